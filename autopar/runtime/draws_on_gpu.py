"""Hashes of the index in one kernel: on a GPU the plain formula is a dozen of them over eight bytes
for each number. The same numbers, bit by bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor

from autopar.runtime.draws import FIRST, SECOND, Span, signed

BLOCK = 1024
MOST_DIMS = 5

_BLOCK = tl.constexpr(BLOCK)
_FIRST, _SECOND = tl.constexpr(FIRST), tl.constexpr(SECOND)
_LOW_34, _LOW_37 = tl.constexpr((1 << 34) - 1), tl.constexpr((1 << 37) - 1)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _kernel(out, count, key, least, n1, n2, n3, n4, s0, s1, s2, s3, s4, MASK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    """``n1`` to ``n4``: lengths of all dims but the first; ``s0`` to ``s4``: what an index adds."""
    place = tl.program_id(0).to(tl.int64) * _BLOCK + tl.arange(0, _BLOCK)
    rest, state = place, tl.zeros([_BLOCK], tl.int64) + key
    state += (rest % n4) * s4
    rest = rest // n4
    state += (rest % n3) * s3
    rest = rest // n3
    state += (rest % n2) * s2
    rest = rest // n2
    state += (rest % n1) * s1
    state += (rest // n1) * s0
    state = state ^ ((state >> 30) & _LOW_34)
    state = state * _FIRST
    state = state ^ ((state >> 27) & _LOW_37)
    state = state * _SECOND
    tl.store(out + place, (state >= least) if MASK else state, mask=place < count)


def hashed(key: int, spans: Sequence[Span], device: torch.device) -> Tensor:
    """As ``draws.hashed``; of at most ``MOST_DIMS`` dims."""
    return _filled(torch.int64, key, 0, spans, device)


def at_least(least: int, key: int, spans: Sequence[Span], device: torch.device) -> Tensor:
    """Whether that is at least so much, without having it."""
    return _filled(torch.bool, key, least, spans, device)


def _filled(
    dtype: torch.dtype, key: int, least: int, spans: Sequence[Span], device: torch.device
) -> Tensor:
    out = torch.empty([length for _, length, _ in spans], dtype=dtype, device=device)
    from_here = signed(key + sum(start * step for start, _, step in spans))
    _, lengths, steps = zip(*[(0, 1, 0)] * (MOST_DIMS - len(spans)), *spans, strict=True)
    blocks = triton.cdiv(out.numel(), BLOCK)
    if blocks:
        numbers = (out.numel(), from_here, least, *lengths[1:], *steps)
        _kernel[(blocks,)](out, *numbers, MASK=dtype == torch.bool)
    return out
