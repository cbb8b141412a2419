"""Every selection of a price list: the oracle that other searchers are compared with."""

from __future__ import annotations

import math

from autopar.errors import AutoparError
from autopar.ir.search import Budget, Problem, SearchResult
from autopar.searchers.approach import Wanted
from autopar.searchers.enumeration import count_selections, selections
from autopar.searchers.optimum import Optimum
from autopar.searchers.over_meshes import Progress
from autopar.searchers.over_microbatches import search_all
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
    return search_all("exhaustive", problem, budget, _solve, progress)


def _solve(
    price_list: PriceList, wanted: Wanted, over_bytes: OverBytes, first: Optimum | None = None
) -> Optimum:
    if first is not None:
        return first
    best = best_selection(price_list, over_bytes, wanted.cutoff_s)
    if best is None:
        return Optimum(None, wanted.cutoff_s, infeasible=math.isinf(wanted.cutoff_s))
    return Optimum(best, price_list.time_of(best))
