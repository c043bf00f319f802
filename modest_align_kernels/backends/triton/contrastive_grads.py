"""The products of weighted softmaxes with the other side, a block of G at a time.

A kernel recomputes a block of logits and writes G = row_weight exp(S - row_lse) + col_weight exp(S - col_lse), with one
exponential an element; two dense matmuls with float32 sums take it from there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from modest_align_kernels.backends import (
    SMALLEST_LOG2_SUM,
    WORKSPACE_BYTES,
    accumulate_products,
    gain_of,
    gradient_block,
    processors_of,
)
from modest_align_kernels.backends.contract import Logits, Softmaxes
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
from modest_align_kernels.backends.triton.tiles import Tile, choose_tile, input_precision

# Of a softmax whose logsumexp is more binades than this below the shift, exponentials may have vanished.
_FARTHEST = tl.constexpr(-SMALLEST_LOG2_SUM)
# float32's smallest normal number: below it a factor loses digits.
_SMALLEST_FACTOR = tl.constexpr(2.0**-126)


@triton.jit
def shift_of(k):
    """What all logits have subtracted: HEADROOM binades stay above it."""
    return tl.maximum(tl.abs(k) - HEADROOM, 0.0)


@triton.jit
def _softmax_factors(lse, weight, factor, careful, shift, gain, count, tile, BLOCK: tl.constexpr):
    place = tile * BLOCK + tl.arange(0, BLOCK)
    its_lse = tl.load(lse + place, mask=place < count, other=-float("inf"))
    nothing = its_lse == -float("inf")
    past = tl.where(nothing, 0.0, shift - its_lse * LOG2E)
    its_weight = tl.load(weight + place, mask=place < count, other=0.0)
    its_factor = tl.where(nothing, 0.0, its_weight * gain * tl.exp2(past))
    tl.store(factor + place, its_factor)
    lost = (tl.abs(its_factor) < _SMALLEST_FACTOR) & (its_weight != 0.0) & ~nothing
    tl.store(careful + tile, tl.max(((past > _FARTHEST) | lost).to(tl.int32)))


@triton.jit(do_not_specialize=["rows", "col_count"])
def softmax_factors_kernel(
    scale,  # float32, one element
    row_lse,  # float32 [rows]
    col_lse,  # float32 [col_count]
    row_weight,  # float32 [rows]
    col_weight,  # float32 [col_count]
    row_factor,  # float32, whole tiles that cover [rows], written
    col_factor,  # float32, whole tiles that cover all columns, written: 0 from col_count on
    row_careful,  # int32 [tiles of rows], written: whether a softmax of the tile has lost terms or digits
    col_careful,  # int32 [tiles of columns], written, likewise
    rows,
    col_count,
    gain,  # float32
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One tile's weight * gain * 2^(shift - lse): with it one exponential serves a row's and a column's softmax."""
    shift = shift_of(tl.load(scale) * LOG2E)
    tile, tiles_of_rows = tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS)
    if tile < tiles_of_rows:
        _softmax_factors(row_lse, row_weight, row_factor, row_careful, shift, gain, rows, tile, BLOCK_ROWS)
    else:
        tile -= tiles_of_rows
        _softmax_factors(col_lse, col_weight, col_factor, col_careful, shift, gain, col_count, tile, BLOCK_COLUMNS)


@triton.jit
def _softmax_log2(lse):
    """``lse`` in units of log2, so large that the softmax is 0 where nothing takes part."""
    return tl.where(lse == -float("inf"), HUGE, lse * LOG2E)


@triton.jit
def careful_g(
    s,  # logits in units of log2, [rows, columns] of a tile
    row_lse,  # this and the three below: float32, from the tile's first row or column on
    col_lse,
    row_weight,
    col_weight,
    row,  # int32 [rows], existing
    in_columns,  # int32 [columns]
    has_softmax,  # whether a column has one of its own
    gain,
):
    """A tile's G from two exponentials an element."""
    row_log2 = _softmax_log2(tl.load(row_lse + row))
    col_log2 = _softmax_log2(tl.load(col_lse + in_columns, mask=has_softmax, other=-float("inf")))
    row_gain = tl.load(row_weight + row) * gain
    col_gain = tl.load(col_weight + in_columns, mask=has_softmax, other=0.0) * gain
    return tl.exp2(s - row_log2[:, None]) * row_gain[:, None] + tl.exp2(s - col_log2[None, :]) * col_gain[None, :]


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
    row_bounds,  # int32 [tiles of B, 2], likewise: of the ids of each
    col_bounds,  # int32 [tiles of N, 2], likewise
    row_factor,  # float32, whole tiles that cover [B], see softmax_factors_kernel
    col_factor,  # float32, whole tiles that cover [N]
    row_careful,  # int32 [tiles of B]
    col_careful,  # int32 [tiles of N]
    g,  # whole tiles that cover [block_rows, block_columns]: no store needs a mask, and what is past them is not read
    stride,  # elements from row to row of g, a multiple of BLOCK_COLUMNS
    first_row,  # of the block, that of a tile
    block_rows,
    first_col,  # likewise
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
    row_tile, col_tile = row0 // BLOCK_ROWS, col0 // BLOCK_COLUMNS
    meet = ids_meet(row_bounds, col_bounds, row_tile, col_tile, IDS)
    careful = tl.load(row_careful + row_tile) | tl.load(col_careful + col_tile)
    k = tl.load(scale) * LOG2E
    s = k * dot_tile(
        x_tile, y_tile, row, col, width,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_FEATURES, PRECISION,
    )  # fmt: skip

    in_rows, in_columns = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS)
    if careful == 0:
        row_gain, col_gain = tl.load(row_factor + row0 + in_rows), tl.load(col_factor + col0 + in_columns)
        values = tl.exp2(s - shift_of(k)) * (row_gain[:, None] + col_gain[None, :])
    else:
        has_softmax = in_columns < tl.minimum(columns_left, col_count - col0)
        values = careful_g(
            s, row_lse + row0, col_lse + col0, row_weight + row0, col_weight + col0,
            row, in_columns, has_softmax, gain,
        )  # fmt: skip
    # Last, because an excluded pair's logit may be far above the logsumexps.
    values = exclude(
        values, row_ids, col_ids, meet, row0, col0, rows_left, columns_left,
        0.0, IDS, DIAGONAL, BLOCK_ROWS, BLOCK_COLUMNS,
    )  # fmt: skip
    g_tile = g + (g_row0.to(tl.int64) * stride + g_col0)
    tl.store(g_tile + ((in_rows * stride)[:, None] + in_columns[None, :]), values.to(g.dtype.element_ty))


def softmax_factors(
    scale: Tensor, softmaxes: Softmaxes, columns: int, gain: float, tile: Tile
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows' and columns' factors, and which tiles of either need care: see :func:`softmax_factors_kernel`."""
    row_lse, col_lse, row_weight, col_weight = softmaxes
    tiles_of_rows, tiles_of_columns = tile.grid(len(row_lse), columns)
    row_factor = scale.new_empty(tiles_of_rows * tile.block_rows)
    col_factor = scale.new_empty(tiles_of_columns * tile.block_columns)
    row_careful = scale.new_empty(tiles_of_rows, dtype=torch.int32)
    col_careful = scale.new_empty(tiles_of_columns, dtype=torch.int32)
    softmax_factors_kernel[(tiles_of_rows + tiles_of_columns,)](
        scale,
        row_lse,
        col_lse,
        row_weight,
        col_weight,
        row_factor,
        col_factor,
        row_careful,
        col_careful,
        len(row_lse),
        len(col_lse),
        gain,
        BLOCK_ROWS=tile.block_rows,
        BLOCK_COLUMNS=tile.block_columns,
    )
    return row_factor, col_factor, row_careful, col_careful


def contrastive_grads(a: Logits, softmaxes: Softmaxes, grad_x: Tensor, grad_y: Tensor) -> None:
    """See :func:`modest_align_kernels.backends.eager.contrastive_grads`."""
    x_hat, y_hat, scale, row_ids, col_ids, exclude_diagonal, _ = a
    row_lse, col_lse, row_weight, col_weight = softmaxes
    (rows, width), columns = x_hat.shape, y_hat.shape[0]
    tile = choose_tile(x_hat.device, x_hat.dtype)
    row_bounds, col_bounds = ids_bounds(row_ids, col_ids, tile)
    gain = gain_of(x_hat.dtype)
    factors = softmax_factors(scale, softmaxes, columns, gain, tile)
    elements = WORKSPACE_BYTES // x_hat.element_size()
    multiples = tile.block_rows, tile.block_columns
    block = gradient_block(rows, columns, width, elements, *multiples, processors_of(x_hat.device))

    def write_g(i: slice, j: slice, g: Tensor) -> None:
        block_rows, block_columns = i.stop - i.start, j.stop - j.start
        tiles_of_rows, tiles_of_columns = tile.grid(block_rows, block_columns)
        contrastive_grads_kernel[(tiles_of_rows * tiles_of_columns,)](
            x_hat,
            y_hat,
            scale,
            row_lse,
            col_lse,
            row_weight,
            col_weight,
            row_ids,
            col_ids,
            row_bounds,
            col_bounds,
            *factors,
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
