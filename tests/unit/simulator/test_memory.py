"""Peak memory, counted by hand on a small model, and what is always true of it."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest

from autopar.extractor import extract
from autopar.ir.graph import Input, Operator, OperatorGraph, Role, Tensor, TensorSpec
from autopar.ir.rule import NOTHING, Split
from autopar.ir.sharding import Mesh
from autopar.ir.strategy import Storage, Strategy, Training
from autopar.ops import bound_rules
from autopar.simulator.memory import optimizer_bytes_per_element, peak_memory
from tests.helpers.strategies import kept, one_stage
from tests.helpers.zoo import zoo

BATCH, WIDE = 64, 128
MESH = Mesh((("data", 4),))
X, W, Y = BATCH * WIDE * 4, WIDE * WIDE * 4, BATCH * WIDE * 4  # bytes
SCALAR = 4


def two_products() -> OperatorGraph:
    """sum(relu(x w) v): x is the batch, w and v are square."""

    def floats(*shape: int) -> TensorSpec:
        return TensorSpec(shape, "float32")

    return OperatorGraph(
        tensors=(
            Tensor("x", floats(BATCH, WIDE), Role.INPUT, False),
            Tensor("w", floats(WIDE, WIDE), Role.PARAMETER, True),
            Tensor("v", floats(WIDE, WIDE), Role.PARAMETER, True),
            Tensor("a", floats(BATCH, WIDE), Role.ACTIVATION, True),
            Tensor("b", floats(BATCH, WIDE), Role.ACTIVATION, True),
            Tensor("c", floats(BATCH, WIDE), Role.ACTIVATION, True),
            Tensor("loss", floats(), Role.ACTIVATION, True),
        ),
        operators=(
            Operator("first", "aten.mm.default", ("x", "w"), ("a",), (Input(0), Input(1))),
            Operator("relu", "aten.relu.default", ("a",), ("b",), (Input(0),)),
            Operator("second", "aten.mm.default", ("b", "v"), ("c",), (Input(0), Input(1))),
            Operator("sum", "aten.sum.default", ("c",), ("loss",), (Input(0),)),
        ),
        loss="loss",
        inputs=("x",),
        input_keys=("",),
    )


def strategy(storage: Storage, training: Training, **splits: Split) -> Strategy:
    graph = two_products()
    chosen = {o.name: splits.get(o.name, (NOTHING,)) for o in graph.operators}
    return one_stage(graph, MESH, chosen, {"w": storage, "v": storage}, training)


def peak(chosen: Strategy) -> int:
    graph = two_products()
    return peak_memory(graph, bound_rules(graph), chosen).total_bytes


SGD = Training("sgd")
WHOLE = kept(("I",))
BATCH_SPLIT = {"first": ("m",), "relu": ("d0",), "second": ("m",), "sum": ("d0",)}


def test_replicated_work_counted_by_hand() -> None:
    # backward of the second product: weights, the loss and its gradient are there or gone; b is
    # saved; the gradient of c comes in, those of b and v go out
    assert peak(strategy(WHOLE, SGD)) == 2 * W + Y + (Y + Y + W) + SCALAR


def test_split_by_the_batch_counted_by_hand() -> None:
    part = Y // 4
    # the same with quarters of the batch; its quarter of x is a copy, saved by the first product
    expected = 2 * W + part + part + (part + part + W) + SCALAR
    # in the step, the two whole gradients and the all-reduced one
    assert peak(strategy(WHOLE, SGD, **BATCH_SPLIT)) == max(expected, 2 * W + 3 * W + SCALAR)


def test_zero_stores_quarters_and_gathers_one_weight_at_a_time() -> None:
    part, shard = Y // 4, W // 4
    chosen = strategy(kept(("S(0)",)), SGD, **BATCH_SPLIT)
    # backward of the second product: v gathered again, and its whole gradient
    assert peak(chosen) == 2 * shard + part + part + (part + part + W) + W + SCALAR
    # gathered along the second dim it is staged: pieces, then the whole
    staged = strategy(kept(("S(1)",)), SGD, **BATCH_SPLIT)
    assert peak(staged) >= peak(chosen)


@lru_cache(maxsize=None)
def gpt() -> OperatorGraph:
    model, inputs = zoo("gpt")
    return extract(model, inputs, name="gpt")


def batch_split(storage: Storage | None, training: Training, microbatches: int = 1) -> Strategy:
    """Everything replicated but stored as ``storage`` says where the first dim allows it."""
    graph = gpt()
    splits = {o.name: (NOTHING,) for o in graph.operators}
    stored = {
        p.name: storage if storage and p.spec.shape and p.spec.shape[0] % 4 == 0 else WHOLE
        for p in graph.parameters
    }
    return replace(one_stage(graph, MESH, splits, stored, training), microbatches=microbatches)


ZERO1 = Storage(("I",), ("I",), ("S(0)",))
ZERO3 = kept(("S(0)",))


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
def test_what_is_sharded_more_keeps_less(name: str) -> None:
    graph, rules = gpt(), bound_rules(gpt())
    training = Training(name)  # type: ignore[arg-type]
    stored = [
        peak_memory(graph, rules, batch_split(storage, training))
        for storage in (None, ZERO1, ZERO3)
    ]
    optimizer = [memory.optimizer_bytes for memory in stored]
    assert optimizer[0] >= optimizer[1] >= optimizer[2]
    assert stored[2].parameters_bytes < stored[0].parameters_bytes


def test_more_microbatches_keep_their_gradients() -> None:
    graph, rules = gpt(), bound_rules(gpt())
    once, twice, more = (
        peak_memory(graph, rules, batch_split(None, SGD, count)).total_bytes for count in (1, 2, 8)
    )
    assert once < twice == more


def test_clipping_and_mixed_precision_copy_the_gradients() -> None:
    graph, rules = gpt(), bound_rules(gpt())
    plain, clipped = (
        peak_memory(graph, rules, batch_split(None, training))
        for training in (Training(), Training(clip_norm=1.0))
    )
    assert clipped.total_bytes >= plain.total_bytes
    spec = TensorSpec((4,), "bfloat16")
    assert optimizer_bytes_per_element(spec, Training("adamw", "mixed")) == 12
    assert optimizer_bytes_per_element(spec, Training("sgd", "mixed")) == 4
    assert optimizer_bytes_per_element(TensorSpec((4,), "float64"), Training("adamw")) == 16


def test_parts_make_the_whole_and_the_peak_has_a_place() -> None:
    memory = peak_memory(gpt(), bound_rules(gpt()), batch_split(ZERO3, Training()))
    parts = (
        memory.parameters_bytes,
        memory.gradients_bytes,
        memory.optimizer_bytes,
        memory.activations_bytes,
        memory.temporaries_bytes,
        memory.buffers_bytes,
    )
    assert all(part >= 0 for part in parts)
    assert sum(parts) == memory.total_bytes
    assert "backward" in memory.at or "forward" in memory.at or "step" in memory.at
