"""What goes wrong is said on stderr, with the exit code that the documentation gives it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from autopar import api, cli
from autopar.errors import (
    AutoparError,
    InfeasibleError,
    PlanMismatchError,
    UnsupportedModelError,
)
from autopar.ir.plan import plan_to_text, save_plan
from autopar.ir.sharding import Mesh
from cost_models.profiled import profile_to_json
from tests.helpers import fake_plans
from tests.helpers.profiles import ideal


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["paln"], 2, "plan"),
        (["list", "exporter"], 2, "did you mean exporters?"),
        (["explain", "none.json"], 2, "cannot read the plan none.json"),
        (["plan", "none.py", "--topology", "h100-sxn"], 2, "h100-sxm"),
        (["plan", "none.py", "--topology", "4x8xh100-sxm", "--mesh", "3,5"], 2, "15 devices"),
        (["plan", "none.py", "--topology", "4x8xh100-sxm", "--mesh", "a,b"], 2, "not a mesh"),
        (["plan", "none.py", "--topology", "4x8xh100-sxm"], 2, "none.py"),
        (["plan", "none.py", "--topology", "4x8xh100-sxm", "--memory-limit", "lots"], 2, "70GB"),
        (["plan", "none.py", "--optimizer", "adamx"], 2, "adamx"),
        (["plan", "none.py", "--devices", "0"], 2, "'--devices': 0 is not in the range x>=1"),
        (["plan", "none.py", "--time-limit", "0"], 2, "range x>0"),
        (["plan", "none.py", "--clip-norm", "-1"], 2, "range x>0"),
        (["run", "none.json", "--steps", "0"], 2, "range x>=1"),
        (["verify", "none.json", "--rank", "-1"], 2, "range x>=0"),
    ],
)
def test_a_mistake_is_named_with_what_there_is(
    arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == code
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.out == ""


def test_dimensions_are_letters_of_soap(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[3] / "examples" / "gpt" / "model.py"
    code = run("plan", str(path), "--topology", "1x2xh100-sxm", "--dimensions", "SOUP")
    assert code == 2
    assert "letters of SOAP" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (AutoparError("what to do"), 2),
        (InfeasibleError("what to do"), 3),
        (UnsupportedModelError("what to do"), 4),
        (KeyboardInterrupt(), 130),
        (RuntimeError("what to do"), 1),
    ],
)
def test_every_kind_of_error_has_its_exit_code(
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("autopar.api.load_plan", fail)
    assert run("explain", "plan.json") == code
    printed = capsys.readouterr()
    assert str(error) in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


def test_the_traceback_of_an_internal_error_is_shown_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("odd")

    monkeypatch.setattr("autopar.api.load_plan", fail)
    assert run("--traceback", "explain", "plan.json") == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_plan_of_a_newer_autopar_is_refused_by_every_command_that_reads_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads(plan_to_text(fake_plans.plan(1)))
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**data, "format": 99, "autopar": "7.0"}))
    for arguments in (
        ("explain", str(path)),
        ("simulate", str(path)),
        ("diff", str(path), str(path)),
        ("export", str(path), "html"),
        ("run", str(path)),
    ):
        assert run(*arguments) == 2, arguments
        assert "written by autopar 7.0" in capsys.readouterr().err


def test_a_split_that_no_rule_offers_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads(plan_to_text(fake_plans.plan(1)))
    data["strategy"]["splits"]["layers.0.gelu"] = ["d0", "colour"]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    assert run("explain", str(path)) == 2
    assert "does not offer" in capsys.readouterr().err


def test_a_plan_made_for_an_object_needs_its_model_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_plan(replace(fake_plans.plan(1), model=""), tmp_path / "plan.json")
    assert run("run", str(tmp_path / "plan.json")) == 2
    assert "give the model" in capsys.readouterr().err


def have(monkeypatch: pytest.MonkeyPatch, gpus: int, cores: int = 4) -> None:
    """This machine has so many."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("autopar.runtime.profiler.cores", lambda: cores)


def test_a_plan_for_a_cluster_is_not_started_on_one_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = fake_plans.plan(1)
    large = replace(
        planned.strategy.stages[0], devices=tuple(range(256)), mesh=Mesh((("data", 256),))
    )
    strategy = replace(planned.strategy, stages=(large,))
    plan = replace(planned, strategy=strategy, topology={"name": "32x8xh100-sxm"})
    for gpus, has, fewer in ((0, "4 cores, no GPU", 4), (8, "8 GPUs", 8)):
        have(monkeypatch, gpus)
        with pytest.raises(PlanMismatchError) as refused:
            api.check_processes(plan)
        says = str(refused.value)
        assert f"256 processes on 32x8xh100-sxm, and this machine has {has}" in says
        assert "torchrun" in says and f"--topology local --devices {fewer}" in says
    save_plan(planned, tmp_path / "plan.json")  # for eight processes
    have(monkeypatch, 4)
    assert run("run", str(tmp_path / "plan.json")) == PlanMismatchError.exit_code
    assert "8 processes" in capsys.readouterr().err


def test_a_plan_for_a_few_hosts_may_be_tried_on_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, gpus=0, cores=1)
    api.check_processes(fake_plans.plan(1))


def test_another_model_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_plan(fake_plans.plan(1), tmp_path / "plan.json")
    path = Path(__file__).parents[3] / "examples" / "gpt" / "model.py"
    have(monkeypatch, gpus=8)
    assert run("run", str(tmp_path / "plan.json"), str(path)) == 2
    assert "not the model of this plan" in capsys.readouterr().err


@pytest.mark.parametrize("searcher", ["hybrid", "ilp"])
def test_a_dtype_that_a_machine_has_no_speed_of_is_the_users_to_change(
    searcher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wide.py"
    path.write_text(
        "import torch\n"
        "def model(): return torch.nn.Linear(8, 8).double()\n"
        "def inputs(): return (torch.zeros(4, 8, dtype=torch.float64),)\n"
        "def loss(outputs, inputs): return outputs.sum()\n"
    )
    code = run("plan", str(path), "--topology", "1x2xrtx-4090", "--searcher", searcher)
    said = capsys.readouterr().err
    assert code == 2
    assert "rtx-4090 has no peak for float64" in said
    assert "internal error" not in said


def test_a_profile_without_collectives_says_so_for_several_devices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ideal(devices=2, exchanges=(), left_out=("collectives",))
    path = tmp_path / "short.json"
    path.write_text(json.dumps(profile_to_json(short)))
    root = Path(__file__).parents[3]
    for model in (root / "examples" / "two_towers.json", root / "examples" / "gpt" / "model.py"):
        assert run("plan", str(model), "--topology", str(path)) == 2
        said = capsys.readouterr().err
        assert "no collective in a host (it was ended early); measure" in said
        assert "internal error" not in said
