"""All degrees priced together are what each is alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from random import Random

import pytest

from autopar.errors import AutoparError
from autopar.ir.strategy import Training
from autopar.recipes import Degrees
from autopar.searchers.degree_space import DegreeSpace
from autopar.searchers.over_degrees import DegreePrices
from benchmarks.transformer import Transformer
from cost_models import cost_model

GPT = Transformer(12, 512, 16, 16, 2048, 1024, 256, flash=False, dropout=True, dtype="float16")
LLAMA = Transformer(
    12, 512, 16, 8, 1024, 1024, 256, gated=True, biased=False, tied=False, dtype="bfloat16"
)
BATCH = 64
SPACE = DegreeSpace(32, 12, BATCH)


def recomputing(random: Random, those: Iterable[Degrees]) -> Iterator[Degrees]:
    """Each in some way, in some of its blocks."""
    for one in those:
        way = random.choice(["none", "attention", "selective", "full"])
        yield replace(one, recompute=way, recomputed=random.choice([1.0, 0.5, 0.25]))


def prices_of(of: Transformer) -> DegreePrices:
    machine = cost_model("4x8xa100-sxm-80gb")
    return DegreePrices(of.graph(BATCH), machine, Training("adam", "mixed"))


@pytest.mark.parametrize("of", [GPT, LLAMA])
def test_priced_together_is_priced_alone(of: Transformer) -> None:
    """Step times to the last digits, except that no transfer waits for another."""
    prices = prices_of(of)
    sample = list(recomputing(Random(0), Random(0).sample(list(SPACE), 12)))
    found = prices.bounds(sample)
    assert not found.skipped and len(found.candidates) == len(sample)
    equal = 0
    for one in found.candidates:
        _, alone = prices.evaluated(one.degrees)
        assert one.step_time_s <= alone.step_time_s * (1 + 1e-9), one
        assert one.step_time_s >= alone.step_time_s * 0.99, one
        assert one.memory_bytes <= alone.peak_memory_bytes, one
        equal += one.step_time_s == pytest.approx(alone.step_time_s, rel=1e-9)
    assert equal >= 10


def test_with_context_parallelism_and_replicas() -> None:
    prices = prices_of(LLAMA)
    for of in (
        Degrees(2, 2, 2, 2, microbatch=2, zero=1, context=2, between="sequence"),
        Degrees(1, 1, 4, 2, microbatch=1, zero=3, context=4, recompute="full"),
        Degrees(4, 4, 2, 1, 3, microbatch=1, zero=2, recompute="selective"),
    ):
        (one,) = prices.bounds([of]).candidates
        _, alone = prices.evaluated(of)
        assert one.step_time_s == pytest.approx(alone.step_time_s, rel=1e-9)
        assert one.memory_bytes <= alone.peak_memory_bytes


def test_what_cannot_be_is_said() -> None:
    prices = prices_of(GPT)
    found = prices.bounds([Degrees(pipeline=8, data=4), Degrees(tensor=2, data=16, microbatch=3)])
    assert not found.candidates
    assert {text.partition(" ")[0] for text in found.skipped} == {"8", "a"}
    apart = prices.bounds([Degrees(data=32, experts=2)])
    assert list(apart.skipped.values()) == [1]
    usual = Degrees(tensor=2, data=16)
    (one,), (same,) = (
        prices.bounds([of]).candidates for of in (usual, replace(usual, microbatch=4))
    )
    assert one.step_time_s == same.step_time_s
    with pytest.raises(AutoparError, match="no block that is repeated"):
        DegreePrices(
            Transformer(1, 64, 2, 2, 64, 64, 16).graph(8), cost_model("1x8xh100-sxm"), Training()
        )


def test_what_is_remembered_of_a_search_goes_with_it() -> None:
    prices = prices_of(GPT)
    prices.bounds(list(SPACE)[:20])
    gone = weakref.ref(prices), weakref.ref(prices.links), weakref.ref(prices.graph)
    del prices
    gc.collect()
    assert [of() for of in gone] == [None] * 3
