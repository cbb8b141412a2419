"""Rows are those of torch.distributed.pipelining where both have the schedule."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from autopar.ir.schedule import Rows, rows_from_text
from autopar.schedules import SCHEDULES


def rows_of_torch(name: str, devices: int, chunks: int, microbatches: int) -> Rows:
    from torch.distributed.pipelining import schedules

    stages = [
        SimpleNamespace(
            stage_index=chunk * devices,
            group=None,
            group_rank=0,
            group_size=devices,
            num_stages=chunks * devices,
            stage_index_to_group_rank={s: s % devices for s in range(chunks * devices)},
            has_backward=True,
        )
        for chunk in range(chunks)
    ]
    made: Any = getattr(schedules, name)(stages, microbatches)
    return rows_in(made.pipeline_order)


def rows_in(order: dict[int, list[Any]]) -> Rows:
    """Without torch's bubbles and gradient reductions."""
    lines = (
        " ".join(str(a) for a in order[r] if a is not None and "REDUCE" not in str(a))
        for r in sorted(order)
    )
    return rows_from_text("\n".join(lines))


@pytest.mark.parametrize(("devices", "microbatches"), [(2, 2), (4, 4), (4, 9), (8, 16)])
def test_gpipe_and_1f1b_are_torchs(devices: int, microbatches: int) -> None:
    from torch.distributed.pipelining import schedules

    sizes: Any = SimpleNamespace(_num_stages=devices, _n_microbatches=microbatches)
    gpipe = rows_in(schedules.ScheduleGPipe._get_pipeline_order(sizes) or {})
    assert SCHEDULES["gpipe"](devices, microbatches) == gpipe
    theirs = rows_in(schedules.Schedule1F1B._get_pipeline_order(sizes) or {})
    # torch 2.13 numbers the last stage's forwards from 1
    assert SCHEDULES["1f1b"](devices, microbatches)[:-1] == theirs[:-1]


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize(("devices", "microbatches"), [(2, 2), (2, 8), (4, 4), (4, 12), (8, 16)])
def test_interleaved_1f1b_is_torchs(devices: int, microbatches: int, chunks: int) -> None:
    theirs = rows_of_torch("ScheduleInterleaved1F1B", devices, chunks, microbatches)
    assert SCHEDULES["interleaved_1f1b"](devices * chunks, microbatches, chunks) == theirs


@pytest.mark.parametrize(("devices", "microbatches"), [(2, 3), (4, 6)])
def test_looped_bfs_is_torchs_but_for_the_order_of_backwards(
    devices: int, microbatches: int
) -> None:
    theirs = rows_of_torch("ScheduleLoopedBFS", devices, 2, microbatches)
    ours = SCHEDULES["looped_bfs"](devices * 2, microbatches)
    half = 2 * microbatches
    assert [row[:half] for row in ours] == [row[:half] for row in theirs]
    assert [sorted(row) for row in ours] == [sorted(row) for row in theirs]
