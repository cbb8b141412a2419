"""Operators that are decided together: views and elementwise chains follow what they read.

The decision unit of a search is a cluster. Inside it no tensor is redistributed; what that rules
out is stated in ``docs/decisions``. Operators that stand for many equal ones are met once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from autopar.ir.graph import OperatorGraph, Role
from autopar.ir.rule import REPLICATED, SUMMED, BoundRule, Choice
from autopar.ir.sharding import Placement
from autopar.simulator.edges import Rules, canonical

Option = dict[int, Choice]
"""What one mesh axis does to each operator of a cluster, by operator index."""


@dataclass(frozen=True)
class Link:
    """Equal tensors between classes of operators: output ``output`` of ``producer``, read by
    ``consumers`` (class, input position), ``count`` times in the graph; ``tensor`` names one."""

    tensor: str
    producer: int
    output: int
    consumers: tuple[tuple[int, int], ...]
    count: int
    ends: bool  # the loss or a buffer's new value: also wanted whole


@dataclass
class Cluster:
    """Operators (by class) and, for one mesh axis, what they may do together."""

    members: list[int]
    options: list[Option] = field(default_factory=list)


def links(graph: OperatorGraph, class_of: Sequence[int]) -> tuple[Link, ...]:
    """The activations between classes, equal ones counted."""
    of = {operator.name: c for operator, c in zip(graph.operators, class_of, strict=True)}
    ends = {graph.loss, *(tensor for _, tensor in graph.mutations)}
    counts: dict[tuple[int, int, tuple[tuple[int, int], ...], bool], int] = {}
    names: dict[tuple[int, int, tuple[tuple[int, int], ...], bool], str] = {}
    for i, operator in enumerate(graph.operators):
        for output, name in enumerate(operator.outputs):
            readers = dict.fromkeys([(of[o.name], place) for o, place in graph.consumers[name]])
            key = (class_of[i], output, tuple(readers), name in ends)
            counts[key] = counts.get(key, 0) + 1
            names.setdefault(key, name)
    return tuple(
        Link(names[key], key[0], key[1], key[2], count, key[3]) for key, count in counts.items()
    )


def clusters(
    graph: OperatorGraph,
    rules: Rules,
    class_of: Sequence[int],
    copies: Mapping[int, int],
    found: Sequence[Link],
) -> tuple[Cluster, ...]:
    """Group the classes; every cluster's members have equally many copies."""
    return _Grouping(graph, rules, copies, tuple(found)).run(sorted(set(class_of)))


@dataclass
class _Grouping:
    graph: OperatorGraph
    rules: Rules
    copies: Mapping[int, int]
    links: tuple[Link, ...]
    home: dict[int, Cluster] = field(default_factory=dict)
    _choices: dict[int, tuple[Choice, ...]] = field(default_factory=dict)

    def run(self, representatives: Sequence[int]) -> tuple[Cluster, ...]:
        for operator in representatives:
            own = Cluster([operator], [{operator: c} for c in self.choices(operator)])
            self.home[operator] = own
        made: dict[int, list[Link]] = {}
        for link in self.links:
            made.setdefault(link.producer, []).append(link)
        for operator in representatives:
            for link in made.get(operator, ()):
                self._absorb_consumers(link)
        seen: dict[int, Cluster] = {id(cluster): cluster for cluster in self.home.values()}
        return tuple(sorted(seen.values(), key=lambda c: min(c.members)))

    def bound(self, operator: int) -> BoundRule:
        return self.rules[self.graph.operators[operator].name]

    def choices(self, operator: int) -> tuple[Choice, ...]:
        """What an axis may do to the operator.

        The same work on R tensors differs from the same work on I tensors only in where gradients
        are summed: worth having where that is smaller, before an operator that makes its input
        larger, or where the operator works on parameters alone.
        """
        known = self._choices.get(operator)
        if known is None:
            bound = self.bound(operator)
            known = tuple(
                c for c in bound.choices if c != REPLICATED or self._replicating_helps(operator)
            )
            self._choices[operator] = known
        return known

    def _replicating_helps(self, operator: int) -> bool:
        inputs = [self.graph.by_name[name] for name in self.graph.operators[operator].inputs]
        outputs = [self.graph.spec(name) for name in self.graph.operators[operator].outputs]
        if all(t.role is not Role.ACTIVATION for t in inputs):
            return any(t.role is Role.PARAMETER for t in inputs)
        flowing = [t.spec.bytes for t in inputs if t.differentiable]
        return bool(flowing) and sum(s.bytes for s in outputs) > sum(flowing)

    def _absorb_consumers(self, link: Link) -> None:
        """Take all consumers of the tensor into its producer's cluster, or none."""
        cluster = self.home[link.producer]
        copies = self.copies[link.producer]
        consumers = list(dict.fromkeys(operator for operator, _ in link.consumers))
        if link.ends or not consumers or link.count != copies:
            return
        newcomers = [c for c in consumers if self.home[c] is not cluster]
        if not newcomers or any(not self._follows(c, copies) for c in newcomers):
            return
        members, options = list(cluster.members), cluster.options
        for newcomer in newcomers:
            joined = self._join(members, options, newcomer)
            if joined is None:
                return
            members, options = [*members, newcomer], joined
        cluster.members, cluster.options = members, options
        for newcomer in newcomers:
            self.home[newcomer] = cluster

    def _follows(self, operator: int, copies: int) -> bool:
        """Whether the operator is cheap enough to be decided by another, and still alone."""
        return (
            self.bound(operator).rule.kind in ("view", "memory")
            and not self.bound(operator).rule.inner
            and self.copies[operator] == copies
            and len(self.home[operator].members) == 1
        )

    def _join(
        self, members: list[int], options: list[Option], newcomer: int
    ) -> list[Option] | None:
        """The options of members and newcomer together, or ``None`` when too much would be lost:
        any option of the members, or more than one factor of a newcomer that works."""
        between = self._between(members, newcomer)
        if between is None:
            return None
        partners = self._partners(newcomer, [link.tensor for link, _, _ in between])
        joined: list[Option] = []
        used: set[Choice] = set()
        for option in options:
            extended = ({**option, newcomer: choice} for choice in partners)
            agreeing = [e for e in extended if all(self._agrees(e, *edge) for edge in between)]
            if not agreeing:
                return None
            joined += agreeing
            used.update(e[newcomer] for e in agreeing)
        if self.bound(newcomer).rule.kind == "view":
            return joined  # what it may not do here can be done to what comes out of it
        factors = set(self.bound(newcomer).factors)
        lost = factors - used
        if len(lost) > 1 or (lost and len(factors & used) < 2):
            return None
        return joined

    def _partners(self, newcomer: int, inside: Sequence[str]) -> tuple[Choice, ...]:
        """The newcomer's choices. Without a gradient the two ways to do nothing are the same; a
        partial sum is not passed on where that would make another input, a residual, partial."""
        operator = self.graph.operators[newcomer]
        differentiable = [
            name
            for name in (*operator.inputs, *operator.outputs)
            if self.graph.by_name[name].differentiable
        ]
        outside = set(differentiable) - set(inside) - set(operator.outputs)
        unwanted = {REPLICATED} if not differentiable else set()
        if outside:
            unwanted.add(SUMMED)
        return tuple(c for c in self.bound(newcomer).choices if c not in unwanted)

    def _between(self, members: list[int], newcomer: int) -> list[tuple[Link, int, int]] | None:
        """(link, consumer, input position) between the newcomer and members, either way; ``None``
        when one of them is not the same in all copies."""
        found = []
        for link in self.links:
            if link.producer in members:
                ends = [(c, p) for c, p in link.consumers if c == newcomer]
            elif link.producer == newcomer:
                ends = [(c, p) for c, p in link.consumers if c in members]
            else:
                continue
            if ends and link.count != self.copies[newcomer]:
                return None
            found += [(link, consumer, position) for consumer, position in ends]
        return found

    def _agrees(self, option: Option, link: Link, consumer: int, position: int) -> bool:
        """Whether the link's tensor is made as this consumer wants it."""
        _, made = self.bound(link.producer).placements(option[link.producer])
        wanted, _ = self.bound(consumer).placements(option[consumer])
        return self._canonical(link, made[link.output]) == self._canonical(link, wanted[position])

    def _canonical(self, link: Link, placement: Placement) -> Placement:
        differentiable = self.graph.by_name[link.tensor].differentiable
        return canonical((placement,), differentiable)[0]
