"""How the meshes and the numbers of microbatches are gone through."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from autopar.api import plan_of
from autopar.errors import InfeasibleError
from autopar.exporters.units import bytes_text
from autopar.extractor import extract
from autopar.ir.graph import OperatorGraph
from autopar.ir.search import Budget, Problem
from autopar.ir.sharding import Mesh
from autopar.ir.strategy import Training
from autopar.ops import bound_rules
from autopar.searchers import SEARCHERS, over_meshes, over_microbatches
from autopar.searchers.approach import Wanted
from autopar.searchers.optimum import Optimum
from autopar.searchers.over_microbatches import search_all
from autopar.searchers.within_peak import OverBytes
from autopar.simulator.listing import Listing, Structure
from autopar.simulator.meshes import factorizations, mesh
from autopar.simulator.price_list import PriceList, cheapest_storages
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
    asked = problem("gpt", limit)
    result = SEARCHERS["ilp"](asked, Budget())
    assert result.stop_reason == "infeasible" and result.best is None
    assert {t.outcome for t in result.trials} == {"infeasible", "recipe"}
    assert result.least_bytes == int(least_bytes("gpt"))
    smallest = min(t.estimate.peak_memory_bytes for t in result.trials if t.estimate is not None)
    assert result.nearest_miss_bytes is not None and result.nearest_miss_bytes >= smallest
    with pytest.raises(InfeasibleError) as refused:
        plan_of(asked, result)
    says = str(refused.value)
    assert (
        f"split perfectly over 8 devices it needs at least {bytes_text(result.least_bytes)}" in says
    )
    assert f"was found needs {bytes_text(result.nearest_miss_bytes)}" in says


def test_the_whole_batch_is_taken_at_once_where_memory_does_not_bind() -> None:
    told: list[str] = []
    result = SEARCHERS["ilp"](problem("gpt", 10**12, None), Budget(), progress=told.append)
    assert result.best is not None and result.best.strategy is not None
    assert result.best.strategy.microbatches == 1
    assert not any("microbatches" in line for line in told)


@pytest.mark.parametrize("share", [1.8, pytest.param(2.5, marks=pytest.mark.slow)])
def test_no_other_number_of_microbatches_is_faster(share: float) -> None:
    """Of what is found without proofs: that is what the number is chosen by."""
    asked = on_few_meshes("gpt", share, None)
    budget = Budget(time_s=20.0, gap=1e-3, proof_s=0.5)
    chosen = SEARCHERS["ilp"](asked, budget).best
    for count in (1, 2, 4, 8):
        found = SEARCHERS["ilp"](replace(asked, microbatches=count), budget).best
        if found is not None and found.estimate is not None:
            assert chosen is not None and chosen.estimate is not None
            assert chosen.estimate.step_time_s <= found.estimate.step_time_s * 1.01


def on_few_meshes(name: str, share: float, microbatches: int | None) -> Problem:
    """With a limit that is ``share`` of what a perfect split of the whole batch needs."""
    asked = problem(name, int(least_bytes(name) * share), microbatches)
    return replace(asked, meshes=(mesh((8,)), mesh((2, 4))))


def test_without_time_for_proofs_a_gap_is_left_and_named() -> None:
    asked = on_few_meshes("mlp", 1.6, 1)
    quick = SEARCHERS["ilp"](asked, Budget(proof_s=0.0))
    slow = SEARCHERS["ilp"](asked, Budget())
    assert quick.best is not None and quick.best.estimate is not None
    assert slow.best is not None and slow.best.estimate is not None
    assert quick.best.estimate.step_time_s >= slow.lower_bound_s * (1 - 1e-9)
    assert quick.lower_bound_s <= slow.best.estimate.step_time_s * (1 + 1e-9)
    assert (quick.stop_reason == "optimal") == (quick.gap <= 1e-6)


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
        for module in (over_meshes, over_microbatches):
            monkeypatch.setattr(module, "monotonic", lambda: self.now_s)


def test_when_half_of_the_time_is_over_no_more_microbatches_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    told: list[str] = []

    def progress(line: str) -> None:
        told.append(line)
        clock.now_s += 6.0 * line.startswith("trying")

    asked = on_few_meshes("gpt", 1.1, None)
    SEARCHERS["ilp"](asked, Budget(time_s=10.0, proof_s=0.0), progress=progress)
    assert sum(line.startswith("trying") for line in told) == 1
    told.clear()
    clock.now_s = 0.0
    SEARCHERS["ilp"](asked, Budget(time_s=1000.0, proof_s=0.0), progress=progress)
    assert sum(line.startswith("trying") for line in told) > 1


def test_an_interruption_keeps_what_was_found() -> None:
    meshes = 0

    def progress(line: str) -> None:
        nonlocal meshes
        meshes += line.startswith("mesh")
        if meshes == 3:
            raise KeyboardInterrupt

    for microbatches in (1, None):
        meshes = 0
        found = SEARCHERS["ilp"](problem("gpt", 10**12, microbatches), Budget(), progress=progress)
        assert found.stop_reason == "interrupted"
        assert found.best is not None and found.best.estimate is not None
        assert found.lower_bound_s <= found.best.estimate.step_time_s


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


def nothing_found(
    price_list: PriceList, wanted: Wanted, over_bytes: OverBytes, first: Optimum | None = None
) -> Optimum:
    """Neither something that fits nor a proof that there is none."""
    return Optimum(None, 0.0)


@pytest.mark.parametrize("microbatches", [1, None])
def test_what_is_only_not_found_is_not_called_infeasible(microbatches: int | None) -> None:
    asked = on_few_meshes("mlp", 1.05, microbatches)
    found = search_all("nothing", asked, Budget(), nothing_found, lambda line: None)
    assert found.best is None
    assert found.stop_reason == "unknown"
    assert {t.outcome for t in found.trials} >= {"unknown"}
