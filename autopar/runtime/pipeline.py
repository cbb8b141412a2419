"""A training step in stages: each process executes the row of its group of devices."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.ir.schedule import Action, Kind
from autopar.ir.sharding import local_shape
from autopar.runtime.batches import Batches
from autopar.runtime.lowering import PartedBackward, divisors
from autopar.runtime.peers import Peers
from autopar.runtime.pieces import box
from autopar.runtime.shared_gradients import Groups, SharedGradients
from autopar.runtime.step import TrainingStep
from autopar.runtime.two_parts import Product, input_part, weight_part
from autopar.simulator.messages import Message
from autopar.simulator.row_memory import MOST_UNDER_WAY
from autopar.simulator.stages import Boundary, Move, Pipelined


@dataclass
class Trace:
    """What this process did in the last step.

    ``actions``: of its row, in the order in which they were done. ``sent_bytes``: what it sent, by
    (row, row). ``exchanged_bytes``: gradients that it all-reduced with processes which have the
    same pieces of the same parameters. ``most_in_flight``: microbatches whose activations it kept
    at once.
    """

    actions: list[Action] = field(default_factory=list)
    sent_bytes: Counter[tuple[int, int]] = field(default_factory=Counter)
    exchanged_bytes: int = 0
    most_in_flight: int = 0


@dataclass
class PipelineStep:
    """``loss = step(inputs...)``: one optimizer step on one *global* batch, in stages.

    Called as ``TrainingStep`` is: by every process, with the same batch. ``held``: the stages of
    this process's row. ``groups``: for gradients of which several rows have the same piece.
    """

    plan: Pipelined
    rank: int
    held: dict[int, TrainingStep]
    batches: Batches
    groups: Groups
    seed: int = 0
    peers: Peers = field(default_factory=Peers)

    def __post_init__(self) -> None:
        self.row = self.plan.row_of(self.rank)
        self.place = self.plan.groups[self.row].index(self.rank)
        self.instructions: Iterable[Action | Move] = self.plan.instructions(self.row)
        self._actions = frozenset(self.plan.rows[self.row])
        self.steps_done = 0
        self.trace = Trace()
        self._under_way: _Post | None = None
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
        # kept if this fails: messages that are under way have their tensors in it
        post = self._under_way = _Post(
            self.plan, self.rank, self.place, self._device, self.trace, self.peers
        )
        stages = {
            number: _Stage(self.plan, number, step, self.batches, inputs, self.seed)
            for number, step in self.held.items()
        }
        for instruction in self.instructions:
            if isinstance(instruction, Move):
                with self._doing(self._place_of(instruction), self._everybody):
                    self._move(instruction, stages, post)
                continue
            with self._doing_action(instruction):
                stages[instruction.stage].do(instruction)
            self.trace.actions.append(instruction)
            in_flight = sum(len(stage.kept) for stage in stages.values())
            self.trace.most_in_flight = max(self.trace.most_in_flight, in_flight)
        with self._doing("the last transfers", self._everybody):
            post.finish()
        self._under_way = None
        for number, stage in stages.items():
            with self._doing(f"the gradients of stage {number}", self._in_row):
                stage.finish()
        sums = SharedGradients(self.plan, self.rank, self.groups, self.held, self.peers)
        sums.exchange(self.steps_done)
        self.trace.exchanged_bytes = sums.summed_bytes
        self.trace.sent_bytes.update(sums.sent_bytes)
        with self._doing("the sum of the loss", self._everybody):
            return self._total_loss(stages.values())

    def update(self) -> None:
        """Clip by the norm of all stages' gradients, and step each stage's optimizer."""
        with self._doing("the norm of all gradients", self._everybody):
            norm = self._norm()
        for action in self.plan.updates(self.row):
            with self._doing_action(action):
                self.held[action.stage].update(norm)
            self.trace.actions.append(action)
        self.steps_done += 1

    def _doing(self, what: str, ranks: Callable[[], Sequence[int]]) -> AbstractContextManager[None]:
        return self.peers.doing(f"{what}, step {self.steps_done}", ranks)

    def _place_of(self, move: Move) -> str:
        """In the words of actions: before the one that reads it, or after the one that made it."""
        ends = move.boundary.source, move.boundary.target
        source, target = reversed(ends) if move.backward else ends
        when, stage = ("before", target) if move.target_row == self.row else ("after", source)
        kind: Kind = "F"
        if move.backward:
            parted = Action(stage, "I", move.microbatch)
            kind = "I" if parted in self._actions else "B"
        return f"{when} {Action(stage, kind, move.microbatch)} (stage {stage})"

    def _doing_action(self, action: Action) -> AbstractContextManager[None]:
        what = f"{action} (stage {action.stage}), step {self.steps_done}"
        return self.peers.doing(what, self._in_row)

    def _in_row(self) -> Sequence[int]:
        return self.plan.groups[self.row]

    def _everybody(self) -> Sequence[int]:
        return range(self.plan.world_size)

    def _move(self, move: Move, stages: dict[int, _Stage], post: _Post) -> None:
        boundary, key = move.boundary, (move.boundary, move.microbatch)
        ends = boundary.source, boundary.target
        source, target = reversed(ends) if move.backward else ends
        own = None
        if move.source_row == self.row:
            given = stages[source].gradients if move.backward else stages[source].made
            own = given.pop(key)
        arrived = post.move(move, own)
        if move.target_row == self.row:
            taken = stages[target].arriving_gradients if move.backward else stages[target].arriving
            taken[key] = arrived

    # ---- between stages, at the end ------------------------------------------------------------

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
    """Of one microbatch, between its forward and its last backward. ``came_back``: the gradients of
    what arrived, after a whole backward."""

    leaves: dict[Boundary, Tensor]
    ends: dict[str, Tensor]
    parted: PartedBackward | None
    came_back: dict[Boundary, Tensor]


class _Arrive(torch.autograd.Function):
    """What arrived, whose gradient is taken as it comes: ``.grad`` would be a copy of it where it
    is used elsewhere, too, or has other strides. Autograd takes part for the ``anchor``'s sake."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, tensor: Tensor, taken: dict[Boundary, Tensor], boundary: Boundary
    ) -> Tensor:
        ctx.taken, ctx.boundary = taken, boundary
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None]:
        ctx.taken[ctx.boundary] = gradient
        return None, None, None, None


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
        self.weights: dict[int, list[Product]] = {}
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
        came_back: dict[Boundary, Tensor] = {}
        for boundary in self.sources:
            tensor = self.arriving.pop((boundary, microbatch))()
            if boundary.gradient:
                anchor = torch.empty(0, requires_grad=True)
                tensor = _Arrive.apply(anchor, tensor, came_back, boundary)  # type: ignore[no-untyped-call]
            leaves[boundary] = tensor
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
        self.kept[microbatch] = _Kept(leaves, ends, self.execution.parted, came_back)
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
        self._give_back(microbatch, kept.came_back, kept)

    def input_gradient(self, microbatch: int) -> None:
        """Back to what arrived, and to what operators with parameters made; not yet into these."""
        kept = self.kept[microbatch]
        assert kept.parted is not None
        roots, gradients = self._roots(kept, microbatch)
        leaves = {b: leaf for b, leaf in kept.leaves.items() if b.gradient}
        with self.step.communicator.recorder.during("backward"):
            found, self.weights[microbatch] = input_part(
                kept.parted, roots, gradients, list(leaves.values())
            )
        self._give_back(microbatch, dict(zip(leaves, found, strict=True)), kept)

    def weight_gradient(self, microbatch: int) -> None:
        del self.kept[microbatch]
        with self.step.communicator.recorder.during("backward"):
            weight_part(self.weights.pop(microbatch))

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
        self, microbatch: int, found: Mapping[Boundary, Tensor | None], kept: _Kept
    ) -> None:
        for boundary, leaf in kept.leaves.items():
            if boundary.gradient:
                gradient = found.get(boundary)
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


class _Sent(NamedTuple):
    """A message under way, and the tensor that must stay until it has arrived."""

    work: dist.Work
    piece: Tensor
    receiver: int
    what: str


class _Asked(NamedTuple):
    """A message that was asked for; without ``work`` it is this process's own."""

    work: dist.Work | None
    piece: Tensor
    sender: int
    message: Message


class _Post:
    """Sends and receives what goes over boundaries, piece by piece.

    Every message is posted where it stands in the instructions, without waiting; so those between
    two processes match in their order, and tags are not needed.
    """

    def __init__(
        self,
        plan: Pipelined,
        rank: int,
        place: int,
        device: torch.device,
        trace: Trace,
        peers: Peers,
    ) -> None:
        self.plan, self.rank, self.place = plan, rank, place
        self.device, self.trace, self.peers = device, trace, peers
        self.answered: dict[_Key, list[_Sent]] = {}
        self.unanswered: dict[tuple[Boundary, bool], deque[list[_Sent]]] = defaultdict(deque)

    def move(self, move: Move, own: Tensor | None) -> Callable[[], Tensor]:
        """Send what this process has of it, ``own``, and ask for what it will hold: a function that
        waits for that.

        In one order for all: where a row sends to itself, messages go both ways between two of its
        processes.
        """
        sources, targets = self.plan.groups[move.source_row], self.plan.groups[move.target_row]
        sent: list[_Sent] = []
        asked: list[_Asked] = []
        for message in self._messages(move):
            sender, receiver = sources[message.sender], targets[message.receiver]
            if self.rank not in (sender, receiver):
                continue
            if receiver == self.rank:
                asked.append(self._ask(move, message, sender, own))
            elif own is not None:
                sent.append(self._send(move, message, receiver, own))
        if sent:
            self._under_way(move, sent)
        return partial(self._arrived, move, asked)

    def _send(self, move: Move, message: Message, receiver: int, own: Tensor) -> _Sent:
        piece = box(own, message.taken).contiguous()
        what = f"{_text(move)} to reach"
        work = self.peers.post(lambda: dist.isend(piece, receiver), what, receiver)
        rows = move.source_row, move.target_row
        self.trace.sent_bytes[rows] += piece.numel() * piece.element_size()
        return _Sent(work, piece, receiver, what)

    def _under_way(self, move: Move, sent: list[_Sent]) -> None:
        if move.boundary.gradient and not move.backward:
            self.answered[move.boundary, move.microbatch] = sent
            return
        under_way = self.unanswered[move.boundary, move.backward]
        under_way.append(sent)
        if len(under_way) > MOST_UNDER_WAY:
            self._wait(under_way.popleft())

    def _ask(self, move: Move, message: Message, sender: int, own: Tensor | None) -> _Asked:
        if sender == self.rank:
            assert own is not None
            return _Asked(None, box(own, message.taken), sender, message)
        size = [stop - start for start, stop in message.put]
        dtype = getattr(torch, move.boundary.spec.dtype)
        piece = torch.empty(size, dtype=dtype, device=self.device)
        what = f"{_text(move)} from"
        work = self.peers.post(lambda: dist.irecv(piece, sender), what, sender)
        return _Asked(work, piece, sender, message)

    def _arrived(self, move: Move, asked: Sequence[_Asked]) -> Tensor:
        boundary = move.boundary
        if move.backward:
            self._wait(self.answered.pop((boundary, move.microbatch), ()))
        for work, _, sender, _ in asked:
            if work is not None:
                self.peers.wait(work, f"{_text(move)} from", sender)
        number, sharding = (
            (boundary.source, boundary.departs)
            if move.backward
            else (boundary.target, boundary.arrives)
        )
        shape = local_shape(boundary.spec.shape, sharding, self.plan.parts[number].mesh)
        if len(asked) == 1 and tuple(asked[0].piece.shape) == shape:
            return asked[0].piece.detach()
        dtype = getattr(torch, boundary.spec.dtype)
        whole = torch.empty(shape, dtype=dtype, device=self.device)
        for _, piece, _, message in asked:
            box(whole, message.put).copy_(piece)
        return whole

    def finish(self) -> None:
        """Wait until all that was sent has arrived."""
        for sent in self.answered.values():
            self._wait(sent)
        for under_way in self.unanswered.values():
            for sent in under_way:
                self._wait(sent)

    def _wait(self, sent: Iterable[_Sent]) -> None:
        for work, _, receiver, what in sent:
            self.peers.wait(work, what, receiver)

    def _messages(self, move: Move) -> tuple[Message, ...]:
        together = move.source_row == move.target_row
        return self.plan.messages(move.boundary, move.backward, together)


def _text(move: Move) -> str:
    """What goes where, in the words of actions."""
    boundary = move.boundary
    source, target = boundary.source, boundary.target
    if move.backward:
        source, target = target, source
    what = f"the gradient of {boundary.tensor}" if move.backward else boundary.tensor
    return f"{what} of microbatch {move.microbatch} (stage {source} to {target})"


__all__ = ["PipelineStep", "Trace"]
