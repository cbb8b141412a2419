"""When everything in the rows happens: the rows of a schedule played with the times of a pipeline.

Each row has a compute stream, which does its actions one after the other, and a communication
stream, which does its gradient exchanges one after the other; transfers take links. A transfer
begins when what it sends is there and its links are free, whatever the receiver is doing.

**The rule of links.** A link does one thing at a time. Its transfers and exchanges take their turn
in the order in which they would be ready if communication took no time (ties: the order of
``Arrangement``). So the turns do not depend on bytes, bandwidth or latency: every task begins when
the last of a fixed set of tasks ends, and more bytes or latency are never faster. For the same
reason nothing can block for ever on links if the rows alone cannot. Exchanges take turns on
communication streams by the same rule.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopar.errors import AutoparError
from autopar.ir.schedule import KINDS, Kind, Rows, most_in_flight, weight_copies
from autopar.ir.simulation import Memory
from autopar.simulator.arrangement import Arrangement, Exchange, arrange
from autopar.simulator.pipeline import Passage, Pipeline, StageCost, StageMemory, Time

Stream = Literal["compute", "communication", "transfer"]


class Event(NamedTuple):
    """``row``: who does it, the sender of a transfer. ``kind``: ``F``, ``B``, ``I``, ``W``, ``U``,
    ``send``, ``exchange`` or ``norm``. ``to``: the row that a transfer goes to."""

    row: int
    stream: Stream
    kind: str
    name: str
    start_s: Time
    end_s: Time
    to: int | None = None


class Parts(NamedTuple):
    """What a row's compute stream does in a step; together ``step_time_s``."""

    forward_s: Time
    backward_s: Time
    update_s: Time
    idle_s: Time


def simulate(rows: Rows, pipeline: Pipeline) -> Timeline:
    """The timeline of rows that are needed once; otherwise ``arrange`` them once and ``play``."""
    return play(arrange(rows, pipeline.wiring), pipeline)


def play(arrangement: Arrangement, pipeline: Pipeline) -> Timeline:
    """Linear in the number of tasks, below 1 us each; n log n where rows share links.

    The pipeline must have the wiring that the rows were arranged for.
    """
    assert pipeline.wiring == arrangement.wiring, (pipeline.wiring, arrangement.wiring)
    prices = prices_of(arrangement, pipeline)
    lengths = [prices[price] for price in arrangement.price_of]
    passages = passages_of(arrangement, pipeline)
    order = arrangement.order
    if turns_matter(arrangement, pipeline, passages):
        order = turns(arrangement, lengths)
    starts, ends = _times(arrangement, pipeline, order, lengths, passages)
    return Timeline(arrangement, pipeline, lengths, passages, starts, ends)


def passages_of(arrangement: Arrangement, pipeline: Pipeline) -> list[Passage]:
    """One for each route."""
    return [
        pipeline.network.passage(pipeline.feeds[r.feed], r.backward, r.source_row, r.target_row)
        for r in arrangement.routes
    ]


def prices_of(arrangement: Arrangement, pipeline: Pipeline) -> dict[int, Time]:
    """By the numbers of ``price_of``, only for what the rows do."""
    prices: dict[int, Time] = {}
    for price in sorted(set(arrangement.price_of)):
        stage, place = divmod(price, len(KINDS))
        cost = pipeline.stages[stage]
        time_s = _TIME_OF[KINDS[place]](cost)
        if time_s is None:
            raise AutoparError(
                f"the schedule splits the backward of stage {stage} in I and W, which has times "
                "for the whole backward only; give both, or take a schedule with B"
            )
        prices[price] = time_s
    return prices


_TIME_OF = {
    "F": lambda cost: cost.forward_s,
    "B": lambda cost: cost.backward_s,
    "I": lambda cost: cost.input_gradient_s,
    "W": lambda cost: cost.weight_gradient_s,
    "U": lambda cost: cost.update_s,
}


def turns_matter(arrangement: Arrangement, pipeline: Pipeline, passages: Sequence[Passage]) -> bool:
    """Whether tasks of several rows share a link or an exchange; else the rows give all turns."""
    for exchange in arrangement.exchanges:
        if len(exchange.rows) > 1 and exchange.synchronisation is not None:
            return True
    users: dict[Hashable, set[Hashable]] = defaultdict(set)
    for route, passage in zip(arrangement.routes, passages, strict=True):
        for link in passage.links:
            users[link].add(route.source_row)
    for number, synchronisation in enumerate(pipeline.synchronisations):
        for link in synchronisation.links:
            users[link].add(("exchange", number))
    return any(len(of_link) > 1 for of_link in users.values())


def turns(arrangement: Arrangement, lengths: Sequence[Time]) -> list[int]:
    """All tasks in the order in which they are ready if communication takes no time.

    ``lengths``: of the actions. Each task comes after all that it waits for, so rows that take part
    in tasks in this order, one after the other, never wait for each other in a ring, even where a
    send waits for its receiver.
    """
    row_of, sender, reader = arrangement.row_of, arrangement.sender, arrangement.reader
    actions, exchanges = arrangement.actions, arrangement.exchanges
    after_transfers = actions + arrangement.transfers
    free: list[Time] = [0] * len(arrangement.rows)
    ready: list[Time] = [0] * (after_transfers + len(exchanges))
    for task in arrangement.order:
        if task < actions:
            row = row_of[task]
            if free[row] > ready[task]:
                ready[task] = free[row]
            free[row] = ready[task] + lengths[task]
        elif task < after_transfers:
            source, target = sender[task - actions], reader[task - actions]
            ready[task] = sent = ready[source] + lengths[source]
            if sent > ready[target]:
                ready[target] = sent
        else:
            exchange = exchanges[task - after_transfers]
            ready[task] = now = _exchange_ready(exchange, ready, lengths)
            for update in exchange.updates:
                if now > ready[update]:
                    ready[update] = now
    return sorted(arrangement.order, key=ready.__getitem__)


def _exchange_ready(exchange: Exchange, starts: list[Time], lengths: Sequence[Time]) -> Time:
    """When its part of every gradient is there."""
    return max(ready_s(exchange, trigger, starts, lengths) for trigger in exchange.triggers)


def ready_s(
    exchange: Exchange, trigger: int, starts: Sequence[Time], lengths: Sequence[Time]
) -> Time:
    """When the part of one of its gradients is there."""
    if exchange.part == exchange.parts:
        return starts[trigger] + lengths[trigger]
    return starts[trigger] + lengths[trigger] * Fraction(exchange.part, exchange.parts)


def _times(
    arrangement: Arrangement,
    pipeline: Pipeline,
    order: Sequence[int],
    lengths: Sequence[Time],
    passages: Sequence[Passage],
) -> tuple[list[Time], list[Time]]:
    """When each task starts and ends; a transfer ends when it leaves its links."""
    row_of, sender, reader = arrangement.row_of, arrangement.sender, arrangement.reader
    actions, route_of = arrangement.actions, arrangement.route_of
    after_transfers = actions + arrangement.transfers
    routes = [(p.links, p.busy_s, p.latency_s) for p in passages]
    free: list[Time] = [0] * len(arrangement.rows)  # compute streams
    free_communication: list[Time] = [0] * len(arrangement.rows)
    free_links: dict[Hashable, Time] = defaultdict(int)
    starts: list[Time] = [0] * (after_transfers + len(arrangement.exchanges))
    ends = starts.copy()
    # until an action is done, its entry of ``starts`` is the earliest start known so far
    for task in order:
        if task < actions:
            row = row_of[task]
            start = free[row]
            if start > starts[task]:
                starts[task] = start
            else:
                start = starts[task]
            free[row] = ends[task] = start + lengths[task]
        elif task < after_transfers:
            number = task - actions
            links, busy_s, latency_s = routes[route_of[number]]
            start = ends[sender[number]]
            for link in links:
                if free_links[link] > start:
                    start = free_links[link]
            end = start + busy_s
            for link in links:
                free_links[link] = end
            starts[task], ends[task] = start, end
            end += latency_s
            target = reader[number]
            if end > starts[target]:
                starts[target] = end
        else:
            exchange = arrangement.exchanges[task - after_transfers]
            time_s, links = exchange_time(exchange, pipeline)
            start = max(
                _exchange_ready(exchange, starts, lengths),
                max(free_communication[row] for row in exchange.rows),
                max((free_links[link] for link in links), default=0),
            )
            starts[task], ends[task] = start, start + time_s
            for row in exchange.rows:
                free_communication[row] = ends[task]
            for link in links:
                free_links[link] = ends[task]
            for update in exchange.updates:
                starts[update] = max(starts[update], ends[task])
    return starts, ends


def exchange_time(exchange: Exchange, pipeline: Pipeline) -> tuple[Time, tuple[Hashable, ...]]:
    if exchange.synchronisation is None:
        assert pipeline.norm_s is not None
        return pipeline.norm_s, ()
    of_all = pipeline.synchronisations[exchange.synchronisation]
    return of_all.time_s * Fraction(1, exchange.parts), of_all.links


@dataclass(frozen=True, slots=True, eq=False)
class Clock:
    """What the times of a timeline are in another one in which some moments take longer; straight
    lines between ``times``, which rise from 0."""

    times: NDArray[np.float64]
    become: NDArray[np.float64]

    def of(self, times: Sequence[Time]) -> list[Time]:
        found: list[Time] = np.interp(
            np.array(times, dtype=float), self.times, self.become
        ).tolist()
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """When each task of ``arrangement`` starts and ends, and what can be read off that.

    ``lengths``: of the actions. ``starts``, ``ends``: of all tasks; a transfer has arrived
    ``passages[route].latency_s`` after its end. ``stretched``: the timeline that this one was made
    of (``sharing``), in which what waits for what can be seen by times that are equal.
    """

    arrangement: Arrangement
    pipeline: Pipeline
    lengths: list[Time]
    passages: list[Passage]
    starts: list[Time]
    ends: list[Time]
    stretched: tuple[Timeline, Clock] | None = None

    @property
    def rows(self) -> Rows:
        return self.arrangement.rows

    @property
    def step_time_s(self) -> Time:
        """Until the last update."""
        return max(self.ends)

    @property
    def launches_s(self) -> Time:
        """What the busiest host takes in a step, if hosts go ahead of their devices: it begins
        with the step, and no step is shorter."""
        stages = self.pipeline.stages
        return max(
            sum(stages[action.stage].launches_s for action in row if action.kind == "F")
            for row in self.rows
        )

    @property
    def with_hosts_s(self) -> Time:
        """What devices take, or their busiest host, whichever is longer."""
        return max(self.step_time_s, self.launches_s)

    @property
    def passes_s(self) -> Time:
        """Until the last forward or backward: the step without updates and what they wait for."""
        numbers = (self._row_actions(row) for row in range(len(self.rows)))
        return max((self.ends[i] for row in numbers for i in row), default=0)

    def by(self, clock: Clock) -> Timeline:
        """The same at the times of a clock."""
        starts, ends = clock.of(self.starts), clock.of(self.ends)
        count = self.arrangement.actions
        lengths: list[Time] = [b - a for a, b in zip(starts[:count], ends[:count], strict=True)]
        return replace(self, lengths=lengths, starts=starts, ends=ends, stretched=(self, clock))

    def busy_s(self, row: int) -> Time:
        """What the forwards and backwards of a row take together."""
        return sum(self.lengths[i] for i in self._row_actions(row))

    def bubble_s(self, row: int) -> Time:
        """What the row's compute stream idles until the last forward or backward of all rows."""
        return self.passes_s - self.busy_s(row)

    def parts(self, row: int) -> Parts:
        """Where a row's time goes, until the last update of all rows."""
        of_kind: dict[Kind, Time] = dict.fromkeys(KINDS, 0)
        for i, action in enumerate(self.rows[row], self.arrangement.first[row]):
            of_kind[action.kind] += self.lengths[i]
        forward_s, update_s = of_kind["F"], of_kind["U"]
        backward_s = of_kind["B"] + of_kind["I"] + of_kind["W"]
        idle_s = self.step_time_s - forward_s - backward_s - update_s
        return Parts(forward_s, backward_s, update_s, idle_s)

    def most_in_flight(self, row: int, stage: int | None = None) -> int:
        """See ``ir.schedule.most_in_flight``; a row's actions happen one after the other."""
        return most_in_flight(self.rows[row], stage)

    def weight_copies(self, row: int) -> int:
        """See ``ir.schedule.weight_copies``."""
        return weight_copies(self.rows[row])

    def sent_bytes(self) -> dict[tuple[int, int], int]:
        """What all transfers of a step between two rows have, by sending and receiving row."""
        times = Counter(self.arrangement.route_of)
        sent: Counter[tuple[int, int]] = Counter()
        for number, route in enumerate(self.arrangement.routes):
            feed = self.pipeline.feeds[route.feed]
            sent[route.source_row, route.target_row] += times[number] * feed.sent_bytes(
                route.backward
            )
        return dict(sent)

    def events(self) -> Iterator[Event]:
        """Row by row, then the transfers, then the exchanges (one event for each row)."""
        arrangement = self.arrangement
        task = 0
        for r, row in enumerate(self.rows):
            for action in row:
                yield Event(
                    r, "compute", action.kind, str(action), self.starts[task], self.ends[task]
                )
                task += 1
        for sender, reader, number in zip(
            arrangement.sender, arrangement.reader, arrangement.route_of, strict=True
        ):
            route = arrangement.routes[number]
            source, target = arrangement.action(sender), arrangement.action(reader)
            yield Event(
                route.source_row,
                "transfer",
                "send",
                f"{source} to {target}",
                self.starts[task],
                self.ends[task] + self.passages[number].latency_s,
                route.target_row,
            )
            task += 1
        for exchange in arrangement.exchanges:
            kind, name = "norm", "sums over all rows"
            if exchange.synchronisation is not None:
                stages = arrangement.wiring.synchronisations[exchange.synchronisation][0]
                kind, name = "exchange", f"gradients of {', '.join(map(str, stages))}"
                if exchange.parts > 1:
                    name += f", part {exchange.part} of {exchange.parts}"
            for r in exchange.rows:
                yield Event(r, "communication", kind, name, self.starts[task], self.ends[task])
            task += 1

    def memory(self, row: int) -> Memory:
        """On one device of a row when it needs most, and what it does then.

        Parameters, gradients and optimizer states of all its stages, and old versions of weights
        until their last use; activations from the start of a forward to the end of its last
        backward; what each action needs while it runs; what is sent until it has left, and what is
        received from the start of its transfer until it is used.
        """
        return _peaks(self, [row])[0]

    def memories(self) -> list[Memory]:
        """``memory`` of every row, in less time than row by row."""
        return _peaks(self, range(len(self.rows)))

    def _row_actions(self, row: int) -> list[int]:
        """The numbers of a row's forwards and backwards."""
        start = self.arrangement.first[row]
        return [i for i, a in enumerate(self.rows[row], start) if a.kind != "U"]


class _Held(NamedTuple):
    """``bytes`` of a kind of ``ir.simulation.Memory`` for a while."""

    kind: str
    bytes: int
    start_s: Time
    end_s: Time


def _peaks(timeline: Timeline, rows: Sequence[int]) -> list[Memory]:
    buffers: dict[int, list[_Held]] = {row: [] for row in rows}
    _put_under_way(timeline, buffers)
    return [_peak(timeline, row, buffers[row]) for row in rows]


def _peak(timeline: Timeline, row: int, buffers: Sequence[_Held]) -> Memory:
    actions = timeline.rows[row]
    stages = {
        stage: _memory_of(timeline.pipeline.stages[stage], stage)
        for stage in sorted({action.stage for action in actions})
    }
    now: Counter[str] = Counter(
        parameters=sum(memory.parameters_bytes for memory in stages.values()),
        gradients=sum(memory.gradients_bytes for memory in stages.values()),
        optimizer=sum(memory.optimizer_bytes for memory in stages.values()),
    )
    changes: list[tuple[Time, bool, int, str]] = []  # what ends comes before what begins
    held = (_of_actions(timeline, row, stages), _versions(timeline, row, stages), buffers)
    for kind, size, start_s, end_s in chain.from_iterable(held):
        if size and start_s < end_s:
            changes += ((start_s, True, size, kind), (end_s, False, size, kind))
    most, most_bytes, when = Counter(now), sum(now.values()), changes and min(changes)[0]
    total = most_bytes
    for time_s, begins, size, kind in sorted(changes):
        change = size if begins else -size
        now[kind] += change
        total += change
        if total > most_bytes:
            most, most_bytes, when = Counter(now), total, time_s
    first = timeline.arrangement.first[row]
    begun = bisect_right(timeline.starts[first : first + len(actions)], when or 0)
    return Memory(
        **{f"{kind}_bytes": most[kind] for kind in _KINDS_OF_MEMORY},
        at=str(actions[max(0, begun - 1)]) if actions else "",
    )


_KINDS_OF_MEMORY = (
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "temporaries",
    "buffers",
)


def _memory_of(cost: StageCost, stage: int) -> StageMemory:
    if cost.memory is None:
        raise AutoparError(f"the memory of stage {stage} is not known; give its StageCost a memory")
    return cost.memory


def _of_actions(timeline: Timeline, row: int, stages: dict[int, StageMemory]) -> Iterator[_Held]:
    """Activations, and what actions need while they run."""
    starts, ends = timeline.starts, timeline.ends
    forward_s: dict[tuple[int, int], Time] = {}
    input_gradient_s: dict[tuple[int, int], Time] = {}
    for task, action in enumerate(timeline.rows[row], timeline.arrangement.first[row]):
        memory, place = stages[action.stage], (action.stage, action.microbatch)
        beside = memory.backward_bytes
        if action.kind == "F":
            forward_s[place] = starts[task]
            beside = memory.forward_bytes
        elif action.kind == "W":
            kept = memory.for_weights_bytes
            yield _Held("activations", kept, input_gradient_s[place], ends[task])
        elif action.kind == "U":
            beside = memory.update_bytes
        else:
            yield _Held("activations", memory.activations_bytes, forward_s[place], ends[task])
            input_gradient_s[place] = ends[task]
        yield _Held("temporaries", beside, starts[task], ends[task])


def _versions(timeline: Timeline, row: int, stages: dict[int, StageMemory]) -> Iterator[_Held]:
    """Weights that an update has replaced and that a later action still uses."""
    version: Counter[int] = Counter()
    replaced_s: dict[tuple[int, int], Time] = {}
    last_use_s: dict[tuple[int, int], Time] = {}
    for task, action in enumerate(timeline.rows[row], timeline.arrangement.first[row]):
        if action.kind == "U":
            replaced_s[action.stage, version[action.stage]] = timeline.ends[task]
            version[action.stage] += 1
        elif action.version is not None:
            last_use_s[action.stage, action.version] = timeline.ends[task]
    for (stage, number), until_s in last_use_s.items():
        from_s = replaced_s.get((stage, number), until_s)
        yield _Held("parameters", stages[stage].parameters_bytes, from_s, until_s)


def _put_under_way(timeline: Timeline, buffers: dict[int, list[_Held]]) -> None:
    """Adds to the rows of ``buffers`` what they send, receive, or hand on within themselves."""
    arrangement, starts, ends = timeline.arrangement, timeline.starts, timeline.ends
    feeds = timeline.pipeline.feeds
    routes = [
        (
            buffers.get(route.source_row),
            feeds[route.feed].kept_bytes(at_source=not route.backward),
            buffers.get(route.target_row),
            feeds[route.feed].kept_bytes(at_source=route.backward),
        )
        for route in arrangement.routes
    ]
    numbered = zip(arrangement.sender, arrangement.reader, arrangement.route_of, strict=True)
    for task, (sender, reader, number) in enumerate(numbered, arrangement.actions):
        sending, sent_bytes, receiving, received_bytes = routes[number]
        if sending is not None:
            sending.append(_Held("buffers", sent_bytes, ends[sender], ends[task]))
        if receiving is not None:
            receiving.append(_Held("buffers", received_bytes, starts[task], starts[reader]))
    for sender, reader, route in arrangement.local:
        if route.source_row in buffers:
            kept = feeds[route.feed].kept_bytes(at_source=route.backward)
            buffers[route.source_row].append(_Held("buffers", kept, ends[sender], starts[reader]))
