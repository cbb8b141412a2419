"""What several stages cost is what their parts cost, played on their rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise
from random import Random

import pytest

from autopar.api import machine
from autopar.errors import AutoparError
from autopar.ir.graph import Operator, Role
from autopar.ir.rule import NOTHING
from autopar.ir.schedule import Action
from autopar.ir.sharding import Mesh
from autopar.ir.strategy import Stage, Strategy
from autopar.schedules import SCHEDULES
from autopar.simulator.costs import Costs
from autopar.simulator.edges import carries_gradient
from autopar.simulator.microbatches import Division, division
from autopar.simulator.pipelines import PricedPipeline, StagePrices, evaluate_stages
from autopar.simulator.prices import evaluate
from autopar.simulator.row_memory import MOST_UNDER_WAY
from autopar.simulator.stage_memory import StageBytes
from autopar.simulator.staged import (
    block_starts,
    even_cuts,
    even_starts,
    runs,
    stack_starts,
    staged,
)
from autopar.simulator.stages import Move, pipelined
from benchmarks.transformer import Experts, Transformer
from tests.helpers.cases import case, divided
from tests.helpers.fake_prices import FakePrices
from tests.helpers.random_graphs import Builder
from tests.helpers.staged_plans import ALONE, blocks, chain
from tests.helpers.stages import PAIR, in_order, looped, strategy_of
from tests.helpers.strategies import one_stage, replicate

PRICES = FakePrices(devices=8)


def priced(strategy: Strategy) -> PricedPipeline:
    of = division(blocks(), strategy.microbatches)
    return PricedPipeline(pipelined(of, strategy), StagePrices(PRICES))


# ---- time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble_h1"])
@pytest.mark.parametrize("name", ["gpt", "unet", "dlrm"])
def test_stages_compute_together_what_one_stage_does(name: str, schedule: str) -> None:
    graph = case(name).graph
    of, alone = divided(graph, 4), replace(replicate(graph, ALONE), microbatches=4)
    whole = evaluate(of.graph, of.rules, PRICES, alone)
    cuts = sorted(Random(name).sample(range(1, len(graph.operators)), 3))
    strategy = staged(graph, runs(graph, cuts), [alone] * 4, schedule, 4)
    found = PricedPipeline(pipelined(of, strategy), StagePrices(PRICES)).stages
    again_s = {"forward_compute_s": 0.0, "backward_compute_s": 0.0}
    if schedule == "zero_bubble_h1":
        again_s["backward_compute_s"] = sum(map(partial(read_again_s, of), of.graph.operators))
        assert again_s["backward_compute_s"] >= 0
    for kind, more_s in again_s.items():
        parts = sum(getattr(stage.parts, kind) for stage in found)
        assert 4 * parts == pytest.approx(getattr(whole, kind) + 4 * more_s)
    assert sum(stage.parts.optimizer_s for stage in found) == pytest.approx(whole.optimizer_s)


def read_again_s(of: Division, operator: Operator) -> float:
    """What gradients of inputs and of parameters take apart more than together."""
    tensors = [of.graph.by_name[name] for name in operator.inputs]
    if not carries_gradient(of.graph, operator):
        return 0.0
    ways = [
        tuple(t.differentiable and (t.role is Role.PARAMETER) in kinds for t in tensors)
        for kinds in ((True,), (False,), (True, False))
    ]
    costs, bound = Costs(PRICES, ALONE), of.rules[operator.name]
    weights, inputs, both = (costs.operator_s(bound, (NOTHING,), way)[1] for way in ways)
    return weights + inputs - both


def test_a_backward_in_two_parts_reads_no_more_than_a_whole_one() -> None:
    """Of a product each of the two gradients is one product, and of a norm the gradient of its
    scale is a kernel of its own, in parts or not."""
    build = Builder()
    x = build.linear(build.input(8, 16), build.parameter(16, 16))
    y = build.layer_norm(build.linear(x, build.parameter(16, 16)))
    graph = build.graph(build.total(y))
    of = divided(graph, 1)
    _, product, norm, _ = graph.operators
    assert read_again_s(of, product) == 0
    assert read_again_s(of, norm) == pytest.approx(0)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_the_parts_of_the_critical_path_are_the_step(schedule: str) -> None:
    found = priced(chain(4, schedule)).estimate()
    assert found.pipeline is not None
    assert found.step_time_s == pytest.approx(
        found.forward_compute_s
        + found.backward_compute_s
        + found.forward_communication_s
        + found.backward_communication_s
        + found.gradient_synchronisation_s
        + found.optimizer_s
        + found.pipeline.transfer_s
    )
    for row in found.pipeline.rows:
        assert row.forward_s + row.backward_s + row.update_s + row.idle_s == pytest.approx(
            found.step_time_s
        )
        assert 0 <= row.bubble_s <= row.idle_s * (1 + 1e-9)


def test_a_backward_is_the_gradients_of_inputs_and_those_of_parameters() -> None:
    for stage in priced(chain(4, "zero_bubble_h1")).stages:
        cost = stage.cost
        assert cost.input_gradient_s is not None and cost.weight_gradient_s is not None
        assert cost.backward_s == pytest.approx(cost.input_gradient_s + cost.weight_gradient_s)
        assert min(cost.input_gradient_s, cost.weight_gradient_s) >= 0
    _, middle, *_ = priced(chain(4, "zero_bubble_h1")).stages
    # a product gives both in the same time; what lies between two has no parameters, which in turn
    # have gradients that are added up
    own = [t for t in middle.part.graph.parameters if t.differentiable]
    sums_s = sum(7 / 8 * PRICES.work["memory"] * 3 * t.spec.bytes for t in own)
    assert middle.parts.weight_compute_s - sums_s < middle.parts.input_compute_s


def test_stages_that_are_alike_are_priced_once() -> None:
    prices = StagePrices(PRICES)
    of = division(blocks(), 8)
    PricedPipeline(pipelined(of, chain(8)), prices).estimate()
    assert len(prices._known) == 3  # the first, those between, the last
    PricedPipeline(pipelined(of, chain(8, "gpipe")), prices).estimate()
    assert len(prices._known) == 3


def test_promised_collectives_have_the_names_of_their_own_stage() -> None:
    strategy = looped_pair("1f1b", 4)
    found = evaluate_stages(divided(case("gpt").graph, 4), FakePrices(devices=8), strategy)
    assert found.pipeline is not None
    graph = case("gpt").graph
    for row in found.pipeline.rows:
        own = {name for n in row.stages for name in strategy.stages[n].operators}
        own |= {name for o in graph.operators if o.name in own for name in (*o.inputs, *o.outputs)}
        reasons = {c.reason for c in row.collectives} - {"loss", "gradient norm"}
        assert reasons and reasons <= own


def looped_pair(schedule: str, groups: int) -> Strategy:
    of = divided(case("gpt").graph, 4)
    return strategy_of(of, in_order(of.graph, groups), looped(groups, PAIR), schedule)


def test_a_group_is_priced_by_where_its_devices_are() -> None:
    """Two stages of two devices each on two hosts of two: each in a host, or across."""
    cost_model = machine("2x2xh100-sxm")
    graph = blocks()
    of = division(graph, 4)
    like = replicate(graph, PAIR)
    splits = {o.name: (of.choices[o.name],) for o in graph.operators}
    near = staged(
        graph, runs(graph, even_cuts(graph, 2)), [replace(like, splits=splits)] * 2, "1f1b", 4
    )
    across = replace(
        near,
        stages=tuple(
            replace(stage, devices=devices)
            for stage, devices in zip(near.stages, ((0, 2), (1, 3)), strict=True)
        ),
    )
    costs = [
        PricedPipeline(pipelined(of, s), StagePrices(cost_model)).stages for s in (near, across)
    ]
    for inside, outside in zip(*costs, strict=True):
        assert outside.parts.reduction_s > inside.parts.reduction_s > 0
        assert outside.parts.forward_compute_s == inside.parts.forward_compute_s


def test_slow_links_between_stages_make_the_step_longer() -> None:
    of, strategy = division(blocks(), 8), chain(4)
    times = []
    for seconds_a_byte in (0.0, 1e-9, 1e-8):
        kinds = dict.fromkeys(("all_reduce", "all_gather", "reduce_scatter", "all_to_all"), 1e-15)
        prices = FakePrices(devices=8, collectives={**kinds, "send": seconds_a_byte})
        times.append(evaluate_stages(of, prices, strategy).step_time_s)
    assert times[0] < times[1] < times[2]


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("name", ["gpt_tied", "unet", "dlrm"])
def test_peaks_are_those_of_a_plain_walk_over_the_instructions(name: str, schedule: str) -> None:
    chunks = 2 if schedule in ("interleaved_1f1b", "looped_bfs") else 1
    of = divided(case(name).graph, 4)
    operators = in_order(of.graph, 2 * chunks)
    strategy = strategy_of(of, operators, looped(2, PAIR, chunks), schedule, Random(5))
    found = PricedPipeline(pipelined(of, strategy), StagePrices(FakePrices()))
    for row, memory in enumerate(found.memories):
        assert memory.total_bytes == walked(found, row)


def walked(found: PricedPipeline, row: int) -> int:
    """The most that a row's devices hold, instruction by instruction; in total bytes."""
    plan = found.plan
    stages = {a.stage: found._bytes(a.stage) for a in plan.rows[row]}
    always = sum(sum(of.always) for of in stages.values())
    saved: Counter[tuple[int, int]] = Counter()
    between: Counter[tuple[int, int]] = Counter()
    waiting: Counter[tuple[object, int, bool]] = Counter()
    under_way: dict[tuple[object, bool], list[int]] = {}
    have_gradients: set[int] = set()
    most = 0

    def other() -> int:
        return (
            sum(saved.values())
            + sum(between.values())
            + sum(waiting.values())
            + sum(size for sent in under_way.values() for size in sent[-MOST_UNDER_WAY:])
            + sum(sum(stages[s].gradients) for s in have_gradients)
        )

    for one in plan.instructions(row):
        if isinstance(one, Move):
            move_along(found, one, row, waiting, under_way)
            continue
        assert isinstance(one, Action)
        of: StageBytes = stages[one.stage]
        place = one.stage, one.microbatch
        for b in plan.boundaries:
            there = b.target if one.kind == "F" else b.source
            if there == one.stage and one.kind != "W":
                waiting.pop((b, one.microbatch, one.kind != "F"), None)
        saved.pop(place, None)
        if one.kind == "W":
            between.pop(place)
        last = one.kind in ("B", "W")
        first = last and one.stage not in have_gradients
        moment = of.first if first else of.moments[one.kind]
        with_gradients = sum(of.gradients) if last and not first else 0
        most = max(most, other() + sum(moment.held) - with_gradients)
        if one.kind == "F":
            saved[place] = sum(of.saved)
        elif one.kind == "I":
            between[place] = sum(of.for_weights)
        else:
            have_gradients.add(one.stage)
    left = sum(size for sent in under_way.values() for size in sent[-MOST_UNDER_WAY:])
    return always + max(most, *at_the_end(found, row, stages, left))


def move_along(
    found: PricedPipeline,
    move: Move,
    row: int,
    waiting: Counter[tuple[object, int, bool]],
    under_way: dict[tuple[object, bool], list[int]],
) -> None:
    plan, b = found.plan, move.boundary
    inside = move.source_row == move.target_row
    if move.target_row == row and (move.backward or not inside):
        size = plan.held_bytes(b, at_source=move.backward)
        waiting[b, move.microbatch, move.backward] = size
    if move.source_row == row and not inside:
        if move.backward:
            place = list(plan.parts[b.target].given).index(b.tensor)
            of = found.stages[b.target].bytes
            copied = plan.flow(b, backward=True, strides=of.given_back[place]).copied_bytes
            own = of.first_given[place] == place
            size = copied or own * plan.held_bytes(b, at_source=False)
        else:
            place = list(plan.parts[b.source].ends).index(b.tensor)
            strides = found.stages[b.source].bytes.departs[place]
            copied = plan.flow(b, backward=False, strides=strides).copied_bytes
            size = 0 if b.gradient else copied
        under_way.setdefault((b, move.backward), []).append(size)


def at_the_end(
    found: PricedPipeline, row: int, stages: dict[int, StageBytes], left: int
) -> list[int]:
    totals = []
    numbers = sorted(stages)
    for i, stage in enumerate(numbers):
        done = sum(sum(stages[s].reduced) for s in numbers[:i])
        to_do = sum(sum(stages[s].gradients) for s in numbers[i + 1 :])
        totals.append(left + done + to_do + sum(stages[stage].moments["R"].held))
    reduced = sum(sum(of.reduced) for of in stages.values())
    exchanged = 0  # beside what was reduced
    for of in found.plan.shared:
        own = of.kinds_in(row)
        for kind in own:
            size = of.piece_bytes(kind)
            totals.append(left + reduced + exchanged + size)
            exchanged += size - size * len(of.kinds[kind].stages_in(row))
        if own and len(of.kinds) > 1:
            sums = sum(map(of.piece_bytes, own))
            sent = list(of.sent(found.plan.groups))
            for device in found.plan.groups[row]:
                arriving = sum(one.bytes for one in sent if one.receiver == device)
                copied = sum(one.copied_bytes for one in sent if one.sender == device)
                totals.append(left + reduced + exchanged + arriving + max(sums, copied))
    for stage in numbers:
        others = reduced - sum(stages[stage].reduced)
        totals.append(others + exchanged + sum(stages[stage].moments["U"].held))
    return totals


def test_a_stage_keeps_as_many_microbatches_as_its_row_has_in_flight() -> None:
    rows = priced(chain(4, "1f1b")).estimate().pipeline.rows  # type: ignore[union-attr]
    assert [row.most_in_flight for row in rows] == [4, 3, 2, 1]
    kept = [row.memory.activations_bytes for row in rows[1:3]]
    assert kept[0] > kept[1]
    all_at_once = priced(chain(4, "gpipe")).estimate()
    assert all_at_once.peak_memory_bytes > priced(chain(4, "1f1b")).estimate().peak_memory_bytes


# ---- writing strategies --------------------------------------------------------------------------


def test_cuts_are_where_blocks_begin() -> None:
    graph = blocks()
    starts = block_starts(graph)
    assert len(starts) == 8  # the first layer, which has no gradient to give back, is another
    assert set(even_cuts(graph, 4)) <= set(starts)
    lengths = [len(run) for run in runs(graph, even_cuts(graph, 4))]
    assert sum(lengths) == len(graph.operators)
    assert lengths == [9, 6, 6, 7]  # the first layer, and the loss


def test_ends_count_as_blocks_only_where_stages_are_even_with_them() -> None:
    """126 blocks are 128 stages with embedding and loss, and 94 are 48 of two."""
    for copies, stages in ((126, 128), (126, 32), (94, 48), (94, 8)):
        starts = even_starts(copies, stages)
        sizes = [b - a for a, b in pairwise(starts)]
        each = (copies + 2) // stages
        assert sizes == [each - 1, *[each] * (stages - 2), each - 1]
    for copies, stages in ((96, 8), (61, 16), (10, 4), (7, 1)):
        sizes = [b - a for a, b in pairwise(even_starts(copies, stages))]
        assert sum(sizes) == copies and max(sizes) - min(sizes) <= 1


def test_blocks_that_follow_each_other_are_one_stack() -> None:
    """Layers with an MLP before layers with experts; each end may be a stage."""
    model = Transformer(6, 32, 4, 4, 64, 64, 16, experts=Experts(4, 2, 32, after=2))
    graph = replace(model, gated=True, biased=False, tied=False).graph(2)
    starts = stack_starts(graph)
    assert [graph.operators[start].name.split(".")[1] for start in starts] == list("012345")
    assert len(block_starts(graph)) == 4
    alone = runs(graph, even_cuts(graph, 8))
    layers = [{name.split(".")[1] for name in run if name.startswith("blocks")} for run in alone]
    assert layers == [set(), *({number} for number in "012345"), set()]


def test_groups_of_devices_are_filled_one_after_the_other() -> None:
    strategy = chain(4, "interleaved_1f1b", 8, chunks=2)
    assert [stage.devices for stage in strategy.stages] == [(0,), (1,), (0,), (1,)]
    assert isinstance(strategy.stages[0], Stage)
    assert chain(4, "chimera").stages[3].devices == (3,)


def test_what_cannot_be_stages_is_refused_with_what_would_do() -> None:
    graph = blocks()
    like = replicate(graph, ALONE)
    with pytest.raises(AutoparError, match="8 equal blocks, which cannot be 9 stages"):
        even_cuts(graph, 9)
    with pytest.raises(AutoparError, match="leave a stage empty"):
        runs(graph, (3, 3))
    with pytest.raises(AutoparError, match="need as many strategies to be like, not 1"):
        staged(graph, runs(graph, (3,)), [like], "1f1b", 2)
    with pytest.raises(AutoparError, match="no schedule is called '2f2b'"):
        staged(graph, runs(graph, (3,)), [like] * 2, "2f2b", 2)
    with pytest.raises(AutoparError, match="a number of stages that 2 divides"):
        staged(graph, runs(graph, (3, 6)), [like] * 3, "looped_bfs", 2)
    wide = replicate(graph, Mesh((("a", 2),)))
    with pytest.raises(AutoparError, match="share a group of devices, and have meshes of 1 and 2"):
        staged(graph, runs(graph, (3,)), [like, wide], "looped_bfs", 2)
    assert one_stage(graph, ALONE, {}, {}).mesh == ALONE
