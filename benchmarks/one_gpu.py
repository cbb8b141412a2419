"""Predicted against measured on one GPU: operators, steps and peak memory of whole models.

Plans are made where the pinned torch is, and trained where the GPU is, by the same runtime as any
plan:

    python -m benchmarks.one_gpu plan FOLDER                # models are traced and planned
    autopar profile --devices 1 -o FOLDER/profile.json      # on the GPU
    python -m benchmarks.one_gpu measure FOLDER             # on the GPU: FOLDER/*.measured.json
    python -m benchmarks.one_gpu rows FOLDER OUT --date D   # steps, operators and profile in OUT
    python -m benchmarks.one_gpu again FOLDER OUT --date D  # what is in OUT, with prices of now
    python -m benchmarks.one_gpu report OUT --date D        # what they say
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from autopar import api
from autopar.ir.graph import Operator, OperatorGraph, argument_to_json
from autopar.ir.plan import Plan, load_plan, save_plan
from autopar.ir.rule import BoundRule
from autopar.runtime.lowering import arguments_of, resolve
from autopar.runtime.rehearsal import Ready, prepare
from autopar.runtime.step import TrainingStep
from autopar.simulator.costs import Costs
from autopar.simulator.edges import carries_gradient
from cost_models.interface import CostModel
from cost_models.profiled import Profiled, read_profile

R = TypeVar("R")

MACHINE = "h100-sxm"
WARM, STEPS = 3, 10
CALLS = 5
"""Of each operator, under the profiler."""

FLUSH_BYTES = 2**28
"""Written between two calls, more than any cache holds: what an operator reads was written some
time ago."""


@dataclass(frozen=True)
class Case:
    """``model``: as ``autopar plan`` takes it."""

    name: str
    model: str
    batch: int | None = None
    sequence: int | None = None
    precision: Any = "mixed"
    microbatches: int = 1
    recompute: str = "none"


def _hf(name: str, batch: int, sequence: int | None = None, **more: Any) -> Case:
    return Case(name, f"hf:benchmarks/models/{name}.json", batch, sequence, **more)


CASES = (
    _hf("llama_1b", 8, 2048),
    _hf("llama_8b_4_layers", 2, 4096),
    _hf("llama_8b_2_layers", 2, 4096),
    _hf("gpt2_medium_plain", 16, 1024),
    _hf("gpt2_medium", 16, 1024),
    _hf("bert_large", 32, 512),
    _hf("vit_large", 64),
    _hf("resnet_50", 128),
    _hf("t5_base", 16, 512),
    Case("unet_large", "benchmarks/models/unet_large.py"),
    Case("gpt", "examples/gpt/model.py"),
    Case(
        "llama_1b_recomputed",
        "hf:benchmarks/models/llama_1b.json",
        8,
        2048,
        microbatches=2,
        recompute="full",
    ),
    Case("gpt2_medium_fp32", "hf:benchmarks/models/gpt2_medium.json", 4, 1024, precision="full"),
    Case("unet_large_fp32", "benchmarks/models/unet_large.py", precision="full"),
)


# ---- plans ---------------------------------------------------------------------------------------


def make_plans(folder: Path, machine: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        say(f"planning {case.name}")
        plan = api.plan(
            case.model,
            topology=f"1x1x{machine}",
            batch=case.batch,
            sequence=case.sequence,
            precision=case.precision,
            microbatches=case.microbatches,
            recompute=case.recompute,
        )
        save_plan(plan, folder / f"{case.name}.json")


# ---- on the GPU ----------------------------------------------------------------------------------


def measure(folder: Path, into: Path, *, operators: bool) -> list[str]:
    """Of the cases that are planned in ``folder``. One that fails says why, and the others go on;
    those are returned."""
    failed = []
    for case in CASES:
        path = folder / f"{case.name}.json"
        if not path.exists():
            continue
        say(f"{case.name}, {time.process_time():.0f} s")
        try:
            found = measured_step(load_plan(path), operators=operators)
            (into / f"{case.name}.measured.json").write_text(json.dumps(found))
            say(f"  {found['step_s']:.4f} s, {found['allocated_bytes'] / 1e9:.2f} GB")
        except Exception:  # time on a GPU is dear: the other cases are not lost
            say(traceback.format_exc())
            failed.append(case.name)
        torch.cuda.empty_cache()
    return failed


def measured_step(plan: Plan, *, operators: bool) -> dict[str, Any]:
    """The plan's step as it is run, the peak of its memory, and each kind of its operators."""
    ready = prepare(plan, api.source_of(plan), seed=0)
    step = ready.step
    assert isinstance(step, TrainingStep)
    for _ in range(WARM):
        ready.take_step()
    taken = [phases_s(step, ready) for _ in range(STEPS)]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    ready.take_step()
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    free, total = torch.cuda.mem_get_info()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": str(torch.__version__),
        "step_s": statistics.median(sum(times) for times in taken),
        "differentiate_s": statistics.median(times[0] for times in taken),
        "update_s": statistics.median(times[1] for times in taken),
        "busy_s": busy_s(ready.take_step),
        "allocated_bytes": allocated,
        "reserved_bytes": reserved,
        "other_bytes": total - free - torch.cuda.memory_reserved(),
    }
    if not operators:
        return found
    inputs = step.microbatch(step.batches.named(ready.args, ready.kwargs), 0)
    values = {**step.state.parameters, **step.state.buffers, **inputs}
    constants = {name: step.program.constant(name) for name, _ in step.graph.constants}
    values = {name: value.detach() for name, value in {**values, **constants}.items()}
    found["operators"] = [*measured_operators(step.graph, values)]
    return found


def phases_s(step: TrainingStep, ready: Ready) -> tuple[float, float]:
    """Of the forward and the backward, and of the update."""
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    step.differentiate(*ready.args, **ready.kwargs)
    torch.cuda.synchronize()
    middle_s = time.perf_counter()
    step.update()
    torch.cuda.synchronize()
    return middle_s - began_s, time.perf_counter() - middle_s


def busy_s(call: Callable[[], Any], calls: int = 1, besides: str = "") -> float:
    """Seconds of all kernels of a call, one after the other, as the profiler sees them; those with
    ``besides`` in their name do not count."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as noted:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    kernels = [
        event
        for event in noted.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not (besides and besides in event.name)
    ]
    return sum(event.time_range.elapsed_us() for event in kernels) / calls / 1e6


def measured_operators(graph: OperatorGraph, values: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    """Of all that are alike, the first, with what it reads in the step."""
    device = next(iter(values.values())).device
    flush = torch.ones(FLUSH_BYTES, dtype=torch.uint8, device=device)
    last = {name: number for number, o in enumerate(graph.operators) for name in o.inputs}
    seen: dict[str, dict[str, Any]] = {}
    for number, operator in enumerate(graph.operators):
        alike = kind_of(graph, operator)
        if alike not in seen:
            there_s, back_s = operator_s(graph, operator, values, flush)
            seen[alike] = {"name": operator.name, "op": operator.op, "count": 0}
            seen[alike] |= {"forward_s": there_s, "backward_s": back_s}
        seen[alike]["count"] += 1
        with torch.no_grad():
            results = called(operator, values, device)
        values.update(zip(operator.outputs, results, strict=True))
        for name in {*operator.inputs, *operator.outputs}:
            if last.get(name, -1) <= number:
                del values[name]
    yield from seen.values()


def called(operator: Operator, values: dict[str, Tensor], device: torch.device) -> list[Tensor]:
    args, kwargs = arguments_of(operator, values, device)
    results = resolve(operator.op)(*args, **kwargs)
    return [results] if isinstance(results, Tensor) else [*results]


def kind_of(graph: OperatorGraph, operator: Operator) -> str:
    read = [graph.by_name[name] for name in operator.inputs]
    sizes = [(t.spec.shape, t.spec.dtype, t.differentiable) for t in read]
    keywords = [(key, argument_to_json(value)) for key, value in operator.keywords]
    return json.dumps([operator.op, sizes, argument_to_json(operator.arguments), keywords])


def operator_s(
    graph: OperatorGraph, operator: Operator, values: dict[str, Tensor], flush: Tensor
) -> tuple[float, float]:
    """Forward and backward of one call, its kernels alone."""
    trains = carries_gradient(graph, operator)
    given = {name: values[name].detach() for name in operator.inputs}
    leaves = [given[name] for name in given if trains and graph.by_name[name].differentiable]
    for leaf in leaves:
        leaf.requires_grad_()

    def forward() -> list[Tensor]:
        flush.bitwise_not_()
        return called(operator, given, flush.device)

    made = [result for result in forward() if result is not None and result.requires_grad]
    there_s = busy_s(forward, CALLS, FLUSHES)
    if not made:
        return there_s, 0.0
    gradients = [torch.randn_like(result) for result in made]

    def backward() -> None:
        flush.bitwise_not_()
        torch.autograd.grad(made, leaves, gradients, retain_graph=True, allow_unused=True)

    backward()
    return there_s, busy_s(backward, CALLS, FLUSHES)


FLUSHES = "bitwise_not"
"""In the name of the kernel that flushes."""


# ---- rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepRow:
    """Predicted with the machine's datasheet, and with what ``autopar profile`` measured of it.

    ``measured_busy_s``: of all kernels of a step, under the profiler. ``measured_update_s``: the
    part of a step that is the optimizer's. ``other``: memory that the allocator does not have.
    """

    case: str
    parameters: int
    precision: str
    microbatches: int
    recomputed: int
    predicted_step_s: float
    profiled_step_s: float
    measured_step_s: float
    measured_busy_s: float
    predicted_update_s: float
    measured_update_s: float
    predicted_allocated_bytes: int
    measured_allocated_bytes: int
    predicted_reserved_bytes: int
    measured_reserved_bytes: int
    predicted_other_bytes: int
    measured_other_bytes: int
    device: str
    torch: str


def step_row(
    case: str, plan: Plan, found: dict[str, Any], model: CostModel, profiled: CostModel
) -> StepRow:
    estimate, strategy = api.simulate(plan, model), plan.strategy
    memory = estimate.memory
    return StepRow(
        case,
        plan.graph.parameter_count,
        strategy.training.precision,
        strategy.microbatches,
        len(strategy.recompute),
        estimate.step_time_s,
        api.simulate(plan, profiled).step_time_s,
        found["step_s"],
        found["busy_s"],
        estimate.optimizer_s,
        found["update_s"],
        memory.total_bytes,
        found["allocated_bytes"],
        memory.reserved_bytes,
        found["reserved_bytes"],
        memory.device_bytes - memory.reserved_bytes,
        found["other_bytes"],
        found["device"],
        found["torch"],
    )


@dataclass(frozen=True)
class OperatorRow:
    """All that are alike in a step; seconds of one, of the device alone."""

    case: str
    op: str
    name: str
    shapes: str
    dtype: str
    count: int
    predicted_forward_s: float
    predicted_backward_s: float
    measured_forward_s: float
    measured_backward_s: float


def by_itself(bound: BoundRule) -> BoundRule:
    """As it is measured: what it gives is added to no gradient of other operators."""
    return replace(bound, rule=replace(bound.rule, added=()))


def operator_rows(
    case: str, plan: Plan, found: Iterable[dict[str, Any]], model: CostModel
) -> Iterator[OperatorRow]:
    division, strategy = api.division_of(plan), plan.strategy
    graph, costs = division.graph, Costs(model, strategy.mesh)
    rules = {name: by_itself(bound) for name, bound in division.rules.items()}
    for one in found:
        operator = graph.operator[one["name"]]
        read = [graph.by_name[name] for name in operator.inputs]
        trains = carries_gradient(graph, operator)
        there_s, back_s = costs.operator_s(
            rules[operator.name],
            strategy.splits[operator.name],
            tuple(trains and tensor.differentiable for tensor in read),
        )
        yield OperatorRow(
            case,
            operator.op,
            operator.name,
            " ".join("x".join(map(str, tensor.spec.shape)) or "1" for tensor in read),
            graph.spec(operator.outputs[0]).dtype,
            one["count"],
            there_s,
            back_s,
            one["forward_s"],
            one["backward_s"],
        )


def measured_in(folder: Path) -> dict[str, dict[str, Any]]:
    """By case, as ``measure`` left it."""
    left = {case.name: folder / f"{case.name}.measured.json" for case in CASES}
    return {name: json.loads(path.read_text()) for name, path in left.items() if path.exists()}


@dataclass(frozen=True)
class Sitting:
    """Files of what was measured on a machine, as ``autopar list topologies`` calls it."""

    folder: Path
    machine: str
    date: str

    def path(self, what: str, end: str = "csv") -> Path:
        return self.folder / f"{what}_{self.machine.partition('-')[0]}_{self.date}.{end}"

    @property
    def steps(self) -> Iterator[StepRow]:
        return _read(self.path("steps"), StepRow)

    @property
    def operators(self) -> Iterator[OperatorRow]:
        return _read(self.path("operators"), OperatorRow)

    @property
    def profile(self) -> Path:
        return self.path("profile", "json")

    def measured(self) -> dict[str, dict[str, Any]]:
        """By case, as ``measured_in``."""
        found: dict[str, dict[str, Any]] = {
            row.case: {
                "step_s": row.measured_step_s,
                "busy_s": row.measured_busy_s,
                "update_s": row.measured_update_s,
                "allocated_bytes": row.measured_allocated_bytes,
                "reserved_bytes": row.measured_reserved_bytes,
                "other_bytes": row.measured_other_bytes,
                "device": row.device,
                "torch": row.torch,
            }
            for row in self.steps
        }
        for one in self.operators:
            seconds = {"forward_s": one.measured_forward_s, "backward_s": one.measured_backward_s}
            of_case = found.setdefault(one.case, {}).setdefault("operators", [])
            of_case.append({"name": one.name, "count": one.count, **seconds})
        return found

    def write(self, plans: Path, found: Mapping[str, dict[str, Any]]) -> None:
        """What was ``found`` beside what is predicted now."""
        model = api.machine(f"1x1x{self.machine}")
        profiled = Profiled(read_profile(self.profile))
        of = {case: load_plan(plans / f"{case}.json") for case in found}
        trained = {case: one for case, one in found.items() if "step_s" in one}
        steps = [step_row(case, of[case], one, model, profiled) for case, one in trained.items()]
        operators = [
            row
            for case, one in found.items()
            for row in operator_rows(case, of[case], one.get("operators", ()), model)
        ]
        _write(self.path("steps"), StepRow, steps)
        _write(self.path("operators"), OperatorRow, operators)


def _write(path: Path, kind: type[Any], rows: Sequence[Any]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(kind)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def _read(path: Path, kind: type[R]) -> Iterator[R]:
    types = get_type_hints(kind)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            yield kind(**{name: types[name](value) for name, value in row.items()})


# ---- what they say -------------------------------------------------------------------------------


def report(sitting: Sitting) -> Iterator[str]:
    """Tables in Markdown."""
    yield table(
        ("model", "predicted ms", "profiled", "measured", "kernels"),
        ("error", "profiled", "predicted GB", "measured", "error"),
    )
    for row in sitting.steps:
        yield step_line(row)
    yield ""
    yield table(("operator", "forward ms", "measured"), ("backward ms", "measured"))
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
    for one in sitting.operators:
        there = one.predicted_forward_s, one.measured_forward_s
        back = one.predicted_backward_s, one.measured_backward_s
        for i, seconds in enumerate((*there, *back)):
            sums[one.op][i] += 1e3 * one.count * seconds
    for op, of in sorted(sums.items(), key=lambda item: -item[1][1] - item[1][3]):
        if of[1] + of[3] > LEAST_MS:
            yield f"| `{op}` | " + " | ".join(f"{ms:.1f}" for ms in of) + " |"


def table(*columns: Sequence[str]) -> str:
    names = [name for some in columns for name in some]
    return f"| {' | '.join(names)} |\n{'|---' * len(names)}|"


def step_line(row: StepRow) -> str:
    took_s, memory = row.measured_step_s, row.measured_allocated_bytes
    seconds = row.predicted_step_s, row.profiled_step_s, took_s, row.measured_busy_s
    cells = [row.case, *(f"{1e3 * s:.1f}" for s in seconds)]
    cells += [f"{s / took_s - 1:+.0%}" for s in seconds[:2]]
    cells += [f"{size / 1e9:.2f}" for size in (row.predicted_allocated_bytes, memory)]
    cells += [f"{row.predicted_allocated_bytes / memory - 1:+.1%}"]
    return f"| {' | '.join(cells)} |"


LEAST_MS = 1.0
"""In all models together: what takes less is left out of the report."""


def say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("plan", "measure", "rows", "again", "report"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("into", type=Path, nargs="?", help="another folder, for what is written")
    parser.add_argument("--machine", default=MACHINE)
    parser.add_argument("--date", default="", help="in the names of files")
    parser.add_argument("--no-operators", action="store_true", help="measure steps only")
    asked = parser.parse_args()
    folder, into = asked.folder, asked.into or asked.folder
    sitting = Sitting(into, asked.machine, asked.date)
    match asked.what:
        case "plan":
            make_plans(folder, asked.machine)
        case "measure":
            failed = measure(folder, into, operators=not asked.no_operators)
            if failed:
                say(f"FAILED: {', '.join(failed)}")
                return 1
        case "rows":
            sitting.profile.write_text((folder / "profile.json").read_text())
            sitting.write(folder, measured_in(folder))
        case "again":
            sitting.write(folder, sitting.measured())
        case _:
            print("\n".join(report(sitting)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
