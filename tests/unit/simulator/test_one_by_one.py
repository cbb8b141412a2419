"""Parameters gathered one by one: what is gathered, and what the device waits for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autopar.ir.simulation import Estimate
from autopar.ir.strategy import Training
from autopar.recipes import Degrees, by_degrees
from autopar.simulator import one_by_one
from autopar.simulator.listing import Structure
from autopar.simulator.microbatches import division
from autopar.simulator.overlap import OneByOne, Overlap
from autopar.simulator.prices import evaluate
from benchmarks.transformer import Transformer
from cost_models import cost_model
from cost_models.interface import CostModel
from tests.helpers.fake_prices import FakePrices

SMALL = Transformer(layers=6, width=512, heads=8, kv_heads=8, ffn=2048, vocabulary=4096, length=256)
RANKS, LAYERS, WEIGHTS, SMALL_ONES = 8, 6, 4, 8
TABLES, END = 2, 2  # words and positions; scale and shift of the last norm

IDLE = FakePrices(
    devices=RANKS,
    work=dict.fromkeys(("matmul", "attention", "memory"), 0.0),
    collectives=dict.fromkeys(("all_gather", "reduce_scatter", "all_reduce"), 0.0),
)
"""A device and links that take no time: what is left is the host's."""


class Apart(FakePrices):
    """Compute and communication take nothing from each other."""

    slowdown = 1.0


def estimate(
    program: OneByOne, machine: CostModel, recompute: str = "none", *, folded: bool = False
) -> Estimate:
    degrees = Degrees(data=RANKS, zero=3, microbatch=2, recompute=recompute)
    found = division(SMALL.graph(2 * RANKS), degrees.microbatches(2 * RANKS))
    structure = Structure(found.graph, found.rules)
    strategy = by_degrees(found, degrees, machine, Training("adam", "mixed"), structure)
    seen = structure.folded_in_runs(tuple(frozenset() for _ in structure.blocks))
    return evaluate(
        found.graph,
        found.rules,
        machine,
        strategy,
        folded=seen if folded else None,
        overlap=Overlap(one_by_one=program),
    )


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("traced", [True, False])
def test_a_host_that_is_waited_for_prepares_a_part_for_each_rank(
    recompute: str, traced: bool
) -> None:
    """The last product of a layer is not run again, since nothing needs it. Who knows what is read
    next has the table of words still, which the loss reads forward and backward one after the
    other, and what is read last of what is run again."""
    keeps = OneByOne(traced=traced, kept_elements=1)
    found = estimate(keeps, IDLE, recompute)
    gather_s = RANKS * (one_by_one.SLICE_S + one_by_one.COPY_S)
    reduce_s = RANKS * (one_by_one.GRADIENT_SLICE_S + one_by_one.COPY_S)
    uses = LAYERS * WEIGHTS + TABLES + 1
    assert found.forward_communication_s == pytest.approx(uses * gather_s)
    kept = 1 if recompute == "none" else 1 + LAYERS
    gathers = uses + LAYERS * (WEIGHTS - 1) * (recompute == "full") - kept * traced
    reduced = LAYERS * (WEIGHTS + SMALL_ONES) + TABLES + END + 1  # the table of words, twice
    assert found.backward_communication_s == pytest.approx(gathers * gather_s + reduced * reduce_s)
    small = LAYERS * SMALL_ONES + END
    placed_s = small * RANKS * one_by_one.PLACE_S
    assert found.gradient_synchronisation_s == pytest.approx(placed_s)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("program", [OneByOne(), OneByOne(traced=False, norms=True)])
def test_a_folded_graph_waits_as_long(program: OneByOne, recompute: str) -> None:
    machine = cost_model("1x8xa100-sxm-80gb")
    whole, folded = (estimate(program, machine, recompute, folded=f) for f in (False, True))
    assert folded.step_time_s == pytest.approx(whole.step_time_s)
    assert folded.memory == whole.memory


def test_what_is_gathered_ahead_hides_behind_what_is_computed() -> None:
    """Where products are slow enough, all but what is read before the first of them."""
    machine = Apart(devices=RANKS, latency_s=1e-3, work=dict(IDLE.work, matmul=1e-9))
    ahead, alone = (estimate(OneByOne(traced=t, kept_elements=0), machine) for t in (True, False))
    assert ahead.step_time_s < alone.step_time_s
    assert ahead.forward_communication_s < 0.2 * alone.forward_communication_s
    limited = OneByOne(live_elements=0, kept_elements=0)
    assert estimate(limited, machine).step_time_s == pytest.approx(alone.step_time_s)


def test_norms_are_passes_over_all_that_is_gathered() -> None:
    machine = replace(IDLE, work=dict(IDLE.work, memory=1e-9))
    plain, normed = (estimate(OneByOne(traced=False, norms=n), machine) for n in (False, True))
    weights = 2 * LAYERS * 12 * SMALL.width**2
    tables = 2 * SMALL.width * (2 * SMALL.vocabulary + SMALL.length)
    extra_s = normed.forward_communication_s - plain.forward_communication_s
    assert extra_s == pytest.approx((weights + tables) * 1e-9)
