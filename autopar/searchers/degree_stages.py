"""What the stages of a candidate among degrees cost, from a few small ones that say it of all.

Each stage has so many copies of the repeated block, one has what is before them and one what is
after; so stages of one to three copies say what any has:

    stage of L copies = stage of 1 + (L - 1) x (first of 2 - first of 1)

What operators and their collectives cost depends on tensor, context, microbatch, ``between`` and
``recompute``; what parameters cost beside on data, replicas and ZeRO. The two are priced apart, the
one on few replicas, the other with the smallest microbatch, and added.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import prod
from typing import Any, TypeVar

import numpy as np

from autopar.errors import AutoparError
from autopar.ir.graph import ITEM_BYTES, OperatorGraph
from autopar.ir.sharding import Mesh, local_shape
from autopar.ir.strategy import Strategy, Training
from autopar.ops import Proposals
from autopar.recipes import Degrees, by_degrees
from autopar.searchers.degree_rows import (
    ALWAYS,
    BACKWARD,
    COPY,
    FIRST,
    FORWARD,
    GRADIENTS,
    INPUTS,
    LAST,
    LAUNCHES,
    LEFT,
    MIDDLE,
    REDUCTION,
    SAVED,
    SUM,
    UPDATE,
    WEIGHTS,
    WHOLE,
    Numbers,
    has_parts,
)
from autopar.simulator.costs import ComputeCache, Costs
from autopar.simulator.edges import parameter_edges
from autopar.simulator.folding import KEPT
from autopar.simulator.listing import Structure
from autopar.simulator.memory import local_bytes, optimizer_bytes_per_element, saved_bytes
from autopar.simulator.microbatches import Division, division
from autopar.simulator.recomputation import Recomputation, recomputation
from autopar.simulator.stage_memory import stage_bytes
from autopar.simulator.stage_parts import (
    StageParts,
    again_parts,
    later_parts,
    operator_parts,
    parameter_parts,
    twice_parts,
)
from autopar.simulator.staged import runs, staged
from autopar.simulator.stages import Pipelined, StagePart, pipelined
from autopar.simulator.updates import sum_time_s
from cost_models.interface import CostModel

T = TypeVar("T")

HELD = [SUM, ALWAYS, GRADIENTS]
"""Of parameters alone."""


@dataclass
class SmallStages:
    """Those of one graph, ``folded`` to ``KEPT`` of its ``layers`` equal blocks (which begin at
    ``starts``), for a global batch on one machine; remembered by what they depend on."""

    folded: OperatorGraph
    starts: tuple[int, ...]
    layers: int
    batch: int
    cost_model: CostModel
    machine: CostModel
    training: Training
    proposals: Proposals = ()
    _cache: ComputeCache = field(default_factory=dict)
    _divisions: dict[int, Division] = field(default_factory=dict)
    _structures: dict[int, Structure] = field(default_factory=dict)
    _graphs: dict[int, dict[int, OperatorGraph]] = field(default_factory=dict)
    _cuts: dict[Any, _Cut | AutoparError] = field(default_factory=dict)
    _numbers: dict[Hashable, int] = field(default_factory=dict)
    _operators: dict[Any, _Small | AutoparError] = field(default_factory=dict)
    _parameters: dict[Any, _Small | AutoparError] = field(default_factory=dict)
    _again: dict[Any, Recomputation | AutoparError] = field(default_factory=dict)
    _beside: dict[Any, Numbers | AutoparError] = field(default_factory=dict)
    _sums: dict[tuple[int, int, bool], Numbers] = field(default_factory=dict)
    _saved: dict[Hashable, dict[int, int]] = field(default_factory=dict)

    def of(self, of: Degrees) -> Stages:
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
            return self.of(none).mixed(self.of(whole), blocks)
        count = of.microbatches(self.batch)
        operators = self._of_operators(of)
        again = of.recompute if of.zero == 3 else "none"
        kept = self._of_parameters(of, again)
        if of.stages > 1:
            _check_between(operators, kept)
        numbers = self._sum(of, operators, kept, again)
        return Stages(
            numbers,
            copies,
            count,
            operators,
            kept,
            lambda: operators.kept_bytes(of.stages == 1, _is_parted(of)),
        )

    def _sum(self, of: Degrees, operators: _Small, kept: _Small, again: str) -> Numbers:
        is_whole = of.stages == 1
        key = id(operators), id(kept), is_whole
        found = self._sums.get(key)
        if found is None:
            alone = self._of_parameters(_few_replicas(of), again)
            of_operators, of_kept, of_alone = (
                small.with_whole if is_whole else small.numbers
                for small in (operators, kept, alone)
            )
            found = of_operators + of_kept - of_alone
            found[:, HELD] = of_kept[:, HELD]
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
        kept = _Kept(cut, one, by_degrees(*known, cut.whole.splits))
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
            lambda kind: self._saved_bytes(kept, kind),
            lambda kind: self._left_bytes(kept, kind),
        )

    def _cut(self, of: Degrees) -> _Cut:
        """By its axes, and what is between them."""
        division = self._divided(of.microbatches(self.batch))
        structure = self._structures[division.count]
        plain = replace(of, zero=0, recompute="none")
        whole = by_degrees(division, plain, self.cost_model, self.training, structure)
        costs = Costs(self.machine, whole.mesh, self._cache, tuple(range(whole.mesh.size)))
        graphs = self._graphs.setdefault(division.count, {})
        cut = _Cut(division, structure, self.starts, whole, costs, graphs)
        cut.number = self._numbers.setdefault(cut.content, len(self._numbers))
        return cut

    def _numbers_of_operators(self, kept: _Kept, kind: int) -> Numbers:
        """What parameters cost beside is that of any microbatch."""
        cut, part = kept.cut, kept.part(kind)
        again = self._recomputation(kept, kind)
        key = cut.number, cut.mesh, kind, part.strategy.recompute
        beside = _remembered(self._beside, key, lambda: _of_parameters(part, again, cut.costs))
        found: Numbers = cut.operators_s(kind) + _seconds(
            again_parts(part, again, cut.costs, listed=False)
        )
        found += beside
        return found

    def _numbers_of_parameters(self, kept: _Kept, kind: int) -> Numbers:
        cut, part = kept.cut, kept.part(kind)
        again = self._recomputation(kept, kind)
        found: Numbers = cut.operators_s(kind) + _seconds(
            again_parts(part, again, cut.costs, listed=False)
        )
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
    return degrees.stages > 1 and has_parts(*of)


@dataclass(frozen=True)
class _Small:
    """``numbers``: a row for each kind of stage, of one copy of the block; that of the ``WHOLE`` is
    known of ``with_whole`` only. ``together``: of all copies in one stage. Bytes by kind of stage:
    ``saved`` by a microbatch, and ``left`` of it between the two parts of a backward. These are
    asked for where it matters whether a candidate fits."""

    numbers: Numbers
    plan: Pipelined
    together: Callable[[], Numbers]
    saved: Callable[[int], int]
    left: Callable[[int], int]

    @cached_property
    def with_whole(self) -> Numbers:
        found = self.numbers.copy()
        found[WHOLE] = self.together() - (KEPT - 1) * found[COPY]
        return found

    def kept_bytes(self, is_whole: bool, is_parted: bool) -> Numbers:
        """Of a microbatch, ``SAVED`` and ``LEFT``; a row for each kind of stage."""
        found = np.zeros((COPY + 1, LEFT + 1))
        found[:, SAVED] = self._saved_bytes
        if is_whole:
            found[WHOLE, SAVED] = self._whole_bytes
        if is_parted:
            found[:, LEFT] = self._left_bytes
        return found

    @cached_property
    def _saved_bytes(self) -> Numbers:
        return _by_kind(self.saved)

    @cached_property
    def _left_bytes(self) -> Numbers:
        return _by_kind(self.left)

    @cached_property
    def _whole_bytes(self) -> float:
        more: float = self._saved_bytes[COPY]
        return self.saved(WHOLE) - (KEPT - 1) * more

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


def _by_kind(of: Callable[[int], int]) -> Numbers:
    """As the numbers of ``_Small``; ``COPY`` is the first stage with one copy more."""
    first, middle, last, longer = map(of, (FIRST, MIDDLE, LAST, COPY))
    return np.array([first, middle, last, np.nan, longer - first])


@dataclass(frozen=True)
class Stages:
    """Of one candidate: ``copies`` of the block in each stage, and ``count`` microbatches.
    ``microbatch``: the bytes that one keeps."""

    numbers: Numbers
    copies: int
    count: int
    operators: _Small
    parameters: _Small
    microbatch: Callable[[], Numbers]

    @cached_property
    def kept(self) -> Numbers:
        return self.microbatch()

    def mixed(self, other: Stages, blocks: int) -> Stages:
        """With the first so many copies as in ``other``."""
        if blocks in (0, self.copies):
            return other if blocks else self
        return replace(
            self,
            numbers=_mixed(self.numbers, other.numbers, blocks),
            microbatch=lambda: _mixed(self.kept, other.kept, blocks),
        )


def _mixed(numbers: Numbers, others: Numbers, blocks: int) -> Numbers:
    """That which is known beside what comes before and after is one of the others."""
    more = others[COPY] - numbers[COPY]
    found: Numbers = others + (blocks - 1) * more
    found[COPY] = numbers[COPY]
    return found


def _check_between(operators: _Small, parameters: _Small) -> None:
    """
    Raises:
        AutoparError: stages have more to do with one another than is priced together.
    """
    _ = operators.sent_bytes, parameters.shared_bytes


@dataclass
class _Cut:
    """All operators split in one way, and cut: the stages of one copy of the block each, the first
    of them with one more (``COPY``), and all of it (``WHOLE``).

    ``starts``: of the blocks. ``whole``: the strategy of one stage, with nothing recomputed.
    ``graphs``: of each kind of stage, the same for all that cut the division. ``number``: the same
    for those that differ in nothing but sizes.
    """

    division: Division
    structure: Structure
    starts: tuple[int, ...]
    whole: Strategy
    costs: Costs
    graphs: dict[int, OperatorGraph]
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
        return self._stages(self.starts[1:])

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
            graph = self.graphs.setdefault(kind, found.graph)  # what it knows of itself stays known
            found = replace(found, division=replace(found.division, graph=graph, count=1))
            self._parts[kind] = found
        return found

    def _part(self, kind: int) -> StagePart:
        if kind == WHOLE:
            ends = {self.division.graph.loss: ("I",) * len(self.mesh.axes)}
            return StagePart(self.division, self.whole, {}, ends)
        if kind == COPY:
            return self._stages(self.starts[2:]).parts[0]
        return self.plan.parts[kind]

    def operators_s(self, kind: int) -> Numbers:
        if kind not in self._operators_s:
            part = self.part(kind)
            found = _seconds(operator_parts(part, self.costs, listed=False))
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
    found = _seconds(parameter_parts(part, used, costs, listed=False))
    twice = twice_parts(part, used, costs, listed=False)
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
    found = np.zeros(LAUNCHES + 1)
    found[FORWARD] = of.forward_compute_s + of.forward_communication_s
    found[INPUTS] = of.input_compute_s + of.input_communication_s
    found[WEIGHTS] = of.weight_compute_s + of.weight_communication_s
    found[BACKWARD] = found[INPUTS] + found[WEIGHTS]
    found[REDUCTION], found[UPDATE] = of.reduction_s, of.optimizer_s + of.refresh_s
    found[LAUNCHES] = of.launches_s
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


__all__ = ["SmallStages", "Stages"]
