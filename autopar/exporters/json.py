"""The explanation of a plan as JSON, for programs: what ``text`` prints, as numbers."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from autopar.exporters.doubts import largest_doubt
from autopar.exporters.explanation import explanation, passed_on, stages_of
from autopar.ir.plan import Plan, plan_to_json
from autopar.ir.simulation import Memory
from autopar.simulator.edges import Rules


def export(plan: Plan, rules: Rules) -> str:
    return json.dumps(explained(plan, rules), indent=1)


def summary(plan: Plan) -> dict[str, Any]:
    """The plan file without its graph, splits and storage: what the summary is made of."""
    data = plan_to_json(plan)
    return {
        **{key: data[key] for key in ("autopar", "format", "created", "model", "fingerprint")},
        "topology": data["topology"],
        **_where(plan),
        "world_size": plan.world_size,
        **_memory(plan.estimate.memory, plan.topology.get("memory_bytes")),
        "estimate": _estimate(plan, data["estimate"]),
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


def _memory(memory: Memory, of_bytes: int | None) -> dict[str, Any]:
    """What its lines come to; ``free`` of a device is its headroom."""
    return {
        "peak_memory_bytes": memory.total_bytes,
        "reserved_memory_bytes": memory.reserved_bytes,
        "device_memory_bytes": memory.device_bytes,
        "free_memory_bytes": None if of_bytes is None else of_bytes - memory.device_bytes,
    }


def _estimate(plan: Plan, data: dict[str, Any]) -> dict[str, Any]:
    """Without collectives."""
    found = {k: v for k, v in data.items() if k != "collectives"}
    if plan.estimate.pipeline is None:
        return found
    of_bytes = plan.topology.get("memory_bytes")
    rows = [
        {k: v for k, v in row.items() if k != "collectives"} | _memory(of.memory, of_bytes)
        for row, of in zip(found["pipeline"]["rows"], plan.estimate.pipeline.rows, strict=True)
    ]
    return {**found, "pipeline": {**found["pipeline"], "rows": rows}}


def explained(plan: Plan, rules: Rules) -> dict[str, Any]:
    doubt = largest_doubt(plan)
    summarised = {**summary(plan), "largest_doubt": None if doubt is None else asdict(doubt)}
    if plan.pipeline is None:
        return {**summarised, **asdict(explanation(plan, rules))}
    alike = [asdict(one) for one in stages_of(plan)]
    passed = [asdict(one) for one in passed_on(plan)]
    return {**summarised, "stages_alike": alike, "gradients_passed_on": passed}
