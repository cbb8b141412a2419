"""Every staging of a shape, stage by stage, but for those that a bound excludes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from autopar.searchers.stage_mixes import Kinds, Mix
from autopar.searchers.stage_shapes import ROUNDING, Incumbent, Shape
from autopar.searchers.stage_tables import Tables, halves
from autopar.simulator.pipeline import Feed
from autopar.simulator.stage_problem import Layout, StageChoice, Staging, facts_of, in_order


class EnoughError(Exception):
    """As many nodes were visited as were to be."""


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
    ``left_device_s``: what a microbatch of the rest takes at least. ``next_there_s``,
    ``next_back_s``: of a next stage, as far as it is a chain."""

    ideal: int
    placed: tuple[_Placed, ...]
    there_s: tuple[float, ...]
    back_s: tuple[float, ...]
    layouts: tuple[Layout | None, ...]
    load_s: tuple[float, ...]
    kept_bytes: tuple[int, ...]
    device_s: float
    left_device_s: float
    next_there_s: float = 0.0
    next_back_s: float = -math.inf
    bound_s: float = 0.0


@dataclass
class Depth:
    """``tables``: where they hold for the shape, what leads the way. ``most``: nodes to visit.
    ``pruned_s``: the least bound of what was excluded."""

    incumbent: Incumbent
    shape: Shape
    tables: Tables | None
    most: int
    pruned_s: float = math.inf
    _visited: int = field(default=0)

    def __post_init__(self) -> None:
        shape = self.shape
        world, count = shape.world, shape.stages
        feeds = tuple((i, i + 1) for i in range(count - 1))
        facts = facts_of(shape.schedule, count, shape.microbatches, shape.chunks, feeds)
        assert facts is not None, shape
        self.held = facts.held
        self.rows_of_stage = [
            [r for r, of_row in enumerate(facts.held) if s in of_row] for s in range(count)
        ]
        self.shares = shape.shares()
        # which rows a stage is in does not depend on what feeds it; how far it runs ahead may
        self.in_flight = [
            of_row if world.is_chain else dict.fromkeys(of_row, 1) for of_row in facts.whole
        ]
        self.one_each = all(len(of_row) == 1 for of_row in facts.held)
        self.full = (1 << len(world.units)) - 1
        self.least_device_s = world.least_device_s(shape.split)
        self.step = self.incumbent.problem.objective == "step"

    def search(self) -> None:
        rows = self.shape.rows
        nothing: tuple[Layout | None, ...] = (None,) * rows
        left = sum(self.least_device_s)
        self._visit(_Node(0, (), (), (), nothing, (0.0,) * rows, (0,) * rows, 0.0, left))

    def _visit(self, node: _Node) -> None:
        self._visited += 1
        if self._visited > self.most:
            raise EnoughError
        if self._visited % 64 == 0:
            self.incumbent.check_time()
        if len(node.placed) == self.shape.stages:
            self._leaf(node)
            return
        if self.tables is not None:
            self._visit_by_tables(node, self.tables)
            return
        for child in sorted(self._children(node), key=lambda child: child.bound_s):
            self._visit_unless_bounded(child)

    def _visit_unless_bounded(self, child: _Node) -> None:
        if child.bound_s >= self.incumbent.good_enough_s:
            self.pruned_s = min(self.pruned_s, child.bound_s)
        else:
            self._visit(child)

    def _visit_by_tables(self, node: _Node, tables: Tables) -> None:
        """Along a chain: mixes are made only where the tables do not exclude them all."""
        number, unit = len(node.placed), node.ideal.bit_count()
        left = self.shape.stages - number
        there_s, back_s = node.next_there_s, node.next_back_s
        world = self.shape.world
        for option in tables.options(left, unit, self._free(node.layouts), there_s, back_s):
            if option.bound_s >= self.incumbent.good_enough_s:
                self.pruned_s = min(self.pruned_s, option.bound_s)
                return
            ideal = (1 << unit + option.size) - 1
            part, kinds = world.part(node.ideal, ideal)
            children = list(self._with(node, ideal, part, kinds, option.layout))
            for child in children:
                rest_s = tables.rest_s(
                    left - 1,
                    unit + option.size,
                    self._free(child.layouts),
                    child.next_there_s,
                    child.next_back_s,
                )
                child.bound_s = max(child.bound_s, rest_s)
            for child in sorted(children, key=lambda child: child.bound_s):
                self._visit_unless_bounded(child)
        self.pruned_s = min(self.pruned_s, tables.under_s)

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
        problem, number = self.incumbent.problem, len(node.placed)
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
        rows = self.rows_of_stage[number]
        self.incumbent.check_time()  # there may be many mixes, which takes long at first
        front = self.shape.world.mixes.of(kinds, layout)
        free = [(limit - node.kept_bytes[row], self.in_flight[row][number]) for row in rows]
        for place in front.fitting(free, self.shape.split):
            mix = front.mix(place)
            kept = list(node.kept_bytes)
            for row in rows:
                kept[row] += mix.static_bytes
            yield self._child(node, ideal, _Placed(part, layout, mix), layouts, kept)

    def _enough_devices(self, layouts: Sequence[Layout | None]) -> bool:
        for pool in self.incumbent.problem.pools:
            used = sum(x.devices for x in layouts if x is not None and x.kind == pool.kind)
            if used > pool.devices:
                return False
        open_rows = sum(layout is None for layout in layouts)
        return self._free(layouts) >= open_rows

    def _free(self, layouts: Sequence[Layout | None]) -> int:
        used = sum(layout.devices for layout in layouts if layout is not None)
        return self.incumbent.problem.devices - used

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
        if self.step:
            f, b, _ = halves(cost, self.shape.split)
            child.next_there_s, child.next_back_s = there_s + f, b + back_s
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
        if not self.one_each or len(self.incumbent.problem.pools) > 1:
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
        network = self.incumbent.problem.network(tuple(groups))
        gone = network.passage(feed, False, source, number)
        come = network.passage(feed, True, number, source)
        return float(gone.busy_s + gone.latency_s), float(come.busy_s + come.latency_s)

    def _bound_s(self, node: _Node) -> float:
        """Of all that begins with these stages."""
        number = len(node.placed)
        devices = self.incumbent.problem.devices
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
        shape, world = self.shape, self.shape.world
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
        bound_s = self.incumbent.consider(shape, staging)
        if bound_s is not None:
            self.pruned_s = min(self.pruned_s, bound_s)
