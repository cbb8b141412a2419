"""Parameters gathered one by one, from lists with a part for each rank, while the device waits.

What DeepSpeed's ZeRO-3 did before it gathered into one buffer (``stage3.py`` and
``partition_parameters.py`` of deepspeed/runtime/zero, v0.3.13 to v0.5.4):

* A parameter is gathered for the layer that reads it, and let go of behind it. Before, the host
  waits until the device has done all that it was given. Then it asks for a part of a buffer for
  each rank; ``torch.distributed.all_gather`` gathers into another buffer, from which it copies each
  part by itself (torch/lib/c10d/ProcessGroupNCCL.cpp at v1.8.0, ``allgather``).
* Where the program knows what is read next, that is gathered ahead: the host prepares all copies
  first, and the device computes beside the collective after that.
* Gradients go back the same way, each by itself, beside the backward of the layer at hand.
* Small parameters stay whole from the update to the end of the backward. After the update they are
  gathered together, and the host puts each together, part by part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from typing import NamedTuple

from autopar.simulator.costs import Costs
from autopar.simulator.edges import ParameterEdge
from autopar.simulator.folding import Folded
from autopar.simulator.overlap import OneByOne, Streams
from autopar.simulator.recomputation import Recomputation
from cost_models.interface import Work, slowdown_of

SLICE_S = 2.5e-6
"""A part of a buffer, asked for by Python (``narrow``, and the rank that is asked for each time).
This and what follows: the least of 40 loops over 768 parts on one core of an Intel Xeon (model 207)
with Python 3.11 and torch 2.13, 2026-11-27. Hosts of 2021 were slower."""

GRADIENT_SLICE_S = 2.7e-6
"""The same of a gradient, which is made flat again for each part."""

PLACE_S = 5.8e-6
"""Three parts of a small parameter and of where it goes to, and a copy, without its launch."""

COPY_S = 0.9e-6
"""What torch takes in C++ for a copy of a part (``select``, ``copy_``), without its launch."""


@dataclass(frozen=True)
class Spent:
    """Seconds of a microbatch's forward and backward, compute included, and those after the
    update."""

    forward_s: float
    backward_s: float
    step_s: float


def spent(
    seen: Folded,
    parameters: Sequence[tuple[ParameterEdge, int]],
    seconds: Mapping[str, tuple[float, float]],
    again: Recomputation,
    costs: Costs,
    program: OneByOne,
) -> Spent:
    """``parameters``: in the order of their uses, each with how many there are; ``seconds``: of
    each operator of ``seen``, forward and backward."""
    gathered = [(edge, count) for edge, count in parameters if edge.gathers]
    layers = _layers(seen, [edge for edge, _ in gathered], seconds, again, program)
    forward = [_Visit(one.large, (), one.forward_s, one.copies) for one in layers]
    visits = list(_without_kept([*forward, *_backward(layers)], program))
    waits = _Waits(costs, program)
    small = [(edge, count) for edge, count in gathered if not program.is_large(edge)]
    return Spent(
        waits.pass_s(visits[: len(forward)]),
        waits.pass_s(visits[len(forward) :]),
        waits.placed_s(small),
    )


def held_bytes(parameters: Sequence[tuple[ParameterEdge, int]], program: OneByOne) -> int:
    """What a device has beside what the operator at hand uses: the buffer from which parts of the
    largest parameter are copied, and what is gathered ahead."""
    large = [edge.spec for edge, _ in parameters if edge.gathers and program.is_large(edge)]
    ahead = [one.bytes for one in large if program.traced and one.numel < program.live_elements]
    return max((one.bytes for one in large), default=0) + max(ahead, default=0)


# ---- layers in the order of a step ---------------------------------------------------------------


class _Visit(NamedTuple):
    """A layer has its turn. ``gathered``: what is missing of its large parameters; ``reduced``:
    whose gradients it makes; ``copies``: how many layers are alike."""

    gathered: tuple[ParameterEdge, ...]
    reduced: tuple[ParameterEdge, ...]
    compute_s: float
    copies: int


@dataclass
class _Layer:
    """From an operator that reads large parameters to the next that does. ``segment``: with which
    it is run again, if it is."""

    large: tuple[ParameterEdge, ...] = ()
    copies: int = 1
    segment: int | None = None
    small: list[ParameterEdge] = field(default_factory=list)
    forward_s: float = 0.0
    again_s: float = 0.0
    backward_s: float = 0.0


def _layers(
    seen: Folded,
    edges: Sequence[ParameterEdge],
    seconds: Mapping[str, tuple[float, float]],
    again: Recomputation,
    program: OneByOne,
) -> list[_Layer]:
    read: dict[str, list[ParameterEdge]] = {}
    for edge in edges:
        for name in edge.consumers:
            read.setdefault(name, []).append(edge)
    found = [_Layer()]
    for operator in seen.graph.operators:
        name = operator.name
        large = tuple(edge for edge in read.get(name, ()) if program.is_large(edge))
        if large:
            found.append(_Layer(large, seen.weight[name], again.again.get(name)))
        layer, share = found[-1], seen.weight[name] / found[-1].copies
        layer.small += [edge for edge in read.get(name, ()) if edge not in large]
        layer.forward_s += share * seconds[name][0]
        layer.again_s += share * seconds[name][0] * (name in again.again)
        layer.backward_s += share * seconds[name][1]
    return found


def _backward(layers: Sequence[_Layer]) -> Iterator[_Visit]:
    """From the last to the first; what is run again has its turn just before."""
    left = list(layers)
    while left:
        together = [left.pop()]
        segment = together[0].segment
        while segment is not None and left and left[-1].segment == segment:
            together.append(left.pop())
        if segment is not None:
            for one in reversed(together):
                yield _Visit(one.large, (), one.again_s, one.copies)
        for one in together:
            yield _Visit(one.large, (*one.large, *one.small), one.backward_s, one.copies)


def _without_kept(visits: Sequence[_Visit], program: OneByOne) -> Iterator[_Visit]:
    """What is read again soon is still there."""
    passed = 0
    left: dict[str, int] = {}
    for visit in visits:
        missing = tuple(
            edge
            for edge in visit.gathered
            if not program.traced
            or edge.parameter not in left
            or passed - left[edge.parameter] >= program.kept_elements
        )
        passed += visit.copies * sum(edge.spec.numel for edge in visit.gathered)
        left |= {edge.parameter: passed for edge in visit.gathered}
        yield visit._replace(gathered=missing)


# ---- what the device waits for -------------------------------------------------------------------


class _Gather(NamedTuple):
    """Seconds of its host before the collective begins, those in which it prepares copies after
    that, and those of the collective and the copies on the device."""

    before_s: float
    copies_s: float
    device_s: float


@dataclass(frozen=True)
class _Waits:
    costs: Costs
    program: OneByOne

    def pass_s(self, visits: Sequence[_Visit]) -> float:
        """Of a microbatch, forward or backward."""
        pairs = pairwise([*visits, _Visit((), (), 0.0, 1)])
        return self.gathered_s(visits[0].gathered) + sum(
            visit.copies * self.visit_s(visit, upcoming.gathered) for visit, upcoming in pairs
        )

    def visit_s(self, visit: _Visit, upcoming: Sequence[ParameterEdge]) -> float:
        """A layer, and what the next one needs."""
        layer_s = self._layer_s(visit)
        at_hand = sum(edge.spec.numel for edge in visit.gathered)
        if not self.program.traced or at_hand >= self.program.live_elements:
            return layer_s + self.gathered_s(upcoming)
        ahead = [self._gather(edge) for edge in upcoming]
        copies_s = sum(one.copies_s for one in ahead)
        beside_s = max(0.0, sum(one.device_s for one in ahead) - copies_s)
        exposed_s = self._streams.exposed_s(layer_s, beside_s)
        return sum(one.before_s for one in ahead) + copies_s + layer_s + exposed_s

    def gathered_s(self, edges: Sequence[ParameterEdge]) -> float:
        """With nothing beside it."""
        each = map(self._gather, edges)
        norms_s = sum(self._passes_s(edge, 1) for edge in edges if self.program.norms)
        return norms_s + sum(one.before_s + max(one.copies_s, one.device_s) for one in each)

    def placed_s(self, edges: Sequence[tuple[ParameterEdge, int]]) -> float:
        """Small parameters after the update: one collective, then each by itself."""
        if not edges:
            return 0.0
        size_bytes = sum(edge.spec.bytes * count for edge, count in edges)
        first = edges[0][0].forward_transfers(self.costs.mesh)
        moved_s = sum(self.costs.transfer_s(replace(one, bytes=size_bytes)) for one in first)
        return moved_s + sum(
            count * self._ranks(edge) * (PLACE_S + self._launch_s(edge)) for edge, count in edges
        )

    def _layer_s(self, visit: _Visit) -> float:
        """The host slices and copies gradients while the device computes; the large one, which
        comes first, is reduced when all of that is done."""
        trained = [edge for edge in visit.reduced if edge.trainable]
        device_s = visit.compute_s + sum(self._passes_s(edge, BUCKET_PASSES) for edge in trained)
        host_s = sum(
            self._ranks(edge) * (GRADIENT_SLICE_S + COPY_S + self._launch_s(edge))
            for edge in trained
        )
        left_s = max(0.0, device_s - host_s)
        reduced_s = sum(
            sum(map(self.costs.transfer_s, edge.backward_transfers(self.costs.mesh)))
            for edge in trained
            if self.program.is_large(edge)
        )
        return host_s + left_s + self._streams.exposed_s(left_s, reduced_s)

    def _gather(self, edge: ParameterEdge) -> _Gather:
        ranks, spec = self._ranks(edge), edge.spec
        moved_s = sum(map(self.costs.transfer_s, edge.forward_transfers(self.costs.mesh)))
        copy_s = self.costs.memory_bound_s(2.0 * spec.bytes / ranks, spec.dtype)
        return _Gather(
            ranks * SLICE_S + self._passes_s(edge, 1),  # of zeros
            ranks * (COPY_S + self._launch_s(edge)),
            moved_s + ranks * copy_s,
        )

    def _passes_s(self, edge: ParameterEdge, times: int) -> float:
        return self.costs.memory_bound_s(float(times * edge.spec.bytes), edge.spec.dtype)

    def _launch_s(self, edge: ParameterEdge) -> float:
        """Of the smallest kernel."""
        return self.costs.cost_model.compute_time_s(Work("memory", edge.spec.dtype, 0.0, 1.0))

    def _ranks(self, edge: ParameterEdge) -> int:
        mesh = self.costs.mesh
        return prod(mesh.sizes[one.axis] for one in edge.forward_transfers(mesh))

    @property
    def _streams(self) -> Streams:
        return Streams(slowdown_of(self.costs.cost_model))


BUCKET_PASSES = 4
"""A gradient is copied into a bucket, which is divided by the number of ranks."""


__all__ = ["Spent", "held_bytes", "spent"]
