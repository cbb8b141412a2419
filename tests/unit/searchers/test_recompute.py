"""Where memory binds, what recomputes is found, chosen where it is faster, and bounded."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import product

import pytest
import torch

from autopar import api
from autopar.api import plan_of
from autopar.errors import AutoparError
from autopar.exporters.text import explain
from autopar.extractor import extract
from autopar.ir.graph import OperatorGraph
from autopar.ir.search import Budget, Problem, SearchResult
from autopar.ops import bound_rules
from autopar.searchers import SEARCHERS
from autopar.simulator.blocks import blocks
from autopar.simulator.costs import Costs
from autopar.simulator.meshes import mesh
from autopar.simulator.prices import evaluate
from autopar.simulator.recompute_choices import BlockChoices
from tests.helpers.fake_prices import FakePrices
from tests.helpers.zoo import GPT

MACHINE = FakePrices(devices=2, work={"matmul": 1e-9, "attention": 1e-9, "memory": 1e-10})
MESH = mesh((2,))
BUDGET = Budget(time_s=60, gap=0.01, proof_s=0.5)
LAYERS = 6


@lru_cache(maxsize=None)
def graph() -> OperatorGraph:
    """A GPT whose activations are most of its memory."""
    tokens = torch.randint(64, (256, 16))
    return extract(GPT(layers=LAYERS), (tokens, tokens), name="deep")


@lru_cache(maxsize=None)
def searched(recompute: str, limit_bytes: int, microbatches: int | None = 1) -> SearchResult:
    problem = Problem(
        graph(), MACHINE, (MESH,), limit_bytes, microbatches=microbatches, recompute=recompute
    )
    return SEARCHERS["ilp"](problem, BUDGET)


def peak_bytes(result: SearchResult) -> int:
    assert result.best is not None and result.best.estimate is not None
    return result.best.estimate.peak_memory_bytes


def step_s(result: SearchResult) -> float:
    assert result.best is not None and result.best.estimate is not None
    return result.best.estimate.step_time_s


def recomputed(result: SearchResult) -> tuple[str, ...]:
    assert result.best is not None and result.best.strategy is not None
    return result.best.strategy.recompute


PLENTY = 10**12


def test_nothing_is_recomputed_where_memory_does_not_bind() -> None:
    plain, auto = searched("none", PLENTY), searched("auto", PLENTY)
    assert step_s(auto) == step_s(plain)
    assert not recomputed(auto)
    assert auto.stop_reason == "optimal"


def test_what_fits_only_with_recomputation_is_found() -> None:
    least = peak_bytes(searched("full", PLENTY))
    limit = int(1.05 * least)
    assert searched("none", limit).best is None
    found = searched("auto", limit)
    assert recomputed(found)
    assert peak_bytes(found) <= limit
    assert step_s(found) > found.lower_bound_s > 0


@pytest.mark.parametrize(
    "share", [0.7, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.95, 0.5))]
)
def test_recomputation_as_a_choice_is_never_slower_than_without(share: float) -> None:
    limit = int(share * peak_bytes(searched("none", PLENTY)))
    plain, auto = (searched(kind, limit, None) for kind in ("none", "auto"))
    assert step_s(auto) <= step_s(plain)
    assert peak_bytes(auto) <= limit


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_a_kind_that_is_asked_for_is_used_in_all_copies(kind: str) -> None:
    names = recomputed(searched(kind, PLENTY))
    counts = {sum(name.startswith(f"blocks.{layer}.") for name in names) for layer in range(LAYERS)}
    assert len(counts) == 1
    assert counts.pop() > 0
    assert step_s(searched(kind, PLENTY)) > step_s(searched("none", PLENTY))


def test_no_strategy_that_recomputes_and_fits_is_below_the_bound() -> None:
    """Those of all recipes, with every kind in every number of copies."""
    rules = bound_rules(graph())
    (block,) = blocks(graph())
    limit = int(0.7 * peak_bytes(searched("none", PLENTY)))
    bound_s = searched("auto", limit).lower_bound_s
    fitting = 0
    for trial in searched("none", PLENTY).trials:
        if trial.strategy is None:
            continue
        of = BlockChoices(graph(), rules, trial.strategy, Costs(MACHINE, trial.mesh), block)
        for kind, copies in product(("selective", "full"), range(LAYERS + 1)):
            strategy = replace(trial.strategy, recompute=of.operators(kind, copies))
            estimate = evaluate(graph(), rules, MACHINE, strategy)
            if estimate.peak_memory_bytes <= limit:
                fitting += 1
                assert estimate.step_time_s >= bound_s * (1 - 1e-9)
    assert fitting > 0


def test_a_plan_says_what_it_recomputes() -> None:
    limit = int(1.05 * peak_bytes(searched("full", PLENTY)))
    problem = Problem(graph(), MACHINE, (MESH,), limit, recompute="auto")
    plan = plan_of(problem, searched("auto", limit))
    line = next(t for t in explain(plan, bound_rules(graph())).splitlines() if "recomputed" in t)
    assert f"of {LAYERS} blocks" in line


def test_an_unknown_way_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(AutoparError, match=r"no way to recompute is called 'some'.*selective"):
        api.problem_of(graph(), topology=MACHINE, recompute="some")
