"""One module a backend, each with the same four functions: see :mod:`modest_align_kernels.backends.eager`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# What a backend may hold at once beyond its results: partial sums, or a block of probabilities.
WORKSPACE_BYTES = 256 * 2**20
# float16 holds P * 2^10 without overflow (P <= 2) and keeps P as small as 1/B normal up to B = 16 million.
FP16_GAIN = 2.0**10
# Compiled operands have rows of whole blocks of features, the last ones zero: every load is aligned, none is masked.
_FEATURES_MULTIPLE = {"triton": 64, "native": 64}


def operand_features(features: int, backend: str) -> int:
    """The width of a backend's x_hat and y_hat for D features; what is past D is zero."""
    return round_up(features, _FEATURES_MULTIPLE.get(backend, 1))


def pair_ids(x_hat: Tensor, y_hat: Tensor, group_ids: Tensor | None) -> Tensor:
    """Int32 [N]: row i and column j are no negatives of each other where ids[i] == ids[j].

    Without groups the ids are the rows' numbers, which leaves out the diagonal; columns past B have ids of their own.
    """
    ids = torch.arange(y_hat.shape[0], dtype=torch.int32, device=x_hat.device)
    if group_ids is not None:
        ids[: group_ids.shape[0]] = group_ids
    return ids


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


def even_blocks(total: int, largest: int, multiple: int) -> list[tuple[int, int]]:
    """[0, total) in the fewest intervals of at most ``largest``, of equal length up to ``multiple``: no tiny tail."""
    count = -(-total // max(largest, multiple))
    size = round_up(-(-total // count), multiple)
    return [(start, min(start + size, total)) for start in range(0, total, size)]


def gradient_blocks(
    rows: int, columns: int, elements: int, row_multiple: int, column_multiple: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Blocks of G of ``elements`` each; near square ones, which touch the float32 sums of both sides least often."""
    largest_columns = columns if rows * columns <= elements else max(math.isqrt(elements), elements // rows)
    column_blocks = even_blocks(columns, largest_columns, column_multiple)
    width = max(b - a for a, b in column_blocks)
    return even_blocks(rows, elements // width, row_multiple), column_blocks


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over operands of ``dtype``: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulate_matmul(out: Tensor, a: Tensor, b: Tensor, first: bool, alpha: float = 1.0) -> None:
    """Out = alpha * a @ b, plus what ``out`` held unless ``first``; ``out`` is of the accumulation dtype."""
    beta = 0.0 if first else 1.0
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=beta, alpha=alpha)
    elif a.is_cuda:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, beta=beta, alpha=alpha, out=out)
    else:
        # A CPU has a fast matmul of bfloat16 operands, and none of float16's.
        product = torch.mm(a, b) if a.dtype == torch.bfloat16 else torch.mm(a.to(out.dtype), b.to(out.dtype))
        if first:
            out.zero_()
        out.add_(product, alpha=alpha)
