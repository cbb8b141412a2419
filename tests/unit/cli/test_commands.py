"""Every command that reads a plan prints what it should, as text and as JSON."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

import cost_models
from autopar import api, cli
from autopar.ir.plan import load_plan, save_plan
from cost_models.saved import cost_model_to_json
from tests.helpers import fake_plans


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    machine = cost_models.cost_model("1x8xh100-sxm")
    plan = replace(fake_plans.priced(2), topology=cost_model_to_json(machine))
    save_plan(plan, tmp_path / "plan.json")
    return tmp_path / "plan.json"


def output(*arguments: object) -> str:
    result = CliRunner().invoke(cli.commands, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_explain_prints_the_blocks(plan_file: Path) -> None:
    assert "layers.* x2" in output("explain", plan_file)
    data = json.loads(output("explain", plan_file, "--json"))
    assert data["blocks"][0]["path"] == "layers.*"


def test_simulating_on_another_machine_prices_the_same_strategy(plan_file: Path) -> None:
    here = json.loads(output("simulate", plan_file, "--json"))
    slower = json.loads(output("simulate", plan_file, "--topology", "8x1xh100-sxm", "--json"))
    assert slower["forward_communication_s"] > here["forward_communication_s"]
    assert slower["peak_memory_bytes"] == here["peak_memory_bytes"]
    assert "8x1xh100-sxm" in output("simulate", plan_file, "--topology", "8x1xh100-sxm")


def test_diff_of_a_plan_with_itself_finds_nothing(plan_file: Path) -> None:
    assert "every choice is the same" in output("diff", plan_file, plan_file)
    data = json.loads(output("diff", plan_file, plan_file, "--json"))
    assert data["changes"] == []


def test_diff_counts_equal_changes_in_equal_blocks(plan_file: Path, tmp_path: Path) -> None:
    plan = load_plan(plan_file)
    splits = {n: ("d0", "nothing") if "gelu" in n else s for n, s in plan.strategy.splits.items()}
    other = tmp_path / "other.json"
    save_plan(replace(plan, strategy=replace(plan.strategy, splits=splits)), other)
    assert "layers.*.gelu x2" in output("diff", plan_file, other)


def test_export_writes_what_it_prints(plan_file: Path, tmp_path: Path) -> None:
    printed = output("export", plan_file, "html")
    assert output("export", plan_file, "html", "-o", tmp_path / "page.html") == ""
    assert (tmp_path / "page.html").read_text() == printed


@pytest.mark.parametrize("shelf", sorted(cli._SHELVES))
def test_every_shelf_can_be_listed(shelf: str) -> None:
    names = output("list", shelf).splitlines()
    assert names
    assert json.loads(output("list", shelf, "--json")) == names == sorted(names)


def test_version_names_what_it_stands_on() -> None:
    found = json.loads(output("version", "--json"))
    assert {"autopar", "python", "torch", "spmd_types", "ortools"} <= set(found)


def test_progress_speaks_of_what_takes_long_and_only_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "SHOWN_AFTER_S", 0.0)
    shown = threading.Event()
    with cli.progress() as tell:
        monkeypatch.setattr(cli._Lines, "_show", lambda _, what: shown.set())
        tell("something long")
        assert shown.wait(10)
    monkeypatch.undo()
    with cli.progress() as tell:
        tell("something quick")
    assert capsys.readouterr().err == ""


def test_memory_is_read_as_people_write_it() -> None:
    assert api.bytes_of("80 gb") == 80 * 10**9
    assert api.bytes_of("80GiB") == 80 * 2**30
    with pytest.raises(api.AutoparError, match="70GB"):
        api.bytes_of("1.2.3GB")
