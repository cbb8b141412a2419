"""Shapes that schedules cannot do, said in words; each gives ``None`` where nothing is wrong."""

from __future__ import annotations

from autopar.ir.schedule import Shape


def several_chunks(shape: Shape) -> str | None:
    if shape.chunks > 1:
        return (
            f"puts one stage on each group of devices, not {shape.chunks}; "
            "leave chunks out, or take a schedule that loops over the devices"
        )
    return None


def one_chunk(shape: Shape) -> str | None:
    if shape.chunks < 2:
        return "puts several stages on each group of devices; ask for 2 chunks or more"
    return None


def uneven_chunks(shape: Shape) -> str | None:
    if shape.stages % shape.chunks:
        near = near_multiples(shape.stages, shape.chunks)
        return (
            f"puts {shape.chunks} stages on each group of devices, and {shape.stages} stages are "
            f"no multiple of that; {near} would work"
        )
    return None


def near_multiples(number: int, divisor: int) -> str:
    """
    >>> near_multiples(10, 4), near_multiples(3, 4)
    ('8 or 12', '4')
    """
    below = number // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)
