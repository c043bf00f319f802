"""The operators ``torch.ops.modest_align.*``: schemas, shapes for tracing, and the one place that registers anything.

Each operator is one of the four functions that every backend has (see :mod:`modest_align_kernels.backends.eager` for
what they compute); its last argument names the backend. They have no gradients of their own: the loss's
gradient is :mod:`modest_align_kernels.autograd`, and a second differentiation raises.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from modest_align_kernels.backends import accumulation_dtype, operand_features

_SCHEMAS = (
    "perturb_normalize(Tensor x, Tensor? seed, int stream, float noise_std, bool relative_noise, "
    "ScalarType operand_dtype, *, str backend) -> (Tensor x_hat, Tensor inv_norm)",
    "perturb_normalize_backward(Tensor grad, Tensor x_hat, Tensor inv_norm, Tensor pair_hat, Tensor pair_weight, "
    "Tensor offset, Tensor factor, SymInt features, ScalarType dtype, *, str backend) -> (Tensor dx, Tensor row_dot)",
    "contrastive_stats(Tensor x_hat, Tensor y_hat, Tensor scale, Tensor? group_ids, bool symmetric, "
    "*, str backend) -> (Tensor positive, Tensor row_lse, Tensor col_lse)",
    "contrastive_grads(Tensor x_hat, Tensor y_hat, Tensor scale, Tensor row_lse, Tensor col_lse, "
    "Tensor? group_ids, bool want_x, bool want_y, *, str backend) -> (Tensor grad_x, Tensor grad_y)",
)

_library = torch.library.Library("modest_align", "DEF")


def _register(schema: str) -> Callable[..., Any]:
    name = schema.split("(")[0]

    @cache
    def function(backend: str) -> Callable[..., Any]:
        # Imported when first used: Triton is no requirement.
        return getattr(import_module(f"modest_align_kernels.backends.{backend}"), name)  # type: ignore[no-any-return]

    def run(*args: Any, backend: str) -> Any:
        device = args[0].device.type
        # The dtypes were chosen above; autocast would choose again for every matmul inside.
        exact = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        # A kernel is launched on the current device, whatever device its tensors are on.
        with exact, torch.cuda.device_of(args[0]) if device == "cuda" else nullcontext():
            return function(backend)(*args)

    def raise_on_double_backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "modest_align_loss has no second derivative: its gradient was differentiated again (create_graph=True)"
        )

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_autograd(f"modest_align::{name}", raise_on_double_backward, lib=_library)
    return getattr(torch.ops.modest_align, name).default  # type: ignore[no-any-return]


perturb_normalize, perturb_normalize_backward, contrastive_stats, contrastive_grads = map(_register, _SCHEMAS)


@torch.library.register_fake("modest_align::perturb_normalize", lib=_library)
def _(
    x: Tensor,
    seed: Any,
    stream: int,
    noise_std: float,
    relative_noise: bool,
    operand_dtype: torch.dtype,
    *,
    backend: str,
) -> Any:
    x_hat = x.new_empty((x.shape[0], operand_features(x.shape[1], backend)), dtype=operand_dtype)
    return x_hat, x.new_empty(x.shape[:1], dtype=accumulation_dtype(operand_dtype))


@torch.library.register_fake("modest_align::perturb_normalize_backward", lib=_library)
def _(
    grad: Tensor,
    x_hat: Tensor,
    inv_norm: Tensor,
    pair_hat: Any,
    pair_weight: Any,
    offset: Any,
    factor: Any,
    features: int,
    dtype: torch.dtype,
    *,
    backend: str,
) -> Any:
    return x_hat.new_empty((x_hat.shape[0], features), dtype=dtype), torch.empty_like(inv_norm)


@torch.library.register_fake("modest_align::contrastive_stats", lib=_library)
def _(x_hat: Tensor, y_hat: Tensor, scale: Tensor, group_ids: Any, symmetric: bool, *, backend: str) -> Any:
    return tuple(x_hat.new_empty(x_hat.shape[:1], dtype=scale.dtype) for _ in range(3))


@torch.library.register_fake("modest_align::contrastive_grads", lib=_library)
def _(
    x_hat: Tensor,
    y_hat: Tensor,
    scale: Tensor,
    row_lse: Any,
    col_lse: Any,
    group_ids: Any,
    want_x: bool,
    want_y: bool,
    *,
    backend: str,
) -> Any:
    grad_x = x_hat.new_empty(x_hat.shape if want_x else 0, dtype=scale.dtype)
    return grad_x, x_hat.new_empty(y_hat.shape if want_y else 0, dtype=scale.dtype)
