"""A global batch as the model takes it: checked against the plan, and cut into microbatches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from autopar.errors import PlanMismatchError
from autopar.ir.sharding import sharded_dim
from autopar.ir.strategy import Training
from autopar.simulator.microbatches import Division


@dataclass(frozen=True)
class Batches:
    """Batches of the graph that ``division`` divides."""

    division: Division
    training: Training
    device: torch.device

    def named(self, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch by the graph's names of its inputs, checked against the plan's."""
        names = self.division.graph.inputs
        keys = dict(zip(self.division.graph.input_keys, names, strict=True))
        keywords = {key for key in keys if key}
        positional = names[: len(names) - len(keywords)]
        if len(args) != len(positional) or set(kwargs) != keywords:
            fixed = sorted(k for k, v in kwargs.items() if not isinstance(v, Tensor))
            raise PlanMismatchError(
                f"the plan was made for {len(positional)} positional inputs and the keywords "
                f"{sorted(keywords)}; got {len(args)} and {sorted(kwargs)}"
                + (
                    f". {fixed} are no tensors: the plan has fixed them, leave them out"
                    * bool(fixed)
                )
            )
        given = dict(zip(positional, args, strict=True))
        given.update({keys[key]: value for key, value in kwargs.items()})
        return {name: self._checked(name, value) for name, value in given.items()}

    def _checked(self, name: str, value: Tensor) -> Tensor:
        expected = self.division.whole.spec(name)
        if self.training.precision == "mixed" and value.is_floating_point():
            value = value.to(torch.bfloat16)
        found = tuple(value.shape), str(value.dtype).removeprefix("torch.")
        if found != (expected.shape, expected.dtype):
            raise PlanMismatchError(
                f"input {name!r} is {found[1]}{list(found[0])}; the plan was made for a global "
                f"batch with {expected.dtype}{list(expected.shape)}. Every rank passes the "
                "whole batch"
            )
        return value.to(self.device)

    def microbatch(self, inputs: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
        """Its part of a global batch, by the graph's names of the inputs."""
        return {name: self.part(name, value, index) for name, value in inputs.items()}

    def part(self, name: str, value: Tensor, microbatch: int) -> Tensor:
        """A microbatch's part of one input."""
        dim = sharded_dim(self.division.placements[name])
        if dim is None:
            return value
        blocks = self.division.blocks.get(name, 1)
        size = self.division.graph.spec(name).shape[dim] // blocks
        shape = value.shape
        parts = value.reshape(*shape[:dim], blocks, -1, *shape[dim + 1 :])
        return parts.narrow(dim + 1, microbatch * size, size).flatten(dim, dim + 1)


__all__ = ["Batches"]
