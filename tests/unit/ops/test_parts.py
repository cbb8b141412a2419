"""Dims that are made as one and taken apart later can be divided, each part of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from autopar.extractor import extract
from autopar.ir.graph import Operator, OperatorGraph
from autopar.ir.sharding import Mesh
from autopar.ops import bound_rules
from autopar.runtime.rule_check import check
from autopar.simulator.edges import Rules

MESHES = (Mesh((("a", 2),)), Mesh((("a", 2), ("b", 2))))
WIDTH, HEADS, TOKENS = 8, 4, 4


class Fused(nn.Module):
    """``take`` makes of (x, its fused projection to ``out``) what is summed to the loss."""

    def __init__(self, out: int, take: Callable[..., Tensor], conv: bool = False) -> None:
        super().__init__()
        self.fused = nn.Conv1d(WIDTH, out, 1) if conv else nn.Linear(WIDTH, out)
        self.take = take

    def forward(self, x: Tensor) -> Tensor:
        return self.take(x, self.fused(x)).square().sum()


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 2)).transpose(1, 2)

    return F.scaled_dot_product_attention(heads(q), heads(k), heads(v), enable_gqa=True)


def by_split(x: Tensor, y: Tensor) -> Tensor:
    return attended(*y.split(WIDTH, dim=-1))


def by_chunk(x: Tensor, y: Tensor) -> Tensor:
    gate, value = y.chunk(2, dim=-1)
    return F.silu(gate) * value


def of_unequal_sizes(x: Tensor, y: Tensor) -> Tensor:
    return attended(*torch.split(y, [8, 4, 4], dim=-1))


def by_slices(x: Tensor, y: Tensor) -> Tensor:
    return attended(y[..., :8], y[..., 8:12], y[..., -4:])


def by_unbind(x: Tensor, y: Tensor) -> Tensor:
    q, k, v = y.reshape(2, TOKENS, 3, HEADS, 2).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v)


def by_select(x: Tensor, y: Tensor) -> Tensor:
    parts = y.unflatten(-1, (3, WIDTH)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    return attended(parts[0], parts[1], parts[2])


def in_heads(x: Tensor, y: Tensor) -> Tensor:
    """Taken apart by heads: 4 of the query, 2 of the key, 2 of the value."""
    q, k, v = y.view(2, TOKENS, 8, 2).split([4, 2, 2], dim=2)
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), enable_gqa=True)


def in_two_steps(x: Tensor, y: Tensor) -> Tensor:
    """Half of it is the query, what is left is taken apart after a nonlinearity."""
    q, rest = y.split([8, 8], dim=-1)
    k, v = torch.tanh(rest).chunk(2, dim=-1)
    return attended(q, k, v)


def after_a_scale(x: Tensor, y: Tensor) -> Tensor:
    return by_chunk(x, (y * 0.5).to(torch.float64) + 1.0)


def by_channels(x: Tensor, y: Tensor) -> Tensor:
    q, k, v = y.chunk(3, dim=1)
    return torch.softmax(q * k, dim=-1) * v


FUSED = {
    "split": (Fused(24, by_split), "S(2,3)"),
    "chunk": (Fused(16, by_chunk), "S(2,2)"),
    "unequal": (Fused(16, of_unequal_sizes), "S(2,2:1:1)"),
    "slices": (Fused(16, by_slices), "S(2,2:1:1)"),
    "unbind": (Fused(24, by_unbind), "S(2,3)"),
    "select": (Fused(24, by_select), "S(2,3)"),
    "heads": (Fused(16, in_heads), "S(2,2:1:1)"),
    "two steps": (Fused(16, in_two_steps), "S(2,2:1:1)"),
    "scaled": (Fused(16, after_a_scale), "S(2,2)"),
    "convolution": (Fused(24, by_channels, conv=True), "S(1,3)"),
}


def graph_of(module: nn.Module, *shape: int) -> OperatorGraph:
    return extract(module.double(), (torch.randn(shape, dtype=torch.float64),))


def graph_named(name: str) -> OperatorGraph:
    module, _ = FUSED[name]
    shape = (2, WIDTH, TOKENS) if name == "convolution" else (2, TOKENS, WIDTH)
    return graph_of(module, *shape)


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_projection_divides_each_of_its_parts(name: str) -> None:
    graph = graph_named(name)
    rules = bound_rules(graph)
    (product,) = (o for o in graph.operators if rules[o.name].rule.products and "fused" in o.name)
    (factor,) = {joined.factor for joined in rules[product.name].rule.joined}
    (data, weight, bias), (made,) = rules[product.name].placements(factor)
    assert made == FUSED[name][1]
    parts = made.removeprefix("S(").partition(",")[2]
    assert (data, weight, bias) == ("R", f"S(0,{parts}", f"S(0,{parts}")


@pytest.mark.parametrize("name", FUSED)
def test_from_there_to_the_parts_nothing_has_to_be_moved(name: str) -> None:
    """Each operator up to the parts takes what the one before it makes, and gives ordinary
    shards of the parts."""
    graph = graph_named(name)
    rules = bound_rules(graph)
    changed = [o for o in graph.operators if rules[o.name].rule.joined]
    ends = 0
    for operator in changed:
        bound = rules[operator.name]
        for factor in {joined.factor for joined in bound.rule.joined}:
            for tensor, placement in zip(
                operator.outputs, bound.placements(factor)[1], strict=True
            ):
                readers = [o for o, _ in graph.consumers[tensor]]
                if "," in placement:
                    assert any(_takes(rules, o, tensor, placement) for o in readers)
                else:
                    ends += 1
    assert ends >= 1


def _takes(rules: Rules, operator: Operator, tensor: str, placement: str) -> bool:
    bound = rules[operator.name]
    position = operator.inputs.index(tensor)
    return any(bound.placements(f)[0][position] == placement for f in bound.factors)


@pytest.mark.parametrize("name", FUSED)
def test_every_split_in_parts_equals_the_whole(name: str) -> None:
    graph = graph_named(name)
    rules = bound_rules(graph)
    for operator in graph.operators:
        bound = rules[operator.name]
        if bound.rule.joined:
            failures = check(
                operator,
                bound.input_specs,
                bound.output_specs,
                bound.rule,
                meshes=MESHES,
                seeds=(0,),
            )
            assert not failures, (operator.op, bound.rule, failures[:3])


def test_a_wrong_part_is_found_by_that_check() -> None:
    """Unequal parts taken for equal ones."""
    graph = graph_named("unequal")
    bound = next(b for b in bound_rules(graph).values() if b.rule.joined and b.rule.kind == "view")
    (operator,) = (o for o in graph.operators if "split" in o.op)
    wrong = replace(bound.rule, joined=tuple(replace(j, parts=(1, 1)) for j in bound.rule.joined))
    assert check(operator, bound.input_specs, bound.output_specs, wrong, meshes=MESHES[:1])


def heads_by_halves(x: Tensor, y: Tensor) -> Tensor:
    """Rotary embedding: the parts are inside each head, and heads are divided as they are."""
    heads = y.unflatten(-1, (HEADS, 4))
    return torch.cat([-heads[..., 2:], heads[..., :2]], dim=-1)


def parts_of_each_head(x: Tensor, y: Tensor) -> Tensor:
    q, k = y.unflatten(-1, (HEADS, 4)).chunk(2, dim=-1)
    return q * k


def one_token(x: Tensor, y: Tensor) -> Tensor:
    return y[:, 0]


def after_a_norm(x: Tensor, y: Tensor) -> Tensor:
    return by_chunk(x, F.layer_norm(y, (16,)))


def of_the_input(x: Tensor, y: Tensor) -> Tensor:
    return (x[..., :4] * x[..., 4:]).sum() + y


def one_by_one(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack(y.unbind(-1)[:3])


def windows(x: Tensor, y: Tensor) -> Tensor:
    """Where windows overlap and what they make is taken apart, parts meet everywhere."""
    return (y[..., 1:] * y[..., :-1]).split([5, y.shape[-1] - 6], dim=-1)[0]


def through_a_view_that_regroups(x: Tensor, y: Tensor) -> Tensor:
    return by_chunk(x, y.unflatten(-1, (4, 4)).transpose(-1, -2).flatten(-2))


@pytest.mark.parametrize("width", [16, 700])
def test_overlapping_windows_are_left_as_they_are(width: int) -> None:
    graph = graph_of(Fused(width, windows), 2, TOKENS, WIDTH)
    assert not any(bound.rule.joined for bound in bound_rules(graph).values())


@pytest.mark.parametrize(
    "take",
    [
        through_a_view_that_regroups,
        heads_by_halves,
        parts_of_each_head,
        one_token,
        after_a_norm,
        of_the_input,
        one_by_one,
    ],
)
def test_what_no_product_makes_in_parts_is_left_as_it_is(take: Callable[..., Tensor]) -> None:
    graph = graph_of(Fused(16, take), 2, TOKENS, WIDTH)
    assert not any(bound.rule.joined for bound in bound_rules(graph).values())


def test_two_readers_that_take_a_dim_apart_differently_give_it_the_parts_of_both() -> None:
    def take(x: Tensor, y: Tensor) -> Tensor:
        return by_chunk(x, y).sum() + torch.cat([y[..., 4:8], y[..., :4]], dim=-1)

    graph = graph_of(Fused(16, take), 2, TOKENS, WIDTH)
    product = next(b for b in bound_rules(graph).values() if b.rule.products)
    assert product.placements("out")[1] == ("S(2,1:1:2)",)


def test_each_part_has_to_be_divided_exactly() -> None:
    bound = next(b for b in bound_rules(graph_named("unequal")).values() if b.rule.products)
    assert bound.sizes["out"] == 16
    assert bound.limits["out"] == 4
    assert bound.divides(("out",), Mesh((("a", 4),)))
    assert not bound.divides(("out",), Mesh((("a", 8),)))
    assert ("a", "out") in bound.refused(Mesh((("a", 8),)))
