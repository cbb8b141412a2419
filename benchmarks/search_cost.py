"""What planning costs: CPU seconds of extraction and search, peak memory, the gap that is left.

Each row is a process of its own, so that its peak is its own. Run as
``python -m benchmarks.search_cost [--gpt3] [--json]``; ``--gpt3`` adds rows of a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from time import process_time
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from autopar import api
from autopar.searchers._solver import end_all

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """``build``: the model on the meta device, its batch size and its sequence length. ``mesh``:
    ``None`` means every mesh of up to three axes. ``memory_limit_bytes``: ``None`` means that of
    the device. ``searcher``: of plans of one stage (``ilp``), of ``degrees``, or ``hybrid``."""

    model: str
    build: Callable[[], tuple[Any, int, int]]
    topology: str
    mesh: Sizes | None
    memory_limit_bytes: int | None = None
    searcher: str = "ilp"
    recompute: str = "none"


class LossOf(torch.nn.Module):
    """A language model with its loss as its output."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, labels=labels).loss


@dataclass(frozen=True)
class Row:
    model: str
    topology: str
    searcher: str
    mesh: str
    operators: int
    extraction_cpu_s: float
    search_cpu_s: float
    peak_mb: float
    step_s: float | None
    gap: float
    microbatches: int | None
    stages: int | None
    stop_reason: str
    among: str


def llama(layers: int) -> tuple[Any, int, int]:
    """Llama 3 8B (arXiv 2407.21783, table 3), or more layers of it."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        use_cache=False,
    )
    return LlamaForCausalLM(config), 64, 8192


def llama2(batch: int, layers: int = 32) -> tuple[Any, int, int]:
    """Llama 2 7B (arXiv 2307.09288), or with other numbers of layers."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
        use_cache=False,
    )
    return LlamaForCausalLM(config), batch, 4096


def gpt3(batch: int = 1536) -> tuple[Any, int, int]:
    """GPT-3 175B (arXiv 2005.14165, table 2.1), with Megatron's batch (arXiv 2104.04473) and its
    vocabulary padded to 51200."""
    config = GPT2Config(
        n_embd=12288,
        n_layer=96,
        n_head=96,
        vocab_size=51200,
        n_positions=2048,
        use_cache=False,
    )
    return GPT2LMHeadModel(config), batch, 2048


H100, A100 = "32x8xh100-sxm", "128x8xa100-sxm-80gb"
NODE, NODES = "1x8xa100-sxm-80gb", "2x8xa100-sxm-80gb"
LARGEST = "2048x8xa100-sxm-80gb"


def _both(
    name: str, model: str, build: Callable[[], tuple[Any, int, int]], topology: str
) -> Iterator[tuple[str, Case]]:
    """All meshes and stages, with recomputation: among degrees, and among all plans."""
    for searcher in ("degrees", "hybrid"):
        case = Case(model, build, topology, None, None, searcher, "auto")
        yield f"{name}-{searcher}", case


CASES = {
    "llama32": Case("Llama-3-8B", lambda: llama(32), H100, (32, 8)),
    "llama32-3d": Case("Llama-3-8B", lambda: llama(32), H100, (4, 8, 8)),
    "llama128": Case("Llama-3-8B, 128 layers", lambda: llama(128), H100, (32, 8)),
    "llama128-free": Case(
        "Llama-3-8B, 128 layers, no memory limit", lambda: llama(128), H100, (32, 8), 10**15
    ),
    **dict(_both("llama2-8", "Llama-2-7B, batch 16", lambda: llama2(16), NODE)),
    **dict(_both("llama2-8-64", "Llama-2-7B, batch 64", lambda: llama2(64), NODE)),
    **dict(_both("llama2-16", "Llama-2-7B, batch 16", lambda: llama2(16), NODES)),
    **dict(_both("llama2-16-64", "Llama-2-7B, batch 64", lambda: llama2(64), NODES)),
    "gpt3": Case("GPT-3 175B", gpt3, A100, None),
    **dict(_both("gpt3-1024", "GPT-3 175B, batch 3072", lambda: gpt3(3072), A100)),
    **dict(_both("gpt3-16384", "GPT-3 175B, batch 3072", lambda: gpt3(3072), LARGEST)),
}
LONG = tuple(name for name in CASES if name.startswith("gpt3"))


def measure(case: Case) -> Row:
    """Extract and search here, in this process."""
    with torch.device("meta"):
        built, batch, length = case.build()
        module = LossOf(built.to(torch.bfloat16))
        tokens = torch.zeros(batch, length, dtype=torch.long)
    inputs = {"input_ids": tokens, "labels": tokens}
    started = process_time()
    graph = api.extract(module, inputs, precision="mixed")
    extracted = process_time()
    wanted: dict[str, Any] = {"searcher": case.searcher, "recompute": case.recompute}
    if case.mesh is not None:
        wanted["mesh"] = case.mesh
    if case.memory_limit_bytes is not None:
        wanted["memory_limit_bytes"] = case.memory_limit_bytes
    found = api.search(graph, topology=case.topology, precision="mixed", **wanted)
    end_all()  # of the solver's processes; then what they took counts
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    searched = process_time() + used.ru_utime + used.ru_stime
    best = found.best
    return Row(
        model=case.model,
        topology=case.topology,
        searcher=case.searcher,
        mesh="all" if case.mesh is None else "x".join(map(str, case.mesh)),
        operators=len(graph.operators),
        extraction_cpu_s=extracted - started,
        search_cpu_s=searched - extracted,
        peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        step_s=best.estimate.step_time_s if best and best.estimate else None,
        gap=found.gap,
        microbatches=best.strategy.microbatches if best and best.strategy else None,
        stages=len(best.strategy.stages) if best and best.strategy else None,
        stop_reason=found.stop_reason,
        among=found.among,
    )


def in_own_process(name: str) -> Row | None:
    command = [sys.executable, "-m", "benchmarks.search_cost", "--case", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(f"{name} failed with exit code {done.returncode}", file=sys.stderr)
        return None
    return Row(**json.loads(done.stdout.splitlines()[-1]))


HEADER = (
    "model",
    "machine",
    "searcher",
    "mesh",
    "extraction CPU s",
    "search CPU s",
    "peak MB",
    "gap",
    "step s",
    "stages",
    "stopped",
)


def line(row: Row) -> tuple[str, ...]:
    return (
        row.model,
        row.topology,
        row.searcher,
        row.mesh,
        f"{row.extraction_cpu_s:.1f}",
        f"{row.search_cpu_s:.2f}",
        f"{row.peak_mb:.0f}",
        f"{row.gap:.2%}",
        "none fits" if row.step_s is None else f"{row.step_s:.3f}",
        str(row.stages or "-"),
        row.stop_reason,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, help="only this one, here, as JSON")
    parser.add_argument("--gpt3", action="store_true", help="GPT-3 175B on 1024 A100")
    parser.add_argument("--json", action="store_true", help="a JSON object for each row")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(asdict(measure(CASES[arguments.case]))))
        return 0
    names = [name for name in CASES if arguments.gpt3 or name not in LONG]
    if not arguments.json:
        print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|", flush=True)
    failed = False
    for name in names:
        row = in_own_process(name)
        failed |= row is None
        if row is not None:
            text = json.dumps(asdict(row)) if arguments.json else f"| {' | '.join(line(row))} |"
            print(text, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
