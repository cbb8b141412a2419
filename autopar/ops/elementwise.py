"""One value in, one value out: activations, arithmetic with broadcasting, comparisons, casts."""

from __future__ import annotations

from typing import Literal

from autopar.ir.graph import Operator, TensorSpec
from autopar.ir.rule import OpRule, RuleMaker, Saved
from autopar.ops.signatures import broadcast, labels, position, signature

Specs = tuple[TensorSpec, ...]
Linearity = Literal["no", "together", "first", "scaled"]


def pointwise(
    *saves: str | Saved, linear: Linearity = "no", kind: Literal["view", "memory"] = "memory"
) -> RuleMaker:
    """Any number of tensors, broadcast to the shape of the outputs.

    ``linear``: ``together`` in all inputs at once (a + b, but not a + 1); ``first`` in one tensor
    when the others are fixed (a x b); ``scaled`` in the first tensor only (a / b).
    """
    kept = tuple(Saved(what) if isinstance(what, str) else what for what in saves)

    def make(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
        shape = outputs[0].shape
        names = labels(shape)
        tensors = [broadcast(spec.shape, shape, names) for spec in inputs]
        return OpRule(
            signature(tensors, [broadcast(spec.shape, shape, names) for spec in outputs]),
            linear=_linear(operator, inputs, outputs, linear),
            kind=kind,
            saves=tuple(s for s in kept if all(i < len(inputs) for i in _mentioned(s))),
        )

    return make


def _linear(
    operator: Operator, inputs: Specs, outputs: Specs, linear: Linearity
) -> tuple[int, ...]:
    if not inputs or not outputs[0].is_floating or not inputs[0].is_floating:
        return ()
    if linear == "together":
        alone = len(inputs) == 1 and len(_values(operator)) > 1
        return () if alone or not all(x.is_floating for x in inputs) else tuple(range(len(inputs)))
    if linear == "scaled":
        return (0,) if position(operator, 0, "self") == 0 else ()
    if linear == "first":
        whole = (i for i, spec in enumerate(inputs) if spec.shape == outputs[0].shape)
        return (next(whole, 0),)
    return ()


def _values(operator: Operator) -> tuple[object, ...]:
    return operator.arguments[:2]


def _mentioned(saved: Saved) -> tuple[int, ...]:
    kind, _, index = saved.what.partition(" ")
    return (*saved.needs, int(index)) if kind == "input" else saved.needs


def cast(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Linear when it rounds; a cast from or to integers is not."""
    linear = inputs[0].is_floating and outputs[0].is_floating
    return pointwise(linear="scaled" if linear else "no")(operator, inputs, outputs)


def where(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Linear in both branches together; a number as a branch makes it affine."""
    rule = pointwise(Saved("input 0"))(operator, inputs, outputs)
    both = len(inputs) == 3 and all(spec.is_floating for spec in inputs[1:])
    return OpRule(rule.signature, linear=(1, 2) if both else (), saves=rule.saves)


def masked_fill(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    rule = pointwise(Saved("input 1", needs=(0,)))(operator, inputs, outputs)
    zero = operator.argument(2, "value") == 0 and inputs[0].is_floating
    return OpRule(rule.signature, linear=(0,) if zero else (), saves=rule.saves)


def power(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """x to a number: the first power and the zeroth keep nothing."""
    exponent = operator.argument(1, "exponent")
    keeps = ("input 0",) if exponent not in (0, 1) else ()
    return pointwise(*keeps)(operator, inputs, outputs)


def broadcast_tensors(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Every input expanded to the common shape."""
    del operator
    shape = outputs[0].shape
    names = labels(shape)
    return OpRule(
        signature(
            [broadcast(spec.shape, shape, names) for spec in inputs], [names for _ in outputs]
        ),
        linear=tuple(range(len(inputs))) if all(x.is_floating for x in inputs) else (),
        kind="view",
    )


KEEPS_NOTHING = pointwise()
KEEPS_INPUT = pointwise("input 0")
KEEPS_OUTPUT = pointwise("output 0")
IDENTITY = pointwise(linear="scaled", kind="view")
COPY = pointwise(linear="scaled")
PRODUCT = pointwise(Saved("input 0", needs=(1,)), Saved("input 1", needs=(0,)), linear="first")
QUOTIENT = pointwise(Saved("input 0", needs=(1,)), Saved("input 1"), linear="scaled")
SUM = pointwise(linear="together")
KEEPS_BOTH = pointwise("input 0", "input 1")

UNARY_INPUT = [
    "gelu",
    "silu",
    "log",
    "log2",
    "log10",
    "log1p",
    "cos",
    "sin",
    "erf",
    "erfc",
    "erfinv",
    "abs",
    "hardswish",
    "hardsigmoid",
    "mish",
    "elu",
    "selu",
    "celu",
    "softplus",
    "leaky_relu",
    "hardtanh",
    "relu6",
    "atan",
    "asin",
    "acos",
    "sinh",
    "cosh",
    "asinh",
    "acosh",
    "atanh",
    "square",
    "lgamma",
    "hardshrink",
    "softshrink",
    "threshold",
    "clamp",
    "clamp_min",
    "clamp_max",
    "sinc",
    "xlogy",
    "logit",
]
UNARY_OUTPUT = [
    "relu",
    "tanh",
    "sigmoid",
    "exp",
    "exp2",
    "expm1",
    "sqrt",
    "rsqrt",
    "reciprocal",
    "tan",
]
UNARY_NOTHING = [
    "sign",
    "sgn",
    "floor",
    "ceil",
    "round",
    "trunc",
    "frac",
    "isnan",
    "isinf",
    "isfinite",
    "logical_not",
    "bitwise_not",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "signbit",
]
COMPARISONS = ["eq", "ne", "lt", "le", "gt", "ge"]
LOGICAL = ["logical_and", "logical_or", "logical_xor"]
BITWISE = [
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
    "__and__",
    "__or__",
    "__xor__",
    "bitwise_left_shift",
    "bitwise_right_shift",
    "__lshift__",
    "__rshift__",
]

RULES: dict[str, OpRule | RuleMaker] = {
    **{f"aten.{name}.default": KEEPS_INPUT for name in UNARY_INPUT},
    **{f"aten.{name}.default": KEEPS_OUTPUT for name in UNARY_OUTPUT},
    **{f"aten.{name}.default": KEEPS_NOTHING for name in UNARY_NOTHING},
    **{f"aten.{n}.{kind}": KEEPS_NOTHING for n in COMPARISONS for kind in ("Tensor", "Scalar")},
    **{f"aten.{n}.default": KEEPS_NOTHING for n in LOGICAL},
    **{f"aten.{n}.{kind}": KEEPS_NOTHING for n in BITWISE for kind in ("Tensor", "Scalar")},
    "aten.clamp.Tensor": pointwise("input 0", "input 1", "input 2"),
    "aten.clamp_min.Tensor": KEEPS_BOTH,
    "aten.clamp_max.Tensor": KEEPS_BOTH,
    "aten.log_sigmoid.default": pointwise("input 0"),
    "aten.neg.default": COPY,
    "aten.positive.default": IDENTITY,
    "aten.add.Tensor": SUM,
    "aten.add.Scalar": KEEPS_NOTHING,
    "aten.sub.Tensor": SUM,
    "aten.sub.Scalar": KEEPS_NOTHING,
    "aten.rsub.Tensor": SUM,
    "aten.rsub.Scalar": KEEPS_NOTHING,
    "aten.mul.Tensor": PRODUCT,
    "aten.mul.Scalar": COPY,
    "aten.div.Tensor": QUOTIENT,
    "aten.div.Scalar": COPY,
    "aten.div.Tensor_mode": KEEPS_NOTHING,
    "aten.div.Scalar_mode": KEEPS_NOTHING,
    "aten.floor_divide.default": KEEPS_NOTHING,
    "aten.remainder.Scalar": KEEPS_NOTHING,
    "aten.remainder.Tensor": KEEPS_NOTHING,
    "aten.fmod.Scalar": KEEPS_NOTHING,
    "aten.pow.Tensor_Scalar": power,
    "aten.pow.Scalar": KEEPS_OUTPUT,
    "aten.pow.Tensor_Tensor": pointwise("input 0", "input 1", "output 0"),
    "aten.maximum.default": KEEPS_BOTH,
    "aten.minimum.default": KEEPS_BOTH,
    "aten.max.other": KEEPS_BOTH,
    "aten.min.other": KEEPS_BOTH,
    "aten.atan2.default": KEEPS_BOTH,
    "aten.addcmul.default": pointwise(Saved("input 1", (2,)), Saved("input 2", (1,))),
    "aten.addcdiv.default": pointwise(Saved("input 1", (2,)), "input 2"),
    "aten.lerp.Scalar": pointwise(linear="together"),
    "aten.lerp.Tensor": KEEPS_BOTH,
    "aten.where.self": where,
    "aten.where.ScalarOther": where,
    "aten.where.ScalarSelf": where,
    "aten.where.Scalar": where,
    "aten.masked_fill.Scalar": masked_fill,
    "aten.masked_fill.Tensor": masked_fill,
    "aten._to_copy.default": cast,
    "aten.to.dtype": cast,
    "aten.to.dtype_layout": cast,
    "aten.clone.default": COPY,
    "aten.contiguous.default": COPY,
    "aten.alias.default": IDENTITY,
    "aten.detach.default": IDENTITY,
    "aten.lift_fresh_copy.default": COPY,
    "aten.broadcast_tensors.default": broadcast_tensors,
}
