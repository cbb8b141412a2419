"""Gloo processes that stay, so that hundreds of distributed cases import torch once."""

from __future__ import annotations

import atexit
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ANSWER_TIMEOUT_S = 240.0  # a case takes seconds, but the first waits for four imports of torch

JOBS_PER_WORLD = 20
"""Each job makes process groups of its own, whose threads poll until the world is destroyed."""


class Pool:
    """``size`` processes; a job of ``ranks`` runs on the first so many, as a world of its own."""

    def __init__(self, size: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="autopar-pool-")
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        self._worlds = 0
        self._world: tuple[int, str] = (0, "")
        self._jobs = 0
        for _ in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._pipes.append(mine)
            self._processes.append(process)

    def run(self, ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(*args)`` on every rank; the results by rank, or the first failure."""
        if self._world[0] != ranks or self._jobs == JOBS_PER_WORLD:
            self._worlds += 1
            self._jobs = 0
            self._world = (ranks, str(Path(self._folder.name) / f"world{self._worlds}"))
        self._jobs += 1
        for rank in range(ranks):
            self._pipes[rank].send((rank, self._world, function, args))
        answers = []
        for rank in range(ranks):
            if not self._pipes[rank].poll(ANSWER_TIMEOUT_S):
                said = [str(p.recv()[1]) for p in self._pipes[rank + 1 : ranks] if p.poll(0)]
                self._restart()
                raise AssertionError(f"rank {rank} of {ranks} waits; the others: {said or answers}")
            answers.append(self._pipes[rank].recv())
        for rank, (failed, answer) in enumerate(answers):
            if failed:
                raise AssertionError(f"rank {rank} of {ranks}:\n{answer}")
        return [answer for _, answer in answers]

    def _restart(self) -> None:
        """A rank that failed alone leaves the others in a collective for ever."""
        size = len(self._processes)
        self.close()
        Pool.__init__(self, size)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(2)
            process.kill()
        self._folder.cleanup()


@lru_cache(maxsize=1)
def pool() -> Pool:
    """The session's four processes, started when first wanted."""
    started = Pool(4)
    atexit.register(started.close)
    return started


def _serve(pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    world: tuple[int, str] = (0, "")
    while True:
        try:
            rank, wanted, function, args = pipe.recv()
        except EOFError:
            break
        try:
            if wanted != world:
                if dist.is_initialized():
                    dist.destroy_process_group()
                world = wanted
                ranks, store = wanted
                dist.init_process_group(
                    "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks
                )
            pipe.send((False, function(*args)))
        except Exception:
            pipe.send((True, traceback.format_exc()))
    if dist.is_initialized():
        dist.destroy_process_group()
