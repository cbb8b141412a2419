"""Gradients of parameters that several stages, or copies of a stage, hold: how they are summed.

Holders that have the same pieces on the same places of their meshes are **alike**: those of a row
add their gradients, then rows all-reduce, place by place. Where holders are of several kinds, the
sum of each goes to the rows of every other, piece by piece as boundary tensors go. All add them in
the order of the kinds, so that what they hold stays equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import lcm, prod
from typing import NamedTuple

from autopar.ir.graph import ITEM_BYTES
from autopar.ir.sharding import Mesh, Sharding, local_ranges, local_shape, shards_of
from autopar.ir.strategy import Training
from autopar.simulator.messages import Message, lies_scattered, messages
from autopar.simulator.strides import contiguous


@dataclass(frozen=True, slots=True)
class Alike:
    """(stage, row) of those who hold a gradient as ``sharding`` on ``mesh``, or in the same pieces
    by another name."""

    sharding: Sharding
    mesh: Mesh
    holders: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(sorted({row for _, row in self.holders}))

    def stages_in(self, row: int) -> tuple[int, ...]:
        return tuple(stage for stage, at in self.holders if at == row)


class Passing(NamedTuple):
    """The sum of one of the kinds goes from a row that has it to a row of another kind."""

    source: int
    target: int
    source_row: int
    target_row: int


@dataclass(frozen=True)
class SharedGradient:
    """``item_bytes``: of an element, in the dtype that the optimizer takes."""

    name: str
    shape: tuple[int, ...]
    item_bytes: int
    kinds: tuple[Alike, ...]

    @property
    def stages(self) -> tuple[int, ...]:
        return tuple(sorted({stage for kind in self.kinds for stage, _ in kind.holders}))

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(sorted({row for kind in self.kinds for _, row in kind.holders}))

    def kinds_in(self, row: int) -> tuple[int, ...]:
        """Numbers of those that a row has."""
        return tuple(k for k, kind in enumerate(self.kinds) if row in kind.rows)

    def piece_bytes(self, kind: int) -> int:
        of = self.kinds[kind]
        return self.item_bytes * prod(local_shape(self.shape, of.sharding, of.mesh))

    @cached_property
    def passings(self) -> tuple[Passing, ...]:
        """In the order in which all processes post them. A row takes from itself what it has; other
        rows take turns with those that have it."""
        found = []
        for t, target in enumerate(self.kinds):
            for s, source in enumerate(self.kinds):
                if s != t:
                    others = [row for row in target.rows if row not in source.rows]
                    turns = {r: source.rows[i % len(source.rows)] for i, r in enumerate(others)}
                    found += [Passing(s, t, turns.get(row, row), row) for row in target.rows]
        return tuple(found)

    def messages(self, passing: Passing) -> tuple[Message, ...]:
        source, target = self.kinds[passing.source], self.kinds[passing.target]
        ends = (source.sharding, source.mesh), (target.sharding, target.mesh)
        return messages(self.shape, *ends, passing.source_row == passing.target_row)

    def deliveries(self, groups: Sequence[tuple[int, ...]]) -> Iterator[Delivery]:
        """All that is passed on, also what a device takes from itself; ``groups``: the devices of
        each row."""
        for passing in self.passings:
            senders, receivers = groups[passing.source_row], groups[passing.target_row]
            for message in self.messages(passing):
                one, other = senders[message.sender], receivers[message.receiver]
                yield Delivery(passing, message, one, other)

    def sent(self, groups: Sequence[tuple[int, ...]]) -> Iterator[Sent]:
        """What goes from device to device."""
        for passing, message, sender, receiver in self.deliveries(groups):
            if sender != receiver:
                of, size = self.kinds[passing.source], self.item_bytes * message.elements
                held = contiguous(local_shape(self.shape, of.sharding, of.mesh))
                copied = size if lies_scattered(message, held) else 0
                yield Sent(passing, sender, receiver, size, copied)


class Delivery(NamedTuple):
    """``sender`` and ``receiver`` are devices."""

    passing: Passing
    message: Message
    sender: int
    receiver: int


class Sent(NamedTuple):
    """``copied_bytes`` of it are put together to be sent."""

    passing: Passing
    sender: int
    receiver: int
    bytes: int
    copied_bytes: int


def shared_gradient(
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    holders: Mapping[tuple[int, int], tuple[Sharding, Mesh]],
    training: Training,
) -> SharedGradient:
    """``holders``: for each (stage, row) how the optimizer keeps its piece of the parameter. What
    they do not divide is padded (``local_elements``)."""
    shape = _padded(shape, holders.values())
    same = {(sharding, mesh.sizes) for sharding, mesh in holders.values()}
    alike: dict[object, list[tuple[int, int]]] = {}
    for holder, (sharding, mesh) in holders.items():
        pieces = _pieces(shape, sharding, mesh) if len(same) > 1 else ()
        alike.setdefault(pieces, []).append(holder)
    item_bytes = 4 if training.precision == "mixed" else ITEM_BYTES[dtype]
    kinds = tuple(Alike(*holders[of[0]], tuple(of)) for of in alike.values())
    return SharedGradient(name, shape, item_bytes, kinds)


def _padded(shape: tuple[int, ...], holders: Iterable[tuple[Sharding, Mesh]]) -> tuple[int, ...]:
    """Each dim a multiple of all numbers of pieces into which it is cut."""
    into = [1] * len(shape)
    for sharding, mesh in set(holders):
        into = [lcm(n, shards_of(sharding, dim, mesh)) for dim, n in enumerate(into)]
    return tuple(-(-size // n) * n for size, n in zip(shape, into, strict=True))


def _pieces(shape: tuple[int, ...], sharding: Sharding, mesh: Mesh) -> object:
    return tuple(local_ranges(shape, sharding, mesh, rank) for rank in range(mesh.size))


@dataclass(frozen=True, slots=True)
class ExchangeBytes:
    """What summing shared gradients takes on a device of a row, beside what is there before it:
    ``most`` while it is done, ``after`` it (less than nothing where stages of a row had a gradient
    each, and have one in common now)."""

    most: int
    after: int


def exchange_bytes(
    shared: Sequence[SharedGradient],
    row: int,
    groups: Sequence[tuple[int, ...]],
    before: Mapping[tuple[str, int], int],
) -> ExchangeBytes:
    """``before``: what a stage has of a parameter's gradient, by (parameter, stage).

    A sum begins with zeros, to which each gradient is added and let go. Sums that are passed on
    stay until totals are made of them, as does what has arrived for these.
    """
    most = now = 0
    for of in shared:
        sums = 0
        for k in of.kinds_in(row):
            size = of.piece_bytes(k)
            sums += size
            most = max(most, now + size)
            now += size - sum(before[of.name, stage] for stage in of.kinds[k].stages_in(row))
        if sums and len(of.kinds) > 1:
            most = max(most, now + _passing_bytes(of, row, groups, sums))
    return ExchangeBytes(most, now)


def _passing_bytes(
    of: SharedGradient, row: int, groups: Sequence[tuple[int, ...]], sums: int
) -> int:
    """On the device of a row that needs most: what arrives, and copies to be sent, then totals."""
    arriving, copied = Counter[int](), Counter[int]()
    for one in of.sent(groups):
        arriving[one.receiver] += one.bytes
        copied[one.sender] += one.copied_bytes
    return max(arriving[device] + max(copied[device], sums) for device in groups[row])


__all__ = [
    "Alike",
    "Delivery",
    "ExchangeBytes",
    "Passing",
    "Sent",
    "SharedGradient",
    "exchange_bytes",
    "shared_gradient",
]
