"""The loss of Modest-Align on materialised matrices, in any dtype: the truth that every backend is tested against.

Nothing here is fast or small in memory. The notation is that of :func:`modest_align_loss`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modest_align_kernels.noise import IMAGES, TEXTS, gaussian_noise


def perturb_normalize(
    x: Tensor,
    *,
    seed: Tensor | None = None,
    noise_stream: int = IMAGES,
    noise_std: Tensor | float = 0.0,
    relative_noise: bool = False,
) -> Tensor:
    """Rows of ``x + noise``, divided by ``max(norm, 1e-12)``.

    Args:
        x: [rows, D], floating point.
        seed: int64, one element; None draws no noise.
        noise_stream: IMAGES or TEXTS.
        noise_std: standard deviation of the noise, in units of the features, or of each row's root mean square
            with ``relative_noise`` (which is held constant in the gradient).
        relative_noise: see ``noise_std``.

    Returns:
        [rows, D], unit rows; a zero row stays zero. A row whose norm is below 1e-12 has no gradient.
    """
    if seed is not None and noise_std > 0:
        noise = gaussian_noise(seed, noise_stream, 0, x.shape[0], x.shape[1]).to(x.dtype)
        if relative_noise:
            noise = noise * x.detach().square().mean(1, keepdim=True).sqrt()
        x = x + noise_std * noise
    unit = torch.nn.functional.normalize(x, dim=1, eps=1e-12)
    return torch.where(x.detach().norm(dim=1, keepdim=True) < 1e-12, unit.detach(), unit)


def _logits(
    x_hat: Tensor,
    y_hat: Tensor,
    scale: Tensor | float,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    exclude_diagonal: bool,
) -> Tensor:
    logits = scale * (x_hat @ y_hat.T)
    excluded = torch.zeros_like(logits, dtype=torch.bool)
    if row_ids is not None and col_ids is not None:
        excluded |= row_ids[:, None] == col_ids[None, :]
    if exclude_diagonal:
        excluded.fill_diagonal_(True)
    return logits.masked_fill(excluded, -math.inf)


def contrastive_stats(
    x_hat: Tensor,
    y_hat: Tensor,
    scale: Tensor | float,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    exclude_diagonal: bool,
    col_count: int,
) -> tuple[Tensor, Tensor]:
    """Row_lse [B], col_lse [col_count]: see :func:`modest_align_kernels.backends.eager.contrastive_stats`."""
    logits = _logits(x_hat, y_hat, scale, row_ids, col_ids, exclude_diagonal)
    return logits.logsumexp(1), logits[:, :col_count].logsumexp(0)


def contrastive_grads(
    x_hat: Tensor,
    y_hat: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    row_weight: Tensor,
    col_weight: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    exclude_diagonal: bool,
) -> tuple[Tensor, Tensor]:
    """grad_x [B, D], grad_y [N, D]: see :func:`modest_align_kernels.backends.eager.contrastive_grads`."""
    logits = _logits(x_hat, y_hat, scale, row_ids, col_ids, exclude_diagonal)
    g = row_weight[:, None] * (logits - row_lse[:, None]).exp()
    g[:, : len(col_lse)] += col_weight * (logits[:, : len(col_lse)] - col_lse).exp()
    g = g.masked_fill(logits == -math.inf, 0.0)
    return g @ y_hat, g.T @ x_hat


def _cross_entropy(logits: Tensor, smoothing: Tensor | float, is_negative: Tensor) -> Tensor:
    """Each row's cross-entropy, [B]; row i's positive is column i, its negatives are ``is_negative[i]``."""
    rows = logits.shape[0]
    is_positive = torch.eye(rows, logits.shape[1], dtype=torch.bool, device=logits.device)
    log_p = logits.masked_fill(~(is_negative | is_positive), -math.inf).log_softmax(1)
    negatives = is_negative.sum(1)
    smoothing = torch.where(negatives > 0, torch.as_tensor(smoothing, dtype=logits.dtype, device=logits.device), 0.0)
    on_positive = (1 - smoothing) * log_p.diagonal()
    on_negatives = smoothing / negatives.clamp_min(1) * log_p.masked_fill(~is_negative, 0).sum(1)
    return -(on_positive + on_negatives)


def modest_align_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    noise_std: float = 0.0,
    relative_noise: bool = False,
    smoothing: Tensor | float = 0.0,
    group_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    symmetric: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    r"""The loss with every matrix materialised and every gradient left to autograd.

    .. math::
        \hat x_i = \tilde x_i / \max(|\tilde x_i|, 10^{-12}), \quad S = s \hat X \hat Y^T, \quad
        T_{ij} = 1 - a \text{ for the positive, } a / n_i \text{ for each of row i's } n_i \text{ negatives},

        \ell_i = \tfrac12 CE(T_{i:}, S_{i:}) + \tfrac12 CE(T_{:i}, S_{:i}), \quad
        L = \sum_i w_i \ell_i / \sum_i w_i

    Rows without negatives keep all their mass on the positive. Columns past B are negatives of every row and have no
    loss of their own.

    Args:
        image_features: [B, D], floating point.
        text_features: [N, D], N >= B.
        logit_scale: s, the inverse temperature.
        noise_std: see :func:`perturb_normalize`.
        relative_noise: see :func:`perturb_normalize`.
        smoothing: a, in [0, 1].
        group_ids: integers [B]; pairs with equal id are not each other's negatives. Or integers [B] and [N]: of rows
            and of all columns.
        weights: w, [B]; None: all are 1.
        reduction: "mean", "sum" (of w l) or "none" (w l, [B]).
        symmetric: False keeps the image-to-text direction only, with weight 1.
        seed: int64, one element: the noise's seed; None draws no noise.

    Returns:
        0-dim or [B] tensor in the features' dtype.
    """
    rows, columns = image_features.shape[0], text_features.shape[0]
    if rows == 0:
        return (image_features.sum() + text_features.sum()) * 0
    noise = {"seed": seed, "noise_std": noise_std, "relative_noise": relative_noise}
    x_hat = perturb_normalize(image_features, noise_stream=IMAGES, **noise)  # type: ignore[arg-type]
    y_hat = perturb_normalize(text_features, noise_stream=TEXTS, **noise)  # type: ignore[arg-type]
    logits = logit_scale * (x_hat @ y_hat.T)
    is_negative = ~torch.eye(rows, columns, dtype=torch.bool, device=logits.device)
    if group_ids is not None:
        row_ids, col_ids = group_ids if isinstance(group_ids, tuple) else (group_ids, group_ids)
        is_negative[:, : len(col_ids)] &= row_ids[:, None] != col_ids[None, :]
    loss = _cross_entropy(logits, smoothing, is_negative)
    if symmetric:
        loss = (loss + _cross_entropy(logits[:, :rows].T, smoothing, is_negative[:, :rows].T)) / 2
    if weights is not None:
        loss = loss * weights
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.mean() if weights is None else loss.sum() / weights.sum()


def contrastive_logsumexp(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    *,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Row_lse [B] and col_lse [N]: see :func:`modest_align_kernels.contrastive_logsumexp`."""
    x_hat, y_hat = perturb_normalize(x), perturb_normalize(y)
    return contrastive_stats(x_hat, y_hat, scale, row_ids, col_ids, False, len(y))
