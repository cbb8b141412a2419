"""Rows of a schedule played for many candidates at once: each number is an array.

They are played for no more microbatches than it takes until each further one takes as long as the
one before, and keeps as much more. Transfers do not wait for one another.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from autopar.ir.schedule import KINDS, Action, Rows
from autopar.schedules import SCHEDULES
from autopar.simulator.arrangement import Arrangement, arrange
from autopar.simulator.pipeline import Wiring

Numbers = NDArray[np.float64]

(
    FORWARD,
    BACKWARD,
    INPUTS,
    WEIGHTS,
    SUM,
    REDUCTION,
    UPDATE,
    ALWAYS,
    GRADIENTS,
    LAUNCHES,
) = range(10)
"""What is known of a stage: seconds of one microbatch forward and backward, of the two parts of a
backward that has two, of adding its gradients to those of others, and once a step; bytes held
always, and of gradients; and what a host that goes ahead takes for a microbatch."""

SAVED, LEFT = range(2)
"""And only when it is asked for: bytes saved by a microbatch, and left of it between the two parts
of its backward."""

FIRST, MIDDLE, LAST, WHOLE, COPY = range(5)
"""Kinds of stages; ``COPY`` is what one more copy of the block adds."""

STEADY = 3
"""After so many microbatches for each row, every further one takes as long as the one before."""


@lru_cache(maxsize=64)
def rows_of(schedule: str, rows: int, chunks: int, count: int) -> Rows:
    stages = SCHEDULES[schedule].stages(rows, chunks)
    chain = tuple((stage, stage + 1) for stage in range(stages - 1))
    return SCHEDULES[schedule](stages, count, chunks, chain)


@lru_cache(maxsize=None)
def placed(schedule: str, rows: int, chunks: int) -> tuple[tuple[int, ...], ...]:
    """The stages of each row."""
    found = rows_of(schedule, rows, chunks, rows)
    return tuple(tuple(sorted({action.stage for action in row})) for row in found)


@lru_cache(maxsize=None)
def has_parts(schedule: str, rows: int, chunks: int) -> bool:
    return any(
        action.kind == "I" for row in rows_of(schedule, rows, chunks, rows) for action in row
    )


def kinds_of(schedule: str, rows: int, chunks: int) -> list[int]:
    """Of each stage."""
    return [FIRST, *[MIDDLE] * (SCHEDULES[schedule].stages(rows, chunks) - 2), LAST]


@lru_cache(maxsize=None)
def stages_of_rows(schedule: str, rows: int, chunks: int) -> Numbers:
    """How many stages of the kinds ``FIRST``, ``MIDDLE`` and ``LAST`` each row has."""
    kinds = kinds_of(schedule, rows, chunks)
    of_rows = placed(schedule, rows, chunks)
    found = np.zeros((rows, LAST + 1))
    for row, stages in enumerate(of_rows):
        for stage in stages:
            found[row, kinds[stage]] += 1
    return found


def played_count(count: int, rows: int) -> int:
    """How many microbatches are played for so many.

    >>> [played_count(n, 4) for n in (8, 16, 17, 18, 20)]
    [8, 16, 17, 18, 16]
    """
    longest = (STEADY + 1) * rows
    return count if count <= longest else longest + count % rows


def played(
    schedule: str,
    rows: int,
    chunks: int,
    counts: NDArray[np.int64],
    of: dict[int, Numbers],
    links: Numbers,
) -> list[list[Numbers]]:
    """When each row has done its passes of each of its stages; ``counts``: of microbatches, for all
    of which as many are played."""
    ends = iter(
        _in_steady_state(
            lambda count: _play(schedule, rows, chunks, count, counts, of, links), counts, rows
        )
    )
    return [[next(ends) for _ in stages] for stages in placed(schedule, rows, chunks)]


def most_kept(
    schedule: str,
    rows: int,
    chunks: int,
    counts: NDArray[np.int64],
    gradients: dict[int, Numbers],
    kept: dict[int, Numbers],
) -> Numbers:
    """What each row keeps of microbatches in flight and of gradients, at most. ``gradients`` and
    ``kept`` (of a microbatch: ``SAVED`` and ``LEFT``) by kind of stage."""
    none = np.zeros(len(counts))
    sizes = np.array(
        [
            [kept[kind][:, what] if kind in kept else none for kind in (FIRST, MIDDLE, LAST)]
            for what in (SAVED, LEFT)
        ]
        + [[gradients.get(kind, none) for kind in (FIRST, MIDDLE, LAST)]]
    ).reshape(-1, len(counts))

    def of_few(count: int) -> list[Numbers]:
        moments, starts = _largest(schedule, rows, chunks, count)
        return [np.maximum.reduceat(moments @ sizes, starts)]

    (found,) = _in_steady_state(of_few, counts, rows)
    return found


def _in_steady_state(
    of_count: Callable[[int], list[Numbers]], counts: NDArray[np.int64], rows: int
) -> list[Numbers]:
    """Of ``counts`` from what it is of a few microbatches."""
    count = played_count(int(counts[0]), rows)
    few = of_count(count)
    more = (counts - count) / rows
    if not more.any():
        return few
    fewer = of_count(count - rows)
    return [b + (b - a) * more for a, b in zip(fewer, few, strict=True)]


@lru_cache(maxsize=64)
def _tasks(schedule: str, rows: int, chunks: int, count: int) -> Arrangement:
    stages = SCHEDULES[schedule].stages(rows, chunks)
    feeds = tuple((stage, stage + 1, True) for stage in range(stages - 1))
    return arrange(rows_of(schedule, rows, chunks, count), Wiring(stages, feeds))


def _play(
    schedule: str,
    rows: int,
    chunks: int,
    count: int,
    counts: NDArray[np.int64],
    of: dict[int, Numbers],
    links: Numbers,
) -> list[Numbers]:
    """``count`` microbatches, with the sums of ``counts``; each number an array. When the last
    backwards end, of each row's stages in their order."""
    kinds = kinds_of(schedule, rows, chunks)
    tasks = _tasks(schedule, rows, chunks, count)
    added = (counts - 1) / counts
    lengths = {
        kind: {
            "F": numbers[:, FORWARD],
            "B": numbers[:, BACKWARD] + added * numbers[:, SUM],
            "I": numbers[:, INPUTS],
            "W": numbers[:, WEIGHTS] + added * numbers[:, SUM],
        }
        for kind, numbers in of.items()
    }
    zero = np.zeros(len(links))
    length_of = {
        price: zero
        if KINDS[price % len(KINDS)] == "U"
        else lengths[kinds[price // len(KINDS)]][KINDS[price % len(KINDS)]]
        for price in set(tasks.price_of)
    }
    delay = [
        links[:, int(route.backward), min(route.source_row, route.target_row)]
        if abs(route.source_row - route.target_row) == 1
        else links[:, int(route.backward), rows - 1]
        for route in tasks.routes
    ]
    sent = _read_by(tasks)
    free, ended = [zero] * rows, [zero] * tasks.actions
    row_of, price_of, actions = tasks.row_of, tasks.price_of, tasks.actions
    maximum = np.maximum
    for task in tasks.order:
        if task < actions:
            row = row_of[task]
            begin = free[row]
            for sender, route in sent[task]:
                begin = maximum(begin, ended[sender] + delay[route])
            free[row] = ended[task] = begin + length_of[price_of[task]]
    return [ended[number] for number in _last_backwards(tasks)]


def _read_by(tasks: Arrangement) -> list[list[tuple[int, int]]]:
    """For each action what it waits for: who sends it, and by which route."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(tasks.actions)]
    for sender, reader, route in zip(tasks.sender, tasks.reader, tasks.route_of, strict=True):
        found[reader].append((sender, route))
    return found


def _last_backwards(tasks: Arrangement) -> Iterator[int]:
    """Of each stage of each row."""
    for first, row in zip(tasks.first, tasks.rows, strict=False):
        last = {a.stage: i for i, a in enumerate(row, first) if a.kind in ("B", "W")}
        yield from (last[stage] for stage in sorted(last))


@lru_cache(maxsize=512)
def _largest(
    schedule: str, rows: int, chunks: int, count: int
) -> tuple[Numbers, NDArray[np.int64]]:
    """At the moments that may be the worst of a row: how many microbatches of each kind of stage it
    keeps, how many between the two parts of their backward, and gradients of how many stages of
    each kind. All rows together, and where each begins."""
    kinds = kinds_of(schedule, rows, chunks)
    of_rows = [_moments(row, kinds) for row in rows_of(schedule, rows, chunks, count)]
    starts = np.cumsum([0, *map(len, of_rows)])[:-1]
    return np.concatenate([np.array(each, dtype=float) for each in of_rows]), starts


def _moments(row: Sequence[Action], kinds: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Before something is let go of, or at the end."""
    saved, left, gradients = [0] * (LAST + 1), [0] * (LAST + 1), [0] * (LAST + 1)
    seen: set[tuple[int, ...]] = set()
    begun: set[int] = set()
    for action in row:
        kind = kinds[action.stage]
        if action.kind == "F":
            saved[kind] += 1
            continue
        seen.add((*saved, *left, *gradients))
        (left if action.kind == "W" else saved)[kind] -= 1
        if action.kind == "I":
            left[kind] += 1
        else:
            gradients[kind] += action.stage not in begun
            begun.add(action.stage)
    seen.add((*saved, *left, *gradients))
    return tuple(_largest_of(seen))


def _largest_of(seen: Collection[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """Those to which no other is equal or above in every number.

    >>> sorted(_largest_of({(1, 2), (2, 1), (1, 1)}))
    [(1, 2), (2, 1)]
    """
    each = list(seen)
    counts = np.array(each)
    above = np.ones((len(each), len(each)), dtype=bool)
    for column in counts.T:
        above &= column[:, None] >= column
    yield from (one for one, by in zip(each, above.sum(axis=0), strict=True) if by == 1)


__all__ = [
    "ALWAYS",
    "BACKWARD",
    "COPY",
    "FIRST",
    "FORWARD",
    "GRADIENTS",
    "INPUTS",
    "LAST",
    "LAUNCHES",
    "LEFT",
    "MIDDLE",
    "REDUCTION",
    "SAVED",
    "SUM",
    "UPDATE",
    "WEIGHTS",
    "WHOLE",
    "Numbers",
    "has_parts",
    "kinds_of",
    "most_kept",
    "placed",
    "played",
    "played_count",
    "rows_of",
    "stages_of_rows",
]
