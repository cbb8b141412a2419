"""Stagings that are likely to be good: where to cut, and how to do units so that they fit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from autopar.searchers.stage_tables import halves
from autopar.simulator.stage_problem import (
    Alternative,
    Facts,
    Layout,
    StageChoice,
    StageProblem,
    Unit,
    kinds_of,
)


def cuts(weights: Sequence[float], stages: int) -> list[tuple[int, ...]]:
    """Consecutive units in so many parts, of which the heaviest is as light as can be.

    >>> cuts([1, 1, 1, 3], 2)
    [(0, 1, 2), (3,)]
    """
    sums = [0.0, *accumulate(weights)]
    low, high = max(max(weights), sums[-1] / stages), sums[-1]
    for _ in range(40):
        middle = (low + high) / 2
        if len(_filled(sums, middle, stages)) <= stages:
            high = middle
        else:
            low = middle
    parts = _filled(sums, high * (1 + 1e-12), stages)
    while len(parts) < stages:  # an empty part is none: halve the longest
        i = max(range(len(parts)), key=lambda k: len(parts[k]))
        middle_unit = len(parts[i]) // 2
        parts[i : i + 1] = [parts[i][:middle_unit], parts[i][middle_unit:]]
    return parts


def _filled(sums: Sequence[float], most: float, stages: int) -> list[tuple[int, ...]]:
    parts: list[tuple[int, ...]] = []
    start, count = 0, len(sums) - 1
    while start < count and len(parts) <= stages:
        end = start + 1
        while end < count and sums[end + 1] - sums[start] <= most:
            end += 1
        parts.append(tuple(range(start, end)))
        start = end
    return parts


def spread(weights: Sequence[float], held: Sequence[Sequence[int]]) -> list[tuple[int, ...]] | None:
    """Consecutive units in stages so that rows with these stages have about as many units, and so
    have their stages; of a row's stages the first ones have one more where it does not divide.

    Of units that are alike but for the first and the last one. ``None``: there are too few.

    >>> spread([1, 5, 5, 5, 5, 5, 4], [(0, 2), (1, 3)])
    [(0, 1, 2), (3,), (4,), (5, 6)]
    """
    stages, count = 1 + max(map(max, held)), len(weights)
    rows = list(dict.fromkeys(map(tuple, held)))
    between = count - 2
    if between < 0:
        return None
    sizes = [0] * stages
    sizes[0] += 1
    sizes[-1] += 1
    middle = sum(weights[1:-1]) / max(1, between)
    loads = [weights[0] * (0 in row) + weights[-1] * (stages - 1 in row) for row in rows]
    for _ in range(between):  # one more to the row that is done first, and there to the smallest
        row = min(range(len(rows)), key=lambda r: (loads[r], -r))
        loads[row] += middle
        ends = {0: 1, stages - 1: 1}
        sizes[min(rows[row], key=lambda s: (sizes[s] - ends.get(s, 0), s))] += 1
    if min(sizes) < 1:
        return None
    bounds = [0, *accumulate(sizes)]
    return [tuple(range(a, b)) for a, b in pairwise(bounds)]


class _Way(NamedTuple):
    """An alternative of a unit in a stage of a row: what it costs a step, and what it keeps."""

    cost_s: float
    kept_bytes: int
    beside_bytes: int
    place: int


class Filling:
    """Chooses alternatives for one number of microbatches: the cheapest mix that fits, nearly.

    Alternatives are those of the lower hull of (bytes, seconds). All units of a row give up seconds
    for bytes at the same rate, the smallest with which it fits; at that rate as many of them as
    need be.
    """

    def __init__(
        self, problem: StageProblem, units: Sequence[Unit], microbatches: int, split: bool
    ) -> None:
        self._problem, self._split = problem, split
        self._kind_of, self._kinds = kinds_of(units)
        self._counts = sorted(Counter(self._kind_of).items())
        self._microbatches = microbatches
        self._hulls: dict[tuple[int, Layout, int], list[_Way]] = {}
        self._slowdowns: dict[tuple[Layout, int, float], float] = {}

    def stages(
        self,
        parts: Sequence[tuple[int, ...]],
        layouts: Sequence[Layout],
        facts: Facts,
        margin: float,
    ) -> tuple[StageChoice, ...] | None:
        """``margin``: share of memory that is left alone. ``None``: it cannot be done."""
        chosen: dict[int, dict[int, int]] = {}
        copies = self._in_copies(facts)
        for row, of_row in enumerate(facts.held):
            limit = self._problem.limit_bytes[layouts[of_row[0]].kind] * (1 - margin)
            rows_with_one = [[s] for s in of_row] if copies else [list(of_row)]
            kept = facts.in_flight[row] if copies or facts.split else facts.at_once[row]
            for stages in rows_with_one:
                items = [(s, u) for s in stages for u in parts[s]]
                hulls = [self._hull(self._kind_of[u], layouts[s], kept[s]) for s, u in items]
                ways = _fitting(hulls, limit * len(stages) / len(of_row))
                if ways is None:
                    return None
                for (s, u), way in zip(items, ways, strict=True):
                    chosen.setdefault(s, {})[u] = way.place
        return tuple(
            StageChoice(part, layout, tuple(chosen[s][u] for u in part))
            for s, (part, layout) in enumerate(zip(parts, layouts, strict=True))
        )

    def likely_slowdown(self, layout: Layout, in_flight: int, room_bytes: float) -> float:
        """How much longer all units take on one layout when together they are to fit, than in
        their fastest way; infinite if they cannot."""
        key = (layout, in_flight, room_bytes)
        found = self._slowdowns.get(key)
        if found is None:
            found = self._slowdowns[key] = self._likely_slowdown(*key)
        return found

    def _likely_slowdown(self, layout: Layout, in_flight: int, room_bytes: float) -> float:
        hulls = [(count, self._hull(kind, layout, in_flight)) for kind, count in self._counts]
        if not all(hull for _, hull in hulls):
            return math.inf
        kept: float = sum(count * hull[-1].kept_bytes for count, hull in hulls)
        fastest_s = cost_s = sum(count * hull[-1].cost_s for count, hull in hulls)
        steps = sorted(
            (_rate(hull[k], hull[k - 1]), count * (hull[k].kept_bytes - hull[k - 1].kept_bytes))
            for count, hull in hulls
            for k in range(len(hull) - 1, 0, -1)
        )
        for rate, size in steps:
            if kept <= room_bytes:
                break
            part = min(size, kept - room_bytes)
            kept -= part
            cost_s += rate * part
        return cost_s / fastest_s if kept <= room_bytes * (1 + 1e-9) else math.inf

    def _in_copies(self, facts: Facts) -> bool:
        return sum(map(len, facts.held)) > 1 + max(max(of_row) for of_row in facts.held)

    def _hull(self, kind: int, layout: Layout, in_flight: int) -> list[_Way]:
        """From the smallest to the fastest."""
        key = (kind, layout, in_flight)
        found = self._hulls.get(key)
        if found is None:
            ways = sorted(
                self._way(alternative, place, in_flight)
                for place, alternative in enumerate(self._kinds[kind])
                if alternative.layout == layout
                and (not self._split or alternative.cost.input_gradient_s is not None)
            )
            found = []
            for way in ways:  # from the fastest on, each smaller than all before
                if found and way.kept_bytes >= found[-1].kept_bytes:
                    continue
                while len(found) > 1 and _rate(found[-2], found[-1]) >= _rate(found[-1], way):
                    found.pop()
                found.append(way)
            found.reverse()
            self._hulls[key] = found
        return found

    def _way(self, alternative: Alternative, place: int, in_flight: int) -> _Way:
        cost, memory = alternative.cost, alternative.cost.memory
        assert memory is not None
        work_s = sum(halves(cost, self._split))
        static = memory.parameters_bytes + memory.gradients_bytes + memory.optimizer_bytes
        return _Way(
            self._microbatches * work_s
            + float(cost.update_s)
            + float(alternative.synchronisation_s),
            static + memory.activations_bytes * in_flight,
            max(memory.forward_bytes, memory.backward_bytes, memory.update_bytes),
            place,
        )


def _rate(faster: _Way, smaller: _Way) -> float:
    """Seconds for a byte."""
    return (smaller.cost_s - faster.cost_s) / (faster.kept_bytes - smaller.kept_bytes)


def _fitting(hulls: Sequence[list[_Way]], limit_bytes: float) -> list[_Way] | None:
    if not all(hulls):
        return None
    at = [len(hull) - 1 for hull in hulls]  # the fastest
    kept = sum(hull[-1].kept_bytes for hull in hulls)
    # the cheapest exchanges of seconds for bytes first, of equal units the first ones
    steps = sorted(
        (_rate(hull[k], hull[k - 1]), number, k)
        for number, hull in enumerate(hulls)
        for k in range(len(hull) - 1, 0, -1)
    )
    beside = max(hull[-1].beside_bytes for hull in hulls)
    for _, number, k in steps:
        if kept + beside <= limit_bytes:
            break
        hull = hulls[number]
        at[number] = k - 1
        kept += hull[k - 1].kept_bytes - hull[k].kept_bytes
        beside = max(beside, hull[k - 1].beside_bytes)
    if kept + beside > limit_bytes:
        return None
    return [hull[place] for hull, place in zip(hulls, at, strict=True)]
