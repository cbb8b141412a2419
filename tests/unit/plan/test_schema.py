"""The schema describes the file that is written, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import cost_models
from autopar import cli
from autopar.errors import PlanMismatchError
from autopar.ir.graph import Dtype, Input, Operator
from autopar.ir.plan import plan_from_json, plan_to_text
from autopar.ir.plan_schema import fault, plan_schema
from cost_models.saved import cost_model_to_json
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


# Reading

Path = tuple[str | int, ...]


def of_a_real_machine() -> dict[str, Any]:
    data = written()
    data["topology"] = cost_model_to_json(cost_models.cost_model("2x4xh100-sxm"))
    return data


def places(value: Any, path: Path = ()) -> Iterator[Path]:
    """Every place in the data, one item for all of a list."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = enumerate(value[:1])
    for key, inner in items:
        yield from places(inner, (*path, key))


def at(data: Any, path: Path) -> Any:
    for key in path:
        data = data[key]
    return data


def broken(path: Path, kind: str) -> dict[str, Any]:
    """A plan in which one thing is lost, or is of another type."""
    data = of_a_real_machine()
    place = at(data, path[:-1])
    if kind == "lost":
        del place[path[-1]]
    else:
        place[path[-1]] = {"null": None, "text": "?", "list": [], "number": -1}[kind]
    return data


ALL = [path for path in places(of_a_real_machine()) if "arguments" not in path]


@pytest.mark.parametrize("kind", ["lost", "null", "text", "list", "number"])
def test_reading_finds_the_faults_that_the_schema_finds_and_names_their_place(kind: str) -> None:
    found = 0
    for path in ALL:
        data = broken(path, kind)
        valid = VALIDATOR.is_valid(data)
        said = fault(data, plan_schema())
        assert (said == "") == valid, (path, said)
        if not valid and path[0] not in ("autopar", "format"):
            named = [str(key) for key in path if isinstance(key, str)]
            assert [key for key in named if key not in said] == [], (path, said)
            with pytest.raises(PlanMismatchError) as refused:
                plan_from_json(data)
            assert said in str(refused.value)
            found += 1
    assert found > 50


def test_a_plan_without_any_of_its_keys_is_not_explained(
    tmp_path: FilePath, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    for path in (("topology", "name"), ("estimate", "memory", "at"), ("graph", "loss")):
        file.write_text(json.dumps(broken(path, "lost")))
        with pytest.raises(SystemExit) as ended:
            cli.main(["explain", str(file)])
        assert ended.value.code == 2
        printed = capsys.readouterr()
        assert f"{'.'.join(path)} is missing" in printed.err
        assert printed.out == ""


def test_keys_that_a_newer_autopar_may_write_are_not_faults() -> None:
    data = written()
    assert fault(data, plan_schema()) == ""
    data["strategy"]["luck"] = 1
    assert fault(data, plan_schema()) == ""
