"""Look-ups in a table of vectors."""

from __future__ import annotations

from autopar.ir.graph import Operator, TensorSpec
from autopar.ir.rule import Kernel, OpRule, RuleMaker, Saved
from autopar.ops.signatures import accumulation_dtype, labels, points, signature

Specs = tuple[TensorSpec, ...]


def embedding(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Split by tokens, by columns, and by vocabulary: then each rank looks up what it has, and the
    output is partial. Gradients that are scaled by frequency are
    only split by columns."""
    del outputs
    names = labels(inputs[1].shape, "token")
    table = ["1" if inputs[0].shape[0] == 1 else "vocab", "1" if inputs[0].shape[1] == 1 else "d"]
    partial = f"{points([*names, table[1]])}/{accumulation_dtype(inputs[0].dtype)}"
    scaled = bool(operator.argument(3, "scale_grad_by_freq", False))
    return OpRule(
        signature([table, names], [[*names, table[1]]]),
        whole=("vocab", *(n for n in names if n != "1")) if scaled else (),
        sums=("vocab",),
        linear=(0,),
        special=("vocab",),
        saves=(Saved("input 1"),),
        forward=(
            Kernel(("input 1", "output 0", "output 0")),
            Kernel(("output 0", "output 0"), divided=("vocab",)),  # zeros for others' tokens
        ),
        backward=(
            Kernel(("input 0",)),
            Kernel(("input 1",) * 4 * RADIX_PASSES),
            Kernel(("output 0", partial), indexed=1),
            Kernel((partial, "output 0"), indexed=1),
        ),
    )


RADIX_PASSES = 8
"""Of a sort of tokens, 64 bits each, with their places: 8 bits at a time. Rows of the gradient that
belong to one token are summed in parts then, and the parts of each token (EmbeddingBackwardKernel
of torch, for more than 3072 tokens)."""


def embedding_bag(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Bags have any lengths, so only columns can be split."""
    del operator
    table = labels(inputs[0].shape, "table")
    others = [labels(spec.shape, f"i{n}_") for n, spec in enumerate(inputs[1:])]
    rows = [labels(spec.shape, f"o{n}_") for n, spec in enumerate(outputs)]
    rows[0][-1] = table[1]
    whole = {n for side in (*others, *rows, table) for n in side} - {"1", table[1]}
    return OpRule(
        signature([table, *others], rows),
        whole=tuple(sorted(whole)),
        agreed=tuple(range(1, len(outputs))),
        saves=tuple(Saved(f"input {i}") for i in range(1, len(inputs)))
        + tuple(Saved(f"output {i}") for i in range(1, len(outputs))),
    )


RULES: dict[str, OpRule | RuleMaker] = {
    "aten.embedding.default": embedding,
    "aten.embedding_bag.padding_idx": embedding_bag,
    "aten.embedding_bag.default": embedding_bag,
    "aten._embedding_bag.default": embedding_bag,
}
