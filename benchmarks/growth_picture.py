"""Panels of how something grows: logarithmic axes, a line of points for each thing measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 290, 200
LEFT, TOP, BETWEEN = 60, 46, 62

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """``low`` and ``high``: powers of ten of the axis upwards, which ``tick`` names. ``values``:
    those of the axis to the right, whose ``label`` stands below. ``lines``: colour and points."""

    values: Sequence[int]
    label: str
    low: int
    high: int
    tick: Callable[[int], str]
    lines: Sequence[tuple[str, Points]]

    def drawn(self, left: float, top: float) -> list[str]:
        bottom = top + HEIGHT
        parts = []
        for power in range(self.low, self.high + 1):
            y = self._y(10.0**power, bottom)
            parts.append(f'<path d="M{left} {y:.1f}h{WIDTH}" stroke="#dddddd"/>')
            parts.append(text(left - 6, y + 4, self.tick(power), "end"))
        for value in self.values:
            parts.append(text(self._x(value, left), bottom + 16, str(value), "middle"))
        parts.append(text(left + WIDTH / 2, bottom + 34, self.label, "middle"))
        for colour, points in self.lines:
            at = [(self._x(x, left), self._y(y, bottom)) for x, y in points]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}"/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in at]
        return parts

    def _x(self, value: float, left: float) -> float:
        first, last = math.log2(self.values[0]), math.log2(self.values[-1])
        return left + WIDTH * (math.log2(value) - first) / (last - first)

    def _y(self, value: float, bottom: float) -> float:
        height = math.log10(max(value, 10.0**self.low)) - self.low
        return bottom - HEIGHT * height / (self.high - self.low)


def picture(columns: Iterable[tuple[Panel, Panel]], names: Iterable[tuple[str, str]]) -> str:
    """Three columns of two panels; ``names``: what each colour is."""
    full = LEFT + 3 * (WIDTH + BETWEEN), 2 * TOP + 2 * HEIGHT + BETWEEN + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {full[0]} {full[1]}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{full[0]}" height="{full[1]}" fill="#ffffff"/>',
    ]
    for column, (above, below) in enumerate(columns):
        left = LEFT + column * (WIDTH + BETWEEN)
        parts += above.drawn(left, TOP)
        parts += below.drawn(left, TOP + HEIGHT + BETWEEN + 20)
    for i, (colour, name) in enumerate(names):
        x = LEFT + 260 * i
        parts.append(f'<rect x="{x}" y="12" width="12" height="12" fill="{colour}"/>')
        parts.append(text(x + 18, 22, name))
    return "\n".join([*parts, "</svg>"]) + "\n"


def seconds(power: int) -> str:
    """
    >>> seconds(-1)
    '0.1 s'
    """
    return f"{10.0**power:g} s"


def percent(power: int) -> str:
    """
    >>> percent(-2)
    '1%'
    """
    return f"{10.0 ** (power + 2):g}%"


def text(x: float, y: float, of: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(of)}</text>'
