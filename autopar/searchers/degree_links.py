"""What rows of stages send one another, and the seconds of it: messages, and sums of the gradients
of what several of them have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from autopar.ir.simulation import HOLDERS, WORLD
from autopar.searchers.degree_rows import Numbers
from autopar.simulator.machine_links import MachineLinks
from autopar.simulator.pipelines import group_sum
from cost_models.interface import Collective, CostModel


@dataclass(frozen=True, eq=False)
class Links:
    """Of one machine, on which ``rows`` follow one another, each of ``size`` devices; remembered
    once it was asked."""

    machine: CostModel

    def __post_init__(self) -> None:
        # a cache of its own, which goes when it goes: one of the class would keep all searches
        for name in ("sends_s", "_strides", "_send_s", "shared_s", "copies_s", "world_s"):
            object.__setattr__(self, name, cache(getattr(self, name)))

    def sends_s(self, rows: int, size: int, sent_bytes: tuple[int, int]) -> Numbers:
        """From each row to the next, the last to the first too, forward; and back."""
        strides = self._strides(rows, size)
        return np.array([[self._send_s(sent, stride) for stride in strides] for sent in sent_bytes])

    def _strides(self, rows: int, size: int) -> tuple[int, ...]:
        groups = tuple(tuple(range(row * size, (row + 1) * size)) for row in range(rows))
        links = MachineLinks(self.machine, groups)
        return tuple(links.stride(row, (row + 1) % rows) for row in range(rows))

    def _send_s(self, size: int, stride: int) -> float:
        return self.machine.collective_time_s(Collective("send", size, 2, stride))

    def shared_s(self, rows: int, size: int, shared: tuple[int, ...]) -> float:
        """Of the exchange of parameters that the first and the last stage share; ``shared``: bytes
        of each."""
        return self._between_rows_s(size, 0, rows - 1, shared)

    def copies_s(
        self,
        rows: int,
        size: int,
        pieces: tuple[tuple[int, ...], ...],
        shared: tuple[int, ...],
    ) -> Numbers:
        """Of the exchange of each stage's gradients between its two copies; and last, of those of
        parameters that the first and the last stage share. With one copy of the block in each
        stage; and what one more adds. ``pieces``: bytes of each parameter of the first, the middle
        and the last stage."""
        first, middle, last = pieces
        of_stage = [first, *[middle] * (rows - 2), last]
        found = np.zeros((2, rows + 1))
        for stage, once in enumerate(of_stage):
            found[0, stage] = self._between_rows_s(size, stage, rows - 1 - stage, once)
            found[1, stage] = self._between_rows_s(size, stage, rows - 1 - stage, middle)
        found[0, rows] = self._between_rows_s(size, 0, rows - 1, shared)
        return found

    def _between_rows_s(self, size: int, row: int, other: int, pieces: Sequence[int]) -> float:
        """Of sums over counterparts in two rows of so many devices."""
        a, b = sorted((row, other))
        groups = tuple((a * size + device, b * size + device) for device in range(size))
        return sum(group_sum(self.machine, HOLDERS, n, "shared", groups).time_s for n in pieces)

    def world_s(self, devices: int, sizes: tuple[tuple[str, int], ...]) -> float:
        """Of sums over all devices; ``sizes``: what for, and bytes."""
        groups = (tuple(range(devices)),)
        return sum(group_sum(self.machine, WORLD, n, what, groups).time_s for what, n in sizes)


__all__ = ["Links"]
