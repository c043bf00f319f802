"""The arguments of csrc/kernels.h by name, for a CPU and a GPU alike: the one place where a tensor becomes an address.

The compiled kernels see no dtype, no strides and no device: what they would misread is refused here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modest_align_kernels.backends import round_up
from modest_align_kernels.backends.contract import SmoothedGradient, SmoothedLosses

# The codes of Dtype in csrc/kernels.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_OPERANDS = {"x_hat", "y_hat", "pair_hat", "exponentials"}
# Of all others float32.
_DTYPES = {
    **dict.fromkeys(("seed", "pair_order", "row_order", "col_order"), torch.int64),
    **dict.fromkeys(("ids", "pair_ids", "row_ids", "col_ids"), torch.int32),
}
# Of each tensor the extents, in the words of csrc/kernels.h.
_SHAPES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("seed", "noise_std", "factor", "scale", "smoothing"), ()),
    **dict.fromkeys(("x", "dx"), ("rows", "features")),
    **dict.fromkeys(("x_hat", "grad", "grad_x"), ("rows", "width")),
    **dict.fromkeys(("y_hat", "grad_y"), ("columns", "width")),
    **dict.fromkeys(("inv_norm", "row_dot", "ids", "row_lse", "row_weight", "row_ids"), ("rows",)),
    **dict.fromkeys(("losses", "slope", "row_negative_weight", "col_negative_weight"), ("rows",)),
    **dict.fromkeys(("col_lse", "col_weight"), ("col_count",)),
    **dict.fromkeys(("pair_dot", "pair_weight", "negative_weight", "pair_negative_weight"), ("pairs",)),
    "row_order": ("rows",),
    **dict.fromkeys(("col_ids", "col_order"), ("columns",)),
    **dict.fromkeys(("pair_ids", "pair_order"), ("pair_rows",)),
    "pair_hat": ("pair_rows", "width"),
    "exponentials": ("last_rows", "last_stride"),
}

# What the smoothing adds where there is none.
UNSMOOTHED_GRADIENT = SmoothedGradient(*(None,) * len(SmoothedGradient._fields))  # type: ignore[arg-type]
UNSMOOTHED_LOSSES = SmoothedLosses(*(None,) * len(SmoothedLosses._fields))  # type: ignore[arg-type]


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
    hat = values["x_hat"]
    operand_dtype = operands[0] if hat is None else hat.dtype
    if operand_dtype not in operands:
        raise ValueError(f"operand_dtype: got {operand_dtype}, want {' or '.join(map(str, operands))} here")
    extents = _extents(values)
    for extent in () if hat is None else ("rows", "columns", "width"):
        if extents.get(extent) == 0:
            raise ValueError(f"{extent}: got 0, want at least 1: the kernels divide by it")
    # What a function does not say by a name of its own: all rows are paired, or all that are there.
    all_extents = {"pairs": extents["rows"], "pair_rows": extents.get("pairs", 0), **extents}
    if extents.get("kept_rows"):
        all_extents |= _last_extents(extents)
    given: dict[str, Any] = {"operand_dtype": DTYPES[operand_dtype], **extents}
    for name, value in values.items():
        if name not in _SHAPES:
            given[name] = value
            continue
        if value is None or (name == "exponentials" and not extents["kept_rows"]):
            given[name] = 0
            continue
        dtype = operand_dtype if name in _OPERANDS else _DTYPES.get(name, torch.float32)
        if name == "x":
            given["row_stride"], given["feature_stride"] = value.stride()
        if name in ("x", "dx"):
            dtype = value.dtype
            given[f"{name}_dtype"] = DTYPES[dtype]
        dense = name == "x" or value.is_contiguous()
        shape = tuple([all_extents[extent] for extent in _SHAPES[name]])
        if not (dense and value.dtype == dtype and value.shape == shape and value.device == device):
            raise _refusal(name, value, dtype, device, shape)
        given[name] = value.data_ptr()
    return given


def _extents(values: dict[str, Any]) -> dict[str, int]:
    if "y_hat" in values:
        rows = len(values["row_lse"])
        columns, width = (rows, 0) if values["y_hat"] is None else values["y_hat"].shape
        extents = {"rows": rows, "columns": columns, "col_count": len(values["col_lse"]), "width": width}
        if "exponentials" in values:
            kept = values["exponentials"]
            extents["kept_rows"], extents["kept_stride"] = (0, 0) if kept is None else kept.shape
        return extents
    rows, width = values["x_hat"].shape
    pair_hat = values["pair_hat"]
    if "x" in values:
        pairs = 0 if pair_hat is None else len(pair_hat)
        return {"rows": rows, "pairs": pairs, "features": values["x"].shape[1], "width": width}
    extents = {"rows": rows, "pairs": len(values["pair_weight"]), "pair_rows": len(pair_hat)}
    return extents | {"features": values["dx"].shape[1], "width": width}


def _last_extents(extents: dict[str, int]) -> dict[str, int]:
    """What kernels.h wants of the exponentials that are kept, and beyond that any number of rows."""
    rows, first = extents["rows"], max(extents["rows"] - extents["kept_rows"], 0)
    last_rows = rows - min(round_up(first, 24), (rows - 1) // 24 * 24)
    return {"last_rows": last_rows, "last_stride": max(extents["kept_stride"], round_up(extents["columns"], 32) + 16)}


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
