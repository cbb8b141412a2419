"""The rules of ATen's ops: ``RULES`` is the shelf, ``bound_rules`` reads it for a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache

from autopar.errors import UnsupportedModelError
from autopar.ir.graph import Operator, OperatorGraph, Role, TensorSpec
from autopar.ir.rule import BoundRule, OpRule, RuleMaker, bind
from autopar.ops import (
    attention,
    convolution,
    draws,
    elementwise,
    embedding,
    factories,
    grouped,
    indexing,
    linear,
    losses,
    normalisation,
    reductions,
    views,
)
from autopar.ops.parts import Change, changed, changes
from autopar.ops.proposals import Proposals, bind_proposal
from autopar.ops.signatures import NoRuleError

RULES: dict[str, OpRule | RuleMaker] = {
    **linear.RULES,
    **grouped.RULES,
    **attention.RULES,
    **convolution.RULES,
    **embedding.RULES,
    **normalisation.RULES,
    **losses.RULES,
    **elementwise.RULES,
    **reductions.RULES,
    **views.RULES,
    **indexing.RULES,
    **factories.RULES,
    **draws.RULES,
}
"""By op: a rule, or a function that makes it where shapes or arguments decide."""


def rule_for(
    operator: Operator,
    input_specs: tuple[TensorSpec, ...],
    output_specs: tuple[TensorSpec, ...],
) -> OpRule | None:
    """The rule of this operator; ``None`` when there is none (for this op, or these arguments)."""
    bound = _bound(operator.op, operator.arguments, operator.keywords, input_specs, output_specs)
    return None if bound is None else bound.rule


def bound_rules(graph: OperatorGraph, proposals: Proposals = ()) -> dict[str, BoundRule]:
    """By operator name; ``proposals`` are for calls that the table has no rule for.

    Raises:
        UnsupportedModelError: naming every op of the graph that has no rule.
    """
    found: dict[str, BoundRule] = {}
    missing: list[Operator] = []
    for operator in graph.operators:
        bound = bind_operator(graph, operator)
        if bound is None and proposals:
            bound = bind_proposal(graph, operator, proposals)
        if bound is None:
            missing.append(operator)
        else:
            found[operator.name] = bound
    if missing:
        raise UnsupportedModelError(complaint(missing, graph.spec))
    return with_parts(graph, found)


def with_parts(graph: OperatorGraph, rules: dict[str, BoundRule]) -> dict[str, BoundRule]:
    """The rules, with those changed that make dims of several parts, and take them apart."""
    found = changes(graph, rules)
    return with_sums(
        graph,
        {
            name: bound
            if name not in found
            else _bound_with_parts(bound.rule, found[name], bound.input_specs, bound.output_specs)
            for name, bound in rules.items()
        },
    )


def with_sums(graph: OperatorGraph, rules: dict[str, BoundRule]) -> dict[str, BoundRule]:
    """The rules, with those changed that read what was read before them, and give it another
    gradient."""
    found = dict(rules)
    given: set[str] = set()
    for operator in graph.operators:
        if not any(graph.by_name[name].differentiable for name in operator.outputs):
            continue
        added = []
        for index, name in enumerate(operator.inputs):
            tensor = graph.by_name[name]
            if tensor.differentiable and tensor.role is Role.ACTIVATION:
                added += [index] if name in given else []
                given.add(name)
        bound = rules.get(operator.name)
        if added and bound is not None:
            found[operator.name] = _bound_with_sums(
                bound.rule, tuple(added), bound.input_specs, bound.output_specs
            )
    return found


@lru_cache(maxsize=16384)
def _bound_with_sums(
    rule: OpRule,
    added: tuple[int, ...],
    input_specs: tuple[TensorSpec, ...],
    output_specs: tuple[TensorSpec, ...],
) -> BoundRule:
    """Shared by equal operators, as ``_bound`` shares ``rule``."""
    return bind(replace(rule, added=added), input_specs, output_specs)


def bind_operator(graph: OperatorGraph, operator: Operator) -> BoundRule | None:
    """The rule of an operator of ``graph`` with its sizes."""
    return _bound(
        operator.op,
        operator.arguments,
        operator.keywords,
        tuple(graph.spec(name) for name in operator.inputs),
        tuple(graph.spec(name) for name in operator.outputs),
    )


@lru_cache(maxsize=16384)
def _bound(
    op: str,
    arguments: tuple[object, ...],
    keywords: tuple[tuple[str, object], ...],
    input_specs: tuple[TensorSpec, ...],
    output_specs: tuple[TensorSpec, ...],
) -> BoundRule | None:
    """Equal operators share one bound rule: a model has few kinds and many layers."""
    found = RULES.get(op)
    if found is None:
        return None
    if isinstance(found, OpRule):
        return bind(found, input_specs, output_specs)
    operator = Operator(
        op=op,
        name=op,
        inputs=tuple(f"i{i}" for i in range(len(input_specs))),
        outputs=tuple(f"o{i}" for i in range(len(output_specs))),
        arguments=arguments,
        keywords=keywords,
    )
    try:
        return bind(found(operator, input_specs, output_specs), input_specs, output_specs)
    except NoRuleError:
        return None


@lru_cache(maxsize=16384)
def _bound_with_parts(
    rule: OpRule,
    change: Change,
    input_specs: tuple[TensorSpec, ...],
    output_specs: tuple[TensorSpec, ...],
) -> BoundRule:
    """Shared by equal operators, as ``_bound`` shares ``rule``."""
    return bind(changed(rule, change, input_specs, output_specs), input_specs, output_specs)


def complaint(missing: Iterable[Operator], spec: Callable[[str], TensorSpec]) -> str:
    """What to tell a person whose model has operators without a rule."""
    by_op: dict[str, list[Operator]] = {}
    for operator in missing:
        by_op.setdefault(operator.op, []).append(operator)
    lines = []
    for op, operators in sorted(by_op.items()):
        first = operators[0]
        specs = ", ".join(f"{spec(n).dtype}{list(spec(n).shape)}" for n in first.inputs)
        more = f" and {len(operators) - 1} more" if len(operators) > 1 else ""
        lines.append(f"  {op}({specs}) in {first.module or 'the model'}{more}")
    return (
        f"{len(by_op)} ops have no rule that says how they can be split:\n"
        + "\n".join(lines)
        + "\nlet --propose (in Python: propose=True) find rules by trying, write them in terms of "
        "other ops, or add a rule to a file in autopar/ops"
    )


__all__ = [
    "RULES",
    "Proposals",
    "bind_operator",
    "bound_rules",
    "complaint",
    "rule_for",
    "with_parts",
]
