"""Parameters that stages share and keep differently: on other meshes, in other pieces."""

from __future__ import annotations

from random import Random

import pytest
import torch.distributed as dist

from autopar.ir.sharding import Mesh
from autopar.ir.strategy import Strategy, Training
from autopar.runtime.launch import run_stages
from autopar.simulator.stages import pipelined
from tests.helpers.cases import Case, call, case, relative
from tests.helpers.pool import pool
from tests.helpers.stage_check import check
from tests.helpers.stages import ALONE, PAIR, Layout, by_axis_name, divided, in_order, strategy_of
from tests.helpers.zoo import zoo

pytestmark = pytest.mark.distributed

CLIPPED = Training("adamw", clip_norm=1.0)
FOUR = Mesh((("tensor", 4),))
GRID = Mesh((("data", 2), ("tensor", 2)))
TALL, WIDE = Mesh((("data", 2), ("tensor", 1))), Mesh((("data", 1), ("tensor", 2)))

LAYOUTS = {
    "1f1b on 1 and 2": ("1f1b", Layout(((0,), (1, 2)), (ALONE, PAIR))),
    "zero_bubble_h1 on 2 and 1": ("zero_bubble_h1", Layout(((0, 1), (2,)), (WIDE, ALONE))),
    "interleaved_1f1b on 2x1 and 1x2": (
        "interleaved_1f1b",
        Layout(((0, 1), (2, 3)) * 2, (TALL, PAIR, PAIR, WIDE)),
    ),
    "chimera on 2x1 and 1x2": ("chimera", Layout(((0, 1), (2, 3)), (TALL, WIDE))),
    "1f1b on 2x2 and 4": ("1f1b", Layout(((0, 1, 2, 3), (4, 5, 6, 7)), (GRID, FOUR))),
    "1f1b on 2, 1 and 1": ("1f1b", Layout(((0, 1), (2,), (3,)), (WIDE, ALONE, ALONE))),
}
"""The first stage embeds, the last one has the head."""


def tied(layout: str, seed: int) -> Strategy:
    """Splits and storages, ZeRO among them, at random."""
    of = divided(case("gpt_tied").graph, 4)
    schedule, where = LAYOUTS[layout]
    operators = in_order(of.graph, len(where.meshes))
    rng = Random(f"{layout} {seed}")
    return strategy_of(of, operators, where, schedule, rng, training=CLIPPED, divide=by_axis_name)


@pytest.mark.parametrize(
    ("layout", "seed"),
    [
        *((layout, 0) for layout in LAYOUTS),
        *(pytest.param(layout, 1, marks=pytest.mark.slow) for layout in LAYOUTS),
    ],
)
def test_a_tied_model_trains_as_in_one_process(layout: str, seed: int) -> None:
    strategy = tied(layout, seed)
    plan = pipelined(divided(case("gpt_tied").graph, 4), strategy)
    (shared,) = (of for of in plan.shared if of.name == "tokens.weight")
    assert len(shared.kinds) == 2
    found = check(case("gpt_tied"), strategy)
    sent = sum(one.bytes for one in shared.sent(plan.groups))
    assert 0 < sent < sum(sum(one.trace.sent_bytes.values()) for one in found)


@pytest.mark.parametrize("layout", ["1f1b on 1 and 2", "chimera on 2x1 and 1x2"])
def test_copies_begin_and_stay_equal(layout: str) -> None:
    """Whichever pieces each stage has of it, before a step and after three."""
    strategy = tied(layout, 0)
    differences = pool().run(strategy.devices, apart, case("gpt_tied"), strategy)
    assert max(differences) < 1e-14


def apart(of: Case, strategy: Strategy) -> float:
    """The largest difference between what two stages say that the parameter is."""
    model, inputs = zoo(of.name)
    step = run_stages(divided(of.graph, strategy.microbatches), strategy, model)
    found = []
    for _ in range(2):
        own = [
            (stage, held.full_parameters()["tokens.weight"])
            for stage, held in step.held.items()
            if "tokens.weight" in held.state.parameters
        ]
        everywhere: list[list] = [[] for _ in range(dist.get_world_size())]  # type: ignore[type-arg]
        dist.all_gather_object(everywhere, own)
        whole = [value for one in everywhere for _, value in one]
        assert len({stage for one in everywhere for stage, _ in one}) == 2
        found.append(max(relative(value, whole[0]) for value in whole))
        for _ in range(3):
            call(step, inputs)
    return max(found)
