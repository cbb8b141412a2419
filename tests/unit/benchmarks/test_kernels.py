"""Kernels of published programs: what they keep, and that they are divided as their parts are."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from autopar.ir.sharding import Mesh
from autopar.ir.simulation import Estimate
from autopar.ir.strategy import Training
from autopar.recipes import Degrees, by_degrees
from autopar.simulator.costs import work
from autopar.simulator.memory import saved_bytes
from autopar.simulator.microbatches import division
from autopar.simulator.prices import evaluate
from benchmarks.kernels import RULES, proposals
from benchmarks.transformer import Experts, Latent, Transformer
from cost_models import cost_model

LAYERS, WIDTH, HEADS, KV_HEADS, FFN, LENGTH = 3, 64, 4, 2, 192, 32
LLAMA = Transformer(LAYERS, WIDTH, HEADS, KV_HEADS, FFN, 128, LENGTH, gated=True, biased=False)
LLAMA = replace(LLAMA, tied=False, fused_loss=True)
GPT = Transformer(2, WIDTH, HEADS, HEADS, FFN, 128, LENGTH, flash=False, dropout=True)
EXPERTS = replace(LLAMA, experts=Experts(4, 2, 96))
RING = replace(LLAMA, fused=True, repeated=True, ring=True)
MIXED = Training("adam", "mixed")


def kept_of_a_token(model: Transformer) -> float:
    """Bytes that a block keeps of a token of one sample on one device."""

    def kept(layers: int) -> int:
        graph = replace(model, layers=layers).graph(1)
        divided = division(graph, 1, proposals(graph))
        strategy = by_degrees(divided, Degrees(1), cost_model("1x1xh100-sxm"), MIXED)
        return saved_bytes(divided.graph, divided.rules, strategy)

    return (kept(2) - kept(1)) / LENGTH


def test_a_block_keeps_what_its_kernels_do() -> None:
    """Before each norm, after it, queries, keys, values, what attention gives, the two factors of
    SwiGLU and what comes of them, in bf16; a float32 for each row of a norm and of attention."""
    grouped = 2 * WIDTH * KV_HEADS // HEADS
    wide = 4 * WIDTH + (WIDTH + grouped) + WIDTH + 3 * FFN
    rows = 2 * 4 + 4 * HEADS
    assert kept_of_a_token(replace(LLAMA, fused=True)) == 2 * wide + rows
    # ATen's rms_norm has two float32 copies for its input, and SwiGLU is in parts
    assert kept_of_a_token(LLAMA) == 2 * wide + rows + 2 * (8 - 2) * WIDTH + 2 * FFN


def test_transformer_engine_keeps_a_byte_of_what_products_take() -> None:
    """And no weights: those that it keeps from step to step are as products take them."""
    engine = replace(LLAMA, fused=True, engine=True, products="float8_e4m3fn")
    taken = WIDTH + WIDTH + WIDTH + FFN  # by the products: of queries to values, out, up, down
    grouped = 2 * WIDTH * KV_HEADS // HEADS
    wide = 2 * WIDTH + (WIDTH + grouped) + WIDTH + 2 * FFN
    assert kept_of_a_token(engine) == taken + 2 * wide + 2 * 4 + 4 * HEADS
    cast = kept_of_a_token(replace(engine, engine=False))
    weights = WIDTH * (2 * WIDTH + grouped) + 3 * WIDTH * FFN
    assert cast == kept_of_a_token(engine) + weights / LENGTH


def test_experts_apply_weights_of_tokens_where_they_are_narrowest() -> None:
    """Not to what they give, which would be kept: as wide as the model, for each chosen expert."""
    chosen, ffn = 2, 96
    plain, fused = kept_of_a_token(EXPERTS), kept_of_a_token(replace(EXPERTS, fused=True))
    of_norms, of_weights = 2 * (8 - 2) * WIDTH, 0
    assert plain - fused == of_norms + 2 * chosen * (ffn + WIDTH) + of_weights


def evaluated(model: Transformer, degrees: Degrees) -> Estimate:
    graph = model.graph(8)
    count = degrees.microbatches(8)
    divided = division(graph, count, proposals(graph))
    machine = cost_model("1x8xh100-sxm")
    strategy = by_degrees(divided, degrees, machine, MIXED)
    return evaluate(divided.graph, divided.rules, machine, strategy)


@pytest.mark.parametrize("model", [LLAMA, GPT, EXPERTS])
@pytest.mark.parametrize(
    "degrees",
    [
        Degrees(data=8, zero=3),
        Degrees(tensor=2, data=4, microbatch=1),
        Degrees(tensor=2, data=2, microbatch=2, between="sequence", zero=1),
        Degrees(data=4, context=2, zero=1),
    ],
    ids=["data", "tensor", "sequence", "context"],
)
def test_kernels_communicate_as_their_parts_do_and_take_and_keep_less(
    model: Transformer, degrees: Degrees
) -> None:
    degrees = replace(degrees, data=8 // (degrees.tensor * degrees.context))
    parts, fused = evaluated(model, degrees), evaluated(replace(model, fused=True), degrees)

    def sent(estimate: Estimate) -> Counter[tuple[str, str, str]]:
        found: Counter[tuple[str, str, str]] = Counter()
        for one in estimate.collectives:
            found[one.kind, one.phase, one.axis] += one.bytes * one.count
        return found

    if model is not EXPERTS:  # there, weights of tokens are sent to experts, not experts' results
        assert sent(fused) == sent(parts)
    assert fused.step_time_s <= parts.step_time_s
    assert fused.peak_memory_bytes <= parts.peak_memory_bytes


@pytest.mark.parametrize("model", [LLAMA, GPT, EXPERTS])
def test_a_batch_may_be_of_one_sample(model: Transformer) -> None:
    graph = replace(model, fused=True).graph(1)
    divided = division(graph, 1, proposals(graph))
    degrees = Degrees(data=1, context=8, zero=1)
    machine = cost_model("1x8xh100-sxm")
    strategy = by_degrees(divided, degrees, machine, MIXED)
    assert evaluate(divided.graph, divided.rules, machine, strategy).step_time_s > 0


def test_every_kernel_is_in_some_graph() -> None:
    narrow = replace(LLAMA, products="float8_e4m3fn")
    fp4 = replace(narrow, products="float4_e2m1fn_x2", near=16)
    told = Experts(4, 2, 96, biased=True, clamped=True, sorted=True, steps=2, apart=True, full=True)
    apart = replace(EXPERTS, experts=told, scaled=True)
    uneven = replace(EXPERTS, experts=Experts(5, 2, 96))
    models = (LLAMA, GPT, EXPERTS, RING, narrow, fp4, apart, uneven)
    models += (replace(LLAMA, latent=Latent(16)),)
    fused = [replace(model, fused=True) for model in models]
    fused += [replace(LLAMA, divided_loss=True), replace(GPT, fused=True, metrics=2)]
    fused += [replace(m, one_pass=True) for m in fused]
    fused += [replace(m, engine=True, cast_norms=True) for m in fused]
    graphs = [model.graph(2) for model in fused]
    used = {o.op for graph in graphs for o in graph.operators if o.op.startswith("fused.")}
    assert used == set(RULES)


def test_what_is_only_measured_is_read_in_the_forward_and_keeps_nothing() -> None:
    """Logits are cast to float32, of which a softmax reads rows and writes them."""
    measuring = replace(LLAMA, fused=True, metrics=2)
    every = LENGTH * LLAMA.vocabulary
    forward, _ = moved_bytes(measuring, "fused.metric")
    assert forward == [6 * every, 8 * every, 8 * LENGTH]
    degrees = Degrees(data=8, zero=3)
    plain, measured = (evaluated(m, degrees) for m in (replace(measuring, metrics=0), measuring))
    assert measured.forward_compute_s > plain.forward_compute_s
    assert measured.backward_compute_s == plain.backward_compute_s
    assert measured.peak_memory_bytes == plain.peak_memory_bytes


def test_dtensors_loss_has_four_copies_of_its_logits_at_once() -> None:
    """Log-probabilities that are kept, zeros with what was picked, their sum with exponentials, and
    the gradient: one more than the loss of this runtime has."""
    of_2 = Degrees(tensor=2, microbatch=8)
    model = replace(LLAMA, fused=True, fused_loss=False, vocabulary=8192)
    runtime = evaluated(model, of_2).memory
    dtensor = evaluated(replace(model, divided_loss=True), of_2).memory
    copy = 8 * LENGTH * 8192 // 2 * 4
    assert (runtime.at, dtensor.at) == ("cross_entropy_loss forward", "cross_entropy backward")
    assert dtensor.total_bytes - runtime.total_bytes == pytest.approx(copy, rel=0.05)


def moved_bytes(model: Transformer, kernel: str) -> tuple[list[float], list[float]]:
    """By the works of the first such operator, forward and backward, of one sample."""
    graph = model.graph(1)
    divided = division(graph, 1, proposals(graph))
    operator = next(o for o in divided.graph.operators if kernel in o.op)
    wanted = tuple(graph.by_name[name].differentiable for name in operator.inputs)
    mesh = Mesh((("data", 1),))
    there, back = work(divided.rules[operator.name], ("nothing",), mesh, wanted)
    return [one.bytes for one in there], [one.bytes for one in back]


def round_the_ring(model: Transformer, recompute: str) -> dict[tuple[str, str], int]:
    """Bytes of each kind and phase that attention sends, of two samples on each of four devices."""
    estimate = evaluated(model, Degrees(data=2, context=4, microbatch=2, recompute=recompute))
    found: Counter[tuple[str, str]] = Counter()
    for one in estimate.collectives:
        if "ring_attention" in one.reason and one.axis == "context":
            found[one.kind, one.phase] += one.bytes * one.count
    return found


@pytest.mark.parametrize("repeated", [True, False])
def test_keys_and_values_go_round_and_their_gradients_go_back(repeated: bool) -> None:
    """Those of all heads, or of as many as there are, of two microbatches."""
    heads = HEADS if repeated else KV_HEADS
    every = LAYERS * 2 * 2 * LENGTH * (WIDTH // HEADS * heads) * 2  # of keys and of values
    found = {("all_gather", "forward"): 2 * every, ("all_gather", "backward"): 2 * every}
    found |= {("send", "backward"): 4 * every}
    ring = replace(RING, repeated=repeated)
    assert round_the_ring(ring, "none") == found
    found["all_gather", "backward"] *= 2  # once more where the forward is run again
    assert round_the_ring(ring, "full") == found


def test_devices_of_a_ring_attend_to_as_many_pairs_each() -> None:
    graph = RING.graph(1)
    (rule,) = {r for _, r in proposals(graph) if r.kind == "attention"}
    attention = next(o for o in graph.operators if "ring_attention" in o.op)
    bound = division(graph, 1, proposals(graph)).rules[attention.name]
    wanted = (True, True, True, False)

    def flops(devices: int) -> list[float]:
        there, back = work(bound, ("q",), Mesh((("context", devices),)), wanted)
        return [one.flops for one in (*there, *back)]

    assert rule.causal
    assert flops(4) == [n / 4 for n in flops(1)]


def test_what_a_ring_gives_is_merged_in_float32() -> None:
    """Around attention: keys and values are put together, and each step's result is added to what
    there is; so are the gradients of queries, keys and values."""
    each = LENGTH * WIDTH
    together, added = 4 * each * 2, each * (4 + 2 + 4)
    (_, *there), (_, *back) = moved_bytes(RING, "ring_attention")
    assert there == [together, added]
    assert back == [together, added, added, added]


def test_keys_are_repeated_for_the_queries_that_share_them() -> None:
    (there,), (back,) = moved_bytes(RING, "repeated")
    assert there == back == 2 * LENGTH * WIDTH * (1 + KV_HEADS / HEADS)


FUSED = replace(GPT, fused=True)


def test_softmax_reads_nothing_above_the_diagonal() -> None:
    scores, seen = 2 * HEADS * LENGTH**2, 2 * HEADS * LENGTH * (LENGTH + 1) // 2
    there, back = moved_bytes(FUSED, "causal_softmax")
    assert there == [seen + scores]
    assert back == [2 * seen + scores]  # what comes back, and its own result


def test_a_sum_takes_what_is_dropped_from_registers() -> None:
    wide = 2 * LENGTH * WIDTH
    dropped, of_dropped = moved_bytes(FUSED, "dropout.into_sum")
    added, of_added = moved_bytes(FUSED, "fused.sum")
    assert dropped == [wide + wide // 2]  # read; a mask of bytes
    assert added == [2 * wide]  # the residual, and the result
    assert (of_dropped, of_added) == ([2 * wide + wide // 2], [3 * wide])  # as if they were apart


@pytest.mark.parametrize("model", [FUSED, replace(LLAMA, fused=True)])
def test_in_one_pass_nothing_is_read_again_for_scale_and_shift(model: Transformer) -> None:
    (in_one,) = moved_bytes(replace(model, one_pass=True), "_norm")[1]
    first, second = moved_bytes(model, "_norm")[1]
    wide = 2 * LENGTH * WIDTH
    assert in_one == pytest.approx(first, rel=0.02)  # numbers of rows in fp32
    assert 2 * wide <= second < 2.2 * wide


def test_what_products_take_narrow_is_written_by_rows_and_by_columns() -> None:
    """Of the forward by whoever makes it; of what comes back by a cast before the products."""
    wide, narrow = LENGTH * WIDTH * 2, LENGTH * WIDTH
    engine = replace(LLAMA, fused=True, engine=True, products="float8_e4m3fn", one_pass=True)
    (there,), _ = moved_bytes(engine, "rms_norm")
    (plain,), _ = moved_bytes(replace(engine, products=None), "rms_norm")
    assert there - plain == 2 * narrow - wide
    (*products, cast) = moved_bytes(replace(engine, kv_heads=HEADS), "linear")[1]
    assert len(products) == 2
    assert cast == 3 * LENGTH * WIDTH * (2 + 1 + 1)  # of queries, keys and values


def test_equal_calls_have_one_rule() -> None:
    """Prices are kept by it: copies of a block are priced once."""
    graph = replace(LLAMA, fused=True).graph(8)
    for count in (1, 4):
        found = division(graph, count, proposals(graph))
        norms = [o.name for o in graph.operators if "rms_norm" in o.op]
        assert len(norms) == 2 * LAYERS + 1
        assert len({id(found.rules[name]) for name in norms}) == 1
