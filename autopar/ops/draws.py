"""Ops that draw random numbers: each is a function of its global index, so every split and every
replica draws the same. No gradient passes through them."""

from __future__ import annotations

from dataclasses import replace

from autopar.ir.graph import Operator, TensorSpec
from autopar.ir.rule import OpRule, RuleMaker
from autopar.ops.elementwise import KEEPS_NOTHING
from autopar.ops.factories import filled, undivided

Specs = tuple[TensorSpec, ...]


def drawn(like: RuleMaker) -> RuleMaker:
    """Split as ``like``, and always drawn by the runtime."""

    def make(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
        return replace(like(operator, inputs, outputs), special=("*",))

    return make


def draws(op: str) -> bool:
    """Whether every call of the op depends on random numbers (attention's may, by its argument)."""
    return op in RULES or "dropout" in op


LIKE = drawn(KEEPS_NOTHING)

RULES: dict[str, OpRule | RuleMaker] = {
    "aten.rand.default": drawn(filled(0)),
    "aten.randn.default": drawn(filled(0)),
    "aten.randint.default": drawn(filled(1)),
    "aten.randint.low": drawn(filled(2)),
    "aten.randperm.default": drawn(undivided),
    "aten.rand_like.default": LIKE,
    "aten.randn_like.default": LIKE,
    "aten.randint_like.default": LIKE,
    "aten.randint_like.low_dtype": LIKE,
    "aten.bernoulli.default": LIKE,
    "aten.bernoulli.p": LIKE,
    "aten.uniform.default": LIKE,
    "aten.exponential.default": LIKE,
    "aten.normal_functional.default": LIKE,
    "aten.normal.Tensor_Tensor": LIKE,
}
