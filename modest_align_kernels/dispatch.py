"""Which backend runs, and why another cannot."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

try:
    from modest_align_kernels import _C
except ImportError as error:
    _WITHOUT_NATIVE: str | None = (
        f"the compiled kernels are not there ({error}): install again with a C++17 compiler and without "
        "MODEST_ALIGN_NATIVE=0"
    )
else:
    _WITHOUT_NATIVE = None

BACKENDS = ("eager", "native", "triton")
_HAS_TRITON = find_spec("triton") is not None
# What backend="auto" tries, in this order; on any other device it is the eager backend. On a GPU nothing has been
# measured yet, so the compiled kernels for one run by name only.
_AUTO = {"cpu": ("native", "eager"), "cuda": ("triton", "eager")}
# Normalisation on a GPU holds whole rows in registers.
_GPU_FEATURES = 16384


def why_not(
    name: str, device: torch.device, dtype: torch.dtype | None = None, features: int | None = None
) -> str | None:
    """Why a backend cannot run, in one sentence, or None if it can.

    Args:
        name: one of :data:`BACKENDS`.
        device: where the features are.
        dtype: of the features; None asks about the device alone.
        features: D; None asks about the device alone.
    """
    if name == "eager":
        return None
    return (_why_not_native if name == "native" else _why_not_triton)(device, dtype, features)


def _why_not_native(device: torch.device, dtype: torch.dtype | None, features: int | None) -> str | None:
    if _WITHOUT_NATIVE is not None:
        return _WITHOUT_NATIVE
    if device.type == "cuda":
        if not _C.cuda:
            return "the CUDA kernels were not built: install with nvcc (CUDA 12.4 or newer) on the PATH"
        if not _C.cuda_sm90a or torch.cuda.get_device_capability(device) != (9, 0):
            return 'the compiled matmuls are for compute capability 9.0 (H100, H200): use backend="triton"'
        if dtype is not None and operand_dtype(dtype, device, "native") != torch.float16:
            return f'the CUDA kernels multiply float16 operands: {dtype} features run on backend="triton" or "eager"'
        if features is not None and features > _GPU_FEATURES:
            return f"the CUDA kernels take rows of at most {_GPU_FEATURES:,} features, not {features:,}"
    elif device.type != "cpu":
        return f"the compiled kernels are written for CPUs and NVIDIA GPUs, not for {device.type}"
    elif dtype == torch.float64:
        return 'float64 features run on backend="eager" only'
    return None


def _why_not_triton(device: torch.device, dtype: torch.dtype | None, features: int | None) -> str | None:
    if not _HAS_TRITON:
        return 'Triton is not installed: pip install "triton>=3.6"'
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return (
                "Triton needs a GPU (TRITON_INTERPRET=1, set before Python starts, runs its kernels on the CPU, slowly)"
            )
    elif device.type != "cuda":
        return f"the Triton kernels are written for NVIDIA and AMD GPUs, not for {device.type}"
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernels need a GPU of compute capability 8.0 or newer"
    if dtype == torch.float64:
        return 'float64 features run on backend="eager" only'
    if features is not None and features > _GPU_FEATURES:
        return f"the Triton kernels take rows of at most {_GPU_FEATURES:,} features, not {features:,}"
    return None


def available_backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """The backends and what keeps them from running.

    Args:
        device: where the features will be; None is the GPU if there is one, else the CPU.

    Returns:
        For each backend's name None if it can run, or the reason why it cannot.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return dict.fromkeys(BACKENDS, "PyTorch sees no GPU here")
    return {name: why_not(name, device) for name in BACKENDS}


def choose(name: str, device: torch.device, dtype: torch.dtype, features: int) -> str:
    """The backend that runs for ``name``, which may be "auto".

    Raises:
        ValueError: no backend has this name.
        RuntimeError: the named backend cannot run; the message is the reason.
    """
    if name == "auto":
        candidates = _AUTO.get(device.type, ("eager",))
        return next(backend for backend in candidates if why_not(backend, device, dtype, features) is None)
    if name not in BACKENDS:
        raise ValueError(f'backend: got {name!r}, want "auto" or one of {", ".join(map(repr, BACKENDS))}')
    reason = why_not(name, device, dtype, features)
    if reason is not None:
        raise RuntimeError(f'backend "{name}" cannot run on {device.type}: {reason}')
    return name


def operand_dtype(features: torch.dtype, device: torch.device, backend: str) -> torch.dtype:
    """The dtype of the matmuls' operands.

    float32 and float64 features keep theirs: that precision was asked for. 16-bit features (and float32 ones under
    autocast) become float16 on a GPU, three bits more than bfloat16 at the same speed: normalised values cannot
    overflow it. On a CPU bfloat16 stays bfloat16 where its products are fast; float16, whose matmul is a hundred times
    slower, becomes float32.
    """
    if torch.is_autocast_enabled(device.type) and features != torch.float64:
        features = torch.get_autocast_dtype(device.type)
    if features in (torch.float32, torch.float64):
        return features
    if device.type == "cuda" or backend == "triton":
        return torch.float16
    return torch.bfloat16 if features == torch.bfloat16 and _fast_bfloat16(backend) else torch.float32


def _fast_bfloat16(backend: str) -> bool:
    return _C.cpu_bfloat16() if backend == "native" else bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
