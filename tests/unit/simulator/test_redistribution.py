"""Redistributions bring every rank what it wants, and the gradient back."""

from __future__ import annotations

from itertools import product
from random import Random

import numpy as np
import pytest

from autopar.ir.graph import TensorSpec
from autopar.ir.sharding import Mesh, Sharding, gradient
from autopar.simulator.costs import Costs
from autopar.simulator.redistribution import Step, forward_collective, reverse, steps, transfers
from autopar.simulator.redistribution_table import RedistributionTable, code, paths
from tests.helpers.emulated import move, pairing, represents, scatter
from tests.helpers.random_graphs import HashPrices

TWO = Mesh((("a", 2), ("b", 3)))
THREE = Mesh((("a", 2), ("b", 2), ("c", 2)))
TWO_DIMS = ("S(0)", "S(1)", "R", "I", "P")
THREE_DIMS = ("S(2)", *TWO_DIMS)

Pair = tuple[Sharding, Sharding]


def pairs(placements: tuple[str, ...], axes: int) -> list[Pair]:
    shardings = list(product(placements, repeat=axes))
    return list(product(shardings, shardings))


def travels(source: Sharding, target: Sharding, mesh: Mesh, shape: tuple[int, ...]) -> None:
    """Forward and backward of one redistribution, on numbers."""
    rng = np.random.default_rng(0)
    value, slope = rng.standard_normal(shape), rng.standard_normal(shape)
    made = scatter(value, source, mesh, rng)
    path = steps(source, target)
    arrived = _along(made, path, source, mesh, backward=False)
    assert represents(arrived, value, target, mesh)
    coming = scatter(slope, gradient(target), mesh, rng)
    back = tuple(reverse(step) for step in reversed(path))
    gone = _along(coming, back, source, mesh, backward=True, target=target)
    assert represents(gone, slope, gradient(source), mesh)
    # the backward is the adjoint of the forward: <F x, y> = <x, B y>
    assert pairing(arrived, coming, target, mesh) == pytest.approx(
        pairing(made, gone, source, mesh), rel=1e-9, abs=1e-9
    )


def _along(
    state: list[np.ndarray],
    path: tuple[Step, ...],
    source: Sharding,
    mesh: Mesh,
    *,
    backward: bool,
    target: Sharding = (),
) -> list[np.ndarray]:
    """Move the numbers; the collectives met are those that ``transfers`` lists, bytes included."""
    size = int(state[0].nbytes * _pieces(gradient(target) if backward else source, mesh))
    met = []
    for step in path:
        before = state[0].nbytes
        state = move(state, step, mesh)
        if forward_collective(step) is not None:
            met.append((forward_collective(step), step.axis, max(before, state[0].nbytes)))
    listed = transfers(source, target or _end(source, path), size, mesh, backward=backward)
    assert [(t.kind, t.axis, t.bytes) for t in listed] == met
    return state


def _end(source: Sharding, path: tuple[Step, ...]) -> Sharding:
    current = list(source)
    for step in path:
        assert current[step.axis] == step.source
        current[step.axis] = step.target
    return tuple(current)


def _pieces(sharding: Sharding, mesh: Mesh) -> int:
    sizes = (n for p, n in zip(sharding, mesh.sizes, strict=True) if p[0] == "S")
    return int(np.prod(list(sizes), dtype=int))


def test_on_one_and_two_axes_every_pair_is_reached_and_the_backward_is_the_adjoint() -> None:
    for source, target in pairs(THREE_DIMS, 1):
        travels(source, target, Mesh((("a", 3),)), (3, 3, 3))
    for source, target in pairs(THREE_DIMS, 2):
        travels(source, target, TWO, (6, 6, 6))


def test_dims_of_several_parts_are_reached_too() -> None:
    """Where axes divide one dim they agree on its parts, before and after."""
    one = ("S(0,2)", "S(0,1:3)", "S(1,2)", "S(0)", "R", "I", "P")
    for source, target in pairs(one, 1):
        travels(source, target, Mesh((("a", 3),)), (12, 6))
    for source, target in Random(0).sample(pairs(("S(0,1:3)", "S(1)", "R", "I", "P"), 2), 200):
        travels(source, target, TWO, (24, 6))
    whole = pairs(("S(0)", "S(1)", "R", "I", "P"), 2)
    for source, plain in Random(1).sample(whole, 200):
        target = tuple("S(0,2)" if p == "S(0)" else p for p in plain)
        travels(source, target, TWO, (12, 6))
        travels(target, source, TWO, (12, 6))


def test_on_three_axes_random_pairs_are_reached() -> None:
    for source, target in Random(0).sample(pairs(TWO_DIMS, 3), 400):
        travels(source, target, THREE, (8, 8))


@pytest.mark.slow
def test_on_three_axes_all_pairs_are_reached() -> None:
    for source, target in pairs(TWO_DIMS, 3):
        travels(source, target, THREE, (8, 8))


def test_nothing_is_done_where_nothing_changes_and_nobody_works_without_need() -> None:
    for source, target in pairs(THREE_DIMS, 2):
        path = steps(source, target)
        changed = {axis for axis in range(2) if source[axis] != target[axis]}
        cuts_one_dim_twice = any(
            s[0] == s[1] and s[0].startswith("S") for s in (source, target)
        ) or {source[0], target[0]} & {source[1], target[1]} & {"S(0)", "S(1)", "S(2)"}
        assert len(path) >= len(changed)
        if not cuts_one_dim_twice:
            assert {step.axis for step in path} == changed
            assert len(path) == len(changed)


def test_a_redistribution_that_makes_a_tensor_smaller_first_moves_less() -> None:
    (first, second) = transfers(("P", "S(1)"), ("S(0)", "R"), 96, TWO)
    assert (first.kind, first.bytes) == ("reduce_scatter", 32)
    assert (second.kind, second.bytes) == ("all_gather", 48)


@pytest.mark.parametrize("sizes", [(4,), (2, 3), (1, 4), (2, 2, 2)])
def test_the_table_of_seconds_equals_the_costs_one_by_one(sizes: tuple[int, ...]) -> None:
    mesh = Mesh(tuple(zip("abc", sizes, strict=False)))
    rng = Random(len(sizes))
    costs = Costs(HashPrices(1, mesh.size), mesh)
    table = RedistributionTable(costs)
    for dtype in ("float32", "bfloat16"):
        spec = TensorSpec((48, 48, 48), dtype)
        found = pairs(("S(2,3)", *THREE_DIMS), len(sizes))
        found = [pair for pair in found if all(map(_agree_on_parts, pair))]
        for source, target in rng.sample(found, min(len(found), 400)):
            number = paths(len(sizes)).block(np.array([code(source)]), np.array([code(target)]))
            there, back = table.seconds(spec, number)
            assert there[0, 0] == pytest.approx(
                costs.redistribution_s(spec, source, target, backward=False), rel=1e-12
            )
            assert back[0, 0] == pytest.approx(
                costs.redistribution_s(spec, source, target, backward=True), rel=1e-12
            )
            collectives, _ = table.seconds(spec, number, copies=False)
            assert collectives[0, 0] == pytest.approx(
                sum(costs.transfer_s(t) for t in transfers(source, target, spec.bytes, mesh)),
                rel=1e-12,
            )


def _agree_on_parts(sharding: Sharding) -> bool:
    return not {"S(2)", "S(2,3)"} <= set(sharding)


def test_rows_of_pairs_and_blocks_of_pairs_have_the_same_numbers() -> None:
    found = [code(s) for s in product(THREE_DIMS, repeat=2)]
    rng = np.random.default_rng(0)
    sources, targets = rng.choice(found, 200), rng.choice(found, 200)
    block = paths(2).block(sources, targets)
    assert (np.diagonal(block) == paths(2).pairs(sources, targets)).all()
