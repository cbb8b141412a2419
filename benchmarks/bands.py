"""Learns how far predictions are off: ``python -m benchmarks.bands rows.csv [...]``.

Runs are predicted as ``benchmarks.validate`` does; those of this machine are read from
``benchmarks/measured``. What is learnt is written to ``cost_models/bands.json`` with ``-o``.

**The model.** The logarithm of measured / predicted of run i is e[i] = sum_k w[i,k] * u[i,k] over
kinds k: w is the kind's share of the step, u by how much its price is off, with mean 0 and a
variance of the kind alone. So e[i] has the variance sum_k w[i,k]^2 * var[k]. Variances are those
that make the runs most likely (expectation maximisation), each drawn to the common one as if one
source more had that. All widths are then stretched alike until the share of runs that is asked for
lies in bands learnt from all other sources. A source counts as one, however many runs it has.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autopar import __version__
from benchmarks.cells import Row
from benchmarks.quality import validate
from benchmarks.runs import Compared
from benchmarks.validate import read
from cost_models.bands import (
    CORRECTED,
    DATASHEET,
    KINDS,
    PROFILED,
    Bands,
    Told,
    Widths,
    bands_to_json,
)

Numbers = NDArray[np.float64]

COVERAGE = 0.8
"""The share of runs that a band is to hold."""

WHOLE_SOURCE = 8
"""Runs of a source from which on it counts as one; with fewer it counts as a part of one."""

LEAST_SHARE = 0.02
"""Of the steps of a source on average, for its runs to tell something of a kind."""

LEAST_WIDTH = 1e-3
"""Of a logarithm: predictions that are exact, as of allocated memory on CPUs, have this one."""

ROUNDS = 400
"""Of expectation maximisation; what changes later is below a thousandth."""

MEASURED = Path(__file__).with_name("measured")


@dataclass(frozen=True)
class Residual:
    """``error``: the logarithm of measured / predicted. ``shares``: of the step, by kind.
    ``device``: the name of one.
    ``alike``: the same for runs among which a plan is chosen: of one model, batch and machine."""

    source: str
    alike: str
    error: float
    shares: dict[str, float]
    device: str = ""


@dataclass(frozen=True)
class Table:
    """Residuals as arrays: ``shares`` has a column for each of ``KINDS``."""

    sources: tuple[str, ...]
    alike: tuple[str, ...]
    errors: Numbers
    shares: Numbers

    @staticmethod
    def of(residuals: Sequence[Residual]) -> Table:
        return Table(
            tuple(one.source for one in residuals),
            tuple(one.alike for one in residuals),
            np.array([one.error for one in residuals]),
            np.array([[one.shares.get(kind, 0.0) for kind in KINDS] for one in residuals]),
        )

    def without(self, *sources: str) -> Table:
        return self._where(np.array([source not in sources for source in self.sources]))

    def only(self, source: str) -> Table:
        return self._where(np.array([one == source for one in self.sources]))

    def _where(self, kept: NDArray[np.bool_]) -> Table:
        numbers = np.flatnonzero(kept)
        return Table(
            tuple(self.sources[i] for i in numbers),
            tuple(self.alike[i] for i in numbers),
            self.errors[kept],
            self.shares[kept],
        )

    @property
    def weights(self) -> Numbers:
        """By which each source counts as one, or a part of one."""
        counts = {source: self.sources.count(source) for source in set(self.sources)}
        return np.array([1 / max(counts[source], WHOLE_SOURCE) for source in self.sources])


# ---- learning ------------------------------------------------------------------------------------


def variances(of: Table) -> Numbers:
    """By kind, in the order of ``KINDS``."""
    weights, squares, errors = of.weights[:, None], of.shares**2, of.errors[:, None]
    common = float((weights * errors**2).sum() / (weights * squares.sum(1, keepdims=True)).sum())
    found = np.full(len(KINDS), common)
    for _ in range(ROUNDS):
        whole = squares @ found  # the variance of each run
        gain = found * of.shares / whole[:, None]
        expected = found + gain**2 * (errors**2 - whole[:, None])  # of u^2, given the run
        found = ((weights * expected).sum(0) + common) / (weights.sum() + 1)
    return found


def half_widths(of: Table, by_kind: Numbers) -> Numbers:
    found: Numbers = np.sqrt(of.shares**2 @ by_kind)
    return found


def stretch(of: Table, coverage: float, leave_out: Sequence[str] = ()) -> float:
    """How much wider than one deviation a band must be, judged by runs of sources that it was not
    learnt from."""
    ratios, weights = [], []
    for source in dict.fromkeys(of.sources):
        others = of.without(source, *leave_out)
        if others.sources:
            own = of.only(source)
            ratios.append(np.abs(own.errors) / half_widths(own, variances(others)))
            weights.append(own.weights)
    if not ratios:  # nothing else to judge by
        return float(
            quantile(np.abs(of.errors) / half_widths(of, variances(of)), of.weights, coverage)
        )
    return float(quantile(np.concatenate(ratios), np.concatenate(weights), coverage))


def quantile(values: Numbers, weights: Numbers, share: float) -> float:
    """The smallest of the values below or at which there is so much of the weight.

    >>> quantile(np.array([3.0, 1.0, 2.0]), np.array([1.0, 1.0, 2.0]), 0.75)
    2.0
    """
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) >= share * weights.sum() * (1 - 1e-12)
    return float(values[order][np.argmax(reached)])


def told_by(of: Table, source: str, coverage: float) -> Told:
    """How many of the runs of a source, and of their differences, are in bands that know nothing of
    it."""
    others, own = of.without(source), of.only(source)
    if not others.sources:
        return Told(source, len(own.sources), None)
    by_kind = variances(others) * stretch(others, coverage) ** 2
    missing, width = missing_squares(own, by_kind), own_width(others, by_kind, coverage)
    return Told(
        source,
        len(own.sources),
        float((np.abs(own.errors) <= half_widths(own, by_kind)).mean()),
        len(missing),
        float((missing <= width**2).mean()) if len(missing) else None,
    )


def own_width(of: Table, by_kind: Numbers, coverage: float) -> float:
    """What differences of alike runs need beside what their kinds explain, to be covered."""
    needed, weights = [], []
    for source in dict.fromkeys(of.sources):
        missing = missing_squares(of.only(source), by_kind)
        if len(missing):
            needed.append(missing)
            weights.append(np.full(len(missing), 1 / max(len(missing), WHOLE_SOURCE)))
    if not needed:  # nothing tells: as wide as all residuals are
        return max(LEAST_WIDTH, quantile(np.abs(of.errors), of.weights, coverage))
    found = quantile(np.concatenate(needed), np.concatenate(weights), coverage)
    return math.sqrt(max(found, LEAST_WIDTH**2))


def missing_squares(of: Table, by_kind: Numbers) -> Numbers:
    """For each pair of alike runs, by how much the square of their difference is above what kinds
    explain."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for i, alike in enumerate(of.alike):
        groups[alike].append(i)
    found = [np.empty(0)]
    for numbers in groups.values():
        a, b = (np.array(numbers)[k] for k in np.triu_indices(len(numbers), 1))
        explained = ((of.shares[a] - of.shares[b]) ** 2) @ by_kind
        found.append((of.errors[a] - of.errors[b]) ** 2 - explained)
    return np.concatenate(found)


def told(of: Table) -> tuple[str, ...]:
    """Kinds that take enough of the steps of some source."""
    most = np.max([of.only(source).shares.mean(0) for source in set(of.sources)], axis=0)
    return tuple(kind for kind, share in zip(KINDS, most, strict=True) if share >= LEAST_SHARE)


def widths(
    residuals: Sequence[Residual], memory: Sequence[Residual], coverage: float = COVERAGE
) -> Widths:
    """Of machines that are known by their data sheets."""
    table = Table.of(residuals)
    by_kind = variances(table) * stretch(table, coverage) ** 2
    known = told(table)
    kinds = {
        kind: _short(math.sqrt(of_kind))
        for kind, of_kind in zip(KINDS, by_kind.tolist(), strict=True)
        if kind in known
    }
    sources = tuple(told_by(table, source, coverage) for source in dict.fromkeys(table.sources))
    return Widths(
        kinds,
        _short(own_width(table, by_kind, coverage)),
        _short(level(memory, coverage)) if memory else max(kinds.values()),
        len(residuals),
        len(memory),
        devices(residuals),
        sources,
    )


def devices(residuals: Sequence[Residual]) -> tuple[str, ...]:
    return tuple(sorted({one.device for one in residuals}))


def level(residuals: Sequence[Residual], coverage: float) -> float:
    """What so many of the residuals are below."""
    weights = Table.of(residuals).weights
    errors = np.abs(np.array([one.error for one in residuals]))
    return max(LEAST_WIDTH, quantile(errors, weights, coverage))


def measured_widths(
    residuals: Sequence[Residual],
    memory: Sequence[Residual],
    typical: Sequence[Residual],
    coverage: float = COVERAGE,
) -> Widths:
    """Of machines that were measured, or corrected after that. Their tables do not say what steps
    consist of, so all kinds have one width, with which a step of shares as those of the ``typical``
    runs has the band that holds so many of the residuals."""
    concentrated = float(np.median(half_widths(Table.of(typical), np.ones(len(KINDS)))))
    width = _short(level(residuals, coverage) / concentrated)
    pairs = own_width(Table.of(residuals), np.zeros(len(KINDS)), coverage)
    sources = []
    for source in dict.fromkeys(one.source for one in residuals):
        others = [one for one in residuals if one.source != source]
        own = [abs(one.error) for one in residuals if one.source == source]
        limit = level(others, coverage) if others else math.inf
        share = sum(error <= limit for error in own) / len(own) if others else None
        sources.append(Told(source, len(own), share))
    return Widths(
        dict.fromkeys(KINDS, width),
        _short(pairs),
        _short(level(memory, coverage)),
        len(residuals),
        len(memory),
        devices(residuals),
        tuple(sources),
    )


def _short(width: float) -> float:
    """Three digits: a width is known no better."""
    return float(f"{width:.3g}")


# ---- what is learnt from -------------------------------------------------------------------------


def residuals_of(compared: Iterable[Compared]) -> list[Residual]:
    """Of steps."""
    found = []
    for one in compared:
        run = one.run
        if run.step_s is not None and one.band is not None:
            shares = {doubt.kind: doubt.time_s / one.step_s for doubt in one.band.doubts}
            alike = repr((run.machine, run.model, run.batch))
            error, device = math.log(run.step_s / one.step_s), run.machine.split("x", 2)[-1]
            found.append(Residual(run.source, alike, error, shares, device))
    return found


def memory_residuals_of(compared: Iterable[Compared]) -> list[Residual]:
    """Of peaks that were measured; and of runs that were wrongly thought to fit or not, for which
    the limit stands: they are off by that much at least."""
    found = []
    for one in compared:
        run, error = one.run, None
        if run.memory_bytes is not None:
            error = math.log(run.memory_bytes / one.memory_bytes)
        elif one.false_fit or one.false_reject:
            error = -math.log(one.needed)
        if error is not None:
            found.append(Residual(run.source, run.name, error, {}))
    return found


LOCAL_COLUMNS = (
    *("model", "machine", "predicted_step_s", "measured_step_s"),
    *("predicted_peak_bytes", "measured_peak_bytes"),
)
CORRECTED_STEP = "corrected_step_s"
"""In tables that have it, predicted by a profile that the runs with 1 in ``corrects`` corrected."""


def local_rows(folder: Path) -> list[Row]:
    """Of the tables that have plans predicted by ``autopar profile``."""
    found: list[Row] = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            rows = csv.DictReader(line for line in file if not line.startswith("#"))
            if set(LOCAL_COLUMNS) <= set(rows.fieldnames or ()):
                found += rows
    return found


def _local(row: dict[str, str], predicted: str, measured: str) -> Residual:
    error = math.log(float(row[measured]) / float(row[predicted]))
    return Residual(row["model"], row["model"], error, {}, row["machine"])


# ---- the command ---------------------------------------------------------------------------------


def learn(compared: Sequence[Compared], measured: Path, date: str) -> Bands:
    """
    Raises:
        SystemExit: there is nothing to learn from.
    """
    steps, memory = residuals_of(compared), memory_residuals_of(compared)
    rows = local_rows(measured)
    local = [_local(row, "predicted_step_s", "measured_step_s") for row in rows]
    local_memory = [_local(row, "predicted_peak_bytes", "measured_peak_bytes") for row in rows]
    corrected = [
        _local(row, CORRECTED_STEP, "measured_step_s") for row in rows if row.get("corrects") == "0"
    ]
    if not steps:
        raise SystemExit("no row has a measured step that is predicted; give other tables")
    if not local:
        raise SystemExit(f"{measured} has no table with {', '.join(LOCAL_COLUMNS)}")
    datasheet = widths(steps, memory)
    machines = {
        DATASHEET: datasheet,
        PROFILED: measured_widths(local, local_memory, steps),
    }
    if corrected:
        machines[CORRECTED] = measured_widths(corrected, local_memory, steps)
    measured_alone = {"measured": _short(level(local, COVERAGE))}  # as a price of its own
    machines = {
        name: replace(of, kinds={**of.kinds, **measured_alone}) for name, of in machines.items()
    }
    return Bands(COVERAGE, date, f"autopar {__version__}", machines)


def some(rows: Iterable[Row], most: int) -> list[Row]:
    """At most so many of each source, evenly spread: a source counts as one anyway.

    >>> rows = [{"source": "abb"[i % 3], "n": str(i)} for i in range(9)]
    >>> [row["n"] for row in some(rows, 3)]
    ['0', '3', '6', '1', '4', '7']
    """
    sources: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        sources[row["source"]].append(row)
    return [
        of[i * len(of) // most] if len(of) > most else of[i]
        for of in sources.values()
        for i in range(min(most, len(of)))
    ]


def text(bands: Bands) -> str:
    lines = []
    for name, found in bands.machines.items():
        lines += [
            f"{name}: {found.rows} runs on {', '.join(found.devices)}",
            f"  memory, by {found.memory_rows} runs     {math.expm1(found.memory):6.1%}",
            f"  differences of alike runs   {math.expm1(found.own):6.1%} beside their kinds",
            *(f"  {what:28} {_width_text(found, kind)}" for kind, what in KINDS.items()),
            f"  in bands of other sources ({bands.coverage:.0%} should be): runs, differences",
            *(
                f"    {_share(one.covered):>5} of {one.rows:4} {_share(one.pairs_covered):>5} of "
                f"{one.pairs:5}  {one.source}"
                for one in found.sources
            ),
        ]
    return "\n".join(lines)


def _width_text(found: Widths, kind: str) -> str:
    by = f"{math.expm1(found.of(kind)):6.1%}"
    return by if kind in found.kinds else f"{by} (the widest: no run tells)"


def _share(number: float | None) -> str:
    return "-" if number is None else f"{number:.0%}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", nargs="+", type=Path, help="files of rows; see benchmarks/README.md")
    parser.add_argument("--measured", type=Path, default=MEASURED, help="folder of local runs")
    parser.add_argument("--most", type=int, default=240, help="runs of each source")
    parser.add_argument("-o", "--output", type=Path, help="e.g. cost_models/bands.json")
    arguments = parser.parse_args()
    _, compared = validate(some(read(arguments.csv), arguments.most))
    date = datetime.now(UTC).date().isoformat()
    found = learn(compared, arguments.measured, date)
    print(text(found))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(bands_to_json(found), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
