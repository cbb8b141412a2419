"""One step of a plan as one rank, without devices or other processes, against what was promised.

Under fake tensors, in a fake process group of the plan's size: the very program that is run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from autopar.errors import AutoparError
from autopar.ir.graph import OperatorGraph, Role
from autopar.ir.sharding import local_shape
from autopar.ir.simulation import Memory, PromisedCollective
from autopar.ir.strategy import Strategy
from autopar.runtime.recorder import Executed
from autopar.runtime.step import TrainingStep
from autopar.runtime.storage import State, has_master
from autopar.runtime.watch import MemoryWatch, Piece, Watch

MEMORY_TOLERANCE = 0.05
"""How far measured peak memory may be from the promised, relative to it."""

PIECES_IN_JSON = 20
"""Of what is alive at the peak, the largest."""


@dataclass(frozen=True, slots=True)
class CollectiveRow:
    """How often a step executes one kind of collective, as promised and as done."""

    kind: str
    phase: str
    axis: str
    bytes: int
    promised: int
    executed: int


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What one step did. ``differences`` are sentences; none: the promise is kept.

    ``measured_peak_bytes`` and ``kept_bytes`` (parameters, buffers and optimizer state) count
    storages of fake tensors; ``at_peak`` is all that is alive at the peak, the largest first.
    """

    collectives: tuple[CollectiveRow, ...]
    promised_memory: Memory
    measured_peak_bytes: int
    measured_peak_at: str
    kept_bytes: int
    at_peak: tuple[Piece, ...] = field(repr=False)
    differences: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.differences

    @property
    def memory_error(self) -> float:
        """(promised - measured) / measured."""
        return self.promised_memory.total_bytes / self.measured_peak_bytes - 1

    def to_data(self) -> dict[str, Any]:
        """For JSON: all fields, but of what is alive at the peak the largest only."""
        return {**asdict(self), "at_peak": [asdict(p) for p in self.at_peak[:PIECES_IN_JSON]]}


@dataclass(frozen=True, slots=True)
class Seen:
    """Of a step: what the watch saw, the bytes that stay from step to step, and what the types
    object to."""

    watch: Watch
    kept_bytes: int
    mistyped: tuple[str, ...]

    def against(
        self,
        promised: Iterable[PromisedCollective],
        memory: Memory,
        *,
        beside: Iterable[str] = (),
        least: bool = False,
    ) -> DryRun:
        """``beside``: differences of what is compared elsewhere. ``least``: the memory is promised
        for a device that may need more than this one."""
        measured = self.watch.memory
        rows = tuple(_compared(promised, self.watch.executed))
        below = least and measured.peak_bytes <= memory.total_bytes
        return DryRun(
            collectives=rows,
            promised_memory=memory,
            measured_peak_bytes=measured.peak_bytes,
            measured_peak_at=measured.peak_at,
            kept_bytes=self.kept_bytes,
            at_peak=measured.at_peak(),
            differences=(
                *self.mistyped,
                *map(_collective_difference, (r for r in rows if r.promised != r.executed)),
                *beside,
                *(() if below else _memory_difference(memory, measured)),
            ),
        )


@contextmanager
def fake_world(size: int, rank: int) -> Iterator[None]:
    """A fake process group of this size, in which this process is ``rank``.

    Raises:
        AutoparError: the process is part of a real one.
    """
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


def check_rank(rank: int, size: int) -> None:
    if not 0 <= rank < size:
        raise AutoparError(f"the plan is for the ranks 0 to {size - 1}, not for rank {rank}")


def watched(
    step: Callable[..., Any],
    held: Iterable[TrainingStep],
    watch: Watch,
    graph: OperatorGraph,
    inputs: Mapping[str, Tensor],
) -> int:
    """Do one step, in the state that training is in: optimizer states exist.

    ``held``: the step itself, or those of the stages that it consists of.

    Returns:
        The bytes that stay from step to step.
    """
    for one in held:
        _make_optimizer_states(one)
        _keep(watch.memory, one)
    watch.memory.ignore(inputs.values())
    kept_bytes = watch.memory.live_bytes
    watch.memory.restart()
    args, kwargs = _arguments_of(graph, inputs)
    with watch:
        step(*args, **kwargs)
    return kept_bytes


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
        state.buffers[tensor.name] = _fake(graph, tensor.name, device)
    return state


def fake_inputs(graph: OperatorGraph, device: torch.device) -> dict[str, Tensor]:
    return {name: _fake(graph, name, device) for name in graph.inputs}


def _fake(graph: OperatorGraph, name: str, device: torch.device) -> Tensor:
    spec = graph.spec(name)
    return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device)


def _make_optimizer_states(step: TrainingStep) -> None:
    """Torch's optimizers make their states in the first step: one with empty gradients."""
    for name, storage in step.strategy.storage.items():
        parameter = step.state.parameters[name]
        if parameter.requires_grad:
            shape = local_shape(step.graph.spec(name).shape, storage.optimizer, step.strategy.mesh)
            step.gradients[name] = parameter.new_empty(shape)
    step.update()
    step.gradients = {}


def _keep(memory: MemoryWatch, step: TrainingStep) -> None:
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


def _arguments_of(
    graph: OperatorGraph, inputs: Mapping[str, Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    pairs = list(zip(graph.input_keys, graph.inputs, strict=True))
    return (
        [inputs[name] for key, name in pairs if not key],
        {key: inputs[name] for key, name in pairs if key},
    )


# ---- comparing ---------------------------------------------------------------------------------


def _compared(
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


def _collective_difference(row: CollectiveRow) -> str:
    return (
        f"{row.phase}: {row.promised} {row.kind} of {row.bytes} bytes on {row.axis} promised, "
        f"{row.executed} executed"
    )


def _memory_difference(promised: Memory, measured: MemoryWatch) -> Iterable[str]:
    error = promised.total_bytes / measured.peak_bytes - 1
    if abs(error) > MEMORY_TOLERANCE:
        yield (
            f"peak memory: {promised.total_bytes / 1e6:.2f} MB promised (at {promised.at}), "
            f"{measured.peak_bytes / 1e6:.2f} MB measured (at {measured.peak_at}): {error:+.1%}"
        )


__all__ = [
    "CollectiveRow",
    "DryRun",
    "Seen",
    "check_rank",
    "fake_inputs",
    "fake_state",
    "fake_world",
    "watched",
]
