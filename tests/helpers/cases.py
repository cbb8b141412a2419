"""What a gloo process of ``pool`` does: run a strategy, and compare it with one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopar.ir.graph import OperatorGraph
from autopar.ir.sharding import Mesh
from autopar.ir.strategy import Strategy
from autopar.runtime.collectives import Communicator, connect
from autopar.runtime.lowering import lower
from autopar.runtime.recorder import Executed
from autopar.runtime.step import OPTIMIZERS, TrainingStep
from autopar.runtime.storage import from_module
from autopar.simulator.edges import Rules
from tests.helpers.zoo import Inputs, zoo

STEPS = 3


@dataclass(frozen=True)
class Differences:
    """Largest relative differences between a strategy and one process, and what it executed in the
    first step."""

    loss: float
    gradient: float
    worst_gradient: str
    parameter: float
    executed: dict[Executed, int]


@lru_cache(maxsize=None)
def traced(name: str, dropout: float = 0.0) -> tuple[OperatorGraph, Rules]:
    from autopar.extractor import extract
    from autopar.ops import bound_rules

    model, inputs = zoo(name, dropout=dropout)
    graph = extract(model, inputs, name=name)
    return graph, bound_rules(graph)


@dataclass(frozen=True)
class Reference:
    """Three steps of the original module on one process."""

    loss: Tensor
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]


@lru_cache(maxsize=None)
def reference(name: str, optimizer: str, clip_norm: float | None) -> Reference:
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
    return Reference(*first, values, dict(model.named_buffers(remove_duplicate=False)))


def loss_of(model: nn.Module, inputs: Inputs) -> Tensor:
    found = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    loss: Tensor = getattr(found, "loss", found)
    return loss


def differences(name: str, strategy: Strategy) -> Differences:
    """On every rank: run the strategy for three steps and compare with one process."""
    step, inputs = training_step(name, strategy)
    expected = reference(name, strategy.training.optimizer, strategy.training.clip_norm)
    recorder = step.communicator.recorder
    with recorder.recording() as executed:
        loss = _call(step, inputs)
    gradients = step.full_gradients()
    for _ in range(STEPS - 1):
        _call(step, inputs)
    parameters = step.full_parameters()
    trained = {n: expected.parameters[n] for n in parameters}
    worst = max(expected.gradients, key=lambda n: relative(gradients[n], expected.gradients[n]))
    for buffer, _ in step.graph.mutations:
        assert relative(step.state.buffers[buffer], expected.buffers[buffer]) < 1e-9, buffer
    return Differences(
        relative(loss, expected.loss),
        relative(gradients[worst], expected.gradients[worst]),
        worst,
        max(relative(parameters[n], trained[n]) for n in trained),
        dict(executed),
    )


def many(name: str, strategies: list[Strategy]) -> list[Differences]:
    return [differences(name, strategy) for strategy in strategies]


def training_step(
    name: str, strategy: Strategy, dropout: float = 0.0
) -> tuple[TrainingStep, Inputs]:
    graph, rules = traced(name, dropout)
    model, inputs = zoo(name, dropout=dropout)
    communicator = communicator_of(strategy.mesh)
    program = lower(graph, strategy, rules)
    state = from_module(model, graph, strategy, communicator.rank, torch.device("cpu"))
    return TrainingStep(program, strategy, state, communicator), inputs


_communicators: dict[tuple[Any, Mesh], Communicator] = {}


def communicator_of(mesh: Mesh) -> Communicator:
    """One for each world and mesh: process groups are dear."""
    key = dist.group.WORLD, mesh
    if key not in _communicators:
        _communicators[key] = connect(mesh, "cpu")
    return _communicators[key]


def _call(step: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    return step(**inputs) if isinstance(inputs, dict) else step(*inputs)


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    scale = max(float(expected.abs().max()), 1e-12) if expected.numel() else 1.0
    return float((found.double() - expected.double()).abs().max()) / scale
