"""What a whole strategy of one stage costs, choice by choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from autopar.ir.graph import OperatorGraph
from autopar.ir.simulation import Estimate, Memory, PromisedCollective
from autopar.ir.strategy import Strategy
from autopar.simulator import one_by_one
from autopar.simulator.beside_products import BesideProducts
from autopar.simulator.costs import ComputeCache, Costs
from autopar.simulator.edges import Rules, stored_alike
from autopar.simulator.folding import Folded, whole
from autopar.simulator.fragments import trapped_bytes
from autopar.simulator.memory import peak_memory
from autopar.simulator.operator_times import (
    awaited,
    launched_passes_s,
    launches_s,
    operator_time_s,
    operators_time_s,
)
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
    sent_s,
)
from autopar.simulator.promise import Needed, priced, promise_of, redistributions, refreshing
from autopar.simulator.recomputation import Recomputation, check_recompute, recomputation
from autopar.simulator.redistribution import Transfer
from autopar.simulator.reserved import communicators, reserved
from autopar.simulator.updates import (
    added_in_products,
    optimizer_time_s,
    parameter_moves_s,
    sum_of_s,
)
from cost_models.interface import CostModel, slowdown_of


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
    needed = redistributions(seen, rules, strategy, again)
    promised = tuple(priced(promise_of(graph, seen, rules, strategy, needed), costs))
    of = _Evaluation(graph, seen, rules, strategy, costs, overlap, again, needed)
    spent = of.at_once(of.in_turn(promised), promised)
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

    def more(self, **seconds: float) -> _Spent:
        return replace(self, **{name: getattr(self, name) + s for name, s in seconds.items()})


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
    def host_waits(self) -> bool:
        """After each pass, or within each forward."""
        return self.overlap.host_waits or (
            self.costs.host_ahead.ahead and bool(awaited(self.seen.graph, self.rules))
        )

    @cached_property
    def host_s(self) -> float:
        """Of hosts that go ahead of more than a pass."""
        if self.host_waits:
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
        forward_s, backward_s = operators_time_s(self.seen, rules, strategy, costs, self.run_again)
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

    def at_once(self, spent: _Spent, promised: Sequence[PromisedCollective]) -> _Spent:
        """With what the program does beside something else."""
        overlap = self.overlap
        if overlap.sums or overlap.in_pieces:
            spent = self._beside_products(spent)
        if overlap.parameters:
            spent = self._parameters_ahead(spent)
        if overlap.one_by_one is not None:
            spent = self._one_by_one(spent, overlap.one_by_one)
        if overlap.experts:
            spent = self._beside_other_microbatches(spent, promised)
        if overlap.together or overlap.replicas:
            spent = self._once_a_step(spent)
        return self._waiting(spent) if self.host_waits else spent

    def _beside_products(self, spent: _Spent) -> _Spent:
        of = self.seen.graph, self.rules, self.strategy, self.costs, self.overlap
        beside = BesideProducts(*of, self.needed.operators)
        forward_s, backward_s = beside.hidden_s(self.needed.activations, self.needed.again)
        return spent.more(
            moved_forward_s=-self.times * forward_s, moved_backward_s=-self.times * backward_s
        )

    def _beside_other_microbatches(
        self, spent: _Spent, promised: Sequence[PromisedCollective]
    ) -> _Spent:
        share = self.overlap.experts
        return spent.more(
            moved_forward_s=-share * sent_s(promised, "forward"),
            moved_backward_s=-share * sent_s(promised, "backward"),
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
            operator.name: operator_time_s(seen.graph, rules, strategy, costs, operator)
            for operator in seen.graph.operators
        }
        waiting = one_by_one.spent(
            seen, self.needed.parameters, seconds, self.again, costs, program
        )
        forward_s, backward_s = operators_time_s(seen, rules, strategy, costs, self.again)
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

    def _waiting(self, spent: _Spent) -> _Spent:
        """Of a host that is ahead within a pass only."""
        seen, times = self.seen, self.times
        of = seen.graph, self.rules, self.strategy, self.costs, seen.weight, self.run_again
        forward_s, backward_s = launched_passes_s(*of, spent.moved_forward_s / times)
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
            for transfer in refreshing(tensor.spec, storage, mesh)
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
        there, back = parameter_moves_s(parameter_edge, costs)
        forward += there * count
        backward += back * count / (strategy.microbatches if parameter_edge.per_step else 1)
        if not added_in_products(parameter_edge, rules, overlap):
            backward += sum_of_s(parameter_edge, strategy.microbatches, costs) * count
    return forward, backward
