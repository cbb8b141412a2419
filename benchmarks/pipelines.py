"""Predicted against measured: plans of one stage and of several, on four processes of this machine.

For each model, plans are written and searched. Then the same four processes measure the machine and
train every plan in turn, in several rounds, so that what else runs on the machine meets all alike;
the plans are priced with what the machine did in the quietest of these rounds. Run as ``python -m
benchmarks.pipelines OUT.csv``; ``--report OUT.csv`` prints what a file says.
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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any, get_type_hints

import torch
import torch.distributed as dist

from autopar import __version__, api
from autopar.ir.graph import OperatorGraph
from autopar.ir.plan import Plan, load_plan, save_plan
from autopar.ir.rule import NOTHING
from autopar.ir.sharding import Mesh
from autopar.ir.simulation import Estimate
from autopar.ir.strategy import Stage, Storage, Strategy
from autopar.runtime.bench import Bench, Rounds, profile_of, quietest_half
from autopar.runtime.devices import MeasuredDevice, cores, processor_seconds
from autopar.runtime.launch import torchrun
from autopar.runtime.profiler import machine_fingerprint, profile, save
from autopar.runtime.rehearsal import Ready, prepare
from autopar.simulator.blocks import blocks
from autopar.simulator.staged import block_starts, even_cuts, runs, staged
from cost_models.profiled import Profile, Profiled, read_profile

DEVICES = 4
ROUNDS, STEPS = 8, 3
"""In each round each plan takes so many steps, after one that warms up."""

PROFILE_S, ROUND_S, SPEEDS_S = 10.0, 3.0, 0.3
"""How long the machine is measured: for the search, in a round, and each time that some devices are
measured with and without the others."""

SEARCH_S = 30.0
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

    @property
    def text(self) -> str:
        """What the table calls it."""
        if self.stages == SEARCHED:
            return "searched"
        inside = [name for name in (self.inside,) if name != "alone"]
        inside += ["recompute"] if self.recompute else []
        towers = "two towers and a pair" if self.stages == TOWERS else f"{self.groups} groups"
        return ", ".join(([] if self.stages == 1 else [towers]) + inside)


SEARCHED = 0
"""Stages: as the search finds them, and everything else, too."""

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
    Case("gpt", "", 1, 1, 1, "data_parallel"),
    Case("gpt", "", 1, 1, 1, "zero3"),
    Case("gpt", "", 1, 1, 2, "megatron"),
    Case("gpt", "", SEARCHED, 1, 1),
    Case("llama", "", 1, 1, 1, "data_parallel"),
    Case("llama", "", 1, 1, 2, "zero1"),
    Case("llama", "", 1, 1, 1, "megatron"),
    Case("llama", "", SEARCHED, 1, 1),
    Case("unet", "", 1, 1, 1, "data_parallel"),
    Case("unet", "", SEARCHED, 1, 1),
    Case("two_towers", "", 1, 1, 1, "data_parallel"),
    Case("two_towers", "", SEARCHED, 1, 1),
)


@dataclass(frozen=True)
class Row:
    """One plan. Times are those of a quiet machine, as far as ``leave`` can tell, but for the least
    and the most of all rounds, which are as they were. ``others``: the share of the processors that
    other programs used in the rounds that count, of the plan and of the profile."""

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
    rounds: int
    others: float
    others_of_profile: float
    machine: str
    cores: int
    date: str

    @property
    def ratio(self) -> float:
        return self.predicted_step_s / self.measured_step_s


# ---- plans ---------------------------------------------------------------------------------------


@lru_cache(maxsize=None)
def graph_of(model: str) -> OperatorGraph:
    return api.extract(MODELS[model])


def plan_of(case: Case, machine: Profiled) -> Plan:
    graph = graph_of(case.model)
    if case.stages == SEARCHED:
        return api.plan(MODELS[case.model], topology=machine, time_limit_s=SEARCH_S)
    if case.stages == 1:
        strategy = recipes(case.model, case.microbatches, DEVICES, machine)[case.inside]
        return api.plan_by_hand(graph, strategy, machine, model=MODELS[case.model])
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


def measured(model: str, folder: Path, rounds: int, patience_s: float) -> Iterator[Row]:
    """All plans of a model, written with what the machine does now and priced with what it did in
    the rounds in which they were trained."""
    say(f"{model}: measuring the machine, to search with")
    machine = Profiled(profile(DEVICES, PROFILE_S))
    cases = [case for case in CASES if case.model == model]
    for number, case in enumerate(cases):
        say(f"{model}: {case.text}")
        save_plan(plan_of(case, machine), folder / f"{number}.json")
    say(f"{model}: {rounds} rounds of {len(cases)} plans and the machine")
    asked = ["--worker", str(folder), "--rounds", str(rounds), "--patience", str(patience_s)]
    code = torchrun(DEVICES, "benchmarks.pipelines", asked)
    if code:
        raise SystemExit(f"the processes of {model} ended with {code}")
    found = Profiled(read_profile(folder / "profile.json"))
    for number, case in enumerate(cases):
        plan = load_plan(folder / f"{number}.json")
        result = json.loads((folder / f"{number}.result").read_text())
        yield row_of(case, api.simulate(plan, found), plan, result, found.profile)


def row_of(
    case: Case, estimate: Estimate, plan: Plan, found: dict[str, Any], profile: Profile
) -> Row:
    steps_s = [moment["step_s"] for moment in found["moments"]]
    return Row(
        model=case.model,
        plan=case.text,
        schedule=str(plan.strategy.schedule) if len(plan.strategy.stages) > 1 else "one stage",
        stages=len(plan.strategy.stages),
        microbatches=plan.strategy.microbatches,
        predicted_step_s=estimate.step_time_s,
        measured_step_s=found["step_s"],
        least_step_s=min(steps_s),
        most_step_s=max(steps_s),
        predicted_peak_bytes=plan.estimate.peak_memory_bytes,
        measured_peak_bytes=found["peak_memory_bytes"],
        rounds=len(steps_s),
        others=found["others"],
        others_of_profile=profile.others,
        machine=profile.device,
        cores=cores(),
        date=profile.date,
    )


@dataclass(frozen=True)
class Moment:
    """A plan's step in one round: of the slowest process, the median of some steps. ``stretch``:
    how many times as stretched as the devices do it to each other time was just before and after;
    ``others``: the share of the processors that other programs used. ``processor_s``: what a
    step took of them, all processes together."""

    step_s: float
    processor_s: float
    stretch: float
    others: float


def work(folder: Path, rounds: int, patience: Patience) -> None:
    """One of the processes: in each round measure the machine, and take steps of every plan."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    machine = Bench(DEVICES, 1, MeasuredDevice("cpu"), dtypes=("float32",))
    known = Rounds()
    paths = sorted(folder.glob("[0-9]*.json"), key=lambda path: int(path.stem))
    plans = [load_plan(path) for path in paths]
    ready = [prepare(plan, api.source_of(plan), seed=0) for plan in plans]
    moments: list[list[Moment]] = [[] for _ in ready]
    speeds = []
    for number in range(rounds):
        if dist.get_rank() == 0:
            say(f"round {number + 1} of {rounds}, load average {os.getloadavg()[0]:.1f}")
        for part in machine.parts:
            patience.wait()
            known.moments[part.name].append(machine.ask(part, ROUND_S))
        for one, of_plan in zip(ready, moments, strict=True):
            of_plan.append(moment(machine, one, patience))
        speeds.append(machine.speeds(SPEEDS_S))
    known.speeds = tuple(
        (of[0][0], statistics.median(speed for _, speed in of)) for of in zip(*speeds, strict=True)
    )
    peaks = [int(largest([float(one.peak_bytes())])[0]) for one in ready]
    if dist.get_rank() == 0:
        leave(folder, paths, known, machine, moments, peaks)


@dataclass
class Patience:
    """Before a measurement, waits for others to pause, together not longer than ``left_s``."""

    left_s: float

    def wait(self) -> None:
        """On the first process; the others wait for it without a processor."""
        began_s = time.perf_counter()
        while dist.get_rank() == 0 and time.perf_counter() - began_s < min(self.left_s, LONGEST_S):
            busy_s, all_s = processor_seconds()
            time.sleep(LOOK_S)
            now_busy_s, now_all_s = processor_seconds()
            if now_busy_s - busy_s < QUIET * (now_all_s - all_s):
                break
        self.left_s -= time.perf_counter() - began_s
        dist.barrier()


LOOK_S, LONGEST_S, QUIET = 0.15, 6.0, 0.15
"""How long to look at what others do, how long to wait for them at a time, and which share of the
processors is taken for a pause."""


def moment(machine: Bench, one: Ready, patience: Patience) -> Moment:
    one.take_step()  # after other plans, caches are cold
    patience.wait()
    before, stretched = machine.spent(), [machine.stretch()]
    began_s = time.process_time()
    steps_s = largest([one.take_step()[1] for _ in range(STEPS)])
    processor_s = torch.tensor((time.process_time() - began_s) / STEPS)
    dist.all_reduce(processor_s)
    stretched.append(machine.stretch())
    stretch = statistics.fmean(stretched) / machine.usual_stretch
    others = machine.others(before)
    return Moment(statistics.median(steps_s), float(processor_s), stretch, others)


def leave(
    folder: Path,
    paths: Sequence[Path],
    known: Rounds,
    machine: Bench,
    moments: Sequence[Sequence[Moment]],
    peaks: Sequence[int],
) -> None:
    """All that was seen, and what it comes to in a quiet machine: the median of the half of the
    rounds in which others used least, by how stretched time was beside them."""
    found = profile_of(machine, known, machine_fingerprint())
    assert found is not None
    save(found, folder / "profile.json")
    (folder / "machine.moments").write_text(
        json.dumps({name: [asdict(m) for m in of] for name, of in known.moments.items()})
    )
    for path, of_plan, peak_bytes in zip(paths, moments, peaks, strict=True):
        quietest = quietest_half(of_plan)
        step_s = statistics.median(m.step_s / m.stretch for m in quietest)
        result = {
            "step_s": step_s,
            "others": statistics.fmean(m.others for m in quietest),
            "peak_memory_bytes": peak_bytes,
            "moments": [asdict(m) for m in of_plan],
        }
        (folder / f"{path.stem}.result").write_text(json.dumps(result))


def largest(values: Sequence[float]) -> list[float]:
    """Element by element over all ranks."""
    everywhere = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(everywhere, op=dist.ReduceOp.MAX)
    return [float(value) for value in everywhere]


# ---- what a file says ----------------------------------------------------------------------------


def report(rows: Sequence[Row]) -> str:
    columns = ["model", "plan", "schedule", "stages", "microbatches"]
    columns += ["predicted ms", "measured ms", "error", "others", "peak MB predicted", "measured"]
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        spread = f"{1e3 * row.least_step_s:.0f}-{1e3 * row.most_step_s:.0f}"
        lines.append(
            [
                row.model,
                row.plan,
                f"`{row.schedule}`" if row.stages > 1 else row.schedule,
                str(row.stages),
                str(row.microbatches),
                f"{1e3 * row.predicted_step_s:.0f}",
                f"{1e3 * row.measured_step_s:.0f} ({spread})",
                f"{row.ratio - 1:+.0%}",
                f"{row.others:.0%}",
                f"{row.predicted_peak_bytes / 1e6:.1f}",
                f"{row.measured_peak_bytes / 1e6:.1f}",
            ]
        )
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{by_model(rows)}\n\n{summary(rows)}"


def by_model(rows: Sequence[Row]) -> str:
    """Also how much slower than the best is the plan that the predictions prefer."""
    columns = ["model", "plans", "median error", "Kendall's tau", "predicted best", "is slower by"]
    lines = [columns, ["---"] * len(columns)]
    for model in dict.fromkeys(row.model for row in rows):
        of = [row for row in rows if row.model == model]
        chosen = min(of, key=lambda row: row.predicted_step_s)
        best_s = min(row.measured_step_s for row in of)
        lines.append(
            [
                model,
                str(len(of)),
                f"{statistics.median(abs(row.ratio - 1) for row in of):.0%}",
                f"{kendall_tau(times(of)):.2f}",
                f"{chosen.plan}, {chosen.schedule}",
                f"{chosen.measured_step_s / best_s - 1:.0%}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(rows: Sequence[Row]) -> str:
    worst = max(rows, key=lambda row: abs(math.log(row.ratio)))
    of_peaks = [abs(row.predicted_peak_bytes / row.measured_peak_bytes - 1) for row in rows]
    others = [row.others for row in rows]
    return (
        f"{len(rows)} plans on {rows[0].machine}, {rows[0].cores} cores, {rows[0].date}; others "
        f"used {min(others):.0%} to {max(others):.0%} of the processors. Step time: median error "
        f"{statistics.median(abs(row.ratio - 1) for row in rows):.0%}, worst {worst.ratio - 1:+.0%}"
        f" ({worst.model}, {worst.plan}, {worst.schedule}), Kendall's tau "
        f"{kendall_tau(times(rows)):.2f}. Peak memory: median error "
        f"{statistics.median(of_peaks):.1%}, worst {max(of_peaks):.1%}."
    )


def times(rows: Sequence[Row]) -> list[tuple[float, float]]:
    return [(row.predicted_step_s, row.measured_step_s) for row in rows]


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


def all_measured(asked: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="autopar-benchmark-") as name:
        for model in asked.models:
            folder = (asked.keep or Path(name)) / model
            folder.mkdir(parents=True, exist_ok=True)
            yield from measured(model, folder, asked.rounds, asked.patience)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", help="the CSV file to write")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--report", type=Path, help="print what this file says; measure nothing")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often all is measured")
    parser.add_argument(
        "--patience",
        type=float,
        default=120.0,
        help="seconds to wait, for a model, for other programs to pause before measurements",
    )
    parser.add_argument("--keep", type=Path, help="a folder for plans, profiles and all moments")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.rounds, Patience(arguments.patience))
        return
    path = arguments.report
    if path is None:
        path = arguments.out
        if path is None:
            parser.error("say which file to write, or --report which to read")
        write(path, all_measured(arguments))
    print(report(read(path)))


if __name__ == "__main__":
    main()
