"""The schema describes the file that is written, and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from autopar.ir.graph import Dtype, Input, Operator
from autopar.ir.plan import plan_to_text
from autopar.ir.plan_schema import plan_schema
from tests.helpers import fake_plans

VALIDATOR = Draft202012Validator(plan_schema())


def written() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(plan_to_text(fake_plans.priced(2)))
    return data


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(plan_schema())


@pytest.mark.parametrize("plan", [fake_plans.plan(1), fake_plans.priced(3)])
def test_a_plan_is_valid(plan: Any) -> None:
    errors = [error.message for error in VALIDATOR.iter_errors(json.loads(plan_to_text(plan)))]
    assert errors == []


def test_arguments_of_any_kind_are_valid() -> None:
    graph = fake_plans.two_blocks(1)
    arguments = (1.5, None, (Input(0),), float("inf"))
    odd = Operator("odd", "aten.odd", (), (), arguments, (("dtype", Dtype("int8")),))
    plan = replace(fake_plans.plan(1), graph=replace(graph, operators=(*graph.operators, odd)))
    assert VALIDATOR.is_valid(json.loads(plan_to_text(plan)))


@pytest.mark.parametrize(
    "key",
    ["autopar", "format", "fingerprint", "topology", "estimate", "search", "strategy", "graph"],
)
def test_no_part_may_be_missing(key: str) -> None:
    data = written()
    del data[key]
    assert not VALIDATOR.is_valid(data)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), 2),
        (("fingerprint",), "abc"),
        (("strategy", "storage", "layers.0.up.weight", 0, 1), "S0"),
        (("strategy", "microbatches"), 0),
        (("strategy", "luck"), 1),
        (("graph", "tensors", 0, 3), "guest"),
        (("graph", "operators", 0, "op"), 7),
        (("estimate", "memory", "parameters_bytes"), -1),
        (("estimate", "collectives", 0, "kind"), "gossip"),
        (("search", "trials", 0, "mesh", 0), ["data"]),
    ],
)
def test_what_cannot_be_is_not_valid(path: tuple[Any, ...], value: Any) -> None:
    data = written()
    place: Any = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert not VALIDATOR.is_valid(data)
