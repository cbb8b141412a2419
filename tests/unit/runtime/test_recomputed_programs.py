"""What a program with recomputed segments keeps and executes is what was promised."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from random import Random

import pytest

from autopar.ir.strategy import Strategy
from autopar.ops import bound_rules
from autopar.runtime.lowering import lower
from autopar.runtime.verify import Report, verify_division
from autopar.runtime.verify_stages import verify_stages
from autopar.simulator.blocks import blocks
from autopar.simulator.costs import Costs
from autopar.simulator.meshes import mesh
from autopar.simulator.microbatches import Division, division
from autopar.simulator.pipelines import evaluate_stages
from autopar.simulator.prices import evaluate
from autopar.simulator.recomputation import recomputation
from autopar.simulator.recompute_choices import BlockChoices
from tests.helpers.cases import case
from tests.helpers.fake_prices import FakePrices
from tests.helpers.stages import PAIR, in_order, looped, strategy_of
from tests.helpers.strategies import random_strategy, recomputing, replicate


@lru_cache(maxsize=None)
def divided(name: str, dropout: float = 0.0, count: int = 1) -> Division:
    return division(case(name, dropout).graph, count)


def verified(part: Division, strategy: Strategy) -> Report:
    estimate = evaluate(part.graph, part.rules, FakePrices(), strategy)
    report = verify_division(part, strategy, estimate, rank=strategy.mesh.size - 1)
    assert report.ok, report.differences
    assert report.typechecked
    return report


@pytest.mark.parametrize(
    ("name", "dropout"),
    [
        ("gpt", 0.0),
        ("gpt", 0.2),
        ("llama", 0.0),
        ("unet", 0.0),
        ("two_tower", 0.0),
        ("resnet", 0.0),
    ],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_random_recomputation_keeps_its_promise(name: str, dropout: float, seed: int) -> None:
    part, rng = divided(name, dropout), Random(seed)
    strategy = random_strategy(part.graph, part.rules, mesh((2, 2)), rng)
    report = verified(part, recomputing(part.graph, part.rules, strategy, rng))
    assert abs(report.memory_error) < 0.005


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("count", [1, 2])
def test_memory_of_recomputed_blocks_is_exact(kind: str, count: int) -> None:
    part = divided("llama", 0.0, count)
    plain = replace(replicate(part.graph, mesh((1,))), microbatches=count)
    (block,) = blocks(part.graph)
    of = BlockChoices(part.graph, part.rules, plain, Costs(FakePrices(), plain.mesh), block)
    peaks = []
    for copies in range(block.copies + 1):
        report = verified(part, replace(plain, recompute=of.operators(kind, copies)))
        assert abs(report.memory_error) < 0.001
        peaks.append(report.measured_peak_bytes)
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < peaks[0]


def test_the_printed_program_shows_what_is_run_again() -> None:
    graph = case("gpt").graph
    strategy = replicate(graph, mesh((1,)))
    chosen = ("blocks.1.norm2.layer_norm", "blocks.1.up.linear", "blocks.1.gelu")
    rules = bound_rules(graph)
    strategy = replace(strategy, recompute=chosen)
    (segment,) = recomputation(graph, rules, strategy).segments
    assert segment.again == chosen
    assert segment.before == "blocks.1.down.linear"
    forward, _, again = str(lower(graph, strategy, rules)).partition("def segment_0_again(")
    assert "recomputing((segment_0,), execution, 'blocks.1.gelu'" in forward
    lines = [line.strip() for line in again.splitlines() if " = torch.ops" in line]
    assert [line.split(" = ")[0] for line in lines] == [
        "blocks_1_norm2_layer_norm",
        "blocks_1_up_linear",
        "blocks_1_gelu",
    ]
    assert all("# float64[8, 16, " in line for line in lines)
    assert "segment" not in str(lower(graph, replace(strategy, recompute=()), rules))


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble_h1"])
@pytest.mark.parametrize("zero", [0, 3])
def test_stages_that_recompute_keep_their_promise(zero: int, schedule: str) -> None:
    part = divided("llama", 0.0, 4)
    strategy = strategy_of(part, in_order(part.graph, 2), looped(2, PAIR), schedule, zero=zero)
    strategy = recomputing(part.graph, part.rules, strategy, Random(2))
    estimate = evaluate_stages(part, FakePrices(devices=4), strategy)
    report = verify_stages(part, strategy, estimate)
    assert report.ok, report.differences
    kept = replace(strategy, recompute=(), repeat_collectives=())
    plain = evaluate_stages(part, FakePrices(devices=4), kept)
    assert estimate.step_time_s > plain.step_time_s
