"""spmd_types passes what the lowering makes, and refuses it with any redistribution left out."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from torch import fx

from autopar.errors import PlanMismatchError, VerificationError
from autopar.ir.sharding import Mesh
from autopar.ir.strategy import Strategy
from autopar.ops import bound_rules
from autopar.runtime.lowering import LoweredProgram, lower
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


def test_processes_that_are_connected_as_another_mesh_are_told_so() -> None:
    of = case("gpt_tied")
    rules = bound_rules(of.graph)
    strategy = random_strategy(of.graph, rules, MESH, Random(0))
    program = lower(of.graph, strategy, rules)
    other = Mesh((("data", 2), ("tensor", 4)))
    says = "for the mesh data 4 x tensor 2, and the processes are connected as data 2 x tensor 4"
    with fake_world(other) as communicator, pytest.raises(PlanMismatchError, match=says):
        program.execution(communicator, {})


def test_a_program_without_one_of_its_redistributions_does_not() -> None:
    def leave_out(step: fx.Node) -> None:
        before = step.args[1]
        step.replace_all_uses_with(before)
        for reader in step.graph.nodes:
            given = reader.meta.get("given", [])
            reader.meta["given"] = [before if g is step else g for g in given]
        step.graph.erase_node(step)

    assert refused(leave_out) > 5


@pytest.mark.parametrize("end", ["src", "dst"])
def test_a_program_that_takes_a_tensor_from_or_to_something_else_does_not(end: str) -> None:
    def mistake(step: fx.Node) -> None:
        other = {"R": "I", "I": "R", "P": "R"}.get(str(step.kwargs[end]), "R")
        step.update_kwarg(end, other)

    assert refused(mistake) > 5


def refused(change: Callable[[fx.Node], None]) -> int:
    """How many redistributions of a program are missed when changed, which all must be. Those of
    tensors without a gradient are left alone: to them R and I are one."""
    of = case("mlp")
    rules = bound_rules(of.graph)
    strategy = random_strategy(of.graph, rules, MESH, Random(3))

    def program_and_steps() -> tuple[LoweredProgram, list[fx.Node]]:
        program = lower(of.graph, strategy, rules)
        nodes = [n for n in program.graph_module.graph.nodes if n.op == "call_method"]
        return program, [n for n in nodes if of.graph.by_name[n.meta["tensor"]].differentiable]

    count = len(program_and_steps()[1])
    for index in range(count):
        program, steps = program_and_steps()
        change(steps[index])
        program.graph_module.recompile()
        with pytest.raises((VerificationError, RuntimeError, ValueError)):
            check(of, strategy, program)
    return count


def test_any_rank_of_a_thousand_can_be_looked_at() -> None:
    of = case("mlp")
    mesh = Mesh((("data", 8), ("tensor", 128)))
    rules = bound_rules(of.graph)
    strategy = random_strategy(of.graph, rules, mesh, Random(0))
    check(of, strategy, lower(of.graph, strategy, rules))
