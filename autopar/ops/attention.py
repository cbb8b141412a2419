"""Scaled dot-product attention, kept whole."""

from __future__ import annotations

from autopar.ir.graph import Operator, TensorSpec
from autopar.ir.rule import OpRule, Product, RuleMaker, Saved
from autopar.ops.signatures import (
    accumulation_dtype,
    broadcast,
    labels,
    points,
    position,
    signature,
)

Specs = tuple[TensorSpec, ...]


def attention(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Split by batch and heads; by queries too, where no causal mask depends on their position.

    Grouped queries have fewer key heads: ``(heads group)`` query heads meet ``heads`` key heads.
    The fused kernel is used where it exists; dropout, unequal head sizes and masks with a gradient
    have a local implementation that keeps the same: inputs, output and a number for each row.
    """
    q, k, v = (spec.shape for spec in inputs[:3])
    mask = position(operator, 3, "attn_mask")
    dropout = float(operator.argument(4, "dropout_p", 0.0))
    causal = bool(operator.argument(5, "is_causal", False))

    names = labels(q[:-2], "batch")
    key_names = list(names)
    if len(q) > 2:
        if q[-3] == k[-3]:
            names[-1] = key_names[-1] = "heads" if q[-3] > 1 else "1"
        else:
            names[-1] = "(heads group)" if k[-3] > 1 else "group"
            key_names[-1] = "heads" if k[-3] > 1 else "1"
    tensors = [[*names, "q", "d"], [*key_names, "k", "d"], [*key_names, "k", "dv"]]
    if mask is not None:
        shape = inputs[mask].shape
        scores = [*names, "q", "k"]
        tensors.append(broadcast(shape, (*q[:-1], k[-2]), scores))
    batch = points(names)
    grouped = "group" in batch.split()
    fused = dropout == 0.0 and len(q) == 4 and q[-1] == v[-1]
    differentiable_mask = mask is not None and inputs[mask].is_floating
    return OpRule(
        signature(tensors, [[*names, "q", "dv"]]),
        whole=("k", "d", "dv") + (("q",) if causal else ()) + (("group",) if grouped else ()),
        kind="attention",
        products=(Product(batch, "q", "k", "d"), Product(batch, "q", "dv", "k")),
        causal=causal and fused,
        saves=_saves(batch, mask, tensors, inputs, fused),
        special=("*",) if differentiable_mask or not fused else (),
    )


def _saves(
    batch: str, mask: int | None, tensors: list[list[str]], inputs: Specs, fused: bool
) -> tuple[Saved, ...]:
    rows = Saved(f"{batch} q".strip(), dtype=accumulation_dtype(inputs[0].dtype))
    operands = (Saved("input 0"), Saved("input 1"), Saved("input 2"), Saved("output 0"), rows)
    if mask is None:
        return operands
    if fused and not inputs[mask].is_floating:
        return (*operands, Saved(points(tensors[3])))  # the kernel wants zeros and -inf
    return (*operands, Saved("input 3"))


RULES: dict[str, OpRule | RuleMaker] = {
    "aten.scaled_dot_product_attention.default": attention,
}
