"""The ways to do all units of a stage on one layout: of equal units, how many go which way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autopar.simulator.pipeline import StageCost, Time
from autopar.simulator.stage_problem import Alternative, Layout, Unit, kinds_of, sum_of

Kinds = tuple[tuple[int, int], ...]
"""(kind, how many units of it), ascending; units of a kind have the same alternatives."""

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Mix:
    """``counts``: (kind, place of the alternative, how many units)."""

    counts: tuple[tuple[int, int, int], ...]
    cost: StageCost
    synchronisation_s: Time

    @cached_property
    def static_bytes(self) -> int:
        """Parameters, gradients and optimizer states."""
        memory = self.cost.memory
        assert memory is not None
        return memory.parameters_bytes + memory.gradients_bytes + memory.optimizer_bytes

    def work_s(self, split: bool) -> Time:
        """Forward and backward of a microbatch."""
        cost = self.cost
        if not split:
            return cost.forward_s + cost.backward_s
        assert cost.input_gradient_s is not None and cost.weight_gradient_s is not None
        return cost.forward_s + cost.input_gradient_s + cost.weight_gradient_s


class Front:
    """All mixes of a stage's units on a layout, none of which beats another one in every time and
    every memory; the fastest first. ``mix`` makes one of them."""

    def __init__(self, parts: Sequence[_Part], kinds: Sequence[tuple[Alternative, ...]]) -> None:
        self._parts = sorted(parts, key=lambda part: float(part.vector[0] + part.vector[1]))
        self._kinds = kinds
        self._made: dict[int, Mix] = {}
        self._vectors = np.array([part.vector for part in self._parts]).reshape(-1, _Part.SIZE)

    def __len__(self) -> int:
        return len(self._parts)

    def fitting(self, free_bytes: Sequence[tuple[int, int]], split: bool) -> list[int]:
        """Those that have room: for each (bytes, microbatches in flight), parameters and the like
        and so many activations are not more. With ``split``, backwards must have two halves."""
        v = self._vectors
        fits = v[:, 12] == 0 if split else np.ones(len(v), dtype=bool)
        for free, in_flight in free_bytes:
            fits &= v[:, 6] + v[:, 7] * in_flight <= free
        return [int(i) for i in np.nonzero(fits)[0]]

    def mix(self, number: int) -> Mix:
        found = self._made.get(number)
        if found is None:
            counts = self._parts[number].counts
            cost, synchronisation_s = sum_of(
                [self._kinds[kind][place] for kind, place, n in counts for _ in range(n)]
            )
            found = self._made[number] = Mix(counts, cost, synchronisation_s)
        return found


class Mixes:
    """Of the units for one number of microbatches. Worked out once for each content of a stage."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.kind_of, self.kinds = kinds_of(units)
        self._found: dict[tuple[Kinds, Layout], Front] = {}
        self._several: dict[tuple[int, int, Layout], list[_Part]] = {}
        self.layouts_of = [{a.layout: None for a in kind} for kind in self.kinds]

    def kinds_in(self, part: Sequence[int]) -> Kinds:
        return tuple(sorted(Counter(self.kind_of[unit] for unit in part).items()))

    def layouts(self, kinds: Kinds) -> list[Layout]:
        """Those that all of these units have."""
        first, *others = (self.layouts_of[kind] for kind, _ in kinds)
        return [layout for layout in first if all(layout in other for other in others)]

    def of(self, kinds: Kinds, layout: Layout) -> Front:
        found = self._found.get((kinds, layout))
        if found is None:
            parts = [_Part((), np.zeros(_Part.SIZE))]
            for kind, count in kinds:
                parts = _joined(parts, self._of_one_kind(kind, count, layout))
            found = self._found[kinds, layout] = Front(parts, self.kinds)
        return found

    def alternatives(self, mix: Mix, part: Sequence[int]) -> tuple[int, ...]:
        """For each unit of a stage the place of its alternative."""
        left = {
            kind: [a for k, a, n in mix.counts if k == kind for _ in range(n)]
            for kind, _, _ in mix.counts
        }
        return tuple(left[self.kind_of[unit]].pop(0) for unit in part)

    def _of_one_kind(self, kind: int, count: int, layout: Layout) -> list[_Part]:
        found = self._several.get((kind, count, layout))
        if found is None:
            if count == 1:
                found = _not_beaten(
                    [
                        _Part(((kind, place, 1),), _Part.vector_of(alternative))
                        for place, alternative in enumerate(self.kinds[kind])
                        if alternative.layout == layout
                    ]
                )
            else:
                half = count // 2
                found = _joined(
                    self._of_one_kind(kind, half, layout),
                    self._of_one_kind(kind, count - half, layout),
                )
            self._several[kind, count, layout] = found
        return found


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Some units of a stage. ``vector``: all that a mix can be better or worse in, first what adds
    up and then, from ``ADDED`` on, what is the largest of all units."""

    counts: tuple[tuple[int, int, int], ...]
    vector: Vector

    ADDED = 9
    SIZE = 13

    @staticmethod
    def vector_of(alternative: Alternative) -> Vector:
        cost, memory = alternative.cost, alternative.cost.memory
        assert memory is not None
        halves = cost.input_gradient_s is not None and cost.weight_gradient_s is not None
        return np.array(
            [
                float(cost.forward_s),
                float(cost.backward_s),
                float(cost.input_gradient_s or 0),
                float(cost.weight_gradient_s or 0),
                float(cost.update_s),
                float(alternative.synchronisation_s),
                memory.parameters_bytes + memory.gradients_bytes + memory.optimizer_bytes,
                memory.activations_bytes,
                memory.for_weights_bytes,
                memory.forward_bytes,
                memory.backward_bytes,
                memory.update_bytes,
                not halves,
            ],
            dtype=np.float64,
        )


def _joined(first: Sequence[_Part], second: Sequence[_Part]) -> list[_Part]:
    found: dict[tuple[tuple[int, int, int], ...], _Part] = {}
    for a in first:
        for b in second:
            counted: Counter[tuple[int, int]] = Counter()
            for kind, place, n in (*a.counts, *b.counts):
                counted[kind, place] += n
            counts = tuple((kind, place, n) for (kind, place), n in sorted(counted.items()))
            if counts not in found:
                added = a.vector[: _Part.ADDED] + b.vector[: _Part.ADDED]
                largest = np.maximum(a.vector[_Part.ADDED :], b.vector[_Part.ADDED :])
                found[counts] = _Part(counts, np.concatenate((added, largest)))
    return _not_beaten(list(found.values()))


def _not_beaten(parts: Sequence[_Part]) -> list[_Part]:
    """Of those that are equal in everything, the first."""
    kept: list[_Part] = []
    vectors = np.empty((len(parts), _Part.SIZE))
    # what beats another comes before it in this order
    for part in sorted(parts, key=lambda part: tuple(part.vector)):
        if not (vectors[: len(kept)] <= part.vector).all(axis=1).any():
            vectors[len(kept)] = part.vector
            kept.append(part)
    return kept
