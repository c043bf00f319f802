"""Blocks of PyTorch operations, on any device: the B x N matrix exists only one block at a time.

The five functions here are the contract of every backend: what they compute is said here, and in
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
    SHRINK,
    SMALLEST_LOG2_SUM,
    Backend,
    accumulate_matmul,
    accumulate_products,
    accumulation_dtype,
    add_rows,
    blocks,
    constant_in_traces,
    even_block,
    gain_of,
    negated_sums,
)
from modest_align_kernels.backends.contract import (
    Logits,
    PairLosses,
    PerturbNormalize,
    PerturbNormalizeBackward,
    SmoothedGradient,
    SmoothedLosses,
    Softmaxes,
)
from modest_align_kernels.noise import gaussian_noise

# One block of float32 logits is 16 MiB: large enough for the matmul, small enough to be still in a CPU's last cache.
BLOCK_ROWS = 512
BLOCK_COLUMNS = 8192
NORMALIZE_ROWS = 1024


def perturb_normalize(a: PerturbNormalize) -> None:
    """x_hat = (x + noise) / max(norm, 1e-12), inv_norm = 1 / max(norm, 1e-12), pair_dot_i = <x_hat_i, pair_hat_i>."""
    x, seed, noise_std, noise_stream, relative_noise, pair_hat, x_hat, inv_norm, pair_dot, first_row = a
    features, dtype = x.shape[1], inv_norm.dtype
    for i in blocks(x.shape[0], NORMALIZE_ROWS):
        block, norm, taken = _norms(x[i].to(dtype))
        if seed is not None and noise_std is not None:
            noise = gaussian_noise(seed, noise_stream, first_row + i.start, i.stop - i.start, features, dtype)
            std = noise_std * (norm[:, None] * features**-0.5 if relative_noise else taken[:, None])
            block, norm, again = _norms(noise.mul_(std).add_(block))
            taken = taken * again
        inverse = norm.clamp_min_(MIN_NORM).reciprocal_()
        torch.mul(block, inverse[:, None], out=x_hat[i])
        torch.mul(inverse, taken, out=inv_norm[i])
        if pair_hat is not None:
            pair_block = pair_hat[i].to(dtype)
            paired = slice(i.start, i.start + len(pair_block))
            torch.sum(x_hat[paired].to(dtype) * pair_block, dim=1, out=pair_dot[i])


def _norms(block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The block, its rows' norms, and how many times each row was taken, which the first two are to be divided by."""
    norm = torch.linalg.vector_norm(block, dim=1)
    if norm.device.type == "cpu" and bool((norm < math.inf).all()):
        return block, norm, torch.ones_like(norm)
    taken = torch.where(norm < math.inf, 1.0, SHRINK)
    block = block * taken[:, None]
    return block, torch.linalg.vector_norm(block, dim=1), taken


def perturb_normalize_backward(a: PerturbNormalizeBackward, smoothed: SmoothedGradient | None) -> None:
    """The float32 terms of the gradient and the normalisation's backward, in one pass.

    With weights that are 0 past their ends, the terms that no tile of the logits has are added,

        g_i  = grad_i + pair_weight_i * pair_hat_i + smoothing * (negative_weight_i * own_i + other_i)
        own_i   = sum of pair_hat_j over the j with pair_ids_j = ids_i  -  sum of all pair_hat_j
        other_i = the same sums of pair_negative_weight_j * pair_hat_j
        dx_i = factor * scale * inv_norm_i * (g_i - x_hat_i <x_hat_i, g_i>)

    and row_dot_i = factor * <x_hat_i, g_i>, whose sum is the scale's gradient. Without ids the first sums are 0. A row
    whose norm was below 1e-12 was divided by a constant, 1e12 times its direction: its dx is 0.
    """
    grad, x_hat, inv_norm, pair_hat, pair_weight, scale, factor, dx, row_dot = a
    rows, pairs, features = x_hat.shape[0], pair_weight.shape[0], dx.shape[1]
    if smoothed is not None:
        smoothing, ids, pair_ids, negative_weight, pair_negative_weight = smoothed
        own = negated_sums(pair_hat, None, pair_ids, pairs)
        other = negated_sums(pair_hat, pair_negative_weight, pair_ids, pairs)
    for first, last, paired in ((0, pairs, True), (pairs, rows, False)):
        for block in blocks(last - first, NORMALIZE_ROWS):
            i = slice(first + block.start, first + block.stop)
            g = grad[i].clone()
            if paired:
                g.addcmul_(pair_weight[i, None], pair_hat[i].to(g.dtype))
            if smoothed is not None:
                of_rows = slice(0, 1) if ids is None else ids[i]
                terms = other[of_rows]
                if paired:
                    terms = torch.addcmul(terms, negative_weight[i, None], own[of_rows])
                g.addcmul_(smoothing, terms)
            x_block = x_hat[i].to(g.dtype)
            dot = (x_block * g).sum(1)
            torch.mul(dot, factor, out=row_dot[i])
            g.addcmul_(x_block, dot[:, None], value=-1).mul_((inv_norm[i] * (factor * scale))[:, None])
            dx[i] = g.masked_fill_((inv_norm[i] >= 1 / MIN_NORM)[:, None], 0.0)[:, :features]


def pair_losses(a: PairLosses, smoothed: SmoothedLosses | None) -> None:
    """Each pair's loss, and the weights of its two softmaxes and of its positive in the gradient.

    With p_i = scale * pair_dot_i, the logistic function sigma, and share = 1/2 (1 in one direction),

        losses_i = share * [softplus(row_lse_i - p_i) + softplus(col_lse_i - p_i)] + smoothing * slope_i
        row_weight_i = sigma(row_lse_i - p_i),   col_weight_i = sigma(col_lse_i - p_i)
        pair_weight_i = on_pair_i * smoothing - row_weight_i - col_weight_i

    A negative of row i has the weight row_negative_weight_i = 1 / (their number), 0 if there are none; those of column
    i likewise (0 in one direction). The slope is what a pair's positive is above the mean of its negatives:

        on_pair_i = [row i has negatives] + [column i has negatives] + apart_i * (row_negative_weight_i + col_..._i)
        slope_i = share * scale * (pair_dot_i * on_pair_i + row_negative_weight_i <x_hat_i, y_own_i>
                                   + col_negative_weight_i <y_hat_i, x_own_i>)

    with y_own_i = sum of y_hat_j over the j with col_ids_j = row_ids_i - sum of all y_hat_j (without ids the first sum
    is 0), x_own_i likewise. The first holds the pair itself, unless its two ids differ or there are none: apart_i = 1.
    """
    row_lse, col_lse, pair_dot, scale, losses, row_weight, col_weight, pair_weight = a
    share = 0.5 if len(col_lse) else 1.0
    positive = pair_dot * scale
    row_margin = row_lse - positive
    torch.sigmoid(row_margin, out=row_weight)
    torch.neg(row_weight, out=pair_weight)
    torch.mul(_softplus(row_margin), share, out=losses)
    if len(col_lse):
        col_margin = col_lse - positive
        torch.sigmoid(col_margin, out=col_weight)
        pair_weight.sub_(col_weight)
        losses.add_(_softplus(col_margin), alpha=share)
    if smoothed is None:
        return
    smoothing, x_hat, y_hat, row_ids, col_ids, slope, row_negative_weight, col_negative_weight = smoothed
    pairs, columns = len(x_hat), len(y_hat)
    row_negatives, col_negatives = torch.full_like(pair_dot, columns), torch.full_like(pair_dot, pairs)
    apart, paired_ids = torch.ones_like(pair_dot), None
    if row_ids is not None and col_ids is not None:
        paired_ids = col_ids[:pairs]
        apart = (row_ids != paired_ids).to(apart.dtype)
        for negatives, all_ids, of_ids in ((row_negatives, col_ids, row_ids), (col_negatives, row_ids, paired_ids)):
            counts = negatives.new_zeros(pairs + 1)
            add_rows(counts, all_ids, counts.new_ones(len(all_ids)))
            negatives.sub_(counts[of_ids])
    on_pair = torch.zeros_like(pair_dot)
    slope.zero_()
    for weight, negatives, wanted, hat, other, ids, other_ids in (
        (row_negative_weight, row_negatives, True, x_hat, y_hat, row_ids, col_ids),
        (col_negative_weight, col_negatives, len(col_lse) > 0, y_hat, x_hat, paired_ids, row_ids),
    ):
        if not wanted:  # else a NaN of one image would reach all, times 0
            weight.zero_()
            continue
        negatives.sub_(apart)
        torch.reciprocal(negatives, out=weight).masked_fill_(negatives <= 0, 0.0)
        on_pair.add_(weight.sign()).addcmul_(apart, weight)
        own = negated_sums(other, None, other_ids, pairs)
        for i in blocks(pairs, NORMALIZE_ROWS):
            slope[i].addcmul_(weight[i], (hat[i].to(own.dtype) * own[slice(0, 1) if ids is None else ids[i]]).sum(1))
    slope.addcmul_(pair_dot, on_pair).mul_(share * scale)
    losses.addcmul_(smoothing, slope)
    pair_weight.addcmul_(smoothing, on_pair)


def _softplus(x: Tensor) -> Tensor:
    # PyTorch's default threshold drops 2e-9 past 20, which float64 would notice.
    return torch.nn.functional.softplus(x, threshold=40.0)


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
    if shift is not None:
        row_factor, col_factor = row_weight * (shift - row_log2).exp2_(), col_weight * (shift - col_log2).exp2_()
        kept = _is_kept(row_factor, row_weight, row_log2) and _is_kept(col_factor, col_weight, col_log2)
        if kept and _log2_fit(shift, row_log2, col_log2):
            row_weight, col_weight = row_factor, col_factor
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
    if scale_log2.device.type != "cpu" or not 0 <= float(scale_log2) <= 2 * HEADROOM:
        return None
    return (scale_log2 - HEADROOM).clamp_min(0)


def _log2_fit(shift: Tensor, *log2: Tensor) -> bool:
    """Whether sums of exponentials under the shift, of which these are log2, have lost nothing."""
    return all(bool(each.min() - shift >= SMALLEST_LOG2_SUM) for each in log2 if len(each))


def _is_kept(factor: Tensor, weight: Tensor, log2: Tensor) -> bool:
    """Whether no weight was so small beside its sum of exponentials that its factor is below the normal numbers."""
    return not bool(((factor.abs() < torch.finfo(factor.dtype).tiny) & (weight != 0) & log2.isfinite()).any())


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
    auto=lambda device, dtype, features: True,
    operand_dtype=_operand_dtype,
    width_multiple=1,
    why_not=lambda device, dtype, features: None,
    module=lambda device_type: __name__,
)
