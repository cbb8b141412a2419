"""The explanation of a plan as JSON, for programs: what ``text`` prints, as numbers."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from autopar.exporters.explanation import explanation
from autopar.ir.plan import Plan, plan_to_json
from autopar.simulator.edges import Rules


def export(plan: Plan, rules: Rules) -> str:
    return json.dumps(explained(plan, rules), indent=1)


def summary(plan: Plan) -> dict[str, Any]:
    """The plan file without its graph, splits and storage: what the summary is made of."""
    data = plan_to_json(plan)
    return {
        **{key: data[key] for key in ("autopar", "format", "created", "model", "fingerprint")},
        "topology": data["topology"],
        "mesh": [list(axis) for axis in plan.mesh.axes],
        "world_size": plan.world_size,
        "peak_memory_bytes": plan.estimate.peak_memory_bytes,
        "estimate": {k: v for k, v in data["estimate"].items() if k != "collectives"},
        "training": data["strategy"]["training"],
        "search": data["search"],
        "proposed": data["proposed"],
    }


def explained(plan: Plan, rules: Rules) -> dict[str, Any]:
    return {**summary(plan), **asdict(explanation(plan, rules))}
