"""All degrees of parallelism that a recipe may have, priced together: what they share is priced
once.

A candidate is ``Degrees``. Each of its stages has so many copies of the repeated block, one has
what is before them and one what is after; so a few small stages, of one to three copies, say what
all stages of all candidates cost:

    stage of L copies = stage of 1 + (L - 1) x (first of 2 - first of 1)

What operators and their collectives cost depends on tensor, context, microbatch, ``between`` and
``recompute``; what parameters cost beside on data, replicas and ZeRO. The two are priced apart, the
one on few replicas, the other with the smallest microbatch, and added. The rows of a schedule are
played for all candidates at once, for no more microbatches than it takes until each further one
takes as long as the one before.

Left out is that transfers wait for one another on a link, what all stages read of the first one,
and of memory what an operator needs beside what is saved: both only make a step longer or larger.
So the numbers are **bounds**, equal to the full evaluation where no transfer waits; candidates are
evaluated in full in their order, until the bound of the next is no better than the best that fits.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import (
    Callable,
    Collection,
    Container,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import prod
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from autopar.errors import AutoparError
from autopar.ir.graph import ITEM_BYTES, OperatorGraph
from autopar.ir.schedule import KINDS, Action, Rows
from autopar.ir.sharding import Mesh, local_shape
from autopar.ir.simulation import HOLDERS, WORLD, Estimate
from autopar.ir.strategy import Strategy, Training
from autopar.ops import Proposals
from autopar.recipes import Degrees, hybrid, recomputed_copies
from autopar.schedules import SCHEDULES
from autopar.simulator.arrangement import Arrangement, arrange
from autopar.simulator.costs import ComputeCache, Costs
from autopar.simulator.edges import parameter_edges
from autopar.simulator.folding import KEPT, fold
from autopar.simulator.listing import Structure
from autopar.simulator.machine_links import MachineLinks
from autopar.simulator.memory import local_bytes, optimizer_bytes_per_element, saved_bytes
from autopar.simulator.microbatches import Division, batch_size, division
from autopar.simulator.pipeline import Wiring
from autopar.simulator.pipelines import (
    evaluate_stages,
    group_sum,
    summed_bytes,
)
from autopar.simulator.prices import (
    StageParts,
    again_parts,
    evaluate,
    later_parts,
    operator_parts,
    parameter_parts,
    sum_time_s,
    twice_parts,
)
from autopar.simulator.recomputation import Recomputation, recomputation
from autopar.simulator.sharing import alone
from autopar.simulator.stage_memory import stage_bytes
from autopar.simulator.staged import block_starts, runs, staged
from autopar.simulator.stages import Pipelined, StagePart, pipelined
from cost_models.interface import Collective, CostModel

T = TypeVar("T")

Numbers = NDArray[np.float64]

(
    FORWARD,
    BACKWARD,
    INPUTS,
    WEIGHTS,
    SUM,
    REDUCTION,
    UPDATE,
    ALWAYS,
    GRADIENTS,
    SAVED,
    LEFT,
) = range(11)
"""What is known of a stage: seconds of one microbatch forward and backward, of the two parts of a
backward that has two, of adding its gradients to those of others, and once a step; bytes held
always, of gradients, saved by a microbatch, and left of it between the two parts."""

HELD = [SUM, ALWAYS, GRADIENTS]
"""Of parameters alone."""

FIRST, MIDDLE, LAST, WHOLE, COPY = range(5)
"""Kinds of stages; ``COPY`` is what one more copy of the block adds."""

STEADY = 3
"""After so many microbatches for each row, every further one takes as long as the one before."""


@dataclass(frozen=True)
class Candidate:
    """``step_time_s`` and ``memory_bytes`` are bounds from below."""

    degrees: Degrees
    step_time_s: float
    memory_bytes: int


@dataclass(frozen=True)
class Bounds:
    """``candidates``: the fastest first. ``skipped``: how many are none, by reason."""

    candidates: tuple[Candidate, ...]
    skipped: dict[str, int]


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
    _cache: ComputeCache = field(default_factory=dict)
    _divisions: dict[int, Division] = field(default_factory=dict)
    _structures: dict[int, Structure] = field(default_factory=dict)
    _cuts: dict[Any, _Cut | AutoparError] = field(default_factory=dict)
    _numbers: dict[Hashable, int] = field(default_factory=dict)
    _operators: dict[Any, _Small | AutoparError] = field(default_factory=dict)
    _parameters: dict[Any, _Small | AutoparError] = field(default_factory=dict)
    _again: dict[Any, Recomputation | AutoparError] = field(default_factory=dict)
    _beside: dict[Any, Numbers | AutoparError] = field(default_factory=dict)
    _sums: dict[tuple[int, int, bool, bool], Numbers] = field(default_factory=dict)
    _saved: dict[Hashable, dict[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        blocks = self._whole(1)[1].blocks
        most = max(blocks, key=lambda block: block.period * block.copies, default=None)
        self.layers = 0 if most is None else most.copies
        if most is None or self.layers < KEPT:
            raise AutoparError(
                f"{self.graph.name} has no block that is repeated at least {KEPT} times, of which "
                "stages could have equal numbers; give degrees one by one, with --recipe"
            )
        self.folded = fold(self.graph, (most,)).graph
        self.batch = batch_size(self.folded, self.proposals)
        self.machine = alone(self.cost_model)

    # ---- one in full ---------------------------------------------------------------------------

    def evaluated(self, degrees: Degrees) -> tuple[Strategy, Estimate]:
        """As any plan by this recipe is."""
        divided, structure = self._whole(degrees.microbatches(self.batch))
        strategy = hybrid(divided, degrees, self.cost_model, self.training, structure)
        if len(strategy.stages) > 1:
            return strategy, evaluate_stages(divided, self.cost_model, strategy)
        ends = tuple(
            frozenset({len(recomputed_copies(block.copies, degrees))} - {0, block.copies})
            for block in structure.blocks
        )
        of = divided.graph, divided.rules, self.cost_model, strategy
        return strategy, evaluate(*of, folded=structure.folded_in_runs(ends))

    @lru_cache(maxsize=4)  # noqa: B019 - the fastest degrees have few numbers of microbatches
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

    def recomputing(
        self, plain: Iterable[Degrees], ways: Sequence[str], limit_bytes: float
    ) -> tuple[Candidate, ...]:
        """Of each of these, which recompute nothing, in each way of recomputation with as few
        blocks recomputed, one of each stage at least, as make what is kept fit."""
        return tuple(
            candidate
            for alike in self._alike(plain, Counter())
            for way in ways
            for candidate in self._candidates(self._least_again(alike, way, limit_bytes))
        )

    def _alike(self, candidates: Iterable[Degrees], skipped: Counter[str]) -> Iterator[_Alike]:
        """Those that are played together."""
        grouped: defaultdict[tuple[str, int, int, int], list[tuple[Degrees, _Stages]]]
        grouped = defaultdict(list)
        for one in candidates:
            try:
                stages = self._stages(one)
            except AutoparError as error:
                skipped[str(error)] += 1
                continue
            played = _played_count(stages.count, one.pipeline)
            grouped[one.schedule_name, one.pipeline, one.row_chunks, played].append((one, stages))
        for (schedule, rows, chunks, _), members in grouped.items():
            alike = _Alike(schedule, rows, chunks, tuple(members))
            try:
                alike.check()
            except AutoparError as error:
                skipped[str(error)] += len(members)
                continue
            yield alike

    def _candidates(self, alike: _Alike) -> Iterator[Candidate]:
        if alike.members:
            times, sizes = self._step_s(alike), self._memory_bytes(alike)
            for (degrees, _), time_s, size in zip(alike.members, times, sizes, strict=True):
                yield Candidate(degrees, float(time_s), int(size))

    def _least_again(self, alike: _Alike, way: str, limit_bytes: float) -> _Alike:
        """Those that fit with so many blocks recomputed, as few as can be: what is kept falls with
        every block."""
        again, possible = [], []
        for degrees, _ in alike.members:
            try:
                again.append(self._stages(replace(degrees, recompute=way)))
                possible.append(True)
            except AutoparError:
                possible.append(False)
        alike = alike.only(np.array(possible, dtype=bool))
        least = np.ones(len(again), dtype=int)
        most = np.array([stages.copies for stages in again], dtype=int)
        all_of_it = self._memory_bytes(alike.again(way, again, most))
        fits = all_of_it <= limit_bytes
        alike, again = alike.only(fits), [s for s, fit in zip(again, fits, strict=True) if fit]
        least, most = least[fits], most[fits]
        while (least < most).any():
            middle = (least + most) // 2
            enough = self._memory_bytes(alike.again(way, again, middle)) <= limit_bytes
            least, most = np.where(enough, least, middle + 1), np.where(enough, middle, most)
        return alike.again(way, again, most)

    def _stages(self, of: Degrees) -> _Stages:
        """Of one candidate.

        Raises:
            AutoparError: it cannot be, or not together with others.
        """
        if of.experts > 1:
            raise AutoparError(
                "experts are not priced together with other degrees; plan them one by one, with "
                "--recipe"
            )
        if of.microbatch is None:
            parts = of.microbatches(self.batch) * of.data * of.replicas
            of = replace(of, microbatch=self.batch // parts)
        if self.layers % of.stages:
            raise AutoparError(f"{of.stages} stages do not have equal numbers of the blocks")
        copies = self.layers // of.stages
        blocks = round(of.recomputed * copies)
        if of.recompute != "none" and blocks < copies:
            whole, none = replace(of, recomputed=1.0), replace(of, recompute="none", recomputed=1.0)
            return self._stages(none).mixed(self._stages(whole), blocks)
        count = of.microbatches(self.batch)
        operators = self._of_operators(of)
        again = of.recompute if of.zero == 3 else "none"
        kept = self._of_parameters(of, again)
        if of.stages > 1:
            _check_between(operators, kept)
        numbers = self._sum(of, operators, kept, again)
        return _Stages(numbers, copies, count, operators, kept)

    def _sum(self, of: Degrees, operators: _Small, kept: _Small, again: str) -> Numbers:
        is_whole, is_parted = of.stages == 1, _is_parted(of)
        key = id(operators), id(kept), is_whole, is_parted
        found = self._sums.get(key)
        if found is None:
            alone = self._of_parameters(_few_replicas(of), again)
            of_operators, of_kept, of_alone = (
                small.with_whole if is_whole else small.numbers
                for small in (operators, kept, alone)
            )
            found = of_operators + of_kept - of_alone
            found[:, HELD] = of_kept[:, HELD]
            if is_parted:
                found[:, LEFT] = operators.left_bytes
            self._sums[key] = found
        return found

    def _of_operators(self, of: Degrees) -> _Small:
        """Of few replicas that keep everything whole."""
        few = _few(of.data * of.replicas)
        key = of.tensor, of.context, few, of.microbatch, of.between, of.recompute
        return _remembered(
            self._operators,
            key,
            lambda: self._small(_few_replicas(of), self._numbers_of_operators),
        )

    def _of_parameters(self, of: Degrees, again: str) -> _Small:
        """Of the smallest microbatch; ``again``: what is recomputed, where parameters are gathered
        again for it."""
        axes = of.tensor, of.context, of.data, of.replicas
        key = *axes, of.zero, of.between, again
        return _remembered(
            self._parameters,
            key,
            lambda: self._small(
                replace(of, microbatch=1, recompute=again), self._numbers_of_parameters
            ),
        )

    def _small(self, of: Degrees, numbers: Callable[[_Kept, int], Numbers]) -> _Small:
        """Three copies of the block in three stages; and what one copy more adds, which of
        parameters is what the one in the middle has."""
        one = replace(of, pipeline=1, chunks=1, schedule=None)
        axes = one.tensor, one.context, one.data, one.replicas, one.between
        key = one.microbatches(self.batch), *axes
        cut = _remembered(self._cuts, key, lambda: self._cut(one))
        known = cut.division, one, self.cost_model, self.training, cut.structure
        kept = _Kept(cut, one, hybrid(*known, cut.whole.splits))
        found = [numbers(kept, kind) for kind in (FIRST, MIDDLE, LAST)]
        if numbers == self._numbers_of_parameters:
            copy = found[MIDDLE]
        else:
            copy = numbers(kept, COPY) - found[FIRST]
        unknown = np.full(len(copy), np.nan)
        small = np.array([*found, unknown, copy])
        return _Small(
            small,
            kept.plan,
            lambda: numbers(kept, WHOLE),
            lambda: [self._left_bytes(kept, kind) for kind in (FIRST, MIDDLE, LAST, COPY)],
        )

    def _cut(self, of: Degrees) -> _Cut:
        """By its axes, and what is between them."""
        division = self._divided(of.microbatches(self.batch))
        structure = self._structures[division.count]
        plain = replace(of, zero=0, recompute="none")
        whole = hybrid(division, plain, self.cost_model, self.training, structure)
        costs = Costs(self.machine, whole.mesh, self._cache, tuple(range(whole.mesh.size)))
        cut = _Cut(division, structure, whole, costs)
        cut.number = self._numbers.setdefault(cut.content, len(self._numbers))
        return cut

    def _numbers_of_operators(self, kept: _Kept, kind: int) -> Numbers:
        """What parameters cost beside is that of any microbatch."""
        cut, part = kept.cut, kept.part(kind)
        again = self._recomputation(kept, kind)
        key = cut.number, cut.mesh, kind, part.strategy.recompute
        beside = _remembered(self._beside, key, lambda: _of_parameters(part, again, cut.costs))
        found: Numbers = cut.operators_s(kind) + _seconds(again_parts(part, again, cut.costs))
        found += beside
        found[SAVED] = self._saved_bytes(kept, kind)
        return found

    def _numbers_of_parameters(self, kept: _Kept, kind: int) -> Numbers:
        cut, part = kept.cut, kept.part(kind)
        again = self._recomputation(kept, kind)
        found: Numbers = cut.operators_s(kind) + _seconds(again_parts(part, again, cut.costs))
        return found + _of_parameters(part, again, cut.costs)

    def _recomputation(self, kept: _Kept, kind: int) -> Recomputation:
        """The same whatever the sizes are."""
        part = kept.part(kind)
        placed = tuple(part.kept(parameter.name).parameter for parameter in part.graph.parameters)
        key = kept.cut.number, kind, part.strategy.recompute, placed
        return _remembered(
            self._again,
            key,
            lambda: recomputation(part.graph, part.division.rules, part.strategy),
        )

    def _saved_bytes(self, kept: _Kept, kind: int) -> int:
        part = kept.part(kind)
        of = part.graph, part.division.rules, part.strategy
        return self._of_samples(
            kept, (kind, SAVED), lambda: saved_bytes(*of, given=part.given, ends=part.ends)
        )

    def _left_bytes(self, kept: _Kept, kind: int) -> int:
        part = kept.part(kind)
        return self._of_samples(
            kept, (kind, LEFT), lambda: sum(stage_bytes(part, parted=True).for_weights)
        )

    def _of_samples(self, kept: _Kept, what: tuple[int, int], count: Callable[[], int]) -> int:
        """Bytes. The samples of a microbatch lie in one dim of a tensor, or not in it: of two
        numbers of them follows any other."""
        recompute = kept.part(what[0]).strategy.recompute
        key = kept.cut.number, kept.cut.mesh, what, recompute
        known, samples = self._saved.setdefault(key, {}), kept.samples
        if len(known) < 2 and samples not in known:
            known[samples] = count()
        return known[samples] if samples in known else _on_line(known, samples)

    def _divided(self, count: int) -> Division:
        if count not in self._divisions:
            made = self._divisions[count] = division(self.folded, count, self.proposals)
            self._structures[count] = Structure(made.graph, made.rules)
        return self._divisions[count]

    # ---- rows ----------------------------------------------------------------------------------

    def _step_s(self, alike: _Alike) -> Numbers:
        of, count = alike.of, alike.counts
        if alike.is_alone:
            one = of[WHOLE]
            time_s = count * (one[:, FORWARD] + one[:, BACKWARD]) + (count - 1) * one[:, SUM]
            found: Numbers = time_s + one[:, REDUCTION] + one[:, UPDATE]
            return found
        links = np.array([self._links(*member) for member in alike.members])
        passes = _played(alike.schedule, alike.rows, alike.chunks, count, of, links)
        reduced = (self._summed_by_copies if alike.has_copies else self._summed)(alike, passes)
        sums = np.array([self._world_s(degrees.devices) for degrees, _ in alike.members])
        update = np.max([alike.total(UPDATE, stages) for stages in alike.placed], axis=0)
        step_s: Numbers = np.max(reduced, axis=0) + sums + update
        return step_s

    def _summed(self, alike: _Alike, passes: Sequence[Sequence[Numbers]]) -> list[Numbers]:
        """When each row has its gradients."""
        reduced = [
            np.max(ends, axis=0) + alike.total(REDUCTION, stages)
            for ends, stages in zip(passes, alike.placed, strict=True)
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
        rows, found = alike.rows, []
        exchanged = np.array([self._copies_s(*member) for member in alike.members])
        for down in range(rows // 2):
            stages = down, rows - 1 - down
            ends = np.maximum(passes[stages[0]], passes[stages[1]])  # of each of the two stages
            first = (np.arange(len(alike.members)), np.argmin(ends, axis=0))
            each_s = exchanged[:, stages]
            ready = np.maximum(ends.min(axis=0) + each_s[first], ends.max(axis=0))
            rest_s = each_s.sum(axis=1) - each_s[first]
            tied_s = exchanged[:, rows] if down == 0 else 0.0
            found.append(ready + alike.total(REDUCTION, stages) + rest_s + tied_s)
        return found

    def _copies_s(self, degrees: Degrees, stages: _Stages) -> Numbers:
        """Of the exchange of each stage's gradients between its two copies; and last, of those of
        parameters that the first and the last stage share."""
        of = stages.parameters
        once, more_s = self._copies_of_block_s(
            degrees.pipeline, degrees.stage_devices, of.exchanged_bytes, of.shared_bytes
        )
        found: Numbers = once + (stages.copies - 1) * more_s
        return found

    @lru_cache(maxsize=None)  # noqa: B019
    def _copies_of_block_s(
        self,
        rows: int,
        size: int,
        pieces: tuple[tuple[int, ...], ...],
        shared: tuple[int, ...],
    ) -> Numbers:
        """With one copy of the block in each stage; and what one more adds."""
        first, middle, last = pieces
        of_stage = [first, *[middle] * (rows - 2), last]
        found = np.zeros((2, rows + 1))
        for stage, once in enumerate(of_stage):
            found[0, stage] = self._between_rows_s(size, stage, rows - 1 - stage, once)
            found[1, stage] = self._between_rows_s(size, stage, rows - 1 - stage, middle)
        found[0, rows] = self._between_rows_s(size, 0, rows - 1, shared)
        return found

    def _memory_bytes(self, alike: _Alike) -> Numbers:
        if not alike.members:
            return np.zeros(0)
        of = alike.of
        if alike.is_alone:
            one = of[WHOLE]
            beside = np.maximum(one[:, GRADIENTS], one[:, SAVED])  # one takes the other's place
            several = one[:, GRADIENTS] + one[:, SAVED]
            found: Numbers = one[:, ALWAYS] + np.where(alike.counts > 1, several, beside)
            return found
        kept = _kept(alike.schedule, alike.rows, alike.chunks, alike.counts, of)
        rows = [
            alike.total(ALWAYS, stages) + beside
            for stages, beside in zip(alike.placed, kept, strict=True)
        ]
        most: Numbers = np.max(rows, axis=0)
        return most

    def _links(self, degrees: Degrees, stages: _Stages) -> Numbers:
        """Seconds from each row to the next, the last to the first too, forward; and back."""
        return self._links_s(degrees.pipeline, degrees.stage_devices, stages.operators.sent_bytes)

    @lru_cache(maxsize=None)  # noqa: B019 - lives as long as the search
    def _links_s(self, rows: int, size: int, sent_bytes: tuple[int, int]) -> Numbers:
        strides = self._strides(rows, size)
        return np.array([[self._send_s(sent, stride) for stride in strides] for sent in sent_bytes])

    @lru_cache(maxsize=None)  # noqa: B019
    def _strides(self, rows: int, size: int) -> tuple[int, ...]:
        groups = tuple(tuple(range(row * size, (row + 1) * size)) for row in range(rows))
        links = MachineLinks(self.machine, groups)
        return tuple(links.stride(row, (row + 1) % rows) for row in range(rows))

    @lru_cache(maxsize=None)  # noqa: B019
    def _send_s(self, size: int, stride: int) -> float:
        return self.machine.collective_time_s(Collective("send", size, 2, stride))

    def _exchange_s(self, degrees: Degrees, stages: _Stages) -> float:
        """Of parameters that the first and the last stage share."""
        key = degrees.pipeline, degrees.stage_devices, stages.parameters.shared_bytes
        return self._shared_s(*key)

    @lru_cache(maxsize=None)  # noqa: B019
    def _shared_s(self, rows: int, size: int, shared: tuple[int, ...]) -> float:
        return self._between_rows_s(size, 0, rows - 1, shared)

    def _between_rows_s(self, size: int, row: int, other: int, pieces: Sequence[int]) -> float:
        """Of sums over counterparts in two rows of so many devices."""
        a, b = sorted((row, other))
        groups = tuple((a * size + device, b * size + device) for device in range(size))
        return sum(group_sum(self.machine, HOLDERS, n, "shared", groups).time_s for n in pieces)

    @lru_cache(maxsize=None)  # noqa: B019
    def _world_s(self, devices: int) -> float:
        groups = (tuple(range(devices)),)
        sizes = summed_bytes(self.graph, self.training)
        return sum(
            group_sum(self.machine, WORLD, n, what, groups).time_s for what, n in sizes.items()
        )

    __hash__ = object.__hash__


def _few_replicas(degrees: Degrees) -> Degrees:
    """One, or as few as divide a batch of which each has one sample: that is another graph, of
    which views can be divided otherwise, than a batch of one.

    >>> _few_replicas(Degrees(data=6, zero=1)).data
    2
    """
    few = _few(degrees.data * degrees.replicas)
    return replace(degrees, data=few, replicas=1, zero=0)


@lru_cache(maxsize=1024)
def _few(several: int) -> int:
    return next((n for n in range(2, several + 1) if several % n == 0), 1)


def _is_parted(degrees: Degrees) -> bool:
    """Whether its backwards have two parts."""
    of = degrees.schedule_name, degrees.pipeline, degrees.row_chunks
    return degrees.stages > 1 and _has_parts(*of)


@lru_cache(maxsize=None)
def _has_parts(schedule: str, rows: int, chunks: int) -> bool:
    return any(
        action.kind == "I" for row in _rows_of(schedule, rows, chunks, rows) for action in row
    )


# ---- small stages --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Small:
    """``numbers``: a row for each kind of stage, of one copy of the block; that of the ``WHOLE`` is
    known of ``with_whole`` only. ``together``: of all copies in one stage. ``left``: what a
    microbatch leaves between the two parts of a backward in the first, the middle and the last
    stage, and in the first with one copy more."""

    numbers: Numbers
    plan: Pipelined
    together: Callable[[], Numbers]
    left: Callable[[], Sequence[int]]

    @cached_property
    def with_whole(self) -> Numbers:
        found = self.numbers.copy()
        found[WHOLE] = self.together() - (KEPT - 1) * found[COPY]
        return found

    @cached_property
    def left_bytes(self) -> Numbers:
        """As ``numbers``."""
        first, middle, last, longer = self.left()
        return np.array([first, middle, last, np.nan, longer - first])

    @cached_property
    def exchanged_bytes(self) -> tuple[tuple[int, ...], ...]:
        """Of each parameter of the first, the middle and the last stage that no other stage has,
        the piece that the optimizer updates."""
        shared = {of.name for of in self.plan.shared}
        return tuple(tuple(_pieces(part, shared)) for part in self.plan.parts)

    @cached_property
    def sent_bytes(self) -> tuple[int, int]:
        """What the busiest device sends from stage to stage, forward and back.

        What all stages read of the first one (rotary tables, masks) is left out: it only makes a
        step longer.
        """
        feeds = {(feed.source, feed.target): feed for feed in self.plan.feeds}
        beyond = feeds.get((0, 2))
        if not {(0, 1), (1, 2)} <= feeds.keys() or (beyond and beyond.busiest_backward_bytes):
            raise AutoparError(
                "stages read more than what the one before them makes; such graphs are not "
                "searched by degrees"
            )
        return feeds[1, 2].busiest_bytes or 0, feeds[1, 2].busiest_backward_bytes or 0

    @cached_property
    def shared_bytes(self) -> tuple[int, ...]:
        """Of each parameter that the first and the last stage share, what is exchanged."""
        for of in self.plan.shared:
            if of.rows != (0, 2) or len(of.kinds) > 1:
                raise AutoparError(f"{of.name} is shared by stages that keep it differently")
        return tuple(of.piece_bytes(0) for of in self.plan.shared)


@dataclass(frozen=True)
class _Stages:
    """Of one candidate: ``copies`` of the block in each stage, and ``count`` microbatches."""

    numbers: Numbers
    copies: int
    count: int
    operators: _Small
    parameters: _Small

    def stage(self, kind: int) -> Numbers:
        found: Numbers = self.numbers[kind] + (self.copies - 1) * self.numbers[COPY]
        return found

    def mixed(self, other: _Stages, blocks: int) -> _Stages:
        """With the first so many copies as in ``other``: that which is known beside what comes
        before and after is one of these."""
        if blocks in (0, self.copies):
            return other if blocks else self
        more = other.numbers[COPY] - self.numbers[COPY]
        numbers = other.numbers + (blocks - 1) * more
        numbers[COPY] = self.numbers[COPY]
        return replace(self, numbers=numbers)


def _check_between(operators: _Small, parameters: _Small) -> None:
    """
    Raises:
        AutoparError: stages have more to do with one another than is priced together.
    """
    _ = operators.sent_bytes, parameters.shared_bytes


@dataclass(frozen=True)
class _Alike:
    """Candidates with the same rows, of which as many microbatches are played."""

    schedule: str
    rows: int
    chunks: int
    members: tuple[tuple[Degrees, _Stages], ...]

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
            played = _played_count(int(self.counts[0]), self.rows)
            _rows_of(self.schedule, self.rows, self.chunks, played)
            if self.has_copies and self.chunks != 2:
                raise AutoparError(
                    f"{self.schedule} with {self.chunks} copies of each stage is not priced "
                    "together with other degrees; take 2 copies, or plan it with --recipe"
                )

    def only(self, kept: NDArray[np.bool_]) -> _Alike:
        chosen = [member for member, keep in zip(self.members, kept, strict=True) if keep]
        return replace(self, members=tuple(chosen))

    def again(self, way: str, others: Sequence[_Stages], blocks: NDArray[np.int64]) -> _Alike:
        """With so many blocks of each stage recomputed this way, in which ``others`` all are."""
        members = []
        for (degrees, stages), other, number in zip(self.members, others, blocks, strict=True):
            of = replace(degrees, recompute=way, recomputed=int(number) / stages.copies)
            members.append((of, stages.mixed(other, int(number))))
        return replace(self, members=tuple(members))

    @cached_property
    def kinds(self) -> list[int]:
        """Of each stage."""
        return [WHOLE] if self.is_alone else _kinds(self.schedule, self.rows, self.chunks)

    @cached_property
    def of(self) -> dict[int, Numbers]:
        """A row for each member, by kind of stage."""
        numbers = np.array([stages.numbers for _, stages in self.members])
        more = np.array([stages.copies - 1 for _, stages in self.members])[:, None]
        return {kind: numbers[:, kind] + more * numbers[:, COPY] for kind in set(self.kinds)}

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        return np.array([stages.count for _, stages in self.members])

    @property
    def placed(self) -> tuple[tuple[int, ...], ...]:
        """The stages of each row."""
        return _placed(self.schedule, self.rows, self.chunks)

    def total(self, what: int, stages: Iterable[int]) -> Numbers:
        """Of so many stages."""
        number = Counter(self.kinds[stage] for stage in stages)
        each = [n * self.of[kind][:, what] for kind, n in number.items()]
        found: Numbers = np.sum(each, axis=0)
        return found


def _kinds(schedule: str, rows: int, chunks: int) -> list[int]:
    """Of each stage."""
    return [FIRST, *[MIDDLE] * (SCHEDULES[schedule].stages(rows, chunks) - 2), LAST]


def _sorted(found: list[Candidate], skipped: Mapping[str, int]) -> Bounds:
    return Bounds(tuple(sorted(found, key=lambda one: one.step_time_s)), dict(skipped))


@dataclass
class _Cut:
    """All operators split in one way, and cut: the stages of one copy of the block each, the first
    of them with one more (``COPY``), and all of it (``WHOLE``).

    ``whole``: the strategy of one stage, with nothing recomputed. ``number``: the same for those
    that differ in nothing but sizes.
    """

    division: Division
    structure: Structure
    whole: Strategy
    costs: Costs
    number: int = -1
    _parts: dict[int, StagePart] = field(default_factory=dict)
    _operators_s: dict[int, Numbers] = field(default_factory=dict)

    @property
    def mesh(self) -> Mesh:
        return self.whole.mesh

    @cached_property
    def content(self) -> Hashable:
        """How all tensors lie, and what is told from operators beside their sizes."""
        of = self.division
        return (
            self.mesh.names,
            tuple(size > 1 for size in self.mesh.sizes),
            tuple(
                (bound.shardings(split), split, bound.rule.kind, bound.rule.saves, bound.rule.inner)
                for operator in of.graph.operators
                for bound, split in [(of.rules[operator.name], self.whole.splits[operator.name])]
            ),
        )

    @cached_property
    def plan(self) -> Pipelined:
        return self._stages(block_starts(self.division.graph)[1:KEPT])

    def _stages(self, cuts: Sequence[int]) -> Pipelined:
        stages = runs(self.division.graph, cuts)
        like = [self.whole] * len(stages)
        of = staged(self.division.graph, stages, like, "1f1b", self.division.count)
        return pipelined(self.division, of)

    def part(self, kind: int) -> StagePart:
        """Its gradients are added to no others."""
        found = self._parts.get(kind)
        if found is None:
            found = self._part(kind)
            found = replace(found, division=replace(found.division, count=1))
            self._parts[kind] = found
        return found

    def _part(self, kind: int) -> StagePart:
        if kind == WHOLE:
            ends = {self.division.graph.loss: ("I",) * len(self.mesh.axes)}
            return StagePart(self.division, self.whole, {}, ends)
        if kind == COPY:
            return self._stages(block_starts(self.division.graph)[2:KEPT]).parts[0]
        return self.plan.parts[kind]

    def operators_s(self, kind: int) -> Numbers:
        if kind not in self._operators_s:
            part = self.part(kind)
            found = _seconds(operator_parts(part, self.costs))
            found[WEIGHTS] += later_parts(part, self.costs).weight_compute_s
            self._operators_s[kind] = found
        return self._operators_s[kind]


@dataclass(frozen=True)
class _Kept:
    """``cut`` with the storages of ``whole``, and what that recomputes."""

    cut: _Cut
    degrees: Degrees
    whole: Strategy
    _parts: dict[int, StagePart] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Of a microbatch."""
        assert self.degrees.microbatch is not None
        return self.degrees.microbatch

    def part(self, kind: int) -> StagePart:
        if kind not in self._parts:
            self._parts[kind] = self._like(self.cut.part(kind))
        return self._parts[kind]

    def _like(self, part: StagePart) -> StagePart:
        recomputed, repeated = self._recomputed
        operators = part.graph.operators
        strategy = replace(
            part.strategy,
            storage={p.name: self.whole.storage[p.name] for p in part.graph.parameters},
            recompute=tuple(o.name for o in operators if o.name in recomputed),
            repeat_collectives=tuple(n for o in operators for n in o.outputs if n in repeated),
        )
        return replace(part, strategy=strategy)

    @cached_property
    def _recomputed(self) -> tuple[set[str], set[str]]:
        return set(self.whole.recompute), set(self.whole.repeat_collectives)

    @property
    def plan(self) -> Pipelined:
        return replace(self.cut.plan, parts=tuple(map(self.part, (FIRST, MIDDLE, LAST))))


def _pieces(part: StagePart, but: Container[str]) -> Iterator[int]:
    wide = part.strategy.training.precision == "mixed"
    for parameter in part.graph.parameters:
        name, spec = parameter.name, parameter.spec
        if parameter.differentiable and part.graph.consumers[name] and name not in but:
            elements = prod(local_shape(spec.shape, part.kept(name).optimizer, part.mesh))
            yield elements * (4 if wide else ITEM_BYTES[spec.dtype])


def _of_parameters(part: StagePart, again: Recomputation, costs: Costs) -> Numbers:
    """And what a backward in two parts does twice, which is mostly to gather them."""
    used = tuple(parameter_edges(part.graph, part.division.rules, part.strategy, again.again))
    found = _seconds(parameter_parts(part, used, costs))
    twice = twice_parts(part, used, costs)
    found[WEIGHTS] += twice.weight_compute_s + twice.weight_communication_s
    for edge in used:
        if edge.trainable:
            size = local_bytes(edge.spec, edge.summed, part.mesh)
            found[SUM] += sum_time_s(size, 2, edge.spec, costs)
    for parameter in part.graph.parameters:
        kept, spec = part.kept(parameter.name), parameter.spec
        updated = prod(local_shape(spec.shape, kept.optimizer, part.mesh))
        states = optimizer_bytes_per_element(spec, part.strategy.training)
        found[ALWAYS] += local_bytes(spec, kept.parameter, part.mesh) + updated * states
        found[GRADIENTS] += local_bytes(spec, kept.gradient, part.mesh)
    return found


def _seconds(of: StageParts) -> Numbers:
    found = np.zeros(LEFT + 1)
    found[FORWARD] = of.forward_compute_s + of.forward_communication_s
    found[INPUTS] = of.input_compute_s + of.input_communication_s
    found[WEIGHTS] = of.weight_compute_s + of.weight_communication_s
    found[BACKWARD] = found[INPUTS] + found[WEIGHTS]
    found[REDUCTION], found[UPDATE] = of.reduction_s, of.optimizer_s + of.refresh_s
    return found


def _on_line(known: Mapping[int, int], at: int) -> int:
    """
    >>> _on_line({1: 10, 3: 14}, 4)
    16
    """
    (a, of_a), (b, of_b) = known.items()
    return of_a + (of_b - of_a) * (at - a) // (b - a)


def _remembered(known: dict[Any, T | AutoparError], key: Hashable, make: Callable[[], T]) -> T:
    """Refusals too."""
    found = known.get(key)
    if found is None:
        try:
            found = make()
        except AutoparError as error:
            found = error
        known[key] = found
    if isinstance(found, AutoparError):
        raise found.with_traceback(None)
    return found


# ---- rows of a schedule --------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _rows_of(schedule: str, rows: int, chunks: int, count: int) -> Rows:
    stages = SCHEDULES[schedule].stages(rows, chunks)
    chain = tuple((stage, stage + 1) for stage in range(stages - 1))
    return SCHEDULES[schedule](stages, count, chunks, chain)


@lru_cache(maxsize=None)
def _placed(schedule: str, rows: int, chunks: int) -> tuple[tuple[int, ...], ...]:
    """The stages of each row."""
    found = _rows_of(schedule, rows, chunks, rows)
    return tuple(tuple(sorted({action.stage for action in row})) for row in found)


def _played_count(count: int, rows: int) -> int:
    """How many microbatches are played for so many.

    >>> [_played_count(n, 4) for n in (8, 16, 17, 18, 20)]
    [8, 16, 17, 18, 16]
    """
    longest = (STEADY + 1) * rows
    return count if count <= longest else longest + count % rows


def _played(
    schedule: str,
    rows: int,
    chunks: int,
    counts: NDArray[np.int64],
    of: dict[int, Numbers],
    links: Numbers,
) -> list[list[Numbers]]:
    """When each row has done its passes of each of its stages; ``counts``: of microbatches, for all
    of which as many are played."""
    ends = iter(
        _in_steady_state(
            lambda count: _play(schedule, rows, chunks, count, counts, of, links), counts, rows
        )
    )
    return [[next(ends) for _ in stages] for stages in _placed(schedule, rows, chunks)]


def _kept(
    schedule: str, rows: int, chunks: int, counts: NDArray[np.int64], of: dict[int, Numbers]
) -> list[Numbers]:
    """What each row keeps of microbatches in flight and of gradients, at most."""
    return _in_steady_state(
        lambda count: _most_kept(schedule, rows, chunks, count, of), counts, rows
    )


def _in_steady_state(
    of_count: Callable[[int], list[Numbers]], counts: NDArray[np.int64], rows: int
) -> list[Numbers]:
    """Of ``counts`` from what it is of a few microbatches."""
    count = _played_count(int(counts[0]), rows)
    few = of_count(count)
    more = (counts - count) / rows
    if not more.any():
        return few
    fewer = of_count(count - rows)
    return [b + (b - a) * more for a, b in zip(fewer, few, strict=True)]


def _most_kept(
    schedule: str, rows: int, chunks: int, count: int, of: dict[int, Numbers]
) -> list[Numbers]:
    members = len(next(iter(of.values())))
    sizes = np.array(
        [
            of[kind][:, what] if kind in of else np.zeros(members)
            for what in (SAVED, LEFT, GRADIENTS)
            for kind in (FIRST, MIDDLE, LAST)
        ]
    )
    return [
        (np.array(largest, dtype=float) @ sizes).max(axis=0)
        for largest in _largest(schedule, rows, chunks, count)
    ]


@lru_cache(maxsize=64)
def _tasks(schedule: str, rows: int, chunks: int, count: int) -> Arrangement:
    stages = SCHEDULES[schedule].stages(rows, chunks)
    feeds = tuple((stage, stage + 1, True) for stage in range(stages - 1))
    return arrange(_rows_of(schedule, rows, chunks, count), Wiring(stages, feeds))


def _play(
    schedule: str,
    rows: int,
    chunks: int,
    count: int,
    counts: NDArray[np.int64],
    of: dict[int, Numbers],
    links: Numbers,
) -> list[Numbers]:
    """``count`` microbatches, with the sums of ``counts``; each number an array. When the last
    backwards end, of each row's stages in their order."""
    kinds = _kinds(schedule, rows, chunks)
    tasks = _tasks(schedule, rows, chunks, count)
    added = (counts - 1) / counts
    lengths = {
        kind: {
            "F": numbers[:, FORWARD],
            "B": numbers[:, BACKWARD] + added * numbers[:, SUM],
            "I": numbers[:, INPUTS],
            "W": numbers[:, WEIGHTS] + added * numbers[:, SUM],
        }
        for kind, numbers in of.items()
    }
    zero = np.zeros(len(links))
    length_of = {
        price: zero
        if KINDS[price % len(KINDS)] == "U"
        else lengths[kinds[price // len(KINDS)]][KINDS[price % len(KINDS)]]
        for price in set(tasks.price_of)
    }
    delay = [
        links[:, int(route.backward), min(route.source_row, route.target_row)]
        if abs(route.source_row - route.target_row) == 1
        else links[:, int(route.backward), rows - 1]
        for route in tasks.routes
    ]
    sent = _read_by(tasks)
    free, ended = [zero] * rows, [zero] * tasks.actions
    row_of, price_of, actions = tasks.row_of, tasks.price_of, tasks.actions
    maximum = np.maximum
    for task in tasks.order:
        if task < actions:
            row = row_of[task]
            begin = free[row]
            for sender, route in sent[task]:
                begin = maximum(begin, ended[sender] + delay[route])
            free[row] = ended[task] = begin + length_of[price_of[task]]
    return [ended[number] for number in _last_backwards(tasks)]


def _read_by(tasks: Arrangement) -> list[list[tuple[int, int]]]:
    """For each action what it waits for: who sends it, and by which route."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(tasks.actions)]
    for sender, reader, route in zip(tasks.sender, tasks.reader, tasks.route_of, strict=True):
        found[reader].append((sender, route))
    return found


def _last_backwards(tasks: Arrangement) -> Iterator[int]:
    """Of each stage of each row."""
    for first, row in zip(tasks.first, tasks.rows, strict=False):
        last = {a.stage: i for i, a in enumerate(row, first) if a.kind in ("B", "W")}
        yield from (last[stage] for stage in sorted(last))


@lru_cache(maxsize=512)
def _largest(
    schedule: str, rows: int, chunks: int, count: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Of each row, at the moments that may be the worst: how many microbatches of each kind of
    stage it keeps, how many between the two parts of their backward, and gradients of how many
    stages of each kind."""
    kinds = _kinds(schedule, rows, chunks)
    return tuple(_moments(row, kinds) for row in _rows_of(schedule, rows, chunks, count))


def _moments(row: Sequence[Action], kinds: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Before something is let go of, or at the end."""
    saved, left, gradients = [0] * (LAST + 1), [0] * (LAST + 1), [0] * (LAST + 1)
    seen: set[tuple[int, ...]] = set()
    begun: set[int] = set()
    for action in row:
        kind = kinds[action.stage]
        if action.kind == "F":
            saved[kind] += 1
            continue
        seen.add((*saved, *left, *gradients))
        (left if action.kind == "W" else saved)[kind] -= 1
        if action.kind == "I":
            left[kind] += 1
        else:
            gradients[kind] += action.stage not in begun
            begun.add(action.stage)
    seen.add((*saved, *left, *gradients))
    return tuple(_largest_of(seen))


def _largest_of(seen: Collection[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """Those to which no other is equal or above in every number.

    >>> sorted(_largest_of({(1, 2), (2, 1), (1, 1)}))
    [(1, 2), (2, 1)]
    """
    each = list(seen)
    counts = np.array(each)
    above = np.ones((len(each), len(each)), dtype=bool)
    for column in counts.T:
        above &= column[:, None] >= column
    yield from (one for one, by in zip(each, above.sum(axis=0), strict=True) if by == 1)


__all__ = ["Bounds", "Candidate", "DegreePrices"]
