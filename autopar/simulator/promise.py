"""The redistributions that a strategy needs, and the promise: every collective of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from autopar.ir.graph import ITEM_BYTES, OperatorGraph, TensorSpec
from autopar.ir.sharding import Mesh
from autopar.ir.simulation import PromisedCollective
from autopar.ir.strategy import Storage, Strategy
from autopar.simulator.costs import Costs, inner_transfers
from autopar.simulator.edges import (
    Edge,
    ParameterEdge,
    Rules,
    carries_gradient,
    edges,
    parameter_edges,
    stored_alike,
)
from autopar.simulator.folding import Folded, whole
from autopar.simulator.recomputation import Recomputation, check_recompute, recomputation
from autopar.simulator.redistribution import Transfer, transfers


@dataclass(frozen=True, slots=True)
class Needed:
    """The redistributions of a strategy, each with how many there are. ``again``: those that are
    repeated when their tensor is made again, and the operators that are."""

    activations: tuple[tuple[Edge, int], ...]
    parameters: tuple[tuple[ParameterEdge, int], ...]
    again: tuple[tuple[Edge, int], ...]
    operators: frozenset[str]


def redistributions(
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
    return promise_of(graph, seen, rules, strategy, redistributions(seen, rules, strategy, again))


def promise_of(
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
    for transfer in refreshing(spec, storage, mesh):
        yield _promised(transfer, "step", mesh, 1, name)


def refreshing(spec: TensorSpec, storage: Storage, mesh: Mesh) -> tuple[Transfer, ...]:
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


def priced(promised: Iterator[PromisedCollective], costs: Costs) -> Iterator[PromisedCollective]:
    for one in promised:
        axis = costs.mesh.names.index(one.axis)
        yield replace(one, time_s=costs.collective_s(one.kind, axis, one.bytes))
