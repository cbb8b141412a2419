"""Parameters are updated a few at a time, which changes memory and nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from autopar.extractor import extract
from autopar.ir.strategy import Training
from autopar.ops import bound_rules
from autopar.runtime.verify import Report, verify_strategy
from autopar.simulator import workspace
from autopar.simulator.meshes import mesh
from autopar.simulator.prices import evaluate
from autopar.simulator.workspace import update_groups
from tests.helpers.cases import call, case, training_step
from tests.helpers.fake_prices import FakePrices
from tests.helpers.strategies import replicate
from tests.helpers.zoo import zoo


def trained(training: Training) -> dict[str, Tensor]:
    """The parameters after three steps of one process."""
    of = case("gpt_tied")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        step, inputs = training_step(of, replicate(of.graph, mesh((1,)), training))
        for _ in range(3):
            call(step, inputs)
        return {name: p.detach().clone() for name, p in step.state.parameters.items()}
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "training",
    [Training("momentum"), Training("adamw", clip_norm=0.1)],
    ids=lambda training: training.optimizer,
)
def test_updated_one_by_one_they_are_the_same(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = trained(training)
    monkeypatch.setattr(workspace, "UPDATE_BYTES", 1)
    assert len(update_groups({"a": 8, "b": 8})) == 2
    for name, alone in trained(training).items():
        assert torch.equal(alone, together[name]), name


def report(training: Training) -> Report:
    model, inputs = zoo("mlp", dtype=torch.bfloat16)
    graph = extract(model, inputs, name="mlp")
    rules = bound_rules(graph)
    strategy = replicate(graph, mesh((2,)), training)
    return verify_strategy(graph, rules, strategy, evaluate(graph, rules, FakePrices(), strategy))


def test_small_groups_need_less_memory_as_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training("adamw", "mixed")
    together = report(training)
    monkeypatch.setattr(workspace, "UPDATE_BYTES", 1)
    alone = report(training)
    assert together.ok and alone.ok, (together.differences, alone.differences)
    assert alone.measured_peak_bytes < together.measured_peak_bytes
