"""Whatever a strategy splits, it trains the same model and communicates what was promised."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from random import Random

import pytest

from autopar.ir.search import Budget, Problem
from autopar.ir.sharding import Mesh
from autopar.ir.strategy import Strategy, Training
from autopar.ops import bound_rules
from autopar.recipes import RECIPES
from autopar.runtime.recorder import Executed
from autopar.searchers import SEARCHERS
from autopar.simulator.edges import Rules
from autopar.simulator.prices import promise
from tests.helpers.cases import Case, Outcome, case, outcome
from tests.helpers.fake_prices import FakePrices
from tests.helpers.pool import pool
from tests.helpers.strategies import random_strategy, random_strategy_in_parts

MESHES = (
    Mesh((("data", 2),)),
    Mesh((("data", 4),)),
    Mesh((("data", 2), ("tensor", 2))),
)
MODELS = (
    "mlp",
    "gpt",
    "gpt_tied",
    "gpt2",
    "llama",
    "qwen",
    "bert",
    "t5",
    "vit",
    "resnet",
    "unet",
    "two_tower",
    "dlrm",
    "transformer_encoder",
    "codebook",
)
TRAININGS = (
    Training("sgd"),
    Training("momentum", clip_norm=0.5),
    Training("adam", clip_norm=0.1),
    Training("adamw"),
)
SLOW_COMPUTE = {"matmul": 1e-8, "attention": 1e-8, "memory": 1e-7}  # worth dividing, at these sizes
IN_DEFAULT_RUN = 4  # seeds for each model; the others are slow
SEEDS = 15


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "seed",
    [
        seed if seed < IN_DEFAULT_RUN else pytest.param(seed, marks=pytest.mark.slow)
        for seed in range(SEEDS)
    ],
)
def test_a_random_strategy_trains_as_one_process_and_keeps_its_promise(
    name: str, seed: int
) -> None:
    of = case(name)
    strategy = drawn(of, seed)
    found = on_ranks(of, strategy)
    assert found.loss < 1e-9
    assert found.gradient < 1e-9, found.worst_gradient
    assert found.parameter < 1e-8
    assert Counter(found.executed) == promised(of, strategy)


@pytest.mark.parametrize("name", ["gpt2", "transformer_encoder", "phi3"])
@pytest.mark.parametrize(
    "seed",
    [
        seed if seed < len(MESHES) else pytest.param(seed, marks=pytest.mark.slow)
        for seed in range(SEEDS)
    ],
)
def test_so_does_one_that_divides_each_part_of_fused_projections(name: str, seed: int) -> None:
    of, rng = case(name), Random(f"{name} in parts {seed}")
    mesh, training = MESHES[seed % len(MESHES)], rng.choice(TRAININGS)
    strategy = random_strategy_in_parts(of.graph, rules(name), mesh, rng, training)
    assert any(
        any(",3)" in placement or ",2" in placement for sharding in made for placement in sharding)
        for operator, split in strategy.splits.items()
        for made in rules(name)[operator].shardings(split)
    )
    found = on_ranks(of, strategy)
    assert found.loss < 1e-9
    assert found.gradient < 1e-9, found.worst_gradient
    assert found.parameter < 1e-8
    assert Counter(found.executed) == promised(of, strategy)


def drawn(of: Case, seed: int) -> Strategy:
    """Seeds walk through the meshes and, more slowly, through the optimizers."""
    rng = Random(f"{of.name} {seed}")
    mesh = MESHES[(seed + MODELS.index(of.name)) % len(MESHES)]
    return random_strategy(of.graph, rules(of.name), mesh, rng, rng.choice(TRAININGS))


@lru_cache(maxsize=None)
def rules(name: str) -> Rules:
    return bound_rules(case(name).graph)


def on_ranks(of: Case, strategy: Strategy) -> Outcome:
    found = pool().run(strategy.mesh.size, outcome, of, strategy)[0]
    assert isinstance(found, Outcome)
    return found


def promised(of: Case, strategy: Strategy) -> Counter[Executed]:
    counts: Counter[Executed] = Counter()
    for one in promise(of.graph, rules(of.name), strategy):
        counts[Executed(one.kind, one.phase, one.axis, one.bytes)] += one.count
    return counts


@pytest.mark.parametrize(
    "name",
    [
        "gpt_tied",
        "resnet",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "t5", "dlrm", "vit")),
    ],
)
def test_so_do_every_recipe_and_what_the_ilp_finds(name: str) -> None:
    of = case(name)
    problem = Problem(
        of.graph,
        FakePrices(work=SLOW_COMPUTE),
        (MESHES[2],),
        memory_limit_bytes=10**9,
        training=Training("adamw", clip_norm=0.5),
    )
    trials = SEARCHERS["ilp"](problem, Budget(), progress=lambda _: None).trials
    assert {trial.name for trial in trials} >= set(RECIPES)
    for trial in trials:
        if trial.strategy is None:
            continue
        found = on_ranks(of, trial.strategy)
        assert found.loss < 1e-9, trial.name
        assert found.gradient < 1e-9, (trial.name, found.worst_gradient)
        assert found.parameter < 1e-8, trial.name
        assert Counter(found.executed) == promised(of, trial.strategy), trial.name
