"""The page of a validation: predicted against measured, a colour and a line for each source."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

from autopar.recipes import degrees_text
from benchmarks.quality import Quality, share
from benchmarks.rows import GIB
from benchmarks.runs import Compared

SIZE, EDGE = 560, 50
"""Of the picture and its margin, in pixels."""

STYLE = """
body { font: 15px system-ui, sans-serif; margin: 2em auto; max-width: 75em; color: #222 }
table { border-collapse: collapse } td, th { padding: .2em .7em; text-align: right }
td:first-child, th:first-child { text-align: left } tr { border-bottom: 1px solid #ddd }
.pictures { display: flex; flex-wrap: wrap }
svg text { font: 12px system-ui, sans-serif }
"""

COLUMNS = (
    *("source", "rows", "predicted", "mean error of steps", "bias", "largest"),
    *("in the band", "tau"),
    *("mean error of memory", "largest", "false fits", "false rejects", "not judged"),
)


def page(found: Sequence[Quality], compared: Sequence[Compared]) -> str:
    """Complete HTML, which loads nothing."""
    colours = {one.source: _colour(number) for number, one in enumerate(found[:-1])}
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Validation</title>"
        f"<style>{STYLE}</style><h1>Predicted and measured</h1>"
        f"<p>{found[-1].predicted} of {found[-1].rows} rows are predicted; a point on the line is "
        "predicted as it was measured.</p>"
        f"<div class=pictures>{_times(compared, colours)}{_memory(compared, colours)}</div>"
        f"{_table(found, colours)}{_assumed(found)}{_skipped(found)}</html>\n"
    )


def _colour(number: int) -> str:
    return f"hsl({number * 137.5 % 360:.0f} 65% 42%)"  # the golden angle: neighbours differ


@dataclass(frozen=True)
class _Point:
    measured: float
    predicted: float
    of: Compared


def _times(compared: Sequence[Compared], colours: dict[str, str]) -> str:
    points = [_Point(one.run.step_s, one.step_s, one) for one in compared if one.run.step_s]
    return _picture("Seconds of a step", points, "s", colours)


def _memory(compared: Sequence[Compared], colours: dict[str, str]) -> str:
    points = [
        _Point(one.run.memory_bytes / GIB, one.memory_bytes / GIB, one)
        for one in compared
        if one.run.memory_bytes
    ]
    return _picture("Peak memory of a device", points, "GiB", colours)


def _picture(title: str, points: Sequence[_Point], unit: str, colours: dict[str, str]) -> str:
    """Logarithmic both ways; each source's line is its mean error over the range of its rows."""
    if not points:
        return ""
    numbers = [number for point in points for number in (point.measured, point.predicted)]
    low, high = math.floor(math.log10(min(numbers))), math.ceil(math.log10(max(numbers)))
    width = (SIZE - 2 * EDGE) / max(1, high - low)

    def at(number: float) -> float:
        return EDGE + (math.log10(number) - low) * width

    lines = []
    for power in range(low, high + 1):
        x = EDGE + (power - low) * width
        y, tick = SIZE - x, f"{10.0**power:g} {unit}"
        lines += [
            f'<path d="M{x:.1f} {EDGE}V{SIZE - EDGE}M{EDGE} {y:.1f}H{SIZE - EDGE}" stroke="#ddd"/>',
            f'<text x="{x:.1f}" y="{SIZE - EDGE + 18}" text-anchor="middle">{tick}</text>',
            f'<text x="{EDGE - 6}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>',
        ]
    dots = (
        f'<circle cx="{at(one.measured):.1f}" cy="{SIZE - at(one.predicted):.1f}" r="3" '
        f'fill="{colours[one.of.run.source]}" fill-opacity=".6">'
        f"<title>{escape(_hover(one, unit))}</title></circle>"
        for one in points
    )
    return (
        f"<figure><figcaption>{title}</figcaption>"
        f'<svg width="{SIZE}" height="{SIZE}" role="img">{"".join(lines)}'
        f'<path d="M{EDGE} {SIZE - EDGE}L{SIZE - EDGE} {EDGE}" stroke="#888"/>'
        f"{''.join(_series(points, at, colours))}{''.join(dots)}"
        f'<text x="{SIZE / 2}" y="{SIZE - 8}" text-anchor="middle">measured</text>'
        f'<text x="14" y="{SIZE / 2}" text-anchor="middle" '
        f'transform="rotate(-90 14 {SIZE / 2})">predicted</text></svg></figure>'
    )


def _series(
    points: Sequence[_Point], at: Callable[[float], float], colours: dict[str, str]
) -> Iterator[str]:
    by_source: dict[str, list[_Point]] = {}
    for point in points:
        by_source.setdefault(point.of.run.source, []).append(point)
    for source, of in by_source.items():
        ratio = math.exp(fmean(math.log(point.predicted / point.measured) for point in of))
        ends = min(point.measured for point in of), max(point.measured for point in of)
        (x, y), (to_x, to_y) = ((at(end), SIZE - at(end * ratio)) for end in ends)
        said = f"{source}: {len(of)} rows, predicted {ratio - 1:+.1%} in the mean"
        yield (
            f'<path d="M{x:.1f} {y:.1f}L{to_x:.1f} {to_y:.1f}" stroke="{colours[source]}" '
            f'stroke-width="1.5"><title>{escape(said)}</title></path>'
        )


def _hover(point: _Point, unit: str) -> str:
    run = point.of.run
    return "\n".join(
        (
            f"{run.name}: {point.predicted:.3g} {unit} predicted, {point.measured:.3g} {unit} "
            f"measured ({point.predicted / point.measured - 1:+.1%})",
            run.source,
            f"{run.model.layers} layers of {run.model.width}, {run.model.length} tokens a sample, "
            f"{run.batch} samples, {run.model.products or run.model.dtype}",
            f"{run.machine}: {degrees_text(run.degrees)}",
            *(f"assumed: {what}" for what in run.assumed),
        )
    )


def _table(found: Sequence[Quality], colours: dict[str, str]) -> str:
    rows = "".join(
        _row(
            (
                _coloured(one.source, colours),
                *(str(one.rows), str(one.predicted)),
                *(share(one.step_mean), share(one.step_bias), share(one.step_largest)),
                share(one.step_in_band),
                "-" if one.tau is None else f"{one.tau:.3f}",
                *(share(one.memory_mean), share(one.memory_largest)),
                *(str(one.false_fits), str(one.false_rejects), str(one.not_judged)),
            )
        )
        for one in found
    )
    return f"<table>{_row(COLUMNS, 'th')}{rows}</table>"


def _coloured(source: str, colours: dict[str, str]) -> str:
    return f'<span style="color:{colours.get(source, "#222")}">{escape(source)}</span>'


def _row(cells: Iterable[str], kind: str = "td") -> str:
    return "<tr>" + "".join(f"<{kind}>{cell}</{kind}>" for cell in cells) + "</tr>"


def _assumed(found: Sequence[Quality]) -> str:
    items = (
        f"<li>{escape(one.source)}: {number} rows, {escape(what)}</li>"
        for one in found[:-1]
        for what, number in one.assumed.items()
    )
    listed = "".join(items)
    return f"<h2>Assumed where rows do not say it</h2><ul>{listed}</ul>" if listed else ""


def _skipped(found: Sequence[Quality]) -> str:
    """By reason, with the names of the rows."""
    names: dict[str, list[str]] = {}
    for name, reason in (*found[-1].left_out, *found[-1].failed):
        names.setdefault(reason, []).append(name)
    items = "".join(
        f"<li><details><summary>{len(of)}: {escape(reason)}</summary>{escape(', '.join(of))}"
        "</details></li>"
        for reason, of in names.items()
    )
    return f"<h2>Skipped</h2><ul>{items}</ul>" if items else ""
