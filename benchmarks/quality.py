"""How good predictions of published runs are, by the source of their rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from benchmarks.cells import Row, SkippedError
from benchmarks.rows import cleaned, run_of
from benchmarks.runs import Compared, DefectError, Run, predicted


@dataclass(frozen=True)
class Quality:
    """Of the rows of one source. Errors are relative; mean and largest are of their size, ``bias``
    is their mean with its sign; ``step_in_band``: the share of steps that lies in its band.
    ``None`` where nothing of the kind was measured. ``assumed``: what some rows do not say;
    ``not_judged``: of how many that decides whether they fit. ``left_out``: names of rows that
    cannot be, and why; ``failed``: of rows that met a defect."""

    source: str
    rows: int
    predicted: int
    skipped: dict[str, int]
    assumed: dict[str, int]
    step_mean: float | None
    step_bias: float | None
    step_largest: float | None
    step_in_band: float | None
    tau: float | None
    memory_mean: float | None
    memory_largest: float | None
    false_fits: int
    false_rejects: int
    not_judged: int
    left_out: tuple[tuple[str, str], ...] = ()
    failed: tuple[tuple[str, str], ...] = ()


def quality(
    source: str,
    compared: Sequence[Compared],
    left_out: Sequence[tuple[str, str]],
    failed: Sequence[tuple[str, str]] = (),
) -> Quality:
    steps = [(one.step_error, one) for one in compared]
    errors = [error for error, _ in steps if error is not None]
    memory = [one.memory_error for one in compared if one.memory_error is not None]
    pairs = [(one.run.step_s, one.step_s) for one in compared if one.run.step_s is not None]
    return Quality(
        source,
        len(compared) + len(left_out) + len(failed),
        len(compared),
        dict(Counter(reason for _, reason in left_out).most_common()),
        dict(Counter(what for one in compared for what in one.run.assumed).most_common()),
        _mean(map(abs, errors)),
        _mean(errors),
        max(map(abs, errors), default=None),
        _mean(one.step_in_band for one in compared if one.step_in_band is not None),
        kendall_tau(pairs),
        _mean(map(abs, memory)),
        max(map(abs, memory), default=None),
        sum(one.false_fit for one in compared),
        sum(one.false_reject for one in compared),
        sum(not one.judged for one in compared),
        tuple(left_out),
        tuple(failed),
    )


def _mean(numbers: Iterable[float]) -> float | None:
    found = list(numbers)
    return fmean(found) if found else None


def kendall_tau(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Tau-b of two orders: 1 where they agree, -1 where one is the other turned round.

    >>> kendall_tau([(1, 10), (2, 20), (3, 15)])
    0.3333333333333333
    """
    agree = ties_a = ties_b = 0
    every = 0
    for (a, b), (c, d) in combinations(pairs, 2):
        every += 1
        order = (a - c) * (b - d)
        agree += (order > 0) - (order < 0)
        ties_a += a == c
        ties_b += b == d
    left = ((every - ties_a) * (every - ties_b)) ** 0.5
    return agree / left if left else None


def validate(rows: Iterable[Row]) -> tuple[list[Quality], list[Compared]]:
    """By source in the order of the rows, then all of them together."""
    runs: list[Run] = []
    left_out = defaultdict[str, list[tuple[str, str]]](list)
    failed = defaultdict[str, list[tuple[str, str]]](list)
    sources: dict[str, list[Compared]] = {}
    for row in map(cleaned, rows):
        sources.setdefault(row["source"], [])
        try:
            runs.append(run_of(row))
        except SkippedError as reason:
            left_out[row["source"]].append((row["config_id"], str(reason)))
    for run, answer in predicted(runs):
        if isinstance(answer, Compared):
            sources[run.source].append(answer)
        else:
            reasons = failed if isinstance(answer, DefectError) else left_out
            reasons[run.source].append((run.name, str(answer)))
    everything = [one for compared in sources.values() for one in compared]
    found = [quality(name, of, left_out[name], failed[name]) for name, of in sources.items()]
    whole = ([one for of in reasons.values() for one in of] for reasons in (left_out, failed))
    return [*found, quality("all", everything, *whole)], everything


def share(number: float | None) -> str:
    """
    >>> share(0.123), share(None)
    ('12.3%', '-')
    """
    return "-" if number is None else f"{number:.1%}"


__all__ = ["Quality", "kendall_tau", "quality", "share", "validate"]
