"""A training step in stages: each process executes the row of its group of devices."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge

from autopar.ir.schedule import Action
from autopar.ir.sharding import local_shape
from autopar.runtime.batches import Batches
from autopar.runtime.lowering import PartedBackward, divisors
from autopar.runtime.step import TrainingStep
from autopar.simulator.row_memory import MOST_UNDER_WAY
from autopar.simulator.stages import Boundary, Message, Move, Pipelined


@dataclass
class Trace:
    """What this process did in the last step.

    ``actions``: of its row, in the order in which they were done. ``sent_bytes``: what it sent, by
    (row, row). ``exchanged_bytes``: gradients that it summed with other processes which hold the
    same parameters. ``most_in_flight``: microbatches whose activations it kept at once.
    """

    actions: list[Action] = field(default_factory=list)
    sent_bytes: Counter[tuple[int, int]] = field(default_factory=Counter)
    exchanged_bytes: int = 0
    most_in_flight: int = 0


@dataclass
class PipelineStep:
    """``loss = step(inputs...)``: one optimizer step on one *global* batch, in stages.

    Called as ``TrainingStep`` is: by every process, with the same batch. ``held``: the stages of
    this process's row. ``exchange``: for parameters that several stages, or copies of a stage,
    hold, how to sum a gradient over those of them that have the same piece.
    """

    plan: Pipelined
    rank: int
    held: dict[int, TrainingStep]
    batches: Batches
    exchange: dict[str, Callable[[Tensor], Tensor]]
    seed: int = 0

    def __post_init__(self) -> None:
        self.row = next(r for r, group in enumerate(self.plan.groups) if self.rank in group)
        self.place = self.plan.groups[self.row].index(self.rank)
        self.instructions = self.plan.instructions(self.row)
        self.steps_done = 0
        self.trace = Trace()
        self._graph = self.batches.division.graph
        self._device = self.batches.device

    # ---- the step ------------------------------------------------------------------------------

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        loss = self.differentiate(*args, **kwargs)
        self.update()
        return loss

    def differentiate(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """All forwards and backwards; leaves the reduced gradients in those of the stages."""
        inputs = self.batches.named(args, kwargs)
        self.trace = Trace()
        post = _Post(self.plan, self.rank, self.place, self._device, self.trace)
        stages = {
            number: _Stage(self.plan, number, step, self.batches, inputs, self.seed)
            for number, step in self.held.items()
        }
        for instruction in self.instructions:
            if isinstance(instruction, Move):
                self._move(instruction, stages, post)
                continue
            stages[instruction.stage].do(instruction)
            self.trace.actions.append(instruction)
            in_flight = sum(len(stage.kept) for stage in stages.values())
            self.trace.most_in_flight = max(self.trace.most_in_flight, in_flight)
        post.finish()
        for stage in stages.values():
            stage.finish()
        self._exchange()
        return self._total_loss(stages.values())

    def update(self) -> None:
        """Clip by the norm of all stages' gradients, and step each stage's optimizer."""
        norm = self._norm()
        for action in self.plan.updates(self.row):
            self.held[action.stage].update(norm)
            self.trace.actions.append(action)
        self.steps_done += 1

    def _move(self, move: Move, stages: dict[int, _Stage], post: _Post) -> None:
        boundary, key = move.boundary, (move.boundary, move.microbatch)
        ends = boundary.source, boundary.target
        source, target = reversed(ends) if move.backward else ends
        tensor = None
        if move.source_row == self.row:
            given = stages[source].gradients if move.backward else stages[source].made
            tensor = given.pop(key)
            post.send(move, tensor)
        if move.target_row == self.row:
            taken = stages[target].arriving_gradients if move.backward else stages[target].arriving
            taken[key] = post.receive(move, tensor)

    # ---- between stages, at the end ------------------------------------------------------------

    def _exchange(self) -> None:
        with torch.no_grad():
            for name, sum_up in self.exchange.items():
                mine = [s for s, row in self.plan.holders[name] if row == self.row]
                if not mine:
                    continue
                steps = [self.held[stage] for stage in mine]
                total = sum(
                    (step.gradients[name] for step in steps if name in step.gradients),
                    start=torch.zeros_like(steps[0].piece(name)),
                )
                summed = sum_up(total)
                if summed is not total:
                    self.trace.exchanged_bytes += total.numel() * total.element_size()
                for step in steps:
                    step.gradients[name] = summed

    def _total_loss(self, stages: Iterable[_Stage]) -> Tensor:
        dtype = getattr(torch, self._graph.spec(self._graph.loss).dtype)
        total = torch.zeros((), dtype=dtype, device=self._device)
        for stage in stages:
            if stage.loss is not None and self.place == 0:
                total += stage.loss
        dist.all_reduce(total)
        return total

    def _norm(self) -> Tensor | None:
        """The 2-norm of all gradients, of which every parameter counts once."""
        if self.plan.strategy.training.clip_norm is None:
            return None
        wide = any(p.spec.dtype == "float64" for p in self._graph.parameters)
        dtype = torch.float64 if wide else torch.float32
        total = torch.zeros((), dtype=dtype, device=self._device)
        for stage, step in self.held.items():
            own = [n for n in step.gradients if self.plan.holders[n][0] == (stage, self.row)]
            axes = tuple(range(len(step.program.mesh.axes)))
            with torch.no_grad():
                total += step.squares(own, axes, dtype, self._device)
        dist.all_reduce(total)
        return total.sqrt()

    # ---- for looking at ------------------------------------------------------------------------

    def full_parameters(self) -> dict[str, Tensor]:
        """Whole parameters; all processes call it together."""
        return self._gathered(TrainingStep.full_parameters)

    def full_gradients(self) -> dict[str, Tensor]:
        """Whole gradients of the last step, before clipping; all processes call it together."""
        return self._gathered(TrainingStep.full_gradients)

    def _gathered(self, of_stage: Callable[[TrainingStep], dict[str, Tensor]]) -> dict[str, Tensor]:
        own: dict[str, Tensor] = {}
        for stage, step in self.held.items():
            values = of_stage(step)  # the whole row takes part
            if self.place == 0:
                own.update(
                    {
                        name: value.cpu()
                        for name, value in values.items()
                        if self.plan.holders[name][0] == (stage, self.row)
                    }
                )
        everywhere: list[dict[str, Tensor]] = [{} for _ in range(self.plan.world_size)]
        dist.all_gather_object(everywhere, own)
        return {name: value for part in everywhere for name, value in part.items()}


@dataclass
class _Kept:
    """Of one microbatch, between its forward and its last backward."""

    leaves: dict[Boundary, Tensor]
    ends: dict[str, Tensor]
    parted: PartedBackward | None


_Product = tuple[list[GradientEdge], list[Tensor], list[GradientEdge]]
"""Outputs of an operator with their gradients, and its parameters."""

_Key = tuple[Boundary, int]
"""What goes over a boundary for a microbatch."""


class _Stage:
    """One stage of this process's row, during a step.

    ``made`` and ``gradients``: what waits to be sent; ``arriving`` and ``arriving_gradients``: what
    was asked for.
    """

    def __init__(
        self,
        plan: Pipelined,
        number: int,
        step: TrainingStep,
        batches: Batches,
        inputs: dict[str, Tensor],
        seed: int,
    ) -> None:
        self.step, self.batches, self.inputs = step, batches, inputs
        self.part = plan.parts[number]
        self.sources = [b for b in plan.boundaries if b.target == number]
        self.targets = [b for b in plan.boundaries if b.source == number]
        self.execution = step.execution
        self.execution.gradients.clear()
        self.execution.seed = seed + step.steps_done
        self.execution.divisors = divisors(step.program, step.state.buffers, inputs)
        self.kept: dict[int, _Kept] = {}
        self.weights: dict[int, list[_Product]] = {}
        self.made: dict[_Key, Tensor] = {}
        self.gradients: dict[_Key, Tensor] = {}
        self.arriving: dict[_Key, Callable[[], Tensor]] = {}
        self.arriving_gradients: dict[_Key, Callable[[], Tensor]] = {}
        self.mutated: dict[str, Tensor] = {}
        self.loss: Tensor | None = None
        self.parted = number in plan.parted
        step.gradients = {}

    def do(self, action: Action) -> None:
        _DOES[action.kind](self, action.microbatch)

    def forward(self, microbatch: int) -> None:
        leaves = {}
        given = {}
        for boundary in self.sources:
            tensor = self.arriving.pop((boundary, microbatch))()
            leaves[boundary] = tensor.requires_grad_(boundary.gradient)
            given[boundary.tensor] = tensor
        for name in self.part.graph.inputs:
            if name in self.inputs:
                given[name] = self.batches.part(name, self.inputs[name], microbatch)
        self.execution.microbatch = microbatch
        self.execution.parted = PartedBackward() if self.parted else None
        with self.step.communicator.recorder.during("forward"):
            ends, self.mutated = self.step.program.run(
                self.execution, self.step.state.buffers, given
            )
        self.kept[microbatch] = _Kept(leaves, ends, self.execution.parted)
        self.execution.parted = None
        for boundary in self.targets:
            self.made[boundary, microbatch] = ends[boundary.tensor].detach()
        if self.part.graph.loss:
            loss = ends[self.part.graph.loss].detach()
            self.loss = loss if self.loss is None else self.loss + loss

    def backward(self, microbatch: int) -> None:
        kept = self.kept.pop(microbatch)
        roots, gradients = self._roots(kept, microbatch)
        with self.step.communicator.recorder.during("backward"):
            if roots:
                torch.autograd.backward(roots, gradients)
        self._give_back(
            microbatch, {boundary: leaf.grad for boundary, leaf in kept.leaves.items()}, kept
        )

    def input_gradient(self, microbatch: int) -> None:
        """Back to what arrived, and to what operators with parameters made; not yet into these."""
        kept = self.kept[microbatch]
        assert kept.parted is not None
        roots, gradients = self._roots(kept, microbatch)
        leaves = {b: leaf for b, leaf in kept.leaves.items() if b.gradient}
        outputs = [made for of in kept.parted.outputs.values() for made in of]
        wanted: list[Any] = [*leaves.values(), *outputs]
        with self.step.communicator.recorder.during("backward"):
            found = (
                torch.autograd.grad(roots, wanted, gradients, retain_graph=True, allow_unused=True)
                if roots and wanted
                else (None,) * len(wanted)
            )
        self._give_back(microbatch, dict(zip(leaves, found, strict=False)), kept)
        arrived = iter(found[len(leaves) :])
        work: list[_Product] = []
        for operator, made in kept.parted.outputs.items():
            pairs = [(edge, g) for edge in made if (g := next(arrived)) is not None]
            if pairs:
                edges, its_gradients = [edge for edge, _ in pairs], [g for _, g in pairs]
                work.append((edges, its_gradients, kept.parted.aliases[operator]))
        self.weights[microbatch] = work

    def weight_gradient(self, microbatch: int) -> None:
        del self.kept[microbatch]
        uses: list[GradientEdge] = []
        gradients: list[Tensor] = []
        with self.step.communicator.recorder.during("backward"):
            for made, given, aliases in self.weights.pop(microbatch):
                found = torch.autograd.grad(made, aliases, given, allow_unused=True)
                for alias, gradient in zip(aliases, found, strict=True):
                    if gradient is not None:
                        uses.append(alias)
                        gradients.append(gradient)
            if uses:
                torch.autograd.backward(uses, gradients)

    def _roots(self, kept: _Kept, microbatch: int) -> tuple[list[Tensor], list[Tensor | None]]:
        """Where the backward begins, with the gradients that came back: of a tensor that several
        stages read, their sum."""
        arrived: dict[str, Tensor | None] = {}
        if self.part.graph.loss and kept.ends[self.part.graph.loss].requires_grad:
            arrived[self.part.graph.loss] = None
        for boundary in self.targets:
            if boundary.gradient:
                gradient = self.arriving_gradients.pop((boundary, microbatch))()
                before = arrived.get(boundary.tensor)
                arrived[boundary.tensor] = gradient if before is None else before + gradient
        return [kept.ends[name] for name in arrived], list(arrived.values())

    def _give_back(
        self, microbatch: int, found: dict[Boundary, Tensor | None], kept: _Kept
    ) -> None:
        for boundary, leaf in kept.leaves.items():
            if boundary.gradient:
                gradient = found[boundary]
                self.gradients[boundary, microbatch] = (
                    torch.zeros_like(leaf) if gradient is None else gradient
                )

    def finish(self) -> None:
        """After the last backward: buffers take their new values, gradients go to their places."""
        with torch.no_grad():
            for name, value in self.mutated.items():  # the same in all microbatches
                self.step.state.buffers[name].copy_(value)
        self.step.reduce()


_DOES: dict[str, Callable[[_Stage, int], None]] = {
    "F": _Stage.forward,
    "B": _Stage.backward,
    "I": _Stage.input_gradient,
    "W": _Stage.weight_gradient,
}


class _Post:
    """Sends and receives what goes over boundaries, piece by piece.

    Every message is posted where it stands in the instructions, without waiting; so those between
    two processes match in their order, and tags are not needed.
    """

    def __init__(
        self, plan: Pipelined, rank: int, place: int, device: torch.device, trace: Trace
    ) -> None:
        self.plan, self.rank, self.place = plan, rank, place
        self.device, self.trace = device, trace
        self.answered: dict[_Key, list[tuple[dist.Work, Tensor]]] = {}
        self.unanswered: dict[tuple[Boundary, bool], deque[list[tuple[dist.Work, Tensor]]]] = (
            defaultdict(deque)
        )

    def send(self, move: Move, tensor: Tensor) -> None:
        """``tensor``: what this process has of it."""
        group, sent = self.plan.groups[move.target_row], []
        for message in self._messages(move):
            receiver = group[message.receiver]
            if message.sender == self.place and receiver != self.rank:
                piece = _box(tensor, message.taken).contiguous()
                work = dist.isend(piece, receiver)
                assert work is not None
                sent.append((work, piece))
                rows = move.source_row, move.target_row
                self.trace.sent_bytes[rows] += piece.numel() * piece.element_size()
        if not sent:
            return
        if move.boundary.gradient and not move.backward:
            self.answered[move.boundary, move.microbatch] = sent
            return
        under_way = self.unanswered[move.boundary, move.backward]
        under_way.append(sent)
        if len(under_way) > MOST_UNDER_WAY:
            _wait(under_way.popleft())

    def receive(self, move: Move, own: Tensor | None) -> Callable[[], Tensor]:
        """A function that waits for it. ``own``: what this process has of what is sent."""
        boundary = move.boundary
        number, sharding = (
            (boundary.source, boundary.departs)
            if move.backward
            else (boundary.target, boundary.arrives)
        )
        shape = local_shape(boundary.spec.shape, sharding, self.plan.parts[number].mesh)
        dtype = getattr(torch, boundary.spec.dtype)
        group = self.plan.groups[move.source_row]
        pieces: list[tuple[dist.Work | None, Tensor, Message]] = []
        for message in self._messages(move):
            if message.receiver != self.place:
                continue
            sender = group[message.sender]
            if sender == self.rank:
                assert own is not None
                pieces.append((None, _box(own, message.taken), message))
                continue
            size = [stop - start for start, stop in message.put]
            piece = torch.empty(size, dtype=dtype, device=self.device)
            pieces.append((dist.irecv(piece, sender), piece, message))

        def arrived() -> Tensor:
            if move.backward:
                _wait(self.answered.pop((boundary, move.microbatch), ()))
            for work, _, _ in pieces:
                if work is not None:
                    work.wait()
            if len(pieces) == 1 and tuple(pieces[0][1].shape) == shape:
                return pieces[0][1].detach()
            whole = torch.empty(shape, dtype=dtype, device=self.device)
            for _, piece, message in pieces:
                _box(whole, message.put).copy_(piece)
            return whole

        return arrived

    def finish(self) -> None:
        """Wait until all that was sent has arrived."""
        for sent in self.answered.values():
            _wait(sent)
        for under_way in self.unanswered.values():
            for sent in under_way:
                _wait(sent)

    def _messages(self, move: Move) -> tuple[Message, ...]:
        together = move.source_row == move.target_row
        return self.plan.messages(move.boundary, move.backward, together)


def _box(tensor: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    for dim, (start, stop) in enumerate(ranges):
        tensor = tensor.narrow(dim, start, stop - start)
    return tensor


def _wait(sent: Iterable[tuple[dist.Work, Tensor]]) -> None:
    for work, _ in sent:
        work.wait()


__all__ = ["PipelineStep", "Trace"]
