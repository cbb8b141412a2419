"""Rules proposed by trying: what is found, what is refused, and what is kept."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from autopar.errors import UnsupportedModelError
from autopar.extractor import extract
from autopar.ir.graph import Dtype, Input, Operator, TensorSpec
from autopar.ir.plan import rule_from_json, rule_to_json
from autopar.ir.rule import BoundRule, bind
from autopar.ops import RULES, bound_rules, rule_for
from autopar.runtime import discovery
from autopar.runtime.discovery import explore, propose, rules_with_proposals
from tests.unit.ops.examples import EXAMPLES, Example

WITHOUT_SCALING = {
    "aten.linear.default",
    "aten.addmm.default",
    "aten.bmm.default",
    "aten.softmax.int",
    "aten.amax.default",
    "aten.cumsum.default",
    "aten.mul.Tensor",
    "aten.add.Tensor",
    "aten.any.dim",
    "aten.layer_norm.default",
    "aten.transpose.int",
    "aten.cat.default",
    "aten.max_pool2d.default",
    "aten.sum.dim_IntList",
}
"""Ops whose every split needs nothing but the plain op, so that trying can find them all."""


def placements(bound: BoundRule) -> set[object]:
    return {bound.placements(factor) for factor in bound.factors}


def hand_written(example: Example) -> BoundRule:
    rule = rule_for(example.operator, example.input_specs, example.output_specs)
    assert rule is not None
    return bind(rule, example.input_specs, example.output_specs)


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.op in WITHOUT_SCALING], ids=str)
def test_what_is_proposed_has_every_split_of_the_hand_written_rule(example: Example) -> None:
    rule = explore(example.operator, example.input_specs, example.output_specs)
    assert rule is not None
    assert rule.proposed
    found = bind(rule, example.input_specs, example.output_specs)
    expected = hand_written(example)
    assert placements(found) >= placements(expected), (rule.signature, expected.rule.signature)
    assert rule.linear or not expected.rule.linear
    assert rule.kind == expected.rule.kind or expected.rule.kind == "view"


def operator(op: str, *arguments: object, outputs: int = 1) -> Operator:
    count = sum(isinstance(a, Input) for a in arguments)
    return Operator(
        op,
        op,
        tuple(f"i{i}" for i in range(count)),
        tuple(f"o{i}" for i in range(outputs)),
        arguments,
    )


def test_large_shapes_are_tried_small() -> None:
    x, w = TensorSpec((64, 8192, 4096), "bfloat16"), TensorSpec((14336, 4096), "bfloat16")
    y = TensorSpec((64, 8192, 14336), "bfloat16")
    rule = explore(operator("aten.linear.default", Input(0), Input(1)), (x, w), (y,))
    assert rule is not None
    assert rule.kind == "matmul"
    assert len(bind(rule, (x, w), (y,)).factors) == 4


def test_signed_data_refuses_what_positive_data_would_accept() -> None:
    """``any`` and ``amax`` look like sums on booleans and on numbers that are never negative."""
    x, y = TensorSpec((12, 6), "float64"), TensorSpec((12,), "float64")
    rule = explore(operator("aten.amax.default", Input(0), (1,)), (x,), (y,))
    assert rule is not None
    assert [bind(rule, (x,), (y,)).placements(f) for f in bind(rule, (x,), (y,)).factors] == [
        (("S(0)",), ("S(0)",))
    ]


def test_an_op_that_differs_every_time_gets_no_rule() -> None:
    x = TensorSpec((12, 6), "float64")
    random = operator("aten.bernoulli.p", Input(0), 0.5)
    assert explore(random, (x,), (x,)) is None


def test_an_op_without_a_dim_to_split_is_still_replicated() -> None:
    x = TensorSpec((6, 6), "float64")
    rule = explore(
        operator("aten.linalg_det.default", Input(0)), (x,), (TensorSpec((), "float64"),)
    )
    assert rule is not None
    assert bind(rule, (x,), (TensorSpec((), "float64"),)).factors == ()


def test_a_proposal_is_kept_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = TensorSpec((12, 6), "float32")
    call = operator("aten.softmax.int", Input(0), -1)
    first = propose(call, (x,), (x,), cache=tmp_path)
    assert first is not None
    monkeypatch.setattr(discovery, "_in_process", None)  # would raise
    assert propose(call, (x,), (x,), cache=tmp_path) == first
    assert rule_from_json(json.loads(json.dumps(rule_to_json(first)))) == first


def test_a_broken_cache_file_is_tried_again(tmp_path: Path) -> None:
    x = TensorSpec((12, 6), "float32")
    call = operator("aten.neg.default", Input(0))
    first = propose(call, (x,), (x,), cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text("{")
    assert propose(call, (x,), (x,), cache=tmp_path) == first


def test_an_attempt_that_kills_the_process_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an illegal local shape may: here, cutting the columns."""
    tried = discovery._rebuilt

    def deadly(trial: discovery._Trial, attempt: discovery.Attempt) -> object:
        if attempt[0] == (1,):
            os.kill(os.getpid(), signal.SIGKILL)
        return tried(trial, attempt)

    monkeypatch.setattr(discovery, "_rebuilt", deadly)
    x = TensorSpec((12, 6), "float32")
    rule = propose(operator("aten.neg.default", Input(0)), (x,), (x,), cache=tmp_path)
    assert rule is not None
    bound = bind(rule, (x,), (x,))
    assert [bound.placements(f) for f in bound.factors] == [(("S(0)",), ("S(0)",))]


@torch.library.custom_op("autopar_tests::doubled_rows", mutates_args=())
def doubled_rows(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + x.flip(1)


@doubled_rows.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


doubled_rows.register_autograd(lambda ctx, gradient: gradient * 2 + gradient.flip(1))


def test_a_custom_op_of_this_process_gets_a_rule(tmp_path: Path) -> None:
    x = TensorSpec((12, 6), "float32")
    custom = operator("autopar_tests.doubled_rows.default", Input(0))
    rule = propose(custom, (x,), (x,), cache=tmp_path)
    assert rule is not None
    bound = bind(rule, (x,), (x,))
    assert [bound.placements(f) for f in bound.factors] == [(("S(0)",), ("S(0)",))]
    assert rule.linear == (0,)


def test_what_a_custom_op_does_may_change_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = TensorSpec((12, 6), "float32")
    custom = operator("autopar_tests.doubled_rows.default", Input(0))
    assert propose(custom, (x,), (x,), cache=tmp_path) is not None
    monkeypatch.setattr(discovery, "_in_process", lambda *_: None)
    assert propose(custom, (x,), (x,), cache=tmp_path) is None


class Unusual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.special.i0e(x @ self.weight)
        return torch.renorm(hidden, 2.0, 0, 1.0).square().mean()


def test_a_model_with_unknown_ops_gets_proposals_or_a_list_of_all_that_lack_a_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery.platformdirs, "user_cache_dir", lambda _: str(tmp_path))
    graph = extract(Unusual(), (torch.randn(4, 6),))
    with pytest.raises(UnsupportedModelError, match=r"special_i0e[\s\S]*renorm|renorm[\s\S]*i0e"):
        bound_rules(graph)
    rules, proposals = rules_with_proposals(graph)
    assert set(rules) == {o.name for o in graph.operators}
    assert {key.partition("(")[0] for key, _ in proposals} == {
        o.op for o in graph.operators if o.op not in RULES
    }
    assert {name: b.rule for name, b in bound_rules(graph, proposals).items()} == {
        name: b.rule for name, b in rules.items()
    }


def test_what_is_tried_is_float64() -> None:
    x, y = TensorSpec((4, 6), "float32"), TensorSpec((4, 6), "bfloat16")
    call = Operator(
        "c", "aten._to_copy.default", ("i0",), ("o0",), (Input(0),), (("dtype", Dtype("bfloat16")),)
    )
    rule = explore(call, (x,), (y,))
    assert rule is not None
    assert len(bind(rule, (x,), (y,)).factors) == 2
