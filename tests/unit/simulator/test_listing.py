"""A price list prices a strategy as ``evaluate`` does, choice by choice."""

from __future__ import annotations

import math
from functools import lru_cache
from random import Random

import pytest

from autopar.ir.graph import OperatorGraph
from autopar.ir.sharding import Mesh
from autopar.ir.strategy import Training
from autopar.ops import bound_rules
from autopar.searchers.enumeration import selections, spreads
from autopar.simulator.edges import edges, parameter_edges
from autopar.simulator.listing import Allowed, Listing, Structure
from autopar.simulator.meshes import mesh
from autopar.simulator.price_list import PriceList, Selection
from autopar.simulator.prices import evaluate
from cost_models.interface import CostModel
from tests.helpers.cases import case
from tests.helpers.fake_prices import FakePrices
from tests.helpers.random_graphs import Builder, HashPrices, random_graph

MESHES = ((2,), (2, 2), (2, 2, 2))


def listing_of(graph: OperatorGraph, on: Mesh, prices: CostModel, microbatches: int = 1) -> Listing:
    structure = Structure(graph, bound_rules(graph))
    training = Training("adamw" if len(graph.operators) % 2 else "sgd")
    return Listing(structure, prices, on, math.inf, training, microbatches)


def random_selection(price_list: PriceList, rng: Random) -> Selection:
    alternatives = tuple(rng.randrange(len(node.time_s)) for node in price_list.nodes)
    return Selection(
        alternatives,
        tuple(
            tuple(rng.choice(spreads(menu, k)) for menu in node.menus)
            for node, k in zip(price_list.nodes, alternatives, strict=True)
        ),
    )


def check(listing: Listing, rng: Random, selections: int) -> None:
    for _ in range(selections):
        selection = random_selection(listing.price_list, rng)
        estimate = evaluate(
            listing.graph,
            listing.structure.rules,
            listing.cost_model,
            listing.strategy(selection),
        )
        time_s = listing.price_list.time_of(selection)
        assert time_s == pytest.approx(estimate.step_time_s, rel=1e-12)
        least = listing.price_list.memory_of(selection).max()
        assert least <= estimate.peak_memory_bytes * (1 + 1e-12)


def test_a_selection_costs_what_its_strategy_costs_and_takes_no_more_memory_than_that() -> None:
    """With prices that follow from nothing, so that no error is lost in a zero."""
    for seed in range(45):
        graph, rng = random_graph(seed), Random(seed)
        sizes = MESHES[seed % 3]
        check(listing_of(graph, mesh(sizes), HashPrices(seed, 8)), rng, 4)


def test_a_parameter_pays_for_gradients_only_from_uses_that_have_one() -> None:
    """The nearest code is looked for with the codes, and trains nothing."""
    graph = case("codebook").graph
    rng = Random(0)
    for sizes in MESHES[:2]:
        check(listing_of(graph, mesh(sizes), HashPrices(3, 8)), rng, 30)


@pytest.mark.slow
def test_hundreds_of_random_graphs_cost_what_their_strategies_cost() -> None:
    for seed in range(45, 500):
        graph, rng = random_graph(seed, most_operators=10), Random(seed)
        for sizes in MESHES:
            check(listing_of(graph, mesh(sizes), HashPrices(seed, 8)), rng, 6)


def test_microbatches_multiply_what_is_paid_for_each_and_nothing_else() -> None:
    for seed in range(25):
        graph, rng = random_graph(seed), Random(seed)
        listing = listing_of(graph, mesh(MESHES[seed % 2]), HashPrices(seed), microbatches=3)
        for _ in range(4):
            selection = random_selection(listing.price_list, rng)
            estimate = evaluate(
                graph, listing.structure.rules, listing.cost_model, listing.strategy(selection)
            )
            time_s = listing.price_list.time_of(selection)
            assert time_s == pytest.approx(estimate.step_time_s, rel=1e-12)


def test_a_gradient_that_is_summed_once_a_step_costs_the_same_for_any_number_of_microbatches() -> (
    None
):
    """While a gradient that is reduce-scattered with every microbatch is paid every time."""
    build = Builder()
    x = build.input(8, 4)
    graph = build.graph(build.total(build.linear(x, build.parameter(4, 4))))
    collectives = dict.fromkeys(("all_gather", "reduce_scatter", "all_to_all"), 0.0)
    prices = FakePrices(
        devices=2,
        work={"matmul": 0.0, "memory": 0.0},
        collectives={**collectives, "all_reduce": 1.0, "reduce_scatter": 0.5},
    )
    for level, once_s, each_s in ((0, 64.0, 4.0), (1, 32.0, 4.0), (2, 0.0, 36.0)):
        by_count = []
        for microbatches in (1, 2, 4):
            structure = Structure(graph, bound_rules(graph))
            listing = Listing(
                structure,
                prices,
                mesh((2,)),
                math.inf,
                Training(),
                microbatches,
                allowed=(Allowed("S", (level,)),),
            )
            found = [s for s in selections(listing.price_list) if _divides_the_batch(listing, s)]
            by_count.append(min(listing.price_list.time_of(s) for s in found))
        assert by_count == [once_s + n * each_s for n in (1, 2, 4)]


def _divides_the_batch(listing: Listing, selection: Selection) -> bool:
    splits = listing.strategy(selection).splits
    return splits["o0"] == ("...0",) and all(
        bound.shardings(splits[name])[1][0] in (("S(0)",), ("P",))
        for name, bound in listing.structure.rules.items()
    )


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("microbatches", [1, 2])
def test_so_does_one_that_divides_dims_in_parts(sizes: tuple[int, ...], microbatches: int) -> None:
    """ZeRO divides them in the same parts once more."""
    graph = gated()
    on = mesh(sizes)
    listing = listing_of(graph, on, HashPrices(3, on.size), microbatches)
    check(listing, Random(0), 40)
    rng = Random(1)
    stored = [
        listing.strategy(random_selection(listing.price_list, rng)).storage["fused.weight"]
        for _ in range(60)
    ]
    kept = {storage.optimizer for storage in stored}
    assert not [s for s in kept if "S(0)" in s and "S(0,2)" in s], "axes disagree on the parts"
    assert any(s.count("S(0,2)") == min(len(sizes), 2) for s in kept)


@lru_cache(maxsize=None)
def gated() -> OperatorGraph:
    """Gate and value are one product."""
    import torch
    from torch import nn

    from autopar.extractor import extract

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fused, self.down = nn.Linear(8, 32), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, value = self.fused(x).chunk(2, dim=-1)
            return self.down(torch.tanh(gate) * value).square().mean()

    return extract(Gated(), (torch.zeros(8, 8),))


def attention_inputs(projections: int) -> OperatorGraph:
    """One tensor read by several projections of the same kind."""
    build = Builder()
    x = build.layer_norm(build.linear(build.input(4, 4), build.parameter(4, 4)))
    made = [build.linear(x, build.parameter(8, 4)) for _ in range(projections)]
    loss = build.total(made[0])
    for other in made[1:]:
        loss = build.same("aten.add.Tensor", loss, build.total(other))
    return build.graph(loss)


def test_one_redistribution_serves_q_k_and_v_and_their_gradients_travel_summed() -> None:
    """All projections column-parallel: the norm's output is gathered once, however many read it."""
    times = []
    for projections in (1, 3):
        graph = attention_inputs(projections)
        prices = FakePrices(
            devices=2,
            work={"matmul": 0.0, "memory": 0.0},
            collectives=dict.fromkeys(
                ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"), 1.0
            ),
        )
        listing = listing_of(graph, mesh((2,)), prices)
        selection = _column_parallel(listing)
        strategy = listing.strategy(selection)
        (shared,) = [e for e in edges(graph, listing.structure.rules, strategy) if e.tensor == "t1"]
        assert len(shared.consumers) == projections
        estimate = evaluate(graph, listing.structure.rules, prices, strategy)
        moved = [c for c in estimate.collectives if c.reason == "t1"]
        assert {(c.kind, c.phase, c.count) for c in moved} == {
            ("all_gather", "forward", 1),
            ("reduce_scatter", "backward", 1),
        }
        times.append(sum(c.time_s for c in moved))
        assert listing.price_list.time_of(selection) == pytest.approx(estimate.step_time_s)
        assert not [
            e for e in parameter_edges(graph, listing.structure.rules, strategy) if e.gathers
        ]
    assert times[0] == times[1]


def _column_parallel(listing: Listing) -> Selection:
    """The first two operators divide the batch, the projections their outputs."""

    def wanted(number: int) -> int:
        candidates = listing.candidates[number]
        first = candidates.cluster.members[0]
        name = listing.graph.operators[first].name
        choice = "...0" if name in ("o0", "o1") else "out"
        found = [
            k for k in range(len(candidates.option)) if candidates.split(k, first) == (choice,)
        ]
        return found[0] if found else 0

    nodes = listing.price_list.nodes
    alternatives = [wanted(i) if i < len(listing.candidates) else 0 for i in range(len(nodes))]
    return Selection(
        tuple(alternatives),
        tuple(
            tuple((menu.count,) + (0,) * (len(menu.time_s[menu.use[k]]) - 1) for menu in node.menus)
            for node, k in zip(nodes, alternatives, strict=True)
        ),
    )
