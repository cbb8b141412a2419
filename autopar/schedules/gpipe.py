"""GPipe (arXiv 1811.06965): all forwards, then all backwards, one stage a group of devices."""

from __future__ import annotations

from autopar.ir.schedule import Action, Rows, Schedule, Shape
from autopar.schedules.refusals import several_chunks


def order(shape: Shape) -> Rows:
    microbatches = range(shape.microbatches)
    return tuple(
        (
            *(Action(stage, "F", i) for i in microbatches),
            *(Action(stage, "B", i) for i in microbatches),
        )
        for stage in range(shape.stages)
    )


gpipe = Schedule("gpipe", "all forwards, then all backwards", order, several_chunks)
