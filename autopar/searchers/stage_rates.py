"""What a number of rows can do at most, whatever units each of them has.

Give each unit u a value y. A row on n devices that has the units U takes

    sum over U of c_u(n)  <=  B + p M,        c_u(n) = min over alternatives (seconds + p bytes),

where seconds are those of a step, bytes those on a device, M its memory, p >= 0 a price of a byte.
With rate(n) = max over units y_u / c_u(n), all rows together have at most the value
(B + p M) sum rate(n_row), and need that of all units. The rates of R rows on N devices add up to no
more than R hull(N / R), the hull being the concave one over n. So

    B  >=  sum y / (R hull(N / R)) - p M.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from autopar.searchers.stage_mixes import Mixes
from autopar.searchers.stage_tables import halves
from autopar.simulator.stage_problem import StageProblem

Array = NDArray[np.float64]

MOST_PRICES = 6
"""Of a byte that are tried for one bound: each gives a bound, the largest counts."""


class Rates:
    """For rows that do all microbatches of their units. ``waits``: and then wait while gradients
    are exchanged. ``copies``: how many rows have each unit, and share its microbatches."""

    def __init__(
        self,
        problem: StageProblem,
        mixes: Mixes,
        microbatches: int,
        split: bool,
        waits: bool,
        copies: int,
    ) -> None:
        self._devices = problem.devices
        self._limit = max(pool.memory_limit_bytes for pool in problem.pools)
        counts = np.bincount(mixes.kind_of, minlength=len(mixes.kinds)) * copies
        self._counts: Array = counts.astype(np.float64)
        of: dict[tuple[int, int], list[tuple[float, float, float, float]]] = {}
        for number, kind in enumerate(mixes.kinds):
            for a in kind:
                if split and a.cost.input_gradient_s is None:
                    continue
                memory = a.cost.memory
                assert memory is not None
                static = memory.parameters_bytes + memory.gradients_bytes + memory.optimizer_bytes
                # copies have equal shares, but for what does not divide
                share = microbatches // copies
                time_s = share * sum(halves(a.cost, split)) + float(a.cost.update_s)
                time_s += float(a.synchronisation_s) * waits
                work_s = time_s
                if copies > 1:
                    work_s = microbatches / copies * sum(halves(a.cost, split))
                kept = (time_s, static, memory.activations_bytes, work_s)
                of.setdefault((number, a.layout.devices), []).append(kept)
        sizes = sorted({devices for _, devices in of})
        most = max(map(len, of.values()), default=1)
        self._sizes: Array = np.array(sizes, dtype=np.float64)
        table = np.full((4, len(mixes.kinds), len(sizes), most), math.inf)
        for (number, devices), ways in of.items():
            for place, way in enumerate(ways):
                table[:, number, sizes.index(devices), place] = way
        self._time_s, self._static, self._activations, self._work_s = table
        self._found: dict[tuple[int, int, bool], float] = {}

    def bound_s(self, rows: int, in_flight: int, priced: bool) -> float:
        """``in_flight``: microbatches that every stage keeps at least. ``priced``: with prices of
        bytes, which takes longer."""
        key = (rows, in_flight, priced)
        if key not in self._found:
            self._found[key] = self._bound_s(*key)
        return self._found[key]

    def _bound_s(self, rows: int, in_flight: int, priced: bool) -> float:
        each = self._devices / rows
        here = int(np.searchsorted(self._sizes, each, side="right")) - 1
        if here < 0:
            return math.inf
        kept = self._static + self._activations * in_flight
        found = 0.0
        for price in self._prices(kept, here) if priced else [0.0]:
            cost = self._time_s + price * kept if price else self._work_s
            cost = cost.min(axis=2)
            if np.isinf(cost.min(axis=1)).any():
                return math.inf
            values = np.where(np.isinf(cost[:, here]), 0.0, cost[:, here])
            largest = int(np.argmax(values * self._counts))
            for of_kinds in (values, np.where(np.arange(len(values)) == largest, values, 0.0)):
                total = float((of_kinds * self._counts).sum())
                rates = (of_kinds[:, None] / np.maximum(cost, 1e-300)).max(axis=0)
                best = _hull_at(self._sizes, rates, each)
                if best > 0:
                    found = max(found, total / (rows * best) - price * self._limit)
        return found

    def _prices(self, kept: Array, here: int) -> list[float]:
        """Those at which one alternative becomes better than another, of the kind with most work;
        a few of them."""
        times = np.where(np.isinf(self._time_s), 0.0, self._time_s).min(axis=2)[:, here]
        kind = int(np.argmax(times * self._counts))
        ways = [
            (t, size)
            for t, size in zip(self._time_s[kind, here], kept[kind, here], strict=True)
            if math.isfinite(t)
        ]
        rates = sorted(
            {
                float((t2 - t1) / (b1 - b2))
                for (t1, b1), (t2, b2) in combinations(ways, 2)
                if b1 != b2 and (t2 - t1) / (b1 - b2) > 0
            }
        )
        step = max(1, -(-len(rates) // MOST_PRICES))
        return [0.0, *rates[::step], *rates[-1:]]


def _hull_at(sizes: Array, rates: Array, size: float) -> float:
    """The least concave function above 0 at 0 and the rates at the sizes, at ``size``."""
    points: list[tuple[float, float]] = [(0.0, 0.0)]
    best = 0.0
    for x, y in zip(sizes.tolist(), rates.tolist(), strict=True):
        best = max(best, y)  # a row may leave devices idle
        while len(points) > 1 and _slope(points[-2], points[-1]) <= _slope(points[-1], (x, best)):
            points.pop()
        points.append((x, best))
    xs, ys = zip(*points, strict=True)
    return float(np.interp(size, xs, ys))


def _slope(a: Sequence[float], b: Sequence[float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
