"""Sees every operator of a dry run: which memory is alive, and which collectives are executed."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from autopar.runtime.recorder import Listening, Recorder


@dataclass(frozen=True, slots=True)
class Piece:
    """Memory that is alive at the peak: how much, what it is, and which operator made it."""

    size_bytes: int
    kind: str
    made_by: str


@dataclass
class MemoryWatch:
    """Live bytes by following the storages of all tensors from their making to their end.

    Views share their base's storage and count once. What a kernel allocates and frees inside, and
    what the allocator rounds up, is not seen.
    """

    live_bytes: int = 0
    peak_bytes: int = 0
    peak_at: str = ""
    _seen: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    _made: int = 0
    _alive: dict[int, Piece] = field(default_factory=dict)
    _before: dict[int, Piece] = field(default_factory=dict)
    _events: list[tuple[int, int, Piece]] = field(default_factory=list)
    _peak_event: int = 0

    def keep(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Count ``tensors``, which are there before the step."""
        for tensor in tensors:
            self._see(tensor, kind, kind)

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count ``tensors``, nor views of them."""
        for tensor in tensors:
            self._seen[tensor.untyped_storage()] = 0

    def restart(self) -> None:
        """Forget the peak; what is alive stays counted."""
        self._before = dict(self._alive)
        self._events.clear()
        self._peak_event = 0
        self.peak_bytes, self.peak_at = self.live_bytes, "start"

    def see(self, tensors: Iterable[Tensor], operator: str, phase: str) -> None:
        """An operator has returned ``tensors``."""
        for tensor in tensors:
            self._see(tensor, phase, operator)
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_at = self.live_bytes, f"{operator} in {phase}"
            self._peak_event = len(self._events)

    def alive(self) -> Counter[Piece]:
        """All that is alive now."""
        return Counter(self._alive.values())

    def at_peak(self) -> tuple[Piece, ...]:
        """All that is alive at the peak, the largest first."""
        alive = dict(self._before)
        for number, change, piece in self._events[: self._peak_event]:
            if change > 0:
                alive[number] = piece
            else:
                del alive[number]
        return tuple(sorted(alive.values(), key=lambda piece: -piece.size_bytes))

    def _see(self, tensor: Tensor, kind: str, made_by: str) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._made += 1
        piece = Piece(storage.nbytes(), kind, made_by)
        self._seen[storage] = self._made
        self._alive[self._made] = piece
        self._change(self._made, 1, piece)
        weakref.finalize(storage, self._end, self._made).atexit = False

    def _end(self, number: int) -> None:
        self._change(number, -1, self._alive.pop(number))

    def _change(self, number: int, sign: int, piece: Piece) -> None:
        self.live_bytes += sign * piece.size_bytes
        self._events.append((number, sign, piece))


class Watch(Listening):  # type: ignore[no-untyped-call]
    """Enter it inside the fake tensor mode: it sees operators after autograd took them apart."""

    def __init__(self, memory: MemoryWatch, recorder: Recorder) -> None:
        super().__init__(recorder)
        self.memory = memory

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.partition("::")[2]
        if name == "wait_tensor" and isinstance(args[0], FakeTensor):
            return args[0]  # so does the real one, which waits; the fake one makes a new tensor
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.memory.see(_tensors(result), name, self.recorder.phase)
        return result


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                yield leaf


def device_for_dry_runs() -> torch.device:
    """Fake tensors need the kernels' registrations of their device, not the device itself: a build
    of torch without CUDA dies on a fake CUDA tensor that needs a gradient."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
