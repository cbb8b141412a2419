"""Recipes from numbers say what Megatron-LM and others say of their layers, on any model."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import pytest

from autopar.errors import AutoparError
from autopar.ir.graph import OperatorGraph
from autopar.ir.simulation import Estimate
from autopar.ir.strategy import Strategy, Training
from autopar.ops import bound_rules
from autopar.recipes import PUBLISHED, Degrees, by_degrees, degrees_from_text, degrees_text
from autopar.simulator.memory import saved_bytes
from autopar.simulator.microbatches import division
from autopar.simulator.pipelines import evaluate_stages
from autopar.simulator.prices import evaluate
from cost_models import cost_model
from tests.helpers.fake_prices import FakePrices
from tests.helpers.zoo import BATCH, zoo

LANGUAGE = ("gpt", "gpt2", "llama", "qwen", "phi3", "palm", "gopher")

COLUMNS = ("query", "key", "value", "q", "k", "v", "q_proj", "k_proj", "v_proj", "qkv_proj")
COLUMNS += ("up", "gate", "up_proj", "gate_proj", "gate_up_proj", "c_fc", "c_attn", "places")
ROWS = ("out", "o", "o_proj", "down", "down_proj", "c_proj")
VOCABULARY = ("tokens", "embed_tokens", "wte", "head", "lm_head")
TRANSPOSED = ("c_fc", "c_attn", "c_proj")
"""GPT-2's, whose weights are (in, out)."""


@lru_cache(maxsize=None)
def graph_of(name: str) -> OperatorGraph:
    from autopar.extractor import extract

    model, inputs = zoo(name)
    return extract(model, inputs, name=name)


def by(name: str, text: str, training: Training = Training("sgd")) -> Strategy:
    degrees = degrees_from_text(text)
    divided = division(graph_of(name), degrees.microbatches(BATCH))
    return by_degrees(divided, degrees, FakePrices(devices=degrees.devices), training)


def estimate_of(name: str, strategy: Strategy) -> Estimate:
    divided, prices = division(graph_of(name), strategy.microbatches), FakePrices(strategy.devices)
    if len(strategy.stages) > 1:
        return evaluate_stages(divided, prices, strategy)
    return evaluate(divided.graph, divided.rules, prices, strategy)


def cut_dim(placement: str) -> int | None:
    return int(placement[2]) if placement.startswith("S") else None


@pytest.mark.parametrize("name", LANGUAGE)
def test_columns_then_rows_then_the_vocabulary(name: str) -> None:
    """Of every layer what reads the residual stream is divided by its columns, what writes to it by
    its rows; norms and positions are whole; and the batch is the other axis's."""
    strategy = by(name, "tensor=2,data=2")
    assert strategy.mesh.axes == (("data", 2), ("tensor", 2))
    for parameter in graph_of(name).parameters:
        *_, module, kind = parameter.name.split(".")
        storage = strategy.storage[parameter.name]
        assert storage.parameter[0] == "I"  # replicated over data
        turned = module in TRANSPOSED and kind == "weight"
        wanted: int | None = None
        if module in VOCABULARY or module in COLUMNS:
            wanted = 1 if turned else 0
        elif module in ROWS and kind == "weight":
            wanted = 0 if turned else 1
        if name == "palm" and module in ("key", "value"):
            wanted = None  # one head, which every device needs
        assert cut_dim(storage.parameter[1]) == wanted, parameter.name


@pytest.mark.parametrize("name", ["gpt", "llama", "gopher"])
def test_a_layer_has_two_sums_forward_and_two_backward(name: str) -> None:
    """Megatron's f and g; and one sum for the vocabulary's rows, one before its columns. The rest
    are numbers: two for the loss of each token, that over all of them."""
    layers = 2
    estimate = estimate_of(name, by(name, "tensor=2"))
    hidden = max(one.bytes for one in estimate.collectives if one.phase == "forward")
    large = [one for one in estimate.collectives if one.bytes == hidden]
    count: Counter[tuple[str, str]] = Counter()
    for one in large:
        count[one.kind, one.phase] += one.count
    assert count == {
        ("all_reduce", "forward"): 2 * layers + 1,
        ("all_reduce", "backward"): 2 * layers + 1,
    }


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_with_its_sequence_divided_gathers_and_scatters_take_the_place_of_sums(name: str) -> None:
    """What was gathered for columns is gathered again in the backward, and only a shard is kept."""
    layers = 2
    estimate = estimate_of(name, by(name, "tensor=2,between=sequence"))
    hidden = max(one.bytes for one in estimate.collectives if one.kind == "reduce_scatter")
    count: Counter[tuple[str, str]] = Counter()
    for one in estimate.collectives:
        if one.bytes == hidden and one.phase != "step":
            count[one.kind, one.phase] += one.count
    again = 2 * layers
    assert count == {
        ("all_gather", "forward"): 2 * layers + 1,
        ("reduce_scatter", "forward"): 2 * layers + 1,
        ("all_gather", "backward"): 2 * layers + 1 + again,
        ("reduce_scatter", "backward"): 2 * layers + 1,
    }


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_a_context_axis_divides_the_sequence_and_gathers_keys_and_values(name: str) -> None:
    """Once forward, and again for the backward, from where their gradients are scattered."""
    strategy, layers = by(name, "context=2"), 2
    attends = [o for o in strategy.splits if "scaled_dot_product" in o]
    assert {strategy.splits[o] for o in attends} == {("q",)}
    estimate = estimate_of(name, strategy)
    read = {i for o in attends for i in graph_of(name).operator[o].inputs[1:]}
    count: Counter[tuple[str, str]] = Counter()
    for one in estimate.collectives:
        if one.reason in read:
            count[one.kind, one.phase] += one.count
    both = 2 * layers
    assert count == {
        ("all_gather", "forward"): both,
        ("all_gather", "backward"): both,
        ("reduce_scatter", "backward"): both,
    }
    parts = estimate_of(name, by(name, "context=1,recompute=none"))
    assert estimate.forward_compute_s < parts.forward_compute_s
    assert estimate.memory.activations_bytes < 0.6 * parts.memory.activations_bytes


def test_degrees_multiply_and_zero_shards_over_context_too() -> None:
    strategy = by("llama", "tensor=2,context=2,data=2,zero=1,between=sequence")
    assert strategy.mesh.axes == (("data", 2), ("context", 2), ("tensor", 2))
    (name, *_) = (p.name for p in graph_of("llama").parameters if "up_proj" in p.name)
    storage = strategy.storage[name]
    assert [p[0] for p in storage.optimizer] == ["S", "S", "S"]
    assert [p[0] for p in storage.parameter] == ["I", "I", "S"]


def experts(text: str, batch: int = 16) -> tuple[Strategy, Estimate]:
    from benchmarks.transformer import Experts, Transformer

    degrees = degrees_from_text(text)
    of = Experts(count=8, chosen=2, ffn=48, groups=degrees.tensor)
    sizes = Transformer(3, 32, 4, 2, 0, 64, 16, gated=True, biased=False, tied=False, experts=of)
    divided = division(sizes.graph(batch), degrees.microbatches(batch))
    machine = FakePrices(devices=degrees.devices)
    strategy = by_degrees(divided, degrees, machine, Training("sgd"))
    return strategy, evaluate(divided.graph, divided.rules, machine, strategy)


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("data=8,experts=4", {"experts": 4}),
        ("tensor=2,data=4,experts=8,between=sequence", {"experts": 4, "tensor": 2}),
        ("tensor=2,data=4,experts=2,between=sequence", {"tensor": 2}),
    ],
)
def test_experts_are_divided_and_tokens_go_all_to_all(text: str, axes: dict[str, int]) -> None:
    """There and back, forward and backward, in each of three layers, over each axis, and nowhere
    else; all places of a rank's tokens go, twice as many as tokens."""
    strategy, estimate = experts(text)
    sizes = dict(strategy.mesh.axes)
    for axis, size in axes.items():
        assert sizes[axis] == size
        sent = [c for c in estimate.collectives if c.kind == "all_to_all" and c.axis == axis]
        assert sum(c.count for c in sent) == 3 * 4
        tokens = 16 * 16 // strategy.devices
        assert {c.bytes for c in sent} == {tokens * 2 * 32 * 2}
    assert {c.axis for c in estimate.collectives if c.kind == "all_to_all"} == set(axes)
    names = list(sizes)
    for name, kept in strategy.storage.items():
        on = {axis for axis, p in zip(names, kept.parameter, strict=True) if p[0] == "S"}
        if ".experts." in name:
            assert on == set(axes)
        elif "router" in name or "norm" in name:
            assert not on


def test_devices_with_all_experts_send_nothing_and_work_as_much() -> None:
    _, apart = experts("data=8,experts=8")
    _, together = experts("data=8")
    assert not [c for c in together.collectives if c.kind == "all_to_all"]
    assert apart.memory.parameters_bytes < together.memory.parameters_bytes


def test_experts_that_do_not_lie_on_whole_neighbours_are_refused() -> None:
    for text in ("data=8,experts=3", "tensor=4,data=2,experts=2,between=sequence"):
        with pytest.raises(AutoparError, match="experts are divided over all of tensor"):
            experts(text)
    with pytest.raises(AutoparError, match="the sequence must be divided"):
        experts("tensor=2,data=4,experts=4")


def test_a_plan_that_divides_queries_of_causal_attention_is_not_run() -> None:
    from autopar import api
    from benchmarks.transformer import Transformer

    graph = Transformer(2, 32, 4, 4, 128, 64, 16).graph(4)
    plan = api.plan(graph, topology="1x2xh100-sxm", recipe="context=2")
    with pytest.raises(AutoparError, match=r"divides q of .*no implementation here"):
        api.division_of(plan)


def test_parallel_layers_have_one_sum(name: str = "palm") -> None:
    """What attention and MLP give is added before it is summed over devices (arXiv 2204.02311)."""
    estimate = estimate_of(name, by(name, "tensor=2"))
    hidden = max(one.bytes for one in estimate.collectives if one.phase == "forward")
    sums = [o for o in estimate.collectives if o.bytes == hidden and o.phase == "forward"]
    assert sum(one.count for one in sums) == 2 + 1


@pytest.mark.parametrize(
    ("name", "between"), [*((name, "sequence") for name in LANGUAGE), ("palm", "width")]
)
def test_of_what_is_between_a_device_keeps_its_part(name: str, between: str) -> None:
    graph = graph_of(name)
    plain, divided = (
        saved_bytes(graph, bound_rules(graph), by(name, f"tensor=4,between={what},recompute=full"))
        for what in ("whole", between)
    )
    assert divided < plain


@pytest.mark.parametrize(
    ("text", "stages"), [("pipeline=2", 2), ("pipeline=4", 4), ("pipeline=2,chunks=2", 4)]
)
def test_stages_have_equal_numbers_of_layers(text: str, stages: int) -> None:
    strategy = by("gpt_deep", f"{text},tensor=2,data=2,microbatch=1")
    assert len(strategy.stages) == stages
    groups = stages // (strategy.chunks or 1)
    for number, stage in enumerate(strategy.stages):
        first = number % groups * 4
        assert stage.devices == tuple(range(first, first + 4))
        layers = {name.split(".")[1] for name in stage.operators if name.startswith("blocks.")}
        assert layers == {str(i) for i in range(number * 4 // stages, (number + 1) * 4 // stages)}
    assert any(name.startswith("tokens") for name in strategy.stages[0].operators)
    assert any(name.startswith("cross") for name in strategy.stages[-1].operators)
    assert strategy.microbatches == BATCH // 2


@pytest.mark.parametrize(("zero", "sharded"), [(0, 0), (1, 1), (2, 2), (3, 3)])
def test_zero_is_over_data_and_not_over_replicas(zero: int, sharded: int) -> None:
    strategy = by("gpt", f"replicas=2,data=2,tensor=2,zero={zero}", Training("adam"))
    storage = strategy.storage["blocks.0.up.weight"]
    kinds = (storage.optimizer, storage.gradient, storage.parameter)
    assert [kind[1] for kind in kinds] == ["S(1)"] * sharded + ["I"] * (3 - sharded)
    assert {(kind[0], kind[2]) for kind in kinds} == {("I", "S(0)")}


def test_recomputed_attention_is_its_products_and_what_is_between() -> None:
    strategy = by("gopher", "tensor=2,recompute=attention")
    assert [name for name in strategy.recompute if name.startswith("blocks.0.")] == [
        f"blocks.0.{name}"
        for name in (
            *("matmul", "matmul_1", "pad", "view_4", "slice", "add", "mul", "masked_fill"),
            *("softmax", "matmul_2"),
        )
    ]


def test_the_same_model_is_divided_alike_on_every_machine() -> None:
    degrees = degrees_from_text("tensor=2,pipeline=2,data=2,microbatch=1,recompute=full")
    divided = division(graph_of("gpt"), 4)
    fast, slow = (
        by_degrees(divided, degrees, cost_model(machine), Training())
        for machine in ("1x8xh100-sxm", "8x1xtpu-v3")
    )
    assert fast == slow


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("resnet", "data=2", "need the whole batch"),
        ("gpt", "tensor=3", "nothing of gpt can be divided by tensor=3"),
        ("gpt", "pipeline=8", "2 equal blocks, which cannot be 8 stages"),
        ("gpt", "data=2,recompute=most", "there are none, attention, selective, full"),
        ("gpt", "data=3,microbatch=2", "a batch of 6 would be"),
    ],
)
def test_what_cannot_be_says_what_could(name: str, text: str, says: str) -> None:
    with pytest.raises(AutoparError, match=says):
        by(name, text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tensr=2", "did you mean tensor"),
        ("tensor=two", "is a number"),
        ("tensor=2,tp=4", "gives tensor twice"),
        ("zero=4", "level from 0 to 3"),
        ("data=0", "at least 1"),
        ("between=rows", "one of whole, sequence, width"),
        ("schedule", "has a name"),
    ],
)
def test_a_text_that_is_no_recipe_is_refused(text: str, says: str) -> None:
    with pytest.raises(AutoparError, match=says):
        degrees_from_text(text)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_degrees_are_those_of_their_machines(name: str) -> None:
    entry = PUBLISHED[name]
    assert entry.degrees.devices == cost_model(entry.topology).devices
    assert entry.batch % entry.degrees.microbatches(entry.batch) == 0
    assert degrees_from_text(degrees_text(entry.degrees)) == entry.degrees
    assert "arXiv" in entry.source or "README" in entry.source
    assert degrees_from_text("zero=3", entry.degrees).tensor == entry.degrees.tensor


def test_one_device_is_the_default() -> None:
    assert Degrees().devices == 1
    assert degrees_text(Degrees()) == ""
