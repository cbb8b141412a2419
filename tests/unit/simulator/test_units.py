"""A traced graph is cut into units where little passes, and each has work worth a stage."""

from __future__ import annotations

from itertools import pairwise

import pytest

from autopar.ir.graph import Role
from autopar.simulator.units import crossing_bytes, units
from tests.helpers.cases import case
from tests.helpers.zoo import BRANCHES, ZOO


@pytest.mark.parametrize("name", [*ZOO, *BRANCHES])
def test_units_are_runs_of_the_whole_graph_each_with_a_weight(name: str) -> None:
    graph = case(name).graph
    found = units(graph)
    assert [i for unit in found for i in unit] == list(range(len(graph.operators)))
    if len(found) > 1:
        for unit in found:
            read = [graph.by_name[n] for i in unit for n in graph.operators[i].inputs]
            assert any(t.role is Role.PARAMETER and len(t.spec.shape) > 1 for t in read)


def test_layers_of_a_transformer_are_cut_into_attention_and_mlp() -> None:
    graph = case("gpt2").graph
    starts = [graph.operators[unit.start].module for unit in units(graph)][1:-1]
    assert [start.rsplit(".", 2)[1] for start in starts[1:]] == ["0", "1", "1"]
    assert [start.rsplit(".", 2)[2] for start in starts[1:]] == ["ln_2", "ln_1", "ln_2"]


def test_less_passes_at_a_cut_than_on_both_sides_of_it() -> None:
    graph = case("unet").graph
    widths = crossing_bytes(graph)
    for before, after in pairwise(units(graph)):
        inside = [widths[i] for unit in (before, after) for i in unit if i and i != after.start]
        assert widths[after.start] <= max(inside)


def test_a_buffer_that_the_step_changes_stays_in_one_unit() -> None:
    graph = case("resnet").graph
    assert graph.mutations
    number = {operator.name: i for i, operator in enumerate(graph.operators)}
    unit_of = {i: u for u, unit in enumerate(units(graph)) for i in unit}
    for buffer, tensor in graph.mutations:
        places = {number[reader.name] for reader, _ in graph.consumers[buffer]}
        places.add(number[graph.producer[tensor].name])
        assert len({unit_of[place] for place in places}) == 1
