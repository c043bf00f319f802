"""What the two matmul kernels share: the order of the tiles, a tile of logits, and the pairs that are no negatives."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of_program(rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Tile (row, column) of a program: eight tiles of rows sweep the columns together, so that L2 serves both."""
    GROUP: tl.constexpr = 8
    tiles_of_rows = tl.cdiv(rows, BLOCK_ROWS)
    in_group = GROUP * tl.cdiv(columns, BLOCK_COLUMNS)
    program = tl.program_id(0)
    first = program // in_group * GROUP
    size = tl.minimum(tiles_of_rows - first, GROUP)
    return first + program % in_group % size, program % in_group // size


@triton.jit
def dot_tile(
    x_tile,  # the tile's first row of x_hat
    y_tile,  # the tile's first row of y_hat
    row,  # int32 [BLOCK_ROWS], counted from there: 32-bit offsets leave registers for the accumulators
    col,
    features,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Dot products of the rows ``row`` and ``col``, float32 [BLOCK_ROWS, BLOCK_COLUMNS]; all must exist."""
    feature = tl.arange(0, BLOCK_FEATURES)
    x_block = x_tile + ((row * features)[:, None] + feature[None, :])
    y_block = y_tile + ((col * features)[None, :] + feature[:, None])
    dots = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for _ in range(0, features, BLOCK_FEATURES):
        x = tl.load(x_block)
        y = tl.load(y_block)
        dots = tl.dot(x, y, dots, input_precision=PRECISION)
        x_block += BLOCK_FEATURES
        y_block += BLOCK_FEATURES
    return dots


@triton.jit
def exclude(values, row_id, col_id, row_inside, col_inside, FILL: tl.constexpr):
    """``values`` with FILL where a pair is no negative. Most tiles have none such, and skip the comparison."""
    overlap = (tl.max(row_id) >= tl.min(col_id)) & (tl.max(col_id) >= tl.min(row_id))
    ragged = (tl.min(row_inside.to(tl.int32)) == 0) | (tl.min(col_inside.to(tl.int32)) == 0)
    if overlap | ragged:
        out = (row_id[:, None] == col_id[None, :]) | (row_inside == 0)[:, None] | (col_inside == 0)[None, :]
        values = tl.where(out, FILL, values)
    return values
