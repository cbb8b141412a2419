"""Rules that were found by trying: which call they are for."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from autopar.ir.graph import Argument, Dtype, Input, Operator, OperatorGraph, TensorSpec
from autopar.ir.rule import BoundRule, OpRule, bind

Proposals = tuple[tuple[str, OpRule], ...]
"""(call, rule) pairs, as a plan keeps them."""


def call_key(operator: Operator, input_specs: tuple[TensorSpec, ...]) -> str:
    """The op with its arguments written out; equal calls behave alike.

    >>> softmax = Operator("s", "aten.softmax.int", ("x",), ("y",), (Input(0), -1))
    >>> call_key(softmax, (TensorSpec((4, 8), "float32"),))
    'aten.softmax.int(float32[4, 8], -1)'
    """

    def text(argument: Argument) -> str:
        match argument:
            case Input(index):
                spec = input_specs[index]
                return f"{spec.dtype}{list(spec.shape)}"
            case Dtype(name):
                return name
            case tuple():
                return f"[{', '.join(map(text, argument))}]"
            case _:
                return repr(argument)

    words = [*map(text, operator.arguments), *(f"{k}={text(v)}" for k, v in operator.keywords)]
    return f"{operator.op}({', '.join(words)})"


def bind_proposal(
    graph: OperatorGraph, operator: Operator, proposals: Iterable[tuple[str, OpRule]]
) -> BoundRule | None:
    """The proposed rule of this call with its sizes, if there is one."""
    inputs = tuple(graph.spec(name) for name in operator.inputs)
    outputs = tuple(graph.spec(name) for name in operator.outputs)
    rule = dict(proposals).get(call_key(operator, inputs))
    return None if rule is None else _bound(rule, inputs, outputs)


@lru_cache(maxsize=16384)
def _bound(
    rule: OpRule, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> BoundRule:
    """One for equal calls, as those of the table have: what is priced is kept by it."""
    return bind(rule, inputs, outputs)
