"""A dim cut into the pieces that the ranks of an axis hold, and joined from them again.

A piece has a share of each part of its dim (``autopar.ir.sharding.Parts``); without parts it is one
contiguous chunk. The functions that end in ``rows`` work with pieces that lie one below the other,
as collectives send and receive them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from autopar.ir.sharding import (
    Mesh,
    Placement,
    Sharding,
    local_ranges,
    part_sizes,
    sharded_dim,
    sharded_parts,
)

Box = Sequence[tuple[int, int]]
"""(start, stop) of each dim."""


def box(tensor: Tensor, ranges: Box) -> Tensor:
    """A view."""
    for dim, (start, stop) in enumerate(ranges):
        tensor = tensor.narrow(dim, start, stop - start)
    return tensor


def cut_rows(tensor: Tensor, pieces: int, placement: Placement) -> Tensor:
    """All pieces of the dim that ``placement`` divides, along dim 0."""
    dim, parts = _divided(placement)
    if not parts:
        return tensor.contiguous() if dim == 0 else torch.cat(tensor.chunk(pieces, dim))
    shape = list(tensor.shape)
    shape[dim] //= pieces
    rows = tensor.new_empty([pieces * shape[0], *shape[1:]])
    for index, row in enumerate(rows.chunk(pieces)):
        _fill(row, _shares(tensor, pieces, index, placement), dim)
    return rows


def join_rows(rows: Tensor, pieces: int, placement: Placement) -> Tensor:
    """The reverse of ``cut_rows``."""
    dim, parts = _divided(placement)
    if not parts:
        return rows if dim == 0 else torch.cat(rows.chunk(pieces), dim)
    shape = [rows.shape[0] // pieces, *rows.shape[1:]]
    shape[dim] *= pieces
    whole = rows.new_empty(shape)
    for index, row in enumerate(rows.chunk(pieces)):
        put_piece(whole, row, pieces, index, placement)
    return whole


def put_piece(whole: Tensor, part: Tensor, pieces: int, index: int, placement: Placement) -> None:
    """Write one piece where it belongs."""
    dim, _ = _divided(placement)
    start = 0
    for share in _shares(whole, pieces, index, placement):
        share.copy_(part.narrow(dim, start, share.shape[dim]))
        start += share.shape[dim]


def held(whole: Tensor, sharding: Sharding, mesh: Mesh, rank: int) -> Tensor:
    """What ``rank`` holds of a tensor: a view, unless it is put together from parts of a dim."""
    for dim, ranges in enumerate(local_ranges(tuple(whole.shape), sharding, mesh, rank)):
        views = [whole.narrow(dim, start, stop - start) for start, stop in ranges]
        whole = views[0] if len(views) == 1 else torch.cat(views, dim)
    return whole


def _divided(placement: Placement) -> tuple[int, tuple[int, ...]]:
    dim = sharded_dim(placement)
    assert dim is not None, placement
    return dim, sharded_parts(placement)


def _shares(tensor: Tensor, pieces: int, index: int, placement: Placement) -> list[Tensor]:
    """Views: the piece's share of each part."""
    dim, parts = _divided(placement)
    each = torch.split(tensor, list(part_sizes(tensor.shape[dim], parts)), dim)
    return [part.chunk(pieces, dim)[index] for part in each]


def _fill(target: Tensor, shares: Iterable[Tensor], dim: int) -> None:
    start = 0
    for share in shares:
        target.narrow(dim, start, share.shape[dim]).copy_(share)
        start += share.shape[dim]
