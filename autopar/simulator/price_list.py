"""A search problem as prices alone: decisions, what each alternative costs, what pairs cost.

Searchers see nothing else; random price lists test them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Seconds = NDArray[np.float64]
Bytes = NDArray[np.float64]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class Menu:
    """How one parameter may be stored, given how its only user uses it.

    ``use`` (alternatives of the node): which list applies. ``time_s[use]`` (storages) and
    ``memory_bytes[use]`` (memory rows, storages): what each storage costs; never empty. All are for
    one copy; ``count`` copies are chosen independently.
    """

    name: str
    use: Index
    time_s: tuple[Seconds, ...]
    memory_bytes: tuple[Bytes, ...]
    count: int = 1


@dataclass(frozen=True)
class Node:
    """A decision. ``time_s`` (alternatives) and ``memory_bytes`` (memory rows, alternatives) are
    those of one copy; the ``count`` copies all take the same alternative."""

    name: str
    time_s: Seconds
    memory_bytes: Bytes
    count: int = 1
    menus: tuple[Menu, ...] = ()


@dataclass(frozen=True, slots=True)
class Groups:
    """``of``: to which of ``count`` groups each alternative belongs; ``present``: those that any
    belongs to. ``order`` puts the alternatives of each together; ``starts``: where these begin."""

    of: Index
    count: int
    present: Index
    order: Index
    starts: Index

    @classmethod
    def by(cls, of: Index, count: int) -> Groups:
        order = np.argsort(of, kind="stable")
        present, starts = np.unique(of[order], return_index=True)
        return cls(of, count, present, order, starts)

    def least(self, values: Seconds) -> Seconds:
        """The least value of each group; 0 for groups that no alternative belongs to.

        >>> Groups.by(np.array([2, 0, 2]), 3).least(np.array([5.0, 1.0, 4.0])).tolist()
        [1.0, 0.0, 4.0]
        """
        found = np.minimum.reduceat(values[self.order], self.starts)
        if len(found) == self.count:
            return found
        every = np.zeros(self.count)
        every[self.present] = found
        return every


@dataclass(frozen=True)
class Flow:
    """A tensor on its way from one node to others.

    ``source`` (producer's alternatives): in which sharding it is made. ``consumers``: (node,
    ``target`` by its alternatives). ``time_s`` (sources, targets): paid once for each target that
    any consumer wants. ``count``: how many equal tensors.
    """

    name: str
    producer: int
    source: Index
    consumers: tuple[tuple[int, Index], ...]
    time_s: Seconds
    count: int = 1

    @cached_property
    def groups(self) -> tuple[Groups, tuple[Groups, ...]]:
        """The producer's alternatives by what they make, each consumer's by what they want."""
        sources, targets = self.time_s.shape
        return (
            Groups.by(self.source, sources),
            tuple(Groups.by(target, targets) for _, target in self.consumers),
        )


@dataclass(frozen=True)
class Instead:
    """What keeping a tensor can be exchanged for, by version: other bytes (memory rows, versions),
    for so many seconds."""

    time_s: Seconds
    memory_bytes: Bytes


@dataclass(frozen=True)
class Kept:
    """Versions of a tensor that stay in memory together with the nodes that need them.

    ``holders``: (node, ``version`` by its alternatives, -1 for none); ``memory_bytes`` (memory
    rows, versions) is taken once for each version that any holder needs. ``instead``: what each
    can be exchanged for; only bounds know of it (``exchanged``).
    """

    name: str
    holders: tuple[tuple[int, Index], ...]
    memory_bytes: Bytes
    count: int = 1
    instead: tuple[Instead, ...] = ()

    def versions_of(self, selection: Selection) -> set[int]:
        """Those that are needed."""
        return {int(v[selection.alternatives[n]]) for n, v in self.holders} - {-1}

    def cheapest(self, weights: Bytes) -> tuple[Seconds, Bytes]:
        """Seconds and bytes of each version, kept or exchanged as is cheapest at these prices of
        memory (seconds per byte, by memory row)."""
        time_s, memory_bytes = np.zeros(self.memory_bytes.shape[1]), self.memory_bytes
        for other in self.instead:
            price_s = time_s + weights @ memory_bytes
            better = other.time_s + weights @ other.memory_bytes < price_s
            time_s = np.where(better, other.time_s, time_s)
            memory_bytes = np.where(better, other.memory_bytes, memory_bytes)
        return time_s, memory_bytes

    @cached_property
    def groups(self) -> tuple[Groups, tuple[Groups, ...]]:
        """As those of a flow that each holder pays for its version; none is one more version."""
        versions = self.memory_bytes.shape[1]
        return (
            Groups.by(np.zeros(1, dtype=np.int64), 1),
            tuple(
                Groups.by(np.where(version < 0, versions, version), versions + 1)
                for _, version in self.holders
            ),
        )


@dataclass(frozen=True)
class PriceList:
    """Choose an alternative for every node and a storage for every menu: minimise the time, keep
    each memory row within its limit.

    >>> node = Node("matmul", np.array([2.0, 1.0]), np.zeros((1, 2)))
    >>> alone = PriceList((node,), (), (), np.array([np.inf]))
    >>> alone.time_of(Selection((1,), ((),)))
    1.0
    """

    nodes: tuple[Node, ...]
    flows: tuple[Flow, ...]
    kept: tuple[Kept, ...]
    limit_bytes: Bytes
    fixed_time_s: float = 0.0
    fixed_memory_bytes: Bytes | float = 0.0

    def time_of(self, selection: Selection) -> float:
        """Seconds of a selection."""
        total = self.fixed_time_s
        for node, k, storages in zip(
            self.nodes, selection.alternatives, selection.storages, strict=True
        ):
            total += node.count * float(node.time_s[k])
            for menu, counts in zip(node.menus, storages, strict=True):
                total += float(np.dot(counts, menu.time_s[menu.use[k]]))
        for flow in self.flows:
            source = flow.source[selection.alternatives[flow.producer]]
            targets = {int(t[selection.alternatives[c]]) for c, t in flow.consumers}
            total += flow.count * sum(float(flow.time_s[source, t]) for t in targets)
        return total

    def memory_of(self, selection: Selection) -> Bytes:
        """Bytes in each memory row."""
        total = np.zeros(len(self.limit_bytes)) + self.fixed_memory_bytes
        for node, k, storages in zip(
            self.nodes, selection.alternatives, selection.storages, strict=True
        ):
            total = total + node.count * node.memory_bytes[:, k]
            for menu, counts in zip(node.menus, storages, strict=True):
                total = total + menu.memory_bytes[menu.use[k]] @ np.asarray(counts, dtype=float)
        for kept in self.kept:
            versions = list(kept.versions_of(selection))
            total = total + kept.count * kept.memory_bytes[:, versions].sum(axis=1)
        return total

    def exchanged(self, selection: Selection, weights: Bytes) -> tuple[float, Bytes]:
        """Seconds and bytes of a selection, where what it keeps is exchanged for what is there
        instead if that is cheaper at these prices of memory."""
        time_s, memory_bytes = self.time_of(selection), self.memory_of(selection)
        for kept in self.kept:
            if kept.instead:
                versions = list(kept.versions_of(selection))
                times, sizes = kept.cheapest(weights)
                time_s += kept.count * float(times[versions].sum())
                more = (sizes - kept.memory_bytes)[:, versions].sum(axis=1)
                memory_bytes = memory_bytes + kept.count * more
        return time_s, memory_bytes

    def fits(self, selection: Selection) -> bool:
        return bool(np.all(self.memory_of(selection) <= self.limit_bytes * (1 + 1e-12)))


@dataclass(frozen=True, slots=True)
class Selection:
    """An alternative for each node; for each of its menus, how many copies take each storage."""

    alternatives: tuple[int, ...]
    storages: tuple[tuple[tuple[int, ...], ...], ...]


def cheapest_storages(
    price_list: PriceList, alternatives: Sequence[int], weights: Bytes | None = None
) -> Selection:
    """The selection whose storages have the least time plus ``weights`` (seconds per byte, by
    memory row) times memory; of equals, the one with the least memory."""
    storages = []
    for node, k in zip(price_list.nodes, alternatives, strict=True):
        chosen = []
        for menu in node.menus:
            use = menu.use[k]
            memory = menu.memory_bytes[use]
            cost = menu.time_s[use] + (0.0 if weights is None else weights @ memory)
            near = cost <= cost.min() * (1 + 1e-9)
            total = np.where(near, memory.sum(axis=0), np.inf)
            best = int(np.argmin(total))
            chosen.append(tuple(menu.count * (i == best) for i in range(len(cost))))
        storages.append(tuple(chosen))
    return Selection(tuple(alternatives), tuple(storages))


def storages_within(price_list: PriceList, alternatives: Sequence[int]) -> Selection | None:
    """A fast selection of these alternatives that keeps to the memory rows; ``None``: there is none
    among those that were looked at.

    Memory gets a price, the same in every row, at which the cheapest storages just fit. Then copies
    take the storages of the next lower price, those first that save most time for the memory.
    """
    fastest = cheapest_storages(price_list, alternatives)
    if price_list.fits(fastest):
        return fastest
    each = price_list.time_of(fastest) / np.maximum(price_list.limit_bytes, 1.0)
    high = HIGHEST_PRICE
    fitting = cheapest_storages(price_list, alternatives, each * high)
    if not price_list.fits(fitting):
        return None
    low, over = 0.0, fastest
    for _ in range(PRICES_TRIED):
        price = high * 1e-3 if low == 0.0 else math.sqrt(low * high)
        found = cheapest_storages(price_list, alternatives, each * price)
        if found in (fitting, over) and low > 0.0:
            break
        if price_list.fits(found):
            high, fitting = price, found
        else:
            low, over = price, found
    return _filled(price_list, fitting, over)


HIGHEST_PRICE = 1e6
"""Of all the memory, in times of the whole step: memory is all that counts then."""

PRICES_TRIED = 40


def _filled(price_list: PriceList, fitting: Selection, over: Selection) -> Selection:
    """``fitting`` with as many storages of ``over`` as there is room for."""
    room = price_list.limit_bytes - price_list.memory_of(fitting)
    steps = []
    for n, (node, k) in enumerate(zip(price_list.nodes, fitting.alternatives, strict=True)):
        for m, menu in enumerate(node.menus):
            before, after = (int(np.argmax(s.storages[n][m])) for s in (fitting, over))
            times, sizes = menu.time_s[menu.use[k]], menu.memory_bytes[menu.use[k]]
            saved, more = times[before] - times[after], sizes[:, after] - sizes[:, before]
            if saved > 0:
                steps.append((float(saved / max(more.max(), 1.0)), n, m, before, after, more))
    storages = [[list(counts) for counts in chosen] for chosen in fitting.storages]
    for _, n, m, before, after, more in sorted(steps, key=lambda step: -step[0]):
        taken = more > 0
        able = np.floor(room[taken] / more[taken]).min() if taken.any() else np.inf
        moved = int(min(max(able, 0), storages[n][m][before]))
        storages[n][m][before] -= moved
        storages[n][m][after] += moved
        room = room - moved * more
    return Selection(
        fitting.alternatives, tuple(tuple(tuple(c) for c in chosen) for chosen in storages)
    )
