"""The arguments of csrc/kernels.h by name, for a CPU and a GPU alike: the one place where a tensor becomes an address.

The compiled kernels see no dtype, no strides and no device: what they would misread is refused here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The codes of Dtype in csrc/kernels.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_OPERANDS = {"x_hat", "y_hat", "pair_hat"}
_DTYPES = {"seed": torch.int64, "row_ids": torch.int32, "col_ids": torch.int32}  # of all others float32
_SHAPES: dict[str, Callable[[dict[str, int]], tuple[int, ...]]] = {
    **dict.fromkeys(("seed", "noise_std", "factor", "scale"), lambda e: ()),
    **dict.fromkeys(("x", "dx"), lambda e: (e["rows"], e["features"])),
    **dict.fromkeys(("x_hat", "grad", "grad_x"), lambda e: (e["rows"], e["width"])),
    **dict.fromkeys(("y_hat", "grad_y"), lambda e: (e["columns"], e["width"])),
    **dict.fromkeys(("inv_norm", "row_dot", "row_lse", "row_weight", "row_ids"), lambda e: (e["rows"],)),
    **dict.fromkeys(("col_lse", "col_weight"), lambda e: (e["col_count"],)),
    **dict.fromkeys(("pair_dot", "pair_weight"), lambda e: (e["pairs"],)),
    "col_ids": lambda e: (e["columns"],),
    "pair_hat": lambda e: (e["pairs"], e["width"]),
    "offset": lambda e: (2, e["width"]),
}


def arguments(device: torch.device, operands: tuple[torch.dtype, ...], values: dict[str, Any]) -> dict[str, Any]:
    """What the binding takes for the values of :mod:`modest_align_kernels.backends.contract`, by their names.

    Args:
        device: where the kernel runs.
        operands: the dtypes of operands that it has.
        values: tensors, None for one that is not there, and what is handed on as it is.

    Raises:
        TypeError: a tensor's dtype is another than the kernel reads or writes.
        ValueError: a tensor is on another device, not contiguous, or of another shape, or operands are of a dtype that
            the kernels do not have: they would be read and written past their end. Or there are no rows or features.
    """
    operand_dtype = values["x_hat"].dtype
    if operand_dtype not in operands:
        raise ValueError(f"operand_dtype: got {operand_dtype}, want {' or '.join(map(str, operands))} here")
    extents = _extents(values)
    for extent in ("rows", "columns", "width"):
        if extents.get(extent) == 0:
            raise ValueError(f"{extent}: got 0, want at least 1: the kernels divide by it")
    given: dict[str, Any] = {"operand_dtype": DTYPES[operand_dtype], **extents}
    for name, value in values.items():
        if name not in _SHAPES:
            given[name] = value
            continue
        if value is None:
            given[name] = 0
            continue
        dtype = operand_dtype if name in _OPERANDS else _DTYPES.get(name, torch.float32)
        if name == "x":
            given["row_stride"], given["feature_stride"] = value.stride()
        if name in ("x", "dx"):
            dtype = value.dtype
            given[f"{name}_dtype"] = DTYPES[dtype]
        dense = name == "x" or value.is_contiguous()
        shape = _SHAPES[name](extents)
        if not (dense and value.dtype == dtype and value.shape == shape and value.device == device):
            raise _refusal(name, value, dtype, device, shape)
        given[name] = value.data_ptr()
    return given


def _extents(values: dict[str, Any]) -> dict[str, int]:
    rows, width = values["x_hat"].shape
    if "y_hat" in values:
        return {"rows": rows, "columns": len(values["y_hat"]), "col_count": len(values["col_lse"]), "width": width}
    pairs = 0 if values["pair_hat"] is None else len(values["pair_hat"])
    features = values["x" if "x" in values else "dx"].shape[1]
    return {"rows": rows, "pairs": pairs, "features": features, "width": width}


def _refusal(
    name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device, shape: tuple[int, ...]
) -> TypeError | ValueError:
    if tensor.dtype != dtype:
        return TypeError(f"{name}: got {tensor.dtype}, want {dtype}")
    if tensor.device != device:
        return ValueError(f"{name}: got a tensor on {tensor.device}, want one on {device}")
    if tensor.shape != shape:
        return ValueError(f"{name}: got shape {tuple(tensor.shape)}, want {shape}")
    got = f"got strides {tensor.stride()} for shape {tuple(tensor.shape)}"
    return ValueError(f"{name}: {got}, want it contiguous")
