"""The products of the negatives' probabilities with the other side, a block of probabilities at a time.

A kernel recomputes a block of logits and writes G = exp(S - row_lse) + exp(S - col_lse), with one exponential an
element; two dense matmuls with float32 sums take it from there.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from modest_align_kernels.backends import (
    FP16_GAIN,
    WORKSPACE_BYTES,
    accumulate_matmul,
    gradient_blocks,
    pair_ids,
    round_up,
)
from modest_align_kernels.backends.triton.logits import dot_tile, exclude, tile_of_program
from modest_align_kernels.backends.triton.tiles import choose_tile, input_precision


@triton.jit(do_not_specialize=["first_row", "wave_rows", "first_col", "wave_columns", "paired"])
def contrastive_grads_kernel(
    x_hat,  # [B, features], contiguous
    y_hat,  # [N, features], contiguous
    ids,  # int32 [N], see pair_ids
    scale,  # float32, one element
    row_lse,  # float32 [B]
    col_lse,  # float32 [paired]
    probabilities,  # whole tiles that cover [wave_rows, wave_columns]: no store needs a mask
    stride,  # elements from row to row, a multiple of BLOCK_COLUMNS
    first_row,
    wave_rows,
    first_col,
    wave_columns,
    paired,  # columns with a softmax of their own
    features,
    log2_gain,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of G times the gain that keeps float16 normal."""
    tile_row, tile_col = tile_of_program(wave_rows, wave_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    row0, col0 = tile_row * BLOCK_ROWS, tile_col * BLOCK_COLUMNS
    in_rows, in_columns = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS)
    row_inside, col_inside = in_rows < wave_rows - row0, in_columns < wave_columns - col0
    row, col = tl.where(row_inside, in_rows, 0), tl.where(col_inside, in_columns, 0)
    x_tile = x_hat + (first_row + row0).to(tl.int64) * features
    y_tile = y_hat + (first_col + col0).to(tl.int64) * features
    row_id, col_id = tl.load(ids + (first_row + row0) + row), tl.load(ids + (first_col + col0) + col)
    k = tl.load(scale) * 1.4426950408889634
    row_log2 = tl.load(row_lse + (first_row + row0) + row) * 1.4426950408889634 - log2_gain
    has_softmax = col < paired - (first_col + col0)
    col_log2 = tl.load(col_lse + (first_col + col0) + col, mask=has_softmax, other=float("inf"))
    col_log2 = col_log2 * 1.4426950408889634 - log2_gain

    s = dot_tile(
        x_tile, y_tile, row, col, features,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_FEATURES, PRECISION,
    )  # fmt: skip
    s = exclude(s * k, row_id, col_id, row_inside, col_inside, -float("inf"))
    # With every logsumexp of the tile within 100 binades of the lowest, one exponential serves both softmaxes: S is at
    # most the larger one's, and what underflows 126 binades below the lowest is nothing to either.
    low = tl.minimum(tl.min(row_log2), tl.min(col_log2))
    high = tl.maximum(tl.max(row_log2), tl.max(tl.where(col_log2 < float("inf"), col_log2, -float("inf"))))
    if high - low <= 100.0:
        g = tl.exp2(s - low) * (tl.exp2(low - row_log2)[:, None] + tl.exp2(low - col_log2)[None, :])
    else:
        g = tl.exp2(s - row_log2[:, None]) + tl.exp2(s - col_log2[None, :])
    g_tile = probabilities + (row0.to(tl.int64) * stride + col0)
    tl.store(g_tile + ((in_rows * stride)[:, None] + in_columns[None, :]), g.to(probabilities.dtype.element_ty))


def contrastive_grads(
    x_hat: Tensor,
    y_hat: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    group_ids: Tensor | None,
    want_x: bool,
    want_y: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`modest_align_kernels.backends.eager.contrastive_grads`."""
    (rows, features), columns = x_hat.shape, y_hat.shape[0]
    tile = choose_tile(x_hat.device, x_hat.dtype)
    grad_x = torch.empty(x_hat.shape if want_x else 0, dtype=torch.float32, device=x_hat.device)
    grad_y = torch.empty(y_hat.shape if want_y else 0, dtype=torch.float32, device=x_hat.device)
    ids = pair_ids(x_hat, y_hat, group_ids)
    gain = FP16_GAIN if x_hat.dtype == torch.float16 else 1.0
    elements = WORKSPACE_BYTES // x_hat.element_size()
    row_blocks, column_blocks = gradient_blocks(rows, columns, elements, tile.block_rows, tile.block_columns)
    height = round_up(max(b - a for a, b in row_blocks), tile.block_rows)
    width = round_up(max(b - a for a, b in column_blocks), tile.block_columns)
    workspace = torch.empty((height, width), dtype=x_hat.dtype, device=x_hat.device)
    for i0, i1 in row_blocks:
        for j0, j1 in column_blocks:
            tiles_of_rows = triton.cdiv(i1 - i0, tile.block_rows)
            tiles_of_columns = triton.cdiv(j1 - j0, tile.block_columns)
            contrastive_grads_kernel[(tiles_of_rows * tiles_of_columns,)](
                x_hat,
                y_hat,
                ids,
                scale,
                row_lse,
                col_lse,
                workspace,
                workspace.stride(0),
                i0,
                i1 - i0,
                j0,
                j1 - j0,
                rows,
                features,
                math.log2(gain),
                BLOCK_ROWS=tile.block_rows,
                BLOCK_COLUMNS=tile.block_columns,
                BLOCK_FEATURES=tile.block_features,
                PRECISION=input_precision(x_hat.dtype),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
            g = workspace[: i1 - i0, : j1 - j0]
            if want_x:
                accumulate_matmul(grad_x[i0:i1], g, y_hat[j0:j1], first=j0 == 0, alpha=1 / gain)
            if want_y:
                accumulate_matmul(grad_y[j0:j1], g.T, x_hat[i0:i1], first=i0 == 0, alpha=1 / gain)
    return grad_x, grad_y
