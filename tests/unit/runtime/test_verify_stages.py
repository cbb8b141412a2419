"""A dry run of each different process of a pipeline does what was promised; differences show."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from autopar.errors import AutoparError
from autopar.extractor import extract
from autopar.ir.sharding import Mesh
from autopar.ir.simulation import Estimate, RowEstimate
from autopar.ir.strategy import Strategy, Training
from autopar.runtime.pipeline import _Post
from autopar.runtime.verify_stages import StagesReport, alike, verify_stages
from autopar.schedules import SCHEDULES
from autopar.simulator.microbatches import division
from autopar.simulator.pipelines import evaluate_stages
from autopar.simulator.stages import pipelined
from tests.helpers.cases import case, divided
from tests.helpers.fake_prices import FakePrices
from tests.helpers.staged_plans import CLIPPED, blocks, chain, in_two
from tests.helpers.stages import (
    ALONE,
    PAIR,
    Layout,
    by,
    in_order,
    looped,
    strategy_of,
)
from tests.helpers.strategies import kept
from tests.helpers.zoo import zoo

SLOW = pytest.mark.slow


def report_of(
    name: str, strategy: Strategy, rank: int | None = None, estimate: Estimate | None = None
) -> StagesReport:
    of = divided(case(name).graph, strategy.microbatches)
    promised = estimate or evaluate_stages(of, FakePrices(devices=8), strategy)
    return verify_stages(of, strategy, promised, rank=rank)


def checked(name: str, strategy: Strategy) -> StagesReport:
    report = report_of(name, strategy)
    assert report.ok, report.differences
    assert report.typechecked
    assert sorted(r for one in report.ranks for r in one.ranks) == list(range(report.world_size))
    return report


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble_h1", "chimera"])
@pytest.mark.parametrize(
    "recipe",
    ["megatron", "zero3", *(pytest.param(r, marks=SLOW) for r in ("megatron_sp", "zero1"))],
)
def test_recipes_inside_stages_keep_their_promise(recipe: str, schedule: str) -> None:
    report = checked("gpt", in_two("gpt", recipe, schedule))
    assert max(abs(one.memory_error) for one in report.ranks) < 0.05
    if schedule != "zero_bubble_h1":  # the worst device of each row, to a thousandth
        for row in range(2):
            of_row = [one.memory_error for one in report.ranks if one.row == row]
            assert min(map(abs, of_row)) < 0.001


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("name", ["gpt_tied", "unet"])
def test_every_schedule_keeps_its_promise_on_single_devices(name: str, schedule: str) -> None:
    of = divided(case(name).graph, 4)
    chunks = 2 if schedule in ("interleaved_1f1b", "looped_bfs") else 1
    layout = looped(2, ALONE, chunks)
    operators = in_order(of.graph, len(layout.meshes))
    checked(name, strategy_of(of, operators, layout, schedule, training=CLIPPED))


@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=SLOW) for n in ("bert", "t5"))])
def test_other_models_keep_their_promise_divided_at_random(name: str) -> None:
    of = divided(case(name).graph, 2)
    strategy = strategy_of(of, in_order(of.graph, 2), looped(2, PAIR), "1f1b", Random(7))
    report = report_of(name, strategy)
    assert not [text for text in report.differences if "peak memory" not in text]


def test_gradients_that_copies_exchange_in_mixed_precision_are_counted_as_wide() -> None:
    model, inputs = zoo("gpt_tied", dtype=torch.float32)
    graph = extract(model, inputs, name="gpt_tied", precision="mixed")
    of, training = divided(graph, 4), Training("adamw", "mixed", clip_norm=1.0)
    layout = looped(2, PAIR)
    strategy = strategy_of(of, in_order(graph, 2), layout, "chimera", zero=3, training=training)
    estimate = evaluate_stages(of, FakePrices(devices=4), strategy)
    report = verify_stages(of, strategy, estimate)
    assert report.ok, report.differences
    assert max(abs(one.memory_error) for one in report.ranks) < 0.001


class Tied(nn.Module):
    """A table of words at both ends, and next to nothing between."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(512, 16)
        self.between = nn.Linear(16, 16)

    def forward(self, words: torch.Tensor, next_words: torch.Tensor) -> torch.Tensor:
        made = F.linear(self.between(self.words(words)), self.words.weight)
        return F.cross_entropy(made, next_words)


WIDE, TALL = Mesh((("a", 1), ("b", 2))), Mesh((("a", 2), ("b", 1)))


@pytest.mark.parametrize("precision", ["full", "mixed"])
@pytest.mark.parametrize(
    ("schedule", "layout"),
    [
        ("1f1b", Layout(((0,), (1, 2)), (ALONE, PAIR))),
        ("gpipe", Layout(((0, 1), (2,)), (PAIR, ALONE))),
        ("chimera", Layout(((0, 1), (2, 3)), (WIDE, TALL))),
    ],
)
def test_sums_of_shared_gradients_are_counted_where_they_are_the_peak(
    schedule: str, layout: Layout, precision: Literal["full", "mixed"]
) -> None:
    words = torch.arange(4)
    graph = extract(Tied(), (words, words), precision=precision)
    of = divided(graph, 2 if schedule == "chimera" else 1)  # one for each copy of a stage
    training = Training("sgd", precision)
    operators = by(graph, lambda o: int(o.op.startswith(("aten.linear", "aten.cross"))))
    strategy = strategy_of(of, operators, layout, schedule, training=training)
    (first, second), name = strategy.stages, "words.weight"
    axes = len(second.mesh.axes)
    halves = {**second.storage, name: kept(("S(1)",) * axes)}
    strategy = replace(strategy, stages=(first, replace(second, storage=halves)))
    estimate = evaluate_stages(of, FakePrices(devices=4), strategy)
    report = verify_stages(of, strategy, estimate)
    assert report.ok, report.differences
    assert estimate.memory.at in ("exchange of gradients", "words.weight reduction")
    for row in range(2):
        assert min(abs(one.memory_error) for one in report.ranks if one.row == row) < 0.001


def test_a_process_that_does_the_same_as_another_is_not_run() -> None:
    """Of six equal stages in the middle all do the same in gpipe, and differ in 1f1b by how many
    microbatches they have in flight."""
    of = division(blocks(), 8)
    classes = {s: alike(pipelined(of, chain(8, s))) for s in ("gpipe", "1f1b")}
    assert len(classes["1f1b"]) == 8
    assert len(classes["gpipe"]) < 8
    assert sorted(rank for ranks in classes["gpipe"] for rank in ranks) == list(range(8))
    strategy = chain(8, "gpipe")
    estimate = evaluate_stages(of, FakePrices(devices=8), strategy)
    (found,) = {
        len(verify_stages(of, strategy, estimate, rank=rank, typecheck=False).differences)
        for rank in (3, 4)
    }
    assert found == 0


def of_rows(change: Callable[[RowEstimate], RowEstimate]) -> Callable[[Estimate], Estimate]:
    def changed(estimate: Estimate) -> Estimate:
        assert estimate.pipeline is not None
        rows = tuple(map(change, estimate.pipeline.rows))
        return replace(estimate, pipeline=replace(estimate.pipeline, rows=rows))

    return changed


def less_traffic(estimate: Estimate) -> Estimate:
    assert estimate.pipeline is not None
    first, *others = estimate.pipeline.traffic
    traffic = (replace(first, bytes=first.bytes - 8), *others)
    return replace(estimate, pipeline=replace(estimate.pipeline, traffic=traffic))


def more_memory(row: RowEstimate) -> RowEstimate:
    extra = row.memory.total_bytes // 10
    return replace(row, memory=replace(row.memory, buffers_bytes=row.memory.buffers_bytes + extra))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (of_rows(lambda row: replace(row, collectives=row.collectives[1:])), "promised"),
        (of_rows(lambda row: replace(row, most_in_flight=row.most_in_flight + 1)), "in flight"),
        (of_rows(more_memory), "peak memory"),
        (less_traffic, "the strategy needs"),
    ],
    ids=["collectives", "in flight", "memory", "traffic"],
)
def test_what_is_not_as_promised_is_a_difference(
    change: Callable[[Estimate], Estimate], found: str
) -> None:
    strategy = in_two("gpt", "zero1", "1f1b")
    of = divided(case("gpt").graph, 4)
    estimate = evaluate_stages(of, FakePrices(devices=4), strategy)
    assert report_of("gpt", strategy, estimate=estimate).ok
    report = report_of("gpt", strategy, estimate=change(estimate))
    assert not report.ok
    assert all(found in text for text in report.differences)


def test_a_message_too_many_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    original = _Post._send

    def twice(self: _Post, *message: Any) -> Any:
        original(self, *message)
        return original(self, *message)

    strategy = in_two("gpt", "zero1", "1f1b")
    monkeypatch.setattr(_Post, "_send", twice)
    report = report_of("gpt", strategy)
    assert any("bytes from row 0 to row 1 promised" in text for text in report.differences)


def test_one_rank_can_be_asked_for_and_only_one_that_there_is() -> None:
    strategy = in_two("gpt", "zero1", "1f1b")
    report = report_of("gpt", strategy, rank=3)
    assert [one.rank for one in report.ranks] == [3] and report.ok
    data = json.loads(report.to_json())
    assert data["ok"] is True and data["ranks"][0]["row"] == 1
    with pytest.raises(AutoparError, match="the ranks 0 to 3, not for rank 4"):
        report_of("gpt", strategy, rank=4)
