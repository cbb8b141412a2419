"""What a recipe is: meshes to try, and what each of their axes may do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autopar.ir.sharding import Mesh
from autopar.simulator.listing import Allowed


@dataclass(frozen=True, slots=True)
class Layout:
    """A mesh and, for each of its axes, what the recipe allows."""

    mesh: Mesh
    allowed: tuple[Allowed, ...]


@dataclass(frozen=True, slots=True)
class Recipe:
    """``layouts(devices, scale_up_devices)``: the ways to lay the recipe out on a machine, of which
    the fastest that fits counts. ``description``: one line for a person."""

    name: str
    description: str
    layouts: Callable[[int, int], tuple[Layout, ...]]
