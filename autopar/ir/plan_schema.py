"""The JSON schema of the plan file, for tools that read plans without autopar."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from autopar.ir.graph import ITEM_BYTES, Role
from autopar.ir.rule import NOT_DATA, Inner, OpRule, Product, Saved
from autopar.ir.search import SearchSummary, Tie, TrialSummary
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
from autopar.ir.strategy import Training
from cost_models.calibration import Calibration
from cost_models.topology import Device, Tier, Topology

FORMAT = 1
"""Version of the plan file: one more whenever an older autopar could misread a newer file."""

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
SECONDS: Schema = {"type": "number", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
ANYTHING: Schema = {}
PLACEMENT: Schema = {
    "type": "string",
    "pattern": r"^(R|I|P|S\([0-9]+(,([2-9]|[1-9][0-9]+|[0-9]+(:[0-9]+)+))?\))$",
}
BOUND: Schema = {"type": ["number", "null"], "description": "null: infinite, nothing is feasible"}


def plan_schema() -> Schema:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"autopar plan, format {FORMAT}",
        **record(
            autopar=described(TEXT, "version that wrote it"),
            format={"const": FORMAT},
            created=described(TEXT, "UTC, ISO 8601"),
            model=described(TEXT, "as the user named it; empty for an object"),
            batch=described({"type": ["integer", "null"]}, "of an hf: model"),
            sequence={"type": ["integer", "null"]},
            fingerprint={"type": "string", "pattern": "^[0-9a-f]{64}$"},
            topology=_topology(),
            estimate=_estimate(),
            search=_search(),
            strategy=_strategy(),
            proposed=described(
                many(tuple_of(TEXT, _rule())), "(op, rule) pairs that were found by trying"
            ),
            graph=_graph(),
        ),
    }
    schema["properties"]["objective"] = one_of(("step", "throughput"))  # left out where it is step
    return schema


# Words that schemas are made of


def record(**properties: Schema) -> Schema:
    """An object with exactly these keys."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def table(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


def many(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def tuple_of(*items: Schema) -> Schema:
    return {"type": "array", "prefixItems": list(items), "items": False, "minItems": len(items)}


def one_of(values: tuple[Any, ...]) -> Schema:
    return {"enum": list(values)}


def described(schema: Schema, what: str) -> Schema:
    return {**schema, "description": what}


def of_dataclass(kind: type, /, **special: Schema) -> Schema:
    """A record with the fields of ``kind``; ``special`` where the type does not say enough."""
    hints = get_type_hints(kind)
    plain: dict[Any, Schema] = {str: TEXT, int: WHOLE, float: SECONDS, bool: FLAG}
    plain[float | None] = {"type": ["number", "null"]}
    found = {}
    for field in fields(kind):
        if field.name in special:
            found[field.name] = special[field.name]
        elif hints[field.name] in plain:
            found[field.name] = plain[hints[field.name]]
        else:
            assert get_origin(hints[field.name]) is Literal, (kind, field.name)
            found[field.name] = one_of(get_args(hints[field.name]))
    return record(**found)


# Reading


def fault(value: Any, schema: Schema, where: str = "") -> str:
    """The first thing in ``value`` that is not as ``schema`` says, "" when all is. Keys that the
    schema does not know are not faults: a newer autopar may write more.

    >>> fault({"a": [1, "x"]}, record(a=many(WHOLE)))
    'a[1] is "x", not an integer'
    >>> fault({}, record(a=WHOLE))
    'a is missing'
    """
    if wrong := _wrong(value, schema):
        return f"{where or 'it'} is {_short(value)}, {wrong}"
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        if lost := [key for key in schema.get("required", ()) if key not in value]:
            return f"{_at(where, lost[0])} is missing"
        inner = [(known.get(key, others), v, _at(where, key)) for key, v in value.items()]
    elif isinstance(value, list):
        first, others = schema.get("prefixItems", []), schema.get("items")
        schemas = [*first, *[others] * (len(value) - len(first))]
        inner = [
            (s, v, f"{where}[{i}]") for i, (s, v) in enumerate(zip(schemas, value, strict=False))
        ]
    else:
        return ""
    return next((f for s, v, place in inner if s and (f := fault(v, s, place))), "")


KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "object": ("an object", (dict,)),
    "array": ("an array", (list,)),
    "string": ("a string", (str,)),
    "boolean": ("a boolean", (bool,)),
    "integer": ("an integer", (int,)),
    "number": ("a number", (int, float)),
    "null": ("null", (type(None),)),
}


def _wrong(value: Any, schema: Schema) -> str:
    """What the value by itself should be instead; "" when it is that."""
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        return "not " + " or ".join(KINDS[kind][0] for kind in kinds)
    if "const" in schema and value != schema["const"]:
        return f"not {_short(schema['const'])}"
    if "enum" in schema and value not in schema["enum"]:
        return "not one of " + ", ".join(map(_short, schema["enum"]))
    if "pattern" in schema and not re.search(schema["pattern"], value):
        return f"not of the form {schema['pattern']}"
    if "minimum" in schema and value < schema["minimum"]:
        return f"less than {schema['minimum']}"
    if isinstance(value, list):
        least, first = schema.get("minItems", 0), schema.get("prefixItems", [])
        if len(value) < least or (schema.get("items") is False and len(value) > len(first)):
            return f"not of {len(first)} items"
    return ""


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, KINDS[kind][1]) and (kind == "boolean" or not isinstance(value, bool))


def _at(where: str, key: str) -> str:
    if not key.isidentifier():
        return f"{where}[{json.dumps(key)}]"
    return f"{where}.{key}" if where else key


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


# The parts of a plan, in the order of the file


def _topology() -> Schema:
    """``analytical`` or ``profiled``; neither for a cost model of the user's own."""
    rates = many(tuple_of(TEXT, NUMBER))
    device = of_dataclass(
        Device,
        peak_flops_per_s=rates,
        achievable_flops_per_s=rates,
        attention_flops_per_s=rates,
    )
    calibration, tiers = of_dataclass(Calibration), many(of_dataclass(Tier))
    for of, later in ((device, "power_w"), (device, "flop_energy"), (calibration, "flop_pj")):
        of["required"].remove(later)  # older plans know nothing of it
    return {
        "type": "object",
        "properties": {
            "name": TEXT,
            "devices": WHOLE,
            "memory_bytes": WHOLE,
            "analytical": of_dataclass(Topology, device=device, tiers=tiers),
            "calibration": calibration,
            "profiled": described({"type": "object"}, "a profile, with a version of its own"),
        },
        "required": ["name", "devices", "memory_bytes"],
        "description": "the machine as its cost model describes itself",
    }


def _estimate() -> Schema:
    memory, collectives = of_dataclass(Memory), many(of_dataclass(PromisedCollective))
    for name in ("workspace_bytes", "fragmentation_bytes", "context_bytes", "communicators_bytes"):
        memory["required"].remove(name)  # older plans know nothing of them
    numbers = many(WHOLE)
    row = of_dataclass(
        RowEstimate, devices=numbers, stages=numbers, memory=memory, collectives=collectives
    )
    pipeline = of_dataclass(PipelineEstimate, rows=many(row), traffic=many(of_dataclass(Traffic)))
    band = of_dataclass(Band, doubts=many(of_dataclass(Doubt)))
    schema = of_dataclass(
        Estimate, memory=memory, collectives=collectives, pipeline=pipeline, band=band
    )
    schema["required"].remove("pipeline")  # left out where there is one stage
    schema["required"].remove("band")  # left out by those who wrote plans before there was one
    return schema


def _mesh() -> Schema:
    return described(many(tuple_of(TEXT, WHOLE)), "(axis, size) pairs; the last varies fastest")


def _search() -> Schema:
    trial = of_dataclass(
        TrialSummary,
        mesh=_mesh(),
        lower_bound_s=BOUND,
        step_time_s={"type": ["number", "null"]},
        peak_memory_bytes={"type": ["integer", "null"]},
    )
    ties = many(of_dataclass(Tie, mesh=_mesh(), slower=NUMBER))
    schema = of_dataclass(SearchSummary, lower_bound_s=BOUND, trials=many(trial), ties=ties)
    for name in ("ties", "among"):
        schema["required"].remove(name)  # left out where there are none
    return schema


def _strategy() -> Schema:
    sharding = many(PLACEMENT)
    storages = table(tuple_of(sharding, sharding, sharding))
    stage = record(operators=many(TEXT), devices=many(WHOLE), mesh=_mesh())
    stage["properties"]["storage"] = described(
        storages, "of parameters that another stage keeps otherwise; left out where there are none"
    )
    schema = record(
        stages=many(stage),
        splits=described(
            table(many(TEXT)), "by operator: for each mesh axis a factor, or a reserved choice"
        ),
        storage=described(
            storages,
            "by parameter: shardings of the parameter, its gradient, its optimizer state",
        ),
        microbatches={"type": "integer", "minimum": 1},
        recompute=described(many(TEXT), "operators of which nothing is kept for the backward"),
        schedule={"type": ["string", "null"]},
        training=of_dataclass(Training, clip_norm={"type": ["number", "null"]}),
    )
    # left out where they follow, or are none
    schema["properties"]["chunks"] = {"type": "integer", "minimum": 1}
    schema["properties"]["repeat_collectives"] = many(TEXT)
    return schema


def _rule() -> Schema:
    names, numbers = many(TEXT), many(WHOLE)
    parts: dict[str, Schema] = {
        "whole": names,
        "sums": names,
        "addends": numbers,
        "linear": numbers,
        "products": many(of_dataclass(Product)),
        "saves": many(of_dataclass(Saved, needs=numbers)),
        "inner": many(of_dataclass(Inner)),
        "special": names,
        "agreed": numbers,
        "sizes": many(tuple_of(TEXT, WHOLE)),
    }
    schema = of_dataclass(OpRule, **parts, **dict.fromkeys(NOT_DATA, ANYTHING))
    kept = {k: v for k, v in schema["properties"].items() if k not in NOT_DATA}
    return record(**kept)


def _graph() -> Schema:
    pair = tuple_of(TEXT, TEXT)
    tensor = tuple_of(
        TEXT, many(WHOLE), one_of(tuple(ITEM_BYTES)), one_of(tuple(map(str, Role))), FLAG
    )
    operator = record(
        name=TEXT,
        op=TEXT,
        inputs=many(TEXT),
        outputs=many(TEXT),
        arguments=many(ANYTHING),
        keywords=table(ANYTHING),
        module=TEXT,
    )
    return record(
        name=TEXT,
        tensors=described(many(tensor), "name, shape, dtype, role, differentiable"),
        operators=described(many(operator), "in topological order"),
        loss=TEXT,
        inputs=many(TEXT),
        input_keys=many(TEXT),
        mutations=many(pair),
        shared=many(pair),
        constants=many(tuple_of(TEXT, ANYTHING)),
    )
