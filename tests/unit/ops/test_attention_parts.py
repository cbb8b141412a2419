"""Attention by its definition works on a few samples at a time, which nobody can tell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autopar.ir.graph import Input, Operator, TensorSpec
from autopar.ir.rule import bind
from autopar.ir.sharding import Mesh
from autopar.ops import rule_for
from autopar.runtime.local_ops import LOCAL_OPS
from autopar.runtime.rule_check import Group, RankContext
from autopar.simulator import workspace
from autopar.simulator.workspace import attention_samples

OP = "aten.scaled_dot_product_attention.default"
SAMPLES, HEADS, KEY_HEADS, LENGTH, WIDTH = 6, 4, 2, 10, 8


def results(bias_samples: int, dropout: float, causal: bool) -> list[Tensor]:
    """The output, and the gradients of all inputs."""
    torch.manual_seed(0)
    shapes = [(SAMPLES, heads, LENGTH, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    shapes.append((bias_samples, HEADS, LENGTH, LENGTH))
    inputs = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    specs = tuple(TensorSpec(shape, "float64") for shape in shapes)
    arguments = (*map(Input, range(4)), dropout, causal)
    keywords = (("scale", 0.3), ("enable_gqa", True))
    operator = Operator("attention", OP, ("q", "k", "v", "b"), ("o",), arguments, keywords)
    rule = rule_for(operator, specs, specs[:1])
    assert rule is not None
    one = Mesh(())
    context = RankContext(bind(rule, specs, specs[:1]), (), one, 0, Group(one))
    out = LOCAL_OPS[OP](context, operator, [*inputs, dropout, causal], dict(keywords))
    return [out, *torch.autograd.grad((out * torch.randn(out.shape)).sum(), inputs)]


@pytest.mark.parametrize("bias_samples", [1, SAMPLES])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("at_once", [1, 4])
def test_in_parts_it_is_the_same(
    bias_samples: int, dropout: float, causal: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = results(bias_samples, dropout, causal)
    monkeypatch.setattr(workspace, "LARGEST_SCORES", at_once * HEADS * LENGTH * LENGTH)
    assert attention_samples(SAMPLES, HEADS * LENGTH * LENGTH) == at_once
    for found, expected in zip(results(bias_samples, dropout, causal), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_samples_larger_than_the_limit_are_taken_one_by_one() -> None:
    assert attention_samples(8, 10 * workspace.LARGEST_SCORES) == 1
    assert attention_samples(8, 1) == 8
