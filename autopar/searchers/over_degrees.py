"""All degrees of parallelism that a recipe may have, priced together: what they share is priced
once.

A candidate is ``Degrees``. What its stages cost is said by a few small ones (``degree_stages``);
the rows of its schedule are played for all candidates at once (``degree_rows``), with what they
send one another (``degree_links``).

Left out is that transfers wait for one another on a link, what all stages read of the first one,
and of memory what an operator needs beside what is saved: both only make a step longer or larger.
So the numbers are **bounds**, equal to the full evaluation where no transfer waits; candidates are
evaluated in full in their order, until the bound of the next is no better than the best that fits.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from autopar.errors import AutoparError
from autopar.ir.graph import OperatorGraph
from autopar.ir.simulation import Estimate
from autopar.ir.strategy import Strategy, Training
from autopar.ops import Proposals
from autopar.recipes import Degrees, by_degrees, recomputed_copies
from autopar.schedules import SCHEDULES
from autopar.searchers.degree_links import Links
from autopar.searchers.degree_rows import (
    ALWAYS,
    BACKWARD,
    COPY,
    FIRST,
    FORWARD,
    GRADIENTS,
    INPUTS,
    LAUNCHES,
    MIDDLE,
    REDUCTION,
    SAVED,
    SUM,
    UPDATE,
    WEIGHTS,
    WHOLE,
    Numbers,
    has_parts,
    kinds_of,
    most_kept,
    placed,
    played,
    played_count,
    rows_of,
    stages_of_rows,
)
from autopar.searchers.degree_stages import SmallStages, Stages
from autopar.simulator.folding import KEPT, fold
from autopar.simulator.listing import Structure
from autopar.simulator.microbatches import Division, batch_size, division
from autopar.simulator.pipelines import evaluate_stages, summed_bytes
from autopar.simulator.prices import evaluate
from autopar.simulator.sharing import alone
from cost_models.interface import CostModel


@dataclass(frozen=True)
class Candidate:
    """``step_time_s`` and ``memory_bytes`` are bounds from below."""

    degrees: Degrees
    step_time_s: float
    stages: Stages = field(repr=False, compare=False)

    @cached_property
    def memory_bytes(self) -> int:
        """Known when it is asked for: most candidates are too slow for it to matter."""
        one = _Alike.of_one(self.degrees, self.stages)
        return int(one.memory_bytes[0])


@dataclass(frozen=True)
class Bounds:
    """``candidates``: the fastest first. ``skipped``: how many are none, by reason."""

    candidates: tuple[Candidate, ...]
    skipped: dict[str, int]


@dataclass(frozen=True)
class Unplayed:
    """Candidates with the same rows, which are not played yet: ``bounds_s`` are theirs."""

    alike: _Alike
    bounds_s: Numbers

    @property
    def least_s(self) -> float:
        return float(self.bounds_s.min())

    @property
    def degrees(self) -> list[Degrees]:
        return [degrees for degrees, _ in self.alike.members]

    @property
    def smallest(self) -> Candidate:
        """That which keeps the least."""
        place = int(self.alike.memory_bytes.argmin())
        degrees, stages = self.alike.members[place]
        return Candidate(degrees, float(self.bounds_s[place]), stages)


@dataclass
class DegreePrices:
    """Of one graph (a global batch) on one machine; remembered by what they depend on.

    Raises:
        AutoparError: the graph has no repeated block.
    """

    graph: OperatorGraph
    cost_model: CostModel
    training: Training
    proposals: Proposals = ()

    def __post_init__(self) -> None:
        # a cache of its own: one of the class would keep this search. Of few numbers of
        # microbatches, which is how many the fastest degrees have
        object.__setattr__(self, "_whole", lru_cache(maxsize=4)(self._whole))
        blocks = self._whole(1)[1].blocks
        most = max(blocks, key=lambda block: block.period * block.copies, default=None)
        self.layers = 0 if most is None else most.copies
        if most is None or self.layers < KEPT:
            raise AutoparError(
                f"{self.graph.name} has no block that is repeated at least {KEPT} times, of which "
                "stages could have equal numbers; give degrees one by one, with --recipe"
            )
        folded = fold(self.graph, (most,)).graph
        self.batch = batch_size(folded, self.proposals)
        machine = alone(self.cost_model)
        self.small = SmallStages(
            folded,
            tuple(most.start + copy * most.period for copy in range(KEPT)),
            self.layers,
            self.batch,
            self.cost_model,
            machine,
            self.training,
            self.proposals,
        )
        self.links = Links(machine)

    # ---- one in full ---------------------------------------------------------------------------

    def evaluated(self, degrees: Degrees) -> tuple[Strategy, Estimate]:
        """As any plan by this recipe is."""
        divided, structure = self._whole(degrees.microbatches(self.batch))
        strategy = by_degrees(divided, degrees, self.cost_model, self.training, structure)
        if len(strategy.stages) > 1:
            return strategy, evaluate_stages(divided, self.cost_model, strategy)
        ends = tuple(
            frozenset({len(recomputed_copies(block.copies, degrees))} - {0, block.copies})
            for block in structure.blocks
        )
        of = divided.graph, divided.rules, self.cost_model, strategy
        return strategy, evaluate(*of, folded=structure.folded_in_runs(ends))

    def _whole(self, count: int) -> tuple[Division, Structure]:
        divided = division(self.graph, count, self.proposals)
        return divided, Structure(divided.graph, divided.rules)

    # ---- all together --------------------------------------------------------------------------

    def bounds(self, candidates: Iterable[Degrees]) -> Bounds:
        """Of each of them."""
        skipped: Counter[str] = Counter()
        found = [
            candidate
            for alike in self._alike(candidates, skipped)
            for candidate in self._candidates(alike)
        ]
        return _sorted(found, skipped)

    def unplayed(self, candidates: Iterable[Degrees]) -> tuple[list[Unplayed], dict[str, int]]:
        """They without their rows, and how many are none, by reason."""
        skipped: Counter[str] = Counter()
        found = [self._unplayed(alike) for alike in self._grouped(candidates, skipped)]
        return found, dict(skipped)

    def _unplayed(self, alike: _Alike) -> Unplayed:
        return Unplayed(alike, self._step_s(alike) if alike.is_alone else alike.least_s)

    def played(self, of: Unplayed) -> tuple[Candidate, ...]:
        """None, if there are no such rows."""
        try:
            of.alike.check()
        except AutoparError:
            return ()
        return tuple(self._candidates(of.alike))

    def recomputing(
        self, plain: Iterable[Degrees], ways: Sequence[str], limit_bytes: float
    ) -> list[Unplayed]:
        """Of each of these, which recompute nothing, in each way of recomputation with as few
        blocks recomputed, one of each stage at least, as make what is kept fit."""
        return [
            self._unplayed(found)
            for alike in self._grouped(plain, Counter())
            for way in ways
            if (found := self._least_again(alike, way, limit_bytes)).members
        ]

    def _alike(self, candidates: Iterable[Degrees], skipped: Counter[str]) -> Iterator[_Alike]:
        """Those that are played together."""
        for alike in self._grouped(candidates, skipped):
            try:
                alike.check()
            except AutoparError as error:
                skipped[str(error)] += len(alike.members)
                continue
            yield alike

    def _grouped(self, candidates: Iterable[Degrees], skipped: Counter[str]) -> Iterator[_Alike]:
        """They, if there are such rows."""
        grouped: defaultdict[tuple[str, int, int, int], list[tuple[Degrees, Stages]]]
        grouped = defaultdict(list)
        for one in candidates:
            try:
                stages = self.small.of(one)
            except AutoparError as error:
                skipped[str(error)] += 1
                continue
            count = played_count(stages.count, one.pipeline)
            grouped[one.schedule_name, one.pipeline, one.row_chunks, count].append((one, stages))
        for (schedule, rows, chunks, _), members in grouped.items():
            yield _Alike(schedule, rows, chunks, tuple(members))

    def _candidates(self, alike: _Alike) -> Iterator[Candidate]:
        if alike.members:
            for member, time_s in zip(alike.members, self._step_s(alike), strict=True):
                degrees, stages = member
                yield Candidate(degrees, float(time_s), stages)

    def _least_again(self, alike: _Alike, way: str, limit_bytes: float) -> _Alike:
        """Those that fit with so many blocks recomputed, as few as can be: what is kept falls with
        every block."""
        again, possible = [], []
        for degrees, _ in alike.members:
            try:
                again.append(self.small.of(replace(degrees, recompute=way)))
                possible.append(True)
            except AutoparError:
                possible.append(False)
        alike = alike.only(np.array(possible, dtype=bool))
        least = np.ones(len(again), dtype=int)
        most = np.array([stages.copies for stages in again], dtype=int)
        fits = alike.again(way, again, most).memory_bytes <= limit_bytes
        alike, again = alike.only(fits), [s for s, fit in zip(again, fits, strict=True) if fit]
        least, most = least[fits], most[fits]
        while (least < most).any():
            middle = (least + most) // 2
            enough = alike.again(way, again, middle).memory_bytes <= limit_bytes
            least, most = np.where(enough, least, middle + 1), np.where(enough, middle, most)
        return alike.again(way, again, most)

    # ---- rows ----------------------------------------------------------------------------------

    def _step_s(self, alike: _Alike) -> Numbers:
        devices_s = self._alone_s(alike) if alike.is_alone else self._rows_s(alike)
        found: Numbers = np.maximum(devices_s, alike.launches_s)
        return found

    @staticmethod
    def _alone_s(alike: _Alike) -> Numbers:
        one, count = alike.of[WHOLE], alike.counts
        time_s = count * (one[:, FORWARD] + one[:, BACKWARD]) + (count - 1) * one[:, SUM]
        found: Numbers = time_s + one[:, REDUCTION] + one[:, UPDATE]
        return found

    def _rows_s(self, alike: _Alike) -> Numbers:
        of, count = alike.of, alike.counts
        links = np.array([self._sends_s(*member) for member in alike.members])
        passes = played(alike.schedule, alike.rows, alike.chunks, count, of, links)
        reduced = (self._summed_by_copies if alike.has_copies else self._summed)(alike, passes)
        of_all = tuple(summed_bytes(self.graph, self.training).items())
        sums = np.array([self.links.world_s(one.devices, of_all) for one, _ in alike.members])
        step_s: Numbers = np.max(reduced, axis=0) + sums + alike.totals(UPDATE).max(axis=0)
        return step_s

    def _summed(self, alike: _Alike, passes: Sequence[Sequence[Numbers]]) -> list[Numbers]:
        """When each row has its gradients."""
        reduced = [
            np.max(ends, axis=0) + reduction_s
            for ends, reduction_s in zip(passes, alike.totals(REDUCTION), strict=True)
        ]
        exchanged = np.array([self._exchange_s(*member) for member in alike.members])
        tied = exchanged > 0
        both = np.maximum(reduced[0], reduced[-1]) + exchanged
        reduced[0] = np.where(tied, both, reduced[0])
        reduced[-1] = np.where(tied, both, reduced[-1])
        return reduced

    def _summed_by_copies(
        self, alike: _Alike, passes: Sequence[Sequence[Numbers]]
    ) -> list[Numbers]:
        """When each two rows with the same stages have their gradients: those of the stage that is
        done first are exchanged while the other one works; then both are reduced, and the rest is
        exchanged."""
        rows, found, reduction_s = alike.rows, [], alike.totals(REDUCTION)
        exchanged = np.array([self._copies_s(*member) for member in alike.members])
        for down in range(rows // 2):
            stages = down, rows - 1 - down
            ends = np.maximum(passes[stages[0]], passes[stages[1]])  # of each of the two stages
            first = (np.arange(len(alike.members)), np.argmin(ends, axis=0))
            each_s = exchanged[:, stages]
            ready = np.maximum(ends.min(axis=0) + each_s[first], ends.max(axis=0))
            rest_s = each_s.sum(axis=1) - each_s[first]
            tied_s = exchanged[:, rows] if down == 0 else 0.0
            found.append(ready + reduction_s[down] + rest_s + tied_s)
        return found

    def _sends_s(self, degrees: Degrees, stages: Stages) -> Numbers:
        size = degrees.stage_devices
        return self.links.sends_s(degrees.pipeline, size, stages.operators.sent_bytes)

    def _exchange_s(self, degrees: Degrees, stages: Stages) -> float:
        """Of parameters that the first and the last stage share."""
        size = degrees.stage_devices
        return self.links.shared_s(degrees.pipeline, size, stages.parameters.shared_bytes)

    def _copies_s(self, degrees: Degrees, stages: Stages) -> Numbers:
        """Of the exchange of each stage's gradients between its two copies; and last, of those of
        parameters that the first and the last stage share."""
        of, size = stages.parameters, degrees.stage_devices
        once, more_s = self.links.copies_s(
            degrees.pipeline, size, of.exchanged_bytes, of.shared_bytes
        )
        found: Numbers = once + (stages.copies - 1) * more_s
        return found

    __hash__ = object.__hash__


@dataclass(frozen=True)
class _Alike:
    """Candidates with the same rows, of which as many microbatches are played."""

    schedule: str
    rows: int
    chunks: int
    members: tuple[tuple[Degrees, Stages], ...]

    @staticmethod
    def of_one(degrees: Degrees, stages: Stages) -> _Alike:
        rows = degrees.schedule_name, degrees.pipeline, degrees.row_chunks
        return _Alike(*rows, ((degrees, stages),))

    @property
    def is_alone(self) -> bool:
        """There is one stage."""
        return self.rows * self.chunks == 1

    @property
    def has_copies(self) -> bool:
        """Of stages, in other rows."""
        return SCHEDULES[self.schedule].copies

    def check(self) -> None:
        """
        Raises:
            AutoparError: there are no such rows, or their stages are not priced together.
        """
        if not self.is_alone:
            played = played_count(int(self.counts[0]), self.rows)
            rows_of(self.schedule, self.rows, self.chunks, played)
            if self.has_copies and self.chunks != 2:
                raise AutoparError(
                    f"{self.schedule} with {self.chunks} copies of each stage is not priced "
                    "together with other degrees; take 2 copies, or plan it with --recipe"
                )

    def only(self, kept: NDArray[np.bool_]) -> _Alike:
        chosen = [member for member, keep in zip(self.members, kept, strict=True) if keep]
        return replace(self, members=tuple(chosen))

    def again(self, way: str, others: Sequence[Stages], blocks: NDArray[np.int64]) -> _Alike:
        """With so many blocks of each stage recomputed this way, in which ``others`` all are."""
        members = []
        for (degrees, stages), other, number in zip(self.members, others, blocks, strict=True):
            of = replace(degrees, recompute=way, recomputed=int(number) / stages.copies)
            members.append((of, stages.mixed(other, int(number))))
        return replace(self, members=tuple(members))

    @cached_property
    def kinds(self) -> list[int]:
        """Of each stage."""
        return [WHOLE] if self.is_alone else kinds_of(self.schedule, self.rows, self.chunks)

    @cached_property
    def of(self) -> dict[int, Numbers]:
        """A row for each member, by kind of stage."""
        return self._by_kind([stages.numbers for _, stages in self.members])

    def _by_kind(self, of_one_copy: Sequence[Numbers]) -> dict[int, Numbers]:
        numbers = np.array(of_one_copy)
        more = np.array([stages.copies - 1 for _, stages in self.members])[:, None]
        return {kind: numbers[:, kind] + more * numbers[:, COPY] for kind in set(self.kinds)}

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        return np.array([stages.count for _, stages in self.members])

    def totals(self, what: int) -> Numbers:
        """Of the stages of each row."""
        return self._of_rows({kind: numbers[:, what] for kind, numbers in self.of.items()})

    def _of_rows(self, of: Mapping[int, Numbers]) -> Numbers:
        number = stages_of_rows(self.schedule, self.rows, self.chunks)
        found = np.zeros((self.rows, len(self.members)))
        for kind, numbers in of.items():
            found += np.outer(number[:, kind], numbers)
        return found

    @property
    def launches_s(self) -> Numbers:
        """What the busiest host takes in a step, if hosts go ahead of their devices."""
        kinds = {kind: numbers[:, LAUNCHES] for kind, numbers in self.of.items()}
        if self.is_alone:
            return self.counts * kinds[WHOLE]
        copies = self.chunks if self.has_copies else 1
        found: Numbers = self.counts / copies * self._of_rows(kinds).max(axis=0)
        return found

    @property
    def least_s(self) -> Numbers:
        """What a row does, and how long its first microbatch takes to come to it and its last one
        to go back from it, as if it waited for nothing else (0.0 where stages have copies); or what
        its host does."""
        busy_s = np.zeros(len(self.members)) if self.has_copies else self._busy_s
        found: Numbers = np.maximum(busy_s, self.launches_s)
        return found

    @property
    def _busy_s(self) -> Numbers:
        of, counts = self.of, self.counts
        parted = has_parts(self.schedule, self.rows, self.chunks)
        back = {kind: numbers[:, BACKWARD] for kind, numbers in of.items()}
        if parted:
            back = {kind: n[:, INPUTS] + n[:, WEIGHTS] for kind, n in of.items()}
        there = {kind: numbers[:, FORWARD] for kind, numbers in of.items()}
        work = {k: counts * (there[k] + back[k]) + (counts - 1) * of[k][:, SUM] for k in of}
        first = np.array([stages[0] for stages in placed(self.schedule, self.rows, self.chunks)])
        busy_s = self._way_there(there, first) + self._of_rows(work)
        reduction_s = self.totals(REDUCTION)
        ends_s = busy_s + reduction_s
        if not parted:  # what a row does last is to go back through its first stage
            back_s = self._way_there(back, first) + reduction_s[first.argmin()]
            ends_s = np.maximum(ends_s, busy_s + back_s)
        found: Numbers = ends_s.max(axis=0) + self.totals(UPDATE).max(axis=0)
        return found

    @staticmethod
    def _way_there(of: Mapping[int, Numbers], first: NDArray[np.int64]) -> Numbers:
        """Through all stages before each row's first."""
        middle: Numbers = np.zeros(1) if MIDDLE not in of else of[MIDDLE]
        several = np.outer(np.maximum(first - 1, 0), middle)
        found: Numbers = np.outer(first > 0, of[FIRST]) + several
        return found

    @property
    def memory_bytes(self) -> Numbers:
        """Of the row that keeps most."""
        if not self.members:
            return np.zeros(0)
        kept = self._by_kind([stages.kept for _, stages in self.members])
        if self.is_alone:
            one, saved = self.of[WHOLE], kept[WHOLE][:, SAVED]
            beside = np.maximum(one[:, GRADIENTS], saved)  # one takes the other's place
            several = one[:, GRADIENTS] + saved
            found: Numbers = one[:, ALWAYS] + np.where(self.counts > 1, several, beside)
            return found
        gradients = {kind: numbers[:, GRADIENTS] for kind, numbers in self.of.items()}
        rows = self.schedule, self.rows, self.chunks
        of_rows = self.totals(ALWAYS) + most_kept(*rows, self.counts, gradients, kept)
        most: Numbers = of_rows.max(axis=0)
        return most


def _sorted(found: list[Candidate], skipped: Mapping[str, int]) -> Bounds:
    return Bounds(tuple(sorted(found, key=lambda one: one.step_time_s)), dict(skipped))


__all__ = ["Bounds", "Candidate", "DegreePrices", "Unplayed"]
