"""Shelf of searchers: from a problem to the best strategy, with a lower bound."""

from __future__ import annotations

from collections.abc import Callable

from autopar.ir.search import SearchResult
from autopar.searchers import degrees, exhaustive, hybrid, ilp

Searcher = Callable[..., SearchResult]
"""``search(problem, budget, progress=...)``; ``progress`` is called with one line at a time."""

SEARCHERS: dict[str, Searcher] = {
    "ilp": ilp.search,
    "hybrid": hybrid.search,
    "degrees": degrees.search,
    "exhaustive": exhaustive.search,
}
"""By the name that ``--searcher`` takes."""
