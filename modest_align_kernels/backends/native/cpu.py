"""The compiled kernels for a CPU, csrc/cpu: a matmul whose tiles become exponentials while they are in registers."""

from __future__ import annotations

import torch
from torch import Tensor

from modest_align_kernels import _C
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


def _kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    """The kernels read and write float32 and bfloat16; float16, rare on a CPU, is converted around them."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def perturb_normalize(a: PerturbNormalize) -> None:
    """See :func:`modest_align_kernels.backends.eager.perturb_normalize`."""
    x = a.x.to(_kernel_dtype(a.x.dtype)).contiguous()
    _C.cpu_perturb_normalize(**a._replace(x=x)._asdict(), threads=torch.get_num_threads())


def perturb_normalize_backward(a: PerturbNormalizeBackward, smoothed: SmoothedGradient | None) -> None:
    """See :func:`modest_align_kernels.backends.eager.perturb_normalize_backward`."""
    dtype = _kernel_dtype(a.dx.dtype)
    dx = a.dx if a.dx.dtype == dtype else torch.empty_like(a.dx, dtype=dtype)
    more = (smoothed or UNSMOOTHED_GRADIENT)._asdict()
    _C.cpu_perturb_normalize_backward(**a._replace(dx=dx)._asdict(), **more, threads=torch.get_num_threads())
    if dx is not a.dx:
        a.dx.copy_(dx)


def pair_losses(a: PairLosses, smoothed: SmoothedLosses | None) -> None:
    """See :func:`modest_align_kernels.backends.eager.pair_losses`."""
    more = (smoothed or UNSMOOTHED_LOSSES)._asdict()
    _C.cpu_pair_losses(**a._asdict(), **more, threads=torch.get_num_threads())


def contrastive_stats(a: Logits, row_lse: Tensor, col_lse: Tensor) -> None:
    """See :func:`modest_align_kernels.backends.eager.contrastive_stats`."""
    _C.cpu_contrastive_stats(**a._asdict(), row_lse=row_lse, col_lse=col_lse, threads=torch.get_num_threads())


def contrastive_grads(a: Logits, softmaxes: Softmaxes, grad_x: Tensor, grad_y: Tensor) -> None:
    """See :func:`modest_align_kernels.backends.eager.contrastive_grads`."""
    _C.cpu_contrastive_grads(
        **a._asdict(),
        **softmaxes._asdict(),
        grad_x=grad_x if grad_x.numel() else None,
        grad_y=grad_y if grad_y.numel() else None,
        threads=torch.get_num_threads(),
    )
