"""Published configurations: what autopar predicts of them beside what was reported.

Run as ``python -m benchmarks.published [NAME ...]`` from the root of the repository.
"""

from __future__ import annotations

import argparse
from time import process_time

from autopar import api
from autopar.exporters.units import bytes_text, time_text
from autopar.recipes import PUBLISHED, Published, degrees_text

SEQUENCE = 2048
"""Tokens of a sample of the ``hf:`` models, as their sources have it."""

HEADER = ("name", "devices", "predicted", "reported", "difference", "memory", "extract", "plan")


def row(entry: Published) -> tuple[str, ...]:
    sized = entry.model.startswith("hf:")
    started = process_time()
    graph = api.extract(
        entry.model,
        precision="mixed",
        batch=entry.batch if sized else None,
        sequence=SEQUENCE if sized else None,
    )
    extracted = process_time()
    limit_bytes = 10**15  # what does not fit is shown as well
    plan = api.plan(
        graph,
        topology=entry.topology,
        recipe=entry.name,
        precision="mixed",
        optimizer="adam",
        memory_limit_bytes=limit_bytes,
    )
    planned = process_time()
    step_s, has = plan.estimate.step_time_s, api.machine(entry.topology).memory_bytes
    return (
        entry.name,
        str(entry.degrees.devices),
        time_text(step_s),
        time_text(entry.step_s),
        f"{step_s / entry.step_s - 1:+.1%}",
        f"{bytes_text(plan.estimate.peak_memory_bytes)} of {bytes_text(has)}",
        f"{extracted - started:.1f} s",
        f"{planned - extracted:.1f} s",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="of autopar/recipes/published.py; default: all")
    names = parser.parse_args().names or list(PUBLISHED)
    print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|")
    for name in names:
        print("| " + " | ".join(row(PUBLISHED[name])) + " |", flush=True)
    for name in names:
        entry = PUBLISHED[name]
        print(f"\n{name}: {degrees_text(entry.degrees)}\n  {entry.source}")
        if entry.note:
            print(f"  {entry.note}")


if __name__ == "__main__":
    main()
