"""Waiting for other processes: how long, and what is said when one has ended or does not answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from autopar.errors import PeerError

TIMEOUT_S = 300.0
"""How long a process waits for another one, unless asked otherwise. Gloo's own limit, half an hour,
looks like a program that hangs; NCCL's is ten minutes."""


@dataclass(frozen=True, slots=True)
class Doing:
    """What a process does, such as ``"2F7 of step 3 (stage 2)"``, and the message that it waits
    for, with the other rank."""

    what: str
    message: str = ""
    peer: int | None = None


Tell = Callable[[Doing], None]


def tell_nobody(_: Doing) -> None:
    """Who did not ask is not told."""


@dataclass
class Peers:
    """The other processes, as this one meets them while it does one thing after the other.

    ``timeout_s``: how long it waits for a message, ``None``: as long as its process group or its
    backend says. ``tell`` is called with whatever it begins to do or to wait for. Once something
    has failed nothing more is done with them, since they are no longer at the same point.
    """

    timeout_s: float | None = None
    tell: Tell = tell_nobody

    def __post_init__(self) -> None:
        self.now = Doing("the start")
        self.failure = ""

    @contextmanager
    def doing(self, what: str, ranks: Callable[[], Sequence[int]]) -> Iterator[None]:
        """What goes wrong inside says where. ``ranks``: those that it communicates with, if it
        does, this one among them.

        >>> with Peers().doing("2F7 of step 3 (stage 2)", lambda: (0, 1)):
        ...     raise RuntimeError("[gloo/tcp/pair.cc:553] Connection closed by peer [::1]:80")
        Traceback (most recent call last):
          ...
        autopar.errors.PeerError: rank 0 at 2F7 of step 3 (stage 2): the connection broke while it \
communicated with rank 1: that process, or one that it worked with, has ended. Its own output says \
why; if there is none it was killed, often because memory ran out
        """
        if self.failure:
            raise PeerError(
                f"a step failed before ({self.failure}), and processes that are not at the same "
                "point cannot go on together; start all of them again"
            )
        began_s = time.monotonic()
        try:
            self._begin(Doing(what))
            yield
        except Exception as error:
            others = [rank for rank in ranks() if rank != _rank()]
            if others and _of_communication(error):
                message = self._explained(error, f"communicated with {_named(others)}", began_s)
                raise PeerError(message) from error
            if not isinstance(error, PeerError) and _world_size() > 1:
                error.add_note(f"rank {_rank()} was at {what}")
                self.failure = f"rank {_rank()} at {what}: {type(error).__name__}: {error}"
            raise

    def post(self, start: Callable[[], dist.Work | None], message: str, peer: int) -> dist.Work:
        """Begin a message to or from ``peer``."""
        began_s = time.monotonic()
        try:
            work = start()
        except RuntimeError as error:
            why = self._explained(error, f"posted {message} rank {peer}", began_s)
            raise PeerError(why) from error
        assert work is not None
        return work

    def wait(self, work: dist.Work, message: str, peer: int) -> None:
        """Until ``message``, such as ``"the output of 1F7 from"``, is through."""
        before = self.now
        self._begin(Doing(before.what, message, peer))
        began_s = time.monotonic()
        try:
            if self.timeout_s is None:
                work.wait()
            else:
                work.wait(timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            why = self._explained(error, f"waited for {message} rank {peer}", began_s)
            raise PeerError(why) from error
        self._begin(before)

    def _begin(self, doing: Doing) -> None:
        self.now = doing
        self.tell(doing)

    def _explained(self, error: Exception, waited: str, began_s: float) -> str:
        late = any(word in str(error).lower() for word in ("timed out", "timeout"))
        where = f"rank {_rank()} at {self.now.what}"
        self.failure = (
            f"{where}: no answer within {time.monotonic() - began_s:.0f} s while it {waited}: that "
            "process, or one that it waits for, is stuck or slower than that. See what it does "
            "(py-spy dump), or give it more time with timeout_s (--timeout)"
            if late
            else f"{where}: the connection broke while it {waited}: that process, or one that it "
            "worked with, has ended. Its own output says why; if there is none it was killed, "
            "often because memory ran out"
        )
        return self.failure


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _named(ranks: Sequence[int]) -> str:
    """
    >>> _named([1]), _named(range(2, 12))
    ('rank 1', 'ranks 2, 3, 4, 5 and 6 more')
    """
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(map(str, ranks[:4]))
    return f"ranks {shown}" + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")


def _of_communication(error: Exception) -> bool:
    """Gloo's errors have no type of their own, and say from which of its files they come."""
    said = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and any(word in said for word in ("gloo/", "NCCL", "caused pair closure"))
    )


__all__ = ["TIMEOUT_S", "Doing", "Peers", "Tell", "tell_nobody"]
