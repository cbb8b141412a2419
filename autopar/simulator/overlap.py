"""Communication beside compute: parameters gathered ahead, gradients reduced while others are made.

What programs such as FSDP and DeepSpeed's ZeRO do: a second stream gathers the parameters of the
next operators and reduces the gradients of those before, while the first computes and moves
activations. Both slow down while both are busy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

from autopar.ir.graph import OperatorGraph
from autopar.ir.sharding import Mesh
from autopar.simulator.blocks import blocks
from autopar.simulator.costs import Costs
from autopar.simulator.edges import ParameterEdge
from autopar.simulator.memory import local_bytes


@dataclass(frozen=True, slots=True)
class Overlap:
    """What the program that runs a strategy does at once; nothing, where it does one thing after
    the other, as ``autopar run`` does and as searches count.

    ``launches``: its host prepares kernels and collectives while the device is busy with earlier
    ones, so that a pass takes what the busier of the two takes. ``parameters``: a second stream
    gathers them ahead, and reduces gradients beside the backward. ``sums``: the gradient of a
    product's input is summed beside the product that gives the gradient of its weight.
    """

    launches: bool = False
    parameters: bool = False
    sums: bool = False


NOTHING_AT_ONCE = Overlap()


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


def ahead(parameters: Sequence[tuple[ParameterEdge, int]], costs: Costs) -> Ahead:
    """``parameters``: in the order of their uses, each with how many there are."""
    gathers = [_gather_s(edge, costs) for edge, _ in parameters]
    reductions = [_reduction_s(edge, costs) for edge, _ in parameters]
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


def _gather_s(edge: ParameterEdge, costs: Costs) -> float:
    return sum(map(costs.transfer_s, edge.forward_transfers(costs.mesh)))


def _reduction_s(edge: ParameterEdge, costs: Costs) -> float:
    return sum(map(costs.transfer_s, edge.backward_transfers(costs.mesh)))


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
    "Overlap",
    "Streams",
    "ahead",
    "held_bytes",
    "hidden",
]
