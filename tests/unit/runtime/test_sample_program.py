"""What operators take beside work is taken apart from programs of different length."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest

from autopar.ir.graph import Role
from autopar.ops import bound_rules
from autopar.runtime.sample_program import (
    ALONE,
    LONG,
    SHORT,
    TRAINED_OF_BLOCK,
    VIEWS_OF_BLOCK,
    WORKS_MORE_IN_PARTS,
    WORKS_OF_BLOCK,
    Programs,
    sample_graph,
)
from autopar.simulator.costs import Costs
from cost_models.interface import Work
from tests.helpers.fake_prices import FakePrices
from tests.helpers.strategies import replicate


def test_what_was_put_together_is_taken_apart() -> None:
    def microbatch_s(blocks: int, views: int, works: int = WORKS_OF_BLOCK) -> float:
        return 2 * 50e-6 + blocks * (works * 20e-6 + 2 * views * 5e-6)

    views, works = VIEWS_OF_BLOCK, WORKS_OF_BLOCK + WORKS_MORE_IN_PARTS
    in_parts_s = microbatch_s(LONG, 0, works) + 50e-6 + LONG * TRAINED_OF_BLOCK * 30e-6
    found = Programs(
        microbatch_s(SHORT, 0), microbatch_s(LONG, 0), microbatch_s(LONG, views), in_parts_s
    )
    assert found.operator_s == pytest.approx(20e-6)
    assert found.view_s == pytest.approx(5e-6)
    assert found.pass_s == pytest.approx(50e-6)
    assert found.part_s == pytest.approx(30e-6)


@dataclass(frozen=True)
class Counting(FakePrices):
    asked: Counter[str] = field(default_factory=Counter)

    def compute_time_s(self, work: Work) -> float:
        self.asked[work.kind] += 1
        return 0.0


def works(blocks: int, *, parted: bool = False) -> int:
    graph, prices = sample_graph(blocks), Counting(devices=1)
    rules, strategy = bound_rules(graph), replicate(graph, ALONE)
    for operator in graph.operators:
        tensors = [graph.by_name[name] for name in operator.inputs]
        of_parameters = tuple(t.differentiable and t.role is Role.PARAMETER for t in tensors)
        of_inputs = tuple(t.differentiable and t.role is not Role.PARAMETER for t in tensors)
        both = tuple(t.differentiable for t in tensors)
        for wanted in (of_inputs, of_parameters) if parted else (both,):
            Costs(prices, ALONE).operator_s(
                rules[operator.name], strategy.splits[operator.name], wanted
            )
    if parted:  # each has asked for the forward
        return sum(prices.asked.values()) - len(graph.operators)
    return sum(prices.asked.values())


def test_a_block_has_the_works_that_are_priced_for_it() -> None:
    assert works(LONG) - works(SHORT) == (LONG - SHORT) * WORKS_OF_BLOCK


def test_a_backward_in_two_parts_has_the_works_more_that_are_priced_for_it() -> None:
    more = [works(blocks, parted=True) - works(blocks) for blocks in (SHORT, LONG)]
    # the norm of the first block, whose input needs no gradient, is asked for its weights only
    assert more[1] - more[0] == (LONG - SHORT) * WORKS_MORE_IN_PARTS
    graph = sample_graph(LONG)
    trained = {o.name for p in graph.parameters for o, _ in graph.consumers[p.name]}
    assert len(trained) == LONG * TRAINED_OF_BLOCK


def test_views_are_all_that_is_added() -> None:
    plain, viewed = sample_graph(LONG), sample_graph(LONG, views=True)
    added = len(viewed.operators) - len(plain.operators)
    assert added == LONG * VIEWS_OF_BLOCK
    kinds = {rule.rule.kind for name, rule in bound_rules(viewed).items()}
    assert "view" in kinds
    assert sum(o.op == "aten.view.default" for o in viewed.operators) == added
