"""Published runs as strategies, their predictions, and how good these are.

A row of a table is a run that somebody reported: a Transformer's sizes, a machine, degrees of
parallelism, and a time or a memory that was measured. It is planned as any model is: the same graph
types, recipe from numbers, prices, memory and timeline.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations, groupby
from statistics import fmean

from autopar.errors import AutoparError
from autopar.ir.graph import OperatorGraph
from autopar.ir.sharding import shard, sharded_dim
from autopar.ir.simulation import Band, Estimate
from autopar.ir.strategy import Storage, Strategy, Training
from autopar.recipes import Degrees, by_degrees
from autopar.recipes.by_degrees import recomputed_copies
from autopar.recipes.columns_rows import DATA
from autopar.simulator.bands import banded
from autopar.simulator.costs import BLOCK, ComputeCache, attended
from autopar.simulator.folding import Folded
from autopar.simulator.listing import Structure
from autopar.simulator.microbatches import Division, division
from autopar.simulator.overlap import Overlap
from autopar.simulator.parameter_prices import at_level
from autopar.simulator.pipelines import PricedPipeline, StagePrices, evaluate_stages
from autopar.simulator.prices import evaluate
from autopar.simulator.stages import pipelined
from benchmarks import cells, families
from benchmarks.assumed import AS_FITS, LARGEST, choices, settled
from benchmarks.cells import NOT_SAID, OUT_OF_MEMORY, Row, SkippedError, is_said, number, positive
from benchmarks.kernels import proposals
from benchmarks.programs import NEW, Program, program_of
from benchmarks.rates import Step, seconds
from benchmarks.transformer import Experts, Latent, Transformer
from cost_models import Analytical, Topology, topology
from cost_models.analytical import MATMUL_EFFICIENCY
from cost_models.collectives import Dispatch
from cost_models.interface import CostModel
from cost_models.overheads import NCCL_CHANNELS

COLUMNS = (
    *("config_id", "source", "model_family", "layers", "hidden", "heads", "ffn", "vocab"),
    *("seq_len", "global_batch", "gpu_type", "n_gpus", "precision", "metric", "value"),
    "iter_time_s",
)
"""That a table has to have."""

OPTIONAL = (
    *("kv_heads", "head_dim", "gated_mlp", "micro_batch", "gpus_per_node", "TP", "PP", "DP"),
    *("virtual_pp", "CP", "EP", "n_experts", "topk", "moe_ffn", "zero_fsdp"),
    *("sequence_parallel", "recompute", "flash_attn", "schedule", "inter"),
    *("notes", *families.COLUMNS),
)
"""That are read, too; where one is missing, all its cells are empty."""

MACHINES = {
    "A100-80GB-SXM": "a100-sxm-80gb",
    "A100-40GB-SXM": "a100-sxm-40gb",
    "H100-80GB-SXM": "h100-sxm",
    "H100-96GB-HBM2e-500W(2.4TB/s)": "h100-sxm-96gb",
    "V100-32GB-SXM(DGX-2H)": "v100-sxm3-32gb",
    "V100-16GB-SXM (p3.16xlarge)": "v100-sxm2-16gb",
    "B200-180GB": "b200-sxm",
    "B300-288GB": "b300-sxm",
    "GB200-NVL72": "gb200-nvl72",
    "GB300-NVL72": "gb300-nvl72",
}
"""By the column ``gpu_type``, the machine of ``autopar list topologies``."""

OTHER_NAMES: tuple[tuple[str, str], ...] = (
    (r"\bgb300", "gb300-nvl72"),
    (r"\bgb200", "gb200-nvl72"),
    (r"\bb300", "b300-sxm"),
    (r"\bb200", "b200-sxm"),
    (r"\bh200", "h200-sxm"),
    (r"\bh100.*(pcie|nvl)", "h100-pcie"),
    (r"\bh100.*96", "h100-sxm-96gb"),
    (r"\bh100", "h100-sxm"),
    (r"\ba100.*pcie", "a100-pcie-80gb"),
    (r"\ba100.*(?<!\d)(40|320)", "a100-sxm-40gb"),
    (r"\ba100", "a100-sxm-80gb"),
    (r"\bv100.*pcie", "v100-pcie"),
    (r"\bv100.*(dgx-?2|sxm3)", "v100-sxm3-32gb"),
    (r"\bv100.*16", "v100-sxm2-16gb"),
    (r"\bv100", "v100-sxm2-32gb"),
    *((rf"\b{name}\b", name) for name in ("mi300x", "mi325x", "mi355x", "l40s", "l4")),
    (r"\b4090\b", "rtx-4090"),
    *((rf"\b(tpu.?)?{name}\b", f"tpu-{name}") for name in ("v3", "v4", "v5e", "v5p", "v6e")),
    (r"\btrillium\b", "tpu-v6e"),
)
"""Where it is none of these, by what is found in it, in small letters; the first."""

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

GIB = 2**30


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
        return "once_to_newer_hosts" if _is_newer(self.topology) else "once_to_hosts"

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
        if self.program.is_megatron and _has_engine(found):
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


def _has_engine(machine: Topology) -> bool:
    """Whether Megatron-LM's blocks are those of Transformer Engine, as on chips since H100."""
    newer = "float8_e4m3fn" in dict(machine.device.peak_flops_per_s)
    return newer and machine.device.vendor == "nvidia"


def _is_newer(machine: Topology) -> bool:
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


# ---- from a row to a run -------------------------------------------------------------------------


def run_of(row: Row) -> Run:
    """
    Raises:
        SkippedError: it has something that no strategy of ours says, or leaves something open.
    """
    assumed: list[str] = []
    row = settled(cleaned(row), assumed)
    machine, network = _machine(row), _network(row, assumed)
    degrees, flash = _degrees(row, assumed), _is(row, "flash_attn")
    memory = row["metric"].startswith("peak_mem")
    program = program_of(row, shards=degrees.zero == 3, flash=flash)
    if program.per_parameter and degrees.pipeline > 1:
        degrees = replace(degrees, zero=1)  # gathered and reduced once (``per_parameter``)
    ran_out = any(row[name].lower() in OUT_OF_MEMORY for name in ("value", "iter_time_s"))
    model, batch = _model(row, degrees, program, machine, assumed), number(row, "global_batch")
    narrow = "PURE" in row["precision"] or model.dtype == "float32"
    first, *others = choices(degrees, batch, assumed, flash=flash)
    return Run(
        name=row["config_id"],
        source=row["source"],
        model=model,
        machine=machine,
        degrees=first,
        training=Training("adam", "full" if narrow else "mixed"),
        batch=batch,
        step_s=None if memory or ran_out else _step_s(row, model, machine, degrees, assumed),
        memory_bytes=_gib(positive(row, "value")) if memory and not ran_out else None,
        ran_out=ran_out,
        assumed=tuple(assumed),
        program=program,
        hosts=_size(row, "topk_group") if _size(row, "n_group") else 0,
        groups=_size(row, "n_group"),
        network_bytes_per_s=network,
        choices=tuple(others),
    )


def _degrees(row: Row, assumed: list[str]) -> Degrees:
    tensor, pipeline = number(row, "TP", 1), number(row, "PP", 1)
    context, schedule = number(row, "CP", 1), _schedule(row, assumed)
    chunks = _chunks(row, schedule == "interleaved", assumed)
    sharded, replicas, zero = _sharded(row, tensor * pipeline * context)
    if zero == 2 and pipeline > 1:
        zero = 1  # of all microbatches in flight, gradients would be scattered one by one
        assumed.append("gradients are scattered once a step")
    layers = number(row, "layers") / (pipeline * chunks)
    recompute, part = _recompute(_recomputed(row), layers, _is(row, "flash_attn"), assumed)
    found = Degrees(
        tensor=tensor,
        pipeline=pipeline,
        data=sharded,
        replicas=replicas,
        chunks=chunks,
        schedule=schedule if schedule not in ("", "1f1b", "interleaved") else None,
        microbatch=_microbatch(row, zero == 3 and pipeline == 1, assumed),
        between="sequence" if _is(row, "sequence_parallel") and tensor > 1 else "whole",
        zero=zero,
        recompute=recompute,
        context=context,
        experts=number(row, "EP", 1),
        recomputed=part,
    )
    _check_degrees(row, found)
    return found


def _check_degrees(row: Row, of: Degrees) -> None:
    """What can be said of them in the words of the row."""
    devices, layers = number(row, "n_gpus"), number(row, "layers")
    if of.devices != devices:
        raise SkippedError(
            f"TP {of.tensor} x PP {of.pipeline} x CP {of.context} x DP {of.data * of.replicas}: "
            f"degrees make {of.devices} devices, and n_gpus is {devices}; an empty DP is what is "
            "left"
        )
    if of.stages > layers + 2:
        raise SkippedError(
            f"PP {of.pipeline} x virtual_pp {of.chunks} are more stages than the {layers} layers, "
            "and what is before and after them; fewer are read"
        )
    batch, shared = number(row, "global_batch"), of.data * of.replicas
    one = of.microbatch or 1
    if batch % (shared * one):
        raise SkippedError(
            f"global_batch is {batch}: a batch of {batch} samples is not a whole number of "
            f"microbatches of {one} (micro_batch) in {shared} replicas (DP); a multiple of "
            f"{shared * one} is read"
        )
    if batch // (shared * one) > MOST_MICROBATCHES:
        raise SkippedError(
            f"global_batch is {batch}: more than {MOST_MICROBATCHES} microbatches of {one} "
            f"(micro_batch) in {shared} replicas (DP), which are not played here"
        )


MOST_MICROBATCHES = 16384


def _sharded(row: Row, others: int) -> tuple[int, int, int]:
    devices = number(row, "n_gpus")
    found = cells.sharded(row["zero_fsdp"], number(row, "DP", max(1, devices // others)))
    assert found is not None  # the row is settled
    return found


def _is(row: Row, column: str) -> bool:
    return bool(cells.flag(row, column))


def _schedule(row: Row, assumed: list[str]) -> str:
    name, what = cells.order(row["schedule"])
    if number(row, "PP", 1) == 1:
        return ""
    assumed += [what] * bool(what)
    return name


def cleaned(row: Mapping[str, str | None]) -> Row:
    """Every column that is read, without blanks around its cells; short rows end in empty ones."""
    found = ((name, row.get(name)) for name in (*COLUMNS, *OPTIONAL))
    return {name: cell.strip() if cell else "" for name, cell in found}


def _step_s(
    row: Row, model: Transformer, machine: str, degrees: Degrees, assumed: list[str]
) -> float | None:
    """Where only a rate is given, from that."""
    found, given, metric = positive(row, "iter_time_s"), positive(row, "value"), row["metric"]
    if found is not None:
        return found
    if given is None:
        assumed.append(NOTHING_MEASURED)
        return None
    device = topology(machine).device
    peaks = dict(device.peak_flops_per_s)
    peak = peaks.get(model.products or model.dtype, peaks.get(model.dtype, 0.0))
    repeated = REPEATED.get(degrees.recompute, 0.0) * degrees.recomputed
    step = Step(model, number(row, "global_batch"), number(row, "n_gpus"), peak, repeated)
    if re.search(r"tflop|mfu|hfu", metric.lower()):
        assumed.append("flops are those of weights and of attention without its mask")
    found = seconds(metric, given, step)
    assumed += [NOTHING_MEASURED] * (found is None)
    return found


NOTHING_MEASURED = "nothing is compared: no iter_time_s, and value or metric tell no time"

REPEATED = {"full": 1.0, "alternate": 0.5}
"""Of the flops of a forward."""


def _gib(number: float | None) -> float | None:
    return None if number is None else number * GIB


def _chunks(row: Row, interleaved: bool, assumed: list[str]) -> int:
    """Interleaved without a number: two layers for each stage, or one, as MegaScale has it (arXiv
    2402.15627, section 6.1, from memory: six chunks of 12 layers, three of three). Where only with
    them stages come out even, what is before the layers and after them counts as one each."""
    if is_said(row, "virtual_pp") or not interleaved:
        return number(row, "virtual_pp", 1)
    layers, pipeline = number(row, "layers"), number(row, "PP", 1)
    if layers % pipeline and (layers + 2) % pipeline == 0:
        layers += 2
    each, left = divmod(layers, pipeline)
    found = 1 if left else each // 2 if each % 2 == 0 else each
    assumed.append(f"virtual_pp is {max(1, found)}")
    return max(1, found)


def _microbatch(row: Row, gathers: bool, assumed: list[str]) -> int | None:
    """Programs that gather parameters for each microbatch have few."""
    if is_said(row, "micro_batch"):
        return number(row, "micro_batch")
    assumed.append(LARGEST if gathers else "micro_batch is 1")
    return None if gathers else 1


RECOMPUTE: tuple[tuple[str, str, str], ...] = (
    # how a cell begins, what is recomputed, what is assumed thereby
    ("none or", "none", "nothing is recomputed"),
    ("none", "none", ""),
    ("no", "none", ""),
    ("false", "none", ""),
    ("unspecified(assume none", "none", "nothing is recomputed"),
    ("unspecified (selective", "attention", "attention is recomputed"),
    ("unspecified", "none", "nothing is recomputed"),
    ("uniform", "full", ""),
    ("true", "full", ""),
    ("selective(op", "alternate", ""),
    ("selective layernorm", "elementwise", ""),
    ("selective modules", "elementwise", "what is no product is recomputed, for single modules"),
    ("full", "full", ""),
    ("selective(layer", "full", ""),
    ("selective (hfu/mfu", "full", ""),
    ("selective", "attention", "attention is recomputed"),
    ("attention", "attention", ""),
    ("core attention", "attention", ""),
    ("activation", "full", ""),  # checkpointing
    ("checkpoint", "full", ""),
    ("gradient checkpoint", "full", ""),
    ("remat", "full", ""),
    ("yes", "full", ""),
    ("minimal", "elementwise", "what is no product is recomputed"),
)


ON_HOST = "activations are kept by the host, and their way there and back is hidden"
"""Their memory is not looked at then: the row does not say which of them."""

ASSUMED_RECOMPUTED = frozenset(what for *_, what in RECOMPUTE if what)


def _recompute(text: str, layers: float, flash: bool, assumed: list[str]) -> tuple[str, float]:
    """What is recomputed, and in which part of the ``layers`` of a stage. Where that is not said,
    ``flash`` attention leaves nothing that would be worth it."""
    said = text.lower()
    if said in NOT_SAID:
        if not said:
            assumed.append(AS_FITS)
        return "none", 1.0
    if said == "selective":
        return "attention", 1.0  # as arXiv 2205.05198 has it
    if "offload" in said and "activation" in said:
        assumed.append(ON_HOST)
        return "none", 1.0
    for begins, kind, what in RECOMPUTE:
        if said.startswith(begins):
            if what == "attention is recomputed" and flash:
                kind = "none"
                what = "nothing is recomputed"
            assumed += [what] * bool(what)
            return kind, _part(said, layers)
    raise SkippedError(
        f"recompute is {text!r}: recomputes in a way that has no name here: {text}; none, full, "
        "selective, selective(op), selective layernorm, full block N layers are read"
    )


def _recomputed(row: Row) -> str:
    """What its cell says, unless that is of other machines: ``(recipe H100/B200)``."""
    said = row["recompute"]
    if found := re.search(r"\(recipe ([\w/]+)\)", said):
        names = found[1].lower().split("/")
        return said if any(name in row["gpu_type"].lower() for name in names) else "none"
    return said


def _part(said: str, layers: float) -> float:
    """Of the layers; or so much that as many flops are done for those of the model, of which all
    would be a third more.

    >>> _part("selective(layer=every 2nd)", 32), _part("full block 4 layers", 32), _part("full", 32)
    (0.5, 0.125, 1.0)
    >>> round(_part("selective (hfu/mfu 1.13)", 32), 2)
    0.39
    """
    if found := re.search(r"every (\d+)", said):
        return 1 / max(1, int(found[1]))
    if found := re.search(r"block (\d+) layers", said):
        return min(1.0, int(found[1]) / layers)
    if found := re.search(r"hfu/mfu (\d+\.?\d*)", said):
        return min(1.0, max(0.0, 3 * (float(found[1]) - 1)))
    return 1.0


def _experts(
    row: Row, degrees: Degrees, program: Program, machine: str, *, narrow: bool
) -> Experts | None:
    """A group for each part of the sequence that a device has."""
    count = number(row, "n_experts", 1)
    if count == 1:
        if degrees.experts > 1:
            raise SkippedError("EP is given, and n_experts is not")
        return None
    if not _is(row, "gated_mlp"):
        raise SkippedError(
            f"gated_mlp is {row['gated_mlp']!r} and n_experts {count}: experts that are not gated "
            "are not among the blocks of a Transformer here"
        )
    groups = degrees.context * (degrees.tensor if degrees.between == "sequence" else 1)
    if number(row, "seq_len") % groups:
        raise SkippedError(
            f"seq_len is {row['seq_len']}: a sequence of {row['seq_len']} cannot be {groups} equal "
            "parts (CP, and TP with sequence_parallel)"
        )
    ffn = number(row, "moe_ffn")
    whole = narrow and program.has("whole_experts") and _is_joined(topology(machine))
    apart = program.is_megatron and not whole
    dropping = _is_padded_to_capacity(row)
    free = apart and not dropping
    return Experts(
        count,
        number(row, "topk"),
        ffn,
        groups,
        shared=_size(row, "n_shared_experts") * ffn,
        after=_size(row, "first_k_dense_replace"),
        biased=bool(_size(row, "expert_bias")) and apart,
        clamped=bool(_size(row, "swiglu_limit")) and apart,
        sorted=apart and count > degrees.experts > 1,
        padded=free and narrow,
        steps=ROUTING_STEPS * free,
        apart=apart and not (dropping and degrees.pipeline == 1),
        full=dropping,
    )


def _is_joined(machine: Topology) -> bool:
    """Whether switches join several hosts, or all that the run has. Iterations are captured as a
    whole there: of the recipes of 2026-06 (NVIDIA-NeMo/Megatron-Bridge v0.5.0,
    ``scripts/performance/configs``, ``cutedsl_fused_grouped_mlp``) those of GB200 and GB300, and
    Qwen3 30B on eight B300; not DeepSeek, gpt-oss and Qwen3 235B on B300, nor H100."""
    domain = machine.tiers[0].size
    return _is_newer(machine) and (domain > machine.host_size or machine.devices <= domain)


def _is_padded_to_capacity(row: Row) -> bool:
    """Experts take as many tokens whatever the router says, and drop others: all sizes are known
    ahead, and nobody waits for them. Where a device has one stage, layers are captured as graphs of
    the device: of the runs of 2025-09 (NVIDIA-NeMo/Megatron-Bridge at r0.1.0,
    ``scripts/performance/configs``, ``cuda_graphs``) those without a pipeline, and no other."""
    return re.search(r"(token|drop).?(drop|pad)", f"{row['config_id']} {row['notes']}") is not None


ROUTING_STEPS = 14
"""Kernels of Megatron-LM's dispatcher for all to all that count tokens, beside those of ATen here:
sums over the map of tokens and experts, of its ranks and of its experts, their gathering, a copy
for the host, which experts come where; scores again for the loss of balance and that loss
(``megatron/core/transformer/moe``: ``token_dispatcher.py``, ``preprocess``, and ``router.py``)."""


def _near(row: Row) -> int:
    """Keys that a query sees in the mean, where layers with a window and without take turns."""
    window, length = _size(row, "sliding_window"), number(row, "seq_len")
    if not window or window >= length:
        return 0
    turns = max(1, _size(row, "sliding_window_pattern"))
    near, every = min(length, window + BLOCK), attended(length) * length
    return round((every + (turns - 1) * near) / turns) if turns > 1 else near


def _size(row: Row, column: str) -> int:
    """Of what the family's publication says where the row does not; 0: it has no such thing."""
    return number(row, column, families.published(row["model_family"]).get(column, 0))


def _latent(row: Row) -> Latent | None:
    keys = _size(row, "kv_lora_rank")
    if keys:
        names = ("q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        queries, plain, rotary, values = (_size(row, name) for name in names)
        if not (plain and rotary and values):
            raise SkippedError(f"kv_lora_rank is given, and {', '.join(names[1:])} are not")
        return Latent(keys, queries, plain, rotary, values)
    if "MLA" in row["model_family"]:
        raise SkippedError(
            f"{row['model_family']} has latent attention, whose sizes are not known: give columns "
            f"{', '.join(families.COLUMNS[:5])}"
        )
    return None


def _ffn(row: Row, assumed: list[str]) -> int:
    """Not given: that of experts, if all layers have them, or as wide as plain ones are."""
    if is_said(row, "ffn") or _is(row, "gated_mlp"):
        if not is_said(row, "ffn") and number(row, "n_experts", 1) > 1:
            return number(row, "moe_ffn")
        return number(row, "ffn")
    assumed.append("ffn is four times hidden")
    return 4 * number(row, "hidden")


def _has_fused_loss(row: Row) -> bool:
    return (
        re.search(r"(fused|chunked|liger)[^;.]*(cross.?entropy|loss)", row["notes"].lower())
        is not None
    )


def _is_parallel(row: Row) -> bool:
    """Whether attention and MLP of a block read the same."""
    return bool(_size(row, "use_parallel_residual")) or "parallel block" in row["notes"].lower()


def _model(
    row: Row, degrees: Degrees, program: Program, machine: str, assumed: list[str]
) -> Transformer:
    found = cells.dtypes(row["precision"])
    assert found is not None  # the row is settled
    dtype, products = found
    _check_peaks(row, machine, products or dtype)
    gated, flash = _is(row, "gated_mlp"), _is(row, "flash_attn")
    engine = program.is_megatron and _has_engine(topology(machine))
    compiled = program.compiled_loss and degrees.tensor == 1
    family, heads = row["model_family"], number(row, "heads")
    layers = number(row, "layers")
    _check_heads(row)
    return Transformer(
        layers=layers,
        width=number(row, "hidden"),
        heads=heads,
        kv_heads=number(row, "kv_heads", heads),
        ffn=_ffn(row, assumed),
        vocabulary=padded(number(row, "vocab"), degrees.tensor, always=program.is_megatron),
        length=number(row, "seq_len"),
        gated=gated,
        biased=not gated,
        flash=flash,
        dropout=not flash,
        tied=not gated,
        fused_loss=family.startswith("MPT") or engine or _has_fused_loss(row) or compiled,
        dtype=dtype,
        head_width=number(row, "head_dim", 0) or None,
        products=products,
        experts=_experts(row, degrees, program, machine, narrow=products is not None),
        engine=engine,
        fused=True,
        one_pass=engine or program.has("norms_in_one_pass"),
        wide_rotary=program.per_parameter,
        divided_loss=program.per_parameter and degrees.tensor > 1,
        metrics=program.metrics,
        latent=_latent(row),
        near=_near(row) if flash else 0,
        parallel=_is_parallel(row),
        cast_norms=program.has("own_scales"),
        repeated=program.repeats_keys and flash,
        ring=program.per_parameter and flash and degrees.context > 1,
        normed_heads=bool(_size(row, "use_qk_norm")),
        scaled=program.is_megatron and _size(row, "rope_factor") > 1,
    )


def _check_peaks(row: Row, machine: str, dtype: str) -> None:
    device = topology(machine).device
    peaks = dict(device.peak_flops_per_s)
    if dtype not in peaks:
        raise SkippedError(
            f"precision is {row['precision']!r}, and gpu_type {row['gpu_type']!r}: {device.name} "
            f"has no peak for {dtype} (it has {', '.join(peaks)})"
        )


def _check_heads(row: Row) -> None:
    heads, hidden = number(row, "heads"), number(row, "hidden")
    shared = number(row, "kv_heads", heads)
    if heads % shared:
        raise SkippedError(
            f"kv_heads is {shared}, which does not divide the {heads} heads; as many heads have "
            "each key: a divisor of heads is read"
        )
    if not is_said(row, "head_dim") and hidden % heads:
        raise SkippedError(
            f"hidden is {hidden}, not a whole number for each of {heads} heads, and head_dim is "
            "not given; give head_dim"
        )


def padded(vocabulary: int, tensor: int, *, always: bool = False) -> int:
    """As Megatron-LM does, to a multiple of 128 for each tensor-parallel device; other programs
    only where it is divided.

    >>> padded(50257, 1), padded(50257, 2), padded(51200, 8), padded(50257, 1, always=True)
    (50257, 50432, 51200, 50304)
    """
    if tensor == 1 and not always:
        return vocabulary
    return -(-vocabulary // (128 * tensor)) * 128 * tensor


def _machine(row: Row) -> str:
    said = re.sub(r"(?<![a-z\d])\d+ ?x ?(?=[a-z])", " ", row["gpu_type"].lower())  # 8xH100
    found = (name for pattern, name in OTHER_NAMES if re.search(pattern, said))
    name = MACHINES.get(row["gpu_type"]) or next(found, None)
    if name is None:
        raise SkippedError(
            f"gpu_type is {row['gpu_type']!r}: no topology for {row['gpu_type']}; what has A100, "
            "H100, H200, B200, GB200, V100, L40S, MI300X or TPU v5p in it is read, and what else "
            "`autopar list topologies` names"
        )
    devices, host = number(row, "n_gpus"), number(row, "gpus_per_node", 8)
    if devices <= host:
        return _sized(row, f"1x{devices}x{name}")
    used = next((n for n in range(host, 0, -1) if devices % n == 0 and (n == host or n >= 8)), 0)
    if not used:  # of a rack of 72, 64 make 128, 256, ... devices
        raise SkippedError(
            f"n_gpus is {devices}: {devices} devices are not whole hosts of {host} (gpus_per_node)"
        )
    return _sized(row, f"{devices // used}x{used}x{name}")


def _sized(row: Row, name: str) -> str:
    try:
        topology(name)
    except ValueError as error:
        raise SkippedError(
            f"n_gpus is {row['n_gpus']!r}, gpus_per_node {row['gpus_per_node']!r}: {error}"
        ) from None
    return name


def _network(row: Row, assumed: list[str]) -> float | None:
    """Of a device, if the row tells it and there is a network."""
    machine = topology(_machine(row))
    if len(machine.tiers) == 1:
        return None
    usual = machine.tiers[-1].bytes_per_s
    found = cells.network_bytes_per_s(row["inter"], number(row, "gpus_per_node", 8), usual)
    if found is None:
        return None
    bytes_per_s, what = found
    assumed += [what] * bool(what)
    return None if bytes_per_s == usual else bytes_per_s


# ---- from runs to predictions --------------------------------------------------------------------


def predicted(runs: Iterable[Run]) -> Iterator[tuple[Run, Compared | Exception]]:
    """Or why there is no prediction. Runs that differ in their batch only have the same stages,
    which are priced once."""

    def alike(run: Run) -> tuple[object, ...]:
        return run.model, run.machine_model, run.degrees, run.training

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


# ---- what is said of them ------------------------------------------------------------------------


@dataclass(frozen=True)
class Quality:
    """Of the rows of one source. Errors are relative; mean and largest are of their size, ``bias``
    is their mean with its sign; ``step_in_band``: the share of steps that lies in its band.
    ``None`` where nothing of the kind was measured. ``assumed``: what some rows do not say;
    ``not_judged``: of how many that decides whether they fit. ``left_out``: names of rows that
    cannot be, and why; ``failed``: of rows that met a defect."""

    source: str
    rows: int
    predicted: int
    skipped: dict[str, int]
    assumed: dict[str, int]
    step_mean: float | None
    step_bias: float | None
    step_largest: float | None
    step_in_band: float | None
    tau: float | None
    memory_mean: float | None
    memory_largest: float | None
    false_fits: int
    false_rejects: int
    not_judged: int
    left_out: tuple[tuple[str, str], ...] = ()
    failed: tuple[tuple[str, str], ...] = ()


def quality(
    source: str,
    compared: Sequence[Compared],
    left_out: Sequence[tuple[str, str]],
    failed: Sequence[tuple[str, str]] = (),
) -> Quality:
    steps = [(one.step_error, one) for one in compared]
    errors = [error for error, _ in steps if error is not None]
    memory = [one.memory_error for one in compared if one.memory_error is not None]
    pairs = [(one.run.step_s, one.step_s) for one in compared if one.run.step_s is not None]
    return Quality(
        source,
        len(compared) + len(left_out) + len(failed),
        len(compared),
        dict(Counter(reason for _, reason in left_out).most_common()),
        dict(Counter(what for one in compared for what in one.run.assumed).most_common()),
        _mean(map(abs, errors)),
        _mean(errors),
        max(map(abs, errors), default=None),
        _mean(one.step_in_band for one in compared if one.step_in_band is not None),
        kendall_tau(pairs),
        _mean(map(abs, memory)),
        max(map(abs, memory), default=None),
        sum(one.false_fit for one in compared),
        sum(one.false_reject for one in compared),
        sum(not one.judged for one in compared),
        tuple(left_out),
        tuple(failed),
    )


def _mean(numbers: Iterable[float]) -> float | None:
    found = list(numbers)
    return fmean(found) if found else None


def kendall_tau(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Tau-b of two orders: 1 where they agree, -1 where one is the other turned round.

    >>> kendall_tau([(1, 10), (2, 20), (3, 15)])
    0.3333333333333333
    """
    agree = ties_a = ties_b = 0
    every = 0
    for (a, b), (c, d) in combinations(pairs, 2):
        every += 1
        order = (a - c) * (b - d)
        agree += (order > 0) - (order < 0)
        ties_a += a == c
        ties_b += b == d
    left = ((every - ties_a) * (every - ties_b)) ** 0.5
    return agree / left if left else None


def validate(rows: Iterable[Row]) -> tuple[list[Quality], list[Compared]]:
    """By source in the order of the rows, then all of them together."""
    runs: list[Run] = []
    left_out = defaultdict[str, list[tuple[str, str]]](list)
    failed = defaultdict[str, list[tuple[str, str]]](list)
    sources: dict[str, list[Compared]] = {}
    for row in map(cleaned, rows):
        sources.setdefault(row["source"], [])
        try:
            runs.append(run_of(row))
        except SkippedError as reason:
            left_out[row["source"]].append((row["config_id"], str(reason)))
    for run, answer in predicted(runs):
        if isinstance(answer, Compared):
            sources[run.source].append(answer)
        else:
            reasons = failed if isinstance(answer, DefectError) else left_out
            reasons[run.source].append((run.name, str(answer)))
    everything = [one for compared in sources.values() for one in compared]
    found = [quality(name, of, left_out[name], failed[name]) for name, of in sources.items()]
    whole = ([one for of in reasons.values() for one in of] for reasons in (left_out, failed))
    return [*found, quality("all", everything, *whole)], everything


def share(number: float | None) -> str:
    """
    >>> share(0.123), share(None)
    ('12.3%', '-')
    """
    return "-" if number is None else f"{number:.1%}"
