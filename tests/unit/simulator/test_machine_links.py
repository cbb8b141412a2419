"""Transfers between groups of devices cost what the machine's links make of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

import cost_models
from autopar.ir.schedule import Rows
from autopar.schedules import SCHEDULES
from autopar.simulator.machine_links import MachineLinks
from autopar.simulator.pipeline import Feed, Passage, equal_stages
from autopar.simulator.timeline import simulate
from cost_models.analytical import Analytical
from cost_models.interface import Collective
from cost_models.topology import topology

ROWS: Rows = SCHEDULES["1f1b"](4, 8)
MACHINE = topology("4x8xh100-sxm")


def passage(
    feed: Feed, groups: tuple[tuple[int, ...], ...], source: int = 0, target: int = 1
) -> Passage:
    return MachineLinks(Analytical(MACHINE), groups).passage(feed, False, source, target)


def groups_of(size: int, first: int = 0) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(range(first + r * size, first + (r + 1) * size)) for r in range(4))


def test_a_transfer_between_hosts_costs_more_than_within_one() -> None:
    feed = Feed(0, 1, 100_000_000)
    near, far = passage(feed, groups_of(2)), passage(feed, groups_of(8))
    assert far.busy_s > 4 * near.busy_s
    assert far.latency_s > near.latency_s
    # neighbours in the numbering, on two hosts
    across = passage(feed, ((7,), (8,)))
    assert across.busy_s == far.busy_s


def test_a_whole_tensor_costs_what_the_cost_model_says_of_a_send() -> None:
    machine = Analytical(MACHINE)
    found = MachineLinks(machine, ((0,), (8,))).passage(Feed(0, 1, 10**8), False, 0, 1)
    expected = machine.collective_time_s(Collective("send", 10**8, 2, 8))
    assert found.busy_s + found.latency_s == pytest.approx(expected)


def test_devices_of_a_group_send_their_shards_side_by_side() -> None:
    whole = passage(Feed(0, 1, 10**9), groups_of(8))
    shards = passage(
        Feed(0, 1, 10**9, source_bytes=10**9 // 8, target_bytes=10**9 // 8), groups_of(8)
    )
    # the protocol for many bytes starts later, which counts as busy
    assert shards.busy_s == pytest.approx(float(whole.busy_s) / 8, rel=0.01)
    # 8 devices to 4: those that receive have twice as much each
    uneven = Feed(0, 1, 10**9, source_bytes=10**9 // 8, target_bytes=10**9 // 4)
    halves = passage(uneven, (tuple(range(8)), (8, 9, 10, 11)))
    assert halves.busy_s == pytest.approx(float(whole.busy_s) / 4, rel=0.01)


def test_groups_that_alternate_on_each_host_are_near() -> None:
    even, odd = tuple(range(0, 32, 2)), tuple(range(1, 32, 2))
    feed = Feed(0, 1, 10**8)
    assert passage(feed, (even, odd)) == passage(feed, ((0,), (1,)))


def test_units_above_the_host_count_when_given() -> None:
    asked = []

    class Recorder:
        devices, memory_bytes, scale_up_devices = 64, 1, 8

        def compute_time_s(self, work: object) -> float:
            raise AssertionError(work)

        def collective_time_s(self, collective: Collective) -> float:
            asked.append(collective.stride)
            return 1.0

    network = MachineLinks(Recorder(), ((0,), (1,), (9,), (40,)), units=(8, 32))
    for target in (1, 2, 3):
        network.passage(Feed(0, target, 1), False, 0, target)
    assert asked[::2] == [1, 8, 32]


@pytest.mark.parametrize("tier", [0, 1])
def test_slower_links_make_steps_that_use_them_slower(tier: int) -> None:
    tiers = list(MACHINE.tiers)
    tiers[tier] = replace(
        tiers[tier],
        bytes_per_s=tiers[tier].bytes_per_s / 2,
        ring_bytes_per_s=None,
        latency_s=tiers[tier].latency_s * 2,
    )
    slower = replace(MACHINE, tiers=tuple(tiers))
    feeds = tuple(Feed(s, s + 1, 50_000_000) for s in range(3))
    pipeline = replace(equal_stages(4, 1e-3, 2e-3), feeds=feeds)
    for size, first, used in ((2, 0, 0), (8, 0, 1), (1, 6, 1)):
        groups = groups_of(size, first)
        before, after = (
            simulate(ROWS, replace(pipeline, network=MachineLinks(Analytical(m), groups)))
            for m in (MACHINE, slower)
        )
        if used == tier:
            assert after.step_time_s > before.step_time_s
        elif first == 0:
            assert after.step_time_s == before.step_time_s


def test_every_machine_on_the_shelf_prices_a_pipeline() -> None:
    feeds = tuple(Feed(s, s + 1, 10**7, backward_bytes=2 * 10**7) for s in range(3))
    for name in cost_models.topology_names():
        machine = Analytical(topology(f"4x{min(4, topology(name).host_size)}x{name}"))
        groups = groups_of(machine.devices // 4)
        network = MachineLinks(machine, groups)
        pipeline = replace(equal_stages(4, 1e-3, 2e-3), feeds=feeds)
        free = simulate(ROWS, pipeline).step_time_s
        assert simulate(ROWS, replace(pipeline, network=network)).step_time_s > free
        there, back = (network.passage(feeds[0], backward, 0, 1) for backward in (False, True))
        assert back.busy_s > there.busy_s


def test_the_device_that_sends_or_receives_most_decides_where_it_is_known() -> None:
    known = Feed(0, 1, 10**9, busiest_bytes=10**8, busiest_backward_bytes=2 * 10**8)
    links = MachineLinks(Analytical(MACHINE), groups_of(8))
    forward, back = links.passage(known, False, 0, 1), links.passage(known, True, 1, 0)
    assert float(back.busy_s) == pytest.approx(2 * float(forward.busy_s), rel=0.01)
    plain = links.passage(Feed(0, 1, 10**8), False, 0, 1)
    assert forward.busy_s == plain.busy_s


def test_a_transfer_is_priced_by_the_farthest_of_all_tiers() -> None:
    """Two racks of 72 with hosts of 4: within a rack, and between racks."""
    machine = Analytical(topology("2x72xgb200-nvl72"))
    feed = Feed(0, 1, 10**8)
    near = MachineLinks(machine, ((0,), (71,))).passage(feed, False, 0, 1)
    far = MachineLinks(machine, ((0,), (72,))).passage(feed, False, 0, 1)
    assert far.busy_s > near.busy_s and far.latency_s > near.latency_s
