"""Recipes from numbers train as one process does, with what they promise."""

from __future__ import annotations

import pytest

from autopar.ir.strategy import Strategy, Training
from autopar.recipes import by_degrees, degrees_from_text
from tests.helpers.cases import case
from tests.helpers.fake_prices import FakePrices
from tests.helpers.stage_check import check
from tests.helpers.stages import divided
from tests.helpers.zoo import BATCH

pytestmark = pytest.mark.distributed


def strategy_of(name: str, text: str) -> Strategy:
    degrees = degrees_from_text(text)
    division = divided(case(name).graph, degrees.microbatches(BATCH))
    prices = FakePrices(devices=degrees.devices)
    return by_degrees(division, degrees, prices, Training("sgd"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gpt2", "tensor=2,pipeline=2,microbatch=2,recompute=attention"),
        ("llama", "tensor=2,pipeline=2,microbatch=4,between=sequence,recompute=full"),
        ("palm", "tensor=2,pipeline=2,microbatch=4,between=width,recompute=full"),
        ("gopher", "tensor=2,pipeline=2,microbatch=2,schedule=gpipe"),
        ("gpt_tied", "pipeline=2,data=2,microbatch=1,zero=2"),
    ],
)
def test_tensor_and_pipeline_degrees_train_as_one_process(name: str, text: str) -> None:
    check(case(name), strategy_of(name, text))


def test_all_degrees_together_train_as_one_process() -> None:
    text = "tensor=2,pipeline=2,data=2,chunks=2,microbatch=1,between=sequence,zero=1,recompute=full"
    strategy = strategy_of("gpt_deep", text)
    assert strategy.schedule == "interleaved_1f1b"
    found = check(case("gpt_deep"), strategy)
    assert len(found) == 8
