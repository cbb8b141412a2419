"""Timelines as text, as a page, as a picture and as a trace."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from autopar import api, cli
from autopar.exporters import drawing, perfetto
from autopar.schedules import SCHEDULES
from autopar.simulator.pipeline import (
    PairLinks,
    Pipeline,
    PortLinks,
    StageCost,
    Synchronisation,
    chain,
    equal_stages,
)
from autopar.simulator.timeline import Timeline, simulate


def busy_timeline(name: str = "interleaved_1f1b", devices: int = 4) -> Timeline:
    """One with all kinds of events."""
    schedule = SCHEDULES[name]
    stages = schedule.stages(devices)
    pipeline = Pipeline(
        (StageCost(1.0, 2.5, 0.5, 1.2, 1.3),) * stages,
        chain(stages, 100),
        PortLinks(1e3, 0.05),
        tuple(Synchronisation((s,), 0.7, parts=2) for s in range(stages)),
        norm_s=0.1,
    )
    return simulate(schedule(stages, 2 * devices), pipeline)


def test_text_shows_each_action_in_the_slot_in_which_it_begins() -> None:
    timeline = simulate(SCHEDULES["1f1b"](2, 2), equal_stages(2, 1, 2))
    assert drawing.text(timeline).splitlines() == [
        "row 0 0F0 0F1 .   .   0B0 --- .   0B1 ---",
        "row 1 .   1F0 1B0 --- 1F1 1B1 --- .   .",
        "",
        "row  stages  busy  bubble  in flight  weight copies",
        "  0       0     6       3          2              1",
        "  1       1     6       3          1              1",
        "",
        "step 9, on its critical path: F 3, B 6",
    ]


def test_text_without_a_common_slot_or_room_shows_kinds_to_scale() -> None:
    for times in ((1.0, 2.0), (Fraction(1), Fraction(2))):
        timeline = simulate(SCHEDULES["gpipe"](2, 2), equal_stages(2, *times))
        first, second = drawing.text(timeline, columns=24).splitlines()[:2]
        assert len(first) <= 24
        assert first.startswith("row 0 FFff")
        assert second.startswith("row 1 ..FF")


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_picture_has_a_bar_for_every_event(name: str) -> None:
    timeline = busy_timeline(name)
    root = ElementTree.fromstring(drawing.svg(timeline))
    titles = [title.text or "" for title in root.iter("{http://www.w3.org/2000/svg}title")]
    events = [e for e in timeline.events() if e.end_s > e.start_s]
    assert len(titles) == len(events)
    assert {e.kind for e in events} >= {"F", "U", "send", "exchange", "norm"}
    for event in events:
        assert any(title.startswith(event.name) for title in titles)


def test_a_page_escapes_and_needs_nothing_else() -> None:
    page = drawing.html(busy_timeline(), "<1f1b>")
    assert "&lt;1f1b&gt;" in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert page.count("<tr>") == 1 + 4


def events_of(trace: str) -> list[dict[str, Any]]:
    found = json.loads(trace)["traceEvents"]
    assert isinstance(found, list)
    return found


def test_a_trace_has_every_event_at_its_time() -> None:
    timeline = busy_timeline()
    bars = [e for e in events_of(perfetto.trace(timeline)) if e["ph"] == "X"]
    events = [e for e in timeline.events() if e.end_s > e.start_s]
    assert len(bars) == len(events)
    named = {(bar["pid"], bar["name"]): bar for bar in bars}
    for event in events:
        if event.stream == "compute":
            bar = named[event.row, event.name]
            shortest_us = 0.5e6
            assert abs(bar["ts"] - float(event.start_s) * 1e6) <= shortest_us / 1000
            assert abs(bar["dur"] - float(event.end_s - event.start_s) * 1e6) <= shortest_us / 500


def test_bars_of_a_thread_do_not_overlap() -> None:
    for name in SCHEDULES:
        threads: dict[tuple[int, int], list[tuple[float, float]]] = {}
        for e in events_of(perfetto.trace(busy_timeline(name))):
            if e["ph"] == "X":
                span = (e["ts"], e["ts"] + e["dur"])
                threads.setdefault((e["pid"], e["tid"]), []).append(span)
        assert threads
        for spans in threads.values():
            spans.sort()
            assert all(a[1] <= b[0] + 1e-3 for a, b in pairwise(spans))


def test_a_trace_of_1024_devices_is_below_5_megabytes_and_says_what_it_leaves_out() -> None:
    names = [f"stage {r}, devices {16 * r}-{16 * r + 15}" for r in range(64)]
    costs = (StageCost(0.0123, 0.0246, 0.01),) * 64
    pipeline = Pipeline(costs, chain(64, 50_000_000), PairLinks(100e9, 1e-5))
    trace = perfetto.trace(simulate(SCHEDULES["1f1b"](64, 512), pipeline), names)
    assert len(trace) < 5_000_000
    assert json.loads(trace)["otherData"] == {"transfers left out": str(2 * 63 * 512)}
    shorter = simulate(SCHEDULES["1f1b"](64, 64), pipeline)
    assert json.loads(perfetto.trace(shorter, names))["otherData"] == {}
    large = perfetto.trace(shorter, names, limit_bytes=300_000)
    assert len(large) < 300_000
    kept = int(json.loads(large)["otherData"]["actions drawn at each end of a row"])
    bars = [e for e in events_of(large) if e["ph"] == "X"]
    assert len(bars) == 64 * (2 * kept + 1)  # both ends and the middle
    assert sum("actions)" in bar["name"] for bar in bars) == 64
    heads = [e["args"]["name"] for e in events_of(large) if e.get("name") == "process_name"]
    assert heads == names


# The command


def draw(*arguments: str) -> str:
    result = CliRunner().invoke(cli.commands, ["draw", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_draw_prints_rows_and_writes_pictures(tmp_path: Path) -> None:
    assert "row 3 .   .   .   3F0 3B0" in draw("1f1b", "--microbatches", "4", "--times", "1,1,0")
    for ending, start in ((".html", "<!doctype"), (".svg", "<svg"), (".json", "{")):
        target = tmp_path / f"drawing{ending}"
        draw("zero_bubble_h1", "-o", str(target))
        assert target.read_text().startswith(start)


@pytest.mark.parametrize("name", SCHEDULES)
def test_draw_prints_what_is_read_off_as_json(name: str) -> None:
    data = json.loads(draw(name, "--devices", "4", "--json"))
    assert len(data["rows"]) == 4
    timeline = api.timeline_of(name, 4, 8)
    assert data["step_time_s"] == timeline.step_time_s
    assert data["rows"][0][0] == "0F0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["1f1"], "did you mean 1f1b?"),
        (["1f1b", "--times", "1,2"], "'1,2' are no three times"),
        (["1f1b", "--times", "1,0,1"], "take some time"),
        (["chimera", "--devices", "5"], "an even number of stages works"),
        (["1f1b", "-o", "x.png"], "no kind of drawing is called '.png'"),
    ],
)
def test_draw_says_what_is_wrong(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["draw", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_schedules_are_listed() -> None:
    result = CliRunner().invoke(cli.commands, ["list", "schedules"])
    assert result.stdout.split() == sorted(SCHEDULES)
