"""The planned collectives on local tensors, with the backward that the plan names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import spmd_types
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from autopar.ir.sharding import Mesh, Placement, Sharding, sharded_dim
from autopar.runtime.pieces import cut_rows, join_rows, piece, put_piece
from autopar.runtime.recorder import Executed, Recorder
from autopar.simulator.redistribution import Step, reverse, steps

_c10d = torch.ops._c10d_functional
_TYPES = {"R": spmd_types.R, "I": spmd_types.I, "P": spmd_types.P, "S": spmd_types.V}


@dataclass
class Communicator:
    """One rank's collectives over the axes of a mesh, each told to ``recorder``.

    Results are new tensors, complete when returned. Any strides, any dim, any dtype that the
    backend carries (gloo: all of them). An axis of one rank communicates like any other.
    """

    mesh: Mesh
    rank: int
    device_mesh: DeviceMesh
    recorder: Recorder = field(default_factory=Recorder)

    def __post_init__(self) -> None:
        self.coordinates = self.mesh.coordinates(self.rank)
        self._groups = [
            self.device_mesh.get_group(axis).group_name for axis in range(len(self.mesh.axes))
        ]

    def all_reduce(
        self, tensor: Tensor, axis: int, op: Literal["sum", "max", "min"] = "sum"
    ) -> Tensor:
        self._record("all_reduce", axis, tensor)
        return _wait(_c10d.all_reduce(tensor.contiguous(), op, self._groups[axis]))

    def all_gather(self, tensor: Tensor, axis: int, joined: Placement) -> Tensor:
        parts = self.mesh.sizes[axis]
        whole = _wait(_c10d.all_gather_into_tensor(tensor.contiguous(), parts, self._groups[axis]))
        self._record("all_gather", axis, whole)
        return join_rows(whole, parts, joined)

    def reduce_scatter(self, tensor: Tensor, axis: int, cut: Placement) -> Tensor:
        self._record("reduce_scatter", axis, tensor)
        parts = self.mesh.sizes[axis]
        pieces = cut_rows(tensor, parts, cut)
        return _wait(_c10d.reduce_scatter_tensor(pieces, "sum", parts, self._groups[axis]))

    def all_to_all(self, tensor: Tensor, axis: int, source: Placement, target: Placement) -> Tensor:
        """From shards of one dim to shards of another."""
        self._record("all_to_all", axis, tensor)
        parts = self.mesh.sizes[axis]
        pieces = cut_rows(tensor, parts, target)
        rows = [pieces.shape[0] // parts] * parts
        received = _wait(_c10d.all_to_all_single(pieces, rows, rows, self._groups[axis]))
        return join_rows(received, parts, source)

    def move(self, tensor: Tensor, step: Step) -> Tensor:
        """The local tensor after ``step`` (see ``redistribution.FORWARD``)."""
        axis, source, target = step.axis, step.source, step.target
        match source[0], target[0]:
            case ("S", "R" | "I"):
                return self.all_gather(tensor, axis, source)
            case ("S", "S"):
                return self.all_to_all(tensor, axis, source, target)
            case ("S", "P"):
                return self._padded(tensor, axis, source)
            case ("R" | "I", "S"):
                return piece(tensor, self.mesh.sizes[axis], self.coordinates[axis], target)
            case ("R" | "I", "P"):
                # the first rank copies, so that all need the same memory
                first = self.coordinates[axis] == 0
                return tensor.clone() if first else torch.zeros_like(tensor)
            case ("P", "S"):
                return self.reduce_scatter(tensor, axis, target)
            case ("P", "R" | "I"):
                return self.all_reduce(tensor, axis)
            case ("R", "I") | ("I", "R"):
                return tensor
            case pair:
                raise AssertionError(f"no step goes from {pair[0]} to {pair[1]}")

    def walk(self, tensor: Tensor, path: Sequence[Step]) -> Tensor:
        for step in path:
            tensor = self.move(tensor, step)
        return tensor

    def types(self, sharding: Sharding) -> dict[Any, Any]:
        """The sharding in the words of ``spmd_types``, which leaves out axes of one rank."""
        return {
            spmd_types.MeshAxis.of(self.device_mesh.get_group(axis)): _TYPES[placement[0]]
            for axis, placement in enumerate(sharding)
            if self.mesh.sizes[axis] > 1
        }

    def _padded(self, tensor: Tensor, axis: int, joined: Placement) -> Tensor:
        parts = self.mesh.sizes[axis]
        dim = sharded_dim(joined)
        assert dim is not None
        shape = list(tensor.shape)
        shape[dim] *= parts
        whole = tensor.new_zeros(shape)
        put_piece(whole, tensor, parts, self.coordinates[axis], joined)
        return whole

    def _record(self, kind: Any, axis: int, largest: Tensor) -> None:
        size = largest.numel() * largest.element_size()
        self.recorder.add(Executed(kind, self.recorder.phase, self.mesh.names[axis], size))


def _wait(tensor: Tensor) -> Tensor:
    waited: Tensor = _c10d.wait_tensor(tensor)
    return waited


def connect(mesh: Mesh, device_type: str) -> Communicator:
    """Process groups for every axis; each rank of the world calls it once, in the same order."""
    device_mesh = init_device_mesh(device_type, mesh.sizes, mesh_dim_names=mesh.names)
    return Communicator(mesh, dist.get_rank(), device_mesh)


class Redistribute(torch.autograd.Function):
    """A tensor goes from ``source`` to ``target``, its gradient back the planned way."""

    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, communicator: Communicator, source: Sharding, target: Sharding
    ) -> Tensor:
        ctx.communicator = communicator
        ctx.ends = source, target
        return fresh(communicator.walk(tensor, steps(source, target)), tensor)

    @staticmethod
    def spmd_typecheck(
        moved: Tensor,
        *,
        tensor: Tensor,
        communicator: Communicator,
        source: Sharding,
        target: Sharding,
    ) -> None:
        spmd_types.assert_type(tensor, communicator.types(source))
        spmd_types.assert_type(moved, communicator.types(target))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        communicator: Communicator = ctx.communicator
        return communicator.walk(gradient, _steps_back(*ctx.ends)), None, None, None


def fresh(moved: Tensor, tensor: Tensor) -> Tensor:
    """``moved``, as another object than ``tensor``: each has a type of its own."""
    return moved.view_as(moved) if moved is tensor else moved


@lru_cache(maxsize=None)
def _steps_back(source: Sharding, target: Sharding) -> tuple[Step, ...]:
    return tuple(reverse(step) for step in reversed(steps(source, target)))
