"""Strategies for tests: random legal ones, and a few that are easy to say."""

from __future__ import annotations

from random import Random

from autopar.ir.graph import OperatorGraph
from autopar.ir.rule import NOTHING, BoundRule, Split
from autopar.ir.sharding import Mesh, Sharding, shard, sharded_dim, shards_of
from autopar.ir.strategy import Stage, Storage, Strategy, Training
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
    splits = {o.name: _random_split(rules[o.name], mesh, rng) for o in graph.operators}
    storage = {
        p.name: _random_storage(p.spec.shape, _uses(graph, rules, splits, p.name), mesh, rng)
        for p in graph.parameters
    }
    return one_stage(graph, mesh, splits, storage, training)


def _random_split(bound: BoundRule, mesh: Mesh, rng: Random) -> Split:
    choices = list(bound.choices)
    while True:
        split = tuple(rng.choice(choices) for _ in mesh.axes)
        if bound.divides(split, mesh):
            return split


def _uses(
    graph: OperatorGraph, rules: Rules, splits: dict[str, Split], parameter: str
) -> list[Sharding]:
    return [
        rules[operator.name].shardings(splits[operator.name])[0][position]
        for operator, position in graph.consumers[parameter]
    ]


def _random_storage(
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
    free = [shard(dim) for dim in range(len(shape)) if dim not in cut_later]
    whole = ("I", "I", "I")
    offered = [whole]
    if wanted:
        offered += [(rng.choice(wanted),) * 3] * 2
    if free:
        s = rng.choice(free)
        offered += [("I", "I", s), ("I", s, s), (s, s, s), (s, s, s)]
    return rng.choice(offered)


def _divides(shape: tuple[int, ...], sharding: Sharding, mesh: Mesh) -> bool:
    return all(size % shards_of(sharding, dim, mesh) == 0 for dim, size in enumerate(shape))
