"""The searcher of degrees finds what trying all of them finds, and its bound is one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import pytest

from autopar import api
from autopar.errors import AutoparError, InfeasibleError
from autopar.ir.graph import OperatorGraph
from autopar.ir.plan import plan_from_json, plan_to_json
from autopar.ir.search import Budget, Problem, SearchResult
from autopar.ir.simulation import Estimate
from autopar.ir.strategy import Strategy, Training
from autopar.recipes import Degrees, degrees_text
from autopar.searchers import degrees, hybrid
from autopar.searchers.degree_space import DegreeSpace
from autopar.searchers.over_degrees import DegreePrices
from autopar.searchers.recompute import AUTO
from autopar.simulator import meshes
from benchmarks.transformer import Transformer
from cost_models import cost_model

GPT = Transformer(4, 256, 8, 8, 1024, 1024, 128, flash=False, dropout=True)
LLAMA = Transformer(4, 256, 8, 4, 512, 1024, 128, gated=True, biased=False, tied=False)
WAYS = ("attention", "selective", "full")
BATCH = 4
EXACT = Budget(gap=1e-9)


def problem_of(of: Transformer, devices: int, limit_bytes: int, recompute: str = AUTO) -> Problem:
    return Problem(
        of.graph(BATCH),
        machine_of(devices),
        tuple(meshes.factorizations(devices)),
        limit_bytes,
        Training("adam", "mixed"),
        microbatches=None,
        recompute=recompute,
    )


def machine_of(devices: int):  # type: ignore[no-untyped-def]
    return cost_model(f"1x{devices}xa100-sxm-80gb")


def shares(one: Degrees, layers: int) -> Iterator[Degrees]:
    """With every number of blocks recomputed in every way."""
    yield one
    copies = layers // one.stages
    for way in WAYS:
        for blocks in range(1, copies + 1):
            yield replace(one, recompute=way, recomputed=blocks / copies)


@lru_cache
def everything(of: Transformer, devices: int) -> tuple[tuple[Degrees, float, int], ...]:
    """All degrees with time and memory, evaluated in full."""
    prices = DegreePrices(of.graph(BATCH), machine_of(devices), Training("adam", "mixed"))
    found = []
    for one in DegreeSpace(devices, of.layers, BATCH):
        for each in shares(one, of.layers):
            try:
                _, estimate = prices.evaluated(each)
            except AutoparError:
                continue
            found.append((each, estimate.step_time_s, estimate.peak_memory_bytes))
    return tuple(found)


def check(of: Transformer, devices: int, result: SearchResult, limit_bytes: int) -> None:
    fitting = [time_s for _, time_s, size in everything(of, devices) if size <= limit_bytes]
    assert result.best is not None and result.best.estimate is not None
    assert result.best.estimate.peak_memory_bytes <= limit_bytes
    best_s, fastest_s = result.best.estimate.step_time_s, min(fitting)
    assert result.lower_bound_s <= fastest_s * (1 + 1e-9) <= best_s * (1 + 2e-9)
    if result.stop_reason == "optimal":
        assert best_s == pytest.approx(fastest_s, rel=1e-9)


@pytest.mark.parametrize("of", [GPT, LLAMA], ids=["gpt", "llama"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.5, 1.0])
def test_finds_the_fastest_of_all_on_two_devices(of: Transformer, share: float) -> None:
    sizes = sorted(size for *_, size in everything(of, 2))
    limit = sizes[round(share * (len(sizes) - 1))]
    result = degrees.search(problem_of(of, 2, limit), EXACT)
    check(of, 2, result, limit)
    assert result.stop_reason == "optimal"


@pytest.mark.slow
@pytest.mark.parametrize("of", [GPT, LLAMA], ids=["gpt", "llama"])
@pytest.mark.parametrize("devices", [4, 8])
def test_finds_the_fastest_of_all(of: Transformer, devices: int) -> None:
    sizes = sorted(size for *_, size in everything(of, devices))
    for share in (0.0, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0):
        limit = sizes[round(share * (len(sizes) - 1))]
        check(of, devices, degrees.search(problem_of(of, devices, limit), EXACT), limit)


def test_the_hybrid_search_is_never_slower_even_if_its_time_ends() -> None:
    sizes = sorted(size for *_, size in everything(GPT, 2))
    limit = sizes[len(sizes) // 10]
    alone = degrees.search(problem_of(GPT, 2, limit), EXACT)
    both = hybrid.search(problem_of(GPT, 2, limit), Budget(time_s=3 * alone.search_time_s))
    assert alone.best and alone.best.estimate and both.best and both.best.estimate
    assert both.best.estimate.step_time_s <= alone.best.estimate.step_time_s * (1 + 1e-9)


def test_one_way_to_recompute_is_taken_in_all_blocks() -> None:
    result = degrees.search(problem_of(GPT, 2, 10**12, "full"), EXACT)
    assert result.best is not None and result.best.strategy is not None
    assert "recompute=full" in result.best.name and "recomputed" not in result.best.name
    assert result.best.strategy.recompute


def test_where_nothing_fits_nothing_is_proved() -> None:
    result = degrees.search(problem_of(GPT, 2, 1000), EXACT)
    assert result.best is None and result.stop_reason == "unknown"


def test_what_the_bound_is_of_is_said() -> None:
    plan = api.plan(GPT.graph(BATCH), topology="1x2xa100-sxm-80gb", searcher="degrees")
    assert plan.search.among.endswith("degrees of parallelism")
    written = json.loads(json.dumps(plan_to_json(plan)))
    assert plan_from_json(written).search == plan.search


def test_an_interrupted_search_keeps_its_best() -> None:
    lines: list[str] = []

    def stop(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            raise KeyboardInterrupt

    result = degrees.search(problem_of(GPT, 2, 10**12), EXACT, stop)
    assert result.stop_reason == "interrupted"


def test_a_search_ends_with_its_time() -> None:
    result = degrees.search(problem_of(GPT, 2, 10**12), Budget(time_s=0.0))
    assert (result.best, result.stop_reason) == (None, "time")


def test_what_the_evaluation_refuses_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fastest = degrees.search(problem_of(GPT, 2, 10**12), EXACT).best
    assert fastest is not None
    evaluated = DegreePrices.evaluated

    def not_that(self: DegreePrices, of: Degrees) -> tuple[Strategy, Estimate]:
        if degrees_text(of) == fastest.name:
            raise AutoparError("not today")
        return evaluated(self, of)

    monkeypatch.setattr(DegreePrices, "evaluated", not_that)
    lines: list[str] = []
    result = degrees.search(problem_of(GPT, 2, 10**12), EXACT, lines.append)
    assert result.best is not None and result.best.name != fastest.name
    assert "left out: not today" in lines


def refused(of: OperatorGraph, **wanted: object) -> None:
    api.plan(of, topology="1x2xa100-sxm-80gb", searcher="degrees", **wanted)  # type: ignore[arg-type]


def test_what_degrees_cannot_do_is_refused_by_name() -> None:
    with pytest.raises(AutoparError, match="degrees say the mesh"):
        refused(GPT.graph(BATCH), dimensions="S")
    with pytest.raises(AutoparError, match="3 microbatches do not divide the batch of 4"):
        refused(GPT.graph(BATCH), microbatches=3)
    with pytest.raises(AutoparError, match="no degrees of parallelism of 5 devices share the 4 "):
        degrees.search(problem_of(GPT, 5, 10**12), EXACT)
    with pytest.raises(InfeasibleError, match="the smallest strategy that was found needs"):
        refused(GPT.graph(BATCH), memory_limit_bytes=1000)
    with pytest.raises(AutoparError, match="no block that is repeated"):
        refused(Transformer(1, 64, 2, 2, 64, 64, 16).graph(8))
