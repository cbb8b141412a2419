"""Products of rows with one matrix of several each: the experts of a mixture."""

from __future__ import annotations

from autopar.ir.graph import Operator, TensorSpec
from autopar.ir.rule import Kernel, OpRule, Product, RuleMaker, Saved
from autopar.ops.embedding import RADIX_PASSES
from autopar.ops.signatures import NoRuleError, position

Specs = tuple[TensorSpec, ...]

GATHER_BMM = "autopar.gather_bmm.default"
"""``bmm(rows, table[index])`` without the copies of matrices that ``table[index]`` makes. ATen has
no such op: the extractor makes it of the two. The last argument says which of the first two is the
table."""


def gather_bmm(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Each row with the matrix that its index names.

    Split by rows, columns and sum like any product, and by the matrices: each rank multiplies the
    rows that ask for what it has, and gives zeros for the others.
    """
    del inputs, outputs
    table = int(operator.argument(3, "table"))
    rows = 1 - table
    moved = f"input {rows}"
    sort = Kernel(("input 2",) * 4 * RADIX_PASSES)
    forward = Product("experts", "rows", "out", "in")
    return OpRule(
        "rows 1 in, experts in out, rows -> rows 1 out"
        if table
        else "experts out in, rows in 1, rows -> rows out 1",
        sums=("in", "experts"),
        linear=(rows,),
        kind="matmul",
        products=(forward,),
        routed=("rows", "experts"),
        special=("experts",),
        saves=(
            Saved(moved, needs=(table,)),
            Saved(f"input {table}", needs=(rows,)),
            Saved("input 2"),
        ),
        forward=(
            sort,
            Kernel((moved, moved)),  # rows of a matrix beside each other
            Kernel(product=forward),
            Kernel(("output 0", "output 0")),  # and back to their places
        ),
        backward=(
            sort,
            Kernel(("output 0", "output 0")),
            Kernel(needs=(rows,), product=Product("experts", "rows", "in", "out")),
            Kernel((moved, moved), needs=(rows,)),
            Kernel((moved, moved), needs=(table,)),
            Kernel(needs=(table,), product=Product("experts", "in", "out", "rows")),
        ),
    )


def grouped_mm(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Groups of rows, one after the other, each with a matrix of its own; ``ends`` says where each
    group ends.

    The dim that has the groups is never split: a slice of it would begin inside of a group that
    only others know. Split by groups, each rank multiplies its own, and gives zeros for the others.

    Raises:
        NoRuleError: with a bias or another dtype for the result.
    """
    del outputs
    if any(operator.argument(i, k) is not None for i, k in ((3, "bias"), (4, "out_dtype"))):
        raise NoRuleError("the grouped product with a bias or a dtype for its result")
    ranks = len(inputs[0].shape), len(inputs[1].shape)
    text, sums, product = _FORMS[ranks]
    by_ends = position(operator, 2, "offs") is not None
    m, n = product.m, product.n
    backward = (
        Kernel(needs=(0,), product=Product(product.batch, m, product.k, n)),
        Kernel(needs=(1,), product=Product(product.batch, product.k, n, m)),
    )
    kept = (Saved("input 0", needs=(1,)), Saved("input 1", needs=(0,)))
    return OpRule(
        text,
        whole=("rows", "ends") if by_ends else (),
        sums=sums,
        linear=(0,),
        kind="matmul",
        products=(product,),
        routed=("rows", "groups") if by_ends else None,
        special=("*", "groups") if by_ends else ("*",),
        saves=(*kept, Saved("input 2")) if by_ends else kept,
        forward=(Kernel(product=product),),
        backward=backward,
    )


_FORMS = {
    (2, 3): (
        "rows in, groups in out, ends -> rows out",
        ("in", "groups"),
        Product("groups", "rows", "out", "in"),
    ),
    (3, 2): (
        "groups left in, in rows, ends -> left rows",
        ("in", "groups"),
        Product("groups", "left", "rows", "in"),
    ),
    (2, 2): (
        "left rows, rows right, ends -> groups left right",
        (),
        Product("groups", "left", "right", "rows"),
    ),
    (3, 3): (
        "groups left in, groups in right -> groups left right",
        ("in",),
        Product("groups", "left", "right", "in"),
    ),
}
"""By the ranks of the two factors: the signature, what is summed, and the product. ``rows`` is the
dim that has the groups."""

RULES: dict[str, OpRule | RuleMaker] = {
    GATHER_BMM: gather_bmm,
    "aten._grouped_mm.default": grouped_mm,
}
