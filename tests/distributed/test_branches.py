"""Stages that are a graph: branches of a model on disjoint devices run at the same time, and train
as one process does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import pytest

from autopar.ir.graph import Operator
from autopar.ir.sharding import Mesh
from autopar.simulator.pipeline import Instant, Pipeline, StageCost
from autopar.simulator.stages import Pipelined, pipelined
from autopar.simulator.timeline import Timeline, simulate
from tests.helpers.cases import case, divided
from tests.helpers.stage_check import check
from tests.helpers.stages import ALONE, PAIR, Layout, by, by_axis_name, strategy_of

ON_GRAPHS = ["gpipe", "1f1b", "zero_bubble_h1"]
"""Schedules that take a graph of stages."""

INCEPTION = ("stem", "one", "three", "five", "pooled", "cat head cross_entropy_loss")
UNET = (
    "down1",
    "max_pool2d down2",
    "avg_pool2d bottom upsample_nearest2d",
    "cat up2 widen",
    "cat_1 up1 out mse_loss",
)
TENSOR = Mesh((("tensor", 2),))


def stage_by(names: Sequence[str]) -> Callable[[Operator], int]:
    """For each stage, the modules and the operators outside of modules that it has."""
    stages = {first: number for number, of in enumerate(names) for first in of.split()}
    return lambda operator: stages[operator.name.partition(".")[0]]


def chained(sizes: Sequence[Mesh]) -> Layout:
    """Each stage on devices of its own."""
    devices, start = [], 0
    for mesh in sizes:
        devices.append(tuple(range(start, start + mesh.size)))
        start += mesh.size
    return Layout(tuple(devices), tuple(sizes))


def feeds_of(plan: Pipelined) -> set[tuple[int, int]]:
    return {(b.source, b.target) for b in plan.boundaries}


def timeline_of(plan: Pipelined, seconds: Sequence[int]) -> Timeline:
    """``seconds``: of each stage's forward; its backward takes twice as long."""
    costs = tuple(StageCost(s, 2 * s, 0, s, s) for s in seconds)
    return simulate(plan.rows, Pipeline(costs, plan.feeds, Instant()))


@pytest.mark.parametrize(
    ("schedule", "meshes"),
    [
        ("1f1b", (ALONE,) * 6),
        pytest.param("gpipe", (ALONE,) * 6, marks=pytest.mark.slow),
        pytest.param("zero_bubble_h1", (ALONE,) * 6, marks=pytest.mark.slow),
        pytest.param("1f1b", (ALONE, ALONE, PAIR, TENSOR, ALONE, ALONE), marks=pytest.mark.slow),
        pytest.param("gpipe", (TENSOR, ALONE, PAIR, ALONE, ALONE, ALONE), marks=pytest.mark.slow),
    ],
)
def test_branches_of_an_inception_block(schedule: str, meshes: tuple[Mesh, ...]) -> None:
    of = divided(case("inception").graph, 4)
    operators = by(of.graph, stage_by(INCEPTION))
    rng = Random(f"{schedule} {meshes}")
    strategy = strategy_of(of, operators, chained(meshes), schedule, rng, divide=by_axis_name)
    check(case("inception"), strategy)


@pytest.mark.parametrize("schedule", ON_GRAPHS)
def test_branches_run_at_the_same_time(schedule: str) -> None:
    of = divided(case("inception").graph, 4)
    operators = by(of.graph, stage_by(INCEPTION))
    plan = pipelined(of, strategy_of(of, operators, chained((ALONE,) * 6), schedule))
    assert feeds_of(plan) == {(0, b) for b in (1, 2, 3, 4)} | {(b, 5) for b in (1, 2, 3, 4)}
    timeline = timeline_of(plan, (1, 1, 5, 4, 2, 1))
    starts = {event.name: event.start_s for event in timeline.events()}
    for branch in (1, 2, 3, 4):
        assert starts[f"{branch}F0"] == 1, "as soon as the stem is through"
    # a microbatch takes as long as its longest branch, not as long as all of them
    assert starts["5F0"] == 1 + 5
    # nor does the step: two of the branches one after the other would take longer
    assert timeline.step_time_s < 4 * 3 * (5 + 4)


@pytest.mark.parametrize(
    "schedule",
    ["1f1b", *(pytest.param(s, marks=pytest.mark.slow) for s in ("gpipe", "zero_bubble_h1"))],
)
def test_levels_of_a_u_net_with_its_skips(schedule: str) -> None:
    """What goes down is read again on the way up, two and four stages later."""
    of = divided(case("unet").graph, 4)
    operators = by(of.graph, stage_by(UNET))
    layout = chained((ALONE,) * 5)
    strategy = strategy_of(of, operators, layout, schedule)
    plan = pipelined(of, strategy)
    assert feeds_of(plan) >= {(0, 4), (1, 3)}
    check(case("unet"), strategy)
