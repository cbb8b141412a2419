"""Normalisation, and dropout: what stands between the products."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from autopar.ir.graph import Operator, TensorSpec
from autopar.ir.rule import Inner, Kernel, Kernels, OpRule, RuleMaker, Saved
from autopar.ops.signatures import (
    Shape,
    accumulation_dtype,
    dim_of,
    labels,
    points,
    position,
    present,
    signature,
    with_argument,
)

Specs = tuple[TensorSpec, ...]


def _normalised(operator: Operator, inputs: Specs) -> tuple[list[str], list[str]]:
    """Labels of the leading dims and of the dims that are normalised together."""
    shape = inputs[0].shape
    lead = len(shape) - len(operator.argument(1, "normalized_shape"))
    names = labels(shape)
    return names[:lead], names[lead:]


def layer_norm(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Split by everything but the normalised dims. Mean and deviation of each row are kept."""
    lead, inner = _normalised(operator, inputs)
    affine = present(position(operator, 2, "weight"), position(operator, 3, "bias"))
    rows = [*lead, *("1" for _ in inner)]
    own = (
        (Saved("output 1"), Saved("output 2")) if len(outputs) == 3 else (Saved(points(lead)),) * 2
    )
    x, y, weights = "input 0", "output 0", tuple(f"input {i}" for i in affine)
    kept = tuple(saved.what for saved in own)
    columns = Kernel(
        (y, x, *kept, *weights),
        needs=affine,
        threads=COLUMN_THREADS,
        shares=points(inner),
        loads=COLUMN_LOADS,
    )
    return OpRule(
        signature(
            [[*lead, *inner], *[inner for _ in affine]],
            [[*lead, *inner], rows, rows][: len(outputs)],
        ),
        whole=tuple(n for n in inner if n != "1"),
        saves=(Saved("input 0"), *(Saved(f"input {i}") for i in affine), *own),
        forward=(Kernel((x, *weights, y, *kept), again=(x,)),),
        backward=(
            Kernel((y, x, *kept, *weights[:1], x), again=(y, x), needs=(0,)),
            *((columns,) if affine else ()),
        ),
    )


BLOCK_THREADS = 512
"""Of the one block that reads all of a channel of a batch norm, or of a sample's group
(Normalization.cuh and group_norm_kernel.cu of torch), a number at a time for each thread."""

COLUMN_THREADS, COLUMN_LOADS = 32, 8
"""Of kernels that sum gradients of scale and shift over rows: blocks of 32 times 32 threads take 32
columns, and each thread eight rows after each other (layer_norm_kernel.cu)."""


def rms_norm(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Below float32 the kernel works on a float32 copy of its input, and keeps that."""
    del outputs
    lead, inner = _normalised(operator, inputs)
    weight = position(operator, 2, "weight")
    accumulated = accumulation_dtype(inputs[0].dtype)
    every = points([*lead, *inner])
    x = Saved("input 0", needs=(0,))
    if accumulated != inputs[0].dtype:
        x = Saved(every, dtype=accumulated)
    saves = [x, Saved(points(lead), needs=(0,), dtype=accumulated)]
    if weight is not None:
        saves += [Saved(f"input {weight}", needs=(0,)), Saved(every, (weight,), accumulated)]
    return OpRule(
        signature([[*lead, *inner]] + [inner] * (weight is not None), [[*lead, *inner]]),
        whole=tuple(n for n in inner if n != "1"),
        saves=tuple(saves),
    )


def group_norm(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """``(g c)`` channels: groups can be split, and with them the number that the op is told."""
    del outputs
    groups = int(operator.argument(1, "num_groups"))
    batch, channels, *space = labels(inputs[0].shape)
    if groups > 1:
        channels = "(g c)" if inputs[0].shape[1] > groups else "g"
    affine = present(position(operator, 2, "weight"), position(operator, 3, "bias"))
    x = [batch, channels, *space]
    whole = [n for n in space if n != "1"] + ([channels] if groups == 1 and channels != "1" else [])
    own = Saved(points([batch, "g" if groups > 1 else "1"]))

    def localize(o: Operator, ins: tuple[Shape, ...], outs: tuple[Shape, ...]) -> Operator:
        del outs
        return with_argument(o, 1, "num_groups", groups * ins[0][1] // inputs[0].shape[1])

    weights = (Saved(f"input {i}") for i in affine[:1] if operator.argument(2, "weight"))
    sizes = inputs[0].shape
    of_group = sizes[1] // groups * prod(sizes[2:])
    moments = Kernel(
        ("input 0", own.what, own.what),
        threads=_block_threads(of_group),
        shares=own.what,
    )
    every = points([batch, channels])
    sums = Kernel(
        ("output 0", "input 0", every, every),
        threads=_block_threads(prod(sizes[2:])),
        shares=every,
        loads=2,
    )
    given = tuple(f"input {i}" for i in affine)
    return OpRule(
        signature([x, *[[channels] for _ in affine]], [x]),
        whole=tuple(whole),
        saves=(Saved("input 0"), *weights, own, own),
        forward=(moments, Kernel(("input 0", *given, "output 0"), indexed=1)),
        backward=(
            sums,
            Kernel(("output 0", "input 0", "input 0"), needs=(0,), indexed=1),
            *((Kernel((every, every, *given), needs=affine),) if affine else ()),
        ),
        localize=localize,
        sizes=(("g", groups),) if "g" in points([channels]).split() else (),
    )


def _block_threads(elements: int) -> int:
    """A warp where there is not one number for each thread of a block."""
    return 32 if elements < BLOCK_THREADS else BLOCK_THREADS


def instance_norm(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Every sample and channel by itself."""
    del outputs
    batch, channels, *space = labels(inputs[0].shape)
    x = [batch, channels, *space]
    affine = present(position(operator, 1, "weight"), position(operator, 2, "bias"))
    own = Saved(points([batch, channels]))
    return OpRule(
        signature([x, *[[channels] for _ in affine]], [x]),
        whole=tuple(n for n in space if n != "1"),
        saves=(Saved("input 0"), *([own] if affine else []), own, own),
    )


def batch_norm(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    if not operator.argument(5 if len(outputs) == 5 else 3, "training"):
        return frozen_batch_norm(operator, inputs, outputs)
    return _global_batch_norm(operator, inputs, outputs)


def _global_batch_norm(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """In training: statistics over batch and space, all-reduced when these are split.

    Outputs: normalised, mean, 1 / deviation, new running mean, new running variance; all but the
    first are the same on all ranks of an axis that does not divide the channels.
    """
    batch, channels, *space = labels(inputs[0].shape)
    x = [batch, channels, *space]
    rows = [name for name in (batch, *space) if name != "1"]
    accumulated = accumulation_dtype(inputs[0].dtype)
    channel = points([channels])
    inner = tuple(
        collective
        for name in rows
        for collective in (
            Inner(name, "all_reduce", "forward", channel, dtype=accumulated),
            Inner(name, "all_reduce", "forward", channel, dtype=accumulated),
            Inner(name, "all_reduce", "backward", channel, times=2, dtype=accumulated),
        )
    )
    bias = position(operator, 2, "bias")
    wide, casts = f"{points(x)}/{accumulated}", accumulated != inputs[0].dtype
    return OpRule(
        signature([x, *[[channels] for _ in inputs[1:]]], [x, *[[channels] for _ in outputs[1:]]]),
        agreed=tuple(range(1, len(outputs))),
        special=tuple(rows),
        inner=inner,
        saves=(
            Saved("input 0"),
            *(Saved(f"input {i}") for i in range(1, len(inputs)) if i != bias),
            Saved("output 1"),
            Saved("output 2"),
        ),
        forward=_batch_statistics(rows, channel, wide, len(inputs), casts=casts),
        backward=_batch_gradients(rows, channel, wide, casts=casts),
    )


def _batch_statistics(
    rows: Sequence[str], channel: str, wide: str, inputs: int, *, casts: bool
) -> Kernels:
    """A block for each channel, then all points. Where ranks agree on statistics it is a formula
    (``runtime.local_ops``), in float32 or wider."""
    x, y, together = "input 0", "output 0", tuple(rows)
    numbers = tuple(f"input {i}" for i in range(1, inputs))
    steps = [(wide,), *((wide, wide),) * 2, (wide,), *((wide, wide),) * 3]
    steps = [(x, wide), *steps, (wide, y)] if casts else steps
    return (
        Kernel((x,), threads=BLOCK_THREADS, shares=channel, undivided=together),
        Kernel((x, *numbers, y), undivided=together),
        *(Kernel(moves, divided=together) for moves in steps),
    )


def _batch_gradients(rows: Sequence[str], channel: str, wide: str, *, casts: bool) -> Kernels:
    """A block for each channel reads it for two sums, and again for the gradient."""
    x, y, together = "input 0", "output 0", tuple(rows)
    normal, sums = ((wide, wide),) * 2, ((wide,), (wide, wide, wide), (wide,))
    gradient = ((wide, wide), (wide, wide), (wide, wide, wide), (wide, wide))
    steps = [*normal, *sums, *gradient]
    steps = [(y, wide), (x, wide), *steps, (wide, x)] if casts else steps
    alone = Kernel(
        (y, x, x),
        again=(y, x),
        threads=BLOCK_THREADS,
        shares=channel,
        loads=2,
        undivided=together,
    )
    return (alone, *(Kernel(moves, divided=together) for moves in steps))


def frozen_batch_norm(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """In evaluation: a scale and a shift for each channel."""
    bias = position(operator, 2, "bias")
    batch, channels, *space = labels(inputs[0].shape)
    x = [batch, channels, *space]
    out = [x] + [["empty"] if spec.shape == (0,) else [channels] for spec in outputs[1:]]
    return OpRule(
        signature([x, *[[channels] for _ in inputs[1:]]], out),
        whole=("empty",) if any("empty" in dims for dims in out) else (),
        agreed=tuple(range(1, len(outputs))),
        saves=tuple(Saved(f"input {i}") for i in range(len(inputs)) if i != bias),
    )


def dropout(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """The mask is a function of the global index, so every split draws the same one: drawn, taken
    and scaled by a kernel each, the latter two again backward."""
    names = labels(inputs[0].shape)
    p = float(operator.argument(1, "p", 0.5))
    draws = 0.0 < p < 1.0 and operator.argument(2, "train", True) is not False
    x, y, mask = "input 0", "output 0", f"{points(names)}/bool"
    taken, scaled = Kernel((x, mask, y)), Kernel((y, y))
    return OpRule(
        signature([names], [names for _ in outputs]),
        linear=(0,),
        special=("*",),
        saves=(Saved("output 1"),) if len(outputs) == 2 else (Saved(points(names), dtype="bool"),),
        forward=(Kernel((mask,)), taken, scaled) if draws else None,
        backward=(scaled, taken) if draws else None,
    )


def weight_norm(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """A direction with a length for each index of one dim: only that dim can be split."""
    del outputs
    names = labels(inputs[0].shape)
    dim = dim_of(operator.argument(2, "dim", 0), len(names))
    lengths = ["1"] * len(names)
    lengths[dim] = names[dim]
    return OpRule(
        signature([names, lengths], [names, lengths]),
        whole=tuple(n for i, n in enumerate(names) if i != dim and n != "1"),
        saves=(Saved("input 0"), Saved("input 1"), Saved("output 1")),
    )


RULES: dict[str, OpRule | RuleMaker] = {
    "aten._weight_norm_interface.default": weight_norm,
    "aten.layer_norm.default": layer_norm,
    "aten.native_layer_norm.default": layer_norm,
    "aten.rms_norm.default": rms_norm,
    "aten.group_norm.default": group_norm,
    "aten.instance_norm.default": instance_norm,
    "aten._native_batch_norm_legit_functional.default": batch_norm,
    "aten._native_batch_norm_legit.no_stats": batch_norm,
    "aten._native_batch_norm_legit_no_training.default": frozen_batch_norm,
    "aten.native_dropout.default": dropout,
    "aten.dropout.default": dropout,
}
