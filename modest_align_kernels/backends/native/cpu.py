"""The compiled kernels for a CPU, csrc/cpu: a matmul whose tiles become exponentials while they are in registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modest_align_kernels import _C
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

_CPU = torch.device("cpu")


def _arguments(values: dict[str, Any]) -> dict[str, Any]:
    operands = (torch.float32, torch.bfloat16) if _C.cpu_bfloat16() else (torch.float32,)
    return arguments(_CPU, operands, values) | {"threads": torch.get_num_threads()}


def _kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    """The kernels read and write float32 and bfloat16; float16, rare on a CPU, is converted around them."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _run(kernel: Callable[..., None], workspace_bytes: Callable[..., int], given: dict[str, Any]) -> None:
    # PyTorch aligns to 64 bytes, which the kernels ask for.
    workspace = torch.empty(workspace_bytes(**given), dtype=torch.uint8)
    kernel(**given, workspace=workspace.data_ptr())


def perturb_normalize(a: PerturbNormalize) -> None:
    """See :func:`modest_align_kernels.backends.eager.perturb_normalize`."""
    x = a.x.to(_kernel_dtype(a.x.dtype)).contiguous()
    _C.cpu_perturb_normalize(**_arguments({**a._asdict(), "x": x}))


def perturb_normalize_backward(a: PerturbNormalizeBackward, smoothed: SmoothedGradient | None) -> None:
    """See :func:`modest_align_kernels.backends.eager.perturb_normalize_backward`."""
    dtype = _kernel_dtype(a.dx.dtype)
    dx = a.dx if a.dx.dtype == dtype else torch.empty_like(a.dx, dtype=dtype)
    given = _arguments({**a._asdict(), **(smoothed or UNSMOOTHED_GRADIENT)._asdict(), "dx": dx})
    _run(_C.cpu_perturb_normalize_backward, _C.cpu_perturb_normalize_backward_workspace, given)
    if dx is not a.dx:
        a.dx.copy_(dx)


def pair_losses(a: PairLosses, smoothed: SmoothedLosses | None) -> None:
    """See :func:`modest_align_kernels.backends.eager.pair_losses`."""
    given = _arguments({**a._asdict(), **(smoothed or UNSMOOTHED_LOSSES)._asdict()})
    _run(_C.cpu_pair_losses, _C.cpu_pair_losses_workspace, given)


def contrastive_stats(a: Logits, row_lse: Tensor, col_lse: Tensor) -> None:
    """See :func:`modest_align_kernels.backends.eager.contrastive_stats`."""
    given = _arguments({**a._asdict(), "row_lse": row_lse, "col_lse": col_lse})
    _run(_C.cpu_contrastive_stats, _C.cpu_contrastive_stats_workspace, given)


def contrastive_grads(a: Logits, softmaxes: Softmaxes, grad_x: Tensor, grad_y: Tensor) -> None:
    """See :func:`modest_align_kernels.backends.eager.contrastive_grads`."""
    wanted = {name: grad if grad.numel() else None for name, grad in (("grad_x", grad_x), ("grad_y", grad_y))}
    given = _arguments({**a._asdict(), **softmaxes._asdict(), **wanted})
    _run(_C.cpu_contrastive_grads, _C.cpu_contrastive_grads_workspace, given)
