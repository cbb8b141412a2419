"""How the meshes and the numbers of microbatches are gone through."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from autopar.extractor import extract
from autopar.ir.graph import OperatorGraph
from autopar.ir.search import Budget, Problem, SearchResult
from autopar.ir.sharding import Mesh
from autopar.ir.strategy import Training
from autopar.ops import bound_rules
from autopar.searchers import SEARCHERS, over_meshes
from autopar.searchers.over_meshes import _counts_in_order
from autopar.simulator.listing import Listing, Structure
from autopar.simulator.meshes import factorizations, mesh
from autopar.simulator.price_list import cheapest_storages
from autopar.simulator.prices import evaluate
from cost_models import cost_model
from tests.helpers.zoo import zoo

MACHINE = cost_model("1x8xh100-sxm")


@cache
def graph(name: str) -> OperatorGraph:
    return extract(*zoo(name, dtype=torch.float32))


def problem(name: str, limit_bytes: int, microbatches: int | None = 1) -> Problem:
    return Problem(graph(name), MACHINE, factorizations(8), limit_bytes, microbatches=microbatches)


def least_bytes(name: str) -> float:
    structure = Structure(graph(name), bound_rules(graph(name)))
    return Listing(structure, MACHINE, mesh((8,)), math.inf, Training()).least_bytes


@pytest.mark.parametrize("name", ["gpt", "llama", "resnet", "unet", "dlrm", "mlp"])
def test_no_strategy_needs_less_than_a_perfect_split(name: str) -> None:
    rules = bound_rules(graph(name))
    result = SEARCHERS["ilp"](problem(name, 10**12), Budget())
    for trial in result.trials:
        if trial.strategy is not None:
            found = evaluate(graph(name), rules, MACHINE, trial.strategy)
            assert found.peak_memory_bytes >= least_bytes(name)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "vit", "unet", "gpt_tied"])
def test_memory_rows_are_never_above_the_peak_of_the_step(name: str) -> None:
    """Views of parameters, expanded masks and tables that all layers share are held once."""
    rules = bound_rules(graph(name))
    structure = Structure(graph(name), rules)
    draw = random.Random(0)
    for sizes in ((4,), (2, 2)):
        listing = Listing(structure, MACHINE, mesh(sizes), math.inf, Training())
        prices = listing.price_list
        for _ in range(3):
            chosen = [draw.randrange(len(node.time_s)) for node in prices.nodes]
            selection = cheapest_storages(prices, chosen)
            peak = evaluate(graph(name), rules, MACHINE, listing.strategy(selection))
            rows = prices.memory_of(selection).max()
            assert listing.least_bytes <= peak.peak_memory_bytes * (1 + 1e-9)
            assert rows <= peak.peak_memory_bytes * (1 + 1e-9)


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return x * table.unsqueeze(0)


class SharesATable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.layers = nn.ModuleList(Scaled() for _ in range(12))

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        x, table = self.first(x), table.cos()
        for layer in self.layers:
            x = layer(x, table)
        return x.sum()


def test_a_table_that_all_layers_save_is_held_once() -> None:
    shared = extract(SharesATable(), (torch.randn(1, 256, 64), torch.randn(256, 64)))
    rules = bound_rules(shared)
    structure = Structure(shared, rules)
    assert any(block.copies > 3 for block in structure.blocks)
    listing = Listing(structure, MACHINE, mesh((4,)), math.inf, Training())
    prices = listing.price_list
    for choice in range(3):
        chosen = [choice % len(node.time_s) for node in prices.nodes]
        selection = cheapest_storages(prices, chosen)
        peak = evaluate(shared, rules, MACHINE, listing.strategy(selection)).peak_memory_bytes
        assert prices.memory_of(selection).max() <= peak
        assert listing.least_bytes <= peak


def test_what_even_a_perfect_split_overfills_is_infeasible_with_the_nearest_miss() -> None:
    limit = int(least_bytes("gpt") * 0.9)
    result = SEARCHERS["ilp"](problem("gpt", limit), Budget())
    assert result.stop_reason == "infeasible" and result.best is None
    assert {t.outcome for t in result.trials} == {"infeasible", "recipe"}
    assert result.nearest_miss_bytes is not None and result.nearest_miss_bytes > limit


def test_the_whole_batch_is_tried_first_where_there_is_room() -> None:
    assert next(_counts_in_order(problem("gpt", 10**12, None)))[0] == 1


def test_counts_that_leave_no_room_come_last_and_hopeless_ones_not_at_all() -> None:
    whole = least_bytes("gpt")
    tight = problem("gpt", int(whole * 1.5), None)
    in_order = [count for count, _ in _counts_in_order(tight)]
    assert 1 in in_order and in_order[0] != 1
    hopeless = problem("gpt", int(whole * 0.9), None)
    assert 1 not in [count for count, _ in _counts_in_order(hopeless)]


def test_a_gap_is_not_called_optimal() -> None:
    asked = problem("gpt", 10**12)
    result = SEARCHERS["ilp"](asked, Budget())
    for trial in result.trials:
        if trial.outcome == "optimal":
            assert trial.estimate is not None
            assert trial.lower_bound_s >= trial.estimate.step_time_s * (1 - 1e-6)
    assert result.gap <= 1e-6 or result.stop_reason != "optimal"


def test_recipes_that_divide_nothing_are_reported_without_a_strategy() -> None:
    two = replace(problem("mlp", 10**12), dimensions="SOAP")
    result = SEARCHERS["ilp"](two, Budget())
    recipes = {t.name: t for t in result.trials if t.outcome == "recipe"}
    assert recipes["data_parallel"].strategy is not None
    assert recipes["replicate"].estimate is not None


class Clock:
    """Seconds that pass only when something is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        monkeypatch.setattr(over_meshes, "monotonic", lambda: self.now_s)


def result(reason: str, best_s: float | None, bound_s: float = 0.0) -> SearchResult:
    """A search that found something (of the time ``best_s``) or nothing."""
    found = next(t for t in tried().trials if t.estimate is not None)
    assert found.estimate is not None
    if best_s is not None:
        found = replace(found, estimate=replace(found.estimate, step_time_s=best_s))
    return SearchResult("ilp", (), None if best_s is None else found, bound_s, reason, 1.0)


@cache
def tried() -> SearchResult:
    return SEARCHERS["ilp"](problem("mlp", 10**12), Budget())


def searched(
    monkeypatch: pytest.MonkeyPatch, each_s: float, *results: SearchResult
) -> tuple[SearchResult, int]:
    """What comes of a search with 10 s in which each number of microbatches takes ``each_s`` and
    has the next of these results; and how many were begun."""
    clock, asked = Clock(monkeypatch), list(results)

    def divided(*_: object) -> SearchResult:
        clock.now_s += each_s
        return asked.pop(0)

    monkeypatch.setattr(over_meshes, "_search_divided", divided)
    found = SEARCHERS["ilp"](problem("mlp", 10**12, None), Budget(time_s=10.0))
    return found, len(results) - len(asked)


def test_when_the_time_is_over_no_more_microbatches_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nothing = result("unknown", None)
    found, begun = searched(monkeypatch, 6.0, nothing, nothing, nothing)
    assert (found.stop_reason, begun) == ("time", 2)


@pytest.mark.parametrize("reason", ["time", "interrupted"])
def test_searching_on_loses_neither_what_was_found_nor_what_was_proved(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = result("time", 3.0, 2.0)
    for again in (result(reason, None), result(reason, 4.0, 1.0)):
        found, _ = searched(monkeypatch, 1.0, first, again)
        assert (found.best, found.lower_bound_s, found.stop_reason) == (first.best, 2.0, reason)
    again = result(reason, 2.5)
    found, _ = searched(monkeypatch, 1.0, first, again)
    assert (found.best, found.lower_bound_s, found.stop_reason) == (again.best, 2.0, reason)


def test_when_the_time_is_over_no_more_meshes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    bounded: list[Mesh] = []
    slow = Listing.least_s.func  # type: ignore[attr-defined]

    def least_s(listing: Listing) -> float:
        clock.now_s += 1.0
        bounded.append(listing.mesh)
        return float(slow(listing))

    monkeypatch.setattr(Listing, "least_s", property(least_s))
    found = SEARCHERS["ilp"](problem("mlp", 10**12), Budget(time_s=1.5))
    assert found.stop_reason == "time"
    assert len(set(bounded)) < len(factorizations(8))
    assert found.lower_bound_s == 0.0
