"""The rule check finds wrong rules, and the table binds whole models at once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autopar.errors import UnsupportedModelError
from autopar.ir.graph import Operator
from autopar.ir.rule import Inner, OpRule, Saved
from autopar.ops import RULES, bound_rules, rule_for
from autopar.runtime.rule_check import check
from tests.helpers import zoo
from tests.unit.ops.examples import Example, b, e, f, index


def failures_of(example: Example, rule: OpRule) -> str:
    found = check(
        example.operator,
        example.input_specs,
        example.output_specs,
        rule,
        differentiable=example.differentiable,
        draw=example.draw,
    )
    return "\n".join(map(str, found))


WRONG = {
    "any is not a sum over its parts": (
        e("any.dim", b(4, 6), 1),
        OpRule("rows columns -> rows"),  # columns are whole then, and this is right
        "",
    ),
    "the largest of a part is not the largest": (
        e("amax.default", f(4, 6), [1]),
        OpRule("a b -> a", sums=("b",), saves=(Saved("input 0"), Saved("output 0"))),
        "output 0 joined",
    ),
    "picking a class is no sum over classes without masking": (
        e("nll_loss.default", f(12, 6), index(12, below=6, ignored=True), None, 2),
        OpRule(
            "tokens classes, tokens -> ",
            sums=("tokens", "classes"),
            saves=(Saved("input 0"), Saved("input 1")),
        ),
        "a rank raises",
    ),
    "a mean over a part is not a part of the mean": (
        e("mean.dim", f(4, 6), [1]),
        OpRule("rows columns -> rows", sums=("columns",)),
        "output 0 joined",
    ),
    "softmax over a part is not a part of softmax": (
        e("softmax.int", f(4, 6), 1),
        OpRule("rows columns -> rows columns", saves=(Saved("output 0"),)),
        "output 0 joined",
    ),
    "a bias is added once, not by every rank": (
        e("linear.default", f(4, 6), f(12, 6), f(12)),
        OpRule(
            "rows in, out in, out -> rows out",
            sums=("in",),
            saves=(Saved("input 0", (1,)), Saved("input 1", (0,))),
        ),
        "('in',) on (2,), seed 0: output 0 joined",
    ),
    "a product is not linear in both factors together": (
        e("mul.Tensor", f(4, 6), f(4, 6)),
        OpRule(
            "a b, a b -> a b",
            linear=(0, 1),
            saves=(Saved("input 0", (1,)), Saved("input 1", (0,))),
        ),
        "('partial',) on (2,), seed 0: output 0 joined",
    ),
    "gelu of a partial sum is not partial": (
        e("gelu.default", f(4, 6)),
        OpRule("a b -> a b", linear=(0,), saves=(Saved("input 0"),)),
        "('partial',)",
    ),
    "what is kept for the backward is stated": (
        e("exp.default", f(4, 6)),
        OpRule("a b -> a b", saves=(Saved("input 0"),)),
        "autograd keeps ['output 0'], the rule says ['input 0']",
    ),
    "tensors of its own are stated with their bytes": (
        e("layer_norm.default", f(4, 6), [6]),
        OpRule("rows d -> rows d", whole=("d",), saves=(Saved("input 0"), Saved("rows d"))),
        "bytes besides inputs and outputs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("claim", WRONG)
def test_a_wrong_rule_is_caught(claim: str) -> None:
    example, rule, expected = WRONG[claim]
    found = failures_of(example, rule)
    assert expected in found
    assert bool(found) == bool(expected), found


def test_collectives_that_are_not_declared_are_caught() -> None:
    example = e("cross_entropy_loss.default", f(12, 6), index(12, below=6, ignored=True))
    rule = rule_for(example.operator, example.input_specs, example.output_specs)
    assert rule is not None
    assert "the rule declares {}" in failures_of(example, replace(rule, inner=()))
    one_more = Inner("classes", "all_reduce", "backward", "token0")
    assert "did the collectives" in failures_of(
        example, replace(rule, inner=(*rule.inner, one_more))
    )


def test_class_parallel_cross_entropy_never_moves_the_logits() -> None:
    example = e("cross_entropy_loss.default", f(12, 6), index(12, below=6))
    rule = rule_for(example.operator, example.input_specs, example.output_specs)
    assert rule is not None
    assert all("classes" not in inner.points.split() for inner in rule.inner)


def test_equal_operators_share_one_bound_rule() -> None:
    from autopar.extractor import extract

    graph = extract(*zoo.gpt2())
    rules = bound_rules(graph)
    assert set(rules) == {operator.name for operator in graph.operators}
    assert len({id(bound) for bound in rules.values()}) < len(rules) / 2


def test_every_op_without_a_rule_is_listed_with_its_module() -> None:
    from autopar.extractor import extract

    graph = extract(*zoo.mlp())
    strange = tuple(
        replace(o, op=f"strange.{o.op.split('.')[1]}.default", module=f"layer{i}")
        for i, o in enumerate(graph.operators)
    )
    with pytest.raises(UnsupportedModelError) as caught:
        bound_rules(replace(graph, operators=strange))
    message = str(caught.value)
    for operator in {o.op: o for o in reversed(strange)}.values():
        assert operator.op in message
        assert operator.module in message
    assert "add a rule" in message


def test_an_einsum_that_the_table_does_not_cover_has_no_rule() -> None:
    example = e("einsum.default", "ii->i", [f(6, 6)])
    assert rule_for(example.operator, example.input_specs, example.output_specs) is None


def test_an_op_that_is_not_in_the_table_has_no_rule() -> None:
    assert "strange.op.default" not in RULES
    operator = Operator("x", "strange.op.default", ("i0",), ("o0",))
    assert rule_for(operator, (f(4).spec,), (f(4).spec,)) is None
