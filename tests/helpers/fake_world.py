"""One process that is any rank of a world of any size: collectives have the right shapes only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from autopar.ir.graph import OperatorGraph, Role, TensorSpec
from autopar.ir.sharding import Mesh, local_shape
from autopar.ir.strategy import Strategy
from autopar.runtime.collectives import Communicator, connect
from autopar.runtime.storage import State


@contextmanager
def fake_world(mesh: Mesh, rank: int = 0) -> Iterator[Communicator]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=mesh.size)
    try:
        communicator = connect(mesh, "cpu")
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield communicator
    finally:
        dist.destroy_process_group()


def fake_state(graph: OperatorGraph, strategy: Strategy) -> State:
    """Inside ``fake_world``: a rank's shards, without values."""
    parameters = {}
    for parameter in graph.parameters:
        sharding = strategy.storage[parameter.name].parameter
        shape = local_shape(parameter.spec.shape, sharding, strategy.mesh)
        shard = tensor_of(TensorSpec(shape, parameter.spec.dtype))
        parameters[parameter.name] = shard.requires_grad_(parameter.differentiable)
    return State(parameters, {b.name: tensor_of(b.spec) for b in graph.of_role(Role.BUFFER)})


def fake_batch(graph: OperatorGraph) -> Mapping[str, torch.Tensor]:
    return {name: tensor_of(graph.spec(name)) for name in graph.inputs}


def tensor_of(spec: TensorSpec) -> torch.Tensor:
    return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
