"""A model made tensor by tensor has the values that it has when made at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from autopar.errors import AutoparError
from autopar.runtime.initial import InitialValues
from tests.helpers.zoo import ZOO


@pytest.mark.parametrize("name", sorted(ZOO))
def test_values_equal_those_of_the_model_made_at_once(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected, _ = ZOO[name]()
    values = InitialValues(large_elements=0)
    made = values.make(lambda: ZOO[name]()[0], seed=3)
    assert all(isinstance(p, FakeTensor) for p in made.parameters())
    for one, other in zip(_tensors(expected), _tensors(made), strict=True):
        assert torch.equal(one, values.whole(other))


def test_small_tensors_are_simply_made() -> None:
    values = InitialValues(large_elements=1000)
    made = values.make(lambda: nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 200)), seed=0)
    assert [isinstance(p, FakeTensor) for p in made.parameters()] == [False, False, True, False]


def test_a_later_change_of_a_part_is_not_lost() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(8, 4, padding_idx=2)
            self.other = nn.Linear(4, 4)
            with torch.no_grad():
                self.table.weight[5] += self.other.bias

    torch.manual_seed(1)
    expected = Padded()
    values = InitialValues(large_elements=0)
    made = values.make(Padded, seed=1)
    assert torch.equal(expected.table.weight, values.whole(made.table.weight))


def test_a_model_that_looks_at_its_weights_is_refused_with_the_way_out() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.weight.nonzero()

    with pytest.raises(AutoparError, match="give the model itself"):
        InitialValues(large_elements=0).make(Looks, seed=0)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
