"""A step time that no synchronous schedule of a pipeline can beat, whatever its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction

from autopar.errors import AutoparError
from autopar.ir.schedule import Rows
from autopar.simulator.pipeline import Feed, Pipeline, StageCost, Time

Shares = Sequence[Mapping[int, int]]
"""For each row, how many microbatches it does of which stage."""


def shares_of(rows: Rows) -> list[Counter[int]]:
    """
    >>> from autopar.schedules import SCHEDULES
    >>> [dict(row) for row in shares_of(SCHEDULES["chimera"](stages=2, microbatches=4))]
    [{0: 2, 1: 2}, {0: 2, 1: 2}]
    """
    return [Counter(action.stage for action in row if action.kind == "F") for row in rows]


def least_step_s(pipeline: Pipeline, shares: Shares, *, split: bool = False) -> Time:
    """No rows with these shares, in which each stage is updated once, take less.

    ``split``: backwards are ``I`` and ``W``. For each row, with h the earliest moment at which
    anything reaches it, w the sum of its forwards and backwards, u that of its updates, and t the
    way back from it to the end of the step:

        step >= h + w + u   and   step >= h + w - (all W) + t

    where t ends with the last part of a gradient exchange and an update. And for each of its
    stages, step >= h + its own work + the last part of its gradient exchange + its update. For a
    chain of equal stages without communication that is the step of ``1f1b``. Linear in stages,
    feeds and rows: no rows are made or played.
    """
    ways = _Ways(pipeline, shares, split)
    there, back = ways.there(), ways.back()
    least: Time = 0
    passed: Time = 0  # when the last row is through with its backwards
    for of_row in shares:
        if not of_row:
            continue
        costs = [(pipeline.stages[stage], count) for stage, count in of_row.items()]
        reached = min(there[stage] for stage in of_row)
        first_halves = sum((c.forward_s + _back_s(c, split)) * count for c, count in costs)
        through = reached + first_halves + sum(_put_off_s(c, split) * count for c, count in costs)
        passed = max(passed, through)
        least = max(
            least,
            through + sum(cost.update_s for cost, _ in costs),
            reached + first_halves + min(back[stage] for stage in of_row),
        )
    for synchronisation in pipeline.synchronisations:
        last_part = synchronisation.time_s * Fraction(1, synchronisation.parts)
        for stage in synchronisation.stages:
            cost = pipeline.stages[stage]
            own = cost.forward_s + _back_s(cost, split) + _put_off_s(cost, split)
            most = max(of_row.get(stage, 0) for of_row in shares)
            least = max(least, there[stage] + own * most + last_part + cost.update_s)
    if pipeline.norm_s is not None:
        least = max(least, passed + pipeline.norm_s + max(c.update_s for c in pipeline.stages))
    return least


def _back_s(cost: StageCost, split: bool) -> Time:
    """Until the gradient of its inputs is there."""
    if not split:
        return cost.backward_s
    if cost.input_gradient_s is None:
        raise AutoparError("a stage has no times of I and W; give both, or do not split backwards")
    return cost.input_gradient_s


def _put_off_s(cost: StageCost, split: bool) -> Time:
    return (cost.weight_gradient_s or 0) if split else 0


class _Ways:
    """How long one microbatch takes to a stage, and from it to the end of the step."""

    def __init__(self, pipeline: Pipeline, shares: Shares, split: bool) -> None:
        self._pipeline, self._split = pipeline, split
        stages = range(len(pipeline.stages))
        self._rows_of = [
            [r for r, of_row in enumerate(shares) if stage in of_row] for stage in stages
        ]

    def there(self) -> list[Time]:
        """The earliest that a stage can begin its first forward."""
        stages = self._pipeline.stages
        found: list[Time] = [0] * len(stages)
        for feed in sorted(self._pipeline.feeds, key=lambda feed: feed.target):
            given = found[feed.source] + stages[feed.source].forward_s
            found[feed.target] = max(found[feed.target], given + self._under_way_s(feed, False))
        return found

    def back(self) -> list[Time]:
        """From the end of a stage's backward (or ``I``) to the end of the step."""
        stages = self._pipeline.stages
        found: list[Time] = [cost.update_s for cost in stages]
        for synchronisation in self._pipeline.synchronisations:
            last_part = synchronisation.time_s * Fraction(1, synchronisation.parts)
            for stage in synchronisation.stages:
                found[stage] = max(found[stage], last_part + stages[stage].update_s)
        for feed in sorted(self._pipeline.feeds, key=lambda feed: feed.target):
            if feed.gradient:
                source_s = _back_s(stages[feed.source], self._split) + found[feed.source]
                way_s = self._under_way_s(feed, True) + source_s
                found[feed.target] = max(found[feed.target], way_s)
        return found

    def _under_way_s(self, feed: Feed, backward: bool) -> Time:
        """Between those rows that are nearest to each other."""
        ends = (self._rows_of[feed.source], self._rows_of[feed.target])
        pairs = [(b, a) if backward else (a, b) for a in ends[0] for b in ends[1]]
        times: list[Time] = []
        for source, target in pairs:
            if source == target:
                return 0
            passage = self._pipeline.network.passage(feed, backward, source, target)
            times.append(passage.busy_s + passage.latency_s)
        return min(times, default=0)
