"""The loss of Modest-Align on materialised matrices, in any dtype: the truth that every backend is tested against.

Nothing here is fast or small in memory. The notation is that of :func:`modest_align_loss`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PHILOX_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF

IMAGE_STREAM = 0
TEXT_STREAM = 1


def _mul_hi_lo(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, in int64 words that hold 32 bits each."""
    product = word * multiplier  # wraps modulo 2^64: the bits are those of the unsigned product
    return (product >> 32) & _MASK, product & _MASK


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of Salmon, Moraes, Dror and Shaw (SC 2011), "Parallel random numbers: as easy as 1, 2, 3".

    Args:
        counter: four int64 tensors, broadcastable, each holding 32 bits.
        key: two int64 tensors, broadcastable, each holding 32 bits.

    Returns:
        Four int64 tensors, each holding 32 random bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        hi0, lo0 = _mul_hi_lo(_MULTIPLIERS[0], c0)
        hi1, lo1 = _mul_hi_lo(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_bits(seed: Tensor, stream: int, first_row: int, rows: int, features: int) -> Tensor:
    """The random integers behind the noise: one 32-bit word for each element.

    Element (row i, feature d) of a stream takes word ``d % 4`` of Philox4x32-10 with

        key     = (seed mod 2^32, seed >> 32)
        counter = (d // 4, i mod 2^32, i >> 32, stream)

    so a word depends on nothing but the seed, the stream, the row's global number and the feature: any shard, tile
    or thread draws its own part and gets the same integers.

    Args:
        seed: int64, one element.
        stream: 0 for images, 1 for texts.
        first_row: global number of the first row.
        rows: how many rows.
        features: D.

    Returns:
        int64 [rows, 4 * ceil(D / 4)], values in [0, 2^32); the columns past D complete the last group of four.
    """
    device = seed.device
    seed = seed.reshape(())
    group = torch.arange((features + 3) // 4, device=device)[None, :]
    row = torch.arange(first_row, first_row + rows, device=device)[:, None]
    counter = (group, row & _MASK, row >> 32, torch.full_like(seed, stream))
    words = philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)


def gaussian_noise(
    seed: Tensor, stream: int, first_row: int, rows: int, features: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Standard normal noise of :func:`random_bits` by Box and Muller's transform.

    Words come in pairs (w0, w1) = (0, 1) and (2, 3) of each group of four:

        u = ((w0 >> 8) + 1) / 2^24  in (0, 1],   v = (w1 >> 8) / 2^24  in [0, 1)
        z0 = sqrt(-2 ln u) cos(2 pi v),   z1 = sqrt(-2 ln u) sin(2 pi v)

    Both u and v are exact in float32; the largest |z| is sqrt(48 ln 2) = 5.77.

    Args:
        seed: int64, one element.
        stream: 0 for images, 1 for texts.
        first_row: global number of the first row.
        rows: how many rows.
        features: D.
        dtype: float32 or float64, also that of the arithmetic.

    Returns:
        [rows, D] in ``dtype``.
    """
    words = (random_bits(seed, stream, first_row, rows, features) >> 8).to(dtype)
    u = (words[:, 0::2] + 1) * 2.0**-24
    angle = words[:, 1::2] * (2 * math.pi * 2.0**-24)
    radius = (-2 * u.log()).sqrt_()
    noise = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return noise.flatten(1)[:, :features]


def perturb_normalize(
    x: Tensor,
    *,
    seed: Tensor | None = None,
    stream: int = IMAGE_STREAM,
    noise_std: float = 0.0,
    relative_noise: bool = False,
) -> Tensor:
    """Rows of ``x + noise``, divided by ``max(norm, 1e-12)``.

    Args:
        x: [rows, D], floating point.
        seed: int64, one element; None draws no noise.
        stream: 0 for images, 1 for texts.
        noise_std: standard deviation of the noise, in units of the features, or of each row's root mean square
            with ``relative_noise`` (which is held constant in the gradient).
        relative_noise: see ``noise_std``.

    Returns:
        [rows, D], unit rows; a zero row stays zero.
    """
    if seed is not None and noise_std > 0:
        noise = gaussian_noise(seed, stream, 0, x.shape[0], x.shape[1]).to(x.dtype)
        if relative_noise:
            noise = noise * x.detach().square().mean(1, keepdim=True).sqrt()
        x = x + noise_std * noise
    return torch.nn.functional.normalize(x, dim=1, eps=1e-12)


def _cross_entropy(logits: Tensor, smoothing: Tensor | float, is_negative: Tensor) -> Tensor:
    """Mean over the rows of the cross-entropy; row i's positive is column i, its negatives are ``is_negative[i]``."""
    rows = logits.shape[0]
    is_positive = torch.eye(rows, logits.shape[1], dtype=torch.bool, device=logits.device)
    log_p = logits.masked_fill(~(is_negative | is_positive), -math.inf).log_softmax(1)
    negatives = is_negative.sum(1)
    smoothing = torch.where(negatives > 0, torch.as_tensor(smoothing, dtype=logits.dtype, device=logits.device), 0.0)
    on_positive = (1 - smoothing) * log_p.diagonal()
    on_negatives = smoothing / negatives.clamp_min(1) * log_p.masked_fill(~is_negative, 0).sum(1)
    return -(on_positive + on_negatives).mean()


def modest_align_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    noise_std: float = 0.0,
    relative_noise: bool = False,
    smoothing: Tensor | float = 0.0,
    group_ids: Tensor | None = None,
    symmetric: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    r"""The loss with every matrix materialised and every gradient left to autograd.

    .. math::
        \hat x_i = \tilde x_i / \max(|\tilde x_i|, 10^{-12}), \quad S = s \hat X \hat Y^T, \quad
        T_{ij} = 1 - a \text{ for the positive, } a / n_i \text{ for each of row i's } n_i \text{ negatives},

        L = \tfrac12 \text{mean}_i CE(T_{i:}, S_{i:}) + \tfrac12 \text{mean}_j CE(T_{:j}, S_{:j})

    Rows without negatives keep all their mass on the positive. Columns past B are negatives of every row and have no
    loss of their own.

    Args:
        image_features: [B, D], floating point.
        text_features: [N, D], N >= B.
        logit_scale: s, the inverse temperature.
        noise_std: see :func:`perturb_normalize`.
        relative_noise: see :func:`perturb_normalize`.
        smoothing: a, in [0, 1].
        group_ids: integers [B]; pairs with equal id are not each other's negatives.
        symmetric: False keeps the image-to-text direction only, with weight 1.
        seed: int64, one element: the noise's seed; None draws no noise.

    Returns:
        0-dim tensor in the features' dtype.
    """
    rows, columns = image_features.shape[0], text_features.shape[0]
    if rows == 0:
        return (image_features.sum() + text_features.sum()) * 0
    noise = {"seed": seed, "noise_std": noise_std, "relative_noise": relative_noise}
    x_hat = perturb_normalize(image_features, stream=IMAGE_STREAM, **noise)  # type: ignore[arg-type]
    y_hat = perturb_normalize(text_features, stream=TEXT_STREAM, **noise)  # type: ignore[arg-type]
    logits = logit_scale * (x_hat @ y_hat.T)
    is_negative = ~torch.eye(rows, columns, dtype=torch.bool, device=logits.device)
    if group_ids is not None:
        is_negative[:, :rows] &= group_ids[:, None] != group_ids[None, :]
    loss = _cross_entropy(logits, smoothing, is_negative)
    if symmetric:
        loss = (loss + _cross_entropy(logits[:, :rows].T, smoothing, is_negative[:, :rows].T)) / 2
    return loss
