"""Local implementations: masks that no split changes, and numbers that plain ops would lose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch

from autopar.ir.graph import Input, Operator, TensorSpec
from autopar.ir.rule import BoundRule, OpRule, Split, bind
from autopar.ir.sharding import Mesh
from autopar.ops import RULES, rule_for
from autopar.runtime.draws import keep_mask
from autopar.runtime.local_ops import LOCAL_OPS, OUT_OF_RANGE
from autopar.runtime.rule_check import Group, RankContext
from tests.unit.ops.examples import EXAMPLES

ONE = Mesh(())


def context(
    bound: BoundRule,
    split: Split = (),
    mesh: Mesh = ONE,
    rank: int = 0,
    seed: int = 0,
    operator: int = 0,
) -> RankContext:
    return RankContext(bound, split, mesh, rank, Group(mesh), seed=seed, operator_id=operator)


def masked(shape: tuple[int, ...], **options: int) -> torch.Tensor:
    rule = OpRule(" ".join(f"d{i}" for i in range(len(shape))) + " ->")
    bound = bind(rule, (TensorSpec(shape, "float32"),), (TensorSpec((), "float32"),))
    return keep_mask(context(bound, **options), bound.inputs[0], 0.3, torch.device("cpu"))


def test_a_mask_keeps_as_many_as_asked() -> None:
    keep = masked((512, 1024)).double()
    deviation = (0.3 * 0.7 / keep.numel()) ** 0.5
    assert abs(keep.mean().item() - 0.7) < 4 * deviation


def test_neighbours_in_a_mask_are_independent() -> None:
    keep = masked((512, 1024)).double() - 0.7
    for dim in (0, 1):
        for distance in (1, 2, 64):
            product = keep * keep.roll(distance, dim)
            assert abs(product.mean().item()) < 4 * 0.21 / keep.numel() ** 0.5


@pytest.mark.parametrize("other", [{"seed": 1}, {"operator": 1}])
def test_steps_and_operators_draw_other_masks(other: dict[str, int]) -> None:
    first, second = masked((64, 128)).double() - 0.7, masked((64, 128), **other).double() - 0.7
    assert abs((first * second).mean().item()) < 5 * 0.21 / first.numel() ** 0.5


def test_the_mask_of_a_shard_is_the_shard_of_the_mask() -> None:
    spec = TensorSpec((8, 12), "float32")
    bound = bind(OpRule("a b -> a b"), (spec,), (spec,))
    whole = keep_mask(context(bound), bound.inputs[0], 0.5, torch.device("cpu"))
    mesh = Mesh((("x", 2), ("y", 3)))
    for rank in range(mesh.size):
        i, j = mesh.coordinates(rank)
        mine = keep_mask(
            context(bound, ("a", "b"), mesh, rank), bound.inputs[0], 0.5, torch.device("cpu")
        )
        assert torch.equal(mine, whole[4 * i : 4 * i + 4, 4 * j : 4 * j + 4])


def test_indices_beyond_32_bits_still_differ() -> None:
    shape = (2**20, 2**16)
    spec = TensorSpec(shape, "float32")
    bound = bind(OpRule("a b -> a b"), (spec,), (spec,))
    mesh = Mesh((("x", 2**17),))
    first, far = (
        keep_mask(context(bound, ("a",), mesh, rank), bound.inputs[0], 0.5, torch.device("cpu"))
        for rank in (0, 2**16)
    )
    assert prod(shape) > 2**32
    assert 0.45 < (first == far).double().mean().item() < 0.55


def test_every_op_with_special_factors_has_an_implementation() -> None:
    special = set()
    for example in EXAMPLES:
        rule = rule_for(example.operator, example.input_specs, example.output_specs)
        assert rule is not None
        if rule.special:
            special.add(example.op)
    assert special == set(LOCAL_OPS) & set(RULES)


@pytest.mark.parametrize("index", [-1, 6, 99])
@pytest.mark.parametrize("op", ["aten.embedding.default", "aten.cross_entropy_loss.default"])
def test_an_index_that_no_shard_has_is_an_error_as_in_one_process(op: str, index: int) -> None:
    rows = torch.randn(6, 4) if "embedding" in op else torch.randn(2, 6)
    given = torch.tensor([0, index])
    example = next(e for e in EXAMPLES if e.op == op and not e.operator.keywords)
    tensors = (rows, given)
    specs = tuple(TensorSpec(tuple(t.shape), str(t.dtype)[6:]) for t in tensors)
    result = TensorSpec((2, 4) if "embedding" in op else (), "float32")
    operator = replace(example.operator, arguments=(Input(0), Input(1)))
    rule = rule_for(operator, specs, (result,))
    assert rule is not None
    bound = bind(rule, specs, (result,))
    factor = "vocab" if "embedding" in op else "classes"
    shard = rows.chunk(2, 0 if "embedding" in op else 1)[0]
    on = context(bound, (factor,), Mesh((("x", 2),)))
    with pytest.raises((IndexError, RuntimeError), match=OUT_OF_RANGE):
        LOCAL_OPS[op](on, operator, (shard, given), {})


def drawn(op: str, *arguments: Any, specs: tuple[TensorSpec, ...] = ()) -> torch.Tensor:
    """What one process draws by a call with these arguments; tensors stand first among them."""
    out = TensorSpec((256, 512), "float64")
    call = Operator(op, op, tuple(f"i{i}" for i in range(len(specs))), ("o",), arguments)
    rule = rule_for(call, specs, (out,))
    assert rule is not None
    values = [torch.full((256, 512), 0.3, dtype=torch.float64) for _ in specs]
    given = [values[a.index] if isinstance(a, Input) else a for a in arguments]
    here = context(bind(rule, specs, (out,)), operator=1)
    found = LOCAL_OPS[op](here, call, given, {})
    assert isinstance(found, torch.Tensor)
    return found


LIKE = (TensorSpec((256, 512), "float64"),)


@pytest.mark.parametrize(
    ("found", "mean", "variance", "low", "high"),
    [
        (lambda: drawn("aten.rand.default", (256, 512)), 1 / 2, 1 / 12, 0, 1),
        (lambda: drawn("aten.randn.default", (256, 512)), 0, 1, -8, 8),
        (lambda: drawn("aten.randint.low", -3, 4, (256, 512)), 0, 4, -3, 3),
        (lambda: drawn("aten.uniform.default", Input(0), -1.0, 3.0, specs=LIKE), 1, 4 / 3, -1, 3),
        (lambda: drawn("aten.exponential.default", Input(0), 2.0, specs=LIKE), 0.5, 0.25, 1e-9, 20),
        (lambda: drawn("aten.bernoulli.default", Input(0), specs=LIKE), 0.3, 0.21, 0, 1),
    ],
)
def test_what_is_drawn_has_its_distribution(
    found: Callable[[], torch.Tensor], mean: float, variance: float, low: float, high: float
) -> None:
    numbers = found()
    deviation = (variance / numbers.numel()) ** 0.5
    assert abs(numbers.mean().item() - mean) < 4 * deviation
    assert abs(numbers.var().item() / variance - 1) < 0.02
    assert low <= numbers.min() and numbers.max() <= high
    assert abs((numbers[:-1] - mean).mul(numbers[1:] - mean).mean().item()) < 0.02 * max(
        variance, 1
    )
