"""Collectives on numpy arrays, one for each rank: the slow obvious way to redistribute."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from autopar.ir.sharding import (
    Mesh,
    Placement,
    Sharding,
    local_ranges,
    part_sizes,
    sharded_dim,
    sharded_parts,
)
from autopar.simulator.redistribution import Step

Array = NDArray[np.float64]
State = list[Array]
"""What each rank of a mesh holds."""


def scatter(value: Array, sharding: Sharding, mesh: Mesh, rng: np.random.Generator) -> State:
    """``value`` as it lies in ``sharding``; what is partial are random parts of the sum."""
    ranks: State = [np.empty(0)] * mesh.size
    partial = [axis for axis, placement in enumerate(sharding) if placement == "P"]
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(mesh.size):
        where = mesh.coordinates(rank)
        groups.setdefault(tuple(c for a, c in enumerate(where) if a not in partial), []).append(
            rank
        )
    parts_of: dict[object, list[Array]] = {}
    for group in groups.values():
        box = local_ranges(value.shape, sharding, mesh, group[0])
        here = held(value, sharding, mesh, group[0])
        if box not in parts_of:  # ranks that hold the same slice hold the same parts of it
            parts = [rng.standard_normal(here.shape) for _ in group[1:]]
            parts_of[box] = [here - sum(parts, np.zeros_like(here)), *parts]
        for rank, part in zip(group, parts_of[box], strict=True):
            ranks[rank] = part
    return ranks


def held(value: Array, sharding: Sharding, mesh: Mesh, rank: int) -> Array:
    """What a rank has of a value that no axis leaves partial."""
    along = [
        [index for bounds in ranges for index in range(*bounds)]
        for ranges in local_ranges(value.shape, sharding, mesh, rank)
    ]
    return value[np.ix_(*along)]


def represents(state: Sequence[Array], value: Array, sharding: Sharding, mesh: Mesh) -> bool:
    """Whether every rank holds what ``sharding`` says of ``value``."""
    for rank in range(mesh.size):
        group = {rank}
        for axis, placement in enumerate(sharding):
            if placement == "P":
                group = {other for member in group for other in mesh.group(axis, member)}
        total = sum((state[r] for r in sorted(group)), np.zeros_like(state[rank]))
        expected = held(value, sharding, mesh, rank)
        if total.shape != expected.shape or not np.allclose(total, expected, atol=1e-9):
            return False
    return True


def pairing(values: Sequence[Array], gradients: Sequence[Array], of: Sharding, mesh: Mesh) -> float:
    """The inner product of a tensor with its gradient: ranks that are invariant count once."""
    once = prod(n for p, n in zip(of, mesh.sizes, strict=True) if p == "I")
    total = sum(float((v * g).sum()) for v, g in zip(values, gradients, strict=True))
    return total / once


def move(state: Sequence[Array], step: Step, mesh: Mesh) -> State:
    """One step, as its collective does it."""
    return [_received(state, step, mesh, rank) for rank in range(mesh.size)]


def _received(state: Sequence[Array], step: Step, mesh: Mesh, rank: int) -> Array:
    group = mesh.group(step.axis, rank)
    place = mesh.coordinates(rank)[step.axis]
    source, target = step.source, step.target
    if source == "P":
        value = sum((state[r] for r in group), np.zeros_like(state[rank]))
        return _slice(value, target, place, len(group)) if target[0] == "S" else value
    if source[0] == "S":
        return _from_shards(state, step, group, place)
    if target[0] == "S":
        return _slice(state[rank], target, place, len(group))
    if target == "P":
        return state[rank] if place == 0 else np.zeros_like(state[rank])
    return state[rank]


def _from_shards(state: Sequence[Array], step: Step, group: tuple[int, ...], place: int) -> Array:
    if step.target == "P":
        pieces = [state[r] if i == place else 0.0 * state[r] for i, r in enumerate(group)]
        return _joined(pieces, step.source)
    whole = _joined([state[r] for r in group], step.source)
    return _slice(whole, step.target, place, len(group)) if step.target[0] == "S" else whole


def _joined(pieces: Sequence[Array], placement: Placement) -> Array:
    """Each part of the dim from the shares that the pieces have of it."""
    dim = sharded_dim(placement)
    assert dim is not None
    shares = [_parts(piece, placement) for piece in pieces]
    return np.concatenate([share for part in zip(*shares, strict=True) for share in part], dim)


def _slice(value: Array, target: Placement, place: int, pieces: int) -> Array:
    dim = sharded_dim(target)
    assert dim is not None
    return np.concatenate(
        [np.split(part, pieces, axis=dim)[place] for part in _parts(value, target)], axis=dim
    )


def _parts(value: Array, placement: Placement) -> list[Array]:
    dim = sharded_dim(placement)
    assert dim is not None
    sizes = part_sizes(value.shape[dim], sharded_parts(placement))
    return np.split(value, np.cumsum(sizes)[:-1], axis=dim)
