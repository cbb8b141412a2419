"""A backward in two parts: gradients of what arrived, and later those of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from autopar.runtime.lowering import PartedBackward

Product = tuple[list[GradientEdge], list[Tensor], list[GradientEdge]]
"""Outputs of an operator with their gradients, and its parameters."""


def input_part(
    noted: PartedBackward,
    roots: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    leaves: Sequence[Tensor],
) -> tuple[tuple[Tensor | None, ...], list[Product]]:
    """Back to the leaves, and to what operators with parameters made; not yet into these. What is
    left for ``weight_part``, too."""
    outputs = [made for of in noted.outputs.values() for made in of]
    wanted: list[Any] = [*leaves, *outputs]
    found: tuple[Tensor | None, ...] = (None,) * len(wanted)
    if roots and wanted:
        found = torch.autograd.grad(
            list(roots), wanted, list(gradients), retain_graph=True, allow_unused=True
        )
    arrived = iter(found[len(leaves) :])
    left: list[Product] = []
    for operator, made in noted.outputs.items():
        pairs = [(edge, g) for edge in made if (g := next(arrived)) is not None]
        if pairs:
            edges, its_gradients = [edge for edge, _ in pairs], [g for _, g in pairs]
            left.append((edges, its_gradients, noted.aliases[operator]))
    return found[: len(leaves)], left


def weight_part(left: Sequence[Product]) -> None:
    uses: list[GradientEdge] = []
    gradients: list[Tensor] = []
    for made, given, aliases in left:
        found = torch.autograd.grad(made, aliases, given, allow_unused=True)
        for alias, gradient in zip(aliases, found, strict=True):
            if gradient is not None:
                uses.append(alias)
                gradients.append(gradient)
    if uses:
        torch.autograd.backward(uses, gradients)


__all__ = ["Product", "input_part", "weight_part"]
