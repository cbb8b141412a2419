"""Every rule, run: shards joined equal the whole, forward and backward."""

from __future__ import annotations

import pytest

from autopar.ops import RULES, rule_for
from autopar.runtime.rule_check import check
from tests.unit.ops.examples import EXAMPLES, Example


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_every_split_of_every_op_equals_the_whole(example: Example) -> None:
    rule = rule_for(example.operator, example.input_specs, example.output_specs)
    assert rule is not None
    failures = check(
        example.operator,
        example.input_specs,
        example.output_specs,
        rule,
        differentiable=example.differentiable,
        draw=example.draw,
    )
    assert not failures, rule.signature + "\n" + "\n".join(map(str, failures[:8]))


def test_every_rule_has_an_example() -> None:
    assert set(RULES) - {example.op for example in EXAMPLES} == set()
