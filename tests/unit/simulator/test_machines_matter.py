"""Slower links move the price of exactly those strategies that communicate over them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest

from autopar.ir.graph import OperatorGraph
from autopar.ir.rule import NOTHING
from autopar.ir.simulation import Estimate
from autopar.ir.strategy import Storage, Strategy
from autopar.ops import bound_rules
from autopar.simulator.meshes import mesh
from autopar.simulator.prices import evaluate
from cost_models.analytical import Analytical
from cost_models.topology import Topology, topology
from tests.helpers.fake_prices import QUICK_HOSTS
from tests.helpers.random_graphs import random_graph
from tests.helpers.strategies import random_strategy

MACHINES = ("2x2xh100-sxm", "2x2xa100-sxm-80gb", "2x2xmi300x")
HOSTS_BY_DEVICES = mesh((2, 2))
TIER_OF = {"a": 1, "b": 0}
"""The mesh's first axis lies across the two hosts, its second within each."""
RATES = ("bytes_per_s", "pair_bytes_per_s", "ring_bytes_per_s", "reduction_bytes_per_s")


def slower(machine: Topology, tier: int, *, rate: float = 1.0, latency: float = 1.0) -> Analytical:
    """With the bandwidths and the latency of one tier multiplied."""
    old = machine.tiers[tier]
    rates = {name: getattr(old, name) for name in RATES if getattr(old, name) is not None}
    new = replace(
        old,
        latency_s=old.latency_s * latency,
        **{name: value * rate for name, value in rates.items()},
    )
    tiers = (*machine.tiers[:tier], new, *machine.tiers[tier + 1 :])
    return Analytical(replace(machine, tiers=tiers), QUICK_HOSTS)


def strategies(seeds: range) -> Iterator[tuple[OperatorGraph, Strategy]]:
    """Two of three are idle on one axis, where all of its ranks do the same."""
    for seed in seeds:
        graph, rng = random_graph(seed), Random(seed)
        strategy = random_strategy(graph, bound_rules(graph), HOSTS_BY_DEVICES, rng)
        yield graph, strategy if seed % 3 == 2 else idle(strategy, axis=seed % 3)


def idle(strategy: Strategy, axis: int) -> Strategy:
    def put(placements: tuple[str, ...], placement: str) -> tuple[str, ...]:
        return (*placements[:axis], placement, *placements[axis + 1 :])

    return replace(
        strategy,
        splits={name: put(split, NOTHING) for name, split in strategy.splits.items()},
        storage={
            name: Storage(put(s.parameter, "I"), put(s.gradient, "I"), put(s.optimizer, "I"))
            for name, s in strategy.storage.items()
        },
    )


def price(graph: OperatorGraph, strategy: Strategy, machine: Analytical) -> Estimate:
    return evaluate(graph, bound_rules(graph), machine, strategy)


def tiers_used(estimate: Estimate) -> set[int]:
    return {TIER_OF[axis] for c in estimate.collectives for axis in c.axis.split("+")}


def compute(estimate: Estimate) -> tuple[float, ...]:
    return estimate.forward_compute_s, estimate.backward_compute_s, estimate.optimizer_s


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("tier", [0, 1])
def test_a_slower_tier_costs_those_that_communicate_over_it_and_nobody_else(
    name: str, tier: int
) -> None:
    machine = topology(name)
    assert [t.size for t in machine.tiers] == [2, 4]
    usual = Analytical(machine, QUICK_HOSTS)
    changed = [slower(machine, tier, rate=0.5), slower(machine, tier, latency=2.0)]
    used = unused = 0
    for graph, strategy in strategies(range(40)):
        before = price(graph, strategy, usual)
        for after in (price(graph, strategy, other) for other in changed):
            assert compute(after) == compute(before)
            if tier in tiers_used(before):
                used += 1
                assert after.step_time_s > before.step_time_s
            else:
                unused += 1
                assert after.step_time_s == before.step_time_s
    assert used >= 20
    assert unused >= 20


@pytest.mark.parametrize("tier", [0, 1])
def test_every_collective_over_the_tier_takes_longer_and_every_other_as_long(tier: int) -> None:
    machine = topology(MACHINES[0])
    usual = Analytical(machine)
    for change in ({"rate": 0.5}, {"latency": 2.0}):
        other = slower(machine, tier, **change)
        for graph, strategy in strategies(range(12)):
            before, after = price(graph, strategy, usual), price(graph, strategy, other)
            for old, new in zip(before.collectives, after.collectives, strict=True):
                assert replace(new, time_s=0.0) == replace(old, time_s=0.0)
                if tier in {TIER_OF[axis] for axis in old.axis.split("+")}:
                    assert new.time_s > old.time_s
                else:
                    assert new.time_s == old.time_s


@pytest.mark.parametrize("name", MACHINES)
def test_faster_links_cost_less(name: str) -> None:
    machine = topology(name)
    for tier in (0, 1):
        quick = slower(machine, tier, rate=2.0, latency=0.5)
        for graph, strategy in strategies(range(12)):
            before = price(graph, strategy, Analytical(machine, QUICK_HOSTS))
            after = price(graph, strategy, quick)
            if tier in tiers_used(before):
                assert after.step_time_s < before.step_time_s
            else:
                assert after.step_time_s == before.step_time_s
