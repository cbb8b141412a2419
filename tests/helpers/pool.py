"""Gloo processes that stay for some cases, so that hundreds of distributed cases import torch once.

They are forked from a process that has torch: a world of new ones costs a fraction of a second. So
no world is taken down from inside, which gloo does not always survive; its processes are ended.
"""

from __future__ import annotations

import atexit
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic
from typing import Any

ANSWER_TIMEOUT_S = 240.0
"""A case takes seconds, on a machine that does nothing else."""

GRACE_S = 5.0
"""When a rank has failed, the others answer in this time or wait for it for ever."""

PRELOADED = (
    "autopar.runtime.launch",
    "tests.helpers.stage_check",
    *(
        f"transformers.models.{name}.modeling_{name}"
        for name in ("gpt2", "llama", "qwen3", "mixtral", "phi3", "bert", "t5", "vit")
    ),
)
"""What cases import, torch with it: in every process of every world that would take seconds."""

JOBS_PER_WORLD = 20
"""Each job makes process groups of its own, whose threads poll as long as their processes live."""


class Pool:
    """A job of ``ranks`` runs on the processes of the last one, if that had as many."""

    def __init__(self) -> None:
        self._world: World | None = None

    def run(self, ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(*args)`` on every rank; the results by rank, or the first failure."""
        world = self._world
        if world is None or world.ranks != ranks or world.jobs == JOBS_PER_WORLD:
            self.close()
            world = self._world = World(ranks)
        answers = world.ask(function, args)
        failures = {r: said for r, (failed, said) in sorted(answers.items()) if failed}
        if failures or len(answers) < ranks:
            self.close()  # whoever has not answered waits in a collective
            rank, said = next(iter(failures.items()), (None, ""))
            waiting = sorted(set(range(ranks)) - set(answers))
            raise AssertionError(
                f"rank {rank} of {ranks} failed, {waiting or 'none'} did not answer:\n{said}"
            )
        return [answers[rank][1] for rank in range(ranks)]

    def close(self) -> None:
        if self._world is not None:
            self._world.close()
        self._world = None


Answers = dict[int, tuple[bool, Any]]
"""By rank: whether it failed, and the result or what it said."""


class World:
    def __init__(self, ranks: int) -> None:
        self.ranks, self.jobs = ranks, 0
        self._folder = tempfile.TemporaryDirectory(prefix="autopar-pool-")
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOADED])
        store = str(Path(self._folder.name) / "store")
        for rank in range(ranks):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, ranks, store), daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
            self._pipes.append(mine)
            self._processes.append(process)

    def ask(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Answers:
        """The answers; those that are not there in time, or after a failure, are missing."""
        self.jobs += 1
        for pipe in self._pipes:
            pipe.send((function, args))
        answers: Answers = {}
        deadline = monotonic() + ANSWER_TIMEOUT_S
        while len(answers) < self.ranks and monotonic() < deadline:
            open_ = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            for pipe in wait(open_, max(deadline - monotonic(), 0.0)):
                assert isinstance(pipe, Connection)
                rank = self._pipes.index(pipe)
                answers[rank] = self._answer(rank)
                if answers[rank][0]:
                    deadline = min(deadline, monotonic() + GRACE_S)
        return answers

    def _answer(self, rank: int) -> tuple[bool, Any]:
        try:
            failed, said = self._pipes[rank].recv()
        except EOFError:
            self._processes[rank].join(GRACE_S)
            return True, f"the process ended with exit code {self._processes[rank].exitcode}"
        return failed, said

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()


@lru_cache(maxsize=1)
def pool() -> Pool:
    """The session's pool, whose processes are started when first wanted."""
    started = Pool()
    atexit.register(started.close)
    return started


def _serve(pipe: Connection, rank: int, ranks: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((False, function(*args)))
        except Exception:
            pipe.send((True, traceback.format_exc()))
