"""Predicted steps beside published ones: ``python -m benchmarks.validate rows.csv [...]``.

Printed by source: rows, those that were skipped and why, the errors of times and
memory, whether their order is right (Kendall's tau), and what was wrongly thought to fit or not.
A row that meets a defect of autopar is told by name, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from time import process_time

from autopar.api import no_garbage
from benchmarks.cells import Row
from benchmarks.quality import Quality, share, validate
from benchmarks.report import page
from benchmarks.rows import COLUMNS


def read(paths: Iterable[Path]) -> Iterator[Row]:
    for path in paths:
        try:
            file = path.open(newline="", encoding="utf-8-sig", errors="replace")
        except OSError as error:
            raise SystemExit(f"{path} cannot be read: {error.strerror}") from error
        with file:
            rows = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
            if missing:
                raise SystemExit(f"{path} has no columns {', '.join(missing)}")
            found = [row for row in rows if any(row.values())]
        if not found:
            raise SystemExit(f"{path} has columns and no rows")
        yield from found


def text(found: Quality) -> str:
    tau = "-" if found.tau is None else f"{found.tau:.3f}"
    lines = [
        f"{found.source}",
        f"  {found.predicted} of {found.rows} rows; step: mean error {share(found.step_mean)} "
        f"(bias {share(found.step_bias)}), largest {share(found.step_largest)}, tau {tau}, "
        f"in the band {share(found.step_in_band)}",
        f"  memory: mean error {share(found.memory_mean)}, largest {share(found.memory_largest)}; "
        f"{found.false_fits} false fits, {found.false_rejects} false rejects, "
        f"{found.not_judged} not judged",
    ]
    lines += [f"    assumed of {n}: {what}" for what, n in found.assumed.items()]
    lines += [f"    skipped {n}: {reason}" for reason, n in found.skipped.items()]
    lines += [f"    FAILED: {name}: {what}" for name, what in found.failed]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", nargs="+", type=Path, help="files of rows; see benchmarks/README.md")
    parser.add_argument("--json", action="store_true", help="an object for each source")
    parser.add_argument("--rows", action="store_true", help="each row, the largest error first")
    parser.add_argument("-o", "--output", type=Path, help="write a page with a picture")
    arguments = parser.parse_args()
    started = process_time()
    with no_garbage():
        found, compared = validate(read(arguments.csv))
    elapsed_s = process_time() - started
    for source in found:
        print(json.dumps(asdict(source)) if arguments.json else text(source))
    if arguments.rows:
        for one in sorted(compared, key=lambda one: -abs(one.step_error or 0)):
            error = "-" if one.step_error is None else f"{one.step_error:+.1%}"
            memory = "" if one.run.memory_bytes is None else f"{one.memory_error:+.1%}"
            fits = "fits" if one.fits else "does not fit"
            wrong = " (it did)" if one.false_reject else ""
            wrong = " (it did not)" if one.false_fit else wrong
            wrong = wrong if one.judged else " (not judged)"
            print(
                f"{one.run.name}\t{one.run.step_s}\t{one.step_s:.4g}\t{error}"
                f"\t{one.memory_bytes / 1e9:.1f} GB {memory}\t{fits}{wrong}"
            )
    if arguments.output is not None:
        try:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(page(found, compared))
        except OSError as error:
            raise SystemExit(f"{arguments.output} cannot be written: {error.strerror}") from error
        print(f"written to {arguments.output}", file=sys.stderr)
    rate = found[-1].rows / elapsed_s * 60
    print(f"{found[-1].rows} rows in {elapsed_s:.1f} CPU s, {rate:.0f} a minute", file=sys.stderr)
    return int(bool(found[-1].failed))


if __name__ == "__main__":
    sys.exit(main())
