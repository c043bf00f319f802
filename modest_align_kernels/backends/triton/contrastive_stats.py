"""Logsumexp of every row's and of the first columns' logits from one matmul.

A program computes one tile of logits and leaves log2 of each row's and each column's sum of exponentials in it. Another
kernel merges these partials in a fixed order, so that the result is the same in every run. Rows go in waves, which
bounds the partials' memory at any B.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from modest_align_kernels.backends import SMALLEST_LOG2_SUM, WORKSPACE_BYTES, blocks, even_block
from modest_align_kernels.backends.contract import Logits
from modest_align_kernels.backends.triton.logits import (
    HEADROOM,
    HUGE,
    LOG2E,
    dot_tile,
    exclude,
    existing,
    ids_bounds,
    ids_meet,
    tile_of_program,
)
from modest_align_kernels.backends.triton.tiles import choose_tile, input_precision

_SMALLEST_SUM = tl.constexpr(2.0**SMALLEST_LOG2_SUM)
# Up to this shift no exponential is subnormal: the smallest is 2^-(HEADROOM + 2 shift).
_LOSSLESS_SHIFT = tl.constexpr((126 - HEADROOM.value) / 2)
_LN2 = tl.constexpr(math.log(2))
# A program's block of partial sums: 128 bytes of each of so many tiles. Not yet measured.
_MERGE_TILES, _MERGE_BLOCK = 64, 32


@triton.jit
def _crop(s, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """-inf past the first ``rows`` and ``columns``."""
    if (rows < BLOCK_ROWS) | (columns < BLOCK_COLUMNS):
        exists = (tl.arange(0, BLOCK_ROWS) < rows)[:, None] & (tl.arange(0, BLOCK_COLUMNS) < columns)[None, :]
        s = tl.where(exists, s, -float("inf"))
    return s


@triton.jit(do_not_specialize=["first_row", "wave_rows", "columns", "col_count"])
def contrastive_stats_kernel(
    x_hat,  # [B, width], contiguous
    y_hat,  # [columns, width], contiguous
    scale,  # float32, one element
    row_ids,  # int32 [B], read with IDS only
    col_ids,  # int32 [columns], likewise
    row_bounds,  # int32 [tiles of B, 2], likewise: of the ids of each
    col_bounds,  # int32 [tiles of columns, 2], likewise
    row_partial,  # float32 [tiles of columns, wave_rows]
    col_partial,  # float32 [tiles of wave_rows, col_count]
    first_row,  # of the wave, that of a tile
    wave_rows,
    columns,
    col_count,  # columns with a logsumexp of their own
    width,
    IDS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of a wave: log2 of the sums of 2^(S log2 e) over its columns and over its rows."""
    tile_row, tile_col = tile_of_program(wave_rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    wave_row0, col0 = tile_row * BLOCK_ROWS, tile_col * BLOCK_COLUMNS
    row0 = first_row + wave_row0
    rows_left, columns_left = wave_rows - wave_row0, columns - col0
    row, col = existing(rows_left, BLOCK_ROWS), existing(columns_left, BLOCK_COLUMNS)
    x_tile, y_tile = x_hat + row0.to(tl.int64) * width, y_hat + col0.to(tl.int64) * width
    meet = ids_meet(row_bounds, col_bounds, row0 // BLOCK_ROWS, tile_col, IDS)
    k = tl.load(scale) * LOG2E

    # One shift for the whole tile leaves HEADROOM binades above it, and sums, and 126 below it.
    shift = tl.maximum(tl.abs(k) - HEADROOM, 0.0)
    s = dot_tile(
        x_tile, y_tile, row, col, width,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_FEATURES, PRECISION,
    )  # fmt: skip
    s = exclude(
        s * k - shift, row_ids, col_ids, meet, row0, col0, rows_left, columns_left,
        -float("inf"), IDS, DIAGONAL, BLOCK_ROWS, BLOCK_COLUMNS,
    )  # fmt: skip
    s = _crop(s, rows_left, columns_left, BLOCK_ROWS, BLOCK_COLUMNS)
    e = tl.exp2(s)
    row_sum, col_sum = tl.sum(e, 1), tl.sum(e, 0)
    row_log2, col_log2 = tl.log2(row_sum) + shift, tl.log2(col_sum) + shift

    # Past scale 78 a row's exponentials may all vanish: then its tile is computed again with maxima of its own.
    in_rows, in_columns = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS)
    row_inside, col_inside = in_rows < rows_left, in_columns < columns_left
    if shift > _LOSSLESS_SHIFT:
        smallest = tl.minimum(tl.min(tl.where(row_inside, row_sum, 1.0)), tl.min(tl.where(col_inside, col_sum, 1.0)))
        if smallest < _SMALLEST_SUM:
            s = dot_tile(
                x_tile, y_tile, row, col, width,
                BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_FEATURES, PRECISION,
            )  # fmt: skip
            s = exclude(
                s * k, row_ids, col_ids, meet, row0, col0, rows_left, columns_left,
                -float("inf"), IDS, DIAGONAL, BLOCK_ROWS, BLOCK_COLUMNS,
            )  # fmt: skip
            s = _crop(s, rows_left, columns_left, BLOCK_ROWS, BLOCK_COLUMNS)
            row_max = tl.maximum(tl.max(s, 1), -HUGE)
            row_log2 = tl.log2(tl.sum(tl.exp2(s - row_max[:, None]), 1)) + row_max
            col_max = tl.maximum(tl.max(s, 0), -HUGE)
            col_log2 = tl.log2(tl.sum(tl.exp2(s - col_max[None, :]), 0)) + col_max

    tl.store(row_partial + tile_col.to(tl.int64) * wave_rows + wave_row0 + in_rows, row_log2, mask=row_inside)
    col_place = tile_row.to(tl.int64) * col_count + col0 + in_columns
    tl.store(col_partial + col_place, col_log2, mask=in_columns < col_count - col0)


@triton.jit(do_not_specialize=["tiles", "length"])
def merge_kernel(
    partial,  # float32 [tiles, length], log2 of sums
    lse,  # float32 [length], natural logarithm, merged into
    tiles,
    length,
    BLOCK_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge partial sums into ``lse``: those of every BLOCK_TILES-th tile in order, then these sums in a fixed one."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, in_tiles = place < length, tl.arange(0, BLOCK_TILES)
    # Each element keeps a sum of its own until the end, so that blocks are copied ahead and nothing waits for a sum.
    maximum = tl.full((BLOCK_TILES, BLOCK), -HUGE, dtype=tl.float32)
    total = tl.zeros((BLOCK_TILES, BLOCK), dtype=tl.float32)
    block = partial + (in_tiles.to(tl.int64)[:, None] * length + place[None, :])
    for first in tl.range(0, tiles, BLOCK_TILES, num_stages=3):
        exists = (in_tiles < tiles - first)[:, None] & inside[None, :]
        log2 = tl.load(block, mask=exists, other=-float("inf"))
        larger = tl.maximum(maximum, log2)
        total = total * tl.exp2(maximum - larger) + tl.exp2(log2 - larger)  # a NaN stays one
        maximum = larger
        block += BLOCK_TILES * length.to(tl.int64)
    earlier = tl.load(lse + place, mask=inside, other=0.0) * LOG2E
    largest = tl.maximum(tl.max(maximum, 0), earlier)
    merged = tl.sum(total * tl.exp2(maximum - largest[None, :]), 0) + tl.exp2(earlier - largest)
    tl.store(lse + place, (largest + tl.log2(merged)) * _LN2, mask=inside)


def contrastive_stats(a: Logits, row_lse: Tensor, col_lse: Tensor) -> None:
    """See :func:`modest_align_kernels.backends.eager.contrastive_stats`."""
    x_hat, y_hat, scale, row_ids, col_ids, exclude_diagonal, _ = a
    (rows, width), columns, col_count = x_hat.shape, y_hat.shape[0], len(col_lse)
    tile = choose_tile(x_hat.device, x_hat.dtype)
    tiles_of_columns = triton.cdiv(columns, tile.block_columns)
    row_bounds, col_bounds = ids_bounds(row_ids, col_ids, tile)
    bytes_per_row = 4 * (tiles_of_columns + triton.cdiv(col_count, tile.block_rows))
    row_lse.fill_(-torch.inf)
    col_lse.fill_(-torch.inf)
    for i in blocks(rows, even_block(rows, WORKSPACE_BYTES // bytes_per_row, tile.block_rows)):
        wave_rows = i.stop - i.start
        tiles_of_rows = triton.cdiv(wave_rows, tile.block_rows)
        row_partial = torch.empty((tiles_of_columns, wave_rows), dtype=torch.float32, device=x_hat.device)
        col_partial = torch.empty((tiles_of_rows, col_count), dtype=torch.float32, device=x_hat.device)
        contrastive_stats_kernel[(tiles_of_rows * tiles_of_columns,)](
            x_hat,
            y_hat,
            scale,
            row_ids,
            col_ids,
            row_bounds,
            col_bounds,
            row_partial,
            col_partial,
            i.start,
            wave_rows,
            columns,
            col_count,
            width,
            IDS=row_ids is not None,
            DIAGONAL=exclude_diagonal,
            BLOCK_ROWS=tile.block_rows,
            BLOCK_COLUMNS=tile.block_columns,
            BLOCK_FEATURES=tile.block_features,
            PRECISION=input_precision(x_hat.dtype),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        _merge(row_partial, row_lse[i])
        if col_count:
            _merge(col_partial, col_lse)


def _merge(partial: Tensor, lse: Tensor) -> None:
    tiles, length = partial.shape
    grid = (triton.cdiv(length, _MERGE_BLOCK),)
    merge_kernel[grid](partial, lse, tiles, length, BLOCK_TILES=_MERGE_TILES, BLOCK=_MERGE_BLOCK, num_warps=8)
