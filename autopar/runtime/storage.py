"""Parameters, buffers and optimizer state as each rank keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from autopar.errors import PlanMismatchError
from autopar.ir.graph import OperatorGraph, Role
from autopar.ir.graph import Tensor as GraphTensor
from autopar.ir.sharding import Sharding
from autopar.ir.strategy import Strategy
from autopar.runtime.collectives import Communicator
from autopar.runtime.initial import LARGE_ELEMENTS, InitialValues
from autopar.runtime.pieces import held
from autopar.simulator.redistribution import steps


@dataclass
class State:
    """One rank's shards of the parameters, and all buffers (whole).

    ``masters``: in mixed precision, the optimizer's shards of the trained parameters in fp32. They
    start from the values that the model was made with, ``parameters`` from these in bf16.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    masters: dict[str, Tensor] = field(default_factory=dict)


def from_module(
    module: nn.Module, graph: OperatorGraph, strategy: Strategy, rank: int, device: torch.device
) -> State:
    """The shards of a module that is in memory as a whole; they share no memory with it."""
    values: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    values.update(module.named_buffers(remove_duplicate=False))
    return from_values(values, graph, strategy, rank, device)


def from_function(
    function: Callable[[], nn.Module],
    graph: OperatorGraph,
    strategy: Strategy,
    rank: int,
    device: torch.device,
    seed: int,
    *,
    large_elements: int = LARGE_ELEMENTS,
) -> State:
    """The shards of ``torch.manual_seed(seed); function()``, of which no rank has a whole copy: at
    most one large parameter is whole at a time."""
    values = InitialValues(large_elements)
    module = values.make(function, seed)
    named: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    named.update(module.named_buffers(remove_duplicate=False))
    state = State({}, {})
    for tensor in _stored(graph):
        value = values.whole(_checked(tensor, named, strategy))
        keep(state, tensor, value, strategy, rank, device)
    return state


def from_values(
    values: Mapping[str, Tensor],
    graph: OperatorGraph,
    strategy: Strategy,
    rank: int,
    device: torch.device,
) -> State:
    """The shards of whole tensors by name (a ``state_dict``)."""
    state = State({}, {})
    for tensor in _stored(graph):
        keep(state, tensor, _checked(tensor, values, strategy).detach(), strategy, rank, device)
    return state


def _stored(graph: OperatorGraph) -> Iterator[GraphTensor]:
    return (t for t in graph.tensors if t.role in (Role.PARAMETER, Role.BUFFER))


def keep(
    state: State,
    tensor: GraphTensor,
    value: Tensor,
    strategy: Strategy,
    rank: int,
    device: torch.device,
) -> None:
    """Put this rank's part of the whole ``value`` into ``state``."""
    dtype: torch.dtype = getattr(torch, tensor.spec.dtype)
    if tensor.role is Role.BUFFER:
        state.buffers[tensor.name] = value.to(device, dtype, copy=True)
        return

    def part(sharding: Sharding, dtype: torch.dtype) -> Tensor:
        own = held(value, sharding, strategy.mesh, rank)
        return torch.empty(own.shape, dtype=dtype, device=device).copy_(own)

    storage = strategy.storage[tensor.name]
    shard = part(storage.parameter, dtype)
    state.parameters[tensor.name] = shard.requires_grad_(tensor.differentiable)
    if has_master(tensor, strategy):
        state.masters[tensor.name] = part(storage.optimizer, torch.float32)


def has_master(tensor: GraphTensor, strategy: Strategy) -> bool:
    """Whether the optimizer changes an fp32 copy of the parameter."""
    return strategy.training.precision == "mixed" and tensor.differentiable


def whole(shard: Tensor, sharding: Sharding, communicator: Communicator) -> Tensor:
    """Gather a stored tensor; all ranks call it together."""
    everywhere = ("I",) * len(sharding)
    return communicator.walk(shard.detach(), steps(sharding, everywhere))


def gather(
    shards: Mapping[str, Tensor],
    shardings: Mapping[str, Sharding],
    communicator: Communicator,
    names: Iterable[str],
) -> dict[str, Tensor]:
    """Whole tensors by name, on every rank."""
    return {name: whole(shards[name], shardings[name], communicator) for name in names}


def _checked(tensor: GraphTensor, values: Mapping[str, Tensor], strategy: Strategy) -> Tensor:
    """The value, of the plan's shape and dtype; in mixed precision of any floating dtype."""
    value = values.get(tensor.name)
    if value is None:
        raise PlanMismatchError(
            f"the plan was made for a model with a {tensor.role} {tensor.name!r}; "
            f"this model has none of that name. Make a new plan for it"
        )
    found = tuple(value.shape), str(value.dtype).removeprefix("torch.")
    if strategy.training.precision == "mixed" and value.is_floating_point():
        found = found[0], tensor.spec.dtype
    if found != (tensor.spec.shape, tensor.spec.dtype):
        raise PlanMismatchError(
            f"{tensor.role} {tensor.name!r} is {found[1]}{list(found[0])} in this model, and "
            f"{tensor.spec.dtype}{list(tensor.spec.shape)} in the plan. Make a new plan for it"
        )
    return value
