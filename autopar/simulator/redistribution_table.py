"""Seconds of many redistributions at once: the steps of ``redistribution``, looked up as arrays.

A sharding is one integer here, its ``code``. The steps between two codes do not depend on sizes, so
they are worked out once and shared by all tensors and all meshes of as many axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopar.ir.graph import TensorSpec
from autopar.ir.sharding import Placement, Sharding, gradient, shard, sharded_dim
from autopar.simulator.costs import Costs
from autopar.simulator.redistribution import Step, forward_collective, reverse, steps
from cost_models.interface import CollectiveKind

Codes = NDArray[np.int64]
Seconds = NDArray[np.float64]

_FIXED = ("R", "I", "P")
_MOST_DIMS = 13
BASE = len(_FIXED) + _MOST_DIMS
"""Placements a code has room for on one axis."""

_KINDS: tuple[CollectiveKind, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
_NOTHING = 0
_COPY = 1  # a slice, mask or pad inside the device
_MOST_STEPS = 8  # 5 is the most that 3 axes need


def placement_code(placement: Placement) -> int:
    dim = sharded_dim(placement)
    return _FIXED.index(placement) if dim is None else len(_FIXED) + dim


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
        found.append(_FIXED[digit] if digit < len(_FIXED) else shard(digit - len(_FIXED)))
    return tuple(reversed(found))


def codes(placements: NDArray[np.int64]) -> Codes:
    """Codes of rows of placement codes, one column for each axis."""
    total: Codes = np.zeros(placements.shape[:-1], dtype=np.int64)
    for axis in range(placements.shape[-1]):
        total = total * BASE + placements[..., axis]
    return total


@dataclass
class Paths:
    """The steps between pairs of codes, as rows of (what, which axes divide the buffer).

    ``what`` is nothing, a copy, or 2 + kind * axes + axis; the buffer of the step is the whole
    tensor divided by the axes in the bits of ``mask``.
    """

    axes: int
    rows: dict[tuple[int, int], int] = field(default_factory=dict)
    what: list[tuple[list[int], list[int]]] = field(default_factory=list)
    mask: list[tuple[list[int], list[int]]] = field(default_factory=list)
    _arrays: tuple[Any, Any] | None = None
    _blocks: dict[tuple[bytes, bytes], NDArray[np.int64]] = field(default_factory=dict)

    def row(self, source: int, target: int) -> int:
        found = self.rows.get((source, target))
        if found is None:
            found = self._add(source, target)
        return found

    def pairs(self, sources: Codes, targets: Codes) -> NDArray[np.int64]:
        """Row numbers for arrays of the same shape."""
        span = BASE**self.axes
        joined = sources * span + targets
        unique, inverse = np.unique(joined, return_inverse=True)
        rows = [self.row(*divmod(int(pair), span)) for pair in unique]
        return np.asarray(rows, dtype=np.int64)[inverse].reshape(joined.shape)

    def block(self, sources: Codes, targets: Codes) -> NDArray[np.int64]:
        """Row numbers for every source (rows) with every target (columns)."""
        key = (sources.tobytes(), targets.tobytes())
        found = self._blocks.get(key)
        if found is None:
            found = np.asarray(
                [[self.row(a, b) for b in targets.tolist()] for a in sources.tolist()],
                dtype=np.int64,
            ).reshape(len(sources), len(targets))
            self._blocks[key] = found
        return found

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``what`` and ``mask`` as (rows, forward or backward, steps)."""
        if self._arrays is None or len(self._arrays[0]) != len(self.what):
            self._arrays = np.asarray(self.what), np.asarray(self.mask)
        return self._arrays

    def _add(self, source: int, target: int) -> int:
        a, b = sharding(source, self.axes), sharding(target, self.axes)
        there = self._encode(a, [(s.axis, s.source, s.target) for s in steps(a, b)])
        back_steps = [reverse(s) for s in reversed(steps(a, b))]
        back = self._encode(gradient(b), [(s.axis, s.source, s.target) for s in back_steps])
        self.what.append((there[0], back[0]))
        self.mask.append((there[1], back[1]))
        self.rows[source, target] = len(self.what) - 1
        return len(self.what) - 1

    def _encode(
        self, start: Sharding, path: Sequence[tuple[int, Placement, Placement]]
    ) -> tuple[list[int], list[int]]:
        what, mask = [_NOTHING] * _MOST_STEPS, [0] * _MOST_STEPS
        current = list(start)
        for i, (axis, source, target) in enumerate(path):
            before = _mask(current)
            current[axis] = target
            after = _mask(current)
            kind = forward_collective(Step(axis, source, target))
            if kind is not None:
                what[i] = 2 + _KINDS.index(kind) * self.axes + axis
                mask[i] = before & after  # the larger buffer is divided by fewer axes
            elif target[0] in "SP":
                what[i], mask[i] = _COPY, after
        return what, mask


def _mask(current: list[Placement]) -> int:
    return sum(1 << axis for axis, p in enumerate(current) if p.startswith("S"))


@lru_cache(maxsize=None)
def paths(axes: int) -> Paths:
    """The paths of all meshes with this many axes."""
    return Paths(axes)


@dataclass
class RedistributionTable:
    """Redistribution seconds on one mesh, equal to ``Costs.redistribution_s``, for whole arrays."""

    costs: Costs
    _steps: dict[TensorSpec, Seconds] = field(default_factory=dict)

    @property
    def paths(self) -> Paths:
        return paths(len(self.costs.mesh.axes))

    def seconds(
        self, spec: TensorSpec, rows: NDArray[np.int64], *, copies: bool = True
    ) -> tuple[Seconds, Seconds]:
        """Forward and backward seconds for an array of row numbers; without ``copies`` the
        collectives alone."""
        what, mask = self.paths.arrays()
        by_step = self._step_seconds(spec)
        if not copies:
            by_step = by_step.copy()
            by_step[_COPY] = 0.0
        unique, inverse = np.unique(rows, return_inverse=True)
        times = by_step[what[unique], mask[unique]].sum(axis=-1)
        found = times[inverse].reshape((*rows.shape, 2))
        return found[..., 0], found[..., 1]

    def _step_seconds(self, spec: TensorSpec) -> Seconds:
        """Seconds by (what, mask)."""
        key = TensorSpec((spec.bytes,), spec.dtype)
        found = self._steps.get(key)
        if found is None:
            mesh = self.costs.mesh
            axes = len(mesh.axes)
            found = np.zeros((2 + len(_KINDS) * axes, 1 << axes))
            for mask in range(1 << axes):
                cut = prod(size for axis, size in enumerate(mesh.sizes) if mask >> axis & 1)
                local_bytes = spec.bytes // cut
                if local_bytes == 0:
                    continue
                found[_COPY, mask] = self.costs.memory_bound_s(2.0 * local_bytes, spec.dtype)
                for kind in range(len(_KINDS)):
                    for axis in range(axes):
                        found[2 + kind * axes + axis, mask] = self.costs.collective_s(
                            _KINDS[kind], axis, local_bytes
                        )
            self._steps[key] = found
        return found
