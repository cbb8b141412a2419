"""What is assumed of a run where cells of its row say nothing, as words that such cells could have.

By what programs of its time did (``programs.py``); where only memory can tell, by what fits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import date

from autopar.recipes import Degrees
from benchmarks.cells import Row, is_said, number
from benchmarks.programs import MEGATRON, written

FUSED_ATTENTION = date(2022, 12, 8)
"""d693034ecf of NVIDIA/Megatron-LM: FlashAttention."""

SEQUENCE_PARALLEL = date(2022, 4, 28)
"""cfd2e21607 of NVIDIA/Megatron-LM: ``--sequence-parallel``."""

GATED = r"llama|mistral|mixtral|qwen|deepseek|kimi|gemma|palm|olmo|yi\b|phi-?3|glm|swiglu"
"""Families whose MLPs are gated, in small letters."""

AS_FITS = "as little is recomputed as fits"
LARGEST = "micro_batch is the largest that fits"


def settled(row: Row, assumed: list[str]) -> Row:
    """``row`` with words where it says nothing."""
    found = dict(row)
    for column, said in _settled(row):
        if not is_said(row, column):
            found[column] = said
            assumed.append(f"{column} is {said}")
    return found


def _settled(row: Row) -> Iterator[tuple[str, str]]:
    told = written(row["source"])

    def is_since(day: date) -> bool:
        return told is None or told >= day

    yield "flash_attn", str(is_since(FUSED_ATTENTION))
    yield "gated_mlp", str(re.search(GATED, row["model_family"].lower()) is not None)
    yield "precision", "fp16" if "v100" in row["gpu_type"].lower() else "bf16"
    if number(row, "TP", 1) > 1:
        yield "sequence_parallel", str(is_since(SEQUENCE_PARALLEL))
    yield "zero_fsdp", str(int(MEGATRON.search(row["source"]) is not None))


def choices(degrees: Degrees, batch: int, assumed: list[str], *, flash: bool) -> Iterator[Degrees]:
    """Others in the order in which a program is made to fit: more is recomputed, and less worked on
    at a time, as far as the row leaves it open."""
    kinds = ["none", *(() if flash else ("attention",)), "full"]
    for kind in kinds if AS_FITS in assumed else [degrees.recompute]:
        part = batch // (degrees.data * degrees.replicas)
        sizes = [degrees.microbatch] if LARGEST not in assumed else _halves(part)
        for size in sizes:
            yield replace(degrees, recompute=kind, microbatch=size)


def _halves(part: int) -> Iterator[int]:
    yield part
    while part % 2 == 0:
        part //= 2
        yield part


__all__ = ["AS_FITS", "LARGEST", "choices", "settled"]
