"""Into how many microbatches the batch is divided: the number with which the fastest is found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from time import monotonic

from autopar.ir.search import Budget, Problem, SearchResult
from autopar.searchers.over_meshes import QUICK_AXES, LateError, MeshSearch, Progress, Solver
from autopar.searchers.recompute import AUTO
from autopar.simulator.listing import Structure
from autopar.simulator.microbatches import Division, division, divisions

COUNTING_SHARE = 0.5
"""Of the time, how much may be spent before a number of microbatches is taken."""

WORSE = 2
"""More microbatches are tried until so many numbers in a row were no better."""


def search_all(
    name: str, problem: Problem, budget: Budget, solver: Solver, progress: Progress
) -> SearchResult:
    """Solve each mesh that could hold a better strategy than the best so far.

    At first every mesh gets a bound and something that fits; then, where that leaves a gap, proofs
    are attempted in the order of the bounds. An open number of microbatches becomes the one of 1,
    2, 4, ... with which meshes of few axes do best: more are faster only as long as memory binds,
    since they save no work. Where recomputation is a choice, what is fastest without is found
    first, and has to be beaten.
    """
    if problem.recompute != AUTO:
        return _Run(name, problem, budget, solver, progress).result()
    plain, half = replace(problem, recompute="none"), replace(budget, time_s=budget.time_s / 2)
    without = _Run(name, plain, half, solver, progress).result()
    if without.stop_reason == "interrupted":
        return without
    found, best_s, count = without.best, math.inf, None
    if found is not None and found.strategy is not None and found.estimate is not None:
        best_s, count = found.estimate.step_time_s, found.strategy.microbatches
    rest = replace(budget, time_s=budget.time_s - without.search_time_s)
    progress("recomputing where that is faster")
    run = _Run(name, problem, rest, solver, progress, best_s, count)
    return _faster(without, run.result())


def _faster(without: SearchResult, recomputing: SearchResult) -> SearchResult:
    """The bound is that of all strategies, recomputing or not."""
    if recomputing.best is not None or without.best is None:
        time_s = without.search_time_s + recomputing.search_time_s
        return replace(recomputing, search_time_s=time_s)
    bounds = {trial.mesh: trial.lower_bound_s for trial in recomputing.trials}
    assert without.best.estimate is not None
    reason = recomputing.stop_reason
    return replace(
        without,
        trials=tuple(
            replace(t, lower_bound_s=min(t.lower_bound_s, bounds.get(t.mesh, 0.0)))
            for t in without.trials
        ),
        lower_bound_s=min(recomputing.lower_bound_s, without.best.estimate.step_time_s),
        stop_reason={"infeasible": "optimal", "unknown": "gap"}.get(reason, reason),
        search_time_s=without.search_time_s + recomputing.search_time_s,
    )


@dataclass
class _Run:
    name: str
    problem: Problem
    budget: Budget
    solver: Solver
    progress: Progress
    cutoff_s: float = math.inf  # what is to be beaten,
    count: int | None = None  # which has so many microbatches
    started: float = field(default_factory=lambda: monotonic())
    searches: list[MeshSearch] = field(default_factory=list)
    best: MeshSearch | None = None

    def result(self) -> SearchResult:
        try:
            search, reason = self._run()
        except KeyboardInterrupt:
            if not self.searches:
                raise
            search, reason = min(reversed(self.searches), key=_own_best_s), "interrupted"
        found = search.result(self.name, reason)
        return replace(found, search_time_s=monotonic() - self.started)

    def _run(self) -> tuple[MeshSearch, str]:
        """The search whose result counts, and why it stopped."""
        problem = self.problem
        if problem.microbatches is None:
            self._count()
        else:
            found = division(problem.graph, problem.microbatches, problem.proposals)
            self._add(found, self.budget.time_s)
        reasons = []
        alike = [s for s in self.searches if s.problem.microbatches == self.count]
        for search in [self.best] if self.best is not None else alike or self.searches:
            search.deadline = self.started + self.budget.time_s
            search.cutoff_s = self.cutoff_s
            reasons.append(search.run())
            if search.best is not None or reasons[-1] == "time":
                return search, reasons[-1]
        return search, "unknown" if "unknown" in reasons else reasons[-1]

    def _count(self) -> None:
        """Begin searches until no more microbatches are promising."""
        worse = 0
        for found in divisions(self.problem.graph, self.problem.proposals):
            several = f"{found.count} microbatches"
            self.progress(f"trying {several if found.count > 1 else 'the whole batch at once'}")
            search = self._add(found, self.budget.time_s * COUNTING_SHARE)
            late = False
            try:
                search.begin(QUICK_AXES)
            except LateError:
                late = True
            if search.best is not None:
                self.best, worse = search, 0
            elif self.best is not None or found.count >= (self.count or math.inf):
                worse += 1
            if late or worse == WORSE or (search.best is not None and not search.memory_binds):
                break
        self._try_fewer()

    def _try_fewer(self) -> None:
        """Where hosts are slower than devices, fewer microbatches launch less: those for which
        nothing was found at first get as much time as proofs."""
        for search in self.searches:
            best = self.best.best if self.best is not None else None
            if best is None or best.estimate is None or not best.estimate.launches_s:
                return
            if search is self.best:
                return
            now, step_s = monotonic(), best.estimate.step_time_s
            if search.best is None and search.least_s < step_s * (1 - self.budget.gap):
                end = now + self.budget.proof_after_s(now - self.started)
                search.deadline = min(end, self.started + self.budget.time_s * COUNTING_SHARE)
                search.cutoff_s = step_s
                search.run()
                if search.best is not None:
                    self.best = search

    def _add(self, found: Division, time_s: float) -> MeshSearch:
        search = MeshSearch(
            replace(self.problem, microbatches=found.count),
            Structure(found.graph, found.rules),
            self.budget,
            self.solver,
            self.progress,
            self.started + time_s,
            self.cutoff_s if self.best is None else self.best.best_s,
            started=self.started,
        )
        self.searches.append(search)
        return search


def _own_best_s(search: MeshSearch) -> float:
    """What it found itself, whatever it was to beat."""
    found = search.best.estimate if search.best is not None else None
    return math.inf if found is None else found.step_time_s
