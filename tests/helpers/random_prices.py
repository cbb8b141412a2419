"""Random price lists, small enough to try every selection."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autopar.searchers.enumeration import count_selections, selections
from autopar.simulator.price_list import Flow, Kept, Menu, Node, PriceList, Selection

Array = NDArray[np.float64]


@dataclass(frozen=True)
class World:
    """A price list without a limit, and all of its selections."""

    price_list: PriceList

    @cached_property
    def selections(self) -> list[Selection]:
        return list(selections(self.price_list))

    @cached_property
    def times_s(self) -> Array:
        return np.array([self.price_list.time_of(s) for s in self.selections])

    @cached_property
    def memory_bytes(self) -> Array:
        """(selections, memory rows)."""
        return np.array([self.price_list.memory_of(s) for s in self.selections])

    def best_s(self, limit_bytes: Array) -> float:
        """The least time among selections that fit; infinite when none does."""
        fits = (self.memory_bytes <= limit_bytes * (1 + 1e-12)).all(axis=1)
        return float(self.times_s[fits].min()) if fits.any() else float("inf")

    def limited(self, limit_bytes: Array) -> PriceList:
        return replace(self.price_list, limit_bytes=limit_bytes)

    def interesting_limits(self, rng: np.random.Generator, count: int) -> list[Array]:
        """Between the least possible and the optimum's memory, where some rows exclude the optimum:
        values that a selection has exactly, values between, and now and then impossible ones."""
        rows = self.memory_bytes.shape[1]
        best = self.memory_bytes[int(self.times_s.argmin())]
        least = self.memory_bytes.min(axis=0)
        found = []
        for _ in range(count):
            kind = rng.integers(4)
            if kind == 0:  # exactly what one selection takes
                limit = self.memory_bytes[rng.integers(len(self.selections))].copy()
            elif kind == 1:  # one row as tight as a selection, the others without a limit
                limit = np.full(rows, np.inf)
                row = rng.integers(rows)
                limit[row] = self.memory_bytes[rng.integers(len(self.selections)), row]
            elif kind == 2:
                limit = least + rng.random(rows) * np.maximum(best - least, 0.0)
            else:  # each row can be met, perhaps not all together; one time in three none can
                limit = least + (rng.random(rows) < 0.5) * (best - least)
                if rng.random() < 0.33:
                    limit = limit * 0.9 - 0.1
            found.append(limit)
        return found


def world(seed: int, most_selections: int = 1500) -> World:
    """Chains, branches, shared redistributions, loops, copies, menus, kept versions."""
    rng = np.random.default_rng(seed)
    while True:
        price_list = _price_list(rng)
        if count_selections(price_list) <= most_selections:
            return World(price_list)


def _price_list(rng: np.random.Generator) -> PriceList:
    rows = int(rng.integers(1, 3))
    nodes = tuple(_node(rng, rows, i) for i in range(rng.integers(2, 7)))
    flows = tuple(_flow(rng, nodes, i) for i in range(rng.integers(1, len(nodes) + 3)))
    kept = tuple(_kept(rng, nodes, rows, i) for i in range(rng.integers(0, 4)))
    fixed_bytes = rng.choice([0.0, 5.0]) + np.zeros(rows)
    return PriceList(
        nodes, flows, kept, np.full(rows, np.inf), float(rng.choice([0.0, 3.0])), fixed_bytes
    )


def _prices(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Some zero, some equal; sometimes whole numbers, sometimes of very different sizes."""
    kind = rng.integers(4)
    if kind == 0:
        found = rng.integers(0, 4, shape).astype(float)
    elif kind == 1:
        found = 10.0 ** rng.uniform(-3, 2, shape)
    else:
        found = rng.random(shape) * 10
    return np.asarray(np.where(rng.random(shape) < 0.15, 0.0, found))


def _count(rng: np.random.Generator) -> int:
    return int(rng.choice([1, 1, 2, 5]))


def _node(rng: np.random.Generator, rows: int, number: int) -> Node:
    alternatives = int(rng.integers(1, 5))
    menus = tuple(_menu(rng, rows, alternatives, m) for m in range(rng.choice([0, 0, 1, 2])))
    memory = _prices(rng, (rows, alternatives))
    return Node(f"n{number}", _prices(rng, (alternatives,)), memory, _count(rng), menus)


def _menu(rng: np.random.Generator, rows: int, alternatives: int, number: int) -> Menu:
    uses = int(rng.integers(1, alternatives + 1))
    sizes = rng.integers(1, 4, uses)
    return Menu(
        f"m{number}",
        rng.integers(0, uses, alternatives),
        tuple(_prices(rng, (n,)) for n in sizes),
        tuple(_prices(rng, (rows, n)) for n in sizes),
        int(rng.integers(1, 4)),
    )


def _flow(rng: np.random.Generator, nodes: tuple[Node, ...], number: int) -> Flow:
    """Consumers are mostly later nodes, sometimes the producer itself or an earlier one."""
    producer = int(rng.integers(len(nodes)))
    sources, targets = rng.integers(1, 4, 2)
    later = np.arange(producer + 1, len(nodes))
    able = later if len(later) and rng.random() < 0.8 else np.arange(len(nodes))
    chosen = rng.choice(able, int(rng.integers(1, 4)))
    consumers = tuple((int(c), rng.integers(0, targets, len(nodes[c].time_s))) for c in chosen)
    time_s = _prices(rng, (int(sources), int(targets)))
    diagonal = np.arange(min(sources, targets))
    if rng.random() < 0.7:  # as wanted already
        time_s[diagonal, diagonal] = 0.0
    source = rng.integers(0, sources, len(nodes[producer].time_s))
    return Flow(f"t{number}", producer, source, consumers, time_s, _count(rng))


def _kept(rng: np.random.Generator, nodes: tuple[Node, ...], rows: int, number: int) -> Kept:
    versions = int(rng.integers(1, 4))
    holders = rng.choice(len(nodes), int(rng.integers(1, 4)))
    return Kept(
        f"k{number}",
        tuple((int(h), rng.integers(-1, versions, len(nodes[h].time_s))) for h in holders),
        _prices(rng, (rows, versions)),
        _count(rng),
    )
