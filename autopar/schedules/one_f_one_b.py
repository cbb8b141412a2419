"""1F1B with a flush (DAPPLE, arXiv 2007.01045; PipeDream-Flush, arXiv 2006.09503)."""

from __future__ import annotations

from collections.abc import Iterator

from autopar.ir.schedule import Action, Rows, Schedule, Shape
from autopar.schedules.refusals import several_chunks


def order(shape: Shape) -> Rows:
    return tuple(
        tuple(_row(stage, after, shape.microbatches))
        for stage, after in enumerate(shape.stages_after())
    )


def _row(stage: int, after: int, microbatches: int) -> Iterator[Action]:
    """As many forwards as there are stages to come and one more, then one for each backward."""
    ahead = min(microbatches, after + 1)
    yield from (Action(stage, "F", i) for i in range(ahead))
    for i in range(microbatches):
        yield Action(stage, "B", i)
        if ahead + i < microbatches:
            yield Action(stage, "F", ahead + i)


one_f_one_b = Schedule(
    "1f1b", "a backward as soon as it can be done, then a forward", order, several_chunks
)
