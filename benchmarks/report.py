"""The page of a validation: predicted against measured, a colour and a line for each source."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from benchmarks.runs import Compared, Quality, share

SIZE, EDGE = 560, 50
"""Of the picture and its margin, in pixels."""

STYLE = """
body { font: 15px system-ui, sans-serif; margin: 2em auto; max-width: 75em; color: #222 }
table { border-collapse: collapse } td, th { padding: .2em .7em; text-align: right }
td:first-child, th:first-child { text-align: left } tr { border-bottom: 1px solid #ddd }
svg text { font: 12px system-ui, sans-serif }
"""

COLUMNS = (
    *("source", "rows", "predicted", "mean error of steps", "bias", "largest"),
    *("in the band", "tau"),
    *("mean error of memory", "largest", "false fits", "false rejects"),
)


def page(found: Sequence[Quality], compared: Sequence[Compared]) -> str:
    """Complete HTML, which loads nothing."""
    colours = {one.source: _colour(number) for number, one in enumerate(found[:-1])}
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Validation</title>"
        f"<style>{STYLE}</style><h1>Predicted and measured</h1>"
        f"<p>{found[-1].predicted} of {found[-1].rows} rows are predicted; a point on the line is "
        "predicted as it was measured.</p>"
        f"{_picture(compared, colours)}{_table(found, colours)}{_skipped(found)}</html>\n"
    )


def _colour(number: int) -> str:
    return f"hsl({number * 137.5 % 360:.0f} 65% 42%)"  # the golden angle: neighbours differ


def _picture(compared: Sequence[Compared], colours: dict[str, str]) -> str:
    points = [(one.run.step_s, one.step_s, one) for one in compared if one.run.step_s is not None]
    if not points:
        return ""
    times = [time for measured, predicted, _ in points for time in (measured, predicted)]
    low, high = math.floor(math.log10(min(times))), math.ceil(math.log10(max(times)))
    width = (SIZE - 2 * EDGE) / max(1, high - low)

    def at(time_s: float) -> float:
        return EDGE + (math.log10(time_s) - low) * width

    lines = []
    for power in range(low, high + 1):
        x = EDGE + (power - low) * width
        y, tick = SIZE - x, f"{10.0**power:g} s"
        lines += [
            f'<path d="M{x:.1f} {EDGE}V{SIZE - EDGE}M{EDGE} {y:.1f}H{SIZE - EDGE}" stroke="#ddd"/>',
            f'<text x="{x:.1f}" y="{SIZE - EDGE + 18}" text-anchor="middle">{tick}</text>',
            f'<text x="{EDGE - 6}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>',
        ]
    dots = (
        f'<circle cx="{at(measured):.1f}" cy="{SIZE - at(predicted):.1f}" r="3" '
        f'fill="{colours[one.run.source]}" fill-opacity=".6"><title>{escape(one.run.name)}: '
        f"{predicted:.3g} s predicted, {measured:.3g} s measured</title></circle>"
        for measured, predicted, one in points
    )
    return (
        f'<svg width="{SIZE}" height="{SIZE}" role="img">{"".join(lines)}'
        f'<path d="M{EDGE} {SIZE - EDGE}L{SIZE - EDGE} {EDGE}" stroke="#888"/>{"".join(dots)}'
        f'<text x="{SIZE / 2}" y="{SIZE - 8}" text-anchor="middle">measured</text>'
        f'<text x="14" y="{SIZE / 2}" text-anchor="middle" '
        f'transform="rotate(-90 14 {SIZE / 2})">predicted</text></svg>'
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
                *(str(one.false_fits), str(one.false_rejects)),
            )
        )
        for one in found
    )
    return f"<table>{_row(COLUMNS, 'th')}{rows}</table>"


def _coloured(source: str, colours: dict[str, str]) -> str:
    return f'<span style="color:{colours.get(source, "#222")}">{escape(source)}</span>'


def _row(cells: Iterable[str], kind: str = "td") -> str:
    return "<tr>" + "".join(f"<{kind}>{cell}</{kind}>" for cell in cells) + "</tr>"


def _skipped(found: Sequence[Quality]) -> str:
    reasons = found[-1].skipped
    items = "".join(f"<li>{number}: {escape(reason)}</li>" for reason, number in reasons.items())
    return f"<h2>Skipped</h2><ul>{items}</ul>" if items else ""
