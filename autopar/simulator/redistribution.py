"""From one sharding to another: which collectives, in which order, forward and backward.

The searcher prices these steps, the runtime executes them, the verifier counts them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from autopar.ir.sharding import (
    INVARIANT,
    REPLICATE,
    Mesh,
    Placement,
    Sharding,
    gradient,
    sharded_dim,
)
from cost_models.interface import CollectiveKind


@dataclass(frozen=True, slots=True)
class Step:
    """One mesh axis changes its placement."""

    axis: int
    source: Placement
    target: Placement


def _kind(placement: Placement) -> str:
    return placement[0]


FORWARD: dict[tuple[str, str], CollectiveKind | None] = {
    ("S", "R"): "all_gather",
    ("S", "I"): "all_gather",
    ("S", "S"): "all_to_all",
    ("S", "P"): None,  # own slice, zeros elsewhere
    ("R", "S"): None,  # slice
    ("R", "I"): None,
    ("R", "P"): None,  # kept on the first rank, zeros elsewhere
    ("I", "S"): None,  # slice
    ("I", "R"): None,
    ("I", "P"): None,  # kept on the first rank, zeros elsewhere
    ("P", "S"): "reduce_scatter",
    ("P", "R"): "all_reduce",
    ("P", "I"): "all_reduce",
}
"""The collective that takes a tensor from one placement to another, ``None`` where each rank has
what it needs. The backward of (a, b) is the forward of (gradient(b), gradient(a))."""


def forward_collective(step: Step) -> CollectiveKind | None:
    return FORWARD[_kind(step.source), _kind(step.target)]


def reverse(step: Step) -> Step:
    """What the step does to the gradient.

    >>> reverse(Step(0, "S(0)", "R"))
    Step(axis=0, source='P', target='S(0)')
    """
    (source,), (target,) = gradient((step.source,)), gradient((step.target,))
    return Step(step.axis, target, source)


def backward_collective(step: Step) -> CollectiveKind | None:
    return forward_collective(reverse(step))


@lru_cache(maxsize=None)
def steps(source: Sharding, target: Sharding) -> tuple[Step, ...]:
    """The steps from ``source`` to ``target``, one axis each.

    Those that make the tensor smaller come first, those that make it larger last. A step on an axis
    that cuts a dim is only possible when no later axis cuts the same dim (it would have to move the
    pieces of pieces); such a later axis is gathered first and cut again after. So is a dim that is
    to be cut into other parts.

    >>> steps(("P", "S(1)"), ("S(0)", "R"))
    (Step(axis=0, source='P', target='S(0)'), Step(axis=1, source='S(1)', target='R'))
    >>> [s.axis for s in steps(("S(0)", "S(0)"), ("R", "S(0)"))]
    [1, 0, 1]
    >>> [s.target for s in steps(("S(0,3)",), ("S(0)",))]
    ['I', 'S(0)']
    """
    done: list[Step] = []
    current = list(source)

    def change(axis: int, placement: Placement) -> None:
        done.append(Step(axis, current[axis], placement))
        current[axis] = placement

    while tuple(current) != target:
        open_axes = [a for a in range(len(target)) if current[a] != target[a]]
        possible = [
            a
            for a in open_axes
            if not _blockers(current, a, target[a]) and not _too_early(current, a, target)
        ]
        if possible:
            axis = min(possible, key=lambda a: (_growth(current[a], target[a]), a))
            change(axis, INVARIANT if _other_parts(current[axis], target[axis]) else target[axis])
            continue
        # every open axis waits for a later one on the same dim: gather the last such
        blocker = max(b for a in open_axes for b in _blockers(current, a, target[a]))
        change(blocker, INVARIANT if target[blocker] == INVARIANT else REPLICATE)
    return tuple(done)


def _other_parts(source: Placement, target: Placement) -> bool:
    """Whether one dim is divided otherwise."""
    dim = sharded_dim(source)
    return dim is not None and dim == sharded_dim(target)


def _blockers(current: list[Placement], axis: int, target: Placement) -> list[int]:
    """Later axes that cut a dim which this step cuts or joins."""
    dims = {sharded_dim(current[axis]), sharded_dim(target)} - {None}
    return [b for b in range(axis + 1, len(current)) if sharded_dim(current[b]) in dims]


def _too_early(current: list[Placement], axis: int, target: Sharding) -> bool:
    """Whether an earlier axis has still to cut or join the dim that this step would cut."""
    dim = sharded_dim(target[axis])
    return dim is not None and any(
        current[a] != target[a] and dim in (sharded_dim(current[a]), sharded_dim(target[a]))
        for a in range(axis)
    )


_GROWTH = {"P>S": 0, "I>S": 0, "R>S": 0, "S>S": 1, "S>R": 3, "S>I": 3, "S>P": 3}


def _growth(source: Placement, target: Placement) -> int:
    if _other_parts(source, target):
        return _GROWTH["S>I"]
    return _GROWTH.get(f"{_kind(source)}>{_kind(target)}", 2)


@dataclass(frozen=True, slots=True)
class Transfer:
    """A collective of a redistribution: on which mesh axis, and the bytes of its largest buffer."""

    kind: CollectiveKind
    axis: int
    bytes: int


def transfers(
    source: Sharding, target: Sharding, global_bytes: int, mesh: Mesh, *, backward: bool = False
) -> tuple[Transfer, ...]:
    """The collectives, in order, for a tensor of ``global_bytes`` in all.

    ``backward``: those of its gradient, when the forward went from ``source`` to ``target``.
    """
    path = steps(source, target)
    if backward:
        path = tuple(reverse(step) for step in reversed(path))
        current = list(gradient(target))
    else:
        current = list(source)
    found = []
    for step in path:
        before = _local_bytes(current, global_bytes, mesh)
        current[step.axis] = step.target
        after = _local_bytes(current, global_bytes, mesh)
        kind = forward_collective(step)
        if kind is not None:
            found.append(Transfer(kind, step.axis, max(before, after)))
    return tuple(found)


def _local_bytes(sharding: list[Placement], global_bytes: int, mesh: Mesh) -> int:
    for placement, size in zip(sharding, mesh.sizes, strict=True):
        if sharded_dim(placement) is not None:
            assert global_bytes % size == 0
            global_bytes //= size
    return global_bytes


__all__ = [
    "FORWARD",
    "Step",
    "Transfer",
    "backward_collective",
    "forward_collective",
    "reverse",
    "steps",
    "transfers",
]
