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
from autopar.searchers.stage_ramps import StageWeights, one_microbatch, through_rows
from autopar.searchers.stage_rates import Rates
from autopar.searchers.stage_rows import Capacities, RowKind, row_kinds
from autopar.searchers.stage_tables import halves
from autopar.searchers.stage_ways import mean_along_row, mean_of_ways
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

MOST_ON_WAYS = 20_000
"""Forwards of rows through which ways are looked for; where there are more, ramps are short."""

MOST_RAMPS = 16
"""Rows whose ramps are looked at one by one."""

MOST_IDEALS = 5000
"""A graph with more sets of units that could come first is cut along one order of its units only:
some parallel branches can then not be stages of their own."""


ROWS_BISECTIONS = 8
"""Halvings of what a bound is known to be between."""


RAMPS_BISECTIONS = 4
"""Likewise, where it takes longer to know."""


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
        self._way_device_s: dict[bool, tuple[float, float]] = {}
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

    def way_device_s(self, split: bool) -> tuple[float, float]:
        """Device-seconds of a microbatch's forward and backward (or ``I``) of all units, and of the
        smallest between the first and the last one, at least."""
        if split not in self._way_device_s:
            of_kinds = [
                min(
                    (
                        a.layout.devices * sum(halves(a.cost, split)[:2])
                        for a in kind
                        if not split or a.cost.input_gradient_s is not None
                    ),
                    default=math.inf,
                )
                for kind in self.mixes.kinds
            ]
            of_units = [of_kinds[kind] for kind in self.mixes.kind_of]
            self._way_device_s[split] = sum(of_units), min(of_units[1:-1], default=0.0)
        return self._way_device_s[split]

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
    def launches_s(self) -> float:
        """What the hosts of all units take in a step at least, one after the other."""
        of_kinds = [min(float(a.cost.launches_s) for a in kind) for kind in self.mixes.kinds]
        return self.microbatches * sum(of_kinds[kind] for kind in self.mixes.kind_of)

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
    between_s: NDArray[np.float64]  # the mean of all units but the first and the last
    last_s: NDArray[np.float64]  # the last unit
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
            np.array([sum(of_units[1:-1]) / max(1, len(of_units) - 2) for of_units in weights]),
            np.array([of_units[-1] for of_units in weights]),
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

    def one_microbatch_s(self) -> float:
        """A chain's least time for a microbatch through all stages and back.

        With c the device-seconds of what a group of n devices has of it, the sum of c / n is at
        least (sum of sqrt c)^2 / (sum of n); the sum of roots is least when all groups but one have
        as little as they can.
        """
        if not self.world.is_chain or self.world.problem.objective != "step":
            return 0.0
        all_s, least_s = self.world.way_device_s(self.split)
        groups = self.rows // self.copies
        with_unit_each = max(0, groups - 2)  # of those without the first and the last unit
        of_group = min(self.stages // groups * least_s, all_s / groups)
        rest_s = all_s - with_unit_each * of_group
        roots = with_unit_each * math.sqrt(of_group) + math.sqrt(max(0.0, rest_s))
        return self.copies * roots**2 / self.world.problem.devices

    def bound_by_rows(self, under_s: float) -> None:
        """As whole rows show it for a chain, or their rates; up to ``under_s``, where it is
        finite."""
        if not self._in_whole_rows:
            found_s = self.rates().bound_s(self.rows, self.at_least_in_flight(), True) * ROUNDING
            self.bound_s = max(self.bound_s, found_s)
            return
        if self._rows_exclude(under_s):
            self.bound_s = under_s
            return
        if not self.bound_s:  # where nothing takes time, no time is too short
            return
        high_s = under_s
        while math.isinf(high_s):
            if self._rows_exclude(2 * self.bound_s):
                self.bound_s *= 2
            else:
                high_s = 2 * self.bound_s
        if self.world.problem.objective == "step":
            for weights in self._simple_weights():
                self.bound_s = max(self.bound_s, self._sum_s(weights, high_s))
        for _ in range(ROWS_BISECTIONS):
            if self.bound_s >= high_s:
                return
            middle_s = (self.bound_s + high_s) / 2
            if self._rows_exclude(middle_s):
                self.bound_s = middle_s
            else:
                high_s = middle_s

    def bound_by_ways(self, under_s: float) -> None:
        """As longer ways through the rows show it, which takes longer to find out."""
        on_ways = self.stages * self.microbatches <= MOST_ON_WAYS
        step = self.world.problem.objective == "step"
        if not (self._in_whole_rows and on_ways and step and math.isfinite(under_s)):
            return
        asked = self.schedule, self.stages, self.microbatches, self.chunks
        # each stage has a unit; so large a part of them could be on any
        free = math.ceil(10 * max(0.0, 1 - self.stages / len(self.world.units))) / 10
        self.bound_s = max(self.bound_s, self._sum_s(mean_of_ways(*asked, free), under_s))
        if self.rows > MOST_RAMPS:
            return
        along = [mean_along_row(*asked, free, row) for row in range(len(self.row_kinds))]
        high_s = under_s
        for _ in range(RAMPS_BISECTIONS):
            if self.bound_s >= high_s:
                return
            if self._ramps_exclude(along, high_s):
                self.bound_s = high_s
                return
            high_s = (self.bound_s + high_s) / 2

    @property
    def _in_whole_rows(self) -> bool:
        return self.world.is_chain and self._capacities.hold

    @property
    def _capacities(self) -> Capacities:
        return self.world.capacities(self.split, self.waits, self.copies)

    def _rows_exclude(self, within_s: float) -> bool:
        """Whether rows cannot do all units within a time."""
        capacities, rows = self._capacities, list(self.row_kinds.values())
        simpler = [row.simpler for row in rows]
        few = capacities.quick_most_units(simpler, within_s) < capacities.between
        return few or capacities.most_units(rows, within_s) < capacities.between

    def _sum_s(self, weights: StageWeights, within_s: float) -> float:
        """What stagings take at least; no more than ``within_s``, within which it is looked at."""
        held, rows = zip(*self.row_kinds.items(), strict=True)
        found_s = self._capacities.least_sum_s(rows, weights.of_rows(held), within_s)
        return min(found_s * ROUNDING, within_s)

    def _simple_weights(self) -> Iterator[StageWeights]:
        held, share = list(self.row_kinds), self.microbatches // self.copies
        if 2 * self.rows > self.microbatches:
            yield one_microbatch(held)
        yield through_rows(held, [dict.fromkeys(of_row, share) for of_row in held], self.split)

    def _ramps_exclude(self, along: Sequence[StageWeights], within_s: float) -> bool:
        """Whether rows have too little time beside their ramps; ``along``: for each of them."""
        capacities = self._capacities
        held, rows = zip(*self.row_kinds.items(), strict=True)
        ramps = [
            capacities.ramp(rows, weights.of_rows(held), within_s, number)
            for number, weights in enumerate(along)
        ]
        return capacities.most_units(rows, within_s, ramps) < capacities.between

    @cached_property
    def row_kinds(self) -> dict[tuple[int, ...], RowKind]:
        """For each set of stages that rows have; of copies one for all."""
        chain = tuple((i, i + 1) for i in range(self.stages - 1))
        long = self.stages * self.rows > MOST_ACTIONS
        if keeps_all(self.schedule):
            facts = facts_of(self.schedule, self.stages, 1, self.chunks, chain)
            if facts is not None:
                return row_kinds(facts, self.microbatches)
        if long and self.one_each:
            last = self.stages - 1
            few = [
                first_in_flight(self.schedule, self.stages - s, self.microbatches)
                for s in range(self.stages)
            ]
            found: dict[tuple[int, ...], RowKind] = {(0,): RowKind((), first=few[0])}
            found |= {(s,): RowKind((few[s],)) for s in range(1, last)}
            return {**found, (last,): RowKind((), last=few[-1])}
        if long and self.copies > 1:  # a microbatch for each copy keeps less
            facts = facts_of(self.schedule, self.stages, self.copies, self.chunks, chain)
            if facts is not None:
                return row_kinds(facts, None)
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
            facts = self.first_facts()
            of_rows = facts.in_flight if facts.split else facts.at_once
            counts = [n for row in of_rows for n in row.values()]
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
        between = max(0, len(self.world.units) - 2)
        of_row, of_stage = -(-between // self.rows), -(-between // self.stages)
        # the last unit finds room where not all rows have as many units
        last_s = sums.last_s if of_row * self.rows == between else np.zeros_like(sums.last_s)
        row_s = np.maximum(sums.work_s / self.rows, of_row * sums.between_s + last_s)
        stage_s = np.maximum(sums.work_s / self.stages, of_stage * sums.between_s)
        found = self.microbatches * row_s + self._likely_ramp * stage_s + self._tail_s(sums)
        found = np.maximum(found, self.world.launches_s / self.rows)
        found[sums.devices * self.rows > self.world.problem.devices] = math.inf
        return found, sums

    def likely_of_s(self, parts: Sequence[Sequence[int]], sums: LayoutSums, place: int) -> float:
        """The same for these stages on the layout with this place in the sums. Rows with several
        stages come to their first ones together, to their second ones, and so on: each time the
        slowest counts."""
        weights = sums.weights[place]
        of_stages: list[float] = [sum(weights[u] for u in part) for part in parts]
        together = zip(*self.first_facts().held, strict=True)
        row_s = sum((max(of_stages[s] for s in places) for places in together), 0.0) / self.copies
        ramp_s = self._likely_ramp * max(of_stages)
        return self.microbatches * row_s + ramp_s + float(self._tail_s(sums)[place])

    @property
    def _likely_ramp(self) -> float:
        """In times of a stage."""
        return self.rows / 2 if self.schedule.copies else self.rows - 1

    def _tail_s(self, sums: LayoutSums) -> NDArray[np.float64]:
        """Of several stages on a row only the last one's gradients are exchanged after all
        backwards."""
        tail_s: NDArray[np.float64] = sums.tail_s / (self.rows if self.one_each else self.stages)
        return tail_s


def shapes_of(world: World) -> Iterator[Shape]:
    """All that are not excluded by what all devices do and keep together."""
    problem, m = world.problem, world.microbatches
    room = sum(pool.devices * pool.memory_limit_bytes for pool in problem.pools)
    sizes = {layout.devices for kind in world.mixes.layouts_of for layout in kind}
    least, most = min(sizes), max(sizes)
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
                if problem.all_devices and rows * most < problem.devices:
                    continue
                if schedule.refuses(Asked(stages, m, chunks)):
                    continue
                shape = Shape(world, schedule, stages, chunks, split, rows, 0.0)
                alone_s = world.slowest_unit_s(split, copies)
                together_s = shape.rates().bound_s(rows, 1, priced=False)
                hosts_s = world.launches_s / rows
                least_s = max(alone_s, together_s, shape.one_microbatch_s(), hosts_s)
                shape.bound_s = least_s * ROUNDING
                if math.isfinite(shape.bound_s):
                    yield shape


@lru_cache(maxsize=None)
def first_in_flight(schedule: Schedule, stages: int, microbatches: int) -> int:
    """Of the first of so many stages in a chain: as many as it has in any longer one, where it is
    as far from the end, or fewer. Long ones are not made: they keep no less."""
    stages = min(stages, math.isqrt(MOST_ACTIONS))
    chain = tuple((i, i + 1) for i in range(stages - 1))
    facts = facts_of(schedule, stages, min(stages, microbatches), 1, chain)
    return 1 if facts is None else facts.whole[0][0]


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
