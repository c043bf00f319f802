"""The compiled kernels of csrc: C++ on a CPU, CUDA C++ on a GPU."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from modest_align_kernels.backends import (
    CUDA_EXPERIMENTS,
    EXPERIMENT,
    GPU_FEATURES,
    WORKSPACE_BYTES,
    Backend,
    computed_dtype,
    constant_in_traces,
    round_up,
)

try:
    from modest_align_kernels import _C
except ImportError as error:
    # Of a module that is not there, Python would suspect a circular import.
    _MISSING: str | None = (
        f"the compiled kernels do not load ({error}): install again"
        if find_spec("modest_align_kernels._C")
        else "the compiled kernels are not there: install again with a C++17 compiler and without MODEST_ALIGN_NATIVE=0"
    )
else:
    _MISSING = None


# From so many features on PyTorch's matmuls are to be preferred where they use AMX: on paper, see benchmarks/NOTES.md.
AMX_FEATURES = 256


@constant_in_traces
def _cpu_bfloat16() -> bool:
    return _C.cpu_bfloat16()


def _operand_dtype(features: torch.dtype, device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if features == torch.bfloat16 and _cpu_bfloat16() else torch.float32


def _why_not(device: torch.device, dtype: torch.dtype | None, features: int | None) -> str | None:
    if _MISSING is not None:
        return _MISSING
    if dtype == torch.float64:
        return 'float64 features run on backend="eager" only'
    if device.type == "cuda":
        if not _C.cuda:
            return "the CUDA kernels were not built: install with nvcc (CUDA 12.4 or newer) on the PATH"
        wanted = EXPERIMENT if EXPERIMENT in CUDA_EXPERIMENTS else ""
        if _C.experiment != wanted:
            # Neither is taken for the other: what is measured has the name that was asked for.
            return (
                f"the CUDA kernels were built with MODEST_ALIGN_EXPERIMENT={_C.experiment!r}, and this process has "
                f"{EXPERIMENT or ''!r}: set the same or build again"
            )
        if torch.cuda.get_device_capability(device) != (9, 0):
            return 'the compiled matmuls are for compute capability 9.0 (H100, H200): use backend="triton"'
        if dtype is not None and computed_dtype(dtype, device) == torch.float32:
            return f'the CUDA kernels multiply float16 operands: {dtype} features run on backend="triton" or "eager"'
        if features is not None and features > GPU_FEATURES:
            return f"the CUDA kernels take rows of at most {GPU_FEATURES:,} features, not {features:,}"
    elif device.type not in ("cpu", "meta"):
        return f"the compiled kernels are written for CPUs and NVIDIA GPUs, not for {device.type}"
    return None


@constant_in_traces
def _amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


def _auto(device: torch.device, dtype: torch.dtype, features: int) -> bool:
    # On a GPU nothing has been measured yet: there it runs by name only. AMX, which PyTorch's matmuls of bfloat16 use,
    # does many times the products of our tile, which pays from where these cost more than passes over the logits.
    amx_pays = dtype == torch.bfloat16 and features >= AMX_FEATURES and _amx()
    return device.type == "cpu" and not amx_pays


def exponentials_shape(rows: int, columns: int, dtype: torch.dtype, device_type: str) -> tuple[int, int]:
    """As many of the last rows as fit the workspace, with the strides and the first row that csrc/kernels.h wants."""
    if device_type != "cpu":
        return 0, 0
    # Rounded up to a cache line, and one more: rows a multiple of a page apart would all fall into the same few sets
    # of a cache. The padding does not count, or 8,192 x 8,192 would just miss 256 MiB.
    stride = round_up(columns, 32) + 64 // dtype.itemsize
    first = round_up(max(rows - WORKSPACE_BYTES // max(columns * dtype.itemsize, 1), 0), 24)
    return max(rows - first, 0), stride


def description() -> str:
    """What was compiled: the instruction sets that run here, and the CUDA part."""
    if _MISSING is not None:
        return "none"
    chosen, levels = _C.cpu_level(), ", ".join(_C.cpu_levels())
    cuda = f"built {f'with {_C.experiment}' if _C.experiment else ''}".strip() if _C.cuda else "not built"
    return f"instruction set {chosen} (of {levels}); CUDA part {cuda}"


BACKEND = Backend(
    name="native",
    auto=_auto,
    operand_dtype=_operand_dtype,
    width_multiple=64,
    why_not=_why_not,
    module=lambda device_type: f"{__name__}.{device_type}",
    exponentials_shape=exponentials_shape,
)
