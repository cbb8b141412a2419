"""Collectives over tiers of links: algorithms and protocols, of which the fastest is taken.

On GPUs these are NCCL's, with the relations of its own tuning model (NCCL@5067397
src/graph/tuning.cc): what a hop takes, and what share of the links' bandwidth is left, by
algorithm, by protocol, and by whether a hop is inside of a host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import ceil, comb, gcd, log2
from typing import NamedTuple

from cost_models.topology import Tier, Topology

LINK_EFFICIENCY = 0.8
"""Of the links' bandwidth, for collectives without a measured one: all-gather on eight H200 comes
to 362 of 450 GB/s (stas00/ml-engineering@744d01e, network)."""

SEND_EFFICIENCY = 0.8
"""The same for one sender and one receiver, which share nothing with others but the protocol."""

IN_SWITCH = (25.0 / 1.9, 2 * 20.9 / 4.0)
"""What an all-reduce in the switch takes inside of a host, and a hop of the tree over hosts that
have one, up and down (NVLS and NVLSTree), in hops as below."""


class Way(NamedTuple):
    """b bytes take latency_s + s_per_byte * b."""

    latency_s: float
    s_per_byte: float


class Protocol(NamedTuple):
    """``launch``: how many times as long as that of a collective with ring and LL. ``inside``,
    ``across``: a hop, inside of a host and between hosts, in those of a ring with LL128, which is
    the latency that tiers have. ``share_inside``, ``share_across``: of the bandwidth, in a group
    that is inside of one host, and else."""

    launch: float
    inside: float
    across: float
    share_inside: float
    share_across: float


RING = {
    # 87.7 of 240 GB/s on A100, 141 of 362 on H100; between hosts 19 to 35 of 160 (llMaxBws)
    "LL": Protocol(1.0, 0.6 / 1.9, 2.7 / 4.0, 0.37, 0.15),
    "LL128": Protocol(14.0 / 6.6, 1.0, 1.0, 0.92, 0.92),
    "Simple": Protocol(8.4 / 6.6, 3.4 / 1.9, 14.0 / 4.0, 1.0, 1.0),
}
TREE = {
    "LL": Protocol(6.8 / 6.6, 0.6 / 1.9, 5.0 / 4.0, 0.92 / 3.8, 0.15),
    "LL128": Protocol(14.0 / 6.6, 1.25 / 1.9, 8.5 / 4.0, 0.92 * 7 / 9, 0.92 * 120 / 128),
    "Simple": Protocol(8.4 / 6.6, 4.0 / 1.9, 14.0 / 4.0, 0.92, 0.92),
}


@dataclass(frozen=True, slots=True)
class Span:
    """What a tier does for a group: it joins ``parts``, each of ``members`` ranks of the group.
    ``inside``: of a host, or of what has such links."""

    tier: Tier
    parts: int
    members: int
    inside: bool


def spans(
    topology: Topology, group_size: int, stride: int, within: tuple[int, ...] = ()
) -> tuple[Span, ...]:
    """The tiers that a group uses, innermost first.

    A mesh axis has groups all over the machine, and its step is as long as that of the slowest, so
    where groups lie differently across units (6 ranks on hosts of 8), the most cut one counts.
    ``within``: where the devices are known, as ``Collective`` has it.
    """
    found, members = [], 1
    known = within or tuple(
        members_in_unit(group_size, stride, tier.size, topology.devices) for tier in topology.tiers
    )
    for tier, in_unit in zip(topology.tiers, known, strict=True):
        inside = min(group_size, in_unit)
        parts = ceil(inside / members)
        if parts > 1:
            found.append(Span(tier, parts, members, tier is topology.tiers[0]))
            members = inside
        if inside == group_size:
            return tuple(found)
    raise ValueError(f"{topology.name} does not hold {group_size} ranks that are {stride} apart")


def members_in_unit(group_size: int, stride: int, unit: int, devices: int) -> int:
    """Ranks of the group in one unit of a tier.

    >>> [members_in_unit(16, s, unit=8, devices=256) for s in (1, 2, 8, 16)]
    [8, 4, 1, 1]
    """
    block = group_size * stride
    if unit >= devices or unit % block == 0:
        return group_size
    if block % unit == 0 and gcd(stride, unit) in (stride, unit):
        return max(1, unit // stride)
    units = ceil(block / unit) if block > unit else 2  # groups lie across the edges of units
    return max(1, min(unit // stride, group_size // units))


def useful(ways: Iterable[Way]) -> tuple[Way, ...]:
    """Without those that take longer than another whatever the bytes; the quickest start first."""
    found: list[Way] = []
    for way in sorted(ways):
        if not found or way.s_per_byte < found[-1].s_per_byte:
            found.append(way)
    return tuple(found)


# ---- bandwidth -----------------------------------------------------------------------------------


def _bytes_per_s(span: Span) -> float:
    """What one device sends in a ring over the parts, all groups of the axis busy at once."""
    tier = span.tier
    if tier.ring_bytes_per_s is not None:
        measured = tier.ring_bytes_per_s / tier.bytes_per_s
        return min(1.0, measured) * _wired_bytes_per_s(span)
    return LINK_EFFICIENCY * _wired_bytes_per_s(span)


def _wired_bytes_per_s(span: Span) -> float:
    """A mesh of links lets each pair use its own; a ring on a torus both directions of each dim
    that it winds through."""
    tier = span.tier
    if tier.pair_bytes_per_s is None:
        return tier.bytes_per_s
    if tier.wiring == "torus":
        links = 2 * min(tier.torus_dims, ceil(log2(span.parts) / log2(max(2.0, _side(tier)))))
        links = 1 if span.parts == 2 else links
    else:
        links = span.parts - 1
    return min(tier.bytes_per_s, links * tier.pair_bytes_per_s)


def _side(tier: Tier) -> float:
    return float(round(tier.size ** (1 / tier.torus_dims), 6))


def _slowest(hops: tuple[Span, ...], rate: Callable[[Span], float]) -> float:
    """Seconds for a byte that comes in over every tier. Between parts of several members there are
    as many rings side by side, each through the links of another member."""
    return max(1 / (span.members * rate(span)) for span in hops)


def _reduction_bytes_per_s(span: Span) -> float:
    tier = span.tier
    if tier.reduction_bytes_per_s is not None and _in_switch(span):
        return tier.reduction_bytes_per_s
    return _bytes_per_s(span)


# ---- latency -------------------------------------------------------------------------------------


def _is_torus(hops: tuple[Span, ...]) -> bool:
    return any(span.tier.wiring == "torus" for span in hops)


def _protocols(hops: tuple[Span, ...]) -> list[str]:
    """LL128 needs that what is written together arrives together, which PCIe does not do."""
    on_pcie = any(span.inside and span.tier.wiring == "tree" for span in hops)
    return [name for name in RING if not (on_pcie and name == "LL128")]


def _share(hops: tuple[Span, ...], protocol: Protocol) -> float:
    return protocol.share_inside if hops[-1].inside else protocol.share_across


def _ring_s(hops: tuple[Span, ...], group_size: int, name: str) -> float:
    """One time round through all ranks, near ones first: as many hops over each tier as that has
    edges. A rank that is alone in its host has nothing to do meanwhile, and its hops are those of a
    tree."""
    protocol = RING[name]
    across = protocol.across if hops[0].inside else TREE[name].across
    total = 0.0
    for span in hops:
        edges = ceil(group_size / span.members) - ceil(group_size / (span.members * span.parts))
        total += edges * span.tier.latency_s * (protocol.inside if span.inside else across)
    return total


def _tree_s(hops: tuple[Span, ...], protocol: Protocol) -> float:
    """Up or down: a chain inside of a host, a tree over hosts."""
    return sum(
        (span.parts - 1) * protocol.inside * span.tier.latency_s
        if span.inside
        else ceil(log2(span.parts)) * protocol.across * span.tier.latency_s
        for span in hops
    )


def _winding_s(hops: tuple[Span, ...]) -> float:
    """Where collectives are compiled for a torus, and where every rank sends to each other: a ring
    over each tier, or for many parts a tree, whose hops take twice as long but are 2 * log2 of the
    parts up and down."""
    return sum(min(s.parts - 1, 2 * ceil(log2(s.parts))) * s.tier.latency_s for s in hops)


# ---- collectives ---------------------------------------------------------------------------------


def _gather(hops: tuple[Span, ...], group_size: int, launch_s: float) -> Iterator[Way]:
    """One ring through all ranks, in which consecutive ranks are near: all that a rank does not
    hold comes in over every tier, at the rate of the slowest."""
    s_per_byte = (group_size - 1) / group_size * _slowest(hops, _bytes_per_s)
    if _is_torus(hops):
        yield Way(launch_s + _winding_s(hops), s_per_byte)
        return
    for name in _protocols(hops):
        latency_s = RING[name].launch * launch_s + _ring_s(hops, group_size, name)
        yield Way(latency_s, s_per_byte / _share(hops, RING[name]))


def _all_reduce(hops: tuple[Span, ...], group_size: int, launch_s: float) -> Iterator[Way]:
    """Reduce-scatter, then all-gather, on a ring; or up and down a tree, whose root gets and sends
    everything; or in the switch, where that was measured."""
    rings = _gather(hops, group_size, 0.0)
    if _is_torus(hops):
        yield from (Way(launch_s + 2 * way.latency_s, 2 * way.s_per_byte) for way in rings)
        return
    s_per_byte = 2 * _slowest(hops, _bytes_per_s)
    for name, ring in zip(_protocols(hops), rings, strict=True):
        yield Way(RING[name].launch * launch_s + 2 * ring.latency_s, 2 * ring.s_per_byte)
        latency_s = TREE[name].launch * launch_s + 2 * _tree_s(hops, TREE[name])
        yield Way(latency_s, s_per_byte / _share(hops, TREE[name]))
    if any(_in_switch(span) for span in hops):
        share = (group_size - 1) / group_size
        yield Way(
            launch_s + _over_switches_s(hops),
            2 * share * _slowest(hops, _reduction_bytes_per_s),
        )


def _in_switch(span: Span) -> bool:
    return span.tier.reduction_bytes_per_s is not None and span.parts >= span.tier.reduction_from


def _over_switches_s(hops: tuple[Span, ...]) -> float:
    inside, across = IN_SWITCH
    return sum(
        span.tier.latency_s * (inside if span.inside else across * ceil(log2(span.parts)))
        for span in hops
    )


def _all_to_all(hops: tuple[Span, ...], group_size: int, launch_s: float) -> Iterator[Way]:
    """Every rank sends a part to each other: over a tier goes all that is not for the ranks below
    it, each rank through its own links. In a ring of a torus it goes a quarter of the way round
    both ways: n / 8 of the bytes over each link."""
    s_per_byte = 0.0
    for span in hops:
        away = (group_size - span.members) / group_size
        tier_s = away / _bytes_per_s(span)
        if span.tier.wiring == "torus" and span.tier.pair_bytes_per_s is not None:
            side = min(span.parts, max(2.0, _side(span.tier)))
            tier_s = max(tier_s, side / 8 / (span.tier.pair_bytes_per_s * LINK_EFFICIENCY))
        s_per_byte = max(s_per_byte, tier_s)
    yield Way(launch_s + _winding_s(hops), s_per_byte)


class Dispatch(NamedTuple):
    """How tokens go to experts. Of each there are ``copies``, for experts drawn evenly, on at most
    ``hosts`` of them if that is not 0; devices and hosts that have several of these experts get it
    once, and what comes back is summed where it was (DeepEP and HybridEP, as in Megatron-LM's
    ``megatron/core/transformer/moe/fused_a2a.py``). ``groups``: of experts, of which a token is in
    ``hosts``, each as a whole on one host; 0: as many as there are."""

    copies: int
    hosts: int = 0
    groups: int = 0


def dispatch(
    of: Dispatch, hops: tuple[Span, ...], group_size: int, launch_s: float
) -> Iterator[Way]:
    """All to all, of what is sent once to each place: a byte is one of all copies."""
    s_per_byte = 0.0
    for span in hops:
        places = ceil(group_size / span.members)
        reached = places * (1 - (1 - 1 / places) ** of.copies)
        if of.hosts and not span.inside:
            reached = min(reached, of.hosts, _hosts_of_groups(of, places))
        away = (group_size - span.members) / group_size
        s_per_byte = max(s_per_byte, reached / of.copies * away / _bytes_per_s(span))
    yield Way(launch_s + _winding_s(hops), s_per_byte)


def _hosts_of_groups(of: Dispatch, places: int) -> float:
    """Where the groups of a token lie, if each of the places has as many of all.

    >>> _hosts_of_groups(Dispatch(8, 4, 8), 8), round(_hosts_of_groups(Dispatch(8, 4, 8), 4), 2)
    (4.0, 3.14)
    """
    if not of.groups or of.groups % places:
        return float(of.hosts)
    others = of.groups - of.groups // places
    return places * (1 - comb(others, of.hosts) / comb(of.groups, of.hosts))


def _send(hops: tuple[Span, ...], _group_size: int, launch_s: float) -> Iterator[Way]:
    """Over the farthest tier; between two devices of a mesh or torus there is one link. NCCL sends
    with LL or Simple."""
    span = hops[-1]
    tier = span.tier
    rate = SEND_EFFICIENCY * min(tier.bytes_per_s, tier.pair_bytes_per_s or tier.bytes_per_s)
    s_per_byte = 1 / min(rate, tier.ring_bytes_per_s or rate)
    if _is_torus(hops):
        yield Way(launch_s + tier.latency_s, s_per_byte)
        return
    for protocol in (RING["LL"], RING["Simple"]):
        hop = protocol.inside if span.inside else protocol.across
        latency_s = protocol.launch * launch_s + hop * tier.latency_s
        yield Way(latency_s, s_per_byte / _share(hops, protocol))


COLLECTIVES: dict[str, Callable[[tuple[Span, ...], int, float], Iterator[Way]]] = {
    "all_gather": _gather,
    "reduce_scatter": _gather,
    "all_reduce": _all_reduce,
    "all_to_all": _all_to_all,
    "send": _send,
}
