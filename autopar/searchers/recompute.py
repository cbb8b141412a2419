"""Recomputation where memory binds: as little as makes a strategy fit, and none where it fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from autopar.ir.rule import Split
from autopar.ir.simulation import Estimate
from autopar.ir.strategy import Strategy
from autopar.simulator.recompute_choices import KINDS, BlockChoices

AUTO = "auto"

RECOMPUTE = (*KINDS, AUTO)
"""What may be asked for: one kind for all copies, or what is fastest within memory."""

PATTERNS = (("selective", "none"), ("full", "none"), ("full", "selective"))
"""Of the copies, the first are recomputed in one way and the others in another."""

Ends = tuple[frozenset[int], ...]
"""By block, after which copies the way of recomputing changes."""

Evaluate = Callable[[Strategy, Ends], Estimate]

Found = tuple[Strategy, Estimate]

Known = dict[object, tuple[int, ...]]
"""Which operators of a block a kind recomputes, by the splits of the block."""


@dataclass
class Recomputing:
    """Ways to recompute under one strategy."""

    blocks: Sequence[BlockChoices]
    evaluate: Evaluate
    known: Known = field(default_factory=dict)

    def everywhere(self, strategy: Strategy, kind: str) -> Found:
        """All copies of all blocks in one way."""
        return self._found(strategy, kind, "none", self._copies)

    def within(self, strategy: Strategy, limit_bytes: float) -> Found:
        """The fastest that fits; where nothing does, what needs the least memory."""
        plain = strategy, self.evaluate(strategy, (frozenset(),) * len(self.blocks))
        if plain[1].peak_memory_bytes <= limit_bytes or not self.blocks:
            return plain
        tried = [self._least(strategy, first, rest, limit_bytes) for first, rest in PATTERNS]
        fitting = [found for found in tried if found[1].peak_memory_bytes <= limit_bytes]
        if fitting:
            return min(fitting, key=lambda found: found[1].step_time_s)
        return min([plain, *tried], key=lambda found: found[1].peak_memory_bytes)

    @property
    def _copies(self) -> int:
        return sum(of.block.copies for of in self.blocks)

    def _least(self, strategy: Strategy, first: str, rest: str, limit_bytes: float) -> Found:
        """With as few copies of the first kind as fit, by halving: each one more keeps less."""
        low, high = -1, self._copies
        best = self._found(strategy, first, rest, high)
        if best[1].peak_memory_bytes > limit_bytes:
            return best
        while high - low > 1:
            middle = (low + high) // 2
            found = self._found(strategy, first, rest, middle)
            if found[1].peak_memory_bytes <= limit_bytes:
                high, best = middle, found
            else:
                low = middle
        return best

    def _found(self, strategy: Strategy, first: str, rest: str, count: int) -> Found:
        """``count`` copies in the first way, from the beginning of the graph on."""
        names: list[str] = []
        ends = []
        for of in self.blocks:
            copies = min(count, of.block.copies)
            count -= copies
            names += of.names(self._offsets(of, first), range(copies))
            names += of.names(self._offsets(of, rest), range(copies, of.block.copies))
            ends.append(frozenset({copies}) - {0, of.block.copies})
        made = replace(strategy, recompute=tuple(names))
        return made, self.evaluate(made, tuple(ends))

    def _offsets(self, of: BlockChoices, kind: str) -> tuple[int, ...]:
        start, period = of.block.start, of.block.period
        operators = of.graph.operators[start : start + period]
        splits: tuple[Split, ...] = tuple(of.strategy.splits[o.name] for o in operators)
        key = kind, start, of.strategy.mesh, splits
        if key not in self.known:
            self.known[key] = KINDS[kind](of)
        return self.known[key]


__all__ = ["AUTO", "RECOMPUTE", "Recomputing"]
