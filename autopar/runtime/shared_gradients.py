"""Sums of gradients over all stages and copies of stages that hold a parameter, once a step."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.runtime.peers import Peers
from autopar.runtime.pieces import Box, box
from autopar.runtime.step import TrainingStep
from autopar.simulator.shared_gradients import SharedGradient
from autopar.simulator.stages import Pipelined

Groups = dict[tuple[str, int], dist.ProcessGroup]
"""By parameter and kind of its holders: the processes of other rows that have the same piece."""


def groups_of(
    plan: Pipelined, rank: int, *, alone: bool = False, timeout: timedelta | None = None
) -> Groups:
    """Those of this process; every one takes part in making those of all, but for ``alone``."""
    made: dict[tuple[int, ...], dist.ProcessGroup] = {}
    found: Groups = {}
    for shared in plan.shared:
        for number, kind in enumerate(shared.kinds):
            if len(kind.rows) == 1:
                continue
            for alike in zip(*(plan.groups[row] for row in kind.rows), strict=True):
                if alone and rank not in alike:
                    continue
                if alike not in made:
                    made[alike] = dist.new_group(alike, timeout=timeout)
                if rank in alike:
                    found[shared.name, number] = made[alike]
    return found


class _Arriving(NamedTuple):
    """Of what another kind passes on, the part that belongs in a box of this process's piece."""

    kind: int
    put: Box
    piece: Tensor


class _UnderWay(NamedTuple):
    """A message, and the tensor that must stay until it is through."""

    work: dist.Work
    piece: Tensor
    what: str
    peer: int


@dataclass
class SharedGradients:
    """``held``: the stages of this process's row, whose gradients become the sums.
    ``summed_bytes``: of all-reduces; ``sent_bytes``: by (row, row)."""

    plan: Pipelined
    rank: int
    groups: Groups
    held: Mapping[int, TrainingStep]
    peers: Peers
    summed_bytes: int = 0
    sent_bytes: Counter[tuple[int, int]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.row = self.plan.row_of(self.rank)

    @torch.no_grad()
    def exchange(self, step: int) -> None:
        """Parameter by parameter, in one order on all processes."""
        for shared in self.plan.shared:
            if shared.kinds_in(self.row):
                self._exchange(shared, step)

    def _exchange(self, shared: SharedGradient, step: int) -> None:
        totals = {}
        for kind in shared.kinds_in(self.row):
            with self._doing(shared, step, partial(self._alike, shared, kind)):
                totals[kind] = self._sum(shared, kind)
        if len(shared.kinds) > 1:
            with self._doing(shared, step, partial(self._others, shared)):
                totals = self._with_others(shared, totals)
        for kind, total in totals.items():
            for stage in shared.kinds[kind].stages_in(self.row):
                self.held[stage].gradients[shared.name] = total

    def _doing(
        self, shared: SharedGradient, step: int, ranks: Callable[[], Sequence[int]]
    ) -> AbstractContextManager[None]:
        return self.peers.doing(f"the sum of the gradient of {shared.name}, step {step}", ranks)

    # ---- of one kind ---------------------------------------------------------------------------

    def _sum(self, shared: SharedGradient, kind: int) -> Tensor:
        stages = [self.held[stage] for stage in shared.kinds[kind].stages_in(self.row)]
        piece = stages[0].piece(shared.name)
        total = torch.zeros(piece.shape, dtype=piece.dtype, device=piece.device)
        for stage in stages:
            gradient = stage.gradients.pop(shared.name, None)
            if gradient is not None:
                total += gradient
            del gradient
        group = self.groups.get((shared.name, kind))
        if group is not None:
            dist.all_reduce(total, group=group)
            self.summed_bytes += total.numel() * total.element_size()
        return total

    def _alike(self, shared: SharedGradient, kind: int) -> Sequence[int]:
        place = self.plan.groups[self.row].index(self.rank)
        return [self.plan.groups[row][place] for row in shared.kinds[kind].rows]

    # ---- of several kinds ----------------------------------------------------------------------

    def _with_others(self, shared: SharedGradient, sums: dict[int, Tensor]) -> dict[int, Tensor]:
        """Each kind's sum is sent to the others; all add them in one order."""
        arriving = self._passed_on(shared, sums)
        totals = {}
        for number, own in sums.items():
            totals[number] = torch.zeros_like(own)
            for kind in range(len(shared.kinds)):
                if kind == number:
                    totals[number] += own
                for one in arriving[number]:
                    if one.kind == kind:
                        box(totals[number], one.put).add_(one.piece)
        return totals

    def _passed_on(
        self, shared: SharedGradient, sums: dict[int, Tensor]
    ) -> dict[int, list[_Arriving]]:
        """By kind of this row, what has arrived for it. All messages are posted in one order before
        any is waited for."""
        arriving: defaultdict[int, list[_Arriving]] = defaultdict(list)
        under_way: list[_UnderWay] = []
        for passing, message, sender, receiver in shared.deliveries(self.plan.groups):
            if self.rank not in (sender, receiver):
                continue
            if sender == receiver:
                piece = box(sums[passing.source], message.taken)
            elif sender == self.rank:
                piece = box(sums[passing.source], message.taken).contiguous()
                under_way.append(self._send(shared, piece, receiver))
                rows = passing.source_row, passing.target_row
                self.sent_bytes[rows] += piece.numel() * piece.element_size()
            else:
                size = [stop - start for start, stop in message.put]
                piece = sums[passing.target].new_empty(size)
                under_way.append(self._receive(shared, piece, sender))
            if receiver == self.rank:
                arriving[passing.target].append(_Arriving(passing.source, message.put, piece))
        for work, _, what, peer in under_way:
            self.peers.wait(work, what, peer)
        return arriving

    def _send(self, shared: SharedGradient, piece: Tensor, receiver: int) -> _UnderWay:
        what = f"its part of the gradient of {shared.name} to reach"
        work = self.peers.post(lambda: dist.isend(piece, receiver), what, receiver)
        return _UnderWay(work, piece, what, receiver)

    def _receive(self, shared: SharedGradient, piece: Tensor, sender: int) -> _UnderWay:
        what = f"the gradient of {shared.name} from"
        work = self.peers.post(lambda: dist.irecv(piece, sender), what, sender)
        return _UnderWay(work, piece, what, sender)

    def _others(self, shared: SharedGradient) -> Sequence[int]:
        """This process and those that it exchanges pieces with."""
        met = {self.rank}
        for _, _, *ends in shared.deliveries(self.plan.groups):
            if self.rank in ends:
                met.update(ends)
        return sorted(met)


__all__ = ["Groups", "SharedGradients", "groups_of"]
