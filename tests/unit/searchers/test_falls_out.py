"""Well-known strategies are found, on real models and machines, without being asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from autopar.ir.graph import OperatorGraph
from autopar.ir.search import Budget, Problem, SearchResult
from autopar.ir.sharding import Sharding
from autopar.ir.strategy import Strategy, Training
from autopar.ops import bound_rules
from autopar.searchers import ilp
from autopar.simulator.meshes import mesh
from cost_models import cost_model

MIXED = Training("adamw", "mixed")


@lru_cache(maxsize=None)
def llama(hidden: int, batch: int, length: int, layers: int = 2) -> OperatorGraph:
    """Llama with the proportions of its 8B version."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=3584 * hidden // 1024,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=length,
        use_cache=False,
    )
    return _extracted(lambda: LlamaForCausalLM(config), batch, length)


@lru_cache(maxsize=None)
def gpt2(hidden: int, batch: int, length: int) -> OperatorGraph:
    """Two layers with the proportions of GPT-3; query, key and value are one projection."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=32000,
        n_positions=length,
        n_embd=hidden,
        n_layer=2,
        n_head=hidden // 128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _extracted(lambda: GPT2LMHeadModel(config), batch, length)


@lru_cache(maxsize=None)
def phi3(hidden: int, batch: int, length: int) -> OperatorGraph:
    """A quarter as many heads of key and value as of query, in one projection; so are gate and
    value of the MLP."""
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=2,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 512,
        max_position_embeddings=length,
        original_max_position_embeddings=length,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return _extracted(lambda: Phi3ForCausalLM(config), batch, length)


@lru_cache(maxsize=None)
def encoder(hidden: int, batch: int, length: int) -> OperatorGraph:
    """torch's own layers, of which ``nn.MultiheadAttention`` is a part."""
    import torch
    from torch import nn

    from autopar.extractor import extract

    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(
                hidden, hidden // 128, 4 * hidden, dropout=0.0, batch_first=True
            )
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return nn.functional.mse_loss(self.encoder(x), target)

    with torch.device("meta"):
        x = torch.zeros(batch, length, hidden, dtype=torch.bfloat16)
        return extract(Regression().to(torch.bfloat16), (x, x))


def _extracted(make: Callable[[], Any], batch: int, length: int) -> OperatorGraph:
    """In bf16 on the meta device, where size costs nothing."""
    import torch

    from autopar.extractor import extract
    from tests.helpers.zoo import LossOf

    with torch.device("meta"):
        model = LossOf(make().to(torch.bfloat16))
        tokens = torch.zeros(batch, length, dtype=torch.long)
    return extract(model, {"input_ids": tokens, "labels": tokens})


@lru_cache(maxsize=None)
def resnet(batch: int) -> OperatorGraph:
    import torch

    from autopar.extractor import extract
    from tests.helpers.zoo import ResNet

    with torch.device("meta"):
        images = torch.zeros(batch, 4, 64, 64)
        labels = torch.zeros(batch, dtype=torch.long)
        return extract(ResNet(0.0), (images, labels))


def search(
    graph: OperatorGraph, machine: str, sizes: tuple[int, ...], memory_bytes: float | None = None
) -> SearchResult:
    prices = cost_model(machine)
    limit = int(prices.memory_bytes * 0.9 if memory_bytes is None else memory_bytes)
    found = ilp.search(Problem(graph, prices, (mesh(sizes),), limit, MIXED), Budget())
    assert found.best is not None
    return found


def strategy_of(result: SearchResult) -> Strategy:
    assert result.best is not None
    assert result.best.strategy is not None
    return result.best.strategy


def split_of(strategy: Strategy, part: str) -> set[tuple[str, ...]]:
    """The splits of the operators with ``part`` in their name."""
    found = {split for name, split in strategy.splits.items() if part in name}
    assert found, part
    return found


def test_a_wide_model_with_a_batch_of_one_gives_megatron_with_a_parallel_vocabulary() -> None:
    """Columns then rows in attention and MLP, heads in attention, the vocabulary in head and
    loss; nobody can divide a batch of one."""
    graph = llama(hidden=8192, batch=1, length=2048)
    strategy = strategy_of(search(graph, "h100-sxm", (8,), 1e13))
    for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"):
        assert split_of(strategy, f"{part}.linear") == {("out",)}, part
    for part in ("o_proj", "down_proj"):
        assert split_of(strategy, f"{part}.linear") == {("in",)}, part
    assert split_of(strategy, "scaled_dot_product_attention") == {("heads",)}
    kept = strategy.storage
    assert {kept[p].parameter for p in kept if p.endswith("q_proj.weight")} == {("S(0)",)}
    assert {kept[p].parameter for p in kept if p.endswith("down_proj.weight")} == {("S(1)",)}
    (loss,) = (o.name for o in graph.operators if "cross_entropy" in o.op)
    logits, _ = _inputs(graph, strategy, loss)
    assert logits == ("S(1)",)


def test_so_it_does_where_query_key_and_value_are_one_projection() -> None:
    """GPT-2: each device has its heads' columns of query, of key and of value."""
    strategy = strategy_of(search(gpt2(8192, batch=1, length=2048), "h100-sxm", (8,), 1e13))
    for part in ("c_attn", "c_fc"):
        assert split_of(strategy, f"{part}.addmm") == {("n",)}, part
    for part in ("attn.c_proj", "mlp.c_proj"):
        assert split_of(strategy, f"{part}.addmm") == {("k",)}, part
    assert split_of(strategy, "scaled_dot_product_attention") == {("heads",)}
    assert stored(strategy, "c_attn.weight") == {("S(1,3)",)}
    assert stored(strategy, "c_attn.bias") == {("S(0,3)",)}
    assert stored(strategy, "attn.c_proj.weight") == {("S(0)",)}


def test_and_where_their_parts_are_unequal_or_the_gate_is_fused_too() -> None:
    strategy = strategy_of(search(phi3(8192, batch=1, length=2048), "h100-sxm", (8,), 1e13))
    for part in ("qkv_proj", "gate_up_proj"):
        assert split_of(strategy, f"{part}.linear") == {("out",)}, part
    for part in ("o_proj", "down_proj"):
        assert split_of(strategy, f"{part}.linear") == {("in",)}, part
    assert split_of(strategy, "scaled_dot_product_attention") == {("heads",)}
    assert stored(strategy, "qkv_proj.weight") == {("S(0,4:1:1)",)}
    assert stored(strategy, "gate_up_proj.weight") == {("S(0,2)",)}


def test_and_in_the_layers_of_torch_itself() -> None:
    """With one sample: of several, batch and heads are one dim there."""
    strategy = strategy_of(search(encoder(8192, batch=1, length=2048), "h100-sxm", (8,), 1e13))
    assert split_of(strategy, "scaled_dot_product_attention") == {("heads",)}
    assert split_of(strategy, "linear1.linear") == {("out",)}
    assert split_of(strategy, "linear2.linear") == {("in",)}
    assert stored(strategy, "in_proj_weight") == {("S(0,3)",)}
    assert stored(strategy, "out_proj.weight") == {("S(1)",)}


def stored(strategy: Strategy, part: str) -> set[Sharding]:
    """How the parameters with ``part`` in their name are kept."""
    found = {s.parameter for name, s in strategy.storage.items() if part in name}
    assert found, part
    return found


def test_a_small_model_with_a_large_batch_gives_data_parallelism() -> None:
    graph = resnet(4096)
    strategy = strategy_of(search(graph, "h100-sxm", (8,)))
    convolutions = [o for o in graph.operators if "conv" in o.op]
    assert len(convolutions) == 8
    for operator in convolutions:
        image, weight = _inputs(graph, strategy, operator.name)
        assert (image, weight) == (("S(0)",), ("R",)), operator.name


def _inputs(graph: OperatorGraph, strategy: Strategy, operator: str) -> tuple[Any, ...]:
    return bound_rules(graph)[operator].shardings(strategy.splits[operator])[0]


def test_when_nothing_less_fits_parameters_are_sharded_and_gathered_for_use() -> None:
    """Plenty of samples, and memory for little more than a shard of the model on each device."""
    graph = llama(hidden=2048, batch=64, length=1024)
    free = search(graph, "h100-sxm", (8,))
    assert free.best is not None
    assert free.best.estimate is not None
    roomy = strategy_of(free)
    memory = free.best.estimate.memory
    resident = memory.parameters_bytes + memory.gradients_bytes + memory.optimizer_bytes
    limit = free.best.estimate.peak_memory_bytes - 0.4 * resident
    tight = strategy_of(search(graph, "h100-sxm", (8,), limit))
    assert _gathered(graph, tight) > _gathered(graph, roomy)


def _gathered(graph: OperatorGraph, strategy: Strategy) -> int:
    """Parameters that are stored in pieces and used whole."""
    return sum(
        any(
            stored.startswith("S") and used in ("R", "I")
            for operator, position in graph.consumers[name]
            for stored, used in zip(
                storage.parameter, _inputs(graph, strategy, operator.name)[position], strict=True
            )
        )
        for name, storage in strategy.storage.items()
    )


def test_on_several_nodes_the_batch_is_divided_across_them_and_the_model_within() -> None:
    """Slow links carry only gradients: the outer axis divides the batch of every product."""
    graph = llama(hidden=8192, batch=32, length=2048)
    strategy = strategy_of(search(graph, "4x8xh100-sxm", (4, 8), 1e13))
    for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        assert split_of(strategy, f"{part}.linear") == {("...0", "out")}, part
    assert split_of(strategy, "down_proj.linear") == {("...0", "in")}
    assert split_of(strategy, "scaled_dot_product_attention") == {("batch0", "heads")}
