"""What a step waits for: the chain of tasks, each begun when the one before let it, to the end.

To make the step shorter, something on it must become shorter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator
from typing import NamedTuple

from autopar.simulator.pipeline import Time
from autopar.simulator.timeline import Timeline, ready_s


class Piece(NamedTuple):
    """A task of the chain, until the next one begins.

    ``kind``: that of the action, or ``send``, ``exchange``, ``norm``. ``row``: who does it or sends
    it; of an exchange, the first of those that take part.
    """

    task: int
    row: int
    kind: str
    start_s: Time
    end_s: Time


def critical_path(timeline: Timeline) -> list[Piece]:
    """From 0 to ``step_time_s``, without gaps.

    Where a task waited for two that ended at the same moment, the one before it in its row counts,
    then what it reads, then what had its link.
    """
    if timeline.stretched is None:
        return _Back(timeline).path()
    before, clock = timeline.stretched
    return [
        piece._replace(start_s=start_s, end_s=end_s)
        for piece in _Back(before).path()
        for start_s, end_s in [clock.of([piece.start_s, piece.end_s])]
    ]


def shares_of_step(timeline: Timeline) -> dict[str, Time]:
    """How long each kind is on the critical path; together ``step_time_s``."""
    found: dict[str, Time] = defaultdict(int)
    for piece in critical_path(timeline):
        found[piece.kind] += piece.end_s - piece.start_s
    return dict(found)


class _Back:
    """Goes back from the last task: what ended when it began?"""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline, self._arrangement = timeline, timeline.arrangement
        self._actions = self._arrangement.actions
        self._exchanges = self._actions + self._arrangement.transfers
        self._before_action: dict[int, list[int]] = defaultdict(list)
        for task, reader in enumerate(self._arrangement.reader, self._actions):
            self._before_action[reader].append(task)
        for task, exchange in enumerate(self._arrangement.exchanges, self._exchanges):
            for update in exchange.updates:
                self._before_action[update].append(task)
        self._freed: dict[tuple[Hashable, Time], list[int]] = defaultdict(list)
        for task in range(self._actions, len(timeline.ends)):
            for link in self._links(task):
                self._freed[link, timeline.ends[task]].append(task)

    def path(self) -> list[Piece]:
        starts, ends = self._timeline.starts, self._timeline.ends
        task = max(range(len(ends)), key=ends.__getitem__)
        found, seen, until_s = [], {task}, ends[task]
        while True:
            start_s = starts[task]
            found.append(Piece(task, self._row(task), self._kind(task), start_s, until_s))
            if start_s == 0:
                return found[::-1]
            task = next(before for before in self._before(task) if before not in seen)
            seen.add(task)
            until_s = start_s

    def _before(self, task: int) -> Iterator[int]:
        """Tasks that ended, or were far enough, when ``task`` began."""
        arrangement, timeline = self._arrangement, self._timeline
        starts, ends = timeline.starts, timeline.ends
        start_s = starts[task]
        if task < self._actions:
            if task > arrangement.first[arrangement.row_of[task]] and ends[task - 1] == start_s:
                yield task - 1
            for before in self._before_action[task]:
                if ends[before] + self._latency_s(before) == start_s:
                    yield before
            return
        if task < self._exchanges:
            sender = arrangement.sender[task - self._actions]
            if ends[sender] == start_s:
                yield sender
        else:
            exchange = arrangement.exchanges[task - self._exchanges]
            for trigger in exchange.triggers:
                if ready_s(exchange, trigger, starts, timeline.lengths) == start_s:
                    yield trigger
        for link in self._links(task):
            yield from self._freed[link, start_s]

    def _links(self, task: int) -> tuple[Hashable, ...]:
        """What a transfer or an exchange has to itself."""
        if task < self._exchanges:
            number = self._arrangement.route_of[task - self._actions]
            return self._timeline.passages[number].links
        exchange = self._arrangement.exchanges[task - self._exchanges]
        streams = tuple(("communication stream", row) for row in exchange.rows)
        if exchange.synchronisation is None:
            return streams
        return streams + self._timeline.pipeline.synchronisations[exchange.synchronisation].links

    def _latency_s(self, task: int) -> Time:
        if task >= self._exchanges:
            return 0
        return self._timeline.passages[self._arrangement.route_of[task - self._actions]].latency_s

    def _row(self, task: int) -> int:
        if task < self._actions:
            return self._arrangement.row_of[task]
        if task < self._exchanges:
            number = self._arrangement.route_of[task - self._actions]
            return self._arrangement.routes[number].source_row
        return self._arrangement.exchanges[task - self._exchanges].rows[0]

    def _kind(self, task: int) -> str:
        if task < self._actions:
            return self._arrangement.action(task).kind
        if task < self._exchanges:
            return "send"
        exchange = self._arrangement.exchanges[task - self._exchanges]
        return "norm" if exchange.synchronisation is None else "exchange"
