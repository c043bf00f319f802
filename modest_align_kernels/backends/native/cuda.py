"""The compiled kernels for NVIDIA GPUs (csrc/cuda): what they get, and the two matmuls that PyTorch does."""

from __future__ import annotations

import torch
from torch import Tensor

from modest_align_kernels import _C
from modest_align_kernels.backends import (
    FP16_GAIN,
    WORKSPACE_BYTES,
    accumulate_matmul,
    gradient_blocks,
    operand_features,
    pair_ids,
    round_up,
)
from modest_align_kernels.backends.native.addresses import DTYPES, address

# Blocks of probabilities are whole tiles: two of rows, because a cluster has two, and one of the widest.
_ROW_MULTIPLE, _COLUMN_MULTIPLE = 256, 256


def _stream(device: torch.device) -> tuple[int, int]:
    """The last two arguments of every launch: the device's number, and its current stream."""
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def _raise_on(status: int, kernel: str, **shape: int) -> None:
    if status != 0:
        extents = ", ".join(f"{name}={value}" for name, value in shape.items())
        raise RuntimeError(f"{kernel}({extents}): CUDA error {status}, {_C.cuda_error_string(status)}")


def perturb_normalize(
    x: Tensor, seed: Tensor | None, stream: int, noise_std: float, relative_noise: bool, operand_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See :func:`modest_align_kernels.backends.eager.perturb_normalize`."""
    (rows, features), (row_stride, feature_stride), device = x.shape, x.stride(), x.device
    width = operand_features(features, "native")
    x_hat = torch.empty((rows, width), dtype=operand_dtype, device=device)
    inv_norm = torch.empty(rows, dtype=torch.float32, device=device)
    status = _C.cuda_perturb_normalize(
        address(x, "x", x.dtype, device, strided=True),
        DTYPES[x.dtype],
        row_stride,
        feature_stride,
        address(seed, "seed", torch.int64, device),
        stream,
        noise_std,
        relative_noise,
        address(x_hat, "x_hat", torch.float16, device),
        address(inv_norm, "inv_norm", torch.float32, device),
        rows,
        features,
        width,
        *_stream(device),
    )
    _raise_on(status, "perturb_normalize", rows=rows, features=features)
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
    (rows, width), pairs, device = x_hat.shape, pair_hat.shape[0], x_hat.device
    dx = torch.empty((rows, features), dtype=dtype, device=device)
    row_dot = torch.empty_like(inv_norm)
    pair_weight = pair_weight.contiguous()
    status = _C.cuda_perturb_normalize_backward(
        address(grad, "grad", torch.float32, device, (rows, width)),
        address(x_hat, "x_hat", torch.float16, device),
        address(inv_norm, "inv_norm", torch.float32, device, (rows,)),
        address(pair_hat, "pair_hat", torch.float16, device, (pairs, width)),
        address(pair_weight, "pair_weight", torch.float32, device, (pairs,)),
        address(offset, "offset", torch.float32, device, (2, width)),
        address(factor, "factor", torch.float32, device, ()),
        address(dx, "dx", dtype, device),
        DTYPES[dtype],
        address(row_dot, "row_dot", torch.float32, device),
        rows,
        pairs,
        features,
        width,
        *_stream(device),
    )
    _raise_on(status, "perturb_normalize_backward", rows=rows, features=features)
    return dx, row_dot


def contrastive_stats(
    x_hat: Tensor, y_hat: Tensor, scale: Tensor, group_ids: Tensor | None, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`modest_align_kernels.backends.eager.contrastive_stats`."""
    (rows, width), columns, device = x_hat.shape, y_hat.shape[0], x_hat.device
    positive, row_lse, col_lse = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(3))
    ids = None if group_ids is None else pair_ids(x_hat, y_hat, group_ids)
    size = _C.cuda_contrastive_stats_workspace(rows, columns, symmetric, WORKSPACE_BYTES)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    status = _C.cuda_contrastive_stats(
        address(x_hat, "x_hat", torch.float16, device),
        address(y_hat, "y_hat", torch.float16, device, (columns, width)),
        address(scale, "scale", torch.float32, device, ()),
        address(ids, "ids", torch.int32, device),
        symmetric,
        address(positive, "positive", torch.float32, device),
        address(row_lse, "row_lse", torch.float32, device),
        address(col_lse, "col_lse", torch.float32, device),
        rows,
        columns,
        width,
        address(workspace, "workspace", torch.uint8, device),
        WORKSPACE_BYTES,
        *_stream(device),
    )
    _raise_on(status, "contrastive_stats", rows=rows, columns=columns, features=width)
    return positive, row_lse, col_lse


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
    """See :func:`modest_align_kernels.backends.eager.contrastive_grads`."""
    (rows, width), columns, device = x_hat.shape, y_hat.shape[0], x_hat.device
    grad_x = torch.empty(x_hat.shape if want_x else 0, dtype=torch.float32, device=device)
    grad_y = torch.empty(y_hat.shape if want_y else 0, dtype=torch.float32, device=device)
    ids = None if group_ids is None else pair_ids(x_hat, y_hat, group_ids)
    row_weight = torch.empty(rows, dtype=torch.float32, device=device)
    col_weight = torch.empty(columns, dtype=torch.float32, device=device)
    softmaxes = (
        address(scale, "scale", torch.float32, device, ()),
        address(row_lse, "row_lse", torch.float32, device, (rows,)),
        address(col_lse, "col_lse", torch.float32, device, (rows,)),
        address(row_weight, "row_weight", torch.float32, device),
        address(col_weight, "col_weight", torch.float32, device),
    )
    status = _C.cuda_contrastive_weights(*softmaxes, rows, columns, *_stream(device))
    _raise_on(status, "contrastive_weights", rows=rows, columns=columns)

    row_blocks, column_blocks = gradient_blocks(rows, columns, WORKSPACE_BYTES // 2, _ROW_MULTIPLE, _COLUMN_MULTIPLE)
    height = round_up(max(b - a for a, b in row_blocks), _ROW_MULTIPLE)
    stride = round_up(max(b - a for a, b in column_blocks), _COLUMN_MULTIPLE)
    workspace = torch.empty((height, stride), dtype=torch.float16, device=device)
    for i0, i1 in row_blocks:
        for j0, j1 in column_blocks:
            status = _C.cuda_contrastive_probabilities(
                address(x_hat, "x_hat", torch.float16, device),
                address(y_hat, "y_hat", torch.float16, device, (columns, width)),
                *softmaxes,
                address(ids, "ids", torch.int32, device),
                address(workspace, "workspace", torch.float16, device),
                stride,
                i0,
                i1 - i0,
                j0,
                j1 - j0,
                rows,
                width,
                *_stream(device),
            )
            _raise_on(status, "contrastive_probabilities", rows=i1 - i0, columns=j1 - j0, features=width)
            g = workspace[: i1 - i0, : j1 - j0]
            if want_x:
                accumulate_matmul(grad_x[i0:i1], g, y_hat[j0:j1], first=j0 == 0, alpha=1 / FP16_GAIN)
            if want_y:
                accumulate_matmul(grad_y[j0:j1], g.T, x_hat[i0:i1], first=i0 == 0, alpha=1 / FP16_GAIN)
    return grad_x, grad_y
