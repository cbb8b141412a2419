"""The two questions a cost model answers, and the values they are asked with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]


@dataclass(frozen=True, slots=True)
class Work:
    """Compute on one device.

    ``kind``: ``matmul`` with ``shape`` (batch, m, n, k); ``attention`` with ``shape`` (batch x
    heads, query length, key length, head dim), fused; ``memory`` (bound by bytes) with no shape.
    ``flops``: floating-point operations; ``bytes``: read and written in device memory.
    """

    kind: Literal["matmul", "attention", "memory"]
    dtype: str
    flops: float
    bytes: float
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Collective:
    """A collective over ``group_size`` ranks that are ``stride`` ranks apart.

    ``bytes`` is the largest buffer that one rank holds: the input of all-reduce, reduce-scatter,
    all-to-all and send, the output of all-gather.
    """

    kind: CollectiveKind
    bytes: int
    group_size: int
    stride: int


class CostModel(Protocol):
    """Seconds for work and for collectives. Unknown questions raise ``KeyError`` or ``ValueError``;
    nothing is free by default."""

    @property
    def devices(self) -> int: ...

    @property
    def memory_bytes(self) -> int:
        """What one device has."""
        ...

    @property
    def scale_up_devices(self) -> int:
        """Devices that share the fastest links: a host, a rack."""
        ...

    def compute_time_s(self, work: Work) -> float: ...

    def collective_time_s(self, collective: Collective) -> float: ...
