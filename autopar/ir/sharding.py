"""How a tensor lies on a mesh: one placement for each mesh axis."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from math import gcd, prod

REPLICATE = "R"  # whole on every rank, used for different work; its gradient is still to be summed
INVARIANT = "I"  # whole on every rank, used for the same work; so is its gradient
PARTIAL = "P"  # still to be summed; its gradient is replicated

Placement = str
"""``"R"``, ``"I"``, ``"P"``, ``"S(dim)"``, or ``"S(dim,parts)"`` for a dim of several parts, one
after the other, each of which is divided: a rank holds its chunk of the first, of the second, ...
``"S(1,3)"``: dim 1 is three equal parts; ``"S(0,4:1:1)"``: the first is four times the others."""

Parts = tuple[int, ...]
"""Relative sizes of the parts of a dim, without a common divisor; ``()``: it is divided as one."""

Sharding = tuple[Placement, ...]
"""A placement for each mesh axis. A dim that several axes shard is cut by the first of them first:
rank (i, j) of a (2, 4) mesh holds chunk ``4 * i + j`` of a dim that is ``S`` on both. Those that
divide one dim agree on its parts."""


@lru_cache(maxsize=None)
def shard(dim: int, parts: Parts = ()) -> Placement:
    """
    >>> shard(1), shard(1, (1, 1, 1)), shard(0, (4, 1, 1))
    ('S(1)', 'S(1,3)', 'S(0,4:1:1)')
    """
    if not parts:
        return f"S({dim})"
    assert len(parts) > 1 and gcd(*parts) == 1, parts
    equal = len(set(parts)) == 1
    return f"S({dim},{len(parts) if equal else ':'.join(map(str, parts))})"


@lru_cache(maxsize=None)
def sharded_dim(placement: Placement) -> int | None:
    """The dim that ``S(dim)`` divides, ``None`` for the other placements."""
    return int(placement[2:-1].partition(",")[0]) if placement.startswith("S") else None


@lru_cache(maxsize=None)
def sharded_parts(placement: Placement) -> Parts:
    """The parts of the dim that are divided each, ``()`` where there are none.

    >>> sharded_parts("S(1,3)"), sharded_parts("S(0,4:1:1)"), sharded_parts("S(0)")
    ((1, 1, 1), (4, 1, 1), ())
    """
    text = placement[2:-1].partition(",")[2]
    if not text:
        return ()
    return tuple(map(int, text.split(":"))) if ":" in text else (1,) * int(text)


def part_sizes(length: int, parts: Parts) -> tuple[int, ...]:
    """Sizes of the parts of a dim of ``length``.

    >>> part_sizes(12, (4, 1, 1)), part_sizes(12, ())
    ((8, 2, 2), (12,))
    """
    weights = parts or (1,)
    assert length % sum(weights) == 0, (length, parts)
    return tuple(length // sum(weights) * weight for weight in weights)


GRADIENT = {REPLICATE: PARTIAL, PARTIAL: REPLICATE, INVARIANT: INVARIANT}


def gradient(sharding: Sharding) -> Sharding:
    """How the gradient lies, which the forward placement fixes.

    >>> gradient(("S(0)", "R", "P", "I"))
    ('S(0)', 'P', 'R', 'I')
    """
    return tuple(GRADIENT.get(placement, placement) for placement in sharding)


@dataclass(frozen=True)
class Mesh:
    """Named logical axes; the last varies fastest over the ranks.

    >>> Mesh((("data", 2), ("tensor", 4))).strides
    (4, 1)
    """

    axes: tuple[tuple[str, int], ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.axes)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return _sizes(self.axes)

    @cached_property
    def size(self) -> int:
        return prod(self.sizes)

    @cached_property
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


@lru_cache(maxsize=1024)
def _sizes(axes: tuple[tuple[str, int], ...]) -> tuple[int, ...]:
    return tuple(size for _, size in axes)


def shards_of(sharding: Sharding, dim: int, mesh: Mesh) -> int:
    """Into how many pieces ``dim`` is cut."""
    return prod(n for p, n in zip(sharding, mesh.sizes, strict=True) if sharded_dim(p) == dim)


def pieces(sharding: Sharding, mesh: Mesh) -> int:
    """Into how many different parts a tensor is cut.

    >>> pieces(("S(0)", "I"), Mesh((("a", 4), ("b", 2))))
    4
    """
    return prod(n for p, n in zip(sharding, mesh.sizes, strict=True) if sharded_dim(p) is not None)


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


def local_elements(shape: tuple[int, ...], sharding: Sharding, mesh: Mesh) -> int:
    """How many numbers every rank holds. Where devices do not divide them, ranks hold as many as
    the first: so do programs that keep parameters as one run of numbers, which they pad. Plans
    that are run never do.

    >>> mesh = Mesh((("data", 4),))
    >>> local_elements((8, 6), ("S(0)",), mesh), local_elements((5, 5), ("S(0)",), mesh)
    (12, 7)
    """
    return -(-prod(shape) // pieces(sharding, mesh))


Ranges = tuple[tuple[int, int], ...]
"""(start, stop) of pieces of a dim that lie one after the other in a local tensor."""


def local_ranges(
    shape: tuple[int, ...], sharding: Sharding, mesh: Mesh, rank: int
) -> tuple[Ranges, ...]:
    """For each dim of the global tensor, what ``rank`` holds of it.

    >>> mesh = Mesh((("a", 2), ("b", 2)))
    >>> local_ranges((8,), ("S(0)", "S(0)"), mesh, rank=1)
    (((2, 4),),)
    >>> local_ranges((8,), ("S(0,2)", "R"), mesh, rank=2)
    (((2, 4), (6, 8)),)
    """
    found: list[Ranges] = [((0, size),) for size in shape]
    divided: dict[int, Placement] = {}
    for placement, size, coordinate in zip(
        sharding, mesh.sizes, mesh.coordinates(rank), strict=True
    ):
        dim = sharded_dim(placement)
        if dim is None:
            continue
        if divided.setdefault(dim, placement) != placement:
            raise AssertionError(f"{sharding}: the axes do not agree on the parts of dim {dim}")
        if len(found[dim]) == 1:
            stops = tuple(accumulate(part_sizes(shape[dim], sharded_parts(placement))))
            if len(stops) > 1:
                found[dim] = tuple(zip((0, *stops), stops, strict=False))
        pieces = []
        for start, stop in found[dim]:
            assert (stop - start) % size == 0, (shape, sharding, mesh)
            length = (stop - start) // size
            pieces.append((start + coordinate * length, start + (coordinate + 1) * length))
        found[dim] = tuple(pieces)
    return tuple(found)
