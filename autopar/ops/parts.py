"""Fused projections: dims that are made as one and taken apart into parts later.

Query, key and value made by one product (GPT-2, ``nn.MultiheadAttention``, a ViT), the gate and the
value of a gated MLP: a device that has its heads needs its share of *each part*, which is not a
contiguous piece of the dim. What takes a dim apart (split, chunk, slices, select, unbind) tells
where its parts meet; this is carried back through views and elementwise operators to the product
that makes the dim, and to its weight and bias. Dividing that dim then divides each part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import accumulate, pairwise
from math import gcd

from autopar.ir.graph import Operator, OperatorGraph, Role, TensorSpec
from autopar.ir.rule import BoundRule, Joined, OpRule
from autopar.ir.sharding import Parts
from autopar.ops import elementwise, views
from autopar.ops.signatures import Shape, dim_of, labels, with_argument

Specs = tuple[TensorSpec, ...]

Place = tuple[str, int]
"""A dim of a tensor, by the tensor's name."""

_CARRYING = views.RULES.keys() | elementwise.RULES.keys()
_KEPT = (Role.PARAMETER, Role.BUFFER, Role.CONSTANT)
_MOST_PARTS = 256  # windows that overlap (x[1:] with x[:-1]) would cut a dim everywhere


@dataclass(frozen=True, slots=True)
class TakenApart:
    """An operator whose outputs are ranges (start, stop) of ``dim`` of its input; the dim is gone
    where each is a single index (select, unbind)."""

    dim: int
    ranges: tuple[tuple[int, int], ...]
    gone: bool = False


def taken_apart(operator: Operator, source: TensorSpec, outputs: Specs) -> TakenApart | None:
    """What an operator of ``_TAKING`` takes out of a dim; ``None`` if it is all or not one run."""
    return _TAKING[operator.op](operator, source.shape, outputs)


def _split(operator: Operator, shape: Shape, outputs: Specs) -> TakenApart | None:
    dim = dim_of(operator.argument(2, "dim", 0), len(shape))
    sizes = [spec.shape[dim] for spec in outputs]
    if 0 in sizes:
        return None
    stops = tuple(accumulate(sizes))
    return TakenApart(dim, tuple(zip((0, *stops), stops, strict=False)))


def _slice(operator: Operator, shape: Shape, outputs: Specs) -> TakenApart | None:
    dim = dim_of(operator.argument(1, "dim", 0), len(shape))
    length = outputs[0].shape[dim]
    if length in (0, shape[dim]) or operator.argument(4, "step", 1) != 1:
        return None
    start = _counted_from_the_left(operator.argument(2, "start"), shape[dim])
    return TakenApart(dim, ((start, start + length),))


def _select(operator: Operator, shape: Shape, outputs: Specs) -> TakenApart | None:
    del outputs
    dim = dim_of(operator.argument(1, "dim"), len(shape))
    index = _counted_from_the_left(operator.argument(2, "index"), shape[dim])
    return TakenApart(dim, ((index, index + 1),), gone=True)


def _unbind(operator: Operator, shape: Shape, outputs: Specs) -> TakenApart | None:
    dim = dim_of(operator.argument(1, "dim", 0), len(shape))
    return TakenApart(dim, tuple((i, i + 1) for i in range(len(outputs))), gone=True)


def _counted_from_the_left(index: int | None, size: int) -> int:
    place = int(index or 0)
    return max(0, place + size) if place < 0 else min(place, size)


_TAKING: dict[str, Callable[[Operator, Shape, Specs], TakenApart | None]] = {
    "aten.split.Tensor": _split,
    "aten.split_with_sizes.default": _split,
    "aten.split.sizes": _split,
    "aten.chunk.default": _split,
    "aten.slice.Tensor": _slice,
    "aten.select.int": _select,
    "aten.unbind.int": _unbind,
}


@dataclass(frozen=True, slots=True)
class Change:
    """How an operator's rule differs from that of others of its kind.

    ``joined`` and ``whole`` are added to it; ``apart``: instead, it takes its input apart into
    these parts, and may divide each.
    """

    joined: tuple[Joined, ...] = ()
    whole: tuple[str, ...] = ()
    apart: tuple[TakenApart, Parts] | None = None


def changes(graph: OperatorGraph, rules: Mapping[str, BoundRule]) -> dict[str, Change]:
    """By operator name, where the graph has dims of several parts."""
    found = _Search(graph, rules)
    return found.changes() if found.takers else {}


@dataclass
class _Search:
    """``cuts``: where the parts of a dim meet, in elements, for the dims that are taken apart
    somewhere. ``refused``: dims that cannot be divided in parts, and so none that they come from
    or lead to."""

    graph: OperatorGraph
    rules: Mapping[str, BoundRule]
    takers: dict[str, TakenApart] = field(default_factory=dict)
    cuts: dict[Place, frozenset[int]] = field(default_factory=dict)
    touched: dict[str, Operator] = field(default_factory=dict)
    refused: set[Place] = field(default_factory=set)
    waiting: dict[str, Operator] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for operator in self.graph.operators:
            if operator.op in _TAKING:
                outputs = tuple(self.graph.spec(name) for name in operator.outputs)
                found = taken_apart(operator, self.graph.spec(operator.inputs[0]), outputs)
                if found is not None:
                    self.takers[operator.name] = found
                    self.waiting[operator.name] = operator

    def changes(self) -> dict[str, Change]:
        while self.waiting:
            self._settle(self.waiting.pop(next(iter(self.waiting))))
        legal = self._legal()
        found = {}
        for operator in self.touched.values():
            change = self._change(operator, legal)
            if change is not None:
                found[operator.name] = change
        return found

    # ---- where parts meet ----------------------------------------------------------------------

    def _settle(self, operator: Operator) -> None:
        """Carry cuts between the operator's inputs and outputs."""
        taker = self.takers.get(operator.name)
        if taker is not None:
            self._settle_taker(operator, taker)
        for factor in self._cut_factors(operator):
            self._settle_factor(operator, factor)

    def _settle_taker(self, operator: Operator, taker: TakenApart) -> None:
        whole = (operator.inputs[0], taker.dim)
        size = self.graph.spec(whole[0]).shape[taker.dim]
        met = set(self.cuts.get(whole, ())) | {c for ends in taker.ranges for c in ends}
        if not taker.gone:
            for name, (start, _) in zip(operator.outputs, taker.ranges, strict=True):
                met |= {start + c for c in self.cuts.get((name, taker.dim), ())}
        inside = frozenset(met) - {0, size}
        self.touched[operator.name] = operator
        self._put(whole, inside)
        if not taker.gone:
            for name, (start, stop) in zip(operator.outputs, taker.ranges, strict=True):
                kept = frozenset(c - start for c in inside if start < c < stop)
                self._put((name, taker.dim), kept)

    def _cut_factors(self, operator: Operator) -> tuple[str, ...]:
        """Factors that lead a dim of an output which has cuts."""
        bound = self.rules[operator.name]
        taker = self.takers.get(operator.name)
        own = taker.dim if taker is not None and not taker.gone else None
        found: dict[str, None] = {}
        for name, dims in zip(operator.outputs, bound.outputs, strict=True):
            for d, dim in enumerate(dims):
                if (name, d) in self.cuts and d != own:
                    factor = leading(bound, dim)
                    if factor is None or not self._carries(operator, bound, factor):
                        self.refused.add((name, d))
                    else:
                        found[factor] = None
        return tuple(found)

    def _carries(self, operator: Operator, bound: BoundRule, factor: str) -> bool:
        rule = bound.rule
        if factor not in bound.factors or rule.proposed:
            return False
        if factor in rule.special or ("*" in rule.special and not rule.products):
            return False
        if operator.op in _CARRYING:
            return True
        # a product makes a factor of its own, which only what it keeps shares with it
        return bool(rule.products) and factor in rule.products[0].n.split()

    def _settle_factor(self, operator: Operator, factor: str) -> None:
        bound = self.rules[operator.name]
        places = list(self._places(operator, bound, factor))
        units: set[int] = set()
        for place, inner in places:
            found = self.cuts.get(place, frozenset())
            if any(c % inner for c in found):
                self.refused.update(p for p, _ in places)
                return
            units |= {c // inner for c in found}
        self.touched[operator.name] = operator
        for place, inner in places:
            self._put(place, frozenset(c * inner for c in units))

    def _places(
        self, operator: Operator, bound: BoundRule, factor: str
    ) -> Iterator[tuple[Place, int]]:
        """The dims that the factor leads, and how many elements one of its indices has there."""
        names = (*operator.inputs, *operator.outputs)
        for name, dims in zip(names, bound.inputs + bound.outputs, strict=True):
            for d, dim in enumerate(dims):
                if leading(bound, dim) == factor:
                    size = self.graph.spec(name).shape[d]
                    yield (name, d), size // bound.sizes[factor]

    def _put(self, place: Place, cuts: frozenset[int]) -> None:
        if len(cuts) >= _MOST_PARTS:
            self.refused.add(place)
        elif cuts and self.cuts.get(place) != cuts:
            self.cuts[place] = cuts
            producer = self.graph.producer.get(place[0])
            readers = (o for o, _ in self.graph.consumers[place[0]] if o.name in self.touched)
            for operator in (*readers, *([producer] if producer else [])):
                self.waiting[operator.name] = operator

    # ---- which may be divided in parts ---------------------------------------------------------

    def _legal(self) -> set[Place]:
        """Dims that only products and what they keep give parts to, of which there is more than
        one element in each, and that can be divided wherever they pass."""
        groups = _Groups()
        made: set[Place] = set()
        for operator in self.touched.values():
            bound = self.rules[operator.name]
            taker = self.takers.get(operator.name)
            if taker is not None and not taker.gone:
                for name in operator.outputs:
                    groups.join((operator.inputs[0], taker.dim), (name, taker.dim))
            for factor in self._cut_factors(operator):
                places = [place for place, _ in self._places(operator, bound, factor)]
                for place in places:
                    groups.join(places[0], place)
                units = self._units(operator, bound, factor)
                if bound.rule.products:
                    made.add(places[0])
                one_by_one = units is None or units[1] == 1
                if one_by_one and (
                    bound.rule.products
                    or (
                        self._compound(bound, factor)
                        and self._next(operator, bound, factor) is None
                    )
                ):
                    self.refused.add(places[0])
        for place in self.cuts:
            if not self._from_what_is_known(place):
                self.refused.add(place)
        bad = {groups.root(place) for place in self.refused}
        good = {groups.root(place) for place in made} - bad
        return {place for place in self.cuts if groups.root(place) in good}

    def _from_what_is_known(self, place: Place) -> bool:
        name, d = place
        producer = self.graph.producer.get(name)
        if producer is None:
            return self.graph.by_name[name].role in _KEPT
        if producer.name not in self.touched:
            return False
        taker = self.takers.get(producer.name)
        if taker is not None and not taker.gone and taker.dim == d:
            return True
        bound = self.rules[producer.name]
        factor = leading(bound, bound.outputs[producer.outputs.index(name)][d])
        return factor is not None and self._carries(producer, bound, factor)

    def _units(self, operator: Operator, bound: BoundRule, factor: str) -> tuple[Parts, int] | None:
        """The parts of a factor, and how many of its indices their common divisor is; ``None``
        where they meet nowhere, or in too many places."""
        (place, inner), *_ = self._places(operator, bound, factor)
        sizes = _sizes(self.cuts.get(place, ()), self.graph.spec(place[0]).shape[place[1]])
        return None if len(sizes) < 2 else _normal([n // inner for n in sizes])

    @staticmethod
    def _compound(bound: BoundRule, factor: str) -> bool:
        return any(
            factor in dim and len(long(bound, dim)) > 1
            for dims in bound.inputs + bound.outputs
            for dim in dims
        )

    def _next(self, operator: Operator, bound: BoundRule, factor: str) -> str | None:
        """The factor after one that has an index for each part, as ``heads`` in ``(three heads
        dim)``: dividing it divides each part."""
        after = {
            tuple(long(bound, dim)[1:2])
            for dims in bound.inputs + bound.outputs
            for dim in dims
            if leading(bound, dim) == factor
        } - {()}
        one_each = (1,) * bound.sizes[factor], 1
        if len(after) != 1 or self._units(operator, bound, factor) != one_each:
            return None
        ((found,),) = after
        joined = self._joined_next(bound, factor, found)
        tried = replace(bound, rule=replace(bound.rule, joined=joined))
        return found if found in tried.factors else None

    @staticmethod
    def _joined_next(bound: BoundRule, factor: str, found: str) -> tuple[Joined, ...]:
        return tuple(
            Joined(tensor, d, found, (1,) * bound.sizes[factor])
            for tensor, dims in enumerate(bound.inputs + bound.outputs)
            for d, dim in enumerate(dims)
            if long(bound, dim)[:2] == (factor, found)
        )

    # ---- rules ---------------------------------------------------------------------------------

    def _change(self, operator: Operator, legal: set[Place]) -> Change | None:
        bound = self.rules[operator.name]
        taker = self.takers.get(operator.name)
        joined: list[Joined] = []
        whole: list[str] = []
        for factor in self._cut_factors(operator):
            places = list(self._places(operator, bound, factor))
            units = self._units(operator, bound, factor)
            if places[0][0] not in legal or units is None:
                continue
            parts, unit = units
            if unit > 1:
                joined += [
                    Joined(tensor, d, factor, parts)
                    for tensor, dims in enumerate(bound.inputs + bound.outputs)
                    for d, dim in enumerate(dims)
                    if leading(bound, dim) == factor
                ]
            elif self._compound(bound, factor):
                after = self._next(operator, bound, factor)
                assert after is not None, operator
                joined += self._joined_next(bound, factor, after)
                whole.append(factor)
        apart = None
        if taker is not None and not taker.gone:
            place = (operator.inputs[0], taker.dim)
            if place in legal:
                size = self.graph.spec(place[0]).shape[taker.dim]
                parts, unit = _normal(_sizes(self.cuts[place], size))
                apart = (taker, parts) if unit > 1 else None
        if not joined and apart is None:
            return None
        return Change(tuple(joined), tuple(whole), apart)


def leading(bound: BoundRule, dim: tuple[str, ...]) -> str | None:
    """The first factor of a dim that has a size."""
    return next(iter(long(bound, dim)), None)


def long(bound: BoundRule, dim: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f for f in dim if bound.sizes[f] > 1)


def _sizes(cuts: Iterable[int], size: int) -> list[int]:
    return [b - a for a, b in pairwise((0, *sorted(cuts), size))]


def _normal(sizes: list[int]) -> tuple[Parts, int]:
    """Relative sizes and their common divisor."""
    unit = reduce(gcd, sizes)
    return tuple(n // unit for n in sizes), unit


class _Groups:
    """Dims that are divided together."""

    def __init__(self) -> None:
        self.above: dict[Place, Place] = {}

    def root(self, place: Place) -> Place:
        while (above := self.above.get(place, place)) != place:
            place = above
        return place

    def join(self, a: Place, b: Place) -> None:
        self.above[self.root(b)] = self.root(a)


# ---- the changed rules ---------------------------------------------------------------------------


def changed(rule: OpRule, change: Change, inputs: Specs, outputs: Specs) -> OpRule:
    """``rule`` with the change that its graph asks for."""
    if change.apart is not None:
        rule = _dividing_each(rule, *change.apart, inputs, outputs)
    return replace(
        rule,
        joined=(*rule.joined, *change.joined),
        whole=(*rule.whole, *change.whole),
    )


def _dividing_each(
    rule: OpRule,
    taker: TakenApart,
    parts: Parts,
    inputs: Specs,
    outputs: Specs,
) -> OpRule:
    """``(each parts) -> each, (each part1), ...``: what a part has in common with the others is
    ``each``, and can be divided."""
    source, dim = inputs[0].shape, taker.dim
    unit = source[dim] // sum(parts)
    meet = [0, *accumulate(n * unit for n in parts)]

    def within(start: int, stop: int) -> list[int]:
        return [n for n, at in zip(parts, meet, strict=False) if start <= at < stop]

    names = labels(source)
    sides, joined = [], [Joined(0, dim, "each", parts)]
    for i, (start, stop) in enumerate(taker.ranges):
        held = within(start, stop)
        side = list(names)
        side[dim] = "each" if sum(held) == 1 else f"(each part{i})"
        sides.append(side)
        if len(held) > 1:
            joined.append(Joined(1 + i, dim, "each", _normal(held)[0]))
    whole = list(names)
    whole[dim] = "(each parts)"
    base = views.view_rule([whole], sides, inputs)

    def localize(o: Operator, ins: tuple[Shape, ...], outs: tuple[Shape, ...]) -> Operator:
        pieces = source[dim] // ins[0][dim]
        if pieces == 1:
            return o
        if o.op == "aten.slice.Tensor":
            start = taker.ranges[0][0] // pieces
            o = with_argument(o, 2, "start", start)
            return with_argument(o, 3, "end", start + outs[0][dim])
        sizes = tuple(shape[dim] for shape in outs)
        return replace(
            o,
            op="aten.split_with_sizes.default",
            arguments=(o.arguments[0], sizes, dim),
            keywords=(),
        )

    del outputs
    return replace(
        base,
        sizes=(("each", unit),),
        joined=tuple(joined),
        localize=localize,
        backward=rule.backward,
    )
