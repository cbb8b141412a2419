"""Of several processes that fail, the one is named that failed first, and what the others do not
know of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from autopar.errors import AutoparError, InfeasibleError, PeerError
from autopar.runtime.first_cause import Diary, Entry, Failure, chosen, first_cause, leave
from autopar.runtime.peers import Doing

REPORT = """
Failures:
[1]:
  rank      : 0 (local_rank: 0)
  exitcode  : {others} (pid: 7073)
------------------------------------------------------
Root Cause (first observed failure):
[0]:
  rank      : 2 (local_rank: 2)
  exitcode  : {root} (pid: 7074)
"""


def waited(rank: int, time_s: float) -> Failure:
    return Failure(rank, f"rank {rank} waited", 1, True, time_s)


def test_an_error_of_its_own_comes_before_those_of_who_waited() -> None:
    own = Failure(3, "too large a token", 2, False, 9.0)
    found = chosen([waited(0, 1.0), own, waited(1, 2.0)], {}, REPORT.format(others=1, root=-9))
    assert isinstance(found, AutoparError)
    assert (str(found), found.exit_code) == ("too large a token", 2)


@pytest.mark.parametrize("others", [-15, 1])
def test_a_killed_rank_comes_before_those_that_waited_for_it(others: int) -> None:
    diaries = {2: Entry(Doing("2F7 (stage 2), step 3"), 1.0)}
    found = chosen([waited(0, 1.0)], diaries, REPORT.format(others=others, root=-9))
    assert isinstance(found, PeerError)
    assert "rank 2 was ended at 2F7 (stage 2), step 3 by signal 9 (SIGKILL)" in str(found)
    late = chosen([waited(0, 1.0)], diaries, REPORT.format(others=-11, root=1))
    assert "rank 0 was ended by signal 11 (SIGSEGV)" in str(late)


def test_a_chain_of_those_that_wait_ends_with_the_one_that_does_not() -> None:
    diaries = {
        0: Entry(Doing("0B0", "a gradient from", 1), 10.0),
        1: Entry(Doing("1B0", "a gradient from", 2), 11.0),
        2: Entry(Doing("2F0"), 12.0),
    }
    found = str(
        chosen([waited(1, 42.0), waited(0, 41.0)], diaries, REPORT.format(others=1, root=1))
    )
    assert found.splitlines() == [
        "rank 0 waited",
        "rank 1 was at 1B0 for 30 s, waiting for a gradient from rank 2",
        "rank 2 was at 2F0 for 29 s",
    ]


def test_two_that_wait_for_each_other_are_both_named_once() -> None:
    diaries = {r: Entry(Doing(f"{r}B0", "a gradient from", 1 - r), 0.0) for r in (0, 1)}
    found = str(chosen([waited(0, 5.0)], diaries, ""))
    assert found.splitlines()[1:] == [
        "rank 1 was at 1B0 for 5 s, waiting for a gradient from rank 0"
    ]


def test_what_is_left_in_the_folder_is_read_again(tmp_path: Path) -> None:
    assert first_cause(tmp_path, 2, "nothing") is None
    diary = Diary(tmp_path, 1)
    diary(Doing("0F0", "a message that is quite long from", 0))
    diary(Doing("0F1"))
    leave(tmp_path, 0, PeerError("rank 0 waited"))
    assert str(first_cause(tmp_path, 2, REPORT.format(others=1, root=1))) == "rank 0 waited"
    killed = str(
        first_cause(tmp_path, 2, REPORT.replace(": 2 (", ": 1 (").format(others=1, root=-9))
    )
    assert killed.startswith("rank 1 was ended at 0F1 by signal 9")
    leave(tmp_path, 1, InfeasibleError("does not fit"))
    found = first_cause(tmp_path, 2, "")
    assert isinstance(found, AutoparError)
    assert (str(found), found.exit_code) == ("does not fit", InfeasibleError.exit_code)
    leave(tmp_path, 1, KeyError("what"))
    assert "rank 1 failed first:\nKeyError: 'what'" in str(first_cause(tmp_path, 2, ""))
