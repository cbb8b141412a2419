"""The outer search: stages x devices x microbatches x schedule x chunks x alternatives of units."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import NamedTuple

from autopar.ir.schedule import Schedule, Shape, most_in_flight
from autopar.ir.search import Budget
from autopar.searchers.stage_mixes import Kinds, Mix, Mixes
from autopar.simulator.pipeline import Feed
from autopar.simulator.pipeline_bound import least_step_s, shares_of
from autopar.simulator.stage_problem import (
    Layout,
    StageChoice,
    StageProblem,
    Staging,
    Unit,
    in_order,
    pipeline_of,
    rows_of,
    value_of_made,
)

Progress = Callable[[str], None]

ROUNDING = 1 - 1e-12
"""Bounds are computed in floats, in another order than what they bound."""


@dataclass(frozen=True, slots=True)
class StageTrial:
    """All stagings of one shape. ``outcome`` as in ``ir.search.Trial``: ``optimal`` (the best of
    them is known, or none is better than the best elsewhere), ``bounded``, ``infeasible``, ``time``
    (not all of them were looked at)."""

    microbatches: int
    schedule: str
    chunks: int
    stages: int
    lower_bound_s: float
    time_s: float | None
    outcome: str


@dataclass(frozen=True)
class StageResult:
    """``best``: ``None`` if nothing was found; ``time_s``: its value. ``lower_bound_s``: no staging
    is better. ``stop_reason`` as in ``ir.search.SearchResult``. ``played``: how many timelines."""

    best: Staging | None
    time_s: float
    lower_bound_s: float
    stop_reason: str
    search_time_s: float
    trials: tuple[StageTrial, ...]
    played: int

    @property
    def gap(self) -> float:
        if self.best is None:
            return 1.0
        return max(0.0, 1 - self.lower_bound_s / self.time_s) if self.time_s else 0.0


def search(
    problem: StageProblem, budget: Budget, progress: Progress = lambda line: None
) -> StageResult:
    """The best staging, and how much better any other could be."""
    return _Search(problem, budget, progress).result()


class LateError(Exception):
    """The time is over."""


class _World:
    """The units for one number of microbatches, and what all shapes with them share."""

    def __init__(self, units: Sequence[Unit], problem: StageProblem) -> None:
        self.units, self.problem = tuple(units), problem
        self.mixes = Mixes(units)
        self.ideals = ideals_of(units)
        self.is_chain = len(self.ideals) == len(units) + 1
        self._parts: dict[tuple[int, int], tuple[tuple[int, ...], Kinds]] = {}
        self._least_device_s: dict[bool, list[float]] = {}

    def part(self, before: int, after: int) -> tuple[tuple[int, ...], Kinds]:
        """Units between two ideals, and their kinds."""
        found = self._parts.get((before, after))
        if found is None:
            bits = after & ~before
            units = tuple(u for u in range(len(self.units)) if bits >> u & 1)
            found = self._parts[before, after] = units, self.mixes.kinds_in(units)
        return found

    def least_device_s(self, split: bool) -> list[float]:
        """For each unit, device-seconds that a microbatch takes at least; infinite if it cannot be
        done."""
        if split not in self._least_device_s:
            of_kind = [
                min(
                    (
                        a.layout.devices * float(Mix((), a.cost, 0).work_s(split))
                        for a in kind
                        if not split or a.cost.input_gradient_s is not None
                    ),
                    default=math.inf,
                )
                for kind in self.mixes.kinds
            ]
            self._least_device_s[split] = [of_kind[kind] for kind in self.mixes.kind_of]
        return self._least_device_s[split]


def ideals_of(units: Sequence[Unit]) -> list[int]:
    """Sets of units (as bits) that hold with each unit all that it reads; smaller ones first."""
    needs = [sum(1 << read for read in unit.reads) for unit in units]
    found = {0}
    layer = [0]
    while layer:
        larger = {
            ideal | 1 << u
            for ideal in layer
            for u, need in enumerate(needs)
            if not ideal >> u & 1 and need & ~ideal == 0
        }
        found |= larger
        layer = sorted(larger)
    return sorted(found, key=lambda ideal: (ideal.bit_count(), ideal))


@dataclass
class _Shape:
    """What is fixed before stages are chosen. ``bound_s``: none of its stagings is better."""

    world: _World
    microbatches: int
    schedule: Schedule
    stages: int
    chunks: int
    split: bool
    rows: int
    bound_s: float
    best_s: float = math.inf
    outcome: str = "bounded"


class _Search:
    def __init__(self, problem: StageProblem, budget: Budget, progress: Progress) -> None:
        self.problem, self.budget, self.progress = problem, budget, progress
        self.start_s = monotonic()
        self.best: Staging | None = None
        self.best_s = math.inf
        self.played = 0
        self.shapes: list[_Shape] = []

    def result(self) -> StageResult:
        reason = ""
        try:
            for m in self.problem.microbatches:
                self.check_time()
                self.shapes += self._shapes(_World(self.problem.units(m), self.problem), m)
            self.shapes.sort(key=lambda shape: shape.bound_s)
            for shape in self.shapes:
                if shape.bound_s >= self.good_enough_s:
                    break
                self.progress(
                    f"{shape.stages} stages, {shape.microbatches} microbatches, "
                    f"{shape.schedule.name}"
                )
                shape.outcome = "time"
                depth = _Depth(self, shape)
                depth.search()
                shape.bound_s = max(shape.bound_s, min(depth.pruned_s, shape.best_s))
                shape.outcome = "infeasible" if math.isinf(shape.bound_s) else "optimal"
        except LateError:
            reason = "time"
        except KeyboardInterrupt:
            reason = "interrupted"
        return self._result(reason)

    def _result(self, reason: str) -> StageResult:
        bound_s = min([self.best_s, *(shape.bound_s for shape in self.shapes)])
        if reason and not self.shapes:
            bound_s = 0.0
        if not reason:
            near = self.best is not None and bound_s >= self.good_enough_s
            reason = "infeasible" if self.best is None else "optimal" if near else "gap"
        return StageResult(
            best=self.best,
            time_s=self.best_s,
            lower_bound_s=bound_s,
            stop_reason=reason,
            search_time_s=monotonic() - self.start_s,
            trials=tuple(
                StageTrial(
                    shape.microbatches,
                    shape.schedule.name,
                    shape.chunks,
                    shape.stages,
                    shape.bound_s,
                    None if math.isinf(shape.best_s) else shape.best_s,
                    shape.outcome,
                )
                for shape in self.shapes
            ),
            played=self.played,
        )

    @property
    def good_enough_s(self) -> float:
        """What is not better than this is not looked at."""
        return self.best_s * (1 - self.budget.gap)

    def check_time(self) -> None:
        if monotonic() - self.start_s > self.budget.time_s:
            raise LateError

    # Shapes

    def _shapes(self, world: _World, m: int) -> Iterator[_Shape]:
        least = min(layout.devices for kind in world.mixes.layouts_of for layout in kind)
        for schedule in self.problem.schedules:
            for stages in range(1, len(world.units) + 1):
                for chunks in range(1, stages + 1):
                    if not schedule.copies and stages % chunks:
                        continue
                    rows = stages if schedule.copies else stages // chunks
                    if rows * least > self.problem.devices:
                        continue
                    if schedule.refuses(Shape(stages, m, chunks)):
                        continue
                    split = _splits(schedule)
                    bound_s = self._bound_s(world, m, split, chunks if schedule.copies else 1)
                    if math.isfinite(bound_s):
                        yield _Shape(world, m, schedule, stages, chunks, split, rows, bound_s)

    def _bound_s(self, world: _World, m: int, split: bool, copies: int) -> float:
        """No devices do more work together than all of them, and no row less than one unit."""
        work_s = m * sum(world.least_device_s(split)) / self.problem.devices
        for kind in world.mixes.kinds:
            of_unit_s = min(
                (
                    m // copies * float(Mix((), a.cost, 0).work_s(split)) + float(a.cost.update_s)
                    for a in kind
                    if not split or a.cost.input_gradient_s is not None
                ),
                default=math.inf,
            )
            work_s = max(work_s, of_unit_s)
        return work_s * ROUNDING


def _splits(schedule: Schedule) -> bool:
    """Whether its backwards are ``I`` and ``W``, in the smallest rows that it makes."""
    for size in range(1, 9):
        for chunks in range(1, size + 1):
            laid = rows_of(schedule, size, size, chunks, tuple((i, i + 1) for i in range(size - 1)))
            if laid is not None:
                return laid.split
    return False


class _Placed(NamedTuple):
    """A stage with all that was chosen for it."""

    part: tuple[int, ...]
    layout: Layout
    mix: Mix


@dataclass
class _Node:
    """The first stages of a shape. ``there_s``, ``back_s``: of each, as in ``pipeline_bound``.

    ``layouts``: of each row, as far as known. ``load_s``, ``kept_bytes`` (parameters, gradients and
    optimizer states): of each row. ``device_s``: device-seconds of what is placed, in a step;
    ``left_device_s``: what a microbatch of the rest takes at least."""

    ideal: int
    placed: tuple[_Placed, ...]
    there_s: tuple[float, ...]
    back_s: tuple[float, ...]
    layouts: tuple[Layout | None, ...]
    load_s: tuple[float, ...]
    kept_bytes: tuple[int, ...]
    device_s: float
    left_device_s: float
    bound_s: float = 0.0


@dataclass
class _Depth:
    """Every staging of a shape, stage by stage, but for those that a bound excludes."""

    search_of: _Search
    shape: _Shape
    pruned_s: float = math.inf
    _visited: int = field(default=0)

    def __post_init__(self) -> None:
        shape = self.shape
        world, count = shape.world, shape.stages
        laid = rows_of(
            shape.schedule,
            count,
            shape.microbatches,
            shape.chunks,
            tuple((i, i + 1) for i in range(count - 1)),
        )
        assert laid is not None, shape
        self.held = laid.stages
        self.rows_of_stage = [
            [r for r, of_row in enumerate(laid.stages) if s in of_row] for s in range(count)
        ]
        self.shares = shares_of(laid.rows)
        # which rows a stage is in does not depend on what feeds it; how far it runs ahead may
        self.in_flight = [
            {s: most_in_flight(row, s) if world.is_chain else 1 for s in of_row}
            for row, of_row in zip(laid.rows, laid.stages, strict=True)
        ]
        self.one_each = all(len(of_row) == 1 for of_row in laid.stages)
        self.full = (1 << len(world.units)) - 1
        self.least_device_s = world.least_device_s(shape.split)
        self.step = self.search_of.problem.objective == "step"

    def search(self) -> None:
        rows = self.shape.rows
        nothing: tuple[Layout | None, ...] = (None,) * rows
        left = sum(self.least_device_s)
        self._visit(_Node(0, (), (), (), nothing, (0.0,) * rows, (0,) * rows, 0.0, left))

    def _visit(self, node: _Node) -> None:
        self._visited += 1
        if self._visited % 64 == 0:
            self.search_of.check_time()
        if len(node.placed) == self.shape.stages:
            self._leaf(node)
            return
        children = sorted(self._children(node), key=lambda child: child.bound_s)
        for child in children:
            if child.bound_s >= self.search_of.good_enough_s:
                self.pruned_s = min(self.pruned_s, child.bound_s)
            else:
                self._visit(child)

    def _children(self, node: _Node) -> Iterator[_Node]:
        world = self.shape.world
        to_come = self.shape.stages - len(node.placed) - 1
        for ideal in world.ideals:
            if ideal == node.ideal or ideal & node.ideal != node.ideal:
                continue
            if (to_come == 0) != (ideal == self.full):
                continue
            if (self.full & ~ideal).bit_count() < to_come:
                continue
            part, kinds = world.part(node.ideal, ideal)
            if node.placed and not self._follows(node.placed[-1].part, part):
                continue
            for layout in world.mixes.layouts(kinds):
                yield from self._with(node, ideal, part, kinds, layout)

    def _follows(self, last: tuple[int, ...], part: tuple[int, ...]) -> bool:
        """Stages that do not read each other are in the order of their first units."""
        if last[0] < part[0]:
            return True
        inside = set(last)
        return any(read in inside for unit in part for read in self.shape.world.units[unit].reads)

    def _with(
        self, node: _Node, ideal: int, part: tuple[int, ...], kinds: Kinds, layout: Layout
    ) -> Iterator[_Node]:
        problem, number = self.search_of.problem, len(node.placed)
        layouts = list(node.layouts)
        for row in self.rows_of_stage[number]:
            there = layouts[row]
            if there is None:
                layouts[row] = layout
            elif (there.devices, there.kind) != (layout.devices, layout.kind):
                return
        if not self._enough_devices(layouts):
            return
        limit = problem.limit_bytes[layout.kind]
        for mix in self.shape.world.mixes.of(kinds, layout):
            if self.shape.split and mix.cost.input_gradient_s is None:
                continue
            memory = mix.cost.memory
            assert memory is not None
            kept = list(node.kept_bytes)
            rows = self.rows_of_stage[number]
            for row in rows:
                kept[row] += mix.static_bytes
            one = memory.activations_bytes
            if any(kept[r] + one * self.in_flight[r][number] > limit for r in rows):
                continue
            yield self._child(node, ideal, _Placed(part, layout, mix), layouts, kept)

    def _enough_devices(self, layouts: Sequence[Layout | None]) -> bool:
        for pool in self.search_of.problem.pools:
            used = sum(x.devices for x in layouts if x is not None and x.kind == pool.kind)
            if used > pool.devices:
                return False
        open_rows = sum(layout is None for layout in layouts)
        return self._free(layouts) >= open_rows

    def _free(self, layouts: Sequence[Layout | None]) -> int:
        used = sum(layout.devices for layout in layouts if layout is not None)
        return self.search_of.problem.devices - used

    def _child(
        self,
        node: _Node,
        ideal: int,
        placed: _Placed,
        layouts: list[Layout | None],
        kept: list[int],
    ) -> _Node:
        number, cost = len(node.placed), placed.mix.cost
        work_s = float(placed.mix.work_s(self.shape.split))
        load = list(node.load_s)
        device_s = node.device_s
        for row in self.rows_of_stage[number]:
            share = self.shares[row][number]
            load[row] += share * work_s
            device_s += share * work_s * placed.layout.devices
        there_s, back_s = self._ways(node, placed, layouts)
        child = _Node(
            ideal,
            (*node.placed, placed),
            (*node.there_s, there_s),
            (*node.back_s, back_s),
            tuple(layouts),
            tuple(load),
            tuple(kept),
            device_s,
            node.left_device_s - sum(self.least_device_s[unit] for unit in placed.part),
        )
        tail_s = float(cost.update_s) + float(placed.mix.synchronisation_s) * self.step
        own_s = there_s + max(self.shares[r][number] for r in self.rows_of_stage[number]) * work_s
        child.bound_s = max(node.bound_s, (own_s + tail_s) * ROUNDING, self._bound_s(child))
        return child

    def _ways(
        self, node: _Node, placed: _Placed, layouts: Sequence[Layout | None]
    ) -> tuple[float, float]:
        """How long a microbatch takes to the stage, and from its backward to the end of the step.

        Passages are priced where each row has one stage, since then their devices are known.
        """
        if not self.step:
            return 0.0, 0.0
        units = self.shape.world.units
        stage_of = {unit: s for s, other in enumerate(node.placed) for unit in other.part}
        crossing: dict[int, set[int]] = {}
        for unit in placed.part:
            for read in units[unit].reads:
                if read in stage_of:
                    crossing.setdefault(stage_of[read], set()).add(read)
        there_s = back_s = 0.0
        for source, tensors in crossing.items():
            cost = node.placed[source].mix.cost
            gone_s, come_s = self._passages_s(node, placed, layouts, source, tensors)
            there_s = max(there_s, node.there_s[source] + float(cost.forward_s) + gone_s)
            if any(units[t].gradient for t in tensors):
                half_s = cost.input_gradient_s if self.shape.split else cost.backward_s
                back_s = max(back_s, come_s + float(half_s or 0) + node.back_s[source])
        cost = placed.mix.cost
        back_s = max(back_s, float(cost.update_s) + float(placed.mix.synchronisation_s))
        return there_s, back_s

    def _passages_s(
        self,
        node: _Node,
        placed: _Placed,
        layouts: Sequence[Layout | None],
        source: int,
        tensors: set[int],
    ) -> tuple[float, float]:
        if not self.one_each or len(self.search_of.problem.pools) > 1:
            return 0.0, 0.0
        units, number = self.shape.world.units, len(node.placed)
        size = sum(units[t].output_bytes for t in tensors)
        back = sum(units[t].output_bytes for t in tensors if units[t].gradient)
        parts = (node.placed[source].layout.parts, placed.layout.parts)
        feed = Feed(
            source, number, size, back, back > 0, -(-size // parts[0]), -(-size // parts[1])
        )
        groups, first = [], 0
        for layout in layouts[: number + 1]:
            assert layout is not None
            groups.append(tuple(range(first, first + layout.devices)))
            first += layout.devices
        network = self.search_of.problem.network(tuple(groups))
        gone = network.passage(feed, False, source, number)
        come = network.passage(feed, True, number, source)
        return float(gone.busy_s + gone.latency_s), float(come.busy_s + come.latency_s)

    def _bound_s(self, node: _Node) -> float:
        """Of all that begins with these stages."""
        number = len(node.placed)
        devices = self.search_of.problem.devices
        all_s = node.device_s + self.shape.microbatches * node.left_device_s
        found = all_s / devices
        if self.step:
            waiting = 0.0
            for row, load_s in enumerate(node.load_s):
                layout = node.layouts[row]
                stages = [s for s in self.held[row] if s < number]
                if layout is None or not stages:
                    continue
                reached_s = min(node.there_s[s] for s in stages)
                waiting += reached_s * layout.devices
                through_s = reached_s + load_s
                if self.shape.split:
                    found = max(found, through_s)
                elif len(self.held[row]) == 1:
                    found = max(found, through_s + node.back_s[stages[0]])
                else:
                    found = max(found, through_s)
            found = max(found, (all_s + waiting) / devices)
        else:
            found = max(found, *node.load_s)
        return found * ROUNDING

    def _leaf(self, node: _Node) -> None:
        search, shape = self.search_of, self.shape
        world = shape.world
        parts = [placed.part for placed in node.placed]
        if in_order(parts, world.units) != parts:
            return
        staging = Staging(
            shape.microbatches,
            shape.schedule,
            shape.chunks,
            tuple(
                StageChoice(p.part, p.layout, world.mixes.alternatives(p.mix, p.part))
                for p in node.placed
            ),
        )
        made = pipeline_of(search.problem, staging, world.units)
        if made is None:
            return
        if self.step:
            shares = shares_of(made.laid.rows)
            bound = least_step_s(made.pipeline, shares, split=made.laid.split)
            if float(bound) * ROUNDING >= search.good_enough_s:
                self.pruned_s = min(self.pruned_s, float(bound) * ROUNDING)
                return
        value = value_of_made(search.problem, staging, made)
        search.played += 1
        if value is None:
            return
        time_s = float(value.time_s)
        shape.best_s = min(shape.best_s, time_s)
        if time_s < search.best_s:
            search.best, search.best_s = staging, time_s
