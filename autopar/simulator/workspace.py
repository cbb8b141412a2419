"""What the implementations of operators allocate beside their results, and free again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from autopar.ir.graph import ITEM_BYTES, Operator
from autopar.ir.rule import BoundRule, Dim
from autopar.ops.grouped import GATHER_BMM

PASSES_ON: dict[str, tuple[int, ...]] = {
    "aten.add.Tensor": (0, 1),
    "aten.add.Scalar": (0,),
    "aten.sub.Tensor": (0,),
    "aten.sub.Scalar": (0,),
    "aten.clone.default": (0,),
}
"""By op: inputs whose gradient is the output's, the same memory. So it is for views as well."""

CAT = "aten.cat.default"
"""Whose gradients are parts of that of its result, the same memory."""

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
    return operator.op == CAT or index in PASSES_ON.get(operator.op, ())


def workspace_bytes(
    operator: Operator,
    bound: BoundRule,
    sizes: Mapping[str, int],
    differentiable: Sequence[bool],
    read: Sequence[int],
    written: Sequence[int],
) -> tuple[int, int]:
    """Most bytes at once, in the forward and in the backward, beside inputs, outputs, their
    gradients, and what is kept. ``read`` and ``written``: local bytes of inputs and outputs."""
    found = WORKSPACE.get(operator.op)
    if found is None:
        forward, backward = bound.rule.workspace
        return _bytes(forward, sizes), _bytes(backward, sizes)
    return found(_Local(operator, bound, sizes, differentiable, read, written))


def _bytes(temporaries: Sequence[str], sizes: Mapping[str, int]) -> int:
    """Of factors, with their dtype after a slash."""
    pairs = (of.split("/") for of in temporaries)
    return sum(prod(sizes[n] for n in names.split()) * ITEM_BYTES[dtype] for names, dtype in pairs)


@dataclass(frozen=True)
class _Local:
    """An operator with the sizes that one rank has of it."""

    operator: Operator
    bound: BoundRule
    sizes: Mapping[str, int]
    differentiable: Sequence[bool]
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


_MASK_BYTES = 2 * ITEM_BYTES["int64"]
"""Of an element of a dropout mask while it is hashed: the state, and the state shifted."""


def _dropout(local: _Local) -> tuple[int, int]:
    """The mask is hashed before there is a result."""
    out = local.written[0]
    elements = out // ITEM_BYTES[local.bound.output_specs[0].dtype]
    return max(0, (_MASK_BYTES - 1) * elements - out), 0


def _drawn(more_bytes: int = 0) -> Callable[[_Local], tuple[int, int]]:
    """Hashes before there are numbers; ``more_bytes``: of an element, held meanwhile."""

    def workspace(local: _Local) -> tuple[int, int]:
        out = local.written[0]
        elements = out // ITEM_BYTES[local.bound.output_specs[0].dtype]
        return max(0, (_MASK_BYTES + more_bytes) * elements - out), 0

    return workspace


def _normal(local: _Local) -> tuple[int, int]:
    """The radius, in float32 or wider, waits for its angle."""
    return _drawn(max(4, ITEM_BYTES[local.bound.output_specs[0].dtype]))(local)


def _fourier_to_complex(local: _Local) -> tuple[int, int]:
    """Backward, the gradient is filled up to all frequencies and transformed as complex numbers."""
    return 0, 3 * local.read[0]


def _fourier_to_real(local: _Local) -> tuple[int, int]:
    """The transform works in a copy of its input."""
    return local.read[0], 0


def _einsum(local: _Local) -> tuple[int, int]:
    """As a product where nothing is summed."""
    return _product_backward(local) if local.bound.rule.kind == "memory" else (0, 0)


def _attention(local: _Local) -> tuple[int, int]:
    """By its definition: scores in float32 or wider, probabilities, their gradients, and the mask,
    all for each query and key. The fused kernels have none of these."""
    if attends_fused(local.operator, local.bound, local.differentiable):
        return 0, 0
    dropout = _attention_dropout(local.operator)
    q = local.bound.input_specs[0]
    item = ITEM_BYTES[q.dtype]
    wide = max(item, 4)
    scores = _product(local, local.bound.inputs[0][:-1])
    scores *= _product(local, local.bound.inputs[1][-2:-1])
    share, gradient = 1.0, 0
    if len(q.shape) == 4:
        gradient = local.written[
            0
        ]  # products of heads that lie beside each other copy both factors
        samples = _product(local, local.bound.inputs[0][:1])
        share = attention_samples(samples, scores // samples) / samples
    narrowed = item if item < wide else 0
    mask = _MASK_BYTES * dropout
    forward = max(
        scores * max(2 * wide + narrowed, wide + item + mask),
        scores * (wide + item) + local.written[0],
    )
    backward = max(
        scores * max(2 * wide + narrowed, 2 * item + mask, (3 * item + 1) * dropout),
        scores * 2 * item + max(local.read[:3]) + gradient,
    )
    return int(share * forward), int(share * backward)


def attends_fused(operator: Operator, bound: BoundRule, differentiable: Sequence[bool]) -> bool:
    """Whether attention is done by a fused kernel."""
    q, _, v = bound.input_specs[:3]
    learned = len(bound.input_specs) > 3 and differentiable[3]
    plain = len(q.shape) == 4 and q.shape[-1] == v.shape[-1]
    return plain and not learned and not _attention_dropout(operator)


def _attention_dropout(operator: Operator) -> bool:
    return float(operator.argument(4, "dropout_p", 0.0)) > 0.0


LARGEST_SCORES = 2**24
"""Scores that attention by definition works on at once: a few hundred megabytes with all that is
made of them, and enough for a GPU to be busy."""


def attention_samples(samples: int, scores: int) -> int:
    """How many samples attention by definition takes at a time; ``scores``: those of a sample."""
    return min(samples, max(1, LARGEST_SCORES // max(1, scores)))


UPDATE_BYTES = 2**28
"""Of what the optimizer updates at once: with their gradients cast and clipped and Adam's
denominators, well under a gigabyte; on a GPU enough for a few long kernels."""


def update_groups(sizes: Mapping[str, int]) -> list[list[str]]:
    """Parameters that are updated together, in order, by the bytes of what is updated.

    >>> update_groups({"a": 2**27, "b": 2**27, "c": 2**20, "d": 2**30})
    [['a', 'b'], ['c'], ['d']]
    """
    groups: list[list[str]] = []
    total = UPDATE_BYTES + 1
    for name, size in sizes.items():
        if total + size > UPDATE_BYTES:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    return groups


def _product(local: _Local, dims: Sequence[Dim]) -> int:
    return prod(local.sizes[factor] for dim in dims for factor in dim)


def _formula(temporaries: int) -> Callable[[_Local], tuple[int, int]]:
    """A backward that is written as a formula of several tensors of the output's size."""

    def workspace(local: _Local) -> tuple[int, int]:
        return 0, temporaries * local.written[0]

    return workspace


def _product_backward(local: _Local) -> tuple[int, int]:
    """The gradient of a factor that is broadcast is made for all points, then summed."""
    out = local.written[0]
    pairs = zip(local.read, local.differentiable, strict=True)
    return 0, out if any(needed and size < out for size, needed in pairs) else 0


def _gathered(local: _Local) -> tuple[int, int]:
    """Rows and results in the order of their matrices, and that order; backward gradients so, and
    rows or their gradients."""
    table = int(local.operator.argument(3, "table"))
    rows, out = local.read[1 - table], local.written[0]
    order = local.sizes["rows"] * ITEM_BYTES["int64"]
    return order + max(rows, out), order + rows + out


def _grouped(local: _Local) -> tuple[int, int]:
    """As ``_gathered``, where a rank has some of the groups; what has all of them in their order
    already is multiplied as it is."""
    if not local.splits("groups") or "rows" not in local.sizes:
        return 0, 0
    order = local.sizes["rows"] * ITEM_BYTES["int64"]
    tensors = zip(
        (*local.read, *local.written), local.bound.inputs + local.bound.outputs, strict=True
    )
    first, second = (size for size, dims in tensors if ("rows",) in dims)
    summed = ("rows",) not in local.bound.outputs[0]
    forward = first + second if summed else max(first, second)
    return order + forward, order + first + second


def _quotient_backward(local: _Local) -> tuple[int, int]:
    return 0, 3 * local.written[0] if local.differentiable[-1] else 0


def _batch_norm(local: _Local) -> tuple[int, int]:
    """With statistics over several ranks it is a formula, in float32 or wider, to which input and
    gradient are cast; the plain kernel has no workspace."""
    if not any(map(local.splits, local.bound.rule.special)):
        return 0, 0
    narrow = local.read[0]
    item = ITEM_BYTES[local.bound.input_specs[0].dtype]
    wide = narrow // item * max(item, 4)
    if wide == narrow:
        return 2 * wide, 3 * wide
    return 4 * wide - narrow, 5 * wide - narrow


WORKSPACE: dict[str, Callable[[_Local], tuple[int, int]]] = {
    "aten._native_batch_norm_legit_functional.default": _batch_norm,
    "aten._grouped_mm.default": _grouped,
    GATHER_BMM: _gathered,
    "aten.abs.default": _formula(1),
    "aten.cos.default": _formula(1),
    "aten.bernoulli.default": _drawn(),
    "aten.bernoulli.p": _drawn(),
    "aten.cross_entropy_loss.default": _cross_entropy,
    "aten.div.Tensor": _quotient_backward,
    "aten.dropout.default": _dropout,
    "aten.einsum.default": _einsum,
    "aten.exponential.default": _drawn(),
    "aten._fft_c2r.default": _fourier_to_real,
    "aten._fft_r2c.default": _fourier_to_complex,
    "aten.mul.Tensor": _product_backward,
    "aten.native_dropout.default": _dropout,
    "aten.normal.Tensor_Tensor": _normal,
    "aten.normal_functional.default": _normal,
    "aten.pow.Tensor_Scalar": _formula(2),
    "aten.rand.default": _drawn(),
    "aten.rand_like.default": _drawn(),
    "aten.randint.default": _drawn(),
    "aten.randint.low": _drawn(),
    "aten.randint_like.default": _drawn(),
    "aten.randint_like.low_dtype": _drawn(),
    "aten.randn.default": _normal,
    "aten.randn_like.default": _normal,
    "aten.randperm.default": _drawn(ITEM_BYTES["int64"]),
    "aten.reciprocal.default": _formula(2),
    "aten.rsqrt.default": _formula(2),
    "aten.scaled_dot_product_attention.default": _attention,
    "aten.sin.default": _formula(1),
    "aten.sqrt.default": _formula(1),
    "aten.square.default": _formula(2),
    "aten.uniform.default": _drawn(),
}
