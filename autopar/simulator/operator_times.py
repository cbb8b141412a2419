"""What the operators of a strategy take on a device, and what their hosts take to launch them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

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
    moved_s: float = 0.0,
) -> tuple[float, float]:
    """How long a microbatch's forward and backward take as far as a host decides it that waits for
    its device after each, and in a forward where it has to read what was computed: what it takes
    for all kernels, and how far the device is behind it where it waits. A kernel does not begin
    before it is launched, so that a long one at the end (a head, its loss) is not done beside those
    before. ``moved_s``: communication of the forward, if the host waits in it: it is done behind
    what is read (where tokens go), and the device is busy with it."""
    forward_s = backward_s = costs.host_ahead.pass_s
    more: list[Ahead] = []
    more_back: list[Ahead] = []
    waits = sum(weight[name] for name in awaited(graph, rules))
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
        more.append(Ahead(busy_s - there_s, count))
        if rules[name].rule.awaited:
            more += [Ahead(0.0, count, awaited=True), Ahead(moved_s / waits, count)]
        more_back.append(Ahead(busy_back_s - back_s, count))
    return forward_s + lag_s(more), backward_s + lag_s(more_back[::-1])


def awaited(graph: OperatorGraph, rules: Rules) -> list[str]:
    """Operators whose result the host reads before it goes on."""
    return [operator.name for operator in graph.operators if rules[operator.name].rule.awaited]


class Ahead(NamedTuple):
    """What keeps a device longer than the host that launches it, so many ``times`` in equal blocks;
    ``awaited``: until that is done, the host waits."""

    more_s: float
    times: int = 1
    awaited: bool = False


def lag_s(parts: Iterable[Ahead]) -> float:
    """How long a host waits for its device, last at the end; those of folded blocks, of
    which there are several, count together, and where their host waits, once for each, from there
    to the same place in the next one.

    >>> lag_s([Ahead(3.0), Ahead(-5.0), Ahead(2.0)]), lag_s([Ahead(4.5, 2), Ahead(-2.0, 2)])
    (2.0, 5.0)
    >>> lag_s([Ahead(3.0), Ahead(0.0, awaited=True), Ahead(-5.0), Ahead(2.0)])
    5.0
    >>> lag_s([Ahead(2.0, 3), Ahead(0.0, 3, awaited=True), Ahead(-5.0, 3)])
    6.0
    """
    behind_s = waited_s = 0.0
    for times, group in groupby(parts, key=attrgetter("times")):
        each = list(group)
        ends = [place for place, part in enumerate(each) if part.awaited]
        if times > 1 and not ends:
            each = [Ahead(times * sum(part.more_s for part in each))]
        elif times > 1:
            last = ends[-1] + 1
            between_s, _ = _waited_s([*each[last:], *each[:last]], 0.0)
            waited_s += (times - 1) * between_s
        more_s, behind_s = _waited_s(each, behind_s)
        waited_s += more_s
    return waited_s + behind_s


def _waited_s(parts: Iterable[Ahead], behind_s: float) -> tuple[float, float]:
    """How long the host waits on the way, and how far behind it the device is in the end."""
    waited_s = 0.0
    for part in parts:
        behind_s = max(0.0, behind_s + part.more_s)
        if part.awaited:
            waited_s, behind_s = waited_s + behind_s, 0.0
    return waited_s, behind_s


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
