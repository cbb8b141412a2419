"""What the last stages of a chain take at least, from any unit on and on any number of devices.

For rows of one stage each. With x the forwards before a stage, y the way back from it to the end of
the step, w its forward and backward of a microbatch, f and b these two, and t what comes after its
last backward, a step takes at least, over all stages,

    x + m w + max(t, y)        and for the next stage x' = x + f, y' = b + max(t, y),

which is ``pipeline_bound`` along a chain. So the last s stages, from unit i on r devices, take at
least x + max(A, y + C), where over all ends j of the first of them and its layouts on n devices

    C[s, i, r] = min max(m w, f + b + C[s-1, j, r-n])
    A[s, i, r] = min max(m w + t, f + A[s-1, j, r-n], f + b + t + C[s-1, j, r-n]).

Each of w, f, b, t is the least that fits, by the dual of the linear relaxation over the units'
alternatives, so that the tables are of the size of (units x devices) and no mix is ever made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopar.simulator.pipeline import StageCost
from autopar.simulator.stage_problem import Alternative, Layout, StageProblem, Unit, kinds_of

Array = NDArray[np.float64]

BUCKETS = 128
"""Devices are counted in as many parts at most; a stage's are rounded down, so bounds hold."""

ROUNDING = 1 - 1e-10
"""Sums over units are differences of sums from the first one on."""


def halves(cost: StageCost, split: bool) -> tuple[float, float, float]:
    """Forward, what it takes to give the gradient of the inputs, and what can wait."""
    if split:
        assert cost.input_gradient_s is not None and cost.weight_gradient_s is not None
        return float(cost.forward_s), float(cost.input_gradient_s), float(cost.weight_gradient_s)
    return float(cost.forward_s), float(cost.backward_s), 0.0


class Tables:
    """``in_flight``: microbatches that the first of the last s stages keeps at least. ``under_s``:
    what takes longer need not be known. ``check_time``: called now and then, raises to end."""

    def __init__(
        self,
        problem: StageProblem,
        units: Sequence[Unit],
        microbatches: int,
        split: bool,
        in_flight: Callable[[int], int],
        under_s: float,
        check_time: Callable[[], None] = lambda: None,
    ) -> None:
        self._in_flight, self.under_s = in_flight, under_s
        self._check_time = check_time
        self._devices = problem.devices
        self.per_bucket = -(-problem.devices // BUCKETS)
        self._buckets = problem.devices // self.per_bucket
        self._count = len(units)
        kind_of, kinds = kinds_of(units)
        step = problem.objective == "step"
        of_layouts: dict[Layout, list[list[_Numbers]]] = {}
        for number, kind in enumerate(kinds):
            for alternative in kind:
                if not split or alternative.cost.input_gradient_s is not None:
                    nothing_yet: list[list[_Numbers]] = [[] for _ in kinds]
                    of_kinds = of_layouts.setdefault(alternative.layout, nothing_yet)
                    of_kinds[number].append(_numbers_of(alternative, microbatches, split, step))
        self._columns = [
            _Column(np.array(kind_of), layout, of_kinds, problem.limit_bytes[layout.kind])
            for layout, of_kinds in of_layouts.items()
        ]
        shape = (self._count + 1, self._buckets + 1)
        nothing = np.full(shape, math.inf)
        nothing[self._count, :] = -math.inf
        self._levels: list[tuple[Array, Array]] = [(nothing, nothing)]
        least = [math.inf] * self._count
        for column in self._columns:
            for unit, device_s in enumerate(column.device_s):
                least[unit] = min(least[unit], device_s)
        self.device_s = np.concatenate(([0.0], np.cumsum(least)))
        """Device-seconds of a step that the first units take at least."""

    def least_s(self, stages: int) -> float:
        """Of all stagings with so many stages."""
        return self._bounded(float(self._level(stages)[0][0, self._buckets]))

    def longer_s(self, stages: int) -> float:
        """Of all stagings with more than so many stages."""
        after = self._level(stages)[0][1:]
        left = self._devices - np.arange(self._buckets + 1) * self.per_bucket
        with np.errstate(divide="ignore"):
            before = self.device_s[1:, None] / left[None, :]
        return self._bounded(float(np.maximum(after, before).min()))

    def rest_s(self, stages: int, unit: int, devices: int, there_s: float, back_s: float) -> float:
        """What begins with ``unit``, on so many devices: x and y as above."""
        first, others = self._level(stages)
        bucket = devices // self.per_bucket
        return self._bounded(
            there_s + max(float(first[unit, bucket]), back_s + float(others[unit, bucket]))
        )

    def options(
        self, stages: int, unit: int, devices: int, there_s: float, back_s: float
    ) -> list[Option]:
        """For what ``rest_s`` is of, each way to begin, the best bound first."""
        first, others = self._level(stages - 1)
        found = []
        for column in self._columns:
            bucket = (devices - column.layout.devices) // self.per_bucket
            if column.layout.devices > devices:
                continue
            for size in range(1, self._count - unit + 1):
                price = column.prices(size, self._in_flight(stages))
                mw, mwt, f, b, t = (float(vector[unit]) for vector in price)
                if there_s + mw >= self.under_s:
                    break
                end, tail_s = (unit + size, bucket), max(t, back_s)
                later_s = f + max(float(first[end]), b + tail_s + float(others[end]))
                value_s = there_s + max(mwt, mw + back_s, later_s)
                if value_s < self.under_s:
                    option = Option(
                        value_s * ROUNDING, size, column.layout, there_s + f, b + tail_s
                    )
                    found.append(option)
        return sorted(found, key=lambda option: option.bound_s)

    def walk(self, stages: int) -> list[tuple[int, Layout]] | None:
        """Sizes and layouts of the stages that the bound of ``least_s`` is of."""
        unit, devices, there_s, back_s = 0, self._devices, 0.0, 0.0
        found = []
        for left in range(stages, 0, -1):
            options = self.options(left, unit, devices, there_s, back_s)
            if not options:
                return None
            best = options[0]
            found.append((best.size, best.layout))
            unit, devices = unit + best.size, devices - best.layout.devices
            there_s, back_s = best.there_s, best.back_s
        return found

    def _bounded(self, found_s: float) -> float:
        return min(found_s, self.under_s) * ROUNDING

    def _level(self, stages: int) -> tuple[Array, Array]:
        while len(self._levels) <= stages:
            self._check_time()
            self._levels.append(self._next(*self._levels[-1], len(self._levels)))
        return self._levels[stages]

    def _next(self, a_before: Array, c_before: Array, stages: int) -> tuple[Array, Array]:
        a_found, c_found = np.full_like(a_before, math.inf), np.full_like(c_before, math.inf)
        in_flight = self._in_flight(stages)
        for column in self._columns:
            taken = column.layout.devices // self.per_bucket
            left = self._buckets + 1 - taken
            if left <= 0:
                continue
            for size in range(1, self._count + 1):
                price = column.prices(size, in_flight)
                if price[0].min() >= self.under_s:
                    break
                mw, mwt, f, b, t = (vector[:, None] for vector in price)
                starts = self._count + 1 - size
                a_then = a_before[size:, :left]
                c_then = c_before[size:, :left] + (f + b)
                c_here = c_found[:starts, taken:]
                np.minimum(c_here, np.maximum(mw, c_then), out=c_here)
                a_here = a_found[:starts, taken:]
                value = np.maximum(mwt, np.maximum(a_then + f, c_then + t))
                np.minimum(a_here, value, out=a_here)
        return a_found, c_found


class Option(NamedTuple):
    """A first stage of ``size`` units; ``there_s`` and ``back_s`` are x and y of the next one."""

    bound_s: float
    size: int
    layout: Layout
    there_s: float
    back_s: float


Prices = tuple[Array, Array, Array, Array, Array]
"""For each first unit of a stage of some size: m w, m w + t, f, b, t."""


class _Column:
    """A layout: what stages on it take at least."""

    def __init__(
        self,
        kind_of: NDArray[np.int64],
        layout: Layout,
        of_kinds: list[list[_Numbers]],
        limit_bytes: int,
    ) -> None:
        self.layout, self._limit = layout, limit_bytes
        self._prices: dict[tuple[int, int], Prices] = {}
        self._sums: dict[int, list[tuple[float, Array, Array]]] = {}
        self._kind_of, self._kinds = kind_of, of_kinds
        self._lacking = self._added([0.0 if kind else 1.0 for kind in self._kinds])
        self._plain = [
            self._added([min((n[place] for n in kind), default=0.0) for kind in self._kinds])
            for place in (2, 3, 4)
        ]
        cost = [
            layout.devices * min((n[1] for n in kind), default=math.inf) for kind in self._kinds
        ]
        self.device_s = [cost[kind] for kind in self._kind_of]

    def _added(self, of_kinds: Sequence[float]) -> Array:
        """Sums over the first units."""
        of_units = np.array(of_kinds, dtype=np.float64)[self._kind_of]
        return np.concatenate(([0.0], np.cumsum(of_units)))

    def prices(self, size: int, in_flight: int) -> Prices:
        found = self._prices.get((size, in_flight))
        if found is None:
            free, f, b, t = (
                of_all[size:] - of_all[:-size] for of_all in (self._lacking, *self._plain)
            )
            mw = np.full(len(f), 0.0)
            mwt = mw.copy()
            for price, sums, sums_t in self._sums_of(in_flight):
                mw = np.maximum(mw, sums[size:] - sums[:-size] - price * self._limit)
                mwt = np.maximum(mwt, sums_t[size:] - sums_t[:-size] - price * self._limit)
            least = self._least_bytes(in_flight)
            cannot = (free > 0) | (least[size:] - least[:-size] > self._limit)
            mw[cannot] = mwt[cannot] = math.inf
            found = self._prices[size, in_flight] = mw, mwt, f, b, t
        return found

    def _least_bytes(self, in_flight: int) -> Array:
        return self._added(
            [min((n.bytes(in_flight) for n in kind), default=0.0) for kind in self._kinds]
        )

    def _sums_of(self, in_flight: int) -> list[tuple[float, Array, Array]]:
        """For each price of a byte that can matter, sums of the least cost with the bytes paid."""
        found = self._sums.get(in_flight)
        if found is None:
            prices = {0.0}
            for kind in self._kinds:
                for one, other in combinations(kind, 2):
                    fewer = one.bytes(in_flight) - other.bytes(in_flight)
                    for place in (0, 1):
                        more = other[place] - one[place]
                        if fewer and more / fewer > 0:
                            prices.add(more / fewer)
            found = self._sums[in_flight] = [
                (price, self._cheapest(0, price, in_flight), self._cheapest(1, price, in_flight))
                for price in sorted(prices)
            ]
        return found

    def _cheapest(self, place: int, price: float, in_flight: int) -> Array:
        return self._added(
            [
                min((n[place] + price * n.bytes(in_flight) for n in kind), default=0.0)
                for kind in self._kinds
            ]
        )


class _Numbers(NamedTuple):
    """Of an alternative, as above."""

    mw: float
    mwt: float
    f: float
    b: float
    t: float
    static_bytes: int
    activations_bytes: int

    def bytes(self, in_flight: int) -> int:
        return self.static_bytes + self.activations_bytes * in_flight


def _numbers_of(alternative: Alternative, m: int, split: bool, step: bool) -> _Numbers:
    cost, memory = alternative.cost, alternative.cost.memory
    assert memory is not None
    f, b, put_off = halves(cost, split)
    w, update_s = f + b + put_off, float(cost.update_s)
    static = memory.parameters_bytes + memory.gradients_bytes + memory.optimizer_bytes
    kept = (static, memory.activations_bytes)
    if not step:  # nothing is waited for
        return _Numbers(m * w, m * w + update_s, 0.0, 0.0, 0.0, *kept)
    t = update_s + float(alternative.synchronisation_s)
    # what can wait is not on the way back, but before the tail
    return _Numbers(m * (f + b), m * w + t, f, b, t, *kept)
