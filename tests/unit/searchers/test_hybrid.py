"""The whole search: never worse than one stage, below its bound by nothing, on all devices."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import pytest

from autopar import api
from autopar.errors import AutoparError, InfeasibleError, InterruptedSearchError
from autopar.ir.search import Budget, Problem, SearchResult
from autopar.schedules import SCHEDULES
from autopar.searchers import hybrid, ilp
from autopar.searchers.prospects import Prospect, Prospects, chains
from autopar.simulator.listing import Structure
from autopar.simulator.meshes import factorizations, mesh
from autopar.simulator.microbatches import division
from autopar.simulator.pipelines import StagePrices, evaluate_stages
from autopar.simulator.staged import even_cuts, runs, staged
from autopar.simulator.units import units
from tests.helpers.cases import case
from tests.helpers.fake_prices import FakePrices
from tests.helpers.strategies import random_strategy

QUICK = Budget(time_s=60.0, gap=1e-3, proof_s=0.5)
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


def problem_of(name: str, devices: int, limit_bytes: int = 10**15, **prices: float) -> Problem:
    """``dear``: seconds per byte of collectives, ``send``: of what goes from stage to stage."""
    per_byte = dict.fromkeys(KINDS, prices.get("dear", 1e-9)) | {"send": prices.get("send", 1e-12)}
    return Problem(
        case(name).graph,
        FakePrices(devices=devices, collectives=per_byte, latency_s=1e-7),
        factorizations(devices),
        limit_bytes,
        microbatches=None,
    )


def step_s(result: SearchResult) -> float:
    assert result.best is not None
    assert result.best.estimate is not None
    return result.best.estimate.step_time_s


@pytest.mark.parametrize("name", ["gpt", "unet", "towers"])
def test_it_is_never_worse_than_one_stage(name: str) -> None:
    problem = problem_of(name, 4)
    found = hybrid.search(problem, QUICK)
    assert step_s(found) <= step_s(ilp.search(problem, QUICK)) * (1 + 1e-3)
    assert found.lower_bound_s <= step_s(found)


def test_stages_are_found_where_collectives_are_dear() -> None:
    found = hybrid.search(problem_of("gpt", 4, dear=1e-7), QUICK)
    assert found.best is not None
    assert found.best.strategy is not None
    strategy = found.best.strategy
    assert len(strategy.stages) > 1
    used = sorted({device for stage in strategy.stages for device in stage.devices})
    assert used == list(range(4))


@pytest.mark.parametrize("limit", [0.5, 0.8])
def test_what_is_found_fits_and_is_worth_what_it_says(limit: float) -> None:
    free = hybrid.search(problem_of("gpt", 4, dear=1e-7), QUICK)
    assert free.best is not None
    assert free.best.estimate is not None
    problem = problem_of("gpt", 4, int(free.best.estimate.peak_memory_bytes * limit), dear=1e-7)
    found = hybrid.search(problem, QUICK).best
    assert found is not None
    assert found.strategy is not None
    assert found.estimate is not None
    assert found.estimate.peak_memory_bytes <= problem.memory_limit_bytes
    strategy = found.strategy
    divided = division(problem.graph, strategy.microbatches)
    if len(strategy.stages) > 1:
        again = evaluate_stages(divided, problem.cost_model, strategy)
        assert again.step_time_s == pytest.approx(found.estimate.step_time_s, rel=1e-12)
        assert again.memory == found.estimate.memory


def test_nothing_that_is_written_by_hand_is_faster_than_the_bound() -> None:
    """Stages of equally many layers, with any splits, under every schedule."""
    problem = problem_of("gpt", 4, dear=1e-8)
    found = hybrid.search(problem, QUICK)
    compared = 0
    for seed in range(60):
        rng = Random(seed)
        m = rng.choice([1, 2, 4, 8])
        divided = division(problem.graph, m)
        like = random_strategy(divided.graph, divided.rules, mesh((2,)), rng)
        stages = runs(problem.graph, even_cuts(problem.graph, 2))
        schedule = rng.choice(["gpipe", "1f1b", "zero_bubble_h1", "chimera"])
        if SCHEDULES[schedule].copies and m % 2:
            continue
        strategy = staged(problem.graph, stages, [replace(like, microbatches=m)] * 2, schedule, m)
        try:
            estimate = evaluate_stages(divided, problem.cost_model, strategy)
        except AutoparError:
            continue
        compared += 1
        assert estimate.step_time_s >= found.lower_bound_s
    assert compared > 30


def test_nothing_fits_in_no_memory() -> None:
    with pytest.raises(InfeasibleError, match="nothing fits"):
        api.plan(
            case("gpt").graph,
            topology=FakePrices(devices=2),
            searcher="hybrid",
            memory_limit_bytes=1000,
        )


def test_one_mesh_means_one_stage() -> None:
    problem = replace(problem_of("gpt", 4, dear=1e-7), meshes=(mesh((2, 2)),))
    found = hybrid.search(problem, QUICK)
    assert found.best is not None
    assert found.best.strategy is not None
    assert len(found.best.strategy.stages) == 1
    assert found.best.mesh == mesh((2, 2))


def test_without_operator_in_the_dimensions_there_is_one_stage() -> None:
    problem = replace(problem_of("gpt", 4, dear=1e-7), dimensions="SAP")
    found = hybrid.search(problem, QUICK)
    assert found.best is not None
    assert found.best.strategy is not None
    assert len(found.best.strategy.stages) == 1


def test_ctrl_c_keeps_the_best_so_far() -> None:
    def press(line: str) -> None:
        if line == "pricing the recipes":  # the likely plans were tried before
            raise KeyboardInterrupt

    found = hybrid.search(problem_of("llama", 4, dear=1e-7), QUICK, press)
    assert found.stop_reason == "interrupted"
    assert found.best is not None
    assert found.lower_bound_s <= step_s(found)


def test_ctrl_c_before_anything_was_found_says_so() -> None:
    def press(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises((InterruptedSearchError, KeyboardInterrupt)):
        api.plan(
            case("gpt").graph,
            topology=FakePrices(devices=4),
            searcher="hybrid",
            progress=lambda line: press(line) if line.startswith("mesh") else None,
        )


def test_more_microbatches_have_no_lower_bound_than_those_that_divide_them() -> None:
    problem = problem_of("gpt", 4)
    prospects = Prospects(
        problem,
        lambda count: structure(problem, count),
        units(problem.graph),
        {},
        StagePrices(problem.cost_model),
    )
    for sizes in ((2,), (4,)):
        rows = 4 // math.prod(sizes)
        single = [
            prospects.bound_s(Prospect(rows, mesh(sizes), (count,))) for count in (1, 2, 4, 8)
        ]
        together = prospects.bound_s(Prospect(rows, mesh(sizes), (1, 2, 4, 8)))
        assert together <= min(single) * (1 + 1e-12)


def structure(problem: Problem, count: int) -> Structure:
    divided = division(problem.graph, count)
    return Structure(divided.graph, divided.rules)


def test_chains_are_multiples_of_their_smallest() -> None:
    for size in (8, 12, 96, 3072):
        counts = [count for count in range(1, size + 1) if size % count == 0]
        found = chains(counts)
        assert sorted(count for chain in found for count in chain) == counts
        for chain in found:
            assert all(count % chain[0] == 0 for count in chain)
