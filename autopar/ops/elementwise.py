"""One value in, one value out: activations, arithmetic with broadcasting, comparisons, casts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from autopar.ir.graph import Operator, TensorSpec
from autopar.ir.rule import Kernel, Kernels, OpRule, RuleMaker, Saved
from autopar.ops.signatures import broadcast, labels, points, position, signature

Specs = tuple[TensorSpec, ...]
Linearity = Literal["no", "together", "first", "scaled"]


Backward = Callable[[Specs, Specs], Kernels | None]
"""(specs of the inputs, of the outputs) -> kernels, as ``OpRule.backward``."""


def pointwise(
    *saves: str | Saved,
    linear: Linearity = "no",
    kind: Literal["view", "memory"] = "memory",
    backward: Backward | None = None,
) -> RuleMaker:
    """Any number of tensors, broadcast to the shape of the outputs.

    ``linear``: ``together`` in all inputs at once (a + b, but not a + 1); ``first`` in one tensor
    when the others are fixed (a x b); ``scaled`` in the first tensor only (a / b). ``backward``:
    where it is several kernels.
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
            forward=_indexed(inputs, outputs) if kind == "memory" else None,
            backward=backward(inputs, outputs) if backward else None,
        )

    return make


def _indexed(inputs: Specs, outputs: Specs) -> Kernels | None:
    """Tensors that are broadcast do not lie as the result does; numbers are passed by value."""
    if not any(_is_broadcast(spec, outputs[0]) for spec in inputs):
        return None
    return (Kernel((*_all("input", inputs), *_all("output", outputs)), indexed=1),)


def _is_broadcast(spec: TensorSpec, to: TensorSpec) -> bool:
    return spec.numel < to.numel and bool(spec.shape)


def _all(side: str, specs: Specs) -> list[str]:
    return [f"{side} {i}" for i in range(len(specs))]


OUT = "output 0"


def formula(*kernels: int) -> Backward:
    """Each kernel reads and writes so many tensors like the output (derivatives.yaml of torch has
    the formulas; each of their functions is a kernel)."""
    found = tuple(Kernel((OUT,) * tensors) for tensors in kernels)
    return lambda _inputs, _outputs: found


def each(*gradients: Sequence[Sequence[str]]) -> Callable[[Specs, Specs], Kernels]:
    """For each input, the kernels that make its gradient, as what each reads beside tensors like
    the output, of which it writes the last: the gradient of an input that is broadcast is made for
    all points and summed then."""

    def make(inputs: Specs, outputs: Specs) -> Kernels:
        names = _all("input", inputs)
        found: list[Kernel] = []
        for i, (spec, kernels) in enumerate(zip(inputs, gradients, strict=False)):
            for moves in kernels:
                # a number is no input
                tensors = [what for what in moves if what == OUT or what in names]
                others = [inputs[names.index(what)] for what in tensors if what != OUT]
                broadcast = any(_is_broadcast(other, outputs[0]) for other in others)
                found.append(Kernel(tuple(tensors), needs=(i,), indexed=int(broadcast)))
            if spec.numel < outputs[0].numel:
                found.append(Kernel((OUT, f"input {i}"), needs=(i,)))
        return tuple(found)

    return make


def passed_on(inputs: Specs, outputs: Specs) -> Kernels:
    """Gradients of sums are what comes back, unless an input was broadcast."""
    return each((), ())(inputs, outputs)


def negated(inputs: Specs, outputs: Specs) -> Kernels:
    """Of a difference."""
    return each((), ((OUT, OUT),))(inputs, outputs)


def _linear(
    operator: Operator, inputs: Specs, outputs: Specs, linear: Linearity
) -> tuple[int, ...]:
    if not outputs[0].is_floating or not any(spec.is_floating for spec in inputs):
        return ()
    if linear == "together":
        alone = len(inputs) == 1 and len(_values(operator)) > 1
        return () if alone or not all(x.is_floating for x in inputs) else tuple(range(len(inputs)))
    if linear == "scaled":
        return (0,) if position(operator, 0, "self") == 0 and inputs[0].is_floating else ()
    if linear == "first":
        floating = [i for i, spec in enumerate(inputs) if spec.is_floating]
        return (max(floating, key=lambda i: (inputs[i].numel, -i)),)
    return ()


def _values(operator: Operator) -> tuple[object, ...]:
    return operator.arguments[:2]


def _mentioned(saved: Saved) -> tuple[int, ...]:
    kind, _, index = saved.what.partition(" ")
    return (*saved.needs, int(index)) if kind == "input" else saved.needs


def cast(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Linear when it rounds; a cast from or to integers is not. Only from float32 to what is
    narrower there are kernels that take elements one after the other."""
    linear = inputs[0].is_floating and outputs[0].is_floating
    rule = pointwise(linear="scaled" if linear else "no")(operator, inputs, outputs)
    there, back = (
        (Kernel(("input 0", OUT), indexed=int(_is_converted(*pair))),)
        for pair in ((inputs[0], outputs[0]), (outputs[0], inputs[0]))
    )
    return replace(rule, forward=there, backward=back)


def _is_converted(source: TensorSpec, target: TensorSpec) -> bool:
    narrowed = source.dtype == "float32" and target.dtype in ("bfloat16", "float16")
    return source.dtype != target.dtype and not narrowed


def where(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Linear in both branches together; a number as a branch makes it affine."""
    rule = pointwise(Saved("input 0"))(operator, inputs, outputs)
    both = len(inputs) == 3 and all(spec.is_floating for spec in inputs[1:])
    return replace(rule, linear=(1, 2) if both else ())


def masked_fill(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    rule = pointwise("input 1")(operator, inputs, outputs)
    zero = operator.argument(2, "value") == 0 and inputs[0].is_floating
    mask = "input 1"
    filled = int(_is_broadcast(inputs[1], outputs[0]))
    return replace(
        rule,
        linear=(0,) if zero else (),
        forward=(Kernel(("input 0", OUT)), Kernel((OUT, OUT, mask), indexed=filled)),
        backward=(Kernel((OUT, "input 0")), Kernel((OUT, OUT, mask), indexed=filled)),
    )


def log_sigmoid(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """The CPU kernel keeps a buffer of its own."""
    rule = KEEPS_INPUT(operator, inputs, outputs)
    buffer = Saved(points(labels(outputs[0].shape)))
    return OpRule(rule.signature, saves=(*rule.saves, buffer))


def power(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """x to a number: the first power and the zeroth keep nothing."""
    exponent = operator.argument(1, "exponent")
    keeps = ("input 0",) if exponent not in (0, 1) else ()
    return pointwise(*keeps, backward=formula(2, 2, 3))(operator, inputs, outputs)


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
CLONE = pointwise(linear="scaled", backward=passed_on)
PRODUCT = pointwise(
    Saved("input 0", needs=(1,)),
    Saved("input 1", needs=(0,)),
    linear="first",
    backward=each(((OUT, OUT, "input 1"),), ((OUT, OUT, "input 0"),)),
)
QUOTIENT = pointwise(
    Saved("input 0", needs=(1,)),
    Saved("input 1"),
    linear="scaled",
    backward=each(
        ((OUT, OUT, "input 1"),),
        ((OUT, OUT), ("input 0", "input 1", OUT), (OUT, "input 1", OUT), (OUT, OUT, OUT)),
    ),
)
SUM = pointwise(linear="together", backward=passed_on)
DIFFERENCE = pointwise(linear="together", backward=negated)
SHIFTED = pointwise(backward=passed_on)
KEEPS_BOTH = pointwise("input 0", "input 1")

FORMULAS = {
    "abs": pointwise("input 0", backward=formula(2, 3)),
    "cos": pointwise("input 0", backward=formula(2, 2, 3)),
    "sin": pointwise("input 0", backward=formula(2, 3)),
    "square": pointwise("input 0", backward=formula(2, 2, 3)),
    "reciprocal": pointwise("output 0", backward=formula(2, 2, 3)),
    "rsqrt": pointwise("output 0", backward=formula(2, 2, 3)),
    "sqrt": pointwise("output 0", backward=formula(2, 3)),
}
"""Of one value, with a backward that is not one kernel."""

UNARY_INPUT = (
    "acos acosh asin asinh atan atanh celu clamp clamp_max clamp_min cosh elu erf erfc",
    "erfinv gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu lgamma log log10 log1p log2",
    "logit mish relu6 selu silu sinc sinh softplus softshrink threshold",
)
UNARY_OUTPUT = ("exp exp2 expm1 relu sigmoid tan tanh",)
UNARY_NOTHING = (
    "bitwise_not ceil floor frac full_like isfinite isinf isnan logical_not ones_like round sign",
    "signbit trunc zeros_like",
)
COMPARISONS = ("eq ge gt le lt ne",)
LOGICAL = ("logical_and logical_or logical_xor",)
BITWISE = ("__and__ __or__ __xor__ bitwise_and bitwise_or bitwise_xor __lshift__ __rshift__",)
SHIFTS = ("bitwise_left_shift bitwise_right_shift",)


def _each(lines: tuple[str, ...], rule: RuleMaker, *overloads: str) -> dict[str, RuleMaker]:
    names = " ".join(lines).split()
    return {f"aten.{name}.{overload}": rule for name in names for overload in overloads}


RULES: dict[str, OpRule | RuleMaker] = {
    **_each(UNARY_INPUT, KEEPS_INPUT, "default"),
    **_each(UNARY_OUTPUT, KEEPS_OUTPUT, "default"),
    **{f"aten.{name}.default": rule for name, rule in FORMULAS.items()},
    **_each(UNARY_NOTHING, KEEPS_NOTHING, "default"),
    **_each(COMPARISONS, KEEPS_NOTHING, "Tensor", "Scalar"),
    **_each(LOGICAL, KEEPS_NOTHING, "default"),
    **_each(BITWISE, KEEPS_NOTHING, "Tensor", "Scalar"),
    **_each(SHIFTS, KEEPS_NOTHING, "Tensor", "Tensor_Scalar"),
    "aten.sgn.default": pointwise("input 0", "output 0"),
    "aten.xlogy.Tensor": KEEPS_BOTH,
    "aten.clamp.Tensor": pointwise("input 0", "input 1", "input 2"),
    "aten.clamp_min.Tensor": KEEPS_BOTH,
    "aten.clamp_max.Tensor": KEEPS_BOTH,
    "aten.log_sigmoid.default": log_sigmoid,
    "aten._prelu_kernel.default": KEEPS_BOTH,
    "aten.fill.Scalar": KEEPS_NOTHING,
    "aten.neg.default": COPY,
    "aten.positive.default": IDENTITY,
    "aten.add.Tensor": SUM,
    "aten.add.Scalar": SHIFTED,
    "aten.sub.Tensor": DIFFERENCE,
    "aten.sub.Scalar": SHIFTED,
    "aten.rsub.Tensor": pointwise(linear="together", backward=each(((OUT, OUT),), ())),
    "aten.rsub.Scalar": KEEPS_NOTHING,
    "aten.mul.Tensor": PRODUCT,
    "aten.mul.Scalar": COPY,
    "aten.div.Tensor": QUOTIENT,
    "aten.div.Scalar": COPY,
    "aten.div.Tensor_mode": pointwise(Saved("input 0", needs=(1,)), "input 1"),
    "aten.div.Scalar_mode": KEEPS_NOTHING,
    "aten.floor_divide.default": KEEPS_NOTHING,
    "aten.remainder.Scalar": KEEPS_NOTHING,
    "aten.remainder.Tensor": KEEPS_NOTHING,
    "aten.fmod.Scalar": KEEPS_NOTHING,
    "aten.pow.Tensor_Scalar": power,
    "aten.pow.Scalar": pointwise("input 0", "output 0"),
    "aten.pow.Tensor_Tensor": pointwise("input 0", "input 1", "output 0"),
    "aten.maximum.default": KEEPS_BOTH,
    "aten.minimum.default": KEEPS_BOTH,
    "aten.max.other": KEEPS_BOTH,
    "aten.min.other": KEEPS_BOTH,
    "aten.atan2.default": KEEPS_BOTH,
    "aten.polar.default": KEEPS_OUTPUT,
    "aten.complex.default": pointwise(Saved("input 0", (0,)), Saved("input 1", (1,))),
    "aten.addcmul.default": pointwise(Saved("input 1", (2,)), Saved("input 2", (1,))),
    "aten.addcdiv.default": pointwise(Saved("input 1", (2,)), "input 2"),
    "aten.lerp.Scalar": pointwise(linear="together"),
    "aten.lerp.Tensor": pointwise(Saved("input 0", (2,)), Saved("input 1", (2,)), "input 2"),
    "aten.where.self": where,
    "aten.where.ScalarOther": where,
    "aten.where.ScalarSelf": where,
    "aten.where.Scalar": where,
    "aten.masked_fill.Scalar": masked_fill,
    "aten.masked_fill.Tensor": masked_fill,
    "aten._to_copy.default": cast,
    "aten.to.dtype": cast,
    "aten.to.dtype_layout": cast,
    "aten.clone.default": CLONE,
    "aten.contiguous.default": IDENTITY,
    "aten.alias.default": IDENTITY,
    "aten.detach.default": IDENTITY,
    "aten.lift_fresh_copy.default": CLONE,
    "aten.broadcast_tensors.default": broadcast_tensors,
}
