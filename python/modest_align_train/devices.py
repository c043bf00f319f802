"""The device that a name means."""

from __future__ import annotations

import torch


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device of that name; for ``"auto"`` a GPU where there is one, otherwise the CPU.

    Raises:
        ValueError: There is no such device.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be auto or one that this torch can use, got {device!r}: {reason}") from None
    return chosen
