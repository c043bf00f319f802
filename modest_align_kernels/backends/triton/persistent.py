"""An experiment, MODEST_ALIGN_EXPERIMENT=triton-persistent: blocks of G by persistent programs of specialised warps.

One warp group copies operands by tensor descriptors, the next tile's already while two others are at this one's
exponentials. The compiler specialises no loop that has an else in it, and spills where a tile can take two ways: tiles
that need care or share ids come again from a second kernel, and PyTorch clears the diagonal. For sm_90 and float16.
This file goes when a GPU has said which is faster.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from modest_align_kernels.backends import (
    WORKSPACE_BYTES,
    accumulate_products,
    gain_of,
    gradient_block,
    processors_of,
)
from modest_align_kernels.backends.contract import Logits, Softmaxes
from modest_align_kernels.backends.triton.contrastive_grads import careful_g, shift_of, softmax_factors
from modest_align_kernels.backends.triton.contrastive_grads import contrastive_grads as contrastive_grads_of_tiles
from modest_align_kernels.backends.triton.logits import LOG2E, dot_tile, existing, ids_bounds, ids_meet, place_of_tile
from modest_align_kernels.backends.triton.tiles import INTERPRETER_TILE, Tile

# Its four warps are one group's: the compiler makes a second one like it, and the one that copies.
TILE = Tile(128, 256, 64, 4, 3)
_RARE_WARPS = 8


@triton.jit(do_not_specialize=["rows", "columns", "first_row", "block_rows", "first_col", "block_columns"])
def persistent_grads_kernel(
    x_hat,  # float16 [rows, width], contiguous
    y_hat,  # float16 [columns, width], contiguous
    scale,  # float32, one element
    row_factor,  # float32, whole tiles that cover [rows], see softmax_factors_kernel
    col_factor,  # float32, whole tiles that cover [columns]
    g,  # as in contrastive_grads_kernel
    stride,  # elements from row to row of g, a multiple of BLOCK_COLUMNS
    rows,
    columns,
    first_row,  # of the block, that of a tile
    block_rows,
    first_col,  # likewise
    block_columns,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    """Every so many'th tile of G with one exponential an element, right where no tile needs care or shares ids."""
    # Not the host's descriptors: the compiler halves a tile between its warp groups, and only these with it.
    x_blocks = tl.make_tensor_descriptor(x_hat, [rows, width], [width, 1], [BLOCK_ROWS, BLOCK_FEATURES])
    y_blocks = tl.make_tensor_descriptor(y_hat, [columns, width], [width, 1], [BLOCK_COLUMNS, BLOCK_FEATURES])
    k = tl.load(scale) * LOG2E
    tiles = tl.cdiv(block_rows, BLOCK_ROWS) * tl.cdiv(block_columns, BLOCK_COLUMNS)
    in_rows, in_columns = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), warp_specialize=True):
        tile_row, tile_col = place_of_tile(tile, block_rows, block_columns, BLOCK_ROWS, BLOCK_COLUMNS)
        g_row0, g_col0 = tile_row * BLOCK_ROWS, tile_col * BLOCK_COLUMNS
        row0, col0 = first_row + g_row0, first_col + g_col0
        dots = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
        for feature in range(0, width, BLOCK_FEATURES):
            dots = tl.dot(x_blocks.load([row0, feature]), y_blocks.load([col0, feature]).T, dots)
        row_gain, col_gain = tl.load(row_factor + row0 + in_rows), tl.load(col_factor + col0 + in_columns)
        values = tl.exp2(dots * k - shift_of(k)) * (row_gain[:, None] + col_gain[None, :])
        g_tile = g + (g_row0.to(tl.int64) * stride + g_col0)
        tl.store(g_tile + ((in_rows * stride)[:, None] + in_columns[None, :]), values.to(g.dtype.element_ty))


@triton.jit(do_not_specialize=["first_row", "block_rows", "first_col", "block_columns", "col_count"])
def rare_grads_kernel(
    x_hat,  # from here to gain as in contrastive_grads_kernel
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
    row_careful,
    col_careful,
    g,
    stride,
    first_row,
    block_rows,
    first_col,
    block_columns,
    col_count,
    width,
    gain,
    IDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,  # of the tables' tiles, a multiple of BLOCK_COLUMNS
):
    """Of every so many'th tile of G those again that need care or share ids."""
    k = tl.load(scale) * LOG2E
    tiles = tl.cdiv(block_rows, BLOCK_ROWS) * tl.cdiv(block_columns, BLOCK_COLUMNS)
    in_rows, in_columns = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
        tile_row, tile_col = place_of_tile(tile, block_rows, block_columns, BLOCK_ROWS, BLOCK_COLUMNS)
        g_row0, g_col0 = tile_row * BLOCK_ROWS, tile_col * BLOCK_COLUMNS
        row0, col0 = first_row + g_row0, first_col + g_col0
        row_tile, col_tile = row0 // BLOCK_ROWS, col0 // TILE_COLUMNS
        rare = (tl.load(row_careful + row_tile) | tl.load(col_careful + col_tile)) != 0
        if rare | ids_meet(row_bounds, col_bounds, row_tile, col_tile, IDS):
            row, col = existing(block_rows - g_row0, BLOCK_ROWS), existing(block_columns - g_col0, BLOCK_COLUMNS)
            x_tile, y_tile = x_hat + row0.to(tl.int64) * width, y_hat + col0.to(tl.int64) * width
            s = k * dot_tile(
                x_tile, y_tile, row, col, width,
                BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_FEATURES, "tf32",
            )  # fmt: skip
            has_softmax = in_columns < col_count - col0
            values = careful_g(
                s, row_lse + row0, col_lse + col0, row_weight + row0, col_weight + col0,
                row, in_columns, has_softmax, gain,
            )  # fmt: skip
            if IDS:
                same = tl.load(row_ids + row0 + row)[:, None] == tl.load(col_ids + col0 + col)[None, :]
                values = tl.where(same, 0.0, values)
            g_tile = g + (g_row0.to(tl.int64) * stride + g_col0)
            tl.store(g_tile + ((in_rows * stride)[:, None] + in_columns[None, :]), values.to(g.dtype.element_ty))


def contrastive_grads(a: Logits, softmaxes: Softmaxes, grad_x: Tensor, grad_y: Tensor) -> None:
    """See :func:`modest_align_kernels.backends.eager.contrastive_grads`."""
    x_hat, y_hat, scale, row_ids, col_ids, exclude_diagonal, _ = a
    row_lse, col_lse, row_weight, col_weight = softmaxes
    (rows, width), columns, device = x_hat.shape, y_hat.shape[0], x_hat.device
    hopper = device.type != "cuda" or (torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9)
    if x_hat.dtype != torch.float16 or not hopper:
        contrastive_grads_of_tiles(a, softmaxes, grad_x, grad_y)
        return
    tile = TILE if device.type == "cuda" else INTERPRETER_TILE
    row_bounds, col_bounds = ids_bounds(row_ids, col_ids, tile)
    gain, programs = gain_of(x_hat.dtype), processors_of(device)
    row_factor, col_factor, *careful = softmax_factors(scale, softmaxes, columns, gain, tile)
    multiples = tile.block_rows, tile.block_columns
    block = gradient_block(rows, columns, width, WORKSPACE_BYTES // x_hat.element_size(), *multiples, programs)
    # The kernel's descriptors lie in memory that Triton asks for; set for the thread that autograd launches from.
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))

    def write_g(i: slice, j: slice, g: Tensor) -> None:
        place = i.start, i.stop - i.start, j.start, j.stop - j.start
        persistent_grads_kernel[(programs,)](
            x_hat,
            y_hat,
            scale,
            row_factor,
            col_factor,
            g,
            g.stride(0),
            rows,
            columns,
            *place,
            width,
            BLOCK_ROWS=tile.block_rows,
            BLOCK_COLUMNS=tile.block_columns,
            BLOCK_FEATURES=tile.block_features,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        rare_grads_kernel[(programs,)](
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
            *careful,
            g,
            g.stride(0),
            *place,
            len(col_lse),
            width,
            gain,
            IDS=row_ids is not None,
            BLOCK_ROWS=tile.block_rows,
            BLOCK_COLUMNS=tile.block_columns // 2,
            BLOCK_FEATURES=tile.block_features,
            TILE_COLUMNS=tile.block_columns,
            num_warps=_RARE_WARPS,
            num_stages=tile.num_stages,
        )
        if exclude_diagonal and -place[1] < i.start - j.start < place[3]:
            g[: place[1], : place[3]].diagonal(i.start - j.start).zero_()

    accumulate_products(a, grad_x, grad_y, block, write_g)
