"""What can be worked on one part of the batch after the other, and what cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from autopar.errors import AutoparError, UnsupportedModelError
from autopar.extractor import extract
from autopar.ir.graph import OperatorGraph
from autopar.ops import bound_rules
from autopar.simulator.microbatches import (
    Divisible,
    Division,
    batch_size,
    divide,
    division,
    divisions,
)
from tests.helpers.cases import case

Head = Callable[[Tensor, Tensor], Tensor]


class Model(nn.Module):
    """A linear, and a loss of its own."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(4, 6), head

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.linear(x), y)


def graph(head: Head) -> OperatorGraph:
    return extract(Model(head), (torch.randn(8, 4), torch.randint(6, (8,))), name="model")


def test_one_microbatch_is_the_graph_itself() -> None:
    whole = case("gpt").graph
    assert divide(whole, 1) is whole


@pytest.mark.parametrize("name", ["gpt", "llama", "bert", "t5", "vit", "unet", "dlrm"])
def test_the_graph_of_a_microbatch_is_that_of_a_smaller_batch(name: str) -> None:
    whole = case(name).graph
    half = divide(whole, 2)
    assert [o.name for o in half.operators] == [o.name for o in whole.operators]
    assert {half.spec(i).shape[0] for i in half.inputs} == {4}
    assert divide(divide(whole, 2), 2).tensors == divide(whole, 4).tensors
    assert bound_rules(half).keys() == bound_rules(whole).keys()


@pytest.mark.parametrize("name", ["gpt", "llama", "vit", "unet", "mlp"])
def test_it_is_what_would_be_extracted_with_such_a_batch(name: str) -> None:
    from tests.helpers.zoo import zoo

    model, inputs = zoo(name)
    few = (
        {key: value[:4] for key, value in inputs.items()}
        if isinstance(inputs, dict)
        else tuple(value[:4] for value in inputs)
    )
    half = divide(case(name).graph, 2)
    extracted = extract(model, few, name=name)
    assert half.tensors == extracted.tensors
    assert half.operators == extracted.operators


@pytest.mark.parametrize("name", ["gpt", "bert", "t5", "vit", "unet", "dlrm", "two_tower"])
def test_several_numbers_of_microbatches_in_any_order_are_as_each_alone(name: str) -> None:
    """Refused ones, which leave the others as they are, among them."""
    whole = case(name).graph
    several = Divisible(whole)
    for count in (4, 3, 2, 16, 8, 1, 2):
        assert _outcome(several.into, count) == _outcome(lambda n: division(whole, n), count)


def _outcome(into: Callable[[int], Division], count: int) -> object:
    try:
        found = into(count)
    except AutoparError as refusal:
        return type(refusal), str(refusal)
    return found, list(found.rules.items())


def test_the_batch_is_the_commonest_leading_dim() -> None:
    whole = graph(lambda x, y: F.cross_entropy(x, y))
    assert batch_size(whole) == 8
    assert [d.count for d in divisions(whole)] == [1, 2, 4, 8]


class WithPositions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(10, 4), nn.Embedding(6, 4)

    def forward(self, ids: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
        x = self.words(ids) + self.places(positions)
        return F.cross_entropy(x.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("shape", [(1, 6), (6,)])
def test_inputs_without_the_batch_stay_whole(shape: tuple[int, ...]) -> None:
    ids = torch.randint(4, (8, 6))
    batch = {"ids": ids, "positions": torch.arange(6).reshape(shape), "labels": ids}
    half = divide(extract(WithPositions(), batch, name="positions"), 2)
    assert [half.spec(name).shape for name in half.inputs] == [(4, 6), shape, (4, 6)]


def test_what_a_mean_divides_by_is_known_before_the_first_microbatch() -> None:
    found = division(case("llama").graph, 2)
    (mean,) = found.means
    counted = [o.op for o in found.counting]
    assert "aten.pad.default" in counted
    assert "aten.embedding.default" not in counted
    assert not any(inner.points == "" for inner in found.rules[mean].rule.inner)


@pytest.mark.parametrize(
    "head",
    [
        lambda x, y: x.sum(),
        lambda x, y: x.mean() * 0.5 + F.cross_entropy(x, y),
        lambda x, y: F.cross_entropy(x, y, reduction="sum") / 3,
        lambda x, y: F.cross_entropy(x, y, reduction="none").mean(),
        lambda x, y: F.nll_loss(F.log_softmax(x, 1), y, weight=torch.arange(6.0)),
        lambda x, y: F.mse_loss(x, F.one_hot(y, 6).to(x.dtype)),
        lambda x, y: x.mean() + torch.ones(()),
        lambda x, y: 1 - x.mean(),
    ],
)
def test_sums_and_means_in_any_mixture_add_up(head: Head) -> None:
    assert division(graph(head), 4).graph.spec(graph(head).loss).shape == ()


@pytest.mark.parametrize(
    ("head", "operator", "why"),
    [
        (lambda x, y: (x @ x.t()).mean(), "matmul", "with other samples"),
        (lambda x, y: x.mean().exp(), "exp", "needs a sum over the whole batch"),
        (lambda x, y: x.amax(0).mean(), "amax", "needs all samples at once"),
        (
            lambda x, y: F.batch_norm(x, None, None, training=True).mean(),
            "batch_norm",
            "statistics over the whole batch: those of microbatches would be another model",
        ),
        (lambda x, y: (x[:4] - x[4:]).mean(), "slice", "needs all samples at once"),
        (lambda x, y: F.cross_entropy(x, (x.argmax(1) + y) % 6), "cross_entropy", "parameter"),
        (lambda x, y: (x * torch.arange(8.0)[:, None]).mean(), "mul", "sample"),
    ],
)
def test_what_needs_the_whole_batch_is_refused_by_name(head: Head, operator: str, why: str) -> None:
    with pytest.raises(UnsupportedModelError, match=why) as refused:
        divide(graph(head), 2)
    assert operator in str(refused.value)


class Encoder(nn.Module):
    """torch's own layer on (sequence, batch, width), or (batch, sequence, width)."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.layer(x).flatten(0, 1), y)


def encoder(batch_first: bool, samples: int) -> OperatorGraph:
    shape = (samples, 6) if batch_first else (6, samples)
    batch = torch.randn(*shape, 8), torch.randn(samples * 6, 8)
    return extract(Encoder(batch_first), batch, name="encoder")


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_batch_inside_a_merged_dim_is_that_of_a_smaller_batch(batch_first: bool) -> None:
    whole = encoder(batch_first, samples=8)
    half = division(whole, 2)
    extracted = encoder(batch_first, samples=4)
    assert half.graph.tensors == extracted.tensors
    (merged,) = (o for o in whole.operators if o.op == "aten.reshape.default")
    assert half.blocks[merged.outputs[0]] == 6
    assert (whole.inputs[1] in half.blocks) == (not batch_first)


def test_the_batch_may_be_the_second_dim() -> None:
    assert batch_size(encoder(batch_first=False, samples=8)) == 8
    assert [d.count for d in divisions(encoder(batch_first=False, samples=8))] == [1, 2, 4, 8]
    with pytest.raises(AutoparError, match="5 microbatches do not divide the batch of 8"):
        divide(encoder(batch_first=False, samples=8), 5)


class Mixed(nn.Module):
    """Positions before samples in one dim, and a mask drawn for each."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.linear, self.p = nn.Linear(4, 4), p

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(0, 1).flatten(0, 1)
        return F.dropout(self.linear(y), self.p).square().mean()


def test_masks_of_samples_that_do_not_stand_together_are_refused() -> None:
    assert divide(extract(Mixed(0.0), (torch.randn(8, 3, 4),), name="mixed"), 2)
    with pytest.raises(UnsupportedModelError, match=r"dropout.* where a sample stands"):
        divide(extract(Mixed(0.5), (torch.randn(8, 3, 4),), name="mixed"), 2)


def test_what_does_not_depend_on_the_batch_is_added_in_shares() -> None:
    weighted = division(graph(lambda x, y: F.cross_entropy(x, y) + 2 * torch.ones(3).norm()), 4)
    (shares,) = weighted.shares.values()
    assert shares == (1,)
    assert not division(graph(lambda x, y: (x + torch.ones(6)).mean()), 4).shares


def test_a_number_that_does_not_divide_the_batch_is_refused() -> None:
    with pytest.raises(AutoparError, match="3 microbatches do not divide the batch of 8"):
        divide(case("mlp").graph, 3)
