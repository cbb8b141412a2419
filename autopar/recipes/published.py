"""Shelf of published configurations: how models were trained on which machine, by whom reported."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.recipes.degrees import Degrees


@dataclass(frozen=True, slots=True)
class Published:
    """``model`` as the command line takes it from the repository's root, with a global batch of
    ``batch`` samples; ``step_s``: what was measured, or follows from the reported FLOP/s or share
    of the peak. ``note``: what the source leaves open, or what is other here."""

    name: str
    degrees: Degrees
    topology: str
    model: str
    batch: int
    step_s: float
    source: str
    note: str = ""


GPT3, ONE_T = "hf:examples/published/gpt3.json", "hf:examples/published/megatron_1t.json"

PUBLISHED: dict[str, Published] = {
    entry.name: entry
    for entry in (
        Published(
            "gpt3",
            Degrees(tensor=8, pipeline=8, chunks=3, microbatch=1, recompute="full"),
            "8x8xa100-sxm-80gb",
            GPT3,
            64,
            18.13,
            "arXiv 2205.05198, table 5, 175B, full recomputation",
        ),
        Published(
            "gpt3-sp",
            Degrees(8, 8, chunks=3, microbatch=1, between="sequence", recompute="attention"),
            "8x8xa100-sxm-80gb",
            GPT3,
            64,
            13.75,
            "arXiv 2205.05198, table 5, 175B, sequence parallelism and selective recomputation",
        ),
        Published(
            "gpt3-1024",
            Degrees(tensor=8, pipeline=16, data=8, microbatch=1, recompute="full"),
            "128x8xa100-sxm-80gb",
            GPT3,
            1536,
            32.0,
            "README of Megatron-LM (2021), GPT-3 example: about 32 seconds",
            "the number of virtual stages is not given; here one",
        ),
        Published(
            "megatron-1t",
            Degrees(tensor=8, pipeline=64, data=6, microbatch=1, recompute="full"),
            "384x8xa100-sxm-80gb",
            ONE_T,
            3072,
            102.6,
            "arXiv 2104.04473, table 1: 163 teraFLOP/s a GPU by its equation 3, 52% of the peak",
            "one stage a device, as in the authors' script for that table",
        ),
        Published(
            "megatron-1t-sp",
            Degrees(8, 64, microbatch=1, between="sequence", recompute="attention"),
            "64x8xa100-sxm-80gb",
            ONE_T,
            512,
            71.49,
            "arXiv 2205.05198, table 5, 1T, sequence parallelism and selective recomputation",
        ),
        Published(
            "gopher",
            Degrees(tensor=16, pipeline=4, data=64, microbatch=1, zero=1, recompute="full"),
            "4x1024xtpu-v3",
            "examples/published/gopher.py",
            1536,
            32.9,
            "arXiv 2112.11446, on its infrastructure: model and data parallel in a pod, pipeline "
            "over pods, optimizer states partitioned, rematerialisation; 32.5% of the peak by "
            "arXiv 2204.02311, table 3",
            "the degrees inside a pod, the schedule and the microbatches are not given; here those "
            "of the entry",
        ),
        Published(
            "palm",
            Degrees(tensor=12, data=256, replicas=2, zero=3, between="width", recompute="full"),
            "2x3072xtpu-v4",
            "examples/published/palm.py",
            2048,
            17.6,
            "arXiv 2204.02311, section 4: 12-way model by 256-way fully sharded data parallel in a "
            "pod, data parallel over two pods, rematerialisation; table 3: 46.2% of the peak",
            "which activations are divided how is not given, but that what is kept is divided over "
            "all devices of a pod",
        ),
    )
}
"""By name."""

__all__ = ["PUBLISHED", "Published"]
