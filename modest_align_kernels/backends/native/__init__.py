"""The compiled kernels of csrc: C++ on a CPU, CUDA C++ on a GPU."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor


def _on(tensor: Tensor) -> Any:
    return import_module(f"modest_align_kernels.backends.native.{tensor.device.type}")


def perturb_normalize(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """See :func:`modest_align_kernels.backends.eager.perturb_normalize`."""
    return _on(x).perturb_normalize(x, *args)  # type: ignore[no-any-return]


def perturb_normalize_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """See :func:`modest_align_kernels.backends.eager.perturb_normalize_backward`."""
    return _on(grad).perturb_normalize_backward(grad, *args)  # type: ignore[no-any-return]


def contrastive_stats(x_hat: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`modest_align_kernels.backends.eager.contrastive_stats`."""
    return _on(x_hat).contrastive_stats(x_hat, *args)  # type: ignore[no-any-return]


def contrastive_grads(x_hat: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """See :func:`modest_align_kernels.backends.eager.contrastive_grads`."""
    return _on(x_hat).contrastive_grads(x_hat, *args)  # type: ignore[no-any-return]
