"""Devices that share cores: the timeline is that of cores divided among whoever is busy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest

from autopar.ir.schedule import Action, Rows
from autopar.schedules import SCHEDULES
from autopar.simulator.critical_path import critical_path
from autopar.simulator.pipeline import Feed, Instant, Pipeline, StageCost
from autopar.simulator.pipelines import PricedPipeline, StagePrices
from autopar.simulator.sharing import Alone, alone, shared
from autopar.simulator.stages import pipelined
from autopar.simulator.timeline import simulate
from cost_models.interface import Collective, Work
from tests.helpers.cases import divided
from tests.helpers.fake_prices import FakePrices
from tests.helpers.pipelines import RandomWorld
from tests.helpers.staged_plans import blocks, chain


@dataclass(frozen=True)
class Sharing(FakePrices):
    """Of which a device alone is twice as fast as all together, and so are two of four."""

    speeds: tuple[tuple[int, float], ...] = ((1, 2.0), (2, 2.0))


def divided_plainly(rows: Rows, pipeline: Pipeline, cores: float) -> float:
    """Each busy row gets its share of the cores, at most one: from one end of an action to the
    next."""
    left = {
        action: float(_length(pipeline.stages[action.stage], action.kind))
        for row in rows
        for action in row
    }
    done: set[Action] = set()
    place = [0] * len(rows)
    now = 0.0
    while len(done) < len(left):
        running = [
            row[place[r]]
            for r, row in enumerate(rows)
            if place[r] < len(row) and _waits(row[place[r]], pipeline) <= done
        ]
        speed = min(1.0, cores / len(running))
        passed = min(left[action] for action in running) / speed
        now += passed
        for action in running:
            left[action] -= passed * speed
            if left[action] <= 1e-12:
                done.add(action)
                place[next(r for r, row in enumerate(rows) if action in row)] += 1
    return now


def _length(cost: StageCost, kind: str) -> float:
    return float({"F": cost.forward_s, "B": cost.backward_s, "U": cost.update_s}[kind])


def _waits(action: Action, pipeline: Pipeline) -> set[Action]:
    if action.kind == "F":
        return {
            Action(f.source, "F", action.microbatch)
            for f in pipeline.feeds
            if f.target == action.stage
        }
    if action.kind == "B":
        return {
            Action(f.target, "B", action.microbatch)
            for f in pipeline.feeds
            if f.source == action.stage and f.gradient
        }
    return set()


@pytest.mark.parametrize("cores", [1, 2])
def test_the_step_is_that_of_cores_divided_among_whoever_is_busy(cores: int) -> None:
    for seed in range(12):
        costs = [StageCost(1.0 + (seed * k) % 3, 2.0 + (seed + k) % 4, 0.5) for k in range(4)]
        schedule = SCHEDULES[("gpipe", "1f1b")[seed % 2]]
        pipeline = Pipeline(tuple(costs), _chain(4), Instant())
        rows = schedule(stages=4, microbatches=3 + seed % 5, feeds=pipeline.shape_feeds)
        played = simulate(rows, pipeline)
        found = shared(played, [1] * 4, Alone(on_cores(cores)))
        expected = divided_plainly(played.rows, pipeline, cores)
        assert found.step_time_s == pytest.approx(expected)
        # what is done takes as long as it is busy, and rows do one thing after the other
        for row in range(4):
            parts = found.parts(row)
            assert sum(parts) == pytest.approx(float(found.step_time_s))


def on_cores(cores: int) -> Sharing:
    """Four devices."""
    return Sharing(devices=4, speeds=tuple((k, 4 / max(k, cores)) for k in (1, 2)))


def _chain(stages: int) -> tuple[Feed, ...]:
    return tuple(Feed(k, k + 1, 8) for k in range(stages - 1))


def test_on_one_core_nothing_is_gained_by_devices() -> None:
    pipeline = Pipeline((StageCost(1.0, 2.0, 0.0),) * 4, _chain(4), Instant())
    rows = SCHEDULES["1f1b"](stages=4, microbatches=8, feeds=pipeline.shape_feeds)
    found = shared(simulate(rows, pipeline), [1] * 4, Alone(on_cores(1)))
    assert found.step_time_s == pytest.approx(4 * 8 * 3.0)


def test_a_critical_path_has_no_gaps_and_is_the_step() -> None:
    for seed in range(20):
        world = RandomWorld(seed)
        played = simulate(world.rows, world.pipeline)
        found = shared(played, [1] * len(world.rows), Alone(Sharing(devices=4)))
        pieces = critical_path(found)
        assert pieces[0].start_s == 0
        assert pieces[-1].end_s == pytest.approx(float(found.step_time_s))
        for before, after in pairwise(pieces):
            assert before.end_s == pytest.approx(after.start_s)
        assert 0.9999 <= float(found.step_time_s / played.step_time_s) <= 2.0001


def test_a_plan_is_priced_between_all_alone_and_all_busy() -> None:
    strategy = chain(4)
    plan = pipelined(divided(blocks(), strategy.microbatches), strategy)
    busy, sharing = FakePrices(devices=4), Sharing(devices=4)
    step = PricedPipeline(plan, StagePrices(busy)).step_time_s
    found = PricedPipeline(plan, StagePrices(sharing)).estimate()
    assert step / 2 < found.step_time_s < step
    parts = found.forward_compute_s + found.backward_compute_s + found.forward_communication_s
    parts += found.backward_communication_s + found.gradient_synchronisation_s + found.optimizer_s
    assert found.pipeline is not None
    assert parts + found.pipeline.transfer_s == pytest.approx(found.step_time_s)


def test_prices_of_a_device_alone_are_a_part_of_those_of_all() -> None:
    busy = Sharing(devices=4, latency_s=1e-5)
    lonely = alone(busy)
    work = Work("matmul", "float32", 1e9, 0.0, (1, 8, 8, 8))
    assert lonely.compute_time_s(work) == busy.compute_time_s(work) / 2
    sent = Collective("send", 1000, 2, 1)
    assert lonely.collective_time_s(sent) == busy.collective_time_s(sent) / 2
    assert alone(replace(busy, speeds=())) == replace(busy, speeds=())
