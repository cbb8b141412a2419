"""The machine that a plan was made for survives the file."""

from __future__ import annotations

import json

import pytest

import cost_models
from autopar import api
from autopar.ir.plan import plan_from_json, plan_to_json
from cost_models.analytical import Analytical
from cost_models.interface import Collective, Work
from cost_models.saved import cost_model_from_json, cost_model_to_json
from tests.helpers.fake_prices import FakePrices


@pytest.mark.parametrize("name", cost_models.topology_names())
def test_every_machine_of_the_shelf_is_read_as_it_was_written(name: str) -> None:
    model = cost_models.cost_model(name)
    again = cost_model_from_json(json.loads(json.dumps(cost_model_to_json(model))))
    assert again == model
    if model.devices > 1:
        question = Collective("all_reduce", 1 << 20, model.devices, 1)
        assert again.collective_time_s(question) == model.collective_time_s(question)
    work = Work("memory", "float32", 0.0, 1e6)
    assert again.compute_time_s(work) == model.compute_time_s(work)


def test_a_cost_model_of_the_users_own_is_named_but_not_kept() -> None:
    data = cost_model_to_json(FakePrices(devices=3))
    assert (data["name"], data["devices"]) == ("FakePrices", 3)
    with pytest.raises(ValueError, match="user's own"):
        cost_model_from_json(data)


def test_a_plan_of_before_knows_no_power_and_keeps_its_prices() -> None:
    plan = api.plan("examples/gpt/model.py", topology="1x1xh100-sxm", microbatches=1)
    data = json.loads(json.dumps(plan_to_json(plan)))
    device, calibration = (data["topology"][k] for k in ("analytical", "calibration"))
    del device["device"]["power_w"], device["device"]["flop_energy"], calibration["flop_pj"]
    before = cost_model_from_json(plan_from_json(data).topology)
    assert isinstance(before, Analytical) and before.clock == 1.0
    del device["device"]["attention_as_products"]
    assert not cost_model_from_json(data["topology"]).topology.device.attention_as_products


def test_a_damaged_machine_is_refused() -> None:
    data = cost_model_to_json(cost_models.cost_model("2x8xh100-sxm"))
    del data["analytical"]["device"]["memory_bytes"]
    with pytest.raises(ValueError, match="damaged"):
        cost_model_from_json(data)
