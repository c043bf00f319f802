"""Blocks of PyTorch operations, on any device: the B x N matrix exists only one block at a time.

The four functions here are the protocol of every backend. Logits are kept in units of log2, so that a block costs one
``exp2``. The diagonal, whose logits are the positives, and pairs of one group are left out of both operations: they
are added in float32 by :mod:`modest_align_kernels.autograd`, so no positive passes through 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from modest_align_kernels.backends import FP16_GAIN, accumulate_matmul, accumulation_dtype
from modest_align_kernels.reference import gaussian_noise

LOG2E = math.log2(math.e)
MIN_NORM = 1e-12

# One block of float32 logits is 16 MiB: large enough for the matmul, small enough to be still in a CPU's last cache.
BLOCK_ROWS = 512
BLOCK_COLUMNS = 8192
NORMALIZE_ROWS = 1024

# exp2 arguments stay within [-126, 100] of float32: headroom for the sums above, no subnormal numbers below.
HEADROOM = 100.0
# A sum below 2^-80 has lost terms to underflow that could matter: then maxima are subtracted instead.
SMALLEST_LOG2_SUM = -80.0


def _blocks(total: int, size: int) -> Iterator[tuple[int, int]]:
    """Intervals of nearly equal length, at most ``size``, that cover [0, total)."""
    count = -(-total // size)
    for b in range(count):
        yield total * b // count, total * (b + 1) // count


def perturb_normalize(
    x: Tensor,
    seed: Tensor | None,
    stream: int,
    noise_std: float,
    relative_noise: bool,
    operand_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x_hat = (x + noise) / max(norm, 1e-12) and inv_norm = 1 / max(norm, 1e-12).

    Args:
        x: [rows, D], any strides.
        seed: int64, one element; None draws no noise.
        stream: 0 for images, 1 for texts.
        noise_std: standard deviation of the noise.
        relative_noise: times each row's root mean square.
        operand_dtype: dtype of x_hat.

    Returns:
        x_hat [rows, D] in ``operand_dtype``; inv_norm [rows] in the accumulation dtype.
    """
    rows, features = x.shape
    dtype = accumulation_dtype(operand_dtype)
    x_hat = torch.empty((rows, features), dtype=operand_dtype, device=x.device)
    inv_norm = torch.empty(rows, dtype=dtype, device=x.device)
    for i0, i1 in _blocks(rows, NORMALIZE_ROWS):
        block = x[i0:i1].to(dtype)
        if seed is not None:
            noise = gaussian_noise(seed, stream, i0, i1 - i0, features, dtype)
            std = noise_std * block.square().mean(1, keepdim=True).sqrt() if relative_noise else noise_std
            block = noise.mul_(std).add_(block)
        norm = torch.linalg.vector_norm(block, dim=1)
        inv_norm[i0:i1] = norm.clamp_min_(MIN_NORM).reciprocal_()
        torch.mul(block, inv_norm[i0:i1, None], out=x_hat[i0:i1])
    return x_hat, inv_norm


def perturb_normalize_backward(
    grad: Tensor,
    x_hat: Tensor,
    inv_norm: Tensor,
    pair_hat: Tensor,
    pair_weight: Tensor,
    offset: Tensor,
    factor: Tensor,
    features: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The float32 terms of the gradient and the normalisation's backward, in one pass.

    With P = pair_hat's rows,

        g_i  = factor * (grad_i + offset[0] + pair_weight_i * pair_hat_i)   for i < P,
        g_i  = factor * (grad_i + offset[1])                                for the others,
        dx_i = inv_norm_i * (g_i - x_hat_i <x_hat_i, g_i>)

    A row whose norm was below 1e-12 was divided by a constant: no projection there.

    Args:
        grad: [rows, D] in the accumulation dtype.
        x_hat: [rows, D].
        inv_norm: [rows].
        pair_hat: [P, D], P <= rows: the rows' positives.
        pair_weight: [P].
        offset: [2, D].
        factor: 0-dim.
        features: of dx; a backend's x_hat may be wider than that, with zeros (this one's is not).
        dtype: of dx.

    Returns:
        dx [rows, features] in ``dtype``; the row dots <x_hat_i, g_i>, [rows].
    """
    rows, pairs = x_hat.shape[0], pair_hat.shape[0]
    dx = torch.empty((rows, features), dtype=dtype, device=x_hat.device)
    dot = torch.empty_like(inv_norm)
    for first, last, row_offset in ((0, pairs, offset[0]), (pairs, rows, offset[1])):
        for b0, b1 in _blocks(last - first, NORMALIZE_ROWS):
            i = slice(first + b0, first + b1)
            g = grad[i] + row_offset
            if first == 0:
                g.addcmul_(pair_weight[i, None], pair_hat[i].to(g.dtype))
            g.mul_(factor)
            x_block = x_hat[i].to(g.dtype)
            torch.sum(x_block * g, dim=1, out=dot[i])
            projection = torch.where(inv_norm[i] < 1 / MIN_NORM, dot[i], 0.0)
            g.addcmul_(x_block, projection[:, None], value=-1)
            dx[i] = g.mul_(inv_norm[i, None])
    return dx, dot


def _logit_blocks(x_hat: Tensor, y_hat: Tensor, scale_log2: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of S * log2(e) in the accumulation dtype: rows, columns, and a buffer that the caller may overwrite."""
    rows, columns = x_hat.shape[0], y_hat.shape[0]
    dtype = accumulation_dtype(x_hat.dtype)
    buffer = torch.empty(min(rows, BLOCK_ROWS) * min(columns, BLOCK_COLUMNS), dtype=dtype, device=x_hat.device)
    for i0, i1 in _blocks(rows, BLOCK_ROWS):
        x_block = x_hat[i0:i1]
        if x_hat.dtype == dtype:
            x_block = x_block * scale_log2
        for j0, j1 in _blocks(columns, BLOCK_COLUMNS):
            logits = buffer[: (i1 - i0) * (j1 - j0)].view(i1 - i0, j1 - j0)
            accumulate_matmul(logits, x_block, y_hat[j0:j1].T, first=True)
            if x_hat.dtype != dtype:
                logits.mul_(scale_log2)
            yield slice(i0, i1), slice(j0, j1), logits


def _fill_excluded(block: Tensor, i: slice, j: slice, group_ids: Tensor | None, value: float) -> None:
    """Write ``value`` where a pair is no negative: on the diagonal and inside a group."""
    if group_ids is None:
        block.diagonal(i.start - j.start).fill_(value)
    else:
        same = group_ids[i, None] == group_ids[None, j]
        block[:, : same.shape[1]].masked_fill_(same, value)


def _shift(scale_log2: Tensor) -> Tensor | None:
    """What one subtraction for the whole matrix can be, or None where rows need their own (see SMALLEST_LOG2_SUM).

    On a GPU the answer would be a host sync, so it is None there.
    """
    if scale_log2.device.type != "cpu" or not float(scale_log2) <= 2 * HEADROOM:
        return None
    return (scale_log2 - HEADROOM).clamp_min(0)


def _logsumexp2(logits: Tensor, dim: int) -> Tensor:
    """log2 of the sum of 2^logits; -inf where all are -inf."""
    maximum = logits.amax(dim, keepdim=True).clamp_min_(torch.finfo(logits.dtype).min)
    return (logits - maximum).exp2_().sum(dim).log2_() + maximum.squeeze(dim)


def contrastive_stats(
    x_hat: Tensor, y_hat: Tensor, scale: Tensor, group_ids: Tensor | None, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The positives' logits, and the logsumexp of each row's and each column's negatives, from one matmul.

        positive_i = S_ii
        row_lse_i  = logsumexp of S_ij over the negatives j of row i
        col_lse_j  = logsumexp of S_ij over the negatives i < B of column j

    Without the positive, 1 - p_i = sigmoid(row_lse_i - positive_i) keeps its relative accuracy however small it is.

    Args:
        x_hat: [B, D].
        y_hat: [N, D], N >= B, same dtype.
        scale: 0-dim, accumulation dtype.
        group_ids: int64 [B]; pairs of equal id are not negatives. None: all but the diagonal are.
        symmetric: False leaves the columns out.

    Returns:
        positive [B], row_lse [B], col_lse [B] (-inf where there is no negative, and everywhere unless symmetric).
    """
    rows = x_hat.shape[0]
    dtype = scale.dtype
    positive = torch.empty(rows, dtype=dtype, device=x_hat.device)
    for i0, i1 in _blocks(rows, NORMALIZE_ROWS):
        torch.sum(x_hat[i0:i1].to(dtype) * y_hat[i0:i1].to(dtype), dim=1, out=positive[i0:i1])
    positive.mul_(scale)

    scale_log2 = scale * LOG2E
    shift = _shift(scale_log2)
    row_log2, col_log2 = _log2_sums(x_hat, y_hat, scale_log2, shift, group_ids, symmetric)
    if shift is not None:
        smallest = torch.minimum(row_log2.min(), col_log2.min()) if symmetric else row_log2.min()
        if smallest - shift < SMALLEST_LOG2_SUM:
            row_log2, col_log2 = _log2_sums(x_hat, y_hat, scale_log2, None, group_ids, symmetric)
    return positive, (row_log2 / LOG2E).to(dtype), (col_log2 / LOG2E).to(dtype)


def _log2_sums(
    x_hat: Tensor,
    y_hat: Tensor,
    scale_log2: Tensor,
    shift: Tensor | None,
    group_ids: Tensor | None,
    symmetric: bool,
) -> tuple[Tensor, Tensor]:
    """log2 of each row's and column's sum of exponentials, in float64; with a shift one exp2 an element, else two."""
    rows = x_hat.shape[0]
    row_log2 = torch.full((rows,), -math.inf, dtype=torch.float64, device=x_hat.device)
    col_log2 = row_log2.clone()
    row_sum, col_sum = torch.zeros_like(row_log2), torch.zeros_like(row_log2)
    for i, j, logits in _logit_blocks(x_hat, y_hat, scale_log2):
        paired = slice(j.start, min(j.stop, rows))
        if shift is not None:
            exponentials = logits.sub_(shift).exp2_()
            _fill_excluded(exponentials, i, j, group_ids, 0.0)
            row_sum[i] += exponentials.sum(1)
            if symmetric and j.start < rows:
                col_sum[paired] += exponentials[:, : rows - j.start].sum(0)
        else:
            _fill_excluded(logits, i, j, group_ids, -math.inf)
            row_log2[i] = torch.logaddexp2(row_log2[i], _logsumexp2(logits, 1).to(row_log2.dtype))
            if symmetric and j.start < rows:
                column_block = _logsumexp2(logits[:, : rows - j.start], 0).to(col_log2.dtype)
                col_log2[paired] = torch.logaddexp2(col_log2[paired], column_block)
    if shift is not None:
        return row_sum.log2() + shift, col_sum.log2() + shift
    return row_log2, col_log2


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
    """The products of the negatives' probabilities with the other side: G Y_hat and G^T X_hat.

        G_ij = exp(S_ij - row_lse_i) + exp(S_ij - col_lse_j)   for the negatives, 0 on the diagonal and inside groups

    Args:
        x_hat: [B, D].
        y_hat: [N, D], N >= B, same dtype.
        scale: 0-dim, accumulation dtype.
        row_lse: [B], with the positive: at least every logit of its row.
        col_lse: [B], likewise; +inf takes a column's own softmax out of G. Columns past B have none.
        group_ids: int64 [B] or None.
        want_x: False returns an empty first result.
        want_y: False returns an empty second result.

    Returns:
        G Y_hat [B, D] and G^T X_hat [N, D] in the accumulation dtype.
    """
    rows, columns = x_hat.shape[0], y_hat.shape[0]
    dtype = scale.dtype
    grad_x = torch.empty(x_hat.shape if want_x else 0, dtype=dtype, device=x_hat.device)
    grad_y = torch.empty(y_hat.shape if want_y else 0, dtype=dtype, device=x_hat.device)
    scale_log2 = scale * LOG2E
    row_log2 = row_lse * LOG2E
    col_log2 = torch.full((columns,), math.inf, dtype=dtype, device=x_hat.device)
    torch.mul(col_lse, LOG2E, out=col_log2[:rows])
    shift = _shift(scale_log2)
    if shift is not None and not torch.minimum(row_log2.min(), col_log2.min()) - shift >= SMALLEST_LOG2_SUM:
        shift = None
    if shift is not None:
        row_weight, col_weight = (shift - row_log2).exp2_(), (shift - col_log2).exp2_()
    gain = FP16_GAIN if x_hat.dtype == torch.float16 else 1.0
    scratch = torch.empty(0, dtype=dtype, device=x_hat.device)
    for i, j, logits in _logit_blocks(x_hat, y_hat, scale_log2):
        if shift is not None:
            # A fresh block each time would cost more in page faults than the addition.
            scratch = scratch if scratch.shape == logits.shape else torch.empty_like(logits)
            g = logits.sub_(shift).exp2_().mul_(torch.add(row_weight[i, None], col_weight[None, j], out=scratch))
        else:
            g = (logits - col_log2[None, j]).exp2_().add_(logits.sub_(row_log2[i, None]).exp2_())
        _fill_excluded(g, i, j, group_ids, 0.0)
        g = g.mul_(gain).to(x_hat.dtype) if gain != 1.0 else g.to(x_hat.dtype)
        if want_x:
            accumulate_matmul(grad_x[i], g, y_hat[j], first=j.start == 0, alpha=1 / gain)
        if want_y:
            accumulate_matmul(grad_y[j], g.T, x_hat[i], first=i.start == 0, alpha=1 / gain)
    return grad_x, grad_y
