"""Seconds that carry their derivatives: a step's by parameters of the prices, in one pricing.

A step is sums, multiples and maxima of prices. Priced with numbers that know how much they change
with each parameter, it does, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cost_models import Analytical
from cost_models.calibration import Calibration
from cost_models.interface import HostTime, Work

Vector = NDArray[np.float64]
STEP = 1e-4


class Seconds(float):
    """``by``: how much it grows when the logarithm of each parameter grows by one."""

    by: Vector

    def __new__(cls, value: float, by: Vector) -> Seconds:
        made = super().__new__(cls, value)
        made.by = by
        return made

    def __add__(self, other: Any) -> Seconds:
        by = self.by + other.by if isinstance(other, Seconds) else self.by
        return Seconds(float(self) + float(other), by)

    def __sub__(self, other: Any) -> Seconds:
        by = self.by - other.by if isinstance(other, Seconds) else self.by
        return Seconds(float(self) - float(other), by)

    def __rsub__(self, other: Any) -> Seconds:
        return Seconds(float(other) - float(self), -self.by)

    def __mul__(self, other: Any) -> Seconds:
        return Seconds(float(self) * float(other), self.by * float(other))

    def __truediv__(self, other: Any) -> Seconds:
        return self * (1.0 / float(other))

    __radd__ = __add__
    __rmul__ = __mul__


@dataclass
class Derived:
    """Prices of a machine with their derivatives by the logarithms of ``names``."""

    base: Analytical
    names: Sequence[str]
    _known: dict[Work, Seconds] = field(default_factory=dict)
    _moved: list[Analytical] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._moved = [
            replace(self.base, calibration=scaled(self.base.calibration, {name: 1.0 - STEP}))
            for name in self.names
        ]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    @property
    def host_time(self) -> HostTime:
        time_s = self.base.host_time.operator_s
        moved = [other.host_time.operator_s for other in self._moved]
        return replace(self.base.host_time, operator_s=self._seconds(time_s, moved))

    def compute_time_s(self, work: Work) -> Seconds:
        found = self._known.get(work)
        if found is None:
            moved = [other.compute_time_s(work) for other in self._moved]
            found = self._known[work] = self._seconds(self.base.compute_time_s(work), moved)
        return found

    def _seconds(self, time_s: float, moved: Sequence[float]) -> Seconds:
        return Seconds(time_s, (time_s - np.array(moved)) / STEP)


def scaled(calibration: Calibration, by: dict[str, float]) -> Calibration:
    return replace(calibration, **{n: getattr(calibration, n) * f for n, f in by.items()})
