"""How near the optimum of a price list is without an ILP: a bound, and selections that fit.

A memory limit enters with a price of memory, a multiplier for each memory row. The bound is a
concave function of it, below a line for every selection; its maximum is looked for where the lowest
of the lines met so far is highest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic

import numpy as np
from ortools.math_opt.python import mathopt

from autopar.searchers.bounds import TOLERANCE, Dual, ascend, dual
from autopar.simulator.price_list import PriceList, Selection, cheapest_storages, storages_within

SWEEPS = 60
FEW_SWEEPS, LITTLE = 12, 1e-3
"""For each price of memory that is tried; and the rise of the bound that ends the sweeps."""

PRICES = 8
"""How many prices of memory are tried at most,"""
NEAR = 1e-3
"""or until the bound is this near (relative) to where the lines meet, or the price to one tried."""

DEARER = (1.0, 1.05, 1.2, 1.5, 2.0, 4.0, 16.0)
"""Times the price of memory of the bound: at which more and more is exchanged until all fits."""

MOST = 1e6
"""Times of the slowest selection met: above any bound."""

Weights = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of a price list: something faster than ``cutoff_s``, before ``deadline``
    (``time.monotonic``), within ``gap`` (relative) of the bound, and not ``refused``. ``hint``:
    multipliers that were good for a similar price list."""

    cutoff_s: float = math.inf
    deadline: float = math.inf
    gap: float = 1e-6
    refused: frozenset[Selection] = frozenset()
    hint: Weights | None = None


@dataclass
class Approach:
    """``tight``: the dual with the highest bound; ``met``: the alternatives of the selections on
    the way; ``infeasible``: proved that nothing fits; ``bounded``: the bound is above the cutoff,
    and nothing more was tried."""

    price_list: PriceList
    tight: Dual
    met: list[tuple[int, ...]] = field(default_factory=list)
    infeasible: bool = False
    bounded: bool = False

    @property
    def bound_s(self) -> float:
        """No selection that fits is faster."""
        return math.inf if self.infeasible else self.tight.bound_s

    def fastest(
        self, less_bytes: float = 0.0, refused: frozenset[Selection] = frozenset()
    ) -> Selection | None:
        """The fastest selection of the alternatives met, if one fits with so much less memory."""
        found = self.within(less_bytes)
        return min(
            (selection for selection in found if selection not in refused),
            key=self.price_list.time_of,
            default=None,
        )

    def fastest_exchanged(self) -> tuple[Selection, float] | None:
        """The fastest of the alternatives met that fits with what is exchanged at the price of
        memory of the bound, or at a higher one; and its time."""
        best: tuple[Selection, float] | None = None
        for alternatives in dict.fromkeys(self.met):
            found = self._exchanged(alternatives)
            if found is not None and (best is None or found[1] < best[1]):
                best = found
        return best

    def _exchanged(self, alternatives: Sequence[int]) -> tuple[Selection, float] | None:
        for times in DEARER:
            weights = times * self.tight.weights
            selection = cheapest_storages(self.price_list, alternatives, weights)
            time_s, memory_bytes = self.price_list.exchanged(selection, weights)
            if (memory_bytes <= self.price_list.limit_bytes).all():
                return selection, time_s
        return None

    def within(self, less_bytes: float) -> Iterator[Selection]:
        """For all alternatives met a selection that fits with so much less memory."""
        price_list = self.price_list
        if less_bytes:
            price_list = replace(price_list, limit_bytes=price_list.limit_bytes - less_bytes)
        for alternatives in dict.fromkeys(self.met):
            selection = storages_within(price_list, alternatives)
            if selection is not None:
                yield selection


def approach(price_list: PriceList, wanted: Wanted) -> Approach:
    """Bound the price list, and meet selections."""
    cutoff_s = wanted.cutoff_s
    if wanted.hint is not None and wanted.hint.any() and math.isfinite(cutoff_s):
        similar = dual(price_list, wanted.hint)
        ascend(similar, SWEEPS, lambda bound_s: bound_s > cutoff_s, LITTLE)
        if similar.bound_s > cutoff_s:
            return Approach(price_list, similar, bounded=True)
    relaxed = dual(price_list)
    best = ascend(relaxed, SWEEPS, lambda bound_s: bound_s > cutoff_s)
    found = Approach(price_list, relaxed, [best.alternatives])
    if relaxed.bound_s > cutoff_s:
        found.bounded = True
    elif not price_list.fits(best):
        if cannot_fit(price_list):
            found.infeasible = True
        else:
            _Prices(found, wanted).search(best)
            found.bounded = found.bound_s > cutoff_s
    return found


@dataclass(frozen=True, slots=True)
class _Line:
    """What a selection costs at every price of memory: ``time_s + weights @ over_bytes``."""

    time_s: float
    over_bytes: Weights


@dataclass
class _Prices:
    """Tries prices of memory: each time the one at which the lowest line of the selections met is
    highest (Kelley's cutting planes), within a box that grows when its corner is wanted."""

    found: Approach
    wanted: Wanted

    def search(self, best: Selection) -> None:
        """Raise ``found.tight`` to the best dual over the prices; ``best`` does not fit."""
        price_list, wanted = self.found.price_list, self.wanted
        box = price_list.time_of(best) / np.maximum(price_list.limit_bytes, 1.0)
        weights = wanted.hint if wanted.hint is not None and wanted.hint.any() else None
        lines = [self._line(best, np.zeros(len(box)))]
        tried: list[Weights] = []
        for _ in range(PRICES):
            if weights is None:
                weights, meet_s = _highest(lines, box)
                if meet_s <= self.found.tight.bound_s * (1 + NEAR) and (weights < box).all():
                    break
            if monotonic() > wanted.deadline or self.found.tight.bound_s > wanted.cutoff_s:
                break
            if any(np.allclose(weights, earlier, rtol=NEAR, atol=0.0) for earlier in tried):
                break
            selection = self._try(weights, FEW_SWEEPS, LITTLE)
            tried.append(weights)
            lines.append(self._line(selection, weights))
            at_edge = (weights >= box) & (lines[-1].over_bytes > 0)
            box = np.where(at_edge, 4 * box, box)
            weights = None
        if self.found.tight.weights.any() and self.found.tight.bound_s <= wanted.cutoff_s:
            self._try(self.found.tight.weights, SWEEPS, 1e-6)

    def _line(self, selection: Selection, weights: Weights) -> _Line:
        """With what is exchanged at these prices of memory."""
        price_list = self.found.price_list
        limit = price_list.limit_bytes
        time_s, memory_bytes = price_list.exchanged(selection, weights)
        over = memory_bytes - limit
        over = np.where(abs(over) <= TOLERANCE * abs(limit), 0.0, over)  # rounding is no slope
        return _Line(time_s, np.where(np.isfinite(limit), over, -np.inf))

    def _try(self, weights: Weights, sweeps: int, rise: float) -> Selection:
        problem = dual(self.found.price_list, weights)
        cutoff_s = self.wanted.cutoff_s
        selection = ascend(problem, sweeps, lambda bound_s: bound_s > cutoff_s, rise)
        if problem.bound_s > self.found.tight.bound_s:
            self.found.tight = problem
        self.found.met.append(selection.alternatives)
        return selection


def _highest(lines: Sequence[_Line], box: Weights) -> tuple[Weights, float]:
    """Where in the box the lowest of the lines is highest, and how high."""
    model = mathopt.Model()
    rows = [r for r in range(len(box)) if np.isfinite(lines[0].over_bytes[r])]
    share = {r: model.add_variable(lb=0.0, ub=1.0) for r in rows}
    scale = max(line.time_s for line in lines) or 1.0
    height = model.add_variable(lb=0.0, ub=MOST)  # without a price it is not negative
    for line in lines:
        slopes = [share[r] * float(box[r] * line.over_bytes[r] / scale) for r in rows]
        model.add_linear_constraint(height <= line.time_s / scale + mathopt.fast_sum(slopes))
    model.maximize(height)
    solved = mathopt.solve(model, mathopt.SolverType.GLOP)
    if not solved.has_primal_feasible_solution():
        return np.zeros(len(box)), -math.inf  # not seen; no price is as good as any other
    values = solved.variable_values()
    weights = np.zeros(len(box))
    for r in rows:
        weights[r] = values[share[r]] * box[r]
    return weights, values[height] * scale


def cannot_fit(price_list: PriceList) -> bool:
    """Whether the bound for memory alone is above a limit: time is left out of the prices."""
    timeless = replace(
        price_list,
        nodes=tuple(
            replace(
                node,
                time_s=np.zeros_like(node.time_s),
                menus=tuple(
                    replace(menu, time_s=tuple(np.zeros_like(t) for t in menu.time_s))
                    for menu in node.menus
                ),
            )
            for node in price_list.nodes
        ),
        flows=(),
        kept=tuple(
            replace(
                kept,
                instead=tuple(replace(i, time_s=np.zeros_like(i.time_s)) for i in kept.instead),
            )
            for kept in price_list.kept
        ),
        fixed_time_s=0.0,
    )
    for row in range(len(price_list.limit_bytes)):
        if np.isfinite(price_list.limit_bytes[row]):
            weights = np.zeros(len(price_list.limit_bytes))
            weights[row] = 1.0
            problem = dual(timeless, weights)
            ascend(problem, SWEEPS)
            if problem.bound_s > 1e-6 * abs(price_list.limit_bytes[row]):
                return True
    return False
