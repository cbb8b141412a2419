"""Peak memory of the devices of each row, as they work: what their instructions hold when.

Unlike a ``Timeline``, which knows when things happen, this counts what the runtime does: a buffer
for what arrives is there from where the row's instructions ask for it, which no speed changes; so
the peak can be promised to the byte. What is given back is kept until two more have followed
(``runtime.pipeline``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopar.ir.schedule import Kind
from autopar.ir.simulation import Memory
from autopar.simulator.arrangement import Arrangement
from autopar.simulator.memory import KINDS
from autopar.simulator.shared_gradients import ExchangeBytes
from autopar.simulator.stage_memory import NONE, Kinds, Moment, StageBytes, minus, plus

MOST_UNDER_WAY = 2
"""Of messages whose arrival nothing tells (gradients, and what has none), how many of a boundary a
process has under way before it waits for the first: more would keep their buffers for longer."""


class Way(NamedTuple):
    """A feed in one direction."""

    feed: int
    backward: bool


class Doing(NamedTuple):
    """``first``: the row's first backward on the stage."""

    kind: Kind
    stage: int
    first: bool


@dataclass(frozen=True)
class RowStates:
    """The different states in which a row begins its actions, in the order of their first time.

    ``counts``: a row for each state; microbatches that are saved and that wait for ``W``, and
    whether there are gradients, for each of ``stages``; then what has been asked for on each of
    ``ways``, and what was sent and is under way. ``names``: the first action in each state.
    """

    stages: tuple[int, ...]
    ways: tuple[Way, ...]
    doing: tuple[Doing, ...]
    names: tuple[str, ...]
    counts: NDArray[np.int64]
    under_way: tuple[int, ...]
    """At the end of the last action, for each of ``ways``."""


@dataclass(frozen=True, slots=True)
class FeedBytes:
    """On one device: of what goes forward, ``arriving`` and ``sent`` (beside what is saved);
    ``returning`` and ``given_back`` of the gradients that go back."""

    arriving: int
    sent: int
    returning: int
    given_back: int


def row_states(arrangement: Arrangement) -> tuple[RowStates, ...]:
    """Of rows without updates before their end. About 2 us a task."""
    found = _Counting(arrangement)
    found.count()
    return tuple(row.states() for row in found.rows)


class _Row:
    def __init__(self, stages: Sequence[int], ways: Sequence[Way]) -> None:
        self.stages, self.ways = tuple(stages), tuple(ways)
        many = 3 * len(self.stages)
        self.now = [0] * (many + 2 * len(self.ways))
        self.at = {stage: 3 * i for i, stage in enumerate(self.stages)}
        self.asked = {way: many + i for i, way in enumerate(self.ways)}
        self.sent = {way: many + len(self.ways) + i for i, way in enumerate(self.ways)}
        self.seen: dict[tuple[Doing, tuple[int, ...]], str] = {}

    def states(self) -> RowStates:
        counts = np.array([counts for _, counts in self.seen], dtype=np.int64)
        return RowStates(
            self.stages,
            self.ways,
            tuple(doing for doing, _ in self.seen),
            tuple(self.seen.values()),
            counts.reshape(len(self.seen), len(self.now)),
            tuple(self.now[place] for place in self.sent.values()),
        )


class _Counting:
    def __init__(self, arrangement: Arrangement) -> None:
        self.arrangement = arrangement
        ways: list[dict[Way, None]] = [{} for _ in arrangement.rows]
        for route in (*arrangement.routes, *(route for _, _, route in arrangement.local)):
            for row in (route.source_row, route.target_row):
                ways[row][Way(route.feed, route.backward)] = None
        self.rows = [
            _Row(sorted({action.stage for action in row}), tuple(of_row))
            for row, of_row in zip(arrangement.rows, ways, strict=True)
        ]
        # a forward within a row hands on what is saved already
        self.reads: dict[int, list[Way]] = defaultdict(list)
        self.hands_on: dict[int, list[Way]] = defaultdict(list)
        for reader, number in zip(arrangement.reader, arrangement.route_of, strict=True):
            route = arrangement.routes[number]
            self.reads[reader].append(Way(route.feed, route.backward))
        for sender, reader, route in arrangement.local:
            if route.backward:
                self.reads[reader].append(Way(route.feed, True))
                self.hands_on[sender].append(Way(route.feed, True))

    def count(self) -> None:
        arrangement = self.arrangement
        after_transfers = arrangement.actions + arrangement.transfers
        for task in arrangement.order:
            if task < arrangement.actions:
                self._act(task)
            elif task < after_transfers:
                route = arrangement.routes[arrangement.route_of[task - arrangement.actions]]
                way = Way(route.feed, route.backward)
                target, source = self.rows[route.target_row], self.rows[route.source_row]
                target.now[target.asked[way]] += 1
                place = source.sent[way]
                source.now[place] = min(source.now[place] + 1, MOST_UNDER_WAY)

    def _act(self, task: int) -> None:
        action = self.arrangement.action(task)
        if action.kind == "U":
            return
        row = self.rows[self.arrangement.row_of[task]]
        now, at = row.now, row.at[action.stage]
        for way in self.reads.get(task, ()):
            now[row.asked[way]] -= 1
        if action.kind in ("B", "I"):
            now[at] -= 1
        elif action.kind == "W":
            now[at + 1] -= 1
        doing = Doing(action.kind, action.stage, action.kind in ("B", "W") and not now[at + 2])
        row.seen.setdefault((doing, tuple(now)), str(action))
        if action.kind == "F":
            now[at] += 1
        elif action.kind == "I":
            now[at + 1] += 1
        else:
            now[at + 2] = 1
        for way in self.hands_on.get(task, ()):
            now[row.asked[way]] += 1


def row_memory(
    states: RowStates,
    stages: Mapping[int, StageBytes],
    feeds: Sequence[FeedBytes],
    updates: Sequence[int],
    exchange: ExchangeBytes,
) -> Memory:
    """The worst moment of a row, on each of its devices.

    ``updates``: the row's stages in the order of their updates. ``exchange``: of the gradients that
    other stages or rows have, too.
    """
    weights = [
        kinds
        for stage in states.stages
        for kinds in (stages[stage].saved, stages[stage].for_weights, stages[stage].gradients)
    ]
    weights += [_buffers(_asked(feeds, way)) for way in states.ways]
    weights += [_buffers(_sent(feeds, way)) for way in states.ways]
    moments = [_moment(stages, doing) for doing in states.doing]
    always = plus(*(stages[stage].always for stage in states.stages), NONE)
    beside = states.counts @ np.array([sum(kinds) for kinds in weights], dtype=np.int64)
    totals = beside + np.array([sum(moment.held) for moment in moments], dtype=np.int64)
    worst = int(np.argmax(totals))
    counted = zip(states.counts[worst].tolist(), weights, strict=True)
    held = [tuple(int(count) * size for size in kinds) for count, kinds in counted]
    found = [
        (plus(moments[worst].held, *held), f"{states.names[worst]}, {moments[worst].at}"),
        *_end(states, stages, feeds, updates, exchange),
    ]
    most, where = max(found, key=lambda pair: sum(pair[0]))
    kinds = {f"{kind}_bytes": n for kind, n in zip(KINDS, plus(always, most), strict=True)}
    return Memory(**kinds, at=where)


def _moment(stages: Mapping[int, StageBytes], doing: Doing) -> Moment:
    """Beside the state, which has the gradients already."""
    of = stages[doing.stage]
    if doing.first:
        return of.first
    moment = of.moments[doing.kind]
    if doing.kind in ("B", "W"):
        return Moment(minus(moment.held, of.gradients), moment.at)
    return moment


def _end(
    states: RowStates,
    stages: Mapping[int, StageBytes],
    feeds: Sequence[FeedBytes],
    updates: Sequence[int],
    exchange: ExchangeBytes,
) -> list[tuple[Kinds, str]]:
    """Gradients are reduced stage by stage, exchanged, and used stage by stage."""
    sent = zip(states.under_way, states.ways, strict=True)
    left = _buffers(sum(count * _sent(feeds, way) for count, way in sent))
    found = []
    for i, stage in enumerate(states.stages):
        before = (stages[other].reduced for other in states.stages[:i])
        after = (stages[other].gradients for other in states.stages[i + 1 :])
        moment = stages[stage].moments["R"]
        found.append((plus(left, moment.held, *before, *after), moment.at))
    reduced = plus(*(stages[stage].reduced for stage in states.stages), NONE)
    if exchange.most:
        beside = _of_kind("temporaries", exchange.most)
        found.append((plus(left, reduced, beside), "exchange of gradients"))
    exchanged = _of_kind("gradients", exchange.after)
    for stage in updates:
        moment = stages[stage].moments["U"]
        others = minus(reduced, stages[stage].reduced)
        found.append((plus(moment.held, others, exchanged), moment.at))
    return found


def _asked(feeds: Sequence[FeedBytes], way: Way) -> int:
    return feeds[way.feed].returning if way.backward else feeds[way.feed].arriving


def _sent(feeds: Sequence[FeedBytes], way: Way) -> int:
    return feeds[way.feed].given_back if way.backward else feeds[way.feed].sent


def _of_kind(kind: str, size_bytes: int) -> Kinds:
    return tuple(size_bytes if each == kind else 0 for each in KINDS)


def _buffers(size_bytes: int) -> Kinds:
    return _of_kind("buffers", size_bytes)


__all__ = ["FeedBytes", "RowStates", "row_memory", "row_states"]
