"""Shapes of a staging (microbatches, schedule, chunks, number of stages), and the best so far."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from autopar.ir.schedule import Schedule
from autopar.ir.schedule import Shape as Asked
from autopar.searchers.stage_mixes import Kinds, Mixes
from autopar.searchers.stage_proposals import Filling
from autopar.searchers.stage_ramps import StageWeights, through_rows
from autopar.searchers.stage_rates import Rates
from autopar.searchers.stage_rows import Capacities, RowKind, row_kinds
from autopar.searchers.stage_tables import halves
from autopar.simulator.pipeline_bound import Shares, least_step_s, shares_of
from autopar.simulator.stage_problem import (
    Facts,
    Layout,
    StageProblem,
    Staging,
    Unit,
    facts_of,
    pipeline_of,
    rows_of,
    value_of_made,
)

ROUNDING = 1 - 1e-12
"""Bounds are computed in floats, in another order than what they bound."""

LEAST_GAP = 1e-9
"""Bounds of what is equally good are smaller by rounding; it need not be looked at."""

MOST_ACTIONS = 1500
"""Forwards of rows that are made only to see how many microbatches they keep in flight."""

MOST_IDEALS = 5000
"""A graph with more sets of units that could come first is cut along one order of its units only:
some parallel branches can then not be stages of their own."""


ROWS_BISECTIONS = 8
"""Halvings of what a bound is known to be between."""


class LateError(Exception):
    """The time is over."""


class World:
    """The units for one number of microbatches, and what all shapes with them share.

    ``ideals``: sets of units (as bits) that hold with each unit all that it reads, smaller ones
    first: a staging is a way from none to all of them. ``is_chain``: they are the first units, and
    every gradient comes back.
    """

    def __init__(self, problem: StageProblem, microbatches: int) -> None:
        self.problem, self.microbatches = problem, microbatches
        self.units = problem.units(microbatches)
        self.mixes = Mixes(self.units)
        found = ideals_of(self.units, MOST_IDEALS)
        self.all_ideals = found is not None
        count = len(self.units)
        self.ideals = [(1 << u) - 1 for u in range(count + 1)] if found is None else found
        in_line = all(u - 1 in unit.reads for u, unit in enumerate(self.units) if u)
        self.is_chain = in_line and all(unit.gradient for unit in self.units[:-1])
        self._parts: dict[tuple[int, int], tuple[tuple[int, ...], Kinds]] = {}
        self._fillings: dict[bool, Filling] = {}
        self._device_s: dict[bool, list[float]] = {}
        self._layout_sums: dict[bool, LayoutSums] = {}
        self._slowest_s: dict[tuple[bool, int], float] = {}
        self._rates: dict[tuple[bool, bool, int], Rates] = {}
        self._capacities: dict[tuple[bool, bool, int], Capacities] = {}

    def part(self, before: int, after: int) -> tuple[tuple[int, ...], Kinds]:
        """Units between two ideals, and their kinds."""
        found = self._parts.get((before, after))
        if found is None:
            bits = after & ~before
            units = tuple(u for u in range(len(self.units)) if bits >> u & 1)
            found = self._parts[before, after] = units, self.mixes.kinds_in(units)
        return found

    def filling(self, split: bool) -> Filling:
        if split not in self._fillings:
            self._fillings[split] = Filling(self.problem, self.units, self.microbatches, split)
        return self._fillings[split]

    def least_device_s(self, split: bool) -> list[float]:
        """For each unit, device-seconds that a microbatch takes at least; infinite if it cannot be
        done."""
        if split not in self._device_s:
            of_kinds = [
                min(
                    (
                        a.layout.devices * sum(halves(a.cost, split))
                        for a in kind
                        if not split or a.cost.input_gradient_s is not None
                    ),
                    default=math.inf,
                )
                for kind in self.mixes.kinds
            ]
            self._device_s[split] = [of_kinds[kind] for kind in self.mixes.kind_of]
        return self._device_s[split]

    def rates(self, split: bool, waits: bool, copies: int) -> Rates:
        """``waits``: while gradients are exchanged, too, as where a row has one stage."""
        key = (split, waits, copies)
        if key not in self._rates:
            self._rates[key] = Rates(
                self.problem, self.mixes, self.microbatches, split, waits, copies
            )
        return self._rates[key]

    def capacities(self, split: bool, waits: bool, copies: int) -> Capacities:
        """As ``rates``, for chains."""
        key = (split, waits, copies)
        if key not in self._capacities:
            self._capacities[key] = Capacities(
                self.problem, self.mixes, split, self.microbatches, copies, waits
            )
        return self._capacities[key]

    def slowest_unit_s(self, split: bool, copies: int) -> float:
        """What the row with some unit takes at least."""
        key = (split, copies)
        if key not in self._slowest_s:
            share = self.microbatches // copies
            self._slowest_s[key] = max(
                min(
                    (
                        share * sum(halves(a.cost, split)) + float(a.cost.update_s)
                        for a in kind
                        if not split or a.cost.input_gradient_s is not None
                    ),
                    default=math.inf,
                )
                for kind in self.mixes.kinds
            )
        return self._slowest_s[key]

    @cached_property
    def least_bytes(self) -> int:
        """What all devices together keep at least."""
        of_kinds = []
        for kind in self.mixes.kinds:
            sizes = []
            for a in kind:
                memory = a.cost.memory
                assert memory is not None
                kept = memory.parameters_bytes + memory.gradients_bytes + memory.optimizer_bytes
                sizes.append(a.layout.devices * (kept + memory.activations_bytes))
            of_kinds.append(min(sizes))
        return sum(of_kinds[kind] for kind in self.mixes.kind_of)

    def layout_sums(self, split: bool) -> LayoutSums:
        if split not in self._layout_sums:
            self._layout_sums[split] = LayoutSums.of(self.mixes, split)
        return self._layout_sums[split]


@dataclass(frozen=True, slots=True, eq=False)
class LayoutSums:
    """For each layout that all units have: its devices, a microbatch of all units, and what comes
    at the end of a step, if all are done in the fastest way."""

    layouts: list[Layout]
    devices: NDArray[np.float64]
    work_s: NDArray[np.float64]
    tail_s: NDArray[np.float64]
    weights: list[list[float]]  # of each unit

    @staticmethod
    def of(mixes: Mixes, split: bool) -> LayoutSums:
        found: dict[Layout, dict[int, tuple[float, float]]] = {}
        for number, kind in enumerate(mixes.kinds):
            for a in kind:
                if split and a.cost.input_gradient_s is None:
                    continue
                times = (
                    sum(halves(a.cost, split)),
                    float(a.cost.update_s) + float(a.synchronisation_s),
                )
                of_kinds = found.setdefault(a.layout, {})
                of_kinds[number] = min(times, of_kinds.get(number, times))
        layouts = [layout for layout, kinds in found.items() if len(kinds) == len(mixes.kinds)]
        weights = [[found[layout][kind][0] for kind in mixes.kind_of] for layout in layouts]
        tails = [sum(found[layout][kind][1] for kind in mixes.kind_of) for layout in layouts]
        return LayoutSums(
            layouts,
            np.array([layout.devices for layout in layouts], dtype=np.float64),
            np.array([sum(of_units) for of_units in weights]),
            np.array(tails),
            weights,
        )


def ideals_of(units: Sequence[Unit], most: int) -> list[int] | None:
    """``None``: there are more than ``most``."""
    needs = [sum(1 << read for read in unit.reads) for unit in units]
    found = [0]
    layer = [0]
    while layer:
        larger = {
            ideal | 1 << u
            for ideal in layer
            for u, need in enumerate(needs)
            if not ideal >> u & 1 and need & ~ideal == 0
        }
        layer = sorted(larger)
        found += layer
        if len(found) > most:
            return None
    return found


@dataclass(eq=False)
class Shape:
    """What is fixed before stages are chosen. ``rows``: groups of devices. ``bound_s``: none of its
    stagings is better; ``best_s``: of those that were played; ``outcome`` as in ``StageTrial``."""

    world: World
    schedule: Schedule
    stages: int
    chunks: int
    split: bool
    rows: int
    bound_s: float
    best_s: float = math.inf
    outcome: str = "bounded"

    @property
    def microbatches(self) -> int:
        return self.world.microbatches

    @property
    def one_each(self) -> bool:
        """Whether every row has one stage, and nobody else has it."""
        return self.chunks == 1 and not self.schedule.copies

    @property
    def copies(self) -> int:
        """How many rows have each stage."""
        return self.chunks if self.schedule.copies else 1

    @property
    def waits(self) -> bool:
        """Whether a row waits while the gradients of all that it has are exchanged."""
        return self.one_each and self.world.problem.objective == "step"

    def rates(self) -> Rates:
        return self.world.rates(self.split, self.waits, self.copies)

    def bound_by_rows(self, under_s: float) -> None:
        """As whole rows show it for a chain, or their rates; up to ``under_s``, where it is
        finite."""
        capacities = self.world.capacities(self.split, self.waits, self.copies)
        if self.world.is_chain and capacities.hold:
            found_s = self._rows_bound_s(capacities, under_s)
        else:
            found_s = self.rates().bound_s(self.rows, self.at_least_in_flight(), True) * ROUNDING
        self.bound_s = max(self.bound_s, found_s)

    def _rows_bound_s(self, capacities: Capacities, under_s: float) -> float:
        held, rows = zip(*self.row_kinds().items(), strict=True)
        simpler = [row.simpler for row in rows]

        def excluded(within_s: float) -> bool:
            if capacities.quick_most_units(simpler, within_s) < capacities.between:
                return True
            if capacities.most_units(rows, within_s) < capacities.between:
                return True
            if self.world.problem.objective != "step" or math.isinf(within_s):
                return False
            weights = self.stage_weights.of_rows(held)
            return capacities.least_sum_s(rows, weights, within_s) * ROUNDING >= within_s

        if excluded(under_s):
            return under_s
        low_s, high_s = self.bound_s, under_s
        while math.isinf(high_s) and low_s:
            if excluded(2 * low_s):
                low_s *= 2
            else:
                high_s = 2 * low_s
        for _ in range(ROWS_BISECTIONS if math.isfinite(high_s) else 0):
            middle_s = (low_s + high_s) / 2
            if excluded(middle_s):
                low_s = middle_s
            else:
                high_s = middle_s
        return low_s

    @cached_property
    def stage_weights(self) -> StageWeights:
        held = self.first_facts().held
        share = self.microbatches // self.copies
        shares = [dict.fromkeys(of_row, share) for of_row in held]
        return through_rows(held, shares, self.split)

    def row_kinds(self) -> dict[tuple[int, ...], RowKind]:
        if keeps_all(self.schedule):
            chain = tuple((i, i + 1) for i in range(self.stages - 1))
            facts = facts_of(self.schedule, self.stages, 1, self.chunks, chain)
            if facts is not None:
                return row_kinds(facts, self.microbatches)
        return row_kinds(self.first_facts(), None)

    def at_least_in_flight(self) -> int:
        """On every stage, whatever reads what; 1 where it would take long to know more."""
        if not self.world.is_chain or self.stages * self.rows > MOST_ACTIONS:
            return 1
        return min(n for of_row in self.first_facts().at_once for n in of_row.values())

    def likely_in_flight(self) -> int:
        """On a stage in the middle."""
        if self.stages * self.rows > MOST_ACTIONS:
            few = self.rows
        else:
            counts = [n for row in self.first_facts().in_flight for n in row.values()]
            few = max(1, round(sum(counts) / len(counts)))
        return few * max(1, self.microbatches // self.rows) if keeps_all(self.schedule) else few

    def likely_slowdown(self, layout: Layout) -> float:
        """Because all has to fit."""
        room = self.rows * self.world.problem.limit_bytes[layout.kind]
        copies = self.chunks if self.schedule.copies else 1
        filling = self.world.filling(self.split)
        return filling.likely_slowdown(layout, self.likely_in_flight(), room / copies)

    def first_facts(self) -> Facts:
        """With a microbatch for each row, or as few as can be: more do not keep less in flight."""
        chain = tuple((i, i + 1) for i in range(self.stages - 1))
        for microbatches in (self.rows, self.microbatches):
            if microbatches <= self.microbatches:
                facts = facts_of(self.schedule, self.stages, microbatches, self.chunks, chain)
                if facts is not None:
                    return facts
        raise AssertionError(self)

    def shares(self) -> Shares:
        """As in ``pipeline_bound``."""
        chain = tuple((i, i + 1) for i in range(self.stages - 1))
        if self.schedule.copies:
            rows = rows_of(self.schedule, self.stages, self.microbatches, self.chunks, chain)
            return shares_of(rows)
        facts = facts_of(self.schedule, self.stages, self.microbatches, self.chunks, chain)
        assert facts is not None, self
        return [dict.fromkeys(of_row, self.microbatches) for of_row in facts.held]

    def likely_s(self) -> tuple[NDArray[np.float64], LayoutSums]:
        """What equal stages on each of the layouts would take if all fits: a guess, no bound."""
        sums = self.world.layout_sums(self.split)
        count = len(self.world.units)
        uneven = -(-count // self.stages) * self.stages / count
        stage_s = sums.work_s / self.stages * uneven
        times = self.microbatches * (1 if self.schedule.copies else self.chunks)
        ramp = self.rows / 2 if self.schedule.copies else self.rows - 1
        found = stage_s * (times + ramp) + sums.tail_s / self.rows
        found[sums.devices * self.rows > self.world.problem.devices] = math.inf
        return found, sums


def shapes_of(world: World) -> Iterator[Shape]:
    """All that are not excluded by what all devices do and keep together."""
    problem, m = world.problem, world.microbatches
    room = sum(pool.devices * pool.memory_limit_bytes for pool in problem.pools)
    least = min(layout.devices for kind in world.mixes.layouts_of for layout in kind)
    for schedule in problem.schedules:
        split = splits(schedule)
        for stages in range(1, len(world.units) + 1):
            for chunks in range(1, stages + 1):
                if not schedule.copies and stages % chunks:
                    continue
                rows = stages if schedule.copies else stages // chunks
                copies = chunks if schedule.copies else 1
                if rows * least > problem.devices or copies * world.least_bytes > room:
                    continue
                if schedule.refuses(Asked(stages, m, chunks)):
                    continue
                shape = Shape(world, schedule, stages, chunks, split, rows, 0.0)
                alone_s = world.slowest_unit_s(split, copies)
                together_s = shape.rates().bound_s(rows, 1, priced=False)
                shape.bound_s = max(alone_s, together_s) * ROUNDING
                if math.isfinite(shape.bound_s):
                    yield shape


@lru_cache(maxsize=None)
def keeps_all(schedule: Schedule) -> bool:
    """Whether the more microbatches, the more are in flight."""
    for stages in range(2, 9):
        for chunks in range(1, stages + 1):
            chain = tuple((i, i + 1) for i in range(stages - 1))
            few, many = (
                facts_of(schedule, stages, count * stages, chunks, chain) for count in (2, 4)
            )
            if few is not None and many is not None:
                return few.in_flight != many.in_flight
    return False


@lru_cache(maxsize=None)
def splits(schedule: Schedule) -> bool:
    """Whether its backwards are ``I`` and ``W``, in the smallest rows that it makes."""
    for size in range(1, 9):
        for chunks in range(1, size + 1):
            chain = tuple((i, i + 1) for i in range(size - 1))
            facts = facts_of(schedule, size, size, chunks, chain)
            if facts is not None:
                return facts.split
    return False


@dataclass(eq=False)
class Incumbent:
    """The best staging so far, and of which shape. ``gap``: what is not better by this share is not
    looked at. ``late_s``: by ``time.monotonic``, when to end."""

    problem: StageProblem
    gap: float
    late_s: float
    best: Staging | None = None
    shape: Shape | None = None
    best_s: float = math.inf
    played: int = 0

    @property
    def good_enough_s(self) -> float:
        return self.best_s * (1 - max(self.gap, LEAST_GAP))

    def check_time(self) -> None:
        if monotonic() > self.late_s:
            raise LateError

    def consider(self, shape: Shape, staging: Staging) -> float | None:
        """Plays it if it could be better; else gives its bound."""
        made = pipeline_of(self.problem, staging, shape.world.units)
        if made is None:
            return None
        if self.problem.objective == "step":
            found = least_step_s(made.pipeline, shape.shares(), split=shape.split)
            bound_s = float(found) * ROUNDING
            if bound_s >= self.good_enough_s:
                return bound_s
        self.check_time()
        value = value_of_made(self.problem, staging, made)
        self.played += 1
        if value is not None:
            time_s = float(value.time_s)
            shape.best_s = min(shape.best_s, time_s)
            if time_s < self.best_s:
                self.best, self.best_s, self.shape = staging, time_s, shape
        return None
