"""A step in stages trains as one process does, and does what its rows say and no more."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from autopar import api
from autopar.errors import AutoparError
from autopar.ir.plan import Plan, plan_from_json, plan_to_json
from autopar.ir.schedule import Action
from autopar.ir.sharding import Mesh
from autopar.ir.strategy import Strategy, Training
from autopar.runtime import pipeline
from autopar.runtime.launch import run_stages
from autopar.simulator.stages import pipelined
from tests.helpers import fake_plans
from tests.helpers.cases import Case, call, case, divided, relative
from tests.helpers.fake_prices import FakePrices
from tests.helpers.pool import pool
from tests.helpers.stage_check import CHUNKS, check, tower_of
from tests.helpers.stages import ALONE, PAIR, Layout, by, in_order, looped, strategy_of
from tests.helpers.strategies import kept
from tests.helpers.zoo import zoo

pytestmark = pytest.mark.distributed

CLIPPED = Training("momentum", clip_norm=0.5)


@pytest.mark.parametrize("name", ["gpt_tied", "unet"])
@pytest.mark.parametrize("schedule", CHUNKS)
def test_every_schedule_trains_as_one_process(schedule: str, name: str) -> None:
    of = divided(case(name).graph, 4)
    layout = looped(4, ALONE, CHUNKS[schedule])
    operators = in_order(of.graph, len(layout.meshes))
    check(case(name), strategy_of(of, operators, layout, schedule))


@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("schedule", CHUNKS)
def test_so_it_does_with_zero_inside_stages(schedule: str, zero: int) -> None:
    of = divided(case("gpt_tied").graph, 4)
    layout = looped(2, PAIR, CHUNKS[schedule])
    operators = in_order(of.graph, len(layout.meshes))
    strategy = strategy_of(of, operators, layout, schedule, zero=zero, training=CLIPPED)
    check(case("gpt_tied"), strategy)


@pytest.mark.parametrize("name", ["gpt_tied", "unet"])
@pytest.mark.parametrize("schedule", CHUNKS)
def test_so_it_does_with_random_splits_inside_stages(schedule: str, name: str) -> None:
    of = divided(case(name).graph, 4)
    layout = looped(2, PAIR, CHUNKS[schedule])
    operators = in_order(of.graph, len(layout.meshes))
    rng = Random(f"{schedule} {name}")
    check(case(name), strategy_of(of, operators, layout, schedule, rng, training=CLIPPED))


def test_so_it_does_with_tensor_parallel_blocks() -> None:
    """Column then row parallel products."""
    of = divided(case("gpt").graph, 4)
    kinds = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    prices = FakePrices(devices=2, collectives=dict.fromkeys(kinds, 1e-15))
    tried = api.search(case("gpt").graph, topology=prices, mesh=(2,), microbatches=4).trials
    (megatron,) = (t.strategy for t in tried if t.name == "megatron" and t.strategy)
    # all collectives cost alike here, so the recipe has columns throughout: give it its rows
    splits, storage = dict(megatron.splits), dict(megatron.storage)
    for layer in ("o", "down"):
        for block in range(2):
            assert splits[f"blocks.{block}.{layer}.linear"] == ("out",)
            splits[f"blocks.{block}.{layer}.linear"] = ("in",)
            storage[f"blocks.{block}.{layer}.weight"] = kept(("S(1)",))
    strategy = strategy_of(of, in_order(of.graph, 2), looped(2, megatron.stages[0].mesh), "1f1b")
    check(
        case("gpt"),
        replace(strategy, splits=splits, storage=storage, training=Training("adamw")),
    )


LAYOUTS: Sequence[tuple[int, ...]] = ((1, 2), (2, 1), (1, 2, 1), (1, 1, 2))


@pytest.mark.parametrize("sizes", LAYOUTS)
@pytest.mark.parametrize("name", ["gpt", "unet", "dlrm"])
def test_meshes_of_stages_may_differ(name: str, sizes: tuple[int, ...]) -> None:
    of = divided(case(name).graph, 4)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    layout = Layout(
        tuple(tuple(range(a, a + n)) for a, n in zip(starts, sizes, strict=True)),
        tuple(Mesh((("data", n),)) for n in sizes),
    )
    rng = Random(f"{name} {sizes}")
    operators = in_order(of.graph, len(sizes))
    check(case(name), strategy_of(of, operators, layout, "1f1b", rng))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zero_bubble_h1"])
def test_towers_run_on_devices_of_their_own(schedule: str) -> None:
    """Neither tower waits for the other: they meet in the loss, here on a pair of devices."""
    of = divided(case("two_tower").graph, 1)
    layout = Layout(((0,), (1,), (2, 3)), (ALONE, ALONE, PAIR))
    operators = by(of.graph, tower_of)
    strategy = strategy_of(of, operators, layout, schedule, Random(3))
    check(case("two_tower"), strategy)
    plan = pipelined(of, strategy)
    assert {(b.source, b.target) for b in plan.boundaries} == {(0, 2), (1, 2)}


def test_two_stages_of_one_row_may_lie_differently_on_its_devices() -> None:
    """Then pieces go from device to device inside the row, which no timeline counts."""
    of = divided(case("gpt").graph, 4)
    wide, tall = Mesh((("a", 2), ("b", 1))), Mesh((("a", 1), ("b", 2)))
    layout = Layout(((0, 1), (2, 3)) * 2, (wide, tall, tall, wide))
    operators = in_order(of.graph, 4)
    found = check(case("gpt"), strategy_of(of, operators, layout, "looped_bfs", Random(1)))
    assert len(found) == 4


def test_masks_of_dropout_are_those_of_one_stage() -> None:
    of = case("gpt", dropout=0.3)
    assert max(pool().run(4, masked, of)) < 1e-9


def masked(of: Case) -> float:
    part = divided(of.graph, 4)
    losses = []
    for strategy in (
        strategy_of(part, in_order(of.graph, 4), looped(4, ALONE), "1f1b"),
        strategy_of(part, in_order(of.graph, 2), looped(2, PAIR), "gpipe", Random(2)),
    ):
        model, inputs = zoo(of.name, dropout=of.dropout)
        losses.append(call(run_stages(part, strategy, model), inputs))
    return relative(*losses)


def test_a_backward_in_two_parts_does_each_product_once() -> None:
    """Those that give gradients of weights in its second part."""
    of = divided(case("gpt").graph, 4)
    strategy = strategy_of(of, in_order(of.graph, 2), looped(2, ALONE), "zero_bubble_h1")
    whole = replace(strategy, schedule="1f1b")
    in_parts = pool().run(2, products_by_kind, case("gpt"), strategy)
    at_once = pool().run(2, products_by_kind, case("gpt"), whole)
    for parts, once in zip(in_parts, at_once, strict=True):
        assert parts["F"] == once["F"]
        assert parts["I"] + parts["W"] == once["B"]
        assert parts["W"] == parts["I"] == parts["F"] > 0  # linear layers: two for one


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += func.__name__.split(".")[0] in ("mm", "addmm", "bmm")
        return func(*args, **(kwargs or {}))


def products_by_kind(of: Case, strategy: Strategy) -> Counter[str]:
    counts: Counter[str] = Counter()
    model, inputs = zoo(of.name)
    step = run_stages(divided(of.graph, strategy.microbatches), strategy, model)
    plain = pipeline._Stage.do
    with pytest.MonkeyPatch.context() as patch, Products() as products:

        def counted(stage: Any, action: Action) -> None:
            before = products.count
            plain(stage, action)
            counts[action.kind] += products.count - before

        patch.setattr(pipeline._Stage, "do", counted)
        call(step, inputs)
    return counts


def test_a_plan_of_several_stages_is_run_as_any_other() -> None:
    of = divided(case("mlp").graph, 4)
    strategy = strategy_of(of, in_order(of.graph, 2), looped(2, ALONE), "1f1b")
    plan = replace(fake_plans.plan(), graph=of.whole, strategy=strategy)
    assert plan.world_size == 2
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))).strategy == strategy
    assert pool().run(2, trained_by, plan) == [True, True]
    with pytest.raises(AssertionError, match="is for 2 processes"):
        pool().run(3, trained_by, plan)
    for verb in (api.verify, api.explain):
        with pytest.raises(AutoparError, match="its estimate is not that of a pipeline"):
            verb(plan)


def trained_by(plan: Plan) -> bool:
    model, inputs = zoo("mlp")
    step = api.run(plan, model, lr=0.1)
    expected = call(model, inputs)
    return bool(relative(call(step, inputs), expected.detach()) < 1e-9) and bool(
        call(step, inputs) < expected
    )


def test_parameters_that_stages_share_are_summed_once() -> None:
    """Of a tied embedding, two processes have a copy: each sends its gradient once a step."""
    of = divided(case("gpt_tied").graph, 4)
    strategy = strategy_of(of, in_order(of.graph, 4), looped(4, ALONE), "1f1b")
    (tied,) = (n for n, h in pipelined(of, strategy).holders.items() if len(h) > 1)
    found = check(case("gpt_tied"), strategy)
    size = of.graph.spec(tied).bytes
    assert [one.trace.exchanged_bytes for one in found] == [size, 0, 0, size]
