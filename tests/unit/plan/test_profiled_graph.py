"""A profile becomes a graph, a plan, and a file that says the same; faults are named by place."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from autopar import api
from autopar.errors import AutoparError, InfeasibleError, PlanMismatchError
from autopar.ir.graph import graph_from_json, graph_to_json
from autopar.ir.plan import load_plan, plan_from_json, plan_to_json, save_plan
from autopar.ir.plan_schema import plan_schema
from autopar.ir.profiled_graph import (
    global_batch,
    load_profiled_graph,
    profiled_graph_from_json,
    profiled_graph_schema,
    profiled_operators,
)

EXAMPLE = Path(__file__).parents[3] / "examples" / "two_towers.json"
MACHINE = "1x4xa100-sxm-40gb"


def chain(operators: int = 4, **more: Any) -> dict[str, Any]:
    return {
        "kind": "autopar profiled graph",
        "format": 1,
        "name": "chain",
        "global_batch": 8,
        "microbatch": 2,
        "operators": [
            {
                "name": f"block.{i}",
                "inputs": [f"block.{i - 1}"] if i else [],
                "forward_s": 0.01,
                "backward_s": 0.02,
                "parameter_bytes": 1_000_000,
                "output_bytes": 1000,
                **more,
            }
            for i in range(operators)
        ],
    }


def test_the_example_is_as_the_schema_says() -> None:
    data = json.loads(EXAMPLE.read_text())
    jsonschema.validate(data, profiled_graph_schema())
    graph = profiled_graph_from_json(data)
    assert global_batch(graph) == 64
    assert [operator.name for operator in graph.operators][-1] == "joined"
    assert graph_from_json(graph_to_json(graph)) == graph


def test_operators_carry_what_was_measured() -> None:
    data = chain(1, alternatives=[{"tensor_parallel": 2, "forward_s": 0.006, "backward_s": 0.011}])
    (operator,) = profiled_operators(profiled_graph_from_json(data))
    assert [m.tensor_parallel for m in operator.measured] == [1, 2]
    assert [m.parameter_bytes for m in operator.measured] == [1_000_000, 500_000]
    assert [m.activation_bytes for m in operator.measured] == [1000, 1000]


def damaged(change: Any) -> str:
    data = copy.deepcopy(chain(2))
    change(data)
    with pytest.raises(AutoparError) as error:
        profiled_graph_from_json(data, "graph.json")
    return str(error.value)


def test_a_fault_is_named_by_its_place() -> None:
    assert "no profiled graph" in damaged(lambda d: d.pop("kind"))
    assert "newer autopar" in damaged(lambda d: d.update(format=2))
    assert "global_batch is missing" in damaged(lambda d: d.pop("global_batch"))
    assert "operators[1].forward_s is -1, less than 0" in damaged(
        lambda d: d["operators"][1].update(forward_s=-1)
    )
    assert "no multiple of microbatch 3" in damaged(lambda d: d.update(microbatch=3))
    assert "operators is empty" in damaged(lambda d: d.update(operators=[]))
    assert "operators[0].inputs[0]: no operator before this one is called 'block.1'" in damaged(
        lambda d: d["operators"][0].update(inputs=["block.1"])
    )
    assert "two operators 'block.0'" in damaged(
        lambda d: d["operators"][1].update(name="block.0", inputs=[])
    )
    assert "operators[1].forwards_s is no key of it" in damaged(
        lambda d: d["operators"][1].update(forwards_s=1)
    )
    assert "give both" in damaged(lambda d: d["operators"][0].update(input_gradient_s=0.01))
    assert "0.05 together, and backward_s is 0.02" in damaged(
        lambda d: d["operators"][0].update(input_gradient_s=0.01, weight_gradient_s=0.04)
    )
    assert "tensor_parallel 1 twice" in damaged(
        lambda d: d["operators"][0].update(alternatives=[{"forward_s": 1, "backward_s": 1}])
    )


def test_a_file_that_is_no_json_says_where(tmp_path: Path) -> None:
    (tmp_path / "graph.json").write_text('{"kind": \n oops')
    with pytest.raises(AutoparError, match=r"not JSON \(line 2"):
        load_profiled_graph(tmp_path / "graph.json")
    with pytest.raises(AutoparError, match="cannot read"):
        load_profiled_graph(tmp_path / "none.json")


def test_a_plan_is_a_file_and_is_simulated_as_it_was_planned(tmp_path: Path) -> None:
    found = api.plan(EXAMPLE, topology="1x8xa100-sxm-40gb", time_limit_s=5)
    save_plan(found, tmp_path / "plan.json")
    jsonschema.validate(json.loads((tmp_path / "plan.json").read_text()), plan_schema())
    loaded = load_plan(tmp_path / "plan.json")
    assert loaded.strategy == found.strategy
    assert api.simulate(loaded) == found.estimate
    assert found.search.lower_bound_s <= found.estimate.step_time_s
    assert found.estimate.peak_memory_bytes <= found.search.memory_limit_bytes
    covered = [name for stage in found.strategy.stages for name in stage.operators]
    assert sorted(covered) == sorted(found.graph.operator)


def test_replicas_divide_the_time_and_exchange_gradients() -> None:
    alone = api.plan(profiled_graph_from_json(chain(1)), topology="1x1xa100-sxm-40gb")
    four = api.plan(profiled_graph_from_json(chain(1)), topology=MACHINE)
    # four microbatches' worth of samples, whatever m is
    assert alone.estimate.forward_compute_s == pytest.approx(0.04)
    assert alone.estimate.gradient_synchronisation_s == 0
    assert four.strategy.stages[0].mesh.axes == (("data", 4), ("tensor", 1))
    assert four.estimate.forward_compute_s == pytest.approx(0.01)
    assert four.estimate.gradient_synchronisation_s > 0


def test_what_does_not_fit_is_cut_in_stages_or_recomputed() -> None:
    data = chain(4, activation_bytes=3_000_000, recompute=True)
    graph = profiled_graph_from_json(data)
    # 4 MB of parameters, gradients and states each, and at least 1.5 MB of activations
    small = api.plan(graph, topology=MACHINE, memory_limit_bytes=9_000_000, time_limit_s=10)
    assert len(small.strategy.stages) > 1 or small.strategy.recompute
    assert small.estimate.peak_memory_bytes <= 9_000_000
    with pytest.raises(InfeasibleError, match=r"nothing fits.*3\.00 MB"):
        api.plan(graph, topology=MACHINE, memory_limit_bytes=3_000_000)


def test_what_was_measured_on_the_machines_device_is_taken() -> None:
    other = {"device": "a100-sxm-40gb", "forward_s": 0.001, "backward_s": 0.002}
    graph = profiled_graph_from_json(chain(1, alternatives=[other]))
    there = api.plan(graph, topology="1x1xa100-sxm-40gb")
    elsewhere = api.plan(graph, topology="1x1xh100-sxm")
    assert there.estimate.forward_compute_s == pytest.approx(0.004)
    assert elsewhere.estimate.forward_compute_s == pytest.approx(0.04)


def test_throughput_counts_no_gaps() -> None:
    graph = profiled_graph_from_json(chain(4))
    step = api.plan(graph, topology=MACHINE)
    steady = api.plan(graph, topology=MACHINE, objective="throughput")
    assert steady.objective == "throughput"
    assert steady.estimate.step_time_s <= step.estimate.step_time_s
    again = plan_from_json(json.loads(json.dumps(plan_to_json(steady))))
    assert again.objective == "throughput"
    assert api.simulate(again) == steady.estimate


def test_a_plan_is_shown_and_not_run(tmp_path: Path) -> None:
    found = api.plan(profiled_graph_from_json(chain()), topology=MACHINE)
    assert "block.0" in api.explain(found)
    for exporter in ("text", "html", "json", "perfetto"):
        assert api.export(found, exporter)
    with pytest.raises(AutoparError, match="cannot be run: it was made from a profiled graph"):
        api.run(found, "model.py")
    with pytest.raises(AutoparError, match="cannot be verified"):
        api.verify(found)
    with pytest.raises(PlanMismatchError, match="plan again"):
        api.simulate(found, topology="1x1xa100-sxm-40gb")


def test_what_is_for_traced_models_is_refused_by_name() -> None:
    graph = profiled_graph_from_json(chain())
    with pytest.raises(AutoparError, match="mesh is for models that are traced"):
        api.plan(graph, topology=MACHINE, mesh=(4,))
    with pytest.raises(AutoparError, match="searcher is for models"):
        api.plan(graph, "exhaustive", topology=MACHINE, searcher="exhaustive")
    with pytest.raises(AutoparError, match=r"3 equal microbatches; 2 would work"):
        api.plan(graph, topology=MACHINE, microbatches=3)
    with pytest.raises(AutoparError, match="searched in stages"):
        api.search(graph, topology=MACHINE)
