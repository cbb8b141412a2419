"""Random stage graphs with random rows, and a slow, plain way to time them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from fractions import Fraction
from graphlib import TopologicalSorter
from itertools import pairwise
from random import Random

from autopar.ir.schedule import Action, Rows
from autopar.simulator.arrangement import Arrangement
from autopar.simulator.pipeline import (
    Feed,
    Pipeline,
    PortLinks,
    StageCost,
    StageMemory,
    Synchronisation,
    Time,
)


@dataclass
class RandomWorld:
    """A random graph of stages, some in copies, on random rows in a random order that can end.

    ``split``: whether backwards are ``I`` and ``W``; ``None``: some are.
    """

    seed: int
    most_stages: int = 6
    most_microbatches: int = 4
    split: bool | None = None
    random: Random = field(init=False)
    rows: Rows = field(init=False)
    pipeline: Pipeline = field(init=False)

    def __post_init__(self) -> None:
        self.random = Random(self.seed)
        stages = self.random.randint(1, self.most_stages)
        feeds = self._feeds(stages)
        self.pipeline = Pipeline(
            stages=tuple(self._cost() for _ in range(stages)),
            feeds=feeds,
            network=PortLinks(Fraction(7), Fraction(self.random.randint(0, 300))),
            synchronisations=self._synchronisations(stages),
            norm_s=self.random.choice([None, self._time()]),
        )
        self.rows = self._rows(stages, feeds)

    def _splits(self, stage: int, microbatch: int) -> bool:
        return (stage + microbatch) % 2 == 0 if self.split is None else self.split

    def _time(self) -> Fraction:
        return Fraction(self.random.randint(1, 10**6), 997)  # equal sums are unlikely

    def _size(self) -> int:
        return self.random.randint(0, 5000)

    def _cost(self) -> StageCost:
        memory = StageMemory(*(self._size() for _ in range(8)))
        return StageCost(*(self._time() for _ in range(5)), memory)

    def _feeds(self, stages: int) -> tuple[Feed, ...]:
        pairs = [(a, b) for b in range(stages) for a in range(b)]
        chosen = self.random.sample(pairs, self.random.randint(0, min(len(pairs), 2 * stages)))
        return tuple(
            Feed(a, b, self._size(), self.random.choice([None, 17]), self.random.random() < 0.8)
            for a, b in chosen
        )

    def _synchronisations(self, stages: int) -> tuple[Synchronisation, ...]:
        found = []
        left = self.random.sample(range(stages), stages)
        while left and self.random.random() < 0.6:
            some = [left.pop() for _ in range(min(len(left), self.random.randint(1, 2)))]
            links = self.random.choice([(), (("out", 0),), (("in", 1), ("out", 1))])
            parts = self.random.randint(1, 3)
            found.append(Synchronisation(tuple(some), self._time(), parts, links))
        return tuple(found)

    def _rows(self, stages: int, feeds: tuple[Feed, ...]) -> Rows:
        """Does random actions that can be done until all are."""
        count = self.random.randint(1, stages + 1)
        microbatches = self.random.randint(1, self.most_microbatches)
        rows: list[list[Action]] = [[] for _ in range(count)]
        waits: dict[Action, set[Action]] = {}
        row_of: dict[Action, int] = {}
        for stage in range(stages):
            copies = self.random.sample(range(count), self.random.randint(1, min(2, count)))
            for i in range(microbatches):
                row = self.random.choice(copies)
                split = self._splits(stage, i)
                forward = Action(stage, "F", i)
                back = Action(stage, "I" if split else "B", i)
                waits[forward] = {Action(f.source, "F", i) for f in feeds if f.target == stage}
                waits[back] = {forward} | {
                    Action(f.target, "I" if self._splits(f.target, i) else "B", i)
                    for f in feeds
                    if f.source == stage and f.gradient
                }
                row_of[forward] = row_of[back] = row
                if split:
                    weights = Action(stage, "W", i)
                    waits[weights] = {back}
                    row_of[weights] = row
        done: set[Action] = set()
        while len(done) < len(waits):
            can = [a for a, before in waits.items() if a not in done and before <= done]
            action = self.random.choice(can)
            rows[row_of[action]].append(action)
            done.add(action)
        return tuple(map(tuple, rows))


Task = tuple[Hashable, ...]


def turns_of(arrangement: Arrangement) -> dict[Task, int]:
    """The place of each transfer and exchange in the order that decides between equal readiness."""
    found: dict[Task, int] = {}
    after = arrangement.actions + arrangement.transfers
    for place, task in enumerate(arrangement.order):
        if task >= after:
            exchange = arrangement.exchanges[task - after]
            found["exchange", exchange.synchronisation, exchange.part] = place
        elif task >= arrangement.actions:
            number = task - arrangement.actions
            route = arrangement.routes[arrangement.route_of[number]]
            microbatch = arrangement.action(arrangement.sender[number]).microbatch
            found["send", route.feed, route.backward, microbatch] = place
    return found


def timed_plainly(
    rows: Rows, pipeline: Pipeline, turns: Callable[[], dict[Task, int]]
) -> dict[Task, tuple[Time, Time]]:
    """When each task starts and ends: every task is a node of a graph and starts when the last that
    it waits for has ended. Shares no code with the simulator; ``turns`` decides between tasks that
    are ready for a link at the same moment. Raises ``CycleError`` if rows cannot end. Each stage is
    updated once."""
    full = [list(row) for row in rows]
    for row in full:
        last: dict[int, int] = {}
        for place, action in enumerate(row):
            if action.kind in "BW":
                last[action.stage] = place
        for stage in sorted(last, key=last.__getitem__):
            row.append(Action(stage, "U", 0))

    length: dict[Task, Time] = {}
    latency: dict[Task, Time] = {}
    waits: dict[Task, list[tuple[Task, Callable[[Time], Time]]]] = defaultdict(list)
    users: dict[Hashable, list[Task]] = defaultdict(list)
    where: dict[Action, tuple[int, Task]] = {}
    for r, row in enumerate(full):
        before: Task | None = None
        for action in row:
            cost = pipeline.stages[action.stage]
            task: Task = (r, str(action))
            length[task] = {
                "F": cost.forward_s,
                "B": cost.backward_s,
                "I": cost.input_gradient_s,
                "W": cost.weight_gradient_s,
                "U": cost.update_s,
            }[action.kind]
            if before is not None:
                _after(waits, task, before)
            before = task
            where[action] = (r, task)
    for action, (_, task) in where.items():
        saved = {"B": "F", "I": "F", "W": "I"}.get(action.kind)
        if saved is not None:
            _after(waits, task, where[action._replace(kind=saved)][1])
    microbatches = {a.microbatch for row in rows for a in row}

    def back(stage: int, i: int) -> Action:
        whole = Action(stage, "B", i)
        return whole if whole in where else Action(stage, "I", i)

    for number, feed in enumerate(pipeline.feeds):
        for i in microbatches:
            pairs = [(False, Action(feed.source, "F", i), Action(feed.target, "F", i))]
            if feed.gradient:
                pairs.append((True, back(feed.target, i), back(feed.source, i)))
            for backward, a, b in pairs:
                (source, sender), (target, reader) = where[a], where[b]
                if source == target:
                    _after(waits, reader, sender)
                    continue
                passage = pipeline.network.passage(feed, backward, source, target)
                task = ("send", number, backward, i)
                length[task], latency[task] = passage.busy_s, passage.latency_s
                _after(waits, task, sender)
                _after(waits, reader, task)
                for link in passage.links:
                    users[link].append(task)
    for number, of_all in enumerate(pipeline.synchronisations):
        for part in range(1, of_all.parts + 1):
            task = ("exchange", number, part)
            length[task] = of_all.time_s / of_all.parts
            streams = set()
            for r, row in enumerate(full):
                for stage in of_all.stages:
                    backward_of = [a for a in row if a.stage == stage and a.kind in "BW"]
                    if backward_of:
                        trigger = (r, str(backward_of[-1]))
                        left = length[trigger] * (of_all.parts - part) / of_all.parts
                        waits[task].append((trigger, lambda end, left=left: end - left))
                        _after(waits, (r, str(Action(stage, "U", 0))), task)
                        streams.add(("communication", r))
            for link in (*streams, *of_all.links):
                users[link].append(task)
    if pipeline.norm_s is not None:
        norm: Task = ("norm",)
        length[norm] = pipeline.norm_s
        for task in [*length]:
            if task != norm and (
                task[0] == "exchange" or (task[0] != "send" and "U" not in task[1])
            ):
                _after(waits, norm, task)
        for action, (_, task) in where.items():
            if action.kind == "U":
                _after(waits, task, norm)
        for r, row in enumerate(full):
            for action in row:
                if action.kind == "U":
                    _after(waits, (r, str(action)), norm)

    quiet = {
        task: 0 if task[0] in ("send", "exchange", "norm") else time
        for task, time in length.items()
    }
    ready = {task: start for task, (start, _) in _walk(waits, quiet, {}).items()}
    among_equals = turns()
    for of_link in users.values():
        in_turn = sorted(of_link, key=lambda task: (ready[task], among_equals[task]))
        for earlier, later in pairwise(in_turn):
            waits[later].append((earlier, lambda end: end))
    return _walk(waits, length, latency)


def _after(
    waits: dict[Task, list[tuple[Task, Callable[[Time], Time]]]], task: Task, before: Task
) -> None:
    waits[task].append((before, lambda end: end))


def _walk(
    waits: dict[Task, list[tuple[Task, Callable[[Time], Time]]]],
    length: dict[Task, Time],
    latency: dict[Task, Time],
) -> dict[Task, tuple[Time, Time]]:
    graph = {task: [before for before, _ in waits.get(task, ())] for task in length}
    times: dict[Task, tuple[Time, Time]] = {}
    for task in TopologicalSorter(graph).static_order():
        start: Time = 0
        for before, when in waits.get(task, ()):
            arrived = when(times[before][1])
            # latency is waited for by readers, not by the next on the link
            if before in latency and task[0] != "send" and task[0] != "exchange":
                arrived += latency[before]
            start = max(start, arrived)
        times[task] = (start, start + length[task])
    return times
