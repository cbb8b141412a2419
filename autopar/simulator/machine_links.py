"""The network of a pipeline on a machine: transfers from group to group at its prices."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from autopar.simulator.pipeline import Feed, Passage
from cost_models.interface import Collective, CostModel, units_of


@dataclass(frozen=True, slots=True)
class MachineLinks:
    """``groups``: the devices of each row. ``units``: sizes of the machine's units of devices,
    innermost first; ``None``: those that its cost model names.

    All devices of a group send at once, each its part to its counterpart in the other group, and
    as many as the larger group has. The one that sends or receives most decides; where a feed does
    not say how much that is, the side whose devices have more of the tensor. A device sends one
    transfer at a time and receives one at a time; what a protocol for many bytes takes to start
    longer than one for few is a part of that, so that more bytes are never faster.
    """

    cost_model: CostModel
    groups: tuple[tuple[int, ...], ...]
    units: tuple[int, ...] | None = None

    def passage(self, feed: Feed, backward: bool, source: int, target: int) -> Passage:
        size = _busiest_bytes(feed, backward)
        latency_s = self.time_s(0, source, target)
        busy_s = max(0.0, self.time_s(size, source, target) - latency_s)
        return Passage(busy_s, latency_s, (("out", source), ("in", target)))

    def time_s(self, size_bytes: int, source: int, target: int) -> float:
        """Of so much from one device to another, as far as counterparts in the two groups are."""
        stride = self.stride(source, target)
        return self.cost_model.collective_time_s(Collective("send", size_bytes, 2, stride))

    def stride(self, source: int, target: int) -> int:
        """Of two ranks that are as far from each other as the farthest counterparts of two rows."""
        smaller, larger = sorted((self.groups[source], self.groups[target]), key=len)
        units = units_of(self.cost_model) if self.units is None else self.units
        devices = self.cost_model.devices  # all in one unit of that size
        for unit in sorted((unit for unit in units if unit < devices), reverse=True):
            for i, a in enumerate(larger):
                if a // unit != smaller[i * len(smaller) // len(larger)] // unit:
                    return min(unit, max(1, devices // 2))
        return 1


def exchange_s(cost_model: CostModel, size: int, copies: int) -> float:
    """Seconds to sum ``size`` bytes on a device over so many copies, spread over the machine."""
    stride = max(1, cost_model.devices // copies)
    return cost_model.collective_time_s(Collective("all_reduce", size, copies, stride))


def _busiest_bytes(feed: Feed, backward: bool) -> int:
    known = feed.busiest_backward_bytes if backward else feed.busiest_bytes
    if known is not None:
        return known
    kept = max(feed.kept_bytes(at_source=True), feed.kept_bytes(at_source=False))
    return ceil(kept * feed.sent_bytes(backward) / feed.bytes) if feed.bytes else kept
