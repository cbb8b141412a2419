"""What a gloo process of ``pool`` does: run a strategy, and compare it with one process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopar.extractor import extract
from autopar.ir.graph import OperatorGraph
from autopar.ir.sharding import Mesh
from autopar.ir.strategy import Strategy
from autopar.runtime.collectives import Communicator, connect
from autopar.runtime.lowering import lower_microbatch
from autopar.runtime.recorder import Executed
from autopar.runtime.step import OPTIMIZERS, TrainingStep
from autopar.runtime.storage import from_module
from autopar.simulator.microbatches import Division, division
from autopar.simulator.promise import promise
from tests.helpers.zoo import Inputs, zoo

STEPS = 3


@dataclass(frozen=True)
class Case:
    """A zoo model and its graph, traced once and sent to the processes."""

    name: str
    graph: OperatorGraph
    dropout: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """Largest relative differences between a strategy and one process, and what it executed in the
    first step."""

    loss: float
    gradient: float
    worst_gradient: str
    parameter: float
    executed: dict[Executed, int]


@lru_cache(maxsize=None)
def case(name: str, dropout: float = 0.0) -> Case:
    model, inputs = zoo(name, dropout=dropout)
    return Case(name, extract(model, inputs, name=name), dropout)


@lru_cache(maxsize=None)
def divided(of: OperatorGraph, count: int) -> Division:
    return division(of, count)


def promised(of: Division, strategy: Strategy) -> Counter[Executed]:
    """Collectives of a step."""
    counts: Counter[Executed] = Counter()
    for one in promise(of.graph, of.rules, strategy):
        counts[Executed(one.kind, one.phase, one.axis, one.bytes)] += one.count
    return counts


@dataclass(frozen=True)
class Run:
    """The first loss and gradients of three steps, and what they led to."""

    loss: Tensor
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]


@lru_cache(maxsize=None)
def one_process(name: str, optimizer: str, clip_norm: float | None) -> Run:
    """Three steps of the original module."""
    model, inputs = zoo(name)
    maker, hyperparameters = OPTIMIZERS[optimizer]
    trainable = [p for p in model.parameters() if p.requires_grad]
    updates = maker(trainable, **hyperparameters)
    first: tuple[Tensor, dict[str, Tensor]] | None = None
    for _ in range(STEPS):
        loss = loss_of(model, inputs)
        updates.zero_grad()
        loss.backward()
        first = first or (
            loss.detach().clone(),
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
        )
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(trainable, clip_norm)
        updates.step()
    assert first is not None
    values = {n: p.detach() for n, p in model.named_parameters()}
    return Run(*first, values, dict(model.named_buffers(remove_duplicate=False)))


def loss_of(model: nn.Module, inputs: Inputs) -> Tensor:
    found = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    loss: Tensor = getattr(found, "loss", found)
    return loss


def outcome(case: Case, strategy: Strategy) -> Outcome | None:
    """On every rank: three steps of the strategy; on rank 0, compared with one process."""
    step, inputs = training_step(case, strategy)
    found, executed = run(step, inputs)
    if dist.get_rank() != 0:
        return None
    training = strategy.training
    expected = one_process(case.name, training.optimizer, training.clip_norm)
    return compare(found, expected, executed)


def run(step: TrainingStep, inputs: Inputs) -> tuple[Run, dict[Executed, int]]:
    with step.communicator.recorder.recording() as executed:
        loss = call(step, inputs)
    gradients = step.full_gradients()
    for _ in range(STEPS - 1):
        call(step, inputs)
    buffers = {name: step.state.buffers[name] for name, _ in step.graph.mutations}
    return Run(loss, gradients, step.full_parameters(), buffers), dict(executed)


def training_step(case: Case, strategy: Strategy) -> tuple[TrainingStep, Inputs]:
    model, inputs = zoo(case.name, dropout=case.dropout)
    communicator = communicator_of(strategy.mesh)
    program = lower_microbatch(divided(case.graph, strategy.microbatches), strategy)
    state = from_module(model, case.graph, strategy, communicator.rank, torch.device("cpu"))
    return TrainingStep(program, strategy, state, communicator), inputs


_communicators: dict[tuple[Any, Mesh], Communicator] = {}


def communicator_of(mesh: Mesh) -> Communicator:
    """One for each world and mesh: process groups are dear."""
    key = dist.group.WORLD, mesh
    if key not in _communicators:
        _communicators[key] = connect(mesh, "cpu")
    return _communicators[key]


def call(step: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    return step(**inputs) if isinstance(inputs, dict) else step(*inputs)


def compare(found: Run, expected: Run, executed: dict[Executed, int]) -> Outcome:
    """A gradient that is zero but for rounding (the bias of attention's keys, which softmax
    cancels) is measured against a millionth of the model's largest; the steps that Adam makes of
    such rounding, against the same of the largest parameter."""
    assert found.gradients.keys() == expected.gradients.keys()
    gradients = _errors(found.gradients, expected.gradients, 1e-6)
    parameters = _errors(found.parameters, expected.parameters, 1e-3)
    buffers = _errors(found.buffers, expected.buffers, 1e-3)
    worst = max(gradients, key=lambda name: gradients[name])
    return Outcome(
        relative(found.loss, expected.loss),
        gradients[worst],
        worst,
        max([*parameters.values(), *buffers.values()]),
        executed,
    )


def _errors(
    found: dict[str, Tensor], expected: dict[str, Tensor], share: float
) -> dict[str, float]:
    least = share * max((float(expected[n].abs().max()) for n in found), default=0.0)
    return {name: relative(found[name], expected[name], least) for name in found}


def relative(found: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """Largest difference over the largest value."""
    scale = max(float(expected.abs().max()), least, 1e-300)
    return float((found.double() - expected.double()).abs().max()) / scale
