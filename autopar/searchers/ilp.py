"""Exact search by bounds and an integer linear programme; the default."""

from __future__ import annotations

from autopar.ir.search import Budget, Problem, SearchResult
from autopar.searchers.over_meshes import Progress
from autopar.searchers.over_microbatches import search_all
from autopar.searchers.within_peak import solve_within_peak


def search(
    problem: Problem, budget: Budget, progress: Progress = lambda line: None
) -> SearchResult:
    """The fastest strategy that fits on any of the problem's meshes, with a lower bound."""
    return search_all("ilp", problem, budget, solve_within_peak, progress)
