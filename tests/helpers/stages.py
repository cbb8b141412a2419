"""Strategies of several stages for tests, and what their processes find."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

import torch.distributed as dist

from autopar.ir.graph import Operator, OperatorGraph
from autopar.ir.rule import NOTHING, Split
from autopar.ir.sharding import Mesh, Sharding, shard
from autopar.ir.strategy import Stage, Storage, Strategy, Training
from autopar.runtime.launch import run_stages
from autopar.runtime.pipeline import Trace
from autopar.runtime.recorder import Executed
from autopar.runtime.verify_stages import one_recorder
from autopar.simulator.microbatches import Division
from tests.helpers.cases import STEPS, Case, Outcome, Run, call, compare, divided, one_process
from tests.helpers.strategies import random_split, random_storage
from tests.helpers.zoo import zoo

ALONE = Mesh((("data", 1),))
PAIR = Mesh((("data", 2),))
PLAIN = Training("sgd")


def in_order(graph: OperatorGraph, stages: int) -> list[tuple[str, ...]]:
    """The operators in as many runs of about equal length, wherever that cuts."""
    names = [o.name for o in graph.operators]
    ends = [round(len(names) * k / stages) for k in range(stages + 1)]
    return [tuple(names[a:b]) for a, b in pairwise(ends)]


def by(graph: OperatorGraph, stage_of: Callable[[Operator], int]) -> list[tuple[str, ...]]:
    numbers = [stage_of(o) for o in graph.operators]
    return [
        tuple(o.name for o, n in zip(graph.operators, numbers, strict=True) if n == stage)
        for stage in range(max(numbers) + 1)
    ]


@dataclass(frozen=True)
class Layout:
    """Where stages are: the devices and the mesh of each."""

    devices: tuple[tuple[int, ...], ...]
    meshes: tuple[Mesh, ...]

    @property
    def world(self) -> int:
        return len({device for of in self.devices for device in of})


def looped(groups: int, mesh: Mesh, chunks: int = 1) -> Layout:
    """Stage k on group k modulo ``groups``, on devices that follow each other."""
    size = mesh.size
    devices = [tuple(range(g * size, (g + 1) * size)) for g in range(groups)] * chunks
    return Layout(tuple(devices), (mesh,) * (groups * chunks))


def strategy_of(
    of: Division,
    operators: Sequence[tuple[str, ...]],
    layout: Layout,
    schedule: str,
    rng: Random | None = None,
    zero: int = 0,
    training: Training = PLAIN,
    divide: Callable[[Division, dict[str, Mesh], Random], dict[str, Split]] | None = None,
) -> Strategy:
    """``rng``: random splits, or those of ``divide``, and random storages. Else each microbatch is
    divided over the devices of a stage, with ZeRO of the level ``zero`` for the parameters that it
    can divide."""
    stages = [
        Stage(names, devices, mesh)
        for names, devices, mesh in zip(operators, layout.devices, layout.meshes, strict=True)
    ]
    mesh_of = {name: stage.mesh for stage in stages for name in stage.operators}
    divide = divide or _random_splits
    splits = divide(of, mesh_of, rng) if rng else _batch_splits(of, mesh_of)
    storage: dict[str, Storage] = {}
    for number, stage in enumerate(stages):
        own = {}
        for parameter in of.graph.parameters:
            name, shape = parameter.name, parameter.spec.shape
            uses = _uses_in(of, stage, splits, name)
            if not uses:
                continue
            if rng is None:
                kept = _zero(shape, stage.mesh, zero)
            else:
                kept = random_storage(shape, uses, stage.mesh, rng)
            if storage.setdefault(name, kept) != kept:
                own[name] = kept
        stages[number] = replace(stage, storage=own)
    return Strategy(tuple(stages), splits, storage, of.count, (), schedule, training)


def _uses_in(of: Division, stage: Stage, splits: dict[str, Split], name: str) -> list[Sharding]:
    return [
        of.rules[operator.name].shardings(splits[operator.name])[0][position]
        for operator, position in of.graph.consumers[name]
        if operator.name in stage.operators
    ]


def _random_splits(of: Division, mesh_of: dict[str, Mesh], rng: Random) -> dict[str, Split]:
    return {name: random_split(of.rules[name], mesh, rng) for name, mesh in mesh_of.items()}


def by_axis_name(of: Division, mesh_of: dict[str, Mesh], rng: Random) -> dict[str, Split]:
    """An axis ``data`` divides the batch; an axis ``tensor`` any other factor, if there is one that
    it can divide: heads, columns, rows, channels, the vocabulary, the sequence."""
    batch = divided(of.whole, 2).choices
    found = {}
    for name, mesh in mesh_of.items():
        bound, split = of.rules[name], []
        for axis in mesh.names:
            if axis == "data":
                split.append(batch[name])
                continue
            others = [f for f in bound.factors if f != batch[name]]
            rng.shuffle(others)
            rest = (NOTHING,) * (len(mesh.axes) - len(split) - 1)
            fitting = (f for f in others if bound.divides((*split, f, *rest), mesh))
            split.append(next(fitting, NOTHING))
        found[name] = tuple(split)
    return found


def _batch_splits(of: Division, mesh_of: dict[str, Mesh]) -> dict[str, Split]:
    choices = None
    splits: dict[str, Split] = {}
    for name, mesh in mesh_of.items():
        if mesh.size == 1:
            splits[name] = (NOTHING,) * len(mesh.axes)
        else:
            choices = choices or divided(of.whole, 2).choices
            splits[name] = (choices[name],) * len(mesh.axes)
    return splits


def _zero(shape: tuple[int, ...], mesh: Mesh, level: int) -> Storage:
    whole = ("I",) * len(mesh.axes)
    if not shape or shape[0] % mesh.size:
        return Storage(whole, whole, whole)
    pieces = (shard(0),) * len(mesh.axes)
    parameter, gradient, optimizer = (pieces if level >= least else whole for least in (3, 2, 1))
    return Storage(parameter, gradient, optimizer)


@dataclass(frozen=True)
class Found:
    """What one process found; on rank 0 with the differences from one process."""

    row: int
    trace: Trace
    executed: dict[Executed, int]
    outcome: Outcome | None = None


def pipeline_outcome(of: Case, strategy: Strategy) -> Found:
    """On every rank: three steps; on rank 0, compared with one process."""
    model, inputs = zoo(of.name, dropout=of.dropout)
    step = run_stages(divided(of.graph, strategy.microbatches), strategy, model)
    with one_recorder(step).recording() as executed:
        loss = call(step, inputs)
    trace = step.trace
    gradients = step.full_gradients()
    for _ in range(STEPS - 1):
        call(step, inputs)
    parameters = step.full_parameters()
    found = Found(step.row, trace, dict(executed))
    if dist.get_rank() != 0:
        return found
    training = strategy.training
    expected = one_process(of.name, training.optimizer, training.clip_norm)
    outcome = compare(Run(loss, gradients, parameters, {}), expected, {})
    return replace(found, outcome=outcome)
