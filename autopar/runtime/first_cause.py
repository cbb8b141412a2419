"""Of a run that failed: which process failed first, where, and why.

Each process keeps a diary of one line and, when it fails, leaves a note, in a folder of whoever
started it. The line is there also when the process was killed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from autopar.errors import AutoparError, PeerError
from autopar.ir.plan import write_atomically
from autopar.runtime.peers import Doing


class Diary:
    """Keeps in a file what a process does now; a line costs some microseconds."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._file = os.open(folder / f"doing{rank}", os.O_WRONLY | os.O_CREAT)

    def __call__(self, doing: Doing) -> None:
        entry = json.dumps([doing.what, doing.message, doing.peer, time.time()])
        # of an older, longer entry something stays behind the end of this line, which nobody reads
        os.pwrite(self._file, entry.encode() + b"\n", 0)


@dataclass(frozen=True, slots=True)
class Entry:
    """A diary's line, and since when."""

    doing: Doing
    since_s: float


@dataclass(frozen=True, slots=True)
class Failure:
    """``exit_code`` 0: not one of autopar's errors. ``of_peer``: it waited for another process."""

    rank: int
    message: str
    exit_code: int
    of_peer: bool
    time_s: float


def leave(folder: Path, rank: int, error: Exception) -> None:
    """For ``first_cause``, when a process ends with ``error``."""
    known = isinstance(error, AutoparError)
    failure = Failure(
        rank,
        str(error) if known else "".join(traceback.format_exception(error)).strip(),
        error.exit_code if isinstance(error, AutoparError) else 0,
        isinstance(error, PeerError),
        time.time(),
    )
    write_atomically(folder / f"failed{rank}", json.dumps(asdict(failure)))


def first_cause(folder: Path, ranks: int, launcher_said: str) -> Exception | None:
    """What the person who started the run should read; ``None`` if nobody left anything."""
    failures, diaries = [], {}
    for rank in range(ranks):
        note, diary = folder / f"failed{rank}", folder / f"doing{rank}"
        if note.exists():
            failures.append(Failure(**json.loads(note.read_text())))
        line = diary.read_text().partition("\n")[0] if diary.exists() else ""
        if line:
            what, message, peer, since_s = json.loads(line)
            diaries[rank] = Entry(Doing(what, message, peer), since_s)
    return chosen(failures, diaries, launcher_said)


def chosen(
    failures: list[Failure], diaries: Mapping[int, Entry], launcher_said: str
) -> Exception | None:
    """An error of a process's own comes before a killed process, and that before all that the
    others say of it: they fail because of it."""
    in_time = sorted(failures, key=lambda failure: failure.time_s)
    for failure in in_time:
        if not failure.of_peer:
            if not failure.exit_code:
                return RuntimeError(f"rank {failure.rank} failed first:\n{failure.message}")
            error = AutoparError(failure.message)
            error.exit_code = failure.exit_code
            return error
    killed = _killed(launcher_said)
    if killed is not None:
        return PeerError(_of_killed(*killed, diaries))
    if in_time:
        return PeerError(in_time[0].message + _of_stuck(in_time[0], diaries))
    return None


def _killed(launcher_said: str) -> tuple[int, int] | None:
    """The rank and the signal that ended it, by torchrun's report. It ends the others itself, with
    SIGTERM."""
    root = launcher_said.partition("Root Cause")[2]
    for text in (root, launcher_said):
        for rank, code in re.findall(r"rank\s*: (\d+) .*?exitcode\s*: (-?\d+)", text, re.DOTALL):
            if int(code) < 0 and (text is root or int(code) != -signal.SIGTERM):
                return int(rank), -int(code)
    return None


def _of_killed(rank: int, number: int, diaries: Mapping[int, Entry]) -> str:
    where = f" at {diaries[rank].doing.what}" if rank in diaries else ""
    why = (
        "often because memory ran out (`dmesg` says so); then plan with a smaller --memory-limit"
        if number == signal.SIGKILL
        else "in native code, unless somebody sent it the signal"
    )
    return f"rank {rank} was ended{where} by signal {number} ({_signal(number)}), {why}"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def _of_stuck(failure: Failure, diaries: Mapping[int, Entry]) -> str:
    """Who waits for whom, up to the one that waits for nobody."""
    seen, rank = {failure.rank}, failure.rank
    chain = []
    while rank in diaries and (peer := diaries[rank].doing.peer) is not None and peer not in seen:
        rank = peer
        seen.add(rank)
        if rank in diaries:
            doing, since_s = diaries[rank].doing, failure.time_s - diaries[rank].since_s
            waits = f", waiting for {doing.message} rank {doing.peer}" if doing.message else ""
            chain.append(f"rank {rank} was at {doing.what} for {since_s:.0f} s{waits}")
    return "".join(f"\n{link}" for link in chain)


__all__ = ["Diary", "Entry", "Failure", "chosen", "first_cause", "leave"]
