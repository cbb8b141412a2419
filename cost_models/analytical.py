"""A roofline for compute, and ways over tiers of links for collectives, from datasheets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import ceil

from cost_models.calibration import Calibration, read_calibration
from cost_models.collectives import COLLECTIVES, Dispatch, Way, dispatch, spans, useful
from cost_models.interface import Collective, CollectiveKind, HostTime, UnpricedError, Work
from cost_models.overheads import BY_VENDOR, NCCL_CHANNELS, NOTHING, Overheads
from cost_models.topology import Topology

MATMUL_EFFICIENCY = 0.78
"""Of the peak, where no largest product was measured: the median of the ten machines whose files
have one (MAMF, stas00/ml-engineering@744d01e), which spread from 0.51 to 0.87."""

ATTENTION_SHARE = 203 / 271.2
"""Of the largest product, for fused attention where it was not measured: as on A100, heads of 128,
forward and backward together (FlashAttention-2, Dao 2023, arXiv 2307.08691, figure 4, from memory;
the product: MAMF, stas00/ml-engineering@744d01e)."""

ITEM_BYTES = {"tensorfloat32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
"""Of what matrix units take. Products in float32 do not go to them: on an H100 one over 50257
columns is as fast as others (benchmarks/measured/operators_h100_2026-11-27.csv)."""

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

LATENCY_S = 0.5e-6
"""From a load of a loop to the next one of the same thread, with the sums between them: H100's
memory answers after 479 cycles (Luo et al. 2024, arXiv 2402.13499), 0.27 us; batch norms of 64 to
256 channels, whose threads load one element at a time, were measured at 0.37 to 0.66 us on it
(benchmarks/measured, operators of one GPU)."""

THREADS_PER_CORE = 2048
"""That a streaming multiprocessor or compute unit holds at once (CUDA C Programming Guide, table of
technical specifications; CDNA holds as many of 32 waves of 64)."""


@dataclass(frozen=True)
class Analytical:
    """A ``CostModel`` of a machine that need not be at hand. ``dispatch``: all that goes all to all
    are tokens for experts, sent so. ``channels``: of the communication library."""

    topology: Topology
    calibration: Calibration = field(default_factory=read_calibration)
    dispatch: Dispatch | None = None
    channels: int = NCCL_CHANNELS
    _computed: dict[Work, float] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _ways: dict[tuple[CollectiveKind, int, int, tuple[int, ...]], tuple[Way, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
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
    def slowdown(self) -> float:
        """Each channel of the communication library has a core of its own while it goes on, which
        compute does not have. On a torus engines for copies move what goes from chip to chip,
        beside the matrix units (jax-ml/scaling-book@0819a7d: tpus.md, and roofline.md, which counts
        the longer of the two); what arrives is written to memory, which compute has not meanwhile.
        """
        device, inner = self.topology.device, self.topology.tiers[0]
        if inner.wiring == "torus":
            taken = inner.bytes_per_s / device.memory_bytes_per_s
        else:
            taken = self.channels / device.cores
        return 2.0 if taken >= 0.5 else 1 / (1 - taken)

    @property
    def scale_up_devices(self) -> int:
        return min(self.topology.tiers[0].size, self.topology.devices)

    @property
    def units(self) -> tuple[int, ...]:
        """One for each tier."""
        return tuple(tier.size for tier in self.topology.tiers)

    @property
    def compiled(self) -> bool:
        return self.topology.device.compiled

    @property
    def host_time(self) -> HostTime:
        """A program that is compiled as a whole does not wait for its host."""
        operator_s = 0.0 if self.compiled else self.calibration.operator_s
        return HostTime(operator_s=operator_s, ahead=True)

    def compute_time_s(self, work: Work) -> float:
        known = self._computed.get(work)
        if known is None:
            known = self._computed[work] = self._compute_time_s(work)
        return known

    def collective_time_s(self, collective: Collective) -> float:
        ways = self.collective_ways(
            collective.kind, collective.group_size, collective.stride, collective.within
        )
        return min(way.latency_s + way.s_per_byte * collective.bytes for way in ways)

    def collective_ways(
        self, kind: CollectiveKind, group_size: int, stride: int, within: tuple[int, ...] = ()
    ) -> tuple[Way, ...]:
        """In which it can be done: the fastest is, which depends on the bytes."""
        key = (kind, group_size, stride, within)
        known = self._ways.get(key)
        if known is None:
            known = self._ways[key] = self._new_ways(*key)
        return known

    @property
    def clock(self) -> float:
        """Of products in a long run, beside that of the largest product ever measured."""
        device = self.topology.device
        wide = "bfloat16" if "bfloat16" in dict(device.peak_flops_per_s) else "float16"
        if not device.power_w or wide not in dict(device.peak_flops_per_s):
            return 1.0
        flop_pj = self.calibration.flop_pj * device.flop_energy
        drawn_w = self._largest(wide) * flop_pj * 1e-12
        if drawn_w <= device.power_w:
            return 1.0
        held: float = (device.power_w / drawn_w) ** (1 / 3)
        return held

    # ------------------------------------------------------------------ compute

    def _compute_time_s(self, work: Work) -> float:
        if work.flops < 0 or work.bytes < 0:
            raise ValueError(f"negative work: {work}")
        if work.kind not in COMPUTE:
            raise KeyError(f"no price for work of kind {work.kind!r}; known: {', '.join(COMPUTE)}")
        device = self.topology.device
        memory_s = (work.bytes + work.again_bytes) / self._bytes_per_s(work)
        return device.launch_s + max(COMPUTE[work.kind](self, work), memory_s)

    def _bytes_per_s(self, work: Work) -> float:
        """What memory gives, or less where what few threads have on the way is not enough for it
        (Little's law)."""
        device = self.topology.device
        most = device.memory_bytes_per_s * self.calibration.memory_efficiency
        if not work.threads:
            return most
        threads = min(work.threads, THREADS_PER_CORE * device.cores)
        return min(most, threads * work.ahead_bytes / LATENCY_S)

    def _index_s(self, work: Work) -> float:
        """A lane's instruction that multiplies and adds counts as two operations in the peak."""
        peak = dict(self.topology.device.peak_flops_per_s).get("float32")
        return 2 * work.instructions / peak if peak else 0.0

    def _product_s(self, work: Work) -> float:
        device, fill_steps = self.topology.device, self.calibration.fill_steps
        waste = matmul_waste(_four(work), device.cores, fill_steps)
        if misaligned(work):
            waste *= self.calibration.misaligned_slowdown
        speed = self._speed(work) * self.calibration.matmul_efficiency * self.clock
        return work.flops * waste / speed

    def _attention_s(self, work: Work) -> float:
        waste = attention_waste(_four(work), self.topology.device.cores)
        return work.flops * waste / self._attention_speed(work)

    def _attention_speed(self, work: Work) -> float:
        device, calibration = self.topology.device, self.calibration
        measured = dict(device.attention_flops_per_s)
        largest = measured.get(work.dtype, self._speed(work) * ATTENTION_SHARE)
        if device.attention_as_products:
            return largest * calibration.matmul_efficiency * self.clock
        return largest * calibration.attention_efficiency

    def _speed(self, work: Work) -> float:
        """Flops per second of the largest product. Convolutions of float32 may round their operands
        on NVIDIA's devices unless torch is told otherwise (``torch.backends.cudnn.allow_tf32``);
        products may not."""
        device = self.topology.device
        rounded = "tensorfloat32" in dict(device.peak_flops_per_s) and device.vendor == "nvidia"
        if work.kind == "convolution" and work.dtype == "float32" and rounded:
            work = replace(work, dtype="tensorfloat32")
        peaks = dict(device.peak_flops_per_s)
        if work.dtype not in peaks:
            raise UnpricedError(
                f"{device.name} has no peak for {work.dtype} (it has {', '.join(peaks)}); "
                "plan the model in one of these, or write a topology file that gives the peak"
            )
        return self._largest(work.dtype)

    def _largest(self, dtype: str) -> float:
        device = self.topology.device
        peaks, achievable = dict(device.peak_flops_per_s), dict(device.achievable_flops_per_s)
        if dtype in achievable:
            return achievable[dtype]
        if "bfloat16" in achievable:
            return peaks[dtype] * achievable["bfloat16"] / peaks["bfloat16"]
        return peaks[dtype] * MATMUL_EFFICIENCY

    # -------------------------------------------------------------- collectives

    def _new_ways(
        self, kind: CollectiveKind, group_size: int, stride: int, within: tuple[int, ...]
    ) -> tuple[Way, ...]:
        if kind not in COLLECTIVES:
            raise KeyError(f"no price for a {kind!r}; known: {', '.join(COLLECTIVES)}")
        if group_size < 2 or stride < 1 or group_size * stride > self.devices:
            raise ValueError(
                f"a {kind} over {group_size} ranks that are {stride} apart does not fit on the "
                f"{self.devices} devices of {self.topology.name} (a group has at least 2)"
            )
        hops = spans(self.topology, group_size, stride, within)
        if kind == "all_to_all" and self.dispatch is not None:
            launch_s = self.topology.collective_launch_s
            return useful(dispatch(self.dispatch, hops, group_size, launch_s))
        return useful(COLLECTIVES[kind](hops, group_size, self.topology.collective_launch_s))


COMPUTE: dict[str, Callable[[Analytical, Work], float]] = {
    "matmul": Analytical._product_s,
    "convolution": Analytical._product_s,  # implicit products, as libraries for GPUs have them
    "attention": Analytical._attention_s,
    "memory": Analytical._index_s,  # the bytes are counted for every kind
}


def _four(work: Work) -> tuple[int, int, int, int]:
    if len(work.shape) != 4 or min(work.shape) < 1:
        raise ValueError(f"a {work.kind} needs a shape of four positive sizes, not {work.shape}")
    a, b, c, d = work.shape
    return a, b, c, d


def misaligned(work: Work) -> bool:
    """Whether rows of a product's matrices start where no aligned load can read them: matrix units
    are fed 16 bytes at a time (NVIDIA, Matrix Multiplication Background, "Tensor Core
    requirements"). Rows are those of n and of k."""
    _, _, n, k = _four(work)
    return work.dtype in ITEM_BYTES and any(size * ITEM_BYTES[work.dtype] % 16 for size in (n, k))


def _tile_speed(m: int, n: int) -> float:
    return m * n / ((m + HALF_TILE) * (n + HALF_TILE))


FULL_SPEED = max(_tile_speed(m, n) for m, n in TILES)


def matmul_waste(shape: tuple[int, int, int, int], cores: int, fill_steps: float = 0.0) -> float:
    """How much longer a product takes than its flops at full speed: what is lost to the edges of
    tiles, to cores without a tile in the last wave, to small tiles, to the start and end of each.

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
            _rounds(batch * ceil(m / tm) * ceil(n / tn), cores, steps, fill_steps)
            * (tm * tn * TILE_K * FULL_SPEED / _tile_speed(tm, tn))
            for tm, tn in TILES
        )
        / ideal
    )


def _rounds(tiles: int, cores: int, steps: int, fill_steps: float) -> float:
    """Steps over k that the busiest core makes: of whole tiles when there are enough for all
    cores, else of parts of one."""
    if tiles >= cores:
        return ceil(tiles / cores) * (steps + fill_steps)
    return max(min(steps, LEAST_STEPS), steps / (cores // tiles)) + fill_steps


def attention_waste(shape: tuple[int, int, int, int], cores: int) -> float:
    """The same for fused attention, which gives 128 queries of a head to a core at a time and goes
    over the keys 64 at a time."""
    heads, queries, keys, dim = shape
    padded = (128 * ceil(keys / 64) * 64 * max(64, ceil(dim / 16) * 16)) / (queries * keys * dim)
    tiles = heads * ceil(queries / 128)
    return ceil(tiles / cores) * cores * padded / heads
