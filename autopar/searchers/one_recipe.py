"""The best strategy within one recipe of the shelf: what a search compares itself with."""

from __future__ import annotations

from dataclasses import replace
from time import monotonic

from autopar.errors import AutoparError
from autopar.ir.search import Budget, Problem
from autopar.ir.strategy import Strategy
from autopar.recipes import Recipe
from autopar.searchers.over_meshes import MeshSearch, Progress
from autopar.searchers.within_peak import solve_within_peak
from autopar.simulator.listing import Structure
from autopar.simulator.microbatches import division


def within(recipe: Recipe, problem: Problem, budget: Budget, progress: Progress) -> Strategy:
    """In as many microbatches as the problem has (one if that is open); whether it fits or not.

    Raises:
        AutoparError: of this model the recipe divides nothing on this machine.
    """
    divided = division(problem.graph, problem.microbatches or 1, problem.proposals)
    search = MeshSearch(
        replace(problem, microbatches=divided.count),
        Structure(divided.graph, divided.rules),
        budget,
        solve_within_peak,
        progress,
        monotonic() + budget.time_s,
    )
    search.try_recipe(recipe)
    (trial,) = search.recipes[:1] or (None,)
    if trial is None or trial.strategy is None:
        raise AutoparError(
            f"the recipe {recipe.name} ({recipe.description}) divides nothing of "
            f"{problem.graph.name} on {problem.cost_model.devices} devices: the sizes do not allow "
            "it, or the machine has no such layout; take another recipe (autopar list recipes)"
        )
    return trial.strategy


__all__ = ["within"]
