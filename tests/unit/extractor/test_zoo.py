"""The graph of a model is the model: the same loss, gradients and buffers, operator by operator."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from autopar.extractor import convert, execute, extract
from autopar.ir.graph import OperatorGraph, Role, graph_from_json, graph_to_json
from tests.helpers.zoo import ZOO, zoo

_GRAPHS: dict[str, tuple[nn.Module, Any, OperatorGraph]] = {}


def extracted(name: str) -> tuple[nn.Module, Any, OperatorGraph]:
    if name not in _GRAPHS:
        model, inputs = zoo(name)
        _GRAPHS[name] = model, inputs, extract(model, inputs, name=name)
    return _GRAPHS[name]


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("name", ZOO)
def test_the_graph_gives_the_loss_the_gradients_and_the_buffers_of_the_model(name: str) -> None:
    model, inputs, graph = extracted(name)
    ours, theirs = deepcopy(model), deepcopy(model)
    expected = theirs(**inputs) if isinstance(inputs, Mapping) else theirs(*inputs)
    expected.backward()
    environment: dict[str, torch.Tensor] = {}
    loss = execute(graph, state_of(ours), inputs, environment=environment)
    for tensor in environment.values():
        if tensor.requires_grad and not tensor.is_leaf:
            tensor.retain_grad()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradients = {n: p.grad for n, p in ours.named_parameters()}
    for parameter, tensor in theirs.named_parameters():
        torch.testing.assert_close(gradients[parameter], tensor.grad, rtol=1e-12, atol=1e-15)
    for buffer, tensor in theirs.named_buffers():
        torch.testing.assert_close(state_of(ours)[buffer], tensor, rtol=1e-12, atol=0)
    for tensor in graph.tensors:
        found = environment[tensor.name]
        assert tuple(found.shape) == tensor.spec.shape, tensor
        assert str(found.dtype) == f"torch.{tensor.spec.dtype}", tensor
        received = found.requires_grad and found.grad is not None
        assert received == tensor.differentiable, tensor


@pytest.mark.parametrize("name", ZOO)
def test_the_graph_is_well_formed_and_survives_json(name: str) -> None:
    _, _, graph = extracted(name)
    assert graph_from_json(graph_to_json(graph)) == graph
    assert len({t.name for t in graph.tensors}) == len(graph.tensors)
    assert len({o.name for o in graph.operators}) == len(graph.operators)
    known = {t.name for t in graph.tensors if t.role is not Role.ACTIVATION}
    for o in graph.operators:
        assert known.issuperset(o.inputs), o
        known.update(o.outputs)
    assert known == {t.name for t in graph.tensors}
    read = {n for o in graph.operators for n in o.inputs} | {graph.loss}
    read |= {value for _, value in graph.mutations}
    assert all(read.intersection(o.outputs) for o in graph.operators)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "vit", "resnet", "transformer_encoder"])
def test_dropout_is_in_the_graph_as_often_as_the_model_draws_a_mask(name: str) -> None:
    model, inputs = zoo(name, dropout=0.25)
    graph = extract(model, inputs)
    masks = [o for o in graph.operators if o.op == "aten.native_dropout.default"]
    inside = [o for o in graph.operators if 0.25 in o.arguments and "attention" in o.op]
    assert masks
    assert all(o.arguments[1:] == (0.25, True) for o in masks)
    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    assert len(masks) + len(inside) >= len({id(m) for m in dropouts if m.p}) > 0
    model.eval()
    assert not any("dropout" in o.op for o in extract(model, inputs).operators)


def test_a_transformers_model_attends_as_in_a_run_not_as_in_an_export() -> None:
    for name in ("gpt2", "llama", "qwen"):
        _, _, graph = extracted(name)
        attention = [o for o in graph.operators if "attention" in o.op]
        assert len(attention) == 2
        for o in attention:
            assert len(o.inputs) == 3, "an explicit mask was built"
            assert o.argument(5, "is_causal") is True


def test_bfloat16_is_extracted_without_touching_the_model() -> None:
    model, inputs = zoo("gpt_tied", dtype=torch.float32)
    graph = extract(model, inputs, precision="mixed")
    assert {t.spec.dtype for t in graph.parameters} == {"bfloat16"}
    assert graph.shared == (("head.weight", "tokens.weight"),)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["gpt2", "llama", "dlrm"])
def test_decomposition_would_give_the_same_operators(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = zoo(name, dropout=0.1)
    calls = [(o.op, o.arguments, o.keywords) for o in extract(model, inputs).operators]
    monkeypatch.setattr(convert, "_is_known_functional", lambda _: False)
    decomposed = extract(model, inputs)
    assert [(o.op, o.arguments, o.keywords) for o in decomposed.operators] == calls
