"""The compiled kernels for a CPU, csrc/cpu: a matmul whose tiles become exponentials while they are in registers."""

from __future__ import annotations

import torch
from torch import Tensor

from modest_align_kernels import _C
from modest_align_kernels.backends import operand_features, pair_ids
from modest_align_kernels.backends.native.addresses import DTYPES, address

_CPU = torch.device("cpu")


def _kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    """The kernels read and write float32 and bfloat16; float16, rare on a CPU, is converted around them."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _operand_code(dtype: torch.dtype) -> int:
    """The code of an operands' dtype that the kernels have: any other would be read and written past its end."""
    if dtype == torch.float32 or (dtype == torch.bfloat16 and _C.cpu_bfloat16()):
        return DTYPES[dtype]
    raise ValueError(f"operand_dtype: got {dtype}, want torch.float32{' or torch.bfloat16' * _C.cpu_bfloat16()} here")


def perturb_normalize(
    x: Tensor, seed: Tensor | None, stream: int, noise_std: float, relative_noise: bool, operand_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See :func:`modest_align_kernels.backends.eager.perturb_normalize`."""
    rows, features = x.shape
    width = operand_features(features, "native")
    x_hat = torch.empty((rows, width), dtype=operand_dtype)
    inv_norm = torch.empty(rows, dtype=torch.float32)
    x = x.to(_kernel_dtype(x.dtype)).contiguous()
    _C.cpu_perturb_normalize(
        address(x, "x", x.dtype, _CPU),
        DTYPES[x.dtype],
        address(seed, "seed", torch.int64, _CPU),
        stream,
        noise_std,
        relative_noise,
        address(x_hat, "x_hat", x_hat.dtype, _CPU),
        _operand_code(operand_dtype),
        address(inv_norm, "inv_norm", torch.float32, _CPU, (rows,)),
        rows,
        features,
        width,
        torch.get_num_threads(),
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
    dx = torch.empty((rows, features), dtype=_kernel_dtype(dtype))
    row_dot = torch.empty_like(inv_norm)
    pair_weight = pair_weight.contiguous()
    _C.cpu_perturb_normalize_backward(
        address(grad, "grad", torch.float32, _CPU, (rows, width)),
        address(x_hat, "x_hat", x_hat.dtype, _CPU),
        _operand_code(x_hat.dtype),
        address(inv_norm, "inv_norm", torch.float32, _CPU, (rows,)),
        address(pair_hat, "pair_hat", x_hat.dtype, _CPU, (pair_hat.shape[0], width)),
        address(pair_weight, "pair_weight", torch.float32, _CPU, (pair_hat.shape[0],)),
        address(offset, "offset", torch.float32, _CPU, (2, width)),
        address(factor, "factor", torch.float32, _CPU, ()),
        address(dx, "dx", dx.dtype, _CPU),
        DTYPES[dx.dtype],
        address(row_dot, "row_dot", torch.float32, _CPU),
        rows,
        pair_hat.shape[0],
        features,
        width,
        torch.get_num_threads(),
    )
    return dx.to(dtype), row_dot


def contrastive_stats(
    x_hat: Tensor, y_hat: Tensor, scale: Tensor, group_ids: Tensor | None, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`modest_align_kernels.backends.eager.contrastive_stats`."""
    (rows, width), columns = x_hat.shape, y_hat.shape[0]
    dtype, threads = _operand_code(x_hat.dtype), torch.get_num_threads()
    positive, row_lse, col_lse = (torch.empty(rows, dtype=torch.float32) for _ in range(3))
    ids = pair_ids(x_hat, y_hat, group_ids)
    size = _C.cpu_contrastive_stats_workspace(rows, columns, width, dtype, threads)
    workspace = torch.empty(size, dtype=torch.uint8)  # PyTorch aligns to 64 bytes, which the kernels ask for
    _C.cpu_contrastive_stats(
        address(x_hat, "x_hat", x_hat.dtype, _CPU),
        address(y_hat, "y_hat", x_hat.dtype, _CPU, (columns, width)),
        dtype,
        address(scale, "scale", torch.float32, _CPU, ()),
        address(ids, "ids", torch.int32, _CPU),
        symmetric,
        address(positive, "positive", torch.float32, _CPU),
        address(row_lse, "row_lse", torch.float32, _CPU, (rows,)),
        address(col_lse, "col_lse", torch.float32, _CPU, (rows,)),
        rows,
        columns,
        width,
        address(workspace, "workspace", torch.uint8, _CPU),
        threads,
    )
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
    (rows, width), columns = x_hat.shape, y_hat.shape[0]
    dtype, threads = _operand_code(x_hat.dtype), torch.get_num_threads()
    grad_x = torch.empty(x_hat.shape if want_x else 0, dtype=torch.float32)
    grad_y = torch.empty(y_hat.shape if want_y else 0, dtype=torch.float32)
    ids = pair_ids(x_hat, y_hat, group_ids)
    size = _C.cpu_contrastive_grads_workspace(rows, columns, width, dtype, threads)
    workspace = torch.empty(size, dtype=torch.uint8)  # PyTorch aligns to 64 bytes, which the kernels ask for
    _C.cpu_contrastive_grads(
        address(x_hat, "x_hat", x_hat.dtype, _CPU),
        address(y_hat, "y_hat", x_hat.dtype, _CPU, (columns, width)),
        dtype,
        address(scale, "scale", torch.float32, _CPU, ()),
        address(row_lse, "row_lse", torch.float32, _CPU, (rows,)),
        address(col_lse, "col_lse", torch.float32, _CPU, (rows,)),
        address(ids, "ids", torch.int32, _CPU),
        address(grad_x if want_x else None, "grad_x", torch.float32, _CPU),
        address(grad_y if want_y else None, "grad_y", torch.float32, _CPU),
        rows,
        columns,
        width,
        address(workspace, "workspace", torch.uint8, _CPU),
        threads,
    )
    return grad_x, grad_y
