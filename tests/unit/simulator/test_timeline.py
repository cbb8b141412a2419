"""The timeline equals a slow, plain one, obeys laws, and says what is wrong with rows."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from graphlib import CycleError
from itertools import pairwise
from random import Random

import pytest

from autopar.errors import AutoparError
from autopar.ir.schedule import Rows, rows_from_text
from autopar.schedules import SCHEDULES
from autopar.simulator.arrangement import arrange
from autopar.simulator.pipeline import (
    Feed,
    Instant,
    PairLinks,
    Passage,
    Pipeline,
    PortLinks,
    StageCost,
    StageMemory,
    Synchronisation,
    Time,
    Wiring,
    chain,
    equal_stages,
)
from autopar.simulator.timeline import Timeline, play, simulate, turns
from tests.helpers.pipelines import RandomWorld, Task, timed_plainly, turns_of


def plainly(rows: Rows, pipeline: Pipeline) -> dict[Task, tuple[Time, Time]]:
    return timed_plainly(rows, pipeline, lambda: turns_of(arrange(rows, pipeline.wiring)))


def times_of_actions(timeline: Timeline) -> dict[tuple[int, str], tuple[object, object]]:
    return {
        (e.row, e.name if e.kind != "U" else e.name.split("U")[0] + "U0"): (e.start_s, e.end_s)
        for e in timeline.events()
        if e.stream == "compute"
    }


def random_worlds(count: int) -> list[RandomWorld]:
    return [RandomWorld(seed) for seed in range(count)]


def test_random_rows_of_random_stage_graphs_are_timed_as_the_plain_way_does() -> None:
    shared = 0
    for world in random_worlds(400):
        for network in (
            world.pipeline.network,
            PairLinks(Fraction(3), Fraction(1)),
            Instant(),
        ):
            pipeline = replace(world.pipeline, network=network)
            timeline = simulate(world.rows, pipeline)
            expected = plainly(world.rows, pipeline)
            assert times_of_actions(timeline) == {
                task: times for task, times in expected.items() if isinstance(task[0], int)
            }, world.seed
            assert timeline.step_time_s == max(end for _, end in expected.values())
            ours = sorted(
                (e.start_s, e.end_s - pipeline_latency(pipeline))
                for e in timeline.events()
                if e.kind == "send"
            )
            assert ours == sorted(t for task, t in expected.items() if task[0] == "send")
            shared += isinstance(network, PortLinks)
    assert shared == 400


def pipeline_latency(pipeline: Pipeline) -> Fraction:
    latency = getattr(pipeline.network, "latency_s", Fraction(0))
    assert isinstance(latency, Fraction)
    return latency


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_on_unequal_stages_are_timed_as_the_plain_way_does(name: str) -> None:
    schedule = SCHEDULES[name]
    for seed in range(10):
        random = Random(seed)
        devices, m = random.choice([(2, 4), (4, 8), (4, 12)])
        rows = schedule(schedule.stages(devices), m)
        stages = schedule.stages(devices)
        times = [Fraction(random.randint(1, 999), 7) for _ in range(stages * 4)]
        costs = tuple(
            StageCost(f, i + w, u, i, w)
            for f, i, w, u in zip(*(times[k::4] for k in range(4)), strict=True)
        )
        pipeline = Pipeline(costs, chain(stages, 50), PortLinks(Fraction(3), Fraction(1)))
        expected = plainly(rows, pipeline)
        assert simulate(rows, pipeline).step_time_s == max(end for _, end in expected.values())


def test_rows_in_any_order_either_end_or_are_refused_as_a_cycle() -> None:
    ended = 0
    for seed in range(300):
        world = RandomWorld(seed)
        rows: Rows = shuffled(world.rows, Random(seed))
        try:
            expected = plainly(rows, world.pipeline)
        except CycleError:
            with pytest.raises(AutoparError, match=r"can never end|the order must be|turn them"):
                arrange(rows, world.pipeline.wiring)
        else:
            found = simulate(rows, world.pipeline).step_time_s
            assert found == max(end for _, end in expected.values())
            ended += 1
    assert 50 < ended < 290


def shuffled(rows: Rows, random: Random) -> Rows:
    """Two neighbours in every row are exchanged."""
    found = []
    for row in map(list, rows):
        if len(row) > 1:
            i = random.randrange(len(row) - 1)
            row[i], row[i + 1] = row[i + 1], row[i]
        found.append(tuple(row))
    return tuple(found)


# Laws


def test_more_bytes_or_latency_or_gradients_are_never_faster() -> None:
    for world in random_worlds(150):
        pipeline, random = world.pipeline, Random(world.seed)
        before = simulate(world.rows, pipeline).step_time_s
        feeds = list(pipeline.feeds)
        if feeds:
            i = random.randrange(len(feeds))
            feeds[i] = replace(feeds[i], bytes=feeds[i].bytes + random.randint(1, 9000))
        exchanges = [replace(s, time_s=s.time_s * 2) for s in pipeline.synchronisations]
        network = pipeline.network
        assert isinstance(network, PortLinks)
        for worse in (
            replace(pipeline, feeds=tuple(feeds)),
            replace(pipeline, synchronisations=tuple(exchanges)),
            replace(pipeline, network=replace(network, latency_s=network.latency_s + 5)),
            replace(pipeline, network=replace(network, bytes_per_s=network.bytes_per_s / 2)),
        ):
            assert simulate(world.rows, worse).step_time_s >= before


def test_slower_stages_are_never_faster_where_rows_share_no_links() -> None:
    for world in random_worlds(150):
        pipeline = replace(
            world.pipeline, network=PairLinks(Fraction(3), Fraction(1)), synchronisations=()
        )
        before = simulate(world.rows, pipeline).step_time_s
        stages = list(pipeline.stages)
        i = Random(world.seed).randrange(len(stages))
        stages[i] = replace(
            stages[i], forward_s=stages[i].forward_s + 1, backward_s=stages[i].backward_s * 2
        )
        assert simulate(world.rows, replace(pipeline, stages=tuple(stages))).step_time_s >= before


def test_a_link_does_one_thing_at_a_time_and_a_row_one_action() -> None:
    for world in random_worlds(100):
        timeline = simulate(world.rows, world.pipeline)
        latency_s = pipeline_latency(world.pipeline)
        used: dict[object, list[tuple[object, object]]] = {}
        for event in timeline.events():
            if event.stream == "transfer":
                end_s = event.end_s - latency_s
                used.setdefault(("out", event.row), []).append((event.start_s, end_s))
                used.setdefault(("in", event.to), []).append((event.start_s, end_s))
            else:
                used.setdefault((event.stream, event.row), []).append((event.start_s, event.end_s))
        for spans in used.values():
            spans.sort()
            assert all(a[1] <= b[0] for a, b in pairwise(spans))


def test_halving_every_time_halves_the_step() -> None:
    for world in random_worlds(50):
        p = world.pipeline
        network = p.network
        assert isinstance(network, PortLinks)
        half = Fraction(1, 2)
        halved = Pipeline(
            tuple(
                StageCost(
                    s.forward_s * half,
                    s.backward_s * half,
                    s.update_s * half,
                    (s.input_gradient_s or 0) * half,
                    (s.weight_gradient_s or 0) * half,
                )
                for s in p.stages
            ),
            p.feeds,
            PortLinks(network.bytes_per_s * 2, network.latency_s * half),
            tuple(replace(s, time_s=s.time_s * half) for s in p.synchronisations),
            None if p.norm_s is None else p.norm_s * half,
        )
        whole, halves = simulate(world.rows, p), simulate(world.rows, halved)
        assert halves.step_time_s * 2 == whole.step_time_s


def test_playing_twice_gives_the_same() -> None:
    world = RandomWorld(11)
    arrangement = arrange(world.rows, world.pipeline.wiring)
    first, second = (play(arrangement, world.pipeline) for _ in range(2))
    assert first.starts == second.starts
    assert list(first.events()) == list(second.events())


def test_tasks_in_turn_come_after_all_that_they_wait_for() -> None:
    """So rows that take part in them in this order never wait in a ring."""
    for world in random_worlds(100):
        arrangement = arrange(world.rows, world.pipeline.wiring)
        timeline = play(arrangement, world.pipeline)
        in_turn = turns(arrangement, timeline.lengths)
        place = {task: i for i, task in enumerate(in_turn)}
        assert sorted(in_turn) == list(range(len(timeline.ends)))
        for a, b in pairwise(range(arrangement.actions)):
            assert place[a] < place[b] or arrangement.row_of[a] != arrangement.row_of[b]
        for i, (a, b) in enumerate(zip(arrangement.sender, arrangement.reader, strict=True)):
            assert place[a] < place[arrangement.actions + i] < place[b]
        for i, exchange in enumerate(arrangement.exchanges):
            at = place[arrangement.actions + arrangement.transfers + i]
            assert all(place[a] < at for a in exchange.triggers)
            assert all(at < place[a] for a in exchange.updates)


def test_parts_of_a_row_are_the_step() -> None:
    for world in random_worlds(50):
        timeline = simulate(world.rows, world.pipeline)
        for r in range(len(world.rows)):
            parts = timeline.parts(r)
            assert sum(parts) == timeline.step_time_s
            assert parts.forward_s + parts.backward_s == timeline.busy_s(r)
            assert parts.idle_s >= 0


def test_integers_stay_exact() -> None:
    stages = (StageCost(1, 2, 3),) * 2
    pipeline = Pipeline(stages, chain(2, 10), PairLinks(3, 1), (Synchronisation((0,), 1, 3),))
    found = simulate(SCHEDULES["1f1b"](2, 4), pipeline)
    assert not any(isinstance(t, float) for t in (*found.starts, *found.ends))


# Communication


def two_stages(network: object, feeds: tuple[Feed, ...], **more: object) -> Pipeline:
    return Pipeline((StageCost(1, 2, 0),) * 2, feeds, network, **more)  # type: ignore[arg-type]


def test_a_transfer_takes_its_latency_and_its_bytes() -> None:
    rows = SCHEDULES["gpipe"](2, 1)
    pipeline = two_stages(PairLinks(Fraction(10), Fraction(3)), chain(2, 50))
    # forward, transfer, forward, backward, transfer, backward
    assert simulate(rows, pipeline).step_time_s == 1 + (5 + 3) + 1 + 2 + (5 + 3) + 2


def test_transfers_follow_each_other_on_a_link_while_stages_compute() -> None:
    rows = SCHEDULES["gpipe"](2, 3)
    timeline = simulate(rows, two_stages(PairLinks(Fraction(10), Fraction(1)), chain(2, 40)))
    sends = [(e.start_s, e.end_s) for e in timeline.events() if e.kind == "send"][:3]
    assert sends == [(1, 6), (5, 10), (9, 14)]  # 4 on the link and 1 under way


def test_a_shared_port_makes_transfers_wait_and_links_of_their_own_do_not() -> None:
    # stage 0 feeds stages 1 and 2
    rows = rows_from_text("0F0 0B0\n1F0 1B0\n2F0 2B0")
    feeds = (Feed(0, 1, 40), Feed(0, 2, 40))
    stages = (StageCost(1, 2, 0),) * 3
    own = simulate(rows, Pipeline(stages, feeds, PairLinks(Fraction(10), Fraction(0))))
    shared = simulate(rows, Pipeline(stages, feeds, PortLinks(Fraction(10), Fraction(0))))
    assert own.step_time_s == 1 + 4 + 1 + 2 + 4 + 2
    assert shared.step_time_s == own.step_time_s + 4


def test_what_carries_no_gradient_sends_nothing_back() -> None:
    rows = SCHEDULES["1f1b"](2, 4)
    network = PairLinks(Fraction(10), Fraction(0))
    both = simulate(rows, two_stages(network, chain(2, 40))).sent_bytes()
    one = simulate(rows, two_stages(network, (Feed(0, 1, 40, gradient=False),))).sent_bytes()
    assert both == {(0, 1): 160, (1, 0): 160}
    assert one == {(0, 1): 160}


def test_chunks_on_one_device_send_nothing_between_them() -> None:
    rows = rows_from_text("0F0 1F0 1B0 0B0")
    timeline = simulate(rows, two_stages(PairLinks(Fraction(1), Fraction(9)), chain(2, 40)))
    assert timeline.step_time_s == 6
    assert timeline.sent_bytes() == {}


def test_gradient_exchange_overlaps_what_is_left_of_the_backward() -> None:
    # two stages on one device: that of the later stage is hidden by the backward of the other
    rows = rows_from_text("0F0 1F0 1B0 0B0")
    network = PairLinks(Fraction(1), Fraction(0))

    def step_time(*exchanges: Synchronisation) -> object:
        pipeline = two_stages(network, chain(2), synchronisations=exchanges)
        return simulate(rows, pipeline).step_time_s

    assert step_time() == 6
    assert step_time(Synchronisation((1,), 2)) == 6
    assert step_time(Synchronisation((0,), 2)) == 8
    # in two parts, the first begins when half of the backward has passed
    assert step_time(Synchronisation((0,), 2, parts=2)) == 7
    # both take the same communication stream
    assert step_time(Synchronisation((1,), 3), Synchronisation((0,), 1)) == 8


def test_updates_wait_for_their_gradients_and_the_norm_for_all_of_them() -> None:
    rows = SCHEDULES["gpipe"](2, 1)
    stages = (StageCost(1, 2, 10), StageCost(1, 2, 10))
    exchanges = (Synchronisation((1,), 100),)
    unclipped = Pipeline(stages, chain(2), Instant(), exchanges)
    clipped = replace(unclipped, norm_s=5)
    ends = {e.name: e.end_s for e in simulate(rows, unclipped).events() if e.kind == "U"}
    assert ends == {"0U0": 6 + 10, "1U0": 4 + 100 + 10}
    ends = {e.name: e.end_s for e in simulate(rows, clipped).events() if e.kind == "U"}
    assert ends == {"0U0": 104 + 5 + 10, "1U0": 104 + 5 + 10}


def test_copies_of_a_stage_exchange_their_gradients_when_both_are_done() -> None:
    rows = SCHEDULES["chimera"](4, 4)
    plain = equal_stages(4, 1, 1)
    exchanges = tuple(Synchronisation((s,), 7) for s in range(4))
    timeline = simulate(rows, replace(plain, synchronisations=exchanges))
    events = list(timeline.events())
    for stage in range(4):
        found = [e for e in events if e.name == f"gradients of {stage}"]
        assert {e.row for e in found} == {stage, 3 - stage}
        last = max(e.end_s for e in events if e.name.startswith(f"{stage}B"))
        assert {e.start_s >= last for e in found} == {True}
        assert len({(e.start_s, e.end_s) for e in found}) == 1
    assert timeline.passes_s == simulate(rows, plain).step_time_s


def test_shared_weights_are_exchanged_between_their_stages() -> None:
    rows = SCHEDULES["1f1b"](4, 8)
    tied = replace(equal_stages(4, 1, 2), synchronisations=(Synchronisation((0, 3), 5),))
    timeline = simulate(rows, tied)
    found = [e for e in timeline.events() if e.kind == "exchange"]
    assert [e.row for e in found] == [0, 3]
    assert found[0].start_s == timeline.passes_s  # the first stage is the last to finish


# Memory


def with_memory(pipeline: Pipeline, memory: StageMemory) -> Pipeline:
    return replace(pipeline, stages=tuple(replace(s, memory=memory) for s in pipeline.stages))


def test_memory_counts_what_stays_and_what_is_in_flight() -> None:
    memory = StageMemory(100, 200, 400, activations_bytes=10, backward_bytes=3)
    pipeline = with_memory(equal_stages(4, 1, 2), memory)
    timeline = simulate(SCHEDULES["1f1b"](4, 8), pipeline)
    for s in range(4):
        found = timeline.memory(s)
        assert (found.parameters_bytes, found.gradients_bytes, found.optimizer_bytes) == (
            100,
            200,
            400,
        )
        assert found.activations_bytes == 10 * (4 - s)
        assert found.temporaries_bytes == 3
        assert found.at.startswith(f"{s}B")


def test_split_backwards_keep_what_the_weights_need() -> None:
    memory = StageMemory(0, 0, 0, activations_bytes=10, for_weights_bytes=4)
    timeline = simulate(
        SCHEDULES["zero_bubble_h1"](4, 8), with_memory(equal_stages(4, 1, 1, 1), memory)
    )
    # the last stage has one whole microbatch, and three whose weight gradients are put off
    assert timeline.memory(0).total_bytes == 4 * 10
    assert timeline.memory(3).total_bytes == 10 + 3 * 4


def test_chimera_holds_the_weights_twice() -> None:
    memory = StageMemory(100, 0, 0, activations_bytes=1)
    timeline = simulate(SCHEDULES["chimera"](4, 8), with_memory(equal_stages(4, 1, 1), memory))
    assert [timeline.memory(d).parameters_bytes for d in range(4)] == [200] * 4
    assert [timeline.memory(d).activations_bytes for d in range(4)] == [3, 4, 4, 3]


def test_a_skip_waits_in_the_memory_of_its_reader() -> None:
    memory = StageMemory(0, 0, 0, 0)
    plain = with_memory(equal_stages(4, 1, 1), memory)
    skip = replace(plain, feeds=(*plain.feeds, Feed(0, 3, 1000)))
    rows = SCHEDULES["1f1b"](4, 8)
    assert simulate(rows, plain).memory(3).buffers_bytes == 0
    # stage 0 has done 4 forwards when stage 3 begins its first; one more arrives in each round
    assert simulate(rows, skip).memory(3).buffers_bytes == 3 * 1000


def test_memory_equals_a_sum_over_moments() -> None:
    for world in random_worlds(60):
        pipeline = replace(world.pipeline, network=Instant())
        timeline = simulate(world.rows, pipeline)
        starts = {e.name: e.start_s for e in timeline.events() if e.stream == "compute"}
        for r, row in enumerate(world.rows):
            spans = []
            for e in timeline.events():
                if e.row == r and e.stream == "compute":
                    memory = pipeline.stages[int(e.name.split(e.kind)[0])].memory
                    assert memory is not None
                    beside = {"F": memory.forward_bytes, "U": memory.update_bytes}
                    spans.append((e.start_s, e.end_s, beside.get(e.kind, memory.backward_bytes)))
                    whole = e.name.replace(e.kind, "F")
                    if e.kind in "BI":
                        spans.append((starts[whole], e.end_s, memory.activations_bytes))
                        ended = e.end_s
                    if e.kind == "W":
                        ended = next(
                            x.end_s for x in timeline.events() if x.name == e.name.replace("W", "I")
                        )
                        spans.append((ended, e.end_s, memory.for_weights_bytes))
            spans += waiting(timeline, pipeline, r)
            held = {a.stage for a in row}
            static = sum(
                m.parameters_bytes + m.gradients_bytes + m.optimizer_bytes
                for m in (pipeline.stages[s].memory for s in held)
                if m is not None
            )
            moments = [start for start, _, _ in spans]
            most = max(
                (sum(size for a, b, size in spans if a <= t < b) for t in moments), default=0
            )
            assert timeline.memory(r).total_bytes == static + most, world.seed
        assert timeline.memories() == [timeline.memory(r) for r in range(len(world.rows))]


def waiting(timeline: Timeline, pipeline: Pipeline, row: int) -> list[tuple[object, object, int]]:
    """On a network without time, what is sent waits only where it is read."""
    where = {a: r for r, of_row in enumerate(timeline.rows) for a in of_row}
    start = {e.name: e.start_s for e in timeline.events() if e.stream == "compute"}
    end = {e.name: e.end_s for e in timeline.events() if e.stream == "compute"}
    found = []
    for feed in pipeline.feeds:
        for action, at in where.items():
            reads = None
            if action.kind == "F" and action.stage == feed.target:
                reads = [f"{feed.source}F{action.microbatch}"]
            if action.kind in "BI" and action.stage == feed.source and feed.gradient:
                reads = [f"{feed.target}{k}{action.microbatch}" for k in "BI"]
            for name in reads or ():
                if at == row and name in end:
                    found.append((end[name], start[str(action)], feed.bytes))
    return found


def test_memory_is_not_guessed() -> None:
    timeline = simulate(SCHEDULES["gpipe"](2, 2), equal_stages(2, 1, 1))
    with pytest.raises(AutoparError, match="memory of stage 0 is not known"):
        timeline.memory(0)


# Updates between microbatches, on weights that are kept or not


def pipedream(p: int, m: int, *, stash: bool) -> Rows:
    """1F1B with an update after each backward; backwards use the weights of their forward."""
    rows = []
    for row in SCHEDULES["1f1b"](p, m):
        updates, seen, found = 0, {}, []
        for action in row:
            if action.kind == "F":
                seen[action.microbatch] = updates
                found.append(action)
            else:
                version = seen[action.microbatch] if stash else None
                found.append(action._replace(version=version))
                found.append(action._replace(kind="U"))
                updates += 1
        rows.append(tuple(found))
    return tuple(rows)


def test_stashed_weights_are_read_off_the_rows() -> None:
    memory = StageMemory(100, 0, 0, 0)
    for p in (2, 4, 8):
        pipeline = with_memory(equal_stages(p, 1, 1), memory)
        stashed = simulate(pipedream(p, 4 * p, stash=True), pipeline)
        latest = simulate(pipedream(p, 4 * p, stash=False), pipeline)
        assert [stashed.weight_copies(s) for s in range(p)] == [p - s for s in range(p)]
        assert [latest.weight_copies(s) for s in range(p)] == [1] * p
        assert [stashed.memory(s).parameters_bytes for s in range(p)] == [
            100 * (p - s) for s in range(p)
        ]
        # no row waits for a flush: all are busy from their first backward on
        assert stashed.step_time_s == 2 * (4 * p) + 2 * (p - 1)


def test_each_update_between_microbatches_waits_for_its_own_exchange() -> None:
    exchanges = (Synchronisation((0,), 3, parts=2),)
    pipeline = replace(equal_stages(2, 1, 1), synchronisations=exchanges)
    timeline = simulate(pipedream(2, 4, stash=True), pipeline)
    events = [e for e in timeline.events() if e.row == 0]
    ends = {e.name: e.end_s for e in events if e.stream == "compute"}
    last_parts = [e for e in events if e.name == "gradients of 0, part 2 of 2"]
    assert len(last_parts) == 4
    for i, exchange in enumerate(last_parts):
        assert exchange.start_s >= ends[f"0B{i}@{max(0, i - 1)}"]
        (update,) = [e for e in events if e.name == f"0U{i}"]
        assert update.start_s >= exchange.end_s


# What is wrong with rows


def refused(text: str, wiring: Wiring) -> str:
    with pytest.raises(AutoparError) as found:
        arrange(rows_from_text(text), wiring)
    return str(found.value)


TWO = Wiring(2, ((0, 1, True),))


def test_rows_that_never_end_are_refused_with_the_actions_that_wait() -> None:
    message = refused("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1", TWO)
    assert "row 0 is at 0B0, which waits for the gradient of 1B0 in row 1" in message
    assert "row 1 is at 1F1, which waits for the output of 0F1 in row 0" in message


def test_rows_that_wait_in_a_ring_are_refused_without_those_that_only_wait_for_them() -> None:
    ring = Wiring(3, ((0, 1, True), (1, 2, True)))
    message = refused("2F0 2B0 0F0 0B0\n1F0 1B0", ring)
    assert "row 0 does 2F0" not in message
    assert "row 0 is at 2F0, which waits for the output of 1F0 in row 1" in message
    assert "row 1 is at 1F0, which waits for the output of 0F0 in row 0" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n", "the rows have no actions"),
        ("0F0 0B0\n1F0", "of microbatch 0 on stage 1 the rows have 1F0; they need F and B, or"),
        ("0F0 0B0\n1F0 1B0 1F0", "1F0 is in the rows twice"),
        ("0F0 0B0", "of microbatch 0 on stage 1 the rows have nothing"),
        ("0B0 0F0\n1F0 1B0", "row 0 does 0B0 before 0F0; the order must be F, B"),
        ("0F0 0W0 0I0\n1F0 1B0", "row 0 does 0F0 before 0W0 before 0I0; the order must be F, I, W"),
        ("0F0\n1F0 1B0 0B0", "0F0, 0B0 are in rows 0, 1; one row must have them all"),
        ("1F0 0F0 0B0 1B0", "row 0 does 1F0 before 0F0, whose result it reads"),
        (
            "0F0 0B0@1\n1F0 1B0",
            "0B0@1 uses weights that have seen 1 updates, but its row has made 0",
        ),
        ("0F0 0B0\n1F0 1B0\n2F0 2B0", "the rows have stage 2, the pipeline has stages 0 to 1"),
    ],
)
def test_rows_that_are_not_whole_are_refused(text: str, message: str) -> None:
    assert message in refused(text, TWO)


def test_updates_that_do_not_go_together_are_refused() -> None:
    exchanged = replace(TWO, synchronisations=(((0, 1), 1),))
    twice = "0F0 0B0 0U0 0F1 0B1 0U1\n1F0 1B0 1F1 1B1"
    assert "not updated equally often" in refused(twice, exchanged)
    assert "only if each stage is updated once" in refused(twice, replace(TWO, norm=True))
    assert "0U0 comes before any gradient" in refused("0U0 0F0 0B0\n1F0 1B0", exchanged)


def test_a_split_backward_needs_times_of_both_halves() -> None:
    stages = (StageCost(1, 2, 0),) * 2
    pipeline = Pipeline(stages, chain(2), Instant())
    with pytest.raises(AutoparError, match="times for the whole backward only"):
        simulate(SCHEDULES["zero_bubble_h1"](2, 2), pipeline)


def test_a_network_may_price_each_pair_of_rows_as_it_likes() -> None:
    class Far:
        def passage(self, feed: Feed, backward: bool, source: int, target: int) -> Passage:
            return Passage(0, 100 if {source, target} == {1, 2} else 1, ())

    rows = SCHEDULES["gpipe"](4, 1)
    pipeline = replace(equal_stages(4, 1, 1), network=Far())
    assert simulate(rows, pipeline).step_time_s == 8 + 2 * (1 + 100 + 1)
