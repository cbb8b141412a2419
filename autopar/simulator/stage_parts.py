"""One stage of several: its parts of a step, from the same prices as a whole one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import Literal

from autopar.ir.graph import Operator
from autopar.ir.simulation import PromisedCollective
from autopar.simulator.beside_products import BesideProducts
from autopar.simulator.costs import Costs, EdgePrice, OperatorPrice, ParameterPrice, inner_transfers
from autopar.simulator.edges import (
    Edge,
    ParameterEdge,
    carries_gradient,
    edges,
    parameter_edges,
    saves_input,
    stored_alike,
)
from autopar.simulator.memory import local_bytes
from autopar.simulator.operator_times import (
    are_inputs,
    are_parameters,
    awaited,
    has_both_gradients,
    launched_passes_s,
    wants_gradients,
)
from autopar.simulator.overlap import NOTHING_AT_ONCE, Overlap, Streams, moved_s, sent_s
from autopar.simulator.recomputation import Recomputation, recomputation
from autopar.simulator.redistribution import Transfer, transfers
from autopar.simulator.stages import StagePart
from autopar.simulator.updates import (
    added_in_products,
    optimizer_time_s,
    parameter_moves_s,
    sum_of_s,
)
from cost_models.interface import slowdown_of

Phase = Literal["forward", "backward", "step"]


@dataclass(frozen=True, slots=True)
class StageParts:
    """What a stage costs: seconds of one microbatch, and of a step where that is said.

    ``input_*`` and ``weight_*``: of the backward, what gives the gradients of its inputs, and what
    those of its parameters. ``reduction_s``, ``optimizer_s``, ``refresh_s``: of a step: gradients
    on their way to the optimizer's shards, the update, and parameters on their way back.
    ``launches_s``: of hosts that go ahead, for a microbatch. ``collectives``: those of one
    microbatch, and in the phase ``step`` those of a step.
    """

    forward_compute_s: float
    forward_communication_s: float
    input_compute_s: float
    input_communication_s: float
    weight_compute_s: float
    weight_communication_s: float
    reduction_s: float
    optimizer_s: float
    refresh_s: float
    launches_s: float
    collectives: tuple[PromisedCollective, ...]

    @property
    def backward_compute_s(self) -> float:
        return self.input_compute_s + self.weight_compute_s

    @property
    def backward_communication_s(self) -> float:
        return self.input_communication_s + self.weight_communication_s

    def __add__(self, other: StageParts) -> StageParts:
        pairs = zip(_values(self), _values(other), strict=True)
        return StageParts(*(a + b for a, b in pairs))


_values = attrgetter(*(one.name for one in fields(StageParts)))


def stage_parts(
    part: StagePart,
    costs: Costs,
    *,
    parted: bool = False,
    handed_on: frozenset[str] = frozenset(),
    overlap: Overlap = NOTHING_AT_ONCE,
) -> StageParts:
    """One stage of several, from the same prices as ``evaluate``; the norm of gradients is left to
    those who know all stages. ``parted``: its backwards are ``I`` and ``W``. ``handed_on``: what
    arrives in the memory of its own devices, without a message. ``overlap``: as for ``evaluate``;
    parameters that are gathered ahead are not, and what is done in both parts of a backward is not
    hidden."""
    of = part.graph, part.division.rules, part.strategy
    again = recomputation(*of)
    run_again = again.to_the_end() if overlap.to_the_end else again
    used = tuple(parameter_edges(*of, again.again))
    found = (
        operator_parts(part, costs, handed_on)
        + again_parts(part, run_again, costs)
        + parameter_parts(part, used, costs, overlap)
    )
    if parted:
        found += later_parts(part, costs) + twice_parts(part, used, costs)
    if (overlap.sums or overlap.in_pieces) and not parted:
        found = _beside_products(part, found, again, costs, overlap)
    if overlap.experts and not parted:
        found = _beside_other_microbatches(found, overlap.experts)
    if overlap.replicas:
        found = _beside_passes(found, costs, overlap.replicas)
    reads = costs.host_ahead.ahead and bool(awaited(part.graph, part.division.rules))
    waits = overlap.host_waits or reads
    return _host_waiting(part, found, run_again, costs) if waits else found


def _beside_products(
    part: StagePart, found: StageParts, again: Recomputation, costs: Costs, overlap: Overlap
) -> StageParts:
    graph, rules, strategy = part.graph, part.division.rules, part.strategy
    remade = {version for segment in again.segments for version, _ in segment.remade}
    activations = [(edge, 1) for edge in edges(graph, rules, strategy, part.ends, part.given)]
    repeated = [(edge, 1) for edge, _ in activations if (edge.tensor, edge.target) in remade]
    beside = BesideProducts(graph, rules, strategy, costs, overlap, frozenset(again.again))
    forward_s, backward_s = beside.hidden_s(activations, repeated)
    return replace(
        found,
        forward_communication_s=found.forward_communication_s - forward_s,
        input_communication_s=found.input_communication_s - backward_s,
    )


def _beside_other_microbatches(found: StageParts, share: float) -> StageParts:
    there_s, back_s = (
        share * sent_s(found.collectives, phase) for phase in ("forward", "backward")
    )
    return replace(
        found,
        forward_communication_s=found.forward_communication_s - there_s,
        input_communication_s=found.input_communication_s - back_s,
    )


def _beside_passes(found: StageParts, costs: Costs, passes: int) -> StageParts:
    """Reductions of a step, and what follows its update, beside so many passes."""
    streams = Streams(slowdown_of(costs.cost_model))
    forward_s = passes * (found.forward_compute_s + found.forward_communication_s)
    backward_s = passes * (found.backward_compute_s + found.backward_communication_s)
    return replace(
        found,
        reduction_s=streams.exposed_s(backward_s, found.reduction_s),
        refresh_s=streams.exposed_s(forward_s, found.refresh_s),
    )


def _host_waiting(
    part: StagePart, found: StageParts, again: Recomputation, costs: Costs
) -> StageParts:
    """Of a host that is ahead within a pass only."""
    graph, once = part.graph, {operator.name: 1 for operator in part.graph.operators}
    of = graph, part.division.rules, part.strategy, costs, once, again
    forward_s, backward_s = launched_passes_s(*of, found.forward_communication_s)
    busy_s = found.forward_compute_s + found.forward_communication_s
    busy_back_s = found.backward_compute_s + found.backward_communication_s
    return replace(
        found,
        forward_compute_s=found.forward_compute_s + max(0.0, forward_s - busy_s),
        input_compute_s=found.input_compute_s + max(0.0, backward_s - busy_back_s),
        launches_s=0.0,
    )


def operator_parts(
    part: StagePart,
    costs: Costs,
    handed_on: frozenset[str] = frozenset(),
    *,
    listed: bool = True,
) -> StageParts:
    """Of that, what does not depend on storages and recomputation: operators once, what is between
    them, and messages. ``listed``: with the list of collectives, not only their seconds."""
    graph, rules, found = part.graph, part.division.rules, _Sums(costs, listed)
    messages_s, answers_s = (
        sum(costs.host.message_s + costs.host.message_byte_s * size for size in sizes)
        for sizes in _messages(part, handed_on)
    )
    pass_s = costs.host.pass_s
    forward_s, input_s, weight_s = pass_s + messages_s, pass_s + answers_s, 0.0
    launched_s = 2 * costs.host_ahead.pass_s
    for operator in graph.operators:
        of, name = _operator_price(part, operator, costs), operator.name
        launched_s += sum(of.launches_s)
        forward_s += of.forward_s
        input_s += of.input_s
        weight_s += of.weight_s
        if of.there:
            found.add(of.there, "forward", name)
        if of.back:
            found.add(of.back, "backward", name)
    for edge in edges(graph, rules, part.strategy, part.ends, part.given):
        between = _edge_price(edge, costs)
        found.add(between.there, "forward", edge.tensor)
        found.add(between.back, "backward", edge.tensor)
        forward_s += between.there_s
        input_s += between.back_s
    return found.parts(
        forward_s=forward_s, input_s=input_s, weight_s=weight_s, launches_s=launched_s
    )


def _operator_price(part: StagePart, operator: Operator, costs: Costs) -> OperatorPrice:
    name, graph = operator.name, part.graph
    bound, split = part.division.rules[name], part.strategy.splits[name]
    key = id(bound), split, graph.differentiable[name], graph.weighing[name]
    found = costs.operators.get(key)
    if found is None:
        found = costs.operators[key] = _priced_operator(part, operator, costs)
    return found


def _priced_operator(part: StagePart, operator: Operator, costs: Costs) -> OperatorPrice:
    name, graph = operator.name, part.graph
    bound, split = part.division.rules[name], part.strategy.splits[name]
    wanted = wants_gradients(graph, operator)
    forward_s, back_s = costs.operator_s(bound, split, wanted)
    there = inner_transfers(bound, split, costs.mesh, "forward")
    launched_s = costs.launches_s(bound, wanted, split)
    if not carries_gradient(graph, operator):
        return OperatorPrice(forward_s, 0.0, 0.0, 0.0, there, (), launched_s)
    back = inner_transfers(bound, split, costs.mesh, "backward")
    inputs_s = costs.operator_s(bound, split, are_inputs(graph, operator))[1]
    weights_s = back_s - inputs_s
    parameters = are_parameters(graph, operator)
    later_s = -weights_s
    if any(parameters):
        later_s += costs.operator_s(bound, split, parameters)[1] + costs.host.part_s
    return OperatorPrice(forward_s, inputs_s, weights_s, later_s, there, back, launched_s)


def _edge_price(edge: Edge, costs: Costs) -> EdgePrice:
    key = edge.spec, edge.source, edge.target, edge.backward
    found = costs.activations.get(key)
    if found is None:
        sides = edge.spec, edge.source, edge.target
        there_s = costs.moves_s(*sides, backward=False)
        back_s = costs.moves_s(*sides, backward=True) if edge.backward else 0.0
        found = EdgePrice(*edge.transfers(costs.mesh), there_s, back_s)
        costs.activations[key] = found
    return found


def again_parts(
    part: StagePart, again: Recomputation, costs: Costs, *, listed: bool = True
) -> StageParts:
    """Of that, what is run again, for the gradients of inputs."""
    found, input_s, launched_s = _Sums(costs, listed), 0.0, 0.0
    graph, mesh = part.graph, part.mesh
    for name in again.again:
        of = _operator_price(part, graph.operator[name], costs)
        input_s += of.forward_s
        launched_s += of.launches_s[0]
        found.add(of.there, "backward", name)
    for segment in again.segments:
        for (name, target), source in segment.remade:
            spec = graph.spec(name)
            found.add(transfers(source, target, spec.bytes, mesh), "backward", name)
            input_s += costs.moves_s(spec, source, target, backward=False)
    return found.parts(input_s=input_s, launches_s=launched_s)


def parameter_parts(
    part: StagePart,
    used: Iterable[ParameterEdge],
    costs: Costs,
    overlap: Overlap = NOTHING_AT_ONCE,
    *,
    listed: bool = True,
) -> StageParts:
    """Of that, what parameters cost on their way to operators, their gradients on the way back,
    and the update. ``used``: the edges of the part's parameters."""
    found = _Sums(costs, listed)
    graph, mesh, training = part.graph, part.mesh, part.strategy.training
    forward_s = weight_s = reduction_s = optimizer_s = 0.0
    reduced: list[tuple[Transfer, int]] = []
    refreshed: list[tuple[Transfer, int]] = []
    for edge in used:
        name, price = edge.parameter, _parameter_price(edge, costs)
        forward_s += price.there_s
        if not added_in_products(edge, part.division.rules, overlap):
            weight_s += sum_of_s(edge, part.division.count, costs)
        found.add(price.there, "forward", name)
        found.add(price.there, "backward", name, times=len(edge.regathered))
        if edge.per_step:
            reduction_s += price.back_s
            reduced += [(transfer, 1) for transfer in price.back]
            found.add(price.back, "step", name)
        else:
            weight_s += price.back_s
            found.add(price.back, "backward", name, of_weights=True)
    for tensor, storage, count in stored_alike(graph, part.strategy):
        if tensor.differentiable:
            sides = storage.optimizer, storage.parameter
            of = tensor.spec, storage, training, costs, overlap
            optimizer_s += optimizer_time_s(*of) * count
            moved = transfers(*sides, tensor.spec.bytes, mesh)
            refreshed += [(transfer, count) for transfer in moved]
            found.add(moved, "step", tensor.name, times=count)
    return found.parts(
        forward_s=forward_s,
        weight_s=weight_s,
        reduction_s=reduction_s + moved_s(reduced, costs, together=overlap.together),
        optimizer_s=optimizer_s,
        refresh_s=moved_s(refreshed, costs, together=overlap.together),
    )


def _parameter_price(edge: ParameterEdge, costs: Costs) -> ParameterPrice:
    key = edge.spec, edge.storage, edge.target, edge.trainable
    found = costs.parameters.get(key)
    if found is None:
        there, back = edge.forward_transfers(costs.mesh), edge.backward_transfers(costs.mesh)
        found = ParameterPrice(there, back, *parameter_moves_s(edge, costs))
        costs.parameters[key] = found
    return found


def _messages(part: StagePart, handed_on: frozenset[str]) -> tuple[list[int], list[int]]:
    """Bytes of each that the forward of a microbatch takes and sends, and of each of its backward:
    what a device has of it on this side."""
    by_name, mesh = part.graph.by_name, part.mesh
    taken = {
        name: local_bytes(by_name[name].spec, sharding, mesh)
        for name, sharding in part.given.items()
        if name not in handed_on
    }
    sent = {
        name: local_bytes(by_name[name].spec, sharding, mesh)
        for name, sharding in part.ends.items()
        if name != part.graph.loss
    }
    there = [size for name, size in sent.items() for _ in range(part.returns.get(name, 1))]
    back = [size for name, size in sent.items() for _ in range(part.returns.get(name, 0))]
    given_back = [size for name, size in taken.items() if by_name[name].differentiable]
    return [*taken.values(), *there], [*given_back, *back]


def later_parts(part: StagePart, costs: Costs) -> StageParts:
    """What gradients of parameters take more where they are asked for later than those of inputs:
    each operator is asked by itself, and what one kernel would read for both is read again."""
    of_each = (_operator_price(part, one, costs).later_s for one in part.graph.operators)
    return _Sums(costs).parts(weight_s=sum(of_each))


def twice_parts(
    part: StagePart, used: Iterable[ParameterEdge], costs: Costs, *, listed: bool = True
) -> StageParts:
    """What a backward in two parts does once more: an operator that gives gradients of inputs and
    of parameters communicates in both, and gathers parameters again in both (not those that are
    gathered only to run it again)."""
    found = _Sums(costs, listed)
    graph, rules, mesh = part.graph, part.division.rules, part.mesh
    for operator in graph.operators:
        name = operator.name
        inner = inner_transfers(rules[name], part.strategy.splits[name], mesh, "backward")
        if inner and has_both_gradients(graph, operator):
            found.add(inner, "backward", name, of_weights=True)
    for edge in used:
        there = _parameter_price(edge, costs).there
        times = sum(_needs_twice(part, edge, name) for name in edge.regathered) if there else 0
        found.add(there, "backward", edge.parameter, times=times, of_weights=True)
    return found.parts(weight_s=costs.host.pass_s)


def _needs_twice(part: StagePart, edge: ParameterEdge, reader: str) -> bool:
    graph, operator = part.graph, part.graph.operator[reader]
    return has_both_gradients(graph, operator) and any(
        name == edge.parameter and saves_input(graph, operator, part.division.rules[reader], i)
        for i, name in enumerate(operator.inputs)
    )


class _Sums:
    """Collectives of a stage, if they are ``listed``, and their seconds by phase."""

    def __init__(self, costs: Costs, listed: bool = True) -> None:
        self.costs, self.listed = costs, listed
        self.forward_s = self.input_s = self.weight_s = 0.0
        self.collectives: list[PromisedCollective] = []

    def add(
        self,
        of: Iterable[Transfer],
        phase: Phase,
        reason: str,
        *,
        times: int = 1,
        of_weights: bool = False,
    ) -> None:
        """An axis of one rank communicates nothing."""
        mesh = self.costs.mesh
        for transfer in of if times else ():
            if mesh.sizes[transfer.axis] == 1:
                continue
            time_s = self.costs.transfer_s(transfer)
            if phase == "forward":
                self.forward_s += time_s * times
            elif phase == "backward" and of_weights:
                self.weight_s += time_s * times
            elif phase == "backward":
                self.input_s += time_s * times
            if self.listed:
                name, size = mesh.names[transfer.axis], transfer.bytes
                one = PromisedCollective(transfer.kind, phase, name, size, times, reason, time_s)
                self.collectives.append(one)

    def parts(
        self,
        *,
        forward_s: float = 0.0,
        input_s: float = 0.0,
        weight_s: float = 0.0,
        reduction_s: float = 0.0,
        optimizer_s: float = 0.0,
        refresh_s: float = 0.0,
        launches_s: float = 0.0,
    ) -> StageParts:
        return StageParts(
            forward_compute_s=forward_s,
            forward_communication_s=self.forward_s,
            input_compute_s=input_s,
            input_communication_s=self.input_s,
            weight_compute_s=weight_s,
            weight_communication_s=self.weight_s,
            reduction_s=reduction_s,
            optimizer_s=optimizer_s,
            refresh_s=refresh_s,
            launches_s=launches_s,
            collectives=tuple(self.collectives),
        )
