"""Looped breadth-first (arXiv 2211.05953): several stages on each group of devices, each of which
does all microbatches before the next stage has its turn.

Stage k is on group k mod p.
"""

from __future__ import annotations

from autopar.ir.schedule import Action, Rows, Schedule, Shape
from autopar.schedules.refusals import one_chunk, uneven_chunks


def order(shape: Shape) -> Rows:
    devices = shape.stages // shape.chunks
    microbatches = range(shape.microbatches)
    return tuple(
        (
            *(Action(s, "F", i) for s in range(d, shape.stages, devices) for i in microbatches),
            *(
                Action(s, "B", i)
                for s in reversed(range(d, shape.stages, devices))
                for i in microbatches
            ),
        )
        for d in range(devices)
    )


def refusal(shape: Shape) -> str | None:
    return one_chunk(shape) or uneven_chunks(shape)


looped_bfs = Schedule(
    "looped_bfs",
    "several stages on each group of devices, each for all microbatches before the next",
    order,
    refusal,
    chunks=2,
)
