"""Ops that make tensors from numbers: full, zeros, arange."""

from __future__ import annotations

from autopar.ir.graph import Operator, TensorSpec
from autopar.ir.rule import OpRule, RuleMaker
from autopar.ops.signatures import labels, signature, sizes_from_output

Specs = tuple[TensorSpec, ...]


def filled(size: int, keyword: str = "size") -> RuleMaker:
    """The same value everywhere; argument ``size`` is the shape."""

    def make(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
        del operator
        given = [labels(spec.shape, f"like{i}_") for i, spec in enumerate(inputs)]
        return OpRule(
            signature(given, [labels(outputs[0].shape)]),
            localize=sizes_from_output(size, keyword),
        )

    return make


def counted(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Each rank counts from where its slice starts."""
    del operator
    return OpRule(signature([[] for _ in inputs], [labels(outputs[0].shape)]), special=("d0",))


def undivided(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Every rank makes all of it."""
    del operator
    names = labels(outputs[0].shape)
    return OpRule(
        signature([labels(spec.shape, f"like{i}_") for i, spec in enumerate(inputs)], [names]),
        whole=tuple(name for name in names if name != "1"),
    )


def one_hot(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    del operator
    names = labels(inputs[0].shape)
    classes = "1" if outputs[0].shape[-1] == 1 else "classes"
    return OpRule(
        signature([names], [[*names, classes]]), whole=("classes",) if classes != "1" else ()
    )


FILLED = filled(0)
NEW = filled(1)

READ_NO_VALUES = frozenset(
    {"aten.new_zeros.default", "aten.new_ones.default", "aten.new_full.default"}
)
"""Ops that ask a tensor for its dtype and device only."""

COUNTERS = {"aten.arange.default": 0, "aten.arange.start": 1, "aten.arange.start_step": 1}
"""Ops that count, and which argument is the end."""

RULES: dict[str, OpRule | RuleMaker] = {
    "aten.full.default": FILLED,
    "aten.zeros.default": FILLED,
    "aten.ones.default": FILLED,
    "aten.new_zeros.default": NEW,
    "aten.new_ones.default": NEW,
    "aten.new_full.default": NEW,
    "aten.scalar_tensor.default": undivided,
    "aten.arange.default": counted,
    "aten.arange.start": counted,
    "aten.arange.start_step": counted,
    "aten.linspace.default": undivided,
    "aten.eye.default": undivided,
    "aten.eye.m": undivided,
    "aten.one_hot.default": one_hot,
}
