"""Every schedule with every kind of parallelism inside its stages trains as one process does.

By default a few of all pairs; `pytest -m slow` takes each schedule with each kind on each model.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from random import Random

import pytest

from autopar.ir.sharding import Mesh
from autopar.ir.strategy import Strategy, Training
from autopar.simulator.microbatches import Division
from tests.helpers.cases import case, divided
from tests.helpers.stage_check import CHUNKS, check, tower_of
from tests.helpers.stages import (
    ALONE,
    PAIR,
    Layout,
    by,
    by_axis_name,
    in_order,
    looped,
    strategy_of,
)

TENSOR = Mesh((("tensor", 2),))
GRID = Mesh((("data", 2), ("tensor", 2)))
ADAM = Training("adamw")
CLIPPED = Training("momentum", clip_norm=0.5)


def batches(level: int) -> Callable[..., Strategy]:
    def made(of: Division, schedule: str, mesh: Mesh, groups: int) -> Strategy:
        layout = looped(groups, mesh, CHUNKS[schedule])
        operators = in_order(of.graph, len(layout.meshes))
        return strategy_of(of, operators, layout, schedule, zero=level, training=ADAM)

    return made


def named_axes(of: Division, schedule: str, mesh: Mesh, groups: int) -> Strategy:
    layout = looped(groups, mesh, CHUNKS[schedule])
    operators = in_order(of.graph, len(layout.meshes))
    rng = Random(f"{of.graph.name} {schedule} {mesh}")
    return strategy_of(of, operators, layout, schedule, rng, training=CLIPPED, divide=by_axis_name)


INSIDE: dict[str, tuple[Callable[..., Strategy], Mesh, int]] = {
    "alone": (batches(0), ALONE, 4),
    "data": (batches(0), PAIR, 2),
    "zero1": (batches(1), PAIR, 2),
    "zero2": (batches(2), PAIR, 2),
    "zero3": (batches(3), PAIR, 2),
    "tensor": (named_axes, TENSOR, 2),
    "axes": (named_axes, GRID, 2),
}
"""What is inside a stage: how to divide it, over which mesh, how many groups of devices."""

FEW = {
    ("1f1b", "zero2", "llama"),
    ("interleaved_1f1b", "tensor", "gpt_tied"),
    ("zero_bubble_h1", "tensor", "unet"),
    ("chimera", "axes", "gpt_tied"),
}


ALL = [
    pytest.param(*chosen, marks=() if chosen in FEW else pytest.mark.slow)
    for chosen in product(CHUNKS, INSIDE, ("gpt_tied", "llama", "unet", "towers"))
]


@pytest.mark.parametrize(("schedule", "inside", "name"), ALL)
def test_every_schedule_with_every_kind_of_parallelism(
    schedule: str, inside: str, name: str
) -> None:
    made, mesh, groups = INSIDE[inside]
    check(case(name), made(divided(case(name).graph, 4), schedule, mesh, groups))


ON_GRAPHS = [
    pytest.param(*chosen, marks=() if chosen == ("1f1b", ALONE) else pytest.mark.slow)
    for chosen in product(("gpipe", "1f1b", "zero_bubble_h1"), (ALONE, PAIR, TENSOR))
]
"""Schedules that take a graph of stages."""


@pytest.mark.parametrize(("schedule", "mesh"), ON_GRAPHS, ids=str)
def test_towers_on_disjoint_devices(schedule: str, mesh: Mesh) -> None:
    of = divided(case("towers").graph, 4)
    n = mesh.size
    devices = tuple(tuple(range(k * n, k * n + n)) for k in range(3))
    layout = Layout(devices, (mesh,) * 3)
    operators = by(of.graph, tower_of)
    rng = Random(f"{schedule} {mesh}")
    check(case("towers"), strategy_of(of, operators, layout, schedule, rng, divide=by_axis_name))
