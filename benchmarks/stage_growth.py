"""How the search for stages grows with blocks, devices and numbers of microbatches: data, picture.

``python -m benchmarks.stage_growth`` measures into ``docs/stage_search.csv`` and draws
``docs/stage_search.svg`` of it; with ``--draw`` it only draws.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path
from time import process_time
from typing import NamedTuple

from autopar.ir.search import Budget
from autopar.searchers.over_stages import search
from benchmarks.growth_picture import Panel, Points, percent, picture, seconds
from benchmarks.stage_search import divisors, problem

DATA = Path(__file__).parent.parent / "docs" / "stage_search.csv"
BATCH, BLOCKS, DEVICES = 3072, 96, 1024
FEW = (48, 96, 192)
PROVING_S = 15.0
"""Of wall time for proofs, as of a user who waits so long."""

VALUES = {
    "blocks": (16, 32, 64, 96, 128, 256),
    "devices": (128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    "microbatches": (1, 3, 6, 11, 22),
}
"""What is varied; of microbatches it is how many numbers of them are tried."""


class Measured(NamedTuple):
    """``plan_cpu_s``: until equal stages had been proposed; ``cpu_s``: in all, with the moves of
    units and the proofs. ``shapes``: how many there were."""

    varied: str
    value: int
    plan_cpu_s: float
    cpu_s: float
    gap: float
    step_time_s: float
    shapes: int
    best: str


def measure(varied: str, value: int) -> Measured:
    blocks = value if varied == "blocks" else BLOCKS
    devices = value if varied == "devices" else DEVICES
    microbatches = FEW
    if varied == "microbatches":  # those in the middle of all that there are
        every = divisors(BATCH)
        first = (len(every) - value) // 2
        microbatches = every[first : first + value]
    start_s = process_time()
    planned: list[float] = []

    def progress(line: str) -> None:
        if line.startswith("moving units"):
            planned.append(process_time() - start_s)

    asked = problem(blocks, devices, BATCH, microbatches)
    result = search(asked, Budget(300.0, 1e-3, PROVING_S), progress)
    cpu_s = process_time() - start_s
    best = "nothing fits" if result.stop_reason == "infeasible" else "nothing found"
    if result.best is not None:
        stages = result.best.stages
        best = (
            f"{len(stages)} stages of {stages[0].layout.name}, {result.best.schedule.name} "
            f"x {result.best.chunks}, {result.best.microbatches} microbatches"
        )
    plan_s = planned[0] if planned else cpu_s
    return Measured(
        varied, value, plan_s, cpu_s, result.gap, result.time_s, len(result.trials), best
    )


def read() -> list[Measured]:
    with DATA.open() as file:
        return [
            Measured(
                row["varied"],
                int(row["value"]),
                *(float(row[key]) for key in ("plan_cpu_s", "cpu_s", "gap", "step_time_s")),
                int(row["shapes"]),
                row["best"],
            )
            for row in csv.DictReader(file)
        ]


def write(found: Sequence[Measured]) -> None:
    with DATA.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Measured._fields)
        for m in found:
            numbers = (f"{x:.4g}" for x in (m.plan_cpu_s, m.cpu_s, m.gap, m.step_time_s))
            writer.writerow((m.varied, m.value, *numbers, m.shapes, m.best))


# The picture: a column for each that is varied, seconds above and gaps below

COLOURS = {"plan_cpu_s": "#4477aa", "cpu_s": "#ee6677", "gap": "#228833"}
NAMES = {
    "plan_cpu_s": "until equal stages were tried",
    "cpu_s": "in all",
    "gap": "how much better a plan could be at most",
}
LABELS = {
    "blocks": "blocks",
    "devices": "devices",
    "microbatches": "numbers of microbatches tried",
}


def drawn(found: Sequence[Measured]) -> str:
    most = math.ceil(math.log10(max(m.cpu_s for m in found)))
    columns = []
    for varied, values in VALUES.items():
        of_this = [m for m in found if m.varied == varied]
        feasible = [m for m in of_this if math.isfinite(m.step_time_s)]
        times = [_line(of_this, key) for key in ("plan_cpu_s", "cpu_s")]
        above = Panel(values, LABELS[varied], -1, most, seconds, times)
        below = Panel(values, LABELS[varied], -3, 0, percent, [_line(feasible, "gap")])
        columns.append((above, below))
    return picture(columns, [(COLOURS[key], name) for key, name in NAMES.items()])


def _line(found: Sequence[Measured], key: str) -> tuple[str, Points]:
    return COLOURS[key], [(m.value, getattr(m, key)) for m in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw", action="store_true", help="only draw what was measured before")
    if not parser.parse_args().draw:
        found = []
        for varied, values in VALUES.items():
            for value in values:
                found.append(measure(varied, value))
                print(*found[-1])
        write(found)
    DATA.with_suffix(".svg").write_text(drawn(read()))


if __name__ == "__main__":
    main()
