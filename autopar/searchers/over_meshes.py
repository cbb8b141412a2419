"""The search that all exact searchers share: every mesh, in the order of its lower bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Protocol

import numpy as np

from autopar.ir.rule import RESERVED
from autopar.ir.search import Budget, Problem, SearchResult, Trial
from autopar.ir.sharding import Mesh
from autopar.ir.simulation import Estimate
from autopar.ir.strategy import Strategy
from autopar.recipes import RECIPES, Recipe
from autopar.searchers.approach import Wanted, Weights
from autopar.searchers.optimum import Optimum, optimum
from autopar.searchers.recompute import AUTO, Known, Recomputing
from autopar.searchers.within_peak import OverBytes
from autopar.simulator.costs import ComputeCache
from autopar.simulator.listing import Allowed, Listing, Structure
from autopar.simulator.price_list import PriceList, Selection
from autopar.simulator.prices import evaluate
from autopar.simulator.recompute_choices import BlockChoices


class Solver(Protocol):
    """Looks for the optimum of a price list among selections whose whole step fits.

    Called with ``first`` ``None`` it finds a bound and, quickly, something that fits. Called again
    with what it returned then, it finds the optimum, or as near as can be proved.
    """

    def __call__(
        self,
        price_list: PriceList,
        wanted: Wanted,
        over_bytes: OverBytes,
        first: Optimum | None = None,
    ) -> Optimum: ...


QUICK_AXES = 2
"""Meshes with more axes come last: they have many more strategies, most of which the best of the
others excludes before they are priced."""

SHARES = (0.5,)
"""Of what is saved for the backward, how much is counted where strategies are looked for that
recompute the rest. With none of it counted the bound holds whatever is recomputed; those found so
may recompute more than pays."""

Progress = Callable[[str], None]
"""Told in one line what is being done."""


class LateError(Exception):
    """The time is over."""


def ended_early(run: Callable[[], None]) -> str:
    """What ended it: ``time``, ``interrupted`` (Ctrl-C), or nothing did."""
    try:
        run()
    except LateError:
        return "time"
    except KeyboardInterrupt:
        return "interrupted"
    return ""


@dataclass
class _Open:
    """A mesh on which something faster than the best may exist. ``fitting``: strategies on it that
    fit."""

    listing: Listing
    found: Optimum
    fitting: dict[Selection, tuple[Strategy, Estimate]]


@dataclass
class MeshSearch:
    """The search for one number of microbatches; its state can be reported at any moment.

    ``cutoff_s``: only what is faster is of interest. ``shelf``: recipes that are priced, too.
    """

    problem: Problem
    structure: Structure
    budget: Budget
    solver: Solver
    progress: Progress
    deadline: float
    cutoff_s: float = math.inf
    trials: dict[Mesh, Trial] = field(default_factory=dict)
    recipes: list[Trial] = field(default_factory=list)
    best: Trial | None = None
    memory_binds: bool = True  # whether the best would be slower with more memory, as far as known
    nearest_miss_bytes: int | None = None
    compute_cache: ComputeCache = field(default_factory=dict)
    started: float = field(default_factory=lambda: monotonic())
    shelf: Mapping[str, Recipe] = field(default_factory=lambda: RECIPES)
    _listings: dict[Mesh, Listing] = field(default_factory=dict)
    _open: dict[Mesh, _Open] = field(default_factory=dict)
    _weights: Weights | None = None
    _recomputed: Known = field(default_factory=dict)

    # ---- the search ----------------------------------------------------------------------------

    def run(self) -> str:
        """Try all; returns why it stopped.

        Raises:
            KeyboardInterrupt: what was found until then is kept.
        """
        try:
            self._run()
        except LateError:
            return "time"
        left = any(self._is_open(trial) for trial in self.trials.values())
        if self.best is None:
            return "unknown" if left else "infeasible"
        return "gap" if left else "optimal"

    def _run(self) -> None:
        if self.shelf and not self.recipes:
            self.progress("pricing the recipes")
            for recipe in self.shelf.values():
                self._in_time()
                self.try_recipe(recipe)
        self.begin()
        self._prove()

    def begin(self, most_axes: float = math.inf) -> None:
        """A bound, and something that fits, for every mesh of so many axes at most.

        Raises:
            LateError: before all were bounded.
        """
        if self.least_bytes > self.problem.memory_limit_bytes:
            return self._hopeless()
        listings = []
        for mesh in self.problem.meshes:
            if len(mesh.axes) <= most_axes and mesh not in self.trials:
                self._in_time()
                listings.append(self.listing(mesh))
                _ = listings[-1].least_s  # takes long where there are many strategies
        listings.sort(key=lambda each: (len(each.mesh.axes) > QUICK_AXES, _least_s(each)))
        for listing in listings:
            self._in_time()
            self.progress(
                f"mesh {_sizes(listing.mesh)} "
                f"({len(self.trials) + 1} of {len(self.problem.meshes)})"
            )
            self._approach(listing)
        return None

    @property
    def least_s(self) -> float:
        """No trial is faster."""
        return min((trial.lower_bound_s for trial in self.trials.values()), default=math.inf)

    @property
    def least_bytes(self) -> float:
        """What a device holds at least when everything is split perfectly."""
        return self.listing(self.problem.meshes[0]).least_bytes

    def _hopeless(self) -> None:
        """Even a perfect split does not fit."""
        for mesh in self.problem.meshes:
            self.trials[mesh] = Trial("", mesh, None, None, math.inf, "infeasible")

    def _in_time(self) -> None:
        if monotonic() > self.deadline:
            raise LateError

    def listing(self, mesh: Mesh, allowed: tuple[Allowed, ...] | None = None) -> Listing:
        """The prices on one mesh; those that are not restricted are made once."""
        if allowed is None and mesh in self._listings:
            return self._listings[mesh]
        problem = self.problem
        made = Listing(
            self.structure,
            problem.cost_model,
            mesh,
            problem.memory_limit_bytes,
            problem.training,
            problem.microbatches or 1,
            self.compute_cache,
            (Allowed(problem.dimensions),) * len(mesh.axes) if allowed is None else allowed,
            saved_share=1.0 if problem.recompute == "none" else 0.0,
        )
        if allowed is None:
            self._listings[mesh] = made
        return made

    @property
    def best_s(self) -> float:
        """What is to be beaten."""
        if self.best is None or self.best.estimate is None:
            return self.cutoff_s
        return min(self.best.estimate.step_time_s, self.cutoff_s)

    # ---- one mesh ------------------------------------------------------------------------------

    def _approach(self, listing: Listing) -> None:
        """A bound for one mesh, and something on it that fits, if it can be faster."""
        mesh = listing.mesh
        least_s = _least_s(listing)
        trial = Trial("", mesh, None, None, least_s, "bounded")
        self.trials[mesh] = trial
        if least_s > self.best_s:
            return
        opened = _Open(listing.below(self.best_s), Optimum(None, least_s), {})
        self._solve(opened, self.deadline, None)
        if self.problem.recompute == AUTO:
            self._look_for_less_recomputation(mesh)
        if self._is_open(self.trials[mesh]):
            self._open[mesh] = opened

    def _look_for_less_recomputation(self, mesh: Mesh) -> None:
        """Where the fastest that was found recomputes: what does so less, or not at all."""
        for share in SHARES:
            found = self.trials[mesh].strategy
            if found is not None and not found.recompute:
                return
            self._in_time()
            listing = self.listing(mesh).below(self.best_s, share)
            self._solve(_Open(listing, Optimum(None, 0.0), {}), self.deadline, None)

    def _prove(self) -> None:
        """Close what gap is left, the mesh with the lowest bound first; as long as nothing fits,
        all of the time is for finding something."""
        looked = monotonic()
        enough = looked + self.budget.proof_after_s(looked - self.started)
        while self._open:
            deadline = self.deadline if self.best is None else min(enough, self.deadline)
            if monotonic() > deadline:
                break
            mesh = min(self._open, key=lambda mesh: self.trials[mesh].lower_bound_s)
            opened = self._open.pop(mesh)
            if self._is_open(self.trials[mesh]):
                self.progress(f"closing the gap on mesh {_sizes(mesh)}")
                self._solve(opened, deadline, opened.found)
        self._in_time()

    def _solve(self, opened: _Open, deadline: float, first: Optimum | None) -> None:
        """Let the solver find what it can, and make it the mesh's trial."""
        listing, cutoff_s = opened.listing, self.best_s
        wanted = Wanted(cutoff_s, deadline, self.budget.gap, hint=self._weights)

        def over_bytes(selection: Selection) -> int:
            strategy, estimate = self._with_recomputation(listing, selection, self.best_s)
            over = estimate.peak_memory_bytes - self.problem.memory_limit_bytes
            if over <= 0:
                opened.fitting[selection] = strategy, estimate
            else:
                self._missed(estimate)
            return over

        found = opened.found = self.solver(listing.price_list, wanted, over_bytes, first)
        if found.weights is not None and found.weights.any():
            self._weights = found.weights
        trial = self.trials[listing.mesh]
        if listing.saved_share == self.listing(listing.mesh).saved_share:
            trial = self._bounded(trial, found, cutoff_s)
        fastest = self._fastest(opened, found)
        if fastest is not None and self._is_faster(fastest[1], trial):
            trial = replace(trial, strategy=fastest[0], estimate=fastest[1])
        self.trials[listing.mesh] = trial
        if self._offer(trial):
            recomputes = trial.strategy is not None and bool(trial.strategy.recompute)
            binds = found.weights is None or bool(found.weights.any())
            self.memory_binds = binds or recomputes

    @staticmethod
    def _bounded(trial: Trial, found: Optimum, cutoff_s: float) -> Trial:
        nothing_faster = found.infeasible and math.isfinite(cutoff_s)
        bound_s = cutoff_s if nothing_faster else found.bound_s
        trial = replace(trial, lower_bound_s=max(trial.lower_bound_s, bound_s))
        if found.infeasible and not nothing_faster:
            trial = replace(trial, outcome="infeasible")
        return trial

    def _fastest(self, opened: _Open, found: Optimum) -> tuple[Strategy, Estimate] | None:
        """The solver's choice; where recomputation, which it does not know of, takes time as well,
        the fastest of all that were met and fit."""
        if self.problem.recompute == "none":
            return None if found.selection is None else opened.fitting[found.selection]
        return min(opened.fitting.values(), key=lambda one: one[1].step_time_s, default=None)

    @staticmethod
    def _is_faster(estimate: Estimate, trial: Trial) -> bool:
        return trial.estimate is None or estimate.step_time_s < trial.estimate.step_time_s

    def _is_open(self, trial: Trial) -> bool:
        """Whether something faster than the best may exist there."""
        enough_s = self.best_s * (1 - self.budget.gap)
        return trial.outcome != "infeasible" and trial.lower_bound_s < enough_s

    def _offer(self, trial: Trial) -> bool:
        """Take the trial as the best if it fits and is faster; whether it was taken."""
        if trial.estimate is None:
            return False
        if trial.estimate.peak_memory_bytes > self.problem.memory_limit_bytes:
            self._missed(trial.estimate)
            return False
        if trial.estimate.step_time_s >= self.best_s:
            return False
        self.best = trial
        return True

    def _missed(self, estimate: Estimate) -> None:
        least = self.nearest_miss_bytes
        peak = estimate.peak_memory_bytes
        self.nearest_miss_bytes = peak if least is None else min(least, peak)

    def _with_recomputation(
        self, listing: Listing, selection: Selection, cutoff_s: float = math.inf
    ) -> tuple[Strategy, Estimate]:
        """As much as is asked for, or needed to fit; as little as fits is looked for below the
        cutoff only."""
        strategy, structure, kind = (
            listing.strategy(selection),
            self.structure,
            self.problem.recompute,
        )
        if kind == "none":
            return strategy, self._evaluate(listing, selection, strategy)
        structure = listing.structure
        blocks = [
            BlockChoices(structure.graph, structure.rules, strategy, listing.costs, block)
            for block in structure.blocks
        ]

        def estimate(of: Strategy, ends: Sequence[frozenset[int]]) -> Estimate:
            return self._evaluate(listing, selection, of, ends)

        ways = Recomputing(blocks, estimate, self._recomputed)
        if kind == AUTO:
            return ways.within(strategy, self.problem.memory_limit_bytes, cutoff_s)
        return ways.everywhere(strategy, kind)

    def _evaluate(
        self,
        listing: Listing,
        selection: Selection,
        strategy: Strategy,
        ends: Sequence[frozenset[int]] = (),
    ) -> Estimate:
        structure = listing.structure
        return evaluate(
            structure.graph,
            structure.rules,
            self.problem.cost_model,
            strategy,
            compute_cache=self.compute_cache,
            folded=listing.folded(selection, ends),
        )

    # ---- recipes -------------------------------------------------------------------------------

    def try_recipe(self, recipe: Recipe) -> None:
        """The recipe's best layout becomes a trial, whether it fits or not; a recipe of which the
        model divides nothing becomes one without a strategy."""
        cost_model = self.problem.cost_model
        wanted = Wanted(deadline=self.deadline, gap=self.budget.gap)
        trials = []
        for layout in recipe.layouts(cost_model.devices, cost_model.scale_up_devices):
            listing = self.listing(layout.mesh, layout.allowed)
            unlimited = replace(listing.price_list, limit_bytes=np.full(2, np.inf))
            found = optimum(unlimited, wanted)
            if found.selection is not None:
                if self.problem.recompute == AUTO and found.bound_s > self.best_s:
                    strategy = listing.strategy(found.selection)
                    estimate = self._evaluate(listing, found.selection, strategy)
                else:
                    strategy, estimate = self._with_recomputation(listing, found.selection)
                if not _divides_work(strategy, layout.allowed):
                    continue  # the mesh divides nothing that the recipe would divide
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

    def _rank(self, trial: Trial) -> tuple[bool, float, float]:
        """Of those that wait for their hosts, the one whose devices take least."""
        estimate = trial.estimate
        assert estimate is not None
        over = estimate.peak_memory_bytes > self.problem.memory_limit_bytes
        return over, estimate.step_time_s, estimate.step_time_s - estimate.launches_s

    # ---- what came of it -----------------------------------------------------------------------

    def result(self, name: str, reason: str) -> SearchResult:
        """What is known now."""
        unseen = (self._unseen_s(mesh) for mesh in self.problem.meshes if mesh not in self.trials)
        bound_s = min((t.lower_bound_s for t in self.trials.values()), default=math.inf)
        bound_s = min(bound_s, min(unseen, default=math.inf))
        if self.best is not None:
            bound_s = min(bound_s, self.best_s)
        late = reason in ("time", "interrupted")
        nothing = self.best is None
        return SearchResult(
            searcher=name,
            trials=tuple(self._with_outcome(t, late) for t in self.trials.values())
            + tuple(self.recipes),
            best=self._with_outcome(self.best, late) if self.best is not None else None,
            lower_bound_s=bound_s,
            stop_reason=reason,
            search_time_s=monotonic() - self.started,
            nearest_miss_bytes=self.nearest_miss_bytes if nothing else None,
            least_bytes=int(self.least_bytes) if nothing and not late else None,
        )

    def _unseen_s(self, mesh: Mesh) -> float:
        """A bound of a mesh that was not looked at: what is known of its compute."""
        listing = self._listings.get(mesh)
        return _least_s(listing) if listing is not None and "least_s" in vars(listing) else 0.0

    def _with_outcome(self, trial: Trial, late: bool) -> Trial:
        """With the word for how far it came."""
        if trial.outcome in ("recipe", "infeasible"):
            return trial
        gap = 1 - self.budget.gap
        if trial.estimate is not None and (trial.lower_bound_s >= trial.estimate.step_time_s * gap):
            outcome = "optimal"
        elif not self._is_open(trial):
            outcome = "bounded"
        elif late:
            outcome = "time"
        else:
            outcome = "gap" if trial.estimate is not None else "unknown"
        return replace(trial, outcome=outcome)


def _least_s(listing: Listing) -> float:
    """Of devices and of hosts."""
    return max(listing.least_s, listing.launches_s)


def _sizes(mesh: Mesh) -> str:
    return " x ".join(map(str, mesh.sizes))


def _divides_work(strategy: Strategy, allowed: tuple[Allowed, ...]) -> bool:
    """Whether work is divided where it may be, and on every axis that has to divide weights."""
    divided = [
        any(split[axis] not in RESERVED for split in strategy.splits.values())
        for axis in range(len(allowed))
    ]
    return (any(divided) or not any(a.letters for a in allowed)) and all(
        done for done, a in zip(divided, allowed, strict=True) if a.weights
    )
