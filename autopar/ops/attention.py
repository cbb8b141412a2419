"""Scaled dot-product attention, kept whole."""

from __future__ import annotations

from autopar.ir.graph import Operator, TensorSpec
from autopar.ir.rule import Kernel, Kernels, OpRule, Product, RuleMaker, Saved
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
        fused=fused,
        forward=_definition(batch, mask, inputs, causal, dropout > 0.0),
        backward=_definition_backward(batch, mask, inputs, causal, dropout > 0.0),
        saves=_saves(batch, mask, tensors, inputs, fused),
        special=("*",) if differentiable_mask or not fused else (),
    )


def _scores(batch: str, mask: int | None, inputs: Specs, causal: bool) -> Kernels:
    """Of each query and key, in float32 or wider: the product, what it is cast to, the mask."""
    narrow, wide = _pairs(batch, inputs)
    found = [
        Kernel(("input 0", "input 0")),  # scaled
        Kernel(product=Product(batch, "q", "k", "d")),
    ]
    if wide != narrow:
        found.append(Kernel((narrow, wide)))
    if mask is not None and inputs[mask].is_floating:
        found.append(Kernel((wide, "input 3", wide), indexed=1))
    if causal or (mask is not None and not inputs[mask].is_floating):
        found += [Kernel((wide, wide)), Kernel((wide, wide), indexed=1)]  # a copy, filled
    return tuple(found)


def _probabilities(batch: str, inputs: Specs) -> Kernels:
    narrow, wide = _pairs(batch, inputs)
    shifted = (Kernel((wide, wide), indexed=1), Kernel((wide, wide)))
    return (*shifted, Kernel((wide, narrow))) if wide != narrow else shifted


def _pairs(batch: str, inputs: Specs) -> tuple[str, str]:
    """A number for each query and key, narrow and wide."""
    every, dtype = f"{batch} q k".strip(), inputs[0].dtype
    return f"{every}/{dtype}", f"{every}/{accumulation_dtype(dtype)}"


def _definition(batch: str, mask: int | None, inputs: Specs, causal: bool, drops: bool) -> Kernels:
    """What ``runtime.local_ops`` does where no fused kernel does it: the logarithm of sums of
    exponentials takes a largest number, a difference, an exponential and a sum."""
    narrow, wide = _pairs(batch, inputs)
    every = f"{batch} q k".strip()
    rows = (Kernel((wide,)), Kernel((wide, wide), indexed=1), Kernel((wide, wide)), Kernel((wide,)))
    kept = (
        Kernel((f"{every}/bool",)),
        Kernel((narrow, f"{every}/bool", narrow)),
        Kernel((narrow, narrow)),
    )
    return (
        *_scores(batch, mask, inputs, causal),
        *rows,
        *_probabilities(batch, inputs),
        *(kept if drops else ()),
        Kernel(product=Product(batch, "q", "dv", "k")),
        Kernel(("output 0", "output 0")),
    )


def _definition_backward(
    batch: str, mask: int | None, inputs: Specs, causal: bool, drops: bool
) -> Kernels:
    """Scores, probabilities and mask are made again."""
    narrow, _ = _pairs(batch, inputs)
    every = f"{batch} q k".strip()
    dropped = (Kernel((narrow, f"{every}/bool", narrow)), Kernel((narrow, narrow)))
    learned = (Kernel((narrow, "input 3"), needs=(3,)),) if mask is not None else ()
    return (
        *_scores(batch, mask, inputs, causal),
        *_probabilities(batch, inputs),
        Kernel(product=Product(batch, "q", "k", "dv")),
        *((Kernel((f"{every}/bool",)), *dropped, *dropped) if drops else ()),
        Kernel(product=Product(batch, "k", "dv", "q")),
        Kernel(("input 2", "input 2")),
        Kernel(("output 0",) * 3),
        Kernel(("output 0",)),
        Kernel((narrow, narrow), indexed=1),
        Kernel((narrow, narrow, narrow)),
        *learned,
        Kernel((narrow, narrow)),  # scaled
        Kernel(product=Product(batch, "q", "d", "k")),
        Kernel(("input 0", "input 0")),
        Kernel(product=Product(batch, "k", "d", "q")),
        Kernel(("input 1", "input 1")),
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
