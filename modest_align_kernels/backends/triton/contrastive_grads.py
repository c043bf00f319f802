"""The products of weighted softmaxes with the other side, a block of G at a time.

A kernel recomputes a block of logits and writes G = row_weight exp(S - row_lse) + col_weight exp(S - col_lse), with one
exponential an element; two dense matmuls with float32 sums take it from there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from modest_align_kernels.backends import WORKSPACE_BYTES, accumulate_products, gradient_block, processors_of
from modest_align_kernels.backends.contract import Logits, Softmaxes
from modest_align_kernels.backends.triton.logits import (
    HEADROOM,
    HUGE,
    LOG2E,
    dot_tile,
    exclude,
    existing,
    ids_meet,
    tile_of_program,
)
from modest_align_kernels.backends.triton.tiles import choose_tile, input_precision


@triton.jit
def _softmax_log2(lse):
    """``lse`` in units of log2, so large that the softmax is 0 where nothing takes part."""
    return tl.where(lse == -float("inf"), HUGE, lse * LOG2E)


@triton.jit
def _largest(log2):
    """The largest logsumexp of those that something takes part in."""
    return tl.max(tl.where(log2 < HUGE, log2, -HUGE))


@triton.jit(do_not_specialize=["first_row", "block_rows", "first_col", "block_columns", "col_count"])
def contrastive_grads_kernel(
    x_hat,  # [B, width], contiguous
    y_hat,  # [N, width], contiguous
    scale,  # float32, one element
    row_lse,  # float32 [B]
    col_lse,  # float32 [col_count]
    row_weight,  # float32 [B]
    col_weight,  # float32 [col_count]
    row_ids,  # int32 [B], read with IDS only
    col_ids,  # int32 [N], likewise
    g,  # whole tiles that cover [block_rows, block_columns]: no store needs a mask, and what is past them is not read
    stride,  # elements from row to row of g, a multiple of BLOCK_COLUMNS
    first_row,
    block_rows,
    first_col,
    block_columns,
    col_count,  # columns with a softmax of their own
    width,
    gain,  # float32
    IDS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of G times the gain that keeps float16 normal."""
    tile_row, tile_col = tile_of_program(block_rows, block_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    g_row0, g_col0 = tile_row * BLOCK_ROWS, tile_col * BLOCK_COLUMNS
    row0, col0 = first_row + g_row0, first_col + g_col0
    rows_left, columns_left = block_rows - g_row0, block_columns - g_col0
    row, col = existing(rows_left, BLOCK_ROWS), existing(columns_left, BLOCK_COLUMNS)
    x_tile, y_tile = x_hat + row0.to(tl.int64) * width, y_hat + col0.to(tl.int64) * width
    meet = ids_meet(row_ids, col_ids, row0 + row, col0 + col, IDS)
    k = tl.load(scale) * LOG2E
    s = k * dot_tile(
        x_tile, y_tile, row, col, width,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_FEATURES, PRECISION,
    )  # fmt: skip

    # Loads stand where their values are wanted, some twice: the columns' would hold registers that accumulators need.
    in_rows, in_columns = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS)
    has_softmax = in_columns < tl.minimum(columns_left, col_count - col0)
    row_log2 = _softmax_log2(tl.load(row_lse + row0 + row))
    col_log2 = _softmax_log2(tl.load(col_lse + col0 + in_columns, mask=has_softmax, other=-float("inf")))
    # With every logsumexp of the tile within HEADROOM of the lowest, one exponential serves both softmaxes: S is at
    # most the larger one's, and what underflows 126 binades below the lowest is nothing to either.
    low = tl.minimum(tl.min(row_log2), tl.min(col_log2))
    if tl.maximum(_largest(row_log2), _largest(col_log2)) - low <= HEADROOM:
        row_gain = tl.load(row_weight + row0 + row) * gain * tl.exp2(low - row_log2)
        col_gain = tl.load(col_weight + col0 + in_columns, mask=has_softmax, other=0.0) * gain * tl.exp2(low - col_log2)
        values = tl.exp2(s - low) * (row_gain[:, None] + col_gain[None, :])
    else:
        row_log2 = _softmax_log2(tl.load(row_lse + row0 + row))
        col_log2 = _softmax_log2(tl.load(col_lse + col0 + in_columns, mask=has_softmax, other=-float("inf")))
        row_gain = tl.load(row_weight + row0 + row) * gain
        col_gain = tl.load(col_weight + col0 + in_columns, mask=has_softmax, other=0.0) * gain
        values = tl.exp2(s - row_log2[:, None]) * row_gain[:, None]
        values += tl.exp2(s - col_log2[None, :]) * col_gain[None, :]
    # Last, because an excluded pair's logit may be far above the logsumexps.
    values = exclude(
        values, row_ids, col_ids, meet, row0, col0, rows_left, columns_left,
        0.0, IDS, DIAGONAL, BLOCK_ROWS, BLOCK_COLUMNS,
    )  # fmt: skip
    g_tile = g + (g_row0.to(tl.int64) * stride + g_col0)
    tl.store(g_tile + ((in_rows * stride)[:, None] + in_columns[None, :]), values.to(g.dtype.element_ty))


def contrastive_grads(a: Logits, softmaxes: Softmaxes, grad_x: Tensor, grad_y: Tensor) -> None:
    """See :func:`modest_align_kernels.backends.eager.contrastive_grads`."""
    x_hat, y_hat, scale, row_ids, col_ids, exclude_diagonal = a
    row_lse, col_lse, row_weight, col_weight = softmaxes
    (rows, width), columns = x_hat.shape, y_hat.shape[0]
    tile = choose_tile(x_hat.device, x_hat.dtype)
    elements = WORKSPACE_BYTES // x_hat.element_size()
    multiples = tile.block_rows, tile.block_columns
    block = gradient_block(rows, columns, width, elements, *multiples, processors_of(x_hat.device))

    def write_g(i: slice, j: slice, g: Tensor, gain: float) -> None:
        block_rows, block_columns = i.stop - i.start, j.stop - j.start
        tiles = triton.cdiv(block_rows, tile.block_rows) * triton.cdiv(block_columns, tile.block_columns)
        contrastive_grads_kernel[(tiles,)](
            x_hat,
            y_hat,
            scale,
            row_lse,
            col_lse,
            row_weight,
            col_weight,
            row_ids,
            col_ids,
            g,
            g.stride(0),
            i.start,
            block_rows,
            j.start,
            block_columns,
            len(col_lse),
            width,
            gain,
            IDS=row_ids is not None,
            DIAGONAL=exclude_diagonal,
            BLOCK_ROWS=tile.block_rows,
            BLOCK_COLUMNS=tile.block_columns,
            BLOCK_FEATURES=tile.block_features,
            PRECISION=input_precision(x_hat.dtype),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    accumulate_products(a, grad_x, grad_y, block, write_g)
