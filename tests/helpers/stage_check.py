"""What every step in stages must do, whatever its schedule, splits and devices."""

from __future__ import annotations

from collections import Counter

from autopar.ir.graph import Operator
from autopar.ir.schedule import Rows, most_in_flight
from autopar.ir.simulation import RowEstimate
from autopar.ir.strategy import Strategy
from autopar.runtime.recorder import Executed
from autopar.simulator.pipeline import Instant, Pipeline, StageCost
from autopar.simulator.pipelines import evaluate_stages
from autopar.simulator.stages import Pipelined, pipelined
from autopar.simulator.timeline import simulate
from tests.helpers.cases import Case, divided
from tests.helpers.fake_prices import FakePrices
from tests.helpers.pool import pool
from tests.helpers.stages import Found, pipeline_outcome

CHUNKS = {
    "gpipe": 1,
    "1f1b": 1,
    "zero_bubble_h1": 1,
    "chimera": 1,
    "interleaved_1f1b": 2,
    "looped_bfs": 2,
}
"""Stages of a group of devices; every member of the shelf."""


def check(of: Case, strategy: Strategy) -> list[Found]:
    """Loss, gradients and parameters are those of one process; actions and their order, collectives
    and bytes those that the estimate promises."""
    division = divided(of.graph, strategy.microbatches)
    plan = pipelined(division, strategy)
    prices = FakePrices(devices=plan.world_size)
    promise = evaluate_stages(division, prices, strategy).pipeline
    assert promise is not None
    found: list[Found] = pool().run(plan.world_size, pipeline_outcome, of, strategy)
    outcome = found[0].outcome
    assert outcome is not None
    assert outcome.loss < 1e-9
    assert outcome.gradient < 1e-9, outcome.worst_gradient
    assert outcome.parameter < 1e-8
    rows, sent = simulated(plan)
    executed: Counter[tuple[int, int]] = Counter()
    for one in found:
        assert tuple(one.trace.actions) == rows[one.row]
        assert one.trace.most_in_flight == most_in_flight(rows[one.row])
        assert one.trace.most_in_flight == promise.rows[one.row].most_in_flight
        assert one.executed == promised(promise.rows[one.row])
        executed += one.trace.sent_bytes
    between = {rows: n for rows, n in executed.items() if rows[0] != rows[1]}
    assert between == {(t.source_row, t.target_row): t.bytes for t in promise.traffic}
    assert between == sent
    return found


def promised(row: RowEstimate) -> dict[Executed, int]:
    found: Counter[Executed] = Counter()
    for one in row.collectives:
        found[Executed(one.kind, one.phase, one.axis, one.bytes)] += one.count
    return dict(found)


def simulated(plan: Pipelined) -> tuple[Rows, dict[tuple[int, int], int]]:
    """The rows of the timeline, and what it sends; with gradients of parameters that stages share
    and keep differently, piece by piece."""
    cost = StageCost(1, 2, 0, 1, 1)
    pipeline = Pipeline((cost,) * len(plan.parts), plan.feeds, Instant())
    timeline = simulate(plan.rows, pipeline)
    sent = Counter(timeline.sent_bytes())
    for shared in plan.shared:
        for one in shared.sent(plan.groups):
            if one.passing.source_row != one.passing.target_row:
                sent[one.passing.source_row, one.passing.target_row] += one.bytes
    return timeline.arrangement.rows, {k: n for k, n in sent.items() if n}


def tower_of(operator: Operator) -> int:
    for number, tower in enumerate(("query", "item")):
        if operator.module.startswith(tower):
            return number
    return 2
