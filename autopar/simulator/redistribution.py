"""From one sharding to another: which collectives, in which order, forward and backward.

The searcher prices these steps, the runtime executes them, the verifier counts them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from autopar.ir.sharding import (
    GRADIENT,
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
    source, target = step.source, step.target
    return Step(step.axis, GRADIENT.get(target, target), GRADIENT.get(source, source))


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
    cut, wanted = list(map(sharded_dim, source)), list(map(sharded_dim, target))

    def change(axis: int, placement: Placement) -> None:
        done.append(Step(axis, current[axis], placement))
        current[axis], cut[axis] = placement, sharded_dim(placement)

    while open_axes := [a for a in range(len(target)) if current[a] != target[a]]:
        possible = [
            a
            for a in open_axes
            if not _blockers(cut, a, wanted[a]) and not _too_early(cut, wanted, a, open_axes)
        ]
        if possible:
            axis = min(possible, key=lambda a: _growth(current[a], target[a]))
            change(axis, INVARIANT if _other_parts(current[axis], target[axis]) else target[axis])
            continue
        # every open axis waits for a later one on the same dim: gather the last such
        blocker = max(b for a in open_axes for b in _blockers(cut, a, wanted[a]))
        change(blocker, INVARIANT if target[blocker] == INVARIANT else REPLICATE)
    return tuple(done)


def _other_parts(source: Placement, target: Placement) -> bool:
    """Whether one dim is divided otherwise."""
    dim = sharded_dim(source)
    return dim is not None and dim == sharded_dim(target)


def _blockers(cut: list[int | None], axis: int, wanted: int | None) -> list[int]:
    """Later axes that cut a dim which this step cuts or joins."""
    joined = cut[axis]
    return [
        b
        for b in range(axis + 1, len(cut))
        if (dim := cut[b]) is not None and dim in (joined, wanted)
    ]


def _too_early(
    cut: list[int | None], wanted: list[int | None], axis: int, open_axes: list[int]
) -> bool:
    """Whether an earlier axis has still to cut or join the dim that this step would cut."""
    dim = wanted[axis]
    return dim is not None and any(dim == cut[a] or dim == wanted[a] for a in open_axes if a < axis)


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
            global_bytes = -(-global_bytes // size)
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
