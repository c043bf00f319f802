"""Which backend runs, and why another cannot."""

from __future__ import annotations

import torch

from modest_align_kernels.backends import computed_dtype
from modest_align_kernels.backends.registry import BACKENDS


def available_backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """The backends and what keeps them from running.

    Args:
        device: where the features will be; None is the GPU if there is one, else the CPU.

    Returns:
        For each backend's name None if it can run, or the reason why it cannot.

    Examples:
        >>> available_backends("cpu")["eager"] is None
        True
        >>> available_backends("mps")["triton"]
        'the Triton kernels are written for NVIDIA and AMD GPUs, not for mps'
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return dict.fromkeys(sorted(BACKENDS), "PyTorch sees no GPU here")
    return {name: why_not(name, device) for name in sorted(BACKENDS)}


def why_not(
    name: str, device: torch.device, dtype: torch.dtype | None = None, features: int | None = None
) -> str | None:
    """Why a backend cannot run, in one sentence, or None if it can.

    Args:
        name: of a backend.
        device: where the features are.
        dtype: of the features; None asks about the device alone.
        features: D; None asks about the device alone.
    """
    return BACKENDS[name].why_not(device, dtype, features)


def choose(name: str, device: torch.device, dtype: torch.dtype, features: int) -> str:
    """The backend that runs for ``name``, which may be "auto".

    Raises:
        TypeError: it is no name.
        ValueError: no backend has this name.
        RuntimeError: the named backend cannot run; the message is the reason.
    """
    if not isinstance(name, str):
        raise TypeError(f'backend: got {type(name).__name__}, want "auto" or a name of available_backends()')
    if name == "auto":
        computed = computed_dtype(dtype, device)
        return next(
            backend.name
            for backend in BACKENDS.values()
            if backend.auto(device, computed, features) and not backend.why_not(device, dtype, features)
        )
    if name not in BACKENDS:
        raise ValueError(f'backend: got {name!r}, want "auto" or one of {", ".join(map(repr, sorted(BACKENDS)))}')
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
    features = computed_dtype(features, device)
    if features in (torch.float32, torch.float64):
        return features
    return BACKENDS[backend].operand_dtype(features, device)
