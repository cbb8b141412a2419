"""From a plan to a training step on the processes that torchrun started, or to starting them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import IO, Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_group, _set_pg_timeout

from autopar.errors import PeerError, PlanMismatchError
from autopar.ir.graph import OperatorGraph
from autopar.ir.sharding import Mesh
from autopar.ir.strategy import Strategy
from autopar.ops import Proposals
from autopar.runtime import profiler
from autopar.runtime.batches import Batches
from autopar.runtime.collectives import Communicator, connect, device_mesh
from autopar.runtime.devices import MeasuredDevice
from autopar.runtime.lowering import lower_microbatch, lower_stage
from autopar.runtime.peers import TIMEOUT_S, Doing, Peers, Tell, tell_nobody
from autopar.runtime.pipeline import PipelineStep
from autopar.runtime.room import check_one_stage, check_stages
from autopar.runtime.shared_gradients import groups_of
from autopar.runtime.step import TrainingStep
from autopar.runtime.storage import State, from_function, from_module
from autopar.simulator.microbatches import Division, division
from autopar.simulator.stages import Pipelined, pipelined

PROCESSES_OF_A_CORE = 8
"""How many processes are started for each core of a machine without GPUs: on four cores one can
still try a plan for four hosts of eight GPUs. With many more, starting alone takes minutes."""


class Planned(Protocol):
    """A ``Plan``, or anything that has its parts that are run."""

    @property
    def graph(self) -> OperatorGraph: ...

    @property
    def strategy(self) -> Strategy: ...

    @property
    def proposed(self) -> Proposals: ...


def run(
    plan: Planned,
    model: nn.Module | Callable[[], nn.Module],
    *,
    seed: int = 0,
    timeout_s: float | None = None,
    tell: Tell = tell_nobody,
    **hyperparameters: Any,
) -> TrainingStep | PipelineStep:
    """The plan's training step on this process, one of those that torchrun started.

    ``model``: a function that makes it, as in ``model.py``; its parameters then get the values of
    ``torch.manual_seed(seed); model()``, each rank keeping only its shards. Or a module that is in
    memory already, whose values are taken. ``timeout_s``: how long to wait for another process,
    ``None``: ``TIMEOUT_S``, or as the caller's process group says. ``tell`` is told what this
    process does. ``hyperparameters`` go to torch's optimizer (``lr``).

    Raises:
        PlanMismatchError: another number of processes, or another model, than the plan's.
        PeerError: another process ended, or did not answer in time.
    """
    graph, strategy = plan.graph, plan.strategy
    divided = division(graph, strategy.microbatches, plan.proposed)
    if len(strategy.stages) > 1:
        return run_stages(
            divided, strategy, model, seed, hyperparameters, timeout_s=timeout_s, tell=tell
        )
    _check_world(strategy.mesh.size, _shape_text(strategy.mesh))
    check_one_stage(graph, strategy)
    peers = _meet(timeout_s, tell)
    device = local_device()
    with peers.doing(CONNECTING, _everybody):
        communicator = connect(strategy.mesh, device.type, _limit(timeout_s))
    program = lower_microbatch(divided, strategy, device)
    state = _state(model, graph, strategy, communicator, device, seed)
    return TrainingStep(program, strategy, state, communicator, hyperparameters, seed, peers)


def run_stages(
    divided: Division,
    strategy: Strategy,
    model: nn.Module | Callable[[], nn.Module],
    seed: int = 0,
    hyperparameters: Mapping[str, Any] | None = None,
    *,
    timeout_s: float | None = None,
    tell: Tell = tell_nobody,
) -> PipelineStep:
    """As ``run``, of a strategy with several stages."""
    plan = pipelined(divided, strategy)
    _check_world(plan.world_size, f"{len(plan.parts)} stages")
    check_stages(plan)
    peers = _meet(timeout_s, tell)
    rank, device = dist.get_rank(), local_device()
    with peers.doing(CONNECTING, _everybody):
        communicators = communicators_of(plan, rank, device.type, timeout=_limit(timeout_s))
        groups = groups_of(plan, rank, timeout=_limit(timeout_s))
    held = {}
    for stage, communicator in communicators.items():
        part = plan.parts[stage]
        program = lower_stage(part, device, parted=stage in plan.parted)
        state = _state(model, part.graph, part.strategy, communicator, device, seed)
        held[stage] = TrainingStep(
            program, part.strategy, state, communicator, hyperparameters or {}, seed, peers
        )
    batches = Batches(divided, strategy.training, device)
    return PipelineStep(plan, rank, held, batches, groups, seed, peers)


def communicators_of(
    plan: Pipelined,
    rank: int,
    device_type: str,
    *,
    alone: bool = False,
    timeout: timedelta | None = None,
) -> dict[int, Communicator]:
    """For the stages that this process holds, the process groups of their meshes.

    Every process takes part in making those of all; ``alone``: there are no others (a dry run).
    """
    made: dict[tuple[int, Mesh], DeviceMesh | None] = {}
    found = {}
    for stage, part in enumerate(plan.parts):
        for row in plan.copies[stage]:
            devices = plan.groups[row]
            if alone and rank not in devices:
                continue
            if (row, part.mesh) not in made:
                made[row, part.mesh] = device_mesh(part.mesh, devices, device_type, timeout)
            groups = made[row, part.mesh]
            if groups is not None:
                found[stage] = Communicator(part.mesh, devices.index(rank), groups)
    return found


def _state(
    model: nn.Module | Callable[[], nn.Module],
    graph: OperatorGraph,
    strategy: Strategy,
    communicator: Communicator,
    device: torch.device,
    seed: int,
) -> State:
    if isinstance(model, nn.Module):
        return from_module(model, graph, strategy, communicator.rank, device)
    return from_function(model, graph, strategy, communicator.rank, device, seed)


CONNECTING = "making process groups"


def _meet(timeout_s: float | None, tell: Tell) -> Peers:
    """Meet the other processes. A process group that is there already keeps its own limit unless
    ``timeout_s`` is given."""
    device = local_device()
    MeasuredDevice(device.type, device.index or 0).use()
    # NCCL waits on the device: a limit here would have this process wait with it
    peers = Peers(timeout_s if device.type == "cpu" else None, tell)
    if dist.is_initialized():
        if timeout_s is not None:
            _set_pg_timeout(timedelta(seconds=timeout_s))
        return peers
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    alone: Mapping[str, Any] = (
        {} if "RANK" in os.environ else {"store": HashStore(), "rank": 0, "world_size": 1}
    )
    limit_s = TIMEOUT_S if timeout_s is None else timeout_s
    rank, size = os.environ.get("RANK", "0"), _world_of_torchrun()
    tell(Doing(f"meeting the other processes, {size} in all"))
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=limit_s), **alone)
    except dist.DistError as error:
        said = str(error).partition("\n")[0]
        raise PeerError(
            f"rank {rank} did not meet all {size} processes within {limit_s:g} s ({said}); see "
            "whether torchrun was started on all hosts with the same --nnodes and --rdzv-endpoint, "
            "and what the others said, or give them more time with timeout_s (--timeout)"
        ) from error
    return peers


def _limit(timeout_s: float | None) -> timedelta:
    """Of the process groups that are made for a mesh: as asked, or that of the world's group."""
    if timeout_s is not None:
        return timedelta(seconds=timeout_s)
    backend = _get_default_group()._get_backend(local_device())
    found: timedelta = backend.options._timeout
    return found


def _everybody() -> Sequence[int]:
    return range(dist.get_world_size())


def _shape_text(mesh: Mesh) -> str:
    return " x ".join(f"{name} {size}" for name, size in mesh.axes)


def _check_world(size: int, shape: str) -> None:
    started = dist.get_world_size() if dist.is_initialized() else _world_of_torchrun()
    if started != size:
        raise PlanMismatchError(
            f"the plan is for {size} processes ({shape}), and there "
            f"{'is' if started == 1 else 'are'} {started}; start them with "
            f"`torchrun --nproc-per-node {size} ...`, or make a plan for {started}"
        )


def _world_of_torchrun() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device() -> torch.device:
    """This process's GPU, by torchrun's ``LOCAL_RANK``; the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def check_processes(processes: int, topology: str, *, measured_here: bool = False) -> None:
    """``measured_here``: so many have run here already, to measure this machine.

    Raises:
        PlanMismatchError: one process for each device of the plan is more than this machine takes.
    """
    gpus, cores = torch.cuda.device_count(), profiler.cores()
    if processes <= (gpus or cores * PROCESSES_OF_A_CORE) or (measured_here and not gpus):
        return
    here = f"{gpus} GPU{'s' * (gpus > 1)}" if gpus else f"{cores} core{'s' * (cores > 1)}, no GPU"
    raise PlanMismatchError(
        f"the plan is for {processes} processes on {topology}, and this machine has {here}; start "
        f"`torchrun ... -m autopar run` on all hosts of the cluster, or make a plan for this "
        f"machine with `--topology local --devices {min(processes, gpus or cores)}`"
    )


def torchrun(
    processes: int, module: str, arguments: Sequence[str], errors: IO[str] | None = None
) -> int:
    """Run ``python -m module arguments...`` in so many processes of this machine.

    ``errors`` takes their stderr instead of this process's.

    Returns:
        The exit code; torchrun's is 1 whatever the failing process's was.
    """
    command = [
        sys.executable,
        *("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
        *("--module", module, *arguments),
    ]
    # more threads than cores would have the processes wait for each other
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    return subprocess.run(command, check=False, env=environment, stderr=errors).returncode
