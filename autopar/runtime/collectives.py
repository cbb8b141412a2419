"""Redistributions of local tensors: ``spmd_types``' own, each with the gradient's way back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from typing import Any, Literal

import spmd_types
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from autopar.ir.sharding import Mesh, Placement, Sharding, sharded_dim, sharded_parts
from autopar.runtime.pieces import cut_rows, join_rows
from autopar.runtime.recorder import Recorder
from autopar.simulator.redistribution import Step, forward_collective

# spmd_types 0.3.1 calls functional collectives by names that torch 2.13 calls deprecated
warnings.filterwarnings("ignore", r".*is deprecated", FutureWarning, r"spmd_types\.")

_c10d = torch.ops._c10d_functional
_TYPES = {"R": spmd_types.R, "I": spmd_types.I, "P": spmd_types.P}


class Pairs(torch.autograd.Function):
    """Complex numbers as pairs of real ones (``to_pairs``), or back: gloo does not carry them."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, to_pairs: bool) -> Tensor:
        ctx.back = not to_pairs
        if to_pairs:
            return torch.view_as_real(tensor.resolve_conj())
        return torch.view_as_complex(tensor.contiguous())

    @staticmethod
    def spmd_typecheck(made: Tensor, *, tensor: Tensor, to_pairs: bool) -> None:
        del to_pairs
        spmd_types.assert_type(made, dict(spmd_types.get_local_type(tensor)))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return Pairs.apply(gradient, ctx.back), None  # type: ignore[no-untyped-call]


_Move = Callable[..., Tensor]


def _in_pairs(method: _Move) -> _Move:
    """The method, which moves tensors of complex numbers as pairs."""

    @wraps(method)
    def move(self: Any, tensor: Tensor, axis: str, *, src: Placement, dst: Placement) -> Tensor:
        if not tensor.is_complex():
            return method(self, tensor, axis, src=src, dst=dst)
        pairs = Pairs.apply(tensor, True)  # type: ignore[no-untyped-call]
        moved: Tensor = Pairs.apply(  # type: ignore[no-untyped-call]
            method(self, pairs, axis, src=src, dst=dst), False
        )
        return moved

    return move


@dataclass
class Communicator:
    """One rank's redistributions over the axes of a mesh.

    A lowered program calls them by name. ``src`` and ``dst`` are placements on ``axis``; the
    gradient goes from ``gradient(dst)`` to ``gradient(src)``. Results are complete when returned,
    and keep no memory of ``tensor`` alive that they do not need. Any strides, any dim, any dtype
    that the backend carries (gloo: all of them).
    """

    mesh: Mesh
    rank: int
    device_mesh: DeviceMesh

    def __post_init__(self) -> None:
        self.coordinates = self.mesh.coordinates(self.rank)
        self.groups = {name: self.device_mesh.get_group(name) for name in self.mesh.names}
        self.recorder = Recorder(
            {
                str(self.groups[name].group_name): name if size > 1 else None
                for name, size in self.mesh.axes
            }
        )

    def ranks(self) -> list[int]:
        """Of the world, those of the mesh."""
        return [int(rank) for rank in self.device_mesh.mesh.flatten()]

    @_in_pairs
    def all_gather(self, tensor: Tensor, axis: str, *, src: Placement, dst: Placement) -> Tensor:
        return self._call(spmd_types.all_gather, tensor, axis, src, dst)

    @_in_pairs
    def reduce_scatter(
        self, tensor: Tensor, axis: str, *, src: Placement, dst: Placement
    ) -> Tensor:
        return self._call(spmd_types.reduce_scatter, tensor, axis, src, dst)

    @_in_pairs
    def all_reduce(self, tensor: Tensor, axis: str, *, src: Placement, dst: Placement) -> Tensor:
        moved = self._call(spmd_types.all_reduce, tensor.contiguous(), axis, src, dst)
        return _with_contiguous_gradient(moved)

    @_in_pairs
    def convert(self, tensor: Tensor, axis: str, *, src: Placement, dst: Placement) -> Tensor:
        """Where each rank has what it needs: a copy of its slice, zeros around it, or itself."""
        moved = self._call(spmd_types.convert, tensor, axis, src, dst, expert_mode=True)
        return _with_contiguous_gradient(moved) if (src, dst) == ("I", "R") else moved

    @_in_pairs
    def all_to_all(self, tensor: Tensor, axis: str, *, src: Placement, dst: Placement) -> Tensor:
        moved: Tensor = AllToAll.apply(  # type: ignore[no-untyped-call]
            tensor, self.groups[axis], src, dst
        )
        return moved

    def move(self, tensor: Tensor, step: Step) -> Tensor:
        method = getattr(self, method_of(step))
        moved: Tensor = method(tensor, self.mesh.names[step.axis], src=step.source, dst=step.target)
        return moved

    def walk(self, tensor: Tensor, path: Sequence[Step]) -> Tensor:
        for step in path:
            tensor = self.move(tensor, step)
        return tensor

    def combine(
        self, tensor: Tensor, axis: int, op: Literal["sum", "max", "min"] = "sum"
    ) -> Tensor:
        """All-reduce outside of autograd and of types, for operators that do their own."""
        group = self.groups[self.mesh.names[axis]].group_name
        return _wait(_c10d.all_reduce(tensor.contiguous(), op, group))

    def types(self, sharding: Sharding) -> dict[Any, Any]:
        """The sharding in the words of ``spmd_types``, which leaves out axes of one rank."""
        return {
            spmd_types.MeshAxis.of(self.groups[name]): _TYPES.get(placement, spmd_types.V)
            for (name, size), placement in zip(self.mesh.axes, sharding, strict=True)
            if size > 1
        }

    def _call(
        self,
        function: Any,
        tensor: Tensor,
        axis: str,
        src: Placement,
        dst: Placement,
        **options: Any,
    ) -> Tensor:
        group = self.groups[axis]
        if sharded_parts(dst):
            tensor = Relaid.apply(tensor, group.size(), dst, True)  # type: ignore[no-untyped-call]
        moved: Tensor = function(
            tensor,
            group,
            src=_type(src),
            dst=_type(dst),
            # gradients are reduced in the dtype they have: so they are priced
            backward_options={"op_dtype": tensor.dtype},
            **options,
        )
        if sharded_parts(src):
            moved = Relaid.apply(moved, group.size(), src, False)  # type: ignore[no-untyped-call]
        return moved


def method_of(step: Step) -> str:
    """The name of the communicator's method that takes ``step``."""
    return forward_collective(step) or "convert"


def connect(mesh: Mesh, device_type: str, timeout: timedelta | None = None) -> Communicator:
    """Process groups for every axis; each rank of the world calls it once, in the same order.
    ``timeout``: of collectives, torch's own where it is not given."""
    groups = device_mesh(mesh, range(mesh.size), device_type, timeout)
    assert groups is not None
    return Communicator(mesh, dist.get_rank(), groups)


def device_mesh(
    mesh: Mesh, ranks: Sequence[int], device_type: str, timeout: timedelta | None
) -> DeviceMesh | None:
    """The mesh on these ranks of the world, ``None`` on others; every rank of the world takes part.

    ``DeviceMesh`` makes its groups with torch's limit, half an hour, even where the world has
    another one.
    """
    me = dist.get_rank()
    mine: list[ProcessGroup] = []
    for axis in range(len(mesh.axes)):
        lines = {mesh.group(axis, place) for place in range(mesh.size)}
        for line in sorted(lines):
            members = [ranks[place] for place in line]
            whole = members == list(range(dist.get_world_size()))
            group = dist.group.WORLD if whole else dist.new_group(members, timeout=timeout)
            if me in members:
                assert isinstance(group, ProcessGroup)
                mine.append(group)
    if me not in ranks:
        return None
    laid = torch.tensor(ranks, dtype=torch.int).reshape(mesh.sizes)
    return DeviceMesh.from_group(mine, device_type, laid, mesh_dim_names=mesh.names)


class AllToAll(torch.autograd.Function):
    """From shards of one dim to shards of another in one exchange of one buffer.

    That of ``spmd_types`` exchanges a list of tensors, one for each rank of the group.
    """

    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, group: ProcessGroup, src: Placement, dst: Placement
    ) -> Tensor:
        ctx.group, ctx.ends = group, (src, dst)
        pieces = cut_rows(tensor, group.size(), dst)
        rows = [pieces.shape[0] // group.size()] * group.size()
        received = _wait(_c10d.all_to_all_single(pieces, rows, rows, group.group_name))
        return join_rows(received, group.size(), src)

    @staticmethod
    def spmd_typecheck(
        moved: Tensor, *, tensor: Tensor, group: ProcessGroup, src: Placement, dst: Placement
    ) -> None:
        del src, dst  # a shard is a shard: its dim is not a part of its type
        spmd_types.assert_type(tensor, {group: spmd_types.V})
        spmd_types.assert_type_like(moved, tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        src, dst = ctx.ends
        moved = AllToAll.apply(gradient, ctx.group, dst, src)  # type: ignore[no-untyped-call]
        return moved, None, None, None


class Relaid(torch.autograd.Function):
    """Pieces of a dim of several parts, one below the other (``to_rows``) or where they belong.

    ``spmd_types`` knows chunks only; laid in rows, a piece is a chunk of dim 0.
    """

    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, pieces: int, placement: Placement, to_rows: bool
    ) -> Tensor:
        ctx.how = pieces, placement, not to_rows
        return (cut_rows if to_rows else join_rows)(tensor, pieces, placement)

    @staticmethod
    def spmd_typecheck(
        relaid: Tensor, *, tensor: Tensor, pieces: int, placement: Placement, to_rows: bool
    ) -> None:
        del pieces, placement, to_rows
        types = dict(spmd_types.get_local_type(tensor))
        spmd_types.assert_type(tensor, types)
        spmd_types.assert_type(relaid, types)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        back = Relaid.apply(gradient, *ctx.how)  # type: ignore[no-untyped-call]
        return back, None, None, None


def _type(placement: Placement) -> Any:
    dim = sharded_dim(placement)
    if dim is None:
        return _TYPES[placement]
    return spmd_types.S(0 if sharded_parts(placement) else dim)


def _with_contiguous_gradient(moved: Tensor) -> Tensor:
    """All-reduces of ``spmd_types``, in the backward as well, take nothing else."""
    if moved.requires_grad:
        with spmd_types.no_typecheck():
            moved.register_hook(Tensor.contiguous)  # type: ignore[no-untyped-call]
    return moved


def _wait(tensor: Tensor) -> Tensor:
    waited: Tensor = _c10d.wait_tensor(tensor)
    return waited
