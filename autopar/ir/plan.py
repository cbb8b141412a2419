"""The plan: one JSON file that can be explained, simulated, compared, verified and run."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from autopar.errors import AutoparError, PlanMismatchError
from autopar.ir.graph import OperatorGraph, graph_from_json, graph_to_json
from autopar.ir.plan_schema import FORMAT, fault, plan_schema
from autopar.ir.rule import NOT_DATA, Inner, OpRule, Product, Saved, Split
from autopar.ir.search import SearchResult, SearchSummary, Tie, TrialSummary
from autopar.ir.sharding import Mesh
from autopar.ir.simulation import (
    Band,
    Doubt,
    Estimate,
    Memory,
    PipelineEstimate,
    PromisedCollective,
    RowEstimate,
    Traffic,
)
from autopar.ir.strategy import Storage, Strategy, strategy_from_json, strategy_to_json


@dataclass(frozen=True)
class Plan:
    """A strategy with all that is needed to judge it and to run it.

    ``topology`` is the machine as its cost model describes itself, ``name`` and ``devices`` among
    the keys. ``model`` is what the user gave (``model.py``, ``package.module:callable``,
    ``hf:NAME``), ``""`` for an object; ``batch`` and ``sequence`` are the sizes given with an
    ``hf:`` one. ``proposed`` are (op, rule) pairs that were found by trying
    rather than written by a person. ``created`` is UTC, ISO 8601. ``objective``: what is short,
    ``step`` or ``throughput`` (then ``estimate.step_time_s`` is of steps without a gap between).
    """

    graph: OperatorGraph
    topology: dict[str, Any] = field(hash=False)
    strategy: Strategy
    estimate: Estimate
    search: SearchSummary
    model: str = ""
    batch: int | None = None
    sequence: int | None = None
    proposed: tuple[tuple[str, OpRule], ...] = ()
    created: str = ""
    autopar: str = ""
    objective: Literal["step", "throughput"] = "step"
    format: int = FORMAT

    @property
    def mesh(self) -> Mesh:
        return self.strategy.mesh

    @property
    def world_size(self) -> int:
        """Processes that run it, one for each device."""
        return self.strategy.devices

    @property
    def pipeline(self) -> PipelineEstimate | None:
        """What is promised of several stages; ``None`` where there is one.

        Raises:
            AutoparError: there are several, and the estimate is not of them.
        """
        if len(self.strategy.stages) == 1:
            return None
        if self.estimate.pipeline is None:
            raise AutoparError(
                "the plan has several stages, and its estimate is not that of a pipeline; give it "
                "the one of `autopar.simulate(plan)`"
            )
        return self.estimate.pipeline


def bound_by(estimate: Estimate, memory_limit_bytes: int) -> str:
    """What takes the largest part of the step, and whether memory is nearly full.

    ``"compute 71%"``, ``"all_reduce on tensor 44%"``, ``"optimizer 60%, memory 97%"``.
    """
    parts = {
        "compute": estimate.forward_compute_s + estimate.backward_compute_s,
        "optimizer": estimate.optimizer_s,
    }
    if estimate.pipeline is not None:
        parts = _parts_of_busiest(estimate.pipeline, estimate.launches_s)
    parts["waiting for hosts"] = estimate.launches_s
    for collective in estimate.collectives:
        name = f"{collective.kind} on {collective.axis}"
        parts[name] = parts.get(name, 0.0) + collective.time_s * collective.count
    largest = max(parts, key=lambda part: parts[part])
    total = estimate.step_time_s
    share = f" {parts[largest] / total:.0%}" if total else ""
    full = estimate.peak_memory_bytes / memory_limit_bytes if memory_limit_bytes else 0.0
    return f"{largest}{share}" + (f", memory {full:.0%}" if full >= 0.9 else "")


def _parts_of_busiest(pipeline: PipelineEstimate, launches_s: float) -> dict[str, float]:
    """What the row does that idles least, and how long it idles for the others, beside what all
    wait for their hosts."""
    row = min(pipeline.rows, key=lambda row: row.idle_s)
    parts = {
        "bubble": row.bubble_s,
        "compute": row.forward_s + row.backward_s,
        "update": row.update_s + row.idle_s - row.bubble_s - launches_s,
    }
    for collective in row.collectives:
        if collective.phase != "step":
            name, time_s = f"{collective.kind} on {collective.axis}", collective.time_s
            parts[name] = parts.get(name, 0.0) + time_s * collective.count
            parts["compute"] -= time_s * collective.count
    return parts


def summarise(result: SearchResult, memory_limit_bytes: int, dimensions: str) -> SearchSummary:
    return SearchSummary(
        searcher=result.searcher,
        stop_reason=result.stop_reason,
        lower_bound_s=result.lower_bound_s,
        gap=result.gap,
        search_time_s=result.search_time_s,
        memory_limit_bytes=memory_limit_bytes,
        dimensions=dimensions,
        trials=tuple(
            TrialSummary(
                name=trial.name,
                mesh=trial.mesh,
                outcome=trial.outcome,
                lower_bound_s=trial.lower_bound_s,
                step_time_s=trial.estimate.step_time_s if trial.estimate else None,
                peak_memory_bytes=trial.estimate.peak_memory_bytes if trial.estimate else None,
                bound_by=bound_by(trial.estimate, memory_limit_bytes) if trial.estimate else "",
            )
            for trial in result.trials
        ),
        among=result.among,
    )


# The file


def save_plan(plan: Plan, path: str | Path) -> None:
    """Write ``path`` as a whole or not at all."""
    write_atomically(path, plan_to_text(plan))


def write_atomically(path: str | Path, text: str) -> None:
    """Replace ``path`` by ``text``; a reader sees the old file or the new one, nothing between."""
    path = Path(path)
    check_writable(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp makes it private; give it what an ordinary new file gets
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_writable(path: str | Path) -> None:
    """Whether ``path`` can be written, asked before the work whose result it is to hold.

    Raises:
        AutoparError: it cannot.
    """
    path = Path(path)
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a directory")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> AutoparError:
    return AutoparError(f"cannot write {path}: {error.strerror}; name another output file")


def load_plan(path: str | Path) -> Plan:
    """Read a plan file.

    Raises:
        AutoparError: the file cannot be read.
        PlanMismatchError: it is not a plan, is damaged, or needs a newer autopar.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise AutoparError(
            f"cannot read the plan {path}: {reason}; `autopar plan MODEL -o {path}` writes one"
        ) from error
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise PlanMismatchError(
            f"{path} is not JSON (line {error.lineno}: {error.msg}): it is damaged or no plan at "
            f"all; `autopar plan MODEL -o {path}` writes one"
        ) from error
    return plan_from_json(data, str(path))


def plan_from_json(data: Any, source: str = "the plan") -> Plan:
    """The plan that ``plan_to_json`` gave; ``source`` names it in messages.

    Raises:
        PlanMismatchError: it is something else, is damaged, or needs a newer autopar.
    """
    if not isinstance(data, dict) or "autopar" not in data or "format" not in data:
        raise PlanMismatchError(
            f"{source} is JSON, but not an autopar plan: a plan has the keys 'autopar' and "
            "'format'; `autopar plan MODEL -o FILE` writes one"
        )
    if not isinstance(data["format"], int) or data["format"] > FORMAT:
        raise PlanMismatchError(
            f"{source} has format {data['format']}, written by autopar {data['autopar']}; this "
            f"autopar reads up to format {FORMAT}: install a newer autopar, or plan again"
        )
    try:
        what = fault(data, plan_schema()) if data["format"] == FORMAT else ""
        if what:
            raise ValueError(what)
        plan, fingerprint = _read(data), data["fingerprint"]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise PlanMismatchError(
            f"{source} is a plan, but a damaged one ({what}); plan again"
        ) from error
    _check(plan, fingerprint, source)
    return plan


def _check(plan: Plan, fingerprint: str, source: str) -> None:
    def refuse(why: str) -> None:
        raise PlanMismatchError(f"{source} contradicts itself: {why}; plan again")

    if plan.graph.fingerprint != fingerprint:
        refuse("its graph is not the one that was planned (the fingerprint differs)")
    if lost := sorted(set(plan.graph.operator) ^ set(plan.strategy.splits)):
        refuse(f"operators and splits differ in {lost[:3]}")
    parameters = {tensor.name for tensor in plan.graph.parameters}
    if lost := sorted(parameters ^ set(plan.strategy.storage)):
        refuse(f"parameters and storage differ in {lost[:3]}")
    meshes = plan.strategy.mesh_of
    if lost := sorted(set(plan.graph.operator) ^ set(meshes)):
        refuse(f"operators and stages differ in {lost[:3]}")
    if plan.estimate.pipeline is not None:
        groups = [row.devices for row in plan.estimate.pipeline.rows]
        if {d for group in groups for d in group} != set(range(plan.world_size)) or not (
            set(groups) <= {stage.devices for stage in plan.strategy.stages}
        ):
            refuse("the rows of its estimate are on other devices than its stages")
    for name, split in plan.strategy.splits.items():
        if len(split) != (axes := len(meshes[name].axes)):
            refuse(f"the split of {name} does not have one choice for each of {axes} mesh axes")


def _read(data: dict[str, Any]) -> Plan:
    return Plan(
        graph=graph_from_json(data["graph"]),
        topology=data["topology"],
        strategy=strategy_from_json(data["strategy"]),
        estimate=_estimate_from_json(data["estimate"]),
        search=_search_from_json(data["search"]),
        model=data["model"],
        batch=data["batch"],
        sequence=data["sequence"],
        proposed=tuple((op, rule_from_json(rule)) for op, rule in data["proposed"]),
        created=data["created"],
        autopar=data["autopar"],
        objective=data.get("objective", "step"),
        format=data["format"],
    )


def plan_to_json(plan: Plan) -> dict[str, Any]:
    return {
        "autopar": plan.autopar,
        "format": plan.format,
        "created": plan.created,
        "model": plan.model,
        "batch": plan.batch,
        "sequence": plan.sequence,
        "fingerprint": plan.graph.fingerprint,
        **({} if plan.objective == "step" else {"objective": plan.objective}),
        "topology": plan.topology,
        "estimate": _estimate_to_json(plan.estimate),
        "search": search_to_json(plan.search),
        "strategy": strategy_to_json(plan.strategy),
        "proposed": [[op, rule_to_json(rule)] for op, rule in plan.proposed],
        "graph": graph_to_json(plan.graph),
    }


def digest_of(plan: Plan) -> str:
    """Hexadecimal digits that two plans share only if they are the same."""
    return hashlib.sha256(plan_to_text(plan).encode()).hexdigest()[:16]


def plan_to_text(plan: Plan) -> str:
    """The JSON text: a line for each operator, split, tensor; short enough to read and to diff."""
    return _lines(plan_to_json(plan), depth=2) + "\n"


def _lines(value: Any, depth: int, indent: str = "") -> str:
    """JSON with the outer ``depth`` + 1 levels on lines of their own."""
    inner = indent + " "
    if depth >= 0 and value and isinstance(value, dict):
        items = [f"{json.dumps(key)}: {_lines(v, depth - 1, inner)}" for key, v in value.items()]
        return "{\n" + ",\n".join(inner + item for item in items) + f"\n{indent}}}"
    if depth >= 0 and isinstance(value, list) and any(isinstance(v, (list, dict)) for v in value):
        return (
            "[\n"
            + ",\n".join(inner + _lines(v, -1 if depth == 0 else depth - 2, inner) for v in value)
            + f"\n{indent}]"
        )
    return json.dumps(value, allow_nan=False)


def _estimate_to_json(estimate: Estimate) -> dict[str, Any]:
    data = asdict(estimate)
    left_out = [key for key in ("pipeline", "band") if data[key] is None]
    return {key: value for key, value in data.items() if key not in left_out}


def _estimate_from_json(data: dict[str, Any]) -> Estimate:
    return Estimate(
        **{
            **data,
            "memory": Memory(**data["memory"]),
            "collectives": tuple(PromisedCollective(**c) for c in data["collectives"]),
            "pipeline": _pipeline_from_json(data["pipeline"]) if data.get("pipeline") else None,
            "band": _band_from_json(data["band"]) if data.get("band") else None,
        }
    )


def _band_from_json(data: dict[str, Any]) -> Band:
    return Band(**{**data, "doubts": tuple(Doubt(**doubt) for doubt in data["doubts"])})


def _pipeline_from_json(data: dict[str, Any]) -> PipelineEstimate:
    return PipelineEstimate(
        rows=tuple(
            RowEstimate(
                **{
                    **row,
                    "devices": tuple(row["devices"]),
                    "stages": tuple(row["stages"]),
                    "memory": Memory(**row["memory"]),
                    "collectives": tuple(PromisedCollective(**c) for c in row["collectives"]),
                }
            )
            for row in data["rows"]
        ),
        traffic=tuple(Traffic(**one) for one in data["traffic"]),
        transfer_s=data["transfer_s"],
    )


def search_to_json(search: SearchSummary) -> dict[str, Any]:
    found = {
        **{f.name: getattr(search, f.name) for f in fields(search)},
        "lower_bound_s": _finite(search.lower_bound_s),
        "trials": [
            {
                **{f.name: getattr(trial, f.name) for f in fields(trial)},
                "mesh": [list(axis) for axis in trial.mesh.axes],
                "lower_bound_s": _finite(trial.lower_bound_s),
            }
            for trial in search.trials
        ],
        "ties": [
            {
                **{f.name: getattr(tie, f.name) for f in fields(tie)},
                "mesh": [list(axis) for axis in tie.mesh.axes],
            }
            for tie in search.ties
        ],
    }
    return {key: value for key, value in found.items() if value or key not in ("ties", "among")}


def _search_from_json(data: dict[str, Any]) -> SearchSummary:
    return SearchSummary(
        **{
            **data,
            "lower_bound_s": _or_infinite(data["lower_bound_s"]),
            "trials": tuple(
                TrialSummary(
                    **{
                        **trial,
                        "mesh": _mesh_from_json(trial["mesh"]),
                        "lower_bound_s": _or_infinite(trial["lower_bound_s"]),
                    }
                )
                for trial in data["trials"]
            ),
            "ties": tuple(
                Tie(**{**tie, "mesh": _mesh_from_json(tie["mesh"])}) for tie in data.get("ties", ())
            ),
        }
    )


def _mesh_from_json(axes: list[list[Any]]) -> Mesh:
    return Mesh(tuple((name, size) for name, size in axes))


def _finite(bound_s: float) -> float | None:
    """JSON has no infinity, the bound of what is infeasible: ``null``."""
    return bound_s if math.isfinite(bound_s) else None


def _or_infinite(bound_s: float | None) -> float:
    return math.inf if bound_s is None else bound_s


def rule_to_json(rule: OpRule) -> dict[str, Any]:
    """A rule as data. Only rules without the fields of ``NOT_DATA`` are data; a proposed rule has
    none of them."""
    assert all(getattr(rule, f) == getattr(OpRule(rule.signature), f) for f in NOT_DATA), rule
    return {k: v for k, v in asdict(rule).items() if k not in NOT_DATA}


def rule_from_json(data: dict[str, Any]) -> OpRule:
    made: dict[str, Callable[..., Any]] = {"products": Product, "saves": Saved, "inner": Inner}
    values: dict[str, Any] = {
        key: tuple(made[key](**_tuples(item)) for item in value) if key in made else _tuple(value)
        for key, value in data.items()
    }
    return OpRule(**values)


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    return {key: _tuple(value) for key, value in data.items()}


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


# Two plans


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that differs. ``what``: ``mesh``, ``topology``, ``training``, ``split``, …"""

    what: str
    name: str
    before: str
    after: str


@dataclass(frozen=True)
class PlanDiff:
    """What changes from plan ``a`` to plan ``b``; ``faster`` is a's step time over b's, of which it
    is known to the factor ``within`` only: ``None`` where that is not known, as for plans of
    different models or machines."""

    same_model: bool
    faster: float
    peak_memory_bytes: tuple[int, int]
    changes: tuple[Change, ...]
    within: float | None = None


def split_text(split: Split, mesh: Mesh) -> str:
    """
    >>> split_text(("batch", "nothing"), Mesh((("data", 2), ("tensor", 4))))
    'data: batch, tensor: nothing'
    """
    return ", ".join(f"{a}: {choice}" for a, choice in zip(mesh.names, split, strict=True))


def mesh_text(mesh: Mesh) -> str:
    """
    >>> mesh_text(Mesh((("data", 2), ("tensor", 4))))
    'data 2 x tensor 4'
    """
    return " x ".join(f"{name} {size}" for name, size in mesh.axes) or "one device"


def diff(a: Plan, b: Plan) -> PlanDiff:
    """What is decided differently in ``b``; operators that only one of them has are not listed."""
    changes = [
        Change(what, "", before, after)
        for what, before, after in (
            ("topology", str(a.topology.get("name")), str(b.topology.get("name"))),
            ("mesh", meshes_text(a.strategy), meshes_text(b.strategy)),
            ("stages", _stages_text(a.strategy), _stages_text(b.strategy)),
            ("microbatches", str(a.strategy.microbatches), str(b.strategy.microbatches)),
            (
                "recomputed operators",
                str(len(a.strategy.recompute)),
                str(len(b.strategy.recompute)),
            ),
            ("training", _training_text(a), _training_text(b)),
        )
        if before != after
    ]
    for name, split in a.strategy.splits.items():
        if name in b.strategy.splits:
            before = split_text(split, a.strategy.mesh_of[name])
            after = split_text(b.strategy.splits[name], b.strategy.mesh_of[name])
            if before != after:
                changes.append(Change("split", name, before, after))
    changes += _moved(a.strategy, b.strategy)
    for name in a.strategy.storage:
        if name in b.strategy.storage:
            before, after = _storage_text(a, name), _storage_text(b, name)
            if before != after:
                changes.append(Change("storage", name, before, after))
    return PlanDiff(
        same_model=a.graph.fingerprint == b.graph.fingerprint,
        faster=a.estimate.step_time_s / b.estimate.step_time_s
        if b.estimate.step_time_s
        else math.inf,
        peak_memory_bytes=(a.estimate.peak_memory_bytes, b.estimate.peak_memory_bytes),
        changes=tuple(changes),
    )


def meshes_text(strategy: Strategy) -> str:
    """Of several stages, what is the same in consecutive ones once: ``a 2 in stages 0-2, a 4 in
    stage 3``."""
    if len({stage.mesh for stage in strategy.stages}) == 1:
        return mesh_text(strategy.stages[0].mesh)
    runs: list[tuple[Mesh, list[int]]] = []
    for number, stage in enumerate(strategy.stages):
        if runs and runs[-1][0] == stage.mesh:
            runs[-1][1].append(number)
        else:
            runs.append((stage.mesh, [number]))
    return ", ".join(
        f"{mesh_text(mesh)} in stage{'s' if len(numbers) > 1 else ''} "
        + (f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}")
        for mesh, numbers in runs
    )


def _stages_text(strategy: Strategy) -> str:
    if len(strategy.stages) == 1:
        return "1"
    chunks = f", {strategy.chunks} on each group" if strategy.chunks else ""
    return f"{len(strategy.stages)} by {strategy.schedule}{chunks}"


def _moved(a: Strategy, b: Strategy) -> list[Change]:
    """Operators that are in another stage."""
    if len(a.stages) == len(b.stages) == 1:
        return []
    before, after = (
        {name: str(n) for n, stage in enumerate(of.stages) for name in stage.operators}
        for of in (a, b)
    )
    return [
        Change("stage", name, number, after[name])
        for name, number in before.items()
        if name in after and number != after[name]
    ]


def _training_text(plan: Plan) -> str:
    training = plan.strategy.training
    clip = "" if training.clip_norm is None else f", clip {training.clip_norm:g}"
    return f"{training.optimizer}, {training.precision} precision{clip}"


def _storage_text(plan: Plan, parameter: str) -> str:
    """For each axis, what of the parameter, its gradient and its optimizer state is cut there."""
    storage = plan.strategy.storage[parameter]
    own = [(n, s) for n, s in enumerate(plan.strategy.stages) if parameter in s.storage]
    others = {o for _, stage in own for o in stage.operators}
    readers = [o.name for o, _ in plan.graph.consumers.get(parameter, ()) if o.name not in others]
    stages = plan.strategy.stages
    mesh = plan.strategy.mesh_of[readers[0]] if readers else stages[0].mesh
    found = [_kept_text(storage, mesh)]
    found += [f"in stage {n} {_kept_text(s.storage[parameter], s.mesh)}" for n, s in own]
    return "; ".join(found)


def _kept_text(storage: Storage, mesh: Mesh) -> str:
    return ", ".join(
        f"{axis}: {p}/{g}/{o}"
        for axis, p, g, o in zip(
            mesh.names, storage.parameter, storage.gradient, storage.optimizer, strict=True
        )
    )
