"""What recomputation keeps, runs again and costs."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from random import Random

import pytest
import torch

from autopar.errors import AutoparError
from autopar.extractor import extract
from autopar.ir.graph import OperatorGraph
from autopar.ir.sharding import Mesh
from autopar.ir.strategy import Strategy, strategy_from_json, strategy_to_json
from autopar.ops import bound_rules
from autopar.simulator.blocks import Block, blocks
from autopar.simulator.costs import Costs
from autopar.simulator.edges import Rules
from autopar.simulator.folding import fold
from autopar.simulator.memory import peak_memory, saved_bytes
from autopar.simulator.prices import evaluate
from autopar.simulator.recomputation import recomputation
from autopar.simulator.recompute_choices import KINDS, BlockChoices
from tests.helpers.cases import case
from tests.helpers.fake_prices import FakePrices
from tests.helpers.strategies import random_strategy, replicate
from tests.helpers.zoo import GPT

ALONE = Mesh((("data", 1),))
PAIR = Mesh((("data", 2),))
LAYERS = 6
PRICES = FakePrices(devices=1, work={"matmul": 1e-9, "attention": 1e-9, "memory": 1e-11})


@lru_cache(maxsize=None)
def deep() -> OperatorGraph:
    """A GPT of six layers, long enough for its activations to matter."""
    model = GPT(layers=LAYERS)
    tokens = torch.randint(64, (32, 16))
    return extract(model, (tokens, tokens), name="deep")


@lru_cache(maxsize=None)
def rules() -> Rules:
    return bound_rules(deep())


def block() -> Block:
    (found,) = blocks(deep())
    return found


def choices(strategy: Strategy) -> BlockChoices:
    return BlockChoices(deep(), rules(), strategy, Costs(PRICES, strategy.mesh), block())


def recomputed(kind: str, copies: int, strategy: Strategy | None = None) -> Strategy:
    plain = replicate(deep(), ALONE) if strategy is None else strategy
    return replace(plain, recompute=choices(plain).operators(kind, copies))


def test_more_recomputed_copies_never_take_less_time_nor_keep_more() -> None:
    for kind in ("selective", "full"):
        found = [recomputed(kind, copies) for copies in range(LAYERS + 1)]
        times = [evaluate(deep(), rules(), PRICES, s).step_time_s for s in found]
        kept = [saved_bytes(deep(), rules(), s) for s in found]
        assert all(b > a for a, b in pairwise(times)), kind
        assert all(b < a for a, b in pairwise(kept)), kind


def test_recomputing_all_blocks_lowers_the_peak() -> None:
    peak = {
        kind: evaluate(deep(), rules(), PRICES, recomputed(kind, LAYERS)).peak_memory_bytes
        for kind in KINDS
    }
    assert peak["full"] < peak["selective"] < peak["none"]
    assert peak["full"] < peak["attention"] <= peak["none"]


def test_all_but_its_input_is_dropped_of_a_full_block() -> None:
    """Of each copy the residual stream is kept, which the copy before it made."""
    strategy = recomputed("full", LAYERS)
    for number, segment in enumerate(recomputation(deep(), rules(), strategy).segments):
        kept = [name for name, _ in segment.kept if deep().by_name[name].role == "activation"]
        assert kept == ["add" if number == 0 else f"blocks.{number - 1}.add_1"]
    freed = [saved_bytes(deep(), rules(), recomputed("full", copies)) for copies in (4, 5)]
    assert freed[0] - freed[1] == choices(replicate(deep(), ALONE)).freed_bytes("full")


def test_a_product_whose_operands_alone_are_saved_is_not_done_again() -> None:
    strategy = recomputed("full", LAYERS)
    segments = recomputation(deep(), rules(), strategy).segments
    assert len(segments) == LAYERS
    for number, segment in enumerate(segments):
        assert f"blocks.{number}.up.linear" in segment.again
        assert f"blocks.{number}.down.linear" in segment.operators
        assert f"blocks.{number}.down.linear" not in segment.again
        assert segment.before == f"blocks.{number}.down.linear"


def test_what_is_selected_frees_a_byte_for_less_than_the_whole_block() -> None:
    of = choices(replicate(deep(), ALONE))
    price = {kind: of.again_s(kind) / of.freed_bytes(kind) for kind in ("selective", "full")}
    assert price["selective"] < price["full"]
    selected = {name.rpartition(".")[2] for name in of.operators("selective", 1)}
    assert "gelu" in selected
    assert "linear" not in selected


def test_where_products_cost_nothing_they_are_selected_too() -> None:
    free = FakePrices(devices=1, work={"matmul": 0.0, "attention": 1.0, "memory": 1e-11})
    of = replace(choices(replicate(deep(), ALONE)), costs=Costs(free, ALONE))
    selected = {name.rpartition(".")[2] for name in of.operators("selective", 1)}
    assert "linear" in selected
    assert "scaled_dot_product_attention" not in selected


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("copies", [0, 1, 3, LAYERS])
def test_a_folded_graph_tells_the_same(kind: str, copies: int) -> None:
    strategy = replace(recomputed(kind, copies), microbatches=1)
    folded = fold(deep(), block().runs((copies,)) if copies else (block(),))
    whole = evaluate(deep(), rules(), PRICES, strategy)
    found = evaluate(deep(), rules(), PRICES, strategy, folded=folded)
    assert found.step_time_s == pytest.approx(whole.step_time_s, rel=1e-12)
    assert found.peak_memory_bytes == whole.peak_memory_bytes
    assert found.memory.activations_bytes == whole.memory.activations_bytes


def test_what_is_not_said_to_be_recomputed_costs_as_before() -> None:
    plain = replicate(deep(), ALONE)
    assert recomputed("none", LAYERS) == plain
    assert recomputed("full", 0) == plain


def test_prices_are_those_of_running_again_what_is_missing() -> None:
    plain = replicate(deep(), ALONE)
    strategy = recomputed("full", 2)
    before, after = (evaluate(deep(), rules(), PRICES, s) for s in (plain, strategy))
    costs = Costs(PRICES, ALONE)
    names = recomputation(deep(), rules(), strategy).again
    again_s = sum(
        costs.operator_s(rules()[n], plain.splits[n], (True,) * len(deep().operator[n].inputs))[0]
        for n in names
    )
    assert after.backward_compute_s - before.backward_compute_s == pytest.approx(again_s)
    assert after.forward_compute_s == before.forward_compute_s


def test_tensors_that_a_later_segment_reads_are_kept() -> None:
    """A skip connection: one who makes it again would be run again long before its turn."""
    of = case("unet")
    of_rules = bound_rules(of.graph)
    names = [o.name for o in of.graph.operators]
    half = len(names) // 2
    strategy = replicate(of.graph, ALONE)
    chosen = (*names[:half], *names[half + 1 : -1])
    found = recomputation(of.graph, of_rules, replace(strategy, recompute=chosen))
    first, second = found.segments
    crossing = {name for name, _ in second.kept} & {
        name for o in of.graph.operators[:half] for name in o.outputs
    }
    assert crossing
    assert crossing.isdisjoint(name for name, _ in found.segment_of)
    assert first.before in first.operators


def test_what_cannot_be_recomputed_is_refused_by_name() -> None:
    plain = replicate(deep(), ALONE)

    def refused(strategy: Strategy, match: str, graph: OperatorGraph) -> None:
        with pytest.raises(AutoparError, match=match):
            evaluate(graph, bound_rules(graph), FakePrices(), strategy)

    nobody = replace(plain, recompute=("nobody",))
    refused(nobody, "nobody are to be recomputed and are not in", deep())
    refused(
        replace(plain, recompute=("blocks.0.gelu",), repeat_collectives=("blocks.0.add",)),
        "blocks.0.add are to be repeated .* recompute the operators that make them",
        deep(),
    )
    resnet = case("resnet").graph
    norm = next(o.name for o in resnet.operators if "batch_norm" in o.op)
    strategy = replicate(resnet, PAIR)
    split = next(f for f in bound_rules(resnet)[norm].rule.special)
    strategy = replace(strategy, splits=strategy.splits | {norm: (split,)}, recompute=(norm,))
    refused(strategy, f"{norm} .* cannot be recomputed without communication.* axis data", resnet)


def test_the_plan_file_has_it() -> None:
    strategy = recomputed("selective", 3)
    strategy = replace(strategy, repeat_collectives=("blocks.0.gelu",))
    assert strategy_from_json(json.loads(json.dumps(strategy_to_json(strategy)))) == strategy


@pytest.mark.parametrize("seed", range(3))
def test_under_random_splits_a_full_block_never_keeps_more_than_none(seed: int) -> None:
    """But for what redistributions bring, which is kept so as not to be repeated."""
    mesh = Mesh((("data", 2), ("tensor", 2)))
    plain = random_strategy(deep(), rules(), mesh, Random(seed))
    full = recomputed("full", LAYERS, plain)
    repeated = replace(
        full,
        repeat_collectives=tuple(
            name for o in deep().operators if o.name in full.recompute for name in o.outputs
        ),
    )
    kept = [saved_bytes(deep(), rules(), s) for s in (plain, repeated)]
    assert kept[1] < kept[0]
    assert peak_memory(deep(), rules(), full).total_bytes > 0
