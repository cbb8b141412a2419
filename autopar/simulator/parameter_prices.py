"""What keeping a parameter costs: every storage of every use, as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate, product
from math import prod
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from autopar.ir.graph import TensorSpec
from autopar.ir.sharding import (
    Parts,
    Placement,
    Sharding,
    gradient,
    shard,
    sharded_dim,
    sharded_parts,
)
from autopar.ir.strategy import Storage, Training
from autopar.simulator.memory import optimizer_bytes_per_element
from autopar.simulator.redistribution_table import (
    Codes,
    RedistributionTable,
    code,
    codes,
    paths,
    placement_code,
    sharding,
)
from autopar.simulator.updates import sum_time_s, update_time_s

Seconds = NDArray[np.float64]
Bytes = NDArray[np.float64]
Index = NDArray[np.int64]

Level = tuple[Placement, Placement, Placement]
"""Placements of parameter, gradient and optimizer state on one axis."""

LEVELS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Offers:
    """Storages on a mesh of so many axes as codes, one row each: for which use, and how the three
    are kept. What follows from the codes alone serves all tensors and meshes."""

    axes: int
    target: Codes
    parameter: Codes
    gradient: Codes
    optimizer: Codes

    def __getitem__(self, rows: Index | NDArray[np.bool_]) -> Offers:
        of = self.target, self.parameter, self.gradient, self.optimizer
        return Offers(self.axes, *(each[rows] for each in of))

    def for_each(self, targets: Codes) -> Offers:
        """All for the first of these uses, then all for the second, ..."""
        of = self.parameter, self.gradient, self.optimizer
        times = len(targets)
        each = (np.tile(kept, times) for kept in of)
        return Offers(self.axes, np.repeat(targets, len(self.parameter)), *each)

    def storage(self, row: int) -> Storage:
        return Storage(
            sharding(int(self.parameter[row]), self.axes),
            sharding(int(self.gradient[row]), self.axes),
            sharding(int(self.optimizer[row]), self.axes),
        )

    @cached_property
    def there(self) -> Index:
        """The paths (``redistribution_table.Paths``) to the use."""
        return paths(self.axes).pairs(self.parameter, self.target)

    @cached_property
    def back(self) -> Index:
        """Of the gradient, from the use."""
        return paths(self.axes).pairs(self._made, self._kept)

    @cached_property
    def again(self) -> Index:
        """From the optimizer's shard to the parameter."""
        return paths(self.axes).pairs(self.optimizer, self.parameter)

    @cached_property
    def per_step(self) -> NDArray[np.bool_]:
        """As ``ParameterEdge.per_step``."""
        gathers = paths(self.axes).communicates(self.there)
        return np.asarray((self.gradient == self.parameter) & ~gathers)

    @cached_property
    def _made(self) -> Codes:
        """How the use leaves the gradient."""
        unique, inverse = np.unique(self.target, return_inverse=True)
        return np.array([code(gradient(sharding(int(t), self.axes))) for t in unique])[inverse]

    @cached_property
    def _kept(self) -> Codes:
        """Where it is sent."""
        return np.where(self.per_step, self.optimizer, self.gradient)

    @cached_property
    def cuts(self) -> Cuts:
        summed = np.where(self.per_step, self._made, self._kept)
        of = self.target, self.parameter, self.gradient, self.optimizer, summed
        return Cuts(*(cut_axes(each, self.axes) for each in of))


@dataclass(frozen=True)
class Cuts:
    """Which axes cut what, as bits; ``summed``: the gradients of microbatches that are added."""

    target: Index
    parameter: Index
    gradient: Index
    optimizer: Index
    summed: Index


@dataclass(frozen=True)
class Priced:
    """The storages worth having for one use, with their times and their memory rows (at the loss:
    parameter and optimizer state; at the end: gradient too)."""

    offers: Offers
    time_s: Seconds
    memory_bytes: Bytes


@dataclass
class ParameterPrices:
    """Prices of parameters on one mesh. ``levels``: the ZeRO levels that each axis may use."""

    table: RedistributionTable
    training: Training
    microbatches: int
    levels: Sequence[tuple[int, ...]]
    _known: dict[object, Priced] = field(default_factory=dict)

    @property
    def axes(self) -> int:
        return len(self.table.costs.mesh.axes)

    def priced(
        self, spec: TensorSpec, targets: Sequence[int], saving: int, *, trained: bool
    ) -> list[Priced]:
        """For each use (a code), the storages that no other beats in time and memory.

        ``saving``: how many operators need the parameter again in the backward.
        """
        key = (spec, saving, trained)
        missing = [t for t in dict.fromkeys(targets) if (key, t) not in self._known]
        if missing:
            offered = tuple((t, self._levels_of(spec, t, trained=trained)) for t in missing)
            offers, starts = _offered(self.axes, offered)
            time_s = self.time_s(spec, offers, trained=trained)
            if saving:
                time_s = time_s + saving * self.gather_s(spec, offers)
            memory = self.memory_bytes(spec, offers, trained=trained, used=True)
            for target, a, b in zip(missing, starts, starts[1:], strict=False):
                kept = a + _undominated(time_s[a:b], memory[:, a:b])
                self._known[key, target] = Priced(offers[kept], time_s[kept], memory[:, kept])
        return [self._known[key, t] for t in targets]

    # ---- what is offered -----------------------------------------------------------------------

    def _levels_of(
        self, spec: TensorSpec, target: int, *, trained: bool
    ) -> tuple[tuple[Level, ...], ...]:
        """How each axis may keep a parameter that is used as ``target``.

        An axis that shards the use shards the storage. On any other axis: replicated, or ZeRO of
        one of its ``levels`` along the first dim that the axis divides and that no later axis cuts
        in the use (such a piece of a piece could not be gathered alone); a dim that the use divides
        in parts is divided in the same parts.
        """
        used = sharding(target, self.axes)
        placed = zero_placements(spec.shape, used, self.table.costs.mesh.sizes)
        return tuple(
            self._axis_levels(placement, sharded, offered, trained)
            for placement, sharded, offered in zip(used, placed, self.levels, strict=True)
        )

    @staticmethod
    def _axis_levels(
        placement: Placement, sharded: Placement | None, offered: tuple[int, ...], trained: bool
    ) -> tuple[Level, ...]:
        if sharded_dim(placement) is not None:
            return ((placement,) * 3,)
        if sharded is None:
            return (at_level(0, ""),)
        useful = offered if trained else tuple(n for n in offered if n in (0, 3)) or (0,)
        return tuple(at_level(n, sharded) for n in useful)

    def any_storage(
        self,
        spec: TensorSpec,
        tensor_parallel: Sequence[bool],
        parts: Mapping[int, Parts] = MappingProxyType({}),
    ) -> Offers:
        """The storages of a parameter that several kinds of operators use: all that the mesh
        divides. ``tensor_parallel``: axes on which it may be kept divided whatever the levels.
        ``parts``: dims that are divided in parts."""
        sizes = self.table.costs.mesh.sizes
        units = [n // sum(parts.get(d, (1,))) for d, n in enumerate(spec.shape)]
        per_axis = []
        for size, levels, divided in zip(sizes, self.levels, tensor_parallel, strict=True):
            dims = [shard(d, parts.get(d, ())) for d, n in enumerate(units) if n % size == 0]
            wanted = (set(levels) | ({0, 3} if divided else set())) if dims else {0}
            per_axis.append(
                [at_level(n, s) for n in sorted(wanted) for s in (dims if n else ["I"])]
            )
        found = _combined(per_axis, 0)
        unique, inverse = np.unique(found.optimizer, return_inverse=True)
        fits = [_divides(units, sharding(int(c), self.axes), sizes) for c in unique]
        return found[np.array(fits, dtype=bool)[inverse]]

    # ---- what it costs -------------------------------------------------------------------------

    def time_s(self, spec: TensorSpec, offers: Offers, *, trained: bool) -> Seconds:
        """What a parameter costs in a step when used once, but for gathering it again: to its use,
        its gradient back, and its update."""
        total = self.use_s(spec, offers, trained=trained)
        return total + self.update_s(spec, offers) if trained else total

    def use_s(self, spec: TensorSpec, offers: Offers, *, trained: bool) -> Seconds:
        """To its use, and its gradient back."""
        forward = self.table.seconds(spec, offers.there)[0] * self.microbatches
        if not trained:
            return np.asarray(forward)
        backward = self.table.seconds(spec, offers.back)[0]
        moved = forward + backward * np.where(offers.per_step, 1, self.microbatches)
        return np.asarray(moved + self._sum_s(spec, offers.cuts.summed))

    def _sum_s(self, spec: TensorSpec, cuts: Index) -> Seconds:
        """Adding up the gradients of all microbatches where they lie so."""
        pieces, inverse = np.unique(self._pieces(cuts), return_inverse=True)
        costs = self.table.costs
        sums = [sum_time_s(spec.bytes / int(n), self.microbatches, spec, costs) for n in pieces]
        return np.array(sums)[inverse]

    def update_s(self, spec: TensorSpec, offers: Offers) -> Seconds:
        """The optimizer on its shard, and the parameter made whole again from the shards."""
        again = self.table.seconds(spec, offers.again, copies=False)[0]
        pieces, inverse = np.unique(self._pieces(offers.cuts.optimizer), return_inverse=True)
        costs = self.table.costs
        update = [update_time_s(spec.numel // int(n), spec, self.training, costs) for n in pieces]
        return np.asarray(again + np.array(update)[inverse])

    def gather_s(self, spec: TensorSpec, offers: Offers) -> Seconds:
        """Gathering the parameter once more, in the backward of one operator."""
        once = self.table.seconds(spec, offers.there, copies=False)[0]
        return np.asarray(self.microbatches * once)

    def memory_bytes(
        self, spec: TensorSpec, offers: Offers, *, trained: bool, used: bool = False
    ) -> Bytes:
        """Two rows: with the optimizer state, and with the gradient too. ``used``: as the offers'
        targets say; the sum of earlier microbatches' gradients is then there always, as it is kept
        or as the use leaves it."""
        cuts = offers.cuts
        parameter = spec.bytes / self._pieces(cuts.parameter)
        if not trained:
            return np.stack([parameter, parameter])
        state_bytes = spec.numel * optimizer_bytes_per_element(spec, self.training)
        kept = parameter + state_bytes / self._pieces(cuts.optimizer)
        pieces = self._pieces(cuts.gradient)
        at_end = kept + spec.bytes / pieces
        if used and self.microbatches > 1:
            kept = kept + spec.bytes / np.maximum(pieces, self._pieces(cuts.target))
        return np.stack([kept, at_end])

    def _pieces(self, cuts: Index) -> NDArray[np.float64]:
        """Into how many pieces these axes cut a tensor."""
        return self._pieces_of[cuts]

    @cached_property
    def _pieces_of(self) -> NDArray[np.float64]:
        sizes = self.table.costs.mesh.sizes
        of = [
            prod(n for axis, n in enumerate(sizes) if cuts >> axis & 1)
            for cuts in range(1 << len(sizes))
        ]
        return np.array(of, dtype=np.float64)


def zero_placements(
    shape: Sequence[int], used: Sharding, sizes: Sequence[int]
) -> list[Placement | None]:
    """For each axis how it can shard the storage of a parameter as well, ``None`` where it cannot
    or its use is sharded anyway: along the first dim that the axis divides and that no later axis
    cuts in the use.

    >>> zero_placements((8, 6), ("R", "S(0)"), (2, 4))
    ['S(1)', None]
    """
    parts = parts_by_dim(used)
    left = [n // sum(parts.get(d, (1,))) for d, n in enumerate(shape)]
    for placement, size in zip(used, sizes, strict=True):
        dim = sharded_dim(placement)
        if dim is not None:
            left[dim] //= size
    found: list[Placement | None] = []
    for axis, size in enumerate(sizes):
        later = {sharded_dim(p) for p in used[axis + 1 :]}
        fitting = (d for d, n in enumerate(left) if d not in later and n % size == 0)
        dim = None if sharded_dim(used[axis]) is not None else next(fitting, None)
        if dim is not None:
            left[dim] //= size
        found.append(None if dim is None else shard(dim, parts.get(dim, ())))
    return found


def at_level(level: int, sharded: Placement) -> Level:
    """Parameter, gradient and optimizer state at a ZeRO level (0: replicated)."""
    return (
        sharded if level >= 3 else "I",
        sharded if level >= 2 else "I",
        sharded if level >= 1 else "I",
    )


@lru_cache(maxsize=4096)
def _offered(
    axes: int, wanted: tuple[tuple[int, tuple[tuple[Level, ...], ...]], ...]
) -> tuple[Offers, tuple[int, ...]]:
    """For each use, with what the axes offer for it, every combination, one use after the other;
    and where each begins. Not those with a gradient that arrives with every microbatch in pieces
    that the optimizer's shard would have to be put together from."""
    found = []
    for target, per_axis in wanted:
        every = _combined(per_axis, target)
        apart = paths(axes).pairs(every.gradient, every.optimizer)
        found.append(every[every.per_step | ~paths(axes).communicates(apart)])
    starts = (0, *accumulate(len(offers.target) for offers in found))
    of = zip(*((o.target, o.parameter, o.gradient, o.optimizer) for o in found), strict=True)
    return Offers(axes, *(np.concatenate(each) for each in of)), starts


def _combined(per_axis: Sequence[Sequence[Level]], target: int) -> Offers:
    """Every combination of what the axes offer."""
    digits = [[[placement_code(p) for p in level] for level in levels] for levels in per_axis]
    rows = np.array(list(product(*digits)), dtype=np.int64)  # (rows, axes, which of the three)
    parameter, grad, optimizer = (codes(rows[:, :, i]) for i in range(3))
    towards = np.full(len(rows), target, dtype=np.int64)
    return Offers(len(per_axis), towards, parameter, grad, optimizer)


def cut_axes(of: Codes, axes: int) -> Index:
    """The axes that divide a dim, as bits."""
    unique, inverse = np.unique(of, return_inverse=True)
    found = [
        sum(1 << axis for axis, p in enumerate(sharding(int(c), axes)) if p[0] == "S")
        for c in unique
    ]
    return np.array(found, dtype=np.int64)[inverse]


def parts_by_dim(of: Sharding) -> dict[int, Parts]:
    """The parts of each dim that is divided in parts."""
    found = {sharded_dim(placement): sharded_parts(placement) for placement in of}
    return {dim: parts for dim, parts in found.items() if dim is not None and parts}


def _divides(shape: Sequence[int], placed: Sharding, sizes: Sequence[int]) -> bool:
    left = list(shape)
    for placement, size in zip(placed, sizes, strict=True):
        dim = sharded_dim(placement)
        if dim is not None:
            if left[dim] % size:
                return False
            left[dim] //= size
    return True


def _undominated(time_s: Seconds, memory: Bytes) -> Index:
    """Indices, by time, of those that no other beats in time and in every memory row; of equals the
    first."""
    order = np.lexsort((memory.sum(axis=0), time_s))
    times, rows = time_s[order], memory[:, order]
    slower = times[:, None] >= times[None, :] * (1 - 1e-12)
    larger = (rows[:, :, None] >= rows[:, None, :]).all(axis=0)
    beaten = slower & larger
    beaten &= np.tri(len(order), k=-1, dtype=bool)  # only by an earlier one
    return order[~beaten.any(axis=1)]
