"""What people publish of how a model was trained: degrees of each kind of parallelism, and how the
batch goes through the pipeline. Numbers only; ``by_degrees`` makes the strategy of any model."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace
from typing import Any

from autopar.errors import AutoparError
from autopar.recipes.columns_rows import BETWEEN
from autopar.schedules import SCHEDULES

LEVELS = (0, 1, 2, 3)
"""Of ZeRO."""


@dataclass(frozen=True, slots=True)
class Degrees:
    """``tensor`` x ``context`` x ``data`` x ``replicas`` devices are a group, and there are
    ``pipeline`` groups, each with ``chunks`` stages (Megatron's virtual stages); with a schedule
    that has copies of stages (chimera) as many copies, where that is 1 the schedule's.

    Neighbours are tensor-parallel; then come ``context``, which divides the sequence of every
    tensor, and ``data``; ZeRO of level ``zero`` shards over both; ``replicas`` of that, whose
    gradients are summed, and the groups of the pipeline. ``schedule``: of the shelf (default:
    ``1f1b``, with several chunks ``interleaved_1f1b``). ``microbatch``:
    samples that a replica works on at a time (default: one in a pipeline, else all of them).
    ``between`` tensor-parallel regions tensors are ``whole``, or divided by their ``sequence``
    (sequence parallelism) or ``width``. ``recompute`` as for a search: ``none``, ``attention``,
    ``selective``, ``alternate``, ``elementwise`` or ``full``, in the first ``recomputed`` (a part
    of 1) of the blocks of each stage.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    replicas: int = 1
    chunks: int = 1
    schedule: str | None = None
    microbatch: int | None = None
    between: str = "whole"
    zero: int = 0
    recompute: str = "none"
    context: int = 1
    experts: int = 1
    recomputed: float = 1.0

    @property
    def stage_devices(self) -> int:
        return self.tensor * self.context * self.data * self.replicas

    @property
    def devices(self) -> int:
        return self.stage_devices * self.pipeline

    @property
    def stages(self) -> int:
        return self.pipeline * (1 if self.has_copies else self.chunks)

    @property
    def has_copies(self) -> bool:
        """Whether chunks are copies of stages."""
        member = SCHEDULES.get(self.schedule_name)
        return member is not None and member.copies

    @property
    def schedule_name(self) -> str:
        """That which is given, or the usual one."""
        return self.schedule or ("1f1b" if self.chunks == 1 else "interleaved_1f1b")

    @property
    def row_chunks(self) -> int:
        """What a group has: stages, or copies of stages."""
        is_usual = self.has_copies and self.chunks == 1
        return SCHEDULES[self.schedule_name].chunks if is_usual else self.chunks

    @property
    def expert_data(self) -> int:
        """Of ``data``, how many neighbours divide experts.

        Raises:
            AutoparError: experts do not lie on whole neighbours.
        """
        if self.experts == 1:
            return 1
        rest, left = divmod(self.experts, self.tensor)
        if left or self.data % max(1, rest) or (self.tensor > 1 and self.between != "sequence"):
            raise AutoparError(
                f"experts={self.experts} with tensor={self.tensor}, data={self.data}: experts are "
                "divided over all of tensor, between which the sequence must be divided "
                "(between=sequence), and over a part of data; take tensor times a divisor of data"
            )
        return rest

    def microbatches(self, batch: int) -> int:
        """In how many parts a global batch of so many samples is worked on.

        >>> Degrees(pipeline=4, data=2, microbatch=2).microbatches(64)
        16
        """
        shared = self.data * self.replicas
        one = self.microbatch or (1 if self.pipeline > 1 else max(1, batch // shared))
        if batch % (shared * one):
            raise AutoparError(
                f"a batch of {batch} samples is not a whole number of microbatches of {one} in "
                f"{shared} replicas; a batch of {max(1, batch // (shared * one)) * shared * one} "
                "would be"
            )
        return batch // (shared * one)


SHORT = {
    "tp": "tensor",
    "pp": "pipeline",
    "dp": "data",
    "cp": "context",
    "ep": "experts",
    "vp": "chunks",
    "mbs": "microbatch",
}
"""What the degrees are called for short."""


def degrees_from_text(text: str, start: Degrees | None = None) -> Degrees:
    """``start``: what holds where the text says nothing (default: one device).

    >>> degrees_from_text("tensor=8,pipeline=4,data=2,between=sequence,recompute=full").devices
    64
    >>> degrees_from_text("tp=8,zero=1") == Degrees(tensor=8, zero=1)
    True
    """
    found: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, is_given, value = part.partition("=")
        name = SHORT.get(name, name)
        if name in found:
            raise AutoparError(f"{text!r} gives {name} twice")
        found[name] = _value(name, value if is_given else None)
    return checked(replace(start or Degrees(), **found))


def _value(name: str, text: str | None) -> Any:
    known = [one.name for one in fields(Degrees)]
    if name not in known:
        near = difflib.get_close_matches(name, [*known, *SHORT], 1, 0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise AutoparError(f"a recipe has no {name!r}; {hint}It has {', '.join(known)}")
    if name in ("schedule", "between", "recompute"):
        if text:
            return text
        raise AutoparError(f"{name} of a recipe has a name: {name}=..., see docs/recipes.md")
    if name == "recomputed":
        return _part(text or "")
    if text is None or not text.isdigit():
        raise AutoparError(f"{name} of a recipe is a number: {name}=8, not {text!r}")
    return int(text)


def _part(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise AutoparError(
            f"recomputed of a recipe is a part: recomputed=0.5, not {text!r}"
        ) from None


def checked(degrees: Degrees) -> Degrees:
    """``degrees`` if all of them are possible numbers."""
    for one in fields(Degrees):
        value = getattr(degrees, one.name)
        if one.name not in ("zero", "recomputed") and isinstance(value, int) and value < 1:
            raise AutoparError(f"{one.name} of a recipe must be at least 1, not {value}")
    if not 0 <= degrees.recomputed <= 1:
        raise AutoparError(
            f"recomputed of a recipe is a part of the blocks, from 0 to 1, not {degrees.recomputed}"
        )
    if degrees.zero not in LEVELS:
        raise AutoparError(f"zero of a recipe is a level from 0 to 3, not {degrees.zero}")
    if degrees.between not in BETWEEN:
        raise AutoparError(
            f"between of a recipe is one of {', '.join(BETWEEN)}, not {degrees.between!r}"
        )
    return degrees


def degrees_text(degrees: Degrees) -> str:
    """What differs from one device, as ``degrees_from_text`` reads it.

    >>> degrees_text(Degrees(tensor=8, between="sequence"))
    'tensor=8,between=sequence'
    """
    plain = Degrees()
    given = [
        (one.name, getattr(degrees, one.name))
        for one in fields(Degrees)
        if getattr(degrees, one.name) != getattr(plain, one.name)
    ]
    return ",".join(f"{name}={value}" for name, value in given)


__all__ = ["Degrees", "checked", "degrees_from_text", "degrees_text"]
