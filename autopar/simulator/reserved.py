"""What a process holds of its device beside the tensors of a step."""

from __future__ import annotations

from dataclasses import replace

from autopar.ir.sharding import Mesh
from autopar.ir.simulation import Memory
from cost_models.interface import CostModel
from cost_models.overheads import allocatable_bytes, overheads_of

MOST_COMMUNICATORS = 5
"""Of a mesh of three axes in a pipeline: one for each, one for its neighbours, one of all."""


def communicators(mesh: Mesh, stages: int, devices: int) -> int:
    """Groups of devices that one process communicates in: along each axis of its mesh, with the
    stages beside its own, and all of them, for the loss and the norm of gradients.

    >>> communicators(Mesh((("data", 4), ("tensor", 2))), stages=1, devices=8)
    3
    >>> communicators(Mesh((("data", 8),)), stages=1, devices=8)
    1
    """
    axes = sum(size > 1 for size in mesh.sizes)
    everyone = devices > 1 and devices not in mesh.sizes
    return axes + (stages > 1) + everyone


def reserved(memory: Memory, cost_model: CostModel, groups: int, trapped_bytes: int = 0) -> Memory:
    """With what the process holds beside, in as many groups. ``trapped_bytes``: of fragments, those
    that are known."""
    found = overheads_of(cost_model)
    return replace(
        memory,
        workspace_bytes=found.workspace_bytes,
        fragmentation_bytes=found.fragmentation_bytes(memory.total_bytes, trapped_bytes),
        context_bytes=found.context_bytes,
        communicators_bytes=found.communicators_bytes(groups),
    )


def usual_limit_bytes(cost_model: CostModel) -> int:
    """What a search lets tensors have of a device where nobody says: enough is left for any mesh
    that is tried."""
    groups = 0 if cost_model.devices == 1 else MOST_COMMUNICATORS
    return allocatable_bytes(cost_model, groups)


__all__ = ["communicators", "reserved", "usual_limit_bytes"]
