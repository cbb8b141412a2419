"""The price list: what every choice of a strategy costs, and what the whole strategy costs."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import Literal

from autopar.ir.graph import ITEM_BYTES, Operator, OperatorGraph, TensorSpec
from autopar.ir.rule import Split
from autopar.ir.sharding import Mesh, gradient, local_elements
from autopar.ir.simulation import Estimate, Memory, PromisedCollective
from autopar.ir.strategy import Storage, Strategy, Training
from autopar.simulator import one_by_one
from autopar.simulator.costs import (
    ComputeCache,
    Costs,
    EdgePrice,
    OperatorPrice,
    ParameterPrice,
    inner_transfers,
)
from autopar.simulator.edges import (
    Edge,
    ParameterEdge,
    Rules,
    carries_gradient,
    edges,
    parameter_edges,
    saves_input,
    stored_alike,
)
from autopar.simulator.folding import Folded, whole
from autopar.simulator.fragments import trapped_bytes
from autopar.simulator.memory import local_bytes, peak_memory
from autopar.simulator.overlap import (
    NOTHING_AT_ONCE,
    OneByOne,
    Overlap,
    Streams,
    ahead,
    copies_s,
    held_bytes,
    hidden,
    moved_s,
)
from autopar.simulator.recomputation import Recomputation, check_recompute, recomputation
from autopar.simulator.redistribution import Transfer, transfers
from autopar.simulator.reserved import communicators, reserved
from autopar.simulator.stages import StagePart
from cost_models.interface import CostModel, slowdown_of

Phase = Literal["forward", "backward", "step"]


def evaluate(
    graph: OperatorGraph,
    rules: Rules,
    cost_model: CostModel,
    strategy: Strategy,
    *,
    compute_cache: ComputeCache | None = None,
    folded: Folded | None = None,
    overlap: Overlap = NOTHING_AT_ONCE,
) -> Estimate:
    """Price a whole strategy, choice by choice. ``graph`` is that of one microbatch.

    Times are summed, but for what the program that runs it does at once (``overlap``): the
    communication of the estimate is then what compute does not hide of that of the promise, and
    its buffers have what is gathered ahead. A host that goes ahead of its device makes the step
    longer where it is the slower one of the two.
    ``folded``: the same graph with equal blocks left out, for strategies that treat the copies
    alike; the answer is the same, sooner.
    """
    check_recompute(graph, strategy)
    seen = whole(graph) if folded is None else folded
    again = recomputation(seen.graph, rules, strategy)
    costs = Costs(cost_model, strategy.mesh, {} if compute_cache is None else compute_cache)
    needed = _needed(seen, rules, strategy, again)
    promised = tuple(_priced(_promise(graph, seen, rules, strategy, needed), costs))
    of = _Evaluation(graph, seen, rules, strategy, costs, overlap, again, needed)
    spent = of.at_once(of.in_turn(promised))
    memory, trapped = of.memory()
    return Estimate(
        step_time_s=max(spent.devices_s, of.host_s),
        forward_compute_s=spent.forward_s,
        backward_compute_s=spent.backward_s,
        forward_communication_s=spent.moved_forward_s,
        backward_communication_s=spent.moved_backward_s,
        gradient_synchronisation_s=spent.once_s,
        optimizer_s=spent.optimizer_s,
        memory=reserved(
            memory, cost_model, communicators(strategy.mesh, 1, strategy.mesh.size), trapped
        ),
        collectives=promised,
        launches_s=max(0.0, of.host_s - spent.devices_s),
    )


@dataclass(frozen=True, slots=True)
class _Spent:
    """Seconds of a step: compute, communication of all microbatches forward and backward, that of
    once a step, and the update."""

    forward_s: float
    backward_s: float
    moved_forward_s: float
    moved_backward_s: float
    once_s: float
    optimizer_s: float

    @property
    def devices_s(self) -> float:
        return (
            self.forward_s
            + self.backward_s
            + self.optimizer_s
            + (self.moved_forward_s + self.moved_backward_s + self.once_s)
        )

    def more(
        self,
        *,
        forward_s: float = 0.0,
        backward_s: float = 0.0,
        moved_forward_s: float = 0.0,
        moved_backward_s: float = 0.0,
        once_s: float = 0.0,
    ) -> _Spent:
        return _Spent(
            self.forward_s + forward_s,
            self.backward_s + backward_s,
            self.moved_forward_s + moved_forward_s,
            self.moved_backward_s + moved_backward_s,
            self.once_s + once_s,
            self.optimizer_s,
        )


@dataclass(frozen=True)
class _Evaluation:
    """Of a strategy of one stage: what is done one after the other, and what at once."""

    graph: OperatorGraph
    seen: Folded
    rules: Rules
    strategy: Strategy
    costs: Costs
    overlap: Overlap
    again: Recomputation
    needed: Needed

    @property
    def times(self) -> int:
        return self.strategy.microbatches

    @cached_property
    def run_again(self) -> Recomputation:
        return self.again.to_the_end() if self.overlap.to_the_end else self.again

    @cached_property
    def host_s(self) -> float:
        """Of hosts that go ahead of more than a pass."""
        if self.overlap.host_waits:
            return 0.0
        seen, again = self.seen, self.run_again.again
        of = seen.graph, self.rules, self.costs, seen.weight, self.strategy.splits, again
        return self.times * launches_s(*of)

    @cached_property
    def streams(self) -> Streams:
        return Streams(slowdown_of(self.costs.cost_model))

    # ---- seconds -------------------------------------------------------------------------------

    def in_turn(self, promised: Sequence[PromisedCollective]) -> _Spent:
        """One thing after the other."""
        rules, strategy, costs, times = self.rules, self.strategy, self.costs, self.times
        forward_s, backward_s = _operators_s(self.seen, rules, strategy, costs, self.run_again)
        there_s, back_s = _local_moves_s(self.needed, strategy, costs, rules, self.overlap)
        moved = {
            phase: sum(c.time_s * c.count for c in promised if c.phase == phase)
            for phase in ("forward", "backward", "step")
        }
        return _Spent(
            times * (forward_s + there_s + costs.host.pass_s),
            times * (backward_s + back_s + costs.host.pass_s),
            moved["forward"],
            moved["backward"],
            moved["step"],
            sum(
                optimizer_time_s(tensor.spec, storage, strategy.training, costs, self.overlap)
                * count
                for tensor, storage, count in stored_alike(self.graph, strategy)
                if tensor.differentiable
            ),
        )

    def at_once(self, spent: _Spent) -> _Spent:
        """With what the program does beside something else."""
        overlap = self.overlap
        if overlap.sums or overlap.in_pieces:
            spent = self._beside_products(spent)
        if overlap.parameters:
            spent = self._parameters_ahead(spent)
        if overlap.one_by_one is not None:
            spent = self._one_by_one(spent, overlap.one_by_one)
        if overlap.together or overlap.replicas:
            spent = self._once_a_step(spent)
        return self._host_waits(spent) if overlap.host_waits else spent

    def _beside_products(self, spent: _Spent) -> _Spent:
        of = self.seen.graph, self.rules, self.strategy, self.costs, self.overlap
        beside = BesideProducts(*of, self.needed.operators)
        forward_s, backward_s = beside.hidden_s(self.needed.activations, self.needed.again)
        return spent.more(
            moved_forward_s=-self.times * forward_s, moved_backward_s=-self.times * backward_s
        )

    def _parameters_ahead(self, spent: _Spent) -> _Spent:
        parameters, costs, times = self.needed.parameters, self.costs, self.times
        plain, gathers = ahead(parameters, costs), ahead(parameters, costs, self.overlap)
        copied_s, copied_back_s = copies_s(parameters, costs, self.overlap)
        spent = spent.more(
            forward_s=times * copied_s,
            backward_s=times * copied_back_s,
            moved_forward_s=times * (gathers.forward_s - plain.forward_s),
            moved_backward_s=times * (gathers.backward_s - plain.backward_s),
            once_s=gathers.step_s - plain.step_s,
        )
        found = hidden(
            gathers,
            self.streams,
            (spent.forward_s + spent.moved_forward_s) / times - gathers.forward_s,
            (spent.backward_s + spent.moved_backward_s) / times - gathers.backward_s,
            times,
        )
        return spent.more(
            moved_forward_s=-found.forward_s,
            moved_backward_s=-found.backward_s,
            once_s=-found.step_s,
        )

    def _one_by_one(self, spent: _Spent, program: OneByOne) -> _Spent:
        seen, rules, strategy, costs = self.seen, self.rules, self.strategy, self.costs
        plain = ahead(self.needed.parameters, costs)
        seconds = {
            operator.name: _operator_s(seen.graph, rules, strategy, costs, operator)
            for operator in seen.graph.operators
        }
        waiting = one_by_one.spent(
            seen, self.needed.parameters, seconds, self.again, costs, program
        )
        forward_s, backward_s = _operators_s(seen, rules, strategy, costs, self.again)
        return spent.more(
            moved_forward_s=self.times * (waiting.forward_s - forward_s - plain.forward_s),
            moved_backward_s=self.times * (waiting.backward_s - backward_s - plain.backward_s),
            once_s=waiting.step_s,
        )

    def _once_a_step(self, spent: _Spent) -> _Spent:
        """Gradients on their way to the optimizer's shards, and parameters on their way back."""
        reduced, refreshed = self._moved_once()
        together = self.overlap.together
        reduced_s, refreshed_s = (
            moved_s(moved, self.costs, together=together) for moved in (reduced, refreshed)
        )
        if together:
            apart_s = moved_s([*reduced, *refreshed], self.costs, together=False)
            spent = spent.more(once_s=reduced_s + refreshed_s - apart_s)
        if not self.overlap.replicas:
            return spent
        share = self.overlap.replicas / self.times
        last_s = share * (spent.backward_s + spent.moved_backward_s)
        first_s = share * (spent.forward_s + spent.moved_forward_s)
        hidden_s = self.streams.hidden_s(last_s, reduced_s)
        hidden_s += self.streams.hidden_s(first_s, refreshed_s)
        return spent.more(once_s=-hidden_s)

    def _host_waits(self, spent: _Spent) -> _Spent:
        seen, times = self.seen, self.times
        of = seen.graph, self.rules, self.strategy, self.costs, seen.weight, self.run_again
        forward_s, backward_s = launched_passes_s(*of)
        return spent.more(
            forward_s=max(0.0, times * forward_s - spent.forward_s - spent.moved_forward_s),
            backward_s=max(0.0, times * backward_s - spent.backward_s - spent.moved_backward_s),
        )

    def _moved_once(self) -> tuple[list[tuple[Transfer, int]], list[tuple[Transfer, int]]]:
        mesh = self.strategy.mesh
        reduced = [
            (transfer, count)
            for edge, count in self.needed.parameters
            if edge.per_step
            for transfer in edge.backward_transfers(mesh)
        ]
        refreshed = [
            (transfer, count)
            for tensor, storage, count in stored_alike(self.graph, self.strategy)
            if tensor.differentiable
            for transfer in _refreshing(tensor.spec, storage, mesh)
        ]
        return reduced, refreshed

    # ---- bytes ---------------------------------------------------------------------------------

    def memory(self) -> tuple[Memory, int]:
        """At the peak; and what the allocator cannot use then."""
        graph, parameters, overlap = self.graph, self.needed.parameters, self.overlap
        memory, trapped = peak_memory(graph, self.rules, self.strategy, self.seen), 0
        held = 0
        if overlap.parameters:
            trapped = trapped_bytes(graph, self.rules, self.strategy, self.seen)
            held = held_bytes(graph, parameters, self.strategy.mesh, memory.gradients_bytes)
        if overlap.one_by_one is not None:
            held = one_by_one.held_bytes(parameters, overlap.one_by_one)
        return replace(memory, buffers_bytes=memory.buffers_bytes + held), trapped


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
    if overlap.replicas:
        found = _beside_passes(found, costs, overlap.replicas)
    return _host_waiting(part, found, run_again, costs) if overlap.host_waits else found


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
    forward_s, backward_s = launched_passes_s(*of)
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
    wanted = _wanted(graph, operator)
    forward_s, back_s = costs.operator_s(bound, split, wanted)
    there = inner_transfers(bound, split, costs.mesh, "forward")
    launched_s = costs.launches_s(bound, wanted, split)
    if not carries_gradient(graph, operator):
        return OperatorPrice(forward_s, 0.0, 0.0, 0.0, there, (), launched_s)
    back = inner_transfers(bound, split, costs.mesh, "backward")
    inputs_s = costs.operator_s(bound, split, _are_inputs(graph, operator))[1]
    weights_s = back_s - inputs_s
    parameters = _are_parameters(graph, operator)
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
        if not _added_in_products(edge, part.division.rules, overlap):
            weight_s += _sum_s(edge, part.division.count, costs)
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
        found = ParameterPrice(there, back, *_parameter_moves_s(edge, costs))
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
        if inner and _has_both_gradients(graph, operator):
            found.add(inner, "backward", name, of_weights=True)
    for edge in used:
        there = _parameter_price(edge, costs).there
        times = sum(_needs_twice(part, edge, name) for name in edge.regathered) if there else 0
        found.add(there, "backward", edge.parameter, times=times, of_weights=True)
    return found.parts(weight_s=costs.host.pass_s)


def _needs_twice(part: StagePart, edge: ParameterEdge, reader: str) -> bool:
    graph, operator = part.graph, part.graph.operator[reader]
    return _has_both_gradients(graph, operator) and any(
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


def _are_inputs(graph: OperatorGraph, operator: Operator) -> tuple[bool, ...]:
    """Which of what it reads needs a gradient and is no parameter."""
    flows, weighs = graph.differentiable[operator.name][0], graph.weighing[operator.name]
    return tuple(flow and not is_one for flow, is_one in zip(flows, weighs, strict=True))


def _are_parameters(graph: OperatorGraph, operator: Operator) -> tuple[bool, ...]:
    flows, weighs = graph.differentiable[operator.name][0], graph.weighing[operator.name]
    return tuple(flow and is_one for flow, is_one in zip(flows, weighs, strict=True))


def _has_both_gradients(graph: OperatorGraph, operator: Operator) -> bool:
    return (
        carries_gradient(graph, operator)
        and any(_are_inputs(graph, operator))
        and any(_are_parameters(graph, operator))
    )


def _operators_s(
    seen: Folded, rules: Rules, strategy: Strategy, costs: Costs, again: Recomputation
) -> tuple[float, float]:
    """Compute of all operators, forward and backward; what is run again is a part of the
    backward."""
    forward_s = backward_s = 0.0
    for operator in seen.graph.operators:
        name = operator.name
        forward, backward = _operator_s(seen.graph, rules, strategy, costs, operator)
        if name in again.again:
            backward += forward
        forward_s += forward * seen.weight[name]
        backward_s += backward * seen.weight[name]
    return forward_s, backward_s


def _operator_s(
    graph: OperatorGraph, rules: Rules, strategy: Strategy, costs: Costs, operator: Operator
) -> tuple[float, float]:
    name = operator.name
    return costs.operator_s(rules[name], strategy.splits[name], _wanted(graph, operator))


def _wanted(graph: OperatorGraph, operator: Operator) -> tuple[bool, ...]:
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
    total_s = 2 * costs.host_ahead.pass_s
    for operator in graph.operators:
        name = operator.name
        split = None if splits is None else splits[name]
        forward_s, backward_s = costs.launches_s(rules[name], _wanted(graph, operator), split)
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
        there_s, back_s = costs.launches_s(rules[name], _wanted(graph, operator), split)
        busy_s, busy_back_s = _operator_s(graph, rules, strategy, costs, operator)
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


@dataclass(frozen=True)
class BesideProducts:
    """What of the communication of activations products hide, in seconds of a microbatch.

    The gradient of a product's input is summed beside the product that gives the gradient of its
    weight (Megatron-LM: a column-parallel layer's all-reduce or reduce-scatter); an input that was
    not kept whole is gathered again beside the product that gives its own gradient. In pieces, what
    is gathered for a product arrives while it is at those that are there, and what is scattered
    leaves as it is made, all but the last piece; of gradients the same. ``run_again``: operators of
    which the forward is repeated in the backward.
    """

    graph: OperatorGraph
    rules: Rules
    strategy: Strategy
    costs: Costs
    overlap: Overlap
    run_again: frozenset[str]

    def hidden_s(
        self, activations: Iterable[tuple[Edge, int]], again: Iterable[tuple[Edge, int]]
    ) -> tuple[float, float]:
        """Forward and backward; ``again``: whose forward is repeated in the backward. Each with how
        many there are."""
        forward_s = backward_s = 0.0
        for edge, count in activations:
            there, back = edge.transfers(self.costs.mesh)
            forward_s += count * self._forward_s(edge, there)
            backward_s += count * self._backward_s(edge, back)
        for edge, count in again:
            backward_s += count * self._again_s(edge, edge.transfers(self.costs.mesh)[0])
        return forward_s, backward_s

    def _forward_s(self, edge: Edge, of: Sequence[Transfer]) -> float:
        if not self.overlap.in_pieces or len(of) != 1:
            return 0.0
        if of[0].kind == "all_gather":
            return self._beside_s(self._made_s(edge.consumers), of)
        if of[0].kind == "reduce_scatter":
            return self._beside_s(self._made_s(self._makers(edge)), of, last=True)
        return 0.0

    def _again_s(self, edge: Edge, of: Sequence[Transfer]) -> float:
        """Of products that are not run again, only gradients of weights want it."""
        only_gathered = len(of) == 1 and of[0].kind == "all_gather"
        if self.overlap.sums and only_gathered and self.run_again.isdisjoint(edge.consumers):
            return self._beside_s(self._gradients_s(edge.consumers, of_inputs=True), of)
        return self._forward_s(edge, of)

    def _backward_s(self, edge: Edge, of: Sequence[Transfer]) -> float:
        if self.overlap.in_pieces and len(of) == 1 and of[0].kind == "all_gather":
            return self._beside_s(self._gradients_s(self._makers(edge), of_inputs=True), of)
        return self._beside_s(self._gradients_s(edge.consumers, of_inputs=False), of)

    def _beside_s(self, products_s: float, of: Sequence[Transfer], last: bool = False) -> float:
        streams = Streams(slowdown_of(self.costs.cost_model))
        time_s = sum(map(self.costs.transfer_s, of))
        if last:
            time_s *= 1 - 1 / self.costs.mesh.sizes[of[0].axis]
        return max(0.0, streams.hidden_s(products_s, time_s)) if products_s else 0.0

    def _makers(self, edge: Edge) -> tuple[str, ...]:
        maker = self.graph.producer.get(edge.tensor)
        return () if maker is None else (maker.name,)

    def _made_s(self, names: Iterable[str]) -> float:
        return sum(self._product_s(name, None)[0] for name in names)

    def _gradients_s(self, names: Iterable[str], *, of_inputs: bool) -> float:
        return sum(self._product_s(name, of_inputs)[1] for name in names)

    def _product_s(self, name: str, of_inputs: bool | None) -> tuple[float, float]:
        """Of an operator that is one: its forward, and what gives the gradient of its input or of
        its weight."""
        operator = self.graph.operator.get(name)
        if operator is None or not self.rules[name].rule.products:
            return 0.0, 0.0
        wanted = _are_inputs(self.graph, operator)
        if not of_inputs:
            weights = _are_parameters(self.graph, operator)
            first = weights.index(True) if any(weights) else None
            wanted = tuple(i == first for i in range(len(weights)))
        return self.costs.operator_s(self.rules[name], self.strategy.splits[name], wanted)


@dataclass(frozen=True, slots=True)
class Needed:
    """The redistributions of a strategy, each with how many there are. ``again``: those that are
    repeated when their tensor is made again, and the operators that are."""

    activations: tuple[tuple[Edge, int], ...]
    parameters: tuple[tuple[ParameterEdge, int], ...]
    again: tuple[tuple[Edge, int], ...]
    operators: frozenset[str]


def _needed(
    seen: Folded,
    rules: Rules,
    strategy: Strategy,
    again: Recomputation,
) -> Needed:
    made = {name: seen.weight[o.name] for o in seen.graph.operators for name in o.outputs}
    found = edges(seen.graph, rules, strategy)
    activations = tuple((edge, made[edge.tensor]) for edge in found)
    remade = {version for segment in again.segments for version, _ in segment.remade}
    return Needed(
        activations,
        tuple(
            (edge, min(seen.weight[name] for name in edge.consumers))
            for edge in parameter_edges(seen.graph, rules, strategy, again.again)
        ),
        tuple(pair for pair in activations if (pair[0].tensor, pair[0].target) in remade),
        frozenset(again.again),
    )


def promise(graph: OperatorGraph, rules: Rules, strategy: Strategy) -> Iterator[PromisedCollective]:
    """Every collective that a step executes, unpriced (``time_s`` is 0)."""
    check_recompute(graph, strategy)
    seen, again = whole(graph), recomputation(graph, rules, strategy)
    return _promise(graph, seen, rules, strategy, _needed(seen, rules, strategy, again))


def _promise(
    graph: OperatorGraph, seen: Folded, rules: Rules, strategy: Strategy, needed: Needed
) -> Iterator[PromisedCollective]:
    on_all_axes = _promise_on_all_axes(graph, seen, rules, strategy, needed)
    yield from _communicating(on_all_axes, strategy.mesh)


def _communicating(
    promised: Iterable[PromisedCollective], mesh: Mesh
) -> Iterator[PromisedCollective]:
    """An axis of one rank communicates nothing."""
    sizes = dict(mesh.axes)
    return (one for one in promised if sizes[one.axis] > 1)


def _promise_on_all_axes(
    graph: OperatorGraph, seen: Folded, rules: Rules, strategy: Strategy, needed: Needed
) -> Iterator[PromisedCollective]:
    mesh, microbatches = strategy.mesh, strategy.microbatches
    for operator in seen.graph.operators:
        bound, split = rules[operator.name], strategy.splits[operator.name]
        times = microbatches * seen.weight[operator.name]
        for transfer in inner_transfers(bound, split, mesh, "forward"):
            yield _promised(transfer, "forward", mesh, times, operator.name)
            if operator.name in needed.operators:
                yield _promised(transfer, "backward", mesh, times, operator.name)
        if carries_gradient(seen.graph, operator):
            for transfer in inner_transfers(bound, split, mesh, "backward"):
                yield _promised(transfer, "backward", mesh, times, operator.name)
    for edge, count in needed.activations:
        forward, backward = edge.transfers(mesh)
        for transfer in forward:
            yield _promised(transfer, "forward", mesh, microbatches * count, edge.tensor)
        for transfer in backward:
            yield _promised(transfer, "backward", mesh, microbatches * count, edge.tensor)
    for edge, count in needed.again:
        for transfer in edge.transfers(mesh)[0]:
            yield _promised(transfer, "backward", mesh, microbatches * count, edge.tensor)
    for parameter_edge, count in needed.parameters:
        for one in _parameter_promise(parameter_edge, mesh, microbatches):
            yield one if count == 1 else replace(one, count=one.count * count)
    for tensor, storage, count in stored_alike(graph, strategy):
        if tensor.differentiable:
            for one in _storage_promise(tensor.spec, tensor.name, storage, mesh):
                yield one if count == 1 else replace(one, count=one.count * count)
    yield from _clip_promise(graph, strategy)


def _parameter_promise(edge: ParameterEdge, mesh: Mesh, times: int) -> Iterator[PromisedCollective]:
    for transfer in edge.forward_transfers(mesh):
        yield _promised(transfer, "forward", mesh, times, edge.parameter)
        if edge.regathered:
            count = times * len(edge.regathered)
            yield _promised(transfer, "backward", mesh, count, edge.parameter)
    for transfer in edge.backward_transfers(mesh):
        if edge.per_step:
            yield _promised(transfer, "step", mesh, 1, edge.parameter)
        else:
            yield _promised(transfer, "backward", mesh, times, edge.parameter)


def _storage_promise(
    spec: TensorSpec, name: str, storage: Storage, mesh: Mesh
) -> Iterator[PromisedCollective]:
    """After the optimizer's step on its shard, the parameter is whole again."""
    for transfer in _refreshing(spec, storage, mesh):
        yield _promised(transfer, "step", mesh, 1, name)


def _refreshing(spec: TensorSpec, storage: Storage, mesh: Mesh) -> tuple[Transfer, ...]:
    return transfers(storage.optimizer, storage.parameter, spec.bytes, mesh)


def _clip_promise(graph: OperatorGraph, strategy: Strategy) -> Iterator[PromisedCollective]:
    """One sum of squares over all ranks, when any gradient is sharded: float32, or float64 in a
    model that has such gradients."""
    axes = clip_axes(strategy)
    wide = any(p.differentiable and p.spec.dtype == "float64" for p in graph.parameters)
    size = ITEM_BYTES["float64" if wide else "float32"]
    if strategy.training.clip_norm is not None:
        for axis in axes:
            yield PromisedCollective(
                "all_reduce", "step", strategy.mesh.names[axis], size, 1, "gradient norm", 0.0
            )


def clip_axes(strategy: Strategy) -> tuple[int, ...]:
    """The mesh axes on which ranks hold different gradients: the norm is summed over each."""
    return tuple(
        axis
        for axis in range(len(strategy.mesh.axes))
        if any(s.optimizer[axis].startswith("S") for s in strategy.storage.values())
    )


def _promised(
    transfer: Transfer, phase: str, mesh: Mesh, count: int, reason: str
) -> PromisedCollective:
    return PromisedCollective(
        transfer.kind,
        phase,  # type: ignore[arg-type]
        mesh.names[transfer.axis],
        transfer.bytes,
        count,
        reason,
        0.0,
    )


def _priced(promised: Iterator[PromisedCollective], costs: Costs) -> Iterator[PromisedCollective]:
    for one in promised:
        axis = costs.mesh.names.index(one.axis)
        yield replace(one, time_s=costs.collective_s(one.kind, axis, one.bytes))


def _local_moves_s(
    needed: Needed, strategy: Strategy, costs: Costs, rules: Rules, overlap: Overlap
) -> tuple[float, float]:
    """Slices, masks and pads of all redistributions, forward and backward."""
    forward = 0.0
    backward = sum(
        costs.moves_s(edge.spec, edge.source, edge.target, backward=False) * count
        for edge, count in needed.again
    )
    for edge, count in needed.activations:
        sides = (edge.spec, edge.source, edge.target)
        forward += costs.moves_s(*sides, backward=False) * count
        if edge.backward:
            backward += costs.moves_s(*sides, backward=True) * count
    for parameter_edge, count in needed.parameters:
        there, back = _parameter_moves_s(parameter_edge, costs)
        forward += there * count
        backward += back * count / (strategy.microbatches if parameter_edge.per_step else 1)
        if not _added_in_products(parameter_edge, rules, overlap):
            backward += _sum_s(parameter_edge, strategy.microbatches, costs) * count
    return forward, backward


def _parameter_moves_s(edge: ParameterEdge, costs: Costs) -> tuple[float, float]:
    """Slices and masks of a parameter on its way to use, and of its gradient on the way back."""
    forward = costs.moves_s(edge.spec, edge.storage.parameter, edge.target, backward=False)
    if not edge.trainable:
        return forward, 0.0
    source = gradient(edge.target)
    return forward, costs.moves_s(edge.spec, source, edge.destination, backward=False)


def _added_in_products(edge: ParameterEdge, rules: Rules, overlap: Overlap) -> bool:
    return overlap.added_in_products and all(rules[n].rule.products for n in edge.consumers)


def _sum_s(edge: ParameterEdge, microbatches: int, costs: Costs) -> float:
    """Of each microbatch's backward, what adds its gradient to those of the others."""
    if not edge.trainable or microbatches == 1:
        return 0.0
    size = local_bytes(edge.spec, edge.summed, costs.mesh)
    return sum_time_s(size, microbatches, edge.spec, costs) / microbatches


def sum_time_s(size_bytes: float, microbatches: int, spec: TensorSpec, costs: Costs) -> float:
    """Adding up as many gradients of this size: of each but the first two are read, one is
    written."""
    return (microbatches - 1) * costs.memory_bound_s(3.0 * size_bytes, spec.dtype)


def optimizer_time_s(
    spec: TensorSpec,
    storage: Storage,
    training: Training,
    costs: Costs,
    overlap: Overlap = NOTHING_AT_ONCE,
) -> float:
    """The update of one parameter's shard."""
    elements = local_elements(spec.shape, storage.optimizer, costs.mesh)
    return update_time_s(elements, spec, training, costs, overlap.update_bytes)


def update_time_s(
    elements: int, spec: TensorSpec, training: Training, costs: Costs, beside_bytes: int = 0
) -> float:
    """An update of so many elements: the gradient is read, parameter and states are read and
    written. In mixed precision the parameter is the master copy, for which the gradient is cast
    before, and from which the parameter is cast after it. ``beside_bytes``: moved for each element
    before and after that."""
    mixed, states = training.precision == "mixed", training.state_tensors
    dtype = "float32" if mixed else spec.dtype
    moved = elements * (ITEM_BYTES[dtype] * (3 + 2 * states) + beside_bytes)
    if mixed:
        moved += elements * 2 * (ITEM_BYTES[spec.dtype] + ITEM_BYTES[dtype])
    return costs.memory_bound_s(float(moved), dtype, f"update {states}")
