"""spmd_types passes what the lowering makes, and refuses it with any redistribution left out."""

from __future__ import annotations

from random import Random

import pytest

from autopar.errors import VerificationError
from autopar.ir.sharding import Mesh
from autopar.ir.strategy import Strategy
from autopar.ops import bound_rules
from autopar.runtime.lowering import LoweredProgram, lower, redistribute, use_parameter
from autopar.runtime.typecheck import typecheck
from tests.helpers.cases import Case, case
from tests.helpers.fake_world import fake_batch, fake_state, fake_world
from tests.helpers.strategies import random_strategy

MESH = Mesh((("data", 4), ("tensor", 2)))


def check(of: Case, strategy: Strategy, program: LoweredProgram) -> None:
    with fake_world(strategy.mesh) as communicator:
        state = fake_state(of.graph, strategy)
        execution = program.execution(communicator, state.parameters)
        typecheck(program, execution, state.buffers, fake_batch(of.graph))


@pytest.mark.parametrize("name", ["gpt_tied", "llama", "resnet", "dlrm"])
@pytest.mark.parametrize("seed", range(3))
def test_lowered_programs_type_check(name: str, seed: int) -> None:
    of = case(name)
    rules = bound_rules(of.graph)
    strategy = random_strategy(of.graph, rules, MESH, Random(seed))
    check(of, strategy, lower(of.graph, strategy, rules))


@pytest.mark.parametrize("kind", [redistribute, use_parameter])
def test_a_program_without_one_of_its_redistributions_does_not(kind: object) -> None:
    of = case("mlp")
    rules = bound_rules(of.graph)
    strategy = random_strategy(of.graph, rules, MESH, Random(3))
    left_out = 0
    nodes = list(lower(of.graph, strategy, rules).graph_module.graph.nodes)
    for index, node in enumerate(nodes):
        if node.target is not kind or not changes(node.args):
            continue
        program = lower(of.graph, strategy, rules)
        victim = list(program.graph_module.graph.nodes)[index]
        victim.replace_all_uses_with(victim.args[0])
        for reader in program.graph_module.graph.nodes:
            given = reader.meta.get("given", [])
            reader.meta["given"] = [victim.args[0] if g is victim else g for g in given]
        program.graph_module.graph.erase_node(victim)
        program.graph_module.recompile()
        with pytest.raises((VerificationError, RuntimeError)) as error:
            check(of, strategy, program)
        left_out += isinstance(error.value, VerificationError)
    assert left_out > 0


def changes(args: tuple[object, ...]) -> bool:
    """Whether the redistribution is one at all: a parameter may be used as it is stored."""
    return len(args) == 4


def test_any_rank_of_a_thousand_can_be_looked_at() -> None:
    of = case("mlp")
    mesh = Mesh((("data", 8), ("tensor", 128)))
    rules = bound_rules(of.graph)
    strategy = random_strategy(of.graph, rules, mesh, Random(0))
    check(of, strategy, lower(of.graph, strategy, rules))
