"""Hashes in one kernel are those of the formula, bit by bit."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from autopar.runtime.draws import Span, formula

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

KEYS = (0, 1, 16, -1, 2**63 - 1, -(2**63))


def spans(random_: random.Random) -> tuple[Span, ...]:
    """Of up to five dims, each of which may be cut."""
    sizes = [random_.randint(1, 40) for _ in range(random_.randint(1, 5))]
    found, stride = [], 1
    for size in reversed(sizes):
        start = random_.randrange(size) if random_.random() < 0.5 else 0
        found.append((start, size - start, stride * random_.randint(-(2**40), 2**40)))
        stride *= size
    return tuple(reversed(found))


def on_cpu(key: int, of: Sequence[Span]) -> torch.Tensor:
    return formula(key, of, torch.device("cpu"))


@pytest.mark.parametrize("seed", range(20))
def test_one_kernel_draws_what_the_formula_draws(seed: int) -> None:
    from autopar.runtime import draws_on_gpu

    random_ = random.Random(seed)
    key = KEYS[seed] if seed < len(KEYS) else random_.randint(-(2**63), 2**63 - 1)
    least = random_.randint(-(2**63), 2**63 - 1)
    of, device = spans(random_), torch.device("cuda")
    expected = on_cpu(key, of)
    assert torch.equal(draws_on_gpu.hashed(key, of, device).cpu(), expected)
    assert torch.equal(draws_on_gpu.at_least(least, key, of, device).cpu(), expected >= least)
