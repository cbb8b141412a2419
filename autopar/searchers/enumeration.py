"""All selections of a price list, or those of some alternatives, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import comb, prod

import numpy as np
from numpy.typing import NDArray

from autopar.simulator.price_list import Menu, Node, PriceList, Selection

Masks = Sequence[NDArray[np.bool_]]
"""For each node, which of its alternatives are meant."""


def count_selections(price_list: PriceList, offered: Masks | None = None) -> int:
    """How many selections there are."""
    return prod(
        sum(
            prod(_compositions(m.count, len(m.time_s[m.use[k]])) for m in node.menus)
            for k in numbers
        )
        for node, numbers in _alternatives(price_list, offered)
    )


def _alternatives(
    price_list: PriceList, offered: Masks | None
) -> Iterator[tuple[Node, Sequence[int]]]:
    for number, node in enumerate(price_list.nodes):
        every = range(len(node.time_s))
        yield node, every if offered is None else [k for k in every if offered[number][k]]


def _compositions(total: int, parts: int) -> int:
    return comb(total + parts - 1, parts - 1)


def selections(price_list: PriceList, offered: Masks | None = None) -> Iterator[Selection]:
    """All of them."""
    per_node = [
        [(k, s) for k in numbers for s in product(*(spreads(menu, k) for menu in node.menus))]
        for node, numbers in _alternatives(price_list, offered)
    ]
    for chosen in product(*per_node):
        yield Selection(tuple(k for k, _ in chosen), tuple(s for _, s in chosen))


def spreads(menu: Menu, alternative: int) -> list[tuple[int, ...]]:
    """All ways to spread a menu's copies over the storages of an alternative's use."""

    def spread(total: int, parts: int) -> Iterator[tuple[int, ...]]:
        if parts == 1:
            yield (total,)
            return
        for first in range(total + 1):
            for rest in spread(total - first, parts - 1):
                yield (first, *rest)

    return list(spread(menu.count, len(menu.time_s[menu.use[alternative]])))
