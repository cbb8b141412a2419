"""What a few real steps of a plan took."""

from __future__ import annotations

import statistics
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Measurement:
    """Over all ranks: the slowest and the largest. ``losses`` and ``step_times_s`` by step."""

    losses: tuple[float, ...]
    step_times_s: tuple[float, ...]
    peak_memory_bytes: int

    @property
    def step_time_s(self) -> float:
        """The median of all steps but the first, which warms up.

        >>> Measurement((2.0, 1.0, 0.5), (9.0, 1.0, 3.0), 0).step_time_s
        2.0
        """
        return statistics.median(self.step_times_s[1:] or self.step_times_s)
