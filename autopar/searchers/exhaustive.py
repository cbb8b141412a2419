"""Every selection of a price list: the oracle that other searchers are compared with."""

from __future__ import annotations

import math

from autopar.errors import AutoparError
from autopar.ir.search import Budget, Problem, SearchResult
from autopar.searchers.enumeration import count_selections, selections
from autopar.searchers.optimum import Optimum, Weights
from autopar.searchers.over_meshes import Progress, search_meshes
from autopar.searchers.within_peak import OverBytes
from autopar.simulator.price_list import PriceList, Selection

MOST_SELECTIONS = 3_000_000


def best_selection(
    price_list: PriceList,
    over_bytes: OverBytes = lambda selection: 0,
    faster_than_s: float = math.inf,
) -> Selection | None:
    """The fastest selection that fits (``over_bytes``: its whole step, too), by trying all;
    ``None`` when nothing fits.

    Raises:
        AutoparError: there are more than ``MOST_SELECTIONS``.
    """
    if (count := count_selections(price_list)) > MOST_SELECTIONS:
        raise AutoparError(
            f"exhaustive search would try {count:.3g} selections, more than {MOST_SELECTIONS:.3g}; "
            "use the ilp searcher, a smaller model or a smaller mesh"
        )
    best: Selection | None = None
    best_s = faster_than_s
    for selection in selections(price_list):
        time_s = price_list.time_of(selection)
        fits = time_s < best_s and price_list.fits(selection) and over_bytes(selection) <= 0
        if fits:
            best, best_s = selection, time_s
    return best


def search(
    problem: Problem, budget: Budget, progress: Progress = lambda line: None
) -> SearchResult:
    """Try every selection on every mesh: for small models, and to check the others."""
    return search_meshes("exhaustive", problem, budget, _solve, progress)


def _solve(
    price_list: PriceList,
    *,
    cutoff_s: float,
    deadline: float,
    gap: float,
    hint: Weights | None,
    over_bytes: OverBytes,
) -> Optimum:
    del deadline, gap, hint
    best = best_selection(price_list, over_bytes, cutoff_s)
    if best is None:
        return Optimum(None, cutoff_s, infeasible=math.isinf(cutoff_s))
    return Optimum(best, price_list.time_of(best))
