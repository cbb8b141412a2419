"""Every schedule on the shelf does all work once, can end, and is as good as its paper says."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from autopar.errors import AutoparError
from autopar.ir.schedule import (
    Action,
    Shape,
    homes,
    most_in_flight,
    rows_from_text,
    rows_to_text,
    weight_copies,
)
from autopar.schedules import SCHEDULES
from autopar.simulator.arrangement import arrange
from autopar.simulator.pipeline import Feed, Wiring, equal_stages
from autopar.simulator.timeline import Timeline, play, simulate

DEVICES = (2, 4, 8, 16)
TIMES = ((1, 1, 1), (2, 3, 1), (3, 4, 2), (1, 2, 1))
"""Forward, gradient of inputs, gradient of weights; for ZB-H1's closed form, the last is least."""

everything = pytest.mark.parametrize("name", SCHEDULES)


def shapes(name: str) -> list[Shape]:
    """Small ones that the schedule can do."""
    found = [
        Shape(stages, microbatches, chunks)
        for stages in range(1, 9)
        for microbatches in range(1, 11)
        for chunks in range(1, 5)
    ]
    return [shape for shape in found if SCHEDULES[name].refuses(shape) is None]


def counts(p: int, multiple: int = 1) -> list[int]:
    """Microbatches from p to 8p."""
    step = multiple * (7 if p == 16 and multiple == 1 else 1)
    return [*range(p, 8 * p, step), 8 * p]


def timelines(name: str, devices: int, microbatches: int, chunks: int) -> list[Timeline]:
    """One for each of ``TIMES``."""
    schedule = SCHEDULES[name]
    stages = schedule.stages(devices, chunks)
    pipelines = [equal_stages(stages, *times) for times in TIMES]
    rows = schedule(stages, microbatches, chunks)
    assert len(rows) == devices
    arrangement = arrange(rows, pipelines[0].wiring)
    return [play(arrangement, pipeline) for pipeline in pipelines]


@everything
def test_all_work_is_done_once_and_each_forward_before_its_backward(name: str) -> None:
    assert shapes(name)
    for shape in shapes(name):
        rows = SCHEDULES[name](shape.stages, shape.microbatches, shape.chunks)
        done = Counter(action for row in rows for action in row)
        assert set(done.values()) == {1}
        kinds = Counter((a.stage, a.kind) for a in done)
        split = any(a.kind == "I" for a in done)
        for stage in range(shape.stages):
            for kind in "FIW" if split else "FB":
                assert kinds[stage, kind] == shape.microbatches
        for row in rows:
            for place, action in enumerate(row):
                before = {"B": "F", "I": "F", "W": "I"}.get(action.kind)
                if before is not None:
                    assert action._replace(kind=before) in row[:place]


@everything
def test_rows_can_end_on_chains_with_skips_and_on_branches(name: str) -> None:
    for shape in shapes(name):
        n = shape.stages
        chain = tuple((s, s + 1) for s in range(n - 1))
        skips = tuple((s, n - 1 - s) for s in range((n - 1) // 2))  # a U-Net's
        towers = tuple((s, s + 2) for s in range(n - 2)) + (((n - 2, n - 1),) if n > 1 else ())
        for feeds in (chain, tuple({*chain, *skips}), towers):
            rows = SCHEDULES[name](shape.stages, shape.microbatches, shape.chunks, feeds)
            arrange(rows, Wiring(n, tuple((a, b, True) for a, b in feeds)))


@everything
def test_rows_can_end_on_any_graph_of_stages(name: str) -> None:
    schedule, random = SCHEDULES[name], Random(0)
    for _ in range(200):
        stages, m = random.randint(2, 9), random.randint(1, 12)
        pairs = [(a, b) for b in range(stages) for a in range(b)]
        feeds = tuple(random.sample(pairs, random.randint(0, len(pairs))))
        chunks = random.choice([c for c in range(1, 5) if schedule.chunks > 1 or c == 1])
        if schedule.refuses(Shape(stages, m, chunks, feeds)) is None:
            rows = schedule(stages, m, chunks, feeds)
            arrange(rows, Wiring(stages, tuple((a, b, True) for a, b in feeds)))


@everything
def test_what_is_refused_says_which_sizes_would_work(name: str) -> None:
    schedule = SCHEDULES[name]
    with pytest.raises(AutoparError, match=f"{name} needs at least one stage, not 0"):
        schedule(0, 1)
    with pytest.raises(AutoparError, match=f"{name} needs at least one microbatch, not 0"):
        schedule(4, 0)
    with pytest.raises(AutoparError, match="stage 3 feeds stage 1"):
        schedule(4, 4, feeds=((3, 1),))


def test_sizes_that_do_not_divide_are_refused_with_those_that_do() -> None:
    def reason(name: str, *shape: int) -> str:
        return str(SCHEDULES[name].refuses(Shape(*shape)))

    assert "8 or 12 would work" in reason("interleaved_1f1b", 8, 10, 2)
    assert "6 or 8 would work" in reason("looped_bfs", 7, 4, 2)
    assert "2 chunks or more" in reason("interleaved_1f1b", 4, 4, 1)
    assert "with 8 stages, 2 or 4 or 8 work" in reason("chimera", 8, 8, 6)
    assert "an even number of stages works" in reason("chimera", 7, 8, 2)
    assert "2 or 4 pipelines" in reason("chimera", 12, 8, 3)
    assert "2 or more would work" in reason("chimera", 4, 1, 2)
    assert "one stage on each group of devices, not 2" in reason("1f1b", 4, 4, 2)
    assert reason("1f1b", 4, 3, 1) == "None"


def test_where_sizes_are_said_to_work_they_do() -> None:
    assert SCHEDULES["interleaved_1f1b"].refuses(Shape(8, 12, 2)) is None
    assert SCHEDULES["looped_bfs"].refuses(Shape(6, 4, 2)) is None
    assert SCHEDULES["chimera"].refuses(Shape(8, 8, 4)) is None


# Closed forms: p groups of devices, m microbatches, tB the whole backward unless W is split off.
# m goes from p to 8p; in steps where p is 16, all of them in the slow test


@pytest.mark.parametrize("p", DEVICES)
def test_gpipe_idles_p_minus_1_forwards_and_backwards_and_keeps_all_microbatches(p: int) -> None:
    for m in counts(p):
        for timeline, (f, b, w) in zip(timelines("gpipe", p, m, 1), TIMES, strict=True):
            assert timeline.step_time_s == (m + p - 1) * (f + b + w)
            assert timeline.bubble_s(0) == timeline.bubble_s(p - 1) == (p - 1) * (f + b + w)
        assert [timeline.most_in_flight(s) for s in range(p)] == [m] * p
        assert timeline.weight_copies(0) == timeline.weight_copies(p - 1) == 1


@pytest.mark.parametrize("p", DEVICES)
def test_1f1b_idles_as_gpipe_does_and_keeps_p_minus_s_microbatches(p: int) -> None:
    for m in counts(p):
        for timeline, (f, b, w) in zip(timelines("1f1b", p, m, 1), TIMES, strict=True):
            assert timeline.step_time_s == (m + p - 1) * (f + b + w)
            assert timeline.bubble_s(0) == timeline.bubble_s(p - 1) == (p - 1) * (f + b + w)
        assert [timeline.most_in_flight(s) for s in range(p)] == [min(m, p - s) for s in range(p)]
        assert timeline.weight_copies(0) == timeline.weight_copies(p - 1) == 1


def test_1f1b_keeps_no_more_microbatches_than_there_are() -> None:
    rows = SCHEDULES["1f1b"](8, 3)
    assert [most_in_flight(row) for row in rows] == [3, 3, 3, 3, 3, 3, 2, 1]


@pytest.mark.parametrize("v", [2, 3, 4])
@pytest.mark.parametrize("p", DEVICES)
def test_interleaving_v_chunks_divides_the_bubble_by_v(p: int, v: int) -> None:
    for m in counts(p, p):
        for timeline, (f, b, w) in zip(timelines("interleaved_1f1b", p, m, v), TIMES, strict=True):
            # a device's forward of a microbatch is v stages
            device, chunk = v * (f + b + w), f + b + w
            assert timeline.step_time_s == m * device + (p - 1) * chunk
            assert timeline.bubble_s(0) == timeline.bubble_s(p - 1) == (p - 1) * chunk
        # arXiv 2104.04473's warm-up and the one that follows it, in chunks
        expected = [min(m * v, 2 * (p - d - 1) + (v - 1) * p + 1) for d in range(p)]
        assert [timeline.most_in_flight(d) for d in range(p)] == expected
        assert timeline.weight_copies(0) == v


@pytest.mark.parametrize("v", [2, 4])
@pytest.mark.parametrize("p", DEVICES)
def test_looping_breadth_first_has_the_small_bubble_and_keeps_everything(p: int, v: int) -> None:
    for m in counts(p, max(1, p // 2)):
        for timeline, (f, b, w) in zip(timelines("looped_bfs", p, m, v), TIMES, strict=True):
            assert timeline.step_time_s == (m * v + p - 1) * (f + b + w)
        assert [timeline.most_in_flight(d) for d in range(p)] == [m * v] * p
        assert timeline.weight_copies(0) == v


@pytest.mark.parametrize("p", DEVICES)
def test_zero_bubble_h1_fills_the_bubble_with_weight_gradients(p: int) -> None:
    for m in counts(p):
        for timeline, (f, b, w) in zip(timelines("zero_bubble_h1", p, m, 1), TIMES, strict=True):
            assert w <= min(f, b)
            assert timeline.step_time_s == m * (f + b + w) + (p - 1) * (f + b - w)
            assert timeline.bubble_s(0) == timeline.bubble_s(p - 1) == (p - 1) * (f + b - w)
        # as the first stage of 1f1b, on every stage
        assert [timeline.most_in_flight(s) for s in range(p)] == [p] * p


@pytest.mark.parametrize("times", [(1, 2, 2), (1, 2, 3), (3, 1, 2), (1, 1, 2), (2, 3, 4)])
@pytest.mark.parametrize("p", DEVICES)
def test_long_weight_gradients_fill_no_more_than_a_forward_or_backward(
    p: int, times: tuple[int, int, int]
) -> None:
    f, b, w = times
    for m in (p, 2 * p + 1, 8 * p):
        timeline = simulate(SCHEDULES["zero_bubble_h1"](p, m), equal_stages(p, f, b, w))
        assert timeline.bubble_s(0) == (p - 1) * (f + b - min(f, b, w))


@pytest.mark.parametrize("pipelines", [2, 4, 8])
@pytest.mark.parametrize("p", DEVICES)
def test_chimera_with_2f_pipelines_idles_p_over_f_minus_2_slots(p: int, pipelines: int) -> None:
    if p % pipelines:
        assert SCHEDULES["chimera"].refuses(Shape(p, p, pipelines)) is not None
        return
    f = pipelines // 2
    for m in counts(p, p):
        rows = SCHEDULES["chimera"](p, m, pipelines)
        timeline = simulate(rows, equal_stages(p, 1, 1))
        assert timeline.step_time_s == 2 * m + p // f - 2
        assert [timeline.bubble_s(d) for d in range(p)] == [p // f - 2] * p
        assert [timeline.weight_copies(d) for d in range(p)] == [pipelines] * p
        kept = [timeline.most_in_flight(d) for d in range(p)]
        assert max(kept) == p
        if f == 1:
            assert min(kept) == p // 2 + 1
            assert kept == kept[::-1]


@pytest.mark.parametrize("p", DEVICES)
def test_chimera_takes_any_number_of_microbatches_and_is_not_slower_than_1f1b(p: int) -> None:
    for m in range(max(2, p), 3 * p + 1):
        ours = simulate(SCHEDULES["chimera"](p, m), equal_stages(p, 1, 1)).step_time_s
        theirs = simulate(SCHEDULES["1f1b"](p, m), equal_stages(p, 1, 1)).step_time_s
        assert ours <= theirs
        assert ours < theirs or m % p == 1


@pytest.mark.slow
def test_closed_forms_hold_for_every_number_of_microbatches_on_16_groups() -> None:
    for m in range(16, 8 * 16 + 1):
        for name, sign in (("gpipe", 1), ("1f1b", 1), ("zero_bubble_h1", -1)):
            for timeline, (f, b, w) in zip(timelines(name, 16, m, 1), TIMES, strict=True):
                assert timeline.bubble_s(0) == 15 * (f + b + sign * w)


def test_one_microbatch_keeps_one_device_busy_at_a_time() -> None:
    timeline = simulate(SCHEDULES["gpipe"](4, 1), equal_stages(4, 2, 3))
    assert timeline.step_time_s == 4 * (2 + 3)
    assert [timeline.busy_s(d) for d in range(4)] == [5] * 4


def test_parallel_towers_need_not_wait_for_each_other() -> None:
    # two towers of two stages, and a stage that joins them
    towers = ((0, 1), (1, 4), (2, 3), (3, 4))
    shape = Shape(stages=5, microbatches=6, feeds=towers)
    for name, in_flight in (("gpipe", [6] * 5), ("1f1b", [3, 2, 3, 2, 1])):
        rows = SCHEDULES[name](5, 6, feeds=towers)
        assert [most_in_flight(row) for row in rows] == in_flight
        joined = equal_stages(5, 1, 2, feeds=tuple(Feed(a, b, 0) for a, b in towers))
        # as a chain of three stages, the length of the longest way
        assert simulate(rows, joined).step_time_s == (6 + 2) * 3
    assert shape.stages_after() == [2, 1, 2, 1, 0]


@everything
def test_home_rows_do_microbatch_0_and_every_row_is_home_to_a_stage(name: str) -> None:
    for shape in shapes(name):
        rows = SCHEDULES[name](shape.stages, shape.microbatches, shape.chunks)
        home = homes(rows)
        assert len(home) == shape.stages
        assert set(home) == set(range(len(rows)))
        for stage, row in enumerate(home):
            assert Action(stage, "F", 0) in rows[row]


@everything
def test_rows_are_written_and_read_as_text(name: str) -> None:
    schedule = SCHEDULES[name]
    rows = schedule(schedule.stages(4), 4)
    assert rows_from_text(rows_to_text(rows)) == rows


def test_text_that_is_no_action_is_refused() -> None:
    with pytest.raises(AutoparError, match=r"'0X1' is no action; .* for example 0F3"):
        rows_from_text("0F0 0X1")


def test_old_weights_are_kept_until_their_last_use() -> None:
    stashed = "0F0 0F1 0B0 0U0 0F2 0B1@0 0U1 0F3 0B2@1 0U2 0B3@2 0U3"
    latest = stashed.replace("@0", "").replace("@1", "").replace("@2", "")
    assert weight_copies(rows_from_text(stashed)[0]) == 2
    assert weight_copies(rows_from_text(latest)[0]) == 1
