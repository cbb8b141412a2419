"""A profile on the command line: from the file to a plan, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autopar import cli

EXAMPLE = Path(__file__).parents[3] / "examples" / "two_towers.json"
SEARCH = ("--topology", "1x4xa100-sxm-40gb", "--time-limit", 3)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    assert run("plan", EXAMPLE, *SEARCH, "-o", path) == 0
    return path


def test_a_profile_is_planned_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", EXAMPLE, *SEARCH) == 0
    shown = capsys.readouterr().out
    assert "two towers: 7 measured operators, 64 samples a step" in shown
    assert "stage 0 on device" in shown
    assert "searched by stages" in shown


def test_json_has_the_stages_and_the_objective(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", EXAMPLE, *SEARCH, "--objective", "throughput", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["objective"] == "throughput"
    assert found["strategy"]["stages"]
    assert found["search"]["lower_bound_s"] <= found["estimate"]["step_time_s"]


@pytest.mark.parametrize("as_json", [False, True])
def test_its_plan_is_explained_and_simulated(
    plan: Path, as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--json"] if as_json else []
    assert run("explain", plan, *more) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown)["stages"] if as_json else "row 0" in shown
    assert run("simulate", plan, *more) == 0
    assert run("export", plan, "perfetto") == 0
    assert run("draw", plan, *more) == 0
    assert run("diff", plan, plan, *more) == 0


def test_its_plan_is_not_run(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run", plan) == 2
    assert run("verify", plan) == 2
    assert capsys.readouterr().err.count("made from a profiled graph") == 2


def test_what_cannot_be_is_an_error_of_its_own_kind(
    tmp_path: Path, plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("plan", EXAMPLE, *SEARCH, "--memory-limit", "1MB") == 3
    assert run("plan", EXAMPLE, *SEARCH, "--mesh", "4") == 2
    assert run("plan", plan, *SEARCH) == 2
    bad = tmp_path / "bad.json"
    bad.write_text(EXAMPLE.read_text().replace('"forward_s": 0.002,', '"forward_s": "fast",'))
    assert run("plan", bad, *SEARCH) == 2
    errors = capsys.readouterr().err
    assert "nothing fits" in errors
    assert "mesh is for models" in errors
    assert "no profiled graph" in errors
    assert 'operators[6].forward_s is "fast", not a number' in errors
