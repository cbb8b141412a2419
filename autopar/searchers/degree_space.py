"""All degrees of parallelism that a stack of equal blocks can have on so many devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from autopar.ir.schedule import Schedule, Shape
from autopar.recipes import Degrees
from autopar.schedules import SCHEDULES

LARGEST_TENSOR, LARGEST_MICROBATCH = 16, 32
"""Devices, and samples of a replica: beyond what anybody has published."""

BETWEEN = ("whole", "sequence")


@dataclass(frozen=True, slots=True)
class DegreeSpace:
    """Every tensor, pipeline and data degree of ``devices``; chunks, with which each stage has as
    many of the ``layers``; schedule; samples of a microbatch, which are a whole number of the
    ``batch`` (or ``microbatches`` of it); sequence parallelism; and ZeRO level. ``recompute``: in
    all blocks."""

    devices: int
    layers: int
    batch: int
    microbatches: int | None = None
    recompute: str = "none"

    def __iter__(self) -> Iterator[Degrees]:
        for tensor in filter(lambda n: n <= LARGEST_TENSOR, _divisors(self.devices)):
            for pipeline in _divisors(self.devices // tensor):
                data = self.devices // tensor // pipeline
                if self.layers % pipeline or self.batch % data:
                    continue
                rows = self._rows(pipeline, self.batch // data)
                between = BETWEEN if tensor > 1 else BETWEEN[:1]
                levels = range(4) if data > 1 else (0,)
                for (chunks, microbatch, schedule), way, zero in product(rows, between, levels):
                    yield Degrees(
                        tensor=tensor,
                        pipeline=pipeline,
                        data=data,
                        chunks=chunks,
                        schedule=schedule,
                        microbatch=microbatch,
                        between=way,
                        zero=zero,
                        recompute=self.recompute,
                    )

    def _rows(self, pipeline: int, samples: int) -> Iterator[tuple[int, int, str | None]]:
        """Chunks, samples of a microbatch, schedule; of so many samples of a replica."""
        for microbatch in self._microbatches(samples):
            if pipeline == 1:
                yield 1, microbatch, None
                continue
            for schedule in SCHEDULES.values():
                for chunks in self._chunks(schedule, pipeline):
                    stages = schedule.stages(pipeline, chunks)
                    if not schedule.refuses(Shape(stages, samples // microbatch, chunks)):
                        yield chunks, microbatch, schedule.name

    def _chunks(self, schedule: Schedule, pipeline: int) -> Sequence[int]:
        """Copies of stages are as many as the schedule has unless asked otherwise."""
        return (schedule.chunks,) if schedule.copies else _divisors(self.layers // pipeline)

    def _microbatches(self, samples: int) -> Iterator[int]:
        for size in filter(lambda n: n <= LARGEST_MICROBATCH, _divisors(samples)):
            if self.microbatches in (None, samples // size):
                yield size


def _divisors(number: int) -> Sequence[int]:
    """
    >>> _divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [n for n in range(1, number + 1) if number % n == 0]


__all__ = ["DegreeSpace"]
