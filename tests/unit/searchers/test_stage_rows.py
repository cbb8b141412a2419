"""Bounds from whole rows: never above the best of a shape, and near it where something binds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from random import Random

import pytest

from autopar.ir.schedule import Row
from autopar.ir.schedule import Shape as Asked
from autopar.schedules import SCHEDULES
from autopar.searchers.stage_ramps import one_microbatch, through_rows
from autopar.searchers.stage_shapes import Shape, World, keeps_all, shapes_of, splits
from autopar.searchers.stage_ways import mean_along_row, mean_of_ways
from autopar.simulator.pipeline import (
    Instant,
    PairLinks,
    Pipeline,
    StageCost,
    StageMemory,
    chain,
    equal_stages,
)
from autopar.simulator.stage_problem import (
    Alternative,
    Layout,
    Pool,
    StageProblem,
    Unit,
    facts_of,
    rows_of,
    stages_of_rows,
    value_of,
)
from autopar.simulator.timeline import simulate
from tests.helpers.stagings import RandomStages, stagings

SEVERAL_ON_A_ROW = ("interleaved_1f1b", "looped_bfs", "chimera")

Key = tuple[int, str, int, int]


def best_of_shapes(problem: StageProblem) -> dict[Key, float]:
    found: dict[Key, float] = {}
    for staging in stagings(problem):
        value = value_of(problem, staging, problem.units(staging.microbatches))
        if value is not None:
            stages = len(staging.stages)
            key = (staging.microbatches, staging.schedule.name, staging.chunks, stages)
            found[key] = min(found.get(key, math.inf), float(value.time_s))
    return found


def chain_shapes(problem: StageProblem) -> list[tuple[Key, Shape]]:
    return [
        ((m, shape.schedule.name, shape.chunks, shape.stages), shape)
        for m in problem.microbatches
        for shape in shapes_of(World(problem, m))
        if shape.world.is_chain
    ]


class Repeated:
    """A first unit, some blocks (all alike, or two kinds in turn), a last unit, on few devices."""

    def __init__(self, seed: int, schedules: tuple[str, ...] = SEVERAL_ON_A_ROW) -> None:
        self._random = random = Random(seed)
        blocks = random.randint(2, 4)
        devices = random.choice([2, 3, 4])
        self._layouts = sorted(random.sample([1, 2], random.randint(1, 2)))
        kinds = [self._kind(0.3), self._kind(1), self._kind(1), self._kind(0.5)]
        order = [0, *(1 + u % random.choice([1, 1, 2]) for u in range(blocks)), 3]
        ways = lru_cache(maxsize=None)(lambda m: [self._for(kind, m) for kind in kinds])
        size = random.randint(0, 60)
        whole = sum(sum(kinds[kind][6:]) for kind in order)
        limit = max(40, round(random.uniform(0.3, 1.5) * whole / devices))
        links = random.choice([Instant(), PairLinks(50, 1)])
        self.problem = StageProblem(
            units=lambda m: tuple(
                Unit(f"unit {u}", ways(m)[kind], (u - 1,) if u else (), size // m)
                for u, kind in enumerate(order)
            ),
            microbatches=(random.choice([2, 4]),),
            pools=(Pool(devices, limit),),
            network=lambda groups: links,
            exchange_s=lambda size, copies: size // 4,
            schedules=tuple(SCHEDULES[name] for name in schedules),
        )

    def _kind(self, part: float) -> list[int]:
        """Forward, two halves of the backward, update, exchange, whether it can be recomputed, and
        bytes that stay and activations."""
        random = self._random
        numbers = [round(part * random.randint(20, 200)) for _ in range(3)]
        return [
            *numbers,
            *(round(part * random.randint(0, 40)) for _ in range(2)),
            random.randint(0, 1),
            random.randint(4, 40),
            random.randint(10, 120),
        ]

    def _for(self, kind: list[int], m: int) -> tuple[Alternative, ...]:
        forward, inputs, weights, update, exchange, again, static, kept = kind
        found = []
        for devices in self._layouts:
            f, i, w = (-(-4 * n // (m * devices)) + 1 for n in (forward, inputs, weights))
            for recomputed in range(1 + again):
                cost = StageCost(
                    f,
                    i + w + recomputed * f,
                    -(-update // devices),
                    i + recomputed * f,
                    w,
                    StageMemory(static, 0, 0, kept // (devices * (1 + 3 * recomputed))),
                )
                found.append(Alternative(Layout(devices, parts=devices), cost, exchange))
        return tuple(found)


def test_bounds_from_rows_are_below_every_staging_of_the_shape() -> None:
    """Also asked for more than the best, and where nothing fits."""
    seen: Counter[tuple[str, str]] = Counter()
    for seed in range(24):
        problem = (
            RandomStages(seed).problem
            if seed % 3 == 0
            else Repeated(seed, tuple(SCHEDULES)).problem
        )
        best = best_of_shapes(problem)
        for key, shape in chain_shapes(problem):
            best_s = best.get(key, math.inf)
            before_s = shape.bound_s
            within_s = (1.5 if seed % 2 else 10) * best_s
            for bound in (shape.bound_by_rows, shape.bound_by_ways):
                bound(within_s)
                assert shape.bound_s <= best_s * (1 + 1e-12), (seed, key)
            name = shape.schedule.name
            seen[name, "checked"] += 1
            seen[name, "better"] += shape.bound_s > 1.01 * before_s and math.isfinite(best_s)
            seen[name, "near"] += shape.bound_s > 0.97 * best_s and math.isfinite(best_s)
            seen[name, "nothing fits"] += math.isinf(shape.bound_s)
    for name in SCHEDULES:
        for what in ("better", "near", "nothing fits"):
            assert seen[name, what], (name, what, seen)


SHAPES = [
    ("gpipe", 4, 9, 1),
    ("1f1b", 4, 12, 1),
    ("1f1b", 5, 3, 1),
    ("zero_bubble_h1", 4, 12, 1),
    ("interleaved_1f1b", 8, 12, 2),
    ("interleaved_1f1b", 9, 3, 3),
    ("looped_bfs", 8, 8, 2),
    ("looped_bfs", 9, 2, 3),
    ("chimera", 4, 8, 2),
    ("chimera", 8, 8, 4),
    ("chimera", 6, 5, 2),
]


@pytest.mark.parametrize(("name", "stages", "m", "chunks"), SHAPES)
def test_weighted_sums_are_below_every_timeline(
    name: str, stages: int, m: int, chunks: int
) -> None:
    """Whatever the stages take, alike or not."""
    random = Random(stages * m)
    schedule = SCHEDULES[name]
    rows = schedule(stages, m, chunks)
    held = list(dict.fromkeys(stages_of_rows(rows)))
    share = m // (chunks if schedule.copies else 1)
    shares = [dict.fromkeys(of_row, share) for of_row in held]
    asked = schedule, stages, m, chunks
    sums = [
        one_microbatch(held),
        through_rows(held, shares, splits(schedule)),
        *(mean_of_ways(*asked, free) for free in (0.0, 0.5, 1.0)),
        *(mean_along_row(*asked, 0.5, row) for row in range(len(held))),
    ]
    for most in (1, 3, 100):
        for _ in range(5):
            costs = [
                StageCost(f, i + w, u, i, w)
                for f, i, w, u in (
                    [random.randint(1, most) for _ in range(4)] for _ in range(stages)
                )
            ]
            pipeline = Pipeline(tuple(costs), chain(stages), Instant())
            step_s = float(simulate(rows, pipeline).step_time_s)
            for weights in sums:
                backward = [c.input_gradient_s if splits(schedule) else c.backward_s for c in costs]
                total = sum(
                    weights.forward[s] * float(c.forward_s)
                    + weights.backward[s] * float(backward[s] or 0)
                    + weights.put_off[s] * float(c.weight_gradient_s or 0)
                    + weights.tail[s] * float(c.update_s)
                    for s, c in enumerate(costs)
                )
                assert total <= step_s * (1 + 1e-9)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zero_bubble_h1"])
def test_with_a_stage_a_row_no_division_of_the_work_has_a_shorter_ramp_than_equal_stages(
    name: str,
) -> None:
    """Many units, which could be anywhere: still the whole ramp counts."""
    for stages, m in ((2, 8), (4, 16), (8, 24)):
        parts = (1, 1, 1) if name == "zero_bubble_h1" else (1, 2, 0)
        equal_s = simulate(SCHEDULES[name](stages, m), equal_stages(stages, *parts)).step_time_s
        weights = mean_of_ways(SCHEDULES[name], stages, m, 1, 1.0)
        counted = (
            parts[0] * weights.forward + parts[1] * weights.backward + parts[2] * weights.put_off
        )
        assert stages * counted.min() == pytest.approx(float(equal_s), rel=1e-6)


@pytest.mark.parametrize("name", SEVERAL_ON_A_ROW)
def test_with_several_stages_a_row_much_of_the_ramp_counts(name: str) -> None:
    for stages, m, chunks in ((8, 16, 2), (12, 12, 2)):
        rows = SCHEDULES[name](stages, m, chunks)
        equal_s = float(simulate(rows, equal_stages(stages, 1, 2)).step_time_s)
        load_s = 3 * sum(action.kind == "F" for action in rows[0])
        weights = mean_of_ways(SCHEDULES[name], stages, m, chunks, 0.5)
        counted = weights.forward + 2 * weights.backward
        held = dict.fromkeys(stages_of_rows(rows))
        of_rows = [(counted[list(row)].mean() + counted[list(row)].min()) / 2 for row in held]
        assert stages * min(of_rows) - load_s > 0.4 * (equal_s - load_s)


# What the bounds lean on


@pytest.mark.parametrize("name", SCHEDULES)
def test_more_microbatches_keep_no_less_at_some_moment(name: str) -> None:
    schedule = SCHEDULES[name]
    for stages, chunks in ((4, 1), (4, 2), (6, 2), (6, 3), (8, 2), (8, 4), (8, 8)):
        chain_feeds = tuple((i, i + 1) for i in range(stages - 1))
        few: list[dict[int, int]] | None = None
        for m in range(1, 3 * stages + 1):
            if schedule.refuses(Asked(stages, m, chunks)):
                continue
            rows = rows_of(schedule, stages, m, chunks, chain_feeds)
            if few is not None:
                for row, least in zip(rows, few, strict=True):
                    assert any(all(now[s] >= least[s] for s in least) for now in moments(row))
            facts = facts_of(schedule, stages, m, chunks, chain_feeds)
            assert facts is not None
            few = list(facts.at_once)
            if keeps_all(schedule):
                assert all(n == m for of_row in few for n in of_row.values())


def moments(row: Row) -> Iterator[Counter[int]]:
    """What a row keeps of each stage after each forward."""
    now: Counter[int] = Counter()
    for action in row:
        now[action.stage] += {"F": 1, "B": -1, "I": -1}.get(action.kind, 0)
        if action.kind == "F":
            yield Counter(now)


def test_copies_of_a_row_have_the_same_stages() -> None:
    for schedule in SCHEDULES.values():
        for stages, m, chunks in ((4, 4, 2), (8, 8, 2), (8, 8, 4), (12, 12, 6), (6, 6, 1)):
            if not schedule.refuses(Asked(stages, m, chunks)):
                held = Counter(stages_of_rows(schedule(stages, m, chunks)))
                assert set(held.values()) == {chunks if schedule.copies else 1}
                assert sum(len(of_row) for of_row in held) == stages
