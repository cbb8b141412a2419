"""Where a traced graph may be cut into stages: runs of operators between which little passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from autopar.ir.graph import OperatorGraph, Role

MOST = 256
"""Units of a graph: of more, every second of the widest cuts is left out."""

FEW = 6
"""Units below which a graph is also cut before each operator that reads a weight: where all widths
are equal, nothing says where little passes."""


def units(graph: OperatorGraph) -> tuple[range, ...]:
    """Positions of the operators of each unit, in the order of the graph; each has work that is
    worth a stage."""
    widths = crossing_bytes(graph)
    heavy = [_reads_a_weight(graph, o.name) for o in graph.operators]
    found = _busy(_no_ridges(_narrow(widths), widths), widths, heavy)
    if len(found) + 1 < FEW:
        before_weights = (i for i, is_heavy in enumerate(heavy) if is_heavy and i)
        found = _busy(sorted({*found, *before_weights}), widths, heavy)
    while len(found) + 1 > MOST:
        found = _thinned(found, widths)
    whole = list(_indivisible(graph))
    found = [cut for cut in found if not any(a < cut <= b for a, b in whole)]
    return tuple(range(a, b) for a, b in pairwise((0, *found, len(heavy))))


def crossing_bytes(graph: OperatorGraph) -> list[int]:
    """For each position, the bytes with a gradient that are made before it and read from it on."""
    made: dict[str, int] = {}
    changes = [0] * (len(graph.operators) + 1)
    last: dict[str, int] = {}
    for i, operator in enumerate(graph.operators):
        for name in operator.inputs:
            if name in made:
                last[name] = i
        made.update((name, i) for name in operator.outputs if graph.by_name[name].differentiable)
    for name, end in last.items():
        changes[made[name] + 1] += graph.spec(name).bytes
        changes[end + 1] -= graph.spec(name).bytes
    widths, width = [], 0
    for change in changes[:-1]:
        width += change
        widths.append(width)
    return widths


def _narrow(widths: Sequence[int]) -> list[int]:
    """Positions where less passes than before, and no less after: of equals in a row the first.

    >>> _narrow([0, 4, 2, 2, 3, 1])
    [2, 5]
    """
    found = []
    for i in range(2, len(widths)):
        end = i
        while end + 1 < len(widths) and widths[end + 1] == widths[i]:
            end += 1
        rises = end + 1 == len(widths) or widths[end + 1] > widths[i]
        if widths[i] < widths[i - 1] and rises:
            found.append(i)
    return found


def _no_ridges(cuts: Sequence[int], widths: Sequence[int]) -> list[int]:
    """Without those at both of whose neighbours less passes, as inside of a residual branch.

    >>> _no_ridges([1, 2, 3, 4], [0, 2, 4, 2, 4])
    [1, 3, 4]
    """
    width = [widths[cut] for cut in cuts]
    inner = range(1, len(cuts) - 1)
    ridges = {i for i in inner if max(width[i - 1], width[i + 1]) < width[i]}
    return [cut for i, cut in enumerate(cuts) if i not in ridges]


def _reads_a_weight(graph: OperatorGraph, name: str) -> bool:
    """Whether it is a product with a parameter, or looks something up in one."""
    inputs = (graph.by_name[read] for read in graph.operator[name].inputs)
    return any(t.role is Role.PARAMETER and len(t.spec.shape) > 1 for t in inputs)


def _busy(cuts: Sequence[int], widths: Sequence[int], heavy: Sequence[bool]) -> list[int]:
    """Without cuts that leave a unit idle: of such a unit's two ends, the wider goes."""
    found = list(cuts)
    while idle := next(_idle(found, heavy), None):
        inside = [cut for cut in idle if 0 < cut < len(heavy)]
        if not inside:
            return []
        found.remove(max(inside, key=lambda cut: widths[cut]))
    return found


def _idle(cuts: Sequence[int], heavy: Sequence[bool]) -> Iterator[tuple[int, int]]:
    for a, b in pairwise((0, *cuts, len(heavy))):
        if not any(heavy[a:b]):
            yield a, b


def _indivisible(graph: OperatorGraph) -> Iterator[tuple[int, int]]:
    """First and last of the operators that read or write a buffer that the step changes."""
    number = {operator.name: i for i, operator in enumerate(graph.operators)}
    for buffer, tensor in graph.mutations:
        places = [number[reader.name] for reader, _ in graph.consumers[buffer]]
        if tensor in graph.producer:
            places.append(number[graph.producer[tensor].name])
        if places:
            yield min(places), max(places)


def _thinned(cuts: Sequence[int], widths: Sequence[int]) -> list[int]:
    """Without every second of the widest cuts.

    >>> _thinned([1, 2, 3, 4], [0, 9, 5, 9, 9])
    [1, 2, 4]
    """
    widest = max(widths[cut] for cut in cuts)
    of_those = [cut for cut in cuts if widths[cut] == widest]
    left_out = set(of_those[1::2] or of_those)
    return [cut for cut in cuts if cut not in left_out]


__all__ = ["crossing_bytes", "units"]
