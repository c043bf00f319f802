"""The operators ``torch.ops.modest_align.*``, and the one place that registers anything with PyTorch.

Each is one of the five functions that every backend has (:mod:`modest_align_kernels.backends.contract`) around the
allocation of its results, which is also its shape for tracing. The positional arguments are the backend's; those by
keyword say what is allocated, and by which backend it is filled. They have no gradients of their own:
:mod:`modest_align_kernels.autograd` has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import flop_registry, register_flop_formula

from modest_align_kernels.backends import accumulation_dtype
from modest_align_kernels.backends.contract import (
    Logits,
    PairLosses,
    PerturbNormalize,
    PerturbNormalizeBackward,
    SmoothedGradient,
    SmoothedLosses,
    Softmaxes,
)
from modest_align_kernels.backends.registry import BACKENDS, exponentials_shape, operand_width

# PyTorch takes an operator once in a process; a second import of this module (a reload, a notebook) finds it there, and
# replaces what it calls: a schema, the implementation and the allocation for each name.
_namespace: Any = torch.ops.modest_align
if "registered" not in vars(_namespace):
    _namespace.library, _namespace.registered = torch.library.Library("modest_align", "DEF"), {}
_library: torch.library.Library = _namespace.library
_registered: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = _namespace.registered
# A tensor of a class of its own has the dispatcher call what it wants, and so has torch.func's, whose class is Tensor.
_PLAIN = {Tensor, torch.nn.Parameter, type(None), bool, int}
_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_Allocation = TypeVar("_Allocation", bound=Callable[..., Any])


@cache
def _kernel(name: str, backend: str, device_type: str) -> Callable[..., None]:
    return getattr(import_module(BACKENDS[backend].module(device_type)), name)  # type: ignore[no-any-return]


def _operator(pack: Callable[..., tuple[Any, ...]]) -> Callable[[_Allocation], _Allocation]:
    """Register an operator that has the backend's function of its name write what it allocates.

    Args:
        pack: that function's arguments, from the operator's positional ones and the results.
    """
    return partial(_register, pack)


def _register(pack: Callable[..., tuple[Any, ...]], results: _Allocation) -> _Allocation:
    name = results.__name__

    def run(*args: Any, backend: str, **allocated: Any) -> Any:
        device = args[0].device.type
        written = results(*args, backend=backend, **allocated)
        kernel, given = _kernel(name, backend, device), pack(*args, *written)
        autocast = torch.is_autocast_enabled(device)
        if device == "cpu" and not autocast:
            kernel(*given)
            return written
        # The dtypes were chosen above; autocast would choose again for every matmul inside.
        exact = torch.autocast(device, enabled=False) if autocast else nullcontext()
        # A kernel is launched on the current device, whatever device its tensors are on.
        with exact, torch.cuda.device_of(args[0]) if device == "cuda" else nullcontext():
            kernel(*given)
        return written

    schema = torch.library.infer_schema(results, mutates_args=())
    first = name not in _registered
    if not first and _registered[name][0] != schema:
        raise RuntimeError(f"torch.ops.modest_align.{name}: its arguments have changed, want a new Python process")
    _registered[name] = schema, run, results
    if first:
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, lambda *a, **k: _registered[name][1](*a, **k), "CompositeExplicitAutograd")
        torch.library.register_fake(
            f"modest_align::{name}", lambda *a, **k: _registered[name][2](*a, **k), lib=_library
        )
    operator = getattr(torch.ops.modest_align, name).default

    def call(*args: Any, **options: Any) -> Any:
        return operator(*args, **options) if _observed(args) else run(*args, **options)

    return call  # type: ignore[return-value]


def _observed(args: tuple[Any, ...]) -> bool:
    """Whether anyone would notice that the dispatcher, some 20 us for each operator, was passed by."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
        or torch._C._autograd._profiler_enabled()
        or args[0].is_meta
        or not all(type(arg) in _PLAIN and not (isinstance(arg, Tensor) and _wrapped(arg)) for arg in args)
    )


@_operator(lambda *a: (PerturbNormalize(*a[:6], *a[-3:], *a[6:-3]),))
def perturb_normalize(
    x: Tensor,
    seed: Tensor | None,
    noise_std: Tensor | None,
    noise_stream: int,
    relative_noise: bool,
    pair_hat: Tensor | None,
    first_row: int = 0,
    *,
    operand_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_hat [rows, width], inv_norm [rows], pair_dot [rows of pair_hat]."""
    rows, features = x.shape
    dtype = accumulation_dtype(operand_dtype)
    return (
        x.new_empty((rows, operand_width(features, backend)), dtype=operand_dtype),
        x.new_empty(rows, dtype=dtype),
        x.new_empty(0 if pair_hat is None else pair_hat.shape[0], dtype=dtype),
    )


@_operator(lambda *a: (PerturbNormalizeBackward(*a[:7], *a[12:]), None if a[7] is None else SmoothedGradient(*a[7:12])))
def perturb_normalize_backward(
    grad: Tensor,
    x_hat: Tensor,
    inv_norm: Tensor,
    pair_hat: Tensor,
    pair_weight: Tensor,
    scale: Tensor,
    factor: Tensor,
    smoothing: Tensor | None,
    ids: Tensor | None,
    pair_ids: Tensor | None,
    negative_weight: Tensor,
    pair_negative_weight: Tensor,
    *,
    features: int,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Dx [rows, features] in ``dtype``, row_dot [rows]."""
    return x_hat.new_empty((x_hat.shape[0], features), dtype=dtype), torch.empty_like(inv_norm)


@_operator(lambda *a: (PairLosses(*a[:4], *a[9:13]), None if a[4] is None else SmoothedLosses(*a[4:9], *a[13:])))
def pair_losses(
    row_lse: Tensor,
    col_lse: Tensor,
    pair_dot: Tensor,
    scale: Tensor,
    smoothing: Tensor | None,
    x_hat: Tensor,
    y_hat: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    *,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses [B], row_weight [B], col_weight [C], pair_weight [B]; slope and both negative weights [B], or empty."""
    losses, *weights = (torch.empty_like(t) for t in (row_lse, row_lse, col_lse, row_lse))
    smoothed = (row_lse.new_empty(0 if smoothing is None else row_lse.shape[0]) for _ in range(3))
    return losses, *weights, *smoothed  # type: ignore[return-value]


@_operator(lambda *a: (Logits(*a[:6])._replace(exponentials=a[8]), *a[6:8]))
def contrastive_stats(
    x_hat: Tensor,
    y_hat: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    exclude_diagonal: bool,
    *,
    col_count: int,
    keep: bool = False,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """row_lse [B], col_lse [col_count], and with ``keep`` the exponentials for ``contrastive_grads``, else empty."""
    rows, columns = x_hat.shape[0], y_hat.shape[0]
    kept = exponentials_shape(rows, columns, x_hat.dtype, x_hat.device.type, backend) if keep else (0, 0)
    return scale.new_empty(rows), scale.new_empty(col_count), x_hat.new_empty(kept)


@_operator(lambda *a: (Logits(*a[:3], *a[7:-2]), Softmaxes(*a[3:7]), *a[-2:]))
def contrastive_grads(
    x_hat: Tensor,
    y_hat: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    row_weight: Tensor,
    col_weight: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    exclude_diagonal: bool,
    exponentials: Tensor | None = None,
    *,
    want_x: bool,
    want_y: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """grad_x [B, width] and grad_y [N, width], either empty if it is not wanted."""
    return (
        scale.new_empty(x_hat.shape if want_x else (0, x_hat.shape[1])),
        scale.new_empty(y_hat.shape if want_y else (0, y_hat.shape[1])),
    )


def _stats_flops(x_hat_shape: Sequence[int], y_hat_shape: Sequence[int], *_: Any, **__: Any) -> int:
    """One matmul, of operands as wide as the backend has them."""
    return 2 * x_hat_shape[0] * y_hat_shape[0] * x_hat_shape[1]


def _grads_flops(*shapes: Any, want_x: bool, want_y: bool, **_: Any) -> int:
    """A matmul for each side that is wanted, and the logits of the rows again whose exponentials were not kept."""
    (rows, width), (columns, _), exponentials = *shapes[:2], shapes[10]
    recomputed = rows - (exponentials[0] if exponentials else 0)
    return int(2 * columns * width * (recomputed + rows * (want_x + want_y)))


for _operator_packet, _formula in (
    (torch.ops.modest_align.contrastive_stats, _stats_flops),
    (torch.ops.modest_align.contrastive_grads, _grads_flops),
):
    flop_registry.pop(_operator_packet, None)  # of an import before
    register_flop_formula(_operator_packet)(_formula)
