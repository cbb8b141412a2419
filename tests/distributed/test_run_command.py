"""``autopar run``: a plan trains in processes of its own, and says how it went."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from autopar import api
from autopar.ir.plan import Plan, save_plan
from autopar.ir.search import SearchResult, Trial
from autopar.ir.sharding import Mesh
from autopar.ops import bound_rules
from autopar.simulator.microbatches import division
from autopar.simulator.prices import evaluate
from autopar.simulator.staged import runs, staged
from tests.helpers.stages import ALONE, in_order, looped, strategy_of
from tests.helpers.strategies import random_strategy, replicate

MODEL = """
import torch
from torch import nn


def model():
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), {extra}nn.Linear(32, 16))


def inputs():
    return (torch.randn(8, 16),)


def loss(outputs, inputs):
    return (outputs - inputs[0]).square().mean()
"""
ROOT = Path(__file__).parents[2]


def planned(folder: Path, extra: str = "", precision: api.Precision = "full") -> Plan:
    """A random strategy of a small model for two processes, in ``folder``."""
    model = folder / "model.py"
    model.write_text(MODEL.format(extra=extra))
    problem = api.problem_of(
        str(model), topology="1x2xh100-sxm", mesh=(2,), precision=precision, clip_norm=1.0
    )
    rules = bound_rules(problem.graph)
    (mesh,) = problem.meshes
    strategy = random_strategy(problem.graph, rules, mesh, Random(1), problem.training)
    estimate = evaluate(problem.graph, rules, problem.cost_model, strategy)
    trial = Trial("", mesh, strategy, estimate, estimate.step_time_s, "optimal")
    result = SearchResult("random", (trial,), trial, 0.0, "time", 0.0)
    plan = replace(api.plan_of(problem, result), model=str(model))
    save_plan(plan, folder / "plan.json")
    return plan


def autopar(*arguments: object, processes: int = 0) -> subprocess.CompletedProcess[str]:
    started = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*started, "--module", "autopar"] if processes else ["-m", "autopar"]
    return subprocess.run(
        [sys.executable, *command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_plan_of_two_stages_trains_beside_its_prediction(tmp_path: Path) -> None:
    model = tmp_path / "model.py"
    model.write_text(MODEL.format(extra=""))
    graph = api.extract(str(model))
    like = replicate(graph, Mesh((("a", 1),)))
    strategy = staged(graph, runs(graph, (2,)), [like] * 2, "1f1b", 4)
    plan = api.plan_by_hand(graph, strategy, "1x2xh100-sxm", model=str(model))
    save_plan(plan, tmp_path / "plan.json")
    done = autopar("run", tmp_path / "plan.json", "--steps", 2, "--compare", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["losses"] == pytest.approx(found["single_process_losses"], rel=1e-5)
    assert found["predicted_step_time_s"] == plan.estimate.step_time_s
    assert found["peak_memory_bytes"] == pytest.approx(plan.estimate.peak_memory_bytes, rel=0.2)


@pytest.mark.parametrize("precision", ["full", "mixed"])
def test_the_losses_are_those_of_one_process(tmp_path: Path, precision: api.Precision) -> None:
    plan = planned(tmp_path, precision=precision)
    done = autopar("run", tmp_path / "plan.json", "--steps", 3, "--compare", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["losses"]) == len(found["step_times_s"]) == 3
    exact = precision == "full"
    assert found["losses"] == pytest.approx(
        found["single_process_losses"], rel=1e-5 if exact else 0.02
    )
    assert found["losses"][0] > found["losses"][2]
    assert found["predicted_step_time_s"] == plan.estimate.step_time_s
    assert found["peak_memory_bytes"] > 0


def test_random_masks_are_not_compared_with_other_random_masks(tmp_path: Path) -> None:
    planned(tmp_path, extra="nn.Dropout(0.5), ")
    done = autopar("run", tmp_path / "plan.json", "--steps", 1, "--compare")
    assert done.returncode == 0, done.stderr
    assert "random masks" in done.stdout
    assert "loss in one process" not in done.stdout


def test_a_token_that_the_table_does_not_have_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        "import torch\n"
        "def model(): return torch.nn.Embedding(16, 8)\n"
        "def inputs(): return (torch.tensor([0, 16, 3, 99]),)\n"
        "def loss(outputs, inputs): return outputs.square().mean()\n"
    )
    plan = api.plan(str(tmp_path / "model.py"), topology="1x1xh100-sxm")
    save_plan(plan, tmp_path / "plan.json")
    done = autopar("run", tmp_path / "plan.json", "--steps", 1)
    assert done.returncode == 2
    assert "the batch of inputs() has an index" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_number_of_processes_is_said_once_and_clearly(tmp_path: Path) -> None:
    planned(tmp_path)
    done = autopar("run", tmp_path / "plan.json", processes=1)
    assert done.returncode != 0
    assert "the plan is for 2 processes" in done.stderr


def test_a_model_that_fails_in_the_processes_keeps_its_message_and_code(tmp_path: Path) -> None:
    planned(tmp_path)
    model = tmp_path / "model.py"
    model.write_text(
        model.read_text().replace(
            "def model():\n",
            'def model():\n    import os\n    assert "RANK" not in os.environ, "no GPU for me"\n',
        )
    )
    done = autopar("run", tmp_path / "plan.json")
    assert done.returncode == 2
    assert "no GPU for me" in done.stderr
    assert "Traceback" not in done.stderr


def test_under_torchrun_the_first_process_prints(tmp_path: Path) -> None:
    planned(tmp_path)
    done = autopar("run", tmp_path / "plan.json", "--steps", 1, "--json", processes=2)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["losses"]) == 1


BAD = """

import os, signal, time
from autopar.runtime import pipeline

def fail(): raise ValueError("my operator does not like this")
def die(): os.kill(os.getpid(), signal.SIGKILL)
def sleep(): time.sleep(1000)

plain = pipeline._Stage.do

def do(stage, action):
    if str(action) == "2F1" and stage.step.steps_done == 1:
        {deed}()
    plain(stage, action)

pipeline._Stage.do = do
"""


def three_stages(folder: Path, deed: str) -> None:
    """A plan of three stages, of which the last does ``deed`` at 2F1 of its second step."""
    one = planned(folder)
    (folder / "model.py").write_text(MODEL.format(extra="") + BAD.format(deed=deed))
    of = division(one.graph, 4)
    layout = looped(3, ALONE)
    strategy = strategy_of(of, in_order(one.graph, 3), layout, "1f1b")
    save_plan(replace(one, strategy=strategy), folder / "plan.json")


DEEDS = {
    "die": "rank 2 was ended at 2F1 (stage 2), step 1 by signal 9 (SIGKILL)",
    "sleep": "rank 2 was at 2F1 (stage 2), step 1 for",
    "fail": "ValueError: my operator does not like this",
}


@pytest.mark.parametrize(
    "deed", ["die", *(pytest.param(d, marks=pytest.mark.slow) for d in ("sleep", "fail"))]
)
def test_a_run_that_fails_says_what_went_wrong_first(tmp_path: Path, deed: str) -> None:
    """And no more than one traceback, of an error that is none of autopar's."""
    three_stages(tmp_path, deed)
    done = autopar("run", tmp_path / "plan.json", "--steps", 3, "--timeout", 4)
    assert done.returncode == 1
    assert DEEDS[deed] in done.stderr
    assert done.stderr.count("Traceback") == (deed == "fail")
    assert "ChildFailedError" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("deed", DEEDS)
def test_under_torchrun_a_failed_run_ends_with_its_exit_code(tmp_path: Path, deed: str) -> None:
    three_stages(tmp_path, deed)
    arguments = ("run", tmp_path / "plan.json", "--steps", 3, "--timeout", 4)
    done = autopar(*arguments, processes=3)
    assert done.returncode != 0
    if deed != "fail":  # else torchrun may end the others before they say anything
        assert "autopar: rank" in done.stderr
