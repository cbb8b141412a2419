"""What each group of devices does in which order: rows of actions, and schedules that make them.

Stages are numbered so that each comes after all that it reads. A *row* is what one group of devices
does in a step, one action after the other; the simulator times the rows and the runtime executes
them. Transfers are not written down: they follow from the rows and from which stage feeds which.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

from autopar.errors import AutoparError

Kind = Literal["F", "B", "I", "W", "U"]
"""``F`` forward. ``B`` the whole backward, recomputation included; or ``I``, which gives the
gradient of the stage's inputs (recomputation included), and later ``W``, which gives that of its
weights. ``U`` updates the weights."""

KINDS: tuple[Kind, ...] = ("F", "B", "I", "W", "U")

_SPELLING = re.compile(r"(\d+)([FBIWU])(\d+)(?:@(\d+))?")


class Action(NamedTuple):
    """One stage's work on one microbatch, spelled as torch.distributed.pipelining does: ``2F7``.

    ``version``: how many updates the weights that are used have seen; ``None``: those that the row
    has at that point. Only schedules that update before all microbatches are through give it, for
    backwards on weights that were kept (``2B7@3``). ``2U7`` updates stage 2 with the gradients of
    microbatches up to 7; stages without any ``U`` in a row are updated once, at its end.
    """

    stage: int
    kind: Kind
    microbatch: int
    version: int | None = None

    def __str__(self) -> str:
        version = "" if self.version is None else f"@{self.version}"
        return f"{self.stage}{self.kind}{self.microbatch}{version}"

    @staticmethod
    def parse(text: str) -> Action:
        """
        >>> Action.parse("0F3"), str(Action.parse("2B7@3"))
        (Action(stage=0, kind='F', microbatch=3, version=None), '2B7@3')
        """
        found = _SPELLING.fullmatch(text.strip())
        if found is None:
            raise AutoparError(
                f"{text!r} is no action; write stage, kind (one of {', '.join(KINDS)}) and "
                "microbatch, for example 0F3"
            )
        stage, kind, microbatch, version = found.groups()
        return Action(
            int(stage), cast(Kind, kind), int(microbatch), None if version is None else int(version)
        )


Row = tuple[Action, ...]
Rows = tuple[Row, ...]
"""A row for each group of devices. A stage may be in several rows, a copy in each: every microbatch
takes one of the copies. A stage's own devices (``Strategy.stages``) are those of ``homes``."""

Feeds = tuple[tuple[int, int], ...]
"""(stage, a later stage that reads its output)."""


def rows_to_text(rows: Rows) -> str:
    """One line a row, actions separated by blanks.

    >>> rows_to_text(((Action(0, "F", 0), Action(0, "B", 0)),))
    '0F0 0B0'
    """
    return "\n".join(" ".join(map(str, row)) for row in rows)


def rows_from_text(text: str) -> Rows:
    return tuple(tuple(map(Action.parse, line.split())) for line in text.splitlines())


def most_in_flight(row: Iterable[Action], stage: int | None = None) -> int:
    """Microbatches whose activations a row must keep at once, those of each of its stages counted.

    An activation is kept from its forward to the end of its last backward (``B`` or ``W``).
    ``stage``: count this stage's only.

    >>> most_in_flight(map(Action.parse, "0F0 0F1 0B0 0F2 0B1 0B2".split()))
    2
    """
    now = most = 0
    for action in row:
        if stage is None or action.stage == stage:
            if action.kind == "F":
                now += 1
                most = max(most, now)
            elif action.kind in ("B", "W"):
                now -= 1
    return most


def weight_copies(row: Sequence[Action]) -> int:
    """Copies of a stage's weights that a row must keep at once: its stages, and their old versions.

    A version is kept until the last action that uses it.

    >>> weight_copies([Action.parse(a) for a in "0F0 0F1 0B0 0U0 0B1@0 0U1".split()])
    2
    """
    version: Counter[int] = Counter()
    last_use: dict[tuple[int, int], int] = {}
    used = []
    for i, action in enumerate(row):
        if action.kind == "U":
            version[action.stage] += 1
        used.append(version[action.stage] if action.version is None else action.version)
        last_use[action.stage, used[-1]] = i
    latest = dict.fromkeys((action.stage for action in row), 0)
    kept = {(stage, 0) for stage in latest}
    most = len(kept)
    for i, action in enumerate(row):
        if action.kind == "U":
            latest[action.stage] = used[i]
            kept.add((action.stage, used[i]))
        kept = {
            (stage, v)
            for stage, v in kept
            if v == latest[stage] or last_use.get((stage, v), -1) > i
        }
        most = max(most, len(kept))
    return most


def homes(rows: Rows) -> tuple[int, ...]:
    """For each stage, the row that does its microbatch 0: the first copy where there are several.

    >>> homes(((Action(0, "F", 0), Action(2, "F", 0)), (Action(1, "F", 0),)))
    (0, 1, 0)
    """
    found = {
        action.stage: r
        for r, row in enumerate(rows)
        for action in row
        if action.kind == "F" and action.microbatch == 0
    }
    return tuple(found[stage] for stage in sorted(found))


@dataclass(frozen=True, slots=True)
class Shape:
    """What a schedule is asked for.

    ``chunks``: stages that each group of devices holds. ``feeds``: which stage feeds which,
    ``None`` for a chain.
    """

    stages: int
    microbatches: int
    chunks: int = 1
    feeds: Feeds | None = None

    def stages_after(self) -> list[int]:
        """For each stage, the length of the longest way from it to a last stage.

        >>> Shape(stages=4, microbatches=1, feeds=((0, 3), (1, 2), (2, 3))).stages_after()
        [1, 2, 1, 0]
        """
        if self.feeds is None:
            return list(range(self.stages - 1, -1, -1))
        after = [0] * self.stages
        for source, target in sorted(self.feeds, reverse=True):
            after[source] = max(after[source], after[target] + 1)
        return after


@dataclass(frozen=True, slots=True)
class Schedule:
    """A member of the schedules shelf: calling it gives rows.

    ``order``: the rows of a shape that is not refused. ``refusal``: why it cannot do a shape, and
    what would work; ``None`` if it can. ``chunks``: stages that a group of devices holds unless
    asked otherwise. ``copies``: these are copies of stages that other groups hold too, so that
    there are as many stages as groups; otherwise they are further stages.
    """

    name: str
    description: str
    order: Callable[[Shape], Rows]
    refusal: Callable[[Shape], str | None]
    chunks: int = 1
    copies: bool = False

    def __call__(
        self,
        stages: int,
        microbatches: int,
        chunks: int | None = None,
        feeds: Feeds | None = None,
    ) -> Rows:
        shape = Shape(stages, microbatches, self.chunks if chunks is None else chunks, feeds)
        reason = self.refuses(shape)
        if reason is not None:
            raise AutoparError(f"the schedule {self.name} {reason}")
        return self.order(shape)

    def refuses(self, shape: Shape) -> str | None:
        """Why this shape cannot be scheduled, ``None`` if it can."""
        for what, count in (
            ("stage", shape.stages),
            ("microbatch", shape.microbatches),
            ("chunk", shape.chunks),
        ):
            if count < 1:
                return f"needs at least one {what}, not {count}"
        for source, target in shape.feeds or ():
            if not 0 <= source < target < shape.stages:
                return (
                    f"needs stages 0 to {shape.stages - 1} numbered so that each comes after what "
                    f"it reads, but stage {source} feeds stage {target}"
                )
        return self.refusal(shape)

    def stages(self, devices: int, chunks: int | None = None) -> int:
        """How many stages ``devices`` groups of devices hold."""
        return devices if self.copies else devices * (self.chunks if chunks is None else chunks)
