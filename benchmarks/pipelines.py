"""Predicted against measured: plans of several stages, trained on four processes of this machine.

For each model the machine is measured, plans are written and priced, and each is trained for some
steps, one after the other in the same four processes. Run as ``python -m benchmarks.pipelines
OUT.csv``; ``--report OUT.csv`` prints what a file says.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any, get_type_hints

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812

from autopar import __version__, api
from autopar.ir.graph import OperatorGraph
from autopar.ir.plan import Plan, load_plan, save_plan
from autopar.ir.rule import NOTHING
from autopar.ir.sharding import Mesh
from autopar.ir.strategy import Stage, Storage, Strategy
from autopar.runtime.launch import torchrun
from autopar.runtime.profiler import cores, profile
from autopar.runtime.rehearsal import rehearse
from autopar.simulator.blocks import blocks
from autopar.simulator.staged import block_starts, even_cuts, runs, staged
from cost_models.profiled import Profile, Profiled

DEVICES = 4
STEPS = 9
"""The first of which warms up."""

PROFILE_S = 14.0
MODELS = {
    "gpt": "examples/gpt/model.py",
    "llama": "benchmarks/models/llama.py",
    "unet": "benchmarks/models/unet.py",
    "two_towers": "benchmarks/models/two_towers.py",
}


@dataclass(frozen=True)
class Case:
    """A plan by hand. ``stages``: how many, on as many groups of devices, or, of schedules with
    chunks, twice as many as groups. ``inside``: a recipe for the devices of a group."""

    model: str
    schedule: str
    stages: int
    groups: int
    microbatches: int
    inside: str = "alone"
    recompute: bool = False


TOWERS = -1
"""Stages: each tower, and what joins them on a pair of devices."""

CASES = (
    Case("gpt", "gpipe", 4, 4, 4),
    Case("gpt", "1f1b", 4, 4, 4),
    Case("gpt", "1f1b", 4, 4, 8),
    Case("gpt", "zero_bubble_h1", 4, 4, 8),
    Case("gpt", "chimera", 4, 4, 8),
    Case("gpt", "interleaved_1f1b", 4, 2, 4, "data_parallel"),
    Case("gpt", "1f1b", 2, 2, 4, "data_parallel"),
    Case("gpt", "1f1b", 2, 2, 4, "megatron"),
    Case("gpt", "gpipe", 2, 2, 4, "zero3"),
    Case("gpt", "1f1b", 4, 4, 8, recompute=True),
    Case("llama", "gpipe", 4, 4, 8),
    Case("llama", "1f1b", 4, 4, 8),
    Case("llama", "zero_bubble_h1", 4, 4, 4),
    Case("llama", "chimera", 4, 4, 4),
    Case("llama", "looped_bfs", 4, 2, 4, "data_parallel"),
    Case("llama", "1f1b", 2, 2, 8, "zero1"),
    Case("llama", "gpipe", 2, 2, 4, "megatron"),
    Case("llama", "1f1b", 2, 2, 4, "megatron", recompute=True),
    Case("unet", "gpipe", 4, 4, 8),
    Case("unet", "1f1b", 4, 4, 4),
    Case("unet", "zero_bubble_h1", 4, 4, 4),
    Case("unet", "1f1b", 2, 2, 4, "data_parallel"),
    Case("unet", "gpipe", 2, 2, 4, "zero2"),
    Case("two_towers", "gpipe", TOWERS, 3, 4),
    Case("two_towers", "1f1b", TOWERS, 3, 8),
    Case("two_towers", "zero_bubble_h1", TOWERS, 3, 4),
    Case("two_towers", "1f1b", 2, 2, 4, "data_parallel"),
    Case("two_towers", "1f1b", 4, 4, 8),
)


@dataclass(frozen=True)
class Row:
    """One plan. ``load_average``: before its steps, the benchmark's own processes included.
    ``slower``: how many times as long as in the profile a product and a pass took with all
    processes busy, just before the plan's steps and after them: what others did on the machine."""

    model: str
    plan: str
    schedule: str
    stages: int
    microbatches: int
    predicted_step_s: float
    measured_step_s: float
    least_step_s: float
    most_step_s: float
    predicted_peak_bytes: int
    measured_peak_bytes: int
    load_average: float
    slower: float
    machine: str
    cores: int
    date: str

    @property
    def ratio(self) -> float:
        return self.predicted_step_s / self.measured_step_s

    @property
    def ratio_then(self) -> float:
        """With the machine as it was while the plan ran."""
        return self.ratio * self.slower


# ---- plans ---------------------------------------------------------------------------------------


@lru_cache(maxsize=None)
def graph_of(model: str) -> OperatorGraph:
    return api.extract(MODELS[model])


def plan_of(case: Case, machine: Profiled) -> Plan:
    graph = graph_of(case.model)
    if case.stages == TOWERS:
        operators = towers(graph)
        like = [recipe(case, machine, size, name) for size, name in TOWER_DEVICES]
        devices: Sequence[tuple[int, ...]] | None = ((0,), (1,), (2, 3))
    else:
        operators = runs(graph, cuts(graph, case.stages))
        like = [recipe(case, machine, DEVICES // case.groups, case.inside)] * case.stages
        devices = None
    strategy = staged(graph, operators, like, case.schedule, case.microbatches, devices=devices)
    if case.recompute:
        strategy = replace(strategy, recompute=inside_blocks(graph))
    return api.plan_by_hand(graph, strategy, machine, model=MODELS[case.model])


TOWER_DEVICES = ((1, "alone"), (1, "alone"), (2, "data_parallel"))


def towers(graph: OperatorGraph) -> list[tuple[str, ...]]:
    def stage(module: str) -> int:
        return next((i for i, name in enumerate(("query", "item")) if module.startswith(name)), 2)

    return [
        tuple(o.name for o in graph.operators if stage(o.module) == number) for number in range(3)
    ]


def cuts(graph: OperatorGraph, stages: int) -> Sequence[int]:
    """Between equal blocks where there are so many, else into runs of as many operators."""
    count = len(graph.operators)
    if len(block_starts(graph)) >= stages:
        return even_cuts(graph, stages)
    return [round(count * k / stages) for k in range(1, stages)]


def inside_blocks(graph: OperatorGraph) -> tuple[str, ...]:
    """All of each block but what makes its output."""
    names = [o.name for o in graph.operators]
    return tuple(
        name
        for block in blocks(graph)
        if block.period > 5
        for copy in range(block.copies)
        for name in names[block.start + copy * block.period :][: block.period - 1]
    )


def recipe(case: Case, machine: Profiled, devices: int, name: str) -> Strategy:
    if devices == 1:
        return alone(graph_of(case.model))
    return recipes(case.model, case.microbatches, devices, machine)[name]


@lru_cache(maxsize=None)
def recipes(model: str, microbatches: int, devices: int, machine: Profiled) -> dict[str, Strategy]:
    """By name, for one stage on so many devices."""
    found = api.search(
        graph_of(model),
        topology=replace(machine, profile=replace(machine.profile, devices=devices)),
        mesh=(devices,),
        microbatches=microbatches,
        time_limit_s=5.0,
    )
    return {t.name: t.strategy for t in found.trials if t.outcome == "recipe" and t.strategy}


def alone(graph: OperatorGraph) -> Strategy:
    mesh, whole = Mesh((("device", 1),)), ("I",)
    return Strategy(
        (Stage(tuple(o.name for o in graph.operators), (0,), mesh),),
        {o.name: (NOTHING,) for o in graph.operators},
        {p.name: Storage(whole, whole, whole) for p in graph.parameters},
    )


# ---- measuring -----------------------------------------------------------------------------------


def measured(model: str) -> Iterator[Row]:
    """All plans of a model, priced with what the machine does now."""
    say(f"{model}: measuring the machine")
    before = profile(DEVICES, PROFILE_S)
    machine = Profiled(before)
    cases = [case for case in CASES if case.model == model]
    with tempfile.TemporaryDirectory(prefix="autopar-benchmark-") as name:
        folder = Path(name)
        for number, case in enumerate(cases):
            save_plan(plan_of(case, machine), folder / f"{number}.json")
        say(f"{model}: training {len(cases)} plans")
        code = torchrun(DEVICES, "benchmarks.pipelines", ["--worker", str(folder)])
        if code:
            raise SystemExit(f"the processes of {model} ended with {code}")
        for number, case in enumerate(cases):
            plan = load_plan(folder / f"{number}.json")
            found = json.loads((folder / f"{number}.result").read_text())
            yield row_of(case, plan, found, slower(before, found["reference_s"]), before.device)


def row_of(case: Case, plan: Plan, found: dict[str, Any], slower: float, device: str) -> Row:
    steps_s = found["step_times_s"][1:]
    inside = [name for name in (case.inside,) if name != "alone"]
    inside += ["recompute"] if case.recompute else []
    groups = "two towers and a pair" if case.stages == TOWERS else f"{case.groups} groups"
    return Row(
        model=case.model,
        plan=", ".join((groups, *inside)),
        schedule=case.schedule,
        stages=len(plan.strategy.stages),
        microbatches=case.microbatches,
        predicted_step_s=plan.estimate.step_time_s,
        measured_step_s=statistics.median(steps_s),
        least_step_s=min(steps_s),
        most_step_s=max(steps_s),
        predicted_peak_bytes=plan.estimate.peak_memory_bytes,
        measured_peak_bytes=found["peak_memory_bytes"],
        load_average=found["load_average"],
        slower=slower,
        machine=device,
        cores=cores(),
        date=datetime.now(UTC).date().isoformat(),
    )


def slower(profile: Profile, reference_s: Sequence[float]) -> float:
    """The geometric mean of how many times as long a product and a pass took."""
    (product_s,) = (
        p.seconds for p in profile.products if (p.dtype, p.shape) == ("float32", (1, *PRODUCT))
    )
    (pass_s,) = (p.seconds for p in profile.passes if (p.dtype, p.bytes) == ("float32", PASS_BYTES))
    ratios = [s / known_s for s, known_s in zip(reference_s, (product_s, pass_s), strict=True)]
    return math.sqrt(math.prod(ratios))


PRODUCT, PASS_BYTES = (256, 256, 256), 2**21
"""Of what the profile has, in float32."""

REFERENCE_S = 0.4


def work(folder: Path) -> None:
    """One of the processes: train each plan in turn."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for path in sorted(folder.glob("[0-9]*.json"), key=lambda path: int(path.stem)):
        plan, load_average = load_plan(path), os.getloadavg()[0]
        before_s = references_s()
        found = rehearse(plan, api.source_of(plan), STEPS, seed=0)
        around_s = [math.sqrt(a * b) for a, b in zip(before_s, references_s(), strict=True)]
        if dist.get_rank() == 0:
            result = {**asdict(found), "load_average": load_average, "reference_s": around_s}
            (folder / f"{path.stem}.result").write_text(json.dumps(result))


def references_s() -> list[float]:
    """Seconds of a product and of a pass while all processes do the same, as the profiler does
    them."""
    m, n, k = PRODUCT
    left, right = torch.randn(m, k), torch.randn(n, k)
    values = torch.randn(PASS_BYTES // 2 // 4 // 64, 64)  # read and written
    found = []
    for call in (lambda: F.linear(left, right), lambda: three_passes(values)):
        dist.barrier()
        found.append(steady_s(call, REFERENCE_S))
    total = torch.tensor(found, dtype=torch.float64)
    dist.all_reduce(total)
    product_s, passes_s = (total / DEVICES).tolist()
    return [product_s, passes_s / 3]


def three_passes(values: torch.Tensor) -> None:
    torch.mul(values, 2.0)
    F.gelu(values)
    F.layer_norm(values, (64,))


def steady_s(call: Callable[[], Any], budget_s: float) -> float:
    began_s, calls = time.perf_counter(), 0
    while (elapsed_s := time.perf_counter() - began_s) < budget_s:
        call()
        calls += 1
    return elapsed_s / calls


# ---- what a file says ----------------------------------------------------------------------------


def report(rows: Sequence[Row]) -> str:
    columns = ["model", "plan", "schedule", "stages", "microbatches"]
    columns += ["predicted ms", "measured ms", "error", "machine then", "error then"]
    columns += ["peak MB predicted", "measured"]
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        spread = f"{1e3 * row.least_step_s:.0f}-{1e3 * row.most_step_s:.0f}"
        lines.append(
            [
                row.model,
                row.plan,
                f"`{row.schedule}`",
                str(row.stages),
                str(row.microbatches),
                f"{1e3 * row.predicted_step_s:.0f}",
                f"{1e3 * row.measured_step_s:.0f} ({spread})",
                f"{row.ratio - 1:+.0%}",
                f"{row.slower:.2f}",
                f"{row.ratio_then - 1:+.0%}",
                f"{row.predicted_peak_bytes / 1e6:.1f}",
                f"{row.measured_peak_bytes / 1e6:.1f}",
            ]
        )
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{summary(rows)}"


def summary(rows: Sequence[Row]) -> str:
    loads = [row.load_average for row in rows]
    of_peaks = [abs(row.predicted_peak_bytes / row.measured_peak_bytes - 1) for row in rows]
    return (
        f"{len(rows)} plans on {rows[0].machine}, {rows[0].cores} cores, {rows[0].date}, load "
        f"average {min(loads):.1f} to {max(loads):.1f}. Step time: "
        f"{errors(rows, lambda row: row.ratio)}; with the machine as it was then: "
        f"{errors(rows, lambda row: row.ratio_then)}. Peak memory: median error "
        f"{statistics.median(of_peaks):.1%}, worst {max(of_peaks):.1%}."
    )


def errors(rows: Sequence[Row], ratio: Callable[[Row], float]) -> str:
    worst = max(rows, key=lambda row: abs(math.log(ratio(row))))
    median = statistics.median(abs(ratio(row) - 1) for row in rows)
    times = [(ratio(row) * row.measured_step_s, row.measured_step_s) for row in rows]
    return (
        f"median error {median:.0%}, worst {ratio(worst) - 1:+.0%} ({worst.model}, {worst.plan}, "
        f"`{worst.schedule}`), Kendall's tau {kendall_tau(times):.2f}"
    )


def kendall_tau(pairs: Sequence[tuple[float, float]]) -> float:
    """How many two of them are in the same order by both numbers, less those that are not, as a
    share of all: of three of which two are the wrong way round, (2 - 1) / 3."""
    signs = [(a[0] - b[0]) * (a[1] - b[1]) for a, b in combinations(pairs, 2)]
    return sum((sign > 0) - (sign < 0) for sign in signs) / len(signs)


def read(path: Path) -> list[Row]:
    kinds = get_type_hints(Row)
    with path.open() as file:
        lines = csv.DictReader(line for line in file if not line.startswith("#"))
        return [Row(**{name: kinds[name](value) for name, value in line.items()}) for line in lines]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Row by row, so that what was measured stays if the rest fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(f"# autopar {__version__}, torch {torch.__version__}, ")
        file.write(f"Python {platform.python_version()}: python -m benchmarks.pipelines {path}\n")
        lines = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        lines.writeheader()
        for row in rows:
            lines.writerow(asdict(row))
            file.flush()


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", help="the CSV file to write")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--report", type=Path, help="print what this file says; measure nothing")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker)
        return
    path = arguments.report
    if path is None:
        path = arguments.out
        if path is None:
            parser.error("say which file to write, or --report which to read")
        write(path, (row for model in arguments.models for row in measured(model)))
    print(report(read(path)))


if __name__ == "__main__":
    main()
