"""Triton kernels: any GPU that Triton compiles for, and the CPU under ``TRITON_INTERPRET=1``."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from modest_align_kernels.backends import GPU_FEATURES, Backend

_HAS_TRITON = find_spec("triton") is not None


def _why_not(device: torch.device, dtype: torch.dtype | None, features: int | None) -> str | None:
    if not _HAS_TRITON:
        return 'Triton is not installed: pip install "triton>=3.6"'
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return (
                "Triton needs a GPU (TRITON_INTERPRET=1, set before Python starts, runs its kernels on the CPU, slowly)"
            )
    elif device.type == "meta":
        pass
    elif device.type != "cuda":
        return f"the Triton kernels are written for NVIDIA and AMD GPUs, not for {device.type}"
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernels need a GPU of compute capability 8.0 or newer"
    if dtype == torch.float64:
        return 'float64 features run on backend="eager" only'
    if features is not None and features > GPU_FEATURES:
        return f"the Triton kernels take rows of at most {GPU_FEATURES:,} features, not {features:,}"
    return None


BACKEND = Backend(
    name="triton",
    auto=lambda device, dtype, features: device.type == "cuda",
    operand_dtype=lambda features, device: torch.float16,
    width_multiple=64,
    why_not=_why_not,
    module=lambda device_type: f"{__name__}.operators",
)
