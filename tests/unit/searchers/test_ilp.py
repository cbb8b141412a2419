"""Search finds what trying every strategy finds, with and without a memory limit that binds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import pytest

from autopar.ir.graph import OperatorGraph
from autopar.ir.search import Budget, Problem, SearchResult
from autopar.ir.strategy import Training
from autopar.ops import bound_rules
from autopar.searchers import exhaustive, ilp
from autopar.searchers.enumeration import count_selections, selections
from autopar.simulator.listing import Listing, Structure
from autopar.simulator.meshes import mesh
from autopar.simulator.prices import evaluate
from tests.helpers.random_graphs import HashPrices, random_graph

MESHES = ((2,), (2, 2), (3,), (4,))
AMPLE = 10**15
FEW, MANY = 250, 6_000
"""Strategies of a graph on a mesh up to which all are simulated one by one."""


@dataclass(frozen=True)
class Case:
    """A problem, and the time of the fastest of all its strategies that fit (infinity: none)."""

    problem: Problem
    best_s: float
    kind: str


def cases(seed: int, limits: int, most: int) -> Iterator[Case]:
    """Problems of one random graph: no limit, limits that bind, one that nothing meets.

    Times and peaks come from the simulator, one strategy after the other; no price list, bound or
    solver has a part in them.
    """
    rng = Random(seed)
    graph = random_graph(seed, most_operators=5)
    training = Training(rng.choice(["sgd", "adamw"]))
    for sizes in MESHES:
        on = mesh(sizes)
        prices = HashPrices(seed, on.size)
        everything = simulated(graph, Problem(graph, prices, (on,), AMPLE, training), most)
        if everything is None:
            continue
        times, peaks = everything
        free = Problem(graph, prices, (on,), AMPLE, training)
        yield Case(free, times.min(), "free")
        fastest = times <= times.min() * (1 + 1e-9)
        binding = sorted({int(p) for p in peaks if p < peaks[fastest].min()})
        chosen = set(binding[:1]) | set(rng.sample(binding, min(limits - 1, len(binding))))
        for limit in sorted(chosen):
            bound = replace(free, memory_limit_bytes=limit)
            yield Case(bound, times[peaks <= limit].min(), "binding")
        hopeless = replace(free, memory_limit_bytes=int(peaks.min()) - 1)
        yield Case(hopeless, math.inf, "hopeless")


def simulated(
    graph: OperatorGraph, problem: Problem, most: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Step time and peak memory of every strategy, where they are few enough."""
    rules = bound_rules(graph)
    (on,) = problem.meshes
    listing = Listing(Structure(graph, rules), problem.cost_model, on, math.inf, problem.training)
    if count_selections(listing.price_list) > most:
        return None
    estimates = [
        evaluate(graph, rules, problem.cost_model, listing.strategy(selection))
        for selection in selections(listing.price_list)
    ]
    times = np.array([e.step_time_s for e in estimates])
    return times, np.array([e.peak_memory_bytes for e in estimates])


def check(found: SearchResult, case: Case) -> None:
    limit = case.problem.memory_limit_bytes
    if math.isinf(case.best_s):
        assert found.best is None
        assert found.stop_reason == "infeasible"
        assert found.nearest_miss_bytes is None or found.nearest_miss_bytes > 0
        return
    assert found.best is not None, "a strategy that fits was missed"
    assert found.best.estimate is not None
    assert found.best.estimate.peak_memory_bytes <= limit
    assert found.best.estimate.step_time_s == pytest.approx(case.best_s, rel=2e-6)
    assert found.lower_bound_s <= case.best_s * (1 + 1e-9)
    assert found.stop_reason == "optimal"
    assert found.gap <= 1e-6


def check_all(seeds: Iterable[int], limits: int, most: int = FEW) -> dict[str, int]:
    """How many there were of each kind."""
    seen = dict.fromkeys(("free", "binding", "hopeless"), 0)
    for seed in seeds:
        for case in cases(seed, limits, most):
            seen[case.kind] += 1
            check(ilp.search(case.problem, Budget()), case)
            check(exhaustive.search(case.problem, Budget()), case)
    return seen


def test_the_ilp_finds_what_trying_everything_finds_within_every_memory_limit() -> None:
    seen = check_all(range(14), limits=2)
    assert seen["free"] >= 25
    assert seen["binding"] >= 20
    assert seen["hopeless"] >= 25


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_hundreds_of_random_problems_are_solved_to_the_end(part: int) -> None:
    seen = check_all(range(1000 + part, 1400, 5), limits=4)
    assert seen["free"] >= 60
    assert seen["binding"] >= 60


@pytest.mark.slow
def test_among_thousands_of_strategies_none_that_fits_is_missed() -> None:
    """More than are refused by name, where the tightest limit leaves one that fits."""
    seen = check_all(range(2010, 2020), limits=2, most=MANY)
    assert seen["binding"] >= 30
