"""Published runs as strategies, and their predictions.

A run is planned as any model is: the same graph types, recipe from numbers, prices, memory and
timeline.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

from autopar.errors import AutoparError
from autopar.ir.graph import OperatorGraph
from autopar.ir.sharding import shard, sharded_dim
from autopar.ir.simulation import Band, Estimate
from autopar.ir.strategy import Storage, Strategy, Training
from autopar.recipes import Degrees, by_degrees
from autopar.recipes.by_degrees import recomputed_copies
from autopar.recipes.columns_rows import DATA
from autopar.simulator.bands import banded
from autopar.simulator.costs import ComputeCache
from autopar.simulator.folding import Folded
from autopar.simulator.listing import Structure
from autopar.simulator.microbatches import Division, division
from autopar.simulator.overlap import Overlap
from autopar.simulator.parameter_prices import at_level
from autopar.simulator.pipelines import PricedPipeline, StagePrices, evaluate_stages
from autopar.simulator.prices import evaluate
from autopar.simulator.stages import pipelined
from benchmarks.cells import SkippedError
from benchmarks.kernels import proposals
from benchmarks.programs import NEW, Program
from benchmarks.recomputed import ASSUMED_RECOMPUTED, ON_HOST
from benchmarks.transformer import Transformer
from cost_models import Analytical, Topology, topology
from cost_models.analytical import MATMUL_EFFICIENCY
from cost_models.collectives import Dispatch
from cost_models.interface import CostModel
from cost_models.overheads import NCCL_CHANNELS

ENGINE_ATTENTION = 539 / 794.5
"""cuDNN's causal attention beside the largest product on H100, heads of 128 (Shah et al. 2024,
FlashAttention-3, arXiv 2407.08608, figure 5: 539 TFLOP/s at 16k tokens, where FlashAttention-2 has
335). Of chips after it the same share is assumed."""

FLASH_2 = {"h100-sxm": 3.35e14, "h100-sxm-96gb": 3.35e14}
"""Floating-point operations a second of FlashAttention's second version (Dao 2023, arXiv
2307.08691, section 4.1, from memory: up to 335 TFLOP/s on H100, whose own instructions it does not
use). Beside the largest product of other chips it is as on A100 (``ATTENTION_SHARE``)."""

UPDATE_BYTES = {"float16": 20, "bfloat16": 6, "float32": 4}
"""That Megatron-LM's optimizer in mixed precision moves beside the update and its casts, for each
element: the norm of wide gradients (4) and their scaling to it (8), in fp16 division by the scale
of the loss, too (8); in bf16 gradients are wide already and are not cast (6 less)
(``megatron/optimizer/optimizer.py``, ``Float16OptimizerWithFloat16Params.step``)."""


class DefectError(Exception):
    """What went wrong here, with a row that should have been predicted."""


@dataclass(frozen=True)
class Run:
    """What a row says. ``step_s``, ``memory_bytes``: what was measured, if it was (of memory: what
    the allocator reserved); ``ran_out``: of memory; else, if something was measured, it fitted.
    ``assumed``: what it does not say. ``hosts``: at most so many have experts of a token, if that
    is limited: as many of the ``groups`` of experts. ``network_bytes_per_s``: between hosts, of a
    device, if it is not as usual. ``choices``: other degrees that the row leaves open; the first
    that fits is taken."""

    name: str
    source: str
    model: Transformer
    machine: str
    degrees: Degrees
    training: Training
    batch: int
    step_s: float | None
    memory_bytes: float | None
    ran_out: bool
    assumed: tuple[str, ...] = ()
    program: Program = NEW
    hosts: int = 0
    groups: int = 0
    network_bytes_per_s: float | None = None
    choices: tuple[Degrees, ...] = ()

    @property
    def other_recomputation(self) -> tuple[Degrees, Degrees] | None:
        """Where the row does not say what is recomputed, what keeps most and what keeps least."""
        if ASSUMED_RECOMPUTED.isdisjoint(self.assumed):
            return None
        most, least = (replace(self.degrees, recompute=kind) for kind in ("none", "full"))
        return most, least

    @property
    def machine_model(self) -> Analytical:
        """Its machine, and how its program sends tokens to experts. Where it is known ahead how
        many go to each, kernels are captured once and follow each other without the host."""
        experts, found = self.model.experts, Analytical(self.topology, channels=self.channels)
        if experts is None:
            return found
        if self.model.engine and not experts.apart:
            launch_s = self.topology.device.launch_s
            found = replace(found, calibration=replace(found.calibration, operator_s=launch_s))
        if experts.full or not self.program.has(self._sends_once):
            return found  # with the plain dispatcher only: Megatron-Bridge's moe_token_drop.py
        if self.hosts or self.is_in_racks:
            return replace(found, dispatch=Dispatch(experts.chosen, self.hosts, self.groups))
        return found

    @property
    def is_in_racks(self) -> bool:
        """Whether switches join the devices of several hosts."""
        return self.topology.tiers[0].size > self.topology.host_size

    @property
    def _sends_once(self) -> str:
        """Since when a token goes to each place once."""
        if self.is_in_racks:
            return "once_in_racks"
        return "once_to_newer_hosts" if is_newer(self.topology) else "once_to_hosts"

    @property
    def channels(self) -> int:
        """Rings between hosts have as many as there are cards to feed (NCCL src/graph/search.cc):
        fewer on a slower network."""
        if self.network_bytes_per_s is None:
            return NCCL_CHANNELS
        usual = topology(self.machine).tiers[-1].bytes_per_s
        return max(1, round(NCCL_CHANNELS * min(1.0, self.network_bytes_per_s / usual)))

    @property
    def topology(self) -> Topology:
        """Its machine, with the kernels that its software has and the network that it says."""
        found = topology(self.machine)
        if self.network_bytes_per_s is not None:
            found = _with_network(found, self.network_bytes_per_s)
        if not self.model.flash:
            return found
        if self.program.is_megatron and has_engine(found):
            return _with_engine(found)
        return _with_flash(found, as_products=self.program.per_parameter)


def _with_network(machine: Topology, bytes_per_s: float) -> Topology:
    """Measured bandwidths are taken to be as much slower or faster."""
    tier = machine.tiers[-1]
    by = bytes_per_s / tier.bytes_per_s
    measured = {
        name: getattr(tier, name) * by
        for name in ("pair_bytes_per_s", "ring_bytes_per_s", "reduction_bytes_per_s")
        if getattr(tier, name) is not None
    }
    tier = replace(tier, bytes_per_s=bytes_per_s, **measured)
    return replace(machine, tiers=(*machine.tiers[:-1], tier))


def has_engine(machine: Topology) -> bool:
    """Whether Megatron-LM's blocks are those of Transformer Engine, as on chips since H100."""
    newer = "float8_e4m3fn" in dict(machine.device.peak_flops_per_s)
    return newer and machine.device.vendor == "nvidia"


def is_newer(machine: Topology) -> bool:
    """Than H100."""
    return "float4_e2m1fn_x2" in dict(machine.device.peak_flops_per_s)


def _with_engine(machine: Topology) -> Topology:
    """The attention of Transformer Engine is cuDNN's: it uses the chip's own instructions, as
    FlashAttention-2 does not, which is what A100 has."""
    device = machine.device
    peaks, measured = dict(device.peak_flops_per_s), dict(device.achievable_flops_per_s)
    largest = measured.get("bfloat16", peaks["bfloat16"] * MATMUL_EFFICIENCY)
    return _with_attention(machine, ENGINE_ATTENTION * largest, as_products=True)


def _with_flash(machine: Topology, *, as_products: bool) -> Topology:
    """The attention of other programs is FlashAttention's second version, or one before it."""
    return _with_attention(machine, FLASH_2.get(machine.device.name), as_products=as_products)


def _with_attention(machine: Topology, flops_per_s: float | None, *, as_products: bool) -> Topology:
    speeds = () if flops_per_s is None else tuple((d, flops_per_s) for d in ("bfloat16", "float16"))
    return replace(
        machine,
        device=replace(
            machine.device, attention_flops_per_s=speeds, attention_as_products=as_products
        ),
    )


@dataclass(frozen=True)
class Compared:
    """``memory_bytes``: what the allocator reserves; ``device_bytes``: all that the process has of
    the ``limit_bytes`` of the device. ``judged``: whether it fits whatever is recomputed, or does
    not, where the row does not say that; else what is assumed of the row decides."""

    run: Run
    step_s: float
    memory_bytes: int
    device_bytes: int
    limit_bytes: int
    band: Band | None = None
    judged: bool = True

    @property
    def step_error(self) -> float | None:
        return None if self.run.step_s is None else self.step_s / self.run.step_s - 1

    @property
    def memory_error(self) -> float | None:
        of = self.run.memory_bytes
        return None if of is None else self.memory_bytes / of - 1

    @property
    def step_in_band(self) -> bool | None:
        if self.band is None or self.run.step_s is None:
            return None
        return self.band.low_s <= self.run.step_s <= self.band.high_s

    @property
    def needed(self) -> float:
        """Relative to what the device has."""
        return self.device_bytes / self.limit_bytes

    @property
    def fits(self) -> bool:
        return self.needed <= 1

    @property
    def false_fit(self) -> bool:
        return self.judged and self.run.ran_out and self.fits

    @property
    def false_reject(self) -> bool:
        return self.judged and not self.run.ran_out and not self.fits


# ---- from runs to predictions --------------------------------------------------------------------


def predicted(runs: Iterable[Run]) -> Iterator[tuple[Run, Compared | Exception]]:
    """Or why there is no prediction. Runs that differ in their batch only have the same stages,
    which are priced once; what their programs do at once is a part of these prices."""

    def alike(run: Run) -> tuple[object, ...]:
        return run.model, run.machine_model, run.degrees, run.training, overlap_of(run)

    for _, group in groupby(sorted(runs, key=lambda run: repr(alike(run))), key=alike):
        together = list(group)
        try:
            machine = together[0].machine_model
        except ValueError as error:
            yield from ((run, error) for run in together)
            continue
        prices, divided = StagePrices(machine, overlap=overlap_of(together[0])), []
        cache: ComputeCache = {}
        for run in together:
            try:
                run, estimate, strategy, found = _first_that_fits(run, machine, prices, cache)
                of = found.graph, found.rules, machine, strategy
                estimate = banded(*of, estimate)
            except (AutoparError, ValueError) as error:
                yield run, SkippedError(f"{_said(run)}: {error}")
                continue
            except Exception as error:  # a defect of ours: told by name, and the others go on
                yield run, DefectError(f"{type(error).__name__}: {error}")
                continue
            divided.append(found)  # prices are kept by its rules
            memory = estimate.memory
            compared = Compared(
                run,
                estimate.step_time_s,
                memory.reserved_bytes,
                memory.device_bytes,
                machine.memory_bytes,
                estimate.band,
            )
            yield run, replace(compared, judged=_is_judged(compared, machine))


def _first_that_fits(
    run: Run, machine: CostModel, prices: StagePrices, cache: ComputeCache
) -> tuple[Run, Estimate, Strategy, Division]:
    """Of what the row leaves open; if nothing fits, the last."""
    found = run, *_estimate(run, machine, prices, cache)
    for degrees in run.choices:
        if found[1].memory.device_bytes <= machine.memory_bytes:
            break
        other = replace(run, degrees=degrees)
        found = (
            other,
            *_estimate(other, machine, StagePrices(machine, overlap=overlap_of(other)), {}),
        )
    return found


def _said(run: Run) -> str:
    """What a recipe was made from, in the words of the row."""
    of, model = run.degrees, run.model
    said = {"TP": of.tensor, "PP": of.pipeline, "virtual_pp": of.chunks, "CP": of.context}
    said |= {"DP": of.data * of.replicas, "EP": of.experts, "micro_batch": of.microbatch or 0}
    said |= {"global_batch": run.batch, "seq_len": model.length, "heads": model.heads}
    said |= {"kv_heads": model.kv_heads, "layers": model.layers}
    degrees = ("TP", "PP", "virtual_pp", "CP", "DP", "EP")
    return ", ".join(f"{k} {v}" for k, v in said.items() if v > 1 or k not in degrees)


def _is_judged(compared: Compared, machine: CostModel) -> bool:
    """Whether what is assumed to be recomputed does not decide if it fits."""
    run = compared.run
    if ON_HOST in run.assumed or (run.choices and compared.fits):
        return False
    if run.other_recomputation is None:
        return True
    most, least = run.other_recomputation
    other = most if compared.fits else least
    if other == run.degrees:
        return True
    estimate, *_ = _estimate(replace(run, degrees=other), machine, StagePrices(machine), {})
    return (estimate.memory.device_bytes <= machine.memory_bytes) == compared.fits


def _estimate(
    run: Run, machine: CostModel, prices: StagePrices, cache: ComputeCache
) -> tuple[Estimate, Strategy, Division]:
    found, structure, strategy = _planned(run, machine)
    if len(strategy.stages) > 1:
        return evaluate_stages(found, machine, strategy, prices), strategy, found
    estimate = evaluate(
        found.graph,
        found.rules,
        machine,
        strategy,
        compute_cache=cache,
        folded=_folded(structure, run.degrees),
        overlap=overlap_of(run),
    )
    return estimate, strategy, found


def estimate(run: Run) -> Estimate:
    """
    Raises:
        AutoparError, ValueError: there is no such strategy, or no price.
    """
    machine = run.machine_model
    return _estimate(run, machine, StagePrices(machine, overlap=overlap_of(run)), {})[0]


def step_s(run: Run, machine: CostModel) -> float:
    """Of whatever number type the prices are; memory is not looked at.

    Raises:
        AutoparError, ValueError: there is no such strategy, or no price.
    """
    found, structure, strategy = _planned(run, machine)
    if len(strategy.stages) > 1:
        played = PricedPipeline(
            pipelined(found, strategy), StagePrices(machine, overlap=overlap_of(run))
        ).timeline
        return played.with_hosts_s  # type: ignore[return-value]
    return evaluate(
        found.graph,
        found.rules,
        machine,
        strategy,
        folded=_folded(structure, run.degrees),
        overlap=overlap_of(run),
    ).step_time_s


def overlap_of(run: Run) -> Overlap:
    """FSDP gathers parameters ahead, in the dtypes that the row names, and so does DeepSpeed of
    now; what it did before, and what Megatron-LM does, depends on when they were written."""
    program, degrees = run.program, run.degrees
    if program.one_by_one is not None:
        return Overlap(one_by_one=program.one_by_one, to_the_end=not program.stops_early)
    if program.shards:
        return Overlap(
            parameters=True,
            gathered_bytes=program.gathered_bytes,
            reduced_bytes=program.reduced_bytes,
            copies=program.per_parameter,
            flat=program.flat,
            to_the_end=not program.stops_early,
            in_pieces=program.in_pieces,
            update_bytes=UPDATE_BYTES[run.model.dtype] if program.is_megatron else 0,
        )
    passes = degrees.pipeline if degrees.chunks > 1 else 1
    waits = degrees.chunks == 1 or not program.has("messages_beside")
    return Overlap(
        sums=program.has("sums"),
        in_pieces=program.has("in_pieces") and run.model.engine,
        to_the_end=not program.stops_early,
        replicas=passes if program.has("replicas") and degrees.zero else 0,
        together=True,
        added_in_products=program.has("added_in_products"),
        update_bytes=UPDATE_BYTES[run.model.dtype],
        waits=waits,
        experts=EXPERTS_BESIDE if _sends_beside(run) else 0.0,
        host_waits=not program.has("passes_untimed") or (degrees.pipeline > 1 and waits),
    )


EXPERTS_BESIDE = 0.3655
"""Of the time of what goes all to all, hidden by products and attention: Qwen3 30B on 16 H100, all
else alike, by its trace; steps were 15% shorter (NVIDIA-NeMo/Megatron-Bridge@067f987d,
``skills/nemo-mbridge-perf-moe-comm-overlap``, run of 2026-07-25)."""


def _sends_beside(run: Run) -> bool:
    """Recipes do so from 2025-09 on, of interleaved pipelines on hosts that no switch joins to
    racks, where no token is dropped (NVIDIA-NeMo/Megatron-Bridge, r0.1.0 to v0.5.0,
    ``scripts/performance``: ``A2A_1F1B``, then ``moe_a2a_overlap``; gpt-oss on GB200 in 2026-04 is
    the one exception)."""
    experts, interleaved = run.model.experts, run.degrees.chunks > 1
    if experts is None or experts.full or not run.model.engine:
        return False
    if not experts.apart:  # captured as a whole
        return True
    return interleaved and not run.is_in_racks and run.program.has("experts_beside")


def _planned(run: Run, machine: CostModel) -> tuple[Division, Structure, Strategy]:
    found, structure = _divided(run.model, run.batch, run.degrees.microbatches(run.batch))
    strategy = by_degrees(found, run.degrees, machine, run.training, structure)
    return found, structure, _padded(run.degrees, found.graph, strategy)


def _folded(structure: Structure, degrees: Degrees) -> Folded:
    return structure.folded_in_runs(
        tuple(_ends(block.copies, degrees) for block in structure.blocks)
    )


def _padded(degrees: Degrees, graph: OperatorGraph, strategy: Strategy) -> Strategy:
    """Programs that shard parameters as runs of numbers do so over any number of devices, and pad
    them: what these divide no dim of is stored along the first that no other axis cuts."""
    mesh = strategy.stages[0].mesh
    data = mesh.names.index(DATA) if DATA in mesh.names else None
    if not degrees.zero or data is None or mesh.sizes[data] == 1:
        return strategy
    padded = {
        parameter.name: _padded_storage(
            strategy.storage[parameter.name], parameter.spec.shape, data, degrees.zero
        )
        for parameter in graph.parameters
        if sharded_dim(strategy.storage[parameter.name].optimizer[data]) is None
    }
    return replace(strategy, storage={**strategy.storage, **padded})


def _padded_storage(of: Storage, shape: tuple[int, ...], axis: int, level: int) -> Storage:
    others = {sharded_dim(placed) for placed in of.parameter}
    dim = next((d for d in range(len(shape)) if d not in others), None)
    if dim is None:
        return of
    kept = of.parameter, of.gradient, of.optimizer
    return Storage(
        *(
            (*placed[:axis], here, *placed[axis + 1 :])
            for placed, here in zip(kept, at_level(level, shard(dim)), strict=True)
        )
    )


@lru_cache(maxsize=8)
def _divided(model: Transformer, batch: int, count: int) -> tuple[Division, Structure]:
    """Rows of one model follow each other."""
    graph = model.graph(batch)
    found = division(graph, count, proposals(graph))
    return found, Structure(found.graph, found.rules)


def _ends(copies: int, degrees: Degrees) -> frozenset[int]:
    """Where a block's copies that recompute end, if others follow."""
    end = len(recomputed_copies(copies, degrees))
    return frozenset({end} if 0 < end < copies else ())
