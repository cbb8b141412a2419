"""What is played on a timeline: stages with their times, what feeds what, links, gradient exchange.

Times may be floats, integers or fractions: with the latter two a timeline is exact.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from autopar.ir.schedule import Feeds

Time = float | Fraction


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes of a stage on one of the devices that run it.

    ``activations_bytes``: what a microbatch's forward saves for its backward (with recomputation:
    what is left of it). ``for_weights_bytes``: how much of that, or instead of that, is kept
    between ``I`` and ``W``. ``forward_bytes``, ``backward_bytes``, ``update_bytes``: what one such
    action needs beside while it runs.
    """

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    for_weights_bytes: int = 0
    forward_bytes: int = 0
    backward_bytes: int = 0
    update_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StageCost:
    """Times of a stage for one microbatch, its own collectives included; ``update_s`` once a step.

    ``backward_s``: of ``B``, recomputation included. ``input_gradient_s`` and
    ``weight_gradient_s``: of ``I`` (recomputation included) and ``W``; ``None`` if it cannot be
    split. ``launches_s``: of a host that goes ahead of its device. ``memory``: needed only to ask
    a timeline about memory.
    """

    forward_s: Time
    backward_s: Time
    update_s: Time
    input_gradient_s: Time | None = None
    weight_gradient_s: Time | None = None
    memory: StageMemory | None = None
    launches_s: Time = 0


@dataclass(frozen=True, slots=True)
class Feed:
    """``target`` reads what ``source`` gives, ``bytes`` of it for one microbatch.

    ``backward_bytes``: of the gradient that goes back; ``None``: as many. Without ``gradient``
    (token ids, masks) nothing goes back. ``source_bytes`` and ``target_bytes``: what one device of
    either side keeps of it while it is under way; ``None``: ``bytes``. ``busiest_bytes`` and
    ``busiest_backward_bytes``: the most that one device sends or receives, where it is known.
    """

    source: int
    target: int
    bytes: int
    backward_bytes: int | None = None
    gradient: bool = True
    source_bytes: int | None = None
    target_bytes: int | None = None
    busiest_bytes: int | None = None
    busiest_backward_bytes: int | None = None

    def sent_bytes(self, backward: bool) -> int:
        if backward and self.backward_bytes is not None:
            return self.backward_bytes
        return self.bytes

    def kept_bytes(self, at_source: bool) -> int:
        kept = self.source_bytes if at_source else self.target_bytes
        return self.bytes if kept is None else kept


@dataclass(frozen=True, slots=True)
class Passage:
    """What one transfer takes: it has all of ``links`` to itself for ``busy_s``, and has arrived
    ``latency_s`` after that."""

    busy_s: Time
    latency_s: Time
    links: tuple[Hashable, ...]


class Network(Protocol):
    """Prices what goes from one group of devices (row) to another: forward what ``feed.source``
    gives, or backward the gradient. Within a group nothing is sent."""

    def passage(self, feed: Feed, backward: bool, source: int, target: int) -> Passage: ...


@dataclass(frozen=True, slots=True)
class PairLinks:
    """Each group of devices has a link of its own to each other one."""

    bytes_per_s: Time
    latency_s: Time

    def passage(self, feed: Feed, backward: bool, source: int, target: int) -> Passage:
        busy_s = Fraction(feed.sent_bytes(backward)) / self.bytes_per_s
        return Passage(busy_s, self.latency_s, ((source, target),))


@dataclass(frozen=True, slots=True)
class PortLinks:
    """Each group of devices has one way out and one way in, which all its transfers share."""

    bytes_per_s: Time
    latency_s: Time

    def passage(self, feed: Feed, backward: bool, source: int, target: int) -> Passage:
        busy_s = Fraction(feed.sent_bytes(backward)) / self.bytes_per_s
        return Passage(busy_s, self.latency_s, (("out", source), ("in", target)))


@dataclass(frozen=True, slots=True)
class Instant:
    """Nothing takes time on the way: what a schedule alone is worth, as papers count it."""

    def passage(self, feed: Feed, backward: bool, source: int, target: int) -> Passage:
        return Passage(0, 0, ())


@dataclass(frozen=True, slots=True)
class Synchronisation:
    """The gradients of ``stages`` are exchanged, by all rows that have them, before their update.

    One stage: its replicas and copies. Several: parameters that these stages share. ``time_s``: of
    all of it. In ``parts`` (buckets) it can begin before the last backward has ended: part i of n
    is ready when i/n of that has passed. ``links``: those of the network that it occupies.
    """

    stages: tuple[int, ...]
    time_s: Time
    parts: int = 1
    links: tuple[Hashable, ...] = ()


@dataclass(frozen=True, slots=True)
class Wiring:
    """What depends on what, without times: rows are arranged once for all pipelines that have it.

    ``feeds``: (source, target, whether a gradient goes back). ``synchronisations``: (stages,
    parts). ``norm``: whether updates wait for the norm of all gradients.
    """

    stages: int
    feeds: tuple[tuple[int, int, bool], ...]
    synchronisations: tuple[tuple[tuple[int, ...], int], ...] = ()
    norm: bool = False


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Stages and all that lies between them. ``norm_s``: what the norm of all gradients takes, for
    which every update at the end of the step waits; ``None``: gradients are not clipped."""

    stages: tuple[StageCost, ...]
    feeds: tuple[Feed, ...]
    network: Network
    synchronisations: tuple[Synchronisation, ...] = ()
    norm_s: Time | None = None

    @property
    def wiring(self) -> Wiring:
        return Wiring(
            len(self.stages),
            tuple((feed.source, feed.target, feed.gradient) for feed in self.feeds),
            tuple((s.stages, s.parts) for s in self.synchronisations),
            self.norm_s is not None,
        )

    @property
    def shape_feeds(self) -> Feeds:
        """As schedules take them."""
        return tuple(sorted({(feed.source, feed.target) for feed in self.feeds}))


def chain(stages: int, bytes: int = 0) -> tuple[Feed, ...]:
    """Each stage feeds the next."""
    return tuple(Feed(stage, stage + 1, bytes) for stage in range(stages - 1))


def equal_stages(
    stages: int,
    forward_s: Time,
    input_gradient_s: Time,
    weight_gradient_s: Time = 0,
    feeds: tuple[Feed, ...] | None = None,
) -> Pipeline:
    """Stages that all take the same, without communication, updates or memory: as papers count."""
    backward_s = input_gradient_s + weight_gradient_s
    cost = StageCost(forward_s, backward_s, 0, input_gradient_s, weight_gradient_s)
    return Pipeline((cost,) * stages, chain(stages) if feeds is None else feeds, Instant())
