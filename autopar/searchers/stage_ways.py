"""Ways through the rows of a shape, and a mean of them that counts the stages of all rows alike.

With stages that all take the same, many ways are about as long. Which of them are passed how often
is a game: one side chooses a mean over ways, the other one where units are, which then count as
often as the mean passes their stage. What the first side can be sure of is a linear programme.

Its ways are the longest ones, with equal stages and with each row in turn a little slower; and
those along a row that are reached with a microbatch before some action of the row, and left with
one after some action.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from ortools.math_opt import model_pb2
from ortools.math_opt.python import mathopt

from autopar.ir.schedule import Rows, Schedule
from autopar.searchers.stage_ramps import StageWeights
from autopar.simulator.stage_problem import rows_of

Array = NDArray[np.float64]
Numbers = NDArray[np.int64]

PARTS = np.array([[1.0, 2.0, 0.0], [1.0, 1.0, 1.0]])
"""Forward, backward and what is put off of a stage, by which ways are compared: without and with
two halves of backwards. Any would do, bounds are best where stages are like that."""

SLOWER = 1.2
"""How much longer a row takes for which the longest way is looked for."""

KINDS = {"F": 0, "B": 1, "I": 1, "W": 2}


@lru_cache(maxsize=1024)
def mean_of_ways(
    schedule: Schedule, stages: int, microbatches: int, chunks: int, free: float
) -> StageWeights:
    """For a chain. ``free``: the part of all units that may be on any stage of their row, while the
    others are on all stages alike."""
    graph = _graph(schedule, stages, microbatches, chunks)
    columns = [*graph.longest_ones, *graph.along_rows]
    return graph.weights(columns, _game(columns, graph.parts, graph.of_row, free, True))


@lru_cache(maxsize=1024)
def mean_along_row(
    schedule: Schedule, stages: int, microbatches: int, chunks: int, free: float, row: int
) -> StageWeights:
    """Of the ways along one row (of those with different stages) only."""
    graph = _graph(schedule, stages, microbatches, chunks)
    columns = [column for column in graph.along_rows if column.of == row]
    columns.append(graph.longest_ones[1 + row])
    return graph.weights(columns, _game(columns, graph.parts, graph.of_row, free, False))


@lru_cache(maxsize=16)
def _graph(schedule: Schedule, stages: int, microbatches: int, chunks: int) -> _Graph:
    chain = tuple((i, i + 1) for i in range(stages - 1))
    return _Graph(rows_of(schedule, stages, microbatches, chunks, chain))


class Column(NamedTuple):
    """A way, or a part of one. ``passed``: for each part of a stage's work how often it is passed
    on each stage; ``last``: the row on which it ends, after the last one where it does not.

    ``of``: the number of a row: what is added to the ways along it, ``begins`` or at their end, one
    of these for each; the ways along a row themselves are such a column with neither.
    """

    passed: Array
    last: int
    of: int | None = None
    begins: bool | None = None


def _game(
    columns: Sequence[Column], parts: Array, of_row: Array, free: float, alike: bool
) -> Array:
    """How often each column counts.

    maximise z, where for each row (or, if these need not count ``alike``, for the sum of all rows)
    z <= (1 - free) (mean of its stages' y) + free (least of them),
    y[s] <= sum over columns of x * (how often it passes s); ways add up to 1, and what they begin
    and end with to as much as there are ways along that row.
    """
    ways, (rows, stages) = len(columns), of_row.shape
    y, least, z = ways, ways + stages, ways + stages + rows  # columns of the matrix come first
    counts = np.einsum("kps,p->ks", np.array([column.passed for column in columns]), parts)
    along = sorted({column.of for column in columns if column.of is not None})
    whole = np.array([column.begins is None for column in columns], dtype=np.float64)
    first_equal = 2 * stages + rows
    matrix = np.zeros((first_equal + 1 + 2 * len(along), z + 1))
    of_stage = np.arange(stages)
    matrix[of_stage, y + of_stage] = 1
    matrix[:stages, :ways] = -counts.T
    matrix[stages + of_stage, least + of_row.argmax(axis=0)] = 1
    matrix[stages + of_stage, y + of_stage] = -1
    of_rows = 2 * stages + (np.arange(rows) if alike else np.zeros(rows, dtype=np.int64))
    matrix[of_rows, z] = 1
    for row, held in zip(of_rows.tolist(), of_row, strict=True):
        matrix[row, y:least] -= (1 - free) / held.sum() * held
    matrix[of_rows, least + np.arange(rows)] = -free
    matrix[first_equal, :ways] = whole
    for k, column in enumerate(columns):
        if column.of is not None:
            here = first_equal + 1 + 2 * along.index(column.of)
            for place, begins in enumerate((True, False)):
                if column.begins in (begins, None):
                    matrix[here + place, k] = 1.0 if column.begins is begins else -1.0
    least_of = np.full(len(matrix), -math.inf)
    least_of[first_equal:] = 0.0
    most_of = np.zeros(len(matrix))
    least_of[first_equal] = most_of[first_equal] = 1.0
    return _exactly(_maximised(matrix, least_of, most_of)[:ways], columns)


def _maximised(matrix: Array, least: Array, most: Array) -> Array:
    """Variables of at least 0 with ``matrix @ variables`` in between, the last as large as can
    be."""
    proto = model_pb2.ModelProto()
    rows, columns = matrix.shape
    proto.variables.ids.extend(range(columns))
    proto.variables.lower_bounds.extend([0.0] * columns)
    proto.variables.upper_bounds.extend([math.inf] * columns)
    proto.variables.integers.extend([False] * columns)
    proto.variables.names.extend([""] * columns)
    proto.linear_constraints.ids.extend(range(rows))
    proto.linear_constraints.lower_bounds.extend(least.tolist())
    proto.linear_constraints.upper_bounds.extend(most.tolist())
    proto.linear_constraints.names.extend([""] * rows)
    of_row, of_column = np.nonzero(matrix)
    proto.linear_constraint_matrix.row_ids.extend(of_row.tolist())
    proto.linear_constraint_matrix.column_ids.extend(of_column.tolist())
    proto.linear_constraint_matrix.coefficients.extend(matrix[of_row, of_column].tolist())
    proto.objective.maximize = True
    proto.objective.linear_coefficients.ids.append(columns - 1)
    proto.objective.linear_coefficients.values.append(1.0)
    model = mathopt.Model.from_model_proto(proto)
    result = mathopt.solve(model, mathopt.SolverType.HIGHS)
    return np.array(result.variable_values(list(model.variables())))


def _exactly(often: Array, columns: Sequence[Column]) -> Array:
    """A mean to the last bit, of what the solver says up to its tolerance."""
    often = np.maximum(0.0, often)
    for of in {column.of for column in columns if column.of is not None}:
        along, begins, ends = (
            [i for i, c in enumerate(columns) if c.of == of and c.begins is which]
            for which in (None, True, False)
        )
        smallest = min(often[begins].sum(), often[ends].sum())
        if smallest <= 0:
            often[[*along, *begins, *ends]] = 0.0
            continue
        for part in (begins, ends):
            often[part] *= often[along].sum() / often[part].sum()
    often /= sum(x for x, column in zip(often, columns, strict=True) if column.begins is None)
    return often


class _Graph:
    """What waits for what, without links: at most two things for each action."""

    def __init__(self, rows: Rows) -> None:
        self.held = list(dict.fromkeys(tuple(sorted({a.stage for a in row})) for row in rows))
        place = {held: number for number, held in enumerate(self.held)}
        stages = 1 + max(max(held) for held in self.held)
        number_of: dict[tuple[int, int, int], int] = {}
        self._row: list[int] = []
        stage: list[int] = []
        kind: list[int] = []
        before: list[int] = []
        for row in rows:
            home = place[tuple(sorted({a.stage for a in row}))]
            previous = -1
            for action in row:
                number = len(stage)
                part = KINDS[action.kind]
                number_of[action.stage, part, action.microbatch] = number
                stage.append(action.stage)
                kind.append(part)
                self._row.append(home)
                before.append(previous)
                previous = number
        reads = []
        for (s, part, m), number in number_of.items():
            wanted = (s - 1, 0, m) if part == 0 else (s + 1, 1, m) if part == 1 else None
            if part == 1 and s == stages - 1:
                wanted = (s, 0, m)
            reads.append(-1 if wanted is None else number_of.get(wanted, -1))
            assert number == len(reads) - 1
        self._stages = stages
        self._stage: Numbers = np.array(stage)
        self._kind: Numbers = np.array(kind)
        self._before: Numbers = np.array(before)
        self._reads: Numbers = np.array(reads)
        self._levels = _levels(self._before, self._reads)
        self._home = next(r for r, held in enumerate(self.held) if 0 in held)
        self.parts: Array = PARTS[int(2 in kind)]
        self.of_row: Array = np.array(
            [[s in held for s in range(stages)] for held in self.held], dtype=np.float64
        )

    def weights(self, columns: Sequence[Column], often: Array) -> StageWeights:
        passed = np.einsum("k,kps->ps", often, np.array([column.passed for column in columns]))
        ends = np.bincount([column.last for column in columns], often, len(self.held) + 1)
        forward, backward, put_off = passed
        return StageWeights(forward, backward, put_off, ends[:-1] @ self.of_row)

    @cached_property
    def longest_ones(self) -> list[Column]:
        """With equal stages, and with those of each row a little slower."""
        equal = np.ones((1, self._stages))
        return self._longest(np.concatenate((equal, equal + (SLOWER - 1) * self.of_row)))

    @cached_property
    def along_rows(self) -> list[Column]:
        """Ways along each row, which reach it with a microbatch and leave it with one."""
        found = []
        none = len(self.held)
        seen: set[int] = set()
        starts = [i for i, before in enumerate(self._before.tolist()) if before < 0]
        for start, end in zip(starts, [*starts[1:], len(self._stage)], strict=True):
            row = self._row[start]
            if row in seen:  # a copy of it
                continue
            seen.add(row)
            stage, kind = self._stage[start:end], self._kind[start:end]
            passed = np.zeros((end - start + 1, 3, self._stages))
            np.add.at(passed, (np.arange(1, end - start + 1), kind, stage), 1)
            passed = passed.cumsum(axis=0)
            found.append(Column(passed[-1], none, row))
            found.append(Column(np.zeros_like(passed[0]), row, row, False))
            for s in self.held[row]:
                for part in (0, 1):
                    at = np.nonzero((stage == s) & (kind == part))[0]
                    if 2 * at[0] < end - start:
                        found.append(Column(self._to(s, part) - passed[at[0]], none, row, True))
                    if 2 * at[-1] >= end - start:
                        rest = passed[-1] - passed[at[-1] + 1]
                        found.append(Column(self._from(s, part) - rest, self._home, row, False))
        return found

    def _to(self, stage: int, part: int) -> Array:
        """What a microbatch passes before it is there."""
        passed = np.zeros((3, self._stages))
        passed[0, : stage if part == 0 else self._stages] = 1
        if part == 1:
            passed[1, stage + 1 :] = 1
        return passed

    def _from(self, stage: int, part: int) -> Array:
        """What it passes afterwards."""
        passed = np.zeros((3, self._stages))
        if part == 0:
            passed[0, stage + 1 :] = 1
        passed[1, : self._stages if part == 0 else stage] = 1
        return passed

    def _longest(self, times: Array) -> list[Column]:
        """The longest way for each row of times of the stages."""
        count = len(self._stage)
        length = times[:, self._stage] * self.parts[self._kind]
        ended = np.zeros((len(times), count + 1))  # the last one: nothing
        for level in self._levels:
            start = np.maximum(ended[:, self._before[level]], ended[:, self._reads[level]])
            ended[:, level] = start + length[:, level]
        passed = np.zeros((len(times), 3, self._stages))
        at = ended[:, :-1].argmax(axis=1)
        every = np.arange(len(times))
        last = [self._row[number] for number in at.tolist()]
        while True:
            there = at >= 0
            if not there.any():
                return [Column(*pair) for pair in zip(passed, last, strict=True)]
            np.add.at(passed, (every[there], self._kind[at[there]], self._stage[at[there]]), 1)
            before, reads = self._before[at], self._reads[at]
            earlier = np.where(ended[every, before] >= ended[every, reads], before, reads)
            at = np.where(there, earlier, -1)


def _levels(before: Numbers, reads: Numbers) -> list[Numbers]:
    """Actions that are as many steps from the beginning; each gives to two others at most."""
    nobody = len(before)
    follows: list[Numbers] = []
    waits = np.zeros(nobody + 1, dtype=np.int64)
    for needed in (before, reads):
        has = np.nonzero(needed >= 0)[0]
        of_this = np.full(nobody + 1, nobody)
        of_this[needed[has]] = has
        follows.append(of_this)
        waits[has] += 1
    found = []
    level: Numbers = np.nonzero(waits[:-1] == 0)[0]
    while len(level):
        found.append(level)
        reached = np.concatenate([of_this[level] for of_this in follows])
        np.subtract.at(waits, reached, 1)
        level = np.unique(reached[(reached < nobody) & (waits[reached] == 0)])
    return found
