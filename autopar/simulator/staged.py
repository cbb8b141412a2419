"""Strategies of several stages, written from where the graph is cut and strategies of one stage."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from autopar.errors import AutoparError
from autopar.ir.graph import OperatorGraph
from autopar.ir.rule import Split
from autopar.ir.strategy import Stage, Storage, Strategy
from autopar.schedules import SCHEDULES
from autopar.simulator.blocks import blocks


def staged(
    graph: OperatorGraph,
    stages: Sequence[Sequence[str]],
    like: Sequence[Strategy],
    schedule: str,
    microbatches: int,
    *,
    chunks: int | None = None,
    devices: Sequence[tuple[int, ...]] | None = None,
) -> Strategy:
    """``stages``: the operators of each, as ``runs`` gives them. ``like``: for each stage a
    strategy of one stage, whose mesh, splits and storages the stage takes, and what it recomputes.

    ``devices`` of each stage; the default is to fill groups of devices one after the other, stage k
    on group k modulo their number, of which each has ``chunks`` (default: the schedule's).
    """
    if len(like) != len(stages):
        raise AutoparError(
            f"{len(stages)} stages need as many strategies to be like, not {len(like)}; give one "
            "for each, also where they are the same"
        )
    if schedule not in SCHEDULES:
        raise AutoparError(
            f"no schedule is called {schedule!r}; there are {', '.join(sorted(SCHEDULES))}"
        )
    member = SCHEDULES[schedule]
    held = 1 if member.copies else member.chunks if chunks is None else chunks
    meshes = [strategy.mesh for strategy in like]
    if devices is None:
        devices = _one_after_the_other([mesh.size for mesh in meshes], held)
    splits: dict[str, Split] = {}
    storage: dict[str, Storage] = {}
    differing: list[dict[str, Storage]] = []  # from how an earlier stage keeps the same parameter
    recompute: list[str] = []
    repeated: list[str] = []
    for names, strategy in zip(stages, like, strict=True):
        recomputed = set(strategy.recompute)
        recompute += [name for name in names if name in recomputed]
        repeated += [
            made
            for name in names
            for made in graph.operator[name].outputs
            if made in strategy.repeat_collectives
        ]
        own: dict[str, Storage] = {}
        for name in names:
            splits[name] = strategy.splits[name]
            for read in graph.operator[name].inputs:
                if read in strategy.storage:
                    kept = strategy.storage[read]
                    if storage.setdefault(read, kept) != kept:
                        own[read] = kept
        differing.append(own)
    for parameter in graph.parameters:  # what nothing reads is kept by the first stage
        storage.setdefault(parameter.name, like[0].storage[parameter.name])
    return Strategy(
        stages=tuple(
            Stage(tuple(names), of, mesh, own)
            for names, of, mesh, own in zip(stages, devices, meshes, differing, strict=True)
        ),
        splits=splits,
        storage=storage,
        microbatches=microbatches,
        schedule=schedule,
        training=like[0].training,
        chunks=chunks,
        recompute=tuple(recompute),
        repeat_collectives=tuple(repeated),
    )


def _one_after_the_other(sizes: Sequence[int], chunks: int) -> list[tuple[int, ...]]:
    if len(sizes) % chunks:
        raise AutoparError(
            f"{len(sizes)} stages cannot be held {chunks} by each group of devices; give a number "
            f"of stages that {chunks} divides"
        )
    groups = len(sizes) // chunks
    starts = [sum(sizes[:group]) for group in range(groups)]
    for stage, size in enumerate(sizes):
        if size != sizes[stage % groups]:
            raise AutoparError(
                f"stages {stage % groups} and {stage} share a group of devices, and have meshes of "
                f"{sizes[stage % groups]} and {size}; give both as many, or say on which devices "
                "each stage is"
            )
    return [
        tuple(range(starts[stage % groups], starts[stage % groups] + size))
        for stage, size in enumerate(sizes)
    ]


def runs(graph: OperatorGraph, cuts: Sequence[int]) -> list[tuple[str, ...]]:
    """The operators in runs: ``cuts`` are the positions at which the second, the third, ... begin.

    Raises:
        AutoparError: a run would be empty.
    """
    names = [operator.name for operator in graph.operators]
    ends = [0, *cuts, len(names)]
    for before, after in pairwise(ends):
        if before >= after:
            raise AutoparError(
                f"the cuts {list(cuts)} leave a stage empty; they must rise from 1 to "
                f"{len(names) - 1}"
            )
    return [tuple(names[a:b]) for a, b in pairwise(ends)]


def block_starts(graph: OperatorGraph) -> tuple[int, ...]:
    """Where each copy of the block that covers most of the graph begins: a layer, usually."""
    most = max(blocks(graph), key=lambda block: block.period * block.copies, default=None)
    if most is None:
        return ()
    return tuple(most.start + copy * most.period for copy in range(most.copies))


def stack_starts(graph: OperatorGraph) -> tuple[int, ...]:
    """Where each block begins: of those that cover most, and of those that come right before and
    after them (layers with an MLP before layers with experts)."""
    found = blocks(graph)
    most = max(found, key=lambda block: block.period * block.copies, default=None)
    if most is None:
        return ()
    stack, place = [most], found.index(most)
    for before in reversed(found[:place]):
        if before.stop != stack[0].start:
            break
        stack.insert(0, before)
    for after in found[place + 1 :]:
        if after.start != stack[-1].stop:
            break
        stack.append(after)
    return tuple(one.start + copy * one.period for one in stack for copy in range(one.copies))


def even_starts(copies: int, stages: int) -> list[int]:
    """At which copy each stage begins, and their number. As equal as can be; where only with them
    stages come out even, what is before the first copy and what is after the last count as one
    each, as Megatron-LM's ``account_for_embedding_in_pipeline_split`` has it.

    >>> even_starts(8, 4), even_starts(6, 4), even_starts(6, 8)
    ([0, 2, 4, 6, 8], [0, 1, 3, 5, 6], [0, 0, 1, 2, 3, 4, 5, 6, 6])
    """
    if copies % stages and (copies + 2) % stages == 0:
        each = (copies + 2) // stages
        return [0, *(each * stage - 1 for stage in range(1, stages)), copies]
    return [round(copies * stage / stages) for stage in range(stages + 1)]


def even_cuts(graph: OperatorGraph, stages: int) -> tuple[int, ...]:
    """Cuts for so many stages with as equal numbers of blocks as can be (``even_starts``); what is
    before and after goes to the first and the last.

    Raises:
        AutoparError: there are fewer blocks than stages.
    """
    starts = stack_starts(graph)
    if stages > max(1, len(starts)) and stages != len(starts) + 2:
        raise AutoparError(
            f"{graph.name} has {len(starts)} equal blocks, which cannot be {stages} stages; take "
            "fewer stages, or say where to cut"
        )
    ends = [*starts, _stack_end(graph, starts)]
    return tuple(ends[copy] for copy in even_starts(len(starts), stages)[1:-1])


def _stack_end(graph: OperatorGraph, starts: tuple[int, ...]) -> int:
    return max((block.stop for block in blocks(graph) if block.start in starts), default=0)


__all__ = ["block_starts", "even_cuts", "even_starts", "runs", "stack_starts", "staged"]
