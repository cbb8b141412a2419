"""Seconds and bytes as people write them."""

from __future__ import annotations

from collections.abc import Callable

from autopar.ir.simulation import Estimate

_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
_SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def time_text(time_s: float) -> str:
    """Three digits, in the largest unit that has one before the point.

    >>> time_text(0.01234), time_text(2.0), time_text(0.0)
    ('12.3 ms', '2.00 s', '0 s')
    """
    for unit_s, name in _TIMES:
        if abs(time_s) >= unit_s:
            return f"{_three(time_s / unit_s)} {name}"
    return "0 s" if time_s == 0 else f"{time_s:.1e} s"


def bytes_text(count: float) -> str:
    """Decimal units, as on a datasheet.

    >>> bytes_text(80e9), bytes_text(1500), bytes_text(12)
    ('80.0 GB', '1.50 kB', '12 B')
    """
    for unit, name in _SIZES:
        if abs(count) >= unit:
            return f"{_three(count / unit)} {name}"
    return f"{count:.0f} B"


def _three(value: float) -> str:
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}"


def count_text(number: int) -> str:
    """
    >>> count_text(8030261248), count_text(124439808), count_text(30)
    ('8.03B', '124M', '30')
    """
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{_three(number / unit)}{name}"
    return str(number)


def share_text(part: float, whole: float) -> str:
    """
    >>> share_text(1, 8), share_text(1, 0)
    ('12%', '-')
    """
    return f"{part / whole:.0%}" if whole else "-"


def between_text(number: float, low: float, high: float, text: Callable[[float], str]) -> str:
    """A number with the two between which it is expected, without units where these are the same.

    >>> between_text(0.416, 0.37, 0.465, time_text), between_text(0.9, 0.8, 1.1, time_text)
    ('416 ms (370–465)', '900 ms (800 ms–1.10 s)')
    """
    shown = [text(one) for one in (number, low, high)]
    units = {one.rpartition(" ")[2] for one in shown}
    if len(units) == 1:
        shown[1:] = (one.rpartition(" ")[0] for one in shown[1:])
    return f"{shown[0]} ({shown[1]}–{shown[2]})"


def step_text(found: Estimate) -> str:
    """The step, with its band."""
    if found.band is None:
        return time_text(found.step_time_s)
    return between_text(found.step_time_s, found.band.low_s, found.band.high_s, time_text)


def peak_text(found: Estimate) -> str:
    """Memory at the peak, with its band."""
    peak, band = found.peak_memory_bytes, found.band
    if band is None:
        return bytes_text(peak)
    return between_text(peak, band.low_bytes, band.high_bytes, bytes_text)
