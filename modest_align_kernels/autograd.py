r"""The loss and its gradient from a backend's four functions: what is saved, what is recomputed.

Everything that depends on the target leaves the B x N loop. With p_i = S_ii, the negatives' logsumexp rho_i of row i
and kappa_j of column j, smoothing a, n_i and m_j negatives, and w = 1/2B (1/B in one direction),

    L  = w [ sum_i softplus(rho_i - p_i) + sum_j softplus(kappa_j - p_j) ] + a * slope
    slope = w [ sum_i (p_i - sum_{j neg} S_ij / n_i) + sum_j (p_j - sum_{i neg} S_ij / m_j) ]

where a sum over negatives is the product with a sum of rows, O(BD). Rows without negatives leave the slope: all their
mass is on the positive. The gradient to x_hat_i is, with sigma the logistic function,

    scale w { sum_{j neg} G_ij y_hat_j - [sigma(rho_i - p_i) + sigma(kappa_i - p_i)] y_hat_i  + a * d slope }

of which the first term is ``contrastive_grads`` and the rest is added in float32.

Saved are x_hat and y_hat (in the operands' dtype), their inverse norms and three vectors of length B; the noise is
neither saved nor drawn again, because adding it has the identity as its Jacobian.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modest_align_kernels import ops
from modest_align_kernels.reference import IMAGE_STREAM, TEXT_STREAM


def _softplus(x: Tensor) -> Tensor:
    # PyTorch's default threshold drops 2e-9 past 20, which float64 would notice.
    return torch.nn.functional.softplus(x, threshold=40.0)


def number_groups(group_ids: Tensor) -> Tensor:
    """The groups' numbers from 0, in the order of their ids: int64 [B] of any values -> int64 [B], below B."""
    # torch.unique would need the number of groups on the host: a sync on a GPU, a graph break when compiled.
    order = group_ids.argsort()
    in_order = group_ids[order]
    number = torch.zeros_like(order)
    number[order[1:]] = (in_order[1:] != in_order[:-1]).cumsum(0)
    return number


def _group_sums(rows: Tensor, group_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Each row's sum over its group, of the shape of ``rows``."""
    sums = torch.zeros(rows.shape, dtype=dtype, device=rows.device)
    return sums.index_add_(0, group_ids, rows.to(dtype))[group_ids]


class _Target(NamedTuple):
    """Unit smoothing: what a = 1 moves from the positive (``mass``) to each negative (``weight``)."""

    row_mass: Tensor  # 0-dim, or [B] with groups
    row_weight: Tensor
    col_mass: Tensor
    col_weight: Tensor
    group_ids: Tensor | None


def _unit_target(rows: int, columns: int, group_ids: Tensor | None, symmetric: bool, like: Tensor) -> _Target:
    size = torch.ones_like(like)
    if group_ids is not None:
        size = _group_sums(size.expand(rows), group_ids, like.dtype)
    row_negatives, col_negatives = columns - size, rows - size
    row_mass = (row_negatives > 0).to(like.dtype)
    col_mass = (col_negatives > 0).to(like.dtype) * float(symmetric)
    return _Target(
        row_mass,
        row_mass / row_negatives.clamp_min(1),
        col_mass,
        col_mass / col_negatives.clamp_min(1),
        group_ids,
    )


def _slope(x_hat: Tensor, y_hat: Tensor, scale: Tensor, positive: Tensor, target: _Target, weight: float) -> Tensor:
    """DL/da: see the module's docstring. 0-dim."""
    rows, dtype = x_hat.shape[0], scale.dtype
    all_y, paired_y, all_x = (t.sum(0, dtype=dtype) for t in (y_hat, y_hat[:rows], x_hat))
    mass = ((target.row_mass + target.col_mass) * positive).sum()
    pair_weight = target.row_weight + target.col_weight
    if target.group_ids is None:
        negatives = scale * (target.row_weight * (all_x * all_y).sum() + target.col_weight * (all_x * paired_y).sum())
        return weight * (mass - (negatives - pair_weight * positive.sum()))
    x, y = x_hat.to(dtype), y_hat[:rows].to(dtype)
    weighted_x, weighted_y = (target.row_weight[:, None] * x).sum(0), (target.col_weight[:, None] * y).sum(0)
    within = (pair_weight[:, None] * x * _group_sums(y, target.group_ids, dtype)).sum()
    return weight * (mass - scale * ((weighted_x * all_y).sum() + (weighted_y * all_x).sum() - within))


def _target_gradient(
    x_hat: Tensor, y_hat: Tensor, target: _Target, smoothing: Tensor, grad_x: Tensor, grad_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The smoothing's rank-1 gradient, apart from the positives' mass.

    With groups its parts that are no vector are added into ``grad_x`` and ``grad_y`` (either may be empty).

    Returns:
        pair_weight (0-dim or [B]), and the offsets [2, D] of dx and dy that ``perturb_normalize_backward`` takes.
    """
    rows, dtype = x_hat.shape[0], smoothing.dtype
    row_weight, col_weight = smoothing * target.row_weight, smoothing * target.col_weight
    all_y, all_x = y_hat.sum(0, dtype=dtype), x_hat.sum(0, dtype=dtype)
    if target.group_ids is None:
        x_offset = -(row_weight * all_y + col_weight * y_hat[:rows].sum(0, dtype=dtype))
        y_offset = torch.stack((-(row_weight + col_weight) * all_x, -row_weight * all_x))
        return row_weight + col_weight, torch.stack((x_offset, x_offset)), y_offset
    pair_weight = (row_weight + col_weight)[:, None]
    x, y = x_hat.to(dtype), y_hat[:rows].to(dtype)
    if grad_x.numel():
        grad_x.addcmul_(pair_weight, _group_sums(y, target.group_ids, dtype)).sub_(row_weight[:, None] * all_y)
    if grad_y.numel():
        grad_y[:rows].addcmul_(pair_weight, _group_sums(x, target.group_ids, dtype)).sub_(col_weight[:, None] * all_x)
    x_offset, y_offset = -(col_weight[:, None] * y).sum(0), -(row_weight[:, None] * x).sum(0)
    return torch.zeros_like(smoothing), torch.stack((x_offset, x_offset)), torch.stack((y_offset, y_offset))


class ContrastiveLoss(torch.autograd.Function):
    """(x, y, scale, smoothing, ...) -> (loss, and what the gradient needs of the forward pass)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        smoothing: Tensor | None,
        group_ids: Tensor | None,
        seed: Tensor | None,
        noise_std: float,
        relative_noise: bool,
        symmetric: bool,
        operand_dtype: torch.dtype,
        backend: str,
    ) -> tuple[Tensor, ...]:
        """Args as :func:`modest_align_kernels.modest_align_loss`; ``smoothing`` None is none at all."""
        rows = x.shape[0]
        x_hat, x_inv_norm = ops.perturb_normalize(
            x, seed, IMAGE_STREAM, noise_std, relative_noise, operand_dtype, backend=backend
        )
        y_hat, y_inv_norm = ops.perturb_normalize(
            y, seed, TEXT_STREAM, noise_std, relative_noise, operand_dtype, backend=backend
        )
        positive, row_lse, col_lse = ops.contrastive_stats(x_hat, y_hat, scale, group_ids, symmetric, backend=backend)
        weight = 1 / (2 * rows) if symmetric else 1 / rows
        loss = _softplus(row_lse - positive).sum()
        if symmetric:
            loss = loss + _softplus(col_lse - positive).sum()
        loss = loss * weight
        slope = torch.zeros_like(loss)
        if smoothing is not None:
            target = _unit_target(rows, y.shape[0], group_ids, symmetric, scale)
            slope = _slope(x_hat, y_hat, scale, positive, target, weight)
            loss = loss + smoothing * slope
        ctx.symmetric, ctx.backend = symmetric, backend
        ctx.features, ctx.dtypes = x.shape[1], (x.dtype, y.dtype)
        # Saved as outputs, so that a second differentiation reaches an operator, which raises.
        for_backward = (x_hat, y_hat, x_inv_norm, y_inv_norm, positive, row_lse, col_lse, slope)
        ctx.save_for_backward(scale, smoothing, group_ids, *for_backward)
        ctx.set_materialize_grads(False)
        return loss, *for_backward

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        """Gradients to x, y, scale and smoothing."""
        nothing = (None,) * 7
        if grad_loss is None:
            return None, None, None, None, *nothing
        (
            scale,
            smoothing,
            group_ids,
            x_hat,
            y_hat,
            x_inv_norm,
            y_inv_norm,
            positive,
            row_lse,
            col_lse,
            slope,
        ) = ctx.saved_tensors
        want_x, want_y, want_scale, want_smoothing = ctx.needs_input_grad[:4]
        rows = x_hat.shape[0]
        d_x = d_y = d_scale = d_smoothing = None
        if want_smoothing:
            d_smoothing = grad_loss * slope
        # <x_hat, dL/dx_hat> = <y_hat, dL/dy_hat> = scale dL/dscale: either side gives the scale's gradient.
        run_x = want_x or (want_scale and not want_y)
        if not (run_x or want_y):
            return None, None, None, d_smoothing, *nothing

        pair_weight = -torch.sigmoid(row_lse - positive)
        full_row_lse = torch.logaddexp(row_lse, positive)
        if ctx.symmetric:
            pair_weight = pair_weight - torch.sigmoid(col_lse - positive)
            full_col_lse = torch.logaddexp(col_lse, positive)
        else:
            full_col_lse = torch.full_like(positive, math.inf)
        grad_x, grad_y = ops.contrastive_grads(
            x_hat, y_hat, scale, full_row_lse, full_col_lse, group_ids, run_x, want_y, backend=ctx.backend
        )
        x_offset = y_offset = torch.zeros((2, x_hat.shape[1]), dtype=scale.dtype, device=scale.device)
        if smoothing is not None:
            target = _unit_target(rows, y_hat.shape[0], group_ids, ctx.symmetric, scale)
            pair_weight = pair_weight + smoothing * (target.row_mass + target.col_mass)
            on_pair, x_offset, y_offset = _target_gradient(x_hat, y_hat, target, smoothing, grad_x, grad_y)
            pair_weight = pair_weight + on_pair
        factor = grad_loss.to(scale.dtype) * scale * (1 / (2 * rows) if ctx.symmetric else 1 / rows)
        if run_x:
            d_x, dot = ops.perturb_normalize_backward(
                grad_x,
                x_hat,
                x_inv_norm,
                y_hat[:rows],
                pair_weight,
                x_offset,
                factor,
                ctx.features,
                ctx.dtypes[0],
                backend=ctx.backend,
            )
        del grad_x
        if want_y:
            d_y, y_dot = ops.perturb_normalize_backward(
                grad_y,
                y_hat,
                y_inv_norm,
                x_hat,
                pair_weight,
                y_offset,
                factor,
                ctx.features,
                ctx.dtypes[1],
                backend=ctx.backend,
            )
        if want_scale:
            d_scale = (dot if run_x else y_dot).sum() / scale
        return d_x if want_x else None, d_y, d_scale, d_smoothing, *nothing
