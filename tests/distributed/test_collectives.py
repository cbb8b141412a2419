"""A redistribution keeps the tensor it stands for, forward and backward, by the planned means."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from autopar.ir.sharding import Mesh, Sharding, gradient
from autopar.runtime.collectives import Communicator
from autopar.runtime.pieces import held
from autopar.runtime.recorder import Executed
from autopar.runtime.rule_check import indices
from autopar.simulator.redistribution import steps, transfers
from tests.helpers.cases import communicator_of
from tests.helpers.pool import pool

ONE = Mesh((("x", 2),))
TWO = Mesh((("x", 2), ("y", 2)))
SHAPE = (4, 8, 4)
PLACEMENTS = ("S(0)", "S(1)", "S(2)", "R", "I", "P")
IN_PARTS = ("S(0,2)", "S(1,2)", "S(1,1:3)", "S(2,2)")  # dims of several parts, each of them divided
PAIRS = [(a, b) for a, b in product(PLACEMENTS, repeat=2) if a != b]


def test_every_pair_on_one_axis_forward_and_backward() -> None:
    pool().run(2, check_pairs, ONE, [((a,), (b,)) for a, b in PAIRS])


def test_pairs_of_pairs_on_two_axes() -> None:
    every = list(product(PLACEMENTS, repeat=2))
    some = [(a, b) for i, (a, b) in enumerate(product(every, every)) if a != b and i % 7 == 0]
    pool().run(4, check_pairs, TWO, some)


def test_dims_of_several_parts_on_one_axis() -> None:
    every = product((*PLACEMENTS, *IN_PARTS), repeat=2)
    some = [((a,), (b,)) for a, b in every if a != b and {a, b} & set(IN_PARTS)]
    pool().run(2, check_pairs, ONE, some)


def test_dims_of_several_parts_on_two_axes() -> None:
    """Two axes may both divide a dim, each part of it a second time."""
    placements = ("S(1,2)", "S(2)", "R", "I", "P")
    every = list(product(placements, repeat=2))
    some = [(a, b) for i, (a, b) in enumerate(product(every, every)) if a != b and i % 7 == 0]
    pool().run(4, check_pairs, TWO, some)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int64", "bool", "complex64"])
def test_any_dtype(dtype: str) -> None:
    pool().run(2, check_dtype, dtype)


def check_pairs(mesh: Mesh, pairs: list[tuple[Sharding, Sharding]]) -> None:
    communicator = communicator_of(mesh)
    for source, target in pairs:
        check_pair(communicator, source, target)


def check_pair(communicator: Communicator, source: Sharding, target: Sharding) -> None:
    whole = torch.arange(128.0, dtype=torch.float64).reshape(SHAPE)
    back = torch.cos(whole)
    start = part(whole, source, communicator).requires_grad_()
    with communicator.recorder.recording() as counts:
        end = communicator.walk(start, steps(source, target))
        # a gradient with strides of its own, as autograd may bring
        arriving = part(back, gradient(target), communicator)
        end.backward(arriving.transpose(0, 2).contiguous().transpose(0, 2))
    assert torch.equal(total(end.detach(), target, communicator), whole), (source, target)
    assert start.grad is not None
    returned = total(start.grad, gradient(source), communicator)
    assert torch.allclose(returned, back, atol=1e-12), (source, target)
    planned = [
        Executed(t.kind, "forward", communicator.mesh.names[t.axis], t.bytes)
        for backward in (False, True)
        for t in transfers(source, target, 128 * 8, communicator.mesh, backward=backward)
    ]
    assert sorted(map(str, counts.elements())) == sorted(map(str, planned)), (source, target)


def check_dtype(dtype: str) -> None:
    communicator = communicator_of(ONE)
    whole = (torch.arange(128) % 5 < 3).reshape(SHAPE).to(getattr(torch, dtype))
    for a, b in PAIRS:
        start = part(whole, (a,), communicator)
        with torch.no_grad():
            end = communicator.walk(start, steps((a,), (b,)))
        assert end.dtype == whole.dtype
        assert torch.equal(total(end, (b,), communicator), whole), (a, b)


def part(whole: Tensor, sharding: Sharding, communicator: Communicator) -> Tensor:
    """What this rank holds; a partial sum is split into unequal addends."""
    local = whole
    for axis, placement in enumerate(sharding):
        if placement == "P":
            first = communicator.coordinates[axis] == 0
            if local.is_floating_point():
                local = local * (0.25 if first else 0.75)
            elif not first:
                local = torch.zeros_like(local)
    return held(local, sharding, communicator.mesh, communicator.rank).clone()


def total(local: Tensor, sharding: Sharding, communicator: Communicator) -> Tensor:
    """The tensor that all ranks' parts stand for, put together the plain way."""
    mesh = communicator.mesh
    parts = [torch.empty_like(local) for _ in range(mesh.size)]
    dist.all_gather(parts, local.contiguous())
    whole = torch.zeros(SHAPE, dtype=local.dtype)
    for rank, found in enumerate(parts):
        copies = [
            c for p, c in zip(sharding, mesh.coordinates(rank), strict=True) if p in ("R", "I")
        ]
        if any(copies):  # of equal copies the first counts, and the others must equal it
            twin = rank - sum(
                c * s
                for p, c, s in zip(sharding, mesh.coordinates(rank), mesh.strides, strict=True)
                if p in ("R", "I")
            )
            assert torch.equal(found, parts[twin])
            continue
        whole[indices(SHAPE, sharding, mesh, rank)] += found
    return whole
