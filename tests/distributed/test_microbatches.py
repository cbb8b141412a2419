"""A step in microbatches trains as one process does on the whole batch, and keeps its promise."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache
from random import Random

import pytest

from autopar.ir.sharding import Mesh
from autopar.ir.strategy import Strategy, Training
from autopar.runtime.recorder import Executed
from autopar.simulator.microbatches import Division, division
from autopar.simulator.prices import promise
from tests.helpers.cases import Case, Outcome, case, outcome
from tests.helpers.pool import pool
from tests.helpers.strategies import random_strategy

pytestmark = pytest.mark.distributed

MESHES = (Mesh((("data", 2),)), Mesh((("data", 2), ("tensor", 2))))
MODELS = ("mlp", "gpt", "gpt_tied", "gpt2", "llama", "qwen", "bert", "t5", "vit", "unet", "dlrm")
TRAININGS = (Training("sgd"), Training("momentum", clip_norm=0.5), Training("adamw"))


@lru_cache(maxsize=None)
def divided(name: str, count: int) -> Division:
    return division(case(name).graph, count)


def check(of: Case, strategy: Strategy) -> None:
    found = pool().run(strategy.mesh.size, outcome, of, strategy)[0]
    assert isinstance(found, Outcome)
    assert found.loss < 1e-9
    assert found.gradient < 1e-9, found.worst_gradient
    assert found.parameter < 1e-8
    assert Counter(found.executed) == promised(divided(of.name, strategy.microbatches), strategy)


def promised(of: Division, strategy: Strategy) -> Counter[Executed]:
    counts: Counter[Executed] = Counter()
    for one in promise(of.graph, of.rules, strategy):
        counts[Executed(one.kind, one.phase, one.axis, one.bytes)] += one.count
    return counts


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 10))]
)
def test_a_random_strategy_in_microbatches_trains_as_one_process(name: str, seed: int) -> None:
    rng = Random(f"{name} {seed}")
    of = divided(name, 4 if seed % 2 else 2)
    mesh = MESHES[(seed + MODELS.index(name)) % len(MESHES)]
    strategy = random_strategy(of.graph, of.rules, mesh, rng, rng.choice(TRAININGS))
    check(case(name), replace(strategy, microbatches=of.count))
