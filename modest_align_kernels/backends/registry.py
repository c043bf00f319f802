"""The backends: a new one is a module with a ``BACKEND`` and a line here."""

from __future__ import annotations

import torch

from modest_align_kernels.backends import Backend, eager, native, round_up, triton

# In the order in which ``backend="auto"`` tries them.
BACKENDS: dict[str, Backend] = {b.name: b for b in (native.BACKEND, triton.BACKEND, eager.BACKEND)}


def operand_width(features: int, backend: str) -> int:
    """The row length of a backend's x_hat and y_hat for D features."""
    return round_up(features, BACKENDS[backend].width_multiple)


def exponentials_shape(rows: int, columns: int, dtype: torch.dtype, device_type: str, backend: str) -> tuple[int, int]:
    """The shape of what a backend keeps of the exponentials of B rows and N columns."""
    return BACKENDS[backend].exponentials_shape(rows, columns, dtype, device_type)
