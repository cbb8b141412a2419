"""A plan as one HTML page that needs nothing else: to mail, to attach, to open in ten years."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape

from autopar.exporters.explanation import (
    Block,
    CollectiveRow,
    explanation,
    passed_on,
    stages_of,
)
from autopar.exporters.text import (
    ALLOCATED_COLUMNS,
    RESERVED_COLUMNS,
    ROW_COLUMNS,
    allocated_cells,
    change_text,
    divided_text,
    kinds_of_memory,
    kinds_of_reserve,
    parts,
    passed_on_text,
    reserved_cells,
    row_cells,
    stages_text,
    summary,
)
from autopar.exporters.units import bytes_text, time_text
from autopar.ir.plan import Plan
from autopar.ir.sharding import Mesh
from autopar.ir.simulation import Memory
from autopar.simulator.edges import Rules

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem;
       color: #1b1f24; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
pre { background: #f5f6f8; padding: 1rem; overflow-x: auto }
table { border-collapse: collapse; margin: .6rem 0 1.2rem; width: 100% }
th, td { text-align: left; padding: .25rem .7rem; border-bottom: 1px solid #e3e6ea;
         vertical-align: top }
th { font-weight: 600; background: #f5f6f8 }
.bar { display: flex; height: 1.8rem; margin: .5rem 0; border-radius: 4px; overflow: hidden }
.bar span { font-size: .75rem; color: #fff; padding: .35rem .4rem; overflow: hidden;
            white-space: nowrap }
.key { font-size: .85rem } .key i { display: inline-block; width: .8em; height: .8em;
       margin: 0 .3em 0 1em; border-radius: 2px }
details { margin: .4rem 0 } summary { cursor: pointer }
.num { text-align: right; font-variant-numeric: tabular-nums }
"""

# Paul Tol's "bright" palette, which colour-blind readers can tell apart
COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#bbbbbb")


def export(plan: Plan, rules: Rules) -> str:
    title = f"{plan.graph.name} on {plan.topology.get('name')}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<pre>{escape(summary(plan, top=20))}</pre>",
        "<h2>Where the time goes</h2>",
        _bar(parts(plan.estimate), time_text),
        "<h2>Where the memory goes</h2>",
        _bar(kinds_of_memory(plan.estimate.memory), bytes_text),
        *_reserve(plan.estimate.memory),
        *_blocks(plan, rules),
        "<h2>Every collective of a step</h2>",
        _promise(plan),
        f"<p>Written by autopar {escape(plan.autopar)} at {escape(plan.created)}.</p>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _reserve(found: Memory) -> Iterator[str]:
    beside = [f"{kind} {bytes_text(n)}" for kind, n in kinds_of_reserve(found) if n]
    if beside:
        in_all = bytes_text(found.device_bytes)
        yield f"<p>Beside it, for {in_all} of the device in all: {escape(', '.join(beside))}.</p>"


def _blocks(plan: Plan, rules: Rules) -> Iterator[str]:
    if plan.pipeline is None:
        for block in explanation(plan, rules).blocks:
            yield _block(block, plan.mesh)
        return
    yield "<h2>Rows</h2>"
    yield _table(ROW_COLUMNS, row_cells(plan.estimate))
    yield "<h2>Memory of each row</h2>"
    yield _table(ALLOCATED_COLUMNS, allocated_cells(plan.estimate))
    of_bytes = plan.topology.get("memory_bytes")
    yield _table(RESERVED_COLUMNS, reserved_cells(plan.estimate, of_bytes))
    for passed in passed_on(plan):
        yield f"<p>{escape(passed_on_text(passed))}</p>"
    for stages in stages_of(plan):
        yield f"<h2>{escape(stages_text(stages))}</h2>"
        for block in stages.what.blocks:
            yield _block(block, stages.mesh)


def _bar(shares: Sequence[tuple[str, float]], text: Callable[[float], str]) -> str:
    total = sum(size for _, size in shares) or 1.0
    spans, keys = [], []
    for (name, size), colour in zip(shares, COLOURS, strict=False):
        if size > 0:
            share = 100 * size / total
            label = f"{name}: {text(size)} ({share:.0f}%)"
            spans.append(
                f'<span style="width:{share:.2f}%;background:{colour}" title="{escape(label)}">'
                f"{escape(name)}</span>"
            )
            keys.append(f'<i style="background:{colour}"></i>{escape(label)}')
    return f'<div class="bar">{"".join(spans)}</div><div class="key">{"".join(keys)}</div>'


def _block(block: Block, mesh: Mesh) -> str:
    axes = [f"{name} ({size})" for name, size in mesh.axes]
    sections = [
        f"<h2>{escape(block.path)}{f' x{block.count}' if block.count > 1 else ''}</h2>",
        f"<p>communication {time_text(block.communication_s)} a step</p>",
    ]
    if block.redistributions:
        sections.append(
            _table(
                ("redistributed", "times", "from → to", "for", "costs"),
                (
                    (
                        row.tensor,
                        str(row.count),
                        change_text(row.source, row.target, mesh),
                        ", ".join(row.readers),
                        _costs(row.collectives),
                    )
                    for row in block.redistributions
                ),
            )
        )
    if block.parameters:
        sections.append(
            _table(
                ("parameter", "times", "shape", *axes, "a device has", "costs"),
                (
                    (
                        row.name,
                        str(row.count),
                        "x".join(map(str, row.shape)),
                        *row.storage,
                        bytes_text(row.local_bytes),
                        _costs(row.collectives),
                    )
                    for row in block.parameters
                ),
            )
        )
    operators = _table(
        ("operator", "times", "op", *axes, "inside it"),
        (
            (
                row.name,
                str(row.count),
                row.op,
                *(divided_text(divided) for divided in row.split),
                _costs(row.collectives),
            )
            for row in block.operators
        ),
    )
    sections.append(f"<details><summary>operators</summary>{operators}</details>")
    refused = "".join(
        f"<li>{escape(r.axis)}: {r.axis_size} devices do not divide {r.size} ("
        + escape(", ".join(f"{factor} of {name}" for name, factor in r.factors))
        + ")</li>"
        for r in block.refusals
    )
    if refused:
        sections.append(f"<details><summary>not offered</summary><ul>{refused}</ul></details>")
    return "\n".join(sections)


def _costs(rows: Iterable[CollectiveRow]) -> str:
    return "\n".join(
        f"{row.phase} {row.kind} on {row.axis}, {bytes_text(row.bytes)} x{row.times}: "
        f"{time_text(row.time_s)}"
        for row in rows
    )


def _promise(plan: Plan) -> str:
    totals: dict[tuple[str, str, str, int], tuple[int, float]] = {}
    rows = () if plan.pipeline is None else plan.pipeline.rows
    for c in (*plan.estimate.collectives, *(c for row in rows for c in row.collectives)):
        key = (c.phase, c.kind, c.axis, c.bytes)
        count, time_s = totals.get(key, (0, 0.0))
        totals[key] = (count + c.count, time_s + c.count * c.time_s)
    return _table(
        ("phase", "collective", "axis", "bytes", "times", "seconds"),
        (
            (phase, kind, axis, bytes_text(size), str(count), time_text(time_s))
            for (phase, kind, axis, size), (count, time_s) in sorted(
                totals.items(), key=lambda item: -item[1][1]
            )
        ),
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "\n".join(
        "<tr>"
        + "".join(f"<td>{escape(cell).replace(chr(10), '<br>')}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
