"""One training step: forward, backward, gradient reduction, clipping, optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from autopar.ir.graph import OperatorGraph
from autopar.ir.sharding import Sharding, gradient, sharded_dim, sharded_parts
from autopar.ir.strategy import Strategy
from autopar.runtime.batches import Batches
from autopar.runtime.collectives import Communicator
from autopar.runtime.devices import optimizer_options
from autopar.runtime.lowering import Execution, LoweredProgram, divisors
from autopar.runtime.peers import Peers
from autopar.runtime.storage import State, gather
from autopar.simulator.promise import clip_axes
from autopar.simulator.redistribution import steps
from autopar.simulator.workspace import update_groups

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 1e-2}),
    "momentum": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {"lr": 1e-3}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3}),
}
"""torch's optimizers, and the hyperparameters used where the caller gives none (torch's own
defaults; SGD's rate and the usual momentum, which torch leaves out, are the tutorial values)."""


@dataclass
class TrainingStep:
    """``loss = step(inputs...)``: one optimizer step on one *global* batch.

    Every rank calls it together with the same batch, passed as the model's ``forward`` takes it,
    and gets the loss of the whole batch. In microbatches, their shares of it are added up: loss
    and gradients are those of the batch in one. ``gradients`` are those of the last step, sharded
    as ``storage.optimizer``, before clipping.
    """

    program: LoweredProgram
    strategy: Strategy
    state: State
    communicator: Communicator
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    peers: Peers = field(default_factory=Peers)

    def __post_init__(self) -> None:
        self.graph: OperatorGraph = self.program.graph
        self.execution: Execution = self.program.execution(self.communicator, self.state.parameters)
        self.steps_done = 0
        self.gradients: dict[str, Tensor] = {}
        self.norm: Tensor | None = None
        self._pieces = {
            name: self._piece(name)
            for name, parameter in self.state.parameters.items()
            if parameter.requires_grad
        }
        maker, defaults = OPTIMIZERS[self.strategy.training.optimizer]
        # a group, since a stage may be without parameters, which torch takes for a mistake
        groups = [{"params": list(self._pieces.values())}]
        how = optimizer_options({piece.device.type for piece in self._pieces.values()})
        self.optimizer = maker(groups, **{**defaults, **how, **self.hyperparameters})

    @cached_property
    def batches(self) -> Batches:
        return Batches(self.program.division, self.strategy.training, self._device)

    # ---- the step ------------------------------------------------------------------------------

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        loss = self.differentiate(*args, **kwargs)
        with self._doing("U"):
            self.update()
        return loss

    def _doing(self, kind: str, microbatch: int | None = None) -> AbstractContextManager[None]:
        action = f"0{kind}{self.strategy.microbatches - 1 if microbatch is None else microbatch}"
        return self.peers.doing(f"{action}, step {self.steps_done}", self.communicator.ranks)

    def differentiate(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Forward and backward; leaves the reduced gradients in ``gradients``."""
        recorder = self.communicator.recorder
        inputs = self.batches.named(args, kwargs)
        self.gradients = {}
        self.execution.gradients.clear()
        self.execution.seed = self.seed + self.steps_done
        self.execution.divisors = divisors(self.program, self.state.buffers, inputs)
        total: Tensor | None = None
        for index in range(self.strategy.microbatches):
            self.execution.microbatch = index
            part = self.microbatch(inputs, index)
            with self._doing("F", index), recorder.during("forward"):
                loss, mutated = self.program(self.execution, self.state.buffers, part)
            with self._doing("B", index), recorder.during("backward"):
                loss.backward()  # type: ignore[no-untyped-call]
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        with torch.no_grad():
            for name, value in mutated.items():  # the same in all microbatches
                self.state.buffers[name].copy_(value)
        with self._doing("B"):
            self.reduce()
        return total

    def update(self, norm: Tensor | None = None) -> None:
        """Clip, step the optimizer, and bring the parameters up to date on every rank. ``norm``: of
        all gradients, where it is known; else it is found."""
        with self.communicator.recorder.during("step"), torch.no_grad():
            scale = self._clip_scale(norm)
            sizes = {name: p.numel() * p.element_size() for name, p in self._pieces.items()}
            for names in update_groups(sizes):
                self._give_gradients(names, scale)
                self.optimizer.step()  # passes over those without a gradient
                for name in names:
                    self._pieces[name].grad = None
                self._refresh(names)
        self.steps_done += 1

    def _give_gradients(self, names: Iterable[str], scale: Tensor | None) -> None:
        """To the optimizer, as it takes them: clipped, and of the dtypes of their pieces."""
        cast = []
        for name in names:
            reduced, piece = self.gradients.get(name), self._pieces[name]
            if reduced is None:
                continue
            if scale is not None:
                piece.grad = (reduced * scale.to(reduced.dtype)).to(piece.dtype)
            elif reduced.dtype == piece.dtype:
                piece.grad = reduced
            else:
                piece.grad = torch.empty_like(piece)
                cast.append((piece.grad, reduced))
        _copy(cast)

    def reduce(self) -> None:
        """Bring gradients to the optimizer's shards, and sum over a parameter's uses."""
        with self.communicator.recorder.during("step"), torch.no_grad():
            for edge in self.program.edges:
                reduced = self.execution.gradients.pop((edge.parameter, edge.target), None)
                if reduced is None:
                    continue
                if edge.per_step:
                    reduced = self._walk(reduced, gradient(edge.target), edge.destination)
                reduced = self._walk(reduced, edge.destination, edge.storage.optimizer)
                before = self.gradients.get(edge.parameter)
                self.gradients[edge.parameter] = reduced if before is None else before + reduced

    def _walk(self, tensor: Tensor, source: Sharding, target: Sharding) -> Tensor:
        return self.communicator.walk(tensor, steps(source, target))

    # ---- clipping ------------------------------------------------------------------------------

    def _clip_scale(self, norm: Tensor | None) -> Tensor | None:
        """As ``torch.nn.utils.clip_grad_norm_``: min(1, clip_norm / (norm + 1e-6))."""
        limit = self.strategy.training.clip_norm
        if limit is None or not self.gradients:
            return None
        self.norm = self._global_norm() if norm is None else norm
        return torch.clamp(limit / (self.norm + 1e-6), max=1.0)

    def _global_norm(self) -> Tensor:
        """The 2-norm of all gradients: of its square (float32; float64 where a gradient is) one
        all-reduce on each of ``clip_axes``."""
        axes = clip_axes(self.strategy)
        wide = any(reduced.dtype == torch.float64 for reduced in self.gradients.values())
        dtype = torch.float64 if wide else torch.float32
        total = self.squares(self.gradients, axes, dtype, self._device)
        for axis in axes:
            total = self.communicator.combine(total, axis)
        return total.sqrt()

    def squares(
        self, names: Iterable[str], axes: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Of these gradients the sum of squares; of equal copies along ``axes`` one counts."""
        total = torch.zeros((), dtype=dtype, device=device)
        for name in names:
            if self._counts_here(self.strategy.storage[name].optimizer, axes):
                total += torch.linalg.vector_norm(self.gradients[name], dtype=dtype) ** 2
        return total

    def _counts_here(self, sharding: Sharding, axes: tuple[int, ...]) -> bool:
        """Of equal copies along ``axes``, the first counts."""
        return all(
            sharded_dim(sharding[axis]) is not None or self.communicator.coordinates[axis] == 0
            for axis in axes
        )

    @property
    def _device(self) -> torch.device:
        return next(iter(self.state.parameters.values())).device

    # ---- optimizer state -----------------------------------------------------------------------

    def piece(self, name: str) -> Tensor:
        """What this rank's optimizer changes of a trained parameter."""
        return self._pieces[name]

    def _piece(self, name: str) -> Tensor:
        """What the optimizer changes: a view of the parameter's shard, or its fp32 master copy."""
        if self.strategy.training.precision == "mixed":
            return self.state.masters[name]
        return self._optimizer_part(name)

    def _optimizer_part(self, name: str) -> Tensor:
        """A view where the shard is only cut further; a copy where its pieces have to be moved, or
        put together from the parts of a dim."""
        storage = self.strategy.storage[name]
        part = self.state.parameters[name].detach()
        path = steps(storage.parameter, storage.optimizer)
        if any(step.source != "I" or sharded_parts(step.target) for step in path):
            return self.communicator.walk(part, path)
        for step in path:
            dim = sharded_dim(step.target)
            assert dim is not None, (name, storage)
            parts = self.strategy.mesh.sizes[step.axis]
            part = part.chunk(parts, dim)[self.communicator.coordinates[step.axis]]
        return part

    def _refresh(self, names: Iterable[str]) -> None:
        cast = []
        for name in names:
            storage, parameter = self.strategy.storage[name], self.state.parameters[name]
            path, piece = steps(storage.optimizer, storage.parameter), self._pieces[name]
            if path:
                parameter.copy_(self.communicator.walk(piece.to(parameter.dtype), path))
            elif self.strategy.training.precision == "mixed":
                cast.append((parameter.detach(), piece))
        _copy(cast)

    # ---- for looking at ------------------------------------------------------------------------

    def full_parameters(self) -> dict[str, Tensor]:
        """Whole parameters; all ranks call it together."""
        shardings = {name: s.parameter for name, s in self.strategy.storage.items()}
        names = self.state.parameters
        return gather(names, shardings, self.communicator, names)

    def full_masters(self) -> dict[str, Tensor]:
        """Whole fp32 master copies, in mixed precision; all ranks call it together."""
        shardings = {name: s.optimizer for name, s in self.strategy.storage.items()}
        masters = self.state.masters
        return gather(masters, shardings, self.communicator, masters)

    def full_gradients(self) -> dict[str, Tensor]:
        """Whole gradients of the last step, before clipping; all ranks call it together."""
        shardings = {name: s.optimizer for name, s in self.strategy.storage.items()}
        return gather(self.gradients, shardings, self.communicator, self.gradients)

    def microbatch(self, inputs: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
        """Its part of a global batch, by the graph's names of the inputs."""
        return self.batches.microbatch(inputs, index)


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """To each first tensor its second: on a GPU in a few kernels for all of them."""
    if pairs:
        torch._foreach_copy_([to for to, _ in pairs], [source for _, source in pairs])


__all__ = ["OPTIMIZERS", "TrainingStep"]
