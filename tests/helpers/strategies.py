"""Strategies for tests: random legal ones, and a few that are easy to say."""

from __future__ import annotations

from random import Random

from autopar.ir.graph import OperatorGraph
from autopar.ir.rule import NOTHING, BoundRule, Split
from autopar.ir.sharding import Mesh, Sharding, shard, sharded_dim, shards_of
from autopar.ir.strategy import Stage, Storage, Strategy, Training
from autopar.simulator.edges import Rules

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
    """Any legal split for each operator, any legal storage for each parameter.

    Half of the operators follow the choice of an axis-wide favourite factor size, so that long
    stretches lie alike; the others are drawn alone.
    """
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
    axes = len(mesh.axes)
    parameter, gradient, optimizer = (["I"] * axes for _ in range(3))
    for axis in range(axes):
        wanted = [use[axis] for use in uses if sharded_dim(use[axis]) is not None]
        level = rng.choice((0, 1, 2, 3, 3, 4))
        if level == 4 and wanted:
            placement, level = rng.choice(wanted), 3
        elif shape:
            placement = shard(rng.randrange(len(shape)))
        else:
            level = 0
        if level == 0 or not _fits(shape, optimizer, axis, placement, uses, mesh):
            continue
        for chosen in ([], [optimizer], [gradient, optimizer], [parameter, gradient, optimizer])[
            min(level, 3)
        ]:
            chosen[axis] = placement
    return Storage(tuple(parameter), tuple(gradient), tuple(optimizer))


def _fits(
    shape: tuple[int, ...],
    optimizer: list[str],
    axis: int,
    placement: str,
    uses: list[Sharding],
    mesh: Mesh,
) -> bool:
    """Whether the dim can be cut once more, and no later axis cuts it, in use or in storage."""
    dim = sharded_dim(placement)
    assert dim is not None
    trial = (*optimizer[:axis], placement, *optimizer[axis + 1 :])
    later = any(sharded_dim(p) == dim for use in uses for p in use[axis + 1 :])
    return shape[dim] % shards_of(trial, dim, mesh) == 0 and not later
