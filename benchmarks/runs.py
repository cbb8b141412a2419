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
from math import isfinite
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
from benchmarks import families
from benchmarks.kernels import proposals
from benchmarks.programs import NEW, Program, program_of
from benchmarks.rates import Step, seconds
from benchmarks.transformer import Experts, Latent, Transformer
from cost_models import Analytical, Topology, topology
from cost_models.analytical import MATMUL_EFFICIENCY
from cost_models.collectives import Dispatch
from cost_models.interface import CostModel

Row = dict[str, str]

COLUMNS = (
    *("config_id", "source", "model_family", "layers", "hidden", "heads", "ffn", "vocab"),
    *("seq_len", "global_batch", "gpu_type", "n_gpus", "precision", "metric", "value"),
    "iter_time_s",
)
"""That a table has to have."""

OPTIONAL = (
    *("kv_heads", "head_dim", "gated_mlp", "micro_batch", "gpus_per_node", "TP", "PP", "DP"),
    *("virtual_pp", "CP", "EP", "n_experts", "topk", "moe_ffn", "zero_fsdp"),
    *("sequence_parallel", "recompute", "flash_attn", "schedule"),
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
    (r"\ba100.*40", "a100-sxm-40gb"),
    (r"\ba100", "a100-sxm-80gb"),
    (r"\bv100.*pcie", "v100-pcie"),
    (r"\bv100.*(dgx-?2|sxm3)", "v100-sxm3-32gb"),
    (r"\bv100.*16", "v100-sxm2-16gb"),
    (r"\bv100", "v100-sxm2-32gb"),
    *((rf"\b{name}\b", name) for name in ("mi300x", "mi325x", "mi355x", "l40s", "l4")),
    (r"\b4090\b", "rtx-4090"),
    *((rf"\btpu.?{name}\b", f"tpu-{name}") for name in ("v3", "v4", "v5e", "v5p", "v6e")),
)
"""Where it is none of these, by what is found in it, in small letters; the first."""

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp8": "bfloat16", "mxfp8": "bfloat16"}
DTYPES |= {"nvfp4": "bfloat16", "float16": "float16", "half": "float16", "bfloat16": "bfloat16"}
DTYPES |= {"float8": "bfloat16", "fp32": "float32", "float32": "float32"}
"""Of what is no product, by how a column ``precision`` begins."""

PRODUCTS = {"fp8": "float8_e4m3fn", "mxfp8": "float8_e4m3fn", "nvfp4": "float4_e2m1fn_x2"}
PRODUCTS["float8"] = "float8_e4m3fn"
"""Of products with the weights of blocks; attention, embedding and head are in the other."""

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

OUT_OF_MEMORY = ("oom", "out of memory", "out_of_memory")
MOST_LAYERS = 4096
GIB = 2**30


class SkippedError(Exception):
    """Why a row is not predicted."""


class DefectError(Exception):
    """What went wrong here, with a row that should have been predicted."""


@dataclass(frozen=True)
class Run:
    """What a row says. ``step_s``, ``memory_bytes``: what was measured, if it was (of memory: what
    the allocator reserved); ``ran_out``: of memory; else, if something was measured, it fitted.
    ``assumed``: what it does not say. ``hosts``: at most so many have experts of a token, if that
    is limited: as many of the ``groups`` of experts."""

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
        experts, found = self.model.experts, Analytical(self.topology)
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
    def topology(self) -> Topology:
        """Its machine, with the kernels that its software has."""
        found = topology(self.machine)
        if not self.model.flash:
            return found
        if self.program.is_megatron and _has_engine(found):
            return _with_engine(found)
        return _with_flash(found, as_products=self.program.per_parameter)


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
    row = cleaned(row)
    assumed: list[str] = []
    tensor, pipeline = _number(row, "TP", 1), _number(row, "PP", 1)
    context, chunks = _number(row, "CP", 1), _chunks(row, assumed)
    others = _number(row, "n_gpus") // (tensor * pipeline * context)
    sharded, replicas, zero = _zero(row["zero_fsdp"], _number(row, "DP", max(1, others)))
    if zero == 2 and pipeline > 1:
        zero = 1  # of all microbatches in flight, gradients would be scattered one by one
        assumed.append("gradients are scattered once a step")
    layers = _number(row, "layers") / (pipeline * chunks)
    flash = _flag(row, "flash_attn")
    program = program_of(row, shards=zero == 3, flash=flash)
    if program.per_parameter and pipeline > 1:
        zero = 1  # gathered once a step, and gradients are reduced once (``per_parameter``)
    recompute, part = _recompute(_recomputed(row), layers, flash, assumed)
    degrees = Degrees(
        tensor=tensor,
        pipeline=pipeline,
        data=sharded,
        replicas=replicas,
        chunks=chunks,
        microbatch=_microbatch(row, assumed),
        between="sequence" if _flag(row, "sequence_parallel") and tensor > 1 else "whole",
        zero=zero,
        recompute=recompute,
        context=context,
        experts=_number(row, "EP", 1),
        recomputed=part,
    )
    memory = row["metric"].startswith("peak_mem")
    ran_out = any(row[name].lower() in OUT_OF_MEMORY for name in ("value", "iter_time_s"))
    model, machine = _model(row, degrees, program, assumed), _machine(row, degrees)
    narrow = "PURE" in row["precision"] or model.dtype == "float32"
    return Run(
        name=row["config_id"],
        source=row["source"],
        model=model,
        machine=machine,
        degrees=degrees,
        training=Training("adam", "full" if narrow else "mixed"),
        batch=_number(row, "global_batch"),
        step_s=None if memory or ran_out else _step_s(row, model, machine, assumed),
        memory_bytes=_gib(_positive(row, "value")) if memory and not ran_out else None,
        ran_out=ran_out,
        assumed=tuple(assumed),
        program=program,
        hosts=_size(row, "topk_group") if _size(row, "n_group") else 0,
        groups=_size(row, "n_group"),
    )


def cleaned(row: Mapping[str, str | None]) -> Row:
    """Every column that is read, without blanks around its cells; short rows end in empty ones."""
    found = ((name, row.get(name)) for name in (*COLUMNS, *OPTIONAL))
    return {name: cell.strip() if cell else "" for name, cell in found}


def _number(row: Row, column: str, default: int | None = None) -> int:
    """``default``: what an empty cell, or one that says none, means."""
    text = row[column]
    if text.lower() in NOT_SAID:
        if default is None:
            raise SkippedError(f"{column} is not given")
        return default
    try:
        found = float(text)
    except ValueError:
        raise SkippedError(f"{column} is {text!r}, no number") from None
    if not isfinite(found) or found != int(found):
        raise SkippedError(f"{column} is {text!r}, no whole number")
    if found < 1:
        raise SkippedError(f"{column} is {text}, and must be at least 1")
    return int(found)


def _step_s(row: Row, model: Transformer, machine: str, assumed: list[str]) -> float | None:
    """Where only a rate is given, from that."""
    found, value = _positive(row, "iter_time_s"), row["value"]
    if found is not None or value.lower() in NOT_SAID:
        return found
    device = topology(machine).device
    peaks = dict(device.peak_flops_per_s)
    peak = peaks.get(model.products or model.dtype, peaks.get(model.dtype, 0.0))
    step = Step(model, _number(row, "global_batch"), _number(row, "n_gpus"), peak)
    given = _positive(row, "value")
    assert given is not None
    metric = row["metric"]
    if re.search(r"tflop|mfu", metric.lower()):
        assumed.append("flops are those of weights and of attention without its mask")
    return seconds(metric, given, step)


NOT_SAID = ("", "none", "nan", "null", "n/a", "na", "-", "?", "unknown")


def _positive(row: Row, column: str) -> float | None:
    text = row[column]
    if text.lower() in (*NOT_SAID, *OUT_OF_MEMORY):
        return None
    try:
        found = float(text)
    except ValueError:
        raise SkippedError(f"{column} is {text!r}, no number") from None
    if not (isfinite(found) and found > 0):
        raise SkippedError(f"{column} is {text}, and must be more than 0")
    return found


def _gib(number: float | None) -> float | None:
    return None if number is None else number * GIB


def _flag(row: Row, column: str) -> bool:
    known = FLAGS.get(row[column].lower())
    if known is None:
        raise SkippedError(f"{column} is {row[column]!r}, neither True nor False")
    return known


FLAGS = {**dict.fromkeys(("true", "yes", "y", "t", "1", "1.0", "on"), True)}
FLAGS |= dict.fromkeys(("false", "no", "n", "f", "0", "0.0", "off", *NOT_SAID), False)


def _chunks(row: Row, assumed: list[str]) -> int:
    """Interleaved without a number: two layers for each stage, or one, as MegaScale has it (arXiv
    2402.15627, section 6.1, from memory: six chunks of 12 layers, three of three)."""
    if row["virtual_pp"].lower() not in NOT_SAID or "interleaved" not in row["schedule"].lower():
        return _number(row, "virtual_pp", 1)
    each, left = divmod(_number(row, "layers"), _number(row, "PP", 1))
    found = 1 if left else each // 2 if each % 2 == 0 else each
    assumed.append(f"virtual_pp is {max(1, found)}")
    return max(1, found)


def _microbatch(row: Row, assumed: list[str]) -> int:
    if row["micro_batch"].lower() in NOT_SAID:
        assumed.append("micro_batch is 1")
    return _number(row, "micro_batch", 1)


def _zero(text: str, data: int) -> tuple[int, int, int]:
    """Devices that shard, replicas of these, level; of HSDP those of a host shard."""
    said = text.lower()
    if said.startswith("hsdp"):
        return (8, data // 8, 3) if data % 8 == 0 and data > 8 else (data, 1, 3)
    if "fsdp" in said:
        return data, 1, 3
    if said in WHOLE:
        return data, 1, 0
    found = re.fullmatch(r"(?:.*zero|stage)?[ _-]*([0-3])(?:\.0)?", said)
    if found:
        return data, 1, int(found[1])
    if re.fullmatch(r"dist\w*[ _-]*opt\w*", said):
        return data, 1, 1
    raise SkippedError(f"zero_fsdp is {text!r}: not known")


WHOLE = ("false", "no", "ddp", "off")

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
)


ON_HOST = "activations are kept by the host, and their way there and back is hidden"
"""Their memory is not looked at then: the row does not say which of them."""

ASSUMED_RECOMPUTED = frozenset(what for *_, what in RECOMPUTE if what)


def _recompute(text: str, layers: float, flash: bool, assumed: list[str]) -> tuple[str, float]:
    """What is recomputed, and in which part of the ``layers`` of a stage. Where that is not said,
    ``flash`` attention leaves nothing that would be worth it."""
    said = text.lower()
    if said in NOT_SAID:
        return "none", 1.0
    if said == "selective":
        return "attention", 1.0  # as arXiv 2205.05198 has it
    if "activation offload" in said:
        assumed.append(ON_HOST)
        return "none", 1.0
    for begins, kind, what in RECOMPUTE:
        if said.startswith(begins):
            if what == "attention is recomputed" and flash:
                kind = "none"
                what = "nothing is recomputed"
            assumed += [what] * bool(what)
            return kind, _part(said, layers)
    raise SkippedError(f"recomputes in a way that has no name here: {text}")


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


def _experts(row: Row, degrees: Degrees, program: Program, narrow: bool) -> Experts | None:
    """A group for each part of the sequence that a device has."""
    count = _number(row, "n_experts", 1)
    if count == 1:
        if degrees.experts > 1:
            raise SkippedError("EP is given, and n_experts is not")
        return None
    if not _flag(row, "gated_mlp"):
        raise SkippedError("experts that are not gated: not among the blocks of a Transformer")
    groups = degrees.context * (degrees.tensor if degrees.between == "sequence" else 1)
    if _number(row, "seq_len") % groups:
        raise SkippedError(f"a sequence of {row['seq_len']} cannot be {groups} equal parts")
    ffn = _number(row, "moe_ffn")
    whole = narrow and program.has("whole_experts") and _is_joined(topology(_machine(row, degrees)))
    apart = program.is_megatron and not whole
    dropping = _is_padded_to_capacity(row)
    free = apart and not dropping
    return Experts(
        count,
        _number(row, "topk"),
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
    window, length = _size(row, "sliding_window"), _number(row, "seq_len")
    if not window or window >= length:
        return 0
    turns = max(1, _size(row, "sliding_window_pattern"))
    near, every = min(length, window + BLOCK), attended(length) * length
    return round((every + (turns - 1) * near) / turns) if turns > 1 else near


def _size(row: Row, column: str) -> int:
    """Of what the family's publication says where the row does not; 0: it has no such thing."""
    return _number(row, column, families.published(row["model_family"]).get(column, 0))


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
    if row["ffn"].lower() not in NOT_SAID or _flag(row, "gated_mlp"):
        if row["ffn"].lower() in NOT_SAID and _number(row, "n_experts", 1) > 1:
            return _number(row, "moe_ffn")
        return _number(row, "ffn")
    assumed.append("ffn is four times hidden")
    return 4 * _number(row, "hidden")


def _is_parallel(row: Row) -> bool:
    """Whether attention and MLP of a block read the same."""
    return bool(_size(row, "use_parallel_residual")) or "parallel block" in row["notes"].lower()


def _model(row: Row, degrees: Degrees, program: Program, assumed: list[str]) -> Transformer:
    precision = row["precision"].lower().replace("amp_", "").replace("fp8-mx", "mxfp8")
    dtype = next((name for key, name in DTYPES.items() if precision.startswith(key)), None)
    if dtype is None:
        raise SkippedError(f"precision is {row['precision']!r}: not known")
    products = next((name for key, name in PRODUCTS.items() if precision.startswith(key)), None)
    gated, flash = _flag(row, "gated_mlp"), _flag(row, "flash_attn")
    engine = program.is_megatron and _has_engine(topology(_machine(row, degrees)))
    family, heads = row["model_family"], _number(row, "heads")
    layers = _number(row, "layers")
    if layers > MOST_LAYERS:
        raise SkippedError(f"layers is {layers}, more than the {MOST_LAYERS} that are built here")
    return Transformer(
        layers=layers,
        width=_number(row, "hidden"),
        heads=heads,
        kv_heads=_number(row, "kv_heads", heads),
        ffn=_ffn(row, assumed),
        vocabulary=padded(_number(row, "vocab"), degrees.tensor, always=program.is_megatron),
        length=_number(row, "seq_len"),
        gated=gated,
        biased=not gated,
        flash=flash,
        dropout=not flash,
        tied=not gated,
        fused_loss=family.startswith("MPT") or engine,
        dtype=dtype,
        head_width=_number(row, "head_dim", 0) or None,
        products=products,
        experts=_experts(row, degrees, program, products is not None),
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


def padded(vocabulary: int, tensor: int, *, always: bool = False) -> int:
    """As Megatron-LM does, to a multiple of 128 for each tensor-parallel device; other programs
    only where it is divided.

    >>> padded(50257, 1), padded(50257, 2), padded(51200, 8), padded(50257, 1, always=True)
    (50257, 50432, 51200, 50304)
    """
    if tensor == 1 and not always:
        return vocabulary
    return -(-vocabulary // (128 * tensor)) * 128 * tensor


def _machine(row: Row, degrees: Degrees) -> str:
    said = row["gpu_type"].lower()
    found = (name for pattern, name in OTHER_NAMES if re.search(pattern, said))
    name = MACHINES.get(row["gpu_type"]) or next(found, None)
    if name is None:
        raise SkippedError(f"no topology for {row['gpu_type']}")
    devices, host = _number(row, "n_gpus"), _number(row, "gpus_per_node", 8)
    if degrees.devices != devices:
        raise SkippedError(f"degrees make {degrees.devices} devices, and n_gpus is {devices}")
    if devices <= host:
        return f"1x{devices}x{name}"
    used = next((n for n in range(host, 0, -1) if devices % n == 0 and (n == host or n >= 8)), 0)
    if not used:  # of a rack of 72, 64 make 128, 256, ... devices
        raise SkippedError(f"{devices} devices are not whole hosts of {host}")
    return f"{devices // used}x{used}x{name}"


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
                estimate, strategy, found = _estimate(run, machine, prices, cache)
                of = found.graph, found.rules, machine, strategy
                estimate = banded(*of, estimate)
            except (AutoparError, ValueError) as error:
                yield run, error
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


def _is_judged(compared: Compared, machine: CostModel) -> bool:
    """Whether what is assumed to be recomputed does not decide if it fits."""
    run = compared.run
    if ON_HOST in run.assumed:
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
