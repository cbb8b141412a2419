"""One layer's predicted forward and backward beside published ones: ``python -m benchmarks.layers
rows.csv``.

A row of kind ``layer_time`` has a ``config`` such as ``h6144 a64 s2048 mbs4 TP8`` (or ``same``), a
``value`` in milliseconds, ``forward/backward``, and says in ``what`` how it recomputes and whether
the sequence is divided. The layer is one of two more in a model that is priced as any other.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from autopar.ir.simulation import Estimate
from autopar.ir.strategy import Training
from autopar.recipes import Degrees
from benchmarks.programs import FIRST, Program, written
from benchmarks.runs import Run, estimate
from benchmarks.transformer import Transformer

FEW, MORE = 2, 4  # layers: what the others cost beside them is left out

MACHINES = {"A100-80GB": "a100-sxm-80gb"}
RECOMPUTE = (("full", "full"), ("selective", "attention"))


@dataclass(frozen=True)
class Layer:
    name: str
    forward_ms: float
    backward_ms: float
    measured_forward_ms: float
    measured_backward_ms: float


def layers(rows: Iterable[dict[str, str]]) -> Iterator[Layer]:
    config = ""
    for row in rows:
        if row["kind"] != "layer_time":
            continue
        config = config if row["config"] == "same" else row["config"]
        forward_ms, backward_ms = map(float, row["value"].split("/"))
        few, more = (estimate(_run(row, config, count)) for count in (FEW, MORE))
        yield Layer(
            row["what"],
            1e3 * (_forward_s(more) - _forward_s(few)) / (MORE - FEW),
            1e3 * (_backward_s(more) - _backward_s(few)) / (MORE - FEW),
            forward_ms,
            backward_ms,
        )


def _run(row: dict[str, str], config: str, count: int) -> Run:
    sizes = {name: int(size) for name, size in re.findall(r"\b([A-Za-z]+)(\d+)\b", config)}
    width, heads, tensor = sizes["h"], sizes["a"], sizes["TP"]
    what = row["what"].lower()
    program = Program(written=written(row["source"]) or FIRST)
    divided = "sequence parallel" in what or "+ sp" in what
    model = Transformer(
        count, width, heads, heads, 4 * width, 51200, sizes["s"], flash=False, dropout=True
    )
    return Run(
        name=what,
        source=row["source"],
        model=replace(
            model, dtype="float16", fused=True, one_pass=program.has("norms_in_one_pass")
        ),
        machine=f"1x{tensor}x{MACHINES[row['gpu']]}",
        degrees=Degrees(
            tensor=tensor,
            microbatch=sizes["mbs"],
            between="sequence" if divided else "whole",
            recompute=next((kind for word, kind in RECOMPUTE if word in what), "none"),
        ),
        training=Training("adam", "mixed"),
        batch=sizes["mbs"],
        step_s=None,
        memory_bytes=None,
        ran_out=False,
        program=program,
    )


def _forward_s(of: Estimate) -> float:
    return of.forward_compute_s + of.forward_communication_s


def _backward_s(of: Estimate) -> float:
    return of.backward_compute_s + of.backward_communication_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path)
    with parser.parse_args().csv.open(newline="") as file:
        for one in layers(csv.DictReader(file)):
            errors = (
                one.forward_ms / one.measured_forward_ms - 1,
                one.backward_ms / one.measured_backward_ms - 1,
            )
            print(
                f"{one.name:32s} {one.forward_ms:6.2f} of {one.measured_forward_ms:5.2f} ms "
                f"({errors[0]:+.1%}), {one.backward_ms:6.2f} of {one.measured_backward_ms:5.2f} "
                f"({errors[1]:+.1%})"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
