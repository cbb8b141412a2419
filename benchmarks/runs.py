"""Published runs as strategies, their predictions, and how good these are.

A row of a table is a run that somebody reported: a Transformer's sizes, a machine, degrees of
parallelism, and a time or a memory that was measured. It is planned as any model is: the same graph
types, recipe from numbers, prices, memory and timeline.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from statistics import fmean

from autopar.errors import AutoparError
from autopar.ir.simulation import Estimate
from autopar.ir.strategy import Training
from autopar.recipes import Degrees, hybrid
from autopar.simulator.costs import ComputeCache
from autopar.simulator.listing import Structure
from autopar.simulator.microbatches import division
from autopar.simulator.pipelines import StagePrices, evaluate_stages
from autopar.simulator.prices import evaluate
from benchmarks.transformer import Transformer
from cost_models import cost_model
from cost_models.interface import CostModel

Row = dict[str, str]

COLUMNS = (
    *("config_id", "source", "model_family", "layers", "hidden", "heads", "kv_heads", "head_dim"),
    *("ffn", "gated_mlp", "vocab", "seq_len", "global_batch", "micro_batch", "gpu_type", "n_gpus"),
    *("gpus_per_node", "TP", "PP", "virtual_pp", "DP", "CP", "EP", "n_experts", "zero_fsdp"),
    *("sequence_parallel", "recompute", "flash_attn", "precision", "schedule", "metric", "value"),
    "iter_time_s",
)
"""That are read; a table may have others."""

MACHINES = {
    "A100-80GB-SXM": "a100-sxm-80gb",
    "A100-40GB-SXM": "a100-sxm-40gb",
    "H100-80GB-SXM": "h100-sxm",
    "V100-32GB-SXM(DGX-2H)": "v100-sxm2-32gb",
    "V100-16GB-SXM (p3.16xlarge)": "v100-sxm2-16gb",
    "B200-180GB": "b200-sxm",
    "B300-288GB": "b300-sxm",
    "GB200-NVL72": "gb200-nvl72",
    "GB300-NVL72": "gb300-nvl72",
}
"""By the column ``gpu_type``, the machine of ``autopar list topologies``."""

DTYPES = {"fp16": "float16", "bf16": "bfloat16"}

OUT_OF_MEMORY = "oom"
GIB = 2**30


class SkippedError(Exception):
    """Why a row is not predicted."""


@dataclass(frozen=True)
class Run:
    """What a row says. ``step_s``, ``memory_bytes``: what was measured, if it was; ``ran_out``: of
    memory; else, if something was measured, it fitted."""

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


@dataclass(frozen=True)
class Compared:
    run: Run
    step_s: float
    memory_bytes: int
    limit_bytes: int

    @property
    def step_error(self) -> float | None:
        return None if self.run.step_s is None else self.step_s / self.run.step_s - 1

    @property
    def memory_error(self) -> float | None:
        of = self.run.memory_bytes
        return None if of is None else self.memory_bytes / of - 1

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.limit_bytes


# ---- from a row to a run -------------------------------------------------------------------------


def run_of(row: Row) -> Run:
    """
    Raises:
        SkippedError: it has something that no strategy of ours says, or leaves something open.
    """
    _check_supported(row)
    tensor = _number(row, "TP")
    pipeline, data = _number(row, "PP"), _number(row, "DP")
    sharded, replicas, zero = _zero(row["zero_fsdp"], data)
    degrees = Degrees(
        tensor=tensor,
        pipeline=pipeline,
        data=sharded,
        replicas=replicas,
        chunks=_chunks(row),
        microbatch=_number(row, "micro_batch"),
        between="sequence" if row["sequence_parallel"] == "True" and tensor > 1 else "whole",
        zero=zero,
        recompute=_recompute(row["recompute"]),
        context=_number(row, "CP"),
    )
    value = row["value"].strip()
    memory = row["metric"].startswith("peak_mem")
    ran_out = value.lower() == OUT_OF_MEMORY
    return Run(
        name=row["config_id"],
        source=row["source"],
        model=_model(row, tensor),
        machine=_machine(row, degrees),
        degrees=degrees,
        training=Training("adam", "full" if "PURE" in row["precision"] else "mixed"),
        batch=_number(row, "global_batch"),
        step_s=float(row["iter_time_s"]) if row["iter_time_s"] and not memory else None,
        memory_bytes=float(value) * GIB if memory and not ran_out else None,
        ran_out=ran_out,
    )


def _check_supported(row: Row) -> None:
    for column, what in (
        ("EP", "experts"),
        ("n_experts", "experts"),
    ):
        if row[column] not in ("", "1"):
            raise SkippedError(f"{what}: no degree of a recipe")
    if "MLA" in row["model_family"]:
        raise SkippedError("latent attention: not among the sizes of a Transformer")
    if "fp8" in row["precision"].lower() or "fp4" in row["precision"].lower():
        raise SkippedError("products in 8 or 4 bits: not priced")


def _number(row: Row, column: str) -> int:
    if not row[column]:
        raise SkippedError(f"{column} is not given")
    try:
        found = int(float(row[column]))
    except ValueError:
        raise SkippedError(f"{column} is {row[column]!r}, no number") from None
    if found < 1:
        raise SkippedError(f"{column} is {row[column]}, and must be at least 1")
    return found


def _chunks(row: Row) -> int:
    if not row["virtual_pp"]:
        if "interleaved" in row["schedule"]:
            raise SkippedError("virtual_pp is not given")
        return 1
    return _number(row, "virtual_pp")


def _zero(text: str, data: int) -> tuple[int, int, int]:
    """Devices that shard, replicas of these, level; of HSDP those of a host shard."""
    if text.startswith("HSDP"):
        return (8, data // 8, 3) if data % 8 == 0 and data > 8 else (data, 1, 3)
    if "ZeRO-3" in text:
        return data, 1, 3
    if text in ("0", "1", "2", "3"):
        return data, 1, int(text)
    raise SkippedError(f"zero_fsdp is {text!r}: not known")


RECOMPUTE: tuple[tuple[Callable[[str], bool], str], ...] = (
    (lambda text: text.startswith("none") and "or" not in text, "none"),
    (lambda text: text.startswith("unspecified") and "none" in text, "none"),
    (lambda text: text in ("full", "full(remat)"), "full"),
    (lambda text: text == "selective", "attention"),  # as arXiv 2205.05198 has it
)


def _recompute(text: str) -> str:
    for means, kind in RECOMPUTE:
        if means(text):
            return kind
    raise SkippedError(f"recomputes in a way that has no name here: {text}")


def _model(row: Row, tensor: int) -> Transformer:
    precision = row["precision"].lower().replace("amp_", "")
    dtype = next((name for key, name in DTYPES.items() if precision.startswith(key)), None)
    if dtype is None:
        raise SkippedError(f"precision is {row['precision']!r}: not known")
    gated, flash = row["gated_mlp"] == "True", row["flash_attn"] == "True"
    family = row["model_family"]
    return Transformer(
        layers=_number(row, "layers"),
        width=_number(row, "hidden"),
        heads=_number(row, "heads"),
        kv_heads=_number(row, "kv_heads"),
        ffn=_number(row, "ffn"),
        vocabulary=padded(_number(row, "vocab"), tensor),
        length=_number(row, "seq_len"),
        gated=gated,
        biased=not gated and not family.startswith("MPT"),
        flash=flash,
        dropout=not flash,
        tied=not gated,
        dtype=dtype,
        head_width=int(row["head_dim"]) if row["head_dim"] else None,
    )


def padded(vocabulary: int, tensor: int) -> int:
    """As Megatron-LM does, to a multiple of 128 for each tensor-parallel device.

    >>> padded(50257, 1), padded(50257, 2), padded(51200, 8)
    (50257, 50432, 51200)
    """
    return vocabulary if tensor == 1 else -(-vocabulary // (128 * tensor)) * 128 * tensor


def _machine(row: Row, degrees: Degrees) -> str:
    name = MACHINES.get(row["gpu_type"])
    if name is None:
        raise SkippedError(f"no topology for {row['gpu_type']}")
    devices, host = _number(row, "n_gpus"), min(8, _number(row, "gpus_per_node"))
    if degrees.devices != devices:
        raise SkippedError(f"degrees make {degrees.devices} devices, and n_gpus is {devices}")
    if devices <= host:
        return f"1x{devices}x{name}"
    if devices % host:
        raise SkippedError(f"{devices} devices are not whole hosts of {host}")
    return f"{devices // host}x{host}x{name}"


# ---- from runs to predictions --------------------------------------------------------------------


def predicted(runs: Iterable[Run]) -> Iterator[tuple[Run, Compared | Exception]]:
    """Or why there is no prediction. Runs that differ in their batch only have the same stages,
    which are priced once."""

    def alike(run: Run) -> tuple[object, ...]:
        return run.machine, run.model, run.degrees, run.training

    for _, group in groupby(sorted(runs, key=lambda run: repr(alike(run))), key=alike):
        together = list(group)
        try:
            machine = cost_model(together[0].machine)
        except ValueError as error:
            yield from ((run, error) for run in together)
            continue
        prices, divided = StagePrices(machine), []
        cache: ComputeCache = {}
        for run in together:
            try:
                estimate, found = _estimate(run, machine, prices, cache)
            except (AutoparError, ValueError) as error:  # the latter of what has no price
                yield run, error
                continue
            divided.append(found)  # prices are kept by its rules
            peak = estimate.peak_memory_bytes
            yield run, Compared(run, estimate.step_time_s, peak, machine.memory_bytes)


def _estimate(
    run: Run, machine: CostModel, prices: StagePrices, cache: ComputeCache
) -> tuple[Estimate, object]:
    count = run.degrees.microbatches(run.batch)
    found = division(run.model.graph(run.batch), count)
    structure = Structure(found.graph, found.rules)
    strategy = hybrid(found, run.degrees, machine, run.training, structure)
    if len(strategy.stages) > 1:
        return evaluate_stages(found, machine, strategy, prices), found
    alike = structure.folded_in_runs(tuple(frozenset[int]() for _ in structure.blocks))
    estimate = evaluate(
        found.graph, found.rules, machine, strategy, compute_cache=cache, folded=alike
    )
    return estimate, found


# ---- what is said of them ------------------------------------------------------------------------


@dataclass(frozen=True)
class Quality:
    """Of the rows of one source. Errors are relative; mean and largest are of their size, ``bias``
    is their mean with its sign. ``None`` where nothing of the kind was measured."""

    source: str
    rows: int
    predicted: int
    skipped: dict[str, int]
    step_mean: float | None
    step_bias: float | None
    step_largest: float | None
    tau: float | None
    memory_mean: float | None
    memory_largest: float | None
    false_fits: int
    false_rejects: int


def quality(source: str, compared: Sequence[Compared], skipped: Counter[str]) -> Quality:
    steps = [(one.step_error, one) for one in compared]
    errors = [error for error, _ in steps if error is not None]
    memory = [one.memory_error for one in compared if one.memory_error is not None]
    pairs = [(one.run.step_s, one.step_s) for one in compared if one.run.step_s is not None]
    return Quality(
        source,
        len(compared) + skipped.total(),
        len(compared),
        dict(skipped.most_common()),
        _mean(map(abs, errors)),
        _mean(errors),
        max(map(abs, errors), default=None),
        kendall_tau(pairs),
        _mean(map(abs, memory)),
        max(map(abs, memory), default=None),
        sum(one.run.ran_out and one.fits for one in compared),
        sum(not one.run.ran_out and not one.fits for one in compared),
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
    skipped = defaultdict[str, Counter[str]](Counter)
    sources: dict[str, list[Compared]] = {}
    for row in rows:
        sources.setdefault(row["source"], [])
        try:
            runs.append(run_of(row))
        except SkippedError as reason:
            skipped[row["source"]][str(reason)] += 1
    for run, answer in predicted(runs):
        if isinstance(answer, Compared):
            sources[run.source].append(answer)
        else:
            skipped[run.source][str(answer)] += 1
    everything = [one for compared in sources.values() for one in compared]
    whole = Counter[str]()
    for reasons in skipped.values():
        whole.update(reasons)
    found = [quality(source, of, skipped[source]) for source, of in sources.items()]
    return [*found, quality("all", everything, whole)], everything


def share(number: float | None) -> str:
    """
    >>> share(0.123), share(None)
    ('12.3%', '-')
    """
    return "-" if number is None else f"{number:.1%}"
