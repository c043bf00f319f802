"""Logsumexp of the negatives of every row and every column from one matmul.

A program computes one tile of logits and leaves log2 of each row's and each column's sum of exponentials in it. Another
kernel merges these partials in a fixed order, so that the result is the same in every run. Rows go in waves, which
bounds the partials' memory at any B.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from modest_align_kernels.backends import WORKSPACE_BYTES, even_blocks, pair_ids
from modest_align_kernels.backends.triton.logits import dot_tile, exclude, tile_of_program
from modest_align_kernels.backends.triton.tiles import choose_tile, input_precision

_MERGE_BLOCK = 128


@triton.jit(do_not_specialize=["first_row", "wave_rows", "columns", "paired"])
def contrastive_stats_kernel(
    x_hat,  # [B, features], contiguous
    y_hat,  # [columns, features], contiguous
    ids,  # int32 [columns], see pair_ids
    scale,  # float32, one element
    row_partial,  # float32 [tiles of columns, wave_rows]
    col_partial,  # float32 [tiles of wave_rows, paired]
    first_row,
    wave_rows,
    columns,
    paired,  # columns with a softmax of their own
    features,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of a wave: log2 of the sums of 2^(S log2 e) over its columns and over its rows."""
    tile_row, tile_col = tile_of_program(wave_rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    row0, col0 = tile_row * BLOCK_ROWS, tile_col * BLOCK_COLUMNS
    in_rows, in_columns = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS)
    row_inside, col_inside = in_rows < wave_rows - row0, in_columns < columns - col0
    # Rows and columns outside are computed from the tile's first, and left out below: the loop needs no mask.
    row, col = tl.where(row_inside, in_rows, 0), tl.where(col_inside, in_columns, 0)
    x_tile = x_hat + (first_row + row0).to(tl.int64) * features
    y_tile = y_hat + col0.to(tl.int64) * features
    row_id, col_id = tl.load(ids + (first_row + row0) + row), tl.load(ids + col0 + col)
    k = tl.load(scale) * 1.4426950408889634

    # One shift for the whole tile leaves 100 binades above it, and sums, and 126 below it.
    shift = tl.maximum(k - 100.0, 0.0)
    s = dot_tile(
        x_tile, y_tile, row, col, features,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_FEATURES, PRECISION,
    )  # fmt: skip
    e = tl.exp2(exclude(s * k - shift, row_id, col_id, row_inside, col_inside, -float("inf")))
    row_sum, col_sum = tl.sum(e, 1), tl.sum(e, 0)
    row_log2, col_log2 = tl.log2(row_sum) + shift, tl.log2(col_sum) + shift

    # Past scale 78 a row's exponentials may all vanish: then its tile is computed again with maxima of its own.
    smallest = tl.minimum(tl.min(tl.where(row_inside, row_sum, 1.0)), tl.min(tl.where(col_inside, col_sum, 1.0)))
    if (shift > 13.0) & (smallest < 8.271806125530277e-25):  # 2^-80
        s = dot_tile(
            x_tile, y_tile, row, col, features,
            BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_FEATURES, PRECISION,
        )  # fmt: skip
        s = exclude(s * k, row_id, col_id, row_inside, col_inside, -float("inf"))
        row_max = tl.maximum(tl.max(s, 1), -1e30)
        row_log2 = tl.log2(tl.sum(tl.exp2(s - row_max[:, None]), 1)) + row_max
        col_max = tl.maximum(tl.max(s, 0), -1e30)
        col_log2 = tl.log2(tl.sum(tl.exp2(s - col_max[None, :]), 0)) + col_max

    tl.store(row_partial + tile_col.to(tl.int64) * wave_rows + row0 + in_rows, row_log2, mask=row_inside)
    tl.store(
        col_partial + tile_row.to(tl.int64) * paired + col0 + in_columns, col_log2, mask=in_columns < paired - col0
    )


@triton.jit(do_not_specialize=["tiles", "length"])
def merge_kernel(
    partial,  # float32 [tiles, length], log2 of sums
    lse,  # float32 [length], natural logarithm, merged into
    tiles,
    length,
    BLOCK: tl.constexpr,
):
    """Merge partial sums into ``lse``, in the order of the tiles."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < length
    maximum = tl.maximum(tl.load(lse + place, mask=inside, other=0.0) * 1.4426950408889634, -1e30)
    total = tl.where(maximum > -1e30, 1.0, 0.0)
    partial += place
    for _ in range(0, tiles):
        log2 = tl.load(partial, mask=inside, other=0.0)
        larger = tl.maximum(maximum, log2)
        total = total * tl.exp2(maximum - larger) + tl.exp2(log2 - larger)
        maximum = larger
        partial += length
    tl.store(lse + place, (maximum + tl.log2(total)) * 0.6931471805599453, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def positive_kernel(
    x_hat,  # [rows, features], contiguous
    y_hat,  # [at least rows, features], contiguous
    scale,  # float32, one element
    positive,  # float32 [rows]
    rows,
    features,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    """The positives' logits in float32."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    place = (row.to(tl.int64) * features)[:, None] + tl.arange(0, BLOCK_FEATURES)[None, :]
    dots = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    for start in range(0, features, BLOCK_FEATURES):
        inside = (row < rows)[:, None] & (tl.arange(0, BLOCK_FEATURES) < features - start)[None, :]
        x = tl.load(x_hat + place + start, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_hat + place + start, mask=inside, other=0.0).to(tl.float32)
        dots += tl.sum(x * y, 1)
    tl.store(positive + row, dots * tl.load(scale), mask=row < rows)


def contrastive_stats(
    x_hat: Tensor, y_hat: Tensor, scale: Tensor, group_ids: Tensor | None, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`modest_align_kernels.backends.eager.contrastive_stats`."""
    (rows, features), columns = x_hat.shape, y_hat.shape[0]
    tile = choose_tile(x_hat.device, x_hat.dtype)
    paired = rows if symmetric else 0
    positive = torch.empty(rows, dtype=torch.float32, device=x_hat.device)
    positive_kernel[(triton.cdiv(rows, 8),)](
        x_hat, y_hat, scale, positive, rows, features, BLOCK_ROWS=8, BLOCK_FEATURES=128
    )
    row_lse = torch.full((rows,), -torch.inf, dtype=torch.float32, device=x_hat.device)
    col_lse = row_lse.clone()
    ids = pair_ids(x_hat, y_hat, group_ids)
    tiles_of_columns = triton.cdiv(columns, tile.block_columns)
    bytes_per_row = 4 * (tiles_of_columns + triton.cdiv(paired, tile.block_rows))
    for first, last in even_blocks(rows, WORKSPACE_BYTES // bytes_per_row, tile.block_rows):
        wave = last - first
        tiles_of_rows = triton.cdiv(wave, tile.block_rows)
        row_partial = torch.empty((tiles_of_columns, wave), dtype=torch.float32, device=x_hat.device)
        col_partial = torch.empty((tiles_of_rows, paired), dtype=torch.float32, device=x_hat.device)
        contrastive_stats_kernel[(tiles_of_rows * tiles_of_columns,)](
            x_hat,
            y_hat,
            ids,
            scale,
            row_partial,
            col_partial,
            first,
            wave,
            columns,
            paired,
            features,
            BLOCK_ROWS=tile.block_rows,
            BLOCK_COLUMNS=tile.block_columns,
            BLOCK_FEATURES=tile.block_features,
            PRECISION=input_precision(x_hat.dtype),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        _merge(row_partial, row_lse[first:last])
        if symmetric:
            _merge(col_partial, col_lse)
    return positive, row_lse, col_lse


def _merge(partial: Tensor, lse: Tensor) -> None:
    tiles, length = partial.shape
    merge_kernel[(triton.cdiv(length, _MERGE_BLOCK),)](partial, lse, tiles, length, BLOCK=_MERGE_BLOCK)
