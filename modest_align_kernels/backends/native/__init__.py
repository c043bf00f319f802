"""The compiled kernels of csrc: C++ on a CPU, CUDA C++ on a GPU."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from torch import Tensor


@cache
def _kernels(device_type: str) -> Any:
    return import_module(f"modest_align_kernels.backends.native.{device_type}")


def perturb_normalize(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """See :func:`modest_align_kernels.backends.eager.perturb_normalize`."""
    return _kernels(x.device.type).perturb_normalize(x, *args)  # type: ignore[no-any-return]


def perturb_normalize_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """See :func:`modest_align_kernels.backends.eager.perturb_normalize_backward`."""
    return _kernels(grad.device.type).perturb_normalize_backward(grad, *args)  # type: ignore[no-any-return]


def contrastive_stats(x_hat: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`modest_align_kernels.backends.eager.contrastive_stats`."""
    return _kernels(x_hat.device.type).contrastive_stats(x_hat, *args)  # type: ignore[no-any-return]


def contrastive_grads(x_hat: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """See :func:`modest_align_kernels.backends.eager.contrastive_grads`."""
    return _kernels(x_hat.device.type).contrastive_grads(x_hat, *args)  # type: ignore[no-any-return]
