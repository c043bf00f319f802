"""Noise, normalisation and cast in one read and one write, and their backward in one more.

A program holds whole rows, so the norm costs no second read. The noise is that of
:func:`modest_align_kernels.reference.gaussian_noise`, drawn in registers: its integers are the same bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from modest_align_kernels.backends import accumulation_dtype, operand_features

_ELEMENTS = 4096  # a program's, so that narrow rows share one


@triton.jit
def _noise_words(seed, row, feature_group, stream):
    """Four words of ``reference.random_bits`` for each row and each group of four features."""
    zero = tl.zeros_like(row + feature_group).to(tl.uint32)
    return tl.philox(
        seed,
        zero + feature_group.to(tl.uint32),
        zero + row.to(tl.uint32),
        zero + (row >> 32).to(tl.uint32),
        zero + stream,
    )


@triton.jit
def _normal_noise(seed, row, feature_group, stream):
    """Four standard normals, in a last axis, for each row and each group of four features."""
    w0, w1, w2, w3 = _noise_words(seed, row, feature_group, stream)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    # join's new axis is the last one: (0, 2) with (1, 3) comes out as 0, 1, 2, 3
    return tl.join(tl.join(z0, z2), tl.join(z1, z3))


@triton.jit
def _box_muller(word0, word1):
    u = ((word0 >> 8).to(tl.float32) + 1.0) * 5.9604644775390625e-08
    angle = (word1 >> 8).to(tl.float32) * 3.7450702829239286e-07  # 2 pi / 2^24
    radius = tl.sqrt(-2.0 * tl.log(u))
    return radius * tl.cos(angle), radius * tl.sin(angle)


# Numbers of rows are not specialised: the last, odd batch of an epoch must not compile anew.
@triton.jit(do_not_specialize=["rows", "stream"])
def perturb_normalize_kernel(
    x,  # [rows, features], any strides
    seed,  # int64, one element; not read unless NOISE
    x_hat,  # [rows, width], contiguous
    inv_norm,  # float32 [rows]
    rows,
    features,
    width,  # features and the zeros after them
    row_stride,
    feature_stride,
    stream,
    noise_std,
    NOISE: tl.constexpr,
    RELATIVE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    """A block of rows: x_hat = (x + noise) / max(norm, 1e-12)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    feature = tl.arange(0, BLOCK_FEATURES)
    inside = (row < rows)[:, None] & (feature < features)[None, :]
    offset = row[:, None] * row_stride + feature.to(tl.int64)[None, :] * feature_stride
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    if NOISE:
        group = tl.arange(0, BLOCK_FEATURES // 4)
        noise = _normal_noise(tl.load(seed), row[:, None], group[None, :], stream)
        noise = tl.reshape(noise, (BLOCK_ROWS, BLOCK_FEATURES))
        std = noise_std
        if RELATIVE:
            std = noise_std * tl.sqrt(tl.sum(value * value, 1) / features)[:, None]
        value += tl.where(inside, std * noise, 0.0)
    norm = tl.sqrt(tl.sum(value * value, 1))
    # A NaN must come through, which a maximum would drop.
    inverse = 1.0 / tl.where(norm < 1e-12, 1e-12, norm)
    tl.store(inv_norm + row, inverse, mask=row < rows)
    value *= inverse[:, None]
    target = row[:, None] * width + feature[None, :]
    tl.store(x_hat + target, value.to(x_hat.dtype.element_ty), mask=(row < rows)[:, None] & (feature < width)[None, :])


@triton.jit(do_not_specialize=["rows", "pairs"])
def perturb_normalize_backward_kernel(
    grad,  # float32 [rows, width], contiguous
    x_hat,  # [rows, width], contiguous
    inv_norm,  # float32 [rows]
    pair_hat,  # [pairs, width], contiguous
    pair_weight,  # float32 [pairs]
    offset,  # float32 [2, width]
    factor,  # float32, one element
    dx,  # [rows, features], contiguous
    row_dot,  # float32 [rows]
    rows,
    features,
    width,  # features and the zeros after them
    pairs,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    """A block of rows of the normalisation's backward, with the float32 terms of the gradient added first."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    feature = tl.arange(0, BLOCK_FEATURES)
    inside = (row < rows)[:, None] & (feature < features)[None, :]
    has_pair = row < pairs
    place = row[:, None] * width + feature[None, :]
    g = tl.load(grad + place, mask=inside, other=0.0)
    paired = tl.load(offset + feature, mask=feature < features, other=0.0)
    extra = tl.load(offset + width + feature, mask=feature < features, other=0.0)
    g += tl.where(has_pair[:, None], paired[None, :], extra[None, :])
    weight = tl.load(pair_weight + row, mask=has_pair, other=0.0)
    pair = tl.load(pair_hat + place, mask=inside & has_pair[:, None], other=0.0).to(tl.float32)
    g = (g + weight[:, None] * pair) * tl.load(factor)
    unit = tl.load(x_hat + place, mask=inside, other=0.0).to(tl.float32)
    dot = tl.sum(unit * g, 1)
    inverse = tl.load(inv_norm + row, mask=row < rows, other=0.0)
    tl.store(row_dot + row, dot, mask=row < rows)
    # A row whose norm was below 1e-12 was divided by a constant: no projection there.
    projection = tl.where(inverse < 1e12, dot, 0.0)
    result = (g - unit * projection[:, None]) * inverse[:, None]
    target = row[:, None] * features + feature[None, :]
    tl.store(dx + target, result.to(dx.dtype.element_ty), mask=inside)


def row_blocks(features: int) -> tuple[int, int, int]:
    """BLOCK_ROWS, BLOCK_FEATURES and num_warps for rows of ``features``. Not yet measured."""
    block_features = triton.next_power_of_2(operand_features(features, "triton"))
    block_rows = max(1, _ELEMENTS // block_features)
    return block_rows, block_features, 8 if block_features <= _ELEMENTS else 16


def perturb_normalize(
    x: Tensor, seed: Tensor | None, stream: int, noise_std: float, relative_noise: bool, operand_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See :func:`modest_align_kernels.backends.eager.perturb_normalize`."""
    rows, features = x.shape
    width = operand_features(features, "triton")
    x_hat = torch.empty((rows, width), dtype=operand_dtype, device=x.device)
    inv_norm = torch.empty(rows, dtype=accumulation_dtype(operand_dtype), device=x.device)
    block_rows, block_features, warps = row_blocks(features)
    perturb_normalize_kernel[(triton.cdiv(rows, block_rows),)](
        x,
        seed if seed is not None else inv_norm,
        x_hat,
        inv_norm,
        rows,
        features,
        width,
        *x.stride(),
        stream,
        noise_std,
        NOISE=seed is not None,
        RELATIVE=relative_noise,
        BLOCK_ROWS=block_rows,
        BLOCK_FEATURES=block_features,
        num_warps=warps,
    )
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
    """See :func:`modest_align_kernels.backends.eager.perturb_normalize_backward`."""
    rows, width = x_hat.shape
    dx = torch.empty((rows, features), dtype=dtype, device=x_hat.device)
    row_dot = torch.empty_like(inv_norm)
    block_rows, block_features, warps = row_blocks(features)
    perturb_normalize_backward_kernel[(triton.cdiv(rows, block_rows),)](
        grad,
        x_hat,
        inv_norm,
        pair_hat,
        pair_weight.contiguous(),
        offset,
        factor,
        dx,
        row_dot,
        rows,
        features,
        width,
        pair_hat.shape[0],
        BLOCK_ROWS=block_rows,
        BLOCK_FEATURES=block_features,
        num_warps=warps,
    )
    return dx, row_dot
