"""Ops that reduce dims, or that need a whole dim to work along it: sum, softmax, sort, fft."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from autopar.ir.graph import ITEM_BYTES, Operator, TensorSpec
from autopar.ir.rule import Kernel, OpRule, RuleMaker, Saved
from autopar.ops.signatures import dim_of, dims_of, labels, signature

Specs = tuple[TensorSpec, ...]
Dims = Callable[[Operator, int], tuple[int, ...]]


def _dims(index: int) -> Dims:
    def dims(operator: Operator, rank: int) -> tuple[int, ...]:
        return dims_of(operator.argument(index, "dim"), rank)

    return dims


def _all(operator: Operator, rank: int) -> tuple[int, ...]:
    del operator
    return tuple(range(rank))


def reduction(dims: Dims, *saves: str, sums: bool = False, divides: bool = False) -> RuleMaker:
    """``sums``: partial results add up. ``divides``: they do after rescaling (mean)."""

    def make(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
        names = labels(inputs[0].shape)
        reduced = dims(operator, len(names))
        keeps = len(outputs[0].shape) == len(names)
        out = [
            ("1" if i in reduced else name)
            for i, name in enumerate(names)
            if keeps or i not in reduced
        ]
        gone = tuple(names[i] for i in reduced if names[i] != "1")
        return OpRule(
            signature([names], [out] * len(outputs)),
            sums=gone if sums else (),
            special=gone if divides else (),
            linear=(0,) if sums and inputs[0].is_floating else (),
            saves=tuple(Saved(what) for what in saves),
            backward=_expanded(divides) if sums else None,
        )

    return make


def _expanded(divides: bool) -> tuple[Kernel, ...]:
    """What comes back to a sum is a view of every row; that of a mean is divided, point by
    point."""
    return (Kernel(("output 0", "input 0"), indexed=1),) if divides else ()


REGISTER_ROW = 9 * 1024
ROW_BYTES = 48 * 2**10
"""Of a row that a block of a softmax keeps: nine numbers for each of its threads, or all of what
memory blocks share by default, if it starts at 16 bytes. Longer rows are read for the largest
number, for the sum and for the result (torch's SoftMax.cu)."""


def rows_fit(spec: TensorSpec, dim: int) -> bool:
    """Whether a softmax along ``dim`` reads a row once."""
    size = spec.shape[dim] if spec.shape else 1
    row_bytes = size * ITEM_BYTES[spec.dtype]
    return size <= REGISTER_ROW or (row_bytes % 16 == 0 and row_bytes < ROW_BYTES)


def softmax(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """The gradient is multiplied with the result first, but for that of the logarithm."""
    rule = along("output 0")(operator, inputs, outputs)
    x, y = "input 0", "output 0"
    dim = dim_of(operator.argument(1, "dim", -1), len(inputs[0].shape))
    again = 0 if rows_fit(inputs[0], dim) else 1
    product = () if "log" in operator.op else (Kernel((y, y, y)),)
    return replace(
        rule,
        forward=(Kernel((x, y), again=(x,) * 2 * again),),
        backward=(*product, Kernel((y, y, x), again=(y,) * again)),
    )


def along(*saves: str, dim: int = 1, default: int = -1, linear: bool = False) -> RuleMaker:
    """Output of the input's rank; the dim that it works along stays whole."""

    def make(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
        names = labels(inputs[0].shape)
        if not names:
            return OpRule(signature([[]], [[] for _ in outputs]))
        at = dim_of(operator.argument(dim, "dim", default), len(names))
        out = list(names)
        size = outputs[0].shape[at]
        if size != inputs[0].shape[at]:
            out[at] = "1" if size == 1 else "kept"
        return OpRule(
            signature([names], [out] * len(outputs)),
            whole=tuple(n for n in dict.fromkeys((names[at], out[at])) if n != "1"),
            linear=(0,) if linear and inputs[0].is_floating else (),
            saves=tuple(Saved(what) for what in saves),
        )

    return make


def fourier(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Transforms need their dims whole; they may be of other sizes afterwards."""
    names = labels(inputs[0].shape)
    out = labels(outputs[0].shape)
    for dim in dims_of(operator.argument(1, "dim"), len(names)):
        out[dim] = "1" if out[dim] == "1" else f"frequency{dim}"
    transformed = [n for n, after in zip(names, out, strict=True) if n != after and n != "1"]
    real = not inputs[0].dtype.startswith("complex")
    return OpRule(
        signature([names], [out]),
        saves=(Saved("input 0"),) if real else (),
        whole=(*transformed, *(n for n in out if n.startswith("frequency"))),
        linear=(0,),
    )


def histogram(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Counts of parts add up; where no range is given it is that of all values."""
    del outputs
    names = labels(inputs[0].shape)
    low, high = operator.argument(2, "min", 0), operator.argument(3, "max", 0)
    counted = tuple(n for n in names if n != "1") if low != high else ()
    return OpRule(signature([names], [["bins"]]), whole=("bins",), sums=counted)


SUM = reduction(_dims(1), sums=True)
MEAN = reduction(_dims(1), sums=True, divides=True)
TEST = reduction(_dims(1))
EXTREME = reduction(_dims(1), "input 0", "output 0")
PICK = reduction(_dims(1), "output 1")
SORT = along("output 1")

RULES: dict[str, OpRule | RuleMaker] = {
    "aten.sum.default": reduction(_all, sums=True),
    "aten.sum.dim_IntList": SUM,
    "aten.mean.default": reduction(_all, sums=True, divides=True),
    "aten.mean.dim": MEAN,
    "aten.amax.default": EXTREME,
    "aten.amin.default": EXTREME,
    "aten.max.default": reduction(_all, "input 0", "output 0"),
    "aten.min.default": reduction(_all, "input 0", "output 0"),
    "aten.max.dim": PICK,
    "aten.min.dim": PICK,
    "aten.median.dim": PICK,
    "aten.argmax.default": TEST,
    "aten.argmin.default": TEST,
    "aten.any.default": reduction(_all),
    "aten.any.dim": TEST,
    "aten.any.dims": TEST,
    "aten.all.default": reduction(_all),
    "aten.all.dim": TEST,
    "aten.all.dims": TEST,
    "aten.count_nonzero.dim_IntList": TEST,
    "aten.prod.default": reduction(_all, "input 0", "output 0"),
    "aten.prod.dim_int": EXTREME,
    "aten.logsumexp.default": EXTREME,
    "aten.std.correction": EXTREME,
    "aten.std.dim": EXTREME,
    "aten.var.correction": reduction(_dims(1), "input 0"),
    "aten.var.dim": reduction(_dims(1), "input 0"),
    "aten.var_mean.correction": reduction(_dims(1), "input 0"),
    "aten.linalg_vector_norm.default": reduction(_dims(2), "input 0", "output 0"),
    "aten.norm.ScalarOpt_dim": reduction(_dims(2), "input 0", "output 0"),
    "aten.softmax.int": softmax,
    "aten.log_softmax.int": softmax,
    "aten._softmax.default": softmax,
    "aten._log_softmax.default": softmax,
    "aten._safe_softmax.default": softmax,
    "aten.cumsum.default": along(linear=True),
    "aten.cumprod.default": along("input 0", "output 0"),
    "aten.logcumsumexp.default": along("input 0", "output 0"),
    "aten.cummax.default": along("input 0", "output 1"),
    "aten.cummin.default": along("input 0", "output 1"),
    "aten.sort.default": SORT,
    "aten.sort.stable": along("output 1", dim=2),
    "aten.argsort.default": along(),
    "aten.topk.default": along("output 1", dim=2),
    "aten.kthvalue.default": reduction(
        lambda o, rank: dims_of(o.argument(2, "dim", -1), rank), "output 1"
    ),
    "aten.glu.default": along("input 0"),
    "aten._fft_r2c.default": fourier,
    "aten._fft_c2r.default": fourier,
    "aten._fft_c2c.default": fourier,
    "aten.histc.default": histogram,
}
