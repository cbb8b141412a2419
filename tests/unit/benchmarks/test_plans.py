"""What the benchmark of plans says of its rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.pipelines import CASES, CORRECTING, MODELS, Row, by_model, kendall_tau, read, write

ROW = Row(
    model="gpt",
    plan="4 groups",
    schedule="1f1b",
    stages=4,
    microbatches=8,
    predicted_step_s=1.0,
    corrected_step_s=1.1,
    corrects=0,
    measured_step_s=1.0,
    least_step_s=0.9,
    most_step_s=2.0,
    processor_s=1.5,
    predicted_peak_bytes=100,
    measured_peak_bytes=100,
    rounds=3,
    others=0.5,
    others_of_profile=0.4,
    machine="a test",
    cores=2,
    date="2026-11-26",
)


def test_there_are_forty_plans_of_four_models_and_two_of_each_correct_its_profile() -> None:
    assert len(CASES) == 40
    assert {case.model for case in CASES} == set(MODELS)
    for model in MODELS:
        found = {(c.schedule, c.groups, c.inside) for c in CASES if c.model == model}
        assert found >= set(CORRECTING)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [ROW, replace(ROW, model="unet", corrects=1)]
    write(tmp_path / "rows.csv", rows)
    assert read(tmp_path / "rows.csv") == rows


def test_tau_counts_pairs() -> None:
    assert kendall_tau([(1, 1), (2, 2), (3, 3)]) == 1
    assert kendall_tau([(1, 3), (2, 2), (3, 1)]) == -1
    assert kendall_tau([(1, 1), (2, 3), (3, 2)]) == pytest.approx(1 / 3)


def test_plans_that_correct_a_profile_are_not_judged_by_it() -> None:
    rows = [
        replace(ROW, predicted_step_s=0.5, corrected_step_s=1.0, corrects=1),
        replace(ROW, plan="searched", predicted_step_s=0.8, corrected_step_s=1.1),
        # predicted to be the best, and slower by 30%
        replace(ROW, plan="c", predicted_step_s=0.4, corrected_step_s=0.9, measured_step_s=1.3),
    ]
    _, _, before, after, *_ = by_model(rows).splitlines()
    assert before.split(" | ")[1:5] == ["the profile", "3", "50%", "-50%"]
    assert after.split(" | ")[1:3] == ["the profile, corrected", "2"]
    assert before.endswith("c, 1f1b | 30% | 0% |")
    assert after.endswith("c, 1f1b | 30% | 0% |")
