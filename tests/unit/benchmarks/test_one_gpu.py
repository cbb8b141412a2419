"""Operators one by one and rows of them; a GPU is not needed for these."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autopar import api
from autopar.ir.graph import Role
from autopar.ir.plan import Plan, save_plan
from benchmarks import one_gpu

DATE = "2026-11-27"
MEASURED = Path(one_gpu.__file__).parent / "measured"
H100, H200 = (one_gpu.Sitting(MEASURED, of, DATE) for of in ("h100-sxm", "h200-sxm"))
MACHINE = "1x1xh100-sxm"
CONVOLUTIONAL = ("resnet", "unet")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return api.plan("examples/gpt/model.py", topology=MACHINE, microbatches=1)


def no_time(call: Callable[[], Any], calls: int = 1, besides: str = "") -> float:
    call()
    return 1.0


def test_every_operator_is_called_alone_and_counted(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_gpu, "busy_s", no_time)
    monkeypatch.setattr(one_gpu, "FLUSH_BYTES", 8)
    graph = plan.graph
    given = {
        t.name: torch.rand(t.spec.shape)
        if t.spec.is_floating
        else torch.zeros(t.spec.shape, dtype=torch.int64)
        for t in graph.tensors
        if t.role in (Role.PARAMETER, Role.INPUT, Role.BUFFER)
    }
    found = [*one_gpu.measured_operators(graph, given)]
    assert sum(one["count"] for one in found) == len(graph.operators)
    assert len(found) < len(graph.operators) / 3  # of four equal blocks
    rows = [*one_gpu.operator_rows("gpt", plan, found, api.machine(MACHINE))]
    for row in rows:  # what has a price backward has a backward
        assert row.predicted_backward_s == 0.0 or row.measured_backward_s == 1.0, row


def test_what_was_measured_is_read_from_its_rows(plan: Plan, tmp_path: Path) -> None:
    name = plan.graph.operators[-1].name
    measured: dict[str, Any] = dict.fromkeys(("step_s", "busy_s", "update_s"), 0.25)
    measured |= dict.fromkeys(("allocated_bytes", "reserved_bytes", "other_bytes"), 7)
    measured |= {"device": "a", "torch": "b"}
    measured["operators"] = [{"name": name, "count": 2, "forward_s": 0.5, "backward_s": 0.125}]
    save_plan(plan, tmp_path / "gpt.json")
    sitting = one_gpu.Sitting(tmp_path, one_gpu.MACHINE, DATE)
    shutil.copy(H100.profile, sitting.profile)
    sitting.write(tmp_path, {"gpt": measured})
    assert sitting.measured() == {"gpt": measured}
    assert any(line.startswith("| gpt |") and "250.0" in line for line in one_gpu.report(sitting))


@pytest.mark.parametrize("sitting", [H100, H200], ids=["h100", "h200"])
def test_the_memory_of_plans_on_a_gpu_is_what_was_promised(sitting: one_gpu.Sitting) -> None:
    large = [row for row in sitting.steps if row.measured_allocated_bytes > 1e9]
    assert len(large) >= 8
    for row in large:  # of convolutions the library's workspaces are not known
        error = row.predicted_allocated_bytes / row.measured_allocated_bytes - 1
        assert abs(error) < (0.07 if row.case.startswith(CONVOLUTIONAL) else 0.015), row
