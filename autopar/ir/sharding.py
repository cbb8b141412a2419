"""How a tensor lies on a mesh: one placement for each mesh axis."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

REPLICATE = "R"  # whole on every rank, used for different work; its gradient is still to be summed
INVARIANT = "I"  # whole on every rank, used for the same work; so is its gradient
PARTIAL = "P"  # still to be summed; its gradient is replicated

Placement = str
"""``"R"``, ``"I"``, ``"P"`` or ``"S(dim)"``."""

Sharding = tuple[Placement, ...]
"""A placement for each mesh axis. A dim that several axes shard is cut by the first of them first:
rank (i, j) of a (2, 4) mesh holds chunk ``4 * i + j`` of a dim that is ``S`` on both."""


@lru_cache(maxsize=None)
def shard(dim: int) -> Placement:
    """
    >>> shard(1)
    'S(1)'
    """
    return f"S({dim})"


@lru_cache(maxsize=None)
def sharded_dim(placement: Placement) -> int | None:
    """The dim that ``S(dim)`` divides, ``None`` for the other placements."""
    return int(placement[2:-1]) if placement.startswith("S") else None


GRADIENT = {REPLICATE: PARTIAL, PARTIAL: REPLICATE, INVARIANT: INVARIANT}


def gradient(sharding: Sharding) -> Sharding:
    """How the gradient lies, which the forward placement fixes.

    >>> gradient(("S(0)", "R", "P", "I"))
    ('S(0)', 'P', 'R', 'I')
    """
    return tuple(GRADIENT.get(placement, placement) for placement in sharding)


@dataclass(frozen=True, slots=True)
class Mesh:
    """Named logical axes; the last varies fastest over the ranks.

    >>> Mesh((("data", 2), ("tensor", 4))).strides
    (4, 1)
    """

    axes: tuple[tuple[str, int], ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.axes)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(size for _, size in self.axes)

    @property
    def size(self) -> int:
        return prod(self.sizes)

    @property
    def strides(self) -> tuple[int, ...]:
        """Distance in ranks between neighbours on each axis."""
        return tuple(prod(self.sizes[i + 1 :]) for i in range(len(self.axes)))

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """
        >>> Mesh((("data", 2), ("tensor", 4))).coordinates(5)
        (1, 1)
        """
        return tuple(rank // s % n for s, n in zip(self.strides, self.sizes, strict=True))

    def group(self, axis: int, rank: int) -> tuple[int, ...]:
        """The ranks that differ from ``rank`` on ``axis`` only."""
        stride, size = self.strides[axis], self.sizes[axis]
        first = rank - self.coordinates(rank)[axis] * stride
        return tuple(first + i * stride for i in range(size))


def shards_of(sharding: Sharding, dim: int, mesh: Mesh) -> int:
    """Into how many pieces ``dim`` is cut."""
    here = shard(dim)
    return prod(n for p, n in zip(sharding, mesh.sizes, strict=True) if p == here)


def local_shape(shape: tuple[int, ...], sharding: Sharding, mesh: Mesh) -> tuple[int, ...]:
    """The shape that every rank holds; splits divide exactly, so it is the same on all.

    >>> local_shape((8, 6), ("S(0)", "S(1)"), Mesh((("data", 2), ("tensor", 3))))
    (4, 2)
    """
    cut = list(shape)
    for placement, size in zip(sharding, mesh.sizes, strict=True):
        dim = sharded_dim(placement)
        if dim is not None:
            assert cut[dim] % size == 0, (shape, sharding, mesh)
            cut[dim] //= size
    return tuple(cut)


def local_box(
    shape: tuple[int, ...], sharding: Sharding, mesh: Mesh, rank: int
) -> tuple[tuple[int, int], ...]:
    """(start, stop) of ``rank``'s slice in each dim of the global tensor.

    >>> local_box((8,), ("S(0)", "S(0)"), Mesh((("a", 2), ("b", 2))), rank=1)
    ((2, 4),)
    """
    box = [(0, size) for size in shape]
    for placement, size, coordinate in zip(
        sharding, mesh.sizes, mesh.coordinates(rank), strict=True
    ):
        dim = sharded_dim(placement)
        if dim is not None:
            start, stop = box[dim]
            length = (stop - start) // size
            box[dim] = (start + coordinate * length, start + (coordinate + 1) * length)
    return tuple(box)
