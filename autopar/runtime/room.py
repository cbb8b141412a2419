"""Whether the processes of a plan have the memory that it needs, before anything is allocated."""

from __future__ import annotations

import os

import torch

from autopar.errors import InfeasibleError
from autopar.ir.graph import ITEM_BYTES, OperatorGraph
from autopar.ir.strategy import Strategy
from autopar.runtime.devices import memory_bytes
from autopar.simulator.memory import local_bytes, optimizer_bytes_per_element
from autopar.simulator.stages import Pipelined


def check_promise(promised_bytes: int, processes: int | None = None) -> None:
    """Of a plan whose devices need ``promised_bytes``; ``processes``: how many of them this machine
    is, ``None``: as many as torchrun started here.

    Raises:
        InfeasibleError: a device has less.
    """
    has_bytes, device = device_memory(processes)
    if promised_bytes > has_bytes:
        raise InfeasibleError(
            f"the plan needs {promised_bytes / 1e9:.3g} GB on a device, and {device} has "
            f"{has_bytes / 1e9:.3g} GB; plan again with --memory-limit {int(has_bytes)}, or on "
            "more devices"
        )


def check_stages(plan: Pipelined) -> None:
    """As ``check_promise``, of what each row keeps between steps: less than that cannot do."""
    has_bytes, device = device_memory()
    for row, actions in enumerate(plan.rows):
        stages = sorted({action.stage for action in actions})
        parts = [plan.parts[stage] for stage in stages]
        _check_kept(
            f"stage {' and '.join(map(str, stages))}",
            sum(kept_bytes(part.graph, part.strategy) for part in parts),
            has_bytes,
            f"{device}, for rank {plan.groups[row][0]},",
        )


def check_one_stage(graph: OperatorGraph, strategy: Strategy) -> None:
    has_bytes, device = device_memory()
    _check_kept("the strategy", kept_bytes(graph, strategy), has_bytes, device)


def _check_kept(what: str, kept: int, has_bytes: int, device: str) -> None:
    if kept > has_bytes:
        raise InfeasibleError(
            f"{what} keeps {kept / 1e9:.3g} GB of parameters, gradients and optimizer states on "
            f"each of its devices, and {device} has {has_bytes / 1e9:.3g} GB; shard them over more "
            "devices (ZeRO), or move operators to other stages"
        )


def kept_bytes(graph: OperatorGraph, strategy: Strategy) -> int:
    """Parameters, gradients and optimizer states on each device, after the last backward."""
    mesh, training = strategy.mesh, strategy.training
    total = 0
    for parameter in graph.parameters:
        storage, spec = strategy.storage[parameter.name], parameter.spec
        total += local_bytes(spec, storage.parameter, mesh)
        if parameter.differentiable:
            piece = local_bytes(spec, storage.optimizer, mesh)
            states = optimizer_bytes_per_element(spec, training)
            total += piece + piece // ITEM_BYTES[spec.dtype] * states
    return total


def device_memory(processes: int | None = None) -> tuple[int, str]:
    """Of one of so many processes on this machine, and what it is a share of."""
    if torch.cuda.is_available():
        here = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0")))
        return here.total_memory, here.name
    sharing = processes or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    share = "this machine" if sharing == 1 else f"one of {sharing} processes on this machine"
    return memory_bytes() // sharing, share


__all__ = ["check_one_stage", "check_promise", "check_stages", "device_memory", "kept_bytes"]
