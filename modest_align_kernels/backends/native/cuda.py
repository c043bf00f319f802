"""The compiled kernels for NVIDIA GPUs (csrc/cuda): what they get, and the two matmuls that PyTorch does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modest_align_kernels import _C
from modest_align_kernels.backends import WORKSPACE_BYTES, accumulate_products, gradient_block, processors_of
from modest_align_kernels.backends.contract import (
    Logits,
    PairLosses,
    PerturbNormalize,
    PerturbNormalizeBackward,
    SmoothedGradient,
    SmoothedLosses,
    Softmaxes,
)
from modest_align_kernels.backends.native.arguments import UNSMOOTHED_GRADIENT, UNSMOOTHED_LOSSES, arguments

# Blocks of G are whole tiles: two of rows, because a cluster has two, and one of the widest.
_ROW_MULTIPLE, _COLUMN_MULTIPLE = 256, 256


def _where(device: torch.device) -> dict[str, Any]:
    """The device's number, and its current stream."""
    stream = torch.cuda.current_stream(device)
    return {"device": stream.device_index, "cuda_stream": stream.cuda_stream}


def _arguments(device: torch.device, values: dict[str, Any]) -> dict[str, Any]:
    return arguments(device, (torch.float16,), values) | _where(device)


def _order(ids: Tensor | None) -> Tensor | None:
    """Rows by their ids: with equal ones in one order, the same sums come out in every run."""
    return None if ids is None else ids.argsort(stable=True)


def _raise_on(status: int, kernel: str, given: dict[str, Any]) -> None:
    if status != 0:
        extents = ", ".join(f"{n}={given[n]}" for n in ("rows", "columns", "features", "width") if n in given)
        raise RuntimeError(f"{kernel}({extents}): CUDA error {status}, {_C.cuda_error_string(status)}")


def _run(kernel: str, given: dict[str, Any], device: torch.device) -> None:
    """``_C.cuda_KERNEL`` with the workspace that it asks for."""
    size = getattr(_C, f"cuda_{kernel}_workspace")(**given)
    # PyTorch aligns to 512 bytes, the kernels ask for 64.
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    _raise_on(getattr(_C, f"cuda_{kernel}")(**given, workspace=workspace.data_ptr()), kernel, given)


def perturb_normalize(a: PerturbNormalize) -> None:
    """See :func:`modest_align_kernels.backends.eager.perturb_normalize`."""
    given = _arguments(a.x_hat.device, a._asdict())
    _raise_on(_C.cuda_perturb_normalize(**given), "perturb_normalize", given)


def perturb_normalize_backward(a: PerturbNormalizeBackward, smoothed: SmoothedGradient | None) -> None:
    """See :func:`modest_align_kernels.backends.eager.perturb_normalize_backward`."""
    device, more = a.x_hat.device, smoothed or UNSMOOTHED_GRADIENT
    order = _order(more.pair_ids)
    given = _arguments(device, {**a._asdict(), **more._asdict(), "pair_order": order})
    _run("perturb_normalize_backward", given, device)


def pair_losses(a: PairLosses, smoothed: SmoothedLosses | None) -> None:
    """See :func:`modest_align_kernels.backends.eager.pair_losses`."""
    device, more = a.row_lse.device, smoothed or UNSMOOTHED_LOSSES
    orders = {"row_order": _order(more.row_ids), "col_order": _order(more.col_ids)}
    _run("pair_losses", _arguments(device, {**a._asdict(), **more._asdict(), **orders}), device)


def contrastive_stats(a: Logits, row_lse: Tensor, col_lse: Tensor) -> None:
    """See :func:`modest_align_kernels.backends.eager.contrastive_stats`."""
    device = a.x_hat.device
    given = _arguments(device, {**a._asdict(), "row_lse": row_lse, "col_lse": col_lse})
    _run("contrastive_stats", given | {"workspace_bytes": WORKSPACE_BYTES}, device)


def contrastive_grads(a: Logits, softmaxes: Softmaxes, grad_x: Tensor, grad_y: Tensor) -> None:
    """See :func:`modest_align_kernels.backends.eager.contrastive_grads`."""
    given = _arguments(a.x_hat.device, {**a._asdict(), **softmaxes._asdict()})
    row_factor, col_factor = a.scale.new_empty(given["rows"]), a.scale.new_empty(given["columns"])
    given |= {"row_factor": row_factor.data_ptr(), "col_factor": col_factor.data_ptr()}
    _raise_on(_C.cuda_softmax_factors(**given), "softmax_factors", given)

    def write_g(i: slice, j: slice, g: Tensor) -> None:
        of_g: dict[str, Any] = {"g": g.data_ptr(), "g_stride": g.stride(0)}
        of_g |= {"first_row": i.start, "block_rows": i.stop - i.start}
        of_g |= {"first_column": j.start, "block_columns": j.stop - j.start}
        _raise_on(_C.cuda_contrastive_g(**given, **of_g), "contrastive_g", given)

    shape = given["rows"], given["columns"], given["width"]
    processors = processors_of(a.x_hat.device)
    block = gradient_block(*shape, WORKSPACE_BYTES // 2, _ROW_MULTIPLE, _COLUMN_MULTIPLE, processors)
    accumulate_products(a, grad_x, grad_y, block, write_g)
