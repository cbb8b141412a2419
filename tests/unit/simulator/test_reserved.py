"""What a process has of its device beside tensors, and what a search may then allocate."""

from __future__ import annotations

import pytest

from autopar.ir.sharding import Mesh
from autopar.ir.simulation import Memory
from autopar.simulator.reserved import communicators, reserved, usual_limit_bytes
from cost_models import cost_model, topology_names
from cost_models.overheads import NOTHING, overheads_of
from tests.helpers.fake_prices import FakePrices

TENSORS = Memory(1_000_000, 2_000_000, 8_000_000, 500_000, 20_000, 3_000)


def test_kinds_add_up_from_what_is_allocated_to_what_the_device_has() -> None:
    memory = reserved(TENSORS, cost_model("2x8xa100-sxm-80gb"), groups=3)
    assert memory.total_bytes == TENSORS.total_bytes
    assert memory.total_bytes < memory.reserved_bytes < memory.device_bytes
    assert memory.reserved_bytes - memory.total_bytes == (
        memory.fragmentation_bytes + memory.workspace_bytes
    )
    assert memory.device_bytes - memory.reserved_bytes == (
        memory.context_bytes + memory.communicators_bytes
    )


def test_each_group_costs_the_same_and_none_costs_nothing() -> None:
    machine = cost_model("2x8xh100-sxm")
    none, one, two, three = (
        reserved(TENSORS, machine, groups).communicators_bytes for groups in range(4)
    )
    assert none == 0 < two - one == three - two < one


def test_a_machine_that_says_nothing_has_nothing_beside() -> None:
    machine = FakePrices(devices=4)
    assert overheads_of(machine) == NOTHING
    assert reserved(TENSORS, machine, groups=2) == TENSORS
    assert usual_limit_bytes(machine) == machine.memory_bytes


@pytest.mark.parametrize("name", topology_names())
def test_what_a_search_may_allocate_fits_with_all_that_is_beside(name: str) -> None:
    machine = cost_model(name)
    limit = usual_limit_bytes(machine)
    mesh = Mesh((("a", machine.devices), ("b", 1)))
    full = Memory(limit, 0, 0, 0, 0, 0)
    groups = communicators(mesh, stages=2, devices=machine.devices)
    assert 0.7 * machine.memory_bytes < limit
    assert reserved(full, machine, groups).device_bytes <= machine.memory_bytes


def test_groups_are_along_axes_with_other_stages_and_of_all() -> None:
    mesh = Mesh((("data", 2), ("other", 1), ("tensor", 4)))
    assert communicators(mesh, stages=1, devices=8) == 3
    assert communicators(mesh, stages=4, devices=32) == 4
    assert communicators(Mesh((("data", 1),)), stages=1, devices=1) == 0
