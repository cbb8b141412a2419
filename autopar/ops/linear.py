"""Matrix products: linear, matmul, bmm, addmm, einsum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_letters

from autopar.ir.graph import Operator, TensorSpec
from autopar.ir.rule import OpRule, Product, RuleMaker, Saved
from autopar.ops.signatures import (
    NoRuleError,
    Shape,
    broadcast,
    labels,
    points,
    signature,
    with_argument,
)

Specs = tuple[TensorSpec, ...]

SAVES_BOTH = (Saved("input 0", needs=(1,)), Saved("input 1", needs=(0,)))


def linear(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """``x @ weight.T + bias``; split on ``in`` with a bias it is row-parallel: the bias is added to
    the sum once."""
    del operator, outputs
    biased = len(inputs) == 3
    return OpRule(
        "... in, out in, out -> ... out" if biased else "... in, out in -> ... out",
        sums=("in",),
        addends=(2,) if biased else (),
        linear=(0, 2) if biased else (0,),
        kind="matmul",
        products=(Product("", "...", "out", "in"),),
        saves=SAVES_BOTH,
    )


def addmm(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """``bias + a @ b`` where the bias is broadcast (GPT-2's Conv1D)."""
    del operator
    names = ["m", "n"]
    bias = broadcast(inputs[0].shape, outputs[0].shape, names)
    return OpRule(
        signature([bias, ["m", "k"], ["k", "n"]], [names]),
        sums=("k",),
        addends=(0,),
        linear=(0, 1),
        kind="matmul",
        products=(Product("", "m", "n", "k"),),
        saves=(Saved("input 1", needs=(2,)), Saved("input 2", needs=(1,))),
    )


def baddbmm(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """``bias + a @ b`` for a batch of matrices."""
    del operator
    names = ["b", "m", "n"]
    bias = broadcast(inputs[0].shape, outputs[0].shape, names)
    return OpRule(
        signature([bias, ["b", "m", "k"], ["b", "k", "n"]], [names]),
        sums=("k",),
        addends=(0,),
        linear=(0, 1),
        kind="matmul",
        products=(Product("b", "m", "n", "k"),),
        saves=(Saved("input 1", needs=(2,)), Saved("input 2", needs=(1,))),
    )


def matmul(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Vectors, matrices and batches of them, with broadcasting of the batch dims."""
    del operator
    a, b = (spec.shape for spec in inputs)
    out = outputs[0]
    batch_shape = out.shape[: len(out.shape) - (len(a) > 1) - (len(b) > 1)]
    batch = labels(batch_shape, "b")
    left = [*broadcast(a[:-2], batch_shape, batch), "m", "k"] if len(a) > 1 else ["k"]
    right = [*broadcast(b[:-2], batch_shape, batch), "k", "n"] if len(b) > 1 else ["k"]
    rows = ["m"] if len(a) > 1 else []
    columns = ["n"] if len(b) > 1 else []
    return OpRule(
        signature([left, right], [[*batch, *rows, *columns]]),
        sums=("k",),
        linear=(0,),
        kind="matmul",
        products=(
            Product(" ".join(x for x in batch if x != "1"), " ".join(rows), " ".join(columns), "k"),
        ),
        saves=SAVES_BOTH,
    )


def einsum(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """One or two operands; each letter is a factor, those absent from the output are summed.

    Raises:
        NoRuleError: three operands, an ellipsis or a repeated letter.
    """
    equation = str(operator.argument(0, "equation")).replace(" ", "")
    left, arrow, right = equation.partition("->")
    operands = left.split(",")
    if "." in equation or len(inputs) > 2 or any(len(set(t)) < len(t) for t in operands):
        raise NoRuleError(f"no rule for einsum {equation!r}")
    if not arrow:
        right = "".join(sorted(c for c in set(left) - {","} if left.count(c) == 1))
    sides = [
        broadcast(spec.shape, spec.shape, list(text))
        for text, spec in zip(operands, inputs, strict=True)
    ]
    (out,) = (spec.shape for spec in outputs)
    everywhere = {name for side in sides for name in side} - {"1"}
    summed = tuple(sorted(everywhere - set(right)))
    rest: dict[str, list[str]] = {"batch": [], "m": [], "n": []}
    for name in sorted(everywhere & set(right)):
        where = [name in side for side in sides]
        rest["batch" if all(where) else "m" if where[0] else "n"].append(name)
    batch, m, n = (" ".join(names) for names in rest.values())
    product = Product(batch, m, n, " ".join(summed))
    contracts = len(inputs) == 2 and bool(summed)
    kept = (
        (_kept(sides, rest, summed, right) if contracts else SAVES_BOTH) if len(inputs) == 2 else ()
    )
    return OpRule(
        signature(sides, [broadcast(out, out, list(right))]),
        sums=summed,
        linear=(0,),
        kind="matmul" if contracts else "memory",
        products=(product,) if contracts else (),
        saves=kept,
        localize=_in_order_of_appearance if arrow else None,
    )


def _in_order_of_appearance(
    operator: Operator, inputs: tuple[Shape, ...], outputs: tuple[Shape, ...]
) -> Operator:
    """Other letters: torch sorts those that it sums, and copies a tensor that has them otherwise.

    A parameter that was gathered would be kept as that copy.
    """
    del inputs, outputs
    equation = str(operator.argument(0, "equation"))
    letters = dict.fromkeys(c for c in equation if c.isalpha())
    renamed = str.maketrans(dict(zip(letters, ascii_letters, strict=False)))
    return with_argument(operator, 0, "equation", equation.translate(renamed))


def _kept(
    sides: Sequence[Sequence[str]],
    free: Mapping[str, Sequence[str]],
    summed: Sequence[str],
    right: str,
) -> tuple[Saved, ...]:
    """The operands of the product of matrices that torch makes of the equation: the inputs, or
    copies of those whose dims are not in its order."""
    found = []
    order = [*right, *(name for side in sides for name in side)]
    for index, (side, own) in enumerate(zip(sides, (free["m"], free["n"]), strict=True)):
        groups = [sorted(group, key=order.index) for group in (free["batch"], own, summed)]
        viewed = all(
            [name for name in side if name in group] == group
            and (not group or _adjacent([side.index(name) for name in group], side))
            for group in groups
        )
        what = f"input {index}" if viewed else points(side)
        found.append(Saved(what, needs=(1 - index,)))
    return tuple(found)


def _adjacent(places: Sequence[int], side: Sequence[str]) -> bool:
    """Whether nothing but dims of size 1 is between the first place and the last."""
    between = side[places[0] : places[-1] + 1]
    return len([name for name in between if name != "1"]) == len(places)


def bilinear(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """``left @ weight[out] @ right + bias``: the bias is added to a sum over either once."""
    del operator, outputs
    biased = len(inputs) == 4
    sides = "... left, ... right, out left right"
    return OpRule(
        f"{sides}, out -> ... out" if biased else f"{sides} -> ... out",
        sums=("left", "right"),
        addends=(3,) if biased else (),
        linear=(0, 3) if biased else (0,),
        kind="matmul",
        products=(Product("", "...", "out left", "right"),),
        saves=(
            Saved("input 0", needs=(1, 2)),
            Saved("input 1", needs=(0, 2)),
            Saved("input 2", needs=(0, 1)),
        ),
    )


DISTANCES = OpRule(
    "... m d, ... n d -> ... m n",
    kind="matmul",
    products=(Product("...", "m", "n", "d"),),
    saves=(Saved("input 0"), Saved("input 1"), Saved("output 0")),
)

RULES: dict[str, OpRule | RuleMaker] = {
    "aten.linear.default": linear,
    "aten.addmm.default": addmm,
    "aten.baddbmm.default": baddbmm,
    "aten.matmul.default": matmul,
    "aten.mm.default": matmul,
    "aten.bmm.default": matmul,
    "aten.mv.default": matmul,
    "aten.dot.default": matmul,
    "aten.vdot.default": matmul,
    "aten.bilinear.default": bilinear,
    "aten._cdist_forward.default": DISTANCES,
    "aten.einsum.default": einsum,
}
