"""What a plan decided, block by block, as plain values that every exporter renders."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal, TypeVar

from autopar.ir.graph import ITEM_BYTES, OperatorGraph
from autopar.ir.plan import Plan
from autopar.ir.rule import BoundRule
from autopar.ir.sharding import Mesh, Parts, Sharding, local_shape
from autopar.ir.simulation import PromisedCollective
from autopar.ir.strategy import Strategy
from autopar.simulator.costs import inner_transfers
from autopar.simulator.edges import OUTPUT, Rules, carries_gradient, edges, parameter_edges
from autopar.simulator.microbatches import divide, division
from autopar.simulator.redistribution import Transfer
from autopar.simulator.stages import Pipelined, pipelined

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


END = "the end of the step"

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
    """Of a plan of one stage. ``rules``: the bound rule of each operator, for the graph of one
    microbatch."""
    graph = divide(plan.graph, plan.strategy.microbatches, plan.proposed)
    collectives = plan.estimate.collectives
    seen = _Seen(graph, rules, plan.strategy, collectives, plan.strategy.microbatches)
    return _explained(seen)


@dataclass(frozen=True)
class StageExplanation:
    """Stages that are alike; ``what`` is of one of them, as its row does it.

    ``numbers``: which they are. ``operators``: for each of them, the blocks and their copies that
    it has, ``model.layers.0-11``.
    """

    numbers: tuple[int, ...]
    mesh: Mesh
    operators: tuple[tuple[str, ...], ...]
    what: Explanation


@dataclass(frozen=True, slots=True)
class PassedOn:
    """A parameter that ``stages`` keep in different pieces: ``bytes`` of its gradient go from
    device to device, once a step, so that each has the sum."""

    parameter: str
    stages: tuple[int, ...]
    bytes: int


def passed_on(of: Plan) -> tuple[PassedOn, ...]:
    plan = _pipelined(of)
    found = []
    for shared in plan.shared:
        sent = sum(one.bytes for one in shared.sent(plan.groups))
        if sent:
            found.append(PassedOn(shared.name, shared.stages, sent))
    return tuple(found)


def _pipelined(of: Plan) -> Pipelined:
    return pipelined(division(of.graph, of.strategy.microbatches, of.proposed), of.strategy)


def stages_of(of: Plan) -> tuple[StageExplanation, ...]:
    """Of a plan of several stages, equal ones once, in the order of their first."""
    estimate, plan = of.pipeline, _pipelined(of)
    assert estimate is not None
    alike: dict[Hashable, list[int]] = {}
    for number, part in enumerate(plan.parts):
        alike.setdefault(part.content, []).append(number)
    found = []
    for numbers in alike.values():
        part, row = plan.parts[numbers[0]], plan.copies[numbers[0]][0]
        own = {name for names in (part.graph.operator, part.graph.by_name) for name in names}
        times = sum(a.stage == numbers[0] and a.kind == "F" for a in plan.rows[row])
        seen = _Seen(
            part.graph,
            part.division.rules,
            part.strategy,
            tuple(c for c in estimate.rows[row].collectives if c.reason in own),
            times,
            part.ends,
            part.given,
        )
        operators = tuple(tuple(_copies(plan.parts[n].graph)) for n in numbers)
        found.append(StageExplanation(tuple(numbers), part.mesh, operators, _explained(seen)))
    return tuple(found)


def _copies(graph: OperatorGraph) -> Iterator[str]:
    """``layers.0-11`` for the copies of a block that are here, names for what is in none."""
    numbers: dict[str, list[int]] = {}
    for operator in graph.operators:
        path, number, name = block_of(operator.name)
        if path == REST:
            numbers.setdefault(name, [])
        elif (copy := int(number)) not in (of_path := numbers.setdefault(path, [])):
            of_path.append(copy)
    for path, copies in numbers.items():
        yield path[:-1] + ranges_text(copies) if copies else path


def ranges_text(numbers: Iterable[int]) -> str:
    """
    >>> ranges_text([0, 1, 2, 5]), ranges_text([3])
    ('0-2, 5', '3')
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


@dataclass(frozen=True)
class _Seen:
    """What is explained: the graph of one microbatch, of which a step does ``times``."""

    graph: OperatorGraph
    rules: Rules
    strategy: Strategy
    promised: tuple[PromisedCollective, ...]
    times: int
    ends: Mapping[str, Sharding] | None = None
    given: Mapping[str, Sharding] = field(default_factory=dict)

    @property
    def mesh(self) -> Mesh:
        return self.strategy.mesh


def _explained(seen: _Seen) -> Explanation:
    operators = _merged(_operators(seen))
    redistributions = _merged(_redistributions(seen))
    parameters = _merged(_parameters(seen))
    numbers: dict[str, set[str]] = defaultdict(set)
    for operator in seen.graph.operators:
        path, number, _ = block_of(operator.name)
        numbers[path].add(number)
    refusals = _refusals(seen)
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
    placed = {name for rows in (seen.graph.operator, seen.graph.by_name) for name in rows}
    return Explanation(
        blocks,
        tuple(
            CollectiveRow(c.kind, c.phase, c.axis, c.bytes, c.count, c.count * c.time_s)
            for c in seen.promised
            if c.reason not in placed
        ),
    )


# Rows, each with the full name that says which block it belongs to


def _operators(seen: _Seen) -> Iterator[tuple[str, OperatorRow]]:
    prices = _prices(seen)
    for operator in seen.graph.operators:
        bound, split = seen.rules[operator.name], seen.strategy.splits[operator.name]
        moved = [("forward", t) for t in inner_transfers(bound, split, seen.mesh, "forward")]
        if carries_gradient(seen.graph, operator):
            moved += [("backward", t) for t in inner_transfers(bound, split, seen.mesh, "backward")]
        yield (
            operator.name,
            OperatorRow(
                block_of(operator.name)[2],
                operator.op,
                bound.rule.kind == "view",
                tuple(
                    Divided(axis, choice, bound.sizes.get(choice), bound.parts(choice))
                    for axis, choice in zip(seen.mesh.names, split, strict=True)
                ),
                _collectives(seen, prices, moved),
            ),
        )


def _redistributions(seen: _Seen) -> Iterator[tuple[str, RedistributionRow]]:
    prices = _prices(seen)
    for edge in edges(seen.graph, seen.rules, seen.strategy, seen.ends, seen.given):
        forward, backward = edge.transfers(seen.mesh)
        moved = [("forward", t) for t in forward] + [("backward", t) for t in backward]
        collectives = _collectives(seen, prices, moved)
        if collectives:
            producer = seen.graph.producer.get(edge.tensor)
            name = edge.tensor if producer is None else producer.name
            departs = seen.ends is not None and edge.tensor != seen.graph.loss
            yield (
                name,
                RedistributionRow(
                    block_of(edge.tensor)[2],
                    edge.source,
                    edge.target,
                    _readers(name, edge.consumers, "other stages" if departs else END),
                    collectives,
                ),
            )


def _readers(producer: str, consumers: Iterable[str], end: str) -> tuple[str, ...]:
    """Names within the producer's block; those of another one with the block before them."""
    here = block_of(producer)[:2]
    found = []
    for name in consumers:
        path, number, rest = block_of(name)
        inside = (path, number) == here or path == REST
        found.append(end if name == OUTPUT else rest if inside else f"{path}.{rest}")
    return tuple(dict.fromkeys(found))


def _parameters(seen: _Seen) -> Iterator[tuple[str, ParameterRow]]:
    uses: dict[str, set[Sharding]] = defaultdict(set)
    for edge in parameter_edges(seen.graph, seen.rules, seen.strategy):
        uses[edge.parameter].add(edge.target)
    promised: dict[str, list[CollectiveRow]] = defaultdict(list)
    for c in seen.promised:
        promised[c.reason].append(
            CollectiveRow(c.kind, c.phase, c.axis, c.bytes, c.count, c.count * c.time_s)
        )
    for tensor in seen.graph.parameters:
        kept = seen.strategy.storage[tensor.name].parameter
        local = prod(local_shape(tensor.spec.shape, kept, seen.mesh))
        yield (
            tensor.name,
            ParameterRow(
                block_of(tensor.name)[2],
                tensor.spec.shape,
                _storage(seen, tensor.name, uses[tensor.name]),
                local * ITEM_BYTES[tensor.spec.dtype],
                tuple(promised[tensor.name]),
            ),
        )


def _storage(seen: _Seen, parameter: str, uses: set[Sharding]) -> tuple[str, ...]:
    """For each axis, in the usual names, what of the parameter is cut there."""
    storage = seen.strategy.storage[parameter]
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


def _prices(seen: _Seen) -> Prices:
    return {(c.kind, c.axis, c.bytes): c.time_s for c in seen.promised}


def _collectives(
    seen: _Seen, prices: Prices, moved: list[tuple[str, Transfer]]
) -> tuple[CollectiveRow, ...]:
    """An axis of one rank communicates nothing."""
    times = seen.times
    rows = []
    for phase, transfer in moved:
        axis, size = seen.mesh.axes[transfer.axis]
        if size == 1:
            continue
        time_s = prices[transfer.kind, axis, transfer.bytes]
        rows.append(
            CollectiveRow(transfer.kind, phase, axis, transfer.bytes, times, times * time_s)
        )
    return tuple(rows)


def _refusals(seen: _Seen) -> dict[str, tuple[Refusal, ...]]:
    sizes = dict(seen.mesh.axes)
    found: dict[str, dict[tuple[str, int], dict[tuple[str, str], None]]] = {}
    for operator in seen.graph.operators:
        bound: BoundRule = seen.rules[operator.name]
        path, _, name = block_of(operator.name)
        for axis, factor in bound.refused(seen.mesh):
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
