"""Zero bubble H1 (arXiv 2401.10241): 1F1B whose weight gradients wait until there is time for them.

A stage passes the gradient of its input on (``I``) before it computes that of its weights (``W``).
The later the stage, the more ``W`` it puts off: with those, every stage of a chain keeps as many
microbatches as the first one of 1F1B.
"""

from __future__ import annotations

from collections.abc import Iterator

from autopar.ir.schedule import Action, Rows, Schedule, Shape
from autopar.schedules.refusals import several_chunks


def order(shape: Shape) -> Rows:
    after = shape.stages_after()
    return tuple(
        tuple(_row(stage, after[stage], max(after) - after[stage], shape.microbatches))
        for stage in range(shape.stages)
    )


def _row(stage: int, after: int, put_off: int, microbatches: int) -> Iterator[Action]:
    ahead = min(microbatches, after + 1)
    put_off = min(microbatches, put_off)
    yield from (Action(stage, "F", i) for i in range(ahead))
    for i in range(microbatches):
        yield Action(stage, "I", i)
        if i >= put_off:
            yield Action(stage, "W", i - put_off)
        if ahead + i < microbatches:
            yield Action(stage, "F", ahead + i)
    yield from (Action(stage, "W", i) for i in range(microbatches - put_off, microbatches))


zero_bubble_h1 = Schedule(
    "zero_bubble_h1",
    "1f1b with weight gradients put off to fill the bubble, in the memory of 1f1b",
    order,
    several_chunks,
)
