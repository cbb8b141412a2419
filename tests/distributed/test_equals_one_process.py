"""Whatever a strategy splits, it trains the same model and communicates what was promised."""

from __future__ import annotations

from random import Random

import pytest

from autopar.ir.search import Budget, Problem
from autopar.ir.sharding import Mesh
from autopar.ir.strategy import Strategy, Training
from autopar.recipes import RECIPES
from autopar.searchers import SEARCHERS
from autopar.simulator.edges import Rules
from tests.helpers.cases import Case, case, divided
from tests.helpers.fake_prices import FakePrices
from tests.helpers.step_check import check
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
    "mixtral",
)
TRAININGS = (
    Training("sgd"),
    Training("momentum", clip_norm=0.5),
    Training("adam", clip_norm=0.1),
    Training("adamw"),
)
SLOW_COMPUTE = {"matmul": 1e-8, "attention": 1e-8, "memory": 1e-7}  # worth dividing, at these sizes
IN_DEFAULT_RUN = len(MESHES)  # seeds for each model, one a mesh; the others are slow
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
    check(of, drawn(of, seed))


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
    check(of, strategy)


def drawn(of: Case, seed: int) -> Strategy:
    """Seeds walk through the meshes and, more slowly, through the optimizers."""
    rng = Random(f"{of.name} {seed}")
    mesh = MESHES[(seed + MODELS.index(of.name)) % len(MESHES)]
    return random_strategy(of.graph, rules(of.name), mesh, rng, rng.choice(TRAININGS))


def rules(name: str) -> Rules:
    return divided(case(name).graph, 1).rules


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
        check(of, trial.strategy)
