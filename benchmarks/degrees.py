"""What a search over all degrees of GPT-3 175B costs: ``python -m benchmarks.degrees``.

Every tensor, pipeline and data degree of 1024 A100, chunks, microbatch, recomputation, ZeRO level,
sequence parallelism and schedule, 3072 samples a step.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import product
from time import process_time

from autopar.api import no_garbage
from autopar.ir.strategy import Training
from autopar.recipes import Degrees, degrees_text
from autopar.searchers.over_degrees import DegreePrices, DegreesFound, search_degrees
from benchmarks.transformer import Transformer
from cost_models import cost_model

GPT3 = Transformer(
    96, 12288, 96, 96, 49152, 51200, 2048, flash=False, dropout=True, dtype="float16"
)
MACHINE, BATCH, DEVICES = "128x8xa100-sxm-80gb", 3072, 1024
LARGEST_TENSOR, LARGEST_MICROBATCH = 16, 32
RECOMPUTE = ("none", "attention", "full")


def candidates(devices: int, layers: int, batch: int) -> Iterator[Degrees]:
    """Those with equal stages and whole microbatches."""
    for tensor in filter(lambda n: n <= LARGEST_TENSOR, _divisors(devices)):
        for pipeline in _divisors(devices // tensor):
            data = devices // tensor // pipeline
            if layers % pipeline or batch % data:
                continue
            rows = _rows(layers, pipeline, batch // data)
            between = ("whole", "sequence") if tensor > 1 else ("whole",)
            levels = range(4) if data > 1 else (0,)
            for (chunks, microbatch, schedule), b, again, zero in product(
                rows, between, RECOMPUTE, levels
            ):
                yield Degrees(
                    tensor, pipeline, data, 1, chunks, schedule, microbatch, b, zero, again
                )


def _rows(layers: int, pipeline: int, samples: int) -> list[tuple[int, int, str | None]]:
    """Chunks, samples of a microbatch, schedule."""
    found: list[tuple[int, int, str | None]] = []
    for microbatch in filter(lambda n: n <= LARGEST_MICROBATCH, _divisors(samples)):
        if pipeline == 1:
            found.append((1, microbatch, None))
            continue
        for chunks in _divisors(layers // pipeline):
            if chunks == 1:
                found += [(1, microbatch, "1f1b"), (1, microbatch, "gpipe")]
            elif samples // microbatch % pipeline == 0:
                found.append((chunks, microbatch, "interleaved_1f1b"))
                found.append((chunks, microbatch, "looped_bfs"))
    return found


def _divisors(number: int) -> Sequence[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="only each so-manieth configuration")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    graph, machine = GPT3.graph(BATCH), cost_model(MACHINE)
    space = list(candidates(DEVICES, GPT3.layers, BATCH))[:: arguments.every]
    prices = DegreePrices(graph, machine, Training("adam", "mixed"))
    started = process_time()
    with no_garbage():  # as in all searches of the API
        found = prices.bounds(space)
        bounds_s = process_time() - started
        best = search_degrees(prices, found, machine.memory_bytes)
    print(_said(len(space), bounds_s, process_time() - started, best, arguments.json))


def _said(number: int, bounds_s: float, search_s: float, found: DegreesFound, as_json: bool) -> str:
    skipped = sum(found.skipped.values())
    if as_json:
        numbers = {
            "configurations": number,
            "skipped": skipped,
            "priced_and_simulated_cpu_s": bounds_s,
            "search_cpu_s": search_s,
            "ms_each": search_s / number * 1e3,
            "evaluated_in_full": found.evaluated,
            "best": found.best and degrees_text(found.best),
            "step_time_s": found.estimate and found.estimate.step_time_s,
        }
        return json.dumps(numbers)
    lines = [
        f"{number} configurations ({skipped} impossible) in {bounds_s:.1f} CPU s, "
        f"{bounds_s / number * 1e3:.2f} ms each; with the {found.evaluated} evaluated in full that "
        f"prove the best: {search_s:.1f} CPU s, {search_s / number * 1e3:.2f} ms each"
    ]
    if found.best is not None and found.estimate is not None:
        lines.append(
            f"best: {degrees_text(found.best)}: {found.estimate.step_time_s:.3f} s, "
            f"{found.estimate.peak_memory_bytes / 1e9:.1f} GB"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
