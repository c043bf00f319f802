"""The compiled kernels for NVIDIA GPUs (csrc/cuda): what they get, and the two matmuls that PyTorch does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modest_align_kernels import _C
from modest_align_kernels.backends import WORKSPACE_BYTES, accumulate_products, gradient_block, processors_of
from modest_align_kernels.backends.contract import (
    UNSMOOTHED_GRADIENT,
    UNSMOOTHED_LOSSES,
    Logits,
    PairLosses,
    PerturbNormalize,
    PerturbNormalizeBackward,
    SmoothedGradient,
    SmoothedLosses,
    Softmaxes,
)

# Blocks of G are whole tiles: two of rows, because a cluster has two, and one of the widest.
_ROW_MULTIPLE, _COLUMN_MULTIPLE = 256, 256


def _where(device: torch.device) -> dict[str, Any]:
    """The device's number, and its current stream."""
    stream = torch.cuda.current_stream(device)
    return {"device": stream.device_index, "cuda_stream": stream.cuda_stream}


def _order(ids: Tensor | None) -> Tensor | None:
    """Rows by their ids: with equal ones in one order, the same sums come out in every run."""
    return None if ids is None else ids.argsort(stable=True)


def _run(kernel: str, given: dict[str, Any], device: torch.device) -> None:
    """``_C.cuda_KERNEL`` with the workspace that it asks for."""
    given |= _where(device)
    size = getattr(_C, f"cuda_{kernel}_workspace")(**given)
    # PyTorch aligns to 512 bytes, the kernels ask for 64.
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    getattr(_C, f"cuda_{kernel}")(**given, workspace=workspace.data_ptr())


def perturb_normalize(a: PerturbNormalize) -> None:
    """See :func:`modest_align_kernels.backends.eager.perturb_normalize`."""
    _C.cuda_perturb_normalize(**a._asdict(), **_where(a.x_hat.device))


def perturb_normalize_backward(a: PerturbNormalizeBackward, smoothed: SmoothedGradient | None) -> None:
    """See :func:`modest_align_kernels.backends.eager.perturb_normalize_backward`."""
    more = smoothed or UNSMOOTHED_GRADIENT
    given = {**a._asdict(), **more._asdict(), "pair_order": _order(more.pair_ids)}
    _run("perturb_normalize_backward", given, a.x_hat.device)


def pair_losses(a: PairLosses, smoothed: SmoothedLosses | None) -> None:
    """See :func:`modest_align_kernels.backends.eager.pair_losses`."""
    more = smoothed or UNSMOOTHED_LOSSES
    orders = {"row_order": _order(more.row_ids), "col_order": _order(more.col_ids)}
    _run("pair_losses", {**a._asdict(), **more._asdict(), **orders}, a.row_lse.device)


def contrastive_stats(a: Logits, row_lse: Tensor, col_lse: Tensor) -> None:
    """See :func:`modest_align_kernels.backends.eager.contrastive_stats`."""
    given = {**a._asdict(), "row_lse": row_lse, "col_lse": col_lse, "workspace_bytes": WORKSPACE_BYTES}
    _run("contrastive_stats", given, a.x_hat.device)


def contrastive_grads(a: Logits, softmaxes: Softmaxes, grad_x: Tensor, grad_y: Tensor) -> None:
    """See :func:`modest_align_kernels.backends.eager.contrastive_grads`."""
    (rows, width), columns, device = a.x_hat.shape, a.y_hat.shape[0], a.x_hat.device
    factors = {"row_factor": a.scale.new_empty(rows), "col_factor": a.scale.new_empty(columns)}
    given = {**a._asdict(), **softmaxes._asdict(), **factors, **_where(device)}
    _C.cuda_softmax_factors(**given)

    def write_g(i: slice, j: slice, g: Tensor) -> None:
        of_g: dict[str, Any] = {"g": g.data_ptr(), "g_stride": g.stride(0)}
        of_g |= {"first_row": i.start, "block_rows": i.stop - i.start}
        of_g |= {"first_column": j.start, "block_columns": j.stop - j.start}
        _C.cuda_contrastive_g(**given, **of_g)

    sizes = WORKSPACE_BYTES // 2, _ROW_MULTIPLE, _COLUMN_MULTIPLE, processors_of(device)
    accumulate_products(a, grad_x, grad_y, gradient_block(rows, columns, width, *sizes), write_g)
