"""Products of rows with one matrix of several each, on one rank: in groups, as kernels take them.

torch's own grouped product has no kernel for float64, takes only matrices whose rows begin at 16
bytes, and leaves rows that belong to no group as they were. What is here takes any matrices, and
gives zeros for such rows: they are another rank's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from autopar.ir.graph import Operator
from autopar.ops.grouped import GATHER_BMM

if TYPE_CHECKING:
    from autopar.runtime.local_ops import LocalContext, LocalOp

Arranged = tuple[Tensor | None, Tensor]
"""The order of rows in which groups follow each other from the first row on (``None``: they do),
and where each group ends; rows after the last one belong to no group."""

Arrange = Callable[[Tensor], Arranged]


# --- kernels -------------------------------------------------------------------------------------


@torch.library.custom_op("autopar::grouped_rows", mutates_args=())
def grouped_rows(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """``x[rows, in]`` times ``matrices[groups, in, out]``; ``ends``: int32."""
    if _has_kernel(x, matrices):
        found: Tensor = torch._grouped_mm(x, matrices, offs=ends)
        others = torch.arange(len(x), device=x.device) >= ends[-1]
        return found.masked_fill_(others.unsqueeze(1), 0)
    out = x.new_zeros(x.shape[0], matrices.shape[2])
    for group, (start, stop) in enumerate(pairwise((0, *ends.tolist()))):
        torch.mm(x[start:stop], matrices[group], out=out[start:stop])
    return out


@grouped_rows.register_fake
def _(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], matrices.shape[2])


@torch.library.custom_op("autopar::grouped_sums", mutates_args=())
def grouped_sums(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """``left[rows, m]`` transposed times ``right[rows, n]``, of each group; ``ends``: int32."""
    if _has_kernel(left, right):
        found: Tensor = torch._grouped_mm(left.t(), right, offs=ends)
        return found
    out = left.new_empty(len(ends), left.shape[1], right.shape[1])
    for group, (start, stop) in enumerate(pairwise((0, *ends.tolist()))):
        torch.mm(left[start:stop].t(), right[start:stop], out=out[group])
    return out


@grouped_sums.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


_ALIGNED_BYTES = 16


def _has_kernel(*factors: Tensor) -> bool:
    """Whether a GPU multiplies all groups at once; others do one after the other anyway."""
    return all(
        x.is_cuda
        and x.dtype == torch.bfloat16
        and x.data_ptr() % _ALIGNED_BYTES == 0
        # one of the two last dims lies in a run, of which each begins at 16 bytes
        and 1 in x.stride()[-2:]
        and all(s == 1 or s * x.element_size() % _ALIGNED_BYTES == 0 for s in x.stride())
        for x in factors
    )


# --- gradients -----------------------------------------------------------------------------------


class _Rows(torch.autograd.Function):
    """Rows times their group's matrix; keeps the rows where they were, and orders them again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrices: Tensor, index: Tensor, arrange: Arrange) -> Tensor:
        of_x, of_matrices = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if of_matrices else None, matrices if of_x else None, index)
        ctx.arrange = arrange
        order, ends = arrange(index)
        return _back(grouped_rows(_ordered(x, order), matrices, ends), order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, matrices, index = ctx.saved_tensors
        order, ends = ctx.arrange(index)
        given = _ordered(gradient, order)
        dx = dmatrices = None
        if matrices is not None:
            dx = _back(grouped_rows(given, matrices.mT, ends), order)
        if x is not None:
            dmatrices = grouped_sums(_ordered(x, order), given, ends)
        return dx, dmatrices, None, None


class _Sums(torch.autograd.Function):
    """Sums over each group's rows."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, index: Tensor, arrange: Arrange) -> Tensor:
        of_left, of_right = ctx.needs_input_grad[:2]
        ctx.save_for_backward(left if of_right else None, right if of_left else None, index)
        ctx.arrange = arrange
        order, ends = arrange(index)
        made: Tensor = grouped_sums(_ordered(left, order), _ordered(right, order), ends)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        left, right, index = ctx.saved_tensors
        order, ends = ctx.arrange(index)
        dleft = dright = None
        if right is not None:
            dleft = _back(grouped_rows(_ordered(right, order), gradient.mT, ends), order)
        if left is not None:
            dright = _back(grouped_rows(_ordered(left, order), gradient, ends), order)
        return dleft, dright, None, None


def _ordered(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x[order]


def _back(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else torch.empty_like(x).index_copy_(0, order, x)


def _rows(x: Tensor, matrices: Tensor, index: Tensor, arrange: Arrange) -> Tensor:
    found: Tensor = _Rows.apply(x, matrices, index, arrange)  # type: ignore[no-untyped-call]
    return found


# --- what a rank has of the groups ---------------------------------------------------------------


def _by_index(first: int, count: int, whole: int) -> Arrange:
    """Rows by the matrix that they ask for; last those that ask for none of ``count`` matrices from
    ``first`` on. Negative indices count from the end of the ``whole``."""

    def arrange(index: Tensor) -> Arranged:
        own = torch.where(index < 0, index + whole, index) - first
        own = torch.where((own >= 0) & (own < count), own, count)
        found, order = own.sort(stable=True)
        matrices = torch.arange(count, device=index.device)
        return order, torch.searchsorted(found, matrices, right=True, out_int32=True)

    return arrange


def _by_ends(first: int, count: int, whole: int, rows: int) -> Arrange:
    """All groups as they are; of ``count`` of ``whole`` from ``first`` on, their rows first."""

    def arrange(ends: Tensor) -> Arranged:
        if count == whole:
            return None, ends
        start = ends[first - 1] if first else ends.new_zeros(())
        order = (torch.arange(rows, device=ends.device) + start) % rows
        return order, ends[first : first + count] - start

    return arrange


def _gathered(a: Tensor, b: Tensor, index: Tensor, table: int, first: int, whole: int) -> Tensor:
    """``first``: of the ``whole`` matrices, where those begin that are here."""
    matrices, rows = (b, a) if table else (a, b)
    inside = ((index >= -whole) & (index < whole)).all()
    torch._assert_async(inside, f"index out of range: there are {whole} matrices")
    arrange = _by_index(first, matrices.shape[0], whole)
    if table:
        return _rows(rows.squeeze(1), matrices, index, arrange).unsqueeze(1)
    return _rows(rows.squeeze(2), matrices.mT, index, arrange).unsqueeze(2)


def _with_all_matrices(a: Tensor, b: Tensor, index: Tensor, table: int) -> Tensor:
    return _gathered(a, b, index, table, 0, (b if table else a).shape[0])


_LIBRARY: Any = torch.library.Library("autopar", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("gather_bmm(Tensor a, Tensor b, Tensor index, int table) -> Tensor")
_LIBRARY.impl("gather_bmm", _with_all_matrices, "CompositeImplicitAutograd")


def gather_bmm(
    context: LocalContext, operator: Operator, values: Sequence[Any], keywords: Mapping[str, Any]
) -> Tensor:
    """With some of the matrices."""
    del operator, keywords
    a, b, index, table = values
    whole = context.bound.sizes["experts"]
    return _gathered(a, b, index, table, context.offset("experts"), whole)


def grouped_mm(
    context: LocalContext, operator: Operator, values: Sequence[Any], keywords: Mapping[str, Any]
) -> Tensor:
    del operator
    a, b = values[:2]
    ends = values[2] if len(values) > 2 else keywords.get("offs")
    if ends is None:
        return torch.bmm(a, b)
    whole = context.bound.sizes["groups"]
    rows = a.shape[-1] if a.ndim == b.ndim == 2 else (a.shape[0] if a.ndim == 2 else b.shape[1])
    local = context.bound.local_sizes(context.split, context.mesh)["groups"]
    arrange = _by_ends(context.offset("groups"), local, whole, rows)
    if a.ndim == b.ndim:
        sums: Tensor = _Sums.apply(a.t(), b, ends, arrange)  # type: ignore[no-untyped-call]
        return sums
    if a.ndim == 2:
        return _rows(a, b, ends, arrange)
    return _rows(b.t(), a.mT, ends, arrange).t()


GROUPED: dict[str, LocalOp] = {
    GATHER_BMM: gather_bmm,
    "aten._grouped_mm.default": grouped_mm,
}


# --- what torch's means --------------------------------------------------------------------------


def _of_groups(a: Tensor, b: Tensor, offs: Tensor | None = None) -> Tensor:
    if offs is None:
        return torch.bmm(a, b)
    bounds = list(pairwise((0, *offs.tolist())))
    if a.ndim == b.ndim:
        return torch.stack([a[:, start:stop] @ b[start:stop] for start, stop in bounds])
    if a.ndim == 2:
        made = [a[start:stop] @ b[i] for i, (start, stop) in enumerate(bounds)]
        return torch.cat([*made, a.new_zeros(len(a) - bounds[-1][1], b.shape[2])])
    return _of_groups(b.t(), a.mT, offs).t()


BY_DEFINITION: dict[str, Callable[..., Tensor]] = {"aten._grouped_mm.default": _of_groups}
"""By op that torch has no kernel of for some dtypes and shapes: what it means, to compare with."""
