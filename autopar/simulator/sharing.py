"""Devices that share what they compute with, as processes share cores: the more are busy, the
slower is each.

Stages are priced as if each device had all that it can use. Then the timeline is stretched: a
moment in which many are busy takes longer, for whatever is done in it. All that is busy at once
slows down alike, so the order of events stays, and this is the timeline of devices that share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.simulator.timeline import Clock, Timeline
from cost_models.interface import Collective, CostModel, HostTime, Work, host_time_of, units_of
from cost_models.overheads import Overheads, overheads_of


def speeds_of(cost_model: CostModel) -> tuple[tuple[int, float], ...]:
    """See ``CostModel``; none where devices share nothing."""
    return tuple(getattr(cost_model, "speeds", ()))


@dataclass(frozen=True)
class Alone:
    """The prices of devices that share with nobody, from those of devices that are all busy."""

    all_busy: CostModel

    @property
    def speed(self) -> float:
        """How many times as fast as when all are busy."""
        return max((speed for _, speed in speeds_of(self.all_busy)), default=1.0)

    def slower(self, busy: NDArray[np.float64]) -> NDArray[np.float64]:
        """How many times as long anything takes while so many devices are busy; between those that
        are known on a straight line, as where cores are divided among all that want them."""
        known = (*speeds_of(self.all_busy), (self.devices, 1.0))
        counts, speeds = zip(*known, strict=True)
        return np.interp(busy, counts, self.speed / np.array(speeds))

    @property
    def devices(self) -> int:
        return self.all_busy.devices

    @property
    def memory_bytes(self) -> int:
        return self.all_busy.memory_bytes

    @property
    def overheads(self) -> Overheads:
        return overheads_of(self.all_busy)

    @property
    def scale_up_devices(self) -> int:
        return self.all_busy.scale_up_devices

    @property
    def units(self) -> tuple[int, ...]:
        return units_of(self.all_busy)

    @property
    def host_time(self) -> HostTime:
        return host_time_of(self.all_busy).times(1.0 / self.speed)

    def compute_time_s(self, work: Work) -> float:
        return self.all_busy.compute_time_s(work) / self.speed

    def collective_time_s(self, collective: Collective) -> float:
        return self.all_busy.collective_time_s(collective) / self.speed


def alone(cost_model: CostModel) -> CostModel:
    return Alone(cost_model) if speeds_of(cost_model) else cost_model


def shared(timeline: Timeline, sizes: Sequence[int], cost_model: CostModel) -> Timeline:
    """``timeline``, which has the prices of ``cost_model``, as its devices share.

    ``sizes``: how many devices each row has; they are busy with its actions and its exchanges of
    gradients.
    """
    if not isinstance(cost_model, Alone):
        return timeline
    times, busy = _busy(timeline, sizes)
    passed = np.cumsum(np.diff(times) * cost_model.slower(busy))
    return timeline.by(Clock(times, np.concatenate([[0.0], passed])))


def _busy(
    timeline: Timeline, sizes: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Moments at which something begins or ends, and how many devices are busy after each but the
    last."""
    arrangement = timeline.arrangement
    starts, ends = (np.array(times, dtype=float) for times in (timeline.starts, timeline.ends))
    tasks: list[list[int]] = [[] for _ in sizes]
    for task, row in enumerate(arrangement.row_of):
        tasks[row].append(task)
    first = arrangement.actions + arrangement.transfers
    for task, exchange in enumerate(arrangement.exchanges, first):
        for row in exchange.rows:
            tasks[row].append(task)
    times = np.unique(np.concatenate([[0.0], starts, ends]))
    busy = np.zeros(len(times) - 1)
    for of_row, size in zip(tasks, sizes, strict=True):
        change = np.zeros(len(times))
        np.add.at(change, np.searchsorted(times, starts[of_row]), 1)
        np.add.at(change, np.searchsorted(times, ends[of_row]), -1)
        busy += size * (np.cumsum(change)[:-1] > 0)
    return times, busy


__all__ = ["Alone", "alone", "shared", "speeds_of"]
