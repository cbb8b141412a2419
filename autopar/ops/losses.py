"""Losses; a mean is over the global batch, however it is split."""

from __future__ import annotations

from dataclasses import replace

from autopar.ir.graph import Operator, TensorSpec
from autopar.ir.rule import Inner, Kernel, Kernels, OpRule, RuleMaker, Saved
from autopar.ops.reductions import rows_fit
from autopar.ops.signatures import (
    accumulation_dtype,
    broadcast,
    labels,
    points,
    position,
    signature,
)

Specs = tuple[TensorSpec, ...]
NONE, MEAN, SUM = range(3)  # how ATen numbers reductions


def compared(reduction: int, *saves: Saved, keeps_difference: bool = False) -> RuleMaker:
    """Compares two tensors point by point; argument ``reduction`` says what is done with these.

    Without ``saves``, all inputs are kept, or the difference only."""

    def make(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
        shape = max((spec.shape for spec in inputs), key=len)
        names = labels(shape)
        how = operator.argument(reduction, "reduction", MEAN)
        every = tuple(n for n in names if n != "1")
        kept = saves or tuple(Saved(f"input {i}") for i in range(len(inputs)))
        return OpRule(
            signature(
                [broadcast(spec.shape, shape, names) for spec in inputs],
                [names if how == NONE else [] for _ in outputs],
            ),
            sums=() if how == NONE else every,
            special=every if how == MEAN else (),
            saves=(Saved(points(names)),) if keeps_difference else kept,
        )

    return make


def classified(*, normalises: bool) -> RuleMaker:
    """Cross-entropy (``normalises``) and negative log-likelihood, split by tokens and by classes.

    A mean over tokens counts those that are not ignored, by one all-reduce of a number. Split by
    classes, cross-entropy reduces the largest logit and the sum of exponentials of each token, and
    every rank contributes the classes that it has: the logits are never gathered. With class
    weights or with probabilities as target the classes stay whole.
    """

    def make(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
        shape = inputs[0].shape
        probabilities = inputs[1].is_floating
        how = operator.argument(3, "reduction", MEAN)
        weighted = position(operator, 2, "weight") is not None
        smooth = normalises and float(operator.argument(5, "label_smoothing", 0.0)) > 0.0

        classes = "1" if shape[0 if len(shape) == 1 else 1] == 1 else "classes"
        tokens = labels((*shape[:1], *shape[2:]) if len(shape) > 1 else (), "token")
        logits = [classes] if len(shape) == 1 else [tokens[0], classes, *tokens[1:]]
        tensors = [logits, logits if probabilities else tokens] + [[classes]] * weighted
        every = tuple(n for n in tokens if n != "1")
        reduced = () if how == NONE else every
        fixed = weighted or probabilities or classes == "1"

        counted = reduced if how == MEAN else ()
        inner = [
            Inner(name, "all_reduce", "forward", dtype="float64")
            for name in counted
            if not probabilities
        ]
        if normalises and not fixed:
            rows = Inner(
                "classes",
                "all_reduce",
                "forward",
                points(tokens),
                dtype=accumulation_dtype(inputs[0].dtype),
            )
            inner += [rows, rows]
        out = [[] if how == NONE and not tokens else (tokens if how == NONE else [])]
        out += [[] for _ in outputs[1:]]
        return OpRule(
            signature(tensors, out),
            whole=("classes",) if fixed and classes != "1" else (),
            sums=reduced if fixed else (*reduced, "classes"),
            special=counted if fixed else (*counted, "classes"),
            of="loss" if normalises else "",
            forward=_forward(inputs[0], points(logits), points(tokens), normalises),
            backward=_backward(inputs[0], points(logits), normalises),
            inner=tuple(inner),
            saves=(
                Saved(points(logits)) if normalises else Saved("input 0"),
                *([Saved(points(tokens), dtype="bool")] if smooth and not probabilities else []),
                Saved("input 1"),
                *([Saved("input 2")] if weighted else []),
            ),
        )

    return make


def _forward(scores: TensorSpec, every: str, tokens: str, normalises: bool) -> Kernels:
    """A softmax along the classes, then what was picked of it; the classes of a token that several
    ranks have are worked on in float32 or wider, a step at a time."""
    picked = Kernel(("input 1", tokens))
    if not normalises:
        return (picked,)
    wide = f"{every}/{accumulation_dtype(scores.dtype)}"
    apart = ("classes",)
    once = Kernel(
        ("input 0", every),
        again=() if rows_fit(scores, min(1, len(scores.shape) - 1)) else ("input 0",) * 2,
        undivided=apart,
    )
    steps = (
        *([("input 0", wide)] if wide.split("/")[1] != scores.dtype else []),
        (wide,),  # the largest
        (wide, wide),  # less the largest
        (wide, wide),  # exponentials
        (wide,),  # their sum
        (wide, wide),  # less its logarithm
        *([(wide, every)] if wide.split("/")[1] != scores.dtype else []),
    )
    return (once, *(Kernel(moves, divided=apart) for moves in steps), picked)


def _backward(scores: TensorSpec, every: str, normalises: bool) -> Kernels:
    """Gradients of what was picked among zeros, and from these and the softmax those of scores."""
    filled = Kernel(("input 0",))
    if not normalises:
        return (filled,)
    fits = rows_fit(scores, min(1, len(scores.shape) - 1))
    apart = ("classes",)
    return (
        replace(filled, undivided=apart),
        Kernel(
            ("input 0", every, "input 0"),
            again=() if fits else ("input 0",),
            undivided=apart,
        ),
        Kernel((every, "input 0"), divided=apart),
        Kernel(("input 0", "input 0"), divided=apart),
    )


COMPARED = compared(2)

RULES: dict[str, OpRule | RuleMaker] = {
    "aten.cross_entropy_loss.default": classified(normalises=True),
    "aten.nll_loss.default": classified(normalises=False),
    "aten.nll_loss_nd.default": classified(normalises=False),
    "aten.nll_loss2d.default": classified(normalises=False),
    "aten.mse_loss.default": COMPARED,
    "aten.l1_loss.default": compared(2, keeps_difference=True),
    "aten.smooth_l1_loss.default": COMPARED,
    "aten.huber_loss.default": COMPARED,
    "aten.kl_div.default": compared(2, Saved("input 0", (1,)), Saved("input 1")),
    "aten.soft_margin_loss.default": COMPARED,
    "aten.binary_cross_entropy.default": compared(3),
    "aten.binary_cross_entropy_with_logits.default": compared(4),
}
