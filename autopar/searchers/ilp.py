"""Exact search by bounds and an integer linear programme; the default."""

from __future__ import annotations

from autopar.ir.search import Budget, Problem, SearchResult
from autopar.searchers.optimum import optimum
from autopar.searchers.over_meshes import Progress, search_meshes


def search(
    problem: Problem, budget: Budget, progress: Progress = lambda line: None
) -> SearchResult:
    """The fastest strategy that fits on any of the problem's meshes, with a lower bound."""
    return search_meshes("ilp", problem, budget, optimum, progress)
