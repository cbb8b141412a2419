"""Who sends what to whom where a tensor goes from the devices of one mesh to those of another.

Each device is sent what it will hold, by one device that has it: the boxes that pieces of both
sides have in common.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

from autopar.ir.sharding import Mesh, Ranges, Sharding, local_ranges, local_shape
from autopar.simulator.strides import Strides, contiguous, is_contiguous


class Message(NamedTuple):
    """``sender`` and ``receiver`` are places in their meshes; of their local tensors, ``taken`` is
    what the one sends and ``put`` where the other has it: (start, stop) of each dim."""

    sender: int
    receiver: int
    taken: tuple[tuple[int, int], ...]
    put: tuple[tuple[int, int], ...]

    @property
    def elements(self) -> int:
        return prod(stop - start for start, stop in self.taken)


Box = tuple[Ranges, ...]
"""What a device has of each dim."""

Common = tuple[tuple[int, int], tuple[int, int]]
"""Of one dim: where it lies in what is held, and in what is wanted."""

End = tuple[Sharding, Mesh]
"""How a tensor lies on the mesh of a stage."""


class Flow(NamedTuple):
    """``total_bytes`` of all messages from device to device; ``busiest_bytes``: the most that one
    device sends or receives; ``copied_bytes``: the most that one has to put together to send."""

    total_bytes: int
    busiest_bytes: int
    copied_bytes: int


@lru_cache(maxsize=None)
def messages(
    shape: tuple[int, ...],
    source: tuple[Sharding, Mesh],
    target: tuple[Sharding, Mesh],
    together: bool = False,
) -> tuple[Message, ...]:
    """Every device of ``target`` gets what it holds from devices of ``source``; of several that
    have a part, receivers take turns. With ``together`` they are the same devices, and take what
    they have from themselves.

    >>> one, two = (("I",), Mesh((("a", 1),))), (("S(0)",), Mesh((("a", 2),)))
    >>> [(m.sender, m.receiver, m.taken, m.put) for m in messages((4,), one, two)]
    [(0, 0, ((0, 2),), ((0, 2),)), (0, 1, ((2, 4),), ((0, 2),))]
    """
    senders: dict[Box, list[int]] = {}
    for rank in range(source[1].size):
        senders.setdefault(local_ranges(shape, *source, rank), []).append(rank)
    order = {held: number for number, held in enumerate(senders)}
    near = _Near(senders)
    found = []
    turns: dict[Box, int] = {}
    for receiver in range(target[1].size):
        wanted = local_ranges(shape, *target, receiver)
        turn = turns.get(wanted, 0)
        turns[wanted] = turn + 1
        for held in sorted(filter(order.__contains__, near.boxes(wanted)), key=order.__getitem__):
            ranks = senders[held]
            own = together and receiver in ranks
            sender = receiver if own else ranks[turn % len(ranks)]
            found += [
                Message(
                    sender, receiver, tuple(o[0] for o in of_dims), tuple(o[1] for o in of_dims)
                )
                for of_dims in product(*near.overlaps(held, wanted))
            ]
    return tuple(found)


@lru_cache(maxsize=None)
def flow(
    shape: tuple[int, ...],
    item: int,
    source: End,
    target: End,
    together: bool = False,
    strides: Strides | None = None,
) -> Flow:
    """``strides``: of the local tensors that are sent; ``None``: in the order of their dims."""
    sent: Counter[tuple[bool, int]] = Counter()
    copied: Counter[int] = Counter()
    held = contiguous(local_shape(shape, *source)) if strides is None else strides
    for message in messages(shape, source, target, together):
        if together and message.sender == message.receiver:
            continue
        sent[True, message.sender] += message.elements
        sent[False, message.receiver] += message.elements
        if lies_scattered(message, held):
            copied[message.sender] += message.elements
    total = sum(n for (outwards, _), n in sent.items() if outwards)
    busiest, copies = max(sent.values(), default=0), max(copied.values(), default=0)
    return Flow(item * total, item * busiest, item * copies)


def lies_scattered(message: Message, strides: Strides) -> bool:
    """Whether what is taken is not one run of memory in a tensor with these strides."""
    return not is_contiguous(tuple(stop - start for start, stop in message.taken), strides)


class _Near:
    """What of the boxes that are held meets one that is wanted. Each dim is looked at alone."""

    def __init__(self, boxes: Iterable[Box]) -> None:
        self._held = [tuple(dict.fromkeys(ranges)) for ranges in zip(*boxes, strict=True)]
        self._met: dict[tuple[int, Ranges], dict[Ranges, list[Common]]] = {}

    def boxes(self, wanted: Box) -> Iterator[Box]:
        """All that could be held, and meet it."""
        return product(*(self._of(dim, want) for dim, want in enumerate(wanted)))

    def overlaps(self, held: Box, wanted: Box) -> list[list[Common]]:
        pairs = zip(held, wanted, strict=True)
        return [self._of(dim, want)[have] for dim, (have, want) in enumerate(pairs)]

    def _of(self, dim: int, want: Ranges) -> dict[Ranges, list[Common]]:
        if (dim, want) not in self._met:
            each = ((have, _overlaps(have, want)) for have in self._held[dim])
            self._met[dim, want] = {have: overlaps for have, overlaps in each if overlaps}
        return self._met[dim, want]


def _overlaps(have: Ranges, want: Ranges) -> list[Common]:
    found = []
    at = 0
    for start, stop in have:
        place = 0
        for first, last in want:
            low, high = max(start, first), min(stop, last)
            if low < high:
                found.append(
                    (
                        (at + low - start, at + high - start),
                        (place + low - first, place + high - first),
                    )
                )
            place += last - first
        at += stop - start
    return found


__all__ = ["End", "Flow", "Message", "flow", "lies_scattered", "messages"]
