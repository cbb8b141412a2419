"""Strategies for tests: random legal ones, and a few that are easy to say."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from autopar.ir.graph import OperatorGraph
from autopar.ir.rule import NOTHING, BoundRule, Split
from autopar.ir.sharding import Mesh, Sharding, shard, sharded_dim, sharded_parts, shards_of
from autopar.ir.strategy import Stage, Storage, Strategy, Training
from autopar.simulator.costs import inner_transfers
from autopar.simulator.edges import Rules
from autopar.simulator.redistribution import steps

PLAIN = Training()


def one_stage(
    graph: OperatorGraph,
    mesh: Mesh,
    splits: dict[str, Split],
    storage: dict[str, Storage],
    training: Training = PLAIN,
) -> Strategy:
    stage = Stage(tuple(o.name for o in graph.operators), tuple(range(mesh.size)), mesh)
    return Strategy((stage,), splits, storage, training=training)


def replicate(graph: OperatorGraph, mesh: Mesh, training: Training = PLAIN) -> Strategy:
    """Every rank does everything."""
    axes = len(mesh.axes)
    return one_stage(
        graph,
        mesh,
        {o.name: (NOTHING,) * axes for o in graph.operators},
        {p.name: kept(("I",) * axes) for p in graph.parameters},
        training,
    )


def kept(sharding: Sharding) -> Storage:
    return Storage(sharding, sharding, sharding)


def random_strategy(
    graph: OperatorGraph,
    rules: Rules,
    mesh: Mesh,
    rng: Random,
    training: Training = PLAIN,
) -> Strategy:
    """Any legal split for each operator, any legal storage for each parameter."""
    splits = {o.name: random_split(rules[o.name], mesh, rng) for o in graph.operators}
    return _with_storage(graph, rules, mesh, rng, training, splits)


def random_strategy_in_parts(
    graph: OperatorGraph,
    rules: Rules,
    mesh: Mesh,
    rng: Random,
    training: Training = PLAIN,
) -> Strategy:
    """As ``random_strategy``, but whatever can divide each part of a dim often does."""
    splits = {o.name: random_split(rules[o.name], mesh, rng) for o in graph.operators}
    for operator in graph.operators:
        bound = rules[operator.name]
        for axis in range(len(mesh.axes)):
            if bound.rule.joined and rng.random() < 0.7:
                split = list(splits[operator.name])
                split[axis] = rng.choice(bound.rule.joined).factor
                if bound.divides(tuple(split), mesh):
                    splits[operator.name] = tuple(split)
    return _with_storage(graph, rules, mesh, rng, training, splits)


def _with_storage(
    graph: OperatorGraph,
    rules: Rules,
    mesh: Mesh,
    rng: Random,
    training: Training,
    splits: dict[str, Split],
) -> Strategy:
    storage = {
        p.name: random_storage(p.spec.shape, uses_of(graph, rules, splits, p.name), mesh, rng)
        for p in graph.parameters
    }
    return one_stage(graph, mesh, splits, storage, training)


def random_split(bound: BoundRule, mesh: Mesh, rng: Random) -> Split:
    choices = list(bound.choices)
    while True:
        split = tuple(rng.choice(choices) for _ in mesh.axes)
        if bound.divides(split, mesh):
            return split


def uses_of(
    graph: OperatorGraph, rules: Rules, splits: dict[str, Split], parameter: str
) -> list[Sharding]:
    return [
        rules[operator.name].shardings(splits[operator.name])[0][position]
        for operator, position in graph.consumers[parameter]
    ]


def random_storage(
    shape: tuple[int, ...], uses: list[Sharding], mesh: Mesh, rng: Random
) -> Storage:
    """On each axis whole, ZeRO-1, 2 or 3, or sharded as one of the uses wants it."""
    while True:
        levels = [_random_level(shape, uses, axis, mesh, rng) for axis in range(len(mesh.axes))]
        parameter, gradient, optimizer = (tuple(level) for level in zip(*levels, strict=True))
        only_cut = all(
            step.source == "I"
            for path in (steps(parameter, gradient), steps(gradient, optimizer))
            for step in path
        )
        if only_cut and _divides(shape, optimizer, mesh):
            return Storage(parameter, gradient, optimizer)


def _random_level(
    shape: tuple[int, ...], uses: list[Sharding], axis: int, mesh: Mesh, rng: Random
) -> tuple[str, str, str]:
    """Placements of parameter, gradient and optimizer on one axis."""
    wanted = [use[axis] for use in uses if sharded_dim(use[axis]) is not None]
    cut_later = {sharded_dim(placement) for use in uses for placement in use[axis + 1 :]}
    parts = {sharded_dim(p): sharded_parts(p) for use in uses for p in use if sharded_parts(p)}
    free = [shard(dim, parts.get(dim, ())) for dim in range(len(shape)) if dim not in cut_later]
    whole = ("I", "I", "I")
    offered = [whole]
    if wanted:
        offered += [(rng.choice(wanted),) * 3] * 2
    if free:
        s = rng.choice(free)
        offered += [("I", "I", s), ("I", s, s), (s, s, s), (s, s, s)]
    return rng.choice(offered)


def _divides(shape: tuple[int, ...], sharding: Sharding, mesh: Mesh) -> bool:
    """Each part of a dim that has parts; axes that disagree on them divide nothing."""
    parts = {(sharded_dim(p), sharded_parts(p)) for p in sharding if sharded_dim(p) is not None}
    units = list(shape)
    for dim, weights in parts:
        units[dim or 0] //= sum(weights or (1,))
    return len({dim for dim, _ in parts}) == len(parts) and all(
        unit % shards_of(sharding, dim, mesh) == 0 for dim, unit in enumerate(units)
    )


def recomputing(
    graph: OperatorGraph, rules: Rules, strategy: Strategy, rng: Random, share: float = 0.8
) -> Strategy:
    """Random runs of operators recomputed, and some of their collectives repeated."""
    chosen = [o for o in graph.operators if rng.random() < share]
    repeated = {name for o in chosen for name in o.outputs if rng.random() < 0.3}
    mesh = strategy.mesh_of
    allowed = [
        o
        for o in chosen
        if not repeated.isdisjoint(o.outputs)
        or not inner_transfers(rules[o.name], strategy.splits[o.name], mesh[o.name], "forward")
    ]
    made = {name for o in allowed for name in o.outputs}
    return replace(
        strategy,
        recompute=tuple(o.name for o in allowed),
        repeat_collectives=tuple(sorted(repeated & made)),
    )
