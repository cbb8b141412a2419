"""What the outer search costs: CPU seconds against blocks, devices and microbatches.

A made-up transformer whose numbers follow from sizes: an embedding, equal blocks, a head. Run as
``python -m benchmarks.stage_search``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import lru_cache, partial
from time import process_time

from autopar.ir.search import Budget
from autopar.searchers.over_stages import search
from autopar.simulator.machine_links import MachineLinks, exchange_s
from autopar.simulator.pipeline import StageCost, StageMemory
from autopar.simulator.stage_problem import Alternative, Layout, Pool, StageProblem, Unit
from cost_models import cost_model
from cost_models.interface import Collective, CostModel

HIDDEN, SEQUENCE, VOCABULARY = 12288, 2048, 51200  # GPT-3 175B (arXiv 2005.14165)
FLOPS_PER_S = 312e12 * 0.55  # A100 bf16 peak, and what large matrix products reach in this example
RECOMPUTED = {  # share of the forward done again, activations that are left
    "": (0.0, 34.0),  # bytes for each token and hidden unit (arXiv 2205.05198, eq. 2, fused)
    "recomputed": (1.0, 2.0),
}


def problem(blocks: int, devices: int, batch: int, microbatches: tuple[int, ...]) -> StageProblem:
    machine = cost_model(f"{max(1, devices // 8)}x{min(8, devices)}xa100-sxm-80gb")
    return StageProblem(
        units=units_of(blocks, devices, batch, machine),
        microbatches=microbatches,
        pools=(Pool(devices, machine.memory_bytes),),
        network=partial(MachineLinks, machine),
        exchange_s=partial(exchange_s, machine),
    )


def units_of(
    blocks: int, devices: int, batch: int, machine: CostModel
) -> Callable[[int], tuple[Unit, ...]]:
    block = 12 * HIDDEN**2

    @lru_cache(maxsize=None)
    def at(m: int) -> tuple[Unit, ...]:
        kinds = [
            tuple(alternatives(parameters, flops, batch // m, devices, machine, kind))
            for parameters, flops, kind in (
                (VOCABULARY * HIDDEN, 0, "embedding"),
                (block, 2 * block + 4 * SEQUENCE * HIDDEN, "block"),
                (VOCABULARY * HIDDEN, 2 * VOCABULARY * HIDDEN, "head"),
            )
        ]
        size = batch // m * SEQUENCE * HIDDEN * 2
        numbers = [0, *[1] * blocks, 2]
        return tuple(
            Unit(f"unit {u}", kinds[kind], (u - 1,) if u else (), size, True)
            for u, kind in enumerate(numbers)
        )

    return at


def alternatives(
    parameters: int, flops: int, samples: int, devices: int, machine: CostModel, kind: str
) -> list[Alternative]:
    """Tensor parallelism in a node, data parallelism between; optimizer states are sharded."""
    found = []
    for tensor in (1, 2, 4, 8):
        for data in (d for d in range(1, devices // tensor + 1) if samples % d == 0):
            if tensor > devices or tensor * data > devices:
                continue
            tokens = samples // data * SEQUENCE
            size = tokens * HIDDEN * 2
            reduce_s = (
                machine.collective_time_s(Collective("all_reduce", size, tensor, 1))
                if tensor > 1 and kind == "block"
                else 0.0
            )
            forward_s = tokens * flops / tensor / FLOPS_PER_S + 2 * reduce_s + 20e-6
            back_s = tokens * flops / tensor / FLOPS_PER_S
            held = parameters * 2 // tensor
            synchronisation_s = (
                machine.collective_time_s(Collective("all_reduce", held, data, tensor))
                if data > 1
                else 0.0
            )
            for name, (again, left) in RECOMPUTED.items() if kind == "block" else [("", (0, 2))]:
                inputs_s = back_s + 2 * reduce_s + again * (forward_s - 2 * reduce_s)
                memory = StageMemory(
                    parameters_bytes=held,
                    gradients_bytes=held,
                    optimizer_bytes=12 * parameters // tensor // data,
                    activations_bytes=int(tokens * HIDDEN * left / tensor),
                    for_weights_bytes=int(tokens * HIDDEN * left / tensor),
                    backward_bytes=int(tokens * HIDDEN * 34 / tensor) if again else 0,
                )
                found.append(
                    Alternative(
                        Layout(tensor * data, f"tensor {tensor} x data {data}", data),
                        StageCost(
                            forward_s, inputs_s + back_s, held / 1e12, inputs_s, back_s, memory
                        ),
                        synchronisation_s,
                        name,
                    )
                )
    return found


def measure(
    blocks: int, devices: int, batch: int, microbatches: tuple[int, ...], proof_s: float = 2.0
) -> str:
    start = process_time()
    result = search(problem(blocks, devices, batch, microbatches), Budget(60.0, 1e-3, proof_s))
    cpu_s = process_time() - start
    best = "nothing found"
    if result.best is not None:
        layouts = [stage.layout for stage in result.best.stages]
        best = (
            f"{len(layouts)} stages of {layouts[0].name}, {result.best.schedule.name}"
            f" x {result.best.chunks}, {result.best.microbatches} microbatches"
        )
    return (
        f"{blocks:6} {devices:8} {len(microbatches):4} {cpu_s:8.2f} {result.played:7} "
        f"{result.time_s:10.3f} {result.gap:7.2%}  {result.stop_reason}: {best}"
    )


def divisors(number: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, number + 1) if number % d == 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few small rows only")
    quick = parser.parse_args().quick
    print(" blocks  devices   ms    CPU s  played   step time     gap  best")
    for blocks in (16, 32) if quick else (16, 32, 64, 96, 128, 256):
        print(measure(blocks, 64 if quick else 1024, 192 if quick else 3072, (48, 96, 192)))
    for devices in (8, 16, 32) if quick else (8, 32, 128, 512, 1024, 4096, 16384):
        print(measure(16 if quick else 96, devices, 192 if quick else 3072, (48, 96, 192)))
    if not quick:
        for microbatches in ((192,), (96, 192, 384), divisors(3072)):
            print(measure(96, 1024, 3072, microbatches))


if __name__ == "__main__":
    main()
