"""Each pair's loss and the weights of its gradient, a program for a block of pairs."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from modest_align_kernels.backends.contract import PairLosses, SmoothedLosses
from modest_align_kernels.backends.triton.group_sums import group_sums
from modest_align_kernels.backends.triton.logits import LOG2E
from modest_align_kernels.backends.triton.perturb_normalize import row_blocks

_PAIRS = 256  # of a program, without smoothing


@triton.jit
def softplus_and_sigmoid(x):
    """log(1 + e^x) and 1 / (1 + e^-x), of which neither loses what is small beside 1; a NaN stays one."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    # log(1 + e) = 2 atanh(q): the hardware's log2 would round away an e that is small.
    q = e / (2.0 + e)
    square = q * q
    series = 1.0 / 13
    for k in tl.static_range(11, 0, -2):
        series = series * square + 1.0 / k
    return tl.where(x > 0, x, 0.0) + 2.0 * q * series, tl.where(x > 0, 1.0, e) / (1.0 + e)


@triton.jit
def _negatives(
    hat,  # [rows, width], contiguous
    row,  # int64 [PAIRS]
    inside,  # which of these there are
    ids,  # int32 [rows]; None without ids
    apart,  # int32 [PAIRS], whether the pair itself is none of the other side's rows with its id
    others,  # how many rows the other side has
    total,  # of the other side, here and below: see GroupSums
    table,
    bounds,
    numbers,
    width,
    FEATURES: tl.constexpr,
):
    """1 / (their number), 0 if there are none, and the product of each row with the others of its id less all."""
    feature = tl.arange(0, FEATURES)
    has_feature = feature < width
    own = -tl.load(total + feature, mask=has_feature, other=0.0)[None, :]
    count = others - apart
    if table is not None:
        its_id = tl.load(ids + row, mask=inside, other=0).to(tl.int64)
        of_id = tl.load(bounds + numbers + its_id, mask=inside, other=0) - tl.load(
            bounds + its_id, mask=inside, other=0
        )
        count -= of_id
        of_table = table + ((its_id * width)[:, None] + feature[None, :])
        own = own + tl.load(of_table, mask=(of_id > 0)[:, None] & has_feature[None, :], other=0.0)
    its_hat = hat + ((row * width)[:, None] + feature[None, :])
    values = tl.load(its_hat, mask=inside[:, None] & has_feature[None, :], other=0.0).to(tl.float32)
    return tl.where(inside & (count > 0), 1.0 / tl.maximum(count, 1), 0.0), tl.sum(values * own, 1)


@triton.jit(do_not_specialize=["pairs", "columns", "col_count"])
def pair_losses_kernel(
    row_lse,  # float32 [pairs]
    col_lse,  # float32 [col_count]
    pair_dot,  # float32 [pairs]
    scale,  # float32, one element
    losses,  # float32 [pairs], written
    row_weight,  # float32 [pairs], written
    col_weight,  # float32 [col_count], written
    pair_weight,  # float32 [pairs], written
    smoothing,  # float32, one element; None: of the tensors below none is there
    x_hat,  # [pairs, width], contiguous
    y_hat,  # [columns, width], contiguous
    row_ids,  # int32 [pairs]; None without ids
    col_ids,  # int32 [columns]
    slope,  # float32 [pairs], written
    row_negative_weight,  # float32 [pairs], written
    col_negative_weight,  # float32 [pairs], written
    total,  # float32 [2, width], of y_hat and, in two directions, of x_hat: see GroupSums, as the two below
    table,  # float32 [2, pairs + 1, width]; None without ids
    bounds,  # int32 [2, 2, pairs + 1]
    pairs,
    columns,
    col_count,  # pairs, or 0: there is one direction
    width,
    PAIRS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """A block of pairs."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    inside, has_column = pair < pairs, pair < col_count
    dot = tl.load(pair_dot + pair, mask=inside, other=0.0)
    times = tl.load(scale)
    positive = times * dot
    share = tl.where(col_count > 0, 0.5, 1.0)
    row_loss, its_row_weight = softplus_and_sigmoid(tl.load(row_lse + pair, mask=inside, other=0.0) - positive)
    its_col_lse = tl.load(col_lse + pair, mask=has_column, other=-float("inf"))
    col_loss, its_col_weight = softplus_and_sigmoid(its_col_lse - positive)
    loss, its_pair_weight = share * (row_loss + col_loss), -its_row_weight - its_col_weight
    tl.store(row_weight + pair, its_row_weight, mask=inside)
    tl.store(col_weight + pair, its_col_weight, mask=has_column)
    if smoothing is not None:
        numbers = pairs + 1
        apart = tl.full((PAIRS,), 1, tl.int32)
        x_table, x_bounds = table, bounds
        if table is not None:
            its_row_id = tl.load(row_ids + pair, mask=inside, other=0)
            apart = (its_row_id != tl.load(col_ids + pair, mask=inside, other=0)).to(tl.int32)
            x_table += numbers.to(tl.int64) * width
            x_bounds += 2 * numbers
        row_negative, row_own = _negatives(
            x_hat, pair, inside, row_ids, apart, columns, total, table, bounds, numbers, width, FEATURES
        )
        col_negative, col_own = tl.zeros((PAIRS,), tl.float32), tl.zeros((PAIRS,), tl.float32)
        if col_count > 0:
            col_negative, col_own = _negatives(
                y_hat, pair, inside, col_ids, apart, pairs, total + width, x_table, x_bounds, numbers, width, FEATURES
            )
        on_pair = (row_negative > 0).to(tl.float32) + (col_negative > 0).to(tl.float32)
        on_pair += apart * (row_negative + col_negative)
        its_slope = share * times * (dot * on_pair + row_negative * row_own + col_negative * col_own)
        strength = tl.load(smoothing)
        loss += strength * its_slope
        its_pair_weight += strength * on_pair
        tl.store(slope + pair, its_slope, mask=inside)
        tl.store(row_negative_weight + pair, row_negative, mask=inside)
        tl.store(col_negative_weight + pair, col_negative, mask=inside)
    tl.store(losses + pair, loss, mask=inside)
    tl.store(pair_weight + pair, its_pair_weight, mask=inside)


def pair_losses(a: PairLosses, smoothed: SmoothedLosses | None) -> None:
    """See :func:`modest_align_kernels.backends.eager.pair_losses`."""
    pairs, col_count = len(a.row_lse), len(a.col_lse)
    tensors: tuple[Tensor | None, ...] = (None,) * 11
    columns, width, (pairs_of_program, features, warps) = pairs, 0, (_PAIRS, 1, 4)
    if smoothed is not None:
        columns, width = smoothed.y_hat.shape
        hats, ids = [smoothed.y_hat, smoothed.x_hat], [smoothed.col_ids, smoothed.row_ids]
        sides = 2 if col_count else 1  # in one direction no column's negatives are wanted
        tensors = *smoothed, *group_sums(hats[:sides], ids[:sides], pairs)
        pairs_of_program, features, warps = row_blocks(width)
    pair_losses_kernel[(triton.cdiv(pairs, pairs_of_program),)](
        *a,
        *tensors,
        pairs,
        columns,
        col_count,
        width,
        PAIRS=pairs_of_program,
        FEATURES=features,
        num_warps=warps,
    )
