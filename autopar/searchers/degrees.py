"""The fastest of all degrees of parallelism, proved: what grids over tensor, pipeline and data
degrees look for, without playing each of them.

All are bounded together as they are without recomputation (``over_degrees``). In the order of their
bounds those that fit are evaluated in full, and of those that do not as few blocks are recomputed
as must be; until the best is faster than the next bound.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count as counting
from time import monotonic

from autopar.errors import AutoparError
from autopar.ir.search import Budget, Problem, SearchResult, Trial
from autopar.ir.sharding import Mesh
from autopar.recipes import Degrees, degrees_text
from autopar.searchers.degree_space import DegreeSpace
from autopar.searchers.over_degrees import Candidate, DegreePrices, Unplayed
from autopar.searchers.over_meshes import LateError, Progress, ended_early
from autopar.searchers.recompute import AUTO
from autopar.simulator import meshes
from autopar.simulator.microbatches import division
from autopar.simulator.recompute_choices import KINDS

TOGETHER = 200
"""At most, of those that do not fit."""

NEAR = 0.02
"""What is kept is not quite a bound where kernels of small models keep other things under another
way to store parameters; what is so little (relative) above the limit is evaluated in full, too."""


def search(
    problem: Problem, budget: Budget, progress: Progress = lambda line: None
) -> SearchResult:
    """The fastest degrees that fit, with a lower bound for all degrees.

    At Ctrl-C or the end of the time it is the best so far.

    Raises:
        AutoparError: the model has no repeated block, no degrees divide it evenly, or only some
            meshes or splits are wanted.
    """
    if not is_open(problem):
        raise AutoparError(
            "degrees say the mesh and what is split; leave --mesh and --dimensions out, or take "
            "another searcher"
        )
    return DegreeSearch(problem, budget, progress).result()


def is_open(problem: Problem) -> bool:
    """Whether any mesh may be taken, and anything be split."""
    every = set(meshes.factorizations(problem.cost_model.devices))
    return set(problem.meshes) >= every and set(problem.dimensions) == set("SOAP")


@dataclass
class DegreeSearch:
    """``number`` of degrees that are possible.

    Raises:
        AutoparError: the model has no repeated block.
    """

    problem: Problem
    budget: Budget
    progress: Progress
    best: Trial | None = None
    trials: list[Trial] = field(default_factory=list)
    number: int = 0
    nearest_miss_bytes: int | None = None
    _open: list[tuple[float, int, Candidate | Unplayed]] = field(default_factory=list)
    _plain: list[Unplayed] = field(default_factory=list)
    _passed: list[tuple[float, int, tuple[Candidate, ...]]] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=counting)
    _beside_bytes: int = 0
    _complete: bool = False

    def __post_init__(self) -> None:
        problem = self.problem
        self.started = monotonic()
        if problem.microbatches is not None:
            division(problem.graph, problem.microbatches, problem.proposals)  # refused by name
        self.prices = DegreePrices(
            problem.graph, problem.cost_model, problem.training, problem.proposals
        )

    def result(self) -> SearchResult:
        return self._result(ended_early(self.run))

    def run(self) -> None:
        """
        Raises:
            LateError: the time is over.
            AutoparError: there are no degrees.
        """
        self._bound_all()
        while self._open and self._open[0][0] < self._enough_s:
            self._in_time()
            one = heapq.heappop(self._open)[-1]
            if isinstance(one, Unplayed):
                self._play(one)
            elif not self._may_fit(one):
                self._recompute_in([one, *self._next_too_large()])
            elif not self._evaluate(one):
                self._with_more_again(one)
        self._try_passed()
        if self.best is None and self.nearest_miss_bytes is None:  # none seemed to fit
            smallest = min((of.smallest for of in self._plain), key=lambda one: one.memory_bytes)
            way = self._ways[-1] if self._ways else smallest.degrees.recompute
            self._evaluate(replace(smallest, degrees=replace(smallest.degrees, recompute=way)))

    @property
    def best_s(self) -> float:
        if self.best is None or self.best.estimate is None:
            return math.inf
        return self.best.estimate.step_time_s

    @property
    def _enough_s(self) -> float:
        return self.best_s * (1 - self.budget.gap)

    # ---- in order ------------------------------------------------------------------------------

    @property
    def _ways(self) -> Sequence[str]:
        """Of recomputation, if what is kept does not fit."""
        return tuple(KINDS)[1:] if self.problem.recompute == AUTO else ()

    def _bound_all(self) -> None:
        problem, prices = self.problem, self.prices
        space = list(
            DegreeSpace(
                problem.cost_model.devices,
                prices.layers,
                prices.batch,
                problem.microbatches,
                "none" if problem.recompute == AUTO else problem.recompute,
            )
        )
        self.progress(f"bounding {len(space):,} degrees of parallelism")
        self._plain, skipped = prices.unplayed(self._while_in_time(space))
        self.number = sum(len(group.degrees) for group in self._plain)
        if not self.number:
            raise AutoparError(self._why_none(skipped))
        self._push(self._plain)
        self._complete = True

    def _play(self, group: Unplayed) -> None:
        """All of it, though some may be too slow: that takes as long as to play one."""
        found = self.prices.played(group)
        self.number -= len(group.degrees) - len(found)
        self._push(found)

    def _why_none(self, skipped: Mapping[str, int]) -> str:
        of = self.problem
        why = max(skipped, key=skipped.__getitem__, default="")
        return (
            f"no degrees of parallelism of {of.cost_model.devices} devices share the "
            f"{self.prices.batch} samples and {self.prices.layers} equal blocks of {of.graph.name} "
            f"evenly"
            f"{f' ({why})' if why else ''}; take other numbers, or another searcher"
        )

    def _may_fit(self, one: Candidate) -> bool:
        return one.memory_bytes <= self._kept_limit_bytes

    @property
    def _kept_limit_bytes(self) -> float:
        return self.problem.memory_limit_bytes * (1 + NEAR)

    def _next_too_large(self) -> Iterator[Candidate]:
        """The next ones that do not fit, some of them: they are priced together."""
        for _ in range(TOGETHER):
            while self._open and isinstance(group := self._open[0][-1], Unplayed):
                if self._open[0][0] >= self._enough_s:
                    return
                heapq.heappop(self._open)
                self._play(group)
            if not self._open or self._open[0][0] >= self._enough_s:
                return
            one = self._open[0][-1]
            if isinstance(one, Unplayed) or self._may_fit(one):
                return
            heapq.heappop(self._open)
            yield one

    def _recompute_in(self, those: Sequence[Candidate]) -> None:
        self.progress(f"recomputing as little as fits in {len(those)} of them")
        plain = [one.degrees for one in those]
        self._push(self.prices.recomputing(plain, self._ways, self._kept_limit_bytes))

    def _push(self, those: Iterable[Candidate | Unplayed]) -> None:
        for one in those:
            bound_s = one.step_time_s if isinstance(one, Candidate) else one.least_s
            heapq.heappush(self._open, (bound_s, next(self._numbers), one))

    def _evaluate(self, one: Candidate) -> bool:
        """Whether it fits, and is a trial now, or cannot be done."""
        name = degrees_text(one.degrees)
        self.progress(name)
        try:
            strategy, estimate = self.prices.evaluated(one.degrees)
        except AutoparError as refusal:
            self.progress(f"left out: {refusal}")
            return True
        peak_bytes = estimate.peak_memory_bytes
        if peak_bytes > self.problem.memory_limit_bytes:
            self._beside_bytes = peak_bytes - one.memory_bytes
            least = self.nearest_miss_bytes
            self.nearest_miss_bytes = peak_bytes if least is None else min(least, peak_bytes)
            return False
        mesh = strategy.stages[0].mesh
        self.trials.append(Trial(name, mesh, strategy, estimate, one.step_time_s, "gap"))
        if estimate.step_time_s < self.best_s:
            self.best = self.trials[-1]
        return True

    def _with_more_again(self, one: Candidate) -> None:
        """What one needs beside what is saved, all of its ways to recompute more are taken to need;
        those in which less would be enough are passed over for now."""
        limit_bytes = self.problem.memory_limit_bytes - self._beside_bytes
        plain = replace(one.degrees, recompute="none", recomputed=1.0)
        way, done = one.degrees.recompute, self._blocks(one.degrees)
        ways = [other for other in self._ways if way in ("none", other)]
        more = self.prices.recomputing([plain], ways, limit_bytes)
        self._push(more)
        enough = {of.recompute: self._blocks(of) for group in more for of in group.degrees}
        copies = self.prices.layers // plain.stages
        for other in ways:
            passed = range(done + 1, enough.get(other, copies + 1))
            self._pass_over(
                replace(plain, recompute=other, recomputed=blocks / copies) for blocks in passed
            )

    def _blocks(self, degrees: Degrees) -> int:
        """Of each stage, how many are recomputed."""
        copies = self.prices.layers // degrees.stages
        return 0 if degrees.recompute == "none" else round(degrees.recomputed * copies)

    def _pass_over(self, those: Iterable[Degrees]) -> None:
        """More and more blocks, recomputed in one way."""
        found = self.prices.bounds(those).candidates
        if found:
            heapq.heappush(self._passed, (found[0].step_time_s, next(self._numbers), found))

    def _try_passed(self) -> None:
        """The most blocks that may be faster than the best: if that does not fit, nor do fewer. As
        long as there is time for proofs."""
        looked = monotonic()
        enough = looked + self.budget.proof_after_s(looked - self.started)
        while self._passed and self._passed[0][0] < self._enough_s and monotonic() < enough:
            self._in_time()
            _, _, those = heapq.heappop(self._passed)
            *fewer, most = (one for one in those if one.step_time_s < self._enough_s)
            if self._evaluate(most) and fewer:
                again = fewer[0].step_time_s, next(self._numbers), tuple(fewer)
                heapq.heappush(self._passed, again)

    def _while_in_time(self, those: Iterable[Degrees]) -> Iterator[Degrees]:
        for one in those:
            self._in_time()
            yield one

    def _in_time(self) -> None:
        if monotonic() > self.started + self.budget.time_s:
            raise LateError

    # ---- what is known -------------------------------------------------------------------------

    def _result(self, reason: str) -> SearchResult:
        left = [one[0] for one in (*self._open[:1], *self._passed[:1])]
        bound_s = min([self.best_s, *left]) if self._complete else 0.0
        if not reason:
            reason = self._reason(bound_s)
        return SearchResult(
            searcher="degrees",
            trials=(*self.trials, *self._bounded()),
            best=self.best,
            lower_bound_s=bound_s,
            stop_reason=reason,
            search_time_s=monotonic() - self.started,
            nearest_miss_bytes=self.nearest_miss_bytes if self.best is None else None,
            among=f"{self.number:,} degrees of parallelism",
        )

    def _reason(self, bound_s: float) -> str:
        if self.best is None:
            return "unknown"  # other plans may fit
        return "optimal" if bound_s >= self._enough_s else "gap"

    def _bounded(self) -> Iterable[Trial]:
        """The fastest of each mesh and number of rows that was not evaluated."""
        fastest: dict[tuple[int, int], tuple[float, Degrees]] = {}
        for bound_s, _, degrees in sorted(self._left()):
            fastest.setdefault((degrees.tensor, degrees.pipeline), (bound_s, degrees))
        for bound_s, degrees in fastest.values():
            axes = (("data", degrees.data), ("tensor", degrees.tensor))
            mesh = Mesh(tuple(axis for axis in axes if axis[1] > 1) or axes[:1])
            yield Trial(degrees_text(degrees), mesh, None, None, bound_s, "bounded")

    def _left(self) -> Iterator[tuple[float, int, Degrees]]:
        """All that were not evaluated, with their bounds; numbered."""
        for _, _, of in self._open:
            if isinstance(of, Candidate):
                yield of.step_time_s, next(self._numbers), of.degrees
                continue
            for bound_s, degrees in zip(of.bounds_s, of.degrees, strict=True):
                yield float(bound_s), next(self._numbers), degrees


__all__ = ["DegreeSearch", "is_open", "search"]
