"""What is paid beside work: views, passes, and the sums of microbatches' gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from autopar.ir.graph import TensorSpec
from autopar.ir.search import Budget, Problem
from autopar.ir.sharding import Mesh
from autopar.ops import bound_rules
from autopar.searchers import exhaustive, ilp
from autopar.simulator.costs import Costs
from autopar.simulator.meshes import mesh
from autopar.simulator.pipelines import PricedPipeline, StagePrices
from autopar.simulator.prices import evaluate
from autopar.simulator.stages import pipelined
from cost_models.interface import HostTime
from tests.helpers.cases import divided
from tests.helpers.fake_prices import FakePrices
from tests.helpers.random_graphs import Builder, HashPrices, random_graph
from tests.helpers.staged_plans import blocks, chain
from tests.helpers.strategies import replicate

ALONE = Mesh((("device", 1),))
HOST = HostTime(view_s=0.25, pass_s=8.0)


@dataclass(frozen=True)
class WithHost(FakePrices):
    host_time: HostTime = HOST


@dataclass(frozen=True)
class HashWithHost(HashPrices):
    @property
    def host_time(self) -> HostTime:
        return HostTime(3e-7, 2e-6, step_s=5e-7)


def test_views_and_passes_take_the_time_of_the_host() -> None:
    build = Builder()
    x = build.linear(build.input(8, 4), build.parameter(4, 4))
    graph = build.graph(build.total(build.transpose(build.view(x, 2, 16), 0, 1)))
    strategy = replicate(graph, ALONE)
    plain, found = (
        evaluate(graph, bound_rules(graph), prices, replace(strategy, microbatches=4))
        for prices in (FakePrices(), WithHost())
    )
    for kind in ("forward_compute_s", "backward_compute_s"):
        beside = getattr(found, kind) - getattr(plain, kind)
        assert beside == pytest.approx(4 * (8.0 + 2 * 0.25))


def test_gradients_of_all_microbatches_but_the_first_are_added() -> None:
    """Two are read, one is written."""
    build = Builder()
    x = build.linear(build.input(8, 4), build.parameter(4, 4))
    graph = build.graph(build.total(x))
    prices = FakePrices(work={"matmul": 0.0, "memory": 1.0})
    strategy = replicate(graph, ALONE)
    times = [
        evaluate(graph, bound_rules(graph), prices, replace(strategy, microbatches=n))
        for n in (1, 2, 5)
    ]
    of_one = times[0].backward_compute_s
    for n, found in zip((1, 2, 5), times, strict=True):
        sums = (n - 1) * 3 * 4 * 4 * 4
        assert found.backward_compute_s == pytest.approx(n * of_one + sums)


def test_a_search_finds_and_proves_what_trying_everything_finds() -> None:
    for seed in range(8):
        graph = random_graph(seed, most_operators=5)
        problem = Problem(graph, HashWithHost(seed), (mesh((2,)),), 10**15)
        result = ilp.search(problem, Budget())
        found, tried = result.best, exhaustive.search(problem, Budget()).best
        assert found is not None and found.estimate is not None
        assert tried is not None and tried.estimate is not None
        assert found.estimate.step_time_s == pytest.approx(tried.estimate.step_time_s)
        assert result.stop_reason == "optimal"
        assert result.lower_bound_s == pytest.approx(found.estimate.step_time_s, rel=1e-5)


def test_messages_take_time_at_both_ends_and_backwards_in_two_parts_that_of_their_calls() -> None:
    """A chain of four: the first sends forward and takes a gradient, those between do both twice,
    the last the other way round."""
    host = HostTime(message_s=100.0, part_s=1000.0)
    for schedule, parted in (("1f1b", 0), ("zero_bubble_h1", 1)):
        plan = pipelined(divided(blocks(), 8), chain(4, schedule))
        plain, found = (
            PricedPipeline(plan, StagePrices(prices)).stages
            for prices in (FakePrices(devices=4), WithHost(devices=4, host_time=host))
        )
        for number, (before, after) in enumerate(zip(plain, found, strict=True)):
            messages = 1 if number in (0, 3) else 2
            graph = after.part.graph
            trained = {o.name for p in graph.parameters for o, _ in graph.consumers[p.name]}
            for kind, beside_s in (
                ("forward_compute_s", messages * 100.0),
                ("input_compute_s", messages * 100.0),
                ("weight_compute_s", parted * len(trained) * 1000.0),
            ):
                more_s = getattr(after.parts, kind) - getattr(before.parts, kind)
                assert more_s == pytest.approx(beside_s), (kind, number)


def test_messages_take_time_by_their_bytes_at_both_ends() -> None:
    """What each stage holds of what it takes and sends, which is what boundaries carry."""
    plan = pipelined(divided(blocks(), 8), chain(4, "1f1b"))
    host = HostTime(message_byte_s=1.0)
    plain, found = (
        PricedPipeline(plan, StagePrices(prices)).stages
        for prices in (FakePrices(devices=4), WithHost(devices=4, host_time=host))
    )
    for number, (before, after) in enumerate(zip(plain, found, strict=True)):
        beside_s = sum(
            plan.bytes(b, backward=False) for b in plan.boundaries if number in (b.source, b.target)
        )
        for kind in ("forward_compute_s", "input_compute_s"):
            more_s = getattr(after.parts, kind) - getattr(before.parts, kind)
            assert more_s == pytest.approx(beside_s) and more_s > 0, (kind, number)


def test_steps_that_move_nothing_are_calls() -> None:
    """What is whole and is used for different work from now on; sums are collectives, which are
    measured with their call; a slice is a call and a copy."""
    spec = TensorSpec((8, 4), "float32")
    prices = WithHost(devices=2, host_time=HostTime(step_s=8.0))
    costs = Costs(prices, mesh((2,)))
    slice_s = 8.0 + prices.work["memory"] * 2 * spec.bytes / 2
    for source, target, forward_s in (("I", "R", 8.0), ("P", "I", 0.0), ("I", "S(0)", slice_s)):
        found = costs.moves_s(spec, (source,), (target,), backward=False)
        assert found == pytest.approx(forward_s)
    assert costs.moves_s(spec, ("I",), ("R",), backward=True) == 0.0
    assert costs.moves_s(spec, ("P",), ("I",), backward=True) == pytest.approx(8.0)


def test_stages_have_a_pass_each_and_one_more_for_a_backward_in_two_parts() -> None:
    for schedule, passes in (("1f1b", 1), ("zero_bubble_h1", 2)):
        plan = pipelined(divided(blocks(), 8), chain(4, schedule))
        plain, found = (
            PricedPipeline(plan, StagePrices(prices(devices=4))).stages
            for prices in (FakePrices, WithHost)
        )
        for before, after in zip(plain, found, strict=True):
            views_s = after.parts.forward_compute_s - before.parts.forward_compute_s - 8.0
            assert views_s >= 0
            beside = after.parts.backward_compute_s - before.parts.backward_compute_s
            assert beside == pytest.approx(passes * 8.0 + views_s, abs=0.3)
