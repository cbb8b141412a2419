"""A lowered program, when printed, shows every redistribution that its strategy needs."""

from __future__ import annotations

import re
from collections import Counter
from random import Random

import pytest

from autopar.ir.sharding import Mesh
from autopar.ops import bound_rules
from autopar.runtime.lowering import lower
from autopar.simulator.edges import edges, parameter_edges
from tests.helpers.cases import case
from tests.helpers.strategies import random_strategy

MESH = Mesh((("data", 2), ("tensor", 2)))
CALL = re.compile(r"= spmd\.(\w+)\((\w+), '(\w+)', src = '(.+?)', dst = '(.+?)'\)")


@pytest.mark.parametrize("name", ["mlp", "gpt"])
@pytest.mark.parametrize("seed", range(3))
def test_the_printed_collectives_are_the_planned_ones(name: str, seed: int) -> None:
    graph = case(name).graph
    rules = bound_rules(graph)
    strategy = random_strategy(graph, rules, MESH, Random(seed))
    printed = Counter(
        (kind, axis)
        for kind, _, axis, _, _ in CALL.findall(str(lower(graph, strategy, rules)))
        if kind != "convert"
    )
    planned = [t for edge in edges(graph, rules, strategy) for t in edge.transfers(MESH)[0]]
    for edge in parameter_edges(graph, rules, strategy):
        planned += edge.forward_transfers(MESH)
    assert printed == Counter((t.kind, MESH.names[t.axis]) for t in planned)
    assert printed


def test_a_line_says_what_goes_in_and_how_the_result_lies() -> None:
    graph = case("mlp").graph
    rules = bound_rules(graph)
    program = str(lower(graph, random_strategy(graph, rules, MESH, Random(1)), rules))
    lines = [line for line in program.splitlines() if "spmd.all_gather" in line]
    assert lines
    for line in lines:
        assert re.search(r"# float64\[[\d, ]*\] \(.+\)$", line), line
