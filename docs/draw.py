"""Draws ``overview.svg``: how one linear layer's splits become the usual kinds of parallelism."""

from __future__ import annotations

from html import escape

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44")  # one for each of four devices
WIDTH, HEIGHT = 920, 300
CELL = 16

# (title, what the axis divides, input, weight, output): "rows" and "columns" say which dim of the
# drawn matrix is cut in four, "whole" that every device has all of it, "sum" that each has a part
# of every sum
SPLITS = (
    ("data parallel", "batch", "rows", "whole", "rows"),
    ("column parallel", "out", "whole", "columns", "columns"),
    ("row parallel", "in", "columns", "rows", "sum"),
)


def overview() -> str:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="14">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(
            20,
            30,
            "y = x · w on four devices: one choice of a factor, three kinds of parallelism",
            bold=True,
        ),
    ]
    for i, (title, factor, x, w, y) in enumerate(SPLITS):
        left = 20 + i * 305
        parts += [
            _text(left, 70, title, bold=True),
            _text(left, 90, f"the axis divides “{factor}”"),
            _matrix(left, 110, x, "x"),
            _text(left + 4.6 * CELL, 110 + 2.3 * CELL, "·"),
            _matrix(left + 6 * CELL, 110, w, "w"),
            _text(left + 10.5 * CELL, 110 + 2.3 * CELL, "="),
            _matrix(left + 12 * CELL, 110, y, "y"),
            _text(left, 225, COSTS[factor]),
        ]
    for device, colour in enumerate(COLOURS):
        parts.append(
            f'<rect x="{20 + 110 * device}" y="260" width="14" height="14" fill="{colour}"/>'
        )
        parts.append(_text(40 + 110 * device, 272, f"device {device}"))
    parts.append('<rect x="460" y="260" width="14" height="14" fill="url(#all)"/>')
    parts.append(_text(480, 272, "whole on every device"))
    parts.append('<rect x="660" y="260" width="14" height="14" fill="#bbbbbb"/>')
    parts.append(_text(680, 272, "still to be summed"))
    parts.insert(1, _stripes())
    return "\n".join([*parts, "</svg>"]) + "\n"


COSTS = {
    "batch": "backward: all-reduce of w's gradient",
    "out": "backward: all-reduce of x's gradient",
    "in": "forward: all-reduce of y",
}


def _matrix(x: float, y: float, how: str, name: str) -> str:
    cells = []
    for row in range(4):
        for column in range(4):
            fill = {
                "rows": COLOURS[row],
                "columns": COLOURS[column],
                "whole": "url(#all)",
                "sum": "#bbbbbb",
            }[how]
            cells.append(
                f'<rect x="{x + column * CELL:g}" y="{y + row * CELL:g}" width="{CELL - 1}" '
                f'height="{CELL - 1}" fill="{fill}"/>'
            )
    return "\n".join([*cells, _text(x + 1.7 * CELL, y + 5.2 * CELL, name)])


def _stripes() -> str:
    stripes = "".join(
        f'<rect x="{4 * i}" width="4" height="16" fill="{colour}"/>'
        for i, colour in enumerate(COLOURS)
    )
    return (
        '<defs><pattern id="all" width="16" height="16" patternUnits="userSpaceOnUse" '
        f'patternTransform="rotate(45)">{stripes}</pattern></defs>'
    )


def _text(x: float, y: float, what: str, *, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" fill="#1b1f24"{weight}>{escape(what)}</text>'
