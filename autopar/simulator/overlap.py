"""Communication beside compute: parameters gathered ahead, gradients reduced while others are made.

What programs such as FSDP and DeepSpeed's ZeRO do: a second stream gathers the parameters of the
next operators and reduces the gradients of those before, while the first computes and moves
activations. Both slow down while both are busy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

from autopar.ir.graph import ITEM_BYTES, OperatorGraph
from autopar.ir.sharding import Mesh
from autopar.ir.simulation import PromisedCollective
from autopar.simulator.blocks import blocks
from autopar.simulator.costs import Costs
from autopar.simulator.edges import ParameterEdge
from autopar.simulator.memory import local_bytes
from autopar.simulator.redistribution import Transfer
from cost_models.interface import CollectiveKind


@dataclass(frozen=True, slots=True)
class OneByOne:
    """How a program keeps parameters that it gathers one by one (``simulator.one_by_one``).

    Those of fewer than ``least_elements`` stay whole. ``traced``: whether it knows what is read
    next. Then that is gathered ahead while fewer than ``live_elements`` are at hand, and what is
    read again before ``kept_elements`` others stays until then. ``norms``: the norm of each
    parameter is taken when it has been gathered. The numbers are DeepSpeed's defaults
    (deepspeed/runtime/zero/constants.py at v0.3.13).
    """

    least_elements: int = 100_000
    live_elements: int = 1_000_000_000
    kept_elements: int = 1_000_000_000
    traced: bool = True
    norms: bool = False

    def is_large(self, edge: ParameterEdge) -> bool:
        return edge.spec.numel >= self.least_elements


@dataclass(frozen=True, slots=True)
class Overlap:
    """What the program that runs a strategy does at once; nothing, where it does one thing after
    the other, as ``autopar run`` does and as searches count.

    ``parameters``: a second stream gathers them ahead, and reduces gradients beside the backward.
    ``sums``: the gradient of a product's input is summed beside the product that gives the gradient
    of its weight, and an input that is gathered again, beside the one that gives its own (arXiv
    2205.05198, section 4.2.2). ``in_pieces``: what is gathered for a product, and what is scattered
    of its result, goes on piece by piece beside it, and so do their gradients. ``replicas``: beside
    so many of the last backwards of a stage goes on what is reduced once a step, and beside as many
    of the first forwards updated parameters are gathered (several, where a device goes on with
    other stages).
    ``together``: what is reduced once a step is one message for each group, and so is what is
    gathered after the update. ``added_in_products``: gradients of microbatches are added up by the
    products that give them.
    ``update_bytes``: read and written for each element beside its update (casts, scales, norms).
    ``gathered_bytes``, ``reduced_bytes``: of an element of a parameter that is gathered, and of its
    gradient that is reduced, with ``parameters``; 0: as the graph has it. ``copies``: parameters
    are copied out of the buffer into which they are gathered together, gradients into another.
    ``flat``: parameters of a group are parts of one tensor (FSDP's first version): backward puts
    their gradients together, and they are cast and divided before they are reduced. ``to_the_end``:
    what is recomputed is run to its end, even if nothing is missing any more.
    ``experts``: the share of what goes all to all that does not show, since another
    microbatch is computed meanwhile.
    ``host_waits``: for its device, after each pass: it goes ahead within a pass only (Megatron-LM
    synchronises after each ``batch_isend_irecv``, and timed each pass until 2022). ``waits``: a
    device computes nothing while messages of a pipeline are on their way; what all
    devices of an axis have whole each sends a part of, and it is gathered on the other side (arXiv
    2104.04473, section 4.1). ``one_by_one``: parameters are gathered one by one, and the device
    waits for its host meanwhile.
    """

    parameters: bool = False
    sums: bool = False
    in_pieces: bool = False
    replicas: int = 0
    together: bool = False
    added_in_products: bool = False
    update_bytes: int = 0
    gathered_bytes: int = 0
    reduced_bytes: int = 0
    copies: bool = False
    flat: bool = False
    to_the_end: bool = False
    waits: bool = False
    experts: float = 0.0
    host_waits: bool = False
    one_by_one: OneByOne | None = None


NOTHING_AT_ONCE = Overlap()


def sent_s(collectives: Iterable[PromisedCollective], phase: str) -> float:
    """Of what goes to experts, or back."""
    return sum(
        one.time_s * one.count
        for one in collectives
        if one.kind == "all_to_all" and one.phase == phase
    )


@dataclass(frozen=True, slots=True)
class Streams:
    """``slowdown``: how many times as long either takes while the other is busy, from 1 (they share
    nothing) to 2 (one might as well wait for the other)."""

    slowdown: float

    def exposed_s(self, busy_s: float, beside_s: float) -> float:
        """How much longer ``busy_s`` takes with ``beside_s`` on the other stream.

        >>> Streams(1.25).exposed_s(10.0, 4.0), Streams(1.25).exposed_s(4.0, 10.0)
        (1.0, 7.0)
        """
        both = max(busy_s, beside_s) + (self.slowdown - 1) * min(busy_s, beside_s)
        return both - busy_s

    def hidden_s(self, busy_s: float, beside_s: float) -> float:
        """How much of ``beside_s`` does not show."""
        return beside_s - self.exposed_s(busy_s, beside_s)


@dataclass(frozen=True, slots=True)
class Ahead:
    """Seconds of parameters on the second stream: of one microbatch's forward and backward, and of
    what is reduced once a step. Of each a part has nothing to hide behind: the first gathers, the
    last reductions."""

    forward_s: float = 0.0
    backward_s: float = 0.0
    step_s: float = 0.0
    first_forward_s: float = 0.0
    first_backward_s: float = 0.0
    last_step_s: float = 0.0


def ahead(
    parameters: Sequence[tuple[ParameterEdge, int]],
    costs: Costs,
    overlap: Overlap = NOTHING_AT_ONCE,
) -> Ahead:
    """``parameters``: in the order of their uses, each with how many there are. ``overlap``: with
    how many bytes of an element they travel."""
    gathers = [_gather_s(edge, costs, overlap.gathered_bytes) for edge, _ in parameters]
    reductions = [_reduction_s(edge, costs, overlap) for edge, _ in parameters]
    forward_s = backward_s = step_s = 0.0
    for (edge, count), gather_s, reduction_s in zip(parameters, gathers, reductions, strict=True):
        forward_s += gather_s * count
        backward_s += gather_s * len(edge.regathered) * count
        if edge.per_step:
            step_s += reduction_s * count
        else:
            backward_s += reduction_s * count
    if not parameters:
        return Ahead()
    (first, _), (last, _) = parameters[0], parameters[-1]
    again_s = gathers[-1] if last.regathered else 0.0
    return Ahead(
        forward_s,
        backward_s,
        step_s,
        first_forward_s=gathers[0],
        first_backward_s=again_s + (0.0 if first.per_step else reductions[0]),
        last_step_s=reductions[0] if first.per_step else 0.0,
    )


def moved_s(moved: Iterable[tuple[Transfer, int]], costs: Costs, *, together: bool) -> float:
    """Transfers, each with how many there are, one by one or all of a kind and axis in one."""
    if not together:
        return sum(count * costs.transfer_s(transfer) for transfer, count in moved)
    sizes = Counter[tuple[CollectiveKind, int]]()
    for transfer, count in moved:
        sizes[transfer.kind, transfer.axis] += count * transfer.bytes
    return sum(costs.collective_s(kind, axis, size) for (kind, axis), size in sizes.items())


def copies_s(
    parameters: Sequence[tuple[ParameterEdge, int]], costs: Costs, overlap: Overlap
) -> tuple[float, float]:
    """What becomes of parameters that were gathered before they are used (casts, copies out of the
    buffer), and of their gradients before they are reduced, in a microbatch's forward and
    backward."""
    forward_s = backward_s = 0.0
    for edge, count in (pair for pair in parameters if pair[0].gathers):
        item = ITEM_BYTES[edge.spec.dtype]
        gathered, reduced = overlap.gathered_bytes or item, overlap.reduced_bytes or item
        elements = local_bytes(edge.spec, edge.target, costs.mesh) / item
        if overlap.copies or gathered != item:
            used_s = costs.memory_bound_s(elements * (gathered + item), edge.spec.dtype)
            forward_s += used_s * count
            backward_s += used_s * len(edge.regathered) * count
        if edge.trainable and (overlap.copies or overlap.flat):
            moved = 2 * item if overlap.flat else item + reduced
            backward_s += costs.memory_bound_s(elements * moved, edge.spec.dtype) * count
    return forward_s, backward_s


def _gather_s(edge: ParameterEdge, costs: Costs, item_bytes: int) -> float:
    of = edge.forward_transfers(costs.mesh)
    return sum(costs.transfer_s(_wide(one, edge, item_bytes)) for one in of)


def _reduction_s(edge: ParameterEdge, costs: Costs, overlap: Overlap) -> float:
    """With what is done to a gradient on the second stream before."""
    of = edge.backward_transfers(costs.mesh)
    travels_s = sum(costs.transfer_s(_wide(one, edge, overlap.reduced_bytes)) for one in of)
    if not (overlap.flat and edge.trainable and edge.gathers):
        return travels_s
    item = ITEM_BYTES[edge.spec.dtype]
    reduced = overlap.reduced_bytes or item
    moved = 2 * reduced + (item + reduced) * (reduced != item)
    elements = local_bytes(edge.spec, edge.target, costs.mesh) / item
    return travels_s + costs.memory_bound_s(elements * moved, edge.spec.dtype)


def _wide(of: Transfer, edge: ParameterEdge, item_bytes: int) -> Transfer:
    item = ITEM_BYTES[edge.spec.dtype]
    return replace(of, bytes=of.bytes * (item_bytes or item) // item)


def held_bytes(
    graph: OperatorGraph,
    parameters: Sequence[tuple[ParameterEdge, int]],
    mesh: Mesh,
    gradients_bytes: int = 0,
) -> int:
    """What a device has beside what the operator at hand uses, and beside ``gradients_bytes``.

    The parameters of the next block, and those that are used outside of repeated blocks, which stay
    from their forward to their backward (FSDP does not reshard its root). And what the allocator
    keeps for the other streams, since memory stays with the stream that asked for it: the buffer
    into which the largest of these groups is gathered, and gradients that were reduced, whose
    memory waits for those of the next step (torch/distributed/fsdp/_fully_shard:
    ``foreach_all_gather`` and ``foreach_reduce``).
    """
    starts = {
        operator.name: (block.start, block.copies)
        for block in blocks(graph)
        for operator in graph.operators[block.start : block.stop]
    }
    groups: Counter[int] = Counter()
    reduced = 0
    for edge, count in parameters:
        if edge.gathers:
            start, copies = max(
                (starts.get(name, (-1, 1)) for name in edge.consumers), key=itemgetter(1)
            )
            groups[start] += local_bytes(edge.spec, edge.target, mesh) * count // copies
            if edge.trainable:
                reduced += local_bytes(edge.spec, edge.destination, mesh) * count
    gathered = sum(groups.values()) + max(groups.values(), default=0)
    return gathered + max(0, reduced - gradients_bytes)


@dataclass(frozen=True, slots=True)
class Hidden:
    """What of a step's communication compute hides, by phase, in seconds."""

    forward_s: float
    backward_s: float
    step_s: float


def hidden(
    found: Ahead, streams: Streams, forward_s: float, backward_s: float, times: int
) -> Hidden:
    """``forward_s`` and ``backward_s``: what the first stream does for one of ``times``
    microbatches. Reductions of a step go beside the last backward, after what is beside it anyway.
    """
    beside_forward_s = found.forward_s - found.first_forward_s
    beside_backward_s = found.backward_s - found.first_backward_s
    beside_step_s = found.step_s - found.last_step_s
    left_s = max(0.0, backward_s - beside_backward_s)
    return Hidden(
        times * (beside_forward_s - streams.exposed_s(forward_s, beside_forward_s)),
        times * (beside_backward_s - streams.exposed_s(backward_s, beside_backward_s)),
        beside_step_s - streams.exposed_s(left_s, beside_step_s),
    )


__all__ = [
    "NOTHING_AT_ONCE",
    "Ahead",
    "Hidden",
    "OneByOne",
    "Overlap",
    "Streams",
    "ahead",
    "copies_s",
    "held_bytes",
    "hidden",
    "moved_s",
]
