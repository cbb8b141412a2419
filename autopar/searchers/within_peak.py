"""The best selection whose whole step fits: what the memory rows of a price list cannot see.

The rows are lower bounds of a step's peak. A selection that keeps to them and whose step does not
fit is answered by allowing less in the rows. For a proof, where few are left that may be faster
than the best, they are taken in the order of their time until one fits; otherwise what does not fit
is refused by name, the fastest first, until none is left that would be faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from time import monotonic

from autopar.searchers.approach import SWEEPS, Approach, Wanted, approach
from autopar.searchers.bounds import ascend, dual, survivors
from autopar.searchers.enumeration import count_selections, selections
from autopar.searchers.optimum import Optimum, optimum, settle
from autopar.simulator.price_list import PriceList, Selection

OverBytes = Callable[[Selection], int]
"""By how much the peak of a selection's step is above the limit; it fits when that is not
positive."""

SMALL = 300
"""Alternatives of a problem up to which it is worth counting the selections that are left,"""
FEW = 10_000
"""and their number up to which they are tried one by one: some seconds of simulation at most."""

FEW_CORRECTIONS, MOST_CORRECTIONS = 4, 10
"""How often less memory is tried, before the proof and in it,"""
CLOSE = 1e-3
"""or until the best that fits is within this fraction of the bound,"""
NARROW = 0.03
"""or until what is not yet known to be too little or enough is this fraction of the limit."""

MOST_REFUSED_ALTERNATIVES = 3_000
"""Selections are refused one by one as long as their number times that of alternatives is below
this: small problems are solved to the end, in large ones a gap is left that the bound shows."""


def solve_within_peak(
    price_list: PriceList, wanted: Wanted, over_bytes: OverBytes, first: Optimum | None = None
) -> Optimum:
    """At first a bound, and the fastest selection met whose step fits. Then, going on from there,
    the fastest of all (as long as the deadline and the sizes above allow).

    A selection is only of interest if it is faster than the cutoff. The bound holds for all that
    fit; where it is below the selection's time by more than the gap, something faster could exist.
    """
    if first is None or first.near is None:
        near = approach(price_list, wanted)
        search = _Search(price_list, over_bytes, wanted, near.bound_s, near)
        if not near.infeasible and not near.bounded:
            search.take_met()
        return search.optimum(near.infeasible)
    settled = settle(replace(first.near, bounded=False), wanted)
    search = _Search(price_list, over_bytes, wanted, settled.bound_s, first.near)
    if settled.selection is None or search.fits(settled.selection):
        return settled
    left = search.few_left()
    if left is None:
        search.allow_less(settled.selection)
        left = search.few_left()
    found = search.in_order() if left is None else search.one_by_one(left)
    return replace(found, columns=settled.columns)


@dataclass
class _Search:
    price_list: PriceList
    over_bytes: OverBytes
    wanted: Wanted
    bound_s: float
    near: Approach
    best: Selection | None = None
    over: dict[Selection, int] = field(default_factory=dict)

    def optimum(self, infeasible: bool = False) -> Optimum:
        bound_s = self.bound_s if self.best is None else min(self.bound_s, self.best_s)
        return Optimum(self.best, bound_s, infeasible, near=self.near)

    def fits(self, selection: Selection) -> bool:
        """Whether its step fits; then it is the best, if it is the fastest so far."""
        if selection not in self.over:
            self.over[selection] = self.over_bytes(selection)
        fits = self.over[selection] <= 0
        if fits and self.price_list.time_of(selection) < self.best_s:
            self.best = selection
        return fits

    @property
    def best_s(self) -> float:
        """What is to be beaten."""
        return self.wanted.cutoff_s if self.best is None else self.price_list.time_of(self.best)

    @property
    def late(self) -> bool:
        return monotonic() > self.wanted.deadline

    def take_met(self) -> None:
        """The fastest selection met whose step fits, with as much less memory as that needs."""
        less = 0.0
        for _ in range(FEW_CORRECTIONS):
            selection = self.near.fastest(less, frozenset(self.over))
            if selection is None or self.price_list.time_of(selection) >= self.best_s:
                return
            if self.fits(selection):
                return
            less = self._too_little(selection, less) + self.over[selection]

    def _too_little(self, selection: Selection, less: float) -> float:
        """So much less was allowed, and some of it was not used either."""
        limit = self.price_list.limit_bytes - less
        return less + max(float((limit - self.price_list.memory_of(selection)).min()), 0.0)

    def allow_less(self, first: Selection) -> None:
        """Lower the limits of the rows until steps fit, then halve the interval."""
        limit = self.price_list.limit_bytes
        least = float(limit.min())
        selection: Selection | None = first
        less, too_little, enough = 0.0, 0.0, math.inf
        for _ in range(MOST_CORRECTIONS):
            if selection is None or self.fits(selection):
                enough = less
            else:
                too_little = self._too_little(selection, less)
                less = too_little + self.over[selection]
            if less >= enough:
                less = (too_little + enough) / 2
            close = self.best is not None and self.best_s <= self.bound_s * (1 + CLOSE)
            if self.late or close or enough - too_little <= NARROW * least:
                return
            lowered = replace(self.price_list, limit_bytes=limit - less)
            selection = self._optimum(lowered, gap=CLOSE).selection

    def few_left(self) -> list[Selection] | None:
        """All that may be faster than the best, the fastest first; ``None``: too many."""
        if self.alternatives > SMALL:
            return None
        problem = dual(self.price_list, self.near.tight.weights)
        ascend(problem, SWEEPS)
        offered = survivors(problem, self.best_s).alternatives
        if count_selections(self.price_list, offered) > FEW:
            return None
        timed = [(self.price_list.time_of(s), s) for s in selections(self.price_list, offered)]
        faster = [(time_s, s) for time_s, s in timed if time_s < self.best_s]
        return [s for _, s in sorted(faster, key=lambda pair: pair[0]) if self.price_list.fits(s)]

    def one_by_one(self, left: list[Selection]) -> Optimum:
        """The first that fits of those that are left, the fastest first."""
        for selection in left:
            if self.late:
                self.bound_s = max(self.bound_s, self.price_list.time_of(selection))
                return self.optimum()
            if self.fits(selection):
                break
        self.bound_s = self.best_s
        return self.optimum(self.best is None and math.isinf(self.best_s))

    @property
    def alternatives(self) -> int:
        return sum(len(node.time_s) for node in self.price_list.nodes)

    def in_order(self) -> Optimum:
        """Refuse what does not fit until nothing faster than the best is left."""
        refused = [selection for selection, over in self.over.items() if over > 0]
        while not self.late and self.bound_s < self.best_s * (1 - self.wanted.gap):
            if len(refused) * self.alternatives > MOST_REFUSED_ALTERNATIVES:
                break
            found = self._optimum(self.price_list, self.wanted.gap, frozenset(refused))
            if found.selection is None:
                if found.infeasible and self.best is None:
                    return found
                self.bound_s = max(self.bound_s, min(found.bound_s, self.best_s))
                break
            self.bound_s = max(self.bound_s, found.bound_s)
            if self.fits(found.selection):
                break
            refused.append(found.selection)
        return self.optimum()

    def _optimum(
        self, price_list: PriceList, gap: float, refused: frozenset[Selection] = frozenset()
    ) -> Optimum:
        wanted = replace(
            self.wanted,
            cutoff_s=self.best_s,
            gap=gap,
            hint=self.near.tight.weights,
            refused=refused,
        )
        return optimum(price_list, wanted)
