"""Laws of whole steps, for random strategies on every machine: nothing in a step is free, and a
machine that is slower in anything has no shorter step."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from autopar.ir.rule import NOTHING
from autopar.ops import bound_rules
from autopar.simulator.costs import Costs, work
from autopar.simulator.meshes import mesh
from autopar.simulator.microbatches import division
from autopar.simulator.pipelines import StagePrices, evaluate_stages
from autopar.simulator.prices import evaluate
from autopar.simulator.staged import even_cuts, runs, staged
from cost_models import Analytical, topology, topology_names
from cost_models.topology import Topology
from tests.helpers.fake_prices import QUICK_HOSTS
from tests.helpers.random_graphs import Builder, random_graph
from tests.helpers.staged_plans import blocks
from tests.helpers.strategies import random_strategy
from tests.unit.cost_models.test_laws import NEAR, with_device, with_links

HOSTS_BY_DEVICES = mesh((2, 2))
DEVICE = ("peak", "memory", "launch")


def test_a_product_has_one_more_for_each_operand_that_needs_a_gradient() -> None:
    """Of x and weights one each, of the bias, which is added, a sum."""
    build = Builder()
    build.linear(build.input(8, 4), build.parameter(16, 4), build.parameter(16))
    (operator,) = build.operators
    bound = bound_rules(build.graph(operator.outputs[0]))[operator.name]
    of_x, of_weight = (1, 8, 4, 16), (1, 4, 16, 8)
    for wanted, shapes in (
        ((True, True, True), [of_x, of_weight]),
        ((False, True, True), [of_weight]),
        ((True, False, True), [of_x]),
        ((False, False, True), []),
    ):
        _, backward = work(bound, (NOTHING,), mesh((1,)), wanted)
        assert [one.shape for one in backward if one.kind == "matmul"] == shapes
        assert [one.shape for one in backward if one.kind == "memory"] == [()]


def machine(name: str) -> Topology:
    """Two hosts of two, or of as many as make four devices; what has no peak in float32 is taken
    to have a quarter of that in bfloat16."""
    per_host = min(2, topology(name).host_size)
    found = topology(f"{4 // per_host}x{per_host}x{name}")
    peaks = dict(found.device.peak_flops_per_s)
    peaks.setdefault("float32", peaks.get("bfloat16", 0.0) / 4)
    device = replace(found.device, peak_flops_per_s=tuple(peaks.items()))
    return replace(found, device=device)


def slower(of: Topology, links: bool = True, device: bool = True) -> list[Topology]:
    """Each slower in one thing."""
    found = []
    for tier in range(len(of.tiers)) if links else ():
        found += [with_links(of, tier, 3.0, 1.0), with_links(of, tier, 1.0, 3.0)]
    for name in DEVICE if device else ():
        found.append(with_device(of, **{**dict.fromkeys(DEVICE, 1.0), name: 3.0}))
    return found


@pytest.mark.parametrize("name", sorted(topology_names()))
def test_a_step_is_no_shorter_on_a_machine_that_is_slower_in_anything(name: str) -> None:
    usual = machine(name)
    for seed in range(3):
        graph, rng = random_graph(seed), Random(f"{name} {seed}")
        rules = bound_rules(graph)
        strategy = random_strategy(graph, rules, HOSTS_BY_DEVICES, rng)
        before_s = evaluate(graph, rules, Analytical(usual), strategy).step_time_s
        for other in slower(usual):
            after_s = evaluate(graph, rules, Analytical(other), strategy).step_time_s
            assert after_s * NEAR >= before_s > 0


@pytest.mark.parametrize("name", sorted(topology_names()))
def test_no_operator_that_works_and_no_collective_of_a_step_is_free(name: str) -> None:
    costs = Costs(Analytical(machine(name)), HOSTS_BY_DEVICES)
    promised = 0
    for seed in range(3, 6):
        graph, rng = random_graph(seed), Random(f"{name} {seed}")
        rules = bound_rules(graph)
        strategy = random_strategy(graph, rules, HOSTS_BY_DEVICES, rng)
        for one in evaluate(graph, rules, costs.cost_model, strategy).collectives:
            promised += 1
            assert one.time_s > 0 and one.count > 0 and one.bytes > 0
        for operator in graph.operators:
            bound, split = rules[operator.name], strategy.splits[operator.name]
            wanted = (True,) * len(operator.inputs)
            if bound.rule.kind != "view":
                for works, time_s in zip(
                    work(bound, split, HOSTS_BY_DEVICES, wanted),
                    costs.operator_s(bound, split, wanted),
                    strict=True,
                ):
                    assert (time_s > 0) or not works
    assert promised


@pytest.mark.parametrize("name", sorted(topology_names()))
def test_a_pipeline_is_no_shorter_over_slower_links(name: str) -> None:
    """Turns on links do not depend on how long anything takes on them."""
    graph, usual = blocks(4), machine(name)
    rng, pair = Random(name), mesh((2,))
    like = random_strategy(graph, bound_rules(graph), pair, rng)
    strategy = staged(graph, runs(graph, even_cuts(graph, 2)), [like] * 2, "1f1b", 4)
    of = division(graph, 4)

    def step_s(on: Topology) -> float:
        prices = Analytical(on, QUICK_HOSTS)
        return evaluate_stages(of, prices, strategy, StagePrices(prices)).step_time_s

    before_s = step_s(usual)
    for other in slower(usual, device=False):
        assert step_s(other) * NEAR >= before_s > 0
    sent = replace(usual, collective_launch_s=usual.collective_launch_s * 3)
    assert step_s(sent) > before_s
