"""Pieces of signatures that follow from shapes: labels, broadcasting, rewritten size arguments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from autopar.ir.graph import Argument, Input, Operator
from autopar.ir.rule import Localize

Shape = tuple[int, ...]


class NoRuleError(Exception):
    """These arguments are not covered by the op's rule."""


def signature(inputs: Iterable[Sequence[str]], outputs: Iterable[Sequence[str]]) -> str:
    """
    >>> signature([["a", "1"], ["a"]], [["a"]])
    'a 1, a -> a'
    """
    left, right = (", ".join(" ".join(dims) for dims in side) for side in (inputs, outputs))
    return f"{left} -> {right}"


def labels(shape: Shape, prefix: str = "d") -> list[str]:
    """A name for each dim, ``1`` for those of size 1.

    >>> labels((4, 1, 6))
    ['d0', '1', 'd2']
    """
    return ["1" if size == 1 else f"{prefix}{i}" for i, size in enumerate(shape)]


def broadcast(shape: Shape, to: Shape, names: Sequence[str]) -> list[str]:
    """The labels of a tensor that is broadcast to a tensor with labels ``names``.

    >>> broadcast((1, 6), (4, 5, 6), ["a", "b", "c"])
    ['1', 'c']
    """
    lead = len(to) - len(shape)
    return ["1" if size == 1 else names[lead + i] for i, size in enumerate(shape)]


def dim_of(argument: Argument, rank: int) -> int:
    """A dim argument, counted from the left."""
    dim = int(argument)
    return dim + rank if dim < 0 else dim


def dims_of(argument: Argument, rank: int) -> tuple[int, ...]:
    """A dim or dims argument; ``None`` and ``()`` are all of them."""
    if argument is None or argument == ():
        return tuple(range(rank))
    many = argument if isinstance(argument, tuple) else (argument,)
    return tuple(dim_of(dim, rank) for dim in many)


def with_argument(operator: Operator, index: int, keyword: str, value: Argument) -> Operator:
    """``operator`` with that argument replaced, wherever it was given."""
    if index < len(operator.arguments):
        changed = (*operator.arguments[:index], value, *operator.arguments[index + 1 :])
        return replace(operator, arguments=changed)
    kept = tuple((k, v) for k, v in operator.keywords if k != keyword)
    return replace(operator, keywords=(*kept, (keyword, value)))


def sizes_from_output(index: int, keyword: str) -> Localize:
    """A ``localize`` for ops that are told the shape of their output."""

    def localize(
        operator: Operator, inputs: tuple[Shape, ...], outputs: tuple[Shape, ...]
    ) -> Operator:
        del inputs
        return with_argument(operator, index, keyword, outputs[0])

    return localize


def position(operator: Operator, index: int, keyword: str) -> int | None:
    """Which of ``operator.inputs`` is passed as this argument; ``None`` when it is not a tensor."""
    argument = operator.argument(index, keyword)
    return argument.index if isinstance(argument, Input) else None


def present(*positions: int | None) -> tuple[int, ...]:
    return tuple(p for p in positions if p is not None)


def accumulation_dtype(dtype: str) -> str:
    """What kernels sum in."""
    return dtype if dtype in ("float64", "complex128") else "float32"


def points(names: Iterable[str]) -> str:
    """The factors of labels, for ``Saved``, ``Inner`` and ``Product``.

    >>> points(["a", "1", "(b c)"])
    'a b c'
    """
    return " ".join(name.strip("()") for name in names if name != "1")
