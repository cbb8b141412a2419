"""The machines on the shelf, their sources, and the ways to name one."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from cost_models import TopologyError, cost_model, topology, topology_names
from cost_models.topology import SHELF

SURVEY = {
    # name: memory GB, memory GB/s, (dtype, peak TFLOP/s), scale-up GB/s one way and devices,
    # scale-out GB/s one way
    "v100-sxm2-16gb": (16, 900, ("float16", 125), 150, 8, 6.25),
    "v100-sxm2-32gb": (32, 900, ("float16", 125), 150, 8, 6.25),
    "v100-sxm3-32gb": (32, 900, ("float16", 131), 150, 16, 6.25),
    "v100-pcie": (16, 900, ("float16", 112), 15.75, 4, 3),
    "a100-sxm-40gb": (40, 1555, ("bfloat16", 312), 300, 8, 25),
    "a100-sxm-80gb": (80, 2039, ("bfloat16", 312), 300, 8, 25),
    "a100-pcie-80gb": (80, 1935, ("bfloat16", 312), 31, 8, 25),
    "h100-sxm": (80, 3350, ("bfloat16", 989), 450, 8, 50),
    "h100-sxm-96gb": (96, 2400, ("bfloat16", 989), 450, 8, 50),
    "h100-pcie": (80, 2000, ("bfloat16", 756), 63, 8, 50),
    "h200-sxm": (141, 4800, ("bfloat16", 989), 450, 8, 50),
    "b200-sxm": (180, 7700, ("bfloat16", 2250), 900, 8, 50),
    "b300-sxm": (288, 8000, ("bfloat16", 2250), 900, 8, 100),
    "gb200-nvl72": (186, 8000, ("bfloat16", 2500), 900, 72, 100),
    "gb300-nvl72": (279, 8000, ("bfloat16", 2500), 900, 72, 100),
    "mi300x": (192, 5300, ("bfloat16", 1307.4), 448, 8, 50),
    "mi325x": (256, 6000, ("bfloat16", 1307.4), 448, 8, 50),
    "mi355x": (288, 8000, ("bfloat16", 2500), 535.5, 8, 50),
    "l4": (24, 300, ("bfloat16", 121), 31, 8, 12.5),
    "l40s": (48, 864, ("bfloat16", 362), 31, 8, 25),
    "rtx-4090": (24, 1008, ("bfloat16", 165.2), 31, 8, 1.25),
    "tpu-v3": (32, 900, ("bfloat16", 123), 400, 1024, 3),
    "tpu-v4": (32, 1200, ("bfloat16", 275), 270, 4096, 6.25),
    "tpu-v5p": (95, 2765, ("bfloat16", 459), 600, 8960, 6.25),
    "tpu-v5e": (16, 819, ("bfloat16", 197), 200, 256, 3.1),
    "tpu-v6e": (32, 1600, ("bfloat16", 918), 360, 256, 3.125),
}


def read(name: str) -> dict[str, Any]:
    return tomllib.loads((SHELF / f"{name}.toml").read_text())


def test_the_shelf_holds_every_machine_of_the_survey() -> None:
    assert set(topology_names()) == set(SURVEY)


@pytest.mark.parametrize("name", SURVEY)
def test_a_machine_agrees_with_the_survey(name: str) -> None:
    data = read(name)
    memory, memory_rate, (dtype, peak), up, domain, out = SURVEY[name]
    device, (scale_up, scale_out) = data["device"], data["tiers"]
    # sold in GB, of which the driver finds up to as many GiB
    assert memory * 1e9 <= device["memory_bytes"]["value"] <= memory * 2**30
    assert device["memory_bytes_per_s"]["value"] == pytest.approx(memory_rate * 1e9)
    assert device["peak_flops_per_s"][dtype]["value"] == pytest.approx(peak * 1e12)
    assert scale_up["bytes_per_s"]["value"] == pytest.approx(up * 1e9)
    assert scale_up["size"]["value"] == domain
    assert scale_out["bytes_per_s"]["value"] == pytest.approx(out * 1e9)


def numbers(data: Any, path: str = "") -> list[tuple[str, Any]]:
    """Every number of a file, with where it stands; a sourced one is a table with ``value``."""
    match data:
        case {"value": _}:
            return [(path, data)]
        case dict():
            return [n for key, value in data.items() for n in numbers(value, f"{path}.{key}")]
        case list():
            return [n for i, value in enumerate(data) for n in numbers(value, f"{path}.{i}")]
        case int() | float():
            return [(path, data)]
        case _:
            return []


@pytest.mark.parametrize("name", SURVEY)
def test_every_number_is_positive_and_has_a_source(name: str) -> None:
    found = numbers(read(name))
    assert len(found) > 10
    for path, number in found:
        if path == ".tiers.1.size":
            assert number == 0  # no limit
            continue
        assert isinstance(number, dict), f"{path} has no source"
        assert number["value"] > 0, path
        assert len(number["source"]) > 10, path


@pytest.mark.parametrize("name", SURVEY)
def test_no_machine_is_faster_than_its_peak(name: str) -> None:
    device = topology(name).device
    peaks = dict(device.peak_flops_per_s)
    for dtype, achieved in device.achievable_flops_per_s:
        assert 0.4 * peaks[dtype] < achieved < peaks[dtype]


def test_a_name_alone_is_one_host() -> None:
    assert topology("h100-sxm").devices == 8
    assert topology("gb200-nvl72").devices == 4
    assert [t.name for t in topology("h100-sxm").tiers] == ["nvlink"]


@pytest.mark.parametrize("name", topology_names())
def test_a_machines_name_says_how_many_devices_there_are_and_gives_the_same_machine(
    name: str,
) -> None:
    found = topology(name)
    nodes, per_node, rest = found.name.split("x", 2)
    assert (int(nodes) * int(per_node), rest) == (found.devices, name)
    assert topology(found.name) == found


def test_part_of_a_host_keeps_its_links_and_less_of_them() -> None:
    tiers = topology("16x4xh100-sxm").tiers
    assert [(t.name, t.size) for t in tiers] == [("nvlink", 4), ("network", 64)]


def test_hosts_of_one_rack_share_its_links() -> None:
    assert [t.size for t in topology("32x4xgb200-nvl72").tiers] == [72, 128]
    assert [t.size for t in topology("2x72xgb200-nvl72").tiers] == [72, 144]
    assert [t.size for t in topology("16x4xtpu-v4").tiers] == [64]


def test_a_nic_that_a_host_shares_is_divided_among_its_devices() -> None:
    assert topology("2x8xa100-pcie-80gb").tiers[1].bytes_per_s == pytest.approx(25e9 / 8)
    assert topology("2x1xa100-pcie-80gb").tiers[-1].bytes_per_s == pytest.approx(25e9)


def test_one_device_has_no_collectives_but_a_cost_model() -> None:
    assert topology("1x1xh100-sxm").devices == 1


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("h100", "did you mean h100-"),
        ("32x8xh100-smx", "did you mean h100-sxm"),
        ("H100-SXM", "did you mean h100-sxm"),
        ("2x16xh100-sxm", "at most 8"),
        ("0x8xh100-sxm", "at least 1"),
        ("2x100xgb200-nvl72", "at most 72"),
        ("8xh100-sxm", "NODESxDEVICESxNAME"),
        ("", "Known"),
        ("nowhere/none.toml", "cannot read"),
    ],
)
def test_what_cannot_be_a_machine_is_refused_with_a_hint(spec: str, says: str) -> None:
    with pytest.raises(TopologyError, match=says):
        topology(spec)


OWN = """
name = "own"
host_size = 4
[cluster]
nodes = 3
[device]
memory_bytes = 16e9
memory_bytes_per_s = 1e12
[device.peak_flops_per_s]
float32 = 1e13
[[tiers]]
name = "bus"
size = 4
bytes_per_s = 1e10
latency_s = 1e-6
[[tiers]]
name = "wire"
bytes_per_s = { value = 1e9, source = "its box" }
latency_s = 1e-5
"""


def test_a_file_of_ones_own_needs_no_sources(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(OWN)
    found = topology(str(path))
    assert found.devices == 12
    assert [(t.name, t.size) for t in found.tiers] == [("bus", 4), ("wire", 12)]
    assert cost_model(path).devices == cost_model(tomllib.loads(OWN)).devices == 12


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("float32 = 1e13", "float32 = -1", "positive"),
        ("latency_s = 1e-6", "latency_s = 'fast'", "positive number"),
        ("memory_bytes = 16e9", "", "memory_bytes is missing"),
        ("[device]", "[devise]", "memory_bytes is missing"),
        ('name = "bus"', 'name = "bus"\nwiring = "string"', "wiring 'string'"),
        ('name = "bus"', 'name = "bus"\nwiring = "mesh"', "pair_bytes_per_s"),
        ('name = "own"', "name = own", "not a TOML file"),
        ("[device]", "[device]\ncompiled = 1", "compiled must be true or false"),
        ("nodes = 3", "nodes = 0", "nodes must be a positive number"),
        ("nodes = 3", "nodes = 2.5", "nodes must be a whole number"),
        ("size = 4", "size = 'all'", "size must be a positive number"),
        ('[[tiers]]\nname = "wire"', "[other]", "holds 4 of 12"),
    ],
)
def test_a_broken_file_is_refused_by_what_is_wrong(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    assert old in OWN
    path = tmp_path / "own.toml"
    path.write_text(OWN.replace(old, new))
    with pytest.raises(TopologyError, match=says) as error:
        topology(str(path))
    assert "own" in str(error.value)


def test_the_wrong_number_of_devices_is_refused() -> None:
    assert cost_model("2x8xh100-sxm", devices=16).devices == 16
    with pytest.raises(TopologyError, match="16 devices, not 8"):
        cost_model("2x8xh100-sxm", devices=8)
