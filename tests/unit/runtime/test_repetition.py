"""What a dry run leaves out of a row changes nothing of what it finds."""

from __future__ import annotations

from random import Random

import pytest

from autopar.ir.schedule import Action
from autopar.runtime.pipeline import _Stage
from autopar.runtime.repetition import ShortenedRow, longest_run
from autopar.runtime.verify_stages import StagesReport, verify_stages
from autopar.schedules import SCHEDULES
from autopar.simulator.microbatches import division
from autopar.simulator.pipelines import evaluate_stages
from autopar.simulator.stages import pipelined
from tests.helpers.cases import case
from tests.helpers.fake_prices import FakePrices
from tests.helpers.stage_check import CHUNKS
from tests.helpers.staged_plans import blocks, chain
from tests.helpers.stages import ALONE, divided, in_order, looped, strategy_of

MANY = 16


def done(monkeypatch: pytest.MonkeyPatch) -> list[Action]:
    """The actions that are really done from here on."""
    found: list[Action] = []
    plain = _Stage.do

    def noted(self: _Stage, action: Action) -> None:
        found.append(action)
        plain(self, action)

    monkeypatch.setattr(_Stage, "do", noted)
    return found


def whole(self: ShortenedRow):  # type: ignore[no-untyped-def]
    yield from self.step.plan.instructions(self.step.row)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_the_report_is_that_of_the_whole_row(
    schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = division(blocks(5), MANY)
    chunks = CHUNKS[schedule] if CHUNKS[schedule] > 1 else None
    strategy = chain(4, schedule, MANY, chunks=chunks, layers=5)
    estimate = evaluate_stages(of, FakePrices(devices=8), strategy)

    def report() -> StagesReport:
        return verify_stages(of, strategy, estimate, typecheck=False)

    actions = done(monkeypatch)
    short = report()
    fewer = len(actions)
    monkeypatch.setattr(ShortenedRow, "__iter__", whole)
    full = report()
    assert short == full and full.ok
    if schedule == "1f1b":
        assert fewer < (len(actions) - fewer) * 0.7
    rows = pipelined(of, strategy).rows
    assert len(actions) - fewer == sum(len(rows[one.row]) for one in full.ranks)


def test_a_row_that_never_comes_back_to_where_it_was_is_done_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Something is kept for ever of every microbatch."""
    of = divided(case("mlp").graph, 8)
    strategy = strategy_of(of, in_order(of.graph, 2), looped(2, ALONE), "1f1b")
    estimate = evaluate_stages(of, FakePrices(devices=2), strategy)
    actions, kept = done(monkeypatch), []
    noted = _Stage.do

    def leaky(self: _Stage, action: Action) -> None:
        noted(self, action)
        if action.kind == "F":
            kept.append(next(iter(self.inputs.values())) + 0)

    monkeypatch.setattr(_Stage, "do", leaky)
    verify_stages(of, strategy, estimate, rank=1, typecheck=False)
    assert len(actions) == 16


@pytest.mark.parametrize("seed", range(4))
def test_the_longest_run_repeats(seed: int) -> None:
    """A beginning, a period for ever higher microbatches, an end."""
    rng = Random(seed)
    period = [Action(rng.randrange(2), "F", rng.randrange(2)) for _ in range(rng.randint(2, 5))]
    period.append(Action(2, "B", 0))  # unlike the others
    times = rng.randint(4, 7)
    again = [replaced(action, 2 * number) for number in range(times) for action in period]
    start = [Action(3, "F", 9), Action(3, "B", 9)]
    run = longest_run([*start, *again, *reversed(start)])
    assert run is not None
    assert (run.start, run.length, run.times, run.shift) == (2, len(period), times, 2)
    assert longest_run([*start, *period, *reversed(start)]) is None


def replaced(action: Action, more: int) -> Action:
    return action._replace(microbatch=action.microbatch + more)
