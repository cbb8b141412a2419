"""The solver in a process of its own, which can be ended at any moment.

HiGHS looks neither at signals nor at OR-tools' interrupter, and at its time limit only between
steps that may take long. In a process of its own it does not keep Ctrl-C waiting, cannot overrun
its limit, and does not write its remarks where results belong.
"""

from __future__ import annotations

import atexit
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from time import monotonic

from ortools.math_opt import rpc_pb2
from ortools.math_opt.python import mathopt

from autopar.searchers._solver_main import LENGTH_BYTES

GRACE_S = 1.0
"""How long an answer is waited for after the time limit: HiGHS looks at it between steps, and one
step (presolve, the first relaxation) was seen to take so long on problems that are offered to it.
"""

COMMAND = [sys.executable, "-P", str(Path(__file__).with_name("_solver_main.py"))]


class SolverError(Exception):
    """The solver failed: not for what it was asked, but as a program."""


class NoAnswerError(Exception):
    """The solver did not keep to its time limit."""


class Solver:
    """One process, which solves one problem after the other."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            COMMAND,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,  # Ctrl-C is for the one who waits, and ends it
        )

    @property
    def process_id(self) -> int:
        return self._process.pid

    def solve(
        self, model: mathopt.Model, parameters: mathopt.SolveParameters, deadline: float
    ) -> mathopt.SolveResult:
        """The best that is found by ``deadline`` (``time.monotonic``).

        Raises:
            NoAnswerError: not even ``GRACE_S`` later was there an answer.
        """
        limit_s = max(deadline - monotonic(), 0.1)
        parameters.time_limit = timedelta(seconds=limit_s)
        request = rpc_pb2.SolveRequest(
            solver_type=mathopt.SolverType.HIGHS.value,
            model=model.export_model(remove_names=True),
            parameters=parameters.to_proto(),
        )
        answer = self._exchange(request.SerializeToString(), monotonic() + limit_s + GRACE_S)
        response = rpc_pb2.SolveResponse.FromString(answer)
        if response.HasField("status"):
            raise SolverError(response.status.message)
        return mathopt.parse_solve_result(response.result, model, validate=False)

    def _exchange(self, request: bytes, until: float) -> bytes:
        assert self._process.stdin is not None
        try:
            left = memoryview(len(request).to_bytes(LENGTH_BYTES) + request)
            while left:
                left = left[os.write(self._process.stdin.fileno(), left) :]
        except BrokenPipeError:
            raise self._lost() from None
        return self._read(int.from_bytes(self._read(LENGTH_BYTES, until)), until)

    def _read(self, size: int, until: float) -> bytes:
        assert self._process.stdout is not None
        source = self._process.stdout.fileno()
        found = bytearray()
        while len(found) < size:
            ready, _, _ = select.select([source], [], [], max(until - monotonic(), 0.0))
            if not ready:
                raise NoAnswerError
            more = os.read(source, size - len(found))
            if not more:
                raise self._lost()
            found += more
        return bytes(found)

    def _lost(self) -> SolverError:
        return SolverError(
            f"the solver's process ended with code {self._process.wait()} before it answered; "
            f"`{' '.join(COMMAND)} < {os.devnull}` shows whether it starts at all"
        )

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


_idle: list[Solver] = []
"""Started, and not solving anything."""


@contextmanager
def solver() -> Iterator[Solver]:
    """A process for one problem; started now unless one is idle, ended if anything goes wrong."""
    found = _idle.pop() if _idle else Solver()
    try:
        yield found
    except BaseException:
        found.end()
        raise
    _idle.append(found)


def end_all() -> None:
    """End the processes that are idle; the next problem starts one again."""
    while _idle:
        _idle.pop().end()


atexit.register(end_all)
os.register_at_fork(after_in_child=_idle.clear)  # they belong to the parent
