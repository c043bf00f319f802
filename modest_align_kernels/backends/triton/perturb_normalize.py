"""Noise, normalisation and cast in one read and one write, and their backward in one more.

A program holds whole rows, so the norm costs no second read. The noise is that of
:func:`modest_align_kernels.noise.gaussian_noise`, drawn in registers: its integers are the same bit for bit.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from modest_align_kernels import backends
from modest_align_kernels.backends.contract import PerturbNormalize, PerturbNormalizeBackward, SmoothedGradient
from modest_align_kernels.backends.triton.group_sums import group_sums

_MIN_NORM = tl.constexpr(backends.MIN_NORM)
_SHRINK = tl.constexpr(backends.SHRINK)
_LARGEST_INVERSE = tl.constexpr(1 / backends.MIN_NORM)
_UNIFORM = tl.constexpr(2.0**-24)  # of 24 random bits
_ANGLE = tl.constexpr(2 * math.pi * 2.0**-24)
_ELEMENTS = 4096  # a program's, so that narrow rows share one


@triton.jit
def _noise_words(seed, row, feature_group, noise_stream):
    """Four words of ``noise.random_bits`` for each row and each group of four features."""
    zero = tl.zeros_like(row + feature_group).to(tl.uint32)
    return tl.philox(
        seed,
        zero + feature_group.to(tl.uint32),
        zero + row.to(tl.uint32),
        zero + (row >> 32).to(tl.uint32),
        zero + noise_stream,
    )


@triton.jit
def _normal_noise(seed, row, feature_group, noise_stream):
    """Four standard normals, in a last axis, for each row and each group of four features."""
    w0, w1, w2, w3 = _noise_words(seed, row, feature_group, noise_stream)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    # join's new axis is the last one: (0, 2) with (1, 3) comes out as 0, 1, 2, 3
    return tl.join(tl.join(z0, z2), tl.join(z1, z3))


@triton.jit
def _box_muller(word0, word1):
    u = ((word0 >> 8).to(tl.float32) + 1.0) * _UNIFORM
    angle = (word1 >> 8).to(tl.float32) * _ANGLE
    radius = tl.sqrt(-2.0 * tl.log(u))
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _norms(value):
    """The block, its rows' norms, and how many times each row was taken: SHRINK times where its squares overflow."""
    norm = tl.sqrt(tl.sum(value * value, 1))
    taken = tl.where(norm < float("inf"), 1.0, _SHRINK)
    if tl.min(taken, 0) < 1.0:
        value *= taken[:, None]
        norm = tl.sqrt(tl.sum(value * value, 1))
    return value, norm, taken


# Numbers of rows are not specialised: the last, odd batch of an epoch must not compile anew.
@triton.jit(do_not_specialize=["rows", "pairs", "noise_stream", "first_row"])
def perturb_normalize_kernel(
    x,  # [rows, features], any strides
    seed,  # int64, one element, read with NOISE only
    noise_std,  # float32, one element, likewise
    pair_hat,  # [pairs, width], contiguous
    x_hat,  # [rows, width], contiguous
    inv_norm,  # float32 [rows]
    pair_dot,  # float32 [pairs]
    rows,
    features,
    width,  # features and the zeros after them
    pairs,
    row_stride,
    feature_stride,
    noise_stream,
    first_row,  # of the noise's numbers
    NOISE: tl.constexpr,
    RELATIVE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    """A block of rows: x_hat = (x + noise) / max(norm, 1e-12), and its first rows' products with their pairs."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    feature = tl.arange(0, BLOCK_FEATURES)
    inside = (row < rows)[:, None] & (feature < features)[None, :]
    offset = row[:, None] * row_stride + feature.to(tl.int64)[None, :] * feature_stride
    value, norm, taken = _norms(tl.load(x + offset, mask=inside, other=0.0).to(tl.float32))
    if NOISE:
        group = tl.arange(0, BLOCK_FEATURES // 4)
        noise = _normal_noise(tl.load(seed), first_row + row[:, None], group[None, :], noise_stream)
        noise = tl.reshape(noise, (BLOCK_ROWS, BLOCK_FEATURES))
        std = tl.load(noise_std) * (tl.sqrt(norm / features * norm) if RELATIVE else taken)[:, None]
        value, norm, again = _norms(value + tl.where(inside, std * noise, 0.0))
        taken *= again
    # A NaN must come through, which a maximum would drop; the constant is what the backward kernel compares with.
    inverse = tl.where(norm < _MIN_NORM, _LARGEST_INVERSE, 1.0 / norm)
    tl.store(inv_norm + row, inverse * taken, mask=row < rows)
    rounded = (value * inverse[:, None]).to(x_hat.dtype.element_ty)
    place = row[:, None] * width + feature[None, :]
    in_width, has_pair = (feature < width)[None, :], row < pairs
    tl.store(x_hat + place, rounded, mask=(row < rows)[:, None] & in_width)
    pair = tl.load(pair_hat + place, mask=has_pair[:, None] & in_width, other=0.0).to(tl.float32)
    tl.store(pair_dot + row, tl.sum(rounded.to(tl.float32) * pair, 1), mask=has_pair)


@triton.jit(do_not_specialize=["rows", "pairs"])
def perturb_normalize_backward_kernel(
    grad,  # float32 [rows, width], contiguous
    x_hat,  # [rows, width], contiguous
    inv_norm,  # float32 [rows]
    pair_hat,  # [at least pairs, width], contiguous
    pair_weight,  # float32 [pairs]
    scale,  # float32, one element
    factor,  # float32, one element
    dx,  # [rows, features], contiguous
    row_dot,  # float32 [rows]
    smoothing,  # float32, one element; None: of the tensors below none is there
    ids,  # int32 [rows]; None without ids
    negative_weight,  # float32 [pairs]
    total,  # float32 [2, width], of pair_hat, plain and weighted: see GroupSums, as the two below
    table,  # float32 [2, pairs + 1, width]; None without ids
    bounds,  # int32 [2, pairs + 1]
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
    has_row, has_pair, has_feature = row < rows, row < pairs, feature < features
    inside = has_row[:, None] & has_feature[None, :]
    place = row[:, None] * width + feature[None, :]
    g = tl.load(grad + place, mask=inside, other=0.0)
    weight = tl.load(pair_weight + row, mask=has_pair, other=0.0)
    pair = tl.load(pair_hat + place, mask=inside & has_pair[:, None], other=0.0).to(tl.float32)
    g += weight[:, None] * pair
    if smoothing is not None:
        own = -tl.load(total + feature, mask=has_feature, other=0.0)[None, :]
        other = -tl.load(total + width + feature, mask=has_feature, other=0.0)[None, :]
        if table is not None:
            numbers = pairs + 1
            its_id = tl.load(ids + row, mask=has_row, other=0).to(tl.int64)
            has_sums = tl.load(bounds + numbers + its_id, mask=has_row, other=0) > 0
            of_id = table + ((its_id * width)[:, None] + feature[None, :])
            summed = has_sums[:, None] & has_feature[None, :]
            own = own + tl.load(of_id, mask=summed, other=0.0)
            other = other + tl.load(of_id + numbers.to(tl.int64) * width, mask=summed, other=0.0)
        strength = tl.load(smoothing)
        own_weight = strength * tl.load(negative_weight + row, mask=has_pair, other=0.0)
        g += own_weight[:, None] * own
        g += strength * other
    unit = tl.load(x_hat + place, mask=inside, other=0.0).to(tl.float32)
    dot = tl.sum(unit * g, 1)
    times = tl.load(factor)
    tl.store(row_dot + row, times * dot, mask=has_row)
    inverse = tl.load(inv_norm + row, mask=has_row, other=0.0)
    result = (g - unit * dot[:, None]) * (inverse * (times * tl.load(scale)))[:, None]
    # A row whose norm was below 1e-12 was divided by a constant.
    result = tl.where((inverse >= _LARGEST_INVERSE)[:, None], 0.0, result)
    target = row[:, None] * features + feature[None, :]
    tl.store(dx + target, result.to(dx.dtype.element_ty), mask=inside)


def row_blocks(width: int) -> tuple[int, int, int]:
    """BLOCK_ROWS, BLOCK_FEATURES and num_warps for rows of ``width``. Not yet measured."""
    block_features = triton.next_power_of_2(width)
    block_rows = max(1, _ELEMENTS // block_features)
    return block_rows, block_features, 8 if block_features <= _ELEMENTS else 16


def perturb_normalize(a: PerturbNormalize) -> None:
    """See :func:`modest_align_kernels.backends.eager.perturb_normalize`."""
    (rows, features), width = a.x.shape, a.x_hat.shape[1]
    block_rows, block_features, warps = row_blocks(width)
    perturb_normalize_kernel[(triton.cdiv(rows, block_rows),)](
        a.x,
        a.seed,
        a.noise_std,
        a.pair_hat if a.pair_hat is not None else a.x_hat,  # of no pairs nothing is read
        a.x_hat,
        a.inv_norm,
        a.pair_dot,
        rows,
        features,
        width,
        len(a.pair_dot),
        *a.x.stride(),
        a.noise_stream,
        a.first_row,
        NOISE=a.seed is not None,
        RELATIVE=a.relative_noise,
        BLOCK_ROWS=block_rows,
        BLOCK_FEATURES=block_features,
        num_warps=warps,
    )


def perturb_normalize_backward(a: PerturbNormalizeBackward, smoothed: SmoothedGradient | None) -> None:
    """See :func:`modest_align_kernels.backends.eager.perturb_normalize_backward`."""
    (rows, width), pairs = a.x_hat.shape, len(a.pair_weight)
    tensors: tuple[Tensor | None, ...] = (None,) * 6
    if smoothed is not None:
        sums = group_sums((a.pair_hat,), (smoothed.pair_ids,), pairs, smoothed.pair_negative_weight)
        tensors = smoothed.smoothing, smoothed.ids, smoothed.negative_weight, *sums
    block_rows, block_features, warps = row_blocks(width)
    perturb_normalize_backward_kernel[(triton.cdiv(rows, block_rows),)](
        *a,
        *tensors,
        rows,
        a.dx.shape[1],
        width,
        pairs,
        BLOCK_ROWS=block_rows,
        BLOCK_FEATURES=block_features,
        num_warps=warps,
    )
