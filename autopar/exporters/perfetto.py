"""A timeline in the trace format of Chrome, which ui.perfetto.dev and chrome://tracing open.

A row stands for all devices of its group, which do the same: a trace has as many processes as there
are rows, however many devices.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import floor, log10
from types import MappingProxyType

from autopar.exporters import played
from autopar.ir.plan import Plan
from autopar.simulator.edges import Rules
from autopar.simulator.pipeline import Time
from autopar.simulator.timeline import Event, Timeline

LIMIT_BYTES = 5_000_000

COMPUTE, COMMUNICATION, SENDS = 0, 1, 2  # threads; further ones for sends at the same time


def export(plan: Plan, rules: Rules) -> str:
    """The plan's own rows on its own machine."""
    del rules
    about = {"model": plan.graph.name, "machine": str(plan.topology.get("name"))}
    return trace(played.timeline(plan), played.row_names(plan), about=about)


def trace(
    timeline: Timeline,
    names: Sequence[str] | None = None,
    limit_bytes: int = LIMIT_BYTES,
    about: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """``names``: of the rows, for example which devices they are; the default is their number.

    What does not fit in ``limit_bytes`` is left out, transfers first; then the middle of each row
    is drawn as one bar. ``otherData`` in the trace says ``about`` what it is, and how much was left
    out.
    """
    rows = len(timeline.rows)
    names = [f"row {r}" for r in range(rows)] if names is None else names
    assert len(names) == rows, (names, rows)
    events = [event for event in timeline.events() if event.end_s > event.start_s]
    sends = [event for event in events if event.stream == "transfer"]
    compute = [event for event in events if event.stream == "compute"]
    exchanges = [event for event in events if event.stream == "communication"]

    digits = _digits(compute)
    whole = [_slice(event, _THREAD[event.stream], digits) for event in (*compute, *exchanges)]
    drawn_sends, lanes = _in_lanes(sends, digits)
    if _size(whole) + _size(drawn_sends) + _size(_heads(names, lanes)) <= limit_bytes - 1000:
        return _document([*_heads(names, lanes), *whole, *drawn_sends], about)
    heads = _heads(names, 0)
    left_out = {"transfers left out": str(len(sends))}
    room = limit_bytes - 1000 - _size(heads)
    if _size(whole) > room:
        fixed = [_slice(event, COMMUNICATION, digits) for event in exchanges]
        size = max(len(one) + 2 for one in whole)
        keep = max(1, (room - _size(fixed)) // (size * rows * 2) - 1)
        whole = [*fixed, *_shortened(compute, rows, keep, digits)]
        left_out["actions drawn at each end of a row"] = str(keep)
    return _document([*heads, *whole], {**about, **left_out})


_THREAD = {"compute": COMPUTE, "communication": COMMUNICATION}


def _digits(compute: Sequence[Event]) -> int:
    """Digits of a microsecond that tell a thousandth of the shortest action, at most three."""
    shortest_s = min((event.end_s - event.start_s for event in compute), default=1)
    return min(3, max(0, 3 - floor(log10(float(shortest_s) * 1e6))))


def _slice(event: Event, thread: int, digits: int) -> str:
    name = event.name if event.to is None else f"{event.name} (row {event.to})"
    return _bar(event.row, thread, event.start_s, event.end_s, name, digits)


def _bar(row: int, thread: int, start_s: Time, end_s: Time, name: str, digits: int) -> str:
    """One complete event; its times are in microseconds."""
    start, end = (round(float(t) * 10 ** (6 + digits)) for t in (start_s, end_s))
    return (
        f'{{"ph":"X","pid":{row},"tid":{thread},"ts":{_decimal(start, digits)},'
        f'"dur":{_decimal(end - start, digits)},"name":{json.dumps(name)}}}'
    )


def _decimal(number: int, digits: int) -> str:
    """
    >>> _decimal(12345, 3), _decimal(5, 1), _decimal(70, 0)
    ('12.345', '0.5', '70')
    """
    whole, part = divmod(number, 10**digits)
    return f"{whole}.{part:0{digits}}" if digits else str(whole)


def _in_lanes(sends: Sequence[Event], digits: int) -> tuple[list[str], int]:
    """Bars of one thread must not overlap: each takes the first that is free."""
    free: dict[int, list[Time]] = {}
    drawn = []
    for event in sorted(sends, key=lambda event: (event.start_s, event.end_s)):
        lanes = free.setdefault(event.row, [])
        lane = next((i for i, until in enumerate(lanes) if until <= event.start_s), len(lanes))
        lanes[lane : lane + 1] = [event.end_s]
        drawn.append(_slice(event, SENDS + lane, digits))
    return drawn, max(map(len, free.values()), default=0)


def _shortened(compute: Sequence[Event], rows: int, keep: int, digits: int) -> list[str]:
    """The first and last actions of each row, and one bar for those between."""
    of_row: list[list[Event]] = [[] for _ in range(rows)]
    for event in compute:
        of_row[event.row].append(event)
    drawn = []
    for r, row in enumerate(of_row):
        if len(row) > 2 * keep:
            between = row[keep:-keep]
            name = f"{between[0].name} ... {between[-1].name} ({len(between)} actions)"
            start_s, end_s = between[0].start_s, between[-1].end_s
            drawn.append(_bar(r, COMPUTE, start_s, end_s, name, digits))
            row = [*row[:keep], *row[-keep:]]
        drawn += [_slice(event, COMPUTE, digits) for event in row]
    return drawn


def _heads(names: Sequence[str], lanes: int) -> list[str]:
    threads = ["compute", "gradient exchange", *(f"sends {i}" for i in range(1, lanes + 1))]
    heads = []
    for row, name in enumerate(names):
        heads.append(_name("process_name", row, 0, name))
        heads.append(
            f'{{"ph":"M","name":"process_sort_index","pid":{row},"args":{{"sort_index":{row}}}}}'
        )
        heads += [_name("thread_name", row, i, thread) for i, thread in enumerate(threads)]
    return heads


def _name(what: str, row: int, thread: int, name: str) -> str:
    args = json.dumps({"name": name})
    return f'{{"ph":"M","name":"{what}","pid":{row},"tid":{thread},"args":{args}}}'


def _size(entries: Sequence[str]) -> int:
    return sum(len(entry) + 2 for entry in entries)


def _document(entries: Sequence[str], about: Mapping[str, str]) -> str:
    other = json.dumps(dict(about))
    body = ",\n".join(entries)
    return f'{{"displayTimeUnit":"ms","otherData":{other},"traceEvents":[\n{body}\n]}}\n'
