"""A step in microbatches trains as one process does on the whole batch, and keeps its promise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import product
from random import Random

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from autopar import api
from autopar.extractor import extract
from autopar.ir.graph import OperatorGraph
from autopar.ir.sharding import Mesh
from autopar.ir.strategy import Storage, Strategy, Training
from autopar.runtime.lowering import lower_microbatch
from autopar.runtime.step import TrainingStep
from autopar.runtime.storage import from_module
from autopar.simulator.microbatches import division
from autopar.simulator.promise import promise
from tests.helpers.cases import (
    Case,
    call,
    case,
    communicator_of,
    divided,
    promised,
    relative,
    training_step,
)
from tests.helpers.fake_prices import FakePrices
from tests.helpers.pool import pool
from tests.helpers.step_check import check
from tests.helpers.strategies import random_strategy, random_strategy_in_parts, replicate

pytestmark = pytest.mark.distributed

MESHES = (Mesh((("data", 2),)), Mesh((("data", 2), ("tensor", 2))))
MODELS = ("mlp", "gpt", "gpt_tied", "gpt2", "llama", "qwen", "bert", "t5", "vit", "unet", "dlrm")
TRAININGS = (Training("sgd"), Training("momentum", clip_norm=0.5), Training("adamw"))


LARGE = ("qwen", "t5")
"""Of these by default two microbatches instead of four: a step of t5 in four takes 20 CPU s."""


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        pytest.param(name, seed, marks=() if seed == int(name in LARGE) else pytest.mark.slow)
        for name in MODELS
        for seed in range(10)
    ],
)
def test_a_random_strategy_in_microbatches_trains_as_one_process(name: str, seed: int) -> None:
    rng = Random(f"{name} {seed}")
    of = divided(case(name).graph, 2 if seed % 2 else 4)
    mesh = MESHES[(seed + MODELS.index(name)) % len(MESHES)]
    strategy = random_strategy(of.graph, of.rules, mesh, rng, rng.choice(TRAININGS))
    check(case(name), replace(strategy, microbatches=of.count))


@pytest.mark.parametrize("name", ["gpt2", "transformer_encoder", "phi3"])
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))]
)
def test_so_does_one_that_divides_each_part_of_fused_projections(name: str, seed: int) -> None:
    rng = Random(f"{name} in parts {seed}")
    of = divided(case(name).graph, 4 if seed % 2 else 2)
    mesh = MESHES[seed % len(MESHES)]
    strategy = random_strategy_in_parts(of.graph, of.rules, mesh, rng, rng.choice(TRAININGS))
    assert any(bound.rule.joined for bound in of.rules.values())
    check(case(name), replace(strategy, microbatches=of.count))


@lru_cache(maxsize=None)
def recipes(name: str, count: int) -> dict[str, Strategy]:
    """The recipes' strategies for four ranks, where communication costs next to nothing."""
    kinds = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    result = api.search(
        case(name).graph,
        topology=FakePrices(devices=4, collectives=dict.fromkeys(kinds, 1e-15)),
        mesh=(4,),
        microbatches=count,
    )
    return {t.name: t.strategy for t in result.trials if t.strategy and t.outcome == "recipe"}


OF_RECIPES = ("data_parallel", "zero1", "zero2", "zero3", "megatron")
BY_DEFAULT = {
    *(("mlp", recipe) for recipe in OF_RECIPES),
    ("gpt", "zero3"),
    ("gpt", "megatron"),
    ("llama", "zero2"),
    ("llama", "megatron"),
    ("bert", "zero1"),
    ("vit", "data_parallel"),
}


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        pytest.param(*pair, marks=() if pair in BY_DEFAULT else pytest.mark.slow)
        for pair in product(("mlp", "gpt", "llama", "bert", "vit"), OF_RECIPES)
    ],
)
def test_a_recipe_in_two_microbatches_trains_as_one_process(name: str, recipe: str) -> None:
    check(case(name), recipes(name, 2)[recipe])


def test_whole_gradients_travel_once_and_pieces_with_every_microbatch() -> None:
    assert executed_for_head("I", "I", "I") == {("all_reduce", "step"): 1}
    assert executed_for_head("I", "I", "S(0)") == {("reduce_scatter", "step"): 1}
    assert executed_for_head("I", "S(0)", "S(0)") == {("reduce_scatter", "backward"): 4}
    assert executed_for_head("S(0)", "S(0)", "S(0)") == {
        ("all_gather", "forward"): 4,
        ("all_gather", "backward"): 4,
        ("reduce_scatter", "backward"): 4,
    }


def executed_for_head(parameter: str, gradient: str, optimizer: str) -> dict[object, int]:
    """Data parallel in four microbatches: what is promised for the weight of the head."""
    of, mesh = divided(case("gpt").graph, 4), MESHES[0]
    batch = division(of.graph, 2).choices
    plain = replicate(of.graph, mesh)
    strategy = replace(
        plain,
        splits={name: (choice,) for name, choice in batch.items()},
        storage={
            **plain.storage,
            "head.weight": Storage((parameter,), (gradient,), (optimizer,)),
        },
        microbatches=4,
    )
    return {
        (one.kind, one.phase): one.count
        for one in promise(of.graph, of.rules, strategy)
        if one.reason == "head.weight" and (one.kind, one.phase) != ("all_gather", "step")
    }


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit"])
def test_dropout_masks_are_those_of_the_batch_in_one(name: str) -> None:
    of = case(name, dropout=0.3)
    found = pool().run(2, losses_and_gradients, of)[0]
    whole, *others = found
    for loss, gradients in others:
        assert relative(loss, whole[0]) < 1e-9
        for parameter, gradient in gradients.items():
            assert relative(gradient, whole[1][parameter], 1e-6) < 1e-9, parameter


def losses_and_gradients(of: Case) -> list[tuple[Tensor, dict[str, Tensor]]]:
    found = []
    for count in (1, 2, 4):
        part = division(of.graph, count)
        drawn = random_strategy(part.graph, part.rules, MESHES[0], Random(count))
        step, inputs = training_step(of, replace(drawn, microbatches=count))
        found.append((call(step, inputs), step.full_gradients()))
    return found


class Losses(nn.Module):
    """Several reductions at once, none of which has the weight of another in a microbatch."""

    weight: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.register_buffer("weight", torch.arange(1.0, 7.0, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.steps.add_(1)
        scores = self.linear(x)
        weighted = F.cross_entropy(scores, y, weight=self.weight, ignore_index=2)
        picked = F.nll_loss(F.log_softmax(scores, 1), (y + 1) % 6, ignore_index=3)
        smooth = F.cross_entropy(scores, y.clamp(min=0), label_smoothing=0.1)
        likely = F.cross_entropy(scores, scores.detach().softmax(1))
        total = F.cross_entropy(scores, y, reduction="sum", ignore_index=0)
        loss: Tensor = (
            weighted + picked * 2 + smooth / 3 + likely + 0.1 * scores.mean() + total * 1e-2
        )
        return loss


class Regularised(nn.Module):
    """What depends on parameters alone, on either side of sums over the batch, and a weight that
    is learned."""

    coefficient: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))
        self.doubt = nn.Parameter(torch.tensor(0.3))
        self.register_buffer("coefficient", torch.tensor(0.01))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scores = self.layers(x)
        loss = (-self.doubt).exp() * F.cross_entropy(scores, y) + self.doubt
        loss = loss + self.coefficient * sum(p.square().sum() for p in self.layers.parameters())
        entropy = 1 - scores.softmax(1).square().sum(1).mean()
        decay = torch.stack([p.abs().mean() for p in self.layers.parameters()])
        return torch.stack([decay.max() - loss, 0.1 * entropy - 2]).sum() * -1


class Encoder(nn.Module):
    """torch's own encoder, which makes one dim of (sequence, batch) inside."""

    def __init__(self, *, batch_first: bool, dropout: float = 0.0) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=batch_first)
        self.batch_first = batch_first
        self.words = nn.Embedding(12, 8)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 12)

    def forward(self, ids: Tensor, padding: Tensor, targets: Tensor) -> Tensor:
        x = self.encoder(self.words(ids), src_key_padding_mask=padding)
        scores: Tensor = self.head(x)
        return F.cross_entropy(scores.view(-1, 12), targets.reshape(-1), ignore_index=0)


def regularised() -> Own:
    return Regularised(), (torch.randn(8, 4), torch.randint(6, (8,)))


def losses() -> Own:
    return Losses(), (torch.randn(8, 4), torch.tensor([0, 2, 2, 3, 5, 2, 1, 4]))


def _ids_and_padding() -> tuple[Tensor, Tensor]:
    """Of 8 samples with 6 positions, the last of which are padding in some."""
    return torch.randint(12, (8, 6)), torch.arange(6)[None] >= torch.arange(3, 11)[:, None]


def batch_first() -> Own:
    ids, padding = _ids_and_padding()
    return Encoder(batch_first=True), (ids, padding, (ids + 1) % 12)


def sequence_first() -> Own:
    ids, padding = _ids_and_padding()
    return Encoder(batch_first=False), (ids.t().contiguous(), padding, (ids.t() + 1) % 12)


def flat_targets() -> Own:
    """A target for every position of every sample in one dim, as some tutorials have them."""
    model, (ids, padding, targets) = sequence_first()
    return model, (ids, padding, targets.reshape(-1))


Own = tuple[nn.Module, tuple[Tensor, ...]]
OWN = (losses, regularised, batch_first, sequence_first, flat_targets)


@pytest.mark.parametrize("make", OWN)
@pytest.mark.parametrize("ranks", [1, 2])
def test_loss_and_gradients_are_those_of_the_whole_batch(
    make: Callable[[], Own], ranks: int
) -> None:
    pool().run(ranks, check_own, make.__name__, own_graph(make.__name__))


def own(name: str) -> Own:
    torch.manual_seed(0)
    make = next(make for make in OWN if make.__name__ == name)
    model, batch = make()
    return model.double(), tuple(x.double() if x.is_floating_point() else x for x in batch)


@lru_cache(maxsize=None)
def own_graph(name: str) -> OperatorGraph:
    return extract(*own(name), name=name)


def check_own(name: str, graph: OperatorGraph) -> None:
    model, batch = own(name)
    mesh = Mesh((("data", dist.get_world_size()),))
    for count in (2, 8):
        part = division(graph, count)
        drawn = random_strategy(part.graph, part.rules, mesh, Random(count))
        strategy = replace(drawn, microbatches=count)
        communicator = communicator_of(strategy.mesh)
        state = from_module(model, graph, strategy, communicator.rank, torch.device("cpu"))
        step = TrainingStep(lower_microbatch(part, strategy), strategy, state, communicator)
        before = {name: value.clone() for name, value in state.buffers.items()}
        with communicator.recorder.recording() as executed:
            found = step(*batch)
        model.zero_grad()
        expected = model(*batch)
        expected.backward()
        assert relative(found, expected.detach()) < 1e-9
        gradients = step.full_gradients()
        for parameter, value in model.named_parameters():
            assert value.grad is not None
            assert relative(gradients[parameter], value.grad, 1e-6) < 1e-9, (count, parameter)
        if "steps" in before:
            assert int(state.buffers["steps"]) == int(before["steps"]) + 1
        assert Counter(executed) == promised(part, strategy), count
