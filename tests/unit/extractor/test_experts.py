"""Mixtures of experts: one graph for all ways to run them, planned by experts, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import autopar
from autopar.errors import UnsupportedModelError
from autopar.extractor import extract
from autopar.ir.graph import OperatorGraph
from autopar.ops import bound_rules
from autopar.ops.grouped import GATHER_BMM
from tests.helpers.zoo import zoo

EXPERTS, BATCH, LENGTH = 4, 16, 8

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": LENGTH,
    "num_experts_per_tok": 2,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FEW = {"num_experts": EXPERTS, "moe_intermediate_size": 24}
LATENT = {
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
}
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "mixtral": (4, {"num_local_experts": EXPERTS}),
    "gpt_oss": (4, {"num_local_experts": EXPERTS, "sliding_window": 4}),
    "deepseek_v3": (2, LATENT),
    "deepseek_v2": (2, {**LATENT, "topk_method": "group_limited_greedy"}),
    "qwen2_moe": (4, {**FEW, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": (4, FEW),
    "olmoe": (4, FEW),
    "granitemoe": (4, {"num_local_experts": EXPERTS}),
    "minimax_m2": (4, {"num_local_experts": EXPERTS}),
    "glm4_moe": (2, {**LATENT, "n_group": 1}),
}
"""Kinds of models of transformers: products with gathered matrices that they have, and sizes."""

OFTEN = ("mixtral", "gpt_oss", "deepseek_v3")
NAMES = [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]


def built(name: str, way: str = "grouped_mm") -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name, **{**SIZES, **MODELS[name][1]})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, experts_implementation=way)
    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    return model.train(), {"input_ids": tokens, "labels": tokens}


def extracted(name: str, way: str = "grouped_mm") -> OperatorGraph:
    return extract(*built(name, way), name=name)


@pytest.mark.parametrize("name", NAMES)
def test_a_mixture_of_experts_is_planned_on_a_cluster_by_its_experts(name: str) -> None:
    model, inputs = built(name)
    plan = autopar.plan(model, inputs, topology="2x4xh100-sxm", recipe="data=8,experts=4")
    splits = plan.strategy.splits
    products = [o.name for o in plan.graph.operators if o.op == GATHER_BMM]
    assert len(products) == MODELS[name][0]
    assert all("experts" in splits[product] for product in products)


def test_all_ways_to_run_the_experts_are_one_graph() -> None:
    graphs = [extracted("qwen3_moe", way) for way in ("eager", "batched_mm", "grouped_mm")]
    assert graphs[0] == graphs[1] == graphs[2]
    ops = {o.op for o in graphs[0].operators}
    assert not any("sort" in op or "histc" in op or op == "aten.bmm.default" for op in ops)


def test_samples_of_a_mixture_are_divided_without_a_word_between_them() -> None:
    model, inputs = zoo("mixtral", dtype=torch.float32)
    graph = extract(model, inputs)
    plan = autopar.plan(graph, topology="1x4xh100-sxm", recipe="data_parallel")
    before_the_loss = 100  # bytes of the loss and of the tokens that count in it
    forward = [p for p in plan.estimate.collectives if p.phase == "forward"]
    assert all(p.bytes < before_the_loss for p in forward), forward


class Grouped(nn.Module):
    """Written with torch's own product: tokens in the order of their experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, EXPERTS)
        self.weight = nn.Parameter(torch.empty(EXPERTS, 32, 32))

    def forward(self, x: Tensor) -> Tensor:
        expert = self.gate(x).argmax(-1)
        order = expert.argsort()
        ends = F.one_hot(expert, EXPERTS).sum(0).cumsum(0).to(torch.int32)
        made = F.grouped_mm(x[order], self.weight, offs=ends)
        return torch.zeros_like(made).index_add(0, order, made) + x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_grouped_products_are_known_in_every_dtype(dtype: torch.dtype) -> None:
    model = Grouped().to(dtype)
    graph = extract(model, (torch.empty(64, 32, dtype=dtype),), lambda y, _: y.sum())
    (product,) = (o for o in graph.operators if o.op == "aten._grouped_mm.default")
    rule = bound_rules(graph)[product.name]
    assert {"groups", "in", "out"} == set(rule.factors)


class Looped(nn.Module):
    """One expert after the other, on the tokens that it happens to have."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, EXPERTS)
        self.weight = nn.Parameter(torch.empty(EXPERTS, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        expert = self.gate(x).argmax(-1)
        out = torch.zeros_like(x)
        for i in range(EXPERTS):
            (rows,) = torch.where(expert == i)
            if len(rows) > 0:
                out = out.index_add(0, rows, x[rows] @ self.weight[i])
        return out


def test_experts_with_as_many_tokens_as_there_are_are_refused_and_told_what_to_write() -> None:
    with pytest.raises(UnsupportedModelError) as refused:
        extract(nn.Sequential(Looped()), (torch.empty(16, 8),), lambda y, _: y.sum())
    message = str(refused.value)
    assert "module '0'" in message
    assert f"{__file__}:" in message
    assert "grouped_mm" in message and "weight[expert_of_row]" in message


class Balanced(nn.Module):
    """With a bias of the router that other rules than gradients move: a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, EXPERTS)
        self.bias = nn.Parameter(torch.zeros(1, EXPERTS), requires_grad=False)
        self.weight = nn.Parameter(torch.empty(EXPERTS, 32, 32))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).sigmoid()
        picked = (scores + self.bias.squeeze()).argmax(-1)
        made = torch.bmm(x.unsqueeze(1), self.weight[picked]).squeeze(1)
        return made * scores.gather(1, picked.unsqueeze(1))


def test_a_router_with_a_frozen_bias_keeps_its_promise() -> None:
    graph = extract(Balanced(), (torch.empty(64, 32),), lambda y, _: y.sum())
    plan = autopar.plan(graph, topology="1x4xh100-sxm", recipe="data_parallel")
    report = autopar.verify(plan)
    assert report.ok, report.differences
