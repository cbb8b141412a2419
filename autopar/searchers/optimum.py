"""The best selection of one price list: bound, exclude, and solve what is left as an ILP."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from time import monotonic

from autopar.searchers._milp import solve
from autopar.searchers.approach import SWEEPS, Approach, Wanted, Weights, approach
from autopar.searchers.bounds import Dual, Survivors, ascend, common, dual, everything, survivors
from autopar.simulator.price_list import PriceList, Selection

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


@dataclass(frozen=True, slots=True)
class Optimum:
    """``selection`` is ``None`` when none was found that fits and beats the cutoff; ``bound_s``: no
    selection that fits is faster; ``infeasible``: proved that none fits; ``columns``: alternatives
    and redistributions that were left to the ILP; ``near``: what was known before the ILP."""

    selection: Selection | None
    bound_s: float
    infeasible: bool = False
    columns: int = 0
    near: Approach | None = None

    @property
    def weights(self) -> Weights | None:
        """The memory multipliers (seconds per byte, by memory row) of the bound."""
        return None if self.near is None else self.near.tight.weights


def optimum(
    price_list: PriceList, wanted: Wanted | None = None, *, exclude: bool = True
) -> Optimum:
    """The fastest selection that fits, if it is faster than the cutoff.

    After the deadline the best so far is returned, with a bound that holds. Without ``exclude`` the
    ILP is solved as it is, with nothing left out.
    """
    wanted = wanted or Wanted()
    if not exclude:
        return _finish(price_list, everything(price_list), None, -math.inf, wanted)
    return settle(approach(price_list, wanted), wanted)


def settle(near: Approach, wanted: Wanted) -> Optimum:
    """Go on from an approach to the optimum, or as near as can be proved."""
    if near.infeasible or near.bounded:
        return Optimum(None, near.bound_s, near.infeasible, near=near)
    price_list = near.price_list
    example = near.fastest(refused=wanted.refused)
    if example is None:
        return replace(_without_example(price_list, near.tight, wanted), near=near)
    example, bound_s, offered = _narrow(price_list, near.tight, example, wanted)
    return replace(_finish(price_list, offered, example, bound_s, wanted), near=near)


def _narrow(
    price_list: PriceList, tight: Dual, best: Selection, wanted: Wanted
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


def _finish(
    price_list: PriceList,
    offered: Survivors,
    best: Selection | None,
    bound_s: float,
    wanted: Wanted,
) -> Optimum:
    """Solve the ILP over what may be better than ``best`` and the cutoff."""
    cutoff_s, gap = wanted.cutoff_s, wanted.gap
    best_s = price_list.time_of(best) if best is not None else math.inf
    if best is not None and bound_s >= best_s * (1 - gap):
        return Optimum(_under(best, best_s, cutoff_s), min(bound_s, best_s))
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


def _without_example(price_list: PriceList, tight: Dual, wanted: Wanted) -> Optimum:
    """No selection is known that fits: offer what could be near the bound, then everything."""
    cutoff_s = wanted.cutoff_s
    optimistic = replace(wanted, cutoff_s=min(tight.bound_s * OPTIMISTIC, cutoff_s))
    offered = survivors(tight, optimistic.cutoff_s)
    first = _finish(price_list, offered, None, tight.bound_s, optimistic)
    if first.selection is not None:
        return first
    every = everything(price_list) if math.isinf(cutoff_s) else survivors(tight, cutoff_s)
    return _finish(price_list, every, None, tight.bound_s, wanted)
