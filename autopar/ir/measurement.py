"""What a few real steps of a plan took."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autopar.errors import AutoparError

FORMAT = "autopar-run"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Measurement:
    """Over all ranks: the slowest and the largest. ``losses`` and ``step_times_s`` by step;
    ``rank_step_times_s`` those of each rank."""

    losses: tuple[float, ...]
    step_times_s: tuple[float, ...]
    peak_memory_bytes: int
    rank_step_times_s: tuple[tuple[float, ...], ...] = ()

    @property
    def step_time_s(self) -> float:
        """The median of all steps but the first, which warms up.

        >>> Measurement((2.0, 1.0, 0.5), (9.0, 1.0, 3.0), 0).step_time_s
        2.0
        """
        return statistics.median(self.step_times_s[1:] or self.step_times_s)


@dataclass(frozen=True)
class RunRecord:
    """A run, for who wants to know more of it later. ``plan``: its file, ``plan_digest``: of what
    was in it. ``machine``: what the plan was made for, as the plan has it; ``device`` and
    ``software``: what it ran on."""

    plan: str
    plan_digest: str
    graph: str
    machine: Mapping[str, Any]
    device: str
    software: tuple[tuple[str, str], ...]
    date: str
    predicted_step_time_s: float
    predicted_peak_memory_bytes: int
    measurement: Measurement

    @property
    def step_time_s(self) -> float:
        return self.measurement.step_time_s

    @property
    def spread(self) -> float:
        """Of the logarithm of ``step_time_s``: that of the steps, less for many of them (a median's
        is 1.25 times that of a mean)."""
        steps = self.measurement.step_times_s[1:]
        if len(steps) < 2:
            return 0.0
        return 1.25 * statistics.stdev(map(math.log, steps)) / math.sqrt(len(steps))


def run_to_json(record: RunRecord) -> dict[str, Any]:
    """What was measured stands beside the rest, not under a name of its own."""
    said = {**asdict(record), "machine": dict(record.machine)}
    measured = said.pop("measurement")
    return {
        "format": FORMAT,
        "version": VERSION,
        **said,
        **measured,
        "step_time_s": record.step_time_s,
    }


def read_run(path: str | Path) -> RunRecord:
    """Raises ``AutoparError`` where that is not the file of a run."""
    try:
        data = json.loads(Path(path).read_text())
    except OSError as error:
        raise AutoparError(f"cannot read the run {path}: {error.strerror}") from error
    except ValueError as error:
        raise AutoparError(f"{path} is not JSON ({error})") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise AutoparError(
            f"{path} is not a run; `autopar run plan.json --json > {path}` makes one"
        )
    if data.get("version") != VERSION:
        raise AutoparError(
            f"{path} has version {data.get('version')!r}, this autopar reads {VERSION}; run again"
        )
    try:
        measured = Measurement(
            tuple(map(float, data["losses"])),
            tuple(map(float, data["step_times_s"])),
            int(data["peak_memory_bytes"]),
            tuple(tuple(map(float, of_rank)) for of_rank in data["rank_step_times_s"]),
        )
        if min(measured.step_times_s, default=0.0) <= 0:
            raise ValueError("no step, or one that took no time")
        return RunRecord(
            plan=str(data["plan"]),
            plan_digest=str(data["plan_digest"]),
            graph=str(data["graph"]),
            machine=dict(data["machine"]),
            device=str(data["device"]),
            software=tuple((str(k), str(v)) for k, v in data["software"]),
            date=str(data["date"]),
            predicted_step_time_s=float(data["predicted_step_time_s"]),
            predicted_peak_memory_bytes=int(data["predicted_peak_memory_bytes"]),
            measurement=measured,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise AutoparError(f"{path} is damaged ({error!r}); run again") from error
