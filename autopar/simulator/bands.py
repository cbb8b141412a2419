"""The band of an estimate, and whether two estimates differ by more than is known.

Everything that shows an estimate to a person gets its band here. Searches do without: they compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

from autopar.ir.graph import OperatorGraph
from autopar.ir.search import Tie, Trial
from autopar.ir.simulation import Band, Doubt, Estimate, PromisedCollective
from autopar.ir.strategy import Strategy
from autopar.simulator.edges import Rules
from autopar.simulator.shares import Seconds, seconds_by_kind
from cost_models.bands import Bands, device_of, known_bands
from cost_models.interface import CostModel


def banded(
    graph: OperatorGraph,
    rules: Rules,
    cost_model: CostModel,
    strategy: Strategy,
    estimate: Estimate,
    bands: Bands | None = None,
) -> Estimate:
    """``estimate`` of ``strategy`` with its band; ``graph`` is that of one microbatch."""
    spent = seconds_by_kind(graph, rules, cost_model, strategy, estimate)
    return with_band(estimate, spent, cost_model, bands)


def with_band(
    estimate: Estimate, spent: Seconds, cost_model: CostModel, bands: Bands | None = None
) -> Estimate:
    """``spent``: the seconds of the step by kind."""
    bands = known_bands() if bands is None else bands
    widths, step_s = bands.of(cost_model), estimate.step_time_s
    device = device_of(cost_model)
    if step_s <= 0:
        return estimate
    doubts = [
        Doubt(kind, time_s, widths.of(kind) * time_s / step_s, kind in widths.kinds)
        for kind, time_s in spent.items()
    ]
    wide = math.exp(math.hypot(*(doubt.relative for doubt in doubts)))
    peak, memory = estimate.peak_memory_bytes, math.exp(widths.memory)
    return replace(
        estimate,
        band=Band(
            low_s=step_s / wide,
            high_s=step_s * wide,
            low_bytes=int(peak / memory),
            high_bytes=math.ceil(peak * memory),
            coverage=bands.coverage,
            own=widths.own,
            learnt=bands.date,
            elsewhere="" if device in widths.devices else device,
            doubts=tuple(sorted(doubts, key=lambda doubt: -doubt.relative)),
        ),
    )


def difference(a: Estimate, b: Estimate) -> float:
    """How far apart the logarithms of two steps of one model on one machine may be, if they are
    equal: an error in the price of what both do as much of makes no difference."""
    assert a.band is not None and b.band is not None
    first, second = (
        {doubt.kind: doubt.relative for doubt in band.doubts} for band in (a.band, b.band)
    )
    kinds = sorted({*first, *second})
    apart = [first.get(kind, 0.0) - second.get(kind, 0.0) for kind in kinds]
    return math.hypot(*apart, a.band.own)


def tied(a: Estimate, b: Estimate) -> bool:
    """Whether it is not known which of the two is faster."""
    return abs(math.log(a.step_time_s / b.step_time_s)) <= difference(a, b)


MOST_LOOKED_AT = 8
"""Of the fastest trials beside the best."""


def ties(
    best: Trial, trials: Iterable[Trial], band_of: Callable[[Trial], Estimate]
) -> tuple[Tie, ...]:
    """The best, and after it those of the fastest trials that are tied with it; none if none is.

    ``band_of`` gives the estimate of a trial with its band.
    """
    estimate = band_of(best)
    if estimate.band is None:
        return ()
    widest_s = estimate.band.high_s**2 / estimate.step_time_s  # if they had no error in common
    others: list[Trial] = []
    for trial in sorted(trials, key=_step_s):
        if trial.strategy is None or _step_s(trial) > widest_s:
            continue
        if all(trial.strategy != one.strategy for one in (best, *others)):
            others.append(trial)
    found = []
    for trial in others[:MOST_LOOKED_AT]:
        other = band_of(trial)
        if other.band is not None and tied(other, estimate):
            found.append(_tie(trial, other, estimate))
    return (_tie(best, estimate, estimate), *found) if found else ()


def _step_s(trial: Trial) -> float:
    return math.inf if trial.estimate is None else trial.estimate.step_time_s


def _tie(trial: Trial, estimate: Estimate, best: Estimate) -> Tie:
    strategy = trial.strategy
    assert strategy is not None
    stages = len(strategy.stages)
    divided = max(sum(size > 1 for size in stage.mesh.sizes) for stage in strategy.stages)
    return Tie(
        name=trial.name,
        mesh=trial.mesh,
        step_time_s=estimate.step_time_s,
        slower=estimate.step_time_s / best.step_time_s - 1,
        within=math.expm1(difference(estimate, best)),
        peak_memory_bytes=estimate.peak_memory_bytes,
        sent_bytes=sent_bytes(estimate),
        axes=divided + (stages > 1),
        stages=stages,
        microbatches=strategy.microbatches,
        recomputed=len(strategy.recompute),
    )


def sent_bytes(estimate: Estimate) -> int:
    """Of the device that has most: the buffers of all collectives and transfers of a step."""
    pipeline = estimate.pipeline
    if pipeline is None:
        return _buffers(estimate.collectives)
    sent = [0] * len(pipeline.rows)
    for one in pipeline.traffic:
        sent[one.source_row] += one.bytes // len(pipeline.rows[one.source_row].devices)
    return max(
        _buffers(row.collectives) + of_row for row, of_row in zip(pipeline.rows, sent, strict=True)
    )


def _buffers(collectives: Iterable[PromisedCollective]) -> int:
    return sum(one.bytes * one.count for one in collectives)
