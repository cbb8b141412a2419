"""How the elements of local tensors lie in memory, as far as copies depend on it.

A view of what does not lie so is a copy; what is sent is one run of memory, or is copied. Followed
through views, and through operators whose results lie as what they read; all others make results in
the order of their dims.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from autopar.ir.graph import Operator

Shape = tuple[int, ...]
Strides = tuple[int, ...]
"""Elements from one index to the next, of each dim; 0 where they are the same elements."""


def contiguous(shape: Shape) -> Strides:
    """
    >>> contiguous((2, 3, 4))
    (12, 4, 1)
    """
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def is_contiguous(shape: Shape, strides: Strides) -> bool:
    """Dims of one index lie anyhow."""
    plain = contiguous(shape)
    return 0 in shape or all(
        size == 1 or a == b for size, a, b in zip(shape, strides, plain, strict=True)
    )


def like(shape: Shape, strides: Strides) -> Strides:
    """Of a new tensor whose dims are in the same order of memory.

    >>> like((2, 3, 4), (100, 1, 30))
    (12, 1, 3)
    """
    order = sorted(range(len(shape)), key=lambda dim: -strides[dim])
    found = [0] * len(shape)
    stride = 1
    for dim in reversed(order):
        found[dim] = stride
        stride *= max(1, shape[dim])
    return tuple(found)


def viewed(shape: Shape, strides: Strides, wanted: Shape) -> Strides | None:
    """With another shape, of the same memory; ``None``: that cannot be.

    >>> viewed((2, 4, 16, 8), (512, 8, 32, 1), (2, 4, 128))
    >>> viewed((2, 16, 4, 8), (512, 32, 8, 1), (2, 16, 32))
    (512, 32, 1)
    """
    if prod(shape) == 0:
        return contiguous(wanted)
    # runs of dims that lie one in the other: (elements, stride of the innermost)
    runs: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == size * stride:
            runs[-1] = runs[-1][0] * size, stride
        else:
            runs.append((size, stride))
    found: list[int] = []
    left, stride = 1, 1
    for size in reversed(wanted):
        if left == 1 and size > 1:
            left, stride = runs.pop()
        found.append(stride)
        if left % size:
            return None
        left //= size
        stride *= size
    return tuple(reversed(found))


# ---- what operators do ---------------------------------------------------------------------------


def permutation(operator: Operator, dims: int) -> tuple[int, ...] | None:
    """Which dim of its input each dim of its output is, if that is all that it does."""
    order = list(range(dims))
    match operator.op:
        case "aten.transpose.int":
            first = int(operator.argument(1, "dim0")) % dims
            second = int(operator.argument(2, "dim1")) % dims
            order[first], order[second] = second, first
        case "aten.permute.default":
            order = [int(dim) % dims for dim in operator.argument(1, "dims")]
        case "aten.t.default" | "aten.numpy_T.default":
            order.reverse()
        case "aten.mT.default":
            order[-2:] = reversed(order[-2:])
        case _:
            return None
    return tuple(order)


def viewed_by(operator: Operator, shape: Shape, strides: Strides, made: Shape) -> Strides | None:
    """How the result of a view lies in the memory of its input; ``None``: it is a copy."""
    order = permutation(operator, len(shape))
    if order is not None:
        return tuple(strides[dim] for dim in order)
    if operator.op in CUTS:
        return CUTS[operator.op](operator, strides)
    if operator.op == "aten.expand.default":
        new = len(made) - len(shape)
        kept = zip(shape, strides, made[new:], strict=True)
        return (0,) * new + tuple(0 if size != wanted else s for size, s, wanted in kept)
    if operator.op == "aten.contiguous.default" and not is_contiguous(shape, strides):
        return None
    return viewed(shape, strides, made)


def gradient_viewed_by(
    operator: Operator, shape: Shape, gradient: Strides, made: Shape
) -> Strides | None:
    """How the gradient of a view's input lies in that of its result; ``None``: it is a new one."""
    order = permutation(operator, len(shape))
    if order is not None:
        return tuple(gradient[order.index(dim)] for dim in range(len(order)))
    if shape == made and operator.op not in CUTS:
        return gradient
    return None if prod(shape) != prod(made) else viewed(made, gradient, shape)


def _slice(operator: Operator, strides: Strides) -> Strides:
    dim = int(operator.argument(1, "dim", 0)) % len(strides)
    step = int(operator.argument(4, "step", 1))
    return tuple(s * step if d == dim else s for d, s in enumerate(strides))


def _without(operator: Operator, strides: Strides) -> Strides:
    dim = int(operator.argument(1, "dim", 0)) % len(strides)
    return tuple(s for d, s in enumerate(strides) if d != dim)


def _same(operator: Operator, strides: Strides) -> Strides:
    return strides


CUTS: dict[str, Callable[[Operator, Strides], Strides]] = {
    "aten.slice.Tensor": _slice,
    "aten.select.int": _without,
    "aten.unbind.int": _without,
    "aten.split.Tensor": _same,
    "aten.split_with_sizes.default": _same,
    "aten.split.sizes": _same,
    "aten.chunk.default": _same,
}
"""Views of a part; in the backward the gradient of the whole is made."""

ATTENTION_ORDER = (0, 2, 1, 3)
"""Of the memory of what the fused kernels of attention make: sample, position, head, channel; of
the gradients of query, key and value, too."""


def attended(shape: Shape) -> Strides:
    """
    >>> attended((2, 4, 16, 8))
    (512, 8, 32, 1)
    """
    plain = contiguous(tuple(shape[dim] for dim in ATTENTION_ORDER))
    return tuple(plain[ATTENTION_ORDER.index(dim)] for dim in range(4))
