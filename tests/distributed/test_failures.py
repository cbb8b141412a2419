"""A process that ends, sleeps for ever or fails ends the run of all, and says where and why."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch.distributed as dist

from autopar.errors import PeerError
from autopar.ir.graph import OperatorGraph
from autopar.ir.sharding import Mesh
from autopar.ir.strategy import Strategy
from autopar.ops import Proposals
from autopar.runtime.launch import run
from autopar.runtime.peers import Doing
from tests.helpers.cases import Case, call, case, divided
from tests.helpers.pool import World
from tests.helpers.stages import ALONE, Layout, in_order, looped, strategy_of
from tests.helpers.zoo import zoo

PATIENCE_S = 2.0
"""Of processes of which one sleeps for ever."""

LONG_S = 200.0
"""Where nothing takes as long, so that it is not what ends them."""

Deed = Callable[[], None]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep() -> None:
    time.sleep(1000)


def fail() -> None:
    raise ValueError("my model does not like this")


def said(of: Case, strategy: Strategy, at: str, deed: Deed, timeout_s: float) -> dict[int, str]:
    """What the processes said before they ended; a killed one says nothing. ``deed``: of the last
    rank but one, at its action ``at``."""
    ranks = max(rank for stage in strategy.stages for rank in stage.devices) + 1
    with tempfile.TemporaryDirectory() as name:
        world = World(ranks)
        try:
            world.ask(failing, (of, strategy, ranks - 2, at, deed, timeout_s, Path(name)))
        finally:
            world.close()
        return {int(file.name): file.read_text() for file in Path(name).iterdir()}


def failing(
    of: Case, strategy: Strategy, bad: int, at: str, deed: Deed, timeout_s: float, folder: Path
) -> None:
    """On every rank: steps that end the process, as a program does that catches nothing."""
    rank = dist.get_rank()

    def tell(doing: Doing) -> None:
        if rank == bad and doing.what.startswith(at) and not doing.message:
            deed()

    plan = Planned(of.graph, strategy)
    model, inputs = zoo(of.name)
    step = run(plan, model, timeout_s=timeout_s, tell=tell)
    errors: list[Exception] = []
    for _ in range(2):
        try:
            call(step, inputs)
        except Exception as error:
            errors.append(error)
    first, again = errors
    assert isinstance(again, PeerError)
    assert "start all of them again" in str(again)
    notes = " ".join(getattr(first, "__notes__", ()))
    (folder / str(rank)).write_text(f"{type(first).__name__}: {first} {notes}")
    os._exit(1)


@dataclass(frozen=True)
class Planned:
    """What of a plan is run."""

    graph: OperatorGraph
    strategy: Strategy
    proposed: Proposals = ()


def pipelined() -> Strategy:
    of = divided(case("gpt").graph, 4)
    return strategy_of(of, in_order(of.graph, 4), looped(4, ALONE), "1f1b")


def alone(zero: int = 0) -> Strategy:
    """One stage on four processes."""
    of = divided(case("mlp").graph, 2)
    mesh = Mesh((("data", 4),))
    layout = Layout((tuple(range(4)),), (mesh,))
    return strategy_of(of, in_order(of.graph, 1), layout, "1f1b", zero=zero)


def test_a_rank_killed_in_a_schedule_is_named_by_those_that_wait_for_it() -> None:
    found = said(case("gpt"), pipelined(), "2F1", die, LONG_S)
    assert set(found) == {0, 1, 3}
    assert all(text.startswith("PeerError") for text in found.values()), found
    # who notices when depends on who is faster, and the first that ends is missed by others
    for rank, text in found.items():
        assert re.search(rf"rank {rank} at \D*{rank}[FB]\d \(stage {rank}\), step 0", text)
        assert re.search(r"of microbatch \d \(stage \d to \d\) (from|to reach) rank \d", text)
    assert any(re.search("(from|to reach) rank 2", text) for text in found.values())
    for text in found.values():
        assert "has ended" in text
        assert "because memory ran out" in text


def test_a_rank_that_sleeps_for_ever_in_a_schedule_is_given_up() -> None:
    found = said(case("gpt"), pipelined(), "2F1", sleep, PATIENCE_S)
    assert set(found) == {0, 1, 3}
    late = [text for text in found.values() if re.search(r"no answer within \d+ s", text)]
    assert late, found
    assert all("--timeout" in text for text in late)
    assert any("from rank 2" in text for text in found.values())


def test_an_error_of_a_rank_itself_stays_what_it_is_and_says_where() -> None:
    found = said(case("gpt"), pipelined(), "2F1", fail, LONG_S)
    assert set(found) == {0, 1, 2, 3}
    assert found[2] == (
        "ValueError: my model does not like this rank 2 was at 2F1 (stage 2), step 0"
    )
    assert all(found[rank].startswith("PeerError") for rank in (0, 1, 3))


@pytest.mark.parametrize("zero", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_rank_killed_before_a_collective_is_said_by_all_others(zero: int) -> None:
    """One stage: nobody sends it messages, but sums need all."""
    found = said(case("mlp"), alone(zero), "0B1", die, LONG_S)
    assert set(found) == {0, 1, 3}
    for rank, text in found.items():
        assert text.startswith("PeerError"), text
        assert re.search(rf"rank {rank} at 0[FBU]1, step 0: the connection broke", text), text
        assert "has ended" in text


@pytest.mark.slow
def test_a_rank_that_sleeps_before_a_collective_is_given_up() -> None:
    found = said(case("mlp"), alone(), "0B1", sleep, PATIENCE_S)
    assert set(found) == {0, 1, 3}
    assert any(re.search(r"no answer within \d+ s", text) for text in found.values())
    assert all("rank" in text.partition("communicated with")[2] for text in found.values())


def test_a_process_that_never_comes_is_not_waited_for_for_ever() -> None:
    context = multiprocessing.get_context("forkserver")
    mine, theirs = context.Pipe()
    process = context.Process(target=meeting_nobody, args=(theirs, alone()), daemon=True)
    process.start()
    assert mine.poll(60)
    said = mine.recv()
    process.join()
    assert "rank 0 did not meet all 4 processes within 1 s" in said
    assert "1/4" in said
    assert "--rdzv-endpoint" in said


def meeting_nobody(pipe: Connection, strategy: Strategy) -> None:
    free = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # any that is free
    os.environ.update({"RANK": "0", "WORLD_SIZE": "4", **free})
    try:
        run(Planned(case("mlp").graph, strategy), zoo("mlp")[0], timeout_s=1)
    except PeerError as error:
        pipe.send(str(error))
