"""Which views of a stage are copies, and how what departs and what is given back lies in memory.

In a whole model, views follow what they look at: heads are transposed and transposed back. Where a
stage begins or ends between the two, what arrives lies in the order of its dims, and the second is
a copy, forward or backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from autopar.ir.graph import Operator, OperatorGraph
from autopar.ir.sharding import Mesh, Sharding, local_shape
from autopar.ops import elementwise
from autopar.simulator.edges import Rules, canonical
from autopar.simulator.strides import (
    Shape,
    Strides,
    attended,
    contiguous,
    gradient_viewed_by,
    like,
    viewed,
    viewed_by,
)
from autopar.simulator.workspace import CAT, CUTS, PASSES_ON, attends_fused

Key = tuple[str, Sharding]
"""A tensor in one of its shardings."""


@dataclass(frozen=True)
class Layouts:
    """``copied``: places of views that are copies, and of products that copy their input first;
    ``copied_back``: of those whose backward copies the gradient first. ``departs``,
    ``given_back``: by name, how what goes to other stages lies.
    """

    copied: frozenset[int]
    copied_back: frozenset[int]
    departs: dict[str, Strides]
    given_back: dict[str, Strides]


@dataclass
class Follow:
    """``reads`` and ``makes``: shardings of inputs and outputs of each operator; ``versions``: of
    which other ones are made before it, and at the end; ``home``: in which each tensor is made or
    arrives. ``in_place``: whether a redistribution leaves a tensor, or with ``backward`` its
    gradient, where it is. ``carries``: whether a gradient goes through each operator.
    """

    graph: OperatorGraph
    rules: Rules
    mesh: Mesh
    given: Mapping[str, Sharding]
    ends: Mapping[str, Sharding]
    reads: Sequence[tuple[Sharding, ...]]
    makes: Sequence[tuple[Sharding, ...]]
    versions: Sequence[Sequence[Key]]
    home: Mapping[str, Sharding]
    in_place: Callable[[str, Sharding, Sharding, bool], bool]
    carries: Sequence[bool]
    lies: dict[Key, Strides] = field(default_factory=dict)
    copied: set[int] = field(default_factory=set)
    copied_back: set[int] = field(default_factory=set)

    def layouts(self) -> Layouts:
        self._forward()
        departs = {name: self._lies(self._end(name)) for name in self.ends}
        gradients = self._backward()
        return Layouts(
            frozenset(self.copied),
            frozenset(self.copied_back),
            departs,
            {
                name: gradients.get((name, of), contiguous(self._shape((name, of))))
                for name, of in self.given.items()
            },
        )

    def _end(self, name: str) -> Key:
        return name, canonical(self.ends[name], self.graph.by_name[name].differentiable)

    def _shape(self, key: Key) -> Shape:
        return local_shape(self.graph.spec(key[0]).shape, key[1], self.mesh)

    def _lies(self, key: Key) -> Strides:
        found = self.lies.get(key)
        return contiguous(self._shape(key)) if found is None else found

    # ---- forward -------------------------------------------------------------------------------

    def _forward(self) -> None:
        for index, operator in enumerate(self.graph.operators):
            self._make(self.versions[index])
            read = list(zip(operator.inputs, self.reads[index], strict=True))
            for key in zip(operator.outputs, self.makes[index], strict=True):
                self.lies[key] = self._made(index, operator, read, self._shape(key))
        self._make(self.versions[-1])

    def _make(self, versions: Iterable[Key]) -> None:
        for name, target in versions:
            home = self.home.get(name)
            if home is not None and self.in_place(name, home, target, False):
                self.lies[name, target] = self._lies((name, home))

    def _made(self, index: int, operator: Operator, read: list[Key], made: Shape) -> Strides:
        rule = self.rules[operator.name].rule
        if rule.kind == "view" and read:
            seen = viewed_by(operator, self._shape(read[0]), self._lies(read[0]), made)
            if seen is None:
                self.copied.add(index)
            return contiguous(made) if seen is None else seen
        if operator.op == LINEAR and not _is_rows(self._shape(read[0]), self._lies(read[0])):
            self.copied.add(index)
        if _attends(operator) and len(made) == 4:
            query = self._shape(read[0]), self._lies(read[0])
            fused = self._is_fused(operator) and query[0] == made
            return like(*query) if fused else attended(made)
        if operator.op in FOLLOWS and "memory_format" not in dict(operator.keywords):
            for key in read:
                if self._shape(key) == made:
                    return like(made, self._lies(key))
        return contiguous(made)

    def _is_fused(self, operator: Operator) -> bool:
        differentiable = [self.graph.by_name[name].differentiable for name in operator.inputs]
        return attends_fused(operator, self.rules[operator.name], differentiable)

    # ---- backward ------------------------------------------------------------------------------

    def _backward(self) -> dict[Key, Strides]:
        """Of the gradients of what was given, where they have come to it."""
        found: dict[Key, Strides] = {}
        for name, sharding in self.ends.items():
            if self.graph.by_name[name].differentiable:
                found[name, sharding] = contiguous(self._shape((name, sharding)))
        self._move_back(self.versions[-1], found)
        for index in range(len(self.graph.operators) - 1, -1, -1):
            if self.carries[index]:
                self._differentiate(index, found)
            self._move_back(self.versions[index], found)
        return found

    def _differentiate(self, index: int, found: dict[Key, Strides]) -> None:
        operator = self.graph.operators[index]
        incoming = [
            (key, found.pop(key))
            for key in zip(operator.outputs, self.makes[index], strict=True)
            if key in found
        ]
        if not incoming:
            return
        made, gradient = incoming[0]
        for place, key in enumerate(zip(operator.inputs, self.reads[index], strict=True)):
            if self.graph.by_name[key[0]].differentiable:
                lies = self._gradient(index, place, self._shape(key), self._shape(made), gradient)
                self._add(found, key, lies)

    def _gradient(
        self, index: int, place: int, shape: Shape, made: Shape, gradient: Strides
    ) -> Strides:
        operator = self.graph.operators[index]
        rule = self.rules[operator.name].rule
        if rule.kind == "view":
            seen = gradient_viewed_by(operator, shape, gradient, made)
            if seen is None and not operator.op.startswith(CUTS):
                self.copied_back.add(index)
            return contiguous(shape) if seen is None else seen
        if operator.op == CAT or (shape == made and place in PASSES_ON.get(operator.op, ())):
            return gradient
        if _attends(operator) and len(shape) == 4 and place < 3:
            fused = self._is_fused(operator)
            key = operator.inputs[place], self.reads[index][place]
            return attended(shape) if fused else like(shape, self._lies(key))
        if operator.op == LINEAR and not _is_rows(made, gradient):
            self.copied_back.add(index)
        elif operator.op in FOLLOWS and shape == made:
            return like(shape, gradient)
        return contiguous(shape)

    def _add(self, found: dict[Key, Strides], key: Key, lies: Strides) -> None:
        before = found.get(key)
        found[key] = lies if before is None else like(self._shape(key), before)

    def _move_back(self, versions: Sequence[Key], found: dict[Key, Strides]) -> None:
        for key in reversed(versions):
            lies = found.pop(key, None)
            home = self.home.get(key[0])
            if lies is not None and home is not None:
                if not self.in_place(key[0], home, key[1], True):
                    lies = contiguous(self._shape((key[0], home)))
                self._add(found, (key[0], home), lies)


LINEAR = "aten.linear.default"


def _is_rows(shape: Shape, strides: Strides) -> bool:
    """Whether it can be seen as a matrix, as products take it."""
    return viewed(shape, strides, (prod(shape[:-1]), shape[-1])) is not None


def _attends(operator: Operator) -> bool:
    return "scaled_dot_product_attention" in operator.op


FOLLOWS = frozenset({*elementwise.RULES, "aten.dropout.default", "aten.native_dropout.default"})
"""Whose results lie in memory as what they read, if that has their shape."""
