"""Chimera (arXiv 2107.06925): pipelines in both directions over the same groups of devices.

With 2f pipelines each group holds 2f stages, of which every other holder has a copy. Pipeline 2j
runs stage s on group s + jD/f (modulo D), pipeline 2j + 1 on group jD/f - 1 - s: down and up.
Microbatches are dealt to the pipelines in turn; D/2f of each pipeline make a unit, and units follow
each other directly (section 3.5 of the paper).
"""

from __future__ import annotations

from autopar.ir.schedule import Action, Rows, Schedule, Shape


def order(shape: Shape) -> Rows:
    stages, pipelines = shape.stages, shape.chunks
    timed: list[list[tuple[int, Action]]] = [[] for _ in range(stages)]
    for microbatch in range(shape.microbatches):
        turn, pipeline = divmod(microbatch, pipelines)
        for stage in range(stages):
            row = timed[_group(stage, pipeline, shape)]
            forward, backward = _slots(stage, turn, shape)
            row.append((forward, Action(stage, "F", microbatch)))
            row.append((backward, Action(stage, "B", microbatch)))
    return tuple(tuple(action for _, action in sorted(row)) for row in timed)


def _group(stage: int, pipeline: int, shape: Shape) -> int:
    pair, up = divmod(pipeline, 2)
    first = pair * shape.stages // (shape.chunks // 2)
    return (first - 1 - stage if up else first + stage) % shape.stages


def _slots(stage: int, turn: int, shape: Shape) -> tuple[int, int]:
    """When a pipeline's microbatch is due on a stage, if forwards and backwards take a slot each.

    Every other slot is left to the pipelines in the other direction, which are there on slots of
    the other parity, because D - 1 is odd; so no two actions of a group are due in the same slot.
    """
    unit, place = divmod(turn, shape.stages // shape.chunks)
    start = 2 * shape.stages * unit + 2 * place
    return start + stage, start + 2 * shape.stages - 1 - stage


def refusal(shape: Shape) -> str | None:
    if shape.chunks % 2:
        return (
            f"has as many pipelines up as down, and {shape.chunks} is odd; "
            f"{max(2, shape.chunks - 1)} or {shape.chunks + 1} pipelines (chunks) would work"
        )
    if shape.stages % shape.chunks:
        work = [n for n in range(2, shape.stages + 1, 2) if shape.stages % n == 0]
        return (
            f"with {shape.chunks} pipelines (chunks) needs a multiple of as many stages, not "
            + (
                f"{shape.stages}; with {shape.stages} stages, {' or '.join(map(str, work))} work"
                if work
                else f"{shape.stages}; an even number of stages works with 2"
            )
        )
    if shape.microbatches < shape.chunks:
        return (
            f"gives each of its {shape.chunks} pipelines (chunks) a microbatch, and there are only "
            f"{shape.microbatches}; {shape.chunks} or more would work"
        )
    return None


chimera = Schedule(
    "chimera",
    "pipelines in both directions: half the bubble for twice the weights",
    order,
    refusal,
    chunks=2,
    copies=True,
)
