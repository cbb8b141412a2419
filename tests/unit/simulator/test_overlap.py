"""Parameters and gradients on a second stream: between nothing hidden and everything hidden."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.ir.simulation import Estimate
from autopar.ir.strategy import Training
from autopar.recipes import Degrees, hybrid
from autopar.simulator.listing import Structure
from autopar.simulator.microbatches import division
from autopar.simulator.overlap import Streams
from autopar.simulator.prices import evaluate
from benchmarks.transformer import Transformer
from cost_models import cost_model, topology_names
from cost_models.interface import slowdown_of
from tests.helpers.fake_prices import FakePrices

SMALL = Transformer(layers=4, width=512, heads=8, kv_heads=8, ffn=2048, vocabulary=4096, length=256)
seconds = st.floats(0, 1e3)


class Slowed(FakePrices):
    slowdown = 1.25


def estimate(degrees: Degrees, machine: Any, overlapped: bool) -> Estimate:
    found = division(SMALL.graph(32), degrees.microbatches(32))
    strategy = hybrid(found, degrees, machine, Training("adam", "mixed"))
    return evaluate(found.graph, found.rules, machine, strategy, overlapped=overlapped)


@given(seconds, seconds, st.floats(1, 2), st.floats(1, 2))
def test_together_is_at_least_the_longer_and_at_most_the_sum(
    busy_s: float, beside_s: float, a: float, b: float
) -> None:
    less, more = (busy_s + Streams(k).exposed_s(busy_s, beside_s) for k in sorted((a, b)))
    assert max(busy_s, beside_s) <= less * (1 + 1e-12)
    assert less <= more * (1 + 1e-12) <= (busy_s + beside_s) * (1 + 1e-9) + 1e-9
    assert Streams(2.0).exposed_s(busy_s, beside_s) == pytest.approx(beside_s, abs=1e-9)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("tensor", [1, 2])
def test_a_step_takes_between_its_compute_and_its_sum(zero: int, tensor: int) -> None:
    degrees = Degrees(tensor=tensor, data=8 // tensor, zero=zero, microbatch=2, recompute="full")
    machine = Slowed(devices=8)
    alone, beside = (estimate(degrees, machine, overlapped) for overlapped in (False, True))
    compute_s = alone.forward_compute_s + alone.backward_compute_s + alone.optimizer_s
    assert compute_s < beside.step_time_s < alone.step_time_s
    assert beside.collectives == alone.collectives
    more_bytes = beside.memory.buffers_bytes - alone.memory.buffers_bytes
    assert replace(beside.memory, buffers_bytes=alone.memory.buffers_bytes) == alone.memory
    block, tables = 12 * SMALL.width**2 // tensor, (4096 // tensor + 256) * SMALL.width
    # gathered ahead, and for the streams that gather and reduce
    reduced_bytes = 2 * (SMALL.layers * block + tables) / (8 // tensor)
    wanted = 2 * (block + tables + max(block, tables))
    wanted += max(0, reduced_bytes - alone.memory.gradients_bytes)
    assert more_bytes == 0 if zero < 3 else wanted < more_bytes < 1.05 * wanted
    parts = replace(beside, step_time_s=0.0)
    total = sum(
        getattr(parts, name)
        for name in (
            *("forward_compute_s", "backward_compute_s", "forward_communication_s"),
            *("backward_communication_s", "gradient_synchronisation_s", "optimizer_s"),
        )
    )
    assert total == pytest.approx(beside.step_time_s)


def test_memory_stays_with_the_stream_that_reduces() -> None:
    """Of gradients, which are gone when the loss has its peak."""
    degrees, machine = Degrees(data=8, zero=3, microbatch=4), Slowed(devices=8)
    alone, beside = (estimate(degrees, machine, overlapped) for overlapped in (False, True))
    assert "cross_entropy" in alone.memory.at and alone.memory.gradients_bytes == 0
    block, tables = 12 * SMALL.width**2, (4096 + 256) * SMALL.width
    wanted = 2 * (block + tables + max(block, tables)) + 2 * (SMALL.layers * block + tables) / 8
    assert wanted < beside.memory.buffers_bytes - alone.memory.buffers_bytes < 1.05 * wanted


def test_what_is_gathered_ahead_is_the_same_of_a_folded_graph() -> None:
    degrees, machine = Degrees(data=8, zero=3, microbatch=2), Slowed(devices=8)
    found = division(SMALL.graph(32), degrees.microbatches(32))
    structure = Structure(found.graph, found.rules)
    strategy = hybrid(found, degrees, machine, Training("adam", "mixed"), structure)
    folded = structure.folded_in_runs(tuple(frozenset[int]() for _ in structure.blocks))
    whole, quick = (
        evaluate(found.graph, found.rules, machine, strategy, overlapped=True, folded=seen)
        for seen in (None, folded)
    )
    assert quick.memory == whole.memory
    assert quick.step_time_s == pytest.approx(whole.step_time_s)


def test_where_one_waits_for_the_other_nothing_is_hidden() -> None:
    degrees = Degrees(data=8, zero=3, microbatch=2)
    alone, beside = (estimate(degrees, FakePrices(devices=8), flag) for flag in (False, True))
    assert beside.step_time_s == pytest.approx(alone.step_time_s)


def test_what_is_between_operators_of_one_device_is_not_hidden() -> None:
    degrees = Degrees(tensor=8, between="sequence")
    alone, beside = (estimate(degrees, Slowed(devices=8), flag) for flag in (False, True))
    assert beside.forward_communication_s == alone.forward_communication_s > 0


@pytest.mark.parametrize("name", topology_names())
def test_compute_and_communication_take_something_from_each_other(name: str) -> None:
    assert 1 < slowdown_of(cost_model(name)) <= 2
