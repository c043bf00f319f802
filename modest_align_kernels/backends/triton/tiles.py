"""Tile shapes of the two kernels that are matmuls, by architecture and operand dtype.

No row has been measured on a GPU yet. Each is the largest that compiles for its chip without spills: larger tiles read
less from L2, and 256 x 128 is what a Hopper chip's L2 can feed (tests/test_triton_compile.py compiles every row;
benchmarks/NOTES.md has the registers).
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """One program's block of logits, and how it is computed."""

    block_rows: int
    block_columns: int
    block_features: int
    num_warps: int
    num_stages: int

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """How many tiles cover ``rows``, and ``columns``."""
        return -(-rows // self.block_rows), -(-columns // self.block_columns)


# (smallest compute capability, operand dtype): the entry with the largest capability that the device has.
TILES: dict[tuple[int, torch.dtype], Tile] = {
    (80, torch.float16): Tile(128, 128, 32, 8, 4),  # not yet measured
    (80, torch.float32): Tile(64, 64, 16, 4, 4),  # not yet measured
    (90, torch.float16): Tile(256, 128, 64, 8, 3),  # not yet measured
    (90, torch.float32): Tile(64, 128, 32, 8, 3),  # not yet measured
    (100, torch.float16): Tile(128, 64, 64, 8, 4),  # not yet measured
    (100, torch.float32): Tile(64, 128, 32, 8, 3),  # not yet measured
    # GeForce and RTX PRO: the tensor cores of sm_80's kind, not those of sm_100, and 99 KiB of shared memory.
    (120, torch.float16): Tile(128, 128, 32, 8, 4),  # not yet measured
    (120, torch.float32): Tile(64, 64, 16, 4, 4),  # not yet measured
}
INTERPRETER_TILE = Tile(32, 64, 16, 1, 1)


def tile_of_capability(capability: int, dtype: torch.dtype) -> Tile:
    """The tile for a compute capability, such as 89, and operands of ``dtype``."""
    known = [smallest for smallest, known_dtype in TILES if known_dtype == dtype]
    return TILES[max(c for c in known if c <= max(capability, min(known))), dtype]


def choose_tile(device: torch.device, dtype: torch.dtype) -> Tile:
    """The tile for a device and operands of ``dtype``; off CUDA that of the interpreter."""
    if device.type != "cuda":
        return INTERPRETER_TILE
    if torch.version.hip:
        return TILES[80, dtype]
    major, minor = torch.cuda.get_device_capability(device)
    return tile_of_capability(10 * major + minor, dtype)


def input_precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: as torch's own matmul precision says, else to float32 accuracy."""
    return "tf32x3" if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"
