"""How many passes over memory the kernels of operators make, and what they are done with."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from autopar.ir.graph import Argument, Input, Operator, TensorSpec
from autopar.ir.rule import BoundRule, bind
from autopar.ir.sharding import Mesh
from autopar.ops import bound_rules, rule_for
from autopar.runtime.bench import LOSSES, _half_of_loss
from autopar.simulator.costs import INDEX_INSTRUCTIONS, Costs, is_free, work
from benchmarks import one_gpu
from benchmarks.transformer import Transformer
from cost_models.analytical import LATENCY_S, THREADS_PER_CORE, Analytical
from cost_models.interface import Work
from cost_models.topology import topology

Shape = tuple[int, ...]
ALONE, PAIR = Mesh((("device", 1),)), Mesh((("device", 2),))
H100 = Analytical(topology("1x2xh100-sxm"))
X = (64, 4096)
IMAGES = (32, 64, 56, 56)
MEANS = (64,)


def bound(
    op: str,
    inputs: list[Shape],
    outputs: list[Shape],
    arguments: tuple[Argument, ...] | None = None,
    dtype: str = "float32",
    made: str = "",
) -> BoundRule:
    """``arguments``: the inputs unless said; targets are the inputs of cross-entropy and embedding
    that are no floats. ``made``: the dtype of the results, if it is another."""
    indices = {"aten.cross_entropy_loss.default": 1, "aten.embedding.default": 1}
    read = tuple(
        TensorSpec(shape, "int64" if indices.get(op) == i else dtype)
        for i, shape in enumerate(inputs)
    )
    written = tuple(TensorSpec(shape, made or dtype) for shape in outputs)
    names = tuple(f"i{i}" for i in range(len(inputs)))
    given = arguments or tuple(Input(i) for i in range(len(inputs)))
    operator = Operator(op, op, names, tuple(f"o{i}" for i in range(len(outputs))), given)
    rule = rule_for(operator, read, written)
    assert rule is not None
    return bind(rule, read, written)


def passes(of: BoundRule, wanted: tuple[bool, ...] = ()) -> tuple[float, float]:
    """Forward and backward, in units of the largest tensor."""
    floats = tuple(spec.is_floating for spec in of.input_specs)
    both = work(of, (None,), ALONE, wanted or floats)
    largest = max(spec.bytes for spec in of.input_specs + of.output_specs)
    there, back = (sum(one.bytes + one.again_bytes for one in of_one) for of_one in both)
    return there / largest, back / largest


def entropy(classes: int, dtype: str = "float32") -> BoundRule:
    return bound("aten.cross_entropy_loss.default", [(64, classes), (64,)], [()], None, dtype)


def batch_norm(shape: Shape = IMAGES) -> BoundRule:
    channels = (shape[1],)
    arguments = (*(Input(i) for i in range(5)), True, 0.1, 1e-5)
    return bound(
        "aten._native_batch_norm_legit_functional.default",
        [shape, *[channels] * 4],
        [shape, *[channels] * 4],
        arguments,
    )


PASSES = [
    # log-softmax: reads for the largest, for the sum, and for the result, which it writes;
    # backward zeros, then the gradient twice, the result, and the gradient that is written
    (entropy(32000), 4, 5),
    # kept by a block: once each
    (entropy(1024), 2, 4),
    (entropy(20000, "bfloat16"), 2, 4),
    # ... unless rows start anywhere
    (entropy(20001, "bfloat16"), 4, 5),
    (bound("aten.softmax.int", [X], [X], (Input(0), -1)), 2, 6),
    (bound("aten.log_softmax.int", [X], [X], (Input(0), -1)), 2, 3),
    # reads twice; backward reads both twice and writes, and both again for scale and shift
    (
        bound(
            "aten.layer_norm.default",
            [X, X[1:], X[1:]],
            [X],
            (Input(0), (4096,), Input(1), Input(2)),
        ),
        3,
        7,
    ),
    # statistics, then all points; backward both sums, then all points
    (batch_norm(), 3, 5),
    (bound("aten.group_norm.default", [IMAGES], [IMAGES], (Input(0), 8)), 3, 5),
    # derivatives.yaml: grad * (exponent * x ** (exponent - 1)), grad * -0.5 * result ** 3
    (bound("aten.pow.Tensor_Scalar", [X], [X], (Input(0), 2)), 2, 7),
    (bound("aten.rsqrt.default", [X], [X]), 2, 7),
    (bound("aten.sqrt.default", [X], [X]), 2, 5),
    (bound("aten.relu.default", [X], [X]), 2, 3),
    # products of the gradient with either factor; that for a factor of all rows is summed
    (bound("aten.mul.Tensor", [X, X], [X]), 3, 6),
    (bound("aten.mul.Tensor", [X, X[1:]], [X]), 2, 2 + 3 + 1),
    (bound("aten.mul.Tensor", [X], [X], (Input(0), 2.0)), 2, 2),
    # gradients of sums are passed on, negated for what is subtracted, summed for what rows share
    (bound("aten.add.Tensor", [X, X], [X]), 3, 0),
    (bound("aten.sub.Tensor", [X, X], [X]), 3, 2),
    (bound("aten.add.Tensor", [X, X[1:]], [X]), 2, 1),
    # views, but for zeros around parts and sums over what was repeated
    (bound("aten.slice.Tensor", [X], [(32, 4096)], (Input(0), 0, 0, 32)), 0, 1 + 2 / 2),
    (bound("aten.select.int", [X], [X[1:]], (Input(0), 0, 3)), 0, 1 + 2 / 64),
    (bound("aten.expand.default", [(1, 4096)], [X], (Input(0), X)), 0, 1 + 1 / 64),
    (bound("aten.cat.default", [X, X], [(128, 4096)], ((Input(0), Input(1)), 0)), 2, 0),
    (bound("aten.sum.dim_IntList", [X], [(64,)], (Input(0), (1,))), 1, 0),
    (bound("aten.mean.dim", [X], [(64,)], (Input(0), (1,))), 1, 1),
    # a mask of a byte is drawn, taken and scaled
    (
        bound("aten.dropout.default", [X], [X], (Input(0), 0.5, True)),
        1 / 4 + (2 + 1 / 4) + 2,
        2 + (2 + 1 / 4),
    ),
    (bound("aten.masked_fill.Scalar", [X, X], [X], (Input(0), Input(1), 1.0)), 5, 5),
]


@pytest.mark.parametrize(("of", "forward", "backward"), PASSES)
def test_passes_are_those_of_the_kernels(of: BoundRule, forward: float, backward: float) -> None:
    assert passes(of) == pytest.approx((forward, backward), rel=0.04)


def test_a_factor_that_needs_no_gradient_costs_none() -> None:
    rows = bound("aten.mul.Tensor", [X, X[1:]], [X])
    assert passes(rows, (True, False))[1] == pytest.approx(2, rel=0.04)
    assert passes(rows, (False, True))[1] == pytest.approx(3 + 1, rel=0.04)


def test_a_table_is_read_where_tokens_say_and_its_gradient_is_filled_with_zeros() -> None:
    of = bound("aten.embedding.default", [(50000, 256), (128,)], [(128, 256)])
    (there,), (zeros, *_) = work(of, (None,), ALONE, (True, False))
    assert there.bytes == 2 * 128 * 256 * 4 + 128 * 8
    assert zeros.bytes == 50000 * 256 * 4


def test_elements_are_looked_for_where_tensors_do_not_lie_alike() -> None:
    """Broadcasts, and casts but from float32 to what is narrower."""
    alike, rows = (bound("aten.mul.Tensor", [X, other], [X]) for other in (X, X[1:]))
    wider = bound("aten._to_copy.default", [X], [X], dtype="bfloat16", made="float32")
    for of, there, back in ((alike, 0, 0), (rows, 1, 1), (wider, 1, 0)):
        both = work(of, (None,), ALONE, (True, False)[: len(of.input_specs)])
        found = [one.instructions for (one,) in both]
        assert found == [n * INDEX_INSTRUCTIONS * prod(X) for n in (there, back)]


def statistics_s(of: BoundRule) -> float:
    (statistics, _), _ = work(of, (None,), ALONE, (True,) * 5)
    return H100.compute_time_s(statistics) - H100.topology.device.launch_s


def test_few_channels_leave_the_memory_idle() -> None:
    """A block reads a channel: twice as many channels of half the points take half as long, until
    all memory can give is asked for."""
    few, more = (
        statistics_s(batch_norm((32, 64, 56, 56))),
        statistics_s(batch_norm((16, 128, 56, 56))),
    )
    assert few == pytest.approx(2 * more)
    read = Work("memory", "float32", 0.0, float(prod(IMAGES) * 4))
    assert few > 3 * (H100.compute_time_s(read) - H100.topology.device.launch_s)
    assert few == pytest.approx(read.bytes * LATENCY_S / (64 * 512 * 4))


def test_more_threads_than_a_device_holds_wait() -> None:
    most = THREADS_PER_CORE * H100.topology.device.cores
    all_at_once, twice = (
        Work("memory", "float32", 0.0, 1e9, threads=n, ahead_bytes=1) for n in (most, 2 * most)
    )
    assert H100.compute_time_s(all_at_once) == H100.compute_time_s(twice)


def test_what_ranks_agree_on_is_a_formula_in_float32() -> None:
    """Batch norm over a batch that is divided, cross-entropy over classes that are: passes over
    half of the points, of two bytes and of four."""
    for of, factor, there, back in (
        (batch_norm(), "d0", 4 * (1 + 2 + 2 + 1 + 2 + 2 + 2), 4 * (4 + 5 + 9)),
        (entropy(32000, "bfloat16"), "classes", 2 * 2 + 4 * (2 + 8), 2 * 4),
    ):
        wanted = tuple(spec.is_floating for spec in of.input_specs)
        apart = work(of, (factor,), PAIR, wanted)
        points = max(spec.numel for spec in of.input_specs) / 2
        found = [sum(one.bytes for one in works) / points for works in apart]
        assert found == pytest.approx([there, back], rel=0.02)


@pytest.mark.parametrize(("name", "rounds"), [("h100-sxm", True), ("mi300x", False)])
def test_convolutions_of_float32_may_round_their_operands_on_nvidia(
    name: str, rounds: bool
) -> None:
    model = Analytical(topology(name))
    shape = (1, 8192, 8192, 8192)
    product = Work("matmul", "float32", 2.0 * prod(shape), 0.0, shape)
    seconds = [
        model.compute_time_s(replace(product, kind=kind, dtype=dtype))
        for kind, dtype in (
            ("matmul", "float32"),
            ("convolution", "float32"),
            ("convolution", "tensorfloat32"),
        )
    ]
    assert seconds[1] == seconds[2 if rounds else 0]
    assert seconds[0] > 3 * seconds[2] or not rounds


# ---- what an H100 took ---------------------------------------------------------------------------

CHANNELS = "aten._native_batch_norm_legit_functional.default"
ARGUMENTS: dict[str, Callable[[list[Shape]], tuple[Argument, ...]]] = {
    "aten.cross_entropy_loss.default": lambda _: (Input(0), Input(1)),
    "aten.layer_norm.default": lambda read: (Input(0), read[1], Input(1), Input(2)),
    "aten.pow.Tensor_Scalar": lambda _: (Input(0), 2),
    CHANNELS: lambda _: (*(Input(i) for i in range(5)), True, 0.1, 1e-5),
    **{f"aten.{name}.default": lambda _: (Input(0),) for name in ("relu", "silu", "tanh")},
}


@pytest.mark.parametrize("op", ARGUMENTS)
def test_operators_take_what_was_measured(op: str) -> None:
    """Kernels alone, in all that twelve models have of the operator: within 30%."""
    path = next((Path(one_gpu.__file__).parent / "measured").glob("operators_h100_*.csv"))
    predicted, measured = [0.0, 0.0], [0.0, 0.0]
    with path.open() as file:
        for row in csv.DictReader(file):
            if row["op"] != op:
                continue
            read = [tuple(map(int, shape.split("x"))) for shape in row["shapes"].split()]
            made = [()] if "loss" in op else read if op == CHANNELS else read[:1]
            of = bound(op, read, made, ARGUMENTS[op](read), row["dtype"])
            wanted = tuple(spec.is_floating for spec in of.input_specs)
            both = Costs(H100, ALONE).operator_s(of, (None,), wanted)
            for i, way in enumerate(("forward", "backward")):
                predicted[i] += int(row["count"]) * both[i]
                measured[i] += int(row["count"]) * float(row[f"measured_{way}_s"])
    assert predicted == pytest.approx(measured, rel=0.3)


# ---- attention by its definition -----------------------------------------------------------------

QUERIES = (2, 4, 256, 32)
SCORES = 2 * 4 * 256 * 256


def attention(dropout: float = 0.0, mask: Shape = ()) -> BoundRule:
    shapes = [QUERIES] * 3 + ([mask] if mask else [])
    given = (*(Input(i) for i in range(3)), Input(3) if mask else None, dropout, False)
    op = "aten.scaled_dot_product_attention.default"
    return bound(op, shapes, [QUERIES], given, "bfloat16")


def test_attention_that_no_kernel_does_is_products_and_passes_over_scores() -> None:
    there, back = work(attention(dropout=0.1), (None,), ALONE, (True,) * 3)
    assert [one.kind for one in there].count("matmul") == 2
    assert [one.kind for one in back].count("matmul") == 5
    flops = 2.0 * SCORES * 32
    assert {one.flops for one in (*there, *back) if one.kind == "matmul"} == {flops}
    over = [sum(one.bytes for one in works if one.kind == "memory") for works in (there, back)]
    # narrow to wide and back, six passes for the sum of exponentials, four for probabilities
    exact = (2 + 4) + 6 * 4 + 4 * 4 + (4 + 2)
    dropped = 1 + (2 + 1 + 2) + (2 + 2)
    assert over[0] == pytest.approx((exact + dropped) * SCORES, rel=0.1)
    assert over[1] > over[0] / 2


def test_a_mask_is_drawn_forward_and_backward_a_byte_for_a_score() -> None:
    for works in work(attention(dropout=0.1), (None,), ALONE, (True,) * 3):
        assert [one.bytes for one in works].count(SCORES) == 1


def test_only_a_mask_that_learns_keeps_attention_from_being_fused() -> None:
    masked = attention(mask=(1, 1, 256, 256))
    fixed, learned = (
        work(masked, (None,), ALONE, (True, True, True, learns)) for learns in (False, True)
    )
    assert [one.kind for one in fixed[0]] == ["attention"]
    assert "attention" not in {one.kind for works in learned for one in works}
    assert sum(map(H100.compute_time_s, learned[0])) > sum(map(H100.compute_time_s, fixed[0]))


# ---- gradients of several readers ----------------------------------------------------------------

GRAPH = Transformer(3, 64, 4, 4, 256, 64, 128, fused_loss=True).graph(2)
RULES = bound_rules(GRAPH)


def test_every_reader_but_the_first_adds_its_gradient() -> None:
    readers: dict[str, int] = {}
    for operator in GRAPH.operators:
        for name in operator.inputs:
            tensor = GRAPH.by_name[name]
            if tensor.differentiable and tensor.role == "activation":
                readers[name] = readers.get(name, 0) + 1
    sums = [len(RULES[o.name].rule.added) for o in GRAPH.operators]
    assert sum(sums) == sum(n - 1 for n in readers.values()) > 0
    for operator in GRAPH.operators:
        rule = RULES[operator.name]
        wanted = tuple(GRAPH.by_name[name].differentiable for name in operator.inputs)
        alone = replace(rule, rule=replace(rule.rule, added=()))
        (_, back), (_, without) = (work(r, (None,), ALONE, wanted) for r in (rule, alone))
        added = [3 * rule.input_specs[i].bytes for i in rule.rule.added]
        assert [one.bytes for one in back[len(without) :]] == added
        assert not (added and is_free(rule))


# ---- other machines ------------------------------------------------------------------------------


def test_compiled_programs_read_and_write_nothing_twice() -> None:
    tpu = Analytical(topology("tpu-v5e"))
    power = bound("aten.pow.Tensor_Scalar", [X], [X], (Input(0), 2), "bfloat16")
    _, (back,) = Costs(tpu, ALONE).work(power, (None,), (True,))
    assert back.bytes == 3 * prod(X) * 2 and back.instructions == 0


def test_a_measured_loss_is_told_for_half_of_the_passes_that_its_rule_counts() -> None:
    for rows, classes in LOSSES:
        of = bound("aten.cross_entropy_loss.default", [(rows, classes), (rows,)], [()])
        there, back = work(of, (None,), ALONE, (True, False))
        assert {one.of for one in (*there, *back)} == {"loss"}
        counted = sum(one.bytes for one in (*there, *back))
        told = _half_of_loss(rows * classes * 4, 1.0)
        assert counted == pytest.approx(2 * told.bytes, rel=0.02)
        assert told.seconds == 0.5
