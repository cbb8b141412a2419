"""Random numbers that every split draws alike: hashes of the seed, the operator and the index.

They are not those that torch's generators would give, whose order depends on who draws what; they
have the same distributions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from math import prod, tau
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autopar.ir.graph import Operator
from autopar.ir.rule import Dim

if TYPE_CHECKING:
    from autopar.runtime.local_ops import LocalContext

_ALL = slice(None)


def keep_mask(
    context: LocalContext,
    dims: tuple[Dim, ...],
    p: float,
    device: torch.device,
    part: slice = _ALL,
) -> Tensor:
    """True with probability 1 - ``p``; ``dims`` and ``part`` as for ``hashed``."""
    # p of all int64 lie below this; the highest bits of the product are the well mixed ones
    least = min(max(int(p * 2.0**64) - 2**63, -(2**63)), 2**63 - 1)
    key, spans = _key(context), _spans(context, dims, part)
    on_gpu = _on_gpu(device, spans)
    if on_gpu is None:
        return formula(key, spans, device) >= least
    mask: Tensor = on_gpu.at_least(least, key, spans, device)
    return mask


def hashed(
    context: LocalContext,
    dims: tuple[Dim, ...],
    device: torch.device,
    part: slice = _ALL,
    stream: int = 0,
) -> Tensor:
    """Evenly distributed int64, by the seed, the operator and the *global* index.

    So every split and every replica draws the same. ``dims`` are the factors of the tensor;
    ``part``: of its first dim, which indices; ``stream``: several are independent.
    """
    key, spans = _key(context, stream), _spans(context, dims, part)
    on_gpu = _on_gpu(device, spans)
    return (formula if on_gpu is None else on_gpu.hashed)(key, spans, device)


def formula(key: int, spans: Sequence[Span], device: torch.device) -> Tensor:
    """``hashed`` in plain torch."""
    state = torch.full((), key, dtype=torch.int64, device=device)
    for start, length, step in spans:
        index = torch.arange(start, start + length, device=device)
        state = state.unsqueeze(-1) + index * step
    state ^= (state >> 30).bitwise_and_((1 << 34) - 1)
    state *= FIRST
    state ^= (state >> 27).bitwise_and_((1 << 37) - 1)
    state *= SECOND
    return state


def _key(context: LocalContext, stream: int = 0) -> int:
    return signed(_mixed(_mixed(context.seed) + context.operator_id * _INCREMENT + stream))


def _spans(context: LocalContext, dims: tuple[Dim, ...], part: slice) -> tuple[Span, ...]:
    local = context.bound.local_sizes(context.split, context.mesh)
    stride = prod(context.bound.sizes[f] for dim in dims for f in dim)
    found = []
    for dim in dims:
        size = prod(context.bound.sizes[f] for f in dim)
        stride //= size
        # only the leading factor of a dim is ever split, so a slice of the dim is contiguous
        start = (context.offset(dim[0]) * (size // context.bound.sizes[dim[0]])) if dim else 0
        some = range(start, start + prod(local[f] for f in dim))[part]
        found.append((some.start, len(some), signed(stride * _INCREMENT)))
        part = _ALL
    return tuple(found)


Span = tuple[int, int, int]
"""Of a dim of the tensor: the first index and how many, and what an index adds to the state."""


def _on_gpu(device: torch.device, spans: Sequence[Span]) -> ModuleType | None:
    """What does it in one kernel, where there is that."""
    found = _kernels() if device.type == "cuda" else None
    return None if found is None or len(spans) > found.MOST_DIMS else found


@cache
def _kernels() -> ModuleType | None:
    try:
        return import_module("autopar.runtime.draws_on_gpu")
    except ImportError:  # there is no Triton
        return None


def signed(value: int) -> int:
    """The int64 with the same bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


# Increment and multipliers of splitmix64: Steele, Lea and Flood, "Fast splittable pseudorandom
# number generators", OOPSLA 2014, figure 17 (the variant of Stafford's mix 13).
_INCREMENT = 0x9E3779B97F4A7C15
FIRST, SECOND = signed(0xBF58476D1CE4E5B9), signed(0x94D049BB133111EB)


def _mixed(value: int) -> int:
    """splitmix64's finalizer, of one number."""
    mask = (1 << 64) - 1
    value &= mask
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & mask
    return value ^ value >> 31


# --- distributions -------------------------------------------------------------------------------

_DIGITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
"""Bits of a number between 0.5 and 1: with so many it does not round to 1."""


class _Source:
    """Numbers for the result of one call, on this rank."""

    def __init__(self, context: LocalContext, values: Sequence[Any], keywords: Any) -> None:
        self.context = context
        self.values, self.keywords = values, keywords
        given = next((value.device for value in values if isinstance(value, Tensor)), None)
        self.device = given or torch.device(keywords.get("device") or "cpu")
        self.dtype: torch.dtype = getattr(torch, context.bound.output_specs[0].dtype)

    def number(self, index: int, keyword: str, default: float) -> float:
        found = self.values[index] if index < len(self.values) else self.keywords.get(keyword)
        return default if found is None else float(found)

    def uniform(self, dtype: torch.dtype, stream: int = 0) -> Tensor:
        """In [0, 1)."""
        digits = _DIGITS[dtype]
        bits = hashed(self.context, self.context.bound.outputs[0], self.device, stream=stream)
        bits = (bits >> (64 - digits)).bitwise_and_((1 << digits) - 1)
        return bits.to(dtype).mul_(2.0**-digits)

    def normal(self) -> Tensor:
        """Box and Muller's: from two uniform numbers, the first of them in (0, 1]."""
        wide = torch.promote_types(self.dtype, torch.float32)
        radius = self.uniform(wide).neg_().add_(1).log_().mul_(-2).sqrt_()
        angle = self.uniform(wide, stream=1).mul_(tau).cos_()
        return radius.mul_(angle).to(self.dtype)

    def integers(self, low: int, high: int) -> Tensor:
        """In [low, high)."""
        share = self.uniform(torch.float64).mul_(high - low).floor_()
        return share.to(torch.int64).add_(low).to(self.dtype)


def _rand(source: _Source) -> Tensor:
    return source.uniform(source.dtype)


def _randn(source: _Source) -> Tensor:
    return source.normal()


def _randint(source: _Source) -> Tensor:
    return source.integers(0, int(source.values[0]))


def _randint_from(source: _Source) -> Tensor:
    return source.integers(int(source.values[0]), int(source.values[1]))


def _randint_like(source: _Source) -> Tensor:
    return source.integers(0, int(source.values[1]))


def _randint_like_from(source: _Source) -> Tensor:
    return source.integers(int(source.values[1]), int(source.values[2]))


def _bernoulli(source: _Source) -> Tensor:
    """1 with the probability that the tensor says."""
    wide = torch.promote_types(source.dtype, torch.float32)
    probability: Tensor = source.values[0]
    return (source.uniform(wide) < probability).to(source.dtype)


def _bernoulli_alike(source: _Source) -> Tensor:
    chance = source.number(1, "p", 0.5)
    return (source.uniform(torch.float32) < chance).to(source.dtype)


def _uniform(source: _Source) -> Tensor:
    low, high = source.number(1, "from", 0.0), source.number(2, "to", 1.0)
    return source.uniform(source.dtype).mul_(high - low).add_(low)


def _exponential(source: _Source) -> Tensor:
    wide = torch.promote_types(source.dtype, torch.float32)
    drawn = source.uniform(wide).neg_().log1p_().div_(-source.number(1, "lambd", 1.0))
    # not 0, as torch's are not: who takes its logarithm would get an infinity
    return drawn.clamp_(min=torch.finfo(source.dtype).tiny).to(source.dtype)


def _normal(source: _Source) -> Tensor:
    return source.normal().mul_(source.number(2, "std", 1.0)).add_(source.number(1, "mean", 0.0))


def _normal_of_tensors(source: _Source) -> Tensor:
    drawn: Tensor = source.normal().mul_(source.values[1]).add_(source.values[0])
    return drawn


def _randperm(source: _Source) -> Tensor:
    (dim,) = source.context.bound.outputs
    return hashed(source.context, dim, source.device).argsort().to(source.dtype)


_DRAWN: dict[str, Callable[[_Source], Tensor]] = {
    "aten.rand.default": _rand,
    "aten.rand_like.default": _rand,
    "aten.randn.default": _randn,
    "aten.randn_like.default": _randn,
    "aten.randint.default": _randint,
    "aten.randint.low": _randint_from,
    "aten.randint_like.default": _randint_like,
    "aten.randint_like.low_dtype": _randint_like_from,
    "aten.randperm.default": _randperm,
    "aten.bernoulli.default": _bernoulli,
    "aten.bernoulli.p": _bernoulli_alike,
    "aten.uniform.default": _uniform,
    "aten.exponential.default": _exponential,
    "aten.normal_functional.default": _normal,
    "aten.normal.Tensor_Tensor": _normal_of_tensors,
}


def _drawn(
    context: LocalContext, operator: Operator, values: Sequence[Any], keywords: Mapping[str, Any]
) -> Tensor:
    with torch.no_grad():
        return _DRAWN[operator.op](_Source(context, values, keywords))


DRAWS = dict.fromkeys(_DRAWN, _drawn)
"""Their local implementations: they are always used."""
