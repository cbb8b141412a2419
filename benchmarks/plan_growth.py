"""How planning a traced model grows with its layers, devices and samples: data, picture.

``python -m benchmarks.plan_growth`` measures into ``docs/plan_search.csv`` and draws
``docs/plan_search.svg`` of it; with ``--draw`` it only draws. Each row is a process of its own.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.growth_picture import Panel, Points, picture, seconds

DATA = Path(__file__).parent.parent / "docs" / "plan_search.csv"

LAYERS, DEVICES, SAMPLES = 32, 64, 256
"""Unless varied: Llama-2-7B's layers of 4096 tokens, on A100 of 80 GB in nodes of 8."""

VALUES = {
    "layers": (16, 32, 64, 128, 256),
    "devices": (8, 64, 512, 2048, 16384),
    "samples": (16, 64, 256, 1024),
}

HYBRID = {"layers": (16, 64), "devices": (8, 64, 512), "samples": (16, 64)}
"""Of these, where the default search is measured, too."""


class Measured(NamedTuple):
    """``degrees``: of parallelism that were bounded, ``None`` for the search over all plans."""

    varied: str
    value: int
    searcher: str
    search_cpu_s: float
    degrees: int | None
    step_time_s: float
    gap: float
    stages: int
    microbatches: int


def cases() -> Iterator[tuple[str, int, str]]:
    for varied, values in VALUES.items():
        for value in values:
            yield varied, value, "degrees"
            if value in HYBRID[varied]:
                yield varied, value, "hybrid"


def measured(varied: str, value: int, searcher: str) -> Measured:
    """Extract and search here, in this process."""
    from benchmarks import search_cost  # noqa: PLC0415 - torch, which drawing does not need

    of = {"layers": LAYERS, "devices": DEVICES, "samples": SAMPLES, varied: value}
    case = search_cost.Case(
        f"Llama-2, {of['layers']} layers",
        lambda: search_cost.llama2(of["samples"], of["layers"]),
        f"{of['devices'] // 8}x8xa100-sxm-80gb",
        None,
        None,
        searcher,
        "auto",
    )
    row = search_cost.measure(case)
    among = re.search(r"[\d,]+", row.among)
    return Measured(
        varied,
        value,
        searcher,
        row.search_cpu_s,
        int(among.group().replace(",", "")) if among else None,
        math.inf if row.step_s is None else row.step_s,
        row.gap,
        row.stages or 0,
        row.microbatches or 0,
    )


def in_own_process(varied: str, value: int, searcher: str) -> Measured:
    command = [sys.executable, "-m", "benchmarks.plan_growth", "--case"]
    command += [varied, str(value), searcher]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Measured(*json.loads(done.stdout.splitlines()[-1]))


def read() -> list[Measured]:
    with DATA.open() as file:
        return [
            Measured(
                row["varied"],
                int(row["value"]),
                row["searcher"],
                float(row["search_cpu_s"]),
                int(row["degrees"]) if row["degrees"] else None,
                float(row["step_time_s"]),
                float(row["gap"]),
                int(row["stages"]),
                int(row["microbatches"]),
            )
            for row in csv.DictReader(file)
        ]


def write(found: Sequence[Measured]) -> None:
    with DATA.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Measured._fields)
        for m in found:
            numbers = f"{m.step_time_s:.5g}", f"{m.gap:.3g}", m.stages, m.microbatches
            writer.writerow(
                (m.varied, m.value, m.searcher, f"{m.search_cpu_s:.3g}", m.degrees, *numbers)
            )


# The picture: a column for each that is varied, seconds above and numbers of degrees below

COLOURS = {"degrees": "#4477aa", "hybrid": "#ee6677", "number": "#228833"}
NAMES = {
    "degrees": "degrees of parallelism",
    "hybrid": "all plans (the default)",
    "number": "how many degrees there are",
}
LABELS = {"layers": "layers", "devices": "devices", "samples": "samples of a step"}


def drawn(found: Sequence[Measured]) -> str:
    most = math.ceil(math.log10(max(m.search_cpu_s for m in found)))
    columns = []
    for varied, values in VALUES.items():
        of_this = [m for m in found if m.varied == varied]
        times = [(COLOURS[of], _points(of_this, of)) for of in ("degrees", "hybrid")]
        number = [(m.value, m.degrees) for m in of_this if m.degrees is not None]
        above = Panel(values, LABELS[varied], -1, most, seconds, times)
        below = Panel(values, LABELS[varied], 2, 5, _count, [(COLOURS["number"], number)])
        columns.append((above, below))
    return picture(columns, [(COLOURS[key], name) for key, name in NAMES.items()])


def _points(found: Sequence[Measured], searcher: str) -> Points:
    return [(m.value, m.search_cpu_s) for m in found if m.searcher == searcher]


def _count(power: int) -> str:
    return f"{10**power:,}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw", action="store_true", help="only draw what was measured before")
    parser.add_argument(
        "--case", nargs=3, metavar=("VARIED", "VALUE", "SEARCHER"), help="only this one, as JSON"
    )
    arguments = parser.parse_args()
    if arguments.case:
        varied, value, searcher = arguments.case
        print(json.dumps(measured(varied, int(value), searcher)))
        return
    if not arguments.draw:
        found = []
        for case in cases():
            found.append(in_own_process(*case))
            print(*found[-1], flush=True)
        write(found)
    DATA.with_suffix(".svg").write_text(drawn(read()))


if __name__ == "__main__":
    main()
