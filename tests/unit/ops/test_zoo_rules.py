"""Every distinct operator of the zoo's models, under every legal split."""

from __future__ import annotations

import pytest
import torch

from autopar.extractor import extract
from autopar.ir.graph import Operator, TensorSpec
from autopar.ir.sharding import Mesh
from autopar.ops import rule_for
from autopar.runtime.rule_check import check, index_data, widened
from tests.helpers.zoo import ZOO

MOST_ELEMENTS = 100_000
MESHES = (Mesh((("a", 2),)), Mesh((("a", 2), ("b", 2))))


def draw(
    operator: Operator, specs: tuple[TensorSpec, ...], i: int, generator: torch.Generator
) -> torch.Tensor | None:
    """Indices in range, variances above zero."""
    op = operator.op.split(".")[1]
    if op == "embedding" and i == 1:
        return index_data(specs[i], specs[0].shape[0], generator)
    if op == "cross_entropy_loss" and i == 1 and not specs[i].is_floating:
        data = index_data(specs[i], specs[0].shape[1], generator)
        data.view(-1)[1:-1:3] = -100
        return data
    if op == "gather" and i == 1:
        return index_data(specs[i], specs[0].shape[operator.argument(1, "dim")], generator)
    if op == "gather_bmm" and i == 2:
        return index_data(specs[i], specs[0].shape[0], generator)
    if op in ("index", "index_select") and i > 0:
        return index_data(specs[i], min(specs[0].shape), generator)
    if "batch_norm" in op and i == 4:
        return torch.rand(specs[i].shape, generator=generator, dtype=torch.float64) + 0.5
    return None


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("model", ZOO)
def test_every_operator_of_a_model_equals_the_whole_under_every_split(
    model: str, dropout: float
) -> None:
    graph = extract(*ZOO[model](dropout))
    seen = set()
    wrong = []
    for operator in graph.operators:
        inputs = tuple(graph.spec(name) for name in operator.inputs)
        outputs = tuple(graph.spec(name) for name in operator.outputs)
        key = (operator.op, operator.arguments, operator.keywords, inputs, outputs)
        if key in seen or any(spec.numel > MOST_ELEMENTS for spec in inputs + outputs):
            continue
        seen.add(key)
        wide = widened(operator, inputs, outputs)
        rule = rule_for(*wide)
        assert rule is not None
        fixed = 3 if "batch_norm" in operator.op else len(inputs)
        failures = check(
            *wide,
            rule,
            meshes=MESHES,
            seeds=(0,),
            draw=draw,
            differentiable=[i for i, x in enumerate(inputs[:fixed]) if x.is_floating],
            saves=False,
        )
        wrong += [f"{operator.op} {rule.signature}: {failure}" for failure in failures[:3]]
    assert not wrong, "\n".join(wrong)
