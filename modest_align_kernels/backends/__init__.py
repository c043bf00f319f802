"""What a backend is, and what several of them share: the numbers of the arithmetic, blocks, and their products.

What the operators compute is the docstrings of :mod:`modest_align_kernels.backends.eager`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from modest_align_kernels.backends.contract import Logits

_Function = TypeVar("_Function", bound=Callable[..., object])

LOG2E = math.log2(math.e)
MIN_NORM = 1e-12
# A row of finite features whose squares overflow float32 is taken so many times: else it would count as a row of zeros.
SHRINK = 2.0**-80
# exp2 arguments stay within [-126, 100] of float32: headroom for the sums above, no subnormal numbers below.
HEADROOM = 100.0
# A sum below 2^-80 has lost terms to underflow that could matter: then maxima are subtracted instead.
SMALLEST_LOG2_SUM = -80.0


def _workspace_bytes() -> int:
    mib = os.environ.get("MODEST_ALIGN_WORKSPACE_MIB") or "256"
    if not re.fullmatch("[0-9]{1,5}", mib) or not 1 <= int(mib) <= 65536:
        raise ValueError(f"MODEST_ALIGN_WORKSPACE_MIB: got {mib!r}, want an integer from 1 to 65536")
    return int(mib) * 2**20


# Of these a build of the CUDA kernels has at most one.
CUDA_EXPERIMENTS = ("pingpong64", "pingpong128", "stagger")


def _experiment() -> str | None:
    name = os.environ.get("MODEST_ALIGN_EXPERIMENT") or None
    known = ("triton-persistent", *CUDA_EXPERIMENTS)
    if name not in (None, *known):
        raise ValueError(f"MODEST_ALIGN_EXPERIMENT: got {name!r}, want {', '.join(known[:-1])} or {known[-1]}")
    return name


# What is tried instead of what is there.
EXPERIMENT = _experiment()
# What a backend may hold at once beyond its results: partial sums, a block of G, or on a CPU the exponentials that are
# kept from the forward to the backward.
WORKSPACE_BYTES = _workspace_bytes()
# float16 holds G * 2^10 without overflow (|G| <= 2) and keeps G as small as 1/B normal up to B = 16 million.
FP16_GAIN = 2.0**10
# How many rows are converted at once to be summed.
SUMMED_ROWS = 1024
# Normalisation on a GPU holds whole rows in registers.
GPU_FEATURES = 16384


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators, as ``backends/registry.py`` lists it.

    Attributes:
        name: what ``backend=`` takes.
        auto: whether ``backend="auto"`` takes it: for a device, the dtype that the features count as
            (:func:`computed_dtype`), and their number.
        operand_dtype: of 16-bit features on a device, the dtype of the matmuls' operands.
        width_multiple: rows of x_hat and y_hat have this many features or a multiple, the last ones zero: every load
            is aligned, none is masked.
        why_not: why it cannot run on a device, for features of a dtype and a number (None asks about the device alone),
            in one sentence; None if it can.
        module: for a device type, the module that has the five functions; imported when first used.
        exponentials_shape: for B, N, the operands' dtype and a device type, the shape of what contrastive_stats keeps
            for contrastive_grads (:class:`~modest_align_kernels.backends.contract.Logits`); without rows: nothing.
    """

    name: str
    auto: Callable[[torch.device, torch.dtype, int], bool]
    operand_dtype: Callable[[torch.dtype, torch.device], torch.dtype]
    width_multiple: int
    why_not: Callable[[torch.device, torch.dtype | None, int | None], str | None]
    module: Callable[[str], str]
    exponentials_shape: Callable[[int, int, torch.dtype, str], tuple[int, int]] = lambda *shape: (0, 0)


def constant_in_traces(function: _Function) -> _Function:
    """Have Dynamo call what it cannot look into, and take the answer for a constant."""
    # torch.compiler.assume_constant_result sets the same, and imports Dynamo, which takes a second.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_traces
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def computed_dtype(features: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that features count as: autocast's, unless they are float64."""
    autocast = _has_autocast(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if autocast and features != torch.float64 else features


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over operands of ``dtype``: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


def even_block(total: int, largest: int, multiple: int = 1) -> int:
    """The length of the fewest equal parts of ``total`` that have at most ``largest``, in whole multiples."""
    largest = max(largest // multiple, 1) * multiple
    parts = max(-(-total // largest), 1)
    return round_up(max(-(-total // parts), 1), multiple)


def blocks(total: int, size: int) -> Iterator[slice]:
    """[0, total) in intervals of ``size``, the last one shorter."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def gradient_block(
    rows: int,
    columns: int,
    width: int,
    elements: int,
    row_multiple: int,
    column_multiple: int,
    processors: int = 1,
) -> tuple[int, int]:
    """Rows and columns of a block of G, in whole multiples, of at most ``elements`` unless a single one is larger.

    Near square ones touch the float32 sums of both sides least often. Of those the ones are taken whose products,
    [block, width] in tiles of 128 x 256, keep the chip's ``processors`` at work until they end.
    """
    widest = max(math.isqrt(elements), elements // round_up(rows, row_multiple))
    widest = min(widest, (2**31 - 1) // row_multiple)  # Triton's offsets within a tile's rows are of 32 bits
    block_columns = _full_block(columns, widest, column_multiple, width, processors)
    return _full_block(rows, elements // block_columns, row_multiple, width, processors), block_columns


def processors_of(device: torch.device) -> int:
    """The streaming multiprocessors of a GPU; 1 for anything else."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _full_block(total: int, largest: int, multiple: int, width: int, processors: int) -> int:
    """An even block at most ``largest``, of which so many are taken that tiles come in the fewest waves in all."""
    fewest = -(-total // even_block(total, largest, multiple))

    def waves(size: int) -> int:
        tiles = -(-size // 128) * -(-width // 256)
        return -(-total // size) * -(-tiles // processors)

    sizes = [round_up(-(-total // parts), multiple) for parts in range(fewest, 2 * fewest + 4)]
    return min((size for size in sizes if size <= max(largest, multiple)), key=waves)


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


def gain_of(dtype: torch.dtype) -> float:
    """What G is multiplied by while it is of ``dtype``."""
    return FP16_GAIN if dtype == torch.float16 else 1.0


def accumulate_products(
    a: Logits,
    grad_x: Tensor,
    grad_y: Tensor,
    block: tuple[int, int],
    write_g: Callable[[slice, slice, Tensor], None],
) -> None:
    """grad_x = G Y_hat and grad_y = G^T X_hat from blocks of G, each written once and multiplied twice.

    Args:
        a: the logits.
        grad_x: [B, width] in the accumulation dtype, or empty: not wanted.
        grad_y: [N, width], likewise.
        block: rows and columns of a block.
        write_g: called with a block's rows, its columns, and a matrix of ``block``'s shape in the operands' dtype to
            whose first rows and columns it writes G times :func:`gain_of` that dtype.
    """
    x_hat, y_hat = a.x_hat, a.y_hat
    gain = gain_of(x_hat.dtype)
    g = torch.empty(block, dtype=x_hat.dtype, device=x_hat.device)
    for i in blocks(x_hat.shape[0], block[0]):
        for j in blocks(y_hat.shape[0], block[1]):
            write_g(i, j, g)
            g_block = g[: i.stop - i.start, : j.stop - j.start]
            if grad_x.numel():
                accumulate_matmul(grad_x[i], g_block, y_hat[j], first=j.start == 0, alpha=1 / gain)
            if grad_y.numel():
                accumulate_matmul(grad_y[j], g_block.T, x_hat[i], first=i.start == 0, alpha=1 / gain)


def negated_sums(hat: Tensor, weight: Tensor | None, ids: Tensor | None, pairs: int) -> Tensor:
    """Less the sum of all rows: the sum of each number's rows, [pairs + 1, width]; of none without ids, [1, width].

    Args:
        hat: [rows, width].
        weight: of the first rows, the others' are 0; None: all are 1.
        ids: int32 [rows], from 0 to ``pairs``, or None.
        pairs: B.
    """
    dtype = accumulation_dtype(hat.dtype)
    sums = hat.new_zeros((1 if ids is None else pairs + 1, hat.shape[1]), dtype=dtype)
    total = hat.new_zeros(hat.shape[1], dtype=dtype)
    for i in blocks(len(hat) if weight is None else len(weight), SUMMED_ROWS):
        values = hat[i].to(dtype)
        if weight is not None:
            values = values * weight[i, None]
        total += values.sum(0)
        if ids is not None:
            add_rows(sums, ids[i], values)
    return sums.sub_(total)


def add_rows(to: Tensor, ids: Tensor, values: Tensor) -> None:
    """Add each row of ``values`` to that of ``to`` with its number, in the same order in every run."""
    if to.is_cuda:  # there index_add_ is made of atomics, whose order changes from run to run; this sorts the ids first
        to.index_put_((ids,), values, accumulate=True)
    else:
        to.index_add_(0, ids, values)
