"""The search that all exact searchers share: every mesh, in the order of its lower bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Protocol

import numpy as np

from autopar.errors import UnsupportedModelError
from autopar.ir.rule import RESERVED
from autopar.ir.search import Budget, Problem, SearchResult, Trial
from autopar.ir.sharding import Mesh
from autopar.ir.simulation import Estimate
from autopar.ir.strategy import Strategy
from autopar.recipes import RECIPES, Recipe
from autopar.searchers.optimum import Optimum, Weights, optimum
from autopar.searchers.within_peak import OverBytes
from autopar.simulator.costs import ComputeCache
from autopar.simulator.listing import Allowed, Listing, Structure
from autopar.simulator.microbatches import counts, division
from autopar.simulator.price_list import PriceList, Selection
from autopar.simulator.prices import evaluate


class Solver(Protocol):
    """Finds the optimum of a price list among selections whose whole step fits; ``hint``: memory
    multipliers of the last one."""

    def __call__(
        self,
        price_list: PriceList,
        *,
        cutoff_s: float,
        deadline: float,
        gap: float,
        hint: Weights | None,
        over_bytes: OverBytes,
    ) -> Optimum: ...


QUICK_AXES = 2
"""Meshes with more axes come last: they have many more strategies, most of which the best of the
others excludes before they are priced."""

Progress = Callable[[str], None]
"""Told in one line what is being done."""


FIRST_SHARE = 0.25
"""Of the time that is left, how much is spent on a number of microbatches before anything is found:
what fits is found soon, and proofs get the rest."""


COMFORTABLE = 0.5
"""Of the memory: what a perfect split may fill before more microbatches are tried first."""


def search_meshes(
    name: str, problem: Problem, budget: Budget, solver: Solver, progress: Progress
) -> SearchResult:
    """Solve each mesh that could hold a better strategy than the best so far.

    Where the number of microbatches is open, it is the fewest of 1, 2, 4, ... that leave room and
    with which anything that fits is found; more of them are not faster, since no work is saved.
    """
    if problem.microbatches is not None:
        structure = _structure(problem, problem.microbatches)
        return _search_divided(name, problem, structure, budget, solver, progress)
    started = monotonic()

    def search(count: int, structure: Structure, share: float) -> SearchResult:
        left = replace(budget, time_s=(budget.time_s - (monotonic() - started)) * share)
        divided = replace(problem, microbatches=count)
        return _search_divided(name, divided, structure, left, solver, progress)

    result: SearchResult | None = None
    for count, structure in _counts_in_order(problem):
        if result is not None and monotonic() - started > budget.time_s:
            result = replace(result, stop_reason="time")
            break
        progress(f"trying {count} microbatches" if count > 1 else "trying the whole batch at once")
        result = search(count, structure, FIRST_SHARE)
        if result.best is not None and result.stop_reason == "time":
            result = _faster(result, search(count, structure, 1.0))
        if result.best is not None or result.stop_reason == "interrupted":
            break
    assert result is not None
    return replace(result, search_time_s=monotonic() - started)


def _faster(first: SearchResult, again: SearchResult) -> SearchResult:
    """The better of two searches for the same, with both bounds; the second one may have ended
    before it was as far as the first."""
    bound_s = max(first.lower_bound_s, again.lower_bound_s)
    if _best_s(again) <= _best_s(first):
        return replace(again, lower_bound_s=min(bound_s, _best_s(again)))
    reason = "interrupted" if again.stop_reason == "interrupted" else "time"
    return replace(first, lower_bound_s=min(bound_s, _best_s(first)), stop_reason=reason)


def _best_s(result: SearchResult) -> float:
    if result.best is None or result.best.estimate is None:
        return math.inf
    return result.best.estimate.step_time_s


def _counts_in_order(problem: Problem) -> Iterator[tuple[int, Structure]]:
    """Numbers of microbatches to try until something fits, the fewest first; only one when the
    model needs its batch whole.

    Those for which even a perfect split would fill more than ``COMFORTABLE`` of the memory come
    last, and those that it would overfill not at all (unless that is all there is): so little room
    costs more time, in the search and in the plan, than microbatches do.
    """
    tight: list[tuple[int, Structure]] = []
    hopeless: list[tuple[int, Structure]] = []
    comfortable = 0
    for count in counts(problem.graph, problem.proposals):
        try:
            structure = _structure(problem, count)
        except UnsupportedModelError:
            if count == 1:
                raise
            break
        share = _least_share(problem, count, structure)
        if share <= COMFORTABLE:
            comfortable += 1
            yield count, structure
        else:
            (tight if share <= 1 else hopeless).append((count, structure))
    yield from tight
    if not tight and not comfortable:
        yield hopeless[-1]


def _structure(problem: Problem, count: int) -> Structure:
    divided = division(problem.graph, count, problem.proposals)
    return Structure(divided.graph, divided.rules)


def _least_share(problem: Problem, count: int, structure: Structure) -> float:
    """The share of memory that so many microbatches fill when everything is split perfectly."""
    listing = Listing(
        structure,
        problem.cost_model,
        problem.meshes[0],
        problem.memory_limit_bytes,
        problem.training,
        count,
    )
    return listing.least_bytes / problem.memory_limit_bytes


def _search_divided(
    name: str,
    problem: Problem,
    structure: Structure,
    budget: Budget,
    solver: Solver,
    progress: Progress,
) -> SearchResult:
    started = monotonic()
    search = _Search(problem, structure, budget, solver, progress, started + budget.time_s)
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
    structure: Structure
    budget: Budget
    solver: Solver
    progress: Progress
    deadline: float
    trials: list[Trial] = field(default_factory=list)
    recipes: list[Trial] = field(default_factory=list)
    best: Trial | None = None
    nearest_miss_bytes: int | None = None
    unseen_bound_s: float = 0.0  # before any mesh has a bound
    compute_cache: ComputeCache = field(default_factory=dict)
    weights: Weights | None = None

    def run(self) -> str:
        """Fill in trials; returns why it stopped."""
        try:
            return self._run()
        except KeyboardInterrupt:
            return "interrupted"

    def _run(self) -> str:
        problem, structure = self.problem, self.structure
        if (least := self._listing(structure, problem.meshes[0]).least_bytes) > (
            problem.memory_limit_bytes
        ):
            return self._hopeless(structure, least)
        self.progress("pricing the recipes")
        for recipe in RECIPES.values():
            if monotonic() < self.deadline:
                self._try_recipe(structure, recipe)
        listings = []
        for mesh in problem.meshes:
            listings.append(self._listing(structure, mesh))
            _ = listings[-1].least_s  # takes long where there are many strategies
            if monotonic() > self.deadline:
                return "time"
        listings.sort(key=lambda each: (len(each.mesh.axes) > QUICK_AXES, each.least_s))
        for number, listing in enumerate(listings):
            self.unseen_bound_s = min(unseen.least_s for unseen in listings[number:])
            if monotonic() > self.deadline:
                return "time"
            sizes = " x ".join(map(str, listing.mesh.sizes))
            self.progress(f"mesh {sizes} ({number + 1} of {len(listings)})")
            trial = self._try(listing)
            self.trials.append(trial)
            self._offer(trial)
        self.unseen_bound_s = math.inf
        outcomes = {trial.outcome for trial in self.trials}
        if "time" in outcomes:
            return "time"
        if self.best is None:
            return "unknown" if "unknown" in outcomes else "infeasible"
        return "gap" if outcomes & {"gap", "unknown"} else "optimal"

    def _hopeless(self, structure: Structure, least_bytes: float) -> str:
        """Even a perfect split does not fit."""
        self.trials = [
            Trial("", mesh, None, None, math.inf, "infeasible") for mesh in self.problem.meshes
        ]
        self.unseen_bound_s = math.inf
        for recipe in RECIPES.values():
            self._try_recipe(structure, recipe)
        if self.nearest_miss_bytes is None:
            self.nearest_miss_bytes = int(least_bytes)
        return "infeasible"

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
            problem.microbatches or 1,
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
            self._missed(trial.estimate)
        elif trial.estimate.step_time_s < self.best_s:
            self.best = trial

    def _missed(self, estimate: Estimate) -> None:
        least = self.nearest_miss_bytes
        peak = estimate.peak_memory_bytes
        self.nearest_miss_bytes = peak if least is None else min(least, peak)

    def _try_recipe(self, structure: Structure, recipe: Recipe) -> None:
        """The recipe's best layout becomes a trial, whether it fits or not; a recipe of which the
        model divides nothing becomes one without a strategy."""
        cost_model = self.problem.cost_model
        trials = []
        for layout in recipe.layouts(cost_model.devices, cost_model.scale_up_devices):
            listing = self._listing(structure, layout.mesh, layout.allowed)
            price_list = replace(listing.price_list, limit_bytes=np.full(2, np.inf))
            found = optimum(price_list, deadline=self.deadline)
            if found.selection is not None:
                strategy = listing.strategy(found.selection)
                if not _divides_work(strategy, layout.allowed):
                    continue  # the mesh divides nothing that the recipe would divide
                estimate = self.evaluate(listing, found.selection, strategy)
                trials.append(
                    Trial(recipe.name, layout.mesh, strategy, estimate, found.bound_s, "recipe")
                )
        if not trials:
            nowhere = recipe.layouts(cost_model.devices, cost_model.scale_up_devices)[:1]
            self.recipes += [
                Trial(recipe.name, layout.mesh, None, None, math.inf, "recipe")
                for layout in nowhere
            ]
        else:
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
        listing = replace(listing, cutoff_s=cutoff_s)
        fitting: dict[Selection, tuple[Strategy, Estimate]] = {}

        def over_bytes(selection: Selection) -> int:
            strategy = listing.strategy(selection)
            estimate = self.evaluate(listing, selection, strategy)
            over = estimate.peak_memory_bytes - self.problem.memory_limit_bytes
            if over <= 0:
                fitting[selection] = strategy, estimate
            else:
                self._missed(estimate)
            return over

        found = self.solver(
            listing.price_list,
            cutoff_s=cutoff_s,
            deadline=self.deadline,
            gap=self.budget.gap,
            hint=self.weights,
            over_bytes=over_bytes,
        )
        self.weights = found.weights if found.weights is not None else self.weights
        late = monotonic() > self.deadline
        trial = replace(trial, lower_bound_s=max(trial.lower_bound_s, found.bound_s))
        if found.selection is None:
            return replace(trial, outcome=_outcome(found, cutoff_s, late))
        strategy, estimate = fitting[found.selection]
        proved = trial.lower_bound_s >= estimate.step_time_s * (1 - self.budget.gap)
        outcome = "optimal" if proved else "time" if late else "gap"
        return replace(trial, strategy=strategy, estimate=estimate, outcome=outcome)

    def evaluate(self, listing: Listing, selection: Selection, strategy: Strategy) -> Estimate:
        structure = listing.structure
        return evaluate(
            structure.graph,
            structure.rules,
            self.problem.cost_model,
            strategy,
            compute_cache=self.compute_cache,
            folded=structure.folded if listing.treats_copies_alike(selection) else None,
        )


def _outcome(found: Optimum, cutoff_s: float, late: bool) -> str:
    if found.infeasible:
        return "infeasible"
    if found.bound_s >= cutoff_s * (1 - 1e-6):
        return "bounded"
    return "time" if late else "unknown"


def _divides_work(strategy: Strategy, allowed: tuple[Allowed, ...]) -> bool:
    """Whether work is divided where it may be, and on every axis that has to divide weights."""
    divided = [
        any(split[axis] not in RESERVED for split in strategy.splits.values())
        for axis in range(len(allowed))
    ]
    return (any(divided) or not any(a.letters for a in allowed)) and all(
        done for done, a in zip(divided, allowed, strict=True) if a.weights
    )
