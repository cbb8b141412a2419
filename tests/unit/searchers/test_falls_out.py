"""Well-known strategies are found, on real models and machines, without being asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from autopar.ir.graph import OperatorGraph
from autopar.ir.search import Budget, Problem, SearchResult
from autopar.ir.strategy import Strategy, Training
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


def test_a_small_model_with_a_large_batch_gives_data_parallelism() -> None:
    graph = resnet(512)
    strategy = strategy_of(search(graph, "h100-sxm", (8,)))
    convolutions = [o for o in graph.operators if "conv" in o.op]
    assert len(convolutions) == 8
    for operator in convolutions:
        image, weight = _inputs(graph, strategy, operator.name)
        assert (image, weight) == (("S(0)",), ("R",)), operator.name


def _inputs(graph: OperatorGraph, strategy: Strategy, operator: str) -> tuple[Any, ...]:
    from autopar.ops import bind_operator

    bound = bind_operator(graph, graph.operator[operator])
    assert bound is not None
    return bound.shardings(strategy.splits[operator])[0]


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
