"""What PyTorch's caching allocator holds beside the tensors of a peak, as nothing fits into it.

Memory that was freed is kept in the pieces in which it was asked for: a tensor takes the smallest
piece that has room for it, or new memory. So what smaller tensors had before a step's largest ones
are made (logits in float32, and what a loss makes of them) is of no use to these, and stays beside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autopar.ir.graph import OperatorGraph
from autopar.ir.strategy import Strategy
from autopar.simulator.edges import Rules
from autopar.simulator.folding import Folded
from autopar.simulator.memory import Block, MemoryWalk

COMES_AND_GOES = "temporaries"
"""The kind of what is played. What is kept has its memory to itself, and what is gathered ahead is
of another stream, which has a pool of its own."""


def trapped_bytes(graph: OperatorGraph, rules: Rules, strategy: Strategy, folded: Folded) -> int:
    """Beside the peak of a first microbatch; later ones find the pieces of the first."""
    walk = _Played(folded, graph, rules, strategy)
    walk.keep_state()
    walk.backward(walk.forward())
    return walk.trapped


@dataclass(slots=True, eq=False)
class Piece:
    """Of memory that was asked for at once, with its neighbours in it. ``at``: when that was, and
    where the piece begins in it."""

    size_bytes: int
    at: tuple[int, int]
    free: bool = False
    before: Piece | None = None
    after: Piece | None = None


class Pool:
    """``reserved_bytes``: asked for so far. A tensor takes the smallest free piece that has room,
    the first of these, and leaves the rest of it; free neighbours are one piece again
    (c10/cuda/CUDACachingAllocator.cpp).

    >>> pool = Pool()
    >>> large, small = pool.take(8), pool.take(2)
    >>> pool.give(large)
    >>> parts = [pool.take(3), pool.take(4)]
    >>> pool.reserved_bytes
    10
    """

    def __init__(self) -> None:
        self.reserved_bytes = self.asked = 0
        self.free: dict[Piece, None] = {}

    def take(self, size_bytes: int) -> Piece:
        room = [piece for piece in self.free if piece.size_bytes >= size_bytes]
        if not room:
            self.reserved_bytes += size_bytes
            self.asked += 1
            return Piece(size_bytes, (self.asked, 0))
        piece = min(room, key=lambda piece: (piece.size_bytes, piece.at))
        del self.free[piece]
        piece.free = False
        if piece.size_bytes > size_bytes:
            asked, start = piece.at
            rest = Piece(
                piece.size_bytes - size_bytes, (asked, start + size_bytes), True, piece, piece.after
            )
            if piece.after is not None:
                piece.after.before = rest
            piece.size_bytes, piece.after = size_bytes, rest
            self.free[rest] = None
        return piece

    def give(self, piece: Piece) -> None:
        piece.free = True
        if piece.after is not None and piece.after.free:
            self._join(piece, piece.after)
        if piece.before is not None and piece.before.free:
            piece = self._join(piece.before, piece)
        self.free[piece] = None

    def _join(self, piece: Piece, after: Piece) -> Piece:
        self.free.pop(after, None)
        piece.size_bytes += after.size_bytes
        piece.after = after.after
        if after.after is not None:
            after.after.before = piece
        return piece


class _Played(MemoryWalk):
    """``trapped``: what the pool has at the peak beside what is in use of it. What an operator
    works on for a moment is taken to be in pieces of the largest tensor there is, if it is larger.
    """

    def __init__(self, *arguments: Any) -> None:
        self.pool, self.pieces = Pool(), dict[Block, Piece]()
        self.in_use = self.trapped = 0
        super().__init__(*arguments)

    def mark(self, where: str, extra_bytes: int = 0) -> None:
        peak = self.peak
        super().mark(where, extra_bytes)
        largest = max((piece.size_bytes for piece in self.pieces.values()), default=0)
        each = min(extra_bytes, largest) or extra_bytes
        worked_on = [self.pool.take(each) for _ in range(-(-extra_bytes // each) if each else 0)]
        if self.peak > peak:
            self.trapped = self.pool.reserved_bytes - self.in_use - each * len(worked_on)
        for piece in worked_on:
            self.pool.give(piece)

    def allocate(self, size_bytes: int, kind: str) -> Block:
        block = super().allocate(size_bytes, kind)
        if kind == COMES_AND_GOES and size_bytes:
            self.pieces[block] = self.pool.take(size_bytes)
            self.in_use += size_bytes
        return block

    def release(self, block: Block) -> None:
        super().release(block)
        if block.users == 0:
            self._leave(block)

    def relabel(self, block: Block, kind: str) -> None:
        """What is kept from now on has memory of its own: all copies of a block alike."""
        super().relabel(block, kind)
        self._leave(block)

    def _leave(self, block: Block) -> None:
        if block in self.pieces:
            self.pool.give(self.pieces.pop(block))
            self.in_use -= block.size_bytes


__all__ = ["Piece", "Pool", "trapped_bytes"]
