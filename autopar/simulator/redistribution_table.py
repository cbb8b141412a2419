"""Seconds of many redistributions at once: the steps of ``redistribution``, looked up as arrays.

A sharding is one integer here, its ``code``. The steps between two codes do not depend on sizes, so
they are worked out once and shared by all tensors and all meshes of as many axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

import numpy as np
from numpy.typing import NDArray

from autopar.ir.graph import TensorSpec
from autopar.ir.sharding import (
    INVARIANT,
    Placement,
    Sharding,
    gradient,
    shard,
    sharded_dim,
    sharded_parts,
)
from autopar.simulator.costs import Costs
from autopar.simulator.redistribution import Step, forward_collective, reverse, steps
from cost_models.interface import CollectiveKind

Codes = NDArray[np.int64]
Seconds = NDArray[np.float64]

_FIXED = ("R", "I", "P")
_MOST_DIMS = 13
BASE = 1024
"""Placements a code has room for on one axis."""

_KINDS: tuple[CollectiveKind, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
_NOTHING = 0
_COPY = 1  # a slice, mask or pad inside the device
_CALL = 2  # what was one thing is another from now on: only the host does it
_FIRST = 3  # of the collectives
_LARGER = np.iinfo(np.int64).max  # than any code
_MOST_STEPS = 8  # 6 is the most that 3 axes need

_placements: list[Placement] = [*_FIXED, *(shard(dim) for dim in range(_MOST_DIMS))]
_codes: dict[Placement, int] = {placement: i for i, placement in enumerate(_placements)}
"""Placements with parts get the next number when they are first met."""


def placement_code(placement: Placement) -> int:
    found = _codes.get(placement)
    if found is None:
        assert len(_placements) < BASE, placement
        found = _codes[placement] = len(_placements)
        _placements.append(placement)
    return found


def code(sharding: Sharding) -> int:
    """
    >>> sharding(code(("S(1)", "R")), 2)
    ('S(1)', 'R')
    """
    total = 0
    for placement in sharding:
        total = total * BASE + placement_code(placement)
    return total


@lru_cache(maxsize=None)
def sharding(of_code: int, axes: int) -> Sharding:
    """The sharding that has this code on a mesh of ``axes`` axes."""
    found = []
    for _ in range(axes):
        of_code, digit = divmod(of_code, BASE)
        found.append(_placements[digit])
    return tuple(reversed(found))


def codes(placements: NDArray[np.int64]) -> Codes:
    """Codes of rows of placement codes, one column for each axis."""
    total: Codes = np.zeros(placements.shape[:-1], dtype=np.int64)
    for axis in range(placements.shape[-1]):
        total = total * BASE + placements[..., axis]
    return total


Encoded = tuple[tuple[int, ...], tuple[int, ...]]
"""The steps of a path: what each does, and the mask of axes that divide its buffer."""


@dataclass
class Paths:
    """The steps between pairs of codes, numbered; many pairs have the same steps.

    ``what`` is nothing, a copy, a call, or 3 + kind * axes + axis; the buffer of the step is the
    whole tensor divided by the axes in the bits of ``mask``.
    """

    axes: int
    _patterns: dict[tuple[int, ...], int] = field(default_factory=dict)
    _encoded: dict[tuple[Encoded, Encoded], int] = field(default_factory=dict)
    _codes: list[int] = field(default_factory=list)
    _sorted: Codes = field(default_factory=lambda: np.array([_LARGER]))
    _places: NDArray[np.int64] = field(default_factory=lambda: np.array([-1]))
    _matrix: NDArray[np.int64] = field(default_factory=lambda: np.full((64, 64), -1))
    _collective: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool))
    _arrays: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None

    def pairs(self, sources: Codes, targets: Codes) -> NDArray[np.int64]:
        """Numbers for arrays of the same shape."""
        return self._numbers_at(self._place(sources), self._place(targets))

    def block(self, sources: Codes, targets: Codes) -> NDArray[np.int64]:
        """Numbers for every source (rows) with every target (columns)."""
        rows, columns = self._place(sources), self._place(targets)
        return self._numbers_at(
            np.broadcast_to(rows[:, None], (len(rows), len(columns))),
            np.broadcast_to(columns[None, :], (len(rows), len(columns))),
        )

    def _place(self, found: Codes) -> NDArray[np.int64]:
        """Where codes stand in the matrix of all pairs met so far."""
        at = np.searchsorted(self._sorted, found)
        if (self._sorted[at] != found).any():
            self._sorted = np.union1d(self._sorted, found)
            self._codes += np.setdiff1d(found, self._codes).tolist()
            self._places = np.append(np.argsort(self._codes), -1)
            at = np.searchsorted(self._sorted, found)
        places = self._places[at]
        if (size := len(self._codes)) > len(self._matrix):
            larger = np.full((2 * size, 2 * size), -1)
            larger[: len(self._matrix), : len(self._matrix)] = self._matrix
            self._matrix = larger
        return np.asarray(places)

    def _numbers_at(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
        found = self._matrix[rows, columns]
        if (found < 0).any():
            unknown = found < 0
            places = rows[unknown], columns[unknown]
            met = np.array(self._codes)
            rows_alike = _rows_alike(met[places[0]], met[places[1]], self.axes)
            self._matrix[places] = [self._number(tuple(row)) for row in rows_alike.tolist()]
            found = self._matrix[rows, columns]
        return found

    def communicates(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the forward of each path has a collective."""
        if len(self._collective) != self.count:
            self._collective = np.asarray((self.arrays()[0][:, 0] >= _FIRST).any(axis=-1))
        return self._collective[numbers]

    @property
    def count(self) -> int:
        return len(self._encoded)

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``what`` and ``mask`` as (numbers, forward or backward, steps)."""
        if self._arrays is None or len(self._arrays[0]) != self.count:
            what = [(there[0], back[0]) for there, back in self._encoded]
            mask = [(there[1], back[1]) for there, back in self._encoded]
            self._arrays = np.asarray(what), np.asarray(mask)
        return self._arrays

    def _number(self, pattern: tuple[int, ...]) -> int:
        found = self._patterns.get(pattern)
        if found is None:
            placed = [_placements[digit] for digit in pattern]
            a, b = tuple(placed[: self.axes]), tuple(placed[self.axes :])
            path = steps(a, b)
            there = self._encode(a, path)
            back = self._encode(gradient(b), [reverse(step) for step in reversed(path)])
            found = self._encoded.setdefault((there, back), len(self._encoded))
            self._patterns[pattern] = found
        return found

    def _encode(self, start: Sharding, path: Sequence[Step]) -> Encoded:
        what, mask = [_NOTHING] * _MOST_STEPS, [0] * _MOST_STEPS
        before = sum(1 << axis for axis, placement in enumerate(start) if placement[0] == "S")
        for i, step in enumerate(path):
            bit = 1 << step.axis
            after = before | bit if step.target[0] == "S" else before & ~bit
            kind = forward_collective(step)
            if kind is not None:
                what[i] = _FIRST + _KINDS.index(kind) * self.axes + step.axis
                mask[i] = before & after  # the larger buffer is divided by fewer axes
            elif step.target[0] in "SP":
                what[i], mask[i] = _COPY, after
            else:
                what[i] = _CALL
            before = after
        return tuple(what), tuple(mask)


def _rows_alike(sources: Codes, targets: Codes, axes: int) -> NDArray[np.int64]:
    """Placement codes of each source and target, in rows that are equal where the steps are: these
    do not depend on which dims are cut, only on which are the same, nor on what is whole on an axis
    and stays as it is."""
    shift = BASE ** np.arange(axes - 1, -1, -1)
    found = np.concatenate([of[:, None] // shift % BASE for of in (sources, targets)], axis=1)
    used, of_used = np.unique(found, return_inverse=True)
    dims = [sharded_dim(_placements[digit]) for digit in used]
    dim = np.array([-1 if d is None else d for d in dims])[of_used.reshape(found.shape)]
    # dims are numbered in the order in which they are met
    number = np.full(found.shape, -1)
    count = np.zeros(len(found), dtype=np.int64)
    for column in range(found.shape[1]):
        new = dim[:, column] >= 0
        for earlier in range(column):
            same = new & (dim[:, earlier] == dim[:, column])
            number[same, column] = number[same, earlier]
            new &= ~same
        number[new, column] = count[new]
        count += new
    for digit in used[[d is not None for d in dims]]:
        parts = sharded_parts(_placements[digit])
        of_digit = found == digit
        renamed = np.array([placement_code(shard(d, parts)) for d in range(2 * axes)])
        number[of_digit] = renamed[number[of_digit]]
    found = np.where(dim < 0, found, number)
    there, back = found[:, :axes], found[:, axes:]
    stays = (there == back) & (dim[:, :axes] < 0)
    whole = placement_code(INVARIANT)
    return np.concatenate([np.where(stays, whole, there), np.where(stays, whole, back)], axis=1)


@lru_cache(maxsize=None)
def paths(axes: int) -> Paths:
    """The paths of all meshes with this many axes."""
    return Paths(axes)


@dataclass
class RedistributionTable:
    """Redistribution seconds on one mesh, equal to ``Costs.redistribution_s``, for whole arrays."""

    costs: Costs
    _steps: dict[tuple[int, str], Seconds] = field(default_factory=dict)
    _times: dict[tuple[int, str, bool], tuple[int, Seconds]] = field(default_factory=dict)

    @property
    def paths(self) -> Paths:
        return paths(len(self.costs.mesh.axes))

    def seconds(
        self, spec: TensorSpec, numbers: NDArray[np.int64], *, copies: bool = True
    ) -> tuple[Seconds, Seconds]:
        """Forward and backward seconds for an array of path numbers; without ``copies`` the
        collectives alone."""
        found = self._path_seconds(spec, copies)[numbers]
        return found[..., 0], found[..., 1]

    def _path_seconds(self, spec: TensorSpec, copies: bool) -> Seconds:
        """Forward and backward seconds of every path met so far."""
        key = (spec.bytes, spec.dtype, copies)
        known, times = self._times.get(key, (0, np.zeros((0, 2))))
        if known != self.paths.count:
            what, mask = self.paths.arrays()
            by_step = self._step_seconds(spec)
            if not copies:
                by_step = by_step.copy()
                by_step[[_COPY, _CALL]] = 0.0
            new = by_step[what[known:], mask[known:]].sum(axis=-1)
            times = np.concatenate([times, new])
            self._times[key] = (self.paths.count, times)
        return times

    def _step_seconds(self, spec: TensorSpec) -> Seconds:
        """Seconds by (what, mask)."""
        key = (spec.bytes, spec.dtype)
        found = self._steps.get(key)
        if found is None:
            mesh = self.costs.mesh
            axes = len(mesh.axes)
            found = np.zeros((_FIRST + len(_KINDS) * axes, 1 << axes))
            found[[_COPY, _CALL]] = self.costs.host.step_s
            for mask in range(1 << axes):
                cut = prod(size for axis, size in enumerate(mesh.sizes) if mask >> axis & 1)
                local_bytes = spec.bytes // cut
                if local_bytes == 0:
                    continue
                found[_COPY, mask] += self.costs.memory_bound_s(2.0 * local_bytes, spec.dtype)
                for kind in range(len(_KINDS)):
                    for axis in range(axes):
                        found[_FIRST + kind * axes + axis, mask] = self.costs.collective_s(
                            _KINDS[kind], axis, local_bytes
                        )
            self._steps[key] = found
        return found
