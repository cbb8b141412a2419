"""The profile of a machine without noise."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from cost_models.profiled import COLLECTIVE_KINDS, Exchange, Pass, Product, Profile

FLOPS_PER_S, BYTES_PER_S, CALL_S, OPERATOR_S = 4e10, 5e9, 3e-6, 8e-6
SIZES = (2**13, 2**15, 2**18, 2**22)
SHAPES = ((1, 64, 64, 64), (1, 512, 64, 512), (1, 512, 512, 512), (16, 64, 64, 32))


def exchange_s(kind: str, group_size: int, size: int) -> float:
    rounds = {"all_reduce": 2.0, "send": 0.5}.get(kind, 1.0)
    return rounds * (1e-4 * group_size + size * (group_size - 1) / group_size / 1e9)


def ideal(**changes: Any) -> Profile:
    """The profile of a machine without noise."""
    made = Profile(
        machine="0123456789abcdef",
        device="a test",
        devices=8,
        memory_bytes=2**30,
        software=(("torch", "2.13"),),
        date="2026-11-20",
        operator_s=OPERATOR_S,
        call_s=CALL_S,
        products=tuple(
            Product(kind, dtype, shape, flops, CALL_S + flops * slow / FLOPS_PER_S)
            for kind in ("matmul", "attention")
            for dtype, slow in (("float32", 1), ("float64", 2))
            for shape in SHAPES
            for flops in [2.0 * math.prod(shape)]
        ),
        passes=tuple(Pass("float32", n, CALL_S + n / BYTES_PER_S) for n in SIZES),
        exchanges=tuple(
            Exchange(kind, g, n, exchange_s(kind, g, n))
            for kind in COLLECTIVE_KINDS
            for g in (2, 8)
            for n in SIZES
        ),
    )
    return replace(made, **changes)
