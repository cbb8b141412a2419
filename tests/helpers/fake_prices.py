"""A cost model that is read from a dict, so that a search test states its own world."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cost_models.calibration import read_calibration
from cost_models.interface import Collective, Work

QUICK_HOSTS = replace(read_calibration(), operator_s=1e-9)
"""Of real machines: so that devices are the slower ones, small as the graphs of tests are."""


@dataclass(frozen=True)
class FakePrices:
    """``work``: seconds per flop (``matmul``, also of convolutions, and ``attention``) or per byte
    (``memory``).

    ``collectives``: seconds per byte, by kind; ``(kind, group_size)`` goes before ``kind``.
    ``latency_s`` is added to every collective. What is not in the dicts raises ``KeyError``.
    """

    devices: int = 4
    memory_bytes: int = 10**15
    work: Mapping[str, float] = field(
        default_factory=lambda: {"matmul": 1e-12, "attention": 1e-12, "memory": 1e-11}
    )
    collectives: Mapping[Any, float] = field(
        default_factory=lambda: dict.fromkeys(
            ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"), 1e-9
        )
    )
    latency_s: float = 0.0

    @property
    def scale_up_devices(self) -> int:
        return self.devices

    def compute_time_s(self, work: Work) -> float:
        kind = "matmul" if work.kind == "convolution" else work.kind
        return self.work[kind] * (work.bytes if kind == "memory" else work.flops)

    def collective_time_s(self, collective: Collective) -> float:
        key = (collective.kind, collective.group_size)
        per_byte = self.collectives[key if key in self.collectives else collective.kind]
        return self.latency_s + per_byte * collective.bytes

    def to_json(self) -> dict[str, Any]:
        return {"name": "fake", "devices": self.devices}
