"""``autopar calibrate``: from a run to a profile that the next plan is made with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import cost_models
from autopar import api, cli
from autopar.ir.measurement import Measurement, read_run, run_to_json
from autopar.ir.plan import Plan, load_plan, save_plan
from autopar.runtime.profiler import here
from cost_models import Profiled
from cost_models.profiled import Profile, profile_to_json, read_profile
from cost_models.saved import cost_model_to_json
from tests.helpers import fake_plans
from tests.helpers.profiles import ideal

SLOWER = 1.25


def of_this_machine(**changes: Any) -> Profile:
    device, software = here(8)
    return ideal(device=device, software=software, **changes)


def planned(folder: Path, profile: Profile) -> Plan:
    made = replace(fake_plans.priced(2), topology=cost_model_to_json(Profiled(profile)))
    plan = replace(made, estimate=api.simulate(made))
    save_plan(plan, folder / "plan.json")
    return plan


def ran(folder: Path, plan: Plan, times: float = SLOWER, **changes: Any) -> Path:
    """The record of a run whose steps took so many times as long as predicted."""
    step_s = times * plan.estimate.step_time_s
    steps = (3 * step_s, step_s, 1.01 * step_s, 0.99 * step_s)
    found = Measurement((1.0,) * 4, steps, 1000, (steps,) * plan.world_size)
    record = replace(api.run_record(plan, folder / "plan.json", found), **changes)
    path = folder / "run.json"
    path.write_text(json.dumps(run_to_json(record)))
    assert read_run(path) == record
    return path


def calibrate(*arguments: object) -> Result:
    return CliRunner().invoke(cli.commands, ["calibrate", *map(str, arguments)])


def refused(*arguments: object) -> str:
    result = calibrate(*arguments)
    assert result.exit_code != 0
    assert isinstance(result.exception, api.AutoparError), result.output
    return str(result.exception)


def test_a_profile_of_more_devices_is_not_corrected_by_a_run_of_fewer(tmp_path: Path) -> None:
    profile = of_this_machine()
    run, other = ran(tmp_path, planned(tmp_path, profile)), tmp_path / "other.json"
    other.write_text(json.dumps(profile_to_json(replace(profile, devices=16))))
    said = refused("--from-run", run, "--profile", other, "-o", tmp_path / "out.json")
    assert "was on 8 devices" in said
    assert "has 16" in said
    assert len(said) < 400


def test_a_corrected_profile_predicts_the_run_and_says_where_it_is_from(tmp_path: Path) -> None:
    profile = of_this_machine()
    plan = planned(tmp_path, profile)
    run, out = ran(tmp_path, plan), tmp_path / "corrected.json"
    text = calibrate("--from-run", run, "-o", out).output
    assert "prediction is" in text
    assert f"plan with --topology {out}" in text

    found = read_profile(out)
    step_s = api.simulate(plan, str(out)).step_time_s
    assert step_s == pytest.approx(SLOWER * plan.estimate.step_time_s, rel=0.03)
    (correction,) = found.corrections
    assert correction.of == profile.digest
    assert correction.runs == (
        (str(tmp_path / "plan.json"), plan.estimate.step_time_s, read_run(run).step_time_s),
    )
    assert any(factor > 1 for _, factor in correction.factors)
    assert cost_models.cost_model(str(out)) == Profiled(found)


def test_json_has_the_factors_and_the_profile(tmp_path: Path) -> None:
    run = ran(tmp_path, planned(tmp_path, of_this_machine()))
    out = tmp_path / "corrected.json"
    found = json.loads(calibrate("--from-run", run, "-o", out, "--json").stdout)
    assert [f["part"] for f in found["factors"]] == ["compute", "communication", "overhead"]
    assert found["profiled"] == json.loads(out.read_text())


def test_a_second_correction_is_of_the_first(tmp_path: Path) -> None:
    profile = of_this_machine()
    run = ran(tmp_path, planned(tmp_path, profile))
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    calibrate("--from-run", run, "-o", first)
    calibrate("--from-run", run, "--profile", first, "-o", second)
    once, twice = read_profile(first), read_profile(second)
    assert [c.of for c in twice.corrections] == [profile.digest, once.digest]
    assert dict(twice.corrections[1].factors)["compute"] == pytest.approx(1.0, abs=0.02)


def test_a_run_elsewhere_is_refused_by_name(tmp_path: Path) -> None:
    plan = planned(tmp_path, of_this_machine())
    out = tmp_path / "corrected.json"
    said = refused("--from-run", ran(tmp_path, plan, device="an abacus"), "-o", out)
    assert "instead of 'an abacus'" in said
    assert "autopar profile" in said
    other = ran(tmp_path, plan, software=(("python", "2.7"), ("torch", "0.1"), ("backend", "mpi")))
    assert "instead of '0.1'" in refused("--from-run", other, "-o", out)
    assert not out.exists()


def test_a_plan_without_a_profile_has_nothing_to_correct(tmp_path: Path) -> None:
    machine = cost_model_to_json(cost_models.cost_model("1x8xh100-sxm"))
    plan = replace(fake_plans.priced(2), topology=machine)
    save_plan(plan, tmp_path / "plan.json")
    said = refused("--from-run", ran(tmp_path, plan), "-o", tmp_path / "out.json")
    assert "1x8xh100-sxm" in said
    assert "--profile" in said


def test_a_plan_that_changed_since_is_refused(tmp_path: Path) -> None:
    run = ran(tmp_path, planned(tmp_path, of_this_machine()))
    plan = load_plan(tmp_path / "plan.json")
    save_plan(replace(plan, model="other.py"), tmp_path / "plan.json")
    assert "has changed since" in refused("--from-run", run, "-o", tmp_path / "out.json")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "is not a run"),
        ('{"format": "autopar-run", "version": 9}', "version 9"),
        ('{"format": "autopar-run", "version": 1}', "damaged"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, text: str, says: str) -> None:
    run = tmp_path / "run.json"
    run.write_text(text)
    assert says in refused("--from-run", run, "-o", tmp_path / "out.json")
    assert "cannot read" in refused("--from-run", tmp_path / "none", "-o", tmp_path / "out.json")


def test_an_old_profile_is_refused_with_what_to_do(tmp_path: Path) -> None:
    run = ran(tmp_path, planned(tmp_path, of_this_machine()))
    old = tmp_path / "old.json"
    old.write_text(json.dumps({**profile_to_json(of_this_machine()), "version": 2}))
    said = refused("--from-run", run, "--profile", old, "-o", tmp_path / "out.json")
    assert "version 2" in said
    assert "autopar profile" in said


def test_a_plan_whose_profile_is_of_elsewhere_is_doubted_by_name(tmp_path: Path) -> None:
    same = planned(tmp_path, of_this_machine())
    assert api.doubts(same) == api.doubts(same, running=True) == []
    other = planned(tmp_path, replace(of_this_machine(), device="an abacus"))
    assert api.doubts(other) == []  # plans are made for machines that are elsewhere
    (doubt,) = api.doubts(other, running=True)
    assert "'an abacus'" in doubt
    software = (("python", "2.7"), ("torch", "0.1"), ("backend", "gloo"))
    old = planned(tmp_path, replace(of_this_machine(), software=software))
    assert ["'2.7'" in doubt or "'0.1'" in doubt for doubt in api.doubts(old)] == [True, True]
    assert api.doubts(replace(same, topology={"name": "1x8xh100-sxm"})) == []
