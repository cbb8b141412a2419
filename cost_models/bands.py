"""How far a prediction may be off: widths learnt from runs whose times are known.

A step's seconds belong to kinds (products, collectives between hosts, ...). The price of a kind is
wrong by a factor that is the same wherever it is asked for; those of several kinds are wrong
independently of each other. ``bands.json`` says by how much, and is made by a script
(benchmarks/bands.py) from what was predicted and what was measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cost_models.analytical import Analytical
from cost_models.interface import CostModel
from cost_models.profiled import Profiled

FILE = Path(__file__).with_name("bands.json")
FORMAT = "autopar-bands"
VERSION = 1

KINDS = {
    "products": "matrix products",
    "attention": "fused attention",
    "memory": "operators bound by memory",
    "launches": "launches of kernels",
    "inside": "collectives inside a host",
    "between": "collectives between hosts",
    "transfers": "transfers between stages",
    "optimizer": "the optimizer",
    "measured": "operators of a profiled graph",
    "idle": "idling in the pipeline",
}
"""What a step consists of; ``idle`` is beside the others: what the schedule adds to the work of the
busiest devices."""

DATASHEET, PROFILED, CORRECTED = "datasheet", "profiled", "corrected"
"""Machines that are known by their data sheets, those that were measured, and those of which
measured steps have corrected that. Of the last, there may be no widths of their own."""


class BandsError(ValueError):
    """A file of widths that cannot be read."""


@dataclass(frozen=True, slots=True)
class Told:
    """What runs of one source said: of ``rows`` runs, the share that lay in bands that were learnt
    from all other sources, and of ``pairs`` of runs of one model, batch and machine, the share that
    differed by no more than these allow; ``None`` where there is nothing to tell."""

    source: str
    rows: int
    covered: float | None
    pairs: int = 0
    pairs_covered: float | None = None


@dataclass(frozen=True, slots=True)
class Widths:
    """Of predictions for machines that are known in one way.

    ``devices``: those that runs were on. ``kinds``: by how much the logarithm of a kind's price may
    be off, either way; those that no run told anything of are left out. ``own``: by how much the
    difference of two plans of one model and machine may be off beside what their kinds explain.
    ``memory``: the logarithm of peak memory.
    """

    kinds: Mapping[str, float]
    own: float
    memory: float
    rows: int
    memory_rows: int
    devices: tuple[str, ...] = ()
    sources: tuple[Told, ...] = ()

    def of(self, kind: str) -> float:
        """The widest known one where nothing is known."""
        if kind not in KINDS:
            raise KeyError(f"no width for {kind!r}; known: {', '.join(KINDS)}")
        return self.kinds.get(kind, max(self.kinds.values()))


@dataclass(frozen=True, slots=True)
class Bands:
    """``coverage``: the share of runs that lies in the bands. ``machines``: by how the machine is
    known. ``date``, ``software``: when and with what they were learnt."""

    coverage: float
    date: str
    software: str
    machines: Mapping[str, Widths]

    def of(self, cost_model: CostModel) -> Widths:
        """One that was not measured is as uncertain as one from a data sheet."""
        if not isinstance(cost_model, Profiled):
            return self.machines[DATASHEET]
        is_corrected = bool(getattr(cost_model.profile, "corrections", ()))
        return self.machines[CORRECTED if is_corrected and CORRECTED in self.machines else PROFILED]


def bands_to_json(bands: Bands) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, **asdict(bands)}


def bands_from_json(data: Any) -> Bands:
    """
    Raises:
        BandsError: this is not what ``bands_to_json`` gives.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BandsError("this is no file of widths; `python -m benchmarks.bands` makes one")
    if data.get("version") != VERSION:
        raise BandsError(
            f"the widths have version {data.get('version')!r}, this autopar reads {VERSION}; "
            "make them again with `python -m benchmarks.bands`"
        )
    try:
        known = (DATASHEET, PROFILED, *([CORRECTED] if CORRECTED in data["machines"] else []))
        machines = {name: _widths(data["machines"][name]) for name in known}
        found = Bands(float(data["coverage"]), data["date"], data["software"], machines)
    except (KeyError, TypeError, ValueError) as error:
        raise BandsError(f"the widths are damaged ({error!r}); make them again") from error
    if not 0 < found.coverage < 1:
        raise BandsError(f"a coverage is between 0 and 1, not {found.coverage}")
    return found


def _widths(data: Mapping[str, Any]) -> Widths:
    kinds = {kind: float(width) for kind, width in data["kinds"].items()}
    numbers = [*kinds.values(), data["own"], data["memory"]]
    if not kinds or not all(0 < width < math.inf for width in numbers):
        raise ValueError("a width is a positive number")
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ValueError(f"no kinds are called {', '.join(unknown)}")
    return Widths(
        kinds,
        float(data["own"]),
        float(data["memory"]),
        int(data["rows"]),
        int(data["memory_rows"]),
        tuple(map(str, data["devices"])),
        tuple(Told(**source) for source in data["sources"]),
    )


def read_bands(path: Path = FILE) -> Bands:
    try:
        return bands_from_json(json.loads(path.read_text()))
    except OSError as error:
        raise BandsError(f"cannot read the widths {path}: {error.strerror}") from error
    except ValueError as error:
        raise BandsError(f"{path}: {error}") from error


def device_of(cost_model: CostModel) -> str:
    """What a machine is made of, by the name that its description gives it."""
    match cost_model:
        case Analytical():
            return cost_model.topology.device.name
        case Profiled():
            return cost_model.profile.device
        case _:
            return type(cost_model).__name__


@lru_cache(maxsize=1)
def known_bands() -> Bands:
    """Those that come with autopar."""
    return read_bands()
