"""Memory is followed from the making of a storage to its end; views count once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.runtime.recorder import Recorder
from autopar.runtime.watch import MemoryWatch, Watch

KB = 1024
SIZE = 256  # float32 elements of a kilobyte


@pytest.fixture
def memory() -> Iterator[MemoryWatch]:
    memory = MemoryWatch()
    with FakeTensorMode(), Watch(memory, Recorder({})):
        yield memory


def test_what_is_made_counts_until_its_last_user_is_gone(memory: MemoryWatch) -> None:
    a = torch.ones(SIZE)
    assert memory.live_bytes == KB
    b = a + 1
    view = b.view(16, 16)[1:]
    assert memory.live_bytes == 2 * KB
    del a
    assert memory.live_bytes == KB
    del b
    assert memory.live_bytes == KB, "the view keeps its base"
    del view
    assert memory.live_bytes == 0
    assert memory.peak_bytes == 2 * KB


def test_the_peak_knows_what_was_alive(memory: MemoryWatch) -> None:
    a = torch.ones(SIZE)
    large = torch.zeros(3 * SIZE)
    del large
    b = torch.ones(SIZE)
    assert (a.numel(), b.numel()) == (SIZE, SIZE)
    assert [piece.size_bytes for piece in memory.at_peak()] == [3 * KB, KB]
    assert memory.peak_at == "zeros in forward"


def test_what_is_there_before_counts_at_every_peak(memory: MemoryWatch) -> None:
    kept = torch.ones(SIZE)
    memory.restart()
    a = torch.ones(SIZE)
    assert (kept.numel(), a.numel()) == (SIZE, SIZE)
    assert memory.peak_bytes == 2 * KB
    assert [piece.size_bytes for piece in memory.at_peak()] == [KB, KB]


def test_ignored_tensors_and_their_views_do_not_count() -> None:
    memory = MemoryWatch()
    with FakeTensorMode():
        batch = torch.ones(SIZE)
        memory.ignore([batch])
        with Watch(memory, Recorder({})):
            part = batch.view(16, 16)[1:]
            assert memory.live_bytes == 0
            assert part.clone().numel() == 240
    assert memory.peak_bytes == 240 * 4


def test_saved_tensors_are_alive_until_the_backward(memory: MemoryWatch) -> None:
    weight = torch.ones(SIZE, requires_grad=True)
    kept = (weight * 2).exp().sum()
    assert memory.live_bytes == 2 * KB + 4, "the weight, what exp saved, the sum"
    kept.backward()
    assert memory.live_bytes == 2 * KB + 4, "the weight, its gradient, the sum"
