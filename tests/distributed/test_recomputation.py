"""What is recomputed trains as what is kept, and repeats the collectives that were promised."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from autopar.ir.sharding import Mesh
from autopar.ir.strategy import Strategy, Training
from autopar.runtime.launch import run_stages
from autopar.simulator.microbatches import Division
from autopar.simulator.recomputation import recomputation
from tests.helpers.cases import Case, call, case, divided, promised, run, training_step
from tests.helpers.pool import pool
from tests.helpers.stage_check import check as check_stages
from tests.helpers.stages import (
    ALONE,
    PAIR,
    in_order,
    looped,
    strategy_of,
)
from tests.helpers.step_check import check as check_step
from tests.helpers.strategies import kept, random_strategy, recomputing, replicate
from tests.helpers.zoo import zoo

pytestmark = pytest.mark.distributed

MODELS = ("gpt", "llama", "unet", "two_tower")
DATA_AND_TENSOR = Mesh((("data", 2), ("tensor", 2)))


def check(of: Case, part: Division, strategy: Strategy) -> None:
    """It does recompute, and trains as one process does."""
    assert recomputation(part.graph, part.rules, strategy).again
    check_step(of, strategy)


def splittable(name: str) -> int:
    """Into how many microbatches the tests divide the model's batch."""
    return 1 if name == "two_tower" else 2


@pytest.mark.parametrize("name", MODELS)
def test_alone_and_in_microbatches(name: str) -> None:
    of = case(name)
    for count in {1, splittable(name)}:
        part = divided(of.graph, count)
        strategy = replace(replicate(part.graph, ALONE, Training("sgd")), microbatches=count)
        check(of, part, recomputing(part.graph, part.rules, strategy, Random(name)))


@pytest.mark.parametrize("seed", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_with_random_splits_and_storages_on_four_processes(name: str, seed: int) -> None:
    of, rng = case(name), Random(f"{name} {seed}")
    count = splittable(name) if seed else 1
    part = divided(of.graph, count)
    strategy = random_strategy(part.graph, part.rules, DATA_AND_TENSOR, rng, Training("momentum"))
    strategy = replace(strategy, microbatches=count)
    check(of, part, recomputing(part.graph, part.rules, strategy, rng))


@pytest.mark.parametrize("name", MODELS)
def test_with_zero_3(name: str) -> None:
    """Each operator that is run again gathers its parameters once, for its backward as well."""
    of = case(name)
    part = divided(of.graph, 1)
    strategy = zero_3(part, replicated=name == "two_tower")
    check(of, part, recomputing(part.graph, part.rules, strategy, Random(name)))


def zero_3(part: Division, *, replicated: bool = False) -> Strategy:
    """Over two devices, the batch divided (where it can be)."""
    if not replicated:
        stages = strategy_of(part, in_order(part.graph, 1), looped(1, PAIR), "", zero=3)
        return replace(stages, schedule=None)
    strategy = replicate(part.graph, PAIR, Training("sgd"))
    pieces = {p.name: kept(("S(0)",)) for p in part.graph.parameters if len(p.spec.shape) > 1}
    return replace(strategy, storage=strategy.storage | pieces)


def test_batch_norm_of_split_statistics_is_refused_or_repeated() -> None:
    of = case("resnet")
    part = divided(of.graph, 1)
    for seed in range(2):
        rng = Random(seed)
        strategy = random_strategy(part.graph, part.rules, PAIR, rng, Training("sgd"))
        check(of, part, recomputing(part.graph, part.rules, strategy, rng))


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_masks_of_dropout_are_the_same_again(name: str) -> None:
    of = case(name, dropout=0.3)
    assert max(pool().run(2, differences, of)) < 1e-9


def differences(of: Case) -> float:
    """Between gradients with and without recomputation."""
    part = divided(of.graph, 2)
    strategy = zero_3(part)
    found = []
    for one in (strategy, recomputing(part.graph, part.rules, strategy, Random(1), 0.95)):
        step, inputs = training_step(of, one)
        ran, _ = run(step, inputs)
        found.append({**ran.gradients, "loss": ran.loss})
    kept_, again = found
    return max(float((kept_[name] - again[name]).abs().max()) for name in kept_)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zero_bubble_h1", "chimera"])
@pytest.mark.parametrize("name", ["gpt_tied", "unet"])
def test_in_stages(name: str, schedule: str) -> None:
    """`B` and `I` run again what their microbatch did not keep, whatever came after its `F`."""
    of = case(name)
    part = divided(of.graph, 4)
    rng = Random(f"{name} {schedule}")
    layout = looped(2, PAIR)
    strategy = strategy_of(part, in_order(part.graph, 2), layout, schedule, rng)
    strategy = recomputing(part.graph, part.rules, strategy, rng)
    assert strategy.recompute
    check_stages(of, strategy)


def test_masks_in_stages_are_those_of_their_microbatch() -> None:
    of = case("gpt", dropout=0.3)
    assert max(pool().run(2, differences_in_stages, of)) < 1e-9


def differences_in_stages(of: Case) -> float:
    part = divided(of.graph, 4)
    strategy = strategy_of(part, in_order(part.graph, 2), looped(2, ALONE), "zero_bubble_h1")
    found = []
    for one in (strategy, recomputing(part.graph, part.rules, strategy, Random(3), 0.95)):
        model, inputs = zoo(of.name, dropout=of.dropout)
        step = run_stages(part, one, model)
        loss = call(step, inputs)
        found.append({**step.full_gradients(), "loss": loss})
    kept_, again = found
    return max(float((kept_[name] - again[name]).abs().max()) for name in kept_)


def test_tensor_parallel_blocks_do_not_repeat_their_collectives() -> None:
    """Megatron's: all of a block recomputed, no all-reduce more; repeated, one more for each."""
    of = case("gpt")
    part = divided(of.graph, 1)
    plain = megatron(part)
    blocks = [o for o in part.graph.operators if o.name.startswith("blocks.")]
    inside = tuple(o.name for o in blocks if not o.name.endswith("add_1"))
    once = replace(plain, recompute=inside)
    twice = replace(once, repeat_collectives=("blocks.0.o.linear", "blocks.1.o.linear"))
    for strategy in (once, twice):
        check(of, part, strategy)
    assert promised(part, once) == promised(part, plain)
    more = promised(part, twice) - promised(part, plain)
    assert {(e.kind, e.phase, n) for e, n in more.items()} == {("all_reduce", "backward", 2)}


def megatron(part: Division) -> Strategy:
    """Columns, heads and rows of each block of the zoo's GPT."""
    plain = replicate(part.graph, PAIR, Training("sgd"))
    splits, storage = dict(plain.splits), dict(plain.storage)
    for operator in part.graph.operators:
        name, *_ = operator.name.removesuffix(".linear").split("_")
        layer = name.rpartition(".")[2]
        found = COLUMNS_AND_ROWS.get(layer if ".linear" in operator.name else operator.op)
        if found is None or not operator.name.startswith("blocks."):
            continue
        splits[operator.name] = (found[0],)
        for parameter, sharding in zip(("weight", "bias"), found[1:], strict=False):
            storage[f"{name}.{parameter}"] = kept((sharding,))
    return replace(plain, splits=splits, storage=storage)


COLUMNS_AND_ROWS = {
    **dict.fromkeys(("q", "k", "v", "up"), ("out", "S(0)", "S(0)")),
    **dict.fromkeys(("o", "down"), ("in", "S(1)")),
    "aten.view.default": ("f2",),
    "aten.transpose.int": ("d2",),
    "aten.scaled_dot_product_attention.default": ("heads",),
    "aten.gelu.default": ("d2",),
}
"""Of a block of the zoo's GPT, by layer or op: the factor that is divided, and how the weight and
the bias are kept."""
