"""The whole search: groups of devices, microbatches, stages, schedules, splits, storages.

Prospects (numbers of rows and microbatches, and the mesh of a row) are bounded by price lists and
excluded where the best plan so far is faster. Of those that are left the likely ones become layouts
for the search over stages; where there is one row, the search over strategies of one stage.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count as counting
from time import monotonic

from autopar.errors import AutoparError, UnsupportedModelError
from autopar.ir.search import Budget, Problem, SearchResult, Trial
from autopar.ir.sharding import Mesh
from autopar.ir.simulation import Estimate
from autopar.ir.strategy import Strategy
from autopar.recipes import RECIPES
from autopar.searchers import degrees, over_stages
from autopar.searchers.over_meshes import LateError, MeshSearch, Progress, ended_early
from autopar.searchers.over_stages import StageResult
from autopar.searchers.prospects import Likely, Prospect, Prospects, chains
from autopar.searchers.recompute import AUTO
from autopar.searchers.within_peak import solve_within_peak
from autopar.simulator import meshes
from autopar.simulator.costs import ComputeCache
from autopar.simulator.listing import Structure
from autopar.simulator.microbatches import Divisible, Division
from autopar.simulator.pipelines import PricedPipeline, StagePrices
from autopar.simulator.recompute_choices import KINDS
from autopar.simulator.stage_problem import StageProblem, Staging
from autopar.simulator.stages import pipelined
from autopar.simulator.traced_stages import NOT_RECOMPUTED, TracedStages
from autopar.simulator.units import units

BUBBLE = 0.1
"""Of a step, at which the first number of microbatches of each prospect is tried."""

FIRST, TOGETHER = 6, 4
"""Likely strategies that are tried first, and how many of these together."""

PROMISING = 1.02
"""What is likely to take at most so many times as long as the best is tried."""

CORRECTIONS, NEAR = 4, 0.003
"""How often another limit of memory is tried where what was found needs more, or less, than units
alone say; and how near (relative) is near enough."""

SLOWER = 1.3
"""Times what is likely: no longer may a step take at first, so that no time is lost where nothing
fits."""

PESSIMISTIC = 0.05
"""Of the memory, by how much units may say that more is needed than is: so much more is allowed
where nothing was found yet and nothing fits (decision 22 has how far units are off)."""

PROMISING_MESHES = 6
"""Of which all numbers of microbatches are tried."""

WORSE = 2
"""More microbatches, or fewer, are tried until so many numbers in a row were no better."""

STAGES_S, FIRST_PROOF_S, PROOF_S = 10.0, 0.3, 1.0
"""How long one search over stages may take, and how much of that for its own gap: while something
good is looked for, and when it is to be excluded."""

SETTLED = 0.5
"""Of the time for proofs, how much may be used where no proof can raise the bound any more."""

MOST_AXES = 2
"""Of the mesh of a row that is not alone."""


def search(
    problem: Problem, budget: Budget, progress: Progress = lambda line: None
) -> SearchResult:
    """The fastest plan that fits, of one stage or several, with a lower bound for pipelines of
    equal rows.

    At Ctrl-C or the end of the time it is the best so far.
    """
    return _Search(problem, budget, progress).result()


@dataclass
class _Search:
    problem: Problem
    budget: Budget
    progress: Progress
    best: Trial | None = None
    trials: dict[tuple[int, Mesh], Trial] = field(default_factory=dict)
    recipes: list[Trial] = field(default_factory=list)
    nearest_miss_bytes: int | None = None
    counts: tuple[int, ...] = (1,)
    started: float = field(default_factory=lambda: monotonic())
    compute_cache: ComputeCache = field(default_factory=dict)
    _divided: dict[int, tuple[Division, Structure]] = field(default_factory=dict)
    _open: list[tuple[float, bool, int, Prospect]] = field(default_factory=list)
    _closed: dict[tuple[int, Mesh, int], float] = field(default_factory=dict)  # with their bounds
    _numbers: Iterator[int] = field(default_factory=counting)
    _plans_s: list[float] = field(default_factory=list)  # how long each took
    _complete: bool = False

    def __post_init__(self) -> None:
        self.units = units(self.problem.graph)
        self.divisible = Divisible(self.problem.graph, self.problem.proposals)
        self.stage_prices = StagePrices(self.problem.cost_model)
        if self.stage_prices.cost_model is self.problem.cost_model:
            self.stage_prices.compute_cache = self.compute_cache
        self.prospects = Prospects(
            self.problem,
            lambda count: self.divided(count)[1],
            self.units,
            self.compute_cache,
            self.stage_prices,
        )

    def result(self) -> SearchResult:
        return self._result(ended_early(self._run))

    # ---- in order ------------------------------------------------------------------------------

    def _run(self) -> None:
        self.counts = self._counts()
        for rows, mesh in self._rows_and_meshes():
            self._in_time()
            fitting = [count for count in self.counts if self.prospects.can_fit(rows, count)]
            for of_counts in _apart(rows, fitting):
                prospect = Prospect(rows, mesh, of_counts)
                self._push(replace(prospect, bound_s=self.prospects.compute_s(prospect)))
        self._complete = True
        self._take_degrees()
        self._dive()
        self._price_recipes()
        self._close()

    def _take_degrees(self) -> None:
        """The fastest plan with equal stages, where the model is a stack of equal blocks."""
        if not degrees.is_open(self.problem):
            return
        try:
            search = degrees.DegreeSearch(self.problem, self.budget, self.progress)
        except AutoparError:
            return
        try:
            search.run()
        except AutoparError as refusal:
            self.progress(f"left out: {refusal}")
        finally:
            self._missed(search.nearest_miss_bytes)
            if search.best is not None and search.best.strategy is not None:
                found = search.best.strategy
                self._offer(_prospect_of(found), found, search.best.estimate)

    def _counts(self) -> tuple[int, ...]:
        """Numbers of microbatches, in rising order."""
        problem = self.problem
        if problem.microbatches is not None:
            return (problem.microbatches,)
        size = self.divisible.batch_size
        several = [count for count in range(2, size + 1) if size % count == 0]
        if several and self._is_refused(several[0]):
            return (1,)
        return (1, *several)

    def _is_refused(self, count: int) -> bool:
        try:
            self.divided(count)
        except UnsupportedModelError:
            return True
        return False

    def divided(self, count: int) -> tuple[Division, Structure]:
        if count not in self._divided:
            found = self.divisible.into(count)
            self._divided[count] = found, Structure(found.graph, found.rules)
        return self._divided[count]

    def _rows_and_meshes(self) -> Iterator[tuple[int, Mesh]]:
        """One row with the meshes that were asked for; if that are all, more rows, too."""
        problem, devices = self.problem, self.problem.cost_model.devices
        for mesh in problem.meshes:
            yield 1, mesh
        if set(problem.meshes) >= set(meshes.factorizations(devices)) and "O" in problem.dimensions:
            for rows in range(2, min(len(self.units), devices) + 1):
                if devices % rows == 0:
                    for mesh in meshes.factorizations(devices // rows, MOST_AXES):
                        yield rows, mesh

    def _push(self, prospect: Prospect, *, is_bounded: bool = False) -> None:
        heapq.heappush(
            self._open, (prospect.bound_s, not is_bounded, next(self._numbers), prospect)
        )

    # ---- something good ------------------------------------------------------------------------

    def _dive(self) -> None:
        """The most likely plans of all meshes with a number of microbatches that is neither small
        nor large; then, of those that seem best, with all others."""
        found: list[Likely] = []
        counts_of: dict[tuple[int, Mesh], list[int]] = {}
        for *_, prospect in sorted(self._open):
            if len(prospect.mesh.axes) <= MOST_AXES:
                key = prospect.rows, prospect.mesh
                counts_of[key] = sorted([*counts_of.get(key, ()), *prospect.counts])
        for (rows, mesh), counts in counts_of.items():
            first = Prospect(rows, mesh, (counts[_first(rows, counts)],))
            if self.prospects.bound_s(first, _best_s(found)) < _best_s(found):
                found += self._likely(first, found)
        found.sort(key=lambda likely: likely.step_s)
        promising = list(dict.fromkeys((one.prospect.rows, one.prospect.mesh) for one in found))
        for rows, mesh in promising[:PROMISING_MESHES]:
            found += self._other_counts(rows, mesh, counts_of[rows, mesh], found)
        found.sort(key=lambda likely: likely.step_s)
        self._try_first(found)

    def _try_first(self, found: Sequence[Likely]) -> None:
        """The likely ones in their order, as long as they may be better; then stages that are laid
        differently."""
        alone = [one for one in found if one.prospect.rows == 1][:TOGETHER]
        stages = [one for one in found if one.prospect.rows > 1][:FIRST]
        for one in sorted((*alone, *stages), key=lambda one: one.step_s):
            if one.step_s < self.best_s * PROMISING:
                if one.prospect.rows == 1:
                    self._try_one_stage(one.prospect, FIRST_PROOF_S)
                else:
                    self._try_stages([one], FIRST_PROOF_S, SLOWER * one.step_s)
        if len(stages) > 1:
            began = monotonic()
            self._try_stages(stages[:TOGETHER], FIRST_PROOF_S, SLOWER * stages[0].step_s)
            self._plans_s.append(monotonic() - began)

    def _other_counts(
        self, rows: int, mesh: Mesh, counts: Sequence[int], known: Sequence[Likely]
    ) -> list[Likely]:
        """With more and with fewer microbatches than the first, as long as that is better."""
        found: list[Likely] = []
        first = _first(rows, counts)
        for way in (counts[first + 1 :], counts[first - 1 :: -1] if first else ()):
            same = [o for o in known if (o.prospect.rows, o.prospect.mesh) == (rows, mesh)]
            best_s, worse = _best_s(same), 0
            for count in way:
                likely = self._likely(Prospect(rows, mesh, (count,)), known)
                found += likely
                worse = worse + 1 if _best_s(likely) >= best_s else 0
                best_s = min(best_s, _best_s(likely))
                if worse == WORSE:
                    break
        return found

    def _likely(self, prospect: Prospect, found: Sequence[Likely]) -> list[Likely]:
        """If it may be faster than those."""
        self._in_time()
        if self.prospects.compute_s(prospect) >= _best_s(found):
            return []
        self.progress(_named(prospect))
        return list(self.prospects.likely(prospect))

    def _close(self) -> None:
        """Take the prospects with the lowest bounds first: bound, halve, and at last plan them.

        Where one that was planned has as low a bound as those that are left, or those with the
        lowest are too many to be planned, no proof can raise the bound of all: what is planned then
        may be faster than the best, no more.
        """
        looked = monotonic()
        share = self.budget.proof_after_s(looked - self.started)
        least_s = math.inf  # of the bounds of those that were planned
        while self._open and self._open[0][0] < self._enough_s:
            left_s = looked + share - monotonic()
            settled = least_s <= self._open[0][0] or not self._can_all_be_planned(left_s)
            left_s -= share * (1 - SETTLED) * settled
            if left_s < 0 and self.best is not None:
                break
            proof_s = max(FIRST_PROOF_S, PROOF_S if self.best is None else min(PROOF_S, left_s))
            self._in_time()
            _, unbounded, _, prospect = heapq.heappop(self._open)
            if unbounded:
                bound_s = self.prospects.bound_s(prospect, self._enough_s)
                self._push(replace(prospect, bound_s=bound_s), is_bounded=True)
            elif not prospect.is_single:
                for half in prospect.halves():
                    self._push(half)
            elif settled and self._key(prospect) in self._closed:
                self._close_one(prospect, 0.0)  # planned before
            else:
                self._plan(prospect, proof_s)
                least_s = min(least_s, self._closed[self._key(prospect)])

    def _can_all_be_planned(self, left_s: float) -> bool:
        """Those that are to be planned now, since their bounds are about the lowest."""
        about_s = self._open[0][0] * (1 + self.budget.gap)
        lowest = [one for one in self._open if one[0] <= about_s]
        if not self._plans_s or any(
            unbounded or not of.is_single for _, unbounded, _, of in lowest
        ):
            return True
        return len(lowest) * sum(self._plans_s) / len(self._plans_s) <= left_s

    def _plan(self, prospect: Prospect, proof_s: float) -> None:
        began = monotonic()
        if prospect.rows > 1:
            self._plan_stages(prospect, proof_s)
        else:
            self._try_one_stage(prospect, proof_s)
        self._plans_s.append(monotonic() - began)

    def _plan_stages(self, prospect: Prospect, proof_s: float) -> None:
        """All of these stages, as far as they may be faster than the best."""
        found = list(self.prospects.likely(prospect))
        self._close_one(prospect, self._try_stages(found, proof_s) if found else 0.0)

    def _close_one(self, prospect: Prospect, bound_s: float) -> None:
        """What is proved of it; whatever was proved of it before holds, too."""
        key = self._key(prospect)
        self._closed[key] = max(prospect.bound_s, bound_s, self._closed.get(key, 0.0))

    @staticmethod
    def _key(prospect: Prospect) -> tuple[int, Mesh, int]:
        (count,) = prospect.counts
        return prospect.rows, prospect.mesh, count

    # ---- plans ---------------------------------------------------------------------------------

    def _price_recipes(self) -> None:
        """With as many microbatches as the best plan; one of them may be better."""
        count = self.counts[0]
        if self.best is not None and self.best.strategy is not None:
            count = self.best.strategy.microbatches
        self.progress("pricing the recipes")
        search = self._one_stage(self.problem, count)
        for recipe in RECIPES.values():
            self._in_time()
            search.try_recipe(recipe)
        self.recipes = search.recipes
        if search.best is not None:
            found = replace(search.best, name="")
            self._offer(Prospect(1, found.mesh, (count,)), found.strategy, found.estimate)

    def _one_stage(self, problem: Problem, count: int, proof_s: float = 0.0) -> MeshSearch:
        return MeshSearch(
            replace(problem, microbatches=count),
            self.divided(count)[1],
            replace(self.budget, proof_s=proof_s),
            solve_within_peak,
            self.progress,
            self.started + self.budget.time_s,
            self.best_s,
            compute_cache=self.compute_cache,
            shelf={},
        )

    def _try_one_stage(self, prospect: Prospect, proof_s: float) -> None:
        """All of this mesh, as far as it may be faster than the best."""
        (count,) = prospect.counts
        self.progress(_named(prospect))
        bound_s = math.inf
        ways = ("none", AUTO) if self.problem.recompute == AUTO else (self.problem.recompute,)
        for recompute in ways:
            problem = replace(self.problem, meshes=(prospect.mesh,), recompute=recompute)
            search = self._one_stage(problem, count, proof_s)
            reason = search.run()
            bound_s = search.trials[prospect.mesh].lower_bound_s
            self._missed(search.nearest_miss_bytes)
            if search.best is not None:
                self._offer(prospect, search.best.strategy, search.best.estimate)
            if reason == "time":
                raise LateError
        self._close_one(prospect, bound_s)

    def _try_stages(
        self, found: Sequence[Likely], proof_s: float, cutoff_s: float = math.inf
    ) -> float:
        """Search over stages that are laid like these, and price the best of them exactly, if they
        are faster than the cutoff and than the best so far.

        Returns a bound for all of these stages: that of the limit of memory which allowed most. 0.0
        where nothing was found, since units may say that more is needed than is.
        """
        problem = self.problem
        laid: dict[int, list[Strategy]] = {}
        for one in found:
            laid.setdefault(one.count, []).append(one.strategy)
        self.progress(", ".join(sorted({_named(one.prospect) for one in found})))
        traced = TracedStages(
            self.divided,
            self.units,
            problem.cost_model,
            problem.memory_limit_bytes,
            laid,
            self.stage_prices,
            problem.training,
            _kinds(problem.recompute),
        )
        bound_s, exact = math.inf, 1.0
        more = PESSIMISTIC if self.best is None else 0.0
        below_s = min(cutoff_s, PROMISING * self.best_s)  # units may say that more time is needed
        for _ in range(CORRECTIONS):
            self._in_time()
            result = self._search_stages(traced.problem, below_s, proof_s)
            bound_s = min(bound_s, result.lower_bound_s)
            if result.best is None and more:
                traced = traced.within(int(problem.memory_limit_bytes * (1 + more)))
                more = 0.0
                continue
            if result.best is None:
                break
            before_s = self.best_s
            estimate = self._exactly(traced, result.best)
            if estimate is None:
                return 0.0
            more = 0.0
            exact = min(exact, estimate.step_time_s / result.time_s)
            below_s = min(cutoff_s, self.best_s / exact)
            planned_bytes = traced.peak_bytes(result.best)
            limit = problem.memory_limit_bytes * planned_bytes // estimate.peak_memory_bytes
            fits = estimate.peak_memory_bytes <= problem.memory_limit_bytes
            if fits and abs(limit - traced.memory_limit_bytes) < NEAR * limit:
                break
            if fits and estimate.step_time_s > before_s:  # nor are those that should be slower
                break
            if not fits:  # units are whole: a bit less may be what was found again
                limit = min(limit, int(traced.memory_limit_bytes * (1 - NEAR)))
            traced = traced.within(limit)
        return bound_s * exact if math.isfinite(bound_s) else 0.0

    def _exactly(self, traced: TracedStages, staging: Staging) -> Estimate | None:
        """What a staging comes to, which is offered; ``None``: it cannot be done."""
        strategy = traced.strategy(staging)
        division = self.divided(strategy.microbatches)[0]
        try:
            pipeline = PricedPipeline(pipelined(division, strategy), self.stage_prices)
            estimate = pipeline.estimate()
        except AutoparError as refusal:
            self.progress(f"left out: {refusal}")
            return None
        self._offer(_prospect_of(strategy), strategy, estimate)
        return estimate

    def _search_stages(self, problem: StageProblem, cutoff_s: float, proof_s: float) -> StageResult:
        left_s = self.started + self.budget.time_s - monotonic()
        budget = Budget(min(left_s, STAGES_S), self.budget.gap, proof_s)
        result = over_stages.search(problem, budget, self.progress, cutoff_s)
        if result.stop_reason == "interrupted":
            raise KeyboardInterrupt
        return result

    def _offer(
        self, prospect: Prospect, strategy: Strategy | None, estimate: Estimate | None
    ) -> None:
        """A trial, and the best if it fits and is faster."""
        if strategy is None or estimate is None:
            return
        key = prospect.rows, prospect.mesh
        trial = Trial(_name(prospect), prospect.mesh, strategy, estimate, 0.0, "gap")
        before = self.trials.get(key)
        if estimate.peak_memory_bytes > self.problem.memory_limit_bytes:
            self._missed(estimate.peak_memory_bytes)
            return
        if (
            before is None
            or before.estimate is None
            or (estimate.step_time_s < before.estimate.step_time_s)
        ):
            self.trials[key] = trial
        if estimate.step_time_s < self.best_s:
            self.best = trial

    def _missed(self, peak_bytes: int | None) -> None:
        if peak_bytes is not None:
            least = self.nearest_miss_bytes
            self.nearest_miss_bytes = peak_bytes if least is None else min(least, peak_bytes)

    # ---- what is known -------------------------------------------------------------------------

    @property
    def best_s(self) -> float:
        if self.best is None or self.best.estimate is None:
            return math.inf
        return self.best.estimate.step_time_s

    @property
    def _enough_s(self) -> float:
        return self.best_s * (1 - self.budget.gap)

    def _in_time(self) -> None:
        if monotonic() > self.started + self.budget.time_s:
            raise LateError

    def _result(self, reason: str) -> SearchResult:
        bounds: dict[tuple[int, Mesh], float] = {}
        left = [((p.rows, p.mesh), p.bound_s) for *_, p in self._open]
        known = {(p.rows, p.mesh, n): p.bound_s for *_, p in self._open for n in p.counts}
        left += [(key[:2], max(of, known.get(key, 0.0))) for key, of in self._closed.items()]
        for key, one_s in left:
            bounds[key] = min(bounds.get(key, math.inf), one_s)
        bound_s = min([self.best_s, *bounds.values()]) if self._complete else 0.0
        if not reason:
            reason = self._reason(bound_s)
        nothing = self.best is None
        return SearchResult(
            searcher="hybrid",
            trials=(*self._trials(bounds), *self.recipes),
            best=self.best,
            lower_bound_s=bound_s,
            stop_reason=reason,
            search_time_s=monotonic() - self.started,
            nearest_miss_bytes=self.nearest_miss_bytes if nothing else None,
            least_bytes=self._least_bytes() if nothing and reason != "interrupted" else None,
        )

    def _reason(self, bound_s: float) -> str:
        if self.best is None:
            return "infeasible" if math.isinf(bound_s) else "unknown"
        return "optimal" if bound_s >= self._enough_s else "gap"

    def _least_bytes(self) -> int:
        most = self.counts[-1]
        return int(self.prospects.listing(self.problem.meshes[0], most).least_bytes)

    def _trials(self, bounds: dict[tuple[int, Mesh], float]) -> Iterator[Trial]:
        for key in dict.fromkeys((*bounds, *self.trials)):
            rows, mesh = key
            bound_s, found = bounds.get(key, 0.0), self.trials.get(key)
            if found is not None and found.estimate is not None:
                time_s = found.estimate.step_time_s
                near = bound_s >= time_s * (1 - self.budget.gap)
                outcome = "optimal" if near else "gap"
                yield replace(found, lower_bound_s=min(bound_s, time_s), outcome=outcome)
                continue
            outcome = "infeasible" if math.isinf(bound_s) else "bounded"
            if bound_s < self._enough_s:
                outcome = "unknown"
            yield Trial(_name(Prospect(rows, mesh, ())), mesh, None, None, bound_s, outcome)


def _best_s(found: Sequence[Likely]) -> float:
    return min((likely.step_s for likely in found), default=math.inf)


def _apart(rows: int, counts: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """One row that does all at once has another peak than one with microbatches."""
    if rows == 1 and len(counts) > 1 and counts[0] == 1:
        yield (1,)
        counts = counts[1:]
    if counts:
        yield from chains(counts)


def _first(rows: int, counts: Sequence[int]) -> int:
    """The place of the number that is tried first."""
    enough = (rows - 1) / BUBBLE
    return next((i for i, count in enumerate(counts) if count >= enough), len(counts) - 1)


def _prospect_of(strategy: Strategy) -> Prospect:
    rows = len({stage.devices for stage in strategy.stages})
    ((common, _),) = Counter(stage.mesh for stage in strategy.stages).most_common(1)
    return Prospect(rows, common, (strategy.microbatches,))


def _kinds(recompute: str) -> tuple[str, ...]:
    return tuple(KINDS) if recompute == AUTO else (recompute or NOT_RECOMPUTED,)


def _name(prospect: Prospect) -> str:
    """
    >>> _name(Prospect(4, Mesh(()), (8,)))
    'on each of 4 groups'
    """
    return f"on each of {prospect.rows} groups" if prospect.rows > 1 else ""


def _named(prospect: Prospect) -> str:
    sizes = " x ".join(map(str, prospect.mesh.sizes))
    (count,) = prospect.counts
    several = f"{count} microbatch{'es' * (count > 1)}"
    return f"mesh {sizes} {_name(prospect)}".rstrip() + f", {several}"


__all__ = ["search"]
