"""A plan written by hand: equal blocks of column- and row-parallel linears."""

from __future__ import annotations

import math
from dataclasses import replace

from autopar.ir.graph import Dtype, Input, Operator, OperatorGraph, Role, Tensor, TensorSpec
from autopar.ir.plan import Plan, bound_by
from autopar.ir.rule import OpRule, Product, Saved
from autopar.ir.search import SearchSummary, TrialSummary
from autopar.ir.sharding import Mesh
from autopar.ir.simulation import Estimate, Memory, PromisedCollective
from autopar.ir.strategy import Stage, Storage, Strategy
from autopar.ops import bound_rules
from autopar.simulator.prices import evaluate
from tests.helpers.fake_prices import FakePrices

MESH = Mesh((("data", 2), ("tensor", 4)))
LIMIT_BYTES = 10_000_000


def two_blocks(layers: int = 2, batch: int = 8, width: int = 16) -> OperatorGraph:
    """``x = x @ up.T; x = gelu(x); x = x @ down.T`` for each layer, then the mean."""
    tensors = [Tensor("x", TensorSpec((batch, width), "float32"), Role.INPUT, False)]
    operators = []
    hidden = (batch, 4 * width)
    here = "x"

    def call(module: str, op: str, inputs: tuple[str, ...], shape: tuple[int, ...]) -> str:
        name = ".".join(part for part in (module, op.split(".")[1]) if part)
        tensors.append(Tensor(name, TensorSpec(shape, "float32"), Role.ACTIVATION, True))
        arguments = tuple(Input(i) for i in range(len(inputs)))
        operators.append(Operator(name, op, inputs, (name,), arguments, (), module))
        return name

    def weight(name: str, shape: tuple[int, int]) -> str:
        tensors.append(Tensor(name, TensorSpec(shape, "float32"), Role.PARAMETER, True))
        return name

    linear = "aten.linear.default"
    for i in range(layers):
        up = weight(f"layers.{i}.up.weight", (4 * width, width))
        here = call(f"layers.{i}.up", linear, (here, up), hidden)
        here = call(f"layers.{i}", "aten.gelu.default", (here,), hidden)
        down = weight(f"layers.{i}.down.weight", (width, 4 * width))
        here = call(f"layers.{i}.down", linear, (here, down), (batch, width))
    loss = call("", "aten.mean.default", (here,), ())
    operators[-1] = replace(operators[-1], keywords=(("dtype", Dtype("float32")),))
    return OperatorGraph(tuple(tensors), tuple(operators), loss, ("x",), ("",), name="TwoBlocks")


def strategy(graph: OperatorGraph) -> Strategy:
    """Data parallel on the first axis, Megatron's column then row on the second."""
    splits = {}
    storage = {}
    chosen = {"up": ("...0", "out"), "down": ("...0", "in"), "gelu": ("d0", "d1")}
    for operator in graph.operators:
        last = operator.module.rpartition(".")[2]
        known = "gelu" if operator.op == "aten.gelu.default" else last
        splits[operator.name] = chosen.get(known, ("d0", "nothing"))
    for parameter in graph.parameters:
        cut = "S(0)" if "up" in parameter.name else "S(1)"
        storage[parameter.name] = Storage(("I", cut), ("I", cut), ("I", cut))
    names = tuple(operator.name for operator in graph.operators)
    return Strategy((Stage(names, tuple(range(MESH.size)), MESH),), splits, storage)


def estimate(step_time_s: float = 0.01, layers: int = 2) -> Estimate:
    """A tenth of the step is all-reduce on ``tensor``, half is compute."""
    return Estimate(
        step_time_s=step_time_s,
        forward_compute_s=step_time_s * 0.2,
        backward_compute_s=step_time_s * 0.3,
        forward_communication_s=step_time_s * 0.1,
        backward_communication_s=step_time_s * 0.1,
        gradient_synchronisation_s=step_time_s * 0.2,
        optimizer_s=step_time_s * 0.1,
        memory=Memory(1000, 1000, 2000, 500, 300, 200, at="layers.1.up.linear backward"),
        collectives=tuple(
            PromisedCollective(
                "all_reduce", "forward", "tensor", 256, 1, f"layers.{i}.down.linear", 5e-4
            )
            for i in range(layers)
        ),
    )


def plan(layers: int = 2, step_time_s: float = 0.01) -> Plan:
    graph = two_blocks(layers)
    best = estimate(step_time_s, layers)
    return Plan(
        graph=graph,
        topology={
            "name": "2x4xfake",
            "devices": 8,
            "memory_bytes": LIMIT_BYTES,
            "tiers": [{"size": 4}, {"size": 2}],
        },
        strategy=strategy(graph),
        estimate=best,
        search=SearchSummary(
            searcher="ilp",
            stop_reason="optimal",
            lower_bound_s=step_time_s * 0.999,
            gap=0.001,
            search_time_s=0.5,
            memory_limit_bytes=LIMIT_BYTES,
            dimensions="SOAP",
            trials=(
                _trial("", MESH, "optimal", step_time_s, best.peak_memory_bytes),
                _trial("", Mesh((("tensor", 8),)), "bounded", None, None),
                _trial("megatron", MESH, "recipe", step_time_s * 1.25, LIMIT_BYTES - 1),
                _trial("data_parallel", MESH, "recipe", step_time_s, 2 * LIMIT_BYTES),
                _trial("hsdp", MESH, "infeasible", None, None),
            ),
        ),
        model="model.py",
        proposed=(
            (
                "mylib.scale.default",
                OpRule(
                    "a b, b -> a b",
                    linear=(0,),
                    products=(Product("", "a", "b", ""),),
                    saves=(Saved("input 0", (1,)),),
                    sizes=(("a", 2),),
                    proposed=True,
                ),
            ),
        ),
        created="2026-11-20T10:00:00+00:00",
        autopar="0.1.0",
    )


def _trial(
    name: str, mesh: Mesh, outcome: str, step_time_s: float | None, memory_bytes: int | None
) -> TrialSummary:
    found = step_time_s is not None
    bound_s = math.inf if outcome == "infeasible" else 0.005
    return TrialSummary(
        name,
        mesh,
        outcome,
        bound_s,
        step_time_s,
        memory_bytes,
        bound_by(estimate(step_time_s), LIMIT_BYTES) if found and step_time_s else "",
    )


def priced(layers: int = 2) -> Plan:
    """The same plan with what the simulator says of its communication, in a world of round prices.

    Compute and memory stay made up, so that golden files change with what they show only.
    """
    handmade = plan(layers)
    rules = bound_rules(handmade.graph)
    prices = FakePrices(devices=MESH.size, latency_s=1e-6)
    found = evaluate(handmade.graph, rules, prices, handmade.strategy)
    communication = {
        "forward_communication_s": found.forward_communication_s,
        "backward_communication_s": found.backward_communication_s,
        "gradient_synchronisation_s": found.gradient_synchronisation_s,
    }
    compute = {"forward_compute_s": 1e-5, "backward_compute_s": 2e-5, "optimizer_s": 1e-6}
    step_time_s = sum(communication.values()) + sum(compute.values())
    return replace(
        handmade,
        estimate=replace(
            handmade.estimate,
            step_time_s=step_time_s,
            collectives=found.collectives,
            **communication,
            **compute,
        ),
    )
