"""Blocks of PyTorch operations, on any device: the B x N matrix exists only one block at a time.

The four functions here are the contract of every backend: what they compute is said here, and in
:mod:`modest_align_kernels.backends.contract` from what. Logits are kept in units of log2, so that a block costs one
``exp2``. The loss excludes each row's positive from the operations on the logits and adds it in float32
(:mod:`modest_align_kernels.autograd`), so that no positive passes through 16 bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modest_align_kernels.backends import (
    HEADROOM,
    LOG2E,
    MIN_NORM,
    SMALLEST_LOG2_SUM,
    Backend,
    accumulate_matmul,
    accumulate_products,
    accumulation_dtype,
    blocks,
    constant_in_traces,
    even_block,
    gain_of,
)
from modest_align_kernels.backends.contract import Logits, PerturbNormalize, PerturbNormalizeBackward, Softmaxes
from modest_align_kernels.noise import gaussian_noise

# One block of float32 logits is 16 MiB: large enough for the matmul, small enough to be still in a CPU's last cache.
BLOCK_ROWS = 512
BLOCK_COLUMNS = 8192
NORMALIZE_ROWS = 1024


def perturb_normalize(a: PerturbNormalize) -> None:
    """x_hat = (x + noise) / max(norm, 1e-12), inv_norm = 1 / max(norm, 1e-12), pair_dot_i = <x_hat_i, pair_hat_i>."""
    x, seed, noise_std, noise_stream, relative_noise, pair_hat, x_hat, inv_norm, pair_dot = a
    features, dtype = x.shape[1], inv_norm.dtype
    for i in blocks(x.shape[0], NORMALIZE_ROWS):
        block = x[i].to(dtype)
        if seed is not None and noise_std is not None:
            noise = gaussian_noise(seed, noise_stream, i.start, i.stop - i.start, features, dtype)
            std = noise_std * block.square().mean(1, keepdim=True).sqrt() if relative_noise else noise_std
            block = noise.mul_(std).add_(block)
        norm = torch.linalg.vector_norm(block, dim=1)
        inv_norm[i] = norm.clamp_min_(MIN_NORM).reciprocal_()
        torch.mul(block, inv_norm[i, None], out=x_hat[i])
        if pair_hat is not None:
            pair_block = pair_hat[i].to(dtype)
            paired = slice(i.start, i.start + len(pair_block))
            torch.sum(x_hat[paired].to(dtype) * pair_block, dim=1, out=pair_dot[i])


def perturb_normalize_backward(a: PerturbNormalizeBackward) -> None:
    """The float32 terms of the gradient and the normalisation's backward, in one pass.

    With P = pair_hat's rows,

        g_i  = factor * (grad_i + offset[0] + pair_weight_i * pair_hat_i)   for i < P,
        g_i  = factor * (grad_i + offset[1])                                for the others,
        dx_i = inv_norm_i * (g_i - x_hat_i <x_hat_i, g_i>)

    and row_dot_i = <x_hat_i, g_i>. A row whose norm was below 1e-12 was divided by a constant: no projection there.
    """
    grad, x_hat, inv_norm, pair_hat, pair_weight, offset, factor, dx, row_dot = a
    rows, pairs, features = x_hat.shape[0], pair_hat.shape[0], dx.shape[1]
    for first, last, row_offset in ((0, pairs, offset[0]), (pairs, rows, offset[1])):
        for block in blocks(last - first, NORMALIZE_ROWS):
            i = slice(first + block.start, first + block.stop)
            g = grad[i] + row_offset
            if first == 0:
                g.addcmul_(pair_weight[i, None], pair_hat[i].to(g.dtype))
            g.mul_(factor)
            x_block = x_hat[i].to(g.dtype)
            torch.sum(x_block * g, dim=1, out=row_dot[i])
            projection = torch.where(inv_norm[i] < 1 / MIN_NORM, row_dot[i], 0.0)
            g.addcmul_(x_block, projection[:, None], value=-1)
            dx[i] = g.mul_(inv_norm[i, None])[:, :features]


def contrastive_stats(a: Logits, row_lse: Tensor, col_lse: Tensor) -> None:
    """The logsumexp of each row's and of the first columns' logits S_ij = scale <x_hat_i, y_hat_j>, from one matmul.

        row_lse_i = logsumexp of S_ij over the columns j that are not excluded
        col_lse_j = logsumexp of S_ij over the rows i that are not excluded,   for j < C

    and -inf where all is excluded. Without the positive, 1 - p_i = sigmoid(row_lse_i - positive_i) keeps its relative
    accuracy however small it is.

    Args:
        a: the logits.
        row_lse: written, [B].
        col_lse: written, [C], C <= N.
    """
    scale_log2 = a.scale * LOG2E
    shift = _shift(scale_log2)
    row_log2, col_log2 = _log2_sums(a, scale_log2, shift, len(col_lse))
    if shift is not None and not _log2_fit(shift, row_log2, col_log2):
        row_log2, col_log2 = _log2_sums(a, scale_log2, None, len(col_lse))
    torch.div(row_log2, LOG2E, out=row_lse)
    torch.div(col_log2, LOG2E, out=col_lse)


def contrastive_grads(a: Logits, softmaxes: Softmaxes, grad_x: Tensor, grad_y: Tensor) -> None:
    """The products of weighted softmaxes with the other side: G Y_hat and G^T X_hat.

        G_ij = row_weight_i exp(S_ij - row_lse_i) + col_weight_j exp(S_ij - col_lse_j),   0 for an excluded pair

    where the second term is for j < C only. With the logsumexps of :func:`contrastive_stats` no exponential is above 1.

    Args:
        a: the logits.
        softmaxes: and their weights.
        grad_x: written, G Y_hat [B, width]; empty if it is not wanted.
        grad_y: written, G^T X_hat [N, width], likewise.
    """
    rows, columns, dtype = len(a.x_hat), len(a.y_hat), a.scale.dtype
    row_lse, col_lse, row_weight, col_weight = softmaxes
    scale_log2 = a.scale * LOG2E
    shift = _shift(scale_log2)
    row_log2, col_log2 = _softmax_log2(row_lse, rows), _softmax_log2(col_lse, columns)
    col_weight = torch.nn.functional.pad(col_weight, (0, columns - len(col_weight)))
    if shift is not None and _log2_fit(shift, row_log2, col_log2):
        row_weight, col_weight = row_weight * (shift - row_log2).exp2_(), col_weight * (shift - col_log2).exp2_()
    else:
        shift = None
    block = even_block(rows, BLOCK_ROWS), even_block(columns, BLOCK_COLUMNS)
    gain = gain_of(a.x_hat.dtype)
    # A fresh block each time would cost more in page faults than what is written to it.
    scratch = torch.empty(2 - (a.x_hat.dtype == dtype), *block, dtype=dtype, device=a.x_hat.device)

    def write_g(i: slice, j: slice, g: Tensor) -> None:
        g, scratch_block = (t[..., : i.stop - i.start, : j.stop - j.start] for t in (g, scratch))
        logits = _logits(a, scale_log2, i, j, g if g.dtype == dtype else scratch_block[1])
        if shift is not None:
            weights = torch.add(row_weight[i, None], col_weight[None, j], out=scratch_block[0])
            logits.sub_(shift).exp2_().mul_(weights)
        else:
            to_col = torch.sub(logits, col_log2[None, j], out=scratch_block[0]).exp2_().mul_(col_weight[None, j])
            logits.sub_(row_log2[i, None]).exp2_().mul_(row_weight[i, None]).add_(to_col)
        _fill_excluded(logits, a, i, j, 0.0)
        if logits is not g:
            g.copy_(logits.mul_(gain) if gain != 1.0 else logits)

    accumulate_products(a, grad_x, grad_y, block, write_g)


def _logits(a: Logits, scale_log2: Tensor, i: slice, j: slice, out: Tensor) -> Tensor:
    """A block of S * log2(e) in the accumulation dtype, in ``out``."""
    if a.x_hat.dtype == out.dtype:
        accumulate_matmul(out, a.x_hat[i] * scale_log2, a.y_hat[j].T, first=True)
        return out
    accumulate_matmul(out, a.x_hat[i], a.y_hat[j].T, first=True)
    return out.mul_(scale_log2)


def _fill_excluded(block: Tensor, a: Logits, i: slice, j: slice, value: float) -> None:
    """Write ``value`` where a pair is excluded."""
    if a.row_ids is not None and a.col_ids is not None:
        block.masked_fill_(a.row_ids[i, None] == a.col_ids[None, j], value)
    if a.exclude_diagonal:
        block.diagonal(i.start - j.start).fill_(value)


def _shift(scale_log2: Tensor) -> Tensor | None:
    """What one subtraction for the whole matrix can be, or None where rows need their own (see SMALLEST_LOG2_SUM).

    On a GPU the answer would be a host sync, so it is None there.
    """
    if scale_log2.device.type != "cpu" or not float(scale_log2) <= 2 * HEADROOM:
        return None
    return (scale_log2 - HEADROOM).clamp_min(0)


def _log2_fit(shift: Tensor, *log2: Tensor) -> bool:
    """Whether sums of exponentials under the shift, of which these are log2, have lost nothing."""
    return all(bool(each.min() - shift >= SMALLEST_LOG2_SUM) for each in log2 if len(each))


def _softmax_log2(lse: Tensor, length: int) -> Tensor:
    """``lse`` in units of log2, +inf (so that the softmax is 0) where nothing takes part or past its end."""
    log2 = torch.where(lse == -math.inf, math.inf, lse * LOG2E)
    return torch.nn.functional.pad(log2, (0, length - len(log2)), value=math.inf)


def _sums_dtype(operands: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of sums of exponentials: float64 where a CPU has it for nothing, and some devices have none at all."""
    return torch.float64 if device.type == "cpu" else accumulation_dtype(operands)


def _log2_sums(a: Logits, scale_log2: Tensor, shift: Tensor | None, col_count: int) -> tuple[Tensor, Tensor]:
    """log2 of each row's and column's sum of exponentials; with a shift one exp2 an element, else two."""
    rows, columns, dtype, device = len(a.x_hat), len(a.y_hat), a.x_hat.dtype, a.x_hat.device
    row_sum, col_sum = (torch.zeros(n, dtype=_sums_dtype(dtype, device), device=device) for n in (rows, col_count))
    block = even_block(rows, BLOCK_ROWS), even_block(columns, BLOCK_COLUMNS)
    buffer = torch.empty(block, dtype=accumulation_dtype(dtype), device=device)
    # Of what is in a sum so far: it is the sum of 2^(logit - maximum).
    row_max, col_max = (
        torch.full_like(s, torch.finfo(buffer.dtype).min, dtype=buffer.dtype) for s in (row_sum, col_sum)
    )
    for i in blocks(rows, block[0]):
        for j in blocks(columns, block[1]):
            logits = _logits(a, scale_log2, i, j, buffer[: i.stop - i.start, : j.stop - j.start])
            counted = logits[:, : max(0, col_count - j.start)]
            if shift is not None:
                logits.sub_(shift).exp2_()
                _fill_excluded(logits, a, i, j, 0.0)
                row_sum[i] += logits.sum(1)
                col_sum[j] += counted.sum(0)
            else:
                _fill_excluded(logits, a, i, j, -math.inf)
                _add_exponentials(row_sum[i], row_max[i], logits, 1)
                _add_exponentials(col_sum[j], col_max[j], counted, 0)
    if shift is not None:
        return row_sum.log2() + shift, col_sum.log2() + shift
    return row_sum.log2() + row_max, col_sum.log2() + col_max


def _add_exponentials(total: Tensor, maximum: Tensor, logits: Tensor, dim: int) -> None:
    """Add sums of 2^logits to total * 2^maximum. Logarithms of float32 in its place would round at every block."""
    larger = torch.maximum(maximum, logits.amax(dim))
    total.mul_((maximum - larger).exp2_()).add_((logits - larger.unsqueeze(dim)).exp2_().sum(dim))
    maximum.copy_(larger)


@constant_in_traces
def _mkldnn_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()  # type: ignore[no-any-return]


def _operand_dtype(features: torch.dtype, device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.float16
    fast = features == torch.bfloat16 and device.type == "cpu" and _mkldnn_bfloat16()
    return torch.bfloat16 if fast else torch.float32


BACKEND = Backend(
    name="eager",
    auto=None,
    operand_dtype=_operand_dtype,
    width_multiple=1,
    why_not=lambda device, dtype, features: None,
    module=lambda device_type: __name__,
)
