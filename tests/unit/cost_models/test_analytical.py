"""Laws that hold for every machine, and magnitudes that were published for some."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cost_models import Analytical, Collective, CollectiveKind, Work, topology, topology_names
from cost_models.analytical import matmul_waste
from cost_models.calibration import read_calibration
from cost_models.collectives import COLLECTIVES, Way, members_in_unit, spans, useful
from cost_models.interface import members_in_units, units_of
from cost_models.topology import Topology

KINDS: tuple[CollectiveKind, ...] = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "send",
)
POD = {
    name: f"{64 // topology(name).host_size}x{topology(name).host_size}x{name}"
    for name in topology_names()
}
GROUPS = [(g, s) for g in (2, 4, 8, 16, 64) for s in (1, 2, 4, 8, 16, 32) if g * s <= 64]


def model(name: str) -> Analytical:
    return Analytical(topology(POD[name]))


def matmul(shape: tuple[int, int, int, int], dtype: str) -> Work:
    batch, m, n, k = shape
    moved = 2.0 * batch * (m * k + k * n + m * n)
    return Work("matmul", dtype, 2.0 * math.prod(shape), moved, shape)


def any_dtype(found: Topology) -> str:
    peaks = dict(found.device.peak_flops_per_s)
    return "bfloat16" if "bfloat16" in peaks else "float16"


def changed(found: Topology, **factors: float) -> Topology:
    """With every bandwidth or latency of the links multiplied."""

    def times(tier: Any, name: str, factor: float) -> Any:
        value = getattr(tier, name)
        return None if value is None else value * factor

    rate, latency = factors.get("bytes_per_s", 1.0), factors.get("latency_s", 1.0)
    rates = ("bytes_per_s", "pair_bytes_per_s", "ring_bytes_per_s", "reduction_bytes_per_s")
    return replace(
        found,
        tiers=tuple(
            replace(
                tier,
                latency_s=tier.latency_s * latency,
                **{name: times(tier, name, rate) for name in rates},
            )
            for tier in found.tiers
        ),
    )


@pytest.mark.parametrize("name", topology_names())
def test_nothing_is_free_and_more_bytes_are_never_faster(name: str) -> None:
    costs = model(name)
    for kind in KINDS:
        for group_size, stride in GROUPS:
            times = [
                costs.collective_time_s(Collective(kind, size, group_size, stride))
                for size in (0, 1, 10**3, 10**6, 10**9)
            ]
            assert times[0] > 0
            assert all(a < b for a, b in pairwise(times))


def per_byte(costs: Analytical, kind: CollectiveKind, *group: int) -> float:
    """Seconds, where there are many bytes."""
    return costs.collective_ways(kind, *group)[-1].s_per_byte


SIZES = (0, 1, 2**10, 2**14, 2**17, 2**20, 2**24, 2**30)


@pytest.mark.parametrize("name", topology_names())
def test_half_the_bandwidth_doubles_what_depends_on_bytes(name: str) -> None:
    found = topology(POD[name])
    slow = Analytical(changed(found, bytes_per_s=0.5))
    for kind in KINDS:
        for group in GROUPS:
            ways = Analytical(found).collective_ways(kind, *group)
            assert slow.collective_ways(kind, *group) == tuple(
                pytest.approx(Way(latency_s, 2 * s_per_byte)) for latency_s, s_per_byte in ways
            )


@pytest.mark.parametrize("name", topology_names())
def test_less_latency_is_never_slower_and_matters_where_bytes_are_few(name: str) -> None:
    found = topology(POD[name])
    quick = Analytical(changed(found, latency_s=0.5))
    for kind in KINDS:
        for group in GROUPS:
            times = [
                [costs.collective_time_s(Collective(kind, size, *group)) for size in SIZES]
                for costs in (quick, Analytical(found))
            ]
            assert all(a <= b for a, b in zip(*times, strict=True))
            assert found.collective_launch_s < times[0][0] < times[1][0]
            assert per_byte(quick, kind, *group) == per_byte(Analytical(found), kind, *group)


@pytest.mark.parametrize("name", topology_names())
def test_the_fastest_way_is_taken_at_every_size(name: str) -> None:
    costs = model(name)
    for kind in KINDS:
        for group in GROUPS:
            ways = costs.collective_ways(kind, *group)
            assert all(a.latency_s < b.latency_s for a, b in pairwise(ways))
            assert all(a.s_per_byte > b.s_per_byte > 0 for a, b in pairwise(ways))
            times = [costs.collective_time_s(Collective(kind, size, *group)) for size in SIZES]
            assert times == sorted(times)
            assert times[0] == ways[0].latency_s
            for size, time_s in zip(SIZES, times, strict=True):
                assert time_s == min(l_s + each_s * size for l_s, each_s in ways)


MEASURED_US = {  # nccl-tests: microsoft/superbenchmark, test_cuda_nccl_bw_performance.py
    "all_reduce": {2**10: 36.1, 2**24: 226.0, 2**26: 584.5, 2**28: 2112.2, 2**30: 8159.5},
    "reduce_scatter": {2**10: 35.2, 2**24: 152.4, 2**26: 356.1, 2**28: 1108.7, 2**30: 4203.0},
    "all_gather": {2**10: 35.4, 2**24: 167.7, 2**26: 379.7, 2**28: 1192.2, 2**30: 4413.4},
}


@pytest.mark.parametrize("kind", MEASURED_US)
def test_collectives_of_eight_a100_take_about_what_was_measured(kind: CollectiveKind) -> None:
    costs = Analytical(topology("1x8xa100-sxm-40gb"))
    for size, measured_us in MEASURED_US[kind].items():
        time_us = 1e6 * costs.collective_time_s(Collective(kind, size, 8, 1))
        assert 0.75 * measured_us < time_us < 1.1 * measured_us


def test_ways_that_are_never_the_fastest_are_left_out() -> None:
    assert useful([Way(3, 1), Way(1, 3), Way(2, 4), Way(4, 1), Way(1, 5)]) == (Way(1, 3), Way(3, 1))


def test_a_ring_over_many_hosts_takes_as_many_hops_as_ranks_and_a_tree_does_not() -> None:
    """NCCL has no tree for all-gather: what DeepSpeed's ZeRO-3 met on 1536 devices (arXiv
    2104.04473, section 5.2)."""

    def start_s(kind: CollectiveKind, hosts: int) -> float:
        machine = topology(f"{hosts}x8xa100-sxm-80gb")
        began_s = Analytical(machine).collective_time_s(Collective(kind, 0, 8 * hosts, 1))
        return began_s - machine.collective_launch_s

    assert start_s("all_gather", 192) > 3.9 * start_s("all_gather", 48)
    assert start_s("all_reduce", 192) < 1.5 * start_s("all_reduce", 48)


@pytest.mark.parametrize("tier", [0, 1])
def test_one_slower_tier_slows_only_the_groups_that_cross_it(tier: int) -> None:
    found = topology("8x8xh100-sxm")
    tiers = list(found.tiers)
    tiers[tier] = changed(replace(found, tiers=(tiers[tier],)), bytes_per_s=0.1).tiers[0]
    slow = Analytical(replace(found, tiers=tuple(tiers)))
    for kind in KINDS:
        for group in GROUPS:
            before = per_byte(Analytical(found), kind, *group)
            after = per_byte(slow, kind, *group)
            assert after >= before
            crossed = {span.tier.name for span in spans(found, *group)}
            if found.tiers[tier].name not in crossed:
                assert after == before
            elif len(crossed) == 1:
                assert after == pytest.approx(10 * before)


@pytest.mark.parametrize("name", topology_names())
def test_an_all_reduce_is_at_most_a_reduce_scatter_and_an_all_gather(name: str) -> None:
    found = topology(POD[name])
    rings = replace(
        found, tiers=tuple(replace(tier, reduction_bytes_per_s=None) for tier in found.tiers)
    )
    for group in GROUPS:
        for size in SIZES:
            scatter_s, gather_s, reduce_s, in_switch_s = (
                costs.collective_time_s(Collective(kind, size, *group))
                for costs, kind in (
                    (Analytical(rings), "reduce_scatter"),
                    (Analytical(rings), "all_gather"),
                    (Analytical(rings), "all_reduce"),
                    (Analytical(found), "all_reduce"),
                )
            )
            assert in_switch_s <= reduce_s <= scatter_s + gather_s
            assert reduce_s > gather_s or size < 2**30  # of few bytes there are trees
        both = 2 * per_byte(Analytical(rings), "all_gather", *group)
        assert per_byte(Analytical(rings), "all_reduce", *group) == pytest.approx(both)


@pytest.mark.parametrize("name", topology_names())
def test_a_group_that_is_farther_apart_is_never_faster(name: str) -> None:
    costs = model(name)
    for kind in KINDS:
        for group_size in (2, 4, 8):
            rates = [per_byte(costs, kind, group_size, stride) for stride in (1, 2, 4, 8)]
            assert all(a <= b * (1 + 1e-12) for a, b in pairwise(rates))


def test_eight_rings_between_hosts_use_eight_nics() -> None:
    costs = Analytical(topology("4x8xh100-sxm"))
    whole = per_byte(costs, "all_gather", 32, 1)
    one_nic = per_byte(costs, "all_gather", 4, 8)
    assert one_nic / whole == pytest.approx(8 * (3 / 4) / (31 / 32))


def test_all_to_all_goes_through_each_ranks_own_nic() -> None:
    costs = Analytical(topology("2x8xh100-sxm"))
    s_per_byte = per_byte(costs, "all_to_all", 16, 1)
    assert s_per_byte == pytest.approx(0.5 / (0.8 * 50e9))


def test_measured_bus_bandwidths_come_out_for_large_buffers() -> None:
    """stas00/ml-engineering@744d01e, network: 362 GB/s all-gather, 480 GB/s all-reduce on eight."""
    costs, size = Analytical(topology("h200-sxm")), 16 * 2**30
    gather_s = costs.collective_time_s(Collective("all_gather", size, 8, 1))
    reduce_s = costs.collective_time_s(Collective("all_reduce", size, 8, 1))
    assert size * 7 / 8 / gather_s == pytest.approx(362e9, rel=0.01)
    assert 2 * size * 7 / 8 / reduce_s == pytest.approx(480e9, rel=0.01)


def test_four_of_eight_reduce_by_a_ring() -> None:
    costs = Analytical(topology("h200-sxm"))
    s_per_byte = per_byte(costs, "all_reduce", 4, 1)
    assert s_per_byte == pytest.approx(2 * 3 / 4 / 362e9)


def test_a_pair_of_a_full_mesh_has_one_link() -> None:
    costs = Analytical(topology("mi300x"))
    pair, all_eight = (per_byte(costs, "all_gather", g, 1) for g in (2, 8))
    assert pair == pytest.approx(1 / 2 / (0.8 * 64e9))
    assert all_eight == pytest.approx(7 / 8 / (0.8 * 448e9))
    assert per_byte(costs, "send", 2, 1) == pytest.approx(1 / (0.8 * 64e9))


def test_a_rack_of_72_is_one_domain_for_hosts_of_four() -> None:
    rack, hosts = Analytical(topology("16x4xgb200-nvl72")), Analytical(topology("16x4xb200-sxm"))
    inside = per_byte(rack, "all_gather", 16, 4)
    assert per_byte(hosts, "all_gather", 16, 4) > 10 * inside


@given(
    group=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]),
    stride=st.sampled_from([1, 2, 3, 4, 6, 8]),
    unit=st.sampled_from([2, 4, 6, 8, 72]),
)
def test_members_in_a_unit_are_those_of_the_most_cut_group(
    group: int, stride: int, unit: int
) -> None:
    block, devices = group * stride, 2 * 72 * 24
    fewest_units = 10**9
    most_units = 0
    for first in range(0, devices - block + 1, block):
        for offset in range(stride):
            units = {(first + offset + i * stride) // unit for i in range(group)}
            fewest_units = min(fewest_units, len(units))
            most_units = max(most_units, len(units))
    found = members_in_unit(group, stride, unit, devices)
    assert 1 <= found <= group
    assert math.ceil(group / found) >= fewest_units
    if most_units == 1:
        assert found == group
    else:
        assert found < group


def test_a_group_that_does_not_fit_or_is_alone_is_refused() -> None:
    costs = Analytical(topology("2x8xh100-sxm"))
    for group_size, stride in ((1, 1), (0, 1), (2, 0), (32, 1), (4, 8)):
        with pytest.raises(ValueError, match="does not fit"):
            costs.collective_time_s(Collective("all_reduce", 1, group_size, stride))


def test_unknown_work_and_collectives_have_no_price() -> None:
    costs: Any = Analytical(topology("h100-sxm"))
    with pytest.raises(KeyError, match="gossip"):
        costs.collective_time_s(Collective("gossip", 1, 2, 1))  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="magic"):
        costs.compute_time_s(Work("magic", "bfloat16", 1.0, 1.0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no peak for float64"):
        costs.compute_time_s(matmul((1, 8, 8, 8), "float64"))
    with pytest.raises(ValueError, match="shape of four"):
        costs.compute_time_s(Work("matmul", "bfloat16", 1.0, 1.0))
    with pytest.raises(ValueError, match="negative"):
        costs.compute_time_s(Work("memory", "bfloat16", 0.0, -1.0))


def test_every_kind_of_collective_is_known() -> None:
    assert set(COLLECTIVES) == set(KINDS)


sizes = st.integers(1, 9000)


@settings(max_examples=200)
@given(st.integers(1, 64), sizes, sizes, sizes, st.sampled_from([4, 58, 108, 132, 304]))
def test_no_product_is_faster_than_full_speed(
    batch: int, m: int, n: int, k: int, cores: int
) -> None:
    assert matmul_waste((batch, m, n, k), cores) >= 1 - 1e-9


@settings(max_examples=200)
@given(st.tuples(st.integers(1, 16), sizes, sizes, sizes), st.integers(0, 3))
def test_a_product_twice_as_large_is_not_faster(
    shape: tuple[int, int, int, int], which: int
) -> None:
    """But for rows of bf16 that only then lie at multiples of 16 bytes."""
    assume(which == 0 or shape[which] % 8 != 4)
    costs = Analytical(topology("h100-sxm"))
    larger = tuple(2 * s if i == which else s for i, s in enumerate(shape))
    before = costs.compute_time_s(matmul(shape, "bfloat16"))
    assert costs.compute_time_s(matmul(larger, "bfloat16")) >= before * (1 - 1e-9)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", topology_names())
@pytest.mark.parametrize("kind", ["matmul", "attention"])
def test_half_the_peak_never_makes_it_faster(
    name: str, kind: Literal["matmul", "attention"]
) -> None:
    found = topology(name)
    device = found.device
    halved = replace(
        device,
        peak_flops_per_s=tuple((d, p / 2) for d, p in device.peak_flops_per_s),
        achievable_flops_per_s=tuple((d, p / 2) for d, p in device.achievable_flops_per_s),
        attention_flops_per_s=tuple((d, p / 2) for d, p in device.attention_flops_per_s),
    )
    slow = Analytical(replace(found, device=halved))
    weak = Analytical(replace(found, device=replace(halved, power_w=device.power_w / 2)))
    for shape in ((1, 8, 8, 8), (16, 4096, 4096, 128), (1, 8192, 8192, 8192)):
        work = replace(matmul(shape, any_dtype(found)), kind=kind)
        assert slow.compute_time_s(work) >= Analytical(found).compute_time_s(work) > 0
    big = replace(matmul((1, 8192, 8192, 8192), any_dtype(found)), kind=kind)
    assert weak.compute_time_s(big) > 1.9 * Analytical(found).compute_time_s(big)


@pytest.mark.parametrize("name", topology_names())
def test_a_large_product_comes_near_to_what_was_measured(name: str) -> None:
    found = topology(name)
    dtype = any_dtype(found)
    work = matmul((1, 16384, 16384, 16384), dtype)
    peak = dict(found.device.peak_flops_per_s)[dtype]
    measured = dict(found.device.achievable_flops_per_s).get(dtype, 0.78 * peak)
    expected = measured * read_calibration().matmul_efficiency * Analytical(found).clock
    achieved = work.flops / Analytical(found).compute_time_s(work)
    assert 0.93 * expected < achieved <= expected


def test_small_and_thin_products_are_slow_per_flop() -> None:
    costs = Analytical(topology("h100-sxm"))

    def rate(*shape: int) -> float:
        work = matmul(shape, "bfloat16")  # type: ignore[arg-type]
        return work.flops / costs.compute_time_s(work)

    assert rate(1, 128, 128, 128) < rate(1, 1024, 1024, 1024) < rate(1, 4096, 4096, 4096)
    assert rate(1, 16, 4096, 4096) < 0.1 * rate(1, 4096, 4096, 4096)


def test_a_megatron_layer_takes_about_what_was_published() -> None:
    """arXiv 2205.05198, table 4: a layer of the 22B GPT (h 6144, a 64, s 2048, b 4, tensor
    parallel 8) on A100-80GB, forward 7.7 ms with its two all-reduces."""
    costs = Analytical(topology("a100-sxm-80gb"))
    tokens, h, heads = 2048 * 4, 6144, 64 // 8
    products = [(3 * h // 8, h), (h, h // 8), (4 * h // 8, h), (h, 4 * h // 8)]
    seconds = sum(costs.compute_time_s(matmul((1, tokens, n, k), "bfloat16")) for n, k in products)
    scores = 4 * heads
    seconds += costs.compute_time_s(matmul((scores, 2048, 2048, h // 64), "bfloat16"))
    seconds += costs.compute_time_s(matmul((scores, 2048, h // 64, 2048), "bfloat16"))
    # softmax, dropout and mask over the scores; norms, dropouts, residuals and gelu over tokens
    passes = [2.0 * scores * 2048 * 2048 * 6, 2.0 * tokens * h * 12, 2.0 * tokens * 4 * h // 8 * 3]
    seconds += sum(costs.compute_time_s(Work("memory", "bfloat16", 0.0, b)) for b in passes)
    seconds += 2 * costs.collective_time_s(Collective("all_reduce", 2 * tokens * h, 8, 1))
    assert seconds == pytest.approx(7.7e-3, rel=0.25)


def test_passes_over_memory_take_bytes_and_a_launch() -> None:
    found = topology("h100-sxm")
    costs = Analytical(found)
    empty = costs.compute_time_s(Work("memory", "bfloat16", 0.0, 0.0))
    assert empty == found.device.launch_s
    full = costs.compute_time_s(Work("memory", "int64", 0.0, 3.35e9))
    assert full - empty == pytest.approx(1e-3 / read_calibration().memory_efficiency)


def test_a_group_whose_devices_are_known_costs_what_its_tiers_do() -> None:
    costs = Analytical(topology("4x8xh100-sxm"))
    units = units_of(costs)
    assert units == (8, 32)
    mesh_groups = {
        (8, 1): [tuple(range(8))],
        (4, 8): [(0, 8, 16, 24)],
        (16, 2): [tuple(range(0, 32, 2))],
    }
    for (size, stride), groups in mesh_groups.items():
        within = members_in_units(groups, units)
        for kind in KINDS:
            known = costs.collective_ways(kind, size, stride, within)
            assert known == costs.collective_ways(kind, size, stride)
    # six neighbours on one host, where groups of six all over the machine would cross hosts
    one_host = members_in_units([tuple(range(6))], units)
    everywhere = costs.collective_time_s(Collective("all_reduce", 10**8, 6, 1))
    assert costs.collective_time_s(Collective("all_reduce", 10**8, 6, 1, one_host)) < everywhere
    # neighbours in the numbering of a mesh that are on two hosts
    apart = members_in_units([(0, 8)], units)
    near = costs.collective_time_s(Collective("all_reduce", 10**8, 2, 1))
    assert costs.collective_time_s(Collective("all_reduce", 10**8, 2, 1, apart)) > near


def test_a_cost_model_without_tiers_has_two_units() -> None:
    class Plain:
        devices, memory_bytes, scale_up_devices = 16, 1, 4

    assert units_of(Plain()) == (4, 16)  # type: ignore[arg-type]
