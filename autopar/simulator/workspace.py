"""What the implementations of operators allocate beside their results, and free again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from autopar.ir.graph import ITEM_BYTES, Operator
from autopar.ir.rule import BoundRule

PASSES_ON: dict[str, tuple[int, ...]] = {
    "aten.add.Tensor": (0, 1),
    "aten.add.Scalar": (0,),
    "aten.sub.Tensor": (0,),
    "aten.sub.Scalar": (0,),
    "aten.clone.default": (0,),
}
"""By op: inputs whose gradient is the output's, the same memory. So it is for views as well."""

CUTS = (
    "aten.slice.",
    "aten.select.",
    "aten.split",
    "aten.chunk.",
    "aten.unbind.",
    "aten.diagonal.",
)
"""Views whose backward allocates all the same."""


def passes_gradient_on(operator: Operator, bound: BoundRule, index: int) -> bool:
    if bound.rule.kind == "view":
        return not operator.op.startswith(CUTS) and len(operator.outputs) == 1
    return index in PASSES_ON.get(operator.op, ())


def workspace_bytes(
    operator: Operator,
    bound: BoundRule,
    sizes: Mapping[str, int],
    read: Sequence[int],
    written: Sequence[int],
) -> tuple[int, int]:
    """Most bytes at once, in the forward and in the backward, beside inputs, outputs, their
    gradients, and what is kept. ``read`` and ``written``: local bytes of inputs and outputs."""
    found = WORKSPACE.get(operator.op)
    if found is None:
        return 0, 0
    return found(_Local(operator, bound, sizes, read, written))


@dataclass(frozen=True)
class _Local:
    """An operator with the sizes that one rank has of it."""

    operator: Operator
    bound: BoundRule
    sizes: Mapping[str, int]
    read: Sequence[int]
    written: Sequence[int]

    def splits(self, factor: str) -> bool:
        return self.sizes.get(factor) != self.bound.sizes.get(factor)


def _cross_entropy(local: _Local) -> tuple[int, int]:
    """The kernel's gradient goes through log-probabilities. Split by classes, all is made again
    from shifted logits, in float32."""
    logits = local.read[0]
    if not local.splits("classes"):
        return 0, logits
    item = ITEM_BYTES[local.bound.input_specs[0].dtype]
    wide = logits // item * max(item, 4)
    return (wide, 0) if wide == logits else (3 * wide, 0)


WORKSPACE: dict[str, Callable[[_Local], tuple[int, int]]] = {
    "aten.cross_entropy_loss.default": _cross_entropy,
}
