"""Calls of every op that has a rule, in shapes that bring out its cases."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from autopar.ir.graph import Argument, Dtype, Input, Operator, TensorSpec
from autopar.runtime.grouped import BY_DEFINITION
from autopar.runtime.local_ops import aten
from autopar.runtime.rule_check import index_data, signed_data


@dataclass(frozen=True)
class T:
    """A tensor argument and the values it may have."""

    shape: tuple[int, ...]
    dtype: str = "float64"
    low: float | None = None
    high: float | None = None
    below: int | None = None  # indices
    ignored: bool = False  # some indices are -100
    ends_below: int | None = None  # where groups end, one of them empty
    differentiable: bool = True

    def draw(self, generator: torch.Generator) -> torch.Tensor | None:
        if self.below is not None:
            data = index_data(self.spec, self.below, generator)
            if self.ignored:
                data.view(-1)[: data.numel() // 2 : 2] = -100
            return data
        if self.ends_below is not None:
            data = torch.randint(0, self.ends_below, self.shape, generator=generator).sort().values
            data[1] = data[0]
            return data.to(getattr(torch, self.dtype))
        if self.low is not None and self.high is not None:
            data = torch.rand(self.shape, generator=generator, dtype=torch.float64)
            return data * (self.high - self.low) + self.low
        return None

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.shape, self.dtype)


def f(*shape: int, **options: Any) -> T:
    return T(shape, **options)


def i(*shape: int, **options: Any) -> T:
    return T(shape, "int64", **options)


def b(*shape: int) -> T:
    return T(shape, "bool")


def index(*shape: int, below: int, ignored: bool = False) -> T:
    return T(shape, "int64", below=below, ignored=ignored)


def ends(groups: int, rows: int) -> T:
    return T((groups,), "int32", ends_below=rows + 1)


def positive(*shape: int) -> T:
    return T(shape, low=0.2, high=2.0)


def unit(*shape: int) -> T:
    return T(shape, low=0.05, high=0.95)


@dataclass(frozen=True)
class Example:
    op: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shapes = "x".join(str(list(t.shape)).replace(" ", "") for t in self.tensors)
        rest = [str(a).replace(" ", "") for a in self.arguments if not _has_tensor(a)]
        words = [f"{k}={v}".replace(" ", "") for k, v in self.keywords.items()]
        return "-".join([self.op.removeprefix("aten."), shapes, *rest, *words])

    @cached_property
    def tensors(self) -> tuple[T, ...]:
        found: list[T] = []

        def visit(value: Any) -> None:
            if isinstance(value, T):
                found.append(value)
            elif isinstance(value, list | tuple):
                for item in value:
                    visit(item)

        visit(self.arguments)
        visit(tuple(self.keywords.values()))
        return tuple(found)

    @cached_property
    def operator(self) -> Operator:
        count = iter(range(len(self.tensors)))

        def written(value: Any) -> Argument:
            if isinstance(value, T):
                return Input(next(count))
            if isinstance(value, list | tuple):
                return tuple(written(item) for item in value)
            if isinstance(value, torch.dtype):
                return Dtype(str(value).removeprefix("torch."))
            return value

        return Operator(
            name=self.op,
            op=self.op,
            inputs=tuple(f"i{n}" for n in range(len(self.tensors))),
            outputs=tuple(f"o{n}" for n in range(len(self.output_specs))),
            arguments=tuple(written(a) for a in self.arguments),
            keywords=tuple((k, written(v)) for k, v in self.keywords.items()),
        )

    @cached_property
    def input_specs(self) -> tuple[TensorSpec, ...]:
        return tuple(t.spec for t in self.tensors)

    @cached_property
    def output_specs(self) -> tuple[TensorSpec, ...]:
        generator = torch.Generator().manual_seed(0)

        def value(item: Any) -> Any:
            if isinstance(item, T):
                drawn = item.draw(generator)
                return signed_data(item.spec, generator) if drawn is None else drawn
            if isinstance(item, list | tuple):
                return [value(x) for x in item]
            return item

        keywords = {k: value(v) for k, v in self.keywords.items()}
        called = BY_DEFINITION.get(self.op) or aten(self.op)
        made = called(*map(value, self.arguments), **keywords)
        outputs = made if isinstance(made, tuple | list) else (made,)
        return tuple(
            TensorSpec(tuple(o.shape), str(o.dtype).removeprefix("torch.")) for o in outputs
        )

    @property
    def differentiable(self) -> tuple[int, ...]:
        return tuple(
            n for n, t in enumerate(self.tensors) if t.spec.is_floating and t.differentiable
        )

    def draw(
        self,
        operator: Operator,
        specs: tuple[TensorSpec, ...],
        position: int,
        generator: torch.Generator,
    ) -> torch.Tensor | None:
        del operator, specs
        return self.tensors[position].draw(generator)


def _has_tensor(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_has_tensor, value))
    return isinstance(value, T)


def e(op: str, *arguments: Any, **keywords: Any) -> Example:
    return Example(f"aten.{op}", arguments, keywords)


def statistics(channels: int) -> tuple[T, T]:
    """Running mean and variance."""
    return (
        f(channels, differentiable=False),
        T((channels,), low=0.5, high=1.5, differentiable=False),
    )


MATRIX_PRODUCTS = [
    e("linear.default", f(4, 6), f(12, 6)),
    e("linear.default", f(2, 6, 4), f(12, 4), f(12)),
    e("linear.default", f(2, 1, 6, 4), f(1, 4), f(1)),
    e("addmm.default", f(6), f(4, 12), f(12, 6)),
    e("addmm.default", f(4, 6), f(4, 12), f(12, 6)),
    e("addmm.default", f(4, 1), f(4, 12), f(12, 6)),
    e("baddbmm.default", f(4, 2, 6), f(4, 2, 12), f(4, 12, 6)),
    e("baddbmm.default", f(1, 1, 6), f(4, 2, 12), f(4, 12, 6)),
    e("matmul.default", f(4, 6), f(6, 2)),
    e("matmul.default", f(6), f(6)),
    e("matmul.default", f(6), f(6, 4)),
    e("matmul.default", f(2, 4, 6), f(6)),
    e("matmul.default", f(2, 4, 6), f(6, 4)),
    e("matmul.default", f(4, 2, 6), f(4, 6, 12)),
    e("matmul.default", f(6, 4, 2, 6), f(6, 4, 6, 2)),
    e("mm.default", f(4, 6), f(6, 2)),
    e("bmm.default", f(4, 2, 6), f(4, 6, 12)),
    e("mv.default", f(4, 6), f(6)),
    e("dot.default", f(12), f(12)),
    e("vdot.default", f(12), f(12)),
    e("bilinear.default", f(2, 4), f(2, 6), f(4, 4, 6), f(4)),
    e("bilinear.default", f(2, 6, 4), f(2, 6, 6), f(2, 4, 6)),
    e("_cdist_forward.default", f(2, 4, 6), f(2, 6, 6), 2.0, None),
    e("_cdist_forward.default", f(4, 6), f(6, 6), 2.0, None),
    e("einsum.default", "bi,bj->bij", [f(4, 6), f(4, 2)]),
    e("einsum.default", "bhqd,bhkd->bhqk", [f(2, 4, 6, 2), f(2, 4, 6, 2)]),
    e("einsum.default", "bij->bji", [f(4, 6, 2)]),
    e("einsum.default", "ibnd,hnd->ibh", [f(2, 2, 4, 2), f(6, 4, 2)]),
    e("einsum.default", "bnij,jbnd->ibnd", [f(2, 4, 6, 2), f(2, 2, 4, 6)]),
    e("einsum.default", "anbd,hdn->abh", [f(2, 4, 2, 6), f(6, 6, 4)]),
]

Q, K, V = f(2, 4, 6, 2), f(2, 4, 12, 2), f(2, 4, 12, 2)
ATTENTION = [
    e("scaled_dot_product_attention.default", Q, K, V),
    e("scaled_dot_product_attention.default", Q, K, V, b(2, 1, 6, 12)),
    e("scaled_dot_product_attention.default", Q, K, V, b(6, 12)),
    e("scaled_dot_product_attention.default", Q, K, V, f(1, 4, 6, 12)),
    e("scaled_dot_product_attention.default", Q, K, V, f(2, 1, 6, 12, differentiable=False)),
    e("scaled_dot_product_attention.default", Q, Q, Q, None, 0.0, True),
    e("scaled_dot_product_attention.default", Q, K, V, scale=0.3),
    e("scaled_dot_product_attention.default", Q, K, V, None, 0.4),
    e("scaled_dot_product_attention.default", Q, Q, Q, None, 0.4, True),
    e("scaled_dot_product_attention.default", Q, K, V, b(2, 1, 6, 12), 0.4),
    e("scaled_dot_product_attention.default", f(2, 12, 6, 2), K, V, enable_gqa=True),
    e(
        "scaled_dot_product_attention.default",
        f(2, 12, 6, 2), K, V, b(2, 12, 6, 12), 0.2, enable_gqa=True,
    ),
    e("scaled_dot_product_attention.default", Q, K, f(2, 4, 12, 6)),
    e("scaled_dot_product_attention.default", f(4, 6, 2), f(4, 12, 2), f(4, 12, 2)),
]  # fmt: skip

EMBEDDINGS = [
    e("embedding.default", f(12, 6), index(4, 6, below=12)),
    e("embedding.default", f(12, 6), index(4, below=12), 5),
    e("embedding.default", f(12, 6), index(4, 6, below=12), -1, True),
    e(
        "embedding_bag.padding_idx",
        f(12, 6), index(8, below=12), T((4,), "int64", below=1), False, 0, False, None, False, None,
    ),
    e("embedding_bag.default", f(12, 6), index(8, below=12), T((4,), "int64", below=1)),
    e("_embedding_bag.default", f(12, 6), index(8, below=12), T((4,), "int64", below=1)),
]  # fmt: skip

NORMALISATION = [
    e("layer_norm.default", f(4, 6, 2), [2], f(2), f(2)),
    e("layer_norm.default", f(4, 6, 2), [6, 2]),
    e("_weight_norm_interface.default", f(4, 6, 2), f(4, 1, 1), 0),
    e("_weight_norm_interface.default", f(4, 6), f(1, 6), 1),
    e("native_layer_norm.default", f(4, 6, 2), [2], f(2), f(2), 1e-5),
    e("rms_norm.default", f(4, 6, 2), [2], f(2)),
    e("rms_norm.default", f(4, 6, 2), [2]),
    e("group_norm.default", f(4, 12, 3), 6, f(12), f(12)),
    e("group_norm.default", f(4, 6, 3), 6, f(6), f(6)),
    e("group_norm.default", f(4, 6, 3), 1),
    e("instance_norm.default", f(4, 6, 3, 2), f(6), f(6), None, None, True, 0.1, 1e-5, False),
    e("instance_norm.default", f(4, 6, 3), None, None, None, None, True, 0.1, 1e-5, False),
    e(
        "_native_batch_norm_legit_functional.default",
        f(4, 6, 4), f(6), f(6), *statistics(6), True, 0.1, 1e-5,
    ),
    e(
        "_native_batch_norm_legit_functional.default",
        f(12, 6), f(6), f(6), *statistics(6), True, 0.1, 1e-5,
    ),
    e(
        "_native_batch_norm_legit_functional.default",
        f(4, 6, 2, 2), f(6), f(6), *statistics(6), False, 0.1, 1e-5,
    ),
    e("_native_batch_norm_legit.no_stats", f(4, 6, 2, 2), f(6), f(6), True, 0.1, 1e-5),
    e(
        "_native_batch_norm_legit_no_training.default",
        f(4, 6, 2, 2), f(6), f(6), *statistics(6), 0.1, 1e-5,
    ),
    e("native_dropout.default", f(4, 6, 2), 0.4, True),
    e("dropout.default", f(4, 6), 0.4, True),
]  # fmt: skip

WEIGHTS = T((6,), low=0.1, high=2.0, differentiable=False)
SHARES = T((4, 6), low=0.0, high=1.0, differentiable=False)
LOSSES = [
    *(
        e("cross_entropy_loss.default", f(12, 6), index(12, below=6, ignored=True), None, how)
        for how in (0, 1, 2)
    ),
    e("cross_entropy_loss.default", f(12, 6), index(12, below=6, ignored=True), None, 1, -100, 0.2),
    e("cross_entropy_loss.default", f(12, 6), index(12, below=6), None, 1, 2, 0.0),
    e(
        "cross_entropy_loss.default",
        f(12, 6), index(12, below=6, ignored=True), WEIGHTS,
    ),
    e("cross_entropy_loss.default", f(2, 6, 4, 2), index(2, 4, 2, below=6, ignored=True)),
    e("cross_entropy_loss.default", f(6), index(below=6)),
    e("cross_entropy_loss.default", f(12, 6), T((12, 6), low=0.0, high=1.0, differentiable=False)),
    *(
        e(f"{op}.default", f(*shape), index(shape[0], *shape[2:], below=6, ignored=True), None, how)
        for op, shape in (
            ("nll_loss", (12, 6)), ("nll_loss_nd", (12, 6)), ("nll_loss2d", (2, 6, 4, 2)),
        )
        for how in (0, 1, 2)
    ),
    *(
        e(f"{op}.default", f(4, 6), f(4, 6), how)
        for op in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div")
        for how in (0, 1, 2)
    ),
    e("soft_margin_loss.default", f(4, 6), f(4, 6, differentiable=False)),
    e("binary_cross_entropy.default", unit(4, 6), SHARES),
    *(
        e("binary_cross_entropy_with_logits.default", f(4, 6), f(4, 6), None, None, how)
        for how in (0, 1, 2)
    ),
]  # fmt: skip

PICKED = "autopar.gather_bmm.default"

GROUPED = [
    Example(PICKED, (f(12, 1, 6), f(4, 6, 2), index(12, below=4), 1)),
    Example(PICKED, (f(4, 2, 6), f(12, 6, 1), index(12, below=4), 0)),
    Example(PICKED, (f(6, 3, 4), f(2, 4, 1), index(2, below=6), 0)),  # most matrices have no row
    e("_grouped_mm.default", f(12, 6), f(4, 6, 2), ends(4, 12)),
    e("_grouped_mm.default", f(4, 6, 2), f(2, 12), offs=ends(4, 12)),
    e("_grouped_mm.default", f(6, 12), f(12, 4), ends(4, 12)),
    e("_grouped_mm.default", f(4, 6, 2), f(4, 2, 6)),
]

CONVOLUTIONS = [
    e("conv2d.default", f(4, 6, 4, 4), f(4, 6, 3, 3), f(4), [1, 1], [1, 1]),
    e("conv2d.default", f(4, 6, 4, 4), f(4, 6, 1, 1)),
    e("conv2d.default", f(2, 3, 8, 12), f(4, 3, 2, 2), f(4), [2, 2]),
    e("conv2d.default", f(2, 3, 9, 6), f(4, 3, 2, 3), f(4), [2, 3]),
    e("conv2d.default", f(2, 6, 4, 4), f(6, 1, 3, 3), f(6), [1, 1], [1, 1], [1, 1], 6),
    e("conv2d.default", f(2, 6, 4, 4), f(12, 1, 3, 3), f(12), [1, 1], [1, 1], [1, 1], 6),
    e("conv2d.default", f(2, 12, 4, 4), f(6, 2, 3, 3), None, [2, 2], [1, 1], [1, 1], 6),
    e("conv2d.padding", f(2, 6, 4, 4), f(4, 6, 3, 3), f(4), [1, 1], "same"),
    e("conv1d.default", f(2, 6, 8), f(4, 6, 3), f(4), [1], [1]),
    e("conv1d.padding", f(2, 6, 8), f(4, 6, 3), f(4), [1], "valid"),
    e("conv3d.default", f(2, 6, 2, 4, 4), f(4, 6, 1, 2, 2), f(4), [1, 2, 2]),
    e("conv3d.padding", f(2, 2, 2, 4, 4), f(4, 2, 1, 3, 3), f(4), [1, 1, 1], "same"),
    e("conv_transpose1d.default", f(2, 6, 8), f(6, 4, 3), f(4), [2]),
    e("conv_transpose2d.input", f(2, 6, 4, 4), f(6, 4, 2, 2), f(4), [2, 2]),
    e("conv_transpose2d.input", f(2, 6, 4, 2), f(6, 2, 3, 3), f(12), [2, 2], [1, 1], [1, 1], 6),
    e("conv_transpose3d.input", f(2, 2, 2, 4, 2), f(2, 4, 1, 2, 2), f(4), [1, 2, 2]),
    e(
        "convolution.default",
        f(2, 6, 4, 4), f(4, 6, 3, 3), f(4), [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
    ),
    e(
        "convolution.default",
        f(2, 6, 4, 4), f(6, 4, 2, 2), f(4), [2, 2], [0, 0], [1, 1], True, [0, 0], 1,
    ),
    e("max_pool1d.default", f(2, 6, 12), [3]),
    e("max_pool2d.default", f(2, 6, 8, 12), [2, 3]),
    e("max_pool2d.default", f(2, 6, 8, 8), [3, 3], [2, 2], [1, 1]),
    e("max_pool3d.default", f(2, 6, 2, 4, 4), [2, 2, 2]),
    e("max_pool2d_with_indices.default", f(2, 6, 8, 8), [2, 2]),
    e("max_pool3d_with_indices.default", f(2, 6, 2, 4, 4), [2, 2, 2]),
    e("avg_pool1d.default", f(2, 6, 12), [3]),
    e("avg_pool2d.default", f(2, 6, 8, 12), [2, 2]),
    e("avg_pool2d.default", f(2, 6, 8, 8), [3, 3], [2, 2], [1, 1]),
    e("avg_pool3d.default", f(2, 6, 2, 4, 4), [2, 2, 2]),
    e("adaptive_avg_pool1d.default", f(2, 6, 12), [6]),
    e("adaptive_avg_pool1d.default", f(2, 6, 12), [1]),
    e("adaptive_avg_pool3d.default", f(2, 6, 2, 4, 4), [1, 1, 1]),
    e("_adaptive_avg_pool2d.default", f(2, 6, 4, 4), [1, 1]),
    e("adaptive_avg_pool2d.default", f(2, 6, 4, 4), [1, 1]),
    e("adaptive_avg_pool2d.default", f(2, 6, 8, 12), [4, 1]),
    e("adaptive_avg_pool2d.default", f(2, 6, 5, 7), [3, 3]),
    e("adaptive_avg_pool3d.default", f(2, 6, 2, 4, 4), [1, 2, 2]),
    e("_adaptive_avg_pool2d.default", f(2, 6, 4, 4), [2, 2]),
    e("_adaptive_avg_pool3d.default", f(2, 6, 2, 4, 4), [1, 2, 2]),
    e("adaptive_max_pool1d.default", f(2, 6, 12), [6]),
    e("adaptive_max_pool2d.default", f(2, 6, 4, 4), [2, 2]),
    e("adaptive_max_pool3d.default", f(2, 6, 2, 4, 4), [1, 2, 2]),
    e("upsample_nearest1d.vec", f(2, 6, 4), None, [2.0]),
    e("upsample_nearest2d.vec", f(2, 6, 4, 4), None, [2.0, 3.0]),
    e("upsample_nearest2d.vec", f(2, 6, 4, 4), [8, 6], None),
    e("upsample_nearest3d.vec", f(2, 2, 2, 4, 4), None, [1.0, 2.0, 2.0]),
    e("upsample_nearest1d.default", f(2, 6, 4), [8]),
    e("upsample_nearest2d.default", f(2, 6, 4, 4), [8, 8]),
    e("upsample_nearest3d.default", f(2, 2, 2, 4, 4), [2, 8, 8]),
    e("upsample_linear1d.vec", f(2, 6, 4), None, False, [2.0]),
    e("upsample_bilinear2d.vec", f(2, 6, 4, 4), None, False, [2.0, 2.0]),
    e("upsample_bicubic2d.vec", f(2, 6, 4, 4), None, False, [2.0, 2.0]),
    e("upsample_trilinear3d.vec", f(2, 2, 2, 4, 4), None, False, [2.0, 2.0, 2.0]),
    e("pixel_shuffle.default", f(2, 24, 4, 2), 2),
]  # fmt: skip

POSITIVE_DOMAIN = {"log", "log2", "log10", "log1p", "sqrt", "rsqrt", "acosh", "lgamma"}
UNIT_DOMAIN = {"asin", "acos", "atanh", "erfinv", "logit"}
WITH_NUMBER = {
    "clamp": (-0.5, 0.5),
    "clamp_min": (0.1,),
    "clamp_max": (0.1,),
    "threshold": (0.1, 2.0),
}
ON_INTEGERS = {"bitwise_not"}


def unary(name: str) -> Example:
    shape = (4, 6)
    if name in POSITIVE_DOMAIN:
        x = T(shape, low=1.1, high=3.0)
    elif name in UNIT_DOMAIN:
        x = unit(*shape)
    elif name in ON_INTEGERS:
        x = i(*shape)
    else:
        x = f(*shape)
    extra = (3.5,) if name == "full_like" else WITH_NUMBER.get(name, ())
    return e(f"{name}.default", x, *extra)


UNARY_NAMES = (
    "abs acos acosh alias asin asinh atan atanh bitwise_not ceil celu clamp clamp_max clamp_min",
    "clone contiguous cos cosh detach elu erf erfc erfinv exp exp2 expm1 floor frac full_like gelu",
    "hardshrink hardsigmoid hardswish hardtanh isfinite isinf isnan leaky_relu lgamma",
    "lift_fresh_copy log log10 log1p log2 log_sigmoid logical_not logit mish neg ones_like",
    "positive reciprocal relu relu6 round rsqrt selu sgn sigmoid sign signbit silu sin sinc sinh",
    "softplus softshrink sqrt square tan tanh threshold trunc zeros_like",
)
UNARY = [unary(name) for name in " ".join(UNARY_NAMES).split()]

BINARY = [
    *(e(f"{n}.Tensor", f(4, 6), f(4, 6)) for n in ("eq", "ne", "lt", "le", "gt", "ge")),
    *(e(f"{n}.Scalar", f(4, 6), 0.1) for n in ("eq", "ne", "lt", "le", "gt", "ge")),
    *(e(f"logical_{n}.default", b(4, 6), b(6)) for n in ("and", "or", "xor")),
    *(
        e(f"{n}.Tensor", i(4, 6), i(6))
        for n in ("bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__", "__xor__")
    ),
    *(
        e(f"{n}.Scalar", i(4, 6), 3)
        for n in ("bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__", "__xor__")
    ),
    *(
        e(f"{n}.Tensor", index(4, 6, below=9), index(6, below=4))
        for n in ("bitwise_left_shift", "bitwise_right_shift", "__lshift__", "__rshift__")
    ),
    *(e(f"{n}.Scalar", index(4, 6, below=9), 2) for n in ("__lshift__", "__rshift__")),
    e("bitwise_left_shift.Tensor_Scalar", index(4, 6, below=9), 2),
    e("bitwise_right_shift.Tensor_Scalar", index(4, 6, below=9), 2),
    e("add.Tensor", f(4, 6), f(4, 6)),
    e("add.Tensor", f(4, 1, 6), f(2, 1)),
    e("add.Tensor", f(4, 6), f()),
    e("add.Tensor", f(4, 6), 1.5),
    e("add.Tensor", f(4, 6), f(6), alpha=2),
    e("add.Tensor", i(4, 6), f(4, 6)),
    e("add.Scalar", f(4, 6), 1.5),
    e("sub.Tensor", f(4, 6), f(6)),
    e("sub.Tensor", f(4, 6), 2),
    e("sub.Scalar", f(4, 6), 1.5),
    e("rsub.Tensor", f(4, 6), f(6)),
    e("rsub.Scalar", f(4, 6), 1.5),
    e("mul.Tensor", f(4, 6), f(4, 6)),
    e("mul.Tensor", f(6), f(4, 6)),
    e("mul.Tensor", f(4, 6), 2.5),
    e("mul.Tensor", f(4, 6), b(4, 6)),
    e("mul.Tensor", f(6), b(4, 6)),
    e("mul.Tensor", i(4, 6), f(4, 1)),
    e("div.Tensor", i(4, 6), positive(6)),
    e("neg.default", i(4, 6)),
    e("mul.Scalar", f(4, 6), 2.5),
    e("div.Tensor", f(4, 6), positive(6)),
    e("div.Tensor", f(4, 6), 2.5),
    e("div.Scalar", f(4, 6), 2.5),
    e("div.Tensor_mode", f(4, 6), positive(6), rounding_mode="floor"),
    e("div.Scalar_mode", f(4, 6), 0.3, rounding_mode="trunc"),
    e("floor_divide.default", i(4, 6), i(6)),
    e("remainder.Scalar", i(4, 6), 3),
    e("remainder.Tensor", i(4, 6), i(6)),
    e("fmod.Scalar", f(4, 6), 0.7),
    e("pow.Tensor_Scalar", f(4, 6), 3),
    e("pow.Tensor_Scalar", f(4, 6), 2.0),
    e("pow.Scalar", 2.0, f(4, 6)),
    e("pow.Tensor_Tensor", positive(4, 6), f(6)),
    *(
        e(f"{n}.default", f(4, 6), f(6))
        for n in ("maximum", "minimum", "atan2", "polar", "complex")
    ),
    e("xlogy.Tensor", f(4, 6), positive(6)),
    e("max.other", f(4, 6), f(6)),
    e("min.other", f(4, 6), f(6)),
    e("clamp.Tensor", f(4, 6), f(6), f(6)),
    e("clamp_min.Tensor", f(4, 6), f(6)),
    e("clamp_max.Tensor", f(4, 6), f(6)),
    e("addcmul.default", f(4, 6), f(4, 6), f(6)),
    e("addcdiv.default", f(4, 6), f(4, 6), positive(6)),
    e("lerp.Scalar", f(4, 6), f(4, 6), 0.3),
    e("lerp.Tensor", f(4, 6), f(4, 6), f(4, 6)),
    e("where.self", b(4, 6), f(4, 6), f(6)),
    e("where.self", b(4, 1), f(4, 6), f()),
    e("where.ScalarOther", b(4, 6), f(4, 6), 2.0),
    e("where.ScalarSelf", b(4, 6), 2.0, f(4, 6)),
    e("where.Scalar", b(4, 6), 2.0, 1.0),
    e("_prelu_kernel.default", f(4, 6, 2), f(1, 6, 1)),
    e("fill.Scalar", f(4, 6), 2.0),
    e("masked_fill.Scalar", f(4, 6), b(6), 0),
    e("masked_fill.Scalar", f(4, 6), b(4, 6), 3.0),
    e("masked_fill.Tensor", f(4, 6), b(4, 6), f()),
    e("_to_copy.default", f(4, 6), dtype=torch.int64),
    e("_to_copy.default", f(4, 6), dtype=torch.float64),
    e("_to_copy.default", i(4, 6), dtype=torch.float64),
    e("to.dtype", i(4, 6), torch.float64),
    e("to.dtype_layout", i(4, 6), dtype=torch.float64),
    e("broadcast_tensors.default", [f(4, 1), f(1, 6)]),
]

REDUCTIONS = [
    e("sum.default", f(4, 6)),
    e("sum.default", i(4, 6)),
    e("sum.dim_IntList", f(4, 6, 2), [1]),
    e("sum.dim_IntList", f(4, 6, 2), [0, -1], True),
    e("mean.default", f(4, 6)),
    e("mean.dim", f(4, 6, 2), [1]),
    e("mean.dim", f(4, 6, 2), [0, -1], True),
    *(e(f"{n}.default", f(4, 6, 2), [1]) for n in ("amax", "amin")),
    *(e(f"{n}.default", f(4, 6, 2), [-1, 0], True) for n in ("amax", "amin", "logsumexp")),
    *(e(f"{n}.default", f(4, 6)) for n in ("max", "min", "prod")),
    *(e(f"{n}.dim", f(4, 6, 2), 1) for n in ("max", "min", "median")),
    *(e(f"{n}.default", f(4, 6, 2), 1) for n in ("argmax", "argmin")),
    e("argmax.default", f(4, 6)),
    *(e(f"{n}.default", b(4, 6)) for n in ("any", "all")),
    *(e(f"{n}.dim", b(4, 6), 1, True) for n in ("any", "all")),
    *(e(f"{n}.dims", b(4, 6), [1]) for n in ("any", "all")),
    e("count_nonzero.dim_IntList", b(4, 6), [1]),
    e("prod.dim_int", f(4, 6), 1),
    e("std.correction", f(4, 6), [1], correction=1),
    e("std.dim", f(4, 6), [1]),
    e("var.correction", f(4, 6, 2), [0, 1], correction=0, keepdim=True),
    e("var.dim", f(4, 6), [1]),
    e("var_mean.correction", f(4, 6), [1], correction=0),
    e("linalg_vector_norm.default", f(4, 6), 2, [1], True),
    e("norm.ScalarOpt_dim", f(4, 6), 2, [1]),
    *(e(f"{n}.int", f(4, 6, 2), 1) for n in ("softmax", "log_softmax")),
    *(e(f"{n}.default", f(4, 6), -1, False) for n in ("_softmax", "_log_softmax")),
    e("_safe_softmax.default", f(4, 6), -1),
    *(e(f"{n}.default", f(4, 6), 1) for n in ("cumsum", "cumprod", "logcumsumexp")),
    *(e(f"{n}.default", f(4, 6), 1) for n in ("cummax", "cummin")),
    e("sort.default", f(4, 6)),
    e("sort.stable", f(4, 6), stable=True, dim=0),
    e("argsort.default", f(4, 6)),
    e("topk.default", f(4, 6), 2),
    e("kthvalue.default", f(4, 6), 2),
    e("glu.default", f(4, 12), 1),
    e("_fft_r2c.default", f(4, 2, 6), [0, 2], 0, True),
    e("_fft_c2r.default", T((4, 2, 6), "complex128"), [2], 2, 10),
    e("_fft_c2c.default", T((4, 2, 6), "complex128"), [0], 1, False),
    e("histc.default", T((4, 6), low=0.0, high=1.0, differentiable=False), 6, 0, 1),
    e("histc.default", T((4, 6), differentiable=False), 6),
]

VIEWS = [
    e("view.default", f(4, 6), [24]),
    e("view.default", f(24), [4, -1]),
    e("view.default", f(4, 12), [4, 2, 6]),
    e("view.default", f(4, 6), [2, 12]),
    e("view.default", f(2, 6, 4), [2, 8, 3]),
    e("view.default", f(6, 4), [1, 8, 3, 1]),
    e("_unsafe_view.default", f(4, 2, 6), [8, 6]),
    e("reshape.default", f(4, 2, 6), [4, 12]),
    e("view_copy.default", f(4, 2, 6), [4, 12]),
    e("flatten.using_ints", f(4, 2, 6), 1),
    e("unflatten.int", f(4, 12), 1, [6, -1]),
    e("permute.default", f(4, 2, 6), [2, 0, -2]),
    e("transpose.int", f(4, 2, 6), 0, -1),
    e("t.default", f(4, 6)),
    e("numpy_T.default", f(4, 6)),
    e("mT.default", f(2, 4, 6)),
    e("unsqueeze.default", f(4, 6), -1),
    e("squeeze.default", f(4, 1, 6)),
    e("squeeze.dim", f(4, 1, 6), 1),
    e("squeeze.dim", f(4, 6), 1),
    e("squeeze.dims", f(4, 1, 6, 1), [1, 3]),
    e("expand.default", f(4, 1), [2, -1, 6]),
    e("expand.default", f(4, 6), [4, 6]),
    e("repeat.default", f(4, 6), [2, 3, 1]),
    e("repeat_interleave.self_int", f(4, 6), 3, 1),
    e("repeat_interleave.self_int", f(4, 6), 2),
    e("slice.Tensor", f(4, 6), 1, 2, 4),
    e("slice.Tensor", f(4, 6), 0, 0, 2**63 - 1),
    e("select.int", f(4, 6), 1, 2),
    e("unbind.int", f(4, 6, 2), 1),
    e("split.Tensor", f(4, 6), 4, 1),
    e("unsafe_split.Tensor", f(4, 6), 2, 1),
    e("split_with_sizes.default", f(4, 6), [2, 4], 1),
    e("split.sizes", f(4, 6), [2, 4], -1),
    e("chunk.default", f(4, 6), 3, 1),
    e("cat.default", [f(4, 2), f(4, 6)], 1),
    e("cat.default", [f(0), f(4, 6)], -1),
    e("stack.default", [f(4, 2), f(4, 2)], 1),
    e("pad.default", f(4, 6), [1, 2]),
    e("pad.default", f(4, 6), [0, 0, 1, 0], "constant", 3.0),
    e("pad.default", f(4, 6, 4), [1, 2], "reflect"),
    e("constant_pad_nd.default", f(4, 6), [0, 2]),
    e("flip.default", f(4, 6), [1]),
    e("roll.default", f(4, 6), [2], [1]),
    e("roll.default", f(4, 6), [2]),
    e("tril.default", f(2, 4, 6)),
    e("triu.default", f(2, 4, 6), 1),
    e("diagonal.default", f(4, 6, 2), 0, 1, 2),
    e("unfold.default", f(4, 6), 1, 2, 2),
    e("slice_scatter.default", f(4, 6), f(4, 2), 1, 2, 4),
    e("select_scatter.default", f(4, 6), f(4), 1, 2),
    e("copy.default", i(4, 6), i(6)),
    e("fill.Tensor", f(4, 6), f()),
    e("as_strided.default", f(4, 6), [2, 6], [12, 1]),
    e("view_as_complex.default", f(4, 6, 2)),
    e("view_as_real.default", T((4, 6), "complex128")),
]

INDEXING = [
    e("gather.default", f(4, 6), 1, index(4, 2, below=6)),
    e("gather.default", f(4, 6), 1, index(2, 2, below=6)),
    e("index_select.default", f(4, 6), 1, index(4, below=6)),
    e("index.Tensor", f(4, 6), [index(2, below=4)]),
    e("index.Tensor", f(4, 6, 2), [None, index(2, below=6), index(2, below=2)]),
    e("index.Tensor", f(4, 6, 2), [index(4, 1, below=4), None, index(6, below=2)]),
    e("index_put.default", f(4, 6), [index(2, below=4)], f(2, 6)),
    e("index_put.default", f(4, 6), [None, index(2, below=6)], f(4, 2), True),
    e("scatter.src", f(4, 6), 1, index(4, 2, below=6), f(4, 2)),
    e("scatter.value", f(4, 6), 1, index(4, 2, below=6), 3.0),
    e("scatter_reduce.two", f(4, 6), 1, index(4, 2, below=6), f(4, 2), "amax"),
    e("scatter_reduce.two", f(4, 6), 0, index(2, 6, below=4), f(2, 6), "mean", include_self=False),
    e("scatter_add.default", f(4, 6), 1, index(4, 2, below=6), f(4, 2)),
    e("scatter_add.default", f(4, 6), 1, index(2, 2, below=6), f(2, 2)),
    e("index_add.default", f(4, 6), 0, index(2, below=4), f(2, 6)),
    e("bucketize.Tensor", f(4, 6), T((5,), low=-0.1, high=0.1, differentiable=False)),
]

FACTORIES = [
    *(e(f"{n}.default", [4, 6]) for n in ("zeros", "ones")),
    e("full.default", [4, 6], 2.5),
    *(e(f"new_{n}.default", f(3), [4, 6]) for n in ("zeros", "ones")),
    e("new_full.default", f(3), [4, 6], 2.5),
    e("scalar_tensor.default", 2.5),
    e("arange.default", 12),
    e("arange.start", 2, 14),
    e("arange.start_step", 2, 26, 2),
    e("arange.start_step", 8, -16, -2.0, dtype=torch.int64),
    e("arange.start_step", 1, 31, 2.5, dtype=torch.int64),
    e("arange.start_step", 0.1, 1.3, 0.1, dtype=torch.float32),
    e("linspace.default", 0.0, 1.0, 6),
    e("eye.default", 4),
    e("eye.m", 4, 6),
    e("one_hot.default", index(4, below=6), 6),
]

DRAWS = [
    *(e(f"{n}.default", [4, 6]) for n in ("rand", "randn")),
    e("randn.default", [4, 6], dtype=torch.bfloat16),
    *(e(f"{n}.default", f(4, 6)) for n in ("rand_like", "randn_like")),
    e("bernoulli.default", unit(4, 6)),
    *(e(f"{n}.default", f(4, 6)) for n in ("uniform", "exponential", "normal_functional")),
    e("randint.default", 100, [4, 6]),
    e("randint.low", -5, 100, [4, 6], dtype=torch.int32),
    e("randint_like.default", i(4, 6), 100),
    e("randint_like.low_dtype", f(4, 6), -5, 100),
    e("randperm.default", 12),
    e("bernoulli.p", f(4, 6), 0.3),
    e("normal.Tensor_Tensor", f(4, 6), positive(4, 6)),
]

EXAMPLES = [
    *MATRIX_PRODUCTS,
    *GROUPED,
    *ATTENTION,
    *EMBEDDINGS,
    *NORMALISATION,
    *LOSSES,
    *CONVOLUTIONS,
    *UNARY,
    *BINARY,
    *REDUCTIONS,
    *VIEWS,
    *INDEXING,
    *FACTORIES,
    *DRAWS,
]
