"""Recomputation: what is not kept for the backward, what is run again for it, when, and from what.

Recomputed operators that follow one another are a **segment**, which is run again as one. Of it no
more is run than something saved is missing of: a product whose operands alone are saved is not done
twice. Collectives are not repeated (``Strategy.repeat_collectives`` says where they are): what a
redistribution of a tensor that a segment makes has brought is kept (communication-aware
checkpointing, arXiv 2303.06318), and then often what made the tensor need not run again.

Memory, prices, promise and the lowered program all read this one list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from autopar.errors import AutoparError
from autopar.ir.graph import Operator, OperatorGraph, Role
from autopar.ir.rule import BoundRule
from autopar.ir.sharding import Sharding
from autopar.ir.strategy import Strategy
from autopar.simulator.costs import inner_transfers
from autopar.simulator.edges import Lying, Rules, carries_gradient, lying, saves_input
from autopar.simulator.redistribution import forward_collective, steps

Version = tuple[str, Sharding]
"""A tensor in one of its shardings."""


@dataclass(frozen=True)
class Segment:
    """Operators whose tensors are not kept, in the order of the graph.

    ``again``: those that are run again, ``before`` the backward of that operator, from the versions
    ``kept`` (gathered parameters are gathered again, and parameters and buffers are there anyway).
    ``remade``: versions that are redistributed again, with the shardings they come from.
    """

    operators: tuple[str, ...]
    again: tuple[str, ...]
    kept: tuple[Version, ...]
    remade: tuple[tuple[Version, Sharding], ...]
    before: str


@dataclass(frozen=True)
class Recomputation:
    """``segment_of``: by version that is not kept for the backward, the number of the segment that
    makes it again."""

    segments: tuple[Segment, ...] = ()
    segment_of: dict[Version, int] = field(default_factory=dict)

    @cached_property
    def again(self) -> dict[str, int]:
        """By operator that is run again, its segment."""
        return {name: i for i, segment in enumerate(self.segments) for name in segment.again}

    def to_the_end(self) -> Recomputation:
        """Every operator of a segment that is run again is run, as by checkpointing that knows
        no more than a block's function."""
        segments = tuple(replace(s, again=s.operators) if s.again else s for s in self.segments)
        return Recomputation(segments, self.segment_of)

    @cached_property
    def recomputed(self) -> dict[str, int]:
        """By operator that keeps nothing, its segment."""
        return {name: i for i, segment in enumerate(self.segments) for name in segment.operators}

    @cached_property
    def before(self) -> dict[str, list[int]]:
        """By operator, the segments that its backward runs again."""
        found: dict[str, list[int]] = {}
        for number, segment in enumerate(self.segments):
            if segment.again:
                found.setdefault(segment.before, []).append(number)
        return found


NONE = Recomputation()


def recomputation(graph: OperatorGraph, rules: Rules, strategy: Strategy) -> Recomputation:
    """What ``strategy.recompute`` means for ``graph``: the whole one, that of a stage, or a folded
    one (operators that it does not have are passed over).

    Raises:
        AutoparError: an operator that cannot be run again without communication.
    """
    if not strategy.recompute:
        return NONE
    return _Analysis(graph, rules, strategy).recomputation()


def check_recompute(graph: OperatorGraph, strategy: Strategy) -> None:
    """
    Raises:
        AutoparError: names that the graph does not have, or that are not recomputed.
    """
    chosen = set(strategy.recompute)
    if unknown := chosen - graph.operator.keys():
        raise AutoparError(
            f"operators {', '.join(sorted(unknown)[:3])} are to be recomputed and are not in the "
            f"graph ({len(unknown)} in all); name operators of {graph.name}"
        )
    made = {name for operator in chosen for name in graph.operator[operator].outputs}
    if others := set(strategy.repeat_collectives) - made:
        raise AutoparError(
            f"collectives of {', '.join(sorted(others)[:3])} are to be repeated ({len(others)} in "
            "all), which no recomputed operator makes; recompute the operators that make them, too"
        )


class _Analysis:
    def __init__(self, graph: OperatorGraph, rules: Rules, strategy: Strategy) -> None:
        self.graph, self.rules, self.strategy = graph, rules, strategy
        self.repeated = set(strategy.repeat_collectives)
        self.number = {o.name: i for i, o in enumerate(graph.operators)}
        self.home: dict[str, Sharding] = {}
        self.savers: dict[str, list[tuple[Version, int]]] = {}
        self.needed_by_others: set[str] = set()
        self.segment_of: dict[Version, int] = {}

    def recomputation(self) -> Recomputation:
        runs = list(_runs(self.graph.operators, set(self.strategy.recompute)))
        makers = {name: run for run in runs for o in run for name in o.outputs}
        for number, operator in enumerate(self.graph.operators):
            wanted, produced = self._lying(operator)
            self.home.update(zip(operator.outputs, produced, strict=True))
            for index, name in enumerate(operator.inputs):
                if name in makers and self._saves(operator, index):
                    self.savers.setdefault(name, []).append(((name, wanted[index]), number))
        # from the last to the first: what a later one is run again from is kept by the earlier ones
        found = [self._segment(len(runs) - 1 - i, run) for i, run in enumerate(reversed(runs))]
        return Recomputation(tuple(reversed(found)), self.segment_of)

    # ---- one segment ---------------------------------------------------------------------------

    def _segment(self, number: int, run: tuple[Operator, ...]) -> Segment:
        made = {name for o in run for name in o.outputs} - self.needed_by_others
        needed: dict[Version, int] = {}
        for name in made:
            for version, saver in self.savers.get(name, ()):
                if self._is_dropped(version, made):
                    needed[version] = max(saver, needed.get(version, -1))
        before = max(needed.values(), default=-1)
        missing = set(needed)
        missing |= {(name, self.home[name]) for name, _ in needed}
        again: list[str] = []
        kept: dict[Version, None] = {}
        for operator in reversed(run):
            outputs = {(name, self.home[name]) for name in operator.outputs}
            own = self._keeps_of_its_own(operator)
            if not own and missing.isdisjoint(outputs):
                continue
            if own:
                before = max(before, self.number[operator.name])
            self._check(operator)
            again.append(operator.name)
            for version in self._wanted(operator):
                if self._is_dropped(version, made):
                    missing |= {version, (version[0], self.home[version[0]])}
                elif self._can_be_kept(version):
                    kept[version] = None
        self.needed_by_others |= {name for name, _ in kept}
        self.segment_of.update(dict.fromkeys(self._dropped(run, made), number))
        return Segment(
            tuple(o.name for o in run),
            tuple(reversed(again)),
            tuple(kept),
            tuple(self._remade(run, missing)),
            self.graph.operators[before].name if again else "",
        )

    def _is_dropped(self, version: Version, made: set[str]) -> bool:
        name, target = version
        return name in made and (name in self.repeated or not self._communicates(name, target))

    def _dropped(self, run: tuple[Operator, ...], made: set[str]) -> Iterator[Version]:
        for operator in run:
            for name in operator.outputs:
                yield from (v for v in self._versions(name) if self._is_dropped(v, made))

    def _versions(self, name: str) -> dict[Version, None]:
        """As it is made, and as it is read."""
        found: dict[Version, None] = {(name, self.home[name]): None}
        for reader, position in self.graph.consumers[name]:
            found[self._wanted(reader)[position]] = None
        return found

    def _remade(
        self, run: tuple[Operator, ...], missing: set[Version]
    ) -> Iterator[tuple[Version, Sharding]]:
        for operator in run:
            for name in operator.outputs:
                for version in self._versions(name):
                    if version in missing and version[1] != self.home[name]:
                        yield version, self.home[name]

    def _check(self, operator: Operator) -> None:
        """Whether it may be run again."""
        bound, split = self.rules[operator.name], self.strategy.splits[operator.name]
        mesh = self.strategy.mesh
        inside = [
            t
            for t in inner_transfers(bound, split, mesh, "forward")
            if mesh.sizes[t.axis] > 1 and self.repeated.isdisjoint(operator.outputs)
        ]
        if inside:
            axes = " and ".join(dict.fromkeys(mesh.names[t.axis] for t in inside))
            raise AutoparError(
                f"{operator.name} ({operator.op}) cannot be recomputed without communication: it "
                f"needs the other ranks of the axis {axes} for its result. Leave it out of what is "
                f"recomputed, or repeat the collectives of {operator.outputs[0]}"
            )

    # ---- operators -----------------------------------------------------------------------------

    def _lying(self, operator: Operator) -> Lying:
        return lying(self.graph, self.rules, self.strategy.splits, operator)

    def _wanted(self, operator: Operator) -> list[Version]:
        return list(zip(operator.inputs, self._lying(operator)[0], strict=True))

    def _saves(self, operator: Operator, index: int) -> bool:
        return saves_input(self.graph, operator, self.rules[operator.name], index)

    def _keeps_of_its_own(self, operator: Operator) -> bool:
        """Whether it saves what is not its input."""
        return carries_gradient(self.graph, operator) and any(
            True for _ in own_saves(self.graph, operator, self.rules[operator.name])
        )

    def _communicates(self, name: str, target: Sharding) -> bool:
        return communicates(self.home[name], target)

    def _can_be_kept(self, version: Version) -> bool:
        """Not a parameter that is gathered: that is gathered again."""
        name, target = version
        if self.graph.by_name[name].role is not Role.PARAMETER:
            return True
        return not communicates(self.strategy.storage[name].parameter, target)


def _runs(operators: Iterable[Operator], chosen: set[str]) -> Iterator[tuple[Operator, ...]]:
    """Those chosen that follow one another."""
    run: list[Operator] = []
    for operator in operators:
        if operator.name in chosen:
            run.append(operator)
        elif run:
            yield tuple(run)
            run = []
    if run:
        yield tuple(run)


def communicates(source: Sharding, target: Sharding) -> bool:
    """Whether the forward of a redistribution has a collective."""
    return any(forward_collective(step) is not None for step in steps(source, target))


def own_saves(graph: OperatorGraph, operator: Operator, bound: BoundRule) -> Iterator[str]:
    """What the operator keeps for its backward that is not one of its inputs."""
    needed = graph.differentiable[operator.name][0]
    for saved in bound.rule.saves:
        if not saved.what.startswith("input ") and (
            not saved.needs or any(needed[i] for i in saved.needs)
        ):
            yield saved.what


__all__ = ["NONE", "Recomputation", "Segment", "check_recompute", "recomputation"]
