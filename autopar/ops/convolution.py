"""Convolutions, pooling and resampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autopar.ir.graph import Argument, Operator, TensorSpec
from autopar.ir.rule import Kernel, Localize, OpRule, Product, RuleMaker, Saved
from autopar.ops.signatures import Shape, labels, points, signature, with_argument

Specs = tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class Arguments:
    """Where a convolution has its arguments: ``convolution`` and ``conv2d`` differ."""

    stride: int = 3
    padding: int = 4
    dilation: int = 5
    groups: int = 6
    transposed: bool = False


def _per_dim(argument: Argument, rank: int) -> tuple[int, ...]:
    many = argument if isinstance(argument, tuple) else (argument,)
    return tuple(int(x) for x in many) * (rank if len(many) == 1 else 1)


def _padding(argument: Argument, kernel: Shape) -> tuple[int, ...]:
    if argument == "valid":
        return (0,) * len(kernel)
    if argument == "same":
        return tuple(size - 1 for size in kernel)  # only whether it is zero matters
    return _per_dim(argument, len(kernel))


def convolution(where: Arguments) -> RuleMaker:
    """Split by batch, by output channels, by input channels (a sum), and by groups.

    Space is split where windows do not overlap (1 x 1, and patches), since elsewhere a rank would
    need a margin of its neighbours.
    """

    def make(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
        x, weight, out = inputs[0].shape, inputs[1].shape, outputs[0].shape
        kernel = weight[2:]
        rank = len(kernel)
        batched = len(x) == rank + 2
        groups = int(operator.argument(where.groups, "groups", 1))
        stride = _per_dim(operator.argument(where.stride, "stride", 1), rank)
        padding = _padding(operator.argument(where.padding, "padding", 0), kernel)
        dilation = _per_dim(operator.argument(where.dilation, "dilation", 1), rank)

        ci, each_in = _channels("in", x[-rank - 1], groups)
        co, each_out = _channels("out", out[-rank - 1], groups)
        # a weight has its groups in the first dim, whichever channels that counts
        taps = [ci, each_out] if where.transposed else [co, each_in]
        window = ["1" if size == 1 else f"k{i}" for i, size in enumerate(kernel)]

        small, large = (x, out) if where.transposed else (out, x)
        here = labels(small[-rank:], "p")
        there = labels(large[-rank:], "w")
        whole: list[str] = []
        for i in range(rank):
            apart = (
                stride[i] == kernel[i]
                and padding[i] == 0
                and dilation[i] in (1, kernel[i])
                and large[i - rank] == small[i - rank] * stride[i]
            )
            if apart and small[i - rank] > 1:
                there[i] = f"p{i}" if kernel[i] == 1 else f"(p{i} k{i})"
            elif apart and kernel[i] > 1:
                there[i] = f"k{i}"
            else:
                whole += [n for n in (here[i], there[i]) if n != "1"]
        source, target = (here, there) if where.transposed else (there, here)
        batch = labels(x[:1], "b") if batched else []
        biased = len(inputs) == 3
        rows = points([*batch, *here])
        product = (
            Product("g" * (groups > 1), rows, points([each_out, *window]), points([each_in]))
            if where.transposed
            else Product("g" * (groups > 1), rows, points([each_out]), points([each_in, *window]))
        )
        return OpRule(
            signature(
                [[*batch, ci, *source], [*taps, *window], *[[co]] * biased], [[*batch, co, *target]]
            ),
            whole=tuple(dict.fromkeys(n for n in (*whole, *window) if n != "1")),
            sums=("in",) if ci == "in" else (),
            addends=(2,) if biased else (),
            linear=(0, 2) if biased else (0,),
            kind="convolution",
            products=(product,),
            saves=(Saved("input 0"), Saved("input 1")),
            localize=_local_groups(where.groups, x[-rank - 1] // groups, -rank - 1)
            if groups > 1
            else None,
        )

    return make


def _channels(name: str, size: int, groups: int) -> tuple[str, str]:
    """Labels of all channels and of those of one group."""
    if groups == 1:
        return ("1", "1") if size == 1 else (name, name)
    return ("g", "1") if size == groups else (f"(g {name})", name)


def _local_groups(index: int, channels_per_group: int, dim: int) -> Localize:
    def localize(
        operator: Operator, inputs: tuple[Shape, ...], outputs: tuple[Shape, ...]
    ) -> Operator:
        del outputs
        return with_argument(operator, index, "groups", inputs[0][dim] // channels_per_group)

    return localize


def pool(*, saves: str | None, space: int, indices: bool = False) -> RuleMaker:
    """Windows over the last ``space`` dims; split where these tile the input without overlap.

    ``indices``: positions are an output, counted over the whole plane, so space stays whole.
    """

    def make(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
        x, out = inputs[0].shape, outputs[0].shape
        kernel = _per_dim(operator.argument(1, "kernel_size"), space)
        given = operator.argument(2, "stride", ())
        stride = _per_dim(given, space) if given not in ((), None) else kernel
        padding = _per_dim(operator.argument(3, "padding", 0), space)
        tiled = [
            not indices
            and stride[i] == kernel[i]
            and padding[i] == 0
            and x[i - space] == out[i - space] * stride[i]
            for i in range(space)
        ]
        return _resampled(x, out, space, tiled, saves, len(outputs))

    return make


def adaptive_pool(*, saves: str | None, space: int, mean: bool = False) -> RuleMaker:
    """A mean down to one point is a sum over space, whose divisor is global."""

    def make(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
        x, out = inputs[0].shape, outputs[0].shape
        tiled = [
            len(outputs) == 1 and a % b == 0 for a, b in zip(x[-space:], out[-space:], strict=True)
        ]
        rule = _resampled(x, out, space, tiled, saves, len(outputs))
        total = tuple(
            f"w{i}" for i in range(space) if mean and out[i - space] == 1 and x[i - space] > 1
        )
        whole = tuple(name for name in rule.whole if name not in total)

        def localize(o: Operator, ins: tuple[Shape, ...], outs: tuple[Shape, ...]) -> Operator:
            del ins
            return with_argument(o, 1, "output_size", outs[0][-space:])

        averages = mean and ".adaptive" in operator.op and all(n == 1 for n in out[-space:])
        return replace(
            rule,
            whole=whole,
            sums=total,
            special=total,
            saves=() if averages else rule.saves,  # runs as a mean, which keeps nothing
            localize=localize,
        )

    return make


def nearest(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Every point becomes a block, when the size grows by a whole number."""
    x, out = inputs[0].shape, outputs[0].shape
    space = len(x) - 2
    tiled = [b % a == 0 for a, b in zip(x[2:], out[2:], strict=True)]
    rule = _resampled(out, x, space, tiled, None, 1, reverse=True)
    if operator.argument(1, "output_size") is None:
        return rule

    def localize(o: Operator, ins: tuple[Shape, ...], outs: tuple[Shape, ...]) -> Operator:
        del ins
        return with_argument(o, 1, "output_size", outs[0][2:])

    return replace(rule, linear=(0,), localize=localize)


def _resampled(
    large: Shape,
    small: Shape,
    space: int,
    tiled: Sequence[bool],
    saves: str | None,
    outputs: int,
    *,
    reverse: bool = False,
) -> OpRule:
    """Points of ``small`` and their windows in ``large``; ``reverse``: from small to large.

    Kernels of the largest in a window look at each point by its index; backward each point works
    out where it is, and which windows are the first and the last that have it."""
    lead = labels(large[:-space], "b")
    here, there = labels(small[-space:], "p"), labels(large[-space:], "w")
    whole: list[str] = []
    for i, tiles in enumerate(tiled):
        times = large[i - space] // small[i - space]
        if tiles and small[i - space] > 1:
            there[i] = f"p{i}" if times == 1 else f"(p{i} w{i})"
        else:
            whole += [n for n in (here[i], there[i]) if n != "1"]
    sides = [[*lead, *there], [*lead, *here]]
    if reverse:
        sides = sides[::-1]
    own = [Saved(points(sides[1]), dtype="int64")] if saves == "indices" and outputs == 1 else []
    own += [Saved("output 1")] if saves == "indices" and outputs == 2 else []
    rule = OpRule(
        signature([sides[0]], [sides[1]] * outputs),
        whole=tuple(whole),
        linear=() if saves == "indices" else (0,),
        saves=(*([Saved("input 0")] if saves else []), *own),
    )
    if saves != "indices":
        return rule
    largest = f"{points(sides[1])}/int64"
    return replace(
        rule,
        forward=(Kernel(("input 0", "output 0", largest), indexed=1),),
        backward=(Kernel(("input 0",)), Kernel(("output 0", largest, "input 0"), indexed=3)),
    )


def interpolated(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Points look beyond their own block, so space stays whole."""
    del operator
    x, out = inputs[0].shape, outputs[0].shape
    return replace(_resampled(x, out, len(x) - 2, [False] * (len(x) - 2), None, 1), linear=(0,))


def pixel_shuffle(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Channels ``(c r)`` become blocks of space."""
    del operator
    *lead, _, height, width = labels(inputs[0].shape)
    c = outputs[0].shape[-3]
    channels = "1" if c == 1 else "c"
    packed = "r" if c == 1 else "(c r)"
    tall = "y" if height == "1" else f"({height} y)"
    wide = "z" if width == "1" else f"({width} z)"
    return OpRule(
        signature([[*lead, packed, height, width]], [[*lead, channels, tall, wide]]),
        linear=(0,),
    )


CONVOLUTION = convolution(Arguments())
TRANSPOSED = convolution(Arguments(dilation=7, groups=6, transposed=True))


def general(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """``aten.convolution`` says in an argument whether it is transposed."""
    transposed = bool(operator.argument(6, "transposed", False))
    return convolution(Arguments(groups=8, transposed=transposed))(operator, inputs, outputs)


RULES: dict[str, OpRule | RuleMaker] = {
    **{f"aten.conv{n}d.{kind}": CONVOLUTION for n in (1, 2, 3) for kind in ("default", "padding")},
    **{
        f"aten.conv_transpose{n}d.{k}": TRANSPOSED
        for n, k in ((1, "default"), (2, "input"), (3, "input"))
    },
    "aten.convolution.default": general,
    **{f"aten.max_pool{n}d.default": pool(saves="indices", space=n) for n in (1, 2, 3)},
    **{
        f"aten.max_pool{n}d_with_indices.default": pool(saves="indices", space=n, indices=True)
        for n in (2, 3)
    },
    **{f"aten.avg_pool{n}d.default": pool(saves="input", space=n) for n in (1, 2, 3)},
    **{
        f"aten.adaptive_avg_pool{n}d.default": adaptive_pool(saves="input", space=n, mean=True)
        for n in (1, 2, 3)
    },
    **{
        f"aten._adaptive_avg_pool{n}d.default": adaptive_pool(saves="input", space=n, mean=True)
        for n in (2, 3)
    },
    **{
        f"aten.adaptive_max_pool{n}d.default": adaptive_pool(saves="indices", space=n)
        for n in (1, 2, 3)
    },
    **{f"aten.upsample_nearest{n}d.{k}": nearest for n in (1, 2, 3) for k in ("vec", "default")},
    "aten.upsample_linear1d.vec": interpolated,
    "aten.upsample_bilinear2d.vec": interpolated,
    "aten.upsample_bicubic2d.vec": interpolated,
    "aten.upsample_trilinear3d.vec": interpolated,
    "aten.pixel_shuffle.default": pixel_shuffle,
}
