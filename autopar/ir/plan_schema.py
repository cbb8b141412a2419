"""The JSON schema of the plan file, for tools that read plans without autopar."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from autopar.ir.graph import ITEM_BYTES, Role
from autopar.ir.plan import FORMAT, SearchSummary, TrialSummary
from autopar.ir.rule import Inner, OpRule, Product, Saved
from autopar.ir.simulation import Estimate, Memory, PromisedCollective
from autopar.ir.strategy import Training

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
SECONDS: Schema = {"type": "number", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
ANYTHING: Schema = {}
PLACEMENT: Schema = {"type": "string", "pattern": r"^(R|I|P|S\([0-9]+\))$"}
BOUND: Schema = {"type": ["number", "null"], "description": "null: infinite, nothing is feasible"}


def plan_schema() -> Schema:
    return {
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
    plain = {str: TEXT, int: WHOLE, float: SECONDS, bool: FLAG}
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


# The parts of a plan, in the order of the file


def _topology() -> Schema:
    return {
        "type": "object",
        "properties": {"name": TEXT, "devices": WHOLE, "memory_bytes": WHOLE},
        "required": ["name", "devices"],
        "description": "the machine as its cost model describes itself",
    }


def _estimate() -> Schema:
    collectives = many(of_dataclass(PromisedCollective))
    return of_dataclass(Estimate, memory=of_dataclass(Memory), collectives=collectives)


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
    return of_dataclass(SearchSummary, lower_bound_s=BOUND, trials=many(trial))


def _strategy() -> Schema:
    sharding = many(PLACEMENT)
    return record(
        stages=many(record(operators=many(TEXT), devices=many(WHOLE), mesh=_mesh())),
        splits=described(
            table(many(TEXT)), "by operator: for each mesh axis a factor, or a reserved choice"
        ),
        storage=described(
            table(tuple_of(sharding, sharding, sharding)),
            "by parameter: shardings of the parameter, its gradient, its optimizer state",
        ),
        microbatches={"type": "integer", "minimum": 1},
        recompute=many(TEXT),
        schedule={"type": ["string", "null"]},
        training=of_dataclass(Training, clip_norm={"type": ["number", "null"]}),
    )


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
    schema = of_dataclass(OpRule, **parts, localize=ANYTHING)
    kept = {k: v for k, v in schema["properties"].items() if k != "localize"}
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
