"""Interleaved 1F1B (Megatron-LM, arXiv 2104.04473): each group of devices holds several stages.

Stage k is on group k mod p. Microbatches go through in bunches of p: a group does its first stage
on all of a bunch, then its second stage, and so on.
"""

from __future__ import annotations

from collections.abc import Iterator

from autopar.ir.schedule import Action, Rows, Schedule, Shape
from autopar.schedules.refusals import near_multiples, one_chunk, uneven_chunks


def order(shape: Shape) -> Rows:
    devices = shape.stages // shape.chunks
    return tuple(tuple(_row(device, devices, shape)) for device in range(devices))


def _row(device: int, devices: int, shape: Shape) -> Iterator[Action]:
    total = shape.microbatches * shape.chunks
    # eq. of section 2.2: two for each group to come, and all of the chunks but the last
    warm_up = 2 * (devices - device - 1) + (shape.chunks - 1) * devices
    ahead = min(total, warm_up + 1)
    for turn in range(ahead):
        yield _action(turn, "F", device, devices, shape.chunks)
    for turn in range(total):
        yield _action(turn, "B", device, devices, shape.chunks)
        if ahead + turn < total:
            yield _action(ahead + turn, "F", device, devices, shape.chunks)


def _action(turn: int, kind: str, device: int, devices: int, chunks: int) -> Action:
    bunch, place = divmod(turn, devices * chunks)
    chunk, i = divmod(place, devices)
    microbatch = bunch * devices + i
    if kind == "F":
        return Action(chunk * devices + device, "F", microbatch)
    return Action((chunks - 1 - chunk) * devices + device, "B", microbatch)


def refusal(shape: Shape) -> str | None:
    reason = one_chunk(shape) or uneven_chunks(shape)
    if reason is not None:
        return reason
    devices = shape.stages // shape.chunks
    if shape.microbatches % devices:
        return (
            f"takes microbatches in bunches of as many as there are groups of devices ({devices}), "
            f"and {shape.microbatches} is no multiple of that; "
            f"{near_multiples(shape.microbatches, devices)} would work"
        )
    return None


interleaved_1f1b = Schedule(
    "interleaved_1f1b",
    "1f1b with several stages on each group of devices: a smaller bubble, more transfers",
    order,
    refusal,
    chunks=2,
)
