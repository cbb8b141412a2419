"""Shelf of pipeline schedules: each is a function from a number of stages and microbatches to rows.

>>> from autopar.ir.schedule import rows_to_text
>>> print(rows_to_text(SCHEDULES["1f1b"](stages=2, microbatches=3)))
0F0 0F1 0B0 0F2 0B1 0B2
1F0 1B0 1F1 1B1 1F2 1B2
"""

from __future__ import annotations

from autopar.ir.schedule import Schedule
from autopar.schedules.chimera import chimera
from autopar.schedules.gpipe import gpipe
from autopar.schedules.interleaved_1f1b import interleaved_1f1b
from autopar.schedules.looped_bfs import looped_bfs
from autopar.schedules.one_f_one_b import one_f_one_b
from autopar.schedules.zero_bubble_h1 import zero_bubble_h1

SCHEDULES: dict[str, Schedule] = {
    schedule.name: schedule
    for schedule in (
        gpipe,
        one_f_one_b,
        interleaved_1f1b,
        looped_bfs,
        zero_bubble_h1,
        chimera,
    )
}
"""By the name that ``Strategy.schedule`` has."""

__all__ = ["SCHEDULES", "Schedule"]
