"""Megatron-LM: tensor parallel on fast links, data parallel across (arXiv 1909.08053)."""

from __future__ import annotations

from collections.abc import Callable

from autopar.recipes.recipe import Layout, Recipe
from autopar.simulator.listing import Allowed
from autopar.simulator.meshes import mesh


def _tensor_parallel(tensor: Allowed) -> Callable[[int, int], tuple[Layout, ...]]:
    """Every tensor-parallel degree that fast links allow; the last axis is the tensor axis. Both
    axes divide what they can, whether it pays or not; what is left to the prices is which products
    are by columns and which by rows."""
    data = Allowed("S", (0,), always=True)

    def layouts(devices: int, scale_up_devices: int) -> tuple[Layout, ...]:
        found = []
        for degree in range(2, min(devices, scale_up_devices) + 1):
            if devices % degree:
                continue
            if degree == devices:
                found.append(Layout(mesh((devices,)), (tensor,)))
            elif degree & (degree - 1) == 0:
                found.append(Layout(mesh((devices // degree, degree)), (data, tensor)))
        return tuple(found)

    return layouts


megatron = Recipe(
    "megatron",
    "tensor parallel by parameters (columns, rows, heads, vocabulary), data parallel outside",
    _tensor_parallel(Allowed("P", (0,), weights=True)),
)
megatron_sp = Recipe(
    "megatron_sp",
    "megatron, with sequence parallelism between the tensor-parallel regions",
    _tensor_parallel(Allowed("PA", (0,), weights=True, always=True)),
)
