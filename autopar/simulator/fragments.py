"""What PyTorch's caching allocator holds beside the tensors of a peak, because nothing fits into it.

Memory that was freed is kept in the pieces in which it was asked for: a tensor takes a piece that
is at least as large, or new memory. So before a step's largest tensors are made (logits in float32,
and what a loss makes of them), what smaller ones had before is of no use to them, and stays beside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from autopar.ir.graph import OperatorGraph
from autopar.ir.strategy import Strategy
from autopar.simulator.edges import Rules
from autopar.simulator.folding import Folded
from autopar.simulator.memory import Block, MemoryWalk

PIECES = "temporaries"
"""The kind of what comes and goes. What stays has its memory to itself, and what is gathered ahead
is of another stream, which has a pool of its own."""

Moment = Counter[int]
"""How many pieces of each size are in use."""


def trapped_bytes(
    graph: OperatorGraph, rules: Rules, strategy: Strategy, folded: Folded, at: str
) -> int:
    """Of a first microbatch; later ones find the pieces of the first. ``at``: where the peak is.
    Nothing, if the peak is not in one."""
    walk = _Watched(folded, graph, rules, strategy)
    walk.keep_state()
    walk.backward(walk.forward())
    found = [i for i, (where, _) in enumerate(walk.moments) if where == at]
    if not found:
        return 0
    return beside([moment for _, moment in walk.moments], found[-1])


def beside(moments: Sequence[Moment], at: int) -> int:
    """What was in use before a moment in pieces too small for its largest one, and is not in use
    then; and so on from where the most of these were.

    Four of 8, after two of 3 and one of 1, after five of 1:

    >>> beside([Counter({1: 5}), Counter({3: 2, 1: 1}), Counter({8: 4})], 2)
    11
    """
    return _beside(moments, at, max(moments[at], default=0))


def _beside(moments: Sequence[Moment], at: int, largest: int) -> int:
    smaller = [_smaller_bytes(moment, largest) for moment in moments[: at + 1]]
    most = max(smaller, default=0)
    if not largest or most == smaller[at]:
        return 0
    before = smaller.index(most)
    next_largest = max(size for size in moments[before] if size < largest)
    return most - smaller[at] + _beside(moments, before, next_largest)


def _smaller_bytes(moment: Moment, than: int) -> int:
    return sum(size * count for size, count in moment.items() if size < than)


class _Watched(MemoryWalk):
    """``moments``: each moment that is looked at, with its name."""

    def __init__(self, *arguments: Any) -> None:
        self.moments: list[tuple[str, Moment]] = []
        self.pieces: Moment = Counter()
        super().__init__(*arguments)

    def mark(self, where: str, extra_bytes: int = 0) -> None:
        super().mark(where, extra_bytes)
        moment = +self.pieces
        moment[extra_bytes] += extra_bytes > 0
        self.moments.append((where, moment))

    def allocate(self, size_bytes: int, kind: str) -> Block:
        self.pieces[size_bytes] += kind == PIECES
        return super().allocate(size_bytes, kind)

    def release(self, block: Block) -> None:
        super().release(block)
        self.pieces[block.size_bytes] -= block.users == 0 and block.kind == PIECES

    def relabel(self, block: Block, kind: str) -> None:
        self.pieces[block.size_bytes] += (kind == PIECES) - (block.kind == PIECES)
        super().relabel(block, kind)


__all__ = ["beside", "trapped_bytes"]
