"""No rows are faster than the bound, and the best schedules reach it."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from random import Random

import pytest

from autopar.errors import AutoparError
from autopar.schedules import SCHEDULES
from autopar.simulator.pipeline import (
    Feed,
    PairLinks,
    Pipeline,
    PortLinks,
    StageCost,
    Synchronisation,
    equal_stages,
)
from autopar.simulator.pipeline_bound import least_step_s, shares_of
from autopar.simulator.timeline import simulate
from tests.helpers.pipelines import RandomWorld


def test_random_rows_are_never_faster_than_the_bound() -> None:
    reached = 0
    for seed in range(300):
        split = seed % 2 == 0
        world = RandomWorld(seed, split=split)
        for network in (world.pipeline.network, PairLinks(Fraction(3), Fraction(1))):
            pipeline = replace(world.pipeline, network=network)
            bound = least_step_s(pipeline, shares_of(world.rows), split=split)
            step_s = simulate(world.rows, pipeline).step_time_s
            assert bound <= step_s
            reached += bound == step_s
    assert reached


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_schedule_is_faster_than_the_bound_on_unequal_stages(name: str) -> None:
    schedule = SCHEDULES[name]
    for seed in range(30):
        random = Random(seed)
        devices, m = random.choice([(2, 4), (4, 8), (4, 12), (8, 16)])
        rows = schedule(schedule.stages(devices), m)
        stages = schedule.stages(devices)
        costs = tuple(
            StageCost(f, i + w, u, i, w)
            for f, i, w, u in (
                [Fraction(random.randint(1, 99)) for _ in range(4)] for _ in range(stages)
            )
        )
        feeds = [Feed(s, s + 1, random.randint(0, 99)) for s in range(stages - 1)]
        feeds += [Feed(0, stages - 1, 10, gradient=random.random() < 0.5)]
        exchanges = tuple(Synchronisation((s,), random.randint(0, 300), 3) for s in range(stages))
        pipeline = Pipeline(
            costs,
            tuple(feeds),
            PortLinks(Fraction(random.randint(1, 20)), Fraction(random.randint(0, 5))),
            exchanges,
            random.choice([None, 7]),
        )
        split = any(action.kind == "I" for row in rows for action in row)
        bound = least_step_s(pipeline, shares_of(rows), split=split)
        assert bound <= simulate(rows, pipeline).step_time_s


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"zero_bubble_h1"}))
def test_on_equal_stages_the_bound_is_the_step(name: str) -> None:
    schedule = SCHEDULES[name]
    for p in (2, 4, 8):
        stages = schedule.stages(p)
        for m in (p, 2 * p, 8 * p):
            rows = schedule(stages, m)
            pipeline = equal_stages(stages, 1, 1)
            bound = least_step_s(pipeline, shares_of(rows))
            assert bound == simulate(rows, pipeline).step_time_s


def test_zero_bubble_h1_is_above_the_bound_by_what_it_cannot_fill() -> None:
    for p in (2, 4, 8):
        rows, pipeline = SCHEDULES["zero_bubble_h1"](p, 2 * p), equal_stages(p, 3, 3, 2)
        bound = least_step_s(pipeline, shares_of(rows), split=True)
        assert bound == 2 * p * 8 + (p - 1) * 3
        assert simulate(rows, pipeline).step_time_s == bound + (p - 1) * (3 - 2)


def test_one_slow_stage_sets_the_bound_and_1f1b_reaches_it() -> None:
    for slow in range(4):
        pipeline = equal_stages(4, 1, 2)
        stages = list(pipeline.stages)
        stages[slow] = StageCost(10, 20, 0)
        uneven = replace(pipeline, stages=tuple(stages))
        rows = SCHEDULES["1f1b"](4, 16)
        bound = least_step_s(uneven, shares_of(rows))
        assert bound == 16 * 30 + 3 * slow == simulate(rows, uneven).step_time_s


def test_splitting_needs_times_of_both_halves() -> None:
    pipeline = replace(equal_stages(2, 1, 1), stages=(StageCost(1, 2, 0),) * 2)
    with pytest.raises(AutoparError, match="no times of I and W"):
        least_step_s(pipeline, [{0: 4}, {1: 4}], split=True)
