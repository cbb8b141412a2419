"""Which logical meshes a number of devices can be arranged in."""

from __future__ import annotations

from math import prod

from autopar.errors import AutoparError
from autopar.ir.sharding import Mesh

AXIS_NAMES = ("a", "b", "c")
"""Axes have no purpose of their own: what an axis divides is decided operator by operator."""


def mesh(sizes: tuple[int, ...]) -> Mesh:
    """A mesh of these sizes, outermost first, its axes named ``a``, ``b``, ``c``.

    >>> mesh((32, 8)).axes
    (('a', 32), ('b', 8))
    """
    if not 1 <= len(sizes) <= len(AXIS_NAMES):
        raise AutoparError(f"a mesh has one to {len(AXIS_NAMES)} axes, {sizes} has {len(sizes)}")
    if min(sizes) < 1:
        raise AutoparError(f"the axes of a mesh have positive sizes, got {sizes}")
    return Mesh(tuple(zip(AXIS_NAMES, sizes, strict=False)))


def factorizations(devices: int, most_axes: int = 3) -> tuple[Mesh, ...]:
    """Every mesh of ``devices`` with one to ``most_axes`` axes of at least 2, in any order.

    >>> [m.sizes for m in factorizations(8, 2)]
    [(8,), (2, 4), (4, 2)]
    """
    if devices < 1:
        raise AutoparError(f"a mesh needs at least one device, got {devices}")
    if devices == 1:
        return (mesh((1,)),)
    return tuple(
        mesh(sizes) for axes in range(1, most_axes + 1) for sizes in _products(devices, axes)
    )


def _products(number: int, count: int) -> list[tuple[int, ...]]:
    if count == 1:
        return [(number,)] if number > 1 else []
    return [
        (first, *rest)
        for first in range(2, number)
        if number % first == 0
        for rest in _products(number // first, count - 1)
    ]


def check_mesh(wanted: Mesh, devices: int) -> Mesh:
    """``wanted`` if it has exactly ``devices`` devices."""
    if prod(wanted.sizes) != devices:
        shape = " x ".join(map(str, wanted.sizes))
        raise AutoparError(
            f"the mesh {shape} has {wanted.size} devices, the topology has {devices}; "
            f"give a mesh whose sizes multiply to {devices}"
        )
    return wanted
