"""The user leaves the search with Ctrl-C, or the reader of the output leaves: real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from autopar.ir.plan import load_plan, save_plan
from tests.helpers import fake_plans

ROOT = Path(__file__).parents[3]
GPT = ROOT / "examples" / "gpt" / "model.py"

LONG_SOLVER = (
    "import os, signal, sys, time\n"
    "sys.stdin.buffer.read(8)\n"  # it is asked something:
    "os.kill(os.getppid(), signal.SIGINT)\n"  # the user has no patience,
    "time.sleep(3600)\n"  # and the solver no answer
)

IMPATIENT = (
    "import sys\n"
    "from autopar import cli\n"
    "from autopar.searchers import _solver\n"
    "from cost_models.analytical import Analytical\n"
    "from cost_models.interface import HostTime\n"
    "Analytical.host_time = HostTime()\n"  # of slow hosts all plans take as long: no solver
    f"_solver.COMMAND[:] = [sys.executable, '-c', {LONG_SOLVER!r}]\n"
    "cli.main(sys.argv[1:])\n"
)


def plan_until_ctrl_c(*arguments: object) -> subprocess.CompletedProcess[str]:
    """``autopar plan`` with a solver that never answers, interrupted while it is waited for."""
    return subprocess.run(
        [sys.executable, "-c", IMPATIENT, "plan", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,  # far more than it takes, far less than the solver
        check=False,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


HERE = (GPT, "--topology", "1x4xl4", "--microbatches", "1", "--searcher", "ilp")


def test_ctrl_c_in_the_solver_keeps_the_best_so_far(tmp_path: Path) -> None:
    limit = ("--memory-limit", "70MB")  # a recipe fits, and the solver is asked for more
    done = plan_until_ctrl_c(*HERE, *limit, "-o", tmp_path / "plan.json")
    assert done.returncode == 130, done.stderr
    plan = load_plan(tmp_path / "plan.json")
    assert plan.search.stop_reason == "interrupted"
    assert plan.world_size == 4
    assert plan.estimate.peak_memory_bytes <= plan.search.memory_limit_bytes
    assert 0 < plan.search.gap <= 1
    assert ", interrupted\n" in done.stdout
    assert f"written to {tmp_path / 'plan.json'}" in done.stdout


def test_ctrl_c_in_the_solver_before_anything_fits_is_said(tmp_path: Path) -> None:
    limit = ("--memory-limit", "52MB")  # no recipe fits
    done = plan_until_ctrl_c(*HERE, *limit, "-o", tmp_path / "plan.json")
    assert done.returncode == 130
    assert done.stderr.endswith("interrupted before any strategy was found\n")
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        ["list", "operators"],
        ["explain", "PLAN"],
        ["explain", "PLAN", "--json"],
        ["export", "PLAN", "html"],
        ["--help"],
        ["explain", "--help"],
    ],
)
def test_a_reader_that_leaves_ends_the_command_quietly(command: list[str], tmp_path: Path) -> None:
    save_plan(fake_plans.priced(2), tmp_path / "PLAN")
    for broken in ("stdout", "stderr"):
        reading, writing = os.pipe()
        os.close(reading)
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, broken: writing}
        wrong = ["--no-such-option"] if broken == "stderr" else []
        done = subprocess.run(
            [sys.executable, "-m", "autopar", *wrong, *command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            text=True,
            check=False,
            **streams,
        )
        os.close(writing)
        assert done.returncode == 141
        assert not done.stdout
        assert not done.stderr
