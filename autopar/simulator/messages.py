"""Who sends what to whom where a tensor goes from the devices of one mesh to those of another.

Each device is sent what it will hold, by one device that has it: the boxes that pieces of both
sides have in common.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

from autopar.ir.sharding import Mesh, Sharding, local_ranges, local_shape
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
    senders: dict[tuple[tuple[tuple[int, int], ...], ...], list[int]] = {}
    for rank in range(source[1].size):
        senders.setdefault(local_ranges(shape, *source, rank), []).append(rank)
    found = []
    turns: dict[tuple[tuple[tuple[int, int], ...], ...], int] = {}
    for receiver in range(target[1].size):
        wanted = local_ranges(shape, *target, receiver)
        turn = turns.get(wanted, 0)
        turns[wanted] = turn + 1
        for held, ranks in senders.items():
            own = together and receiver in ranks
            sender = receiver if own else ranks[turn % len(ranks)]
            overlaps = [_overlaps(have, want) for have, want in zip(held, wanted, strict=True)]
            found += [
                Message(
                    sender, receiver, tuple(o[0] for o in of_dims), tuple(o[1] for o in of_dims)
                )
                for of_dims in product(*overlaps)
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


def _overlaps(
    have: Sequence[tuple[int, int]], want: Sequence[tuple[int, int]]
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Of one dim: where what both hold lies in the one and in the other."""
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
