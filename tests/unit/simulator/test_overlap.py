"""What a program does at once: between nothing hidden and everything hidden."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.ir.simulation import Estimate
from autopar.ir.strategy import Training
from autopar.recipes import Degrees, by_degrees
from autopar.simulator.costs import Costs, work
from autopar.simulator.listing import Structure
from autopar.simulator.microbatches import division
from autopar.simulator.overlap import NOTHING_AT_ONCE, Overlap, Streams
from autopar.simulator.pipelines import PricedPipeline, StagePrices, evaluate_stages
from autopar.simulator.prices import evaluate
from autopar.simulator.stages import pipelined
from benchmarks.transformer import Transformer
from cost_models import cost_model, topology_names
from cost_models.interface import Collective, HostTime, slowdown_of
from tests.helpers.fake_prices import FakePrices

SMALL = Transformer(layers=4, width=512, heads=8, kv_heads=8, ffn=2048, vocabulary=4096, length=256)
seconds = st.floats(0, 1e3)


class Slowed(FakePrices):
    slowdown = 1.25


AHEAD, SUMS, QUEUE = Overlap(parameters=True), Overlap(sums=True), Overlap(launches=True)


@dataclass(frozen=True)
class Waiting(Slowed):
    """``operator_s``: of the host, for each kernel."""

    operator_s: float = 0.0

    @property
    def host_time(self) -> HostTime:
        return HostTime(operator_s=self.operator_s)


def estimate(degrees: Degrees, machine: Any, overlap: Overlap = NOTHING_AT_ONCE) -> Estimate:
    found = division(SMALL.graph(32), degrees.microbatches(32))
    strategy = by_degrees(found, degrees, machine, Training("adam", "mixed"))
    if len(strategy.stages) > 1:
        return evaluate_stages(found, machine, strategy, StagePrices(machine, overlap=overlap))
    return evaluate(found.graph, found.rules, machine, strategy, overlap=overlap)


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
    alone, beside = (estimate(degrees, machine, how) for how in (NOTHING_AT_ONCE, AHEAD))
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
    alone, beside = (
        estimate(degrees, machine, Overlap(parameters=ahead)) for ahead in (False, True)
    )
    assert "cross_entropy" in alone.memory.at and alone.memory.gradients_bytes == 0
    block, tables = 12 * SMALL.width**2, (4096 + 256) * SMALL.width
    wanted = 2 * (block + tables + max(block, tables)) + 2 * (SMALL.layers * block + tables) / 8
    assert wanted < beside.memory.buffers_bytes - alone.memory.buffers_bytes < 1.05 * wanted


def test_what_is_gathered_ahead_is_the_same_of_a_folded_graph() -> None:
    degrees, machine = Degrees(data=8, zero=3, microbatch=2), Slowed(devices=8)
    found = division(SMALL.graph(32), degrees.microbatches(32))
    structure = Structure(found.graph, found.rules)
    strategy = by_degrees(found, degrees, machine, Training("adam", "mixed"), structure)
    folded = structure.folded_in_runs(tuple(frozenset[int]() for _ in structure.blocks))
    whole, quick = (
        evaluate(found.graph, found.rules, machine, strategy, overlap=AHEAD, folded=seen)
        for seen in (None, folded)
    )
    assert quick.memory == whole.memory
    assert quick.step_time_s == pytest.approx(whole.step_time_s)


def test_where_one_waits_for_the_other_nothing_is_hidden() -> None:
    degrees = Degrees(data=8, zero=3, microbatch=2)
    alone, beside = (
        estimate(degrees, FakePrices(devices=8), how) for how in (NOTHING_AT_ONCE, AHEAD)
    )
    assert beside.step_time_s == pytest.approx(alone.step_time_s)


def test_what_is_between_operators_of_one_device_is_not_hidden() -> None:
    degrees = Degrees(tensor=8, between="sequence")
    alone, beside = (estimate(degrees, Slowed(devices=8), how) for how in (NOTHING_AT_ONCE, AHEAD))
    assert beside.forward_communication_s == alone.forward_communication_s > 0


@pytest.mark.parametrize("name", topology_names())
def test_compute_and_communication_take_something_from_each_other(name: str) -> None:
    assert 1 < slowdown_of(cost_model(name)) <= 2


STRATEGIES = (
    Degrees(data=8, microbatch=2),
    Degrees(tensor=8, microbatch=4),
    Degrees(tensor=4, data=2, between="sequence", recompute="full", zero=1),
    Degrees(tensor=2, pipeline=2, data=2, microbatch=4),
    Degrees(pipeline=4, data=2, microbatch=2, recompute="attention"),
)


@pytest.mark.parametrize("degrees", STRATEGIES)
@pytest.mark.parametrize("operator_s", [0.0, 1e-6, 1e-3])
def test_a_host_that_is_ahead_costs_nothing_until_it_is_the_slower(
    degrees: Degrees, operator_s: float
) -> None:
    machine = Waiting(devices=8, operator_s=operator_s)
    device = estimate(degrees, Slowed(devices=8))
    ahead, in_turn = (estimate(degrees, machine, how) for how in (QUEUE, NOTHING_AT_ONCE))
    assert device.step_time_s <= ahead.step_time_s * (1 + 1e-12)
    if operator_s == 0.0:
        assert ahead.step_time_s == pytest.approx(in_turn.step_time_s)
    if operator_s == 1e-6:  # far less than what kernels take: the first of a pass is waited for
        first_s = 2 * 2 * degrees.microbatches(32) * operator_s
        assert ahead.step_time_s == pytest.approx(device.step_time_s, abs=first_s)
    if operator_s == 1e-3:  # far more: kernels wait, and so do collectives
        communicating = device.forward_communication_s + device.backward_communication_s > 0
        assert ahead.step_time_s > 0.5 * in_turn.step_time_s
        assert ahead.step_time_s <= in_turn.step_time_s or communicating


def test_a_pass_takes_what_the_busier_of_device_and_host_takes() -> None:
    degrees, operator_s = Degrees(data=1, microbatch=32), 1.0
    machine = Waiting(devices=1, operator_s=operator_s)
    found = division(SMALL.graph(32), 1)
    strategy = by_degrees(found, degrees, machine, Training("adam", "mixed"))
    costs = Costs(machine, strategy.mesh)
    kernels = [0, 0]
    for operator in found.graph.operators:
        wanted = tuple(found.graph.by_name[name].differentiable for name in operator.inputs)
        bound, split = found.rules[operator.name], strategy.splits[operator.name]
        both = work(bound, split, strategy.mesh, wanted)
        calls = [sum(not one.follows for one in of) for of in both]
        kernels = [n + more for n, more in zip(kernels, calls, strict=True)]
        host = costs.host_s(bound, split, wanted)
        assert host == pytest.approx([operator_s * n for n in calls])
    ahead = estimate(degrees, machine, QUEUE)
    assert ahead.forward_compute_s == pytest.approx(operator_s * kernels[0])
    assert ahead.backward_compute_s == pytest.approx(operator_s * kernels[1])


@pytest.mark.parametrize("operator_s", [1e-6, 3e-5, 1e-4, 3e-4, 1e-2])
def test_a_kernel_waits_for_its_launch_and_for_the_kernel_before(operator_s: float) -> None:
    """Beside kernels that are launched and done one by one, of a head that takes as long as many
    layers."""
    degrees, machine = Degrees(data=1, microbatch=32), Waiting(devices=1, operator_s=operator_s)
    wide = replace(SMALL, vocabulary=2**16)
    found = division(wide.graph(32), 1)
    strategy = by_degrees(found, degrees, machine, Training("adam", "mixed"))
    costs = Costs(machine, strategy.mesh)
    host_s = device_s = 0.0
    for operator in found.graph.operators:
        flows, _ = found.graph.differentiable[operator.name]
        of = found.rules[operator.name], strategy.splits[operator.name], flows
        host_s += costs.host_s(*of)[0]
        device_s = max(device_s, host_s) + costs.device_s(*of)[0]
    ahead = evaluate(found.graph, found.rules, machine, strategy, overlap=QUEUE)
    assert device_s - 2 * operator_s <= ahead.forward_compute_s <= device_s * (1 + 1e-12)


@pytest.mark.parametrize("degrees", STRATEGIES)
def test_sums_beside_weights_hide_only_sums_of_products_inputs(degrees: Degrees) -> None:
    alone, beside = (estimate(degrees, Slowed(devices=8), how) for how in (NOTHING_AT_ONCE, SUMS))
    assert beside.forward_communication_s == pytest.approx(alone.forward_communication_s)
    assert beside.backward_compute_s == pytest.approx(alone.backward_compute_s)
    if degrees.tensor == 1:
        assert beside.step_time_s == pytest.approx(alone.step_time_s)
    else:
        # each layer sums twice backward, before its first and its third product; what is left of a
        # sum is at least what it takes from the product beside it
        left = beside.backward_communication_s / alone.backward_communication_s
        assert Slowed.slowdown - 1 <= left < 1


def test_where_one_waits_for_the_other_no_sum_is_hidden() -> None:
    degrees, machine = Degrees(tensor=8, microbatch=4), FakePrices(devices=8)
    alone, beside = (estimate(degrees, machine, how) for how in (NOTHING_AT_ONCE, SUMS))
    assert beside.step_time_s == pytest.approx(alone.step_time_s)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("pipeline", [1, 2])
def test_what_is_gathered_again_for_a_weight_is_beside_the_gradient_of_the_input(
    recompute: str, pipeline: int
) -> None:
    """A product that is run again waits for it."""
    degrees = Degrees(
        tensor=4, pipeline=pipeline, between="sequence", microbatch=4, recompute=recompute
    )
    gathered = dict.fromkeys(("all_reduce", "reduce_scatter", "send"), 1e-15)
    machine = Slowed(devices=4 * pipeline, collectives=gathered | {"all_gather": 1e-9})
    alone, beside = (estimate(degrees, machine, how) for how in (NOTHING_AT_ONCE, SUMS))
    hidden_s = alone.backward_communication_s - beside.backward_communication_s
    # of four gathers of a layer two are of the gradients of what was scattered
    assert 0 <= hidden_s <= alone.backward_communication_s / 2
    assert (hidden_s > 0.05 * alone.backward_communication_s) == (recompute == "none")


def test_gradients_in_one_buffer_are_one_message() -> None:
    degrees, latency_s = Degrees(data=8, microbatch=4), 1e-3
    machine = Slowed(devices=8, latency_s=latency_s)
    alone, one = (estimate(degrees, machine, Overlap(together=how)) for how in (False, True))
    messages = sum(c.count for c in alone.collectives if c.phase == "step")
    saved_s = alone.gradient_synchronisation_s - one.gradient_synchronisation_s
    assert messages > SMALL.layers
    assert saved_s == pytest.approx((messages - 1) * latency_s)
    assert one.collectives == alone.collectives


@pytest.mark.parametrize("zero", [0, 1])
def test_each_stage_has_a_buffer_of_its_own(zero: int) -> None:
    degrees = Degrees(data=4, pipeline=2, microbatch=4, zero=zero)
    swift, slow = (Slowed(devices=8, latency_s=latency_s) for latency_s in (0.0, 1e-3))
    one = Overlap(together=True)
    assert estimate(degrees, swift, one).step_time_s == pytest.approx(
        estimate(degrees, swift).step_time_s
    )
    assert estimate(degrees, slow, one).step_time_s < estimate(degrees, slow).step_time_s


PIECES = Overlap(in_pieces=True)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("pipeline", [1, 2])
def test_in_pieces_products_hide_what_is_gathered_and_scattered_for_them(
    recompute: str, pipeline: int
) -> None:
    degrees = Degrees(tensor=4, between="sequence", pipeline=pipeline, microbatch=4)
    degrees = replace(degrees, recompute=recompute, data=2 // pipeline)
    alone, beside = (estimate(degrees, Slowed(devices=8), how) for how in (NOTHING_AT_ONCE, PIECES))
    assert beside.forward_compute_s == pytest.approx(alone.forward_compute_s)
    assert beside.step_time_s < alone.step_time_s
    for phase in ("forward_communication_s", "backward_communication_s"):
        left = getattr(beside, phase) / getattr(alone, phase)
        # what is left of each is at least what it takes from the product beside it
        assert Slowed.slowdown - 1 <= left < 1


def test_what_is_summed_whole_does_not_go_in_pieces() -> None:
    """An all-reduce of a forward has to end before the next operator begins."""
    degrees = Degrees(tensor=8, microbatch=4)
    alone, beside = (estimate(degrees, Slowed(devices=8), how) for how in (NOTHING_AT_ONCE, PIECES))
    assert beside.forward_communication_s == pytest.approx(alone.forward_communication_s)


@pytest.mark.parametrize(
    "degrees",
    [Degrees(data=8, zero=1, microbatch=4), Degrees(data=4, pipeline=2, zero=1, microbatch=4)],
)
def test_replicas_hide_at_most_what_they_exchange(degrees: Degrees) -> None:
    """Behind many passes all but what is taken from them, behind one less or as much."""
    alone, one, many = (
        estimate(degrees, Slowed(devices=8), Overlap(replicas=n)) for n in (0, 1, 1000)
    )
    exchanged = alone.gradient_synchronisation_s
    assert exchanged > 0
    assert one.step_time_s < alone.step_time_s
    assert many.step_time_s <= one.step_time_s * (1 + 1e-12)
    hidden = (alone.step_time_s - many.step_time_s) / exchanged
    assert hidden <= 1 - (Slowed.slowdown - 1) + 1e-9


@pytest.mark.parametrize("degrees", STRATEGIES)
def test_what_products_add_up_is_not_added_again(degrees: Degrees) -> None:
    added = Overlap(added_in_products=True)
    alone, fused = (estimate(degrees, Slowed(devices=8), how) for how in (NOTHING_AT_ONCE, added))
    if degrees.microbatches(32) > 1:
        assert fused.step_time_s < alone.step_time_s
    else:
        assert fused.step_time_s == pytest.approx(alone.step_time_s)


@pytest.mark.parametrize("degrees", STRATEGIES)
def test_what_an_optimizer_moves_beside_its_update_is_a_part_of_it(degrees: Degrees) -> None:
    moved = Overlap(update_bytes=1000)
    alone, more = (estimate(degrees, Slowed(devices=8), how) for how in (NOTHING_AT_ONCE, moved))
    assert more.optimizer_s > alone.optimizer_s
    others = more.step_time_s - more.optimizer_s
    assert others == pytest.approx(alone.step_time_s - alone.optimizer_s)


def test_parameters_travel_with_the_bytes_that_are_said() -> None:
    """Of a machine that hides nothing: twice the bytes of an element take twice as long, and are
    cast where they are used."""
    degrees, machine = Degrees(data=8, zero=3, microbatch=2), FakePrices(devices=8, latency_s=0.0)

    def with_bytes(gathered: int, reduced: int) -> Estimate:
        of = Overlap(parameters=True, gathered_bytes=gathered, reduced_bytes=reduced)
        return estimate(degrees, machine, of)

    plain, wide = with_bytes(0, 0), with_bytes(4, 4)
    assert with_bytes(2, 2) == plain
    assert wide.forward_communication_s == pytest.approx(2 * plain.forward_communication_s)
    assert wide.backward_communication_s == pytest.approx(2 * plain.backward_communication_s)
    assert wide.forward_compute_s > plain.forward_compute_s
    assert with_bytes(0, 4).forward_compute_s == plain.forward_compute_s
    copied = Overlap(parameters=True, copies=True)
    assert estimate(degrees, machine, copied).backward_compute_s > plain.backward_compute_s


@pytest.mark.parametrize("between", ["whole", "sequence"])
def test_who_waits_for_messages_sends_each_part_once(between: str) -> None:
    """What all devices of a stage have whole, each sends a part of, and gathers it on the other
    side; what they have divided they send as it is."""
    degrees = Degrees(pipeline=2, tensor=4, microbatch=4, between=between)
    machine = Slowed(devices=8, latency_s=0.0)
    priced = {}
    for waits in (False, True):
        found = division(SMALL.graph(32), degrees.microbatches(32))
        strategy = by_degrees(found, degrees, machine, Training("adam", "mixed"))
        prices = StagePrices(machine, overlap=Overlap(waits=waits))
        priced[waits] = PricedPipeline(pipelined(found, strategy), prices)
    there, waiting = (priced[waits].pipeline.stages[0].forward_s for waits in (False, True))
    sent = Collective("send", 2 * 4 * SMALL.length * SMALL.width // 4, 2, 4)
    message_s = machine.collective_time_s(sent)
    if between == "whole":
        gathered = Collective("all_gather", 4 * sent.bytes, 4, 1)
        message_s += machine.collective_time_s(gathered)
    assert waiting - there == pytest.approx(message_s)
    assert priced[True].step_time_s > priced[False].step_time_s
    last, waiting = (priced[waits].pipeline.stages[1] for waits in (False, True))
    assert waiting.forward_s == last.forward_s
    assert waiting.backward_s > last.backward_s
