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

# Of each tensor the extents, in the words of csrc/kernels.h, and its dtype: None is that of the operands, and ANY is
# handed on beside the address.
_ANY = object()
_LAYOUTS: dict[str, tuple[tuple[str, ...], object]] = {
    "seed": ((), torch.int64),
    **dict.fromkeys(("noise_std", "factor", "scale", "smoothing"), ((), torch.float32)),
    **dict.fromkeys(("x", "dx"), (("rows", "features"), _ANY)),
    "x_hat": (("rows", "width"), None),
    "y_hat": (("columns", "width"), None),
    "pair_hat": (("pair_rows", "width"), None),
    "exponentials": (("last_rows", "last_stride"), None),
    **dict.fromkeys(("grad", "grad_x"), (("rows", "width"), torch.float32)),
    "grad_y": (("columns", "width"), torch.float32),
    **dict.fromkeys(("inv_norm", "row_dot", "row_lse", "row_weight", "losses", "slope"), (("rows",), torch.float32)),
    **dict.fromkeys(("row_negative_weight", "col_negative_weight"), (("rows",), torch.float32)),
    **dict.fromkeys(("col_lse", "col_weight"), (("col_count",), torch.float32)),
    **dict.fromkeys(("pair_dot", "pair_weight"), (("pairs",), torch.float32)),
    **dict.fromkeys(("negative_weight", "pair_negative_weight"), (("pairs",), torch.float32)),
    **dict.fromkeys(("ids", "row_ids"), (("rows",), torch.int32)),
    "col_ids": (("columns",), torch.int32),
    "pair_ids": (("pair_rows",), torch.int32),
    "row_order": (("rows",), torch.int64),
    "col_order": (("columns",), torch.int64),
    "pair_order": (("pair_rows",), torch.int64),
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
    if "exponentials" in values:
        if extents["kept_rows"]:
            all_extents |= _last_extents(extents)
        else:
            values = {**values, "exponentials": None}
    given: dict[str, Any] = {"operand_dtype": DTYPES[operand_dtype], **extents}
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {}
    for name, value in values.items():
        layout = _LAYOUTS.get(name)
        if layout is None:
            given[name] = value
            continue
        if value is None:
            given[name] = 0
            continue
        extents_of, dtype = layout
        if dtype is None:
            dtype = operand_dtype
        elif dtype is _ANY:
            dtype = value.dtype
            given[f"{name}_dtype"] = DTYPES[dtype]
        if name == "x":
            given["row_stride"], given["feature_stride"] = value.stride()
        shape = shapes.get(extents_of)
        if shape is None:
            shape = shapes[extents_of] = tuple([all_extents[extent] for extent in extents_of])
        dense = name == "x" or value.is_contiguous()
        if not (dense and value.dtype is dtype and value.shape == shape and value.device == device):
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
    name: str, tensor: Tensor, dtype: object, device: torch.device, shape: tuple[int, ...]
) -> TypeError | ValueError:
    if tensor.dtype != dtype:
        return TypeError(f"{name}: got {tensor.dtype}, want {dtype}")
    if tensor.device != device:
        return ValueError(f"{name}: got a tensor on {tensor.device}, want one on {device}")
    if tensor.shape != shape:
        return ValueError(f"{name}: got shape {tuple(tensor.shape)}, want {shape}")
    got = f"got strides {tensor.stride()} for shape {tuple(tensor.shape)}"
    return ValueError(f"{name}: {got}, want it contiguous")
