"""`--recipe`: plans that are written down, through the command line."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from autopar import api, cli
from autopar.extractor import extract
from autopar.ir.graph import OperatorGraph
from autopar.ir.plan import load_plan
from autopar.recipes import PUBLISHED, Degrees
from tests.helpers.zoo import zoo

ROOT = Path(__file__).parents[3]
MACHINE = "1x8xh100-sxm"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@lru_cache(maxsize=None)
def graph() -> OperatorGraph:
    """Of four equal blocks and a batch of 8."""
    model, inputs = zoo("gpt_deep", dtype=torch.float32)
    return extract(model, inputs, name="gpt")


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "extract", lambda *_, **__: graph())


def plan(*arguments: object) -> int:
    return run("plan", "m.py", "--topology", MACHINE, *arguments)


def test_degrees_make_a_plan_like_any_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    assert plan("--recipe", "tp=2,pp=2,dp=2,zero=1", "-o", path) == 0
    said = capsys.readouterr().out
    assert "2 stages by 1f1b, mesh data 2 x tensor 2" in said
    assert "recipe tp=2,pp=2,dp=2,zero=1, not searched" in said
    made = load_plan(path)
    assert (made.model, made.world_size, made.search.trials) == ("m.py", 8, ())
    assert api.simulate(made) == made.estimate
    for command in ("explain", "simulate"):
        assert run(command, path) == 0
    assert "2 stages by 1f1b" in capsys.readouterr().out
    assert plan("--recipe", "tp=2,pp=2,dp=2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["world_size"] == 8


def test_a_recipe_of_the_shelf_is_the_trial_that_a_search_compares_with() -> None:
    found = api.search(graph(), topology=MACHINE, mesh=(8,), microbatches=1)
    (trial,) = [trial for trial in found.trials if trial.name == "zero2"]
    made = api.plan(graph(), topology=MACHINE, recipe="zero2")
    assert made.strategy == trial.strategy
    assert trial.estimate is not None
    assert made.estimate.step_time_s == pytest.approx(trial.estimate.step_time_s)
    assert made.estimate.memory == trial.estimate.memory


def test_from_python_degrees_are_a_value_too() -> None:
    by_text = api.plan(graph(), topology=MACHINE, recipe="data=4,tensor=2")
    by_value = api.plan(graph(), topology=MACHINE, recipe=Degrees(data=4, tensor=2))
    assert by_value.strategy == by_text.strategy


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--recipe", "gpt4"), "no recipe is called 'gpt4'; did you mean gpt3"),
        (("--recipe", "tensor=4"), "for 4 devices, and the machine has 8; give a machine with"),
        (("--recipe", "palm"), "for 6144 devices, .* give it --topology 2x3072xtpu-v4"),
        (("--recipe", "zero3,tensor=2"), "has no degrees that could be changed"),
        (("--recipe", "data=8", "--mesh", "8"), "has its own mesh"),
        (
            ("--recipe", "data=8,microbatch=1", "--microbatches", 2),
            "microbatches of 1 samples in each replica",
        ),
        (("--recipe", "data=8", "--recompute", "auto"), "no way to recompute called 'auto'"),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: tuple[object, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(*arguments) == 2
    assert re.search(says, capsys.readouterr().err)


def test_options_say_what_the_degrees_leave_open(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--recipe", "data=4,tensor=2", "--microbatches", 2, "--recompute", "full") == 0
    said = capsys.readouterr().out
    assert "2 microbatches" in said and "recomputed for the backward: " in said


def test_what_does_not_fit_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--recipe", "data=8", "--memory-limit", "1KB") == 3
    said = capsys.readouterr().err
    assert "the recipe data=8 needs" in said and "the limit is 1.00 kB" in said
    limit = said.rsplit("--memory-limit ", 1)[1].strip()
    assert plan("--recipe", "data=8", "--memory-limit", limit) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_planned_at_full_size(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They fit, as they did, and take about as long as was reported."""
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    entry = PUBLISHED[name]
    sizes = {"batch": entry.batch, "sequence": 2048} if entry.model.startswith("hf:") else {}
    made = api.plan(entry.model, topology=entry.topology, recipe=name, precision="mixed", **sizes)
    assert made.world_size == entry.degrees.devices
    assert len(made.strategy.stages) == entry.degrees.stages
    assert made.strategy.microbatches == entry.degrees.microbatches(entry.batch)
    assert made.estimate.step_time_s == pytest.approx(entry.step_s, rel=0.25)
