"""What a plan promises is what its program does: collectives exactly, memory within 5%."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.testing._internal.distributed.fake_pg import FakeStore

from autopar.errors import AutoparError
from autopar.extractor import extract
from autopar.ir.graph import OperatorGraph
from autopar.ir.sharding import Mesh
from autopar.ir.strategy import Strategy, Training
from autopar.ops import bound_rules
from autopar.runtime.collectives import Communicator
from autopar.runtime.verify import Report, verify_strategy
from autopar.searchers.optimum import optimum
from autopar.simulator.listing import Allowed, Listing, Structure
from autopar.simulator.meshes import mesh
from autopar.simulator.prices import evaluate
from tests.helpers.fake_prices import FakePrices
from tests.helpers.strategies import random_strategy, random_strategy_in_parts, replicate
from tests.helpers.zoo import ZOO, zoo


@lru_cache(maxsize=None)
def graph_of(name: str, dropout: float = 0.0) -> OperatorGraph:
    model, inputs = zoo(name, dropout=dropout)
    return extract(model, inputs, name=name)


def report_of(graph: OperatorGraph, strategy: Strategy, rank: int = 0) -> Report:
    rules = bound_rules(graph)
    estimate = evaluate(graph, rules, FakePrices(), strategy)
    return verify_strategy(graph, rules, strategy, estimate, rank=rank)


def drawn(graph: OperatorGraph, on: Mesh, seed: int, training: Training) -> Strategy:
    return random_strategy(graph, bound_rules(graph), on, Random(seed), training)


@pytest.mark.parametrize("name", ZOO)
def test_random_strategies_keep_their_promise(name: str) -> None:
    graph = graph_of(name)
    strategy = drawn(graph, mesh((2, 2, 2)), 2, Training())
    report = report_of(graph, strategy, rank=7)
    assert report.ok, report.differences
    assert report.typechecked


@pytest.mark.parametrize("name", ["gpt2", "transformer_encoder", "phi3"])
def test_fused_projections_divided_in_parts_keep_their_promise(name: str) -> None:
    graph = graph_of(name)
    strategy = random_strategy_in_parts(graph, bound_rules(graph), mesh((2, 2)), Random(1))
    report = report_of(graph, strategy, rank=3)
    assert report.ok, report.differences
    assert report.typechecked
    assert abs(report.memory_error) < 0.005


@pytest.mark.parametrize("seed", range(3))
def test_statistics_of_a_bfloat16_batch_norm_keep_their_promise(seed: int) -> None:
    model, inputs = zoo("resnet")
    graph = extract(model, inputs, name="resnet", precision="mixed")
    for operator in graph.operators:
        if "batch_norm" in operator.op:
            buffers = [graph.spec(name) for name in operator.inputs[3:]]
            assert [graph.spec(name) for name in operator.outputs[3:]] == buffers
    report = report_of(graph, drawn(graph, mesh((2, 2)), seed, Training(precision="mixed")))
    assert report.ok, report.differences


@pytest.mark.parametrize(
    "name",
    ["gpt2", "bert", "vit", "transformer_encoder", pytest.param("t5", marks=pytest.mark.slow)],
)
def test_dropout_keeps_its_promise(name: str) -> None:
    graph = graph_of(name, dropout=0.1)
    report = report_of(graph, drawn(graph, mesh((2, 2)), 5, Training()), rank=3)
    assert report.ok, report.differences


class Drawing(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 256), nn.Linear(256, 64)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return (self.last(self.between(self.first(x))) - x).square().mean()


DRAWINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal noise": lambda h: h + torch.randn_like(h),
    "uniform noise": lambda h: h * torch.rand(512, 256, device=h.device),
    "integers": lambda h: h + torch.randint(0, 5, (512, 256), device=h.device),
    "dropout in place": lambda h: F.dropout(h, 0.1, inplace=True),
    "Gumbel softmax": F.gumbel_softmax,
    "Fourier transform": lambda h: torch.fft.irfft(torch.fft.rfft(h), n=256),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_what_draws_or_transforms_keeps_its_promise(name: str) -> None:
    graph = extract(Drawing(DRAWINGS[name]), (torch.randn(512, 64),))
    report = report_of(graph, replicate(graph, mesh((2,))))
    assert report.ok, report.differences
    assert abs(report.memory_error) < 0.005
    assert report_of(graph, drawn(graph, mesh((2, 2)), 1, Training()), rank=3).typechecked


@pytest.mark.parametrize(
    "training",
    [Training("sgd"), Training("momentum", clip_norm=1.0), Training("adam", clip_norm=0.5)],
    ids=lambda training: training.optimizer,
)
@pytest.mark.parametrize("sizes", [(1,), (4,), (8,), (2, 2)])
def test_every_optimizer_and_mesh_keeps_the_promise(
    sizes: tuple[int, ...], training: Training
) -> None:
    graph = graph_of("gpt_tied")
    report = report_of(graph, drawn(graph, mesh(sizes), 1, training), rank=mesh(sizes).size - 1)
    assert report.ok, report.differences


@pytest.mark.parametrize("name", ["gpt_tied", "resnet"])
def test_master_copies_are_in_the_promised_memory(name: str) -> None:
    model, inputs = zoo(name, dtype=torch.float32)
    graph = extract(model, inputs, name=name, precision="mixed")
    for seed, training in enumerate((Training("adamw", "mixed"), Training("sgd", "mixed", 1.0))):
        report = report_of(graph, drawn(graph, mesh((2, 2)), seed, training), rank=3)
        assert report.ok, report.differences


def test_random_strategies_are_within_half_a_percent_of_the_measured_peak() -> None:
    graph = graph_of("gpt")
    for seed in range(3):
        report = report_of(graph, drawn(graph, mesh((2, 2)), seed, Training()), rank=3)
        assert abs(report.memory_error) < 0.005, (seed, report.memory_error)


def test_a_collective_too_many_or_too_few_is_a_difference() -> None:
    graph, rules = graph_of("mlp"), bound_rules(graph_of("mlp"))
    strategy = drawn(graph, mesh((2, 2)), 0, Training())
    estimate = evaluate(graph, rules, FakePrices(), strategy)
    first = estimate.collectives[0]
    for collectives in (
        estimate.collectives[1:],
        (replace(first, count=first.count + 1), *estimate.collectives[1:]),
        (replace(first, bytes=first.bytes + 1), *estimate.collectives[1:]),
    ):
        report = verify_strategy(graph, rules, strategy, replace(estimate, collectives=collectives))
        assert not report.ok
        assert first.kind in report.differences[0] and "promised" in report.differences[0]


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_memory_a_tenth_off_is_a_difference(factor: float) -> None:
    graph, rules = graph_of("mlp"), bound_rules(graph_of("mlp"))
    strategy = replicate(graph, mesh((2,)))
    estimate = evaluate(graph, rules, FakePrices(), strategy)
    extra = round((factor - 1) * estimate.peak_memory_bytes)
    memory = replace(estimate.memory, parameters_bytes=estimate.memory.parameters_bytes + extra)
    report = verify_strategy(graph, rules, strategy, replace(estimate, memory=memory))
    (difference,) = report.differences
    assert "peak memory" in difference


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter"])
def test_a_program_that_moves_a_tensor_otherwise_is_caught(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    original: Callable[..., torch.Tensor] = getattr(Communicator, kind)

    def twice(*args: object, **kwargs: object) -> torch.Tensor:
        original(*args, **kwargs)
        return original(*args, **kwargs)

    graph = graph_of("mlp")
    strategy = drawn(graph, mesh((4,)), 1, Training())
    assert report_of(graph, strategy).ok
    monkeypatch.setattr(Communicator, kind, twice)
    assert any(kind in text for text in report_of(graph, strategy).differences)


def test_a_collective_that_the_runtime_knows_nothing_of_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = Communicator.combine

    def combine(*args: Any, **kwargs: Any) -> torch.Tensor:
        found = original(*args, **kwargs)
        dist.all_reduce(found)
        return found

    graph = graph_of("mlp")
    strategy = drawn(graph, mesh((4,)), 1, Training(clip_norm=1.0))
    assert report_of(graph, strategy).ok
    monkeypatch.setattr(Communicator, "combine", combine)
    (difference,) = report_of(graph, strategy).differences
    assert "0 c10d::allreduce_ of 8 bytes on an unknown group promised, 1 executed" in difference


def test_ranks_that_there_are_not_and_processes_of_another_world_are_refused() -> None:
    graph = graph_of("mlp")
    strategy = replicate(graph, mesh((4,)))
    with pytest.raises(AutoparError, match="ranks 0 to 3"):
        report_of(graph, strategy, rank=4)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        with pytest.raises(AutoparError, match="process group of its own"):
            report_of(graph, strategy)
    finally:
        dist.destroy_process_group()


def test_the_report_is_json() -> None:
    import json

    graph = graph_of("mlp")
    data = json.loads(report_of(graph, drawn(graph, mesh((4,)), 1, Training())).to_json())
    assert data["ok"] is True
    assert data["world_size"] == 4
    assert data["collectives"][0]["promised"] == data["collectives"][0]["executed"]
    assert data["at_peak"][0]["size_bytes"] > 0


def test_attention_in_parts_keeps_its_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of("vit", dropout=0.1)
    strategy = replicate(graph, mesh((2,)), Training("sgd"))
    whole = report_of(graph, strategy)
    monkeypatch.setattr("autopar.simulator.workspace.LARGEST_SCORES", 1)
    parts = report_of(graph, strategy)
    assert whole.ok and parts.ok, parts.differences
    assert parts.measured_peak_bytes <= whole.measured_peak_bytes


@pytest.mark.slow
def test_gpt3_on_a_thousand_ranks_keeps_its_promise() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.helpers.zoo import LossOf

    config = GPT2Config(
        vocab_size=51200,  # 50257, padded so that 8 divides it
        n_positions=2048,
        n_embd=12288,
        n_layer=96,
        n_head=96,
        use_cache=False,
        attn_pdrop=0.0,
    )
    with torch.device("meta"):
        model = LossOf(GPT2LMHeadModel(config))
        tokens = torch.zeros(128, 2048, dtype=torch.long)
    graph = extract(model.train(), {"input_ids": tokens, "labels": tokens.clone()}, name="gpt3")
    assert graph.parameter_count > 174e9
    strategy = tensor_parallel(graph, mesh((128, 8)))
    report = report_of(graph, strategy, rank=1000)
    assert report.ok, report.differences
    assert report.world_size == 1024
    assert report.measured_peak_bytes < graph.parameter_count * 4


def tensor_parallel(graph: OperatorGraph, on: Mesh) -> Strategy:
    """The batch over the first axis, weights over the second, as the prices have it."""
    listing = Listing(
        Structure(graph, bound_rules(graph)),
        FakePrices(devices=on.size),
        on,
        10**15,
        Training(),
        1,
        {},
        (Allowed("S", (0,)), Allowed("P", (0,))),
    )
    found = optimum(listing.price_list)
    assert found.selection is not None
    return listing.strategy(found.selection)
