"""Gradients of parameters that several stages hold: all get the sum, in their own pieces."""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np
import pytest

from autopar.ir.sharding import Mesh, Sharding, shard
from autopar.ir.strategy import Training
from autopar.simulator.shared_gradients import SharedGradient, exchange_bytes, shared_gradient
from tests.helpers.emulated import held

FULL, MIXED = Training(), Training(precision="mixed")
ONE, TWO, FOUR = (Mesh((("a", n),)) for n in (1, 2, 4))
GRID = Mesh((("a", 2), ("b", 2)))

Lies = tuple[Sharding, Mesh]


def gradient(holders: dict[tuple[int, int], Lies], training: Training = FULL) -> SharedGradient:
    return shared_gradient("w", (8, 4), "float32", holders, training)


def at_random(rng: Random) -> tuple[SharedGradient, list[tuple[int, ...]]]:
    """Some rows, with stages on meshes of any shapes."""
    groups: list[tuple[int, ...]] = []
    holders: dict[tuple[int, int], Lies] = {}
    for row in range(rng.randint(1, 4)):
        size = rng.choice((1, 2, 4))
        first = sum(map(len, groups))
        groups.append(tuple(range(first, first + size)))
        for stage in range(rng.randint(1, 2)):
            mesh = rng.choice([mesh for mesh in (ONE, TWO, FOUR, GRID) if mesh.size == size])
            lies = tuple(rng.choice(("I", shard(0), shard(1))) for _ in mesh.axes)
            if lies == (shard(1), shard(1)):
                lies = (shard(1), "I")
            holders[2 * row + stage, row] = lies, mesh
    return gradient(holders), groups


@pytest.mark.parametrize("seed", range(40))
def test_every_holder_gets_the_sum_of_all(seed: int) -> None:
    of, groups = at_random(Random(seed))
    numbers = np.random.default_rng(seed)
    whole = {holder: numbers.normal(size=of.shape) for kind in of.kinds for holder in kind.holders}
    sums = [sum(whole[holder] for holder in kind.holders) for kind in of.kinds]
    for k, kind in enumerate(of.kinds):
        for row in kind.rows:
            for place, device in enumerate(groups[row]):
                total = np.array(held(sums[k], kind.sharding, kind.mesh, place))
                for passing, message, _, receiver in of.deliveries(groups):
                    if (passing.target, passing.target_row, receiver) == (k, row, device):
                        source = of.kinds[passing.source]
                        ends = source.sharding, source.mesh, message.sender
                        piece = held(sums[passing.source], *ends)[box(message.taken)]
                        total[box(message.put)] += piece
                expected = held(np.sum([*whole.values()], axis=0), kind.sharding, kind.mesh, place)
                assert np.allclose(total, expected)


def box(ranges: tuple[tuple[int, int], ...]) -> tuple[slice, ...]:
    return tuple(slice(*ends) for ends in ranges)


def test_the_same_pieces_on_other_meshes_are_alike() -> None:
    whole: dict[tuple[int, int], Lies] = {(0, 0): (("I", "I"), GRID), (1, 1): (("I",), FOUR)}
    assert len(gradient(whole).kinds) == 1
    cut: dict[tuple[int, int], Lies] = {
        (0, 0): ((shard(0), shard(0)), GRID),
        (1, 1): ((shard(0),), FOUR),
    }
    assert len(gradient(cut).kinds) == 1
    assert len(gradient({**cut, (2, 2): (("I",), FOUR)}).kinds) == 2


def test_a_row_takes_from_itself_and_others_take_turns() -> None:
    """Two rows have the one, three others the other."""
    one: Lies = (shard(0),), TWO
    other: Lies = ("I",), TWO
    of = gradient({(0, 0): one, (1, 0): other, (0, 1): one, (1, 2): other, (1, 3): other})
    there = {(p.source_row, p.target_row) for p in of.passings if p.target == 1}
    assert there == {(0, 0), (0, 2), (1, 3)}
    back = {(p.source_row, p.target_row) for p in of.passings if p.target == 0}
    assert back == {(0, 0), (0, 1)}


def test_between_one_device_and_two_halves_each_byte_goes_once_each_way() -> None:
    groups = [(0,), (1, 2)]
    halves: dict[tuple[int, int], Lies] = {(0, 0): (("I",), ONE), (1, 1): ((shard(0),), TWO)}
    for training, item in ((FULL, 4), (MIXED, 4)):
        sent = Counter[tuple[int, int]]()
        for one in gradient(halves, training).sent(groups):
            sent[one.sender, one.receiver] += one.bytes
        assert sent == dict.fromkeys([(0, 1), (0, 2), (1, 0), (2, 0)], 4 * 4 * item)
    columns = gradient({(0, 0): (("I",), ONE), (1, 1): ((shard(1),), TWO)})
    copied = {(one.sender, one.receiver): one.copied_bytes for one in columns.sent(groups)}
    assert copied == {(0, 1): 64, (0, 2): 64, (1, 0): 0, (2, 0): 0}, "columns are put together"


def test_what_a_device_holds_while_it_is_summed() -> None:
    """Row 0 has the whole (128 bytes in 32 elements), row 1 halves of the columns."""
    of = gradient({(0, 0): (("I",), ONE), (1, 1): ((shard(1),), TWO)})
    before = {("w", 0): 128, ("w", 1): 64}
    whole = exchange_bytes([of], 0, [(0,), (1, 2)], before)
    # its gradient has become the sum; beside it 128 arrive, then a total of 128 is made
    assert (whole.most, whole.after) == (128 + 128, 0)
    half = exchange_bytes([of], 1, [(0,), (1, 2)], before)
    assert (half.most, half.after) == (64 + 64, 0)
    nothing = exchange_bytes([of], 2, [(0,), (1, 2), (3,)], before)
    assert (nothing.most, nothing.after) == (0, 0)
