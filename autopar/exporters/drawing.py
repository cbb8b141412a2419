"""A timeline as a drawing: a line of text for each row, or one HTML page, or a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from html import escape
from math import gcd, lcm
from typing import Any

from autopar.exporters.html import STYLE
from autopar.exporters.units import time_text as seconds_as_text
from autopar.simulator.critical_path import shares_of_step
from autopar.simulator.pipeline import Time
from autopar.simulator.timeline import Event, Timeline

TimeText = Callable[[Time], str]


def number_text(time: Time) -> str:
    """
    >>> number_text(Fraction(6, 2)), number_text(0.5)
    ('3', '0.5')
    """
    return f"{float(time):.6g}"


def seconds_text(time: Time) -> str:
    """
    >>> seconds_text(Fraction(1, 500))
    '2.00 ms'
    """
    return seconds_as_text(float(time))


def text(timeline: Timeline, columns: int = 120, time_text: TimeText = number_text) -> str:
    """A line for each row, then what each row idles and keeps.

    Where all actions begin on the beat of a common slot and there is room, each slot shows the
    action that begins in it, ``-`` while that goes on, and ``.`` where the row idles. Otherwise a
    column is a part of the step and shows the kind of action that takes most of it, in small
    letters for every other action.
    """
    labels = [f"row {r}" for r in range(len(timeline.rows))]
    margin = max(map(len, labels))
    slot_s = _common_slot(timeline)
    width = 1 + max(len(str(action)) for row in timeline.rows for action in row)
    if slot_s is not None and timeline.passes_s / slot_s * width <= columns - margin:
        lines = [_slots(row, slot_s, width, timeline.passes_s) for row in _computing(timeline)]
    else:
        room = max(10, columns - margin - 1)
        lines = [_columns(row, timeline.passes_s, room) for row in _computing(timeline)]
    drawn = [f"{label:>{margin}} {line}" for label, line in zip(labels, lines, strict=True)]
    table = [list(column) for column in (_HEAD, *_facts(timeline, time_text))]
    widths = [max(len(row[i]) for row in table) for i in range(len(_HEAD))]
    facts = [
        "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    return "\n".join([*drawn, "", *facts, "", _waits(timeline, time_text)])


def html(timeline: Timeline, title: str, time_text: TimeText = number_text) -> str:
    """A page with the drawing to scale; pointing at a bar tells what it is."""
    facts = "".join(
        "<tr>" + "".join(f'<td class="num">{escape(cell)}</td>' for cell in row) + "</tr>"
        for row in _facts(timeline, time_text)
    )
    head = "".join(f"<th>{escape(cell)}</th>" for cell in _HEAD)
    keys = "".join(
        f'<i style="background:{colour}"></i>{escape(meaning)}'
        for colour, meaning in _COLOURS.values()
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n"
        f"<p>{escape(_waits(timeline, time_text))}</p>\n"
        f'<div style="overflow-x:auto">{svg(timeline, time_text)}</div>\n'
        f'<p class="key">{keys}</p>\n'
        f"<table><thead><tr>{head}</tr></thead><tbody>{facts}</tbody></table>\n"
        "</body>\n</html>\n"
    )


def summary(timeline: Timeline) -> dict[str, Any]:
    """The rows and what is read off them, for JSON."""
    rows = range(len(timeline.rows))
    return {
        "rows": [list(map(str, row)) for row in timeline.rows],
        "step_time_s": float(timeline.step_time_s),
        "critical_path_s": {kind: float(t) for kind, t in shares_of_step(timeline).items()},
        "busy_s": [float(timeline.busy_s(r)) for r in rows],
        "bubble_s": [float(timeline.bubble_s(r)) for r in rows],
        "most_in_flight": [timeline.most_in_flight(r) for r in rows],
        "weight_copies": [timeline.weight_copies(r) for r in rows],
    }


# Paul Tol's "bright" palette, which colour-blind readers can tell apart
_COLOURS = {
    "F": ("#4477aa", "F forward"),
    "B": ("#ee6677", "B backward"),
    "I": ("#ccbb44", "I gradient of inputs"),
    "W": ("#228833", "W gradient of weights"),
    "U": ("#aa3377", "U update"),
    "exchange": ("#66ccee", "gradient exchange"),
    "norm": ("#66ccee", "gradient exchange"),
    "send": ("#bbbbbb", "transfer"),
}
_LEFT, _LANE, _THIN, _GAP = 60, 22, 5, 8
_LONGEST = 20_000  # px; browsers draw no wider pictures well


def svg(timeline: Timeline, time_text: TimeText = number_text) -> str:
    """The timeline to scale: a wide lane for each row's actions, and thin ones for its gradient
    exchanges and for what it sends. Later stages of a row are lighter."""
    events = [event for event in timeline.events() if event.end_s > event.start_s]
    step_s = float(timeline.step_time_s) or 1.0
    shortest_s = min(
        (float(e.end_s - e.start_s) for e in events if e.stream == "compute"), default=1.0
    )
    scale = min(_LONGEST, max(800.0, 26 * step_s / shortest_s)) / step_s
    pitch = _LANE + 2 * _THIN + _GAP
    shade = {
        (r, stage): 1 - 0.45 * place / max(1, len(stages) - 1)
        for r, row in enumerate(timeline.rows)
        for stages in [sorted({action.stage for action in row})]
        for place, stage in enumerate(stages)
    }
    width, height = _LEFT + step_s * scale + 10, len(timeline.rows) * pitch + _GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        f'viewBox="0 0 {width:.0f} {height}" font-family="system-ui, sans-serif" font-size="11">'
    ]
    for r in range(len(timeline.rows)):
        y = _GAP + r * pitch
        parts.append(f'<text x="4" y="{y + 15}">row {r}</text>')
        parts.append(
            f'<rect x="{_LEFT}" y="{y}" width="{step_s * scale:.1f}" height="{_LANE}" '
            'fill="#f0f1f3"/>'
        )
    for event in events:
        parts += _bar(event, scale, _GAP + event.row * pitch, shade, time_text)
    return "\n".join([*parts, "</svg>"])


def _bar(
    event: Event,
    scale: float,
    y: int,
    shade: dict[tuple[int, int], float],
    time_text: TimeText,
) -> Iterator[str]:
    x, width = _LEFT + float(event.start_s) * scale, float(event.end_s - event.start_s) * scale
    colour, _ = _COLOURS[event.kind]
    top = {"compute": 0, "communication": _LANE, "transfer": _LANE + _THIN}[event.stream]
    height = _LANE if event.stream == "compute" else _THIN - 1
    to = "" if event.to is None else f" (row {event.to})"
    title = f"{event.name}{to}: {time_text(event.start_s)} to {time_text(event.end_s)}"
    stage = int(event.name.split(event.kind)[0]) if event.stream == "compute" else -1
    opacity = shade.get((event.row, stage), 1.0)
    yield (
        f'<rect x="{x:.1f}" y="{y + top}" width="{max(width - 0.5, 0.3):.1f}" height="{height}" '
        f'fill="{colour}"' + (f' opacity="{opacity:.2f}"' if opacity < 1 else "") + ">"
        f"<title>{escape(title)}</title></rect>"
    )
    if event.stream == "compute" and width > 7 * len(event.name):
        yield (
            f'<text x="{x + width / 2:.1f}" y="{y + 15}" text-anchor="middle" fill="#fff" '
            f'pointer-events="none">{escape(event.name)}</text>'
        )


def _computing(timeline: Timeline) -> list[list[Event]]:
    """Each row's forwards and backwards that take time."""
    rows: list[list[Event]] = [[] for _ in timeline.rows]
    for event in timeline.events():
        if event.stream == "compute" and event.kind != "U" and event.end_s > event.start_s:
            rows[event.row].append(event)
    return rows


def _common_slot(timeline: Timeline) -> Fraction | None:
    """The longest time that all beginnings and ends are multiples of; ``None`` if inexact."""
    moments = [t for row in _computing(timeline) for e in row for t in (e.start_s, e.end_s)]
    if not moments or not all(isinstance(t, int | Fraction) for t in moments):
        return None
    exact = [Fraction(t) for t in moments]
    denominator = lcm(*(t.denominator for t in exact))
    return Fraction(gcd(*(int(t * denominator) for t in exact)), denominator)


def _slots(row: Sequence[Event], slot_s: Fraction, width: int, until_s: Time) -> str:
    cells = ["."] * int(until_s / slot_s)
    for event in row:
        first, last = int(event.start_s / slot_s), int(event.end_s / slot_s)
        cells[first:last] = [event.name, *["-" * (width - 1)] * (last - first - 1)]
    return "".join(f"{cell:<{width}}" for cell in cells).rstrip()


def _columns(row: Sequence[Event], until_s: Time, columns: int) -> str:
    column_s = float(until_s) / columns
    taken: list[dict[str, float]] = [{} for _ in range(columns)]
    for place, event in enumerate(row):
        kind = event.kind.lower() if place % 2 else event.kind
        start, end = float(event.start_s) / column_s, float(event.end_s) / column_s
        for column in range(int(start), min(columns, int(end) + 1)):
            share = min(end, column + 1) - max(start, column)
            taken[column][kind] = taken[column].get(kind, 0.0) + share
    return "".join(
        max(kinds, key=kinds.__getitem__) if sum(kinds.values()) >= 0.5 else "." for kinds in taken
    )


def _waits(timeline: Timeline, time_text: TimeText) -> str:
    """The step, and what is on its critical path."""
    shares = ((kind, time) for kind, time in shares_of_step(timeline).items() if time > 0)
    on_path = ", ".join(f"{kind} {time_text(time)}" for kind, time in shares)
    return f"step {time_text(timeline.step_time_s)}, on its critical path: {on_path}"


_HEAD = ("row", "stages", "busy", "bubble", "in flight", "weight copies")


def _facts(timeline: Timeline, time_text: TimeText) -> list[tuple[str, ...]]:
    return [
        (
            str(r),
            ", ".join(map(str, sorted({action.stage for action in row}))),
            time_text(timeline.busy_s(r)),
            time_text(timeline.bubble_s(r)),
            str(timeline.most_in_flight(r)),
            str(timeline.weight_copies(r)),
        )
        for r, row in enumerate(timeline.rows)
    ]
