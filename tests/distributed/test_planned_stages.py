"""What the whole search finds is what is run, and trains as one process."""

from __future__ import annotations

import pytest

from autopar.ir.search import Budget, Problem
from autopar.ir.strategy import Strategy
from autopar.searchers import hybrid
from autopar.simulator.meshes import factorizations
from tests.helpers.cases import case
from tests.helpers.fake_prices import FakePrices
from tests.helpers.stage_check import check

pytestmark = pytest.mark.distributed

DEAR = {"send": 1e-12} | dict.fromkeys(
    ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"), 1e-7
)


def planned(name: str, recompute: str = "none") -> Strategy:
    """On four devices in a world where collectives are dear."""
    problem = Problem(
        case(name).graph,
        FakePrices(devices=4, collectives=DEAR, latency_s=1e-7),
        factorizations(4),
        10**15,
        microbatches=None,
        recompute=recompute,
    )
    found = hybrid.search(problem, Budget(time_s=60.0, gap=1e-2, proof_s=0.2)).best
    assert found is not None
    assert found.strategy is not None
    return found.strategy


@pytest.mark.parametrize("name", ["gpt", "towers"])
def test_planned_stages_train_as_one_process(name: str) -> None:
    strategy = planned(name)
    assert len(strategy.stages) > 1
    check(case(name), strategy)


def test_so_do_those_that_recompute() -> None:
    strategy = planned("gpt", "full")
    assert len(strategy.stages) > 1
    assert strategy.recompute
    check(case("gpt"), strategy)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "unet", "inception"])
def test_so_do_those_of_other_models(name: str) -> None:
    strategy = planned(name)
    assert len(strategy.stages) > 1
    check(case(name), strategy)
