"""What a training step does beside its arithmetic: dropout, precision, memory."""

from __future__ import annotations

import io
from dataclasses import replace
from random import Random

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from autopar.errors import PlanMismatchError
from autopar.extractor import extract
from autopar.ir.graph import OperatorGraph
from autopar.ir.sharding import Mesh
from autopar.ir.strategy import Storage, Strategy, Training
from autopar.ops import bound_rules
from autopar.runtime.lowering import lower
from autopar.runtime.rehearsal import _peak_bytes
from autopar.runtime.step import TrainingStep
from autopar.runtime.storage import from_function, from_module
from autopar.runtime.verify import verify_division
from autopar.simulator.prices import evaluate
from tests.helpers.cases import (
    Case,
    call,
    case,
    communicator_of,
    divided,
    relative,
    run,
    training_step,
)
from tests.helpers.fake_prices import FakePrices
from tests.helpers.pool import pool
from tests.helpers.strategies import one_stage, random_strategy, replicate
from tests.helpers.zoo import zoo

TWO = Mesh((("data", 2),))
FOUR = Mesh((("data", 2), ("tensor", 2)))
CPU = torch.device("cpu")


@pytest.mark.parametrize("mesh", [TWO, FOUR])
def test_dropout_masks_are_those_of_one_rank(mesh: Mesh) -> None:
    of = case("gpt", dropout=0.2)
    strategy = random_strategy(of.graph, bound_rules(of.graph), mesh, Random(7))
    alone = replicate(of.graph, Mesh((("data", 1),)))
    expected = torch.load(io.BytesIO(pool().run(1, trained, of, alone)[0]))
    found = torch.load(io.BytesIO(pool().run(mesh.size, trained, of, strategy)[0]))
    assert relative(found.pop("loss"), expected.pop("loss")) < 1e-9
    for name, value in expected.items():
        assert relative(found[name], value, 1e-3) < 1e-8, name


def trained(of: Case, strategy: Strategy) -> bytes:
    step, inputs = training_step(of, strategy)
    found, _ = run(step, inputs)
    buffer = io.BytesIO()
    torch.save({"loss": found.loss, **found.parameters}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("seed", range(2))
def test_the_peak_of_processes_is_that_of_the_dry_run(seed: int) -> None:
    """What a collective works on is let go of when it is through; now and then its thread lets go a
    moment later than its waiter goes on, so the least of some runs counts."""
    of = case("gpt")
    part = divided(of.graph, 2)
    plain = random_strategy(part.graph, part.rules, FOUR, Random(seed))
    strategy = replace(plain, microbatches=2)
    estimate = evaluate(part.graph, part.rules, FakePrices(), strategy)
    report = verify_division(part, strategy, estimate, typecheck=False)
    assert any("all_gather" in c.kind for c in report.collectives)
    found = [max(pool().run(4, peak_bytes, of, strategy)) for _ in range(8)]
    assert min(found) == pytest.approx(report.measured_peak_bytes, rel=0.01)


def peak_bytes(of: Case, strategy: Strategy) -> int:
    step, inputs = training_step(of, strategy)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    step(*args, **kwargs)
    return _peak_bytes(step, args, kwargs)


def test_mixed_precision_steps_a_master_copy_that_bfloat16_could_not_hold() -> None:
    model, inputs = zoo("mlp", dtype=torch.float32)
    graph = extract(model, inputs, precision="mixed")
    mixed = Training("sgd", precision="mixed")
    strategy = random_strategy(graph, bound_rules(graph), TWO, Random(2), mixed)
    pool().run(2, check_mixed, graph, strategy)


def check_mixed(graph: OperatorGraph, strategy: Strategy) -> None:
    model, inputs = zoo("mlp", dtype=torch.float32)
    communicator = communicator_of(strategy.mesh)
    state = from_module(model, graph, strategy, communicator.rank, CPU)
    program = lower(graph, strategy, bound_rules(graph))
    step = TrainingStep(program, strategy, state, communicator, {"lr": 1e-6})
    loss = call(step, inputs)
    assert relative(loss, call(model, inputs)) < 0.02  # bfloat16 keeps 8 bits
    assert all(p.dtype == torch.bfloat16 for p in state.parameters.values())
    masters = next(group["params"] for group in step.optimizer.param_groups)
    assert all(master.dtype == torch.float32 for master in masters)
    assert any(not torch.equal(m, m.bfloat16().float()) for m in masters)


MIXED = Training("adamw", precision="mixed")


def mixed_case(name: str) -> Case:
    model, inputs = zoo(name, dtype=torch.float32)
    return Case(name, extract(model, inputs, name=name, precision="mixed"))


@pytest.mark.parametrize("seed", [0, 1])
def test_masters_start_from_the_values_of_the_model(seed: int) -> None:
    of = mixed_case("gpt_tied")
    strategy = random_strategy(of.graph, bound_rules(of.graph), FOUR, Random(seed), MIXED)
    assert any(s.parameter != s.optimizer for s in strategy.storage.values())
    pool().run(4, check_first_masters, of, strategy)


def check_first_masters(of: Case, strategy: Strategy) -> None:
    model, _ = zoo(of.name, dtype=torch.float32)
    values = {name: p.detach() for name, p in model.named_parameters()}
    communicator = communicator_of(strategy.mesh)
    rank, program = communicator.rank, lower(of.graph, strategy, bound_rules(of.graph))
    for state in (
        from_module(model, of.graph, strategy, rank, CPU),
        from_function(
            lambda: zoo_model(of.name), of.graph, strategy, rank, CPU, 0, large_elements=0
        ),
    ):
        step = TrainingStep(program, strategy, state, communicator)
        masters, working = step.full_masters(), step.full_parameters()
        assert masters.keys() == values.keys()
        for name, value in values.items():
            assert torch.equal(masters[name], value), name
            assert torch.equal(working[name], value.bfloat16()), name
        assert any(not torch.equal(m, m.bfloat16().float()) for m in masters.values())


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_masters_in_pieces_take_the_steps_of_one_rank(level: int) -> None:
    """Both ranks do the same work, so that not even the order of a sum is different."""
    of = mixed_case("mlp")
    alone = replicate(of.graph, Mesh((("data", 1),)), MIXED)
    both = replicate(of.graph, TWO, MIXED)
    cut = Storage(*(("S(0)",) if level > kept else ("I",) for kept in (2, 1, 0)))
    strategy = replace(both, storage=dict.fromkeys(both.storage, cut))
    expected = torch.load(io.BytesIO(pool().run(1, mixed_steps, of, alone)[0]))
    found = torch.load(io.BytesIO(pool().run(2, mixed_steps, of, strategy)[0]))
    first = {name: p.detach() for name, p in zoo("mlp", dtype=torch.float32)[0].named_parameters()}
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert all(not torch.equal(expected[f"master {name}"], p) for name, p in first.items())


def mixed_steps(of: Case, strategy: Strategy) -> bytes:
    """Three steps: losses, parameters and their masters."""
    model, inputs = zoo(of.name, dtype=torch.float32)
    communicator = communicator_of(strategy.mesh)
    state = from_module(model, of.graph, strategy, communicator.rank, CPU)
    program = lower(of.graph, strategy, bound_rules(of.graph))
    step = TrainingStep(program, strategy, state, communicator)
    found = {f"loss {i}": call(step, inputs) for i in range(3)}
    found |= {f"master {name}": value for name, value in step.full_masters().items()}
    buffer = io.BytesIO()
    torch.save({**found, **step.full_parameters()}, buffer)
    return buffer.getvalue()


def test_a_gathered_parameter_is_not_kept_for_the_backward() -> None:
    of = case("mlp")
    sharded = Storage(("S(0)",), ("S(0)",), ("S(0)",))
    splits = {o.name: ("replicated",) for o in of.graph.operators}
    storage = {p.name: sharded for p in of.graph.parameters}
    strategy = one_stage(of.graph, TWO, splits, storage)
    pool().run(2, check_not_kept, of, strategy)


def check_not_kept(of: Case, strategy: Strategy) -> None:
    step, inputs = training_step(of, strategy)
    assert not isinstance(inputs, dict)
    batch = dict(zip(of.graph.inputs, inputs, strict=True))
    kept: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, _ = step.program(step.execution, step.state.buffers, batch)
    whole = {p.spec.shape for p in of.graph.parameters if len(p.spec.shape) == 2}
    assert not {shape for shape in kept if shape in whole or shape[::-1] in whole}
    with step.communicator.recorder.during("backward"), step.communicator.recorder.recording() as n:
        loss.backward()
    again = sum(c for executed, c in n.items() if executed.kind == "all_gather")
    assert again == 2  # the first layer's input needs no gradient, so its weight is not needed


def test_shards_made_one_by_one_are_those_of_the_model_in_memory() -> None:
    of = case("gpt_tied")
    strategy = random_strategy(of.graph, bound_rules(of.graph), FOUR, Random(1))
    pool().run(4, check_shards, of, strategy)


def check_shards(of: Case, strategy: Strategy) -> None:
    rank = dist.get_rank()
    model, _ = zoo(of.name)
    expected = from_module(model, of.graph, strategy, rank, CPU)
    torch.set_default_dtype(torch.float64)
    try:
        made = from_function(
            lambda: zoo_model(of.name), of.graph, strategy, rank, CPU, 0, large_elements=0
        )
    finally:
        torch.set_default_dtype(torch.float32)
    for name, shard in expected.parameters.items():
        assert torch.equal(shard, made.parameters[name]), name
        assert shard.untyped_storage().nbytes() == shard.numel() * shard.element_size()


def zoo_model(name: str) -> torch.nn.Module:
    from tests.helpers.zoo import ZOO

    model, _ = ZOO[name]()
    return model


def test_a_batch_of_another_size_is_refused() -> None:
    of = case("mlp")
    pool().run(1, check_refused, of, replicate(of.graph, Mesh((("data", 1),))))


def check_refused(of: Case, strategy: Strategy) -> None:
    step, inputs = training_step(of, strategy)
    assert not isinstance(inputs, dict)
    with pytest.raises(PlanMismatchError, match="Every rank passes the whole batch"):
        step(*(x[:4] for x in inputs))
    with pytest.raises(PlanMismatchError, match="2 positional inputs"):
        step(inputs[0])
