"""Which backend runs, and why another cannot."""

from __future__ import annotations

import torch

# In the order of preference of backend="auto".
BACKENDS = ("triton", "native", "eager")


def why_not(name: str, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why a backend cannot run, in one sentence, or None if it can.

    Args:
        name: one of :data:`BACKENDS`.
        device: where the features are.
        dtype: of the features; None asks about the device alone.
    """
    if name in ("triton", "native"):
        return f'the {name} kernels are not part of this version yet; backend="eager" runs on any device'
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
    return {name: why_not(name, torch.device(device)) for name in sorted(BACKENDS)}


def choose(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs for ``name``, which may be "auto".

    Raises:
        ValueError: no backend has this name.
        RuntimeError: the named backend cannot run; the message is the reason.
    """
    if name == "auto":
        return next(backend for backend in BACKENDS if why_not(backend, device, dtype) is None)
    if name not in BACKENDS:
        raise ValueError(f'backend: got {name!r}, want "auto" or one of {", ".join(map(repr, sorted(BACKENDS)))}')
    reason = why_not(name, device, dtype)
    if reason is not None:
        raise RuntimeError(f'backend "{name}" cannot run on {device.type}: {reason}')
    return name


def operand_dtype(features: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the matmuls' operands.

    float32 and float64 features keep theirs: that precision was asked for. 16-bit features (and float32 ones under
    autocast) become float16 on CUDA, three bits more than bfloat16 at the same speed: normalised values cannot
    overflow it. On a CPU bfloat16 stays bfloat16, whose matmul is fast there; float16, whose matmul is a hundred times
    slower, becomes float32.
    """
    if torch.is_autocast_enabled(device.type) and features != torch.float64:
        features = torch.get_autocast_dtype(device.type)
    if features in (torch.float32, torch.float64):
        return features
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if features == torch.bfloat16 and _fast_bfloat16() else torch.float32


def _fast_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
