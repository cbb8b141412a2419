"""Recipes that divide the batch only: data parallel, and parameters sharded along with it."""

from __future__ import annotations

from collections.abc import Callable

from autopar.recipes.recipe import Layout, Recipe
from autopar.simulator.listing import Allowed
from autopar.simulator.meshes import mesh


def _all_devices(allowed: Allowed) -> Callable[[int, int], tuple[Layout, ...]]:
    """One axis over all devices."""

    def layouts(devices: int, scale_up_devices: int) -> tuple[Layout, ...]:
        del scale_up_devices
        return (Layout(mesh((devices,)), (allowed,)),)

    return layouts


def _hybrid(devices: int, scale_up_devices: int) -> tuple[Layout, ...]:
    """ZeRO-3 among the devices with fast links, replicas across them."""
    if devices % scale_up_devices or devices == scale_up_devices:
        return (Layout(mesh((devices,)), (Allowed("S", (3,), always=True),)),)
    return (
        Layout(
            mesh((devices // scale_up_devices, scale_up_devices)),
            (Allowed("S", (0,), always=True), Allowed("S", (3,), always=True)),
        ),
    )


replicate = Recipe("replicate", "every device does all the work", _all_devices(Allowed("", (0,))))
data_parallel = Recipe(
    "data_parallel",
    "the batch is split, gradients all-reduced",
    _all_devices(Allowed("S", (0,), always=True)),
)
zero1 = Recipe(
    "zero1",
    "data parallel, optimizer states sharded",
    _all_devices(Allowed("S", (1,), always=True)),
)
zero2 = Recipe(
    "zero2",
    "data parallel, gradients and optimizer states sharded",
    _all_devices(Allowed("S", (2,), always=True)),
)
zero3 = Recipe(
    "zero3",
    "fully sharded data parallel: parameters are sharded too",
    _all_devices(Allowed("S", (3,), always=True)),
)
hsdp = Recipe("hsdp", "fully sharded within a host or rack, replicated across", _hybrid)
