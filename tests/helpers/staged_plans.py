"""Plans of several stages of small models, made from strategies of one stage."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from autopar import api
from autopar.extractor import extract
from autopar.ir.graph import OperatorGraph
from autopar.ir.plan import Plan
from autopar.ir.sharding import Mesh
from autopar.ir.strategy import Strategy, Training
from autopar.simulator.staged import even_cuts, runs, staged
from tests.helpers import fake_plans
from tests.helpers.cases import case
from tests.helpers.fake_prices import FakePrices
from tests.helpers.strategies import kept, replicate
from tests.helpers.zoo import zoo

CLIPPED = Training("adamw", clip_norm=1.0)
ALONE = Mesh((("a", 1),))


@lru_cache(maxsize=None)
def by_recipe(name: str, recipe: str, microbatches: int = 4) -> Strategy:
    """The recipe's strategy of a zoo model on two devices, in a world where its layout pays."""
    kinds = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    prices = FakePrices(devices=2, collectives=dict.fromkeys(kinds, 1e-15))
    graph = case(name).graph
    tried = api.search(graph, topology=prices, mesh=(2,), microbatches=microbatches).trials
    (found,) = (t.strategy for t in tried if t.name == recipe and t.strategy is not None)
    return replace(found, training=CLIPPED)


@lru_cache(maxsize=None)
def in_two(name: str, recipe: str, schedule: str) -> Strategy:
    """A zoo model of two blocks in two stages of two devices, four for interleaving schedules."""
    graph, like = case(name).graph, by_recipe(name, recipe)
    return staged(graph, runs(graph, even_cuts(graph, 2)), [like] * 2, schedule, 4)


@lru_cache(maxsize=None)
def blocks(layers: int = 9) -> OperatorGraph:
    """Layers, all but the first of which are alike."""
    return fake_plans.two_blocks(layers=layers, batch=32)


def chain(
    stages: int,
    schedule: str = "1f1b",
    microbatches: int = 8,
    chunks: int | None = None,
    layers: int = 9,
) -> Strategy:
    """``blocks`` in stages of one device each."""
    graph = blocks(layers)
    like = replicate(graph, ALONE)
    cut = runs(graph, even_cuts(graph, stages))
    return staged(graph, cut, [like] * stages, schedule, microbatches, chunks=chunks)


def plan_of(
    stages: int, schedule: str = "1f1b", microbatches: int = 8, chunks: int | None = None
) -> Plan:
    strategy = chain(stages, schedule, microbatches, chunks)
    return api.plan_by_hand(blocks(), strategy, f"1x{strategy.devices}xh100-sxm")


@lru_cache(maxsize=None)
def tied_plan() -> Plan:
    """Its first stage has the embedding on one device; its last, on two, halves of that."""
    model, inputs = zoo("gpt_tied", dtype=torch.float32)
    graph = extract(model, inputs, name="gpt_tied")
    whole, pair = replicate(graph, ALONE), replicate(graph, Mesh((("a", 2),)))
    halves = {**pair.storage, "tokens.weight": kept(("S(0)",))}
    cut = runs(graph, even_cuts(graph, 2))
    strategy = staged(graph, cut, [whole, replace(pair, storage=halves)], "1f1b", 4)
    return api.plan_by_hand(graph, strategy, "1x3xh100-sxm")


def large_plan(stages: int = 64, devices: int = 1024, microbatches: int = 128) -> Plan:
    """Every stage does the same work on all of its devices."""
    graph = fake_plans.two_blocks(layers=stages + 1, batch=microbatches)
    like = replicate(graph, Mesh((("a", devices // stages),)))
    cut = runs(graph, even_cuts(graph, stages))
    strategy = staged(graph, cut, [like] * stages, "1f1b", microbatches)
    return api.plan_by_hand(graph, strategy, f"{devices // 8}x8xh100-sxm")
