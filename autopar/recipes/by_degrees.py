"""One recipe for what is published: tensor, data and pipeline parallelism from their degrees.

The strategy of any traced model: operators divided by ``columns_rows``, equal blocks shared out
evenly over the stages, parameters kept as ZeRO says, and repeated blocks recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from autopar.errors import AutoparError
from autopar.ir.rule import Split
from autopar.ir.sharding import INVARIANT, Mesh, Sharding, sharded_dim
from autopar.ir.strategy import Stage, Storage, Strategy, Training
from autopar.recipes.columns_rows import (
    CONTEXT,
    DATA,
    EXPERTS,
    TENSOR,
    TENSOR_EXPERTS,
    splits_by_purpose,
)
from autopar.recipes.degrees import Degrees
from autopar.simulator.costs import Costs
from autopar.simulator.listing import Structure
from autopar.simulator.microbatches import Division
from autopar.simulator.parameter_prices import at_level, zero_placements
from autopar.simulator.recompute_choices import RECIPE_KINDS, BlockChoices
from autopar.simulator.staged import even_cuts, even_starts, runs, staged
from cost_models.interface import CostModel


def by_degrees(
    division: Division,
    degrees: Degrees,
    cost_model: CostModel,
    training: Training,
    structure: Structure | None = None,
    splits: Mapping[str, Split] | None = None,
) -> Strategy:
    """``division``: into as many microbatches as ``degrees`` say of its batch. Prices are asked for
    one thing only: what is worth recomputing (``recompute="selective"``). ``structure``: of the
    division, if it is known; so are ``splits``, which depend on axes and ``between`` alone. Equal
    blocks are treated alike.

    Raises:
        AutoparError: the model cannot be divided so; the message says what could.
    """
    structure = structure or Structure(division.graph, division.rules)
    mesh, purposes, levels = _mesh(degrees)
    if splits is None:
        splits = splits_by_purpose(structure, mesh, purposes, degrees.between)
        _check_shares(structure, splits, mesh, degrees)
    stage = Stage(structure.names, tuple(range(mesh.size)), mesh)
    whole = Strategy(
        (stage,),
        dict(splits),
        dict(_storage(structure, splits, mesh, levels)),
        division.count,
        training=training,
    )
    whole = _recomputing(structure, whole, degrees, cost_model)
    if degrees.stages == 1:
        return whole
    stages = runs(division.graph, even_cuts(division.graph, degrees.stages))
    return staged(
        division.graph,
        stages,
        [whole] * len(stages),
        degrees.schedule_name,
        division.count,
        chunks=degrees.row_chunks,
    )


def _mesh(degrees: Degrees) -> tuple[Mesh, list[str], list[int]]:
    """The mesh of a stage, what each axis is for and its ZeRO level; axes of one device are left
    out."""
    axes = [
        ("replicas", degrees.replicas, DATA, 0),
        ("data", degrees.data // degrees.expert_data, DATA, degrees.zero),
        ("experts", degrees.expert_data, EXPERTS, degrees.zero),
        ("context", degrees.context, CONTEXT, degrees.zero),
        ("tensor", degrees.tensor, TENSOR if degrees.experts == 1 else TENSOR_EXPERTS, 0),
    ]
    kept = [axis for axis in axes if axis[1] > 1] or [axes[1]]
    mesh = Mesh(tuple((name, size) for name, size, _, _ in kept))
    return mesh, [purpose for *_, purpose, _ in kept], [level for *_, level in kept]


def _check_shares(
    structure: Structure, splits: Mapping[str, Split], mesh: Mesh, degrees: Degrees
) -> None:
    """Every axis has something to divide."""
    for axis, (name, size) in enumerate(mesh.axes):
        if size > 1 and not any(
            split[axis] in structure.rules[operator].sizes for operator, split in splits.items()
        ):
            raise AutoparError(
                f"nothing of {structure.graph.name} can be divided by {name}={size}: it has "
                "no batch, columns or heads that this number divides; take one that does, or more "
                "samples"
            )


def _storage(
    structure: Structure, splits: Mapping[str, Split], mesh: Mesh, levels: Sequence[int]
) -> Iterator[tuple[str, Storage]]:
    """Divided as they are used, if all readers agree, and over data axes as their ZeRO says."""
    graph = structure.graph
    known: dict[object, Storage] = {}
    for parameter in graph.parameters:
        uses = {
            structure.rules[reader.name].shardings(splits[reader.name])[0][position]
            for reader, position in graph.consumers[parameter.name]
        }
        used = tuple(_agreed([use[axis] for use in uses]) for axis in range(len(mesh.axes)))
        key = parameter.spec.shape, used
        if key not in known:
            known[key] = _stored(*key, mesh, levels)
        yield parameter.name, known[key]


def _stored(shape: tuple[int, ...], used: Sharding, mesh: Mesh, levels: Sequence[int]) -> Storage:
    zero = zero_placements(shape, used, mesh.sizes)
    per_axis = [
        (placement,) * 3 if sharded_dim(placement) is not None else at_level(level, over or "I")
        for placement, over, level in zip(used, zero, levels, strict=True)
    ]
    kept, gradient, optimizer = zip(*per_axis, strict=True)
    return Storage(kept, gradient, optimizer)


def _agreed(placements: Sharding | list[str]) -> str:
    found = set(placements)
    (one,) = found if len(found) == 1 else (INVARIANT,)
    return one


def _recomputing(
    structure: Structure, strategy: Strategy, degrees: Degrees, cost_model: CostModel
) -> Strategy:
    """Copies of the repeated blocks; collectives are done again, as checkpointing does them in
    Megatron-LM and XLA."""
    if degrees.recompute not in RECIPE_KINDS:
        raise AutoparError(
            f"a recipe has no way to recompute called {degrees.recompute!r}; there are "
            f"{', '.join(RECIPE_KINDS)}"
        )
    costs = Costs(cost_model, strategy.mesh, {})
    names: list[str] = []
    for block in structure.blocks:
        of = BlockChoices(structure.graph, structure.rules, strategy, costs, block)
        chosen = recomputed_copies(block.copies, degrees)
        others = sorted(set(range(block.copies)).difference(chosen))
        names += of.names(_offsets(of, degrees), chosen)
        if others:
            names += of.names(_offsets(of, replace(degrees, recompute="none")), others)
    made = tuple(made for name in names for made in structure.graph.operator[name].outputs)
    return replace(strategy, recompute=tuple(names), repeat_collectives=made)


def recomputed_copies(copies: int, degrees: Degrees) -> list[int]:
    """Of each stage's, the first.

    >>> recomputed_copies(8, Degrees(pipeline=2, recomputed=0.5))
    [0, 1, 4, 5]
    """
    starts = even_starts(copies, degrees.stages)
    return [
        start + copy
        for start, end in pairwise(starts)
        for copy in range(round(degrees.recomputed * (end - start)))
    ]


def _offsets(of: BlockChoices, degrees: Degrees) -> Sequence[int]:
    """What of a copy is not kept. Where what is between lies divided, or the sequence does, nor is
    what was gathered (of a ring of keys and values, each device keeps its own), and if it is all of
    a copy, what communicates inside of an operator."""
    if degrees.between == "whole" and degrees.context == 1:
        return RECIPE_KINDS[degrees.recompute](of)
    if degrees.between == "width" and degrees.recompute == "full":
        return of.summands
    inside = of.communicating if degrees.recompute == "full" else ()
    return sorted({*RECIPE_KINDS[degrees.recompute](of), *of.gathered, *inside})


__all__ = ["by_degrees", "recomputed_copies"]
