"""Hardware to seconds: what a piece of work or a collective takes. Knows no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cost_models.analytical import Analytical
from cost_models.interface import Collective, CollectiveKind, CostModel, UnpricedError, Work
from cost_models.profiled import Profiled, ProfileError, read_profile
from cost_models.topology import (
    Topology,
    TopologyError,
    topology,
    topology_file,
    topology_from_data,
    topology_names,
)


def cost_model(
    spec: str | Path | Topology | dict[str, Any], devices: int | None = None
) -> CostModel:
    """The cost model of a machine: its name, ``NODESxDEVICESxNAME``, a TOML file, the content of
    one, a ``Topology``, or a profile (``.json``). ``devices``: how many it must have.

    >>> cost_model("32x8xh100-sxm").devices
    256
    """
    if str(spec).endswith(".json"):
        return _with_devices(Profiled(read_profile(Path(str(spec)))), str(spec), devices)
    match spec:
        case Topology():
            found = spec
        case Path():
            found = topology_file(spec)
        case dict():
            found = topology_from_data(spec)
        case _:
            found = topology(spec)
    return _with_devices(Analytical(found), found.name, devices)


def _with_devices(found: CostModel, name: str, devices: int | None) -> CostModel:
    if devices is not None and devices != found.devices:
        raise TopologyError(
            f"{name} has {found.devices} devices, not {devices}; "
            f"give NODESxDEVICESxNAME with a product of {devices}, or leave the number out"
        )
    return found


__all__ = [
    "Analytical",
    "Collective",
    "CollectiveKind",
    "CostModel",
    "ProfileError",
    "Profiled",
    "Topology",
    "TopologyError",
    "UnpricedError",
    "Work",
    "cost_model",
    "topology",
    "topology_names",
]
