"""The critical path is what a step waits for: it fills it, and only it matters."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest

from autopar.schedules import SCHEDULES
from autopar.simulator.critical_path import critical_path, shares_of_step
from autopar.simulator.pipeline import (
    PairLinks,
    Pipeline,
    PortLinks,
    StageCost,
    Synchronisation,
    chain,
    equal_stages,
)
from autopar.simulator.timeline import simulate
from tests.helpers.pipelines import RandomWorld


def test_the_path_fills_the_step_without_gaps() -> None:
    kinds = set()
    for seed in range(300):
        world = RandomWorld(seed)
        timeline = simulate(world.rows, world.pipeline)
        path = critical_path(timeline)
        assert path[0].start_s == 0
        assert path[-1].end_s == timeline.step_time_s
        assert all(a.end_s == b.start_s for a, b in pairwise(path))
        assert len({piece.task for piece in path}) == len(path)
        assert sum(shares_of_step(timeline).values()) == timeline.step_time_s
        kinds |= {piece.kind for piece in path}
    assert kinds == {"F", "B", "I", "W", "U", "send", "exchange", "norm"}


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_fills_the_step_in_floats_too(name: str) -> None:
    schedule = SCHEDULES[name]
    stages = schedule.stages(4)
    pipeline = Pipeline(
        (StageCost(0.1, 0.23, 0.05, 0.12, 0.11),) * stages,
        chain(stages, 100),
        PortLinks(3e3, 0.013),
        tuple(Synchronisation((s,), 0.7, parts=3) for s in range(stages)),
    )
    timeline = simulate(schedule(stages, 8), pipeline)
    path = critical_path(timeline)
    assert path[0].start_s == 0
    assert path[-1].end_s == timeline.step_time_s
    assert all(a.end_s == b.start_s for a, b in pairwise(path))


def test_what_is_not_on_the_path_may_become_a_little_slower() -> None:
    tried = 0
    for seed in range(200):
        world = RandomWorld(seed)
        pipeline = replace(world.pipeline, network=PairLinks(Fraction(3), Fraction(1)))
        timeline = simulate(world.rows, pipeline)
        path = [piece for piece in critical_path(timeline) if len(piece.kind) == 1]
        busy = {timeline.arrangement.action(piece.task).stage for piece in path}
        for stage in set(range(len(pipeline.stages))) - busy:
            stages = list(pipeline.stages)
            cost = stages[stage]
            stages[stage] = replace(cost, forward_s=cost.forward_s + Fraction(1, 10**9))
            slower = replace(pipeline, stages=tuple(stages))
            assert simulate(world.rows, slower).step_time_s == timeline.step_time_s
            tried += 1
    assert tried > 20


def test_a_slow_stage_and_a_slow_link_are_found() -> None:
    rows = SCHEDULES["1f1b"](4, 16)
    plain = equal_stages(4, 1, 2)
    stages = (plain.stages[0], StageCost(10, 20, 0), *plain.stages[2:])
    slow_stage = simulate(rows, replace(plain, stages=stages))
    on_stage_1 = [p for p in critical_path(slow_stage) if p.row == 1]
    assert sum(p.end_s - p.start_s for p in on_stage_1) == 16 * 30
    slow_link = simulate(rows, replace(plain, network=PairLinks(Fraction(1), Fraction(50))))
    assert shares_of_step(slow_link)["send"] > slow_link.step_time_s / 2
