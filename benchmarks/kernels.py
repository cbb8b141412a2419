"""Kernels that published programs run and ATen does not have: what they read, write and keep.

A norm that keeps its input and a number for each row; SwiGLU that keeps its two factors (and, of
experts, the weights of tokens); dropout whose mask is drawn where it is used; cross-entropy that
keeps the logits and makes the gradient from them. Such are those of Apex, Transformer Engine,
flash-attn and Liger, and what a compiler makes of the operators. ATen's own keep more: an rms_norm
below float32 two float32 copies of its input, SwiGLU in parts a third tensor, cross-entropy
log-probabilities beside two gradients.

They are rules as those for ops that somebody's model has and autopar does not know: proposed ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from autopar.ir.graph import OperatorGraph, TensorSpec
from autopar.ir.rule import Inner, OpRule, Saved
from autopar.ops.proposals import Proposals, call_key
from autopar.ops.signatures import labels, points, signature

Shapes = tuple[TensorSpec, ...]


def _rms_norm(inputs: Shapes) -> OpRule:
    """Along the last dim."""
    *rows, last = labels(inputs[0].shape)
    x = [*rows, last]
    return OpRule(
        signature([x, [last]], [x]),
        whole=(last,),
        saves=(Saved("input 0"), Saved("input 1"), Saved(points(rows), dtype="float32")),
    )


def _swiglu(inputs: Shapes) -> OpRule:
    """Of a gate and what it lets through, and perhaps a weight for each row."""
    x = labels(inputs[0].shape)
    read = [x, x, [*x[:-1], "1"]][: len(inputs)]
    return OpRule(
        signature(read, [x]), saves=tuple(Saved(f"input {i}") for i in range(len(inputs)))
    )


def _dropout(inputs: Shapes) -> OpRule:
    x = labels(inputs[0].shape)
    return OpRule(signature([x], [x, x]), linear=(0,), saves=(Saved("output 1"),))


def _cross_entropy(inputs: Shapes) -> OpRule:
    """Of logits by sample, class and position. Split by classes, the largest logit and the sum of
    exponentials of each token are reduced; the mean is over the tokens of the batch."""
    sample, _, position = labels(inputs[0].shape)
    tokens = [name for name in (sample, position) if name != "1"]
    row = Inner("classes", "all_reduce", "forward", points(tokens), dtype="float32")
    counted = [Inner(name, "all_reduce", "forward", dtype="float64") for name in tokens]
    return OpRule(
        signature([[sample, "classes", position], [sample, position]], [[]]),
        sums=(*tokens, "classes"),
        special=(*tokens, "classes"),
        inner=(*counted, row, row),
        saves=(Saved("input 0"), Saved("input 1"), Saved(points(tokens), dtype="float32")),
    )


RULES: dict[str, Callable[[Shapes], OpRule]] = {
    "fused.rms_norm.default": _rms_norm,
    "fused.swiglu.default": _swiglu,
    "fused.dropout.default": _dropout,
    "fused.cross_entropy.default": _cross_entropy,
}
"""By op."""


def proposals(graph: OperatorGraph) -> Proposals:
    """A rule for each call of such a kernel in ``graph``."""
    found: dict[str, OpRule] = {}
    for operator in graph.operators:
        if operator.op in RULES:
            inputs = tuple(graph.spec(name) for name in operator.inputs)
            rule = RULES[operator.op](inputs)
            found[call_key(operator, inputs)] = replace(rule, proposed=True)
    return tuple(found.items())


__all__ = ["RULES", "proposals"]
