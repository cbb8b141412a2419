"""From names to a plan file, with a searcher and a world that the test makes up."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autopar import api, cli, searchers
from autopar.errors import AutoparError
from autopar.ir.plan import load_plan
from autopar.ir.search import Budget, Problem, SearchResult, Trial
from autopar.ops import bound_rules
from autopar.simulator.prices import evaluate
from autopar.simulator.reserved import usual_limit_bytes
from tests.helpers import fake_plans
from tests.helpers.fake_prices import FakePrices
from tests.helpers.strategies import replicate

Seen = list[tuple[Problem, Budget]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What the searcher ``fake`` was asked; it replicates on the first mesh."""
    asked: Seen = []

    def search(problem: Problem, budget: Budget, *, progress: object = None) -> SearchResult:
        asked.append((problem, budget))
        mesh = problem.meshes[0]
        strategy = replicate(problem.graph, mesh, problem.training)
        estimate = evaluate(problem.graph, bound_rules(problem.graph), problem.cost_model, strategy)
        fits = estimate.peak_memory_bytes <= problem.memory_limit_bytes
        trial = Trial("whole", mesh, strategy, estimate, estimate.step_time_s, "optimal")
        return SearchResult(
            searcher="fake",
            trials=(trial,),
            best=trial if fits else None,
            lower_bound_s=estimate.step_time_s,
            stop_reason="optimal" if fits else "infeasible",
            search_time_s=0.1,
            nearest_miss_bytes=None if fits else estimate.peak_memory_bytes,
        )

    use(monkeypatch, search)
    monkeypatch.setattr(api, "extract", lambda *_, **__: fake_plans.two_blocks(2))
    return asked


def use(monkeypatch: pytest.MonkeyPatch, search: Callable[..., SearchResult]) -> None:
    monkeypatch.setattr(searchers, "SEARCHERS", {"fake": search})


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


FAKE = ("--searcher", "fake", "--topology", "1x8xh100-sxm")


def test_the_options_arrive_in_the_problem(seen: Seen, tmp_path: Path) -> None:
    assert (
        run(
            *("plan", "m.py", *FAKE, "--mesh", "2,4", "--memory-limit", "3GB"),
            *("--optimizer", "sgd", "--precision", "mixed", "--clip-norm", "0.5"),
            *("--microbatches", 2, "--time-limit", 7, "--dimensions", "SP"),
        )
        == 0
    )
    ((problem, budget),) = seen
    assert [mesh.sizes for mesh in problem.meshes] == [(2, 4)]
    assert problem.memory_limit_bytes == 3 * 10**9
    training = problem.training
    assert (training.optimizer, training.precision, training.clip_norm) == ("sgd", "mixed", 0.5)
    assert (problem.microbatches, problem.dimensions, budget.time_s) == (2, "SP", 7.0)


def test_microbatches_are_as_few_as_fit_unless_given(
    seen: Seen, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("plan", "m.py", *FAKE) == 0
    ((problem, _),) = seen
    assert problem.microbatches is None
    assert run("plan", "m.py", *FAKE, "--microbatches", "some") == 2
    assert "'some' is no number of microbatches" in capsys.readouterr().err


def test_without_a_mesh_all_of_up_to_three_axes_are_tried(seen: Seen) -> None:
    assert run("plan", "m.py", *FAKE) == 0
    ((problem, _),) = seen
    assert {mesh.sizes for mesh in problem.meshes} == {(8,), (2, 4), (4, 2), (2, 2, 2)}
    assert problem.memory_limit_bytes == usual_limit_bytes(problem.cost_model)


def test_the_plan_is_written_and_printed(
    seen: Seen, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    assert run("plan", "m.py", *FAKE, "-o", path) == 0
    assert "TwoBlocks" in capsys.readouterr().out
    plan = load_plan(path)
    assert (plan.model, plan.search.searcher, plan.world_size) == ("m.py", "fake", 8)
    assert run("plan", "m.py", *FAKE, "--json") == 0
    assert json.loads(capsys.readouterr().out)["world_size"] == 8
    assert api.simulate(plan) == plan.estimate


def test_searching_prints_every_trial(seen: Seen, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("search", "m.py", *FAKE) == 0
    assert "whole" in capsys.readouterr().out
    assert run("search", "m.py", *FAKE, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["trials"]) == 1


@pytest.mark.parametrize("command", ["plan", "search"])
def test_what_does_not_fit_says_how_much_it_needs(
    command: str, seen: Seen, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ("-o", tmp_path / "plan.json") if command == "plan" else ()
    assert run(command, "m.py", *FAKE, "--memory-limit", "1kB", *output) == 3
    message = capsys.readouterr().err
    assert "the limit is 1.00 kB" in message
    assert "needs 7" in message  # kilobytes: what replication of the two blocks takes
    assert list(tmp_path.iterdir()) == []


def ended(stop_reason: str, *, found: bool) -> Callable[..., SearchResult]:
    """A searcher that stops early, with or without a strategy."""

    def search(problem: Problem, budget: Budget, *, progress: object = None) -> SearchResult:
        mesh = problem.meshes[0]
        strategy = replicate(problem.graph, mesh)
        estimate = evaluate(problem.graph, bound_rules(problem.graph), problem.cost_model, strategy)
        trial = Trial("whole", mesh, strategy, estimate, estimate.step_time_s / 2, "time")
        return SearchResult(
            searcher="fake",
            trials=(trial,) if found else (),
            best=trial if found else None,
            lower_bound_s=estimate.step_time_s / 2,
            stop_reason=stop_reason,
            search_time_s=1.0,
        )

    return search


@pytest.mark.parametrize(("stop_reason", "code"), [("time", 0), ("interrupted", 130)])
def test_an_early_end_keeps_the_best_and_says_how_far_it_may_be(
    stop_reason: str,
    code: int,
    seen: Seen,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use(monkeypatch, ended(stop_reason, found=True))
    assert run("plan", "m.py", *FAKE, "-o", tmp_path / "plan.json") == code
    assert load_plan(tmp_path / "plan.json").search.gap == 0.5
    assert "at most 50.00% from optimal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stop_reason", "code", "says"),
    [("time", 5, "allow more time"), ("interrupted", 130, "before any strategy was found")],
)
def test_an_early_end_with_nothing_has_an_exit_code_of_its_own(
    stop_reason: str,
    code: int,
    says: str,
    seen: Seen,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use(monkeypatch, ended(stop_reason, found=False))
    assert run("plan", "m.py", *FAKE, "-o", tmp_path / "plan.json") == code
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_refused_before_the_search(
    seen: Seen, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path, tmp_path / "file" / "plan.json"):
        assert run("plan", "m.py", *FAKE, "-o", output) == 2
        assert f"cannot write {output}" in capsys.readouterr().err
    assert seen == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_unknown_searcher_is_named_with_what_there_is(
    seen: Seen, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("plan", "m.py", "--searcher", "fakke", "--topology", "1x8xh100-sxm") == 2
    assert "did you mean fake?" in capsys.readouterr().err


def test_a_searcher_and_a_machine_of_ones_own(seen: Seen) -> None:
    prices = FakePrices(devices=2, memory_bytes=10**9)
    plan = api.plan("m.py", topology=prices, searcher=searchers.SEARCHERS["fake"])
    assert (plan.world_size, plan.topology["name"]) == (2, "FakePrices")
    assert api.simulate(plan, FakePrices(devices=2)) == plan.estimate
    with pytest.raises(AutoparError, match="user's own"):
        api.simulate(plan)


def test_a_plan_is_not_simulated_on_more_or_fewer_devices(seen: Seen) -> None:
    plan = api.plan("m.py", topology="1x8xh100-sxm", searcher="fake")
    with pytest.raises(AutoparError, match="8 devices"):
        api.simulate(plan, "1x4xh100-sxm")


def test_what_is_done_is_told(seen: Seen) -> None:
    told: list[str] = []
    api.plan("m.py", topology="1x8xh100-sxm", searcher="fake", progress=told.append)
    assert any("searching 4 meshes of 8 devices" in line for line in told)


def test_a_module_needs_a_batch() -> None:
    module: Any = object()
    with pytest.raises(AutoparError, match="give inputs"):
        api.extract(module)


def test_the_plan_remembers_the_sizes_of_an_hf_model(seen: Seen) -> None:
    plan = api.plan("hf:x", topology="1x8xh100-sxm", searcher="fake", batch=4, sequence=16)
    assert (plan.model, plan.batch, plan.sequence) == ("hf:x", 4, 16)
    assert replace(plan, batch=None) != plan
