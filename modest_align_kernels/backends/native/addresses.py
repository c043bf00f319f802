"""The one place where a tensor becomes an address: the compiled kernels see no dtype, no strides and no device."""

from __future__ import annotations

import torch
from torch import Tensor

# The codes of Dtype in csrc/kernels.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def address(
    tensor: Tensor | None,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, ...] | None = None,
    strided: bool = False,
) -> int:
    """Where a tensor's elements start; 0 for None.

    Args:
        tensor: whose address is wanted.
        name: of the argument, for the message.
        dtype: that the kernel reads or writes.
        device: where the kernel runs.
        shape: that the kernel was told, where it is not the tensor's own.
        strided: the kernel takes strides, so that the tensor need not be contiguous.

    Raises:
        TypeError: the dtype is another.
        ValueError: the tensor is on another device, not contiguous, or of another shape.
    """
    if tensor is None:
        return 0
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: got {tensor.dtype}, want {dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: got a tensor on {tensor.device}, want one on {device}")
    if not strided and not tensor.is_contiguous():
        raise ValueError(f"{name}: got strides {tensor.stride()} for shape {tuple(tensor.shape)}, want it contiguous")
    if shape is not None and tensor.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, want {shape}")
    return tensor.data_ptr()
