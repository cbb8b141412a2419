"""A dry run of a row that does what repeats only until it changes nothing any more.

Between its first and its last microbatches a row does the same again and again, for later
microbatches. When a **period** of its instructions has led to where it began (what is alive in
memory is the same, piece by piece), the next one does what this one did, as only the numbers of
microbatches differ, on which no shape depends. It is left out, as often as the instructions go on
so; what it sent and communicated is counted as often.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from autopar.ir.schedule import Action
from autopar.runtime.pipeline import PipelineStep
from autopar.runtime.watch import Piece, Watch
from autopar.simulator.stages import Move

Instruction = Action | Move


class Run(NamedTuple):
    """From ``start`` on, ``length`` instructions are done ``times`` over, each time for
    microbatches whose numbers are higher by ``shift``."""

    start: int
    length: int
    times: int
    shift: int


def longest_run(instructions: Sequence[Instruction]) -> Run | None:
    """The run that has most to leave out."""
    numbers: dict[Hashable, int] = {}
    kinds = np.array([numbers.setdefault(_kind(one), len(numbers)) for one in instructions])
    microbatches = np.array([one.microbatch for one in instructions])
    best = None
    for length in range(1, len(instructions) // 3 + 1):
        shifts = microbatches[length:] - microbatches[:-length]
        same = (kinds[length:] == kinds[:-length]) & (shifts > 0)
        for start, stop in _stretches(same, shifts):
            times = (stop - start) // length + 1
            found = Run(start, length, times, int(shifts[start]))
            if times > 2 and (best is None or _left_out(found) > _left_out(best)):
                best = found
    return best


def _kind(one: Instruction) -> Hashable:
    return (one.stage, one.kind) if isinstance(one, Action) else one._replace(microbatch=0)


def _left_out(run: Run) -> int:
    return (run.times - 2) * run.length


def _stretches(same: NDArray[np.bool_], shifts: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Where it is the same all along, by one shift."""
    marked = np.where(same, shifts, 0)
    ends = np.flatnonzero(np.diff(marked)) + 1
    for start, stop in zip((0, *ends), (*ends, len(marked)), strict=True):
        if marked[start]:
            yield int(start), int(stop)


class _State(NamedTuple):
    """What a period begins with, whatever the numbers of its microbatches: all memory, and for
    which microbatches something has been done forward but not backward."""

    alive: Counter[Piece]
    open: frozenset[Action]


@dataclass
class ShortenedRow:
    """The instructions of a step, one after the other, without the periods that change nothing.

    Those after them are for lower microbatches than in the plan, as many as were left out.
    ``left_out``: the instructions; ``before``: how many actions were done before them.
    """

    step: PipelineStep
    watch: Watch
    left_out: tuple[Instruction, ...] = ()
    before: int = 0
    shift: int = 0

    def __iter__(self) -> Iterator[Instruction]:
        instructions = self.step.plan.instructions(self.step.row)
        run = longest_run(instructions)
        stop = len(instructions) if run is None else run.start
        yield from instructions[:stop]
        if run is None:
            return
        state = self._state(0)
        for period in range(1, run.times + 1):
            sent, executed = self.step.trace.sent_bytes.copy(), self.watch.executed.copy()
            yield from instructions[stop : stop + run.length]
            stop += run.length
            reached = self._state(period * run.shift)
            if reached == state:
                times = run.times - period
                self.left_out = instructions[stop : stop + times * run.length]
                self.before, self.shift = len(self.step.trace.actions), times * run.shift
                _count_again(self.step.trace.sent_bytes, sent, times)
                _count_again(self.watch.executed, executed, times)
                break
            state = reached
        for one in instructions[stop + len(self.left_out) :]:
            yield one._replace(microbatch=one.microbatch - self.shift)

    def _state(self, shift: int) -> _State:
        begun: set[Action] = set()
        for action in self.step.trace.actions:
            forward = action._replace(kind="F", microbatch=action.microbatch - shift)
            if action.kind == "F":
                begun.add(forward)
            elif action.kind in ("B", "W"):
                begun.discard(forward)
        return _State(self.watch.memory.alive(), frozenset(begun))

    def actions(self) -> tuple[Action, ...]:
        """All that the step stands for, with those that were left out."""
        done = self.step.trace.actions
        after = [
            one if one.kind == "U" else one._replace(microbatch=one.microbatch + self.shift)
            for one in done[self.before :]
        ]
        left_out = [one for one in self.left_out if isinstance(one, Action)]
        return (*done[: self.before], *left_out, *after)


Counted = TypeVar("Counted", bound=Hashable)


def _count_again(now: Counter[Counted], before: Counter[Counted], times: int) -> None:
    """As often as that, what has been counted since ``before``."""
    for what, count in (now - before).items():
        now[what] += times * count


__all__ = ["Run", "ShortenedRow", "longest_run"]
