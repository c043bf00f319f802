"""The noise of Random Perturbation: normal numbers that depend on a seed, a stream, a row and a feature alone.

Every backend draws these integers bit for bit, whatever its tiles and threads are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PHILOX_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF

# The values of noise_stream.
IMAGES, TEXTS = 0, 1


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


def random_bits(seed: Tensor, noise_stream: int, first_row: int, rows: int, features: int) -> Tensor:
    """The random integers behind the noise: one 32-bit word for each element.

    Element (row i, feature d) of a stream takes word ``d % 4`` of Philox4x32-10 with

        key     = (seed mod 2^32, seed >> 32)
        counter = (d // 4, i mod 2^32, i >> 32, noise_stream)

    so a word depends on nothing but the seed, the stream, the row's global number and the feature: any shard, tile
    or thread draws its own part and gets the same integers.

    Args:
        seed: int64, one element.
        noise_stream: IMAGES or TEXTS.
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
    counter = (group, row & _MASK, row >> 32, torch.full_like(seed, noise_stream))
    words = philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)


def gaussian_noise(
    seed: Tensor, noise_stream: int, first_row: int, rows: int, features: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Standard normal noise of :func:`random_bits` by Box and Muller's transform.

    Words come in pairs (w0, w1) = (0, 1) and (2, 3) of each group of four:

        u = ((w0 >> 8) + 1) / 2^24  in (0, 1],   v = (w1 >> 8) / 2^24  in [0, 1)
        z0 = sqrt(-2 ln u) cos(2 pi v),   z1 = sqrt(-2 ln u) sin(2 pi v)

    Both u and v are exact in float32; the largest |z| is sqrt(48 ln 2) = 5.77.

    Args:
        seed: see :func:`random_bits`, as for all but ``dtype``.
        noise_stream: likewise.
        first_row: likewise.
        rows: likewise.
        features: likewise.
        dtype: float32 or float64, also that of the arithmetic.

    Returns:
        [rows, D] in ``dtype``.
    """
    words = (random_bits(seed, noise_stream, first_row, rows, features) >> 8).to(dtype)
    u = (words[:, 0::2] + 1) * 2.0**-24
    angle = words[:, 1::2] * (2 * math.pi * 2.0**-24)
    radius = (-2 * u.log()).sqrt_()
    noise = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return noise.flatten(1)[:, :features]
