"""Machines as devices and tiers of links, read from TOML files whose numbers have sources."""

from __future__ import annotations

import difflib
import re
import tomllib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

Wiring = Literal["switch", "mesh", "torus", "tree"]
WIRINGS: tuple[Wiring, ...] = ("switch", "mesh", "torus", "tree")
SHELF = Path(__file__).with_name("topologies")


class TopologyError(ValueError):
    """A machine that is not known, or a description of one that cannot be read."""


@dataclass(frozen=True, slots=True)
class Device:
    """``peak_flops_per_s``: (dtype, dense peak) pairs; ``achievable_flops_per_s``: measured maxima
    of real matrix products, for some of these dtypes. ``cores``: what tiles are spread over
    (streaming multiprocessors, compute units). ``launch_s``: the shortest time of any kernel.
    ``attention_flops_per_s``: measured maxima of fused attention, where these are other than
    products let expect; ``attention_as_products``: whether it runs beside them as products do
    beside theirs, as torch's kernels do now, and not as those of earlier programs. ``compiled``:
    programs run as a whole, not operator by operator. ``power_w``: what it may draw; 0 where that
    is not known. ``flop_energy``: what an operation of a product draws beside the chips that
    ``Calibration.flop_pj`` was fitted to (A100, H100).
    """

    name: str
    vendor: str
    peak_flops_per_s: tuple[tuple[str, float], ...]
    memory_bytes: int
    memory_bytes_per_s: float
    cores: int = 1
    launch_s: float = 3e-6
    achievable_flops_per_s: tuple[tuple[str, float], ...] = ()
    attention_flops_per_s: tuple[tuple[str, float], ...] = ()
    attention_as_products: bool = True
    compiled: bool = False
    power_w: float = 0.0
    flop_energy: float = 1.0


@dataclass(frozen=True, slots=True)
class Tier:
    """Links between the devices of one unit, e.g. of a host, a rack or a cluster.

    ``size``: devices in one unit. ``bytes_per_s``: per device, one way, all its links of this tier
    together and all devices busy. ``latency_s``: one hop.

    ``wiring``: through a ``switch`` or ``tree`` any pair has all of ``bytes_per_s``; in a ``mesh``
    (a link for each pair) and a ``torus`` of ``torus_dims`` dims a link has ``pair_bytes_per_s``.
    ``ring_bytes_per_s``: measured bus bandwidth of all-gather and reduce-scatter;
    ``reduction_bytes_per_s``: that of an all-reduce in the switch, used for groups of
    ``reduction_from`` and more.
    """

    name: str
    size: int
    bytes_per_s: float
    latency_s: float
    wiring: Wiring = "switch"
    pair_bytes_per_s: float | None = None
    torus_dims: int = 1
    ring_bytes_per_s: float | None = None
    reduction_bytes_per_s: float | None = None
    reduction_from: int = 2


@dataclass(frozen=True, slots=True)
class Topology:
    """``devices`` of one kind under ``tiers``, innermost first; the last tier holds all of them.

    Consecutive ranks are as near to each other as possible. ``host_size`` devices share a host
    (a process launcher's node), which may be less than the innermost tier (an NVL72 rack).
    ``collective_launch_s`` is spent once by each collective.
    """

    name: str
    device: Device
    tiers: tuple[Tier, ...]
    devices: int
    host_size: int
    collective_launch_s: float = 6.6e-6


def topology_names() -> tuple[str, ...]:
    """The machines on the shelf."""
    return tuple(sorted(path.stem for path in SHELF.glob("*.toml")))


@lru_cache(maxsize=64)
def topology(spec: str) -> Topology:
    """One node of a machine by name, ``NODESxDEVICESxNAME``, or the path of a TOML file.

    ``DEVICES`` up to the size of a host means hosts: those in one scale-up domain share its links.
    More than that means whole domains, e.g. racks.

    >>> [(t.name, t.size) for t in topology("32x8xh100-sxm").tiers]
    [('nvlink', 8), ('network', 256)]
    >>> [(t.name, t.size) for t in topology("18x4xgb200-nvl72").tiers]
    [('nvlink', 72)]
    """
    if spec.endswith(".toml") or "/" in spec:
        return topology_file(Path(spec))
    counted = re.fullmatch(r"(\d+)x(\d+)x(.+)", spec)
    if counted is None:
        machine = _machine(spec)
        return machine.build(1, machine.host_size)
    nodes, per_node, name = int(counted[1]), int(counted[2]), counted[3]
    return _machine(name).build(nodes, per_node)


def topology_file(path: Path) -> Topology:
    """The machine of a TOML file; its ``[cluster]`` table gives ``nodes`` and ``devices_per_node``
    (default: one full host)."""
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise TopologyError(f"cannot read the topology {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TopologyError(f"{path} is not a TOML file: {error}") from error
    return topology_from_data(data, str(path), path.stem)


def topology_from_data(
    data: dict[str, Any], where: str = "the given topology", default_name: str = "custom"
) -> Topology:
    """The same from the content of such a file, already parsed."""
    machine, reader = _Machine.read(data, where, default_name), _Reader(where)
    cluster = reader.table(data, "cluster") if "cluster" in data else {}
    return machine.build(
        reader.count(cluster, "nodes", 1),
        reader.count(cluster, "devices_per_node", machine.host_size),
    )


def _machine(name: str) -> _Machine:
    path = SHELF / f"{name}.toml"
    if not re.fullmatch(r"[a-z0-9-]+", name) or not path.is_file():
        near = difflib.get_close_matches(name.lower(), topology_names(), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise TopologyError(
            f"no machine is called {name!r}; {hint}Known: {', '.join(topology_names())}. "
            "Or give NODESxDEVICESxNAME (32x8xh100-sxm), or the path of a TOML file."
        )
    return _Machine.read(tomllib.loads(path.read_text()), str(path), name)


@dataclass(frozen=True, slots=True)
class _Machine:
    """What a TOML file says, before the number of nodes is known.

    ``tiers``: as written, ``size`` 0 where the tier spans the cluster; ``shared_by``: devices of a
    host that share a link of the tier.
    """

    name: str
    device: Device
    tiers: tuple[Tier, ...]
    shared_by: tuple[int, ...]
    host_size: int
    collective_launch_s: float

    @staticmethod
    def read(data: dict[str, Any], where: str, default_name: str) -> _Machine:
        reader = _Reader(where)
        device, tiers = reader.table(data, "device"), data.get("tiers")
        if not isinstance(tiers, list) or not tiers:
            raise TopologyError(f"{where}: needs at least one [[tiers]] table")
        name = str(data.get("name", default_name))
        return _Machine(
            name=name,
            device=Device(
                name=name,
                vendor=str(data.get("vendor", "")),
                peak_flops_per_s=reader.by_dtype(device, "peak_flops_per_s", required=True),
                achievable_flops_per_s=reader.by_dtype(device, "achievable_flops_per_s"),
                attention_flops_per_s=reader.by_dtype(device, "attention_flops_per_s"),
                attention_as_products=reader.flag(device, "attention_as_products", True),
                compiled=reader.flag(device, "compiled"),
                memory_bytes=reader.count(device, "memory_bytes"),
                memory_bytes_per_s=reader.number(device, "memory_bytes_per_s"),
                cores=reader.count(device, "cores", 1),
                launch_s=reader.number(device, "launch_s", 3e-6),
                power_w=reader.number(device, "power_w") if "power_w" in device else 0.0,
                flop_energy=reader.number(device, "flop_energy", 1.0),
            ),
            tiers=tuple(reader.tier(tier) for tier in tiers),
            shared_by=tuple(reader.count(tier, "shared_by", 1) for tier in tiers),
            host_size=reader.count(data, "host_size", 1),
            collective_launch_s=reader.number(data, "collective_launch_s", 6.6e-6),
        )

    def build(self, nodes: int, per_node: int) -> Topology:
        domain = self.tiers[0].size or nodes * per_node
        if nodes < 1 or per_node < 1:
            raise TopologyError(f"{nodes}x{per_node}x{self.name}: there must be at least 1 device")
        if per_node > max(domain, self.host_size):
            raise TopologyError(
                f"{nodes}x{per_node}x{self.name}: a {self.name} node has at most "
                f"{max(domain, self.host_size)} devices; ask for more nodes"
            )
        hosts_in_domain = max(1, domain // self.host_size) if per_node <= self.host_size else 1
        innermost = min(domain, per_node * hosts_in_domain)
        devices, tiers, within = nodes * per_node, [], 1
        for tier, shared_by in zip(self.tiers, self.shared_by, strict=True):
            size = min(devices, innermost if tier is self.tiers[0] else tier.size or devices)
            if size > within or devices == 1:
                sharing = min(shared_by, per_node)
                tiers.append(replace(tier, size=size, bytes_per_s=tier.bytes_per_s / sharing))
            if size == devices:
                break
            within = size
        else:
            raise TopologyError(
                f"{nodes}x{per_node}x{self.name}: its outermost tier holds {within} of {devices} "
                "devices; add a tier of size 0 (no limit) to its file"
            )
        name = f"{nodes}x{per_node}x{self.name}"
        return Topology(
            name, self.device, tuple(tiers), devices, self.host_size, self.collective_launch_s
        )


@dataclass(frozen=True, slots=True)
class _Reader:
    """Typed look-ups in a parsed file, with errors that name it. A number is written plain or as
    ``{ value = ..., source = "..." }``."""

    where: str

    def table(self, data: dict[str, Any], key: str) -> dict[str, Any]:
        found = data.get(key)
        if not isinstance(found, dict):
            raise TopologyError(f"{self.where}: needs a [{key}] table")
        return found

    def number(self, data: dict[str, Any], key: str, default: float | None = None) -> float:
        found = data.get(key, default)
        if isinstance(found, dict):
            found = found.get("value")
        if found is None:
            raise TopologyError(f"{self.where}: {key} is missing")
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < 1e30:
            raise TopologyError(f"{self.where}: {key} must be a positive number, not {found!r}")
        return found

    def count(self, data: dict[str, Any], key: str, default: int | None = None) -> int:
        found = self.number(data, key, default)
        if found != int(found):
            raise TopologyError(f"{self.where}: {key} must be a whole number, not {found!r}")
        return int(found)

    def flag(self, data: dict[str, Any], key: str, default: bool = False) -> bool:
        found = data.get(key, default)
        if isinstance(found, dict):
            found = found.get("value")
        if not isinstance(found, bool):
            raise TopologyError(f"{self.where}: {key} must be true or false, not {found!r}")
        return found

    def optional(self, data: dict[str, Any], key: str) -> float | None:
        return self.number(data, key) if key in data else None

    def by_dtype(
        self, data: dict[str, Any], key: str, *, required: bool = False
    ) -> tuple[tuple[str, float], ...]:
        table = self.table(data, key) if required or key in data else {}
        return tuple(sorted((dtype, self.number(table, dtype)) for dtype in table))

    def tier(self, data: dict[str, Any]) -> Tier:
        wiring = data.get("wiring", "switch")
        if wiring not in WIRINGS:
            raise TopologyError(
                f"{self.where}: wiring {wiring!r} is not one of {', '.join(WIRINGS)}"
            )
        pair = self.optional(data, "pair_bytes_per_s")
        if wiring in ("mesh", "torus") and pair is None:
            raise TopologyError(f"{self.where}: a {wiring} needs pair_bytes_per_s")
        return Tier(
            name=str(data.get("name", "tier")),
            size=self.count(data, "size") if data.get("size") else 0,
            bytes_per_s=self.number(data, "bytes_per_s"),
            latency_s=self.number(data, "latency_s"),
            wiring=wiring,
            pair_bytes_per_s=pair,
            torus_dims=self.count(data, "torus_dims", 1),
            ring_bytes_per_s=self.optional(data, "ring_bytes_per_s"),
            reduction_bytes_per_s=self.optional(data, "reduction_bytes_per_s"),
            reduction_from=self.count(data, "reduction_from", 2),
        )
