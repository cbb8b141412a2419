"""A graph with only three copies of each repeated block: what is priced need not grow with depth.

The first and the last copy stand for themselves, the one between them for all others. Where a
strategy treats all copies alike, sums over the folded graph with these weights are those over the
whole graph, and memory peaks in or outside the first or the last copy: what is held changes by the
same amount from copy to copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autopar.ir.graph import OperatorGraph, Role
from autopar.simulator.blocks import Block

KEPT = 3


@dataclass(frozen=True)
class Folded:
    """``weight``: how many operators each operator of ``graph`` stands for, by name."""

    graph: OperatorGraph
    weight: dict[str, int]


def whole(graph: OperatorGraph) -> Folded:
    """Nothing folded."""
    return Folded(graph, dict.fromkeys((o.name for o in graph.operators), 1))


def fold(graph: OperatorGraph, blocks: Sequence[Block]) -> Folded:
    """Leave out all copies but the first two and the last of each block."""
    weight = {operator.name: 1 for operator in graph.operators}
    left_out: set[int] = set()
    renamed: dict[str, str] = {}
    for block in blocks:
        if block.copies <= KEPT:
            continue
        for offset in range(block.period):
            second = graph.operators[block.start + block.period + offset]
            weight[second.name] = block.copies - 2
            for copy in range(2, block.copies - 1):
                index = block.start + copy * block.period + offset
                left_out.add(index)
                removed = graph.operators[index]
                renamed.update(zip(removed.outputs, second.outputs, strict=True))
    operators = tuple(
        replace(o, inputs=tuple(renamed.get(name, name) for name in o.inputs))
        for i, o in enumerate(graph.operators)
        if i not in left_out
    )
    used = {name for o in operators for name in (*o.inputs, *o.outputs)}
    tensors = tuple(
        t for t in graph.tensors if t.name in used or t.role in (Role.BUFFER, Role.CONSTANT)
    )
    mutations = tuple((buffer, tensor) for buffer, tensor in graph.mutations if tensor in used)
    folded = replace(graph, tensors=tensors, operators=operators, mutations=mutations)
    return Folded(folded, {o.name: weight[o.name] for o in operators})
