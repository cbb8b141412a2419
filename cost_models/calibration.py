"""What no datasheet says of kernels and hosts: parameters that were fitted to published runs.

``calibration.toml`` has them and what they were fitted to; ``python -m benchmarks.fit`` writes it.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

FORMAT = "autopar-calibration"
VERSION = 1
FILE = Path(__file__).with_name("calibration.toml")


class CalibrationError(ValueError):
    """A file of parameters that cannot be read."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Efficiencies are shares of what a machine's file says, 0 to 1.

    ``matmul_efficiency``: of the largest measured product, for large ones in a long run, when the
    chip is warm; ``fill_steps``: what a tile needs beside its steps over k, in such steps;
    ``misaligned_slowdown``: of products with rows that are no multiple of 16 bytes;
    ``attention_efficiency``: of what a large product achieves, for fused attention;
    ``memory_efficiency``: of the bandwidth, for kernels that stream; ``operator_s``: the time of a
    host from one kernel of a program that is not compiled to the next (Python, dispatch, autograd).
    ``flop_pj``: what a floating-point operation in 16 bits draws in a long run of products, the
    whole chip counted, in picojoules at the clock of the largest product; a chip that may not draw
    as much runs at the clock that it can hold, and power grows as the cube of the clock. 0: never.
    """

    matmul_efficiency: float
    fill_steps: float
    misaligned_slowdown: float
    attention_efficiency: float
    memory_efficiency: float
    operator_s: float
    flop_pj: float = 0.0

    def __post_init__(self) -> None:
        for name in PARAMETERS:
            value = getattr(self, name)
            most = 1.0 if name.endswith("efficiency") else 1e3
            least = 1.0 if name.endswith("slowdown") else 0.0
            if name == "flop_pj" and value == 0:  # plans made before there was one
                continue
            if not least <= value <= most or value <= 0:
                raise CalibrationError(
                    f"{name} is {value!r}, and must be more than 0, from {least:g} to {most:g}"
                )


PARAMETERS = tuple(f.name for f in fields(Calibration))


@lru_cache(maxsize=8)
def read_calibration(path: Path = FILE) -> Calibration:
    """
    Raises:
        CalibrationError: it has other parameters than those above, or a version that is not known.
    """
    try:
        data = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read: {error}") from error
    if (data.get("format"), data.get("version")) != (FORMAT, VERSION):
        raise CalibrationError(
            f"{path} is not an {FORMAT} of version {VERSION}; `python -m benchmarks.fit` writes one"
        )
    return _calibration(data.get("parameters", {}), str(path))


def _calibration(parameters: dict[str, Any], where: str) -> Calibration:
    if set(parameters) != set(PARAMETERS):
        odd = sorted(set(parameters) ^ set(PARAMETERS))
        raise CalibrationError(f"{where}: missing or not known: {', '.join(odd)}")
    values = {name: parameters[name]["value"] for name in PARAMETERS}
    if not all(isinstance(value, int | float) for value in values.values()):
        raise CalibrationError(f"{where}: a parameter is no number")
    return Calibration(**{name: float(value) for name, value in values.items()})
