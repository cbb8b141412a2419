"""Recipes divide what their names say and keep parameters as they say, on models of all kinds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import pytest

from autopar.ir.graph import OperatorGraph, Role
from autopar.ir.rule import RESERVED
from autopar.ir.search import Budget, Problem, Trial
from autopar.ir.sharding import Sharding
from autopar.ir.strategy import Training
from autopar.ops import bound_rules
from autopar.recipes import RECIPES
from autopar.searchers import ilp
from autopar.simulator.meshes import mesh
from cost_models import cost_model
from cost_models.interface import CostModel
from tests.helpers.fake_prices import FakePrices
from tests.helpers.random_graphs import Builder

ROOT = Path(__file__).parents[3]
MODELS = ("gpt", "llama", "dlrm", "resnet")
BATCH_ONLY = ("data_parallel", "zero1", "zero2", "zero3", "hsdp")
TENSOR = ("megatron", "megatron_sp")


@lru_cache(maxsize=None)
def zoo_graph(name: str) -> OperatorGraph:
    import torch

    from autopar.extractor import extract
    from tests.helpers.zoo import zoo

    model, inputs = zoo(name, dtype=torch.float32)
    return extract(model, inputs, name=name)


@dataclass(frozen=True)
class TwoHosts(FakePrices):
    """Two hosts of two devices, where whatever divides work is faster."""

    work: Mapping[str, float] = field(
        default_factory=lambda: dict.fromkeys(("matmul", "attention", "memory"), 1e-6)
    )

    @property
    def scale_up_devices(self) -> int:
        return 2


def priced(graph: OperatorGraph, prices: CostModel, training: Training) -> dict[str, Trial]:
    """Every recipe's trial, by name."""
    problem = Problem(graph, prices, (mesh((prices.devices,)),), prices.memory_bytes, training)
    trials = ilp.search(problem, Budget()).trials
    return {trial.name: trial for trial in trials if trial.outcome == "recipe"}


@lru_cache(maxsize=None)
def recipes_of(name: str) -> dict[str, Trial]:
    return priced(zoo_graph(name), TwoHosts(), Training("adamw"))


def uses(name: str, trial: Trial, role: Role) -> Iterator[tuple[str, Sharding]]:
    """How every operator wants the tensors of a role."""
    graph = zoo_graph(name)
    rules = bound_rules(graph)
    assert trial.strategy is not None
    for operator in graph.operators:
        wanted, _ = rules[operator.name].shardings(trial.strategy.splits[operator.name])
        for tensor, sharding in zip(operator.inputs, wanted, strict=True):
            if graph.by_name[tensor].role is role:
                yield tensor, sharding


@pytest.mark.parametrize("name", MODELS)
def test_every_recipe_is_defined_for_every_model(name: str) -> None:
    found = recipes_of(name)
    assert found.keys() == RECIPES.keys()
    for trial in found.values():
        assert trial.strategy is not None
        assert trial.estimate is not None
        assert trial.estimate.step_time_s > 0
        assert trial.lower_bound_s <= trial.estimate.step_time_s * (1 + 1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_replicas_divide_nothing_and_communicate_nothing(name: str) -> None:
    trial = recipes_of(name)["replicate"]
    assert trial.strategy is not None
    assert trial.estimate is not None
    assert {c for s in trial.strategy.splits.values() for c in s} <= {"nothing", "replicated"}
    assert trial.estimate.collectives == ()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", BATCH_ONLY)
def test_what_divides_the_batch_uses_parameters_whole(name: str, recipe: str) -> None:
    trial = recipes_of(name)[recipe]
    assert not [
        (tensor, sharding)
        for tensor, sharding in uses(name, trial, Role.PARAMETER)
        if any(placement.startswith("S") for placement in sharding)
    ]
    cut = [sharding for _, sharding in uses(name, trial, Role.INPUT)]
    assert all(placement in ("S(0)", "R", "I") for sharding in cut for placement in sharding)
    assert any("S(0)" in sharding for sharding in cut)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", TENSOR)
def test_what_divides_parameters_leaves_the_batch_to_the_outer_axis(name: str, recipe: str) -> None:
    trial = recipes_of(name)[recipe]
    last = len(trial.mesh.axes) - 1
    for _, sharding in uses(name, trial, Role.INPUT):
        assert sharding[last] != "S(0)"
    for _, sharding in uses(name, trial, Role.PARAMETER):
        assert not any(placement.startswith("S") for placement in sharding[:last])
    assert any(s[last].startswith("S") for _, s in uses(name, trial, Role.PARAMETER))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("recipe", "sharded"), [("data_parallel", 0), ("zero1", 1), ("zero2", 2)])
def test_zero_levels_shard_one_thing_more_each(name: str, recipe: str, sharded: int) -> None:
    """Counted from the optimizer's states over gradients to parameters."""
    strategy = recipes_of(name)[recipe].strategy
    assert strategy is not None
    cut = 0
    for stored in strategy.storage.values():
        kinds = (stored.optimizer, stored.gradient, stored.parameter)
        assert all(kind == ("I",) for kind in kinds[sharded:])
        assert len(set(kinds[:sharded])) <= 1
        cut += any(kind != ("I",) for kind in kinds)
    assert (cut > 0) == (sharded > 0)


@pytest.mark.parametrize("name", MODELS)
def test_fully_sharded_parameters_are_kept_in_pieces_and_replicas_lie_across_hosts(
    name: str,
) -> None:
    found = recipes_of(name)
    full, hybrid = found["zero3"].strategy, found["hsdp"].strategy
    assert full is not None
    assert hybrid is not None
    assert found["hsdp"].mesh.sizes == (2, 2)
    for strategy, axis in ((full, 0), (hybrid, 1)):
        for stored in strategy.storage.values():
            assert stored.parameter == stored.gradient == stored.optimizer
            assert set(stored.parameter[:axis]) <= {"I"}
        cut = [s for s in strategy.storage.values() if s.parameter[axis].startswith("S")]
        assert cut
    assert found["zero3"].estimate is not None
    assert found["data_parallel"].estimate is not None
    kept = (found[r].estimate for r in ("data_parallel", "zero1", "zero2", "zero3"))
    resident = [
        e.memory.parameters_bytes + e.memory.gradients_bytes + e.memory.optimizer_bytes
        for e in kept
        if e is not None
    ]
    assert resident == sorted(resident, reverse=True)
    assert len(set(resident)) > 1


@lru_cache(maxsize=None)
def wide_gpt() -> OperatorGraph:
    """Separate q, k and v; one sample, so that only parameters can be divided."""
    import torch

    from autopar.extractor import extract
    from tests.helpers.zoo import GPT

    with torch.device("meta"):
        model = GPT(vocabulary=32768, length=1024, width=4096, heads=32).to(torch.bfloat16)
        tokens = torch.zeros(1, 1024, dtype=torch.long)
    return extract(model, (tokens, tokens), name="gpt")


def test_megatron_is_columns_then_rows_with_heads_and_a_parallel_vocabulary() -> None:
    graph = wide_gpt()
    trial = priced(graph, cost_model("h100-sxm"), Training("adamw", "mixed"))["megatron"]
    strategy = trial.strategy
    assert strategy is not None
    assert trial.mesh.sizes == (8,)

    def splits(part: str) -> set[tuple[str, ...]]:
        found = {s for name, s in strategy.splits.items() if part in name}
        assert found, part
        return found

    for part in (".q.linear", ".k.linear", ".v.linear", ".up.linear", "head.linear"):
        assert splits(part) == {("out",)}, part
    for part in (".o.linear", ".down.linear"):
        assert splits(part) == {("in",)}, part
    assert splits("scaled_dot_product_attention") == {("heads",)}
    (loss,) = (o for o in graph.operators if "cross_entropy" in o.op)
    wanted, _ = bound_rules(graph)[loss.name].shardings(strategy.splits[loss.name])
    assert wanted[0] == ("S(1)",)
    assert trial.estimate is not None
    logits = next(t for t in loss.inputs if graph.spec(t).shape[-1:] == (32768,))
    moved = {c.reason for c in trial.estimate.collectives}
    assert logits not in moved


@lru_cache(maxsize=None)
def recipes_of_the_example() -> dict[str, Trial]:
    """On two devices between which everything moves slowly."""
    from autopar.extractor.sources import load

    kinds = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    prices = FakePrices(devices=2, collectives=dict.fromkeys(kinds, 1e-8))
    graph = load(str(ROOT / "examples/gpt/model.py")).extract()
    return priced(graph, prices, Training("adamw"))


@pytest.mark.parametrize("recipe", TENSOR)
def test_megatron_is_megatron_where_it_does_not_pay(recipe: str) -> None:
    found = recipes_of_the_example()
    strategy, estimate = found[recipe].strategy, found[recipe].estimate
    assert strategy is not None
    assert estimate is not None
    alone = found["replicate"].estimate
    assert alone is not None
    assert estimate.step_time_s > alone.step_time_s
    wanted = {"query": "out", "key": "out", "value": "out", "out": "in", "up": "out", "down": "in"}
    for block in range(4):
        for name, choice in wanted.items():
            assert strategy.splits[f"blocks.{block}.{name}.linear"] == (choice,)
        assert strategy.splits[f"blocks.{block}.scaled_dot_product_attention"] == ("heads",)
        between = "d1" if recipe == "megatron_sp" else "nothing"
        for norm in ("norm_1", "norm_2"):
            assert strategy.splits[f"blocks.{block}.{norm}.layer_norm"] == (between,)
    assert strategy.splits["tokens.embedding"] == ("vocab",)
    assert strategy.splits["head.linear"] == ("out",)
    assert strategy.splits["cross_entropy_loss"] == ("classes",)


@pytest.mark.parametrize("recipe", TENSOR)
def test_of_a_convolutional_network_megatron_divides_channels(recipe: str) -> None:
    trial = priced(zoo_graph("resnet"), cost_model("1x4xh100-sxm"), Training("sgd"))[recipe]
    assert trial.strategy is not None
    last = len(trial.mesh.axes) - 1
    for name, split in trial.strategy.splits.items():
        if "conv2d" in name or name == "head.linear":
            assert split[last] not in RESERVED, name


def test_a_recipe_of_which_the_model_divides_nothing_is_reported_without_a_strategy() -> None:
    build = Builder()
    graph = build.graph(build.total(build.linear(build.input(3, 5), build.parameter(7, 5))))
    found = priced(graph, FakePrices(), Training("sgd"))
    assert found.keys() == RECIPES.keys()
    possible = {name for name, trial in found.items() if trial.strategy is not None}
    assert possible == {"replicate"}
    for name in RECIPES.keys() - possible:
        assert found[name].estimate is None
        assert found[name].lower_bound_s == float("inf")


def test_a_batch_in_the_second_dim_is_what_data_parallel_divides() -> None:
    """As ``nn.TransformerEncoder`` wants it by default: (sequence, batch, features)."""
    trial = priced(sequences_first(), TwoHosts(), Training("adamw"))["data_parallel"]
    assert trial.strategy is not None
    split = trial.strategy.splits
    assert split["0.layers.0.linear1.linear"] == split["0.layers.0.linear2.linear"] == ("...1",)
    assert split["0.layers.1.norm1.layer_norm"] == ("d1",)
    assert split["0.layers.1.self_attn.scaled_dot_product_attention"] == ("batch0",)


@lru_cache(maxsize=None)
def sequences_first() -> OperatorGraph:
    import torch
    from torch import nn

    from autopar.extractor import extract

    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    return extract(model, (torch.zeros(12, 8, 16),), lambda out, _: out.square().mean())
