"""Bounds from whole rows: never above the best of a shape, and near it where something binds."""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache
from random import Random

from autopar.schedules import SCHEDULES
from autopar.searchers.stage_shapes import Shape, World, shapes_of
from autopar.simulator.pipeline import Instant, PairLinks, StageCost, StageMemory
from autopar.simulator.stage_problem import (
    Alternative,
    Layout,
    Pool,
    StageProblem,
    Unit,
    value_of,
)
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
        gradient = lru_cache(maxsize=None)(lambda m: [self._for(kind, m) for kind in kinds])
        size = random.randint(0, 60)
        whole = sum(sum(kinds[kind][6:]) for kind in order)
        limit = max(40, round(random.uniform(0.3, 1.5) * whole / devices))
        links = random.choice([Instant(), PairLinks(50, 1)])
        self.problem = StageProblem(
            units=lambda m: tuple(
                Unit(f"unit {u}", gradient(m)[kind], (u - 1,) if u else (), size // m)
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
    for seed in range(36):
        problem = (
            RandomStages(seed).problem
            if seed % 3 == 0
            else Repeated(seed, tuple(SCHEDULES)).problem
        )
        best = best_of_shapes(problem)
        for key, shape in chain_shapes(problem):
            best_s = best.get(key, math.inf)
            before_s = shape.bound_s
            shape.bound_by_rows((1.5 if seed % 2 else 10) * best_s)
            assert shape.bound_s <= best_s * (1 + 1e-12), (seed, key)
            name = shape.schedule.name
            seen[name, "checked"] += 1
            seen[name, "better"] += shape.bound_s > 1.01 * before_s and math.isfinite(best_s)
            seen[name, "near"] += shape.bound_s > 0.97 * best_s and math.isfinite(best_s)
            seen[name, "nothing fits"] += math.isinf(shape.bound_s)
    for name in SCHEDULES:
        for what in ("better", "near", "nothing fits"):
            assert seen[name, what], (name, what, seen)
