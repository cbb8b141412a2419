"""Step times of many pipelines at once are those of each alone."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from autopar.schedules import SCHEDULES
from autopar.simulator.arrangement import arrange
from autopar.simulator.many_timelines import step_times_s
from autopar.simulator.pipeline import (
    Feed,
    Instant,
    PairLinks,
    Pipeline,
    PortLinks,
    StageCost,
    Synchronisation,
)
from autopar.simulator.timeline import play
from tests.helpers.pipelines import RandomWorld


def in_floats(pipeline: Pipeline, random: Random) -> Pipeline:
    """The same wiring with other times."""

    def time() -> float:
        return random.random() + 0.01

    network = random.choice(
        [PairLinks(1e3, time()), PairLinks(1e3, time()), PortLinks(2e3, time()), Instant()]
    )
    return Pipeline(
        tuple(StageCost(time(), time(), time(), time(), time()) for _ in pipeline.stages),
        tuple(replace(feed, bytes=random.randint(0, 2000)) for feed in pipeline.feeds),
        network,
        tuple(replace(s, time_s=time(), links=()) for s in pipeline.synchronisations),
        None if pipeline.norm_s is None else time(),
    )


def test_random_pipelines_at_once_take_what_each_takes_alone() -> None:
    for seed in range(150):
        world, random = RandomWorld(seed), Random(seed)
        arrangement = arrange(world.rows, world.pipeline.wiring)
        pipelines = [in_floats(world.pipeline, random) for _ in range(random.randint(1, 6))]
        alone = [play(arrangement, pipeline).step_time_s for pipeline in pipelines]
        assert step_times_s(arrangement, pipelines) == alone


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_at_once_takes_what_it_takes_alone(name: str) -> None:
    schedule, random = SCHEDULES[name], Random(name)
    stages = schedule.stages(4)
    base = Pipeline(
        (StageCost(1, 1, 1),) * stages,
        tuple(Feed(s, s + 1, 100) for s in range(stages - 1)),
        Instant(),
        () if schedule.copies else tuple(Synchronisation((s,), 1, 2) for s in range(stages)),
        1,
    )
    arrangement = arrange(schedule(stages, 8), base.wiring)
    pipelines = [in_floats(base, random) for _ in range(20)]
    alone = [play(arrangement, pipeline).step_time_s for pipeline in pipelines]
    assert step_times_s(arrangement, pipelines) == alone


def test_none_at_once_takes_nothing() -> None:
    world = RandomWorld(1)
    assert step_times_s(arrange(world.rows, world.pipeline.wiring), []) == []
