"""What keeping a parameter costs: every storage of every use, as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
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
from autopar.simulator.prices import sum_time_s, update_time_s
from autopar.simulator.redistribution_table import (
    Codes,
    RedistributionTable,
    code,
    codes,
    placement_code,
    sharding,
)

Seconds = NDArray[np.float64]
Bytes = NDArray[np.float64]
Index = NDArray[np.int64]

Level = tuple[Placement, Placement, Placement]
"""Placements of parameter, gradient and optimizer state on one axis."""

LEVELS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Offers:
    """Storages as codes, one row each: for which use, and how the three are kept."""

    target: Codes
    parameter: Codes
    gradient: Codes
    optimizer: Codes

    def __getitem__(self, rows: Index | NDArray[np.bool_]) -> Offers:
        return Offers(
            self.target[rows], self.parameter[rows], self.gradient[rows], self.optimizer[rows]
        )

    def storage(self, row: int, axes: int) -> Storage:
        return Storage(
            sharding(int(self.parameter[row]), axes),
            sharding(int(self.gradient[row]), axes),
            sharding(int(self.optimizer[row]), axes),
        )


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
            offers = [self.offers(spec, t, trained=trained) for t in missing]
            together = _joined(offers)
            time_s = self.time_s(spec, together, trained=trained)
            if saving:
                time_s = time_s + saving * self.gather_s(spec, together)
            memory = self.memory_bytes(spec, together, trained=trained, used=True)
            starts = np.cumsum([0, *(len(o.target) for o in offers)])
            for target, offer, a, b in zip(missing, offers, starts, starts[1:], strict=False):
                keep = _undominated(time_s[a:b], memory[:, a:b])
                self._known[key, target] = Priced(
                    offer[keep], time_s[a:b][keep], memory[:, a:b][:, keep]
                )
        return [self._known[key, t] for t in targets]

    # ---- what is offered -----------------------------------------------------------------------

    def offers(self, spec: TensorSpec, target: int, *, trained: bool) -> Offers:
        """How a parameter that is used as ``target`` may be kept.

        An axis that shards the use shards the storage. On any other axis: replicated, or ZeRO of
        one of its ``levels`` along the first dim that the axis divides and that no later axis cuts
        in the use (such a piece of a piece could not be gathered alone); a dim that the use divides
        in parts is divided in the same parts. Nor is a gradient offered
        that arrives with every microbatch in pieces that the optimizer's shard would have to be put
        together from.
        """
        used = sharding(target, self.axes)
        per_axis = [
            self._axis_levels(placement, sharded, offered, trained)
            for placement, sharded, offered in zip(
                used,
                zero_placements(spec.shape, used, self.table.costs.mesh.sizes),
                self.levels,
                strict=True,
            )
        ]
        found = _combined(per_axis, target)
        late = self._per_step(found)
        assembled = self._communicates(found.gradient, found.optimizer)
        return found[late | ~assembled]

    @staticmethod
    def _axis_levels(
        placement: Placement, sharded: Placement | None, offered: tuple[int, ...], trained: bool
    ) -> list[Level]:
        if sharded_dim(placement) is not None:
            return [(placement,) * 3]
        if sharded is None:
            return [at_level(0, "")]
        useful = offered if trained else tuple(n for n in offered if n in (0, 3)) or (0,)
        return [at_level(n, sharded) for n in useful]

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
        fits = [_divides(units, sharding(int(c), self.axes), sizes) for c in found.optimizer]
        return found[np.array(fits, dtype=bool)]

    # ---- what it costs -------------------------------------------------------------------------

    def time_s(self, spec: TensorSpec, offers: Offers, *, trained: bool) -> Seconds:
        """What a parameter costs in a step when used once, but for gathering it again: to its use,
        its gradient back, and its update."""
        total = self.use_s(spec, offers, trained=trained)
        return total + self.update_s(spec, offers) if trained else total

    def use_s(self, spec: TensorSpec, offers: Offers, *, trained: bool) -> Seconds:
        """To its use, and its gradient back."""
        forward = self._forward_s(spec, offers.parameter, offers.target) * self.microbatches
        if not trained:
            return np.asarray(forward)
        late = self._per_step(offers)
        unique, inverse = np.unique(offers.target, return_inverse=True)
        back = np.array([code(gradient(sharding(int(t), self.axes))) for t in unique])[inverse]
        destination = np.where(late, offers.optimizer, offers.gradient)
        backward = self._forward_s(spec, back, destination)
        moved = forward + backward * np.where(late, 1, self.microbatches)
        return np.asarray(moved + self._sum_s(spec, np.where(late, back, destination)))

    def _sum_s(self, spec: TensorSpec, summed: Codes) -> Seconds:
        """Adding up the gradients of all microbatches where they lie so."""
        pieces, inverse = np.unique(self._pieces(summed), return_inverse=True)
        costs = self.table.costs
        sums = [sum_time_s(spec.bytes / int(n), self.microbatches, spec, costs) for n in pieces]
        return np.array(sums)[inverse]

    def update_s(self, spec: TensorSpec, offers: Offers) -> Seconds:
        """The optimizer on its shard, and the parameter made whole again from the shards."""
        again = self._forward_s(spec, offers.optimizer, offers.parameter, copies=False)
        pieces, inverse = np.unique(self._pieces(offers.optimizer), return_inverse=True)
        costs = self.table.costs
        update = [update_time_s(spec.numel // int(n), spec, self.training, costs) for n in pieces]
        return np.asarray(again + np.array(update)[inverse])

    def gather_s(self, spec: TensorSpec, offers: Offers) -> Seconds:
        """Gathering the parameter once more, in the backward of one operator."""
        once = self._forward_s(spec, offers.parameter, offers.target, copies=False)
        return np.asarray(self.microbatches * once)

    def memory_bytes(
        self, spec: TensorSpec, offers: Offers, *, trained: bool, used: bool = False
    ) -> Bytes:
        """Two rows: with the optimizer state, and with the gradient too. ``used``: as the offers'
        targets say; the sum of earlier microbatches' gradients is then there always, as it is kept
        or as the use leaves it."""
        parameter = spec.bytes / self._pieces(offers.parameter)
        if not trained:
            return np.stack([parameter, parameter])
        state_bytes = spec.numel * optimizer_bytes_per_element(spec, self.training)
        kept = parameter + state_bytes / self._pieces(offers.optimizer)
        pieces = self._pieces(offers.gradient)
        at_end = kept + spec.bytes / pieces
        if used and self.microbatches > 1:
            kept = kept + spec.bytes / np.maximum(pieces, self._pieces(offers.target))
        return np.stack([kept, at_end])

    def _forward_s(
        self, spec: TensorSpec, source: Codes, target: Codes, *, copies: bool = True
    ) -> Seconds:
        numbers = self.table.paths.pairs(source, target)
        return self.table.seconds(spec, numbers, copies=copies)[0]

    def _per_step(self, offers: Offers) -> NDArray[np.bool_]:
        """As ``ParameterEdge.per_step``."""
        gathers = self._communicates(offers.parameter, offers.target)
        return np.asarray((offers.gradient == offers.parameter) & ~gathers)

    def _communicates(self, source: Codes, target: Codes) -> NDArray[np.bool_]:
        return self.table.paths.communicates(self.table.paths.pairs(source, target))

    def _pieces(self, of: Codes) -> NDArray[np.float64]:
        """Into how many pieces the shardings cut a tensor."""
        sizes = self.table.costs.mesh.sizes
        unique, inverse = np.unique(of, return_inverse=True)
        pieces = [
            float(
                np.prod(
                    [
                        n
                        for p, n in zip(sharding(int(c), self.axes), sizes, strict=True)
                        if sharded_dim(p) is not None
                    ]
                )
            )
            for c in unique
        ]
        return np.array(pieces)[inverse]


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


def _combined(per_axis: Sequence[Sequence[Level]], target: int) -> Offers:
    """Every combination of what the axes offer."""
    digits = [[[placement_code(p) for p in level] for level in levels] for levels in per_axis]
    rows = np.array(list(product(*digits)), dtype=np.int64)  # (rows, axes, which of the three)
    parameter, grad, optimizer = (codes(rows[:, :, i]) for i in range(3))
    return Offers(np.full(len(rows), target, dtype=np.int64), parameter, grad, optimizer)


def _joined(offers: Sequence[Offers]) -> Offers:
    return Offers(
        np.concatenate([o.target for o in offers]),
        np.concatenate([o.parameter for o in offers]),
        np.concatenate([o.gradient for o in offers]),
        np.concatenate([o.optimizer for o in offers]),
    )


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
