"""Plans of several stages through every command that reads a plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from autopar import api, cli
from autopar.errors import PlanMismatchError
from autopar.exporters import EXPORTERS, text
from autopar.exporters.perfetto import LIMIT_BYTES
from autopar.ir.measurement import Measurement
from autopar.ir.plan import bound_by, diff, load_plan, plan_from_json, plan_to_json, save_plan
from autopar.simulator.microbatches import division
from autopar.simulator.pipelines import evaluate_stages
from cost_models import Analytical, topology
from tests.helpers.fake_prices import QUICK_HOSTS
from tests.helpers.staged_plans import blocks, chain, large_plan, plan_of, tied_plan
from tests.helpers.strategies import kept


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    save_plan(plan_of(4), tmp_path / "plan.json")
    return tmp_path / "plan.json"


def called(*arguments: object) -> Result:
    return CliRunner().invoke(cli.commands, [str(a) for a in arguments], catch_exceptions=False)


def output(*arguments: object) -> str:
    result = called(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble_h1", "chimera", "interleaved_1f1b"])
def test_the_file_keeps_the_estimate(schedule: str) -> None:
    plan = plan_of(4, schedule)
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan
    assert api.simulate(plan) == plan.estimate


def test_a_file_whose_rows_are_not_on_the_devices_of_its_stages_is_refused() -> None:
    data = json.loads(json.dumps(plan_to_json(plan_of(4))))
    data["estimate"]["pipeline"]["rows"].pop()
    with pytest.raises(PlanMismatchError, match="on other devices than its stages"):
        plan_from_json(data)
    data["estimate"]["pipeline"]["rows"][0]["memory"]["at"] = 3
    with pytest.raises(PlanMismatchError, match=r"pipeline.rows\[0\].memory.at is 3, not a string"):
        plan_from_json(data)


def test_explain_says_what_rows_do_and_equal_stages_once(plan_file: Path) -> None:
    said = output("explain", plan_file)
    assert "4 stages by 1f1b" in said
    assert "stages 1-2, which are alike: mesh a 1: layers.3-4; layers.5-6" in said
    assert said.count("stage 0: ") == said.count("stage 3: ") == 1
    assert "bound by" in said and "in flight" in said
    data = json.loads(output("explain", plan_file, "--json"))
    assert [row["most_in_flight"] for row in data["estimate"]["pipeline"]["rows"]] == [4, 3, 2, 1]
    assert [alike["numbers"] for alike in data["stages_alike"]] == [[0], [1, 2], [3]]


def test_explain_says_which_gradients_stages_pass_on(tmp_path: Path) -> None:
    """Of 64 x 32 floats, each half goes once each way."""
    plan = tied_plan()
    assert plan.strategy.kept(0, "tokens.weight") == kept(("I",))
    assert plan.strategy.kept(1, "tokens.weight") == kept(("S(0)",))
    save_plan(plan, tmp_path / "tied.json")
    assert load_plan(tmp_path / "tied.json") == plan
    size = 2 * 64 * 32 * 4
    data = json.loads(output("explain", tmp_path / "tied.json", "--json"))
    assert data["gradients_passed_on"] == [
        {"parameter": "tokens.weight", "stages": [0, 1], "bytes": size}
    ]
    said = output("explain", tmp_path / "tied.json")
    assert "tokens.weight is kept otherwise in stages 0-1: 16.4 kB of its gradient" in said
    assert "kept otherwise in stages 0-1" in EXPORTERS["html"](plan, {})


def test_a_difference_in_how_one_of_two_stages_keeps_a_parameter_is_shown() -> None:
    plan = tied_plan()
    first, second = plan.strategy.stages
    whole = replace(second, storage={"tokens.weight": kept(("R",))})
    other = replace(plan, strategy=replace(plan.strategy, stages=(first, whole)))
    (change,) = diff(plan, other).changes
    assert change.name == "tokens.weight"
    assert change.before == "a: I/I/I; in stage 1 a: S(0)/S(0)/S(0)"


def test_simulate_prices_the_pipeline_on_another_machine(plan_file: Path) -> None:
    here = json.loads(output("simulate", plan_file, "--json"))
    apart = json.loads(output("simulate", plan_file, "--topology", "4x1xh100-sxm", "--json"))
    assert apart["pipeline"]["transfer_s"] > here["pipeline"]["transfer_s"] > 0
    assert apart["peak_memory_bytes"] == here["peak_memory_bytes"]
    assert apart["pipeline"]["traffic"] == here["pipeline"]["traffic"]
    assert "on its critical path" in output("simulate", plan_file)


def test_verify_ends_with_1_if_the_promise_is_not_kept(plan_file: Path, tmp_path: Path) -> None:
    assert "the plan keeps its promise" in output("verify", plan_file)
    plan = load_plan(plan_file)
    assert plan.pipeline is not None
    first, *others = plan.pipeline.rows
    rows = (replace(first, most_in_flight=1), *others)
    wrong = replace(plan.estimate, pipeline=replace(plan.pipeline, rows=rows))
    save_plan(replace(plan, estimate=wrong), tmp_path / "wrong.json")
    arguments = ["verify", str(tmp_path / "wrong.json"), "--rank", "0"]
    assert cli.commands.main(arguments, standalone_mode=False) == 1
    said = output(*arguments)
    assert "DIFFERENT rank 0: 1 microbatches in flight promised, 4 kept" in said
    data = json.loads(output("verify", tmp_path / "wrong.json", "--rank", 2, "--json"))
    assert data["ok"] is True and data["ranks"][0]["row"] == 2


def test_draw_and_export_show_the_rows_of_the_plan(plan_file: Path, tmp_path: Path) -> None:
    assert "row 3" in output("draw", plan_file)
    output("draw", plan_file, "-o", tmp_path / "drawn.html")
    assert "row 3" in (tmp_path / "drawn.html").read_text()
    trace = json.loads(output("export", plan_file, "perfetto"))
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"]
    assert names == [f"row {r}: devices {r}, stage {r}" for r in range(4)]
    actions = [e["name"] for e in trace["traceEvents"] if e["ph"] == "X" and e["tid"] == 0]
    assert {"0F0", "3B7", "2U7"} <= set(actions)
    step_us = max(e["ts"] + e["dur"] for e in trace["traceEvents"] if e["ph"] == "X")
    assert step_us == pytest.approx(load_plan(plan_file).estimate.step_time_s * 1e6, rel=1e-3)


@pytest.mark.parametrize("name", sorted(EXPORTERS))
def test_every_exporter_takes_several_stages(plan_file: Path, name: str) -> None:
    plan = load_plan(plan_file)
    assert plan.graph.name in api.export(plan, name) or name == "json"


def test_a_trace_of_a_thousand_devices_is_small_and_has_a_process_for_each_row() -> None:
    plan = large_plan()
    assert plan.world_size == 1024
    trace = api.export(plan, "perfetto")
    assert len(trace) < LIMIT_BYTES
    events = json.loads(trace)["traceEvents"]
    assert {e["pid"] for e in events} == set(range(64))


def test_diff_says_which_operators_went_to_another_stage(plan_file: Path, tmp_path: Path) -> None:
    assert "every choice is the same" in output("diff", plan_file, plan_file)
    save_plan(plan_of(2, "gpipe"), tmp_path / "other.json")
    said = output("diff", plan_file, tmp_path / "other.json")
    assert "stages: 4 by 1f1b -> 2 by gpipe" in said
    data = json.loads(output("diff", plan_file, tmp_path / "other.json", "--json"))
    moved = {c["name"]: (c["before"], c["after"]) for c in data["changes"] if c["what"] == "stage"}
    assert moved["layers.8.up.linear"] == ("3", "1")
    assert "layers.0.up.linear" not in moved


def test_a_measurement_stands_beside_the_prediction() -> None:
    plan = plan_of(4)
    measured = Measurement((1.0, 0.9), (0.5, 0.5), plan.estimate.peak_memory_bytes)
    said = text.measurement(plan, measured, None)
    assert "4 stages by 1f1b" in said and "0% too" in said


def test_a_pipeline_is_bound_by_what_its_busiest_row_does() -> None:
    def said(stages: int, microbatches: int) -> str:
        prices = Analytical(topology(f"1x{stages}xh100-sxm"), QUICK_HOSTS)
        strategy = chain(stages, "gpipe", microbatches)
        found = evaluate_stages(division(blocks(), microbatches), prices, strategy)
        return bound_by(found, 10**12)

    assert said(4, 8).startswith(("compute", "update"))
    assert said(8, 1).startswith("bubble")
    hosts = bound_by(plan_of(4, "gpipe", 8).estimate, 10**12)
    assert hosts.startswith("waiting for hosts")  # of operators as small as these
