"""The outer search: stages x devices x microbatches x schedule x chunks x alternatives of units."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import monotonic

import numpy as np

from autopar.ir.schedule import Schedule
from autopar.ir.search import Budget, SearchSummary, TrialSummary
from autopar.ir.sharding import Mesh
from autopar.searchers.stage_depth import Depth, EnoughError
from autopar.searchers.stage_proposals import cuts, spread
from autopar.searchers.stage_shapes import (
    Incumbent,
    LateError,
    LayoutSums,
    Shape,
    World,
    first_in_flight,
    shapes_of,
)
from autopar.searchers.stage_tables import Tables
from autopar.simulator.stage_problem import (
    Layout,
    StageProblem,
    Staging,
    facts_of,
    in_order,
    reading_each_other,
)

Progress = Callable[[str], None]

MOST_PROPOSALS = 40
"""Of equal stages on one layout, those with the best prospects, before anything is proved."""

ALIKE = 3
"""Of these, with the same schedule, layout and numbers of rows and microbatches."""

NEARLY = 1.01
"""Prospects say nothing of transfers: what looks so much slower than the best may be faster."""

MOST_GUESSES = 40_000
"""Of how much longer such stages take because all has to fit."""

MOST_MOVES = 200
"""Of a unit to another stage, or of a stage to another layout, tried on the best staging."""

PER_SHAPE = 8
"""Layouts of a shape that are proposed."""

NODES = 300
"""That are visited in a shape before the others have their turn; each time eight times as many."""

MOST_LEVELS = 64
"""Stages for which tables are made; longer pipelines have one bound together."""

MOST_STAGINGS = 1e6
"""Of a shape without tables that is looked through; in a larger one only proposals are played."""


@dataclass(frozen=True, slots=True)
class StageTrial:
    """All stagings of one shape. ``outcome``: ``optimal`` (its best is known, or none of it is
    better than the best elsewhere), ``bounded`` (its bound says so), ``infeasible``, ``gap`` (not
    all of it was looked at)."""

    microbatches: int
    schedule: str
    chunks: int
    stages: int
    lower_bound_s: float
    time_s: float | None
    outcome: str

    @property
    def name(self) -> str:
        """
        >>> StageTrial(8, "1f1b", 1, 4, 1.0, None, "bounded").name
        '4 stages, 1f1b, 8 microbatches'
        """
        chunks = f" x {self.chunks}" if self.chunks > 1 else ""
        stages = f"{self.stages} stage{'s' * (self.stages > 1)}"
        microbatches = f"{self.microbatches} microbatch{'es' * (self.microbatches > 1)}"
        return f"{stages}, {self.schedule}{chunks}, {microbatches}"


@dataclass(frozen=True)
class StageResult:
    """``best``: ``None`` if nothing was found; ``time_s``: its value. ``lower_bound_s``: no staging
    is better, but for those with a unit done in a way that another beats in every time and memory.
    ``stop_reason`` as in ``ir.search.SearchResult``. ``played``: how many timelines. ``in_line``:
    the graph has too many branches, so that only consecutive units were made stages."""

    best: Staging | None
    time_s: float
    lower_bound_s: float
    stop_reason: str
    search_time_s: float
    trials: tuple[StageTrial, ...]
    played: int
    in_line: bool = False

    @property
    def gap(self) -> float:
        if self.best is None:
            return 1.0
        return max(0.0, 1 - self.lower_bound_s / self.time_s) if self.time_s else 0.0


def search(
    problem: StageProblem,
    budget: Budget,
    progress: Progress = lambda line: None,
    cutoff_s: float = math.inf,
) -> StageResult:
    """The best staging, and how much better any other could be.

    Only what is faster than ``cutoff_s`` is of interest. At Ctrl-C or the end of the time it is the
    best so far.
    """
    return _Search(problem, budget, progress, cutoff_s).result()


MOST_TRIALS = 50
"""That a summary lists: those with the best bounds."""


def summarise(result: StageResult, searcher: str, memory_limit_bytes: int) -> SearchSummary:
    """As a plan file has it."""
    trials = sorted(
        result.trials, key=lambda trial: (trial.time_s or math.inf, trial.lower_bound_s)
    )
    return SearchSummary(
        searcher=searcher,
        stop_reason=result.stop_reason,
        lower_bound_s=result.lower_bound_s,
        gap=result.gap,
        search_time_s=result.search_time_s,
        memory_limit_bytes=memory_limit_bytes,
        dimensions="SOAP",
        trials=tuple(
            TrialSummary(
                name=trial.name,
                mesh=Mesh(()),
                outcome=trial.outcome,
                lower_bound_s=trial.lower_bound_s,
                step_time_s=trial.time_s,
                peak_memory_bytes=None,
                bound_by="",
            )
            for trial in trials[:MOST_TRIALS]
        ),
    )


class _Search:
    def __init__(
        self, problem: StageProblem, budget: Budget, progress: Progress, cutoff_s: float
    ) -> None:
        self._problem, self._budget, self._progress = problem, budget, progress
        self._start_s = monotonic()
        self._incumbent = Incumbent(problem, budget.gap, self._start_s + budget.time_s)
        self._incumbent.best_s = cutoff_s
        self._shapes: list[Shape] = []
        self._tables: dict[tuple[int, bool], Tables] = {}
        self._all_shapes = False

    def result(self) -> StageResult:
        reason = ""
        try:
            self._progress("pricing the units")
            for m in self._problem.microbatches:
                self._incumbent.check_time()
                self._shapes += shapes_of(World(self._problem, m))
            self._all_shapes = True
            self._progress("trying equal stages")
            self._propose()
            proof_s = self._budget.proof_after_s(monotonic() - self._start_s)
            self._progress("moving units between stages")
            self._for_at_most(proof_s / 2, self._improve)
            self._for_at_most(proof_s, self._prove)
        except LateError:
            reason = "time"
        except KeyboardInterrupt:
            reason = "interrupted"
        return self._result(reason)

    def _for_at_most(self, time_s: float, what: Callable[[], None]) -> None:
        """Once there is something to beat; before, for all the time that is left."""
        end_s = self._incumbent.late_s
        if math.isfinite(self._incumbent.best_s):
            self._incumbent.late_s = min(end_s, monotonic() + time_s)
        try:
            what()
        except LateError:
            if monotonic() > end_s:
                raise
        finally:
            self._incumbent.late_s = end_s

    def _result(self, reason: str) -> StageResult:
        best_s = self._incumbent.best_s
        bound_s = min([best_s, *(shape.bound_s for shape in self._shapes)])
        if not self._all_shapes:
            bound_s = 0.0
        if bound_s >= self._incumbent.good_enough_s and math.isfinite(best_s):
            reason = "optimal"
        elif not reason:
            feasible = self._incumbent.best is not None
            reason = "gap" if feasible else "infeasible" if math.isinf(bound_s) else "unknown"
        return StageResult(
            best=self._incumbent.best,
            time_s=best_s,
            lower_bound_s=bound_s,
            stop_reason=reason,
            search_time_s=monotonic() - self._start_s,
            trials=tuple(map(_trial, self._shapes)),
            played=self._incumbent.played,
            in_line=not all(shape.world.all_ideals for shape in self._shapes),
        )

    # Something good

    def _propose(self) -> None:
        """Equal stages on one layout, those first that are likely to be fast.

        First without a thought of memory, which is quick for all; then those that come up with it,
        and those that come up again with whole units.
        """
        line: list[tuple[float, int, int, int]] = []
        for number, shape in enumerate(self._shapes):
            found_s, _ = shape.likely_s()
            for place in np.argsort(found_s)[:PER_SHAPE]:
                if math.isfinite(found_s[place]):
                    line.append((float(found_s[place]), 0, number, int(place)))
            if number % 1024 == 0:
                self._incumbent.check_time()
        heapq.heapify(line)
        guesses, tries = MOST_GUESSES, MOST_PROPOSALS
        tried: Counter[tuple[Schedule, Layout, int, int]] = Counter()
        while line and guesses and tries:
            likely_s, known, number, place = heapq.heappop(line)
            if likely_s >= self._incumbent.best_s * NEARLY:
                return
            shape = self._shapes[number]
            sums = shape.world.layout_sums(shape.split)
            layout = sums.layouts[place]
            family = (shape.schedule, layout, shape.rows, shape.microbatches)
            if tried[family] == ALIKE:
                continue
            if known < len(GUESSES):
                guesses -= 1
                likely_s = GUESSES[known](shape, sums, place, likely_s)
                if math.isfinite(likely_s):
                    heapq.heappush(line, (likely_s, known + 1, number, place))
                continue
            tried[family] += 1
            tries -= 1
            for parts in _even(shape, sums, place):
                self._try(shape, parts, [layout] * shape.stages)

    def _improve(self) -> None:
        """Moves a unit of the best staging to another stage, or gives it another layout, as long as
        that makes it better."""
        tries = MOST_MOVES
        improved = True
        while improved:
            improved = False
            best, shape = self._incumbent.best, self._incumbent.shape
            if best is None or shape is None:
                return
            for parts, layouts in _neighbours(best, shape.world):
                if not tries:
                    return
                tries -= 1
                before_s = self._incumbent.best_s
                self._try(shape, parts, layouts)
                if self._incumbent.best_s < before_s:
                    improved = True
                    break

    def _try(self, shape: Shape, parts: list[tuple[int, ...]], layouts: list[Layout]) -> None:
        self._incumbent.check_time()
        units = shape.world.units
        layout_of = dict(zip(parts, layouts, strict=True))
        try:
            parts = in_order(parts, units)
        except ValueError:
            return
        layouts = [layout_of[part] for part in parts]
        feeds = reading_each_other(parts, units)
        facts = facts_of(shape.schedule, shape.stages, shape.microbatches, shape.chunks, feeds)
        if facts is None:
            return
        # the second time, with room for what is under way between stages
        for margin in (0.0, 0.05):
            played = self._incumbent.played
            stages = shape.world.filling(shape.split).stages(parts, layouts, facts, margin)
            if stages is None:
                return
            staging = Staging(shape.microbatches, shape.schedule, shape.chunks, stages)
            self._incumbent.consider(shape, staging)
            if self._incumbent.played == played or math.isfinite(shape.best_s):
                return

    # What nothing can beat

    def _prove(self) -> None:
        nodes = NODES
        left = list(self._shapes)
        while left:
            left = list(self._round(left, nodes))
            nodes *= 8

    def _round(self, shapes: list[Shape], nodes: int) -> Iterator[Shape]:
        """Gives the shapes that are not finished."""
        shapes = sorted(shapes, key=lambda shape: shape.stages)  # of equal bounds, these first
        line = [(shape.bound_s, number) for number, shape in enumerate(shapes)]
        heapq.heapify(line)
        by_rows: set[int] = set()
        by_ways: set[int] = set()
        bounded: set[int] = set()
        while line:
            bound_s, number = heapq.heappop(line)
            shape = shapes[number]
            if bound_s >= self._incumbent.good_enough_s:
                return
            self._incumbent.check_time()
            if number not in by_rows:
                by_rows.add(number)
                shape.bound_by_rows(self._incumbent.good_enough_s)
                heapq.heappush(line, (shape.bound_s, number))
                continue
            if number not in by_ways:
                by_ways.add(number)
                shape.bound_by_ways(self._incumbent.good_enough_s)
                heapq.heappush(line, (shape.bound_s, number))
                continue
            tables = self._tables_for(shape)
            if tables is not None and number not in bounded:
                bounded.add(number)
                self._progress(
                    f"bounds of {shape.stages} stages, {shape.microbatches} microbatches"
                )
                self._bound(shape, tables)
                heapq.heappush(line, (shape.bound_s, number))
                continue
            if tables is None and _stagings(shape) > MOST_STAGINGS:
                shape.outcome = "gap"
                continue
            self._progress(
                f"{shape.stages} stages, {shape.microbatches} microbatches, {shape.schedule.name}"
            )
            depth = Depth(self._incumbent, shape, tables, nodes)
            shape.outcome = "gap"
            try:
                depth.search()
            except EnoughError:
                yield shape
                continue
            shape.bound_s = max(shape.bound_s, min(depth.pruned_s, shape.best_s))
            shape.outcome = "infeasible" if math.isinf(shape.bound_s) else "optimal"

    def _tables_for(self, shape: Shape) -> Tables | None:
        if not (shape.world.is_chain and shape.one_each and shape.stages <= MOST_LEVELS):
            return None
        key = (shape.microbatches, shape.split)
        if key not in self._tables:
            alike = [
                schedule
                for schedule in {of.schedule: None for of in self._shapes if of.one_each}
                if any(of.split == shape.split and of.schedule == schedule for of in self._shapes)
            ]
            m = shape.microbatches
            self._tables[key] = Tables(
                self._problem,
                shape.world.units,
                m,
                shape.split,
                lambda stages: min(first_in_flight(schedule, stages, m) for schedule in alike),
                self._incumbent.good_enough_s,
                self._incumbent.check_time,
            )
        return self._tables[key]

    def _bound(self, shape: Shape, tables: Tables) -> None:
        """Its own; and that of all longer ones, where it excludes them or no table is made."""
        shape.bound_s = max(shape.bound_s, tables.least_s(shape.stages))
        longer_s = tables.longer_s(shape.stages)
        if longer_s >= self._incumbent.good_enough_s or shape.stages == MOST_LEVELS:
            for other in self._shapes:
                alike = other.world is shape.world and other.split == shape.split
                if alike and other.one_each and other.stages > shape.stages:
                    other.bound_s = max(other.bound_s, longer_s)
        if shape.bound_s < self._incumbent.good_enough_s:
            walk = tables.walk(shape.stages)
            if walk is not None and sum(size for size, _ in walk) == len(shape.world.units):
                ends = np.cumsum([size for size, _ in walk]).tolist()
                parts = [
                    tuple(range(end - size, end)) for end, (size, _) in zip(ends, walk, strict=True)
                ]
                self._try(shape, parts, [layout for _, layout in walk])


def _even(shape: Shape, sums: LayoutSums, place: int) -> list[list[tuple[int, ...]]]:
    """Stages that take about as long, on the layout with this place in the sums."""
    weights = sums.weights[place]
    found = [cuts(weights, shape.stages)]
    even = spread(weights, shape.first_facts().held) if shape.world.is_chain else None
    if even is not None and even != found[0]:
        found.insert(0, even)
    return found


def _with_memory(shape: Shape, sums: LayoutSums, place: int, likely_s: float) -> float:
    """A likely time with what it takes to fit."""
    return likely_s * shape.likely_slowdown(sums.layouts[place])


def _with_units(shape: Shape, sums: LayoutSums, place: int, likely_s: float) -> float:
    """A likely time with stages of whole units."""
    ways = _even(shape, sums, place)
    whole_s = min(shape.likely_of_s(parts, sums, place) for parts in ways)
    return max(likely_s, whole_s)


GUESSES = (_with_memory, _with_units)
"""Of how long equal stages take, each better than the ones before."""


def _neighbours(
    staging: Staging, world: World
) -> Iterator[tuple[list[tuple[int, ...]], list[Layout]]]:
    """With one unit in another stage, which it reads or is read by; with another layout for one."""
    parts = [stage.units for stage in staging.stages]
    layouts = [stage.layout for stage in staging.stages]
    for source, target in reading_each_other(parts, world.units):
        inside, outside = set(parts[source]), set(parts[target])
        leaving = {r for u in parts[target] for r in world.units[u].reads if r in inside}
        coming = {u for u in parts[target] if inside & set(world.units[u].reads)}
        for unit in sorted(leaving | coming):
            first, second = inside ^ {unit}, outside ^ {unit}
            if first and second:
                moved = list(parts)
                moved[source], moved[target] = tuple(sorted(first)), tuple(sorted(second))
                yield moved, layouts
    for s, part in enumerate(parts):
        for layout in world.mixes.layouts(world.mixes.kinds_in(part)):
            if layout != layouts[s]:
                yield parts, [*layouts[:s], layout, *layouts[s + 1 :]]


def _stagings(shape: Shape) -> float:
    """How many there are about, without alternatives of units."""
    ideals = len(shape.world.ideals)
    layouts = len(shape.world.layout_sums(shape.split).layouts) or 1
    return math.comb(max(ideals - 2, 0), min(shape.stages - 1, max(ideals - 2, 0))) * float(
        layouts
    ) ** min(shape.rows, 40)


def _trial(shape: Shape) -> StageTrial:
    return StageTrial(
        shape.microbatches,
        shape.schedule.name,
        shape.chunks,
        shape.stages,
        shape.bound_s,
        None if math.isinf(shape.best_s) else shape.best_s,
        shape.outcome,
    )
