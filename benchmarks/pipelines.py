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
from contextlib import contextmanager
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
from autopar.ir.strategy import Stage, Storage, Strategy
from autopar.runtime.bench import Bench, Rounds, profile_of, quietest
from autopar.runtime.devices import MeasuredDevice, cores, processor_seconds
from autopar.runtime.launch import torchrun
from autopar.runtime.profiler import machine_fingerprint, profile, save
from autopar.runtime.rehearsal import Ready, prepare
from autopar.simulator.blocks import blocks
from autopar.simulator.calibration import MeasuredStep, factors
from autopar.simulator.staged import block_starts, even_cuts, runs, staged
from cost_models.profiled import Profile, Profiled, corrected, read_profile

DEVICES = 4
ROUNDS, STEPS, STEPS_S = 8, 3, 1.5
"""In each round each plan takes so many steps, and for at least so long, after one that warms
up."""

PROFILE_S, ROUND_S, SPEEDS_S = 10.0, 5.0, 0.3
"""How long the machine is measured: for the search, in a round, and each time that some devices are
measured with and without the others."""

SEARCH_S = 60.0
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
    """One plan. The measured step is that of a quiet machine, as far as ``Taken`` can tell; the
    least and the most are those of all rounds, as they were, and ``processor_s`` is what the
    processes together had of the processors. ``corrected_step_s``: predicted with the profile that
    two plans have corrected, of which this may be one (``corrects``). ``others``: the share of the
    processors that other programs used in the rounds that count, of the plan and of the profile."""

    model: str
    plan: str
    schedule: str
    stages: int
    microbatches: int
    predicted_step_s: float
    corrected_step_s: float
    corrects: int
    measured_step_s: float
    least_step_s: float
    most_step_s: float
    processor_s: float
    predicted_peak_bytes: int
    measured_peak_bytes: int
    rounds: int
    others: float
    others_of_profile: float
    machine: str
    cores: int
    date: str

    def ratio(self, *, corrected: bool) -> float:
        predicted_s = self.corrected_step_s if corrected else self.predicted_step_s
        return predicted_s / self.measured_step_s


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


def measure(model: str, folder: Path, rounds: int, patience_s: float, real_time: bool) -> None:
    """All plans of a model, written with what the machine does now, and what it and they took."""
    say(f"{model}: measuring the machine, to search with")
    with first(real_time):
        machine = Profiled(profile(DEVICES, PROFILE_S))
    cases = cases_of(model)
    for number, case in enumerate(cases):
        say(f"{model}: {case.text}")
        save_plan(plan_of(case, machine), folder / f"{number}.json")
    say(f"{model}: {rounds} rounds of {len(cases)} plans and the machine")
    asked = ["--worker", str(folder), "--rounds", str(rounds), "--patience", str(patience_s)]
    asked += ["--real-time"] * real_time
    code = torchrun(DEVICES, "benchmarks.pipelines", asked)
    if code:
        raise SystemExit(f"the processes of {model} ended with {code}")


def cases_of(model: str) -> list[Case]:
    return [case for case in CASES if case.model == model]


@dataclass(frozen=True)
class Taken:
    """A plan and what its steps took."""

    case: Case
    plan: Plan
    found: dict[str, Any]

    def priced_s(self, profile: Profile) -> float:
        return api.simulate(self.plan, Profiled(profile)).step_time_s

    @property
    def quietest(self) -> list[Moment]:
        return quietest([Moment(**moment) for moment in self.found["moments"]])

    @property
    def step_s(self) -> float:
        """In a quiet machine, as far as one can tell: the median of the half of the rounds in which
        others used least, by how stretched time was beside them."""
        return statistics.median(m.step_s / m.stretch for m in self.quietest)

    @property
    def spread(self) -> float:
        logs = [math.log(m.step_s / m.stretch) for m in self.quietest]
        return statistics.stdev(logs) if len(logs) > 1 else 0.0

    @property
    def corrects(self) -> bool:
        return (self.case.schedule, self.case.groups, self.case.inside) in CORRECTING


CORRECTING = (("", 1, "data_parallel"), ("1f1b", 4, "alone"))
"""Schedule, groups and recipe of the plans of each model by which its profile is corrected: one
that computes and then communicates, and one that computes in turns; the first of each."""


def rows(model: str, folder: Path) -> Iterator[Row]:
    """What was measured, and predicted with the profile as it was and as two plans correct it."""
    measured_as = read_profile(folder / "profile.json")
    taken = [
        Taken(
            case,
            load_plan(folder / f"{number}.json"),
            json.loads((folder / f"{number}.result").read_text()),
        )
        for number, case in enumerate(cases_of(model))
    ]
    by = [next(t for t in taken if t.corrects and t.case.groups == n) for _, n, _ in CORRECTING]
    steps = [MeasuredStep(t.priced_s, t.step_s, t.spread) for t in by]
    known = factors(measured_as, steps)
    say(f"{model}: {', '.join(f'{f.part} {f.factor:.2f}' for f in known)}")
    corrected_by = corrected(measured_as, {f.part: f.factor for f in known})
    for one in taken:
        moments = one.quietest
        all_s = [moment["step_s"] for moment in one.found["moments"]]
        strategy = one.plan.strategy
        yield Row(
            model=model,
            plan=one.case.text,
            schedule=str(strategy.schedule) if len(strategy.stages) > 1 else "one stage",
            stages=len(strategy.stages),
            microbatches=strategy.microbatches,
            predicted_step_s=one.priced_s(measured_as),
            corrected_step_s=one.priced_s(corrected_by),
            corrects=int(one in by),
            measured_step_s=one.step_s,
            least_step_s=min(all_s),
            most_step_s=max(all_s),
            processor_s=statistics.median(m.processor_s for m in moments),
            predicted_peak_bytes=one.plan.estimate.peak_memory_bytes,
            measured_peak_bytes=one.found["peak_memory_bytes"],
            rounds=len(all_s),
            others=statistics.fmean(m.others for m in moments),
            others_of_profile=measured_as.others,
            machine=measured_as.device,
            cores=cores(),
            date=measured_as.date,
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


def work(folder: Path, rounds: int, patience: Patience, real_time: bool) -> None:
    """One of the processes: in each round measure the machine, and take steps of every plan."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    share_groups()
    device = MeasuredDevice("cpu")
    device.use()
    machine = Bench(DEVICES, 1, device, dtypes=("float32",))
    known = Rounds()
    paths = sorted(folder.glob("[0-9]*.json"), key=lambda path: int(path.stem))
    plans = [load_plan(path) for path in paths]
    ready = [prepare(plan, api.source_of(plan), seed=0) for plan in plans]
    moments: list[list[Moment]] = [[] for _ in ready]
    speeds = []
    if real_time and machine.parts:  # all threads that communicate are there by then
        before_all_others()
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


@contextmanager
def first(real_time: bool) -> Iterator[None]:
    """What is started meanwhile goes ``before_all_others``, if that is asked."""
    if real_time:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    try:
        yield
    finally:
        if real_time:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def before_all_others() -> None:
    """From now on other programs get what these processes leave: all their threads take turns with
    each other only. Threads that pass messages on may not go before those that compute: they wait
    for these without sleeping."""
    for thread in map(int, os.listdir("/proc/self/task")):
        os.sched_setscheduler(thread, os.SCHED_RR, os.sched_param(1))


def share_groups() -> None:
    """Plans take turns, and may have the same process groups: the threads of each poll as long as
    its process lives, and those of 14 plans would be the load of the machine."""
    made: dict[tuple[int, ...], Any] = {}
    new_group = dist.new_group

    def shared(ranks: Sequence[int], *rest: Any, **options: Any) -> Any:
        members = tuple(ranks)
        if members not in made:
            made[members] = new_group(list(members), *rest, **options)
        return made[members]

    dist.new_group = shared


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
    (cold_s,) = largest([one.take_step()[1]])  # after other plans, caches are
    steps = max(STEPS, math.ceil(STEPS_S / cold_s))
    patience.wait()
    before, stretched = machine.spent(), [machine.stretch()]
    began_s = time.process_time()
    steps_s = largest([one.take_step()[1] for _ in range(steps)])
    processor_s = torch.tensor((time.process_time() - began_s) / steps)
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
    """All that was seen."""
    found = profile_of(machine, known, machine_fingerprint())
    assert found is not None
    save(found, folder / "profile.json")
    (folder / "machine.moments").write_text(
        json.dumps({name: [asdict(m) for m in of] for name, of in known.moments.items()})
    )
    for path, of_plan, peak_bytes in zip(paths, moments, peaks, strict=True):
        result = {"peak_memory_bytes": peak_bytes, "moments": [asdict(m) for m in of_plan]}
        (folder / f"{path.stem}.result").write_text(json.dumps(result))


def largest(values: Sequence[float]) -> list[float]:
    """Element by element over all ranks."""
    everywhere = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(everywhere, op=dist.ReduceOp.MAX)
    return [float(value) for value in everywhere]


# ---- what a file says ----------------------------------------------------------------------------


def report(rows: Sequence[Row]) -> str:
    columns = ["model", "plan", "schedule", "stages", "microbatches", "predicted ms", "corrected"]
    columns += ["measured ms", "error", "corrected", "processor ms", "others"]
    columns += ["peak MB predicted", "measured"]
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        spread = f"{1e3 * row.least_step_s:.0f}-{1e3 * row.most_step_s:.0f}"
        after = "(corrects)" if row.corrects else f"{row.ratio(corrected=True) - 1:+.0%}"
        lines.append(
            [
                row.model,
                row.plan,
                f"`{row.schedule}`" if row.stages > 1 else row.schedule,
                str(row.stages),
                str(row.microbatches),
                f"{1e3 * row.predicted_step_s:.0f}",
                f"{1e3 * row.corrected_step_s:.0f}",
                f"{1e3 * row.measured_step_s:.0f} ({spread})",
                f"{row.ratio(corrected=False) - 1:+.0%}",
                after,
                f"{1e3 * row.processor_s:.0f}",
                f"{row.others:.0%}",
                f"{row.predicted_peak_bytes / 1e6:.1f}",
                f"{row.measured_peak_bytes / 1e6:.1f}",
            ]
        )
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{by_model(rows)}\n\n{summary(rows)}"


def by_model(rows: Sequence[Row]) -> str:
    """Errors, order, and how much slower than the best is the plan that predictions prefer, and the
    one that the search had found before with a profile of its own."""
    columns = ["model", "predicted with", "plans", "median error", "bias", "Kendall's tau"]
    columns += ["predicted best", "is slower by", "searched"]
    lines = [columns, ["---"] * len(columns)]
    for model in [*dict.fromkeys(row.model for row in rows), ALL]:
        for after in (False, True):
            of = [row for row in rows if model in (row.model, ALL)]
            judged = [row for row in of if not (after and row.corrects)]
            ratios = [row.ratio(corrected=after) for row in judged]
            chosen = [_chosen(of, name, after) for name in dict.fromkeys(r.model for r in of)]
            lines.append(
                [
                    model,
                    "the profile, corrected" if after else "the profile",
                    str(len(judged)),
                    f"{statistics.median(abs(ratio - 1) for ratio in ratios):.0%}",
                    f"{statistics.median(ratios) - 1:+.0%}",
                    f"{kendall_tau(times(judged, after)):.2f}",
                    "" if model == ALL else chosen[0][0],
                    f"{max(slower for _, slower in chosen):.0%}",
                    f"{max(_searched(of, name) for name in {r.model for r in of}):.0%}",
                ]
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


ALL = "all"


def _chosen(rows: Sequence[Row], model: str, after: bool) -> tuple[str, float]:
    """Of a model, the plan that is predicted to be best, and how much slower than the best one."""
    of = [row for row in rows if row.model == model]
    chosen = min(of, key=lambda row: row.ratio(corrected=after) * row.measured_step_s)
    best_s = min(row.measured_step_s for row in of)
    return f"{chosen.plan}, {chosen.schedule}", chosen.measured_step_s / best_s - 1


def _searched(rows: Sequence[Row], model: str) -> float:
    """How much slower than the best of a model is what the search found."""
    of = [row for row in rows if row.model == model]
    (found,) = (row for row in of if row.plan == "searched")
    return found.measured_step_s / min(row.measured_step_s for row in of) - 1


def summary(rows: Sequence[Row]) -> str:
    worst = max(rows, key=lambda row: abs(math.log(row.ratio(corrected=False))))
    of_peaks = [abs(row.predicted_peak_bytes / row.measured_peak_bytes - 1) for row in rows]
    others = [row.others for row in rows]
    return (
        f"{len(rows)} plans on {rows[0].machine}, {rows[0].cores} cores, {rows[0].date}; others "
        f"used {min(others):.0%} to {max(others):.0%} of the processors. Worst step: "
        f"{worst.ratio(corrected=False) - 1:+.0%} ({worst.model}, {worst.plan}, {worst.schedule}). "
        f"Peak memory: median error {statistics.median(of_peaks):.1%}, worst {max(of_peaks):.1%}."
    )


def times(rows: Sequence[Row], corrected: bool) -> list[tuple[float, float]]:
    return [
        (row.ratio(corrected=corrected) * row.measured_step_s, row.measured_step_s) for row in rows
    ]


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
            if not asked.again:
                measure(model, folder, asked.rounds, asked.patience, asked.real_time)
            yield from rows(model, folder)


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
    parser.add_argument(
        "--real-time",
        action="store_true",
        help="measure with real-time priority, which needs its right: all other programs wait",
    )
    parser.add_argument("--again", action="store_true", help="price what --keep has; no measuring")
    parser.add_argument("--keep", type=Path, help="a folder for plans, profiles and all moments")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        patience = Patience(arguments.patience)
        work(arguments.worker, arguments.rounds, patience, arguments.real_time)
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
