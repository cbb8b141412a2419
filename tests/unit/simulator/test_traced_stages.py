"""Units of a traced model add up to the stages that are made of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest

from autopar.ir.strategy import Strategy
from autopar.schedules import SCHEDULES
from autopar.simulator.listing import Structure
from autopar.simulator.meshes import mesh
from autopar.simulator.microbatches import Division, division
from autopar.simulator.pipelines import PricedPipeline, StagePrices
from autopar.simulator.stage_problem import StageChoice, Staging, played
from autopar.simulator.stages import pipelined
from autopar.simulator.traced_stages import TracedStages
from autopar.simulator.units import units
from tests.helpers.cases import case
from tests.helpers.fake_prices import FakePrices
from tests.helpers.strategies import random_strategy, replicate

MICROBATCHES = 4
PARTED = {"1f1b": 1, "zero_bubble_h1": 1, "interleaved_1f1b": 2}
"""Schedules, and how many stages a row has."""


def divided(name: str) -> Division:
    return division(case(name).graph, MICROBATCHES)


def traced(of: Division, like: Strategy, rows: int) -> TracedStages:
    prices = FakePrices(devices=rows * like.mesh.size, latency_s=1e-7)
    structure = Structure(of.graph, of.rules)
    return TracedStages(
        lambda m: (of, structure),
        units(of.whole),
        prices,
        10**15,
        {MICROBATCHES: [replace(like, microbatches=MICROBATCHES)]},
        StagePrices(prices),
        like.training,
        ("none", "selective", "full"),
    )


def random_staging(stages: TracedStages, schedule: str, rows: int, rng: Random) -> Staging:
    found = stages.problem.units(MICROBATCHES)
    count = rows * PARTED[schedule]
    ends = [0, *sorted(rng.sample(range(1, len(found)), count - 1)), len(found)]
    layout = found[0].alternatives[0].layout
    chosen = tuple(
        StageChoice(
            tuple(range(a, b)),
            layout,
            tuple(rng.randrange(len(found[u].alternatives)) for u in range(a, b)),
        )
        for a, b in pairwise(ends)
    )
    return Staging(MICROBATCHES, SCHEDULES[schedule], PARTED[schedule], chosen)


def compared(stages: TracedStages, of: Division, staging: Staging) -> tuple[float, float]:
    """Of time and peak, what units say by what is evaluated."""
    timeline = played(stages.problem, staging, stages.problem.units(MICROBATCHES))
    assert timeline is not None
    exact = PricedPipeline(pipelined(of, stages.strategy(staging)), stages.prices).estimate()
    peak_bytes = stages.peak_bytes(staging)
    return (
        float(timeline.step_time_s) / exact.step_time_s,
        peak_bytes / exact.peak_memory_bytes,
    )


@pytest.mark.parametrize("schedule", PARTED)
@pytest.mark.parametrize("name", ["gpt", "towers"])
def test_stages_of_whole_tensors_take_exactly_the_time_of_their_units(
    name: str, schedule: str
) -> None:
    of = divided(name)
    stages = traced(of, replicate(of.graph, mesh((1,))), 2)
    for seed in range(4):
        staging = random_staging(stages, schedule, 2, Random(seed))
        staging = replace(
            staging,
            stages=tuple(replace(s, alternatives=(0,) * len(s.units)) for s in staging.stages),
        )
        time, memory = compared(stages, of, staging)
        assert time == pytest.approx(1, rel=1e-9)
        assert memory == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("schedule", PARTED)
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_stages_with_any_splits_and_recomputation_take_nearly_that(
    name: str, schedule: str
) -> None:
    of = divided(name)
    for seed in range(4):
        rng = Random(seed)
        like = random_strategy(of.graph, of.rules, mesh((2,)), rng)
        stages = traced(of, like, 2)
        time, memory = compared(stages, of, random_staging(stages, schedule, 2, rng))
        assert time == pytest.approx(1, abs=0.1)
        assert memory == pytest.approx(1, abs=0.15)


def test_what_a_unit_recomputes_is_what_its_stage_recomputes() -> None:
    of = divided("gpt")
    stages = traced(of, replicate(of.graph, mesh((1,))), 2)
    found = stages.problem.units(MICROBATCHES)
    full = [
        next(i for i, a in enumerate(unit.alternatives) if a.name == "full") for unit in found[1:-1]
    ]
    staging = random_staging(stages, "1f1b", 2, Random(0))
    choices = (0, *full, 0)
    staging = replace(
        staging,
        stages=tuple(
            replace(s, alternatives=tuple(choices[u] for u in s.units)) for s in staging.stages
        ),
    )
    strategy = stages.strategy(staging)
    home = {of.graph.operators[i].name: u for u, unit in enumerate(stages.units) for i in unit}
    assert {home[name] for name in strategy.recompute} == set(range(1, len(found) - 1))
    kept = stages.strategy(
        replace(
            staging,
            stages=tuple(replace(s, alternatives=(0,) * len(s.units)) for s in staging.stages),
        )
    )
    assert kept.recompute == ()


def test_alike_units_have_the_same_alternatives() -> None:
    of = divided("gpt")
    stages = traced(of, replicate(of.graph, mesh((2,))), 2)
    found = stages.problem.units(MICROBATCHES)
    assert found[1].alternatives is found[3].alternatives  # the attention of two layers
    assert found[2].alternatives is found[4].alternatives
    assert found[1].alternatives is not found[2].alternatives


def test_a_tied_parameter_is_shared_by_its_units() -> None:
    of = divided("gpt_tied")
    stages = traced(of, replicate(of.graph, mesh((1,))), 2)
    ((sharing, size),) = stages.problem.shared
    assert sharing == (0, len(stages.units) - 1)
    assert size in {parameter.spec.bytes for parameter in of.graph.parameters}
