"""Laws of prices, on questions drawn at random over all machines: more is never faster, nothing is
free, and what has no price raises."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_models import Analytical, Collective, CostModel, Work, topology, topology_names
from cost_models.analytical import COLLECTIVES, COMPUTE
from cost_models.profiled import Profiled
from cost_models.topology import Device, Tier, Topology
from tests.unit.cost_models.test_profiled import ideal

drawn = settings(max_examples=300, derandomize=True, deadline=None)
MACHINES = sorted(topology_names())
RATES = ("bytes_per_s", "pair_bytes_per_s", "ring_bytes_per_s", "reduction_bytes_per_s")
NEAR = 1 + 1e-9

sizes = st.integers(0, 40).map(lambda power: 2**power) | st.integers(0, 10**10)
kinds = st.sampled_from(sorted(COLLECTIVES))
factors = st.floats(1.0, 50.0)


@st.composite
def machines(draw: st.DrawFn) -> Topology:
    """Of one to many hosts, not all of them full."""
    name = draw(st.sampled_from(MACHINES))
    per_host = draw(st.integers(1, topology(name).host_size))
    hosts = draw(st.sampled_from((1, 2, 3, 8, 32)))
    return topology(f"{hosts}x{per_host}x{name}")


@st.composite
def questions(draw: st.DrawFn) -> tuple[Topology, Collective]:
    machine = draw(machines().filter(lambda found: found.devices > 1))
    size = draw(st.integers(2, machine.devices))
    stride = draw(st.integers(1, machine.devices // size))
    return machine, Collective(draw(kinds), draw(sizes), size, stride)


@st.composite
def works(draw: st.DrawFn, machine: Topology) -> Work:
    kind = draw(st.sampled_from(sorted(COMPUTE)))
    dtype = draw(st.sampled_from([dtype for dtype, _ in machine.device.peak_flops_per_s]))
    if kind == "memory":
        return Work("memory", dtype, 0.0, float(draw(sizes)))
    side = st.integers(1, 5000)
    shape = (draw(st.integers(1, 64)), draw(side), draw(side), draw(side))
    batch, m, n, k = shape
    moved = 2.0 * batch * (m * k + k * n + m * n)
    return Work(kind, dtype, 2.0 * math.prod(shape), moved, shape)  # type: ignore[arg-type]


def time_s(machine: Topology, asked: Collective | Work) -> float:
    costs = Analytical(machine)
    if isinstance(asked, Work):
        return costs.compute_time_s(asked)
    return costs.collective_time_s(asked)


def with_links(machine: Topology, number: int, slower: float, later: float) -> Topology:
    """One tier (counted round) of less bandwidth and more latency."""
    number %= len(machine.tiers)

    def changed(tier: Tier) -> Tier:
        rates: dict[str, Any] = {
            name: getattr(tier, name) / slower for name in RATES if getattr(tier, name) is not None
        }
        return replace(tier, latency_s=tier.latency_s * later, **rates)

    tiers = (changed(t) if i == number else t for i, t in enumerate(machine.tiers))
    return replace(machine, tiers=tuple(tiers))


def with_device(machine: Topology, **slower: float) -> Topology:
    device: Device = machine.device
    rates = {
        field.name: tuple((d, rate / slower["peak"]) for d, rate in getattr(device, field.name))
        for field in fields(device)
        if field.name.endswith("flops_per_s")
    }
    return replace(
        machine,
        device=replace(
            device,
            memory_bytes_per_s=device.memory_bytes_per_s / slower["memory"],
            launch_s=device.launch_s * slower["launch"],
            **rates,  # type: ignore[arg-type]
        ),
    )


# ---- collectives ---------------------------------------------------------------------------------


@drawn
@given(questions(), sizes)
def test_a_collective_is_never_free_and_more_bytes_are_never_faster(
    question: tuple[Topology, Collective], more: int
) -> None:
    machine, asked = question
    before_s = time_s(machine, asked)
    assert 0 < before_s < math.inf
    assert time_s(machine, replace(asked, bytes=asked.bytes + more)) * NEAR >= before_s


@drawn
@given(questions(), st.integers(0, 2), factors, factors)
def test_slower_and_later_links_of_any_tier_never_make_a_collective_faster(
    question: tuple[Topology, Collective], tier: int, slower: float, later: float
) -> None:
    machine, asked = question
    before_s = time_s(machine, asked)
    for changes in ((slower, 1.0), (1.0, later), (slower, later)):
        assert time_s(with_links(machine, tier, *changes), asked) * NEAR >= before_s
    launched = replace(machine, collective_launch_s=machine.collective_launch_s * later)
    assert time_s(launched, asked) * NEAR >= before_s


@drawn
@given(questions())
def test_both_directions_of_an_all_reduce_are_never_less_than_one(
    question: tuple[Topology, Collective],
) -> None:
    """A sum that everybody has says more than one that is scattered."""
    machine, asked = question
    reduce_s = time_s(machine, replace(asked, kind="all_reduce"))
    assert reduce_s * NEAR >= time_s(machine, replace(asked, kind="reduce_scatter"))


# ---- compute -------------------------------------------------------------------------------------


@drawn
@given(st.data(), machines(), factors, factors, factors)
def test_a_slower_device_never_makes_work_faster_and_no_work_is_free(
    data: st.DataObject, machine: Topology, peak: float, memory: float, launch: float
) -> None:
    asked = data.draw(works(machine))
    before_s = time_s(machine, asked)
    assert 0 < before_s < math.inf
    for changes in ((peak, 1.0, 1.0), (1.0, memory, 1.0), (1.0, 1.0, launch)):
        names = dict(zip(("peak", "memory", "launch"), changes, strict=True))
        assert time_s(with_device(machine, **names), asked) * NEAR >= before_s


@drawn
@given(st.data(), machines(), sizes)
def test_more_bytes_of_the_same_work_are_never_faster(
    data: st.DataObject, machine: Topology, more: int
) -> None:
    asked = data.draw(works(machine))
    after_s = time_s(machine, replace(asked, bytes=asked.bytes + more))
    assert after_s * NEAR >= time_s(machine, asked)


# ---- what has no price ---------------------------------------------------------------------------

MEASURED = Profiled(ideal())
names = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12)


def models() -> st.SearchStrategy[CostModel]:
    return machines().map(Analytical) | st.just(MEASURED)


@drawn
@given(models(), names)
def test_a_kind_that_nobody_knows_raises(costs: CostModel, name: str) -> None:
    unknown: Any = name
    if name not in COMPUTE:
        with pytest.raises(KeyError, match="no price for work"):
            costs.compute_time_s(Work(unknown, "float32", 1.0, 1.0, (1, 1, 1, 1)))
    if name not in COLLECTIVES and costs.devices > 1:
        with pytest.raises(KeyError, match=name):
            costs.collective_time_s(Collective(unknown, 1, 2, 1))


@drawn
@given(models(), kinds, st.integers(-1, 2000), st.integers(-1, 2000))
def test_a_group_that_is_none_or_does_not_fit_raises(
    costs: CostModel, kind: Any, size: int, stride: int
) -> None:
    asked = Collective(kind, 1, size, stride)
    if size < 2 or stride < 1 or size * stride > costs.devices:
        with pytest.raises(ValueError, match="does not fit"):
            costs.collective_time_s(asked)
    else:
        assert costs.collective_time_s(asked) > 0


@drawn
@given(machines(), names, st.sampled_from(["matmul", "attention"]))
def test_a_dtype_that_a_device_has_no_peak_of_raises(
    machine: Topology, dtype: str, kind: Any
) -> None:
    asked = Work(kind, dtype, 2.0, 6.0, (1, 1, 1, 1))
    if dtype not in dict(machine.device.peak_flops_per_s):
        with pytest.raises(ValueError, match=f"no peak for {dtype}"):
            time_s(machine, asked)


@drawn
@given(models(), st.floats(-1e12, 0, exclude_max=True), st.booleans())
def test_negative_work_raises(costs: CostModel, amount: float, of_flops: bool) -> None:
    flops, moved = (amount, 1.0) if of_flops else (1.0, amount)
    with pytest.raises(ValueError, match="negative"):
        costs.compute_time_s(Work("memory", "float32", flops, moved))


# ---- machines that were measured -----------------------------------------------------------------


@drawn
@given(kinds, st.integers(2, 8), sizes, sizes, factors)
def test_a_measured_machine_prices_like_what_was_measured(
    kind: Any, group_size: int, size: int, more: int, slower: float
) -> None:
    """More bytes are never faster, nothing is free, and slower measurements never cost less."""
    asked = Collective(kind, size, group_size, 1)
    before_s = MEASURED.collective_time_s(asked)
    assert before_s > 0
    larger = replace(asked, bytes=size + more)
    assert MEASURED.collective_time_s(larger) * NEAR >= before_s
    profile = MEASURED.profile
    slow = tuple(replace(e, seconds=e.seconds * slower) for e in profile.exchanges)
    after_s = Profiled(replace(profile, exchanges=slow)).collective_time_s(asked)
    assert after_s * NEAR >= before_s
