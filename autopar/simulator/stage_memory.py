"""What a device holds for one stage of several: the walk of ``memory``, action by action.

Counted beside what ``memory`` counts: what arrives and what departs is kept until the backward has
ended; gradients that come back and those that are given back; with a backward in two parts, what
its first part leaves for the second.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from autopar.ir.graph import Operator, Role
from autopar.ir.sharding import Sharding
from autopar.simulator.edges import canonical
from autopar.simulator.folding import whole
from autopar.simulator.layouts import Follow, Layouts
from autopar.simulator.memory import (
    KINDS,
    Block,
    Footprint,
    Key,
    MemoryWalk,
    local_bytes,
)
from autopar.simulator.stages import StagePart
from autopar.simulator.strides import Strides

T = TypeVar("T")

Kinds = tuple[int, ...]
"""Bytes of each of ``memory.KINDS``."""

NONE: Kinds = (0,) * len(KINDS)


def plus(*kinds: Kinds) -> Kinds:
    return tuple(map(sum, zip(*kinds, strict=True)))


def minus(kinds: Kinds, less: Kinds) -> Kinds:
    return tuple(a - b for a, b in zip(kinds, less, strict=True))


@dataclass(frozen=True, slots=True)
class Moment:
    """The worst of an action: what is held then, and which operator is at work."""

    held: Kinds
    at: str


@dataclass(frozen=True, slots=True)
class StageBytes:
    """What each device of a stage holds.

    ``always``: parameters, buffers and optimizer states; all else is beside it. ``saved``: for a
    microbatch between its forward and its ``B`` or ``I``; ``for_weights``: between ``I`` and ``W``.
    ``gradients``: from the end of the first ``B`` or ``W`` to ``R``, their reduction; ``reduced``:
    from there to ``U``. ``moments``: by kind of action, with what its microbatch has saved; in
    ``B``, ``W``, ``R`` and ``U`` with the gradients. ``first``: of the first ``B`` or ``W``, which
    meets none. ``departs`` and ``given_back``: how what the part's ``ends`` name, and the gradients
    of what it is ``given``, lie in memory; ``first_given``: for each of these the place of the
    first that is the same memory.
    """

    always: Kinds
    saved: Kinds
    for_weights: Kinds
    gradients: Kinds
    reduced: Kinds
    moments: dict[str, Moment]
    first: Moment
    departs: tuple[Strides, ...]
    given_back: tuple[Strides, ...]
    first_given: tuple[int, ...]


def stage_bytes(
    part: StagePart,
    *,
    parted: bool = False,
    handed_on: Collection[str] = (),
    shared: Collection[str] = (),
) -> StageBytes:
    """``parted``: its backwards are ``I`` and ``W``. ``handed_on``: what arrives in the memory of a
    stage of the same row, which keeps it for longer. ``shared``: parameters whose gradients are
    summed with others', in the dtype that the optimizer takes."""
    return _StageWalk(part, parted, frozenset(handed_on), frozenset(shared)).bytes()


@dataclass(frozen=True, slots=True)
class _Microbatch:
    """What was seen of one."""

    saved: Kinds
    for_weights: Kinds
    moments: dict[str, Moment]
    first_given: tuple[int, ...]


class _StageWalk(MemoryWalk):
    """``base``: what was there before the microbatch. Blocks that are held beside those that
    autograd holds: ``departed`` until the last backward, ``returned`` until the end of the backward
    that reads them, ``retained`` until the end of ``W``. ``left``: by operator with parameters, the
    gradients of its outputs, which ``I`` leaves for ``W``; ``put_off``: what it saved."""

    def __init__(
        self,
        part: StagePart,
        parted: bool,
        handed_on: frozenset[str],
        shared: frozenset[str],
    ) -> None:
        rules, strategy = part.division.rules, part.strategy
        super().__init__(whole(part.graph), part.graph, rules, strategy, part.given, part.ends)
        self.parted, self.handed_on, self.shared, self.doing = parted, handed_on, shared, "F"
        self.layouts = self._layouts()
        self.footprints = [self._with_copies(i) for i in range(len(self.footprints))]
        self.returns = part.returns
        self.index = {o.name: i for i, o in enumerate(self.graph.operators)}
        self.departed: list[Block] = []
        self.returned: list[Block] = []
        self.retained: list[Block] = []
        self.left: dict[int, list[tuple[Key, Block]]] = {}
        self.put_off: dict[int, list[Block]] = {}
        self.always = self.base = self.reduced = NONE
        self.reduction = Moment(NONE, "")

    def _layouts(self) -> Layouts:
        by_name = self.graph.by_name

        def in_place(name: str, source: Sharding, target: Sharding, backward: bool) -> bool:
            return self.move_between(by_name[name].spec, source, target, backward).in_place

        return Follow(
            self.graph,
            self.rules,
            self.mesh,
            self.given,
            self.ends,
            [footprint.wanted for footprint in self.footprints],
            [footprint.produced for footprint in self.footprints],
            self.made,
            self.home,
            in_place,
            [footprint.carries_gradient for footprint in self.footprints],
        ).layouts()

    def _with_copies(self, index: int) -> Footprint:
        """Of an operator, with copies of what lies otherwise than it can take."""
        found = self.footprints[index]
        if index in self.layouts.copied:
            found = _with_copy(found)
        if index in self.layouts.copied_back:
            if any(found.passes_on):
                return replace(found, passes_on=(False,) * len(found.passes_on))
            return replace(found, backward_bytes=found.backward_bytes + found.produced_bytes[0])
        return found

    def bytes(self) -> StageBytes:
        self.keep_state()
        self.always = self.base = self._now()
        first = self._microbatch()
        gradients = minus(self._now(), self.always)
        self.base = self._now()
        later = self._microbatch()
        self._restart()
        self.update()
        last = "W" if self.parted else "B"
        moments = {**first.moments, last: later.moments[last]}
        moments |= {"R": self.reduction, "U": self._moment(self.always)}
        return StageBytes(
            always=self.always,
            saved=first.saved,
            for_weights=first.for_weights,
            gradients=gradients,
            reduced=self.reduced,
            moments=moments,
            first=first.moments[last],
            departs=tuple(self.layouts.departs.values()),
            given_back=tuple(self.layouts.given_back.values()),
            first_given=first.first_given,
        )

    def _microbatch(self) -> _Microbatch:
        moments: dict[str, Moment] = {}
        saved = self._begin("F", self.forward)
        self._keep_departing()
        moments["F"] = self._moment(self.base)
        after_forward = between = minus(self._now(), self.base)
        if self.parted:
            given_back = self._begin("I", lambda: self.backward(saved))
            moments["I"] = self._moment(self.base)
            first_given = self._first_given(given_back)
            _let_go(self, given_back.values(), self.returned)
            between = minus(self._now(), self.base)
            self._begin("W", self._weight_gradients)
            moments["W"] = self._moment(self.always)
        else:
            given_back = self._begin("B", lambda: self.backward(saved))
            moments["B"] = self._moment(self.always)
            first_given = self._first_given(given_back)
            _let_go(self, given_back.values(), self.returned, self.arrivals, self.departed)
        return _Microbatch(after_forward, between, moments, first_given)

    def _first_given(self, given_back: dict[Key, Block]) -> tuple[int, ...]:
        blocks = [given_back.get(key) for key in self.given.items()]
        return tuple(
            place if block is None else next(i for i, b in enumerate(blocks) if b is block)
            for place, block in enumerate(blocks)
        )

    def _begin(self, doing: str, action: Callable[[], T]) -> T:
        self.doing = doing
        self._restart()
        return action()

    def _restart(self) -> None:
        self.peak, self.at_peak, self.where = self.total, self.live.copy(), "start"

    def _now(self) -> Kinds:
        return tuple(self.live[kind] for kind in KINDS)

    def _moment(self, base: Kinds) -> Moment:
        return Moment(minus(tuple(self.at_peak[kind] for kind in KINDS), base), self.where)

    # ---- what goes over boundaries -------------------------------------------------------------

    def given_bytes(self, name: str, sharding: Sharding) -> int:
        return 0 if name in self.handed_on else super().given_bytes(name, sharding)

    def _keep_departing(self) -> None:
        for name, sharding in self.ends.items():
            key = name, canonical(sharding, self.graph.by_name[name].differentiable)
            self.hold(key, self.departed)
        for key in list(self.blocks):
            self.forget(key)

    def seeds(self) -> dict[Key, Block]:
        """Gradients come back for what departed, and are kept while they are read."""
        found = {}
        for name, sharding in self.ends.items():
            tensor = self.graph.by_name[name]
            if tensor.differentiable:
                size = local_bytes(tensor.spec, sharding, self.mesh)
                block = self.allocate(size, "temporaries" if name == self.graph.loss else "buffers")
                if name != self.graph.loss:
                    block.users += 1
                    self.returned.append(block)
                found[name, sharding] = block
        self._mark_sums()
        return found

    def _mark_sums(self) -> None:
        """Of gradients from several stages; all are there when the first two are added."""
        summed = {name: count for name, count in self.returns.items() if count > 1}
        size = {n: local_bytes(self.graph.spec(n), self.ends[n], self.mesh) for n in summed}
        if summed:
            waiting = sum((count - 1) * size[name] for name, count in summed.items())
            self.mark("sum of returned gradients", waiting + max(size.values()))

    # ---- a backward in two parts ---------------------------------------------------------------

    def _reads_parameters(self, operator: Operator) -> list[bool]:
        """For each input whether it is a trained parameter."""
        by_name = self.graph.by_name
        return [
            by_name[name].role is Role.PARAMETER and by_name[name].differentiable
            for name in operator.inputs
        ]

    def operator_backward(
        self,
        operator: Operator,
        footprint: Footprint,
        gradients: dict[Key, Block],
        saved: list[Block],
    ) -> None:
        if self.doing != "I":
            super().operator_backward(operator, footprint, gradients, saved)
            return
        parameters = self._reads_parameters(operator)
        if any(parameters):
            index = self.index[operator.name]
            self.left[index] = []
            for key in zip(operator.outputs, footprint.produced, strict=True):
                if key in gradients:
                    gradients[key].users += 1
                    self.left[index].append((key, gradients[key]))
            self.put_off[index] = saved
            footprint = _for_inputs(footprint, [not is_one for is_one in parameters])
            if not any(footprint.differentiable):
                for key, _ in self.left[index]:
                    self.release(gradients.pop(key))
                return
        for block in saved:
            block.users += 1  # autograd keeps it for W
        if not any(parameters):
            self.retained += saved
        super().operator_backward(operator, footprint, gradients, list(saved))

    def _weight_gradients(self) -> None:
        """Operator by operator, in the order of the forward; then all of them to their places."""
        _let_go(self, self.arrivals, self.departed)
        gradients: dict[Key, Block] = {}
        for index in sorted(self.left):
            operator, footprint = self.graph.operators[index], self.footprints[index]
            for key, block in self.left[index]:
                block.users += 1
                gradients[key] = block
                self.retained.append(block)
            wanted = _for_inputs(footprint, self._reads_parameters(operator))
            super().operator_backward(operator, wanted, gradients, self.put_off[index])
        for made in reversed(self.made):
            self.move_back(made, gradients)
        _let_go(self, self.retained)
        self.left, self.put_off = {}, {}

    # ---- the end of the step -------------------------------------------------------------------

    def cast(self, name: str) -> bool:
        return name not in self.shared and super().cast(name)

    def reduce(self) -> dict[str, Block]:
        reduced = super().reduce()
        self.reduction = self._moment(self.always)
        self.reduced = minus(self._now(), self.always)
        self._restart()
        return reduced


def _let_go(walk: MemoryWalk, *held: Iterable[Block]) -> None:
    for blocks in held:
        for block in list(blocks):
            walk.release(block)
        if isinstance(blocks, list):
            blocks.clear()


def _with_copy(found: Footprint) -> Footprint:
    """Of a view that is none, or of a product, which keeps the copy of its input."""
    if found.aliases:
        return replace(found, aliases=False)
    size, kept = found.wanted_bytes[0], 0 in found.saved_inputs
    return replace(
        found,
        saved_inputs=tuple(i for i in found.saved_inputs if i),
        own_bytes=found.own_bytes + size * kept,
        forward_bytes=found.forward_bytes + size * (not kept),
    )


def _for_inputs(footprint: Footprint, wanted: Sequence[bool]) -> Footprint:
    """The backward into these inputs alone."""
    both = zip(footprint.differentiable, wanted, strict=True)
    return replace(footprint, differentiable=tuple(a and b for a, b in both))


__all__ = ["NONE", "Kinds", "Moment", "StageBytes", "minus", "plus", "stage_bytes"]
