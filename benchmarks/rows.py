"""Rows of tables of published runs: what they say of a Transformer, a machine and degrees of
parallelism, and what was measured.

What a row cannot be read as is told by its column, what it says and what would be read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from autopar.ir.strategy import Training
from autopar.recipes import Degrees
from autopar.simulator.costs import BLOCK, attended
from benchmarks import cells, families
from benchmarks.assumed import LARGEST, choices, settled
from benchmarks.cells import OUT_OF_MEMORY, Row, SkippedError, is_said, number, positive
from benchmarks.programs import Program, program_of
from benchmarks.rates import Step, seconds
from benchmarks.recomputed import recomputed
from benchmarks.runs import Run, has_engine, is_newer
from benchmarks.transformer import Experts, Latent, Transformer
from cost_models import Topology, topology

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


def run_of(row: Row) -> Run:
    """
    Raises:
        SkippedError: it has something that no strategy of ours says, or leaves something open.
    """
    assumed: list[str] = []
    row = settled(cleaned(row), assumed)
    machine = _machine(row)
    network = _network(row, topology(machine), assumed)
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
    flash = _is(row, "flash_attn")
    recompute, part = recomputed(row, layers, assumed, flash=flash)
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
"""Longer pipelines take minutes to play, and no published run has a tenth of it."""

GIB = 2**30


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
    return is_newer(machine) and (domain > machine.host_size or machine.devices <= domain)


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
    engine = program.is_megatron and has_engine(topology(machine))
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


def _network(row: Row, machine: Topology, assumed: list[str]) -> float | None:
    """Of a device, if the row tells it and there is a network."""
    if len(machine.tiers) == 1:
        return None
    usual = machine.tiers[-1].bytes_per_s
    found = cells.network_bytes_per_s(row["inter"], number(row, "gpus_per_node", 8), usual)
    if found is None:
        return None
    bytes_per_s, what = found
    assumed += [what] * bool(what)
    return None if bytes_per_s == usual else bytes_per_s


__all__ = ["COLUMNS", "GIB", "MACHINES", "OPTIONAL", "cleaned", "padded", "run_of"]
