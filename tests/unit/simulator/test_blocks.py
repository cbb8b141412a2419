"""Repeated blocks are found in real models, and folding them changes no price."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn

from autopar.extractor import extract
from autopar.ir.graph import OperatorGraph
from autopar.ir.rule import NOTHING
from autopar.ops import bound_rules
from autopar.simulator.blocks import blocks
from autopar.simulator.folding import fold
from autopar.simulator.listing import Listing, Structure
from autopar.simulator.meshes import mesh
from autopar.simulator.price_list import Selection
from autopar.simulator.prices import evaluate
from tests.helpers.random_graphs import HashPrices
from tests.helpers.strategies import PLAIN, replicate
from tests.helpers.zoo import LossOf

LAYERS = 5
SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64, n_embd=32, n_layer=LAYERS, n_head=4, bos_token_id=0, eos_token_id=0
        )
    )


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(**SMALL, num_hidden_layers=LAYERS, num_attention_heads=4, use_cache=False)
    )


def bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**SMALL, num_hidden_layers=LAYERS, num_attention_heads=4))


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=LAYERS,
            num_decoder_layers=LAYERS,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
            use_cache=False,
        )
    )


@lru_cache(maxsize=None)
def language_model(make: Callable[[], Any]) -> OperatorGraph:
    with torch.device("meta"):
        model = LossOf(make())
        tokens = torch.zeros(8, 16, dtype=torch.long)
    return extract(model, {"input_ids": tokens, "labels": tokens})


class Tower(nn.Module):
    """Equal layers in a row, and a head."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(layers))
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x)).sum()


def tower(layers: int = LAYERS) -> OperatorGraph:
    with torch.device("meta"):
        return extract(Tower(layers), (torch.zeros(8, 16),))


@pytest.mark.parametrize("make", [gpt2, llama, bert])
def test_the_layers_of_a_transformer_are_copies_of_one_block(make: Callable[[], Any]) -> None:
    graph = language_model(make)
    found = [block for block in blocks(graph) if block.period > 5]
    (block,) = found
    assert block.copies >= LAYERS - 1
    for offset in range(block.period):
        alike = graph.operators[block.start + offset : block.stop : block.period]
        assert len({o.op for o in alike}) == 1
        assert len({o.module for o in alike if o.module}) in (0, block.copies)


@pytest.mark.slow
def test_encoder_and_decoder_of_t5_are_two_blocks() -> None:
    found = [block for block in blocks(language_model(t5)) if block.period > 5]
    assert len(found) == 2
    assert all(block.copies >= LAYERS - 2 for block in found)


def test_the_projections_of_one_layer_are_not_copies_of_one_another() -> None:
    """q, k and v are equal in all but name, and may still be split differently."""
    graph = language_model(llama)
    structure = Structure(graph, bound_rules(graph))
    position = {o.name: i for i, o in enumerate(graph.operators)}
    classes = {
        part: {structure.class_of[position[name]] for name in position if f"{part}_proj" in name}
        for part in "qkv"
    }
    assert not classes["k"] & classes["v"]
    assert not classes["q"] & classes["k"]


def test_a_sequence_of_equal_layers_is_one_block() -> None:
    """But for the first layer, whose input needs no gradient."""
    graph = tower()
    (block,) = blocks(graph)
    assert (block.period, block.copies) == (2, LAYERS - 1)


def test_decisions_do_not_grow_with_depth() -> None:
    sizes = set()
    for layers in (6, 24):
        graph = tower(layers)
        structure = Structure(graph, bound_rules(graph))
        listing = Listing(structure, HashPrices(0), mesh((2, 2)), float("inf"), PLAIN)
        sizes.add(sum(len(node.time_s) for node in listing.price_list.nodes))
        assert len(fold(graph, structure.blocks).graph.operators) < 6 * 3
    assert len(sizes) == 1


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_folded_graph_is_priced_as_the_whole_one(make: Callable[[], Any], runs: int) -> None:
    """Times to rounding, memory to the byte, also where the copies of a parameter are kept in
    several ways, one run of them after the other."""
    graph = language_model(make)
    rules = bound_rules(graph)
    structure = Structure(graph, rules)
    listing = Listing(structure, HashPrices(3), mesh((2, 2)), float("inf"), PLAIN)
    nodes = listing.price_list.nodes
    cut = 0
    for turn in range(6):
        alternatives = tuple((7 * turn + 3 * i) % len(n.time_s) for i, n in enumerate(nodes))
        storages = tuple(
            tuple(
                _spread(menu.count, len(menu.time_s[menu.use[k]]), turn + i, runs)
                for i, menu in enumerate(n.menus)
            )
            for n, k in zip(nodes, alternatives, strict=True)
        )
        selection = Selection(alternatives, storages)
        folded = listing.folded(selection)
        assert sum(folded.weight.values()) == len(graph.operators)
        cut += len(folded.graph.operators) > len(fold(graph, structure.blocks).graph.operators)
        strategy = listing.strategy(selection)
        whole = evaluate(graph, rules, listing.cost_model, strategy)
        part = evaluate(graph, rules, listing.cost_model, strategy, folded=folded)
        assert part.step_time_s == pytest.approx(whole.step_time_s, rel=1e-12)
        assert part.peak_memory_bytes == whole.peak_memory_bytes
        assert part.gradient_synchronisation_s == pytest.approx(whole.gradient_synchronisation_s)
        assert sum(c.count for c in part.collectives) == sum(c.count for c in whole.collectives)
    assert (cut > 0) == (runs > 1)


def _spread(count: int, storages: int, turn: int, runs: int) -> tuple[int, ...]:
    """All copies in one storage, or some of them in the next."""
    found = [0] * storages
    some = count if runs == 1 else 1 + turn % count
    found[turn % storages] += some
    found[(turn + 1) % storages] += count - some
    return tuple(found)


def test_what_every_rank_does_alike_needs_no_collective_folded_or_not() -> None:
    graph = tower()
    rules = bound_rules(graph)
    strategy = replicate(graph, mesh((2,)))
    assert set(strategy.splits.values()) == {(NOTHING,)}
    estimate = evaluate(graph, rules, HashPrices(0), strategy, folded=fold(graph, blocks(graph)))
    assert estimate.collectives == ()
