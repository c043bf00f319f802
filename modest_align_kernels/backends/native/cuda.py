"""The compiled kernels for NVIDIA GPUs (csrc/cuda): what they get, and the two matmuls that PyTorch does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modest_align_kernels import _C
from modest_align_kernels.backends import WORKSPACE_BYTES, accumulate_products, gradient_block, processors_of
from modest_align_kernels.backends.contract import Logits, PerturbNormalize, PerturbNormalizeBackward, Softmaxes
from modest_align_kernels.backends.native.arguments import arguments

# Blocks of G are whole tiles: two of rows, because a cluster has two, and one of the widest.
_ROW_MULTIPLE, _COLUMN_MULTIPLE = 256, 256


def _where(device: torch.device) -> dict[str, Any]:
    """The device's number, and its current stream."""
    stream = torch.cuda.current_stream(device)
    return {"device": stream.device_index, "cuda_stream": stream.cuda_stream}


def _arguments(values: dict[str, Any]) -> dict[str, Any]:
    device = values["x_hat"].device
    return arguments(device, (torch.float16,), values) | _where(device)


def _raise_on(status: int, kernel: str, given: dict[str, Any]) -> None:
    if status != 0:
        extents = ", ".join(f"{n}={given[n]}" for n in ("rows", "columns", "features", "width") if n in given)
        raise RuntimeError(f"{kernel}({extents}): CUDA error {status}, {_C.cuda_error_string(status)}")


def perturb_normalize(a: PerturbNormalize) -> None:
    """See :func:`modest_align_kernels.backends.eager.perturb_normalize`."""
    given = _arguments(a._asdict())
    _raise_on(_C.cuda_perturb_normalize(**given), "perturb_normalize", given)


def perturb_normalize_backward(a: PerturbNormalizeBackward) -> None:
    """See :func:`modest_align_kernels.backends.eager.perturb_normalize_backward`."""
    given = _arguments(a._asdict())
    _raise_on(_C.cuda_perturb_normalize_backward(**given), "perturb_normalize_backward", given)


def contrastive_stats(a: Logits, row_lse: Tensor, col_lse: Tensor) -> None:
    """See :func:`modest_align_kernels.backends.eager.contrastive_stats`."""
    given = _arguments({**a._asdict(), "row_lse": row_lse, "col_lse": col_lse})
    extents = {name: given[name] for name in ("rows", "columns", "col_count")}
    size = _C.cuda_contrastive_stats_workspace(**extents, workspace_bytes=WORKSPACE_BYTES)
    workspace = torch.empty(size, dtype=torch.uint8, device=a.x_hat.device)
    given |= {"workspace": workspace.data_ptr(), "workspace_bytes": WORKSPACE_BYTES}
    _raise_on(_C.cuda_contrastive_stats(**given), "contrastive_stats", given)


def contrastive_grads(a: Logits, softmaxes: Softmaxes, grad_x: Tensor, grad_y: Tensor) -> None:
    """See :func:`modest_align_kernels.backends.eager.contrastive_grads`."""
    given = _arguments({**a._asdict(), **softmaxes._asdict()})
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
