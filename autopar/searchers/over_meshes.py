"""The search that all exact searchers share: every mesh, in the order of its lower bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Protocol

import numpy as np

from autopar.ir.search import Budget, Problem, SearchResult, Trial
from autopar.ir.sharding import Mesh
from autopar.ir.simulation import Estimate
from autopar.ir.strategy import Strategy
from autopar.ops import bound_rules
from autopar.recipes import RECIPES, Recipe
from autopar.searchers.optimum import Optimum, Weights, optimum
from autopar.simulator.costs import ComputeCache
from autopar.simulator.listing import Allowed, Listing, Structure
from autopar.simulator.price_list import PriceList, Selection
from autopar.simulator.prices import evaluate


class Solver(Protocol):
    """Finds the optimum of a price list; ``hint``: memory multipliers of the last one."""

    def __call__(
        self,
        price_list: PriceList,
        *,
        cutoff_s: float,
        deadline: float,
        gap: float,
        hint: Weights | None,
    ) -> Optimum: ...


Progress = Callable[[str], None]
"""Told in one line what is being done."""

MOST_CORRECTIONS = 6
"""How often a mesh is solved again with less memory, because the whole step's peak, which the price
list only bounds from below, was above the limit."""


def search_meshes(
    name: str, problem: Problem, budget: Budget, solver: Solver, progress: Progress
) -> SearchResult:
    """Solve each mesh that could hold a better strategy than the best so far."""
    started = monotonic()
    search = _Search(problem, budget, solver, progress, started + budget.time_s)
    reason = search.run()
    bound_s = min((t.lower_bound_s for t in search.trials), default=math.inf)
    bound_s = min(bound_s, search.unseen_bound_s)
    best = search.best
    if best is not None and best.estimate is not None:
        bound_s = min(bound_s, best.estimate.step_time_s)
    return SearchResult(
        searcher=name,
        trials=tuple(search.trials) + tuple(search.recipes),
        best=best,
        lower_bound_s=bound_s,
        stop_reason=reason,
        search_time_s=monotonic() - started,
        nearest_miss_bytes=search.nearest_miss_bytes if best is None else None,
    )


@dataclass
class _Search:
    problem: Problem
    budget: Budget
    solver: Solver
    progress: Progress
    deadline: float
    trials: list[Trial] = field(default_factory=list)
    recipes: list[Trial] = field(default_factory=list)
    best: Trial | None = None
    nearest_miss_bytes: int | None = None
    unseen_bound_s: float = math.inf
    compute_cache: ComputeCache = field(default_factory=dict)
    weights: Weights | None = None

    def run(self) -> str:
        """Fill in trials; returns why it stopped."""
        try:
            return self._run()
        except KeyboardInterrupt:
            return "interrupted"

    def _run(self) -> str:
        rules = bound_rules(self.problem.graph, self.problem.proposals)
        structure = Structure(self.problem.graph, rules)
        self.progress("pricing the recipes")
        for recipe in RECIPES.values():
            self._try_recipe(structure, recipe)
        listings = sorted(
            (self._listing(structure, mesh) for mesh in self.problem.meshes),
            key=lambda listing: listing.least_s,
        )
        for number, listing in enumerate(listings):
            self.unseen_bound_s = listing.least_s
            if monotonic() > self.deadline:
                return "time"
            sizes = " x ".join(map(str, listing.mesh.sizes))
            self.progress(f"mesh {sizes} ({number + 1} of {len(listings)})")
            trial = self._try(listing)
            self.trials.append(trial)
            self._offer(trial)
        self.unseen_bound_s = math.inf
        if self.best is None:
            return "infeasible"
        if any(trial.outcome == "time" for trial in self.trials):
            return "time"
        return "optimal"

    def _listing(
        self, structure: Structure, mesh: Mesh, allowed: tuple[Allowed, ...] | None = None
    ) -> Listing:
        problem = self.problem
        letters = Allowed(problem.dimensions)
        return Listing(
            structure,
            problem.cost_model,
            mesh,
            problem.memory_limit_bytes,
            problem.training,
            problem.microbatches,
            self.compute_cache,
            (letters,) * len(mesh.axes) if allowed is None else allowed,
        )

    @property
    def best_s(self) -> float:
        if self.best is None or self.best.estimate is None:
            return math.inf
        return self.best.estimate.step_time_s

    def _offer(self, trial: Trial) -> None:
        """Take the trial as the best if it fits and is faster."""
        if trial.estimate is None:
            return
        if trial.estimate.peak_memory_bytes > self.problem.memory_limit_bytes:
            least = self.nearest_miss_bytes
            peak = trial.estimate.peak_memory_bytes
            self.nearest_miss_bytes = peak if least is None else min(least, peak)
        elif trial.estimate.step_time_s < self.best_s:
            self.best = trial

    def _try_recipe(self, structure: Structure, recipe: Recipe) -> None:
        """The recipe's best layout becomes a trial, whether it fits or not."""
        cost_model = self.problem.cost_model
        trials = []
        for layout in recipe.layouts(cost_model.devices, cost_model.scale_up_devices):
            listing = self._listing(structure, layout.mesh, layout.allowed)
            price_list = replace(listing.price_list, limit_bytes=np.full(2, np.inf))
            found = optimum(price_list, deadline=self.deadline)
            if found.selection is not None:
                strategy = listing.strategy(found.selection)
                estimate = self.evaluate(listing, found.selection, strategy)
                trials.append(
                    Trial(recipe.name, layout.mesh, strategy, estimate, found.bound_s, "recipe")
                )
        if trials:
            best = min(trials, key=self._rank)
            self.recipes.append(best)
            if set(self.problem.dimensions) >= set("SAP") and best.mesh in self.problem.meshes:
                self._offer(best)

    def _rank(self, trial: Trial) -> tuple[bool, float]:
        assert trial.estimate is not None
        over = trial.estimate.peak_memory_bytes > self.problem.memory_limit_bytes
        return over, trial.estimate.step_time_s

    def _try(self, listing: Listing) -> Trial:
        """The fastest strategy on one mesh that fits in memory."""
        cutoff_s = self.best_s
        trial = Trial("", listing.mesh, None, None, listing.least_s, "bounded")
        if listing.least_s > cutoff_s:
            return trial
        price_list = listing.price_list
        bound_s: float | None = None
        for _ in range(MOST_CORRECTIONS):
            found = self.solver(
                price_list,
                cutoff_s=cutoff_s,
                deadline=self.deadline,
                gap=self.budget.gap,
                hint=self.weights,
            )
            self.weights = found.weights if found.weights is not None else self.weights
            bound_s = found.bound_s if bound_s is None else bound_s
            if found.selection is None:
                outcome = _outcome(found, bound_s, cutoff_s, self.deadline)
                return replace(trial, lower_bound_s=bound_s, outcome=outcome)
            strategy = listing.strategy(found.selection)
            estimate = self.evaluate(listing, found.selection, strategy)
            trial = Trial("", listing.mesh, strategy, estimate, bound_s, "optimal")
            over = estimate.peak_memory_bytes - self.problem.memory_limit_bytes
            if over <= 0:
                late = monotonic() > self.deadline
                return replace(trial, outcome="time") if late else trial
            self._offer(trial)
            seen = float(price_list.memory_of(found.selection).max())
            price_list = replace(
                price_list,
                limit_bytes=np.minimum(price_list.limit_bytes, seen) - over,
            )
        return replace(trial, outcome="infeasible")

    def evaluate(self, listing: Listing, selection: Selection, strategy: Strategy) -> Estimate:
        structure = listing.structure
        return evaluate(
            self.problem.graph,
            structure.rules,
            self.problem.cost_model,
            strategy,
            compute_cache=self.compute_cache,
            folded=structure.folded if listing.treats_copies_alike(selection) else None,
        )


def _outcome(found: Optimum, bound_s: float, cutoff_s: float, deadline: float) -> str:
    if found.infeasible:
        return "infeasible"
    if bound_s >= cutoff_s * (1 - 1e-6):
        return "bounded"
    return "time" if monotonic() > deadline else "infeasible"
