"""Networks in which messages have no tags and sending may wait for the receiver.

What a process does is found by running the runtime's own loop with stages that compute nothing.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from random import Random
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor

from autopar.ir.graph import TensorSpec
from autopar.ir.schedule import Action, Rows, Schedule, Shape, homes
from autopar.ir.sharding import Mesh, Sharding, local_shape
from autopar.runtime import pipeline
from autopar.runtime.peers import Peers
from autopar.runtime.pipeline import PipelineStep, Trace, _Post
from autopar.simulator.stages import Boundary, Move, Pipelined

Side = Literal["send", "recv"]


class Post(NamedTuple):
    """One end of a message: the ``number``-th that its process posts. ``label``: what it is."""

    side: Side
    peer: int
    number: int
    label: object


class Await(NamedTuple):
    number: int


class Meet(NamedTuple):
    """All processes of a row do an action together."""

    action: Action
    ranks: tuple[int, ...]


Program = list[Post | Await | Meet]
"""What one process does."""


def random_plan(
    rows: Rows, feeds: Sequence[tuple[int, int, bool]], devices: Sequence[int], random: Random
) -> Pipelined:
    """Stages that compute nothing, on as many ``devices`` for each row; what goes between them lies
    in pieces or whole. ``feeds`` say whether gradients go back, too. The copies of a stage are on
    equally many devices."""
    groups, start = [], 0
    for size in devices:
        groups.append(tuple(range(start, start + size)))
        start += size
    parts: Any = tuple(SimpleNamespace(mesh=Mesh((("a", devices[row]),))) for row in homes(rows))
    routes: dict[tuple[int, int, bool], tuple[Boundary, ...]] = {}

    def lies() -> Sharding:
        return (random.choice(["I", "S(0)", "S(1)"]),)

    for source, target, gradient in feeds:
        for number in range(random.randint(1, 2)):
            name = f"{source} to {target} no. {number}"
            spec = TensorSpec((6, 6), "float32")
            boundary = Boundary(name, spec, source, target, lies(), lies(), gradient)
            key = source, target, gradient
            routes[key] = (*routes.get(key, ()), boundary)
    boundaries = tuple(b for of in routes.values() for b in of)
    nothing: Any = None
    count = 1 + max(action.microbatch for row in rows for action in row)
    return _OnRows(
        nothing, parts, boundaries, routes, Shape(len(parts), count), tuple(groups), rows
    )


@dataclass(frozen=True)
class _OnRows(Pipelined):
    """On rows that no schedule of the shelf makes."""

    given: Rows = ()

    @cached_property
    def schedule(self) -> Schedule:
        return Schedule("given", "", lambda _: self.given, lambda _: None)


def programs(plan: Pipelined) -> list[Program]:
    """What each process of the plan does in a step, up to the updates."""
    return [
        _program(plan, instructions, rank, row, place)
        for row, group in enumerate(plan.groups)
        for instructions in [plan.instructions(row)]
        for place, rank in enumerate(group)
    ]


def _program(
    plan: Pipelined, instructions: Sequence[Action | Move], rank: int, row: int, place: int
) -> Program:
    found = _Recording()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "dist", found)
        post = _Post(plan, rank, place, torch.device("cpu"), Trace(), Peers())
        numbers = {action.stage for action in plan.rows[row]}
        stages: Any = {number: _Silent(plan, number) for number in numbers}
        step: Any = SimpleNamespace(row=row)
        for instruction in instructions:
            if isinstance(instruction, Move):
                found.begin(instruction)
                PipelineStep._move(step, instruction, stages, post)
            else:
                stages[instruction.stage].do(instruction)
                found.program.append(Meet(instruction, plan.groups[row]))
        post.finish()
    for stage in stages.values():
        assert not (stage.arriving or stage.arriving_gradients), "all that arrives is read"
    return found.program


class _Recording:
    """Stands for ``torch.distributed``."""

    def __init__(self) -> None:
        self.program: Program = []
        self.posted = 0
        self.move: Move | None = None
        self.within: dict[tuple[Side, int], int] = defaultdict(int)

    def begin(self, move: Move) -> None:
        self.move = move
        self.within.clear()

    def isend(self, piece: Tensor, peer: int) -> Any:
        return self._post("send", peer, piece)

    def irecv(self, piece: Tensor, peer: int) -> Any:
        return self._post("recv", peer, piece)

    def is_initialized(self) -> bool:
        return False

    def _post(self, side: Side, peer: int, piece: Tensor) -> Any:
        number = self.posted
        self.posted += 1
        label = self.move, self.within[side, peer], tuple(piece.shape)
        self.within[side, peer] += 1
        self.program.append(Post(side, peer, number, label))
        return SimpleNamespace(wait=lambda: self.program.append(Await(number)))


class _Silent:
    """A stage that waits for what it reads, and makes something of the right shape."""

    def __init__(self, plan: Pipelined, number: int) -> None:
        self.plan, self.number = plan, number
        self.arriving: dict[tuple[Boundary, int], Callable[[], Tensor]] = {}
        self.arriving_gradients: dict[tuple[Boundary, int], Callable[[], Tensor]] = {}
        mesh = plan.parts[number].mesh
        self.made = _Anything(lambda b: local_shape(b.spec.shape, b.departs, mesh))
        self.gradients = _Anything(lambda b: local_shape(b.spec.shape, b.arrives, mesh))

    def do(self, action: Action) -> None:
        for boundary in self.plan.boundaries:
            key = boundary, action.microbatch
            if action.kind == "F" and boundary.target == self.number:
                self.arriving.pop(key)()
            if action.kind in "BI" and boundary.source == self.number and boundary.gradient:
                self.arriving_gradients.pop(key)()


@dataclass
class _Anything:
    shape: Callable[[Boundary], tuple[int, ...]]

    def pop(self, key: tuple[Boundary, int]) -> Tensor:
        return torch.empty(self.shape(key[0]))


@dataclass
class Network:
    """Plays programs. ``blocking``: the sides on which a process goes on only when the message is
    through; without, it waits where its program does.

    Between two processes messages pass one after the other, both ways, in the order in which each
    of them posts them (NCCL's stream of a pair); so the two ends must agree on that order.
    """

    programs: Sequence[Program]
    blocking: frozenset[Side]
    at: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.places = [
            {step.action: place for place, step in enumerate(program) if isinstance(step, Meet)}
            for program in self.programs
        ]

    def play(self) -> list[object]:
        """What every process that cannot go on stands at; empty if all come to their end."""
        self.at = [0] * len(self.programs)
        self.between: dict[tuple[int, int], list[Post]] = defaultdict(list)
        self.numbers: list[dict[int, tuple[int, int]]] = [{} for _ in self.programs]
        ready = deque(range(len(self.programs)))
        idle = 0
        while ready and idle <= len(ready):
            rank = ready.popleft()
            went = self._go_on(rank)
            idle = 0 if went else idle + 1
            if self.at[rank] < len(self.programs[rank]):
                ready.append(rank)
        return [self.programs[rank][self.at[rank]] for rank in ready]

    def _go_on(self, rank: int) -> bool:
        went = False
        while self.at[rank] < len(self.programs[rank]) and self._passes(rank):
            self.at[rank] += 1
            went = True
        return went

    def _passes(self, rank: int) -> bool:
        step = self.programs[rank][self.at[rank]]
        if isinstance(step, Meet):
            return self._all_there(step)
        if isinstance(step, Await):
            return self._through(rank, step.number)
        if step.number not in self.numbers[rank]:
            mine = self.between[rank, step.peer]
            self.numbers[rank][step.number] = step.peer, len(mine)
            mine.append(step)
        return step.side not in self.blocking or self._through(rank, step.number)

    def _through(self, rank: int, number: int) -> bool:
        peer, place = self.numbers[rank][number]
        theirs = self.between[peer, rank]
        if len(theirs) <= place:
            return False
        mine, other = self.between[rank, peer][place], theirs[place]
        assert {mine.side, other.side} == {"send", "recv"}, (mine, other)
        assert mine.label == other.label, (mine, other)
        return True

    def _all_there(self, meeting: Meet) -> bool:
        """The others stand at it, or are past it."""
        return all(self.places[rank][meeting.action] <= self.at[rank] for rank in meeting.ranks)


__all__ = ["Await", "Meet", "Network", "Post", "Program", "programs", "random_plan"]
