"""The explanation adds up to the estimate, and equal things stand once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from autopar.api import rules_of
from autopar.exporters import EXPORTERS, text
from autopar.exporters import json as json_exporter
from autopar.exporters.explanation import REST, explanation
from autopar.ir.plan import Plan
from autopar.ir.sharding import Mesh
from autopar.ir.simulation import Memory, PipelineEstimate, RowEstimate
from autopar.ir.strategy import Training
from autopar.ops import bound_rules
from autopar.simulator.microbatches import division
from autopar.simulator.prices import evaluate
from tests.helpers import fake_plans
from tests.helpers.fake_prices import FakePrices
from tests.helpers.strategies import kept, one_stage, random_strategy

TWO_BY_TWO = Mesh((("a", 2), ("b", 2)))


def random_plan(seed: int, layers: int = 3, mesh: Mesh = TWO_BY_TWO) -> Plan:
    """Any legal strategy, its gradients clipped so that some collective belongs to no block."""
    plan = fake_plans.plan(layers)
    divided = division(plan.graph, 2 ** (seed % 3))
    training = Training(clip_norm=1.0)
    strategy = random_strategy(divided.graph, divided.rules, mesh, Random(seed), training)
    strategy = replace(strategy, microbatches=divided.count)
    estimate = evaluate(divided.graph, divided.rules, FakePrices(latency_s=1e-5), strategy)
    return replace(plan, strategy=strategy, estimate=estimate)


@pytest.mark.parametrize("seed", range(20))
def test_the_blocks_communicate_as_long_as_the_estimate_says(seed: int) -> None:
    plan = random_plan(seed)
    found = explanation(plan, rules_of(plan))
    estimate = plan.estimate
    assert found.communication_s == pytest.approx(
        estimate.forward_communication_s
        + estimate.backward_communication_s
        + estimate.gradient_synchronisation_s
    )
    rows = [c for block in found.blocks for c in block.collectives] + list(found.unplaced)
    assert sum(row.times for row in rows) == sum(c.count for c in estimate.collectives)


@pytest.mark.parametrize("sizes", [(1,), (1, 2), (2, 1)])
@pytest.mark.parametrize("seed", range(5))
def test_an_axis_of_one_device_communicates_nothing(seed: int, sizes: tuple[int, ...]) -> None:
    mesh = Mesh(tuple(zip("ab", sizes, strict=False)))
    plan = random_plan(seed, mesh=mesh)
    rows = [c for block in explanation(plan, rules_of(plan)).blocks for c in block.collectives]
    assert all(dict(mesh.axes)[row.axis] > 1 for row in rows)
    for export in EXPORTERS.values():
        assert export(plan, rules_of(plan))


@pytest.mark.parametrize("seed", range(5))
def test_every_operator_and_parameter_stands_in_one_row(seed: int) -> None:
    plan = random_plan(seed)
    found = explanation(plan, rules_of(plan))
    rows = [row for block in found.blocks for row in block.operators]
    assert sum(row.count for row in rows) == len(plan.graph.operators)
    kept = [row for block in found.blocks for row in block.parameters]
    assert sum(row.count for row in kept) == len(plan.graph.parameters)


def test_equal_layers_are_one_block_however_many() -> None:
    for layers in (2, 7):
        plan = fake_plans.priced(layers)
        found = explanation(plan, bound_rules(plan.graph))
        (block,) = (b for b in found.blocks if b.path != REST)
        assert (block.path, block.count) == ("layers.*", layers)
        assert [row.count for row in block.operators] == [layers] * 3
        assert {row.storage for row in block.parameters} == {
            ("whole", "S(0) split"),
            ("whole", "S(1) split"),
        }


def test_a_fused_projection_is_said_to_be_divided_in_parts() -> None:
    plan = gated(48, "out")
    shown = text.explain(plan, bound_rules(plan.graph))
    assert "out 96 in 2 parts" in shown
    assert "S(0,2) split" in shown
    assert "in parts: a device has its share of each" in shown


def test_what_does_not_divide_each_part_is_not_offered() -> None:
    """4 divides the 12 columns of gate and value together, not the 6 of each."""
    plan = gated(6, "nothing")
    shown = text.explain(plan, bound_rules(plan.graph))
    assert "4 devices do not divide 6 (out of fused.linear" in shown
    assert "in parts:" not in shown


def gated(width: int, choice: str) -> Plan:
    """A product that makes gate and value, split so on the second axis."""
    import torch
    from torch import nn

    from autopar.extractor import extract

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fused = nn.Linear(8, 2 * width, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, value = self.fused(x).chunk(2, dim=-1)
            return (gate * value).mean()

    graph = extract(Gated(), (torch.zeros(8, 8),))
    splits = {o.name: ("nothing", "nothing") for o in graph.operators}
    splits["fused.linear"] = ("nothing", choice)
    placement = "S(0,2)" if choice == "out" else "I"
    strategy = one_stage(graph, fake_plans.MESH, splits, {"fused.weight": kept(("I", placement))})
    estimate = evaluate(graph, bound_rules(graph), FakePrices(devices=8), strategy)
    return replace(fake_plans.plan(1), graph=graph, strategy=strategy, estimate=estimate)


def test_a_size_that_no_axis_divides_is_named() -> None:
    plan = fake_plans.priced(1)
    narrow = fake_plans.two_blocks(layers=1, batch=6, width=16)
    strategy = replace(
        fake_plans.strategy(narrow),
        splits={o.name: ("nothing", "nothing") for o in narrow.operators},
    )
    estimate = evaluate(narrow, bound_rules(narrow), FakePrices(devices=8), strategy)
    odd = replace(plan, graph=narrow, strategy=strategy, estimate=estimate)
    refused = [r for b in explanation(odd, bound_rules(narrow)).blocks for r in b.refusals]
    assert {(r.axis, r.axis_size, r.size) for r in refused} == {("tensor", 4, 6)}
    assert "4 devices do not divide 6" in text.explain(odd, bound_rules(narrow))


Golden = Callable[[str, str], None]


@pytest.fixture
def golden(update_golden: bool) -> Golden:
    def check(name: str, found: str) -> None:
        path = Path(__file__).parent / "golden" / name
        if update_golden:
            path.write_text(found)
        assert found == path.read_text(), "pytest --update-golden rewrites it; review the diff"

    return check


def test_the_summary_reads_as_it_did(golden: Golden) -> None:
    golden("summary.txt", text.summary(fake_plans.plan(2)) + "\n")


def test_the_explanation_reads_as_it_did(golden: Golden) -> None:
    plan = fake_plans.priced(2)
    golden("explain.txt", text.explain(plan, bound_rules(plan.graph)))


@pytest.mark.parametrize("name", sorted(EXPORTERS))
def test_every_exporter_takes_every_plan_and_names_its_model(name: str) -> None:
    for seed in range(3):
        plan = random_plan(seed)
        assert plan.graph.name in EXPORTERS[name](plan, bound_rules(plan.graph)) or name == "json"


def test_the_json_has_the_numbers_of_the_text() -> None:
    plan = fake_plans.priced(2)
    data = json.loads(EXPORTERS["json"](plan, bound_rules(plan.graph)))
    assert data["estimate"]["step_time_s"] == plan.estimate.step_time_s
    assert data["peak_memory_bytes"] == plan.estimate.peak_memory_bytes
    assert [block["path"] for block in data["blocks"]] == ["layers.*", REST]


def test_the_page_stands_alone_and_escapes_names() -> None:
    plan = fake_plans.priced(1)
    graph = replace(plan.graph, name="<script>alert(1)</script>")
    page = EXPORTERS["html"](replace(plan, graph=graph), bound_rules(graph))
    assert page.startswith("<!doctype html>")
    assert "<script" not in page
    assert "http" not in page.replace('charset="utf-8"', "")
    assert page.count("<table>") == page.count("</table>") > 3


def test_recipes_are_compared_and_what_does_not_fit_is_said() -> None:
    found = text.summary(fake_plans.plan(2))
    assert "1.25x faster than megatron" in found
    assert "data_parallel does not fit: 20.0 MB" in found


@pytest.mark.parametrize("bound_s", [0.0, float("inf")])
def test_a_search_that_ended_before_anything_was_bounded_claims_nothing(bound_s: float) -> None:
    plan = fake_plans.plan(1)
    ended = replace(plan.search, stop_reason="time", lower_bound_s=bound_s, gap=1.0)
    said = text.summary(replace(plan, search=ended))
    assert "without a lower bound" in said
    assert "from optimal" not in said


def test_what_is_allocated_reserved_and_left_adds_up_in_text_and_json() -> None:
    of = Memory(1, 2, 3, 4, 5, 6, "here", 70, 80, 900, 1000)
    row = RowEstimate((0,), (0,), 1.0, 1.0, 0.0, 0.0, 0.0, 1, of, ())
    pipeline = PipelineEstimate(rows=(row,), traffic=(), transfer_s=0.0)
    found = replace(fake_plans.priced(2).estimate, memory=of, pipeline=pipeline)
    (cells,) = text.reserved_cells(found, 5000)
    assert cells == ["0", "21 B", "80 B", "70 B", "171 B", "1.00 kB", "900 B", "2.07 kB", "2.93 kB"]
    plan = replace(fake_plans.priced(2), estimate=found, topology={"memory_bytes": 5000})
    (told,) = json_exporter.summary(plan)["estimate"]["pipeline"]["rows"]
    lines = {name: n for name, n in told["memory"].items() if name.endswith("_bytes")}
    assert told["device_memory_bytes"] == sum(lines.values()) == 5000 - told["free_memory_bytes"]
    beside = lines["context_bytes"] + lines["communicators_bytes"]
    assert told["reserved_memory_bytes"] == told["device_memory_bytes"] - beside
    assert told["peak_memory_bytes"] == of.total_bytes == 21
    lines = "\n".join(text.memory(found, 5000))
    for line in ("21 B        allocated", "171 B        reserved", "2.93 kB        headroom"):
        assert line in lines
