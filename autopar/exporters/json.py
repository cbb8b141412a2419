"""The explanation of a plan as JSON, for programs: what ``text`` prints, as numbers."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from autopar.exporters.doubts import largest_doubt
from autopar.exporters.explanation import explanation, passed_on, stages_of
from autopar.ir.plan import Plan, plan_to_json
from autopar.simulator.edges import Rules


def export(plan: Plan, rules: Rules) -> str:
    return json.dumps(explained(plan, rules), indent=1)


def summary(plan: Plan) -> dict[str, Any]:
    """The plan file without its graph, splits and storage: what the summary is made of."""
    data = plan_to_json(plan)
    device_bytes, of_bytes = plan.estimate.device_memory_bytes, plan.topology.get("memory_bytes")
    return {
        **{key: data[key] for key in ("autopar", "format", "created", "model", "fingerprint")},
        "topology": data["topology"],
        **_where(plan),
        "world_size": plan.world_size,
        "peak_memory_bytes": plan.estimate.peak_memory_bytes,
        "reserved_memory_bytes": plan.estimate.reserved_memory_bytes,
        "device_memory_bytes": device_bytes,
        "free_memory_bytes": None if of_bytes is None else of_bytes - device_bytes,
        "estimate": _without_collectives(data["estimate"], of_bytes),
        "training": data["strategy"]["training"],
        "search": data["search"],
        "proposed": data["proposed"],
    }


def _where(plan: Plan) -> dict[str, Any]:
    """The mesh; or the stages, each with its mesh and how many operators it has."""
    stages = plan.strategy.stages
    if len(stages) == 1:
        return {"mesh": [list(axis) for axis in plan.mesh.axes]}
    return {
        "schedule": plan.strategy.schedule,
        "microbatches": plan.strategy.microbatches,
        "stages": [
            {
                "devices": list(stage.devices),
                "mesh": [list(axis) for axis in stage.mesh.axes],
                "operators": len(stage.operators),
            }
            for stage in stages
        ],
    }


ALLOCATED = ("parameters", "gradients", "optimizer", "activations", "temporaries", "buffers")


def totals(memory: dict[str, Any], of_bytes: int | None) -> dict[str, Any]:
    """What the lines of a row's memory come to; ``free`` of a device is its headroom."""
    allocated = sum(memory[f"{kind}_bytes"] for kind in ALLOCATED)
    reserved = allocated + memory.get("workspace_bytes", 0) + memory.get("fragmentation_bytes", 0)
    device = reserved + memory.get("context_bytes", 0) + memory.get("communicators_bytes", 0)
    return {
        "peak_memory_bytes": allocated,
        "reserved_memory_bytes": reserved,
        "device_memory_bytes": device,
        "free_memory_bytes": None if of_bytes is None else of_bytes - device,
    }


def _without_collectives(estimate: dict[str, Any], of_bytes: int | None) -> dict[str, Any]:
    found = {k: v for k, v in estimate.items() if k != "collectives"}
    if "pipeline" in found:
        rows = [
            {k: v for k, v in row.items() if k != "collectives"} | totals(row["memory"], of_bytes)
            for row in found["pipeline"]["rows"]
        ]
        found["pipeline"] = {**found["pipeline"], "rows": rows}
    return found


def explained(plan: Plan, rules: Rules) -> dict[str, Any]:
    doubt = largest_doubt(plan)
    summarised = {**summary(plan), "largest_doubt": None if doubt is None else asdict(doubt)}
    if plan.pipeline is None:
        return {**summarised, **asdict(explanation(plan, rules))}
    alike = [asdict(one) for one in stages_of(plan)]
    passed = [asdict(one) for one in passed_on(plan)]
    return {**summarised, "stages_alike": alike, "gradients_passed_on": passed}
