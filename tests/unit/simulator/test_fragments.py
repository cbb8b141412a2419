"""What an allocator holds beside a peak, against one that looks at every byte."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest

from autopar.ir.strategy import Training
from autopar.recipes import Degrees, by_degrees
from autopar.simulator.folding import whole
from autopar.simulator.fragments import Piece, Pool, trapped_bytes
from autopar.simulator.listing import Structure
from autopar.simulator.microbatches import division
from benchmarks.kernels import proposals
from benchmarks.transformer import Transformer
from cost_models import cost_model

SMALL = Transformer(
    layers=4, width=64, heads=4, kv_heads=4, ffn=256, vocabulary=256, length=64, fused=True
)


class Bytes:
    """Segments of bytes; a tensor takes the smallest run of free ones that has room."""

    def __init__(self) -> None:
        self.segments: list[list[bool]] = []

    def take(self, size: int) -> tuple[int, int]:
        runs = [
            (stop - start, i, start)
            for i, used in enumerate(self.segments)
            for start, stop in _free_runs(used)
            if stop - start >= size
        ]
        if not runs:
            self.segments.append([True] * size)
            return len(self.segments) - 1, 0
        _, i, start = min(runs)
        self.segments[i][start : start + size] = [True] * size
        return i, start

    def give(self, i: int, start: int, size: int) -> None:
        self.segments[i][start : start + size] = [False] * size


def _free_runs(used: list[bool]) -> list[tuple[int, int]]:
    edges = [0, *(i for i in range(1, len(used)) if used[i] != used[i - 1]), len(used)]
    return [(start, stop) for start, stop in pairwise(edges) if not used[start]]


@pytest.mark.parametrize("seed", range(20))
def test_a_pool_asks_for_as_much_as_one_that_looks_at_bytes(seed: int) -> None:
    draw = Random(seed)
    pool, slow = Pool(), Bytes()
    held: list[tuple[Piece, tuple[int, int], int]] = []
    for _ in range(100):
        if held and draw.random() < 0.5:
            piece, place, size = held.pop(draw.randrange(len(held)))
            pool.give(piece)
            slow.give(*place, size)
        else:
            size = draw.randint(1, 9)
            held.append((pool.take(size), slow.take(size), size))
        assert pool.reserved_bytes == sum(map(len, slow.segments))
        free = [stop - start for used in slow.segments for start, stop in _free_runs(used)]
        assert sorted(piece.size_bytes for piece in pool.free) == sorted(free)


@pytest.mark.parametrize("seed", range(5))
def test_growing_tensors_find_no_room_and_shrinking_ones_do(seed: int) -> None:
    sizes = Random(seed).sample(range(1, 50), 8)

    def reserved(order: list[int]) -> int:
        pool = Pool()
        for size in order:
            pool.give(pool.take(size))
        return pool.reserved_bytes

    assert reserved(sorted(sizes)) == sum(sizes)
    assert reserved(sorted(sizes, reverse=True)) == max(sizes)


def trapped(model: Transformer, recompute: str = "none", *, folds: bool = False) -> int:
    graph = model.graph(8)
    found = division(graph, 1, proposals(graph))
    structure = Structure(found.graph, found.rules)
    degrees = Degrees(data=8, zero=3, microbatch=1, recompute=recompute)
    machine = cost_model("1x8xh100-sxm")
    strategy = by_degrees(found, degrees, machine, Training("adam", "mixed"), structure)
    runs = tuple(frozenset[int]() for _ in structure.blocks)
    seen = structure.folded_in_runs(runs) if folds else whole(found.graph)
    return trapped_bytes(found.graph, found.rules, strategy, seen)


@pytest.mark.parametrize("vocabulary", [2**5, 2**14])
@pytest.mark.parametrize("recompute", ["none", "full", "alternate"])
def test_equal_blocks_find_the_same_pieces(vocabulary: int, recompute: str) -> None:
    model = replace(SMALL, layers=6, vocabulary=vocabulary)
    assert trapped(model, recompute, folds=True) == trapped(model, recompute)


def test_the_larger_the_logits_the_more_is_beside_them() -> None:
    """Of what blocks had nothing can be used for logits that are larger, nor the logits themselves
    for their copies in float32."""
    found = [trapped(replace(SMALL, vocabulary=n)) for n in (2**5, 2**14, 2**15)]
    assert found == sorted(found)
    assert found[2] - found[1] >= 2 * 2**14 * SMALL.length
