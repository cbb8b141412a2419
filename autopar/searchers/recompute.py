"""Recomputation where memory binds: as little as makes a strategy fit, and none where it fits."""

from __future__ import annotations

import math
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

    def within(self, strategy: Strategy, limit_bytes: float, cutoff_s: float = math.inf) -> Found:
        """The fastest that fits; where nothing does, what needs the least memory. What would take
        longer than ``cutoff_s`` is not looked for."""
        plain = strategy, self.evaluate(strategy, (frozenset(),) * len(self.blocks))
        if plain[1].peak_memory_bytes <= limit_bytes or not self.blocks:
            return plain
        if plain[1].step_time_s >= cutoff_s:
            return plain
        tried: list[Found] = []
        for first, rest in PATTERNS:
            fastest_s = min(
                [cutoff_s, *(of.step_time_s for _, of in tried if _fits(of, limit_bytes))]
            )
            tried += self._least(strategy, first, rest, limit_bytes, plain, fastest_s)
        fitting = [found for found in tried if _fits(found[1], limit_bytes)]
        if fitting:
            return min(fitting, key=lambda found: found[1].step_time_s)
        return min([plain, *tried], key=lambda found: found[1].peak_memory_bytes)

    @property
    def _copies(self) -> int:
        return sum(of.block.copies for of in self.blocks)

    def _least(
        self,
        strategy: Strategy,
        first: str,
        rest: str,
        limit_bytes: float,
        plain: Found,
        cutoff_s: float,
    ) -> list[Found]:
        """With as few copies of the first kind as fit: each one more keeps less, about as much as
        every other, and takes as long. The last is the best of them; none, where no copy has to be
        of the first kind, or it would take longer than the cutoff."""
        fewer, more = 0, self._copies
        too_large = plain if rest == "none" else self._found(strategy, first, rest, 0)
        if _fits(too_large[1], limit_bytes) or too_large[1].step_time_s >= cutoff_s:
            return []
        best = self._found(strategy, first, rest, more)
        while _fits(best[1], limit_bytes) and more - fewer > 1:
            over = too_large[1].peak_memory_bytes - limit_bytes
            share = over / (too_large[1].peak_memory_bytes - best[1].peak_memory_bytes)
            slower_s = best[1].step_time_s - too_large[1].step_time_s
            if too_large[1].step_time_s + share * slower_s >= cutoff_s:
                return [best]
            guess = fewer + math.ceil(share * (more - fewer))
            if guess == more:  # or one less, if it is that near
                guess = more - 1
            found = self._found(strategy, first, rest, guess)
            if _fits(found[1], limit_bytes):
                more, best = guess, found
            else:
                fewer, too_large = guess, found
        return [best]

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


def _fits(estimate: Estimate, limit_bytes: float) -> bool:
    return estimate.peak_memory_bytes <= limit_bytes


__all__ = ["AUTO", "RECOMPUTE", "Recomputing"]
