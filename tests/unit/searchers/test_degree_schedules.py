"""Degrees with every schedule of the shelf, priced together: what each is alone, and once."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from random import Random

import pytest

from autopar.ir.strategy import Training
from autopar.recipes import Degrees
from autopar.schedules import SCHEDULES
from autopar.searchers import degree_stages
from autopar.searchers.degree_space import DegreeSpace
from autopar.searchers.over_degrees import DegreePrices
from benchmarks.transformer import Transformer
from cost_models import cost_model

LAYERS, BATCH, DEVICES = 12, 64, 32
GPT = Transformer(LAYERS, 512, 16, 16, 2048, 1024, 256, flash=False, dropout=True, dtype="float16")
LLAMA = Transformer(
    LAYERS, 512, 16, 8, 1024, 1024, 256, gated=True, biased=False, tied=False, dtype="bfloat16"
)
SPACE = list(DegreeSpace(DEVICES, LAYERS, BATCH))


@cache
def prices_of(of: Transformer) -> DegreePrices:
    machine = cost_model("4x8xa100-sxm-80gb")
    return DegreePrices(of.graph(BATCH), machine, Training("adam", "mixed"))


def test_the_space_has_every_schedule() -> None:
    assert {of.schedule for of in SPACE} == {None, *SCHEDULES}


@pytest.mark.parametrize("of", [GPT, LLAMA])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_priced_together_is_priced_alone(schedule: str, of: Transformer) -> None:
    """Step times to the last digits, except that no transfer waits for another; memory is a
    bound."""
    prices, random = prices_of(of), Random(f"{schedule} {of.gated}")
    sample = random.sample([one for one in SPACE if one.schedule == schedule], 3)
    sample = [
        replace(one, recompute=random.choice(["none", "attention", "full"])) for one in sample
    ]
    found = prices.bounds(sample)
    assert not found.skipped and len(found.candidates) == len(sample)
    equal = 0
    for one in found.candidates:
        _, alone = prices.evaluated(one.degrees)
        assert 0.99 * alone.step_time_s <= one.step_time_s <= alone.step_time_s * (1 + 1e-9), one
        assert one.memory_bytes <= alone.peak_memory_bytes, one
        equal += one.step_time_s == pytest.approx(alone.step_time_s, rel=1e-9)
    assert equal >= 2


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble_h1"])
def test_what_is_known_of_other_sizes_is_what_it_would_be_anew(schedule: str) -> None:
    of = [
        Degrees(tensor=2, pipeline=2, data=2, schedule=schedule, microbatch=size, recompute=again)
        for again in ("none", "full")
        for size in (1, 2, 4, 8)
    ]
    together = {one.degrees: one for one in prices_of(LLAMA).bounds(of).candidates}
    for degrees in of[2:4] + of[6:]:
        (anew,) = prices_of.__wrapped__(LLAMA).bounds([degrees]).candidates
        assert anew.step_time_s == pytest.approx(together[degrees].step_time_s, rel=1e-12)
        assert anew.memory_bytes == together[degrees].memory_bytes


def test_what_cannot_be_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Degrees] = []
    by_degrees = degree_stages.by_degrees

    def counted(*of: object) -> object:
        asked.append(of[1])  # type: ignore[arg-type]
        return by_degrees(*of)  # type: ignore[arg-type]

    monkeypatch.setattr(degree_stages, "by_degrees", counted)
    odd = Degrees(tensor=7, pipeline=2, schedule="1f1b", microbatch=1)
    found = prices_of(LLAMA).bounds([odd, replace(odd, schedule="gpipe"), replace(odd, pipeline=4)])
    assert list(found.skipped.values()) == [3]
    assert len(asked) == 1


def test_copies_are_the_schedules_unless_others_are_asked_for() -> None:
    usual = Degrees(tensor=4, pipeline=2, data=4, schedule="chimera", microbatch=2)
    prices = prices_of(LLAMA)
    assert usual.stages == 2
    two = replace(usual, chunks=2)
    (one,), (same,) = (prices.bounds([of]).candidates for of in (usual, two))
    assert one.step_time_s == same.step_time_s
    assert prices.evaluated(usual)[1].step_time_s == pytest.approx(one.step_time_s, rel=1e-9)
    four = Degrees(tensor=4, pipeline=4, data=2, chunks=4, schedule="chimera", microbatch=2)
    (reason,) = prices.bounds([four]).skipped
    assert "2 copies" in reason


def test_more_microbatches_than_are_played() -> None:
    """Of each schedule, those that follow take as long as the ones before."""
    prices = prices_of(GPT)
    for schedule, member in SCHEDULES.items():
        of = Degrees(8, 2, 2, chunks=member.chunks, schedule=schedule, microbatch=1)
        (one,) = prices.bounds([of]).candidates
        _, alone = prices.evaluated(of)
        assert one.step_time_s == pytest.approx(alone.step_time_s, rel=1e-9), schedule
        assert one.memory_bytes <= alone.peak_memory_bytes


@pytest.mark.parametrize("of", [GPT, LLAMA])
def test_no_rows_are_faster_than_what_is_known_before_they_are_played(of: Transformer) -> None:
    prices, sample = prices_of(of), Random(of.gated).sample(SPACE, 400)
    groups, skipped = prices.unplayed(sample)
    assert not skipped
    near = 0
    for group in groups:
        played = {one.degrees: one.step_time_s for one in prices.played(group)}
        for degrees, bound_s in zip(group.degrees, group.bounds_s, strict=True):
            assert bound_s <= played[degrees] * (1 + 1e-9), degrees
            near += bound_s >= 0.9 * played[degrees]
    assert near >= len(sample) / 2
