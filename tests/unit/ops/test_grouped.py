"""Products with one matrix of several for each row: what torch computes, and what they cost."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from autopar.ir.graph import Input, Operator, TensorSpec
from autopar.ir.rule import BoundRule, bind
from autopar.ir.sharding import Mesh
from autopar.ops import rule_for
from autopar.ops.grouped import GATHER_BMM
from autopar.runtime import grouped
from autopar.runtime.grouped import GROUPED, grouped_rows
from autopar.runtime.rule_check import Group, RankContext
from autopar.simulator.costs import work

ROWS, EXPERTS, WIDE, NARROW = 24, 4, 16, 8
ONE = Mesh(())
GROUPED_MM = "aten._grouped_mm.default"


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def with_gradients(out: Tensor, *inputs: Tensor) -> list[Tensor]:
    weight = torch.arange(out.numel(), dtype=out.dtype).reshape(out.shape).cos()
    return [out, *torch.autograd.grad(out, inputs, weight)]


def gather_bmm(a: Tensor, b: Tensor, index: Tensor, table: int) -> Tensor:
    found: Tensor = torch.ops.autopar.gather_bmm(a, b, index, table)
    return found


@pytest.mark.parametrize("table", [0, 1])
def test_a_row_is_multiplied_with_the_matrix_that_its_index_names(table: int) -> None:
    torch.manual_seed(table)
    index = torch.randint(-EXPERTS, EXPERTS - 1, (ROWS,))  # one is never asked for
    if table:
        a, b = leaves((ROWS, 1, WIDE), (EXPERTS, WIDE, NARROW))
        expected = torch.bmm(a, b[index])
    else:
        a, b = leaves((EXPERTS, NARROW, WIDE), (ROWS, WIDE, 1))
        expected = torch.bmm(a[index], b)
    ours = with_gradients(gather_bmm(a, b, index, table), a, b)
    assert_close(ours, with_gradients(expected, a, b))


@pytest.mark.parametrize("index", [EXPERTS, -EXPERTS - 1])
def test_an_index_that_no_matrix_has_is_an_error_as_in_torch(index: int) -> None:
    a, b = leaves((1, 1, WIDE), (EXPERTS, WIDE, NARROW))
    with pytest.raises(RuntimeError, match="index out of range: there are 4 matrices"):
        gather_bmm(a, b, torch.tensor([index]), 1)


SHAPES = [
    ((ROWS, WIDE), (EXPERTS, WIDE, NARROW)),
    ((EXPERTS, NARROW, WIDE), (WIDE, ROWS)),
    ((WIDE, ROWS), (ROWS, NARROW)),
    ((EXPERTS, NARROW, WIDE), (EXPERTS, WIDE, NARROW)),
]


def bound_for(op: str, tensors: list[Tensor], out: Tensor, *constants: int) -> BoundRule:
    specs = [TensorSpec(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in tensors]
    made = (TensorSpec(tuple(out.shape), specs[0].dtype),)
    names = tuple(f"i{i}" for i in range(len(tensors)))
    arguments = (*(Input(i) for i in range(len(tensors))), *constants)
    operator = Operator(op, op, names, ("o0",), arguments)
    rule = rule_for(operator, tuple(specs), made)
    assert rule is not None
    return bind(rule, tuple(specs), made)


@pytest.mark.parametrize(("first", "second"), SHAPES)
def test_groups_are_multiplied_as_torch_does(
    first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    a, b = leaves(first, second)
    ends = torch.tensor([5, 5, 20, ROWS], dtype=torch.int32)
    given = [a, b] if len(first) == len(second) == 3 else [a, b, ends]
    expected = torch._grouped_mm(*given)
    bound = bound_for(GROUPED_MM, given, expected)
    operator = Operator(GROUPED_MM, GROUPED_MM, ("a", "b"), ("c",))
    context = RankContext(bound, (), ONE, 0, Group(ONE))
    ours = GROUPED[GROUPED_MM](context, operator, given, {})
    assert_close(with_gradients(ours, a, b), with_gradients(expected, a, b))


def test_rows_of_no_group_give_zeros_and_any_width_will_do() -> None:
    x, matrices = torch.randn(7, 3), torch.randn(2, 3, 5)
    ends = torch.tensor([2, 5], dtype=torch.int32)
    found = grouped_rows(x, matrices, ends)
    for i, (start, stop) in enumerate(pairwise((0, 2, 5))):
        assert_close(found[start:stop], x[start:stop] @ matrices[i])
    assert not found[5:].any()


def by_kernel(*factors: Tensor) -> bool:
    """What a GPU's kernel takes, which torch's of a processor takes, too."""
    return all(
        x.data_ptr() % 16 == 0
        and 1 in x.stride()[-2:]
        and all(s == 1 or s * x.element_size() % 16 == 0 for s in x.stride())
        for x in factors
    )


@pytest.mark.parametrize("table", [0, 1])
def test_one_kernel_for_all_groups_gives_what_one_for_each_gives(
    table: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(table)
    index = torch.randint(0, EXPERTS, (ROWS,))
    a, b = (
        leaves((ROWS, 1, WIDE), (EXPERTS, WIDE, NARROW))
        if table
        else leaves((EXPERTS, NARROW, WIDE), (ROWS, WIDE, 1))
    )
    whole = gather_bmm(a, b, index, table)
    bound = bound_for(GATHER_BMM, [a, b, index], whole, table)
    operator = Operator(GATHER_BMM, GATHER_BMM, ("a", "b", "index"), ("c",))
    expected = with_gradients(whole, a, b)
    monkeypatch.setattr(grouped, "_has_kernel", by_kernel)
    assert_close(with_gradients(gather_bmm(a, b, index, table), a, b), expected)
    mesh, half = Mesh((("experts", 2),)), EXPERTS // 2
    group, parts = Group(mesh), []
    for rank in range(2):
        context = RankContext(bound, ("experts",), mesh, rank, group)
        own = slice(rank * half, (rank + 1) * half)
        given = (a, b[own], index, table) if table else (a[own], b, index, table)
        parts.append(GROUPED[GATHER_BMM](context, operator, given, {}))
    assert_close(with_gradients(parts[0] + parts[1], a, b), expected)


# --- what they cost ------------------------------------------------------------------------------


def flops(bound: BoundRule, *split: str, wanted: tuple[bool, ...] = (True, True, False)) -> float:
    mesh = Mesh(tuple((f"axis{i}", 2) for i in range(len(split))))
    forward, backward = work(bound, split, mesh, wanted)
    return sum(one.flops for one in (*forward, *backward))


def routed(experts: int) -> BoundRule:
    a, b = torch.empty(64, 1, WIDE), torch.empty(experts, WIDE, NARROW)
    index = torch.zeros(64, dtype=torch.int64)
    return bound_for(GATHER_BMM, [a, b, index], torch.empty(64, 1, NARROW), 1)


def in_groups(experts: int) -> BoundRule:
    a, b = torch.empty(64, WIDE), torch.empty(experts, WIDE, NARROW)
    ends = torch.zeros(experts, dtype=torch.int32)
    return bound_for(GROUPED_MM, [a, b, ends], torch.empty(64, NARROW))


@pytest.mark.parametrize("of", [routed, in_groups])
def test_a_row_costs_as_much_however_many_experts_there_are(of) -> None:  # type: ignore[no-untyped-def]
    once = 2.0 * 64 * WIDE * NARROW
    for experts in (1, 4, 16):
        assert flops(of(experts)) == 3 * once
        assert flops(of(experts), wanted=(False, True, False)) == 2 * once


@pytest.mark.parametrize("factor", ["rows", "experts", "in", "out"])
def test_half_of_the_rows_the_experts_or_a_matrix_is_half_of_the_work(factor: str) -> None:
    assert flops(routed(4), factor) == flops(routed(4)) / 2
    assert flops(routed(4), factor, factor) == flops(routed(4)) / 4
    if factor != "rows":
        factor = {"experts": "groups"}.get(factor, factor)
        assert flops(in_groups(4), factor) == flops(in_groups(4)) / 2


def test_rows_in_groups_are_not_divided_since_a_slice_begins_inside_of_one() -> None:
    assert "rows" not in in_groups(4).factors
    assert {"groups", "in", "out"} <= set(in_groups(4).factors)
