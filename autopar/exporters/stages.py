"""A plan of a profiled graph: its stages, what each of them does when, and the memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from autopar.exporters import drawing, perfetto
from autopar.exporters.doubts import largest_doubt
from autopar.exporters.text import doubts, may_not_fit, quality
from autopar.exporters.text import memory as memory_lines
from autopar.exporters.units import bytes_text, peak_text, share_text, step_text, time_text
from autopar.ir.plan import Plan, mesh_text, plan_to_json
from autopar.ir.profiled_graph import global_batch
from autopar.ir.strategy import Stage
from autopar.simulator.timeline import Timeline

MOST_COLUMNS = 120


def summary(plan: Plan) -> str:
    """What `autopar plan` prints."""
    strategy, found = plan.strategy, plan.estimate
    count = len(strategy.stages)
    chunks = f" x {strategy.chunks}" if (strategy.chunks or 1) > 1 else ""
    what = "step" if plan.objective == "step" else "busiest device or link in a step"
    lines = [
        f"{plan.graph.name}: {len(plan.graph.operators)} measured operators, "
        f"{global_batch(plan.graph)} samples a step, {strategy.training.optimizer}",
        f"on {plan.topology.get('name')}: {count} stage{'s' * (count > 1)} on {plan.world_size} of "
        f"{plan.topology.get('devices')} devices, schedule {strategy.schedule}{chunks}, "
        f"{strategy.microbatches} microbatch{'es' * (strategy.microbatches > 1)}",
        f"{what} {step_text(found)}, peak memory {peak_text(found)} of "
        f"{bytes_text(plan.search.memory_limit_bytes)} on each device{may_not_fit(plan)}",
        quality(plan),
        "",
        *_stages(plan),
        "",
    ]
    return "\n".join([*lines, *memory_lines(found)])


def _stages(plan: Plan) -> list[str]:
    return [
        f"  stage {number} on {_devices(stage)}, {mesh_text(stage.mesh)}: {_operators(stage, plan)}"
        for number, stage in enumerate(plan.strategy.stages)
    ]


def _devices(stage: Stage) -> str:
    first, last = stage.devices[0], stage.devices[-1]
    return f"device {first}" if first == last else f"devices {first} to {last}"


def _operators(stage: Stage, plan: Plan) -> str:
    first, last, count = stage.operators[0], stage.operators[-1], len(stage.operators)
    names = first if count == 1 else f"{first} to {last}, {count} operators"
    again = sum(name in plan.strategy.recompute for name in stage.operators)
    return names + (f", {again} recomputed" if again else "")


def explain(plan: Plan, timeline: Timeline) -> str:
    """The summary, the stages with their times, and the rows."""
    lines = ["", "a microbatch in each stage"]
    for number, (stage, cost) in enumerate(
        zip(plan.strategy.stages, timeline.pipeline.stages, strict=True)
    ):
        lines.append(
            f"  stage {number}: forward {time_text(float(cost.forward_s))}, backward "
            f"{time_text(float(cost.backward_s))}, {len(stage.operators)} operators"
        )
    lines += ["", "each row, and what it waits for"]
    for row in range(len(timeline.rows)):
        idle_s = float(timeline.parts(row).idle_s)
        lines.append(
            f"  row {row}: idle {share_text(idle_s, float(timeline.step_time_s))}, "
            f"{timeline.most_in_flight(row)} in flight, "
            f"{bytes_text(timeline.memory(row).total_bytes)}"
        )
    drawn = drawing.text(timeline, MOST_COLUMNS, lambda time_s: time_text(float(time_s)))
    return "\n".join([summary(plan), *doubts(plan), *lines, "", drawn, ""])


def explained(plan: Plan, timeline: Timeline) -> dict[str, Any]:
    """The same for programs."""
    data, doubt = plan_to_json(plan), largest_doubt(plan)
    more = {"largest_doubt": None if doubt is None else asdict(doubt)}
    return {
        **summarised(plan),
        **more,
        "stages": data["strategy"]["stages"],
        **drawing.summary(timeline),
    }


def summarised(plan: Plan) -> dict[str, Any]:
    """The plan file without its graph, splits and storage."""
    data = plan_to_json(plan)
    strategy = {k: v for k, v in data["strategy"].items() if k not in ("splits", "storage")}
    return {
        **{key: data[key] for key in ("autopar", "format", "created", "model", "fingerprint")},
        "objective": plan.objective,
        "topology": data["topology"],
        "world_size": plan.world_size,
        "peak_memory_bytes": plan.estimate.peak_memory_bytes,
        "estimate": {k: v for k, v in data["estimate"].items() if k != "collectives"},
        "strategy": strategy,
        "search": data["search"],
    }


def _html(plan: Plan, timeline: Timeline) -> str:
    title = f"{plan.graph.name}, {plan.strategy.schedule}"
    return drawing.html(timeline, title, lambda time_s: time_text(float(time_s)))


def _perfetto(plan: Plan, timeline: Timeline) -> str:
    return perfetto.trace(timeline)


EXPORTERS: dict[str, Callable[[Plan, Timeline], str]] = {
    "html": _html,
    "json": lambda plan, timeline: json.dumps(explained(plan, timeline), indent=1),
    "perfetto": _perfetto,
    "text": explain,
}
