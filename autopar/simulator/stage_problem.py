"""Stages to be chosen: units with the prices of their alternatives, and what a choice is worth.

Whoever makes a ``StageProblem`` (from a profile, or from a traced model) knows where the numbers
come from; whoever searches it does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from heapq import heapify, heappop, heappush
from itertools import accumulate
from typing import Literal, NamedTuple

from autopar.ir.schedule import Feeds, Row, Rows, Schedule, Shape, homes, most_in_flight
from autopar.schedules import SCHEDULES
from autopar.simulator.arrangement import Arrangement, arrange
from autopar.simulator.pipeline import (
    Feed,
    Network,
    Pipeline,
    StageCost,
    StageMemory,
    Synchronisation,
    Time,
    Wiring,
)
from autopar.simulator.timeline import Timeline, exchange_time, play

Objective = Literal["step", "throughput"]
"""``step``: the time of one training step, by the timeline of the schedule's rows. ``throughput``:
of a step when steps follow each other without a gap, which is what the busiest row, communication
stream or link has to do in one."""

Groups = tuple[tuple[int, ...], ...]
"""The devices of each row."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Devices that are alike; numbered one after the other, those of the first pool first."""

    devices: int
    memory_limit_bytes: int
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a stage lies on its devices, for example ``tensor 4 x data 2`` on 8.

    All units of a stage have the same. ``parts``: into how many a tensor that goes to another stage
    is cut; each device has one of them, and several have the same where there are more devices.
    ``kind``: of the devices, that of a ``Pool``.
    """

    devices: int
    name: str = ""
    parts: int = 1
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Alternative:
    """One way to do a unit: ``name`` says which, beside the layout (``recomputed``).

    ``cost``: as of a stage that is this unit alone; its times are of one microbatch, and its bytes
    are on one device. ``synchronisation_s``: the exchange of its gradients inside the stage, once a
    step.
    """

    layout: Layout
    cost: StageCost
    synchronisation_s: Time = 0
    name: str = ""

    def __post_init__(self) -> None:
        assert self.cost.memory is not None, self
        halves = (self.cost.input_gradient_s, self.cost.weight_gradient_s)
        assert halves.count(None) != 1, self


@dataclass(frozen=True, slots=True)
class Unit:
    """What is never divided between stages: an operator, or a block.

    ``reads``: units, all before this one, whose outputs it takes. ``output_bytes``: of the whole
    output for one microbatch. ``gradient``: whether one comes back for it. Units with equal
    ``alternatives`` are interchangeable inside a stage.
    """

    name: str
    alternatives: tuple[Alternative, ...]
    reads: tuple[int, ...] = ()
    output_bytes: int = 0
    gradient: bool = True


@dataclass(frozen=True)
class StageProblem:
    """``units``: with m microbatches a step, asked for each m at most once; the same units reading
    the same ones for every m. ``microbatches``: those to try. ``network``: of rows on these
    devices. ``exchange_s``: of gradients (bytes on a device) between so many copies of a stage, for
    schedules that keep copies, and for parameters that stages share: ``shared`` has units and the
    bytes of what they have in common. ``norm_s``: as in ``Pipeline``. ``all_devices``: none may be
    idle."""

    units: Callable[[int], tuple[Unit, ...]]
    microbatches: tuple[int, ...]
    pools: tuple[Pool, ...]
    network: Callable[[Groups], Network]
    exchange_s: Callable[[int, int], Time]
    schedules: tuple[Schedule, ...] = tuple(SCHEDULES.values())
    objective: Objective = "step"
    norm_s: Time | None = None
    shared: tuple[tuple[tuple[int, ...], int], ...] = ()
    all_devices: bool = False

    @property
    def devices(self) -> int:
        return sum(pool.devices for pool in self.pools)

    @cached_property
    def limit_bytes(self) -> dict[str, int]:
        """On a device, by kind."""
        return {pool.kind: pool.memory_limit_bytes for pool in self.pools}


@dataclass(frozen=True, slots=True)
class StageChoice:
    """``units`` ascending; ``alternatives``: for each the place of its alternative in the unit."""

    units: tuple[int, ...]
    layout: Layout
    alternatives: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Staging:
    """Everything that is chosen. ``stages`` in the order of ``in_order``."""

    microbatches: int
    schedule: Schedule
    chunks: int
    stages: tuple[StageChoice, ...]


class Value(NamedTuple):
    """What a staging is worth by the objective, and the timeline that says so."""

    time_s: Time
    timeline: Timeline


def in_order(parts: Iterable[tuple[int, ...]], units: Sequence[Unit]) -> list[tuple[int, ...]]:
    """Stages so that each comes after all that it reads, and else by their first unit.

    Raises:
        ValueError: there is no such order, two of them wait for each other.
    """
    parts = sorted(parts)
    stage_of = {unit: s for s, part in enumerate(parts) for unit in part}
    before: list[set[int]] = [set() for _ in parts]
    after: list[set[int]] = [set() for _ in parts]
    for s, part in enumerate(parts):
        for unit in part:
            for read in units[unit].reads:
                if stage_of[read] != s:
                    before[s].add(stage_of[read])
                    after[stage_of[read]].add(s)
    ready = [s for s in range(len(parts)) if not before[s]]
    heapify(ready)
    found = []
    while ready:
        s = heappop(ready)
        found.append(parts[s])
        for t in after[s]:
            before[t].remove(s)
            if not before[t]:
                heappush(ready, t)
    if len(found) < len(parts):
        raise ValueError("stages wait for each other")
    return found


def reading_each_other(parts: Sequence[tuple[int, ...]], units: Sequence[Unit]) -> Feeds:
    """As schedules take them."""
    stage_of = {unit: s for s, part in enumerate(parts) for unit in part}
    pairs = {
        (stage_of[read], s) for s, part in enumerate(parts) for u in part for read in units[u].reads
    }
    return tuple(sorted((a, b) for a, b in pairs if a != b))


def kinds_of(units: Sequence[Unit]) -> tuple[list[int], list[tuple[Alternative, ...]]]:
    """For each unit its kind; and of each kind the alternatives."""
    numbers: dict[tuple[Alternative, ...], int] = {}
    seen: dict[int, int] = {}  # comparing long tuples takes long; most are the same object
    for unit in units:
        if id(unit.alternatives) not in seen:
            seen[id(unit.alternatives)] = numbers.setdefault(unit.alternatives, len(numbers))
    return [seen[id(unit.alternatives)] for unit in units], list(numbers)


def sum_of(alternatives: Sequence[Alternative]) -> tuple[StageCost, Time]:
    """A stage of several units, one after the other, and the exchange of its gradients."""
    costs = [alternative.cost for alternative in alternatives]
    memories = [cost.memory for cost in costs if cost.memory is not None]
    halves = all(c.input_gradient_s is not None and c.weight_gradient_s is not None for c in costs)
    return StageCost(
        forward_s=sum(cost.forward_s for cost in costs),
        backward_s=sum(cost.backward_s for cost in costs),
        update_s=sum(cost.update_s for cost in costs),
        input_gradient_s=sum(c.input_gradient_s or 0 for c in costs) if halves else None,
        weight_gradient_s=sum(c.weight_gradient_s or 0 for c in costs) if halves else None,
        memory=StageMemory(
            parameters_bytes=sum(m.parameters_bytes for m in memories),
            gradients_bytes=sum(m.gradients_bytes for m in memories),
            optimizer_bytes=sum(m.optimizer_bytes for m in memories),
            activations_bytes=sum(m.activations_bytes for m in memories),
            for_weights_bytes=sum(m.for_weights_bytes for m in memories),
            forward_bytes=max(m.forward_bytes for m in memories),
            backward_bytes=max(m.backward_bytes for m in memories),
            update_bytes=max(m.update_bytes for m in memories),
        ),
        launches_s=sum(cost.launches_s for cost in costs),
    ), sum(alternative.synchronisation_s for alternative in alternatives)


def feeds_of(stages: Sequence[StageChoice], units: Sequence[Unit]) -> tuple[Feed, ...]:
    """One for each two stages of which one reads the other; a tensor with many readers goes once
    to each stage."""
    stage_of = {unit: s for s, stage in enumerate(stages) for unit in stage.units}
    crossing: dict[tuple[int, int], set[int]] = {}
    for s, stage in enumerate(stages):
        for unit in stage.units:
            for read in units[unit].reads:
                if stage_of[read] != s:
                    crossing.setdefault((stage_of[read], s), set()).add(read)
    feeds = []
    for (source, target), tensors in sorted(crossing.items()):
        size = sum(units[t].output_bytes for t in tensors)
        back = [units[t].output_bytes for t in tensors if units[t].gradient]
        feeds.append(
            Feed(
                source,
                target,
                size,
                backward_bytes=sum(back),
                gradient=bool(back),
                source_bytes=-(-size // stages[source].layout.parts),
                target_bytes=-(-size // stages[target].layout.parts),
            )
        )
    return tuple(feeds)


def stages_of_rows(rows: Rows) -> list[tuple[int, ...]]:
    """For each row, the stages that it has."""
    return [tuple(sorted({action.stage for action in row})) for row in rows]


class Facts(NamedTuple):
    """What the rows of a shape say without times. ``held``: the stages of each row;
    ``in_flight``: for each row, of each of its stages, the most microbatches; ``whole``: likewise,
    but only until ``I``, with all that the forward saved; ``at_once``: those of ``whole`` at the
    moment when all stages of the row together keep most; ``split``: whether backwards are ``I`` and
    ``W``."""

    held: tuple[tuple[int, ...], ...]
    in_flight: tuple[dict[int, int], ...]
    whole: tuple[dict[int, int], ...]
    at_once: tuple[dict[int, int], ...]
    split: bool


def facts_of_rows(rows: Rows) -> Facts:
    held = tuple(tuple(sorted({action.stage for action in row})) for row in rows)
    split = any(action.kind == "I" for action in rows[0])
    whole, at_once = zip(
        *(_kept_whole(row, of_row) for row, of_row in zip(rows, held, strict=True)), strict=True
    )
    in_flight = whole
    if split:
        in_flight = tuple(
            {s: most_in_flight(row, s) for s in of_row}
            for row, of_row in zip(rows, held, strict=True)
        )
    return Facts(held, in_flight, whole, at_once, split)


def _kept_whole(row: Row, stages: tuple[int, ...]) -> tuple[dict[int, int], dict[int, int]]:
    """The most of each stage, and what each has when it is most together."""
    now = dict.fromkeys(stages, 0)
    most, at_once = dict(now), dict(now)
    together = most_together = 0
    rising = False
    for action in row:
        if action.kind == "F":
            now[action.stage] += 1
            most[action.stage] = max(most[action.stage], now[action.stage])
            together += 1
            rising = True
        elif action.kind in ("B", "I"):
            if rising and together >= most_together:
                if together > most_together or min(now.values()) > min(at_once.values()):
                    at_once = dict(now)
                most_together = together
            rising = False
            now[action.stage] -= 1
            together -= 1
    return most, at_once


@lru_cache(maxsize=4096)
def facts_of(
    schedule: Schedule, stages: int, microbatches: int, chunks: int, feeds: Feeds
) -> Facts | None:
    """``None``: the schedule refuses this shape.

    Where a few microbatches for each stage keep no more in flight than half as many, all do; so
    rows are made for those only.
    """
    shape = Shape(stages, microbatches, chunks, feeds)
    if schedule.refuses(shape):
        return None
    few = [replace(shape, microbatches=count * stages) for count in (2, 4)]
    if microbatches > 4 * stages and not schedule.copies and not any(map(schedule.refuses, few)):
        half, full = (facts_of_rows(schedule.order(of_few)) for of_few in few)
        if half.in_flight == full.in_flight:
            return full
    return facts_of_rows(schedule.order(shape))


@lru_cache(maxsize=8)
def rows_of(schedule: Schedule, stages: int, microbatches: int, chunks: int, feeds: Feeds) -> Rows:
    return schedule.order(Shape(stages, microbatches, chunks, feeds))


@lru_cache(maxsize=8)
def _arranged(
    schedule: Schedule, stages: int, microbatches: int, chunks: int, feeds: Feeds, wiring: Wiring
) -> Arrangement:
    return arrange(rows_of(schedule, stages, microbatches, chunks, feeds), wiring)


def groups_of(problem: StageProblem, layouts: Sequence[Layout]) -> Groups | None:
    """Devices for rows with these layouts, one row after the other; ``None``: there are too few, or
    some are left that may not be idle."""
    if problem.all_devices and sum(layout.devices for layout in layouts) < problem.devices:
        return None
    first = dict(
        zip(
            (pool.kind for pool in problem.pools),
            accumulate((pool.devices for pool in problem.pools), initial=0),
            strict=False,
        )
    )
    end = {pool.kind: first[pool.kind] + pool.devices for pool in problem.pools}
    groups = []
    for layout in layouts:
        start = first[layout.kind]
        first[layout.kind] = start + layout.devices
        if first[layout.kind] > end[layout.kind]:
            return None
        groups.append(tuple(range(start, first[layout.kind])))
    return tuple(groups)


def groups_of_staging(
    problem: StageProblem, staging: Staging, units: Sequence[Unit]
) -> list[tuple[int, ...]]:
    """The devices of each stage: of several copies, those that have microbatch 0."""
    rows = rows_of(*_key(staging, feeds_of(staging.stages, units)))
    layouts = [staging.stages[row[0].stage].layout for row in rows]
    groups = groups_of(problem, layouts)
    assert groups is not None, staging
    return [groups[row] for row in homes(rows)]


class Made(NamedTuple):
    """A staging that can be played. ``limits_bytes``: on a device of each row."""

    facts: Facts
    pipeline: Pipeline
    limits_bytes: list[int]


def pipeline_of(problem: StageProblem, staging: Staging, units: Sequence[Unit]) -> Made | None:
    """``None`` where the schedule cannot do it, the devices do not suffice, or stages that share
    devices want different numbers of them."""
    stages = staging.stages
    feeds = feeds_of(stages, units)
    facts = facts_of(*_key(staging, feeds))
    if facts is None:
        return None
    for of_row in facts.held:
        if len({(stages[s].layout.devices, stages[s].layout.kind) for s in of_row}) > 1:
            return None
    layouts = [stages[of_row[0]].layout for of_row in facts.held]
    groups = groups_of(problem, layouts)
    if groups is None:
        return None
    copies = Counter(s for of_row in facts.held for s in of_row)
    costs, synchronisations = [], []
    for s, stage in enumerate(stages):
        cost, time_s = sum_of(
            [units[u].alternatives[a] for u, a in zip(stage.units, stage.alternatives, strict=True)]
        )
        if facts.split and cost.input_gradient_s is None:
            return None
        costs.append(cost)
        if copies[s] > 1:
            assert cost.memory is not None
            time_s += problem.exchange_s(cost.memory.gradients_bytes, copies[s])
        if time_s:
            synchronisations.append(Synchronisation((s,), time_s))
    synchronisations += _of_shared(problem, stages)
    pipeline = Pipeline(
        tuple(costs), feeds, problem.network(groups), tuple(synchronisations), problem.norm_s
    )
    return Made(facts, pipeline, [problem.limit_bytes[layout.kind] for layout in layouts])


def _of_shared(problem: StageProblem, stages: Sequence[StageChoice]) -> Iterator[Synchronisation]:
    """Of parameters that are in several stages; replicas have exchanged theirs before."""
    stage_of = {unit: s for s, stage in enumerate(stages) for unit in stage.units}
    for units, size in problem.shared:
        sharing = tuple(sorted({stage_of[unit] for unit in units}))
        if len(sharing) > 1:
            layouts = [stages[s].layout for s in sharing]
            on_device = max(-(-size * layout.parts // layout.devices) for layout in layouts)
            yield Synchronisation(sharing, problem.exchange_s(on_device, len(sharing)))


def _key(
    staging: Staging, feeds: Sequence[Feed]
) -> tuple[Schedule, int, int, int, tuple[tuple[int, int], ...]]:
    shape_feeds = tuple((feed.source, feed.target) for feed in feeds)
    count = len(staging.stages)
    return staging.schedule, count, staging.microbatches, staging.chunks, shape_feeds


def value_of(problem: StageProblem, staging: Staging, units: Sequence[Unit]) -> Value | None:
    """``None``: it cannot be done, or does not fit; by the timeline of its rows."""
    made = pipeline_of(problem, staging, units)
    return None if made is None else value_of_made(problem, staging, made)


def played(problem: StageProblem, staging: Staging, units: Sequence[Unit]) -> Timeline | None:
    """Whether it fits or not; ``None``: it cannot be done."""
    made = pipeline_of(problem, staging, units)
    if made is None:
        return None
    return play(_arranged(*_key(staging, made.pipeline.feeds), made.pipeline.wiring), made.pipeline)


def value_of_made(problem: StageProblem, staging: Staging, made: Made) -> Value | None:
    """``value_of`` where the pipeline is there already."""
    _, pipeline, limits_bytes = made
    key = _key(staging, pipeline.feeds)
    rows = rows_of(*key)
    kept = [c.memory for c in pipeline.stages if c.memory is not None]
    # rows alone say less than the timeline, but sooner
    least = [least_peak_bytes(row, kept) for row in rows]
    if any(size > limit for size, limit in zip(least, limits_bytes, strict=True)):
        return None
    timeline = play(_arranged(*key, pipeline.wiring), pipeline)
    under_way = _most_under_way_bytes(facts_of_rows(rows), pipeline, staging.microbatches)
    for row, (size, limit) in enumerate(zip(least, limits_bytes, strict=True)):
        if size + under_way[row] > limit and timeline.memory(row).total_bytes > limit:
            return None
    time_s = timeline.step_time_s if problem.objective == "step" else busiest_s(timeline)
    return Value(max(time_s, timeline.launches_s), timeline)


def _most_under_way_bytes(facts: Facts, pipeline: Pipeline, microbatches: int) -> list[int]:
    """For each row, no less than what it keeps at once of what it sends and receives: a microbatch
    whose gradient is to come back is in flight on the stage that sent it."""
    in_flight: Counter[int] = Counter()
    for of_row in facts.in_flight:
        in_flight.update(of_row)  # copies of a stage keep different microbatches
    found = [0] * len(facts.held)
    for row, of_stages in enumerate(facts.held):
        for feed in pipeline.feeds:
            times = in_flight[feed.source] if feed.gradient else microbatches
            if feed.source in of_stages:
                found[row] += 2 * times * feed.kept_bytes(at_source=True)
            if feed.target in of_stages:
                found[row] += 2 * times * feed.kept_bytes(at_source=False)
    return found


def least_peak_bytes(row: Row, memories: Sequence[StageMemory]) -> int:
    """What a row needs at its peak, without what is under way between rows.

    >>> from autopar.ir.schedule import rows_from_text
    >>> least_peak_bytes(rows_from_text("0F0 0F1 0B0 0B1")[0], [StageMemory(10, 0, 0, 3)])
    16
    """
    stages = {action.stage for action in row}
    held = sum(
        memories[s].parameters_bytes + memories[s].gradients_bytes + memories[s].optimizer_bytes
        for s in stages
    )
    peak = held + max(memories[s].update_bytes for s in stages)
    for stage, kind, _, _ in row:
        memory = memories[stage]
        if kind == "F":
            held += memory.activations_bytes
            peak = max(peak, held + memory.forward_bytes)
        elif kind in ("B", "I"):
            peak = max(peak, held + memory.backward_bytes)
            held -= memory.activations_bytes
            if kind == "I":
                held += memory.for_weights_bytes
                peak = max(peak, held)
        elif kind == "W":
            peak = max(peak, held + memory.backward_bytes)
            held -= memory.for_weights_bytes
    return peak


def busiest_s(timeline: Timeline) -> Time:
    """What the busiest row, communication stream or link does in a step."""
    loads: dict[Hashable, Time] = {}
    for row in range(len(timeline.rows)):
        of_row = timeline.parts(row)
        loads["row", row] = of_row.forward_s + of_row.backward_s + of_row.update_s
    for route, times in Counter(timeline.arrangement.route_of).items():
        passage = timeline.passages[route]
        for link in passage.links:
            loads["link", link] = loads.get(("link", link), 0) + passage.busy_s * times
    for exchange in timeline.arrangement.exchanges:
        time_s, links = exchange_time(exchange, timeline.pipeline)
        for user in (*(("exchange", row) for row in exchange.rows), *(("link", k) for k in links)):
            loads[user] = loads.get(user, 0) + time_s
    return max(loads.values())
