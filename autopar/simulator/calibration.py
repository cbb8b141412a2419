"""Corrects a profile by steps that were measured: a factor for each physical part of it.

Some steps say little of some parts. So factors are those that are likeliest when the measured steps
and what is known before are taken together: with T_i the predicted and M_i the measured step of
run i, f_p the factor on the seconds of part p, s the spreads,

    minimise  sum_i (log T_i(f) - log M_i)^2 / s_i^2  +  sum_p (log f_p)^2 / s_p^2.

A factor that the runs leave nearly as uncertain as it was before is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cost_models.profiled import PARTS, Profile, corrected

SPREADS = {"compute": 0.2, "communication": 0.4, "overhead": 0.4}
"""How far the logarithm of each factor is expected from 0. Kernels in a step find other caches and
clocks than in a loop, a fifth; collectives and the host also meet ranks that come late."""

LEAST_SPREAD = 0.02
"""Of a measured step: that of the same plan from one start to the next."""

LEAST_LEARNT = 0.05
"""A factor is used if the runs take at least this share of its variance away."""

ROUNDS = 6
STEP = 0.05
"""For derivatives: so much is added to the logarithm of a factor."""

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """``price``: what a profile says that the step takes. ``spread``: of the logarithm of
    ``seconds``."""

    price: Callable[[Profile], float]
    seconds: float
    spread: float


@dataclass(frozen=True, slots=True)
class Factor:
    """On the seconds of ``part``. ``learnt``: which share of what was unknown the steps told."""

    part: str
    factor: float
    learnt: float


def factors(profile: Profile, steps: Sequence[MeasuredStep]) -> tuple[Factor, ...]:
    """Of every part; 1 where the steps say nothing."""
    used = list(PARTS)
    while used:
        logs, learnt = _likeliest(profile, steps, used)
        least = int(np.argmin(learnt))
        if learnt[least] >= LEAST_LEARNT:
            break
        used.pop(least)
    known = (
        {
            part: Factor(part, float(np.exp(log)), float(share))
            for part, log, share in zip(used, logs, learnt, strict=True)
        }
        if used
        else {}
    )
    return tuple(known.get(part, Factor(part, 1.0, 0.0)) for part in PARTS)


def _likeliest(
    profile: Profile, steps: Sequence[MeasuredStep], parts: Sequence[str]
) -> tuple[Vector, Vector]:
    """Logarithms of factors by Gauss and Newton, and how much of each one's variance is gone."""
    before = np.diag([SPREADS[part] ** -2.0 for part in parts])
    weights = np.diag([max(step.spread, LEAST_SPREAD) ** -2.0 for step in steps])
    measured = np.log([step.seconds for step in steps])
    logs = np.zeros(len(parts))
    information = before
    for _ in range(ROUNDS):
        predicted = _predicted(profile, steps, parts, logs)
        slopes = np.stack(
            [
                (_predicted(profile, steps, parts, logs + STEP * one) - predicted) / STEP
                for one in np.eye(len(parts))
            ],
            axis=1,
        )
        information = before + slopes.T @ weights @ slopes
        wanted = slopes.T @ weights @ (measured - predicted) - before @ logs
        logs = logs + np.linalg.solve(information, wanted)
    after = np.diag(np.linalg.inv(information))
    return logs, 1.0 - after * np.diag(before)


def _predicted(
    profile: Profile, steps: Sequence[MeasuredStep], parts: Sequence[str], logs: Vector
) -> Vector:
    changed = corrected(profile, dict(zip(parts, np.exp(logs).tolist(), strict=True)))
    return np.log([step.price(changed) for step in steps])


__all__ = ["Factor", "MeasuredStep", "factors"]
