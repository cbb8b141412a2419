"""The two questions a cost model answers, and the values they are asked with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, Protocol

CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]


@dataclass(frozen=True, slots=True)
class Work:
    """Compute on one device.

    ``kind``: ``matmul`` with ``shape`` (batch, m, n, k); ``convolution`` with that of the product
    that it is (groups, places of all windows, channels out, channels in x window), or of the one
    that gives a gradient; ``attention`` with ``shape`` (batch x heads, query length, key length,
    head dim), fused; ``memory`` (bound by bytes) with no shape.
    ``flops``: floating-point operations; ``bytes``: read and written in device memory.
    ``of``: whose work that is bound by memory is, where several kernels do it: ``loss``, a softmax
    with what compares it; ``update 2``, an optimizer with so many states.

    ``again_bytes``: what a block of a kernel reads more than once, beside ``bytes``: from memory on
    a GPU, whose caches are small for all that it works on at once; from the caches of a processor.
    ``threads``: all that work, with ``ahead_bytes`` on the way for each (0: as many as there are).
    ``instructions``: what a kernel takes to find elements that do not lie one after the other.
    ``follows``: launched by the call that launched the work before it.
    """

    kind: Literal["matmul", "convolution", "attention", "memory"]
    dtype: str
    flops: float
    bytes: float
    shape: tuple[int, ...] = ()
    of: str = ""
    again_bytes: float = 0.0
    threads: int = 0
    ahead_bytes: int = 0
    instructions: float = 0.0
    follows: bool = False


@dataclass(frozen=True, slots=True)
class Collective:
    """A collective over ``group_size`` ranks that are ``stride`` ranks apart.

    ``bytes`` is the largest buffer that one rank holds: the input of all-reduce, reduce-scatter,
    all-to-all and send, the output of all-gather.

    Such groups lie all over the machine, unless it is known on which devices they are: then
    ``within`` says how many ranks share a unit of each of the ``units_of`` the machine.
    """

    kind: CollectiveKind
    bytes: int
    group_size: int
    stride: int
    within: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class HostTime:
    """What a host takes beside work and collectives: ``view_s`` for an operator that gives its
    input another shape, forward or backward; ``pass_s`` for the forward or the backward of a
    microbatch, beside its operators; ``operator_s`` for each kernel of an operator, however short;
    ``part_s`` for an operator of which gradients of parameters are asked for by themselves, in a
    backward in two parts; ``step_s`` for a redistribution's step that is no collective;
    ``message_s`` for a message that is sent, or received, and ``message_byte_s`` for each byte of
    it, beside what goes on without the device.

    A device waits for all of it, where host and device do one thing after the other (on a
    processor, whose ``operator_s`` is in its times of work). A host that goes ``ahead`` launches
    kernels while its device is busy with earlier ones, as with GPUs: a step then takes what the
    devices take, or what the busiest host takes, whichever is longer.
    """

    view_s: float = 0.0
    pass_s: float = 0.0
    operator_s: float = 0.0
    part_s: float = 0.0
    step_s: float = 0.0
    message_s: float = 0.0
    message_byte_s: float = 0.0
    ahead: bool = False

    def times(self, factor: float) -> HostTime:
        seconds = {f.name: factor * getattr(self, f.name) for f in fields(self)}
        return HostTime(**{**seconds, "ahead": self.ahead})


class UnpricedError(ValueError):
    """A machine without the figure that a price needs: a dtype that it has no speed of, a
    collective that nobody measured on it."""


class CostModel(Protocol):
    """Seconds for work and for collectives. What a machine has no figure for raises
    ``UnpricedError``, other unknown questions ``KeyError`` or ``ValueError``; nothing is free by
    default.

    A machine of more than two tiers has ``units``, too: see ``units_of``. One whose devices wait
    for their hosts has a ``host_time``; one whose programs are compiled says ``compiled``; one that
    knows what compute and communication take from each other has a ``slowdown``. One whose devices
    share what they compute with answers for all of them busy, and has ``speeds``: (so many devices,
    how many times as fast each is when the others idle), fewest first.
    """

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


def units_of(cost_model: CostModel) -> tuple[int, ...]:
    """Sizes of the units in which devices share links, innermost first; the last is all of them."""
    found: tuple[int, ...] | None = getattr(cost_model, "units", None)
    return (cost_model.scale_up_devices, cost_model.devices) if found is None else found


def host_time_of(cost_model: CostModel) -> HostTime:
    """Nothing unless the cost model says otherwise: a host prepares ahead of its devices."""
    found: HostTime | None = getattr(cost_model, "host_time", None)
    return HostTime() if found is None else found


def is_compiled(cost_model: CostModel) -> bool:
    """Whether programs are compiled as a whole: what an operator does pass by pass is one kernel
    then."""
    return bool(getattr(cost_model, "compiled", False))


def slowdown_of(cost_model: CostModel) -> float:
    """How many times as long compute takes while a collective goes on beside it, and the collective
    beside compute. 2, that is as if one waited for the other, unless the cost model knows."""
    found: float | None = getattr(cost_model, "slowdown", None)
    return 2.0 if found is None else found


def members_in_units(groups: Iterable[Sequence[int]], units: Sequence[int]) -> tuple[int, ...]:
    """How many ranks of a group share a unit of each size, in the group that is cut most.

    >>> members_in_units([(0, 1, 2, 3), (6, 7, 8, 9)], units=(8, 16))
    (2, 4)
    """
    devices = [tuple(group) for group in groups]
    return tuple(
        min(len(group) // len({device // unit for device in group}) for group in devices)
        for unit in units
    )
