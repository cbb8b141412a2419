"""A plan, its explanation and the difference of two plans as plain text for a terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from autopar.exporters.doubts import doubt_text, largest_doubt
from autopar.exporters.explanation import (
    Block,
    CollectiveRow,
    Divided,
    PassedOn,
    StageExplanation,
    block_of,
    explanation,
    passed_on,
    ranges_text,
    stages_of,
)
from autopar.exporters.units import (
    bytes_text,
    count_text,
    peak_text,
    share_text,
    step_text,
    time_text,
)
from autopar.ir.graph import OperatorGraph
from autopar.ir.measurement import Measurement
from autopar.ir.plan import Change, Plan, PlanDiff, bound_by, mesh_text, meshes_text
from autopar.ir.rule import NOTHING, REPLICATED, SUMMED
from autopar.ir.search import SearchSummary, TrialSummary
from autopar.ir.sharding import Mesh, Sharding
from autopar.ir.simulation import Estimate, Memory
from autopar.ir.strategy import Strategy
from autopar.simulator.blocks import blocks
from autopar.simulator.edges import Rules

if TYPE_CHECKING:
    from autopar.runtime.verify import Report
    from autopar.runtime.verify_stages import StagesReport
    from autopar.simulator.calibration import Factor

WIDTH = 120


def export(plan: Plan, rules: Rules) -> str:
    """Summary and explanation, one after the other."""
    return summary(plan) + "\n" + explain(plan, rules)


# Summary: what `autopar plan` prints


def summary(plan: Plan, top: int = 5) -> str:
    """What was found, the ``top`` best trials, and the distance to each recipe."""
    return "\n".join(
        [
            *_heading(plan),
            "",
            *_best(plan, top),
            *_ties(plan),
            *_recipes(plan),
            *rows(plan.estimate),
            *memory(plan.estimate, plan.topology.get("memory_bytes")),
            *_proposed(plan),
        ]
    )


def _heading(plan: Plan) -> list[str]:
    found, training = plan.estimate, plan.strategy.training
    step_s = found.step_time_s
    batches = plan.strategy.microbatches
    return [
        f"{plan.graph.name}: {count_text(plan.graph.parameter_count)} parameters, "
        f"{len(plan.graph.operators)} operators, {training.optimizer}, "
        f"{training.precision} precision" + (f", {batches} microbatches" if batches > 1 else ""),
        f"on {plan.topology.get('name')}: {plan.world_size} device{'s' * (plan.world_size > 1)}, "
        f"{_shape(plan.strategy)}",
        *_recomputed(plan),
        f"step {step_text(found)}: "
        + ", ".join(f"{name} {share_text(t, step_s)}" for name, t in parts(found) if t > 0),
        f"peak memory {peak_text(found)} of "
        f"{bytes_text(plan.search.memory_limit_bytes)} on each device{may_not_fit(plan)}",
        quality(plan),
    ]


def may_not_fit(plan: Plan) -> str:
    """Where the limit of memory is inside the band."""
    band = plan.estimate.band
    if band is None or band.high_bytes <= plan.search.memory_limit_bytes:
        return ""
    return ", which may be too little"


def _recomputed(plan: Plan) -> list[str]:
    """In how many copies of repeated blocks how many operators are recomputed."""
    left = set(plan.strategy.recompute)
    if not left:
        return []
    found = []
    for block in blocks(plan.graph):
        copies: Counter[int] = Counter()
        for start in range(block.start, block.stop, block.period):
            inside = {o.name for o in plan.graph.operators[start : start + block.period]}
            copies[len(inside & left)] += 1
            left -= inside
        found += [
            f"{copies[count]} of {block.copies} blocks ({count} of {block.period} operators)"
            for count in sorted(copies, reverse=True)
            if count
        ]
    if left:
        found.append(f"{len(left)} operators{' outside of blocks' if found else ''}")
    return [f"recomputed for the backward: {', '.join(found)}"]


def parts(found: Estimate) -> list[tuple[str, float]]:
    """Of the step; in several stages, of its critical path."""
    return [
        ("forward", found.forward_compute_s),
        ("backward", found.backward_compute_s),
        ("forward communication", found.forward_communication_s),
        ("backward communication", found.backward_communication_s),
        ("gradients and parameters", found.gradient_synchronisation_s),
        ("optimizer", found.optimizer_s),
        *([("transfers", found.pipeline.transfer_s)] if found.pipeline is not None else []),
        *([("waiting for hosts", found.launches_s)] if found.launches_s else []),
    ]


EXACT = 5e-5
"""Gaps below this print as 0.00%."""


def quality(plan: Plan) -> str:
    """How good it is known to be, and who found it."""
    search = plan.search
    if not search.trials:
        return f"{search.searcher.replace('by hand', 'written by hand')}, not searched"
    among = f" among {search.among}" if search.among else ""
    if not 0 < search.lower_bound_s < math.inf:
        proof = "without a lower bound"
    elif search.stop_reason == "optimal" and search.gap < EXACT:
        proof = f"proven optimal{among} (gap {search.gap:.2%})"
    else:
        proof = (
            f"at most {search.gap:.2%} from optimal{among}: "
            f"{'none of them' if among else 'no strategy'} is faster than "
            f"{time_text(search.lower_bound_s)}"
        )
    stopped = {"time": ", the time limit ended it", "interrupted": ", interrupted"}
    return (
        f"{proof}, searched by {search.searcher} in {time_text(search.search_time_s)}"
        f"{stopped.get(search.stop_reason, '')}"
    )


def _best(plan: Plan, top: int) -> list[str]:
    """The best strategy of each mesh, the fastest first; a recipe stands here only when no mesh's
    own strategy is as fast."""
    search = plan.search
    tried = [t for t in search.trials if t.outcome != "recipe"]
    found = [t for t in tried if t.step_time_s is not None]
    found = sorted(filter(lambda t: _fits(t, search), found), key=_step_time_s)
    fastest = [t for t in search.trials if t.step_time_s == plan.estimate.step_time_s]
    if fastest and not any(t in found for t in fastest):
        found.insert(0, fastest[0])
    rows = [
        [
            str(place),
            f"{mesh_text(trial.mesh)} {trial.name}".rstrip(),
            time_text(_step_time_s(trial)),
            _against_limit(trial, search.memory_limit_bytes),
            trial.bound_by,
            time_text(trial.lower_bound_s) if math.isfinite(trial.lower_bound_s) else "-",
        ]
        for place, trial in enumerate(found[:top], 1)
    ]
    others = {
        "more found": len(found) - len(rows),
        "not searched, their bound is above the best": _number(tried, "bounded"),
        "do not fit in memory": _number(tried, "infeasible"),
        "not reached in time": len([t for t in tried if t.outcome == "time" and t not in found]),
    }
    left = ", ".join(f"{n} {what}" for what, n in others.items() if n)
    columns = ["", "mesh", "step", "memory", "bound by", "lower bound"]
    shown = [table(columns, rows, right=(2,))] if rows else []
    return [*shown, *([f"  other meshes: {left}"] if left else []), ""]


def _ties(plan: Plan) -> list[str]:
    """Plans that may be as fast, and what is otherwise with them."""
    ties = plan.search.ties
    if not ties:
        return []
    rows = [
        [
            f"{mesh_text(tie.mesh)} {tie.name}".rstrip(),
            time_text(tie.step_time_s),
            f"{tie.slower:+.1%}" if place else "",
            f"{tie.within:.1%}" if place else "",
            bytes_text(tie.peak_memory_bytes),
            bytes_text(tie.sent_bytes),
            str(tie.stages),
            str(tie.microbatches),
            str(tie.axes),
            str(tie.recomputed),
        ]
        for place, tie in enumerate(ties)
    ]
    columns = ["mesh", "step", "slower", "unsure by", "memory", "sent", "stages"]
    columns += ["microbatches", "axes", "recomputed"]
    return [
        "ties, as far as is known; what they have otherwise:",
        table(columns, rows, right=range(1, len(columns))),
        *_left_out(plan),
        "",
    ]


def _left_out(plan: Plan) -> list[str]:
    """Meshes that were not searched, since a bound was above the best, but not by more than two
    plans may differ without our knowing."""
    band = plan.estimate.band
    if band is None:
        return []
    limit_s = plan.estimate.step_time_s * math.exp(band.own)
    tried = (t for t in plan.search.trials if t.outcome == "bounded")
    count = sum(trial.lower_bound_s <= limit_s for trial in tried)
    return [f"  not searched, and their bounds do not exclude a tie: {count}"] if count else []


def _fits(trial: TrialSummary, search: SearchSummary) -> bool:
    return (trial.peak_memory_bytes or 0) <= search.memory_limit_bytes


def _number(trials: list[TrialSummary], outcome: str) -> int:
    return sum(trial.outcome == outcome for trial in trials)


def _step_time_s(trial: TrialSummary) -> float:
    assert trial.step_time_s is not None
    return trial.step_time_s


def _against_limit(trial: TrialSummary, limit_bytes: int) -> str:
    assert trial.peak_memory_bytes is not None
    share = share_text(trial.peak_memory_bytes, limit_bytes)
    return f"{bytes_text(trial.peak_memory_bytes)} ({share})"


def _recipes(plan: Plan) -> list[str]:
    """ "1.31x faster than megatron_sp", the nearest recipe first; what does not fit comes last."""
    limit = plan.search.memory_limit_bytes
    recipes = [t for t in plan.search.trials if t.outcome == "recipe"]
    fitting, others = [], []
    for trial in recipes:
        if trial.step_time_s is None or trial.peak_memory_bytes is None:
            others.append(f"  {trial.name} divides nothing here: the sizes do not allow it")
        elif trial.peak_memory_bytes > limit:
            others.append(
                f"  {trial.name} does not fit: {bytes_text(trial.peak_memory_bytes)} on a device"
            )
        else:
            fitting.append((trial.step_time_s, trial))
    lines = [
        f"  {_faster(time_s / plan.estimate.step_time_s)} {trial.name} "
        f"({time_text(time_s)}, {bytes_text(trial.peak_memory_bytes or 0)}, "
        f"mesh {mesh_text(trial.mesh)})"
        for time_s, trial in sorted(fitting, key=lambda pair: pair[0])
    ]
    return ["the usual recipes:", *lines, *others, ""] if recipes else []


def _faster(ratio: float) -> str:
    """
    >>> _faster(1.312), _faster(0.99), _faster(1.0)
    ('1.31x faster than', '1.01x slower than', 'as fast as')
    """
    if abs(ratio - 1) < 0.0005:
        return "as fast as"
    return f"{ratio:.2f}x faster than" if ratio > 1 else f"{1 / ratio:.2f}x slower than"


def kinds_of_memory(found: Memory) -> list[tuple[str, int]]:
    return [
        ("parameters", found.parameters_bytes),
        ("gradients", found.gradients_bytes),
        ("optimizer state", found.optimizer_bytes),
        ("activations kept for the backward", found.activations_bytes),
        ("temporaries", found.temporaries_bytes),
        ("communication buffers", found.buffers_bytes),
    ]


def kinds_of_reserve(found: Memory) -> list[tuple[str, int]]:
    """What the process has beside what is allocated."""
    return [
        ("the allocator's fragments", found.fragmentation_bytes),
        ("the matrix library's workspace", found.workspace_bytes),
        ("the communication library's buffers", found.communicators_bytes),
        ("the device's context", found.context_bytes),
    ]


ROW_COLUMNS = (
    "row",
    "devices",
    "stages",
    "forward",
    "backward",
    "update",
    "bubble",
    "in flight",
    "peak memory",
    "of the device",
)


def row_cells(found: Estimate) -> list[list[str]]:
    assert found.pipeline is not None
    return [
        [
            str(number),
            ranges_text(row.devices),
            ranges_text(row.stages),
            time_text(row.forward_s),
            time_text(row.backward_s),
            time_text(row.update_s),
            f"{time_text(row.bubble_s)} ({share_text(row.bubble_s, found.step_time_s)})",
            str(row.most_in_flight),
            bytes_text(row.memory.total_bytes),
            bytes_text(row.memory.device_bytes),
        ]
        for number, row in enumerate(found.pipeline.rows)
    ]


def rows(found: Estimate) -> list[str]:
    """What each group of devices does in a step, and what goes between them."""
    if found.pipeline is None:
        return []
    sent = sum(one.bytes for one in found.pipeline.traffic)
    return [
        "each row, on each of its devices:",
        table(list(ROW_COLUMNS), row_cells(found), right=range(3, 10)),
        f"  sent from row to row in a step: {bytes_text(sent)} in all",
        "",
    ]


def memory(found: Estimate, of_bytes: int | None = None) -> list[str]:
    """``of_bytes``: what a device has, if it is known."""
    total, kinds = found.peak_memory_bytes, kinds_of_memory(found.memory)
    where = f", reached at {found.memory.at}" if found.memory.at else ""
    return [
        f"memory at the peak{where}:",
        *(f"  {bytes_text(n):>8}  {share_text(n, total):>4}  {kind}" for kind, n in kinds if n),
        *_reserve(found, of_bytes),
    ]


def _reserve(found: Estimate, of_bytes: int | None) -> list[str]:
    """From what is allocated to what the process has of the device."""
    beside = [(kind, n) for kind, n in kinds_of_reserve(found.memory) if n]
    if not beside:
        return []
    fragments, workspace, *others = kinds_of_reserve(found.memory)
    shown = [
        ("allocated, in all", found.peak_memory_bytes),
        *(fragments, workspace),
        ("reserved by the allocator, in all", found.reserved_memory_bytes),
        *others,
        ("of the device, in all", found.device_memory_bytes),
    ]
    if of_bytes is not None and of_bytes > found.device_memory_bytes:
        free = of_bytes - found.device_memory_bytes
        shown.append((f"headroom: free of {bytes_text(of_bytes)}", free))
    return [f"  {bytes_text(n):>8}        {kind}" for kind, n in shown if n]


ALLOCATED_COLUMNS = (
    *("row", "parameters", "gradients", "optimizer", "activations", "temporaries", "buffers"),
    "reached at",
)
RESERVED_COLUMNS = (
    *("row", "allocated", "fragments", "workspace", "reserved", "communication", "context"),
    *("of the device", "headroom"),
)


def allocated_cells(found: Estimate) -> list[list[str]]:
    """Of each row of a pipeline, what is allocated at its peak."""
    assert found.pipeline is not None
    return [
        [str(i), *(bytes_text(n) for _, n in kinds_of_memory(row.memory)), row.memory.at]
        for i, row in enumerate(found.pipeline.rows)
    ]


def reserved_cells(found: Estimate, of_bytes: int | None) -> list[list[str]]:
    """Of each row of a pipeline, from what is allocated to what is left of the device."""
    assert found.pipeline is not None
    cells = []
    for i, row in enumerate(found.pipeline.rows):
        of = row.memory
        numbers = (
            *(of.total_bytes, of.fragmentation_bytes, of.workspace_bytes, of.reserved_bytes),
            *(of.communicators_bytes, of.context_bytes, of.device_bytes),
        )
        free = "-" if of_bytes is None else bytes_text(max(0, of_bytes - of.device_bytes))
        cells.append([str(i), *map(bytes_text, numbers), free])
    return cells


def memory_of_rows(found: Estimate, of_bytes: int | None) -> list[str]:
    """What each group of devices has at its peak, by kind."""
    if found.pipeline is None:
        return []
    return [
        "memory of each row, at its peak:",
        table(list(ALLOCATED_COLUMNS), allocated_cells(found), right=range(1, 7)),
        "",
        table(list(RESERVED_COLUMNS), reserved_cells(found, of_bytes), right=range(1, 9)),
        "",
    ]


def _proposed(plan: Plan) -> list[str]:
    if not plan.proposed:
        return []
    return [
        "",
        "rules found by trying, not written by a person (each passed the check against the whole "
        "op):",
        *(f"  {op}: {rule.signature}" for op, rule in plan.proposed),
    ]


# Parts of it that other commands print


def search(found: SearchSummary, best: Estimate | None = None) -> str:
    """Every trial, in the order in which they were made, and what the best may take."""
    rows = [
        [
            trial.name,
            mesh_text(trial.mesh),
            trial.outcome,
            "-" if trial.step_time_s is None else time_text(trial.step_time_s),
            time_text(trial.lower_bound_s) if math.isfinite(trial.lower_bound_s) else "-",
            "-" if trial.peak_memory_bytes is None else bytes_text(trial.peak_memory_bytes),
            trial.bound_by,
        ]
        for trial in found.trials
    ]
    columns = ["", "mesh", "outcome", "step", "lower bound", "memory", "bound by"]
    return "\n".join(
        [
            f"{len(rows)} trials of {found.searcher} in {time_text(found.search_time_s)}, "
            f"{found.stop_reason}, gap {found.gap:.2%}",
            *([] if best is None else [f"the best: step {step_text(best)}, {peak_text(best)}"]),
            table(columns, rows),
        ]
    )


def estimate(found: Estimate, machine: str) -> str:
    """The parts of a predicted step."""
    shown = [[name, time_text(t), share_text(t, found.step_time_s)] for name, t in parts(found)]
    shown += [["step", step_text(found), ""]]
    path = [] if found.pipeline is None else ["on its critical path:"]
    lines = [table(["", "", ""], shown, right=(1, 2)), *rows(found), *memory(found)]
    return "\n".join([f"on {machine}", *path, *lines])


def graph(found: OperatorGraph) -> str:
    """How many operators of each op, and the sizes of the model."""
    counts = Counter(operator.op for operator in found.operators)
    rows = [[str(n), op] for op, n in counts.most_common()]
    inputs = ", ".join(
        f"{name} {spec.dtype}{list(spec.shape)}"
        for name in found.inputs
        for spec in (found.spec(name),)
    )
    return "\n".join(
        [
            f"{found.name}: {count_text(found.parameter_count)} parameters in "
            f"{len(found.parameters)} tensors, {len(found.operators)} operators",
            f"inputs: {inputs}",
            f"fingerprint {found.fingerprint[:16]}",
            table(["", "op"], rows, right=(0,)),
        ]
    )


# Explanation: what `autopar explain` prints


def explain(plan: Plan, rules: Rules, *, views: bool = False) -> str:
    """Block by block: what is split how, and what each redistribution costs.

    ``views``: list the operators that cost nothing, too.
    """
    if plan.pipeline is not None:
        return _explain_stages(plan, views)
    found = explanation(plan, rules)
    lines = [
        *_heading(plan)[:-1],
        f"communication {time_text(found.communication_s)} a step",
        "",
    ]
    lines[-1:] = [*doubts(plan), ""]
    for block in found.blocks:
        lines += _block(block, plan.mesh, views)
    if found.unplaced:
        lines += ["gradient norm", *_indented([_collective_text(c) for c in found.unplaced]), ""]
    lines += memory(plan.estimate, plan.topology.get("memory_bytes"))
    return "\n".join(lines) + "\n"


def _explain_stages(plan: Plan, views: bool) -> str:
    """The rows, and equal stages once."""
    bound = bound_by(plan.estimate, plan.search.memory_limit_bytes)
    lines = [*_heading(plan)[:-1], f"bound by {bound}", *doubts(plan), "", *rows(plan.estimate)]
    if passed := passed_on(plan):
        lines[-1:] = [*_indented(map(passed_on_text, passed)), ""]
    for stages in stages_of(plan):
        lines += [stages_text(stages), ""]
        for block in stages.what.blocks:
            lines += _block(block, stages.mesh, views)
    lines += memory_of_rows(plan.estimate, plan.topology.get("memory_bytes"))
    lines += memory(plan.estimate, plan.topology.get("memory_bytes"))
    return "\n".join(lines) + "\n"


def doubts(plan: Plan) -> list[str]:
    """What is known least of the step, and what would tell."""
    found = largest_doubt(plan)
    return [] if found is None else doubt_text(found)


def passed_on_text(of: PassedOn) -> str:
    """
    >>> passed_on_text(PassedOn("wte.weight", (0, 3), 4096))
    'wte.weight is kept otherwise in stages 0, 3: 4.10 kB of its gradient are exchanged once a step'
    """
    return (
        f"{of.parameter} is kept otherwise in stages {ranges_text(of.stages)}: "
        f"{bytes_text(of.bytes)} of its gradient are exchanged once a step"
    )


def stages_text(stages: StageExplanation) -> str:
    """Which they are, their mesh, and which operators each has."""
    numbers = ranges_text(stages.numbers)
    what = f"stage {numbers}" if len(stages.numbers) == 1 else f"stages {numbers}, which are alike"
    has = "; ".join(_some(operators) for operators in stages.operators[:MOST_STAGES])
    more = "; ..." if len(stages.operators) > MOST_STAGES else ""
    return f"{what}: mesh {mesh_text(stages.mesh)}: {has}{more}"


MOST_STAGES = 3
"""Of stages that are alike, how many are listed."""


def _block(block: Block, mesh: Mesh, views: bool) -> list[str]:
    lines = [f"{block.path}{_times(block.count)}: communication {time_text(block.communication_s)}"]
    axes = [f"{name} ({size})" for name, size in mesh.axes]
    shown = [row for row in block.operators if views or not row.view]
    if shown:
        rows = [
            [
                f"{row.name}{_times(row.count, block.count)}",
                *(divided_text(divided) for divided in row.split),
                _collectives_text(row.collectives),
            ]
            for row in shown
        ]
        lines.append(table(["operator", *axes, "inside it"], rows))
    if block.redistributions:
        rows = [
            [
                f"{row.tensor}{_times(row.count, block.count)}",
                change_text(row.source, row.target, mesh),
                _some(row.readers),
                _collectives_text(row.collectives),
            ]
            for row in block.redistributions
        ]
        lines.append(table(["redistributed", "from -> to", "for", "costs"], rows))
    if block.parameters:
        rows = [
            [
                f"{row.name}{_times(row.count, block.count)}",
                "x".join(map(str, row.shape)),
                *row.storage,
                bytes_text(row.local_bytes),
                _collectives_text(row.collectives),
            ]
            for row in block.parameters
        ]
        lines.append(table(["parameter", "shape", *axes, "a device has", "costs"], rows))
    if any(divided.parts for row in block.operators for divided in row.split):
        lines.append(IN_PARTS)
    for refusal in block.refusals:
        factors = _some([f"{factor} of {name}" for name, factor in refusal.factors])
        lines.append(
            f"  not offered on {refusal.axis}: {refusal.axis_size} devices do not divide "
            f"{refusal.size} ({factors})"
        )
    return [*lines, ""]


def divided_text(divided: Divided) -> str:
    """
    >>> divided_text(Divided("tensor", "out", 48)), divided_text(Divided("tensor", "nothing", None))
    ('out 48', '-')
    >>> divided_text(Divided("tensor", "out", 48, (1, 1, 1)))
    'out 48 in 3 parts'
    >>> divided_text(Divided("tensor", "out", 48, (4, 1, 1)))
    'out 48 in parts 4:1:1'
    """
    if divided.choice in WORDS:
        return WORDS[divided.choice]
    text = f"{divided.choice} {divided.size}"
    if not divided.parts:
        return text
    if set(divided.parts) == {1}:
        return f"{text} in {len(divided.parts)} parts"
    return f"{text} in parts {':'.join(map(str, divided.parts))}"


IN_PARTS = (
    "  in parts: a device has its share of each (of query, key and value of one product, say);\n"
    "  S(d,3): of 3 equal parts of dim d, S(d,4:1:1): of parts of these relative sizes"
)

WORDS = {NOTHING: "-", REPLICATED: "repeated", SUMMED: "partial sums"}
"""How an axis that divides no factor is shown."""


def change_text(source: Sharding, target: Sharding, mesh: Mesh) -> str:
    """The axes that change.

    >>> change_text(("S(0)", "P"), ("S(0)", "S(1)"), Mesh((("data", 2), ("tensor", 4))))
    'tensor: P -> S(1)'
    """
    return ", ".join(
        f"{axis}: {a} -> {b}"
        for axis, a, b in zip(mesh.names, source, target, strict=True)
        if a != b
    )


def _collectives_text(rows: Iterable[CollectiveRow]) -> str:
    return "\n".join(map(_collective_text, rows))


def _collective_text(row: CollectiveRow) -> str:
    return (
        f"{row.phase} {row.kind} on {row.axis}, {bytes_text(row.bytes)}{_times(row.times)}: "
        f"{time_text(row.time_s)}"
    )


def _times(count: int, usual: int = 1) -> str:
    return "" if count == usual else f" x{count}"


def _some(names: Iterable[str], most: int = 3) -> str:
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


# Difference: what `autopar diff` prints


def difference(found: PlanDiff) -> str:
    lines = [] if found.same_model else ["the two plans are of different models"]
    before, after = found.peak_memory_bytes
    lines += [
        f"the second is {_faster(found.faster)} the first, predicted{_tie_text(found)}",
        f"peak memory {bytes_text(before)} -> {bytes_text(after)}",
    ]
    for change in found.changes:
        if not change.name:
            lines.append(f"{change.what}: {change.before} -> {change.after}")
    rows = [
        [what, f"{path}{_times(n)}", before_text, after_text]
        for (what, path, before_text, after_text), n in _alike(found.changes).items()
    ]
    if rows:
        lines += ["", table(["", "where", "first", "second"], rows)]
    if not found.changes:
        lines.append("every choice is the same")
    return "\n".join(lines) + "\n"


def _tie_text(found: PlanDiff) -> str:
    """
    >>> stages = (Change("stages", "", "1", "2"),)
    >>> _tie_text(PlanDiff(True, 0.99, peak_memory_bytes=(1, 1), changes=stages, within=1.04))
    ': a tie, it is known to a factor of 1.04'
    """
    if (
        not found.changes
        or found.within is None
        or not 1 / found.within <= found.faster <= found.within
    ):
        return ""
    return f": a tie, it is known to a factor of {found.within:.2f}"


def _alike(changes: Iterable[Change]) -> dict[tuple[str, str, str, str], int]:
    """Equal changes in equal blocks, counted."""
    found: dict[tuple[str, str, str, str], int] = {}
    for change in changes:
        if change.name:
            path, number, rest = block_of(change.name)
            where = f"{path}.{rest}" if number else rest
            key = (change.what, where, change.before, change.after)
            found[key] = found.get(key, 0) + 1
    return found


# Measurement: what `autopar run` prints


def measurement(
    plan: Plan, found: Measurement, alone: tuple[float, ...] | None, *, random: bool = False
) -> str:
    """``alone``: the losses of the same steps in one process, which there are none of when they
    depend on ``random`` masks."""
    columns = ["step", "loss", "time"] + (["loss in one process", "difference"] if alone else [])
    rows = []
    for i, (loss, time_s) in enumerate(zip(found.losses, found.step_times_s, strict=True)):
        row = [str(i + 1), f"{loss:.7g}", time_text(time_s)]
        if alone:
            row += [f"{alone[i]:.7g}", f"{_relative(loss, alone[i]):.1e}"]
        rows.append(row)
    predicted = plan.estimate
    against = [
        [
            "step time",
            step_text(predicted),
            time_text(found.step_time_s),
            _error(predicted.step_time_s, found.step_time_s),
        ],
        [
            "peak memory of a device",
            peak_text(predicted),
            bytes_text(found.peak_memory_bytes),
            _error(predicted.peak_memory_bytes, found.peak_memory_bytes),
        ],
    ]
    return "\n".join(
        [
            f"{plan.graph.name} on {plan.world_size} processes, {_shape(plan.strategy)}",
            table(columns, rows, right=range(len(columns))),
            *(["  not compared with one process: torch draws other random masks"] * random),
            "",
            table(["", "predicted", "measured", "prediction is"], against, right=(1, 2)),
        ]
    )


def _shape(strategy: Strategy) -> str:
    if len(strategy.stages) == 1:
        return f"mesh {mesh_text(strategy.mesh)}"
    return f"{len(strategy.stages)} stages by {strategy.schedule}, mesh {meshes_text(strategy)}"


def _relative(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected) if expected else abs(found)


def _error(predicted: float, measured: float) -> str:
    """
    >>> _error(1.2, 1.0), _error(0.9, 1.0), _error(1.0, 0.0)
    ('20% too high', '10% too low', '-')
    """
    if not measured:
        return "-"
    error = predicted / measured - 1
    return f"{abs(error):.0%} too {'high' if error > 0 else 'low'}"


# Verification: what `autopar verify` prints


def verification(report: Report) -> str:
    """Promised against executed, and what differs."""
    rows = [
        [r.phase, r.kind, r.axis, bytes_text(r.bytes), str(r.promised), str(r.executed)]
        for r in report.collectives
    ]
    columns = ["", "collective", "axis", "bytes", "promised", "executed"]
    promised = report.promised_memory.total_bytes
    lines = [f"rank {report.rank} of {report.world_size}, dry run of one step"]
    lines += [table(columns, rows, right=(3, 4, 5))] if rows else ["no communication"]
    lines += [
        f"peak memory {bytes_text(promised)} promised, "
        f"{bytes_text(report.measured_peak_bytes)} measured ({report.memory_error:+.1%}), "
        f"at {report.measured_peak_at}",
        *(["types of all tensors checked by spmd_types"] if report.typechecked else []),
        *(f"DIFFERENT {difference}" for difference in report.differences),
        "the plan keeps its promise" if report.ok else "the plan does not keep its promise",
    ]
    return "\n".join(lines)


def verification_of_stages(report: StagesReport) -> str:
    """A line for each process that was dry-run, and what differs."""
    shown = [
        [
            str(one.rank),
            ranges_text(one.ranks),
            ranges_text(one.stages),
            str(one.actions),
            str(sum(c.executed for c in one.collectives)),
            bytes_text(sum(executed for *_, executed in one.sent)),
            bytes_text(one.promised_memory.total_bytes),
            bytes_text(one.measured_peak_bytes),
            f"{one.memory_error:+.1%}",
        ]
        for one in report.ranks
    ]
    columns = ["rank", "stands for", "stages", "actions", "collectives", "sent"]
    columns += ["peak promised", "measured", ""]
    return "\n".join(
        [
            f"dry run of one step, {len(report.ranks)} of {report.world_size} processes",
            table(columns, shown, right=(3, 4, 5, 6, 7, 8)),
            *(["types of all tensors checked by spmd_types"] if report.typechecked else []),
            *(f"DIFFERENT {difference}" for difference in report.differences),
            "the plan keeps its promise" if report.ok else "the plan does not keep its promise",
        ]
    )


# Profile: what `autopar profile` and `autopar calibrate` print


def profile(saved: dict[str, Any]) -> str:
    """The machine that was measured, and its fastest of each kind."""
    data = saved["profiled"]
    plain = [p for p in data["passes"] if not p["of"]]
    passes = max(plain, key=lambda p: p["bytes"] / p["seconds"])
    hosts = f" on {data['hosts']} hosts" if data["hosts"] > 1 else ""
    lines = [
        f"{saved['name']}: {saved['devices']} devices{hosts} with "
        f"{bytes_text(saved['memory_bytes'])} each, measured {data['date']} with "
        f"{', '.join(f'{name} {version}' for name, version in data['software'])}",
        *(
            f"  corrected {one['date']} by runs of {', '.join(plan for plan, *_ in one['runs'])}"
            for one in data["corrections"]
        ),
        f"  others used {data['others']:.0%} of the processors meanwhile",
        *([f"  ended early, without {', '.join(data['left_out'])}"] * bool(data["left_out"])),
        f"  an operator takes {time_text(data['operator_s'])} beside its work",
        *_messages(data["message_s"], data["message_byte_s"]),
        *(
            f"  {count} at work: {speed:.3g} times as fast as all"
            for count, speed in data.get("speeds", ())
        ),
        *_fastest_products(data["products"]),
        f"  memory at {bytes_text(passes['bytes'] / passes['seconds'])}/s",
        *_fastest_exchanges(data["exchanges"], data["devices"] // data["hosts"]),
        *(
            f"  {o['kind']} of {bytes_text(o['bytes'])} beside products: the longer takes "
            f"{o['together_s'] / max(o['product_s'], o['collective_s']):.3g} times as long"
            for o in data["overlaps"]
        ),
    ]
    return "\n".join(lines)


def _messages(message_s: float, message_byte_s: float) -> list[str]:
    if not message_s:
        return []
    by_size = f" and {time_text(1e6 * message_byte_s)} for each MB" if message_byte_s else ""
    return [f"  a message takes {time_text(message_s)} of its sender and of its receiver{by_size}"]


_PRODUCTS = {"matmul": "products", "convolution": "convolutions", "attention": "attention"}


def _fastest_products(products: list[dict[str, Any]]) -> Iterator[str]:
    for kind, name in _PRODUCTS.items():
        of_kind = [p for p in products if p["kind"] == kind]
        if of_kind:
            best = max(of_kind, key=lambda p: p["flops"] / p["seconds"])
            yield (
                f"  {name} at {best['flops'] / best['seconds'] / 1e9:.3g} GFLOP/s "
                f"({best['dtype']}, {' x '.join(map(str, best['shape']))})"
            )


def _fastest_exchanges(exchanges: list[dict[str, Any]], per_host: int) -> Iterator[str]:
    """Of each axis and kind."""
    fastest: dict[tuple[str, int, int], float] = {}
    for e in exchanges:
        key = (e["kind"], e["group_size"], e["stride"])
        fastest[key] = max(e["bytes"] / e["seconds"], fastest.get(key, 0.0))
    for (kind, size, stride), rate in fastest.items():
        inside = size * stride <= per_host
        where = "a host" if inside else f"{size} hosts" if stride >= per_host else "all hosts"
        yield f"  {kind} over {size} devices of {where} at {bytes_text(rate)}/s"


def calibration(saved: dict[str, Any], factors: Sequence[Factor], output: str) -> str:
    last = saved["profiled"]["corrections"][-1]
    runs = [
        [plan, time_text(said), time_text(took), _error(said, took)]
        for plan, said, took in last["runs"]
    ]
    told = [
        [f.part, f"{f.factor:.3g}" if f.learnt else "1 (not told by these runs)", f"{f.learnt:.0%}"]
        for f in factors
    ]
    return "\n".join(
        [
            table(["run of", "predicted", "measured", "prediction is"], runs, right=(1, 2)),
            "",
            table(["seconds of", "factor", "of what was unknown, told"], told, right=(2,)),
            "",
            f"written to {output}; plan with --topology {output}",
        ]
    )


# Layout


def table(
    columns: list[str], rows: list[list[str]], *, right: Iterable[int] = (), width: int = WIDTH
) -> str:
    """A table without rules, as wide as it needs to be and at most ``width``."""
    made = Table(box=None, pad_edge=False, show_edge=False, header_style="", padding=(0, 2, 0, 0))
    aligned = set(right)
    for i, column in enumerate(columns):
        made.add_column(
            column, justify="right" if i in aligned else "left", overflow="fold", no_wrap=False
        )
    for row in rows:
        made.add_row(*row)
    return rendered(Padding(made, (0, 0, 0, 2)), width)


def rendered(what: object, width: int) -> str:
    """What rich draws, without colour and without blanks at the ends of lines."""
    out = StringIO()
    Console(
        file=out,
        width=width,
        color_system=None,
        markup=False,
        highlight=False,
        legacy_windows=False,
    ).print(what)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().split("\n"))


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]
