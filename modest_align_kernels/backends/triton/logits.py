"""What the two matmul kernels share: numbers, the order of the tiles, a tile of logits, and its excluded pairs."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from modest_align_kernels import backends
from modest_align_kernels.backends.triton.tiles import Tile

LOG2E = tl.constexpr(backends.LOG2E)
HEADROOM = tl.constexpr(backends.HEADROOM)
# In place of an infinity, whose difference with another one would be NaN; exp2 of minus this is 0.
HUGE = tl.constexpr(1e30)


@triton.jit
def place_of_tile(tile, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Tile (row, column), the ``tile``th: eight tiles of rows sweep the columns together, so that L2 serves both."""
    GROUP: tl.constexpr = 8
    tiles_of_rows = tl.cdiv(rows, BLOCK_ROWS)
    in_group = GROUP * tl.cdiv(columns, BLOCK_COLUMNS)
    first = tile // in_group * GROUP
    size = tl.minimum(tiles_of_rows - first, GROUP)
    return first + tile % in_group % size, tile % in_group // size


@triton.jit
def tile_of_program(rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Tile (row, column) of a program."""
    return place_of_tile(tl.program_id(0), rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)


@triton.jit
def existing(count, BLOCK: tl.constexpr):
    """[0, BLOCK), the first in place of those from ``count`` on: what loads them needs no mask."""
    place = tl.arange(0, BLOCK)
    return tl.where(place < count, place, 0)


@triton.jit
def dot_tile(
    x_tile,  # the tile's first row of x_hat
    y_tile,  # the tile's first row of y_hat
    row,  # int32 [BLOCK_ROWS], counted from there: 32-bit offsets leave registers for the accumulators
    col,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Dot products of the rows ``row`` and ``col``, float32 [BLOCK_ROWS, BLOCK_COLUMNS]; all must exist."""
    feature = tl.arange(0, BLOCK_FEATURES)
    x_block = x_tile + ((row * width)[:, None] + feature[None, :])
    y_block = y_tile + ((col * width)[None, :] + feature[:, None])
    dots = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for _ in range(0, width, BLOCK_FEATURES):
        x = tl.load(x_block)
        y = tl.load(y_block)
        dots = tl.dot(x, y, dots, input_precision=PRECISION)
        x_block += BLOCK_FEATURES
        y_block += BLOCK_FEATURES
    return dots


@triton.jit
def ids_meet(row_bounds, col_bounds, row_tile, col_tile, IDS: tl.constexpr):
    """Whether the ids of two tiles lie in ranges that overlap, see :func:`ids_bounds_kernel`."""
    meet = False
    if IDS:
        row_bounds += 2 * row_tile
        col_bounds += 2 * col_tile
        meet = tl.load(row_bounds + 1) >= tl.load(col_bounds)
        meet = meet & (tl.load(col_bounds + 1) >= tl.load(row_bounds))
    return meet


@triton.jit
def exclude(
    values,  # [BLOCK_ROWS, BLOCK_COLUMNS]
    row_ids,  # int32 [B], read with IDS only
    col_ids,  # int32 [N], likewise
    meet,  # of the tile, see ids_meet
    row0,  # the tile's first row
    col0,
    row_count,  # how many of the tile's rows exist
    col_count,
    FILL: tl.constexpr,
    IDS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """``values`` with FILL where a pair is excluded. Most tiles have none such, and compare nothing."""
    row, col = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS)
    if DIAGONAL:
        diagonal = row0 - col0
        if (diagonal < BLOCK_COLUMNS) & (diagonal > -BLOCK_ROWS):
            values = tl.where((row + diagonal)[:, None] == col[None, :], FILL, values)
    if IDS:
        row_inside, col_inside = row < row_count, col < col_count
        if meet:
            # Loaded again, because ids held through the loop would cost it registers.
            row_id = tl.load(row_ids + row0 + row, mask=row_inside, other=0)
            col_id = tl.load(col_ids + col0 + col, mask=col_inside, other=0)
            values = tl.where(row_id[:, None] == col_id[None, :], FILL, values)
    return values


@triton.jit
def _ids_bounds(ids, bounds, count, tile, BLOCK: tl.constexpr):
    first = tile * BLOCK
    its_ids = tl.load(ids + first + existing(count - first, BLOCK))
    tl.store(bounds + 2 * tile, tl.min(its_ids))
    tl.store(bounds + 2 * tile + 1, tl.max(its_ids))


@triton.jit(do_not_specialize=["rows", "columns"])
def ids_bounds_kernel(
    row_ids,  # int32 [rows]
    col_ids,  # int32 [columns]
    row_bounds,  # int32 [tiles of rows, 2], written: the lowest and the highest id
    col_bounds,  # int32 [tiles of columns, 2], likewise
    rows,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The range of one tile's ids, found once: in each program of a matmul these reductions would be barriers."""
    tile, tiles_of_rows = tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS)
    if tile < tiles_of_rows:
        _ids_bounds(row_ids, row_bounds, rows, tile, BLOCK_ROWS)
    else:
        _ids_bounds(col_ids, col_bounds, columns, tile - tiles_of_rows, BLOCK_COLUMNS)


def ids_bounds(row_ids: Tensor | None, col_ids: Tensor | None, tile: Tile) -> tuple[Tensor | None, Tensor | None]:
    """The lowest and the highest id of every tile of rows and of columns; None without ids."""
    if row_ids is None or col_ids is None:
        return None, None
    tiles_of_rows, tiles_of_columns = tile.grid(len(row_ids), len(col_ids))
    row_bounds, col_bounds = row_ids.new_empty((tiles_of_rows, 2)), row_ids.new_empty((tiles_of_columns, 2))
    ids_bounds_kernel[(tiles_of_rows + tiles_of_columns,)](
        row_ids,
        col_ids,
        row_bounds,
        col_bounds,
        len(row_ids),
        len(col_ids),
        BLOCK_ROWS=tile.block_rows,
        BLOCK_COLUMNS=tile.block_columns,
    )
    return row_bounds, col_bounds
