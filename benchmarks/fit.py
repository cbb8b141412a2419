"""Fits the parameters of prices to published runs: ``python -m benchmarks.fit rows.csv [...]``.

What is made small is the errors' size, of the logarithm of a step's time; a source counts by the
square root of its number of rows, so that one of a thousand does not drown the others. Each
parameter also has a guess to stay near to, with a width. Printed is a table: each source's error
where all were fitted, and where all but this one were; sources that are never fitted to are shown,
too. ``--write`` writes ``calibration.toml``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import exp, log
from pathlib import Path
from statistics import fmean

import numpy as np

from autopar.errors import AutoparError
from benchmarks.cells import SkippedError
from benchmarks.derived import Derived, Seconds, Vector, scaled
from benchmarks.quality import kendall_tau
from benchmarks.rows import run_of
from benchmarks.runs import Run, step_s
from benchmarks.validate import read
from cost_models import Analytical, Topology
from cost_models.calibration import FILE, FORMAT, VERSION, Calibration

NEVER_FITTED = ("arXiv 2104.04473",)
"""PTD-P, tables 1 and 2: kept to show what the others say of it."""

ROUNDS, INNER_ROUNDS = 3, 30
LEAST_ERROR = 0.02
"""Errors below this count by their square: they are noise."""


@dataclass(frozen=True)
class Guess:
    """``width``: of the logarithm; ``why``: where the guess is from."""

    value: float
    width: float
    least: float
    most: float
    why: str


GUESSES = {
    "matmul_efficiency": Guess(
        1.0,
        0.05,
        0.5,
        1.0,
        "11 products of 0.2 ms and more by themselves on one H100 (2026-11-27): 0.97 and more of "
        "the largest measured, their shapes apart, 0.05 from each other",
    ),
    "fill_steps": Guess(
        5.0, 0.05, 0.5, 32.0, "25 products alone on one H100 (2026-11-27), which 4 to 6 fit best"
    ),
    "misaligned_slowdown": Guess(
        3.0, 0.5, 1.0, 8.0, "NVIDIA, Matrix Multiplication Background: several times"
    ),
    "attention_efficiency": Guess(
        0.8, 0.3, 0.2, 1.0, "as for products: fused attention in a run beside the largest measured"
    ),
    "memory_efficiency": Guess(
        0.85, 0.1, 0.5, 0.95, "copy and triad of BabelStream on HBM, from memory: 0.8 to 0.92"
    ),
    "operator_s": Guess(4e-5, 0.5, 1e-6, 5e-4, "tens of microseconds in traces of eager PyTorch"),
    "flop_pj": Guess(
        1.44,
        0.1,
        0.1,
        3.0,
        "products for seconds on one H100 (2026-11-27): 0.84 of the largest measured at 680 W; 3% "
        "of that clock is 10% of the energy",
    ),
}
NAMES = tuple(GUESSES)


@dataclass(frozen=True)
class Priced:
    """``error``: the logarithm of predicted by measured; ``by``: its derivatives."""

    run: Run
    error: float
    by: Vector


# ---- prices --------------------------------------------------------------------------------------


def priced(runs: Iterable[Run], calibration: Calibration) -> Iterator[Priced]:
    """Those that can be predicted."""
    models: dict[tuple[Topology, int], Derived] = {}
    for run in runs:
        assert run.step_s is not None
        try:
            machine = run.topology, run.channels
            if machine not in models:
                topology, channels = machine
                base = Analytical(topology, calibration, channels=channels)
                models[machine] = Derived(base, NAMES)
            time_s = step_s(run, models[machine])
        except (AutoparError, ValueError):
            continue
        by = time_s.by / float(time_s) if isinstance(time_s, Seconds) else np.zeros(len(NAMES))
        yield Priced(run, log(time_s / run.step_s), by)


# ---- the fit -------------------------------------------------------------------------------------


def fitted(runs: Sequence[Run], start: Calibration) -> Calibration:
    found = start
    for _ in range(ROUNDS):
        found = better(list(priced(runs, found)), found)
    return found


def better(rows: Sequence[Priced], calibration: Calibration) -> Calibration:
    """Least absolute errors with steps as linear as they are here; the step is at most a half."""
    counts = {row.run.source: 0 for row in rows}
    for row in rows:
        counts[row.run.source] += 1
    share = np.array([counts[row.run.source] ** -0.5 for row in rows])
    share /= share.sum()
    errors = np.array([row.error for row in rows])
    by = np.stack([row.by for row in rows])
    now = np.array([log(getattr(calibration, name)) for name in NAMES])
    guess = np.array([log(g.value) for g in GUESSES.values()])
    prior = 1e-3 / np.array([g.width for g in GUESSES.values()]) ** 2
    low = np.array([log(g.least) for g in GUESSES.values()])
    high = np.array([log(g.most) for g in GUESSES.values()])
    moved = np.zeros(len(NAMES))
    for _ in range(INNER_ROUNDS):
        weight = share / np.maximum(np.abs(errors + by @ moved), LEAST_ERROR)
        left = (by.T * weight) @ by + np.diag(prior)
        right = -(by.T * weight) @ errors + prior * (guess - now)
        moved = np.clip(np.linalg.solve(left, right), -0.5, 0.5)
        moved = np.clip(now + moved, low, high) - now
    return scaled(calibration, {n: exp(step) for n, step in zip(NAMES, moved, strict=True)})


# ---- the table -----------------------------------------------------------------------------------


def thinned(runs: Sequence[Run], most: int) -> list[Run]:
    """Of each source at most so many, evenly from its list."""
    by_source: dict[str, list[Run]] = {}
    for run in runs:
        by_source.setdefault(run.source, []).append(run)
    found: list[Run] = []
    for of in by_source.values():
        stride = max(1, -(-len(of) // most))
        # a stride that divides a table's own period would see only some of its rows
        found += of[:: stride + (stride % 2 == 0)] if len(of) > most else of
    return found


def summary(rows: Sequence[Priced]) -> str:
    errors = [exp(row.error) - 1 for row in rows]
    measured_s = [row.run.step_s or 0.0 for row in rows]
    tau = kendall_tau([(s, s * (1 + e)) for s, e in zip(measured_s, errors, strict=True)])
    order = "-" if tau is None else f"{tau:.2f}"
    largest = max(map(abs, errors))
    return f"{fmean(map(abs, errors)):6.1%} {fmean(errors):+7.1%} {largest:6.1%} {order:>5}"


def report(runs: Sequence[Run], found: Calibration) -> Iterator[str]:
    """The fit to all others is one step from the fit to all, with steps as linear as there."""
    rows = list(priced(runs, found))
    yield f"{'source':60s} rows | fitted to all: mean, bias, largest, tau | to all others"
    for source in dict.fromkeys(row.run.source for row in rows):
        own = [row for row in rows if row.run.source == source]
        line = f"{short(source):60s} {len(own):4d} | {summary(own)}"
        if source.startswith(NEVER_FITTED):
            yield f"{line} | never fitted to"
            continue
        others = [row for row in rows if row.run.source != source and not kept_out(row.run)]
        without = better(others, found)
        yield f"{line} | {summary(list(priced([row.run for row in own], without)))}"


def short(source: str) -> str:
    return source if len(source) <= 60 else f"{source[:28]} ... {source[-27:]}"


def kept_out(run: Run) -> bool:
    return run.source.startswith(NEVER_FITTED)


def content(found: Calibration, runs: Sequence[Run], command: str) -> str:
    lines = [
        "# Parameters of prices of compute; cost_models/calibration.py says what they mean.",
        f"# Written by `{command}`; what each source says of the others: benchmarks/README.md.",
        "",
        f'format = "{FORMAT}"',
        f"version = {VERSION}",
        f'date = "{datetime.now(UTC).date().isoformat()}"',
        "",
        "[parameters]",
    ]
    for name, guess in GUESSES.items():
        value = f"{getattr(found, name):.3g}"
        value = value if set(value) & set(".e") else f"{value}.0"
        lines.append(
            f'{name} = {{ value = {value}, source = "fit, from {guess.value:g}: {guess.why}" }}'
        )
    lines += ["", "[fitted_to]  # rows by source"]
    for source in dict.fromkeys(run.source for run in runs):
        lines.append(f"{json.dumps(source)} = {sum(run.source == source for run in runs)}")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", nargs="+", type=Path, help="files of rows; see benchmarks/README.md")
    parser.add_argument("--most", type=int, default=96, help="rows of a source that are fitted to")
    parser.add_argument("--write", action="store_true", help="write cost_models/calibration.toml")
    parser.add_argument("--no-table", action="store_true", help="leave the table out")
    arguments = parser.parse_args()
    runs = thinned(list(measured(arguments.csv)), arguments.most)
    used = [run for run in runs if not kept_out(run)]
    found = fitted(used, Calibration(**{name: guess.value for name, guess in GUESSES.items()}))
    for name in NAMES:
        print(f"{name:24s} {getattr(found, name):.4g}  (guess {GUESSES[name].value:g})", flush=True)
    if arguments.write:
        names = " ".join(path.name for path in arguments.csv)
        command = f"python -m benchmarks.fit {names} --most {arguments.most} --write"
        FILE.write_text(content(found, used, command))
    for line in [] if arguments.no_table else report(runs, found):
        print(line, flush=True)
    return 0


def measured(paths: Sequence[Path]) -> Iterator[Run]:
    for row in read(paths):
        try:
            run = run_of(row)
        except SkippedError:
            continue
        if run.step_s is not None:
            yield run


if __name__ == "__main__":
    sys.exit(main())
