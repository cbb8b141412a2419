"""Memory of processes, and what a profile asks with."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from autopar.runtime.bench import RING_BYTES, Bench
from autopar.runtime.devices import MeasuredDevice, keep_freed_memory

TENSORS, FLOATS = 8, 2**21
"""64 MB in all, of which glibc by itself keeps a fourth."""


def faults_of_new_memory() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    made = [torch.ones(FLOATS) for _ in range(TENSORS)]
    del made
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other systems keep memory otherwise")
def test_memory_that_tensors_leave_is_there_for_the_next() -> None:
    keep_freed_memory()
    several = [faults_of_new_memory() for _ in range(8)]
    pages = TENSORS * FLOATS * 4 // resource.getpagesize()
    assert min(several) < pages / 10


def test_results_of_a_question_stay_until_caches_have_seen_as_much() -> None:
    bench = Bench(1, 1, MeasuredDevice("cpu"), dtypes=("float32",))
    for count in (RING_BYTES // 64, RING_BYTES // 16, RING_BYTES):
        keep = bench._keeping(torch.float32, count)
        for _ in range(20):
            keep(torch.empty(count))
        kept = [t for t in bench._results if t.numel() == count]
        assert len(kept) == len(bench._results) == max(1, RING_BYTES // (4 * count))


def test_operands_of_a_question_follow_each_other_through_all_memory() -> None:
    bench = Bench(1, 1, MeasuredDevice("cpu"), dtypes=("float32",))
    rows = bench._in_turn(torch.float32, 1024, 1024)
    several = [rows().data_ptr() for _ in range(2 * RING_BYTES // 2**22)]
    assert len(set(several)) == RING_BYTES // 2**22
