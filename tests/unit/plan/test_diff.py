"""What differs between two plans, and what bounds one."""

from __future__ import annotations

from dataclasses import replace

from autopar.ir.plan import Change, bound_by, diff
from autopar.ir.strategy import Storage, Training
from tests.helpers import fake_plans


def test_a_plan_does_not_differ_from_itself() -> None:
    plan = fake_plans.plan(2)
    difference = diff(plan, plan)
    assert difference.same_model
    assert difference.faster == 1.0
    assert difference.changes == ()


def test_every_choice_that_differs_is_named_once() -> None:
    before = fake_plans.plan(2)
    strategy = replace(
        before.strategy,
        splits={**before.strategy.splits, "layers.1.gelu": ("d0", "nothing")},
        storage={
            **before.strategy.storage,
            "layers.0.up.weight": Storage(("I", "S(0)"), ("I", "S(0)"), ("S(1)", "S(0)")),
        },
        training=Training("sgd", clip_norm=1.0),
    )
    after = replace(before, strategy=strategy, estimate=fake_plans.estimate(0.005))
    difference = diff(before, after)
    assert difference.faster == 2.0
    assert difference.changes == (
        Change("training", "", "adamw, full precision", "sgd, full precision, clip 1"),
        Change("split", "layers.1.gelu", "data: d0, tensor: d1", "data: d0, tensor: nothing"),
        Change(
            "storage",
            "layers.0.up.weight",
            "data: I/I/I, tensor: S(0)/S(0)/S(0)",
            "data: I/I/S(1), tensor: S(0)/S(0)/S(0)",
        ),
    )


def test_plans_of_two_models_say_so() -> None:
    assert not diff(fake_plans.plan(1), fake_plans.plan(2)).same_model


def test_the_largest_part_bounds_a_step() -> None:
    estimate = fake_plans.estimate(0.01)
    assert bound_by(estimate, 10**9) == "compute 50%"
    (first, *_) = estimate.collectives
    slow = replace(estimate, collectives=(replace(first, time_s=0.008),))
    assert bound_by(slow, 10**9) == "all_reduce on tensor 80%"
    assert bound_by(slow, 5000) == "all_reduce on tensor 80%, memory 100%"
