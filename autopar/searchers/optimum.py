"""The best selection of one price list: bound, exclude, and solve what is left as an ILP."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from time import monotonic

import numpy as np

from autopar.searchers._milp import solve
from autopar.searchers.bounds import (
    Dual,
    Survivors,
    ascend,
    common,
    dual,
    everything,
    survivors,
)
from autopar.simulator.price_list import PriceList, Selection

SWEEPS = 60
FEW_SWEEPS = 8
"""For each of the multipliers that are tried until the memory fits."""

ROUNDS = 5
FEW = 1500
"""Columns up to which the ILP is solved rather than more excluded."""

LONGEST_S = 10.0
"""No single ILP takes longer; what it has proved by then counts."""

MANY = 8_000
"""Columns above which the ILP is not tried: building it alone would take seconds. What is then left
between the best selection and the bound is reported as the gap."""

OPTIMISTIC = 1.2
"""When no selection is known that fits: at first what is within this factor of the bound."""


Weights = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Optimum:
    """``selection`` is ``None`` when none was found that fits and beats the cutoff; ``bound_s``: no
    selection that fits is faster; ``infeasible``: proved that none fits; ``columns``: alternatives
    and redistributions that were left to the ILP; ``weights``: the memory multipliers (seconds per
    byte, by memory row) of the bound."""

    selection: Selection | None
    bound_s: float
    infeasible: bool = False
    columns: int = 0
    weights: Weights | None = None


def optimum(
    price_list: PriceList,
    *,
    cutoff_s: float = math.inf,
    deadline: float = math.inf,
    gap: float = 1e-6,
    exclude: bool = True,
    hint: Weights | None = None,
    refused: frozenset[Selection] = frozenset(),
) -> Optimum:
    """The fastest selection that fits, if it is faster than ``cutoff_s``.

    ``deadline`` (``time.monotonic``): then the best so far is returned, with a bound that holds.
    ``gap``: relative distance to the bound that counts as optimal. Without ``exclude``
    the ILP is solved as it is, with nothing left out. ``hint``: memory multipliers that were good
    for a similar price list; a bound with them may show at once that nothing beats the cutoff.
    ``refused``: selections that count as if they did not fit.
    """
    wanted = _Wanted(cutoff_s, deadline, gap, refused, hint)
    if not exclude:
        return _finish(price_list, everything(price_list), None, -math.inf, wanted)
    if hint is not None and hint.any() and math.isfinite(cutoff_s):
        similar = dual(price_list, hint)
        ascend(similar, SWEEPS, lambda bound_s: bound_s > cutoff_s)
        if similar.bound_s > cutoff_s:
            return Optimum(None, similar.bound_s)
    relaxed = dual(price_list)
    best = ascend(relaxed, SWEEPS, lambda bound_s: bound_s > cutoff_s)
    if relaxed.bound_s > cutoff_s:
        return Optimum(None, relaxed.bound_s)
    tight, example = relaxed, None if best in refused else best
    if not price_list.fits(best):
        if _cannot_fit(price_list):
            return Optimum(None, math.inf, True)
        example, tight = _within_memory(price_list, relaxed, best, wanted)
        if tight.bound_s > cutoff_s:
            return Optimum(None, tight.bound_s)
    if example is None:
        return _without_example(price_list, tight, wanted)
    example, bound_s, offered = _narrow(price_list, tight, example, wanted)
    found = _finish(price_list, offered, example, bound_s, wanted)
    return replace(found, weights=tight.weights)


def _narrow(
    price_list: PriceList, tight: Dual, best: Selection, wanted: _Wanted
) -> tuple[Selection, float, Survivors]:
    """What can still be better than ``best``, bounded again among itself as long as that excludes
    more; a better selection if one is met; and the bound."""
    target_s = min(price_list.time_of(best), wanted.cutoff_s)
    bound_s = tight.bound_s
    offered = survivors(tight, target_s)
    for _ in range(ROUNDS):
        if bound_s >= target_s * (1 - wanted.gap) or offered.columns <= FEW:
            break
        again = dual(price_list, tight.weights, offered, never_s=10 * target_s)
        met = ascend(again, SWEEPS)
        faster = price_list.time_of(met) < price_list.time_of(best)
        if faster and met not in wanted.refused and price_list.fits(met):
            best = met
            target_s = min(price_list.time_of(best), wanted.cutoff_s)
        bound_s = max(bound_s, min(again.bound_s, target_s))
        before, offered = offered.columns, common(offered, survivors(again, target_s))
        if offered.columns > 0.8 * before:
            break
    return best, bound_s, offered


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What ``optimum`` was asked."""

    cutoff_s: float
    deadline: float
    gap: float
    refused: frozenset[Selection]
    hint: Weights | None


def _finish(
    price_list: PriceList,
    offered: Survivors,
    best: Selection | None,
    bound_s: float,
    wanted: _Wanted,
) -> Optimum:
    """Solve the ILP over what may be better than ``best`` and the cutoff."""
    cutoff_s, gap = wanted.cutoff_s, wanted.gap
    best_s = price_list.time_of(best) if best is not None else math.inf
    if best is not None and bound_s >= best_s * (1 - gap):
        return Optimum(_under(best, best_s, cutoff_s), min(bound_s, best_s), columns=0)
    if offered.columns > MANY and math.isfinite(bound_s):
        return Optimum(_under(best, best_s, cutoff_s), min(bound_s, best_s), False, offered.columns)
    target_s = min(best_s, cutoff_s)
    solved = solve(
        price_list,
        offered,
        time_limit_s=min(wanted.deadline - monotonic(), LONGEST_S),
        gap=gap / 10,
        cutoff_s=target_s if math.isfinite(target_s) else None,
        refused=wanted.refused,
    )
    found = None if solved.selection in wanted.refused else solved.selection
    if found is not None and price_list.fits(found) and price_list.time_of(found) < best_s:
        best, best_s = found, price_list.time_of(found)
    if solved.infeasible:
        nothing = best is None and not math.isfinite(cutoff_s)
        bound_s = math.inf if nothing else max(bound_s, target_s * (1 - 1e-9))
        return Optimum(_under(best, best_s, cutoff_s), bound_s, nothing, offered.columns)
    bound_s = max(bound_s, min(solved.bound_s, best_s, cutoff_s))
    return Optimum(_under(best, best_s, cutoff_s), bound_s, False, offered.columns)


def _under(best: Selection | None, best_s: float, cutoff_s: float) -> Selection | None:
    return best if best_s < cutoff_s else None


# ---- memory -------------------------------------------------------------------------------------


def _within_memory(
    price_list: PriceList, relaxed: Dual, best: Selection, wanted: _Wanted
) -> tuple[Selection | None, Dual]:
    """Raise the price of memory until the selection fits, then halve the interval: the fastest
    selection seen that fits, and the dual with the highest bound."""
    rows = price_list.memory_of(best) > price_list.limit_bytes
    unit = price_list.time_of(best) / np.maximum(price_list.limit_bytes, 1.0)
    factor = 0.25
    if wanted.hint is not None and (wanted.hint > 0).any():
        factor = float((wanted.hint / unit).max())
    seen = _Memory(price_list, relaxed, wanted)
    low, high = 0.0, math.inf
    for _ in range(10):
        if monotonic() > wanted.deadline or seen.tight.bound_s > wanted.cutoff_s:
            break
        selection = seen.look(np.where(rows, unit * factor, 0.0))
        over = price_list.memory_of(selection) > price_list.limit_bytes
        if (over & ~rows).any():
            rows = rows | over
            low = 0.0
        if over.any():
            low = factor
        else:
            high = factor
        if math.isinf(high):
            factor *= 4
            if factor > 1e7:
                break
        elif low == 0.0:
            factor /= 4
        elif high / low < 1.1:
            break
        else:
            factor = math.sqrt(low * high)
    return seen.best, seen.tight


@dataclass
class _Memory:
    """The best selection that fits and the best dual over the multipliers tried."""

    price_list: PriceList
    tight: Dual
    wanted: _Wanted
    best: Selection | None = None

    def look(self, weights: Weights) -> Selection:
        problem = dual(self.price_list, weights)
        selection = ascend(problem, FEW_SWEEPS, lambda bound_s: bound_s > self.wanted.cutoff_s)
        if problem.bound_s > self.tight.bound_s:
            self.tight = problem
        fits = selection not in self.wanted.refused and self.price_list.fits(selection)
        if fits and (
            self.best is None
            or self.price_list.time_of(selection) < self.price_list.time_of(self.best)
        ):
            self.best = selection
        return selection


def _cannot_fit(price_list: PriceList) -> bool:
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


def _without_example(price_list: PriceList, tight: Dual, wanted: _Wanted) -> Optimum:
    """No selection is known that fits: offer what could be near the bound, then everything."""
    cutoff_s = wanted.cutoff_s
    optimistic = replace(wanted, cutoff_s=min(tight.bound_s * OPTIMISTIC, cutoff_s))
    offered = survivors(tight, optimistic.cutoff_s)
    first = _finish(price_list, offered, None, tight.bound_s, optimistic)
    if first.selection is not None:
        return first
    every = everything(price_list) if math.isinf(cutoff_s) else survivors(tight, cutoff_s)
    return _finish(price_list, every, None, tight.bound_s, wanted)
