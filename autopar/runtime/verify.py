"""Whether a plan keeps its promise: its program is dry-run as one rank, and compared."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from autopar.errors import AutoparError, VerificationError
from autopar.ir.graph import OperatorGraph, Role
from autopar.ir.plan import Plan
from autopar.ir.sharding import local_shape
from autopar.ir.simulation import Estimate, Memory, PromisedCollective
from autopar.ir.strategy import Strategy
from autopar.runtime.collectives import Communicator, connect
from autopar.runtime.lowering import LoweredProgram, lower_microbatch
from autopar.runtime.recorder import Executed
from autopar.runtime.step import TrainingStep
from autopar.runtime.storage import State, has_master
from autopar.runtime.typecheck import typecheck as check_types
from autopar.runtime.watch import MemoryWatch, Piece, Watch, device_for_dry_runs
from autopar.simulator.edges import Rules
from autopar.simulator.microbatches import Division, division, undivided

MEMORY_TOLERANCE = 0.05
"""How far measured peak memory may be from the promised, relative to it."""


@dataclass(frozen=True, slots=True)
class CollectiveRow:
    """How often a step executes one kind of collective, as promised and as done."""

    kind: str
    phase: str
    axis: str
    bytes: int
    promised: int
    executed: int


@dataclass(frozen=True)
class Report:
    """What a dry run of ``rank`` found. ``differences`` are sentences; none: the promise is kept.

    ``measured_peak_bytes`` and ``kept_bytes`` (parameters, buffers and optimizer state) count
    storages of fake tensors; ``at_peak`` is all that is alive at the peak, the largest first.
    """

    rank: int
    world_size: int
    collectives: tuple[CollectiveRow, ...]
    promised_memory: Memory
    measured_peak_bytes: int
    measured_peak_at: str
    kept_bytes: int
    at_peak: tuple[Piece, ...] = field(repr=False)
    typechecked: bool = False
    differences: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.differences

    @property
    def memory_error(self) -> float:
        """(promised - measured) / measured."""
        return self.promised_memory.total_bytes / self.measured_peak_bytes - 1

    def to_json(self) -> str:
        data = {**asdict(self), "at_peak": [asdict(piece) for piece in self.at_peak[:20]]}
        return json.dumps({"ok": self.ok, **data}, indent=1)


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
    if not 0 <= rank < size:
        raise AutoparError(f"the plan is for the ranks 0 to {size - 1}, not for rank {rank}")
    with fake_world(size, rank):
        communicator = connect(strategy.mesh, device_for_dry_runs().type)
        watch, kept_bytes, mistyped = _dry_run(division, strategy, communicator, typecheck)
    rows = tuple(compared(estimate.collectives, watch.executed))
    memory = watch.memory
    return Report(
        rank=rank,
        world_size=size,
        collectives=rows,
        promised_memory=estimate.memory,
        measured_peak_bytes=memory.peak_bytes,
        measured_peak_at=memory.peak_at,
        kept_bytes=kept_bytes,
        at_peak=memory.at_peak(),
        typechecked=typecheck,
        differences=(
            *mistyped,
            *map(collective_difference, (row for row in rows if row.promised != row.executed)),
            *memory_difference(estimate.memory, memory),
        ),
    )


@contextmanager
def fake_world(size: int, rank: int) -> Iterator[None]:
    """A fake process group of this size, in which this process is ``rank``."""
    if dist.is_initialized():
        raise AutoparError(
            "verify makes a process group of its own, and this process is in one already; "
            "call it in a process that torchrun did not start"
        )
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _dry_run(
    division: Division,
    strategy: Strategy,
    communicator: Communicator,
    typecheck: bool,
) -> tuple[Watch, int, tuple[str, ...]]:
    """A step in the state that training is in: optimizer states exist.

    What was seen, the bytes that stay from step to step, and what the types object to.
    """
    graph, device = division.whole, device_for_dry_runs()
    watch = Watch(MemoryWatch(), communicator.recorder)
    with FakeTensorMode():
        program = lower_microbatch(division, strategy, device)
        state = fake_state(graph, strategy, device)
        inputs = {name: fake(graph, name, device) for name in graph.inputs}
        step = TrainingStep(program, strategy, state, communicator)
        make_optimizer_states(step)
        keep(watch.memory, step)
        watch.memory.ignore(inputs.values())
        kept_bytes = watch.memory.live_bytes
        watch.memory.restart()
        args, kwargs = arguments_of(graph, inputs)
        with watch:
            step(*args, **kwargs)
        mistyped = _mistyped(program, step, step.microbatch(inputs, 0)) if typecheck else ()
    return watch, kept_bytes, mistyped


def _mistyped(
    program: LoweredProgram, step: TrainingStep, inputs: Mapping[str, Tensor]
) -> tuple[str, ...]:
    try:
        check_types(program, step.execution, step.state.buffers, inputs)
    except VerificationError as error:
        return (str(error),)
    return ()


def fake_state(graph: OperatorGraph, strategy: Strategy, device: torch.device) -> State:
    state = State({}, {})
    for tensor in graph.of_role(Role.PARAMETER):
        stored = strategy.storage[tensor.name].parameter
        shape = local_shape(tensor.spec.shape, stored, strategy.mesh)
        shard = torch.empty(shape, dtype=getattr(torch, tensor.spec.dtype), device=device)
        state.parameters[tensor.name] = shard.requires_grad_(tensor.differentiable)
        if has_master(tensor, strategy):
            piece = local_shape(
                tensor.spec.shape, strategy.storage[tensor.name].optimizer, strategy.mesh
            )
            state.masters[tensor.name] = torch.empty(piece, dtype=torch.float32, device=device)
    for tensor in graph.of_role(Role.BUFFER):
        state.buffers[tensor.name] = fake(graph, tensor.name, device)
    return state


def fake(graph: OperatorGraph, name: str, device: torch.device) -> Tensor:
    spec = graph.spec(name)
    return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device)


def make_optimizer_states(step: TrainingStep) -> None:
    """Torch's optimizers make their states in the first step: one with empty gradients."""
    for name, storage in step.strategy.storage.items():
        parameter = step.state.parameters[name]
        if parameter.requires_grad:
            shape = local_shape(step.graph.spec(name).shape, storage.optimizer, step.strategy.mesh)
            step.gradients[name] = parameter.new_empty(shape)
    step.update()
    step.gradients = {}


def keep(memory: MemoryWatch, step: TrainingStep) -> None:
    memory.keep("parameters", step.state.parameters.values())
    memory.keep("buffers", step.state.buffers.values())
    memory.keep("constants", step.program.graph_module.buffers())
    memory.keep("optimizer", _optimizer_tensors(step.optimizer))


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """States, and what is updated: a piece of the parameter, or a master copy."""
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def arguments_of(
    graph: OperatorGraph, inputs: Mapping[str, Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    pairs = list(zip(graph.input_keys, graph.inputs, strict=True))
    return (
        [inputs[name] for key, name in pairs if not key],
        {key: inputs[name] for key, name in pairs if key},
    )


# ---- comparing ---------------------------------------------------------------------------------


def compared(
    of_plan: Iterable[PromisedCollective], executed: Mapping[Executed, int]
) -> Iterator[CollectiveRow]:
    promised: Counter[Executed] = Counter()
    for one in of_plan:
        promised[Executed(one.kind, one.phase, one.axis, one.bytes)] += one.count
    for key in sorted(
        {*promised, *executed}, key=lambda e: (_PHASES.index(e.phase), e.axis, e.kind, -e.bytes)
    ):
        yield CollectiveRow(
            key.kind, key.phase, key.axis, key.bytes, promised[key], executed.get(key, 0)
        )


_PHASES = ("forward", "backward", "step")


def collective_difference(row: CollectiveRow) -> str:
    return (
        f"{row.phase}: {row.promised} {row.kind} of {row.bytes} bytes on {row.axis} promised, "
        f"{row.executed} executed"
    )


def memory_difference(promised: Memory, measured: MemoryWatch) -> Iterable[str]:
    error = promised.total_bytes / measured.peak_bytes - 1
    if abs(error) > MEMORY_TOLERANCE:
        yield (
            f"peak memory: {promised.total_bytes / 1e6:.2f} MB promised (at {promised.at}), "
            f"{measured.peak_bytes / 1e6:.2f} MB measured (at {measured.peak_at}): {error:+.1%}"
        )


__all__ = ["CollectiveRow", "Report", "verify", "verify_division", "verify_strategy"]
