"""A band is what errors of prices make of the step; what two plans share makes no difference."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random

import pytest

from autopar import api
from autopar.ir.graph import OperatorGraph
from autopar.ir.search import Trial
from autopar.ir.sharding import Mesh
from autopar.ir.simulation import Estimate
from autopar.ir.strategy import Strategy
from autopar.ops import bound_rules
from autopar.simulator.bands import banded, difference, sent_bytes, tied, ties, with_band
from autopar.simulator.microbatches import division
from autopar.simulator.pipelines import evaluate_stages
from autopar.simulator.prices import evaluate
from autopar.simulator.shares import Seconds, seconds_by_kind, seconds_of_measured
from cost_models import cost_model
from cost_models.bands import DATASHEET, PROFILED, Bands, Widths, known_bands
from cost_models.interface import Collective, CostModel, Work
from tests.helpers import fake_plans
from tests.helpers.fake_prices import FakePrices
from tests.helpers.staged_plans import blocks, chain
from tests.helpers.strategies import random_strategy

MESH = Mesh((("a", 2), ("b", 4)))
HOSTS = cost_model("2x4xa100-sxm-80gb")
WIDTHS = Widths({"products": 0.1, "inside": 0.2, "between": 0.4, "launches": 0.3}, 0.02, 0.1, 9, 9)
BANDS = Bands(0.8, "2026-11-26", "autopar", {DATASHEET: WIDTHS, PROFILED: WIDTHS})


@dataclass(frozen=True)
class Dearer:
    """All prices of one kind times a factor."""

    base: CostModel
    kind: str
    factor: float
    devices: int = 8
    memory_bytes: int = 10**15
    scale_up_devices: int = 4

    def compute_time_s(self, work: Work) -> float:
        time_s = self.base.compute_time_s(work)
        launch_s = self.base.compute_time_s(Work("memory", work.dtype, 0.0, 1.0))
        kind = {"matmul": "products"}.get(work.kind, work.kind)
        rest_s = time_s - launch_s
        return launch_s * self._of("launches") + rest_s * self._of(kind)

    def collective_time_s(self, collective: Collective) -> float:
        inside = collective.group_size * collective.stride <= 4
        kind = "inside" if inside else "between"
        return self.base.collective_time_s(collective) * self._of(kind)

    def _of(self, kind: str) -> float:
        return self.factor if kind == self.kind else 1.0


def alone(graph: OperatorGraph, strategy: Strategy, prices: CostModel) -> Estimate:
    of = division(graph, strategy.microbatches)
    return evaluate(of.graph, of.rules, prices, strategy)


def spent(graph: OperatorGraph, strategy: Strategy, prices: CostModel) -> Seconds:
    of, estimate = division(graph, strategy.microbatches), alone(graph, strategy, prices)
    return seconds_by_kind(of.graph, of.rules, prices, strategy, estimate)


@pytest.mark.parametrize("seed", range(8))
def test_seconds_by_kind_are_the_step(seed: int) -> None:
    graph, rng = fake_plans.two_blocks(layers=2, batch=64, width=32), Random(seed)
    for _ in range(2):
        strategy = random_strategy(graph, bound_rules(graph), MESH, rng)
        step_s = alone(graph, strategy, HOSTS).step_time_s
        assert sum(spent(graph, strategy, HOSTS).values()) == pytest.approx(step_s)


def test_a_kind_takes_what_the_step_grows_by_when_it_is_dearer() -> None:
    """All but what has no part of its own: gradients' sums and local moves go with compute."""
    graph = fake_plans.two_blocks(layers=3, batch=512, width=512)
    strategy = fake_plans.strategy(graph)
    by_kind = spent(graph, strategy, HOSTS)
    assert {"products", "memory", "launches", "inside", "between"} <= set(by_kind)
    before_s = alone(graph, strategy, Dearer(HOSTS, "", 1.0)).step_time_s
    for kind in ("products", "inside", "between"):
        dearer_s = alone(graph, strategy, Dearer(HOSTS, kind, 2.0)).step_time_s
        assert dearer_s - before_s == pytest.approx(by_kind[kind], rel=0.02)


def test_a_pipeline_idles_beside_what_is_on_its_critical_path() -> None:
    strategy = chain(4, "1f1b")
    of = division(blocks(), strategy.microbatches)
    estimate = evaluate_stages(of, HOSTS, strategy)
    by_kind = seconds_by_kind(of.graph, of.rules, HOSTS, strategy, estimate)
    assert estimate.pipeline is not None and estimate.launches_s > 0
    idle_s = min(row.idle_s for row in estimate.pipeline.rows) - estimate.launches_s
    assert by_kind["idle"] == idle_s > 0  # and what it waits for its host is a launch
    assert by_kind["launches"] > estimate.launches_s
    assert by_kind["transfers"] == estimate.pipeline.transfer_s > 0
    assert sum(by_kind.values()) - idle_s == pytest.approx(estimate.step_time_s)


def test_a_measured_operator_is_of_its_own_kind_and_the_rest_of_the_step_idles() -> None:
    estimate = replace(fake_plans.estimate(1.0), gradient_synchronisation_s=0.2, optimizer_s=0.1)
    found = seconds_of_measured(HOSTS, estimate)
    assert found == pytest.approx({"measured": 0.5, "optimizer": 0.1, "between": 0.2, "idle": 0.2})
    assert "between" not in seconds_of_measured(FakePrices(), estimate)


# ---- bands ---------------------------------------------------------------------------------------


def of_kinds(step_s: float, **shares: float) -> Estimate:
    by_kind = {kind: share * step_s for kind, share in shares.items()}
    return with_band(fake_plans.estimate(step_s), by_kind, HOSTS, BANDS)


def test_a_band_holds_as_many_steps_as_its_widths_hold_prices() -> None:
    """Prices drawn at random, of which 80% are within their widths."""
    shares = {"products": 0.5, "inside": 0.3, "between": 0.2}
    band, rng = of_kinds(1.0, **shares).band, Random(0)
    assert band is not None
    deviation = {kind: WIDTHS.of(kind) / 1.2816 for kind in shares}  # 80% of a normal one
    inside = 0
    for _ in range(4000):
        factors = {kind: math.exp(rng.gauss(0, deviation[kind])) for kind in shares}
        step_s = sum(share * factors[kind] for kind, share in shares.items())
        inside += band.low_s <= step_s <= band.high_s
    assert inside / 4000 == pytest.approx(0.8, abs=0.03)


def test_a_kind_that_nothing_is_known_of_is_as_wide_as_the_widest_and_says_so() -> None:
    band = of_kinds(1.0, attention=0.5, products=0.5).band
    assert band is not None
    most, other = band.doubts
    assert (most.kind, most.relative, most.told) == ("attention", 0.5 * 0.4, False)
    assert (other.kind, other.told) == ("products", True)


def test_memory_has_a_band_of_its_own() -> None:
    estimate = of_kinds(1.0, products=1.0)
    band, peak = estimate.band, estimate.peak_memory_bytes
    assert band is not None
    assert (band.low_bytes, band.high_bytes) == pytest.approx(
        (peak / math.exp(0.1), peak * math.exp(0.1)), abs=1
    )


def test_the_step_is_inside_its_band_for_every_machine() -> None:
    for name in ("h100-sxm", "a100-sxm-80gb", "2x4xv100-sxm2-32gb"):
        graph = fake_plans.two_blocks()
        machine = cost_model(name, 8)
        plan = api.plan_by_hand(graph, fake_plans.strategy(graph), machine)
        band = plan.estimate.band
        assert band is not None and band.coverage == known_bands().coverage
        assert band.low_s < plan.estimate.step_time_s < band.high_s
        assert band.low_bytes < plan.estimate.peak_memory_bytes < band.high_bytes


# ---- ties ----------------------------------------------------------------------------------------


def test_errors_that_two_plans_share_are_no_difference() -> None:
    a, b = of_kinds(1.0, products=0.9, inside=0.1), of_kinds(1.05, products=0.9, inside=0.1)
    assert a.band is not None and a.band.high_s > 1.05  # alone, each could be the other
    assert difference(a, b) == pytest.approx(WIDTHS.own)
    assert not tied(a, b)
    c = of_kinds(1.05, products=0.5, between=0.5)
    assert difference(a, c) == pytest.approx(math.hypot(0.4 * 0.1, 0.1 * 0.2, 0.5 * 0.4, 0.02))
    assert tied(a, c) and tied(c, a)


def test_a_difference_is_symmetric_and_never_more_than_without_anything_shared() -> None:
    rng = Random(1)
    for _ in range(200):
        drawn = [{kind: rng.random() for kind in WIDTHS.kinds} for _ in range(2)]
        a, b = (
            of_kinds(1.0, **{kind: n / sum(of.values()) for kind, n in of.items()}) for of in drawn
        )
        assert difference(a, b) == difference(b, a)
        assert a.band is not None and b.band is not None
        apart = math.hypot(math.log(a.band.high_s), math.log(b.band.high_s), WIDTHS.own)
        assert difference(a, b) <= apart + 1e-12


def trial(name: str, strategy: Strategy, estimate: Estimate) -> Trial:
    return Trial(name, MESH, strategy, estimate, 0.0, "gap")


def test_ties_are_the_best_and_those_that_may_be_as_fast() -> None:
    graph = fake_plans.two_blocks()
    made = [replace(fake_plans.strategy(graph), microbatches=n) for n in (1, 2, 4, 8)]
    best, near, shared, far = (
        trial(str(n), strategy, estimate)
        for n, (strategy, estimate) in enumerate(
            zip(
                made,
                (
                    of_kinds(1.0, products=1.0),
                    of_kinds(1.1, between=0.5, products=0.5),
                    of_kinds(1.05, products=1.0),
                    of_kinds(9.0, between=1.0),
                ),
                strict=True,
            )
        )
    )
    asked = []

    def band_of(one: Trial) -> Estimate:
        asked.append(one.name)
        assert one.estimate is not None
        return one.estimate

    found = ties(best, (far, shared, near, best), band_of)
    assert [tie.name for tie in found] == ["0", "1"]
    assert far.name not in asked  # it cannot be as fast, so its band is not needed
    assert found[1].slower == pytest.approx(0.1) and found[1].within > 0.1
    assert (found[0].slower, found[1].axes, found[1].microbatches) == (0, 2, 2)
    assert ties(best, (far, shared, best), band_of) == ()


def test_what_a_device_sends_is_its_buffers_and_its_part_of_what_its_row_sends() -> None:
    graph = fake_plans.two_blocks()
    estimate = alone(graph, fake_plans.strategy(graph), FakePrices(devices=8))
    assert sent_bytes(estimate) == sum(c.bytes * c.count for c in estimate.collectives) > 0
    strategy = chain(4, "1f1b")
    found = evaluate_stages(division(blocks(), strategy.microbatches), HOSTS, strategy)
    assert found.pipeline is not None
    most = max(
        sum(one.bytes for one in found.pipeline.traffic if one.source_row == row)
        + sum(c.bytes * c.count for c in of.collectives)
        for row, of in enumerate(found.pipeline.rows)
    )
    assert sent_bytes(found) == most


def test_a_plan_that_is_searched_has_a_band_and_its_ties() -> None:
    graph = fake_plans.two_blocks(layers=2, batch=64, width=64)
    plan = api.plan(graph, topology=HOSTS)
    assert plan.estimate.band is not None
    fits = [t for t in plan.search.trials if t.step_time_s is not None]
    for tie in plan.search.ties[1:]:
        assert any(t.step_time_s == tie.step_time_s for t in fits)
        assert abs(math.log1p(tie.slower)) <= math.log1p(tie.within)
    again = api.simulate(plan)
    assert again.band == plan.estimate.band
    of = division(graph, plan.strategy.microbatches)
    assert banded(of.graph, of.rules, HOSTS, plan.strategy, again) == again
