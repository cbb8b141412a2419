"""A roofline for compute and rings over tiers of links for collectives, from datasheets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil, gcd, log2

from cost_models.interface import Collective, CollectiveKind, Work
from cost_models.overheads import BY_VENDOR, NOTHING, Overheads
from cost_models.topology import Tier, Topology

MATMUL_EFFICIENCY = 0.78
"""Of the peak, for a large product: the median of the ten machines whose files have a measured
maximum (MAMF, stas00/ml-engineering@744d01e), which spread from 0.51 to 0.87."""

ATTENTION_EFFICIENCY = 0.8
"""Of what a large product achieves, for fused attention. FlashAttention-2 (Dao 2023, section 4):
up to 73% of the A100's peak forward and 63% backward, where products achieve 87%: 0.84 and 0.72."""

MEMORY_EFFICIENCY = 0.85
"""Of the datasheet's bandwidth, for streaming kernels. From memory: copy and triad of BabelStream
on HBM parts come to 0.8 to 0.92."""

LINK_EFFICIENCY = 0.8
"""Of the links' bandwidth, for collectives without a measured one: all-gather on eight H200 comes
to 362 of 450 GB/s (stas00/ml-engineering@744d01e, network)."""

SEND_EFFICIENCY = 0.8
"""The same for one sender and one receiver, which share nothing with others but the protocol."""

TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64), (32, 32))
"""Output tiles that matrix libraries choose from (CUTLASS's defaults)."""

HALF_TILE = 32
"""A tile of m x n runs at m*n / ((m + h) * (n + h)) of full speed: each step over k loads m + n
values for m * n products. h is set so that a 128 x 128 tile has two thirds of the full speed and
a 256 x 128 one 71%, about the spread of CUTLASS's profiler; the largest tile counts as 1."""

TILE_K = 32
"""Products go over k in steps of this many."""

LEAST_STEPS = 8
"""When tiles are fewer than cores, k is cut among cores too, but not below this many steps: a part
has to fill and drain its pipeline, and the parts have to be summed (CUTLASS's split-k and
stream-k; the number is an estimate)."""


@dataclass(frozen=True)
class Analytical:
    """A ``CostModel`` of a machine that need not be at hand."""

    topology: Topology
    _computed: dict[Work, float] = field(default_factory=dict, repr=False, compare=False)
    _coefficients: dict[tuple[CollectiveKind, int, int, tuple[int, ...]], tuple[float, float]] = (
        field(default_factory=dict, repr=False, compare=False)
    )

    @property
    def devices(self) -> int:
        return self.topology.devices

    @property
    def memory_bytes(self) -> int:
        return self.topology.device.memory_bytes

    @property
    def overheads(self) -> Overheads:
        """Of the runtime of such devices; nothing is known of a vendor that has no name here."""
        return BY_VENDOR.get(self.topology.device.vendor, NOTHING)

    @property
    def scale_up_devices(self) -> int:
        return min(self.topology.tiers[0].size, self.topology.devices)

    @property
    def units(self) -> tuple[int, ...]:
        """One for each tier."""
        return tuple(tier.size for tier in self.topology.tiers)

    def compute_time_s(self, work: Work) -> float:
        known = self._computed.get(work)
        if known is None:
            known = self._computed[work] = self._compute_time_s(work)
        return known

    def collective_time_s(self, collective: Collective) -> float:
        latency_s, s_per_byte = self.collective_coefficients(
            collective.kind, collective.group_size, collective.stride, collective.within
        )
        return latency_s + s_per_byte * collective.bytes

    def collective_coefficients(
        self, kind: CollectiveKind, group_size: int, stride: int, within: tuple[int, ...] = ()
    ) -> tuple[float, float]:
        """(latency_s, s_per_byte): a collective of b bytes takes latency_s + s_per_byte * b."""
        key = (kind, group_size, stride, within)
        known = self._coefficients.get(key)
        if known is None:
            known = self._coefficients[key] = self._new_coefficients(*key)
        return known

    # ------------------------------------------------------------------ compute

    def _compute_time_s(self, work: Work) -> float:
        if work.flops < 0 or work.bytes < 0:
            raise ValueError(f"negative work: {work}")
        if work.kind not in COMPUTE:
            raise KeyError(f"no price for work of kind {work.kind!r}; known: {', '.join(COMPUTE)}")
        device = self.topology.device
        memory_s = work.bytes / (device.memory_bytes_per_s * MEMORY_EFFICIENCY)
        return device.launch_s + max(COMPUTE[work.kind](self, work), memory_s)

    def _product_s(self, work: Work) -> float:
        return (
            work.flops * matmul_waste(_four(work), self.topology.device.cores) / self._speed(work)
        )

    def _attention_s(self, work: Work) -> float:
        waste = attention_waste(_four(work), self.topology.device.cores)
        return work.flops * waste / (self._speed(work) * ATTENTION_EFFICIENCY)

    def _speed(self, work: Work) -> float:
        """Flops per second of a large product."""
        device = self.topology.device
        peaks = dict(device.peak_flops_per_s)
        if work.dtype not in peaks:
            raise ValueError(
                f"{device.name} has no peak for {work.dtype} (it has {', '.join(peaks)}); "
                "plan the model in one of these, or write a topology file that gives the peak"
            )
        achievable = dict(device.achievable_flops_per_s)
        if work.dtype in achievable:
            return achievable[work.dtype]
        if "bfloat16" in achievable:
            return peaks[work.dtype] * achievable["bfloat16"] / peaks["bfloat16"]
        return peaks[work.dtype] * MATMUL_EFFICIENCY

    # -------------------------------------------------------------- collectives

    def _new_coefficients(
        self, kind: CollectiveKind, group_size: int, stride: int, within: tuple[int, ...]
    ) -> tuple[float, float]:
        if kind not in COLLECTIVES:
            raise KeyError(f"no price for a {kind!r}; known: {', '.join(COLLECTIVES)}")
        if group_size < 2 or stride < 1 or group_size * stride > self.devices:
            raise ValueError(
                f"a {kind} over {group_size} ranks that are {stride} apart does not fit on the "
                f"{self.devices} devices of {self.topology.name} (a group has at least 2)"
            )
        hops = spans(self.topology, group_size, stride, within)
        latency_s, s_per_byte = COLLECTIVES[kind](hops, group_size)
        return self.topology.collective_launch_s + latency_s, s_per_byte


COMPUTE: dict[str, Callable[[Analytical, Work], float]] = {
    "matmul": Analytical._product_s,
    "attention": Analytical._attention_s,
    "memory": lambda _model, _work: 0.0,  # the bytes are counted for every kind
}


def _four(work: Work) -> tuple[int, int, int, int]:
    if len(work.shape) != 4 or min(work.shape) < 1:
        raise ValueError(f"a {work.kind} needs a shape of four positive sizes, not {work.shape}")
    a, b, c, d = work.shape
    return a, b, c, d


def _tile_speed(m: int, n: int) -> float:
    return m * n / ((m + HALF_TILE) * (n + HALF_TILE))


FULL_SPEED = max(_tile_speed(m, n) for m, n in TILES)


def matmul_waste(shape: tuple[int, int, int, int], cores: int) -> float:
    """How much longer a product takes than its flops at full speed: what is lost to the edges of
    tiles, to cores without a tile in the last wave, to small tiles.

    >>> round(matmul_waste((1, 8192, 8192, 8192), cores=132), 2)
    1.03
    >>> matmul_waste((1, 16, 4096, 4096), cores=132) > 4
    True
    """
    batch, m, n, k = shape
    steps = ceil(k / TILE_K)
    ideal = batch * m * n * k / cores
    return (
        min(
            _rounds(batch * ceil(m / tm) * ceil(n / tn), cores, steps)
            * (tm * tn * TILE_K * FULL_SPEED / _tile_speed(tm, tn))
            for tm, tn in TILES
        )
        / ideal
    )


def _rounds(tiles: int, cores: int, steps: int) -> float:
    """Steps over k that the busiest core makes: of whole tiles when there are enough for all
    cores, else of parts of one."""
    if tiles >= cores:
        return ceil(tiles / cores) * steps
    return max(min(steps, LEAST_STEPS), steps / (cores // tiles))


def attention_waste(shape: tuple[int, int, int, int], cores: int) -> float:
    """The same for fused attention, which gives 128 queries of a head to a core at a time and goes
    over the keys 64 at a time."""
    heads, queries, keys, dim = shape
    padded = (128 * ceil(keys / 64) * 64 * max(64, ceil(dim / 16) * 16)) / (queries * keys * dim)
    tiles = heads * ceil(queries / 128)
    return ceil(tiles / cores) * cores * padded / heads


# ------------------------------------------------------------------------ collectives


@dataclass(frozen=True, slots=True)
class Span:
    """What a tier does for a group: it joins ``parts``, each of ``members`` ranks of the group."""

    tier: Tier
    parts: int
    members: int


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
            found.append(Span(tier, parts, members))
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


def _hops(span: Span) -> int:
    """A ring, or for many parts a tree, whose hops take twice as long (NCCL's table of latencies:
    4.0 and 8.5 us a hop on a network with LL128) but are 2 * log2 of the parts up and down."""
    return min(span.parts - 1, 2 * ceil(log2(span.parts)))


def _latency_s(hops: tuple[Span, ...]) -> float:
    return sum(_hops(span) * span.tier.latency_s for span in hops)


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


def _gather(hops: tuple[Span, ...], group_size: int) -> tuple[float, float]:
    """One ring through all ranks, in which consecutive ranks are near: all that a rank does not
    hold comes in over every tier, at the rate of the slowest. Between parts of several members
    there are as many rings side by side, each through the links of another member."""
    share = (group_size - 1) / group_size
    return _latency_s(hops), share * max(1 / (span.members * _bytes_per_s(span)) for span in hops)


def _all_reduce(hops: tuple[Span, ...], group_size: int) -> tuple[float, float]:
    """Reduce-scatter, then all-gather; or in the switch, where that was measured."""
    latency_s, s_per_byte = _gather(hops, group_size)
    share = (group_size - 1) / group_size
    in_switch = share * max(1 / (span.members * _reduction_bytes_per_s(span)) for span in hops)
    return 2 * latency_s, 2 * min(s_per_byte, in_switch)


def _reduction_bytes_per_s(span: Span) -> float:
    tier = span.tier
    if tier.reduction_bytes_per_s is not None and span.parts >= tier.reduction_from:
        return tier.reduction_bytes_per_s
    return _bytes_per_s(span)


def _all_to_all(hops: tuple[Span, ...], group_size: int) -> tuple[float, float]:
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
    return _latency_s(hops), s_per_byte


def _send(hops: tuple[Span, ...], _group_size: int) -> tuple[float, float]:
    """Over the farthest tier; between two devices of a mesh or torus there is one link."""
    tier = hops[-1].tier
    rate = SEND_EFFICIENCY * min(tier.bytes_per_s, tier.pair_bytes_per_s or tier.bytes_per_s)
    return tier.latency_s, 1 / min(rate, tier.ring_bytes_per_s or rate)


COLLECTIVES: dict[str, Callable[[tuple[Span, ...], int], tuple[float, float]]] = {
    "all_gather": _gather,
    "reduce_scatter": _gather,
    "all_reduce": _all_reduce,
    "all_to_all": _all_to_all,
    "send": _send,
}
