"""Whether a plan keeps its promise: its program is dry-run as one rank, and compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.errors import VerificationError
from autopar.ir.graph import OperatorGraph
from autopar.ir.plan import Plan
from autopar.ir.simulation import Estimate
from autopar.ir.strategy import Strategy
from autopar.runtime.collectives import Communicator, connect
from autopar.runtime.dry_run import (
    DryRun,
    Seen,
    check_rank,
    fake_inputs,
    fake_state,
    fake_world,
    watched,
)
from autopar.runtime.lowering import LoweredProgram, lower_microbatch
from autopar.runtime.step import TrainingStep
from autopar.runtime.typecheck import typecheck as check_types
from autopar.runtime.watch import MemoryWatch, Watch, device_for_dry_runs
from autopar.simulator.edges import Rules
from autopar.simulator.microbatches import Division, division, undivided


@dataclass(frozen=True, kw_only=True)
class Report(DryRun):
    """What a dry run of ``rank`` found."""

    rank: int
    world_size: int
    typechecked: bool = False

    def to_json(self) -> str:
        return json.dumps({"ok": self.ok, **self.to_data()}, indent=1)


def verify(plan: Plan, *, rank: int = 0, typecheck: bool = True) -> Report:
    """Dry-run one training step of ``plan`` as ``rank``, without devices or other processes.

    ``typecheck``: have ``spmd_types`` derive the types of all tensors, too.
    """
    divided = division(plan.graph, plan.strategy.microbatches, plan.proposed)
    return verify_division(divided, plan.strategy, plan.estimate, rank=rank, typecheck=typecheck)


def verify_strategy(
    graph: OperatorGraph,
    rules: Rules,
    strategy: Strategy,
    estimate: Estimate,
    *,
    rank: int = 0,
    typecheck: bool = True,
) -> Report:
    """As ``verify_division``, when the batch is not divided in time."""
    return verify_division(
        undivided(graph, rules), strategy, estimate, rank=rank, typecheck=typecheck
    )


def verify_division(
    division: Division,
    strategy: Strategy,
    estimate: Estimate,
    *,
    rank: int = 0,
    typecheck: bool = True,
) -> Report:
    """As ``verify``, of the parts of a plan that are needed.

    Raises:
        AutoparError: the process is part of a real process group; the dry run needs its own.
    """
    size = strategy.mesh.size
    check_rank(rank, size)
    with fake_world(size, rank):
        communicator = connect(strategy.mesh, device_for_dry_runs().type)
        seen = _dry_run(division, strategy, communicator, typecheck)
    found = seen.against(estimate.collectives, estimate.memory)
    return Report(**vars(found), rank=rank, world_size=size, typechecked=typecheck)


def _dry_run(
    division: Division, strategy: Strategy, communicator: Communicator, typecheck: bool
) -> Seen:
    graph, device = division.whole, device_for_dry_runs()
    watch = Watch(MemoryWatch(), communicator.recorder)
    with FakeTensorMode():
        program = lower_microbatch(division, strategy, device)
        state = fake_state(graph, strategy, device)
        inputs = fake_inputs(graph, device)
        step = TrainingStep(program, strategy, state, communicator)
        kept_bytes = watched(step, [step], watch, graph, inputs)
        mistyped = _mistyped(program, step, step.microbatch(inputs, 0)) if typecheck else ()
    return Seen(watch, kept_bytes, mistyped)


def _mistyped(
    program: LoweredProgram, step: TrainingStep, inputs: Mapping[str, Tensor]
) -> tuple[str, ...]:
    try:
        check_types(program, step.execution, step.state.buffers, inputs)
    except VerificationError as error:
        return (str(error),)
    return ()


__all__ = ["Report", "verify", "verify_division", "verify_strategy"]
