"""What docs/schedules.md shows is what one gets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autopar import cli
from autopar.errors import AutoparError
from autopar.ir.plan import load_plan
from autopar.ir.schedule import rows_from_text
from autopar.schedules import SCHEDULES
from autopar.simulator.arrangement import arrange
from autopar.simulator.pipeline import Wiring

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "schedules.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_example_runs() -> None:
    exec(compile(blocks("python")[0], "schedules.md", "exec"), {})


def test_a_plan_of_several_stages_is_written_and_priced_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    written, priced = blocks("python")[1:3]
    names: dict[str, Any] = {}
    exec(
        compile(written.replace("plan.json", str(tmp_path / "plan.json")), "written", "exec"), names
    )
    exec(compile(priced, "priced", "exec"), names)
    plan = load_plan(tmp_path / "plan.json")
    assert plan.estimate.step_time_s == names["priced"].step_time_s


def test_commands_run_and_draw_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    printed = {}
    for line in blocks("sh")[0].splitlines():
        command = line.split("#")[0].split()[1:]
        result = CliRunner().invoke(cli.commands, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        printed[" ".join(command)] = result.stdout
    drawn = printed["draw zero_bubble_h1 --devices 4 --microbatches 8"]
    assert drawn.startswith(blocks("text")[0])
    assert (tmp_path / "chimera.html").exists()


def test_rows_that_never_end_are_refused_as_shown() -> None:
    rows = rows_from_text("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1")
    with pytest.raises(AutoparError) as found:
        arrange(rows, Wiring(2, ((0, 1, True),)))
    assert str(found.value) + "\n" == blocks("text")[1]


def test_every_schedule_is_on_the_page() -> None:
    for name in SCHEDULES:
        assert f"| `{name}`" in PAGE
