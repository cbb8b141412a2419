"""Sums of stage times that no step of a shape is shorter than: rows with their ramps.

A way through a step goes along rows and with microbatches from stage to stage: what it passes takes
as long as a step at most, and so does every mean over ways. Means are taken in which all stages
count about equally: wherever units are put then, the sum is about the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.searchers.stage_rows import RowWeights
from autopar.simulator.pipeline_bound import Shares

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class StageWeights:
    """For each stage, how often its forward, its backward (or ``I``) and its ``W`` count, those of
    all copies together; ``tail``: its update, and the exchange of gradients before that."""

    forward: Array
    backward: Array
    put_off: Array
    tail: Array

    def of_rows(self, held: Iterable[Sequence[int]]) -> list[RowWeights]:
        """For rows that have these stages, one for all its copies."""
        parts = np.array([self.forward, self.backward, self.put_off])
        last = parts.shape[1] - 1
        found = []
        for of_row in held:
            of_stages = parts[:, list(of_row)]
            least = of_stages.min(axis=1)
            more = of_stages - least[:, None]
            places = [(s == 0, s == last) for s in of_row]
            between, first, last_one = (
                _sums(more, [place == which for place in places])
                for which in ((False, False), (True, False), (False, True))
            )
            tail = float(self.tail[list(of_row)].min())
            forward, backward, put_off = least.tolist()
            found.append(RowWeights(forward, backward, put_off, tail, between, first, last_one))
        return found


def _sums(more: Array, chosen: Sequence[bool]) -> tuple[float, float, float]:
    forward, backward, put_off = more[:, list(chosen)].sum(axis=1).tolist()
    return forward, backward, put_off


def through_rows(held: Sequence[Sequence[int]], shares: Shares, split: bool) -> StageWeights:
    """The mean over rows of: a microbatch's way to the row, all that the row does, and the way back
    to the first stage. With ``split`` the row's ``W`` come last, instead of the way back."""
    rows, stages = len(held), 1 + max(map(max, held))
    work, ramp, own = np.zeros(stages), np.zeros(stages), np.zeros(stages)
    for of_row, share in zip(held, shares, strict=True):
        for stage in of_row:
            work[stage] += share[stage] / rows
            own[stage] += 1 / rows
        ramp[: min(of_row)] += 1 / rows
    if split:
        return StageWeights(work + ramp, work, work, own)
    # the last of all is the row of the first stage; of its copies, each sometimes
    (first,) = {of_row for of_row in map(tuple, held) if 0 in of_row}
    tail = np.zeros(stages)
    tail[list(first)] = 1
    return StageWeights(work + ramp, work + ramp, np.zeros(stages), tail)


def one_microbatch(held: Sequence[Sequence[int]]) -> StageWeights:
    """A microbatch's way through all stages and back, with the first row's updates."""
    stages = 1 + max(map(max, held))
    (first,) = {of_row for of_row in map(tuple, held) if 0 in of_row}
    tail = np.zeros(stages)
    tail[list(first)] = 1
    ones, zeros = np.ones(stages), np.zeros(stages)
    return StageWeights(ones, ones, zeros, tail)
