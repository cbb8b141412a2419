"""What cannot be run is refused before it is: what was asked, what there is, what would work."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autopar import api
from autopar.errors import AutoparError, InfeasibleError, PlanMismatchError
from autopar.ir.plan import Plan
from autopar.ir.sharding import Mesh
from autopar.ir.strategy import Strategy, Training
from autopar.runtime import room
from autopar.simulator.stages import pipelined
from tests.helpers import fake_plans
from tests.helpers.cases import case, divided
from tests.helpers.stages import ALONE, PAIR, in_order, looped, strategy_of
from tests.helpers.zoo import zoo


def staged(name: str = "mlp", schedule: str = "1f1b", count: int = 4, stages: int = 2) -> Strategy:
    of = divided(case(name).graph, count)
    return strategy_of(of, in_order(of.graph, stages), looped(stages, ALONE), schedule)


def planned(strategy: Strategy, name: str = "mlp") -> Plan:
    return replace(fake_plans.plan(), graph=case(name).graph, strategy=strategy)


def refused(plan: Plan, error: type[AutoparError], *said: str) -> None:
    """``said``: what was asked, what there is, what to do."""
    with pytest.raises(error) as raised:
        api.run(plan, zoo("mlp")[0])
    for text in said:
        assert text in str(raised.value)


def test_microbatches_that_do_not_divide_the_batch() -> None:
    plan = planned(replace(staged(), microbatches=3))
    refused(plan, AutoparError, "3 microbatches", "the batch of 8", "1, 2, 4, 8 would")


def test_microbatches_too_small_for_the_devices_of_a_stage() -> None:
    of = divided(case("mlp").graph, 8)
    strategy = strategy_of(of, in_order(of.graph, 2), looped(2, PAIR), "1f1b")
    said = ("over a mesh of 2 devices", "in 8 microbatches it has", " 1 of these", "fewer")
    refused(planned(strategy), PlanMismatchError, *said)
    wide = Mesh((("data", 4),))
    of = divided(case("mlp").graph, 4)
    strategy = strategy_of(of, in_order(of.graph, 2), looped(2, wide), "1f1b")
    refused(planned(strategy), PlanMismatchError, "mesh of 4 devices", " 2 of these")


def test_more_stages_than_operators() -> None:
    operators = len(case("mlp").graph.operators)
    strategy = staged(stages=operators + 1)
    refused(planned(strategy), AutoparError, f"of {operators + 1} has no operators", str(operators))


@pytest.mark.parametrize(
    ("schedule", "count", "stages", "said"),
    [
        ("chimera", 4, 3, "an even number of stages works"),
        ("chimera", 1, 2, "2 or more would work"),
        ("interleaved_1f1b", 4, 3, "ask for 2 chunks or more"),
    ],
)
def test_a_shape_that_the_schedule_cannot_do(
    schedule: str, count: int, stages: int, said: str
) -> None:
    strategy = staged(schedule=schedule, count=count, stages=stages)
    refused(planned(strategy), AutoparError, f"the schedule {schedule}", said)


def test_another_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    said = ("is for 2 processes (2 stages)", "there are 3", "--nproc-per-node 2", "a plan for 3")
    refused(planned(staged()), PlanMismatchError, *said)


def test_a_stage_that_cannot_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    strategy = replace(staged(), training=Training("adamw"))
    parts = pipelined(divided(case("mlp").graph, 4), strategy).parts
    kept = [room.kept_bytes(part.graph, part.strategy) for part in parts]
    parameters = [sum(p.spec.bytes for p in part.graph.parameters) for part in parts]
    assert kept == [4 * n for n in parameters], "with a gradient and two moments"
    larger = max(range(2), key=kept.__getitem__)
    monkeypatch.setattr(room, "memory_bytes", lambda: 2 * (kept[larger] - 1))
    said = (f"stage {larger} keeps", "one of 2 processes on this machine", "ZeRO")
    refused(planned(strategy), InfeasibleError, *said)


def test_a_plan_that_promises_more_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    promised = fake_plans.plan().estimate.peak_memory_bytes
    monkeypatch.setattr(room, "memory_bytes", lambda: promised - 1)
    refused(planned(staged()), InfeasibleError, "the plan needs", f"--memory-limit {promised - 1}")
    monkeypatch.setattr(room, "memory_bytes", lambda: promised * 8 - 1)
    with pytest.raises(InfeasibleError, match="one of 8 processes on this machine has"):
        api.check_processes(replace(fake_plans.plan(), topology={"name": "local", "profiled": {}}))
