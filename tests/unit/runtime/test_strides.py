"""Strides are followed as torch makes them."""

from __future__ import annotations

from random import Random

import pytest
import torch
from torch import Tensor

from autopar.simulator.strides import Strides, attended, is_contiguous, like, viewed


def at_random(rng: Random) -> Tensor:
    """Permuted, cut and expanded."""
    tensor = torch.empty([rng.choice((1, 2, 3, 4, 6)) for _ in range(rng.randint(1, 4))])
    for _ in range(rng.randint(0, 3)):
        dim = rng.randrange(tensor.ndim)
        match rng.randrange(3):
            case 0:
                tensor = tensor.permute(rng.sample(range(tensor.ndim), tensor.ndim))
            case 1 if tensor.shape[dim] > 1:
                tensor = tensor.narrow(dim, 0, tensor.shape[dim] // 2)
            case 2:
                tensor = tensor.expand([rng.choice((2, 3)) if n == 1 else n for n in tensor.shape])
    return tensor


def regrouped(elements: int, rng: Random) -> list[int]:
    shape = []
    while elements > 1:
        shape.append(rng.choice([n for n in range(2, elements + 1) if elements % n == 0]))
        elements //= shape[-1]
    for _ in range(rng.randint(0, 2)):
        shape.insert(rng.randint(0, len(shape)), 1)
    return shape


def same(shape: list[int], a: Strides, b: Strides) -> bool:
    return all(size == 1 or x == y for size, x, y in zip(shape, a, b, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_views_are_those_of_torch(seed: int) -> None:
    rng = Random(seed)
    possible = 0
    for _ in range(400):
        tensor = at_random(rng)
        shape, strides = tuple(tensor.shape), tensor.stride()
        assert is_contiguous(shape, strides) == tensor.is_contiguous()
        wanted = regrouped(tensor.numel(), rng)
        found = viewed(shape, strides, tuple(wanted))
        try:
            expected = tensor.view(wanted).stride()
        except RuntimeError:
            assert found is None
        else:
            possible += 1
            assert found is not None and same(wanted, found, expected)
        if 0 not in strides:
            assert same(list(shape), like(shape, strides), (tensor + tensor).stride())
    assert 40 < possible < 400


def test_fused_attention_gives_gradients_by_position() -> None:
    q, k, v = (torch.randn(2, 4, 16, 8, requires_grad=True) for _ in range(3))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    found = torch.autograd.grad(out.sum(), [q, k, v])
    assert all(gradient.stride() == attended((2, 4, 16, 8)) for gradient in found)
