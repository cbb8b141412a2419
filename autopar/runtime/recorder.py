"""What was communicated, to be compared with what was promised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from cost_models.interface import CollectiveKind

Phase = Literal["forward", "backward", "step"]


@dataclass(frozen=True, slots=True)
class Executed:
    """One collective that this rank took part in.

    ``axis`` and ``bytes`` as in ``PromisedCollective``: names joined by ``"+"`` for a group over
    several axes; its largest buffer on this rank.
    """

    kind: CollectiveKind
    phase: Phase
    axis: str
    bytes: int


@dataclass
class Recorder:
    """Keeps ``executed`` while ``on``; ``phase`` is what the training step is doing now."""

    on: bool = False
    phase: Phase = "forward"
    executed: list[Executed] = field(default_factory=list)

    def add(self, executed: Executed) -> None:
        if self.on:
            self.executed.append(executed)

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    @contextmanager
    def recording(self) -> Iterator[Counter[Executed]]:
        """Counts what is executed inside the block; filled when it ends."""
        counts: Counter[Executed] = Counter()
        self.on, self.executed = True, []
        try:
            yield counts
        finally:
            self.on = False
            counts.update(self.executed)
