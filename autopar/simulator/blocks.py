"""Equal blocks of operators: found by their repetition, so that depth costs nothing later.

Only the sequence of operators decides (what they are, their shapes and arguments, and how their
rules differ from others of that kind); which tensors flow between the copies is looked at by those
who use the classes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

from autopar.ir.graph import OperatorGraph, Role

_NONE: Mapping[str, Hashable] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Block:
    """``copies`` equal runs of ``period`` operators, the first of them at ``start``."""

    start: int
    period: int
    copies: int

    @property
    def stop(self) -> int:
        return self.start + self.period * self.copies

    def runs(self, ends: Iterable[int]) -> list[Block]:
        """The block cut after so many copies.

        >>> [run.copies for run in Block(0, 5, 8).runs((2, 8))]
        [2, 6]
        """
        cuts = sorted({0, *(end for end in ends if end < self.copies), self.copies})
        return [Block(self.start + a * self.period, self.period, b - a) for a, b in pairwise(cuts)]


def blocks(graph: OperatorGraph, marks: Mapping[str, Hashable] = _NONE) -> tuple[Block, ...]:
    """Repeated blocks in the order of the graph; they do not overlap. ``marks``: what else has to
    be equal, by operator name."""
    signatures = _signatures(graph, marks)
    layers = [_layer(operator.module) for operator in graph.operators]
    return tuple(sorted(_find(signatures, layers, 0, len(signatures)), key=lambda b: b.start))


def _signatures(graph: OperatorGraph, marks: Mapping[str, Hashable]) -> list[int]:
    """Equal numbers for operators that are alike."""
    numbers: dict[Hashable, int] = {}
    tensors = {
        t.name: numbers.setdefault(
            (t.spec.shape, t.spec.dtype, t.differentiable, t.role is Role.PARAMETER), len(numbers)
        )
        for t in graph.tensors
    }
    return [
        numbers.setdefault(
            (
                o.op,
                o.arguments,
                o.keywords,
                marks.get(o.name),
                *(tensors[name] for name in o.inputs),
                -1,
                *(tensors[name] for name in o.outputs),
            ),
            len(numbers),
        )
        for o in graph.operators
    ]


def _layer(module: str) -> str:
    """The path up to the first number: where a copy of a repeated block starts, it changes."""
    match = re.match(r".*?\.?\d+", module)
    return match.group() if match else ""


def _find(signatures: Sequence[int], layers: Sequence[str], start: int, stop: int) -> list[Block]:
    """The repetition that covers most between ``start`` and ``stop``, then the rest on both
    sides."""
    best: Block | None = None
    for period in _periods(signatures, start, stop):
        for block in _runs(signatures, layers, start, stop, period):
            if best is None or _saved(block) > _saved(best):
                best = block
    if best is None:
        return []
    return [
        *_find(signatures, layers, start, best.start),
        best,
        *_find(signatures, layers, best.stop, stop),
    ]


def _saved(block: Block) -> int:
    return block.period * (block.copies - 1)


def _periods(signatures: Sequence[int], start: int, stop: int) -> list[int]:
    """The commonest distances between neighbouring equals, and sums of two that often follow one
    another are among them because rarer operators of a block vote for its whole length."""
    last: dict[int, int] = {}
    votes: Counter[int] = Counter()
    for index in range(start, stop):
        signature = signatures[index]
        if signature in last:
            votes[index - last[signature]] += 1
        last[signature] = index
    return [period for period, _ in votes.most_common(12)]


def _runs(
    signatures: Sequence[int], layers: Sequence[str], start: int, stop: int, period: int
) -> list[Block]:
    """Maximal stretches where every operator equals the one a period later."""
    found = []
    first = start
    while first < stop - period:
        last = first
        while last < stop - period and signatures[last] == signatures[last + period]:
            last += 1
        length = last - first + period
        copies = length // period
        if last > first and copies >= 2:
            slack = length - copies * period
            start_of_first = _aligned(layers, first, slack)
            if _in_different_layers(layers, start_of_first, period, copies):
                found.append(Block(start_of_first, period, copies))
        first = last + 1
    return found


def _aligned(layers: Sequence[str], first: int, slack: int) -> int:
    """The first place within the slack where a new layer begins."""
    for index in range(first, first + slack + 1):
        if index > 0 and layers[index] and layers[index] != layers[index - 1]:
            return index
    return first


def _in_different_layers(layers: Sequence[str], first: int, period: int, copies: int) -> bool:
    """Equal operators of one layer (the projections to q, k and v) are not copies of a block."""
    starts = {layers[first + copy * period] for copy in range(copies)}
    return len(starts) == copies
