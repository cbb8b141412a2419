"""What rows with whole units can do within some time: the devices of each, memory, ramps.

For a chain. A row holds some of the units between the first and the last one, and the first or the
last one where it has the first or the last stage. On a layout, k units take at least

    max over prices p of   c(p) + k u(p)   seconds,

where u is the least of (seconds + p bytes) over a unit's alternatives, and c the same for what is
there anyway, less p times the memory of a device: the dual of the linear relaxation over
alternatives, exact for equal units but for how many of them go which way. Activations count as
often as the row keeps them in flight; each stage has a unit at least, the others may all be in the
stage that keeps fewest. Where units differ, k units in v stages take at least k times their mean,
less v times the most by which units one after the other can fall below it.

So for each number of devices n a row has at most a whole number of units K(n) within a time T, and
all rows together at most the sum over rows of K(n_row) with the sum of n_row being the devices
there are: a table over (rows, devices). If that is less than all units, no staging takes T.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from autopar.searchers.stage_mixes import Mixes
from autopar.searchers.stage_tables import halves
from autopar.simulator.stage_problem import Alternative, Facts, Layout, StageProblem

Array = NDArray[np.float64]

BUCKETS = 128
"""Devices are counted in as many parts at most; a row's are rounded down, so bounds hold."""

MOST_KINDS = 8
"""Of different units; with more of them, means say little."""

UNIT_PRICES = np.geomspace(0.5, 4.0, 13)
"""Of what a step takes for each unit."""

ROUNDING = 1e-11
"""Relative; what takes so little longer is taken to be in time."""


@dataclass(frozen=True, slots=True)
class RowKind:
    """``in_flight``: microbatches of each stage of the row that has neither the first nor the last
    unit, ascending; ``first``, ``last``: of the stages with these, if the row has them."""

    in_flight: tuple[int, ...]
    first: int | None = None
    last: int | None = None

    @property
    def least_in_flight(self) -> int:
        ends = (n for n in (self.first, self.last) if n is not None)
        return min((*self.in_flight, *ends))

    @property
    def simpler(self) -> RowKind:
        """As if all its stages kept as few as one of them does: many rows are alike then."""
        least = self.least_in_flight
        return RowKind(
            (least,) * len(self.in_flight),
            None if self.first is None else least,
            None if self.last is None else least,
        )


def row_kinds(facts: Facts, all_microbatches: int | None) -> dict[tuple[int, ...], RowKind]:
    """For each set of stages that rows have: of copies, one stands for all, which have equal
    devices. ``all_microbatches``: so many are in flight on every stage."""
    last_stage = max(map(max, facts.held))
    found: dict[tuple[int, ...], RowKind] = {}
    together: dict[tuple[int, ...], int] = {}
    for held, of_row in zip(facts.held, facts.at_once, strict=True):
        counts = {s: n if all_microbatches is None else all_microbatches for s, n in of_row.items()}
        if sum(counts.values()) > together.get(held, 0):
            together[held] = sum(counts.values())
            between = sorted(n for s, n in counts.items() if s not in (0, last_stage))
            found[held] = RowKind(tuple(between), counts.get(0), counts.get(last_stage))
    return found


@dataclass(frozen=True, slots=True)
class RowWeights:
    """Of a row's forwards, backwards, what is put off of these, and updates with the exchange of
    gradients before them, in a sum that no step is shorter than. ``more_between``: of one unit of
    each stage with neither end, together, how much more of the first three; ``more_first``,
    ``more_last``: of the first and the last unit."""

    forward: float
    backward: float
    put_off: float
    tail: float
    more_between: tuple[float, float, float] = (0.0, 0.0, 0.0)
    more_first: tuple[float, float, float] = (0.0, 0.0, 0.0)
    more_last: tuple[float, float, float] = (0.0, 0.0, 0.0)


NOTHING = RowWeights(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Ramp:
    """A sum that no step is shorter than: of a row itself, and the least that the others add."""

    own: RowWeights
    others_s: float


@dataclass(frozen=True, slots=True, eq=False)
class _Lines:
    """For each layout: c and u as above, for several prices; how many units have room at most."""

    const: Array
    slope: Array
    fitting: Array


class Capacities:
    """For so many microbatches. ``copies``: for how many rows, which share the microbatches of
    their stages, one stands; ``waits``: a row waits while its gradients are exchanged."""

    def __init__(
        self,
        problem: StageProblem,
        mixes: Mixes,
        split: bool,
        microbatches: int,
        copies: int,
        waits: bool,
    ) -> None:
        self._problem, self._mixes, self._split = problem, mixes, split
        self._share, self._copies, self._waits = microbatches // copies, copies, waits
        self.between = len(mixes.kind_of) - 2
        """Units that are neither the first nor the last one."""
        self.per_bucket = -(-problem.devices // BUCKETS)
        self._lines: dict[RowKind, _Lines] = {}
        self._most: dict[tuple[RowKind, float], Array] = {}

    @property
    def hold(self) -> bool:
        """Whether there is something to count, of few kinds."""
        return self.between > 0 and len(set(self._mixes.kind_of[1:-1])) <= MOST_KINDS

    def most_units(
        self, rows: Iterable[RowKind], within_s: float, ramps: Iterable[Ramp] | None = None
    ) -> float:
        """That all rows together can do. ``ramps``: of each row, if they are known."""
        found = np.zeros(self._problem.devices // self.per_bucket + 1)
        for row, ramp in zip(rows, repeat(None) if ramps is None else ramps, strict=False):
            most = self._most_of(row, within_s)
            if ramp is not None:
                most = np.minimum(most, self._most_with(row, ramp, within_s))
            found = self._with_row(found, most)
        return float(found[-1])

    def walk(self, rows: Sequence[RowKind], within_s: float) -> list[tuple[Layout, int]] | None:
        """A layout for each row, and how many units it has between the first and the last one, so
        that all are done; ``None``: within this time they cannot be."""
        tables = [np.zeros(self._problem.devices // self.per_bucket + 1)]
        for row in rows:
            tables.append(self._with_row(tables[-1], self._most_of(row, within_s)))
        left, devices = self.between, len(tables[0]) - 1
        if tables[-1][devices] < left:
            return None
        found = []
        for number in range(len(rows) - 1, -1, -1):
            row, before = rows[number], tables[number]
            most = self._most_of(row, within_s)
            # the fewest devices that do
            size = next(
                i
                for i, taken in enumerate(self._taken)
                if taken <= devices and before[devices - taken] + most[i] >= left
            )
            on = self._most_on(row, within_s)
            layout = min(
                (i for i in range(len(on)) if self._size_of[i] == size and on[i] == most[size]),
                key=lambda i: float(self._lines_of(row).slope[i].min()),
            )
            devices -= self._taken[size]
            units = min(
                int(most[size]), left - sum(len(other.in_flight) for other in rows[:number])
            )
            left -= units
            found.append((self._layouts[layout], units))
        return found[::-1]

    def _with_row(self, before: Array, most: Array) -> Array:
        """One more row, on any number of devices."""
        found = np.full_like(before, -math.inf)
        for taken, units in zip(self._taken, most.tolist(), strict=True):
            if units >= 0:
                there = found[taken:]
                np.maximum(there, before[: len(before) - taken] + units, out=there)
        return found

    def quick_most_units(self, rows: Sequence[RowKind], within_s: float) -> float:
        """No less than ``most_units``, sooner: devices have a price instead of being counted."""
        least = math.inf
        for share in (0.9, 1.0, 1.1):
            price = share * self.between / self._problem.devices
            most = price * self._problem.devices
            for row in rows:
                most += float((self._most_of(row, within_s) - price * self._sizes).max())
            least = min(least, most)
        return least + ROUNDING * self.between

    def least_sum_s(
        self,
        rows: Sequence[RowKind],
        weights: Sequence[RowWeights],
        within_s: float,
        without: int | None = None,
    ) -> float:
        """The weighted sum of the times of all rows, of which each takes no more than ``within_s``.

        Units have a price instead of being counted, several are tried. ``without``: a row that does
        its part but is not in the sum.
        """
        prices = within_s / self.between * UNIT_PRICES
        found = np.zeros((len(prices), self._problem.devices // self.per_bucket + 1))
        for number, (row, weight) in enumerate(zip(rows, weights, strict=True)):
            counted = NOTHING if number == without else weight
            costs = self._cost_of(row, counted, prices, within_s)
            before, found = found, np.full_like(found, math.inf)
            for taken, cost in zip(self._taken, costs.T, strict=True):
                if np.isfinite(cost).any():
                    there = found[:, taken:]
                    np.minimum(
                        there, before[:, : before.shape[1] - taken] + cost[:, None], out=there
                    )
        return float((found[:, -1] + prices * self.between).max())

    def ramp(
        self, rows: Sequence[RowKind], weights: Sequence[RowWeights], within_s: float, row: int
    ) -> Ramp:
        """What the others take in a weighted sum, beside a row."""
        return Ramp(weights[row], self.least_sum_s(rows, weights, within_s, without=row))

    def _most_with(self, row: RowKind, ramp: Ramp, within_s: float) -> Array:
        """``_most_of``, if so much is to be passed beside."""
        const, slope = self._lines_for(row, self._weighted(ramp.own))
        room = (
            within_s * (1 + ROUNDING) - ramp.others_s - self._once(row, ramp.own)[:, None] - const
        )
        most = np.floor(_times_in(room, slope).min(axis=1) + ROUNDING)
        most[most < len(row.in_flight)] = -math.inf
        found = np.full(len(self._sizes), -math.inf)
        np.maximum.at(found, self._size_of, most)
        return found

    def _weighted(self, weight: RowWeights) -> Array:
        tail = weight.tail
        parts = (weight.forward, weight.backward, weight.put_off, tail, tail)
        there = np.isfinite(self._table[0])
        finite = np.where(there, self._table[:5], 0.0)
        times: Array = np.where(there, np.tensordot(parts, finite, axes=1), math.inf)
        return times

    def _cost_of(self, row: RowKind, weight: RowWeights, prices: Array, within_s: float) -> Array:
        """For each price of a unit and each of ``_sizes``: what the row costs less its units."""
        const, slope = self._lines_for(row, self._weighted(weight))
        const = const + self._once(row, weight)[:, None]
        most = self._most_on(row, within_s)
        cannot = np.isneginf(most)
        gain = slope - prices[:, None, None]  # [price, layout, line]
        count = np.where(gain < 0, np.where(cannot, 0.0, most)[:, None], float(len(row.in_flight)))
        with np.errstate(invalid="ignore"):
            cost = np.where(np.isinf(gain), const, const + gain * count).max(axis=2)
        cost[:, cannot] = math.inf
        found = np.full((len(self._sizes), len(prices)), math.inf)
        np.minimum.at(found, self._size_of, cost.T)
        return found.T

    def _once(self, row: RowKind, weight: RowWeights) -> Array:
        """Of the unit that each stage has at least, what it weighs more than others."""
        found = np.zeros(len(self._layouts))
        least = self._table[:3].min(axis=3)
        least[np.isinf(least)] = 0.0
        for more, kinds in zip(
            (weight.more_between, weight.more_first, weight.more_last),
            (self._between_kinds, [self._mixes.kind_of[0]], [self._mixes.kind_of[-1]]),
            strict=True,
        ):
            for part, times in zip(more, least, strict=True):
                if part:
                    found += part * times[:, kinds].min(axis=1)
        return found

    def _most_of(self, row: RowKind, within_s: float) -> Array:
        """For each of ``_sizes``, the most units of a row with so many devices."""
        found = self._most.get((row, within_s))
        if found is None:
            found = np.full(len(self._sizes), -math.inf)
            np.maximum.at(found, self._size_of, self._most_on(row, within_s))
            self._most[row, within_s] = found
        return found

    def _most_on(self, row: RowKind, within_s: float) -> Array:
        """Likewise for each layout."""
        lines = self._lines_of(row)
        room = within_s * (1 + ROUNDING) - lines.const
        units = np.minimum(_times_in(room, lines.slope).min(axis=1), lines.fitting)
        most: Array = np.minimum(np.floor(units + ROUNDING), self.between)
        most[most < len(row.in_flight)] = -math.inf
        return most

    def _lines_of(self, row: RowKind) -> _Lines:
        found = self._lines.get(row)
        if found is None:
            const, slope = self._lines_for(row, self._times)
            # without a thought of time: what has room at all
            nothing_s = np.where(np.isinf(self._times), math.inf, 0.0)
            kept, least, _ = self._priced(row, nothing_s, np.ones((len(const), 1)))
            fitting = _times_in(self._limits[:, None] - kept, least)[:, 0]
            found = self._lines[row] = _Lines(const, slope, fitting)
        return found

    def _lines_for(self, row: RowKind, times: Array) -> tuple[Array, Array]:
        """c and u as above, of such times."""
        ends = [n for n in (row.first, row.last) if n is not None]
        prices = self._prices(sorted({*row.in_flight, *ends}), times)
        const, smallest, of_kinds = self._priced(row, times, prices)
        const -= prices * self._limits[:, None]
        if of_kinds.shape[1] == 1:
            return const, smallest
        mean, lowest = self._mean(of_kinds)
        stages = len(row.in_flight) + len(ends)
        return (
            np.concatenate((const, const + stages * lowest), axis=1),
            np.concatenate((smallest, mean), axis=1),
        )

    def _priced(self, row: RowKind, times: Array, prices: Array) -> tuple[Array, Array, Array]:
        """For each layout and price: what is there anyway, what a further unit takes at least, and
        (between them, for each kind) what one of that kind does."""
        of_all = self._least(row.least_in_flight, times, prices)  # [layout, kind, price]
        of_kinds = of_all[:, self._between_kinds]
        const = np.zeros_like(prices)
        for n in row.in_flight:
            if n > row.least_in_flight:
                more = self._least(n, times, prices)[:, self._between_kinds]
                with np.errstate(invalid="ignore"):
                    const += np.nan_to_num(more - of_kinds, nan=0.0, posinf=0.0).min(axis=1)
        for end, unit in ((row.first, 0), (row.last, -1)):
            if end is not None:
                const += self._least(end, times, prices)[:, self._mixes.kind_of[unit]]
        return const, of_kinds.min(axis=1), of_kinds

    def _mean(self, of_kinds: Array) -> tuple[Array, Array]:
        """Of the units, and the most by which consecutive ones are together below it."""
        can = np.asarray(np.isfinite(of_kinds).all(axis=1))
        finite = np.where(can[:, None], of_kinds, 0.0)
        mean: Array = np.einsum("lkp,k->lp", finite, self._counts / self._counts.sum())
        run = lowest = np.zeros_like(mean)
        for kind in self._between_order:
            run = np.minimum(0.0, run + finite[:, kind] - mean)
            lowest = np.minimum(lowest, run)
        return mean, np.where(can, lowest, -math.inf)

    def _prices(self, in_flight: Sequence[int], all_times: Array) -> Array:
        """Those at which one alternative becomes better than another, of the most frequent kind."""
        times = all_times[:, self._main]
        found = [np.zeros((len(times), 1))]
        one, other = np.triu_indices(times.shape[1], 1)
        for n in in_flight:
            size = self._static[:, self._main] + n * self._activations[:, self._main]
            with np.errstate(invalid="ignore", divide="ignore"):
                rates = (times[:, other] - times[:, one]) / (size[:, one] - size[:, other])
            found.append(np.where(np.isfinite(rates) & (rates > 0), rates, 0.0))
        return np.concatenate(found, axis=1)

    def _least(self, in_flight: int, times: Array, prices: Array) -> Array:
        size = self._static + in_flight * self._activations
        priced: Array = times[:, :, None] + prices[:, None, :, None] * size[:, :, None]
        least: Array = priced.min(axis=3)
        return least

    # The alternatives as arrays over (layout, kind, alternative)

    @cached_property
    def _table(self) -> Array:
        of: dict[int, list[list[Alternative]]] = {}
        for number, layout in enumerate(self._layouts):
            of[number] = [
                [
                    a
                    for a in kind
                    if a.layout == layout
                    and (not self._split or a.cost.input_gradient_s is not None)
                ]
                for kind in self._mixes.kinds
            ]
        most = max(len(ways) for kinds in of.values() for ways in kinds)
        table = np.zeros((7, len(of), len(self._mixes.kinds), max(1, most)))
        table[:5] = math.inf
        for number, kinds in of.items():
            for kind, ways in enumerate(kinds):
                for place, a in enumerate(ways):
                    table[:, number, kind, place] = self._numbers(a)
        return table

    def _numbers(self, alternative: Alternative) -> tuple[float, ...]:
        cost, memory = alternative.cost, alternative.cost.memory
        assert memory is not None
        static = memory.parameters_bytes + memory.gradients_bytes + memory.optimizer_bytes
        return (
            *halves(cost, self._split),
            float(cost.update_s),
            float(alternative.synchronisation_s) * self._waits,
            static,
            memory.activations_bytes,
        )

    @cached_property
    def _layouts(self) -> list[Layout]:
        return list({a.layout: None for kind in self._mixes.kinds for a in kind})

    @cached_property
    def _limits(self) -> Array:
        limits = [self._problem.limit_bytes[layout.kind] for layout in self._layouts]
        return np.array(limits, dtype=np.float64)

    @cached_property
    def _sizes(self) -> Array:
        """Devices of a row and its copies."""
        sizes = sorted({x.devices * self._copies for x in self._layouts})
        return np.array(sizes, dtype=np.float64)

    @cached_property
    def _size_of(self) -> NDArray[np.int64]:
        sizes = [float(x.devices * self._copies) for x in self._layouts]
        return np.searchsorted(self._sizes, sizes)

    @cached_property
    def _taken(self) -> list[int]:
        buckets = self._problem.devices // self.per_bucket
        return [min(int(size) // self.per_bucket, buckets + 1) for size in self._sizes]

    @cached_property
    def _times(self) -> Array:
        """Of all that a row does for its units in a step."""
        forward, backward, put_off, update, exchange = self._table[:5]
        times: Array = self._share * (forward + backward + put_off) + update + exchange
        return times

    @property
    def _static(self) -> Array:
        static: Array = self._table[5]
        return static

    @property
    def _activations(self) -> Array:
        activations: Array = self._table[6]
        return activations

    @cached_property
    def _between_kinds(self) -> list[int]:
        return sorted(set(self._mixes.kind_of[1:-1]))

    @cached_property
    def _between_order(self) -> list[int]:
        place = {kind: number for number, kind in enumerate(self._between_kinds)}
        return [place[kind] for kind in self._mixes.kind_of[1:-1]]

    @cached_property
    def _counts(self) -> Array:
        return np.bincount(self._between_order).astype(np.float64)

    @cached_property
    def _main(self) -> int:
        return self._between_kinds[int(np.argmax(self._counts))]


def _times_in(room: Array, each: Array) -> Array:
    """How often it has room; below 0 if nothing has."""
    with np.errstate(invalid="ignore", divide="ignore"):
        often = np.where(each > 0, room / each, np.where(room >= 0, math.inf, -1.0))
    return np.where(np.isnan(often), -1.0, often)
