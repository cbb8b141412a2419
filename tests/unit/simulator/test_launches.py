"""A host that goes ahead of its device: a step takes what the slower of the two takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import pytest

from autopar.ir.graph import OperatorGraph
from autopar.ir.search import Budget, Problem
from autopar.ir.sharding import Mesh
from autopar.ir.simulation import Estimate
from autopar.ir.strategy import Strategy, Training
from autopar.ops import bound_rules
from autopar.recipes import Degrees, by_degrees
from autopar.searchers import exhaustive, ilp
from autopar.searchers.over_degrees import DegreePrices
from autopar.simulator.costs import Costs, work
from autopar.simulator.listing import Structure
from autopar.simulator.meshes import mesh
from autopar.simulator.microbatches import Division, division
from autopar.simulator.operator_times import Ahead, lag_s
from autopar.simulator.overlap import Overlap
from autopar.simulator.pipelines import StagePrices, evaluate_stages
from autopar.simulator.prices import evaluate
from autopar.simulator.recomputation import recomputation
from cost_models.interface import HostTime
from tests.helpers.fake_prices import FakePrices
from tests.helpers.random_graphs import HashPrices, random_graph
from tests.unit.simulator.test_overlap import SMALL
from tests.unit.simulator.test_overlap import STRATEGIES as ONE_CHUNK

MIXED = Training("adam", "mixed")
IN_NO_TIME = HostTime()
SHORT_S, LONG_S = 1e-9, 1.0
"""Of a kernel: beside the devices of ``FakePrices`` nothing, and far more than all they do."""


@dataclass(frozen=True)
class WithHost(FakePrices):
    host_time: HostTime = IN_NO_TIME


def hosts(kernel_s: float, pass_s: float = 0.0, view_s: float = 0.0) -> WithHost:
    return WithHost(
        devices=8,
        host_time=HostTime(operator_s=kernel_s, pass_s=pass_s, view_s=view_s, ahead=True),
    )


def planned(degrees: Degrees, machine: FakePrices) -> tuple[Division, Strategy, Estimate]:
    found = division(SMALL.graph(32), degrees.microbatches(32))
    strategy = by_degrees(found, degrees, machine, MIXED)
    if len(strategy.stages) > 1:
        return found, strategy, evaluate_stages(found, machine, strategy)
    return found, strategy, evaluate(found.graph, found.rules, machine, strategy)


def calls(of: Division, strategy: Strategy) -> Counter[int]:
    """Of a microbatch, how many kernels are launched for each stage."""
    stage_of = {name: n for n, stage in enumerate(strategy.stages) for name in stage.operators}
    repeated = set(strategy.recompute)
    if len(strategy.stages) == 1:  # but what nothing asks for again
        repeated = set(recomputation(of.graph, of.rules, strategy).again)
    found: Counter[int] = Counter()
    for operator in of.graph.operators:
        name = operator.name
        wanted, made = of.graph.differentiable[name]
        if not any(made):
            wanted = (False,) * len(wanted)
        whole = Mesh((("all", 1),))
        there, back = work(of.rules[name], ("replicated",), whole, wanted)
        again = 2 if name in repeated else 1
        found[stage_of[name]] += again * sum(not one.follows for one in there)
        found[stage_of[name]] += sum(not one.follows for one in back)
    return found


STRATEGIES = (
    *ONE_CHUNK,
    Degrees(pipeline=2, chunks=2, data=4, microbatch=1, schedule="interleaved_1f1b"),
)


@pytest.mark.parametrize("degrees", STRATEGIES)
def test_a_host_that_is_faster_than_its_devices_costs_nothing(degrees: Degrees) -> None:
    assert planned(degrees, hosts(SHORT_S))[2] == planned(degrees, FakePrices(devices=8))[2]


@pytest.mark.parametrize("degrees", STRATEGIES)
def test_a_slower_one_takes_what_it_launches_for_the_stages_of_its_row(degrees: Degrees) -> None:
    of, strategy, found = planned(degrees, hosts(LONG_S))
    of_rows: Counter[tuple[int, ...]] = Counter()
    for number, count in calls(of, strategy).items():
        of_rows[strategy.stages[number].devices] += count
    wanted = LONG_S * strategy.microbatches * max(of_rows.values())
    assert found.step_time_s == pytest.approx(wanted)
    devices_s = planned(degrees, FakePrices(devices=8))[2].step_time_s
    assert found.launches_s == pytest.approx(wanted - devices_s)


def test_passes_and_views_of_such_a_host_are_counted_with_its_launches() -> None:
    degrees = Degrees(data=8, microbatch=2)
    of, strategy, found = planned(degrees, hosts(0.0, pass_s=100.0))
    assert found.step_time_s == pytest.approx(2 * 100.0 * strategy.microbatches)
    views = [o.name for o in of.graph.operators if of.rules[o.name].rule.kind == "view"]
    back = sum(any(of.graph.differentiable[name][1]) for name in views)
    found = planned(degrees, hosts(0.0, view_s=100.0))[2]
    assert views
    assert found.step_time_s == pytest.approx(100.0 * (len(views) + back) * strategy.microbatches)


WAITS = Overlap(host_waits=True)


@pytest.mark.parametrize("kernel_s", [1e-6, 3e-5, 1e-4, 3e-4, 1e-2])
def test_within_a_pass_a_kernel_waits_for_its_launch_and_for_the_kernel_before(
    kernel_s: float,
) -> None:
    """Of a host that waits after each pass, and a head that takes as long as many layers: beside
    kernels that are launched and done one by one."""
    machine = replace(hosts(kernel_s), devices=1)
    wide = replace(SMALL, vocabulary=2**16)
    found = division(wide.graph(32), 1)
    strategy = by_degrees(found, Degrees(microbatch=32), machine, MIXED)
    costs = Costs(machine, strategy.mesh)
    host_s = device_s = 0.0
    for operator in found.graph.operators:
        flows, _ = found.graph.differentiable[operator.name]
        bound, split = found.rules[operator.name], strategy.splits[operator.name]
        host_s += costs.launches_s(bound, flows, split)[0]
        device_s = max(device_s, host_s) + costs.operator_s(bound, split, flows)[0]
    ahead = evaluate(found.graph, found.rules, machine, strategy, overlap=WAITS)
    assert device_s - 2 * kernel_s <= ahead.forward_compute_s <= device_s * (1 + 1e-12)


@pytest.mark.parametrize("degrees", STRATEGIES)
@pytest.mark.parametrize("kernel_s", [SHORT_S, 3e-5, LONG_S])
def test_a_host_that_waits_after_each_pass_is_never_faster(
    degrees: Degrees, kernel_s: float
) -> None:
    machine = hosts(kernel_s)
    of, strategy, ahead = planned(degrees, machine)
    if len(strategy.stages) > 1:
        prices = StagePrices(machine, overlap=WAITS)
        waiting = evaluate_stages(of, machine, strategy, prices)
    else:
        waiting = evaluate(of.graph, of.rules, machine, strategy, overlap=WAITS)
    assert waiting.launches_s == 0.0
    assert waiting.step_time_s >= ahead.step_time_s * (1 - 1e-9)
    if kernel_s == SHORT_S:
        assert waiting.step_time_s == pytest.approx(ahead.step_time_s, rel=1e-3)


def test_a_folded_graph_launches_as_much() -> None:
    degrees, machine = Degrees(data=8, microbatch=2, recompute="full"), hosts(LONG_S)
    of, strategy, found = planned(degrees, machine)
    structure = Structure(of.graph, of.rules)
    folded = structure.folded_in_runs(tuple(frozenset[int]() for _ in structure.blocks))
    quick = evaluate(of.graph, of.rules, machine, strategy, folded=folded)
    assert quick.step_time_s == pytest.approx(found.step_time_s)


@pytest.mark.parametrize("kernel_s", [SHORT_S, 3e-5, LONG_S])
def test_all_degrees_together_have_the_hosts_of_each(kernel_s: float) -> None:
    machine = hosts(kernel_s)
    prices = DegreePrices(SMALL.graph(32), machine, MIXED)
    for candidate in prices.bounds(STRATEGIES[3:]).candidates:
        _, found = prices.evaluated(candidate.degrees)
        assert candidate.step_time_s == pytest.approx(found.step_time_s, rel=0.02)
        assert candidate.step_time_s <= found.step_time_s * (1 + 1e-9)
    (unplayed, *_), _ = prices.unplayed(STRATEGIES[3:])
    assert unplayed.least_s <= min(one.step_time_s for one in prices.played(unplayed)) * (1 + 1e-9)


@dataclass(frozen=True)
class HashWithHost(HashPrices):
    kernel_s: float = 0.0

    @property
    def host_time(self) -> HostTime:
        return HostTime(operator_s=self.kernel_s, ahead=True)


@pytest.mark.parametrize("kernel_s", [1e-9, 1e-6, 1e-3])
def test_a_search_finds_and_proves_what_trying_everything_finds(kernel_s: float) -> None:
    for seed in range(6):
        graph: OperatorGraph = random_graph(seed, most_operators=5)
        problem = Problem(graph, HashWithHost(seed, kernel_s=kernel_s), (mesh((2,)),), 10**15)
        found, tried = (of.search(problem, Budget()) for of in (ilp, exhaustive))
        assert found.best is not None and found.best.estimate is not None
        assert tried.best is not None and tried.best.estimate is not None
        best_s = found.best.estimate.step_time_s
        assert best_s == pytest.approx(tried.best.estimate.step_time_s)
        assert found.lower_bound_s == pytest.approx(best_s)
        rules = bound_rules(graph)
        assert found.best.strategy is not None
        again = evaluate(graph, rules, problem.cost_model, found.best.strategy)
        assert again.step_time_s == best_s
        without = evaluate(graph, rules, HashPrices(seed), found.best.strategy)
        assert replace(again, step_time_s=0.0, launches_s=0.0) == replace(without, step_time_s=0.0)


# ---- a host that reads what was computed ---------------------------------------------------------


LAUNCH_S = 2.0


def waited_s(parts: Sequence[Ahead]) -> float:
    """Of a host, by its clock and that of its device: what it does not take to launch."""
    host_s = device_s = launched_s = 0.0
    for more_s, _, is_awaited in parts:
        if is_awaited:
            host_s = max(host_s, device_s)
            continue
        device_s = max(device_s, host_s) + LAUNCH_S + more_s
        host_s += LAUNCH_S
        launched_s += LAUNCH_S
    return max(host_s, device_s) - launched_s


@pytest.mark.parametrize("seed", range(20))
def test_blocks_in_which_the_host_waits_count_as_if_they_were_written_out(seed: int) -> None:
    random = Random(seed)

    def some(count: int) -> list[Ahead]:
        return [Ahead(random.uniform(-1, 1), count) for _ in range(random.randint(1, 5))]

    copies = random.randint(2, 6)
    block = [*some(copies), Ahead(0.0, copies, awaited=True), *some(copies)]
    first, last = some(1), some(1)
    written_out = [*first, *[part._replace(times=1) for part in block] * copies, *last]
    assert lag_s([*first, *block, *last]) == pytest.approx(waited_s(written_out))
