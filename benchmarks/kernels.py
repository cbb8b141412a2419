"""Kernels that published programs run and ATen does not have: what they read, write and keep.

A norm that keeps its input and a number for each row, and one whose backward is a single pass,
perhaps with a cast after it; SwiGLU that keeps its two factors (and, of experts, the weights of
tokens); casts to what products take, and rotary positions, element by element, also of a part of
each head; keys and values of latent attention, and attention of these, of a window, or with keys
and values that go round a ring; keys that are repeated for the queries of a group; products of
experts, their biases, and their rows put elsewhere; dropout whose mask is drawn where it is used,
perhaps with the residual sum; softmax of scores that reads nothing above the diagonal;
cross-entropy that keeps the logits and makes the gradient from them. Such are those of Megatron-LM,
Apex, Transformer Engine, flash-attn and Liger, and what a compiler makes of the operators. ATen's
own keep more: an rms_norm below float32 two float32 copies of its input, SwiGLU in parts a third
tensor, cross-entropy log-probabilities beside two gradients.

They are rules as those for ops that somebody's model has and autopar does not know: proposed ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from autopar.ir.graph import OperatorGraph, TensorSpec
from autopar.ir.rule import Inner, Kernel, OpRule, Product, Saved
from autopar.ops.proposals import Proposals, call_key
from autopar.ops.signatures import labels, points, signature

Shapes = tuple[TensorSpec, ...]


def _rms_norm(inputs: Shapes) -> OpRule:
    """Along the last dim."""
    return _norm(inputs, numbers=1)


def _layer_norm(inputs: Shapes) -> OpRule:
    return _norm(inputs, numbers=2)


def _norm(inputs: Shapes, numbers: int) -> OpRule:
    """``numbers``: that are kept of each row."""
    *rows, last = labels(inputs[0].shape)
    x = [*rows, last]
    return OpRule(
        signature([x, *[[last]] * (len(inputs) - 1)], [x]),
        whole=(last,),
        saves=(
            Saved("input 0"),
            *(Saved(f"input {i}") for i in range(1, len(inputs))),
            *(Saved(points(rows), dtype="float32"),) * numbers,
        ),
    )


def _in_one_pass(rule: Callable[[Shapes], OpRule]) -> Callable[[Shapes], OpRule]:
    """Partial sums for the gradients of scale and shift are kept in registers meanwhile (Apex's
    FastLayerNorm, Transformer Engine)."""
    backward = Kernel(("output 0", "input 0", "input 0", "input 1", "input 1"))
    return lambda inputs: replace(rule(inputs), backward=(backward,))


def _then_cast(inputs: Shapes, times: int) -> OpRule:
    """A norm whose result is wide, and read ``times`` to be cast: of rows and of columns."""
    written = ("output 0",) * (2 if times == 1 else 1)  # of half a byte, both are in one
    looked = (Kernel(("input 0",)),) * (times - 1)
    return replace(
        _in_one_pass(_rms_norm)(inputs),
        forward=(
            Kernel(("input 0", "input 1", "input 0")),
            *looked,
            Kernel(("input 0", *written)),
        ),
        backward=(Kernel(("input 0", "input 0", "input 0", "input 1", "input 1")),),
    )


def _norm_then_cast(inputs: Shapes) -> OpRule:
    """To a byte."""
    return _then_cast(inputs, 1)


def _norm_then_cast_twice(inputs: Shapes) -> OpRule:
    """To NVFP4."""
    return _then_cast(inputs, 2)


def _cast(inputs: Shapes) -> OpRule:
    """To what products take; the gradient that they give is wide already."""
    x = labels(inputs[0].shape)
    return OpRule(signature([x], [x]), backward=())


def _rotary(inputs: Shapes) -> OpRule:
    """Of queries or keys by head, with a table of positions."""
    *rows, position, width = labels(inputs[0].shape)
    x, table = [*rows, position, width], [position, width]
    return OpRule(signature([x, table], [x]), linear=(0,), saves=(Saved("input 1", needs=(0,)),))


def _rotary_in_steps(inputs: Shapes) -> OpRule:
    """The same where positions are scaled, which the one kernel does not do: half of each head is
    negated (here as if it were all) and put before the other half, both are multiplied and added
    up, and joined with what has no position, if it be nothing; back also zeros for that, and their
    sum (Megatron-LM's ``megatron/core/models/common/embeddings/rope_utils.py``)."""
    moved, times = Kernel(("input 0", "input 0")), Kernel(("input 0", "input 0"), indexed=1)
    added = Kernel(("input 0",) * 3)
    return replace(
        _rotary(inputs),
        forward=(times, moved, times, times, added, moved),
        backward=(times, times, times, moved, added, Kernel(("input 0",)), added),
    )


def _clamped(inputs: Shapes, bounds: int) -> OpRule:
    """One of two halves that a product made together, held within ``bounds`` and joined with the
    other; back what was within is compared, and its gradient taken, and both joined (Megatron-LM's
    ``weighted_bias_quick_geglu_impl`` and torch's ``clamp``)."""
    x = labels(inputs[0].shape)
    within, joined = f"{points(x)}/bool", Kernel(("input 0", "input 0"))
    compared = Kernel(("input 0", within), indexed=1)
    both = (Kernel((within, within, within)),) * (bounds - 1)
    taken = Kernel((within, "input 0", "input 0"), indexed=1)
    return OpRule(
        signature([x], [x]),
        saves=(Saved("input 0"),),
        forward=(Kernel(("input 0", "output 0"), indexed=1), joined),
        backward=(*(compared,) * bounds, *both, taken, joined),
    )


def _clamped_above(inputs: Shapes) -> OpRule:
    return _clamped(inputs, bounds=1)


def _clamped_on_both_sides(inputs: Shapes) -> OpRule:
    return _clamped(inputs, bounds=2)


def _rotary_part(inputs: Shapes) -> OpRule:
    """Of as many of the last numbers of each head as the table is wide, in place."""
    *rows, position, width = labels(inputs[0].shape)
    x, table = [*rows, position, width], [position, "part"]
    turned = (Kernel((points([*rows, position, "part"]),) * 2),)
    return OpRule(
        signature([x, table], [x]),
        whole=(width, "part"),
        linear=(0,),
        saves=(Saved("input 1", needs=(0,)),),
        forward=turned,
        backward=turned,
    )


def _latent_keys(inputs: Shapes) -> OpRule:
    """Keys and values of each head, from what has both and from the part of keys with positions
    that all heads share, which is turned on the way."""
    batch, heads, position, _ = labels(inputs[0].shape)
    rows, shared = [batch, heads, position], [batch, position, "part"]
    return OpRule(
        signature([[*rows, "both"], shared, [position, "part"]], [[*rows, "dk"], [*rows, "dv"]]),
        whole=("both", "part", "dk", "dv"),
        linear=(0, 1),
        saves=(Saved("input 2", needs=(1,)),),
    )


def _causal_attention(inputs: Shapes) -> OpRule:
    """In one kernel also where values are narrower than keys, as cuDNN has it."""
    batch, heads, _, _ = labels(inputs[0].shape)
    rows = [batch, heads]
    each = points([name for name in rows if name != "1"])
    return OpRule(
        signature([[*rows, "q", "d"], [*rows, "k", "d"], [*rows, "k", "dv"]], [[*rows, "q", "dv"]]),
        whole=("q", "k", "d", "dv"),
        kind="attention",
        products=(Product(each, "q", "k", "d"), Product(each, "q", "dv", "k")),
        causal=True,
        saves=(
            *(Saved(f"input {i}") for i in range(3)),
            Saved("output 0"),
            Saved(f"{each} q".strip(), dtype="float32"),
        ),
    )


def _repeated(inputs: Shapes) -> OpRule:
    """Keys or values of each head, for all the queries that share them."""
    batch, _, position, width = labels(inputs[0].shape)
    return OpRule(
        signature([[batch, "heads", position, width]], [[batch, "(heads group)", position, width]]),
        whole=("group",),
        linear=(0,),
    )


def _ring_attention(inputs: Shapes) -> OpRule:
    """Of torch's ``context_parallel`` (torch 2.6, torch/distributed/tensor/experimental/
    _attention.py): the queries of a device attend to the keys and values of one device after the
    other, to as many pairs each time; in all to as many keys as the last input is long. These are
    gathered before, forward and backward. Their gradients, in float32, go on by one device with
    each step, until they are home.

    Of a compiled program nothing of that goes on beside attention: where functional collectives are
    traced, each is waited for at once (torch/distributed/_functional_collectives.py,
    ``_maybe_wrap_tensor``), and Inductor leaves it there (``reorder_for_compute_comm_overlap``).

    Around attention keys and values are put together, and what each step gives is merged, in
    float32, into what there is: the result, and the gradients of queries, keys and values.
    """
    batch, heads, *_ = labels(inputs[0].shape)
    grouped = inputs[0].shape[1] != inputs[1].shape[1]
    q_rows = [batch, "(heads group)" if grouped else heads]
    k_rows = [batch, "heads" if grouped else heads]
    each, of_keys = points(q_rows), points(k_rows)
    queries, keys = points([each, "k", "d"]), points([of_keys, "k", "d"])
    merged, added = (Kernel((f"{of}/float32", of, f"{of}/float32")) for of in (queries, keys))
    together = Kernel(("input 1", "input 1", "input 2", "input 2"))
    gathered = (f"{keys}/{inputs[1].dtype}",) * 2
    sums = [f"{points([of, 'q', 'd'])}/float32" for of in (each, *(of_keys,) * 4)]
    q, k = [*q_rows, "q", "d"], [*k_rows, "q", "d"]
    return OpRule(
        signature([q, k, k, ["k"]], [q]),
        whole=("k", "d", *(["group"] if grouped else [])),
        kind="attention",
        products=(Product(each, "q", "k", "d"), Product(each, "q", "d", "k")),
        causal=True,
        around=((together, merged), (together, merged, added, added)),
        inner=(
            Inner("q", "all_gather", "forward", keys, times=2),
            Inner("q", "all_gather", "backward", keys, times=2),
            Inner("q", "send", "backward", keys, times=2, dtype="float32"),
        ),
        saves=(
            *(Saved(f"input {i}") for i in range(3)),
            Saved("output 0"),
            Saved(points([each, "q"]), dtype="float32"),
        ),
        workspace=((), (*gathered, *sums)),  # of a backward; what a forward gathers is less
    )


def _near_attention(inputs: Shapes) -> OpRule:
    """Of queries that see as many keys in the mean as the last input is long, heads perhaps grouped
    as for torch's."""
    batch, heads, *_ = labels(inputs[0].shape)
    grouped = inputs[0].shape[1] != inputs[1].shape[1]
    q_rows = [batch, "(heads group)" if grouped else heads]
    k_rows = [batch, "heads" if grouped else heads]
    each = points(q_rows)
    return OpRule(
        signature(
            [[*q_rows, "q", "d"], [*k_rows, "k", "d"], [*k_rows, "k", "dv"], ["near"]],
            [[*q_rows, "q", "dv"]],
        ),
        whole=("q", "k", "d", "dv", "near", *(["group"] if grouped else [])),
        kind="attention",
        products=(Product(each, "q", "near", "d"), Product(each, "q", "dv", "near")),
        saves=(
            *(Saved(f"input {i}") for i in range(3)),
            Saved("output 0"),
            Saved(f"{each} q".strip(), dtype="float32"),
        ),
    )


def _grouped(inputs: Shapes) -> OpRule:
    """Products of the rows of each expert with its own weight, which is a parameter by itself: of
    each the program looks up what products take, and hands on its gradient (``GroupedLinear`` of
    Transformer Engine, and the hooks of Megatron-LM's ``DistributedDataParallel``)."""
    expert, *rows, width = labels(inputs[0].shape)
    each = "" if expert == "1" else expert
    return OpRule(
        signature([[expert, *rows, width], [expert, "out", width]], [[expert, *rows, "out"]]),
        sums=(width,),
        linear=(0,),
        kind="matmul",
        products=(Product(each, points(rows), "out", width),),
        apart=each,
        saves=(Saved("input 0", needs=(1,)), Saved("input 1", needs=(0,))),
    )


def _moved(inputs: Shapes) -> OpRule:
    """Rows put elsewhere, and their gradients back."""
    x = labels(inputs[0].shape)
    return OpRule(signature([x], [x]), linear=(0,))


def _strided(inputs: Shapes) -> OpRule:
    """The same, by a copy of what does not lie in its order (torch's ``contiguous``): of each
    number the kernel works out where it lies."""
    copied = (Kernel(("input 0", "output 0"), indexed=1),)
    return replace(_moved(inputs), forward=copied, backward=copied)


def _awaited(inputs: Shapes) -> OpRule:
    """The same, of numbers that the host needs: it waits for them."""
    return replace(_moved(inputs), awaited=True)


def _spread(inputs: Shapes) -> OpRule:
    """Rows shared out anew among two dims, as many as come nearest: some are nobody's, and left
    empty."""
    batch, group, *_, width = labels(inputs[0].shape)
    before, after = ([batch, group, *pair, width] for pair in (("a", "b"), ("c", "d")))
    return OpRule(signature([before], [after]), whole=("a", "b", "c", "d"), linear=(0,))


def _cast_twice(inputs: Shapes) -> OpRule:
    """As ``_cast``, but the largest number of the tensor is looked for first: to NVFP4, which has a
    scale for the tensor beside those of blocks. Rows and columns have half a byte each."""
    x = labels(inputs[0].shape)
    made = Kernel(("input 0", "output 0", "output 0"))
    return OpRule(signature([x], [x]), forward=(Kernel(("input 0",)), made), backward=())


def _expert_bias(inputs: Shapes) -> OpRule:
    """Added to the rows of each expert, which each has a weight, in float32 and expert by expert,
    each a parameter by itself: the product, the sum, all joined, the cast; back a cast for the
    rows, products and sums for the bias and for the weights, and what the parts make together
    (Megatron-LM's ``_apply_bias`` in ``megatron/core/transformer/moe/experts.py``). Products and
    sums of a row, a column and what is narrow are kernels that work out where elements lie."""
    expert, *rows, width = labels(inputs[0].shape)
    wide = f"{points([expert, *rows, width])}/float32"
    return OpRule(
        signature(
            [[expert, *rows, width], [expert, width], [expert, *rows, "1"]],
            [[expert, *rows, width]],
        ),
        saves=(Saved("input 1"), Saved("input 2")),
        apart="" if expert == "1" else expert,
        forward=(
            Kernel((wide,), indexed=1),
            Kernel(("input 0", wide, wide), indexed=1),
            Kernel((wide, wide)),
            Kernel((wide, "output 0")),
        ),
        backward=(
            Kernel(("output 0", wide)),
            Kernel((wide, "input 0")),
            *(Kernel((wide, wide), indexed=1), Kernel((wide,))) * 2,
            Kernel(("input 0", "input 0")),
        ),
    )


def _causal_softmax(inputs: Shapes) -> OpRule:
    """Of scores, with their scale and mask; what is hidden is written as zero and never read, nor
    is its gradient (Megatron-LM's scaled_upper_triang_masked_softmax)."""
    *rows, keys = labels(inputs[0].shape)
    x = [*rows, keys]
    return OpRule(signature([x], [x]), whole=(keys,), causal=True, saves=(Saved("output 0"),))


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


def _dropout_into_sum(inputs: Shapes) -> OpRule:
    """Handed on to the residual sum, which the same kernel does: only the mask is written."""
    return replace(_dropout(inputs), forward=(Kernel(("input 0", "output 1")),))


def _sum(inputs: Shapes) -> OpRule:
    """Of a residual and what such a kernel hands on."""
    x = labels(inputs[0].shape)
    return OpRule(
        signature([x, x], [x]),
        linear=(0, 1),
        forward=(Kernel(("input 0", "output 0")),),
        backward=(),
    )


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


def _divided_cross_entropy(inputs: Shapes) -> OpRule:
    """With divided classes, in float32, a step at a time, as DTensor does it (torch/distributed/
    tensor/parallel/loss.py): forward the largest logit is subtracted, and exponentials are summed
    before there are log-probabilities, which are kept; backward there are zeros with what was
    picked, exponentials, their sum, and that times what comes back."""
    sample, _, position = labels(inputs[0].shape)
    every = points([sample, "classes", position])
    wide = f"{every}/float32"
    read, made, added = Kernel((wide,)), Kernel((wide, wide)), Kernel((wide, wide, wide))
    return replace(
        _cross_entropy(inputs),
        forward=(read, made, made, read, made),
        backward=(read, made, added, made),
        saves=(Saved(every, dtype="float32"), Saved("input 1")),
        workspace=((wide,), (wide, wide)),
    )


def _metric(inputs: Shapes) -> OpRule:
    """A cross-entropy of which nothing is trained: logits are cast, then it is torch's softmax of
    long rows, which is read for the largest number, for the sum and for the result."""
    sample, _, position = labels(inputs[0].shape)
    tokens = [name for name in (sample, position) if name != "1"]
    wide = f"{points([sample, 'classes', position])}/float32"
    return OpRule(
        signature([[sample, "classes", position], [sample, position]], [[]]),
        whole=("classes",),
        sums=tuple(tokens),
        forward=(
            Kernel(("input 0", wide)),
            Kernel((wide, wide), again=(wide, wide)),
            Kernel(("input 1",)),
        ),
    )


RULES: dict[str, Callable[[Shapes], OpRule]] = {
    "fused.rms_norm.default": _rms_norm,
    "fused.rms_norm.one_pass": _in_one_pass(_rms_norm),
    "fused.rms_norm.then_cast": _norm_then_cast,
    "fused.rms_norm.then_cast_twice": _norm_then_cast_twice,
    "fused.layer_norm.one_pass": _in_one_pass(_layer_norm),
    "fused.cast.default": _cast,
    "fused.rotary.default": _rotary,
    "fused.rotary.in_steps": _rotary_in_steps,
    "fused.rotary.part": _rotary_part,
    "fused.clamped.above": _clamped_above,
    "fused.clamped.on_both_sides": _clamped_on_both_sides,
    "fused.latent_keys.default": _latent_keys,
    "fused.causal_attention.default": _causal_attention,
    "fused.repeated.default": _repeated,
    "fused.ring_attention.default": _ring_attention,
    "fused.near_attention.default": _near_attention,
    "fused.grouped.default": _grouped,
    "fused.moved.default": _moved,
    "fused.moved.awaited": _awaited,
    "fused.moved.strided": _strided,
    "fused.spread.default": _spread,
    "fused.cast.twice": _cast_twice,
    "fused.expert_bias.default": _expert_bias,
    "fused.causal_softmax.default": _causal_softmax,
    "fused.swiglu.default": _swiglu,
    "fused.dropout.default": _dropout,
    "fused.dropout.into_sum": _dropout_into_sum,
    "fused.sum.default": _sum,
    "fused.cross_entropy.default": _cross_entropy,
    "fused.cross_entropy.divided": _divided_cross_entropy,
    "fused.metric.default": _metric,
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
