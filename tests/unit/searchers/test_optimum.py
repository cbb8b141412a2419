"""The optimum of a price list is that of trying every selection."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from time import monotonic

import numpy as np
import pytest

from autopar.errors import AutoparError
from autopar.searchers.approach import Wanted, approach
from autopar.searchers.bounds import ascend, dual, survivors, weighed_s
from autopar.searchers.enumeration import count_selections
from autopar.searchers.exhaustive import best_selection
from autopar.searchers.optimum import Optimum, optimum
from autopar.simulator.price_list import (
    Bytes,
    Instead,
    Kept,
    Node,
    PriceList,
    Selection,
    cheapest_storages,
    storages_within,
)
from tests.helpers.random_prices import World, world

GAP = 1e-6
SEEDS = range(45)
MORE_SEEDS = range(1000, 2500)


def check(found: Optimum, price_list: PriceList, best_s: float) -> None:
    """``found`` is a selection that fits and takes ``best_s``, and its bound says so too."""
    if math.isinf(best_s):
        assert found.infeasible
        assert found.selection is None
        return
    assert not found.infeasible
    assert found.selection is not None
    assert price_list.fits(found.selection)
    assert price_list.time_of(found.selection) == pytest.approx(best_s, rel=1e-9, abs=1e-12)
    assert found.bound_s <= best_s * (1 + 1e-9)
    assert found.bound_s >= best_s * (1 - GAP) - 1e-9


def limits(of: World, seed: int, count: int = 3) -> list[np.ndarray]:
    return of.interesting_limits(np.random.default_rng(seed), count)


def check_without_a_limit(seed: int) -> None:
    here = world(seed, 500)
    best_s = float(here.times_s.min())
    for exclude in (True, False):
        check(optimum(here.price_list, exclude=exclude), here.price_list, best_s)


def check_with_limits(seed: int) -> None:
    here = world(seed, 500)
    for limit in limits(here, seed):
        price_list = here.limited(limit)
        for exclude in (True, False):
            check(optimum(price_list, exclude=exclude), price_list, here.best_s(limit))


def test_the_optimum_is_that_of_trying_everything() -> None:
    for seed in range(300):
        check_without_a_limit(seed)


def test_within_a_memory_limit_the_optimum_is_that_of_trying_everything() -> None:
    for seed in SEEDS:
        check_with_limits(seed)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_thousands_of_price_lists_have_the_optimum_of_trying_everything(part: int) -> None:
    for seed in MORE_SEEDS[part::10]:
        check_without_a_limit(seed)
        check_with_limits(seed)


def test_the_oracle_tries_everything_and_says_when_that_is_too_much() -> None:
    for seed in range(10):
        here = world(seed, 300)
        for limit in limits(here, seed):
            found = best_selection(here.limited(limit))
            assert (math.inf if found is None else here.price_list.time_of(found)) == here.best_s(
                limit
            )
        assert len(here.selections) == len(set(here.selections))
        assert len(here.selections) == count_selections(here.price_list)
    nodes = tuple(Node(f"n{i}", np.zeros(10), np.zeros((1, 10))) for i in range(8))
    with pytest.raises(AutoparError, match="ilp searcher"):
        best_selection(PriceList(nodes, (), (), np.array([np.inf])))


def test_the_limits_tried_bind_and_some_cannot_be_met() -> None:
    binding = infeasible = 0
    for seed in SEEDS:
        here = world(seed, 500)
        for limit in limits(here, seed):
            best_s = here.best_s(limit)
            infeasible += math.isinf(best_s)
            binding += not math.isinf(best_s) and best_s > here.times_s.min()
    assert binding > 40
    assert infeasible > 10


def test_a_cutoff_hides_what_is_slower_and_never_what_is_faster() -> None:
    for seed in range(25):
        here = world(seed, 500)
        for limit in (here.price_list.limit_bytes, *limits(here, seed, 1)):
            price_list, best_s = here.limited(limit), here.best_s(limit)
            if math.isinf(best_s) or best_s == 0.0:
                continue
            above = optimum(price_list, Wanted(cutoff_s=best_s * 1.5))
            check(above, price_list, best_s)
            below = optimum(price_list, Wanted(cutoff_s=best_s * 0.9))
            assert below.selection is None
            assert not below.infeasible
            assert best_s * 0.9 * (1 - 1e-8) <= below.bound_s <= best_s * (1 + 1e-9)


def test_after_the_deadline_the_bound_still_holds() -> None:
    for seed in range(15):
        here = world(seed, 300)
        for limit in limits(here, seed, 2):
            price_list, best_s = here.limited(limit), here.best_s(limit)
            found = optimum(price_list, Wanted(deadline=monotonic() - 1.0))
            assert found.bound_s <= best_s * (1 + 1e-9)
            if found.selection is not None:
                assert price_list.fits(found.selection)
                assert price_list.time_of(found.selection) >= best_s * (1 - 1e-9)
            assert math.isinf(best_s) or not found.infeasible


def test_every_bound_of_the_dual_holds_whatever_the_memory_multipliers() -> None:
    for seed in range(60):
        here = world(seed, 300)
        rng = np.random.default_rng(seed)
        (limit,) = limits(here, seed, 1)
        rows = len(limit)
        for weights in (np.zeros(rows), rng.random(rows) * 10.0 ** rng.integers(-3, 2)):
            weights = np.where(np.isfinite(limit), weights, 0.0)
            problem = dual(here.limited(limit), weights)
            spare = float(weights @ np.where(np.isfinite(limit), limit, 0.0))
            weighed = here.times_s + here.memory_bytes @ weights
            for sweeps in (0, 1, 40):
                selection = ascend(problem, sweeps)
                assert problem.bound_s <= here.best_s(limit) * (1 + 1e-9) + 1e-9
                assert problem.bound_s + spare <= weighed.min() + 1e-9 * abs(weighed).max()
                assert weighed_s(problem, selection) >= weighed.min() * (1 - 1e-9)


def test_sweeps_raise_the_bound() -> None:
    for seed in range(60):
        problem = dual(world(seed, 300).price_list)
        before = problem.bound_s
        ascend(problem, 3)
        assert problem.bound_s >= before - 1e-9 * abs(before)


def test_what_is_excluded_is_in_no_optimum() -> None:
    """Nor in any selection that is as fast as what exclusion was asked for."""
    for seed in range(60):
        here = world(seed, 300)
        problem = dual(here.price_list)
        ascend(problem, 40)
        for target_s in (here.times_s.min(), np.median(here.times_s)):
            offered = survivors(problem, float(target_s))
            for selection, time_s in zip(here.selections, here.times_s, strict=True):
                if time_s <= target_s:
                    assert _offered(selection, offered.alternatives)
                    assert _redistributed(here.price_list, selection, offered.pairs)


def _offered(selection: Selection, masks: tuple[np.ndarray, ...]) -> bool:
    return all(mask[k] for mask, k in zip(masks, selection.alternatives, strict=True))


def _redistributed(
    price_list: PriceList, selection: Selection, pairs: tuple[np.ndarray, ...]
) -> bool:
    return all(
        pair[flow.source[selection.alternatives[flow.producer]], t[selection.alternatives[c]]]
        for flow, pair in zip(price_list.flows, pairs, strict=True)
        for c, t in flow.consumers
    )


def test_the_cheapest_storages_are_the_best_of_all_for_these_alternatives() -> None:
    for seed in range(25):
        here = world(seed, 300)
        rng = np.random.default_rng(seed)
        weights = np.asarray(rng.random(here.memory_bytes.shape[1]))
        weighed = here.times_s + here.memory_bytes @ weights
        for i in rng.integers(0, len(here.selections), 3):
            alternatives = here.selections[i].alternatives
            alike = [s.alternatives == alternatives for s in here.selections]
            found = cheapest_storages(here.price_list, alternatives, weights)
            cost = here.price_list.time_of(found) + weights @ here.price_list.memory_of(found)
            assert cost == pytest.approx(weighed[alike].min(), rel=1e-8)


def test_an_approach_bounds_the_optimum_and_what_it_meets_fits() -> None:
    near = 0
    for seed in SEEDS:
        here = world(seed, 500)
        for limit in limits(here, seed):
            price_list, best_s = here.limited(limit), here.best_s(limit)
            found = approach(price_list, Wanted())
            assert found.bound_s <= best_s * (1 + 1e-9)
            fastest = found.fastest()
            if fastest is not None:
                assert price_list.fits(fastest)
                assert price_list.time_of(fastest) >= best_s * (1 - 1e-9)
                near += price_list.time_of(fastest) <= best_s * 1.05
    assert near > len(SEEDS) * 3 / 2


def test_an_approach_bounds_what_is_exchanged_too() -> None:
    """What is kept for something instead, in every way: never faster than the bound; and what is
    said to fit with exchanges does."""
    near = looked = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        here = world(seed, 40)
        exchanged = tuple(_with_instead(kept, rng) for kept in here.price_list.kept)
        free = replace(here.price_list, kept=exchanged)
        every = [exchange for s in here.selections for exchange in _exchanges(free, s)]
        times_s, sizes = np.array([t for t, _ in every]), np.array([b for _, b in every])
        for limit in limits(here, seed, 2):
            best_s = times_s[(sizes <= limit * (1 + 1e-12)).all(axis=1)].min(initial=math.inf)
            found = approach(replace(free, limit_bytes=limit), Wanted())
            assert found.bound_s <= best_s * (1 + 1e-9)
            fastest = found.fastest_exchanged()
            looked += math.isfinite(best_s)
            if fastest is not None:
                assert fastest[1] >= best_s * (1 - 1e-9)
                near += fastest[1] <= best_s * 1.2
    assert near > looked / 2


def _with_instead(kept: Kept, rng: np.random.Generator) -> Kept:
    shape = kept.memory_bytes.shape
    instead = Instead(rng.random(shape[1]) * 3, kept.memory_bytes * rng.random(shape) * 0.5)
    return replace(kept, instead=(instead,))


def _exchanges(price_list: PriceList, selection: Selection) -> Iterator[tuple[float, Bytes]]:
    """Seconds and bytes, each version that is needed kept or exchanged."""
    time_s, memory_bytes = price_list.time_of(selection), price_list.memory_of(selection)
    needed = [(k, v) for k in price_list.kept for v in sorted(k.versions_of(selection))]
    for choice in product((False, True), repeat=len(needed)):
        more_s, more = 0.0, np.zeros(len(memory_bytes))
        for (kept, version), is_exchanged in zip(needed, choice, strict=True):
            if is_exchanged:
                (other,) = kept.instead
                more_s += kept.count * float(other.time_s[version])
                change = other.memory_bytes[:, version] - kept.memory_bytes[:, version]
                more = more + kept.count * change
        yield time_s + more_s, memory_bytes + more


def test_storages_that_are_found_fit_and_are_mostly_the_best() -> None:
    """One price for all rows: where several rows bind, what fits may be missed."""
    exact = looked = 0
    for seed in range(60):
        here = world(seed, 300)
        for limit in limits(here, seed, 2):
            price_list = here.limited(limit)
            by_alternatives: dict[tuple[int, ...], float] = {}
            for selection, time_s in zip(here.selections, here.times_s, strict=True):
                if price_list.fits(selection):
                    known = by_alternatives.get(selection.alternatives, math.inf)
                    by_alternatives[selection.alternatives] = min(known, float(time_s))
            for alternatives, best_s in by_alternatives.items():
                found = storages_within(price_list, alternatives)
                looked += 1
                if found is not None:
                    assert price_list.fits(found)
                    assert found.alternatives == alternatives
                    time_s = price_list.time_of(found)
                    assert time_s >= best_s * (1 - 1e-9)
                    exact += time_s <= best_s * (1 + 1e-9)
    assert looked > 900
    assert exact > 0.8 * looked
