"""What the operators of a strategy take on a device, and what their hosts take to launch them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from itertools import groupby
from operator import itemgetter

from autopar.ir.graph import Operator, OperatorGraph
from autopar.ir.rule import Split
from autopar.ir.strategy import Strategy
from autopar.simulator.costs import Costs
from autopar.simulator.edges import Rules, carries_gradient
from autopar.simulator.folding import Folded
from autopar.simulator.recomputation import Recomputation


def operators_time_s(
    seen: Folded, rules: Rules, strategy: Strategy, costs: Costs, again: Recomputation
) -> tuple[float, float]:
    """Compute of all operators, forward and backward; what is run again is a part of the
    backward."""
    forward_s = backward_s = 0.0
    for operator in seen.graph.operators:
        name = operator.name
        forward, backward = operator_time_s(seen.graph, rules, strategy, costs, operator)
        if name in again.again:
            backward += forward
        forward_s += forward * seen.weight[name]
        backward_s += backward * seen.weight[name]
    return forward_s, backward_s


def operator_time_s(
    graph: OperatorGraph, rules: Rules, strategy: Strategy, costs: Costs, operator: Operator
) -> tuple[float, float]:
    name = operator.name
    return costs.operator_s(rules[name], strategy.splits[name], wants_gradients(graph, operator))


def wants_gradients(graph: OperatorGraph, operator: Operator) -> tuple[bool, ...]:
    """Which of its inputs its backward gives gradients of."""
    differentiable, made = graph.differentiable[operator.name]
    return differentiable if any(made) else (False,) * len(differentiable)


def launches_s(
    graph: OperatorGraph,
    rules: Rules,
    costs: Costs,
    weight: Mapping[str, int],
    splits: Mapping[str, Split] | None = None,
    again: Container[str] = (),
) -> float:
    """What hosts that go ahead take for a microbatch; without ``splits``, what they take at least.
    ``weight``: of each operator, how many there are; ``again``: those that are run twice."""
    if not costs.host_ahead.ahead:
        return 0.0
    total_s = 2 * costs.host_ahead.pass_s
    for operator in graph.operators:
        name = operator.name
        split = None if splits is None else splits[name]
        forward_s, backward_s = costs.launches_s(
            rules[name], wants_gradients(graph, operator), split
        )
        total_s += weight[name] * (forward_s * (1 + (name in again)) + backward_s)
    return total_s


def launched_passes_s(
    graph: OperatorGraph,
    rules: Rules,
    strategy: Strategy,
    costs: Costs,
    weight: Mapping[str, int],
    again: Recomputation,
) -> tuple[float, float]:
    """How long a microbatch's forward and backward take as far as a host decides it that waits for
    its device after each: what it takes for all kernels, and how far the device is behind it then.
    A kernel does not begin before it is launched, so that a long one at the end (a head, its loss)
    is not done beside those before."""
    forward_s = backward_s = costs.host_ahead.pass_s
    more: list[tuple[bool, float]] = []
    more_back: list[tuple[bool, float]] = []
    for operator in graph.operators:
        name, count = operator.name, weight[operator.name]
        split = strategy.splits[name]
        there_s, back_s = costs.launches_s(rules[name], wants_gradients(graph, operator), split)
        busy_s, busy_back_s = operator_time_s(graph, rules, strategy, costs, operator)
        if name in again.again:
            back_s += there_s
            busy_back_s += busy_s
        forward_s += there_s * count
        backward_s += back_s * count
        more.append((count > 1, (busy_s - there_s) * count))
        more_back.append((count > 1, (busy_back_s - back_s) * count))
    return forward_s + _lag_s(more), backward_s + _lag_s(reversed(more_back))


def _lag_s(parts: Iterable[tuple[bool, float]]) -> float:
    """How far behind its host a device is after ``parts``, which each keep it so much longer than
    the host; those that are said to be of folded blocks count together.

    >>> _lag_s([(False, 3.0), (False, -5.0), (False, 2.0)]), _lag_s([(True, 9.0), (True, -4.0)])
    (2.0, 5.0)
    """
    found = 0.0
    for folded, group in groupby(parts, key=itemgetter(0)):
        each = [more_s for _, more_s in group]
        for more_s in [sum(each)] if folded else each:
            found = max(0.0, found + more_s)
    return found


def are_inputs(graph: OperatorGraph, operator: Operator) -> tuple[bool, ...]:
    """Which of what it reads needs a gradient and is no parameter."""
    flows, weighs = graph.differentiable[operator.name][0], graph.weighing[operator.name]
    return tuple(flow and not is_one for flow, is_one in zip(flows, weighs, strict=True))


def are_parameters(graph: OperatorGraph, operator: Operator) -> tuple[bool, ...]:
    flows, weighs = graph.differentiable[operator.name][0], graph.weighing[operator.name]
    return tuple(flow and is_one for flow, is_one in zip(flows, weighs, strict=True))


def has_both_gradients(graph: OperatorGraph, operator: Operator) -> bool:
    return (
        carries_gradient(graph, operator)
        and any(are_inputs(graph, operator))
        and any(are_parameters(graph, operator))
    )
