"""Ops that move or regroup elements and compute nothing: view, permute, slice, cat, pad."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count, pairwise
from math import gcd
from operator import mul

from autopar.ir.graph import Operator, TensorSpec
from autopar.ir.rule import Kernel, Localize, OpRule, RuleMaker, Saved
from autopar.ops.signatures import (
    Shape,
    broadcast,
    dim_of,
    dims_of,
    labels,
    signature,
    sizes_from_output,
    with_argument,
)

Specs = tuple[TensorSpec, ...]


def view_rule(
    inputs: Sequence[Sequence[str]],
    outputs: Sequence[Sequence[str]],
    specs: Specs,
    *,
    whole: Sequence[str] = (),
    copies: bool = False,
    localize: Localize | None = None,
) -> OpRule:
    """Linear in all its inputs together, keeps nothing."""
    return OpRule(
        signature(inputs, outputs),
        whole=tuple(whole),
        linear=tuple(range(len(specs))) if all(spec.is_floating for spec in specs) else (),
        kind="memory" if copies else "view",
        localize=localize,
    )


@dataclass(frozen=True, slots=True)
class Regrouped:
    """Labels of both sides of a reshape, factors that must stay whole, sizes that do not follow."""

    left: list[str]
    right: list[str]
    whole: tuple[str, ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()


def regrouped(source: Shape, target: Shape) -> Regrouped:
    """The factors of a reshape.

    The boundaries of the dims of both shapes, counted in elements from the outside, cut the
    elements into factors: (4, 6) -> (2, 12) is ``(a b) c -> a (b c)`` with a = 2, b = 2, c = 6.
    Where the boundaries do not divide each other, only a common divisor of the first dims is left.

    >>> regrouped((4, 6), (2, 12))
    Regrouped(left=['(f0 f1)', 'f2'], right=['f0', '(f1 f2)'], whole=(), sizes=())
    >>> regrouped((6, 4), (8, 3)).left, regrouped((6, 4), (8, 3)).right
    (['(f0 f1)', 'f2'], ['(f0 f3)', 'f4'])
    """
    left, right = [""] * len(source), [""] * len(target)
    whole: list[str] = []
    given: list[tuple[str, int]] = []
    names = (f"f{i}" for i in count())
    for block in _blocks(source, target):
        sides = [
            (labels, [(dim, shape[dim]) for dim in dims if shape[dim] > 1])
            for labels, shape, dims in zip((left, right), (source, target), block, strict=True)
        ]
        cuts = sorted({c for _, dims in sides for c in accumulate((n for _, n in dims), mul)})
        if all(b % a == 0 for a, b in pairwise(cuts)):
            factors = [(c, next(names)) for c in cuts]
            for labels, dims in sides:
                before = 1
                for dim, size in dims:
                    parts = [name for c, name in factors if before < c <= before * size]
                    labels[dim] = _compound(parts)
                    before *= size
            continue
        common = gcd(*(dims[0][1] for _, dims in sides))
        shared = next(names) if common > 1 else ""
        given += [(shared, common)] if shared else []
        for labels, dims in sides:
            for dim, size in dims:
                lead = [shared] if shared and dim == dims[0][0] else []
                own = [next(names)] if size > common or not lead else []
                whole += own
                labels[dim] = _compound(lead + own)
    return Regrouped(
        [x or "1" for x in left], [x or "1" for x in right], tuple(whole), tuple(given)
    )


def _compound(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"({' '.join(parts)})"


def _blocks(source: Shape, target: Shape) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of dims, left and right, that hold the same number of elements."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(source) or j < len(target):
        left, right, a, b = [], [], 1, 1
        while True:
            if i < len(source) and (a <= b or j == len(target)):
                left.append(i)
                a *= source[i]
                i += 1
            elif j < len(target):
                right.append(j)
                b *= target[j]
                j += 1
            if a == b or (i == len(source) and j == len(target)):
                break
        blocks.append((left, right))
    return blocks


def reshape(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    source, target = inputs[0].shape, outputs[0].shape
    if 0 in source:
        return opaque(operator, inputs, outputs)
    return _reshaped(regrouped(source, target), inputs, sizes_from_output(1, "size"))


def _reshaped(found: Regrouped, inputs: Specs, localize: Localize | None) -> OpRule:
    rule = view_rule([found.left], [found.right], inputs, whole=found.whole, localize=localize)
    return replace(rule, sizes=found.sizes)


def flatten(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Reshapes that are told dims, not sizes (flatten, squeeze)."""
    del operator
    return _reshaped(regrouped(inputs[0].shape, outputs[0].shape), inputs, None)


def unflatten(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    rank = len(inputs[0].shape)
    dim = dim_of(operator.argument(1, "dim"), rank)
    count = len(outputs[0].shape) - rank + 1

    def localize(o: Operator, ins: tuple[Shape, ...], outs: tuple[Shape, ...]) -> Operator:
        del ins
        return with_argument(o, 2, "sizes", outs[0][dim : dim + count])

    return _reshaped(regrouped(inputs[0].shape, outputs[0].shape), inputs, localize)


def opaque(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Nothing is known of how elements move: no dim can be split."""
    del operator
    left = [labels(spec.shape, f"i{n}_") for n, spec in enumerate(inputs)]
    right = [labels(spec.shape, f"o{n}_") for n, spec in enumerate(outputs)]
    whole = [name for side in left + right for name in side if name != "1"]
    return view_rule(left, right, inputs, whole=whole, copies=True)


def permute(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    del outputs
    names = labels(inputs[0].shape)
    order = dims_of(operator.argument(1, "dims"), len(names))
    return view_rule([names], [[names[i] for i in order]], inputs)


def transpose(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    del outputs
    names = labels(inputs[0].shape)
    swapped = list(names)
    a, b = (dim_of(operator.argument(i, f"dim{i - 1}"), len(names)) for i in (1, 2))
    swapped[a], swapped[b] = names[b], names[a]
    return view_rule([names], [swapped], inputs)


def matrix_transpose(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    del operator, outputs
    names = labels(inputs[0].shape)
    return view_rule([names], [names[:-2] + names[-2:][::-1]], inputs)


def unsqueeze(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    names = labels(inputs[0].shape)
    dim = dim_of(operator.argument(1, "dim"), len(outputs[0].shape))
    return view_rule([names], [[*names[:dim], "1", *names[dim:]]], inputs)


def squeeze(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Locally it must not squeeze dims that only this rank has at size 1."""
    source = inputs[0].shape
    names = labels(source)
    given = None if operator.op == "aten.squeeze.default" else operator.argument(1, "dim")
    gone = tuple(d for d in dims_of(given, len(source)) if source[d] == 1)
    del outputs

    def localize(o: Operator, ins: tuple[Shape, ...], outs: tuple[Shape, ...]) -> Operator:
        del ins, outs
        return replace(o, op="aten.squeeze.dims", arguments=(o.arguments[0], gone))

    kept = [name for d, name in enumerate(names) if d not in gone]
    return view_rule([names], [kept], inputs, localize=localize)


def expand(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """A dim that is new or repeated can be split: every rank then repeats it less often. Gradients
    of what is repeated are summed."""
    del operator
    names = labels(outputs[0].shape)
    lead = len(names) - len(inputs[0].shape)
    source = ["1" if size == 1 else names[lead + i] for i, size in enumerate(inputs[0].shape)]
    rule = view_rule([source], [names], inputs, localize=sizes_from_output(1, "size"))
    if inputs[0].numel == outputs[0].numel:
        return rule
    return replace(rule, backward=(Kernel(("output 0", "input 0")),))


def repeat(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """``(times d)``: the copies are outermost, so only they can be split."""
    del outputs
    source = inputs[0].shape
    repeats = tuple(int(n) for n in operator.argument(1, "repeats"))
    lead = len(repeats) - len(source)
    names = labels(source)
    target = []
    for i, times in enumerate(repeats):
        name = "1" if i < lead else names[i - lead]
        if times > 1:
            target.append(f"r{i}" if name == "1" else f"(r{i} {name})")
        else:
            target.append(name)

    def localize(o: Operator, ins: tuple[Shape, ...], outs: tuple[Shape, ...]) -> Operator:
        padded = (1,) * lead + ins[0]
        times = tuple(b // a for a, b in zip(padded, outs[0], strict=True))
        return with_argument(o, 1, "repeats", times)

    return view_rule([names], [target], inputs, copies=True, localize=localize)


def repeat_interleave(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """``(d times)``: the copies are innermost, so the dim itself can be split."""
    source = inputs[0].shape
    if operator.argument(2, "dim") is None:
        return opaque(operator, inputs, outputs)
    dim = dim_of(operator.argument(2, "dim"), len(source))
    names = labels(source)
    target = list(names)
    times = outputs[0].shape[dim] // source[dim]
    if times > 1:
        target[dim] = "times" if names[dim] == "1" else f"({names[dim]} times)"

    def localize(o: Operator, ins: tuple[Shape, ...], outs: tuple[Shape, ...]) -> Operator:
        o = with_argument(o, 1, "repeats", outs[0][dim] // ins[0][dim])
        return (
            o
            if o.argument(3, "output_size") is None
            else with_argument(o, 3, "output_size", outs[0][dim])
        )

    return view_rule([names], [target], inputs, copies=True, localize=localize)


def _cut(names: Sequence[str], dim: int, shapes: Sequence[Shape], prefix: str) -> list[list[str]]:
    """``names`` for tensors whose ``dim`` has sizes of its own."""
    sides = []
    for i, shape in enumerate(shapes):
        side = list(names)
        side[dim] = "1" if shape[dim] == 1 else f"{prefix}{i}"
        sides.append(side)
    return sides


def _wholes(sides: Sequence[Sequence[str]], dim: int) -> list[str]:
    return [side[dim] for side in sides if side[dim] != "1"]


def slicing(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """The sliced dim stays whole, unless all of it is taken."""
    source, target = inputs[0].shape, outputs[0].shape
    dim = dim_of(operator.argument(1, "dim", 0), len(source))
    names = labels(source)
    if source == target:

        def localize(o: Operator, ins: tuple[Shape, ...], outs: tuple[Shape, ...]) -> Operator:
            del outs
            o = with_argument(o, 2, "start", 0)
            return with_argument(o, 3, "end", ins[0][dim])

        return view_rule([names], [names], inputs, localize=localize)
    (out,) = _cut(names, dim, [target], "part")
    rule = view_rule([names], [out], inputs, whole=[*_wholes([names, out], dim)])
    return replace(rule, backward=AMONG_ZEROS)


AMONG_ZEROS = (Kernel(("input 0",)), Kernel(("output 0", "output 0")))
"""The gradient of a part of a tensor: zeros, and a copy."""


def select(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    del outputs
    names = labels(inputs[0].shape)
    dim = dim_of(operator.argument(1, "dim"), len(names))
    rule = view_rule([names], [names[:dim] + names[dim + 1 :]], inputs)
    return rule if inputs[0].shape[dim] == 1 else replace(rule, backward=AMONG_ZEROS)


def unbind(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    names = labels(inputs[0].shape)
    dim = dim_of(operator.argument(1, "dim", 0), len(names))
    return view_rule([names], [names[:dim] + names[dim + 1 :] for _ in outputs], inputs)


def split(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """The dim that is cut into outputs stays whole."""
    names = labels(inputs[0].shape)
    dim = dim_of(operator.argument(2, "dim", 0), len(names))
    sides = _cut(names, dim, [spec.shape for spec in outputs], "part")
    return view_rule([names], sides, inputs, whole=_wholes([names, *sides], dim))


def cat(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """The joined dim stays whole. An empty vector may be joined to anything. Gradients are parts of
    that of the result."""
    target = outputs[0].shape
    names = labels(target)
    dim = dim_of(operator.argument(1, "dim", 0), len(target))
    sides = []
    for i, spec in enumerate(inputs):
        empty = spec.shape == (0,) and len(target) != 1
        sides.append([f"part{i}"] if empty else _cut(names, dim, [spec.shape], f"part{i}_")[0])
    whole = [n for side in sides for n in side if n.startswith("part")]
    rule = view_rule(sides, [names], inputs, whole=[*whole, *_wholes([names], dim)], copies=True)
    return replace(rule, backward=())


def stack(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    target = outputs[0].shape
    names = labels(target, "d")
    dim = dim_of(operator.argument(1, "dim", 0), len(target))
    side = names[:dim] + names[dim + 1 :]
    rule = view_rule(
        [side] * len(inputs), [names], inputs, whole=_wholes([names], dim), copies=True
    )
    return replace(rule, backward=())


def pad(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Padded dims stay whole; only padding with zeros passes partial sums."""
    source, target = inputs[0].shape, outputs[0].shape
    names = labels(source)
    amounts = operator.argument(1, "pad")
    padded = {len(source) - 1 - i // 2 for i, amount in enumerate(amounts) if amount}
    out = [
        ("1" if target[i] == 1 else f"padded{i}") if i in padded else name
        for i, name in enumerate(names)
    ]
    whole = [n for i in padded for n in (names[i], out[i]) if n != "1"]
    rule = view_rule([names], [out], inputs, whole=whole, copies=True)
    mode = operator.argument(2, "mode", "constant") if "constant" not in operator.op else "constant"
    index = 2 if "constant" in operator.op else 3
    filled = mode == "constant" and bool(operator.argument(index, "value", None))
    kept = () if mode == "constant" else (Saved("input 0"),)
    return replace(rule, linear=() if filled else rule.linear, saves=kept)


def keeping(dims: Callable[[Operator, int], tuple[int, ...]], *, linear: bool = True) -> RuleMaker:
    """Output like the input, ``dims`` whole (flip, roll, tril)."""

    def make(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
        del outputs
        names = labels(inputs[0].shape)
        whole = [names[d] for d in dims(operator, len(names)) if names[d] != "1"]
        rule = view_rule([names], [names], inputs, whole=whole, copies=True)
        return rule if linear else replace(rule, linear=())

    return make


def slice_scatter(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Part of a dim replaced by another tensor: that dim stays whole."""
    del outputs
    names = labels(inputs[0].shape)
    dim = dim_of(operator.argument(2, "dim", 0), len(names))
    (part,) = _cut(names, dim, [inputs[1].shape], "part")
    whole = dict.fromkeys(_wholes([names, part], dim))
    return view_rule([names, part], [names], inputs, whole=[*whole], copies=True)


def select_scatter(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    del outputs
    names = labels(inputs[0].shape)
    dim = dim_of(operator.argument(2, "dim"), len(names))
    part = names[:dim] + names[dim + 1 :]
    return view_rule([names, part], [names], inputs, whole=_wholes([names], dim), copies=True)


def overwrite(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """The second tensor, broadcast to the shape of the first."""
    del operator, outputs
    shape = inputs[0].shape
    names = labels(shape)
    rule = view_rule(
        [names, broadcast(inputs[1].shape, shape, names)], [names], inputs, copies=True
    )
    return replace(rule, linear=(1,) if all(spec.is_floating for spec in inputs) else ())


def diagonal(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    names = labels(inputs[0].shape)
    a, b = (
        dim_of(operator.argument(i, f"dim{i - 1}", default), len(names))
        for i, default in ((2, 0), (3, 1))
    )
    kept = [n for i, n in enumerate(names) if i not in (a, b)]
    last = "1" if outputs[0].shape[-1] == 1 else "diagonal"
    return view_rule([names], [[*kept, last]], inputs, whole=["diagonal"] if last != "1" else [])


def unfold(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Windows of a dim: that dim and the new one stay whole."""
    names = labels(inputs[0].shape)
    dim = dim_of(operator.argument(1, "dimension"), len(names))
    (out,) = _cut(names, dim, [outputs[0].shape], "windows")
    last = "1" if outputs[0].shape[-1] == 1 else "window"
    whole = [n for n in (names[dim], out[dim], last) if n != "1"]
    return view_rule([names], [[*out, last]], inputs, whole=whole)


def complex_pairs(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """The last dim of size 2 holds real and imaginary parts."""
    del operator
    real, other = inputs[0].shape, outputs[0].shape
    names = labels(min(real, other, key=len))
    sides = [names if len(shape) == len(names) else [*names, "pair"] for shape in (real, other)]
    return view_rule([sides[0]], [sides[1]], inputs, whole=["pair"])


FLIP = keeping(lambda o, rank: dims_of(o.argument(1, "dims"), rank))
ROLL = keeping(lambda o, rank: dims_of(o.argument(2, "dims"), rank))
TRIANGLE = keeping(lambda o, rank: (rank - 2, rank - 1))

RULES: dict[str, OpRule | RuleMaker] = {
    "aten.view.default": reshape,
    "aten._unsafe_view.default": reshape,
    "aten.reshape.default": reshape,
    "aten.view_copy.default": reshape,
    "aten.flatten.using_ints": flatten,
    "aten.unflatten.int": unflatten,
    "aten.permute.default": permute,
    "aten.transpose.int": transpose,
    "aten.t.default": matrix_transpose,
    "aten.numpy_T.default": matrix_transpose,
    "aten.mT.default": matrix_transpose,
    "aten.unsqueeze.default": unsqueeze,
    "aten.squeeze.default": squeeze,
    "aten.squeeze.dim": squeeze,
    "aten.squeeze.dims": squeeze,
    "aten.expand.default": expand,
    "aten.repeat.default": repeat,
    "aten.repeat_interleave.self_int": repeat_interleave,
    "aten.slice.Tensor": slicing,
    "aten.select.int": select,
    "aten.unbind.int": unbind,
    "aten.split.Tensor": split,
    "aten.unsafe_split.Tensor": split,
    "aten.split_with_sizes.default": split,
    "aten.split.sizes": split,
    "aten.chunk.default": split,
    "aten.cat.default": cat,
    "aten.stack.default": stack,
    "aten.pad.default": pad,
    "aten.constant_pad_nd.default": pad,
    "aten.flip.default": FLIP,
    "aten.roll.default": ROLL,
    "aten.tril.default": TRIANGLE,
    "aten.triu.default": TRIANGLE,
    "aten.diagonal.default": diagonal,
    "aten.unfold.default": unfold,
    "aten.slice_scatter.default": slice_scatter,
    "aten.select_scatter.default": select_scatter,
    "aten.copy.default": overwrite,
    "aten.fill.Tensor": overwrite,
    "aten.as_strided.default": opaque,
    "aten.view_as_complex.default": complex_pairs,
    "aten.view_as_real.default": complex_pairs,
}
