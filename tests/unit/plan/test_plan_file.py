"""A plan survives the file, and a file that is no plan says so."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from autopar.errors import AutoparError, PlanMismatchError
from autopar.ir.plan import FORMAT, load_plan, plan_from_json, plan_to_json, plan_to_text, save_plan
from tests.helpers import fake_plans


@pytest.mark.parametrize("layers", [1, 3])
def test_a_plan_is_read_as_it_was_written(tmp_path: Path, layers: int) -> None:
    plan = fake_plans.plan(layers)
    save_plan(plan, tmp_path / "deep" / "plan.json")
    assert load_plan(tmp_path / "deep" / "plan.json") == plan


def test_the_file_is_the_plans_json_laid_out_for_people() -> None:
    plan = fake_plans.plan(layers=3)
    text = plan_to_text(plan)
    assert json.loads(text) == json.loads(json.dumps(plan_to_json(plan)))
    line = next(line for line in text.splitlines() if '"layers.2.down.weight": [' in line)
    assert (
        line.strip()
        .rstrip(",")
        .endswith('"layers.2.down.weight": [["I", "S(1)"], ["I", "S(1)"], ["I", "S(1)"]]')
    )


def test_a_failed_write_leaves_the_old_plan_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    save_plan(fake_plans.plan(1), path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        save_plan(fake_plans.plan(2), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AutoparError, match="cannot write"):
        save_plan(fake_plans.plan(1), tmp_path / "file" / "plan.json")


def changed(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(plan_to_text(fake_plans.plan(1)))
    data.update(changes)
    return data


def without(*keys: str) -> dict[str, Any]:
    return {k: v for k, v in changed().items() if k not in keys}


def edited_graph() -> dict[str, Any]:
    data = changed()
    data["graph"]["tensors"][0][1] = [80, 16]
    return data


def lost_split() -> dict[str, Any]:
    data = changed()
    del data["strategy"]["splits"]["layers.0.gelu"]
    return data


def lost_storage() -> dict[str, Any]:
    data = changed()
    del data["strategy"]["storage"]["layers.0.up.weight"]
    return data


def short_split() -> dict[str, Any]:
    data = changed()
    data["strategy"]["splits"]["layers.0.gelu"] = ["nothing"]
    return data


def unknown_estimate() -> dict[str, Any]:
    data = changed()
    data["estimate"]["luck_s"] = 1.0
    return data


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        (plan_to_text(fake_plans.plan(1))[:-50], "not JSON"),
        ("[1, 2]", "not an autopar plan"),
        ('{"format": 1}', "not an autopar plan"),
        (json.dumps({"name": "a package.json", "version": "1.0"}), "not an autopar plan"),
        (json.dumps(changed(format=FORMAT + 1, autopar="9.9")), "written by autopar 9.9"),
        (json.dumps(changed(format="two")), "format two"),
        (json.dumps(without("strategy")), "strategy is missing"),
        (json.dumps(without("fingerprint")), "fingerprint is missing"),
        (json.dumps(changed(graph=None)), "graph is null, not an object"),
        (json.dumps(changed(topology={})), "topology.name is missing"),
        (json.dumps(unknown_estimate()), "luck_s"),
        (json.dumps(edited_graph()), "fingerprint"),
        (json.dumps(lost_split()), "layers.0.gelu"),
        (json.dumps(lost_storage()), "layers.0.up.weight"),
        (json.dumps(short_split()), "layers.0.gelu"),
    ],
)
def test_what_is_no_plan_is_refused_with_its_name_and_the_reason(
    tmp_path: Path, text: str, says: str
) -> None:
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(PlanMismatchError, match=says) as raised:
        load_plan(path)
    assert str(path) in str(raised.value)
    assert raised.value.exit_code == 2


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(AutoparError, match="autopar plan MODEL"):
        load_plan(tmp_path / "none.json")


def test_a_binary_file_is_no_plan(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AutoparError, match="not text"):
        load_plan(tmp_path / "plan.json")


def test_the_json_of_a_plan_is_plain_data() -> None:
    plan = fake_plans.plan(2)
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan), allow_nan=False))) == plan
