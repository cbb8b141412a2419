"""What all degrees of GPT-3 175B cost: ``python -m benchmarks.degrees``.

Every tensor, pipeline and data degree of 1024 A100, chunks, schedule, microbatch, sequence
parallelism and ZeRO level, 3072 samples a step. First all of them are priced and simulated with
each way of recomputation in all blocks; then the fastest that fits is searched and proved, with any
number of blocks recomputed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from time import process_time
from typing import Any

from autopar import api
from autopar.ir.strategy import Training
from autopar.searchers.degree_space import DegreeSpace
from autopar.searchers.over_degrees import DegreePrices
from benchmarks.transformer import Transformer
from cost_models import cost_model

GPT3 = Transformer(
    96, 12288, 96, 96, 49152, 51200, 2048, flash=False, dropout=True, dtype="float16"
)
MACHINE, BATCH = "128x8xa100-sxm-80gb", 3072
RECOMPUTE = ("none", "attention", "full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="only each so-manieth configuration")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = {**_all_bounds(arguments.every), **_search()}
    print(json.dumps(found) if arguments.json else _said(found))


def _all_bounds(every: int) -> dict[str, Any]:
    machine = cost_model(MACHINE)
    degrees = DegreeSpace(machine.devices, GPT3.layers, BATCH)
    space = [replace(one, recompute=way) for one in degrees for way in RECOMPUTE][::every]
    prices = DegreePrices(GPT3.graph(BATCH), machine, Training("adam", "mixed"))
    started = process_time()
    with api.no_garbage():  # as in all searches of the API
        bounds = prices.bounds(space)
    used_s = process_time() - started
    return {
        "configurations": len(space),
        "skipped": sum(bounds.skipped.values()),
        "cpu_s": used_s,
        "ms_each": used_s / len(space) * 1e3,
    }


def _search() -> dict[str, Any]:
    graph = GPT3.graph(BATCH)
    started = process_time()
    result = api.search(
        graph,
        topology=MACHINE,
        searcher="degrees",
        recompute="auto",
        optimizer="adam",
        precision="mixed",
    )
    used_s = process_time() - started
    best = result.best
    assert best is not None and best.estimate is not None
    return {
        "search_cpu_s": used_s,
        "among": result.among,
        "evaluated_in_full": sum(trial.estimate is not None for trial in result.trials),
        "best": best.name,
        "step_time_s": best.estimate.step_time_s,
        "peak_memory_bytes": best.estimate.peak_memory_bytes,
        "gap": result.gap,
    }


def _said(of: dict[str, Any]) -> str:
    return (
        f"{of['configurations']} configurations ({of['skipped']} impossible) in "
        f"{of['cpu_s']:.1f} CPU s, {of['ms_each']:.2f} ms each\n"
        f"search among {of['among']}: {of['search_cpu_s']:.1f} CPU s, gap {of['gap']:.2%}\n"
        f"best: {of['best']}: {of['step_time_s']:.3f} s, {of['peak_memory_bytes'] / 1e9:.1f} GB"
    )


if __name__ == "__main__":
    main()
