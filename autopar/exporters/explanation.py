"""What a plan decided, block by block, as plain values that every exporter renders."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Literal, TypeVar

from autopar.ir.graph import ITEM_BYTES
from autopar.ir.plan import Plan
from autopar.ir.rule import BoundRule
from autopar.ir.sharding import Parts, Sharding, local_shape
from autopar.simulator.costs import inner_transfers
from autopar.simulator.edges import OUTPUT, Rules, carries_gradient, edges, parameter_edges
from autopar.simulator.microbatches import divide
from autopar.simulator.redistribution import Transfer

Phase = Literal["forward", "backward", "step"]


@dataclass(frozen=True, slots=True)
class Divided:
    """What one mesh axis does to an operator; ``size`` of the factor, ``None`` for no factor.

    ``parts``: relative sizes, where each part of the factor is divided.
    """

    axis: str
    choice: str
    size: int | None
    parts: Parts = ()


@dataclass(frozen=True, slots=True)
class CollectiveRow:
    """``times`` a step; ``time_s`` is that of all of them."""

    kind: str
    phase: str
    axis: str
    bytes: int
    times: int
    time_s: float


@dataclass(frozen=True, slots=True)
class OperatorRow:
    """``count`` operators of a block that are alike: the same op, the same split.

    ``view``: it costs nothing. ``collectives``: of its own implementation.
    """

    name: str
    op: str
    view: bool
    split: tuple[Divided, ...]
    collectives: tuple[CollectiveRow, ...]
    count: int = 1


@dataclass(frozen=True, slots=True)
class RedistributionRow:
    """``count`` tensors of a block that are wanted otherwise than they are made."""

    tensor: str
    source: Sharding
    target: Sharding
    readers: tuple[str, ...]
    collectives: tuple[CollectiveRow, ...]
    count: int = 1


@dataclass(frozen=True, slots=True)
class ParameterRow:
    """``count`` parameters that are alike. ``storage``: a phrase for each mesh axis;
    ``local_bytes``: what one device keeps of one of them."""

    name: str
    shape: tuple[int, ...]
    storage: tuple[str, ...]
    local_bytes: int
    collectives: tuple[CollectiveRow, ...]
    count: int = 1


@dataclass(frozen=True, slots=True)
class Refusal:
    """A size that a mesh axis does not divide: splits of these factors on it are not offered. Of a
    factor with parts it is the largest common divisor of their sizes."""

    axis: str
    axis_size: int
    size: int
    factors: tuple[tuple[str, str], ...]
    """(operator, factor) pairs."""


@dataclass(frozen=True)
class Block:
    """Modules whose paths differ in one number only, e.g. ``model.layers.*``."""

    path: str
    count: int
    operators: tuple[OperatorRow, ...]
    redistributions: tuple[RedistributionRow, ...]
    parameters: tuple[ParameterRow, ...]
    refusals: tuple[Refusal, ...]

    @property
    def communication_s(self) -> float:
        return sum(c.time_s for c in self.collectives)

    @property
    def collectives(self) -> tuple[CollectiveRow, ...]:
        return (
            *(c for row in self.operators for c in row.collectives),
            *(c for row in self.redistributions for c in row.collectives),
            *(c for row in self.parameters for c in row.collectives),
        )


@dataclass(frozen=True)
class Explanation:
    """Blocks in the order in which they run; ``unplaced`` belong to none (the gradient norm)."""

    blocks: tuple[Block, ...]
    unplaced: tuple[CollectiveRow, ...]

    @property
    def communication_s(self) -> float:
        return sum(b.communication_s for b in self.blocks) + sum(c.time_s for c in self.unplaced)


REST = "(model)"
"""The block of what is in no numbered module."""


def block_of(name: str) -> tuple[str, str, str]:
    """Block, number, and name within the block.

    >>> block_of("model.layers.12.mlp.up_proj.linear")
    ('model.layers.*', '12', 'mlp.up_proj.linear')
    >>> block_of("lm_head.linear")
    ('(model)', '', 'lm_head.linear')
    """
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join([*parts[:i], "*"]), part, ".".join(parts[i + 1 :])
    return REST, "", name


def explanation(plan: Plan, rules: Rules) -> Explanation:
    """``rules``: the bound rule of each operator, for the graph of one microbatch."""
    plan = replace(plan, graph=divide(plan.graph, plan.strategy.microbatches, plan.proposed))
    operators = _merged(_operators(plan, rules))
    redistributions = _merged(_redistributions(plan, rules))
    parameters = _merged(_parameters(plan, rules))
    numbers: dict[str, set[str]] = defaultdict(set)
    for operator in plan.graph.operators:
        path, number, _ = block_of(operator.name)
        numbers[path].add(number)
    refusals = _refusals(plan, rules)
    paths = dict.fromkeys((*numbers, *redistributions, *parameters))
    blocks = tuple(
        Block(
            path,
            max(1, len(numbers[path])),
            operators.get(path, ()),
            redistributions.get(path, ()),
            parameters.get(path, ()),
            refusals.get(path, ()),
        )
        for path in paths
    )
    placed = {name for rows in (plan.graph.operator, plan.graph.by_name) for name in rows}
    return Explanation(
        blocks,
        tuple(
            CollectiveRow(c.kind, c.phase, c.axis, c.bytes, c.count, c.count * c.time_s)
            for c in plan.estimate.collectives
            if c.reason not in placed
        ),
    )


# Rows, each with the full name that says which block it belongs to


def _operators(plan: Plan, rules: Rules) -> Iterator[tuple[str, OperatorRow]]:
    prices = _prices(plan)
    for operator in plan.graph.operators:
        bound, split = rules[operator.name], plan.strategy.splits[operator.name]
        moved = [("forward", t) for t in inner_transfers(bound, split, plan.mesh, "forward")]
        if carries_gradient(plan.graph, operator):
            moved += [("backward", t) for t in inner_transfers(bound, split, plan.mesh, "backward")]
        yield (
            operator.name,
            OperatorRow(
                block_of(operator.name)[2],
                operator.op,
                bound.rule.kind == "view",
                tuple(
                    Divided(axis, choice, bound.sizes.get(choice), bound.parts(choice))
                    for axis, choice in zip(plan.mesh.names, split, strict=True)
                ),
                _collectives(plan, prices, moved),
            ),
        )


def _redistributions(plan: Plan, rules: Rules) -> Iterator[tuple[str, RedistributionRow]]:
    prices = _prices(plan)
    for edge in edges(plan.graph, rules, plan.strategy):
        forward, backward = edge.transfers(plan.mesh)
        moved = [("forward", t) for t in forward] + [("backward", t) for t in backward]
        collectives = _collectives(plan, prices, moved)
        if collectives:
            producer = plan.graph.producer[edge.tensor].name
            yield (
                producer,
                RedistributionRow(
                    block_of(edge.tensor)[2],
                    edge.source,
                    edge.target,
                    _readers(producer, edge.consumers),
                    collectives,
                ),
            )


def _readers(producer: str, consumers: Iterable[str]) -> tuple[str, ...]:
    """Names within the producer's block; those of another one with the block before them."""
    here = block_of(producer)[:2]
    found = []
    for name in consumers:
        path, number, rest = block_of(name)
        inside = (path, number) == here or path == REST
        found.append(
            "the end of the step" if name == OUTPUT else rest if inside else f"{path}.{rest}"
        )
    return tuple(dict.fromkeys(found))


def _parameters(plan: Plan, rules: Rules) -> Iterator[tuple[str, ParameterRow]]:
    uses: dict[str, set[Sharding]] = defaultdict(set)
    for edge in parameter_edges(plan.graph, rules, plan.strategy):
        uses[edge.parameter].add(edge.target)
    promised: dict[str, list[CollectiveRow]] = defaultdict(list)
    for c in plan.estimate.collectives:
        promised[c.reason].append(
            CollectiveRow(c.kind, c.phase, c.axis, c.bytes, c.count, c.count * c.time_s)
        )
    for tensor in plan.graph.parameters:
        kept = plan.strategy.storage[tensor.name].parameter
        local = prod(local_shape(tensor.spec.shape, kept, plan.mesh))
        yield (
            tensor.name,
            ParameterRow(
                block_of(tensor.name)[2],
                tensor.spec.shape,
                _storage(plan, tensor.name, uses[tensor.name]),
                local * ITEM_BYTES[tensor.spec.dtype],
                tuple(promised[tensor.name]),
            ),
        )


def _storage(plan: Plan, parameter: str, uses: set[Sharding]) -> tuple[str, ...]:
    """For each axis, in the usual names, what of the parameter is cut there."""
    storage = plan.strategy.storage[parameter]
    phrases = []
    for axis, (kept, gradient, optimizer) in enumerate(
        zip(storage.parameter, storage.gradient, storage.optimizer, strict=True)
    ):
        if kept != "I":
            split = all(use[axis] == kept for use in uses)
            phrases.append(f"{kept} split" if split else f"{kept} ZeRO-3")
        elif gradient != "I":
            phrases.append(f"{gradient} ZeRO-2")
        elif optimizer != "I":
            phrases.append(f"{optimizer} ZeRO-1")
        else:
            phrases.append("whole")
    return tuple(phrases)


Prices = dict[tuple[str, str, int], float]
"""Seconds of one collective by kind, axis and bytes, as the plan's promise has them."""


def _prices(plan: Plan) -> Prices:
    return {(c.kind, c.axis, c.bytes): c.time_s for c in plan.estimate.collectives}


def _collectives(
    plan: Plan, prices: Prices, moved: list[tuple[str, Transfer]]
) -> tuple[CollectiveRow, ...]:
    """An axis of one rank communicates nothing."""
    times = plan.strategy.microbatches
    rows = []
    for phase, transfer in moved:
        axis, size = plan.mesh.axes[transfer.axis]
        if size == 1:
            continue
        time_s = prices[transfer.kind, axis, transfer.bytes]
        rows.append(
            CollectiveRow(transfer.kind, phase, axis, transfer.bytes, times, times * time_s)
        )
    return tuple(rows)


def _refusals(plan: Plan, rules: Rules) -> dict[str, tuple[Refusal, ...]]:
    sizes = dict(plan.mesh.axes)
    found: dict[str, dict[tuple[str, int], dict[tuple[str, str], None]]] = {}
    for operator in plan.graph.operators:
        bound: BoundRule = rules[operator.name]
        path, _, name = block_of(operator.name)
        for axis, factor in bound.refused(plan.mesh):
            by_size = found.setdefault(path, {})
            by_size.setdefault((axis, bound.limits[factor]), {})[name, factor] = None
    return {
        path: tuple(
            Refusal(axis, sizes[axis], size, tuple(factors))
            for (axis, size), factors in by_size.items()
        )
        for path, by_size in found.items()
    }


Row = TypeVar("Row", OperatorRow, RedistributionRow, ParameterRow)


def _merged(rows: Iterable[tuple[str, Row]]) -> dict[str, tuple[Row, ...]]:
    """Rows by block; equal ones become one, with their number and all their time."""
    counts: dict[str, dict[Row, int]] = {}
    for name, row in rows:
        same = counts.setdefault(block_of(name)[0], {})
        same[row] = same.get(row, 0) + 1
    return {
        path: tuple(
            replace(
                row,
                count=n,
                collectives=tuple(
                    replace(c, times=c.times * n, time_s=c.time_s * n) for c in row.collectives
                ),
            )
            for row, n in same.items()
        )
        for path, same in counts.items()
    }
