"""Sums of a side's rows, of all and by group, in an order that is the same in every run.

Rows come in the order of their ids, so that a group is a run of neighbours. A program walks a chunk of them: runs that
lie in it go to the table, and of one that lies in several chunks each leaves a piece. A second kernel adds up the
pieces, and the chunks' totals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# A program's rows, how many of them at a time, and features: 8 for each thread of its one warp. Not yet measured.
_ROWS, _TILE_ROWS, _FEATURES = 64, 4, 256
_INTERPRETER_TILE_ROWS = 16  # whose time goes by operations
# Of pieces, likewise. Not yet measured.
_PIECES, _PIECE_FEATURES = 64, 32


class GroupSums(NamedTuple):
    """The sums of S sides in K kinds: plain, and weighted if K is 2.

    Attributes:
        total: float32 [S, K, width], of all rows.
        table: float32 [S, K, B + 1, width], of each id that has rows, uninitialised for others; None without ids.
        bounds: int32 [S, 2, B + 1], where each id begins and ends in their order, both 0 if it has no rows; or None.
    """

    total: Tensor
    table: Tensor | None
    bounds: Tensor | None


@triton.jit
def _sum_chunk(
    hat,
    order,
    ids,
    weight,
    rows,
    chunk,  # of this side
    kind,
    partial,  # float32 [3, width]: total, piece of a run that began before this chunk, piece of one that opens in it
    open_id,  # int32: that of the run that begins in this chunk and does not end in it, or -1
    table,  # float32 [numbers, width], of this side and kind
    bounds,  # int32 [2, numbers], of this side
    weighted_rows,
    numbers,
    width,
    ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    first, past = chunk * ROWS, tl.minimum((chunk + 1) * ROWS, rows)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    has_feature = feature < width
    total = tl.zeros((FEATURES,), dtype=tl.float32)
    if order is not None:
        earlier_id = tl.load(ids + first - 1, mask=first > 0, other=-1)
        carried, carried_id = total, earlier_id
        if (kind == 0) & (tl.program_id(1) == 0):
            place = first + tl.arange(0, ROWS)
            inside = place < rows
            its_ids = tl.load(ids + place, mask=inside, other=-1)
            begins = its_ids != tl.load(ids + place - 1, mask=inside & (place > 0), other=-1)
            ends = its_ids != tl.load(ids + place + 1, mask=place + 1 < rows, other=-1)
            tl.store(bounds + its_ids, place, mask=inside & begins)
            tl.store(bounds + numbers + its_ids, place + 1, mask=inside & ends)
    for tile_first in range(first, past, TILE_ROWS):
        place = tile_first + tl.arange(0, TILE_ROWS)
        inside = place < rows
        row = tl.load(order + place, mask=inside, other=0) if order is not None else place.to(tl.int64)
        values = hat + ((row * width)[:, None] + feature[None, :])
        tile = tl.load(values, mask=inside[:, None] & has_feature[None, :], other=0.0).to(tl.float32)
        if weight is not None:
            its_weight = tl.load(weight + row, mask=inside & (row < weighted_rows), other=0.0)
            tile *= tl.where(kind == 1, its_weight, 1.0)[:, None]
        total += tl.sum(tile, 0)
        if order is not None:
            its_ids = tl.load(ids + place, mask=inside, other=-1)
            same = its_ids[:, None] == its_ids[None, :]
            runs = tl.sum(tl.where(same[:, :, None], tile[None, :, :], 0.0), 1)
            runs += tl.where((its_ids == carried_id)[:, None], carried[None, :], 0.0)
            ends = inside & (its_ids != tl.load(ids + place + 1, mask=place + 1 < rows, other=-1))
            row_of_table = table + ((its_ids.to(tl.int64) * width)[:, None] + feature[None, :])
            tl.store(row_of_table, runs, mask=(ends & (its_ids != earlier_id))[:, None] & has_feature[None, :])
            earlier_piece = tl.broadcast_to((partial + width + feature)[None, :], (TILE_ROWS, FEATURES))
            tl.store(earlier_piece, runs, mask=(ends & (its_ids == earlier_id))[:, None] & has_feature[None, :])
            last = tl.minimum(tile_first + TILE_ROWS, past) - 1
            carried = tl.sum(tl.where((place == last)[:, None], runs, 0.0), 0)
            carried_id = tl.load(ids + last)
    tl.store(partial + feature, total, mask=has_feature)
    if order is not None:
        opened = -1
        if carried_id == tl.load(ids + past, mask=past < rows, other=-1):
            piece = partial + width
            if carried_id != earlier_id:
                opened = carried_id
                piece += width
            tl.store(piece + feature, carried, mask=has_feature)
        tl.store(open_id, opened)


# Numbers of rows are not specialised: the last, odd batch of an epoch must not compile anew.
@triton.jit(do_not_specialize=["rows", "other_rows", "weighted_rows", "numbers"])
def group_sums_kernel(
    hat,  # [rows, width], contiguous
    order,  # int64 [rows], which row has which place in the order of the ids; None without ids
    ids,  # int32 [rows], in order
    other_hat,  # [other_rows, width], another side; None: there is one
    other_order,
    other_ids,
    weight,  # float32 [weighted_rows], 0 for the other rows; None: there is one kind
    partial,  # float32 [chunks of all sides, kinds, 3, width], written, see _sum_chunk, as what follows
    open_ids,  # int32 [chunks of all sides], written with ids
    table,  # float32 [sides, kinds, numbers, width], likewise
    bounds,  # int32 [sides, 2, numbers], likewise
    rows,
    other_rows,
    weighted_rows,
    numbers,
    width,
    ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """A chunk of rows in one kind: its total, the runs that lie in it, and its pieces of others."""
    KINDS: tl.constexpr = 1 if weight is None else 2
    chunk, kind = tl.program_id(0) // KINDS, tl.program_id(0) % KINDS
    chunks = tl.cdiv(rows, ROWS)
    partial += tl.program_id(0).to(tl.int64) * 3 * width
    of_kind = numbers.to(tl.int64) * width
    if order is not None:
        open_ids += chunk
        table += kind * of_kind
    if other_hat is None:  # noqa: SIM114 - decided when this is compiled, the next one when it runs
        _sum_chunk(
            hat, order, ids, weight, rows, chunk, kind, partial, open_ids, table, bounds,
            weighted_rows, numbers, width, ROWS, TILE_ROWS, FEATURES,
        )  # fmt: skip
    elif chunk < chunks:
        _sum_chunk(
            hat, order, ids, weight, rows, chunk, kind, partial, open_ids, table, bounds,
            weighted_rows, numbers, width, ROWS, TILE_ROWS, FEATURES,
        )  # fmt: skip
    else:
        if order is not None:
            table += KINDS * of_kind
            bounds += 2 * numbers
        _sum_chunk(
            other_hat, other_order, other_ids, weight, other_rows, chunk - chunks, kind, partial, open_ids, table,
            bounds, weighted_rows, numbers, width, ROWS, TILE_ROWS, FEATURES,
        )  # fmt: skip


@triton.jit
def _add_up(pieces, stride, count, feature, has_feature, PIECES: tl.constexpr, FEATURES: tl.constexpr):
    """The sum of ``count`` pieces, ``stride`` elements from one to the next."""
    in_pieces = tl.arange(0, PIECES)
    # Each element keeps a sum of its own until the end: no load waits for a sum.
    sums = tl.zeros((PIECES, FEATURES), dtype=tl.float32)
    block = pieces + (in_pieces[:, None] * stride + feature[None, :])
    for first in range(0, count, PIECES):
        sums += tl.load(block, mask=(in_pieces < count - first)[:, None] & has_feature[None, :], other=0.0)
        block += PIECES * stride
    return tl.sum(sums, 0)


@triton.jit(do_not_specialize=["rows", "chunks", "numbers"])
def fold_sums_kernel(
    partial,  # float32 [chunks of all sides, kinds, 3, width]: see _sum_chunk, as the two below
    open_ids,  # int32 [chunks of all sides]; None without ids
    bounds,  # int32 [sides, 2, numbers]
    table,  # float32 [sides, kinds, numbers, width], written: the runs that lie in several chunks
    total,  # float32 [sides, kinds, width], written
    rows,  # of the first side
    chunks,  # of all sides
    numbers,
    width,
    SIDES: tl.constexpr,
    KINDS: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """In one kind the total of a side, or the run that a chunk leaves open."""
    unit, kind = tl.program_id(0) // KINDS, tl.program_id(0) % KINDS
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    has_feature = feature < width
    of_first = tl.cdiv(rows, ROWS)
    stride = width.to(tl.int64) * (3 * KINDS)
    partial += kind * 3 * width
    if unit < SIDES:
        first = tl.where(unit == 0, 0, of_first)
        count = tl.where(unit == SIDES - 1, chunks, of_first) - first
        sums = _add_up(partial + first * stride, stride, count, feature, has_feature, PIECES, FEATURES)
        tl.store(total + tl.program_id(0) * width + feature, sums, mask=has_feature)
    elif open_ids is not None:
        chunk = unit - SIDES
        open_id = tl.load(open_ids + chunk)
        if open_id >= 0:
            side = (chunk >= of_first).to(tl.int32)
            end = tl.load(bounds + (2 * side + 1) * numbers + open_id)
            count = tl.cdiv(end, ROWS) + side * of_first - (chunk + 1)
            partial += chunk * stride
            sums = tl.load(partial + 2 * width + feature, mask=has_feature, other=0.0)
            sums += _add_up(partial + stride + width, stride, count, feature, has_feature, PIECES, FEATURES)
            row = (side * KINDS + kind).to(tl.int64) * numbers + open_id
            tl.store(table + row * width + feature, sums, mask=has_feature)


def group_sums(
    hats: Sequence[Tensor], ids: Sequence[Tensor | None], pairs: int, weight: Tensor | None = None
) -> GroupSums:
    """The sums of one side's rows, or of two sides'.

    Args:
        hats: [rows, width] of each side.
        ids: int32 [rows] of each side, from 0 to ``pairs``, or None for all.
        pairs: B.
        weight: float32, of one side's first rows, 0 for the others; None: there is no weighted kind.
    """
    sides, kinds, numbers, width = len(hats), 1 if weight is None else 2, pairs + 1, hats[0].shape[1]
    rows = [len(hat) for hat in hats]
    chunks = sum(triton.cdiv(count, _ROWS) for count in rows)
    partial = hats[0].new_empty((chunks, kinds, 3, width), dtype=torch.float32)
    total = hats[0].new_empty((sides, kinds, width), dtype=torch.float32)
    table = bounds = open_ids = None
    ordered: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * sides
    if ids[0] is not None:
        table = total.new_empty((sides, kinds, numbers, width))
        bounds, open_ids = ids[0].new_zeros((sides, 2, numbers)), ids[0].new_empty(chunks)
        ordered = [its_ids.sort(stable=True) for its_ids in ids if its_ids is not None]
    (in_order, order), (other_in_order, other_order) = ordered[0], ordered[-1]
    two_sides = sides == 2
    group_sums_kernel[(chunks * kinds, triton.cdiv(width, _FEATURES))](
        hats[0],
        order,
        in_order,
        hats[1] if two_sides else None,
        other_order if two_sides else None,
        other_in_order if two_sides else None,
        weight,
        partial,
        open_ids,
        table,
        bounds,
        rows[0],
        rows[-1],
        0 if weight is None else len(weight),
        numbers,
        width,
        ROWS=_ROWS,
        TILE_ROWS=_TILE_ROWS if total.is_cuda else _INTERPRETER_TILE_ROWS,
        FEATURES=_FEATURES,
        num_warps=1,
    )
    units = sides + (chunks if table is not None else 0)
    fold_sums_kernel[(units * kinds, triton.cdiv(width, _PIECE_FEATURES))](
        partial,
        open_ids,
        bounds,
        table,
        total,
        rows[0],
        chunks,
        numbers,
        width,
        SIDES=sides,
        KINDS=kinds,
        ROWS=_ROWS,
        PIECES=_PIECES,
        FEATURES=_PIECE_FEATURES,
    )
    return GroupSums(total, table, bounds)
