"""The outer search finds what trying everything finds, and its bound is never above that."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from random import Random

import pytest

from autopar.ir.schedule import Shape
from autopar.ir.search import Budget
from autopar.schedules import SCHEDULES
from autopar.searchers.over_stages import StageResult, search
from autopar.searchers.stage_shapes import World, ideals_of, shapes_of
from autopar.searchers.stage_tables import Tables
from autopar.simulator.pipeline import Instant, PairLinks, StageCost, StageMemory
from autopar.simulator.stage_problem import (
    Alternative,
    Layout,
    Pool,
    StageProblem,
    Unit,
    facts_of,
    value_of,
)
from tests.helpers.stagings import RandomStages, best_of_all, stagings

EXACT = Budget(gap=0.0)


def check(problem: StageProblem) -> StageResult:
    """The search agrees with trying all stagings."""
    best_s, _ = best_of_all(problem)
    result = search(problem, EXACT)
    if best_s is None:
        assert result.best is None
        assert result.stop_reason == "infeasible"
        return result
    assert result.best is not None
    value = value_of(problem, result.best, problem.units(result.best.microbatches))
    assert value is not None
    assert value.time_s == best_s
    assert result.time_s == pytest.approx(float(best_s), rel=1e-12)
    assert result.lower_bound_s <= float(best_s)
    assert result.stop_reason == "optimal"
    return result


@pytest.mark.parametrize("branching", [False, True])
def test_the_search_finds_the_best_of_all_stagings(branching: bool) -> None:
    seen: Counter[str] = Counter()
    for seed in range(105):
        result = check(RandomStages(seed, branching).problem)
        if result.best is None:
            seen["infeasible"] += 1
            continue
        seen["feasible"] += 1
        seen[result.best.schedule.name] += 1
        seen["several stages"] += len(result.best.stages) > 1
        seen["unequal"] += len({stage.layout.devices for stage in result.best.stages}) > 1
    assert seen["feasible"] > 70
    for what in ("infeasible", "several stages", "unequal", "1f1b", "zero_bubble_h1", "chimera"):
        assert seen[what], (what, seen)


@pytest.mark.parametrize("branching", [False, True])
def test_the_search_finds_the_best_throughput(branching: bool) -> None:
    for seed in range(300, 320):
        check(replace(RandomStages(seed, branching).problem, objective="throughput"))


def test_the_search_finds_the_best_on_two_kinds_of_devices() -> None:
    kinds: Counter[str] = Counter()
    for seed in range(25):
        result = check(on_two_kinds(RandomStages(seed, seed % 2 == 0, most_units=3).problem))
        if result.best is not None:
            kinds.update({stage.layout.kind for stage in result.best.stages})
    assert kinds["fast"] and kinds["slow"]


def on_two_kinds(problem: StageProblem) -> StageProblem:
    """Of each unit also alternatives on devices that take half as long again and have more room."""

    def slow(alternative: Alternative) -> Alternative:
        cost = alternative.cost
        times = (cost.forward_s, cost.backward_s, cost.update_s)
        halves = (cost.input_gradient_s, cost.weight_gradient_s)
        return replace(
            alternative,
            layout=replace(alternative.layout, kind="slow"),
            cost=StageCost(
                *(Fraction(3, 2) * t for t in times),
                *(None if t is None else Fraction(3, 2) * t for t in halves),
                cost.memory,
            ),
        )

    def both(unit: Unit) -> Unit:
        ways = [replace(a, layout=replace(a.layout, kind="fast")) for a in unit.alternatives]
        return replace(unit, alternatives=(*ways, *map(slow, unit.alternatives)))

    (pool,) = problem.pools
    return replace(
        problem,
        units=lru_cache(maxsize=None)(lambda m: tuple(map(both, problem.units(m)))),
        pools=(
            Pool(2, pool.memory_limit_bytes, "fast"),
            Pool(pool.devices - 2, 2 * pool.memory_limit_bytes, "slow"),
        ),
    )


@pytest.mark.slow
@pytest.mark.parametrize("branching", [False, True])
def test_the_search_finds_the_best_of_larger_problems(branching: bool) -> None:
    checked = 0
    for seed in range(1000, 1100):
        problem = RandomStages(seed, branching, most_units=5).problem
        if sum(1 for _ in stagings(problem)) < 20_000:
            check(problem)
            checked += 1
    assert checked > 50


def test_a_bound_holds_when_the_search_is_ended_early() -> None:
    for seed in range(25):
        problem = RandomStages(seed, seed % 2 == 0).problem
        best_s, _ = best_of_all(problem)
        result = search(problem, Budget(time_s=0.0))
        assert result.lower_bound_s <= (math.inf if best_s is None else float(best_s))
        assert result.stop_reason in ("time", "optimal", "infeasible")


def test_an_interrupted_search_keeps_its_best_and_a_bound() -> None:
    kept = 0
    for seed in range(20):
        told: list[str] = []

        def progress(line: str, told: list[str] = told) -> None:
            told.append(line)
            if len(told) == 4:
                raise KeyboardInterrupt

        problem = RandomStages(seed).problem
        result = search(problem, EXACT, progress)
        if result.stop_reason == "interrupted" and result.best is not None:
            best_s, _ = best_of_all(problem)
            assert best_s is not None
            assert 0 < result.lower_bound_s <= float(best_s) <= result.time_s
            kept += 1
    assert kept


# Chains with closed answers


def chain_problem(
    work: list[tuple[int, int]], devices: int, batch: int, limit: int = 10**9
) -> StageProblem:
    """(seconds of the whole batch forward, bytes of parameters) on any number of devices."""

    @lru_cache(maxsize=None)
    def units(m: int) -> tuple[Unit, ...]:
        return tuple(
            Unit(f"unit {u}", ways(seconds, size, m), (u - 1,) if u else ())
            for u, (seconds, size) in enumerate(work)
        )

    @lru_cache(maxsize=None)
    def ways(seconds: int, size: int, m: int) -> tuple[Alternative, ...]:
        return tuple(
            Alternative(
                Layout(n, parts=n),
                StageCost(
                    Fraction(seconds, m * n),
                    Fraction(2 * seconds + again * seconds, m * n),
                    0,
                    memory=StageMemory(size, size, 2 * size, (1 if again else 120) // n),
                ),
                name="recomputed" if again else "",
            )
            for n in (1, 2, 4)
            if (batch // m) % n == 0
            for again in (False, True)
        )

    return StageProblem(
        units=units,
        microbatches=tuple(m for m in range(1, batch + 1) if batch % m == 0),
        pools=(Pool(devices, limit),),
        network=lambda groups: Instant(),
        exchange_s=lambda size, copies: 0,
    )


def test_without_a_price_for_replicas_one_stage_on_all_devices_is_best() -> None:
    result = search(chain_problem([(8, 1)] * 4, devices=4, batch=8), EXACT)
    assert result.time_s == 8 * 4 * 3 / 4
    assert result.stop_reason == "optimal"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_fewest_units_are_planned(count: int) -> None:
    result = search(chain_problem([(8, 1)] * count, devices=2, batch=2), EXACT)
    assert result.time_s == 8 * count * 3 / 2
    assert result.stop_reason == "optimal"


def test_just_enough_units_are_recomputed() -> None:
    # one device: 4 bytes of parameters each, 120 bytes of activations or 1
    whole = 8 * 4 + 8 * 120
    for recomputed in range(9):
        problem = chain_problem([(1, 1)] * 8, 1, 1, limit=whole - 119 * recomputed)
        result = search(problem, EXACT)
        assert result.best is not None
        units = problem.units(1)
        chosen = [
            units[u].alternatives[place].name
            for stage in result.best.stages
            for u, place in zip(stage.units, stage.alternatives, strict=True)
        ]
        assert chosen.count("recomputed") == recomputed
        assert result.time_s == 8 * 3 + recomputed


def test_parallel_branches_run_at_the_same_time_on_devices_of_their_own() -> None:
    def units(m: int) -> tuple[Unit, ...]:
        cost = StageCost(Fraction(4, m), Fraction(8, m), 0, memory=StageMemory(60, 0, 0, 1))
        ways = (Alternative(Layout(1), cost),)
        return (Unit("a", ways), Unit("b", ways), Unit("c", ways, (0, 1)))

    problem = StageProblem(
        units=units,
        microbatches=(1,),
        pools=(Pool(3, 100),),  # one unit a device
        network=lambda groups: Instant(),
        exchange_s=lambda size, copies: 0,
    )
    result = search(problem, EXACT)
    assert result.time_s == 4 + 4 + 8 + 8


def test_many_equal_units_are_planned_within_a_bound() -> None:
    """Memory binds: 40 units of 4 + 120 bytes, or 4 + 1, on 8 devices of 500."""
    problem = chain_problem([(1, 1)] * 40, devices=8, batch=16, limit=500)
    result = search(problem, Budget(60.0, 1e-3, proof_s=1.0))
    assert result.best is not None
    value = value_of(problem, result.best, problem.units(result.best.microbatches))
    assert value is not None
    assert all(memory.total_bytes <= 500 for memory in value.timeline.memories())
    assert result.lower_bound_s <= float(value.time_s)
    assert result.lower_bound_s >= 40 * 3 / 8 * (1 - 1e-9)  # all devices always busy
    assert len(result.trials) > 100


# What the search leans on


@pytest.mark.parametrize("name", SCHEDULES)
def test_more_microbatches_do_not_keep_less_in_flight(name: str) -> None:
    schedule = SCHEDULES[name]
    for stages in range(1, 9):
        feeds = tuple((i, i + 1) for i in range(stages - 1))
        for chunks in range(1, stages + 1):
            last = None
            for m in range(1, 5 * stages):
                if schedule.refuses(Shape(stages, m, chunks)):
                    continue
                facts = facts_of(schedule, stages, m, chunks, feeds)
                assert facts is not None
                if last is not None:
                    assert facts.held == last.held
                    for now, before in zip(facts.in_flight, last.in_flight, strict=True):
                        assert all(now[s] >= before[s] for s in before)
                last = facts


@pytest.mark.parametrize("name", SCHEDULES)
def test_which_rows_have_a_stage_does_not_depend_on_what_feeds_it(name: str) -> None:
    schedule = SCHEDULES[name]
    for stages, m in ((2, 4), (4, 4), (4, 8), (6, 12)):
        for chunks in range(1, stages + 1):
            if schedule.refuses(Shape(stages, m, chunks)):
                continue
            chain = facts_of(
                schedule, stages, m, chunks, tuple((i, i + 1) for i in range(stages - 1))
            )
            other = facts_of(schedule, stages, m, chunks, ((0, stages - 1),))
            assert chain is not None and other is not None
            assert chain.held == other.held
            assert chain.split == other.split


def test_a_longer_chain_keeps_no_less_as_far_from_its_end() -> None:
    for schedule in SCHEDULES.values():
        for m in (4, 8, 16):
            found = {}
            for stages in range(1, 9):
                chain = tuple((i, i + 1) for i in range(stages - 1))
                facts = facts_of(schedule, stages, m, 1, chain)
                if facts is None or schedule.copies:
                    continue
                for s in range(stages):
                    after = stages - s
                    for kind, of_rows in enumerate((facts.in_flight, facts.whole)):
                        assert of_rows[s][s] >= found.get((kind, after, s - 1), 0)
                        found[kind, after, s] = of_rows[s][s]


def test_tables_and_bounds_of_shapes_are_below_every_staging() -> None:
    for seed in range(30):
        problem = RandomStages(seed).problem
        best: dict[tuple[int, str, int, int], float] = {}
        for staging in stagings(problem):
            value = value_of(problem, staging, problem.units(staging.microbatches))
            if value is not None:
                stages = len(staging.stages)
                key = (staging.microbatches, staging.schedule.name, staging.chunks, stages)
                best[key] = min(best.get(key, math.inf), float(value.time_s))
        for m in problem.microbatches:
            world = World(problem, m)
            for shape in shapes_of(world):
                best_s = best.pop((m, shape.schedule.name, shape.chunks, shape.stages), math.inf)
                assert shape.bound_s <= best_s
                priced_s = shape.rates().bound_s(shape.rows, shape.at_least_in_flight(), True)
                assert priced_s <= best_s * (1 + 1e-9)
                if world.is_chain and shape.one_each:
                    tables = Tables(problem, world.units, m, shape.split, lambda s: 1, math.inf)
                    assert tables.least_s(shape.stages) <= best_s
                    longer_s = tables.longer_s(shape.stages)
                    for (m2, name, chunks, stages), other_s in best.items():
                        if (m2, name, chunks) == (m, shape.schedule.name, 1):
                            assert stages <= shape.stages or longer_s <= other_s
        assert not best  # every shape that can be done was offered


def test_sets_that_can_come_first() -> None:
    def units(*reads: tuple[int, ...]) -> list[Unit]:
        return [Unit(str(u), (), of) for u, of in enumerate(reads)]

    assert ideals_of(units((), (0,), (1,)), 10) == [0, 1, 3, 7]
    assert ideals_of(units((), (), (0, 1)), 10) == [0, 1, 2, 3, 7]
    assert ideals_of(units((), (), (), ()), 10) is None


# PipeDream


def pipedream(
    times: list[int], weights: list[int], activations: list[int], devices: int, bytes_per_s: int
) -> Fraction:
    """The slowest stage of the best split, by the recurrence of section 3.1 of arXiv 1806.03377."""

    def stage_s(i: int, j: int, n: int) -> Fraction:
        exchange = Fraction(4 * (n - 1) * sum(weights[i:j]), n * bytes_per_s)
        return max(Fraction(sum(times[i:j])), exchange) / n

    @lru_cache(maxsize=None)
    def best(j: int, n: int) -> Fraction:
        found = stage_s(0, j, n)
        for i in range(1, j):
            for last in range(1, n):
                sent = Fraction(2 * activations[i - 1], bytes_per_s)
                found = min(found, max(best(i, n - last), sent, stage_s(i, j, last)))
        return found

    return min(best(len(times), n) for n in range(1, devices + 1))


@pytest.mark.parametrize("seed", range(25))
def test_throughput_on_a_chain_with_replicas_is_that_of_pipedream(seed: int) -> None:
    """Its stages overlap computing, gradient exchange and transfers in both directions."""
    random = Random(seed)
    count, devices, bytes_per_s = random.randint(2, 6), random.randint(2, 6), 10
    times = [random.randint(3, 60) for _ in range(count)]
    weights = [random.choice([0, random.randint(1, 200)]) for _ in range(count)]
    activations = [random.randint(1, 200) for _ in range(count)]
    ways = [
        tuple(
            Alternative(
                Layout(n),
                StageCost(
                    Fraction(t, 3 * n), Fraction(2 * t, 3 * n), 0, memory=StageMemory(0, 0, 0, 0)
                ),
                Fraction(4 * (n - 1) * w, n * n * bytes_per_s),
            )
            for n in range(1, devices + 1)
        )
        for t, w in zip(times, weights, strict=True)
    ]
    chain = tuple(
        Unit(f"layer {u}", of, (u - 1,) if u else (), activations[u]) for u, of in enumerate(ways)
    )
    problem = StageProblem(
        units=lambda m: chain,
        microbatches=(1,),
        pools=(Pool(devices, 10**9),),
        network=lambda groups: _BothWays(bytes_per_s),
        exchange_s=lambda size, copies: 0,
        schedules=(SCHEDULES["1f1b"],),
        objective="throughput",
    )
    result = search(problem, EXACT)
    assert result.stop_reason == "optimal"
    expected = pipedream(times, weights, activations, devices, bytes_per_s)
    assert result.time_s == pytest.approx(float(expected), rel=1e-12)


class _BothWays:
    """One link between two groups, which outputs and gradients share, as the paper has it."""

    def __init__(self, bytes_per_s: int) -> None:
        self._links = PairLinks(Fraction(bytes_per_s), Fraction(0))

    def passage(self, feed, backward, source, target):  # type: ignore[no-untyped-def]
        passage = self._links.passage(feed, backward, source, target)
        return replace(passage, links=((min(source, target), max(source, target)),))
