"""Stages of a chain on equal meshes, run by torch.distributed.pipelining instead of our runtime:
the same rows, the same loss and the same gradients."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as of_torch

from autopar.ir.graph import OperatorGraph
from autopar.ir.schedule import Action
from autopar.ir.sharding import Mesh, local_shape
from autopar.ir.strategy import Strategy
from autopar.runtime.launch import run_stages
from autopar.runtime.lowering import divisors
from autopar.runtime.pipeline import PipelineStep
from autopar.runtime.step import TrainingStep
from tests.helpers.cases import Case, case, divided, relative
from tests.helpers.pool import pool
from tests.helpers.stages import ALONE, PAIR, looped, strategy_of
from tests.helpers.zoo import zoo

MICROBATCHES = 4

TORCHS = {
    "gpipe": (of_torch.ScheduleGPipe, 1),
    "1f1b": (of_torch.Schedule1F1B, 1),
    "interleaved_1f1b": (of_torch.ScheduleInterleaved1F1B, 2),
    "looped_bfs": (of_torch.ScheduleLoopedBFS, 2),
}
"""Torch's class of each of our schedules that it has, and the stages of a group of devices. It has
no ZB-H1 and no Chimera."""


def chain_of(graph: OperatorGraph, stages: int) -> list[tuple[str, ...]]:
    """The operators in runs between which a single tensor with a gradient passes."""
    names = [o.name for o in graph.operators]
    places = {name: i for i, name in enumerate(names)}
    cuts = []
    for cut in range(1, len(names)):
        crossing = {
            tensor
            for o in graph.operators[:cut]
            for tensor in o.outputs
            if any(places[reader.name] >= cut for reader, _ in graph.consumers[tensor])
        }
        if len(crossing) == 1 and graph.by_name[next(iter(crossing))].differentiable:
            cuts.append(cut)
    chosen = [cuts[round((len(cuts) - 1) * k / stages)] for k in range(1, stages)]
    return [tuple(names[a:b]) for a, b in pairwise((0, *chosen, len(names)))]


class Lowered(nn.Module):
    """A stage's lowered program as a module: what arrives in, what departs or the loss out."""

    def __init__(self, pipeline: PipelineStep, number: int, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.stage: TrainingStep = pipeline.held[number]
        self.pipeline, self.inputs = pipeline, inputs
        plan = pipeline.plan
        self.part = plan.parts[number]
        self.given = [b for b in plan.boundaries if b.target == number]
        self.made = [b for b in plan.boundaries if b.source == number]
        execution = self.stage.execution
        execution.gradients.clear()
        execution.seed = pipeline.seed
        execution.divisors = divisors(self.stage.program, self.stage.state.buffers, inputs)

    def forward(self, *arrived: Tensor, microbatch: Tensor) -> Tensor:
        execution = self.stage.execution
        execution.microbatch = index = int(microbatch)
        given = dict(zip((b.tensor for b in self.given), arrived, strict=True))
        for name in self.part.graph.inputs:
            if name in self.inputs:
                given[name] = self.pipeline.batches.part(name, self.inputs[name], index)
        ends, _ = self.stage.program.run(execution, self.stage.state.buffers, given)
        (out,) = ends.values()
        return out if self.made else out.reshape(1)  # torch puts outputs of microbatches together

    def shapes(self) -> tuple[list[Tensor], list[Tensor]]:
        """Examples of what goes in and out."""
        mesh = self.part.mesh
        ins = [local_shape(b.spec.shape, b.arrives, mesh) for b in self.given]
        outs = [local_shape(b.spec.shape, b.departs, mesh) for b in self.made] or [(1,)]
        return [example(s) for s in ins], [example(s) for s in outs]


def example(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, requires_grad=True)


def by_torch(of: Case, strategy: Strategy) -> tuple[float, float, list[str], list[str]]:
    """On every rank: the largest differences in loss and gradients between torch's runtime and
    ours, and what each of them did."""
    model, inputs = zoo(of.name)
    ours = run_stages(divided(of.graph, strategy.microbatches), strategy, model)
    loss = ours.differentiate(*inputs) if isinstance(inputs, tuple) else None
    assert loss is not None
    expected = {n: dict(step.gradients) for n, step in ours.held.items()}
    did = [str(action) for action in ours.trace.actions]

    named = ours.batches.named(tuple(inputs), {})
    group = [dist.new_group(list(line)) for line in zip(*ours.plan.groups, strict=True)]
    count, recorded = len(ours.plan.parts), []
    stages = []
    for number in sorted(ours.held):
        module = Lowered(ours, number, named)
        ins, outs = module.shapes()
        stage: Any = PipelineStage(
            module,
            number,
            count,
            torch.device("cpu"),
            input_args=tuple(ins),
            output_args=tuple(outs),
            group=group[ours.place],
        )
        _record(stage, number, recorded)
        stages.append(stage)
    maker, chunks = TORCHS[strategy.schedule or ""]
    schedule: Any = maker(
        stages if chunks > 1 else stages[0],
        strategy.microbatches,
        loss_fn=lambda share, _: share.sum(),
        scale_grads=False,
    )
    numbers, losses = torch.arange(strategy.microbatches), []
    last = count - 1 in ours.held
    schedule.step(microbatch=numbers, **({"target": numbers, "losses": losses} if last else {}))
    differences = [0.0]
    for number, step in ours.held.items():
        step.gradients = {}
        step.reduce()
        assert step.gradients.keys() == expected[number].keys()
        differences += [
            relative(g, expected[number][name], 1e-6) for name, g in step.gradients.items()
        ]
    of_loss = relative(sum(losses), loss) if last else 0.0
    return of_loss, max(differences), recorded, did


def _record(stage: Any, number: int, recorded: list[str]) -> None:
    forward, backward = stage.forward_one_chunk, stage.backward_one_chunk

    def forward_one_chunk(chunk: int, *args: Any, **kwargs: Any) -> Any:
        recorded.append(str(Action(number, "F", chunk)))
        return forward(chunk, *args, **kwargs)

    def backward_one_chunk(chunk: int, *args: Any, **kwargs: Any) -> Any:
        recorded.append(str(Action(number, "B", chunk)))
        return backward(chunk, *args, **kwargs)

    stage.forward_one_chunk, stage.backward_one_chunk = forward_one_chunk, backward_one_chunk


FEW = {("1f1b", PAIR), ("interleaved_1f1b", PAIR)}


@pytest.mark.parametrize(
    ("schedule", "mesh"),
    [
        pytest.param(schedule, mesh, marks=() if (schedule, mesh) in FEW else pytest.mark.slow)
        for schedule in TORCHS
        for mesh in (ALONE, PAIR)
    ],
    ids=str,
)
def test_torchs_own_runtime_gives_the_same_rows_and_gradients(schedule: str, mesh: Mesh) -> None:
    of = divided(case("gpt").graph, MICROBATCHES)
    chunks = TORCHS[schedule][1]
    groups = 2 if chunks > 1 else 4 // mesh.size
    layout = looped(groups, mesh, chunks)
    operators = chain_of(of.graph, len(layout.meshes))
    strategy = strategy_of(of, operators, layout, schedule, zero=3 if mesh is PAIR else 0)
    for of_loss, of_gradients, torchs, ours in pool().run(
        layout.world, by_torch, case("gpt"), strategy
    ):
        assert of_loss < 1e-12
        assert of_gradients < 1e-9
        if (
            schedule == "looped_bfs"
        ):  # torch's goes back from the first microbatch, ours from the last
            forwards = [[a for a in did if "F" in a] for did in (torchs, ours)]
            assert forwards[0] == forwards[1]
            torchs, ours = sorted(torchs), sorted(ours)
        assert torchs == ours
