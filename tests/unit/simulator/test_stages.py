"""What goes between stages: every device gets what it holds, and nobody waits for ever."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from itertools import product
from random import Random

import numpy as np
import pytest

from autopar.errors import AutoparError
from autopar.ir.sharding import Mesh, local_shape
from autopar.ir.strategy import Strategy
from autopar.schedules import SCHEDULES
from autopar.simulator.stages import Move, messages, pipelined
from tests.helpers.cases import case, divided
from tests.helpers.emulated import held
from tests.helpers.stages import ALONE, PAIR, Layout, in_order, looped, strategy_of

ONE, TWO = Mesh((("a", 1),)), Mesh((("a", 2),))
SIX, GRID = Mesh((("a", 3), ("b", 2))), Mesh((("a", 2), ("b", 2)))
LAID = (
    (("I",), ONE),
    (("R",), TWO),
    (("S(0)",), TWO),
    (("S(1,2)",), TWO),
    (("S(0)", "S(0)"), GRID),
    (("S(1)", "I"), SIX),
    (("I", "S(1,3)"), GRID),
)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(("source", "target"), list(product(LAID, LAID)))
def test_every_device_gets_what_it_holds(source: tuple, target: tuple, together: bool) -> None:  # type: ignore[type-arg]
    whole = np.arange(12 * 12).reshape(12, 12)
    if together and source[1].size != target[1].size:
        return
    found = messages(whole.shape, source, target, together)
    for receiver in range(target[1].size):
        local = np.full(local_shape(whole.shape, *target), -1)
        for message in found:
            if message.receiver == receiver:
                sent = held(whole, *source, message.sender)[box(message.taken)]
                local[box(message.put)] = sent
        assert np.array_equal(local, held(whole, *target, receiver))
    received = sum(message.elements for message in found)
    assert received == target[1].size * local.size, "nothing is sent twice"
    if together and source == target:
        assert all(message.sender == message.receiver for message in found)


def box(ranges: tuple[tuple[int, int], ...]) -> tuple[slice, ...]:
    return tuple(slice(*ends) for ends in ranges)


def test_receivers_of_the_same_take_turns_with_those_that_have_it() -> None:
    found = messages((4,), (("I",), TWO), (("I", "I"), GRID))
    assert [m.sender for m in found] == [0, 1, 0, 1]


def test_stages_of_a_schedule_end_even_if_sending_waits_for_the_receiver() -> None:
    """The instructions of all rows, each move waiting for both of its rows to come to it."""
    of = divided(case("gpt").graph, 4)
    for name, schedule in SCHEDULES.items():
        layout = looped(4, ALONE, 1 if schedule.copies else schedule.chunks)
        operators = in_order(of.graph, len(layout.meshes))
        plan = pipelined(of, strategy_of(of, operators, layout, name))
        waiting = [deque(plan.instructions(row)) for row in range(len(plan.rows))]
        while any(waiting):
            before = sum(map(len, waiting))
            for row in waiting:
                if row and not (
                    isinstance(row[0], Move) and row[0].source_row != row[0].target_row
                ):
                    row.popleft()
            for row in waiting:
                if row and isinstance(row[0], Move):
                    move = row[0]
                    ends = [waiting[move.source_row], waiting[move.target_row]]
                    if all(end and end[0] == move for end in ends):
                        for end in ends:
                            end.popleft()
            assert sum(map(len, waiting)) < before, (name, [row[:1] for row in map(list, waiting)])


def plain() -> Strategy:
    of = divided(case("gpt_tied").graph, 4)
    return strategy_of(of, in_order(of.graph, 2), looped(2, PAIR), "1f1b")


def refused(strategy: Strategy, match: str) -> None:
    with pytest.raises(AutoparError, match=match):
        pipelined(divided(case("gpt_tied").graph, 4), strategy)


def test_what_cannot_be_run_is_refused_by_name() -> None:
    strategy = plain()
    first, second = strategy.stages
    refused(replace(strategy, schedule=None), "needs a schedule, and it has none; there are gpipe")
    refused(replace(strategy, recompute=("nobody",)), "nobody are to be recomputed and are not in")
    refused(replace(strategy, stages=(first, first)), "are in several stages")
    refused(replace(strategy, stages=(first,)), "are in no stage")
    refused(replace(strategy, stages=(first, replace(second, devices=(1, 2)))), "must not overlap")
    refused(
        replace(strategy, stages=(first, replace(second, devices=(2,)))),
        "stage 1 has 1 devices and a mesh of 2",
    )
    refused(
        replace(strategy, stages=(second, first)), "numbered so that each comes after what it reads"
    )
    refused(replace(strategy, schedule="interleaved_1f1b"), "ask for 2 chunks or more")
    refused(replace(strategy, chunks=2), "puts one stage on each group of devices, not 2")


def test_storages_are_over_the_axes_of_the_stage_that_reads() -> None:
    of = divided(case("gpt_tied").graph, 4)
    grid = Mesh((("a", 1), ("b", 2)))
    layout = Layout(((0,), (1, 2)), (ALONE, grid))
    strategy = strategy_of(of, in_order(of.graph, 2), layout, "1f1b")
    first, second = strategy.stages
    assert list(second.storage) == ["tokens.weight"]
    refused(
        replace(strategy, stages=(first, replace(second, storage={}))),
        "the storage of tokens.weight has 1 placements, and the mesh of stage 1, which reads it, 2",
    )
    kept = {**second.storage, "blocks.0.q.weight": second.storage["tokens.weight"]}
    refused(
        replace(strategy, stages=(first, replace(second, storage=kept))),
        "stage 1 says how it keeps blocks.0.q.weight, which none of its operators reads",
    )


def test_an_operator_goes_to_one_stage_whatever_it_reads() -> None:
    """Random cuts: each operator's inputs are made in its stage, arrive, or are the model's."""
    graph = case("unet").graph
    of = divided(graph, 4)
    for seed in range(5):
        layout = looped(3, ALONE)
        strategy = strategy_of(of, in_order(graph, 3), layout, "gpipe", Random(seed))
        for part in pipelined(of, strategy).parts:
            there = {t.name for t in part.graph.tensors}
            made = set(part.graph.inputs) | {p.name for p in part.graph.parameters}
            for operator in part.graph.operators:
                assert set(operator.inputs) <= there
                assert {i for i in operator.inputs if part.graph.by_name[i].role == "input"} <= made
