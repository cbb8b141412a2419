"""Collectives on numpy arrays, one for each rank: the slow obvious way to redistribute."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from autopar.ir.sharding import Mesh, Placement, Sharding, local_box, sharded_dim
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
    parts_of: dict[tuple[tuple[int, int], ...], list[Array]] = {}
    for group in groups.values():
        box = local_box(value.shape, sharding, mesh, group[0])
        here = value[tuple(slice(*bounds) for bounds in box)]
        if box not in parts_of:  # ranks that hold the same slice hold the same parts of it
            parts = [rng.standard_normal(here.shape) for _ in group[1:]]
            parts_of[box] = [here - sum(parts, np.zeros_like(here)), *parts]
        for rank, part in zip(group, parts_of[box], strict=True):
            ranks[rank] = part
    return ranks


def represents(state: Sequence[Array], value: Array, sharding: Sharding, mesh: Mesh) -> bool:
    """Whether every rank holds what ``sharding`` says of ``value``."""
    for rank in range(mesh.size):
        group = {rank}
        for axis, placement in enumerate(sharding):
            if placement == "P":
                group = {other for member in group for other in mesh.group(axis, member)}
        total = sum((state[r] for r in sorted(group)), np.zeros_like(state[rank]))
        box = local_box(value.shape, sharding, mesh, rank)
        expected = value[tuple(slice(*bounds) for bounds in box)]
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
    dim = sharded_dim(step.source)
    assert dim is not None
    if step.target == "P":
        pieces = [state[r] if i == place else 0.0 * state[r] for i, r in enumerate(group)]
        return np.concatenate(pieces, axis=dim)
    whole = np.concatenate([state[r] for r in group], axis=dim)
    return _slice(whole, step.target, place, len(group)) if step.target[0] == "S" else whole


def _slice(value: Array, target: Placement, place: int, pieces: int) -> Array:
    dim = sharded_dim(target)
    assert dim is not None
    return np.split(value, pieces, axis=dim)[place]
