"""A cluster is measured under torchrun, planned for, run, and its profile corrected by the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from autopar import cli
from cost_models.profiled import read_profile

MODEL = """
import torch
from torch import nn


def model():
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))


def inputs():
    return (torch.randn(64, 64),)


def loss(outputs, inputs):
    return (outputs - inputs[0]).square().mean()
"""
ROOT = Path(__file__).parents[2]


def started(*arguments: object, processes: int = 0) -> str:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*torchrun, "--module", "autopar"] if processes else ["-m", "autopar"]
    done = subprocess.run(
        [sys.executable, *command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def here(*arguments: object) -> str:
    done = CliRunner().invoke(cli.commands, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.slow
def test_from_a_cluster_to_a_corrected_plan(tmp_path: Path) -> None:
    model, profile, plan, run, corrected = (
        tmp_path / name
        for name in ("model.py", "cluster.json", "plan.json", "run.json", "corrected.json")
    )
    model.write_text(MODEL)
    told = started("profile", "--seconds", 0.3, "-o", profile, "--json", processes=2)
    assert json.loads(told)["profiled"]["devices"] == 2  # one process tells, the other does not
    here("plan", model, "--topology", profile, "-o", plan)
    run.write_text(started("run", plan, "--steps", 4, "--json"))
    record = json.loads(run.read_text())
    assert [len(of_rank) for of_rank in record["rank_step_times_s"]] == [4, 4]
    by_step = zip(*record["rank_step_times_s"], strict=True)
    assert list(map(max, by_step)) == record["step_times_s"]
    here("calibrate", "--from-run", run, "-o", corrected)
    (correction,) = read_profile(corrected).corrections
    assert correction.of == read_profile(profile).digest
    here("plan", model, "--topology", corrected)
