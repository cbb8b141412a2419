"""Steps in stages end on networks without tags, and on those where sending waits for the receiver:
any rows of any graph, whatever lies how on which devices."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest

from autopar.ir.schedule import Shape, homes
from autopar.schedules import SCHEDULES
from autopar.simulator.stages import Pipelined
from tests.helpers.networks import Network, Post, Program, programs, random_plan
from tests.helpers.pipelines import RandomWorld

NETWORKS = (frozenset(), frozenset({"send"}), frozenset({"send", "recv"}))


def check(plan: Pipelined) -> int:
    """How many messages it has."""
    found = programs(plan)
    for blocking in NETWORKS:
        assert not Network(found, blocking).play()
    return sum(isinstance(step, Post) and step.side == "send" for of in found for step in of)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_on_random_graphs_of_stages(name: str) -> None:
    messages = sum(map(check, plans_of(name, Random(name))))
    assert messages > 200


def plans_of(name: str, random: Random) -> Iterator[Pipelined]:
    schedule, found = SCHEDULES[name], 0
    while found < 15:
        stages, m = random.randint(2, 7), random.randint(1, 6)
        pairs = [(a, b) for b in range(stages) for a in range(b)]
        feeds = tuple(random.sample(pairs, random.randint(1, len(pairs))))
        chunks = random.randint(2, 4) if schedule.chunks > 1 else 1
        if schedule.refuses(Shape(stages, m, chunks, feeds)) is None:
            rows = schedule(stages, m, chunks, feeds)
            size = random.randint(1, 3)
            sizes = [size if schedule.copies else random.randint(1, 3) for _ in rows]
            found += 1
            ways = [(a, b, random.random() < 0.8) for a, b in feeds]
            yield random_plan(rows, ways, sizes, random)


def test_random_rows_that_can_end_with_copies_of_stages() -> None:
    messages = 0
    for seed in range(100):
        world = RandomWorld(seed)
        feeds = [(f.source, f.target, f.gradient) for f in world.pipeline.feeds]
        if len(set(homes(world.rows))) == len(world.rows):  # each row is the home of some stage
            sizes = [world.random.randint(1, 3)] * len(world.rows)
            messages += check(random_plan(world.rows, feeds, sizes, world.random))
    assert messages > 200


def test_a_network_tells_when_all_wait_for_each_other() -> None:
    first: Program = [Post("send", 1, 0, "a"), Post("recv", 1, 1, "b")]
    second: Program = [Post("send", 0, 0, "b"), Post("recv", 0, 1, "a")]
    crossed = Network([first, second], frozenset({"send"}))
    with pytest.raises(AssertionError):
        crossed.play()
    agreed: Program = [Post("recv", 0, 0, "a"), Post("send", 0, 1, "b")]
    assert not Network([first, agreed], frozenset({"send", "recv"})).play()
    ring: list[Program] = [
        [Post("send", (r + 1) % 3, 0, r), Post("recv", (r - 1) % 3, 1, (r - 1) % 3)]
        for r in range(3)
    ]
    assert len(Network(ring, frozenset({"send", "recv"})).play()) == 3
    assert not Network(ring, frozenset()).play()
