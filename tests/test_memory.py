"""The B x N matrix never exists beyond a constant: peak memory grows with B, and stays below the plain loss's."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.providers import plain_loss
from modest_align_kernels import modest_align_loss
from modest_align_kernels.backends import eager, native
from modest_align_kernels.testing import peak_extra_bytes, poisoned_memory


def peak(rows: int, features: int = 64, **kwargs) -> int:
    x, y = (torch.randn(rows, features, requires_grad=True) for _ in range(2))
    return peak_extra_bytes(lambda: modest_align_loss(x, y, 14.3, **kwargs).backward())


def test_peak_extra_bytes_sees_what_is_held() -> None:
    assert peak_extra_bytes(lambda: torch.empty(1 << 20) + torch.ones(1 << 20)) == 3 * 4 << 20
    assert peak_extra_bytes(lambda: len([torch.empty(1 << 20) for _ in range(4)])) >= 4 * 4 << 20


def test_poisoned_memory_is_poisoned() -> None:
    with poisoned_memory():
        assert torch.empty(100).isnan().all()
        assert torch.empty(100, dtype=torch.float16).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_memory_grows_with_the_rows_not_with_their_square(monkeypatch) -> None:
    monkeypatch.setattr(eager, "BLOCK_ROWS", 64)
    monkeypatch.setattr(eager, "BLOCK_COLUMNS", 256)
    small, large = peak(1024, backend="eager"), peak(4096, backend="eager")
    assert large <= 4.1 * small
    assert large <= 6 * 4096 * 64 * 4  # x_hat, y_hat, two sums, the gradients


def test_options_do_not_bring_the_matrix_back(monkeypatch) -> None:
    monkeypatch.setattr(native, "WORKSPACE_BYTES", 0)  # the exponentials that native keeps are a part of the matrix
    matrix = 4096 * 4096 * 4
    for kwargs in (
        {"noise_std": 0.1},
        {"smoothing": 0.1},
        {"group_ids": torch.arange(4096) // 3, "smoothing": 0.1},
        {"reduction": "none", "weights": torch.ones(4096)},
    ):
        x, y = (torch.randn(4096, 64, requires_grad=True) for _ in range(2))
        step = partial(modest_align_loss, x, y, 14.3, **kwargs)
        assert peak_extra_bytes(lambda: step().sum().backward()) <= 0.6 * matrix, kwargs  # noqa: B023


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_stays_below_the_compiled_plain_loss(dtype: torch.dtype) -> None:
    x, y = (torch.randn(3000, 256, dtype=dtype, requires_grad=True) for _ in range(2))
    scale = torch.tensor(14.3, requires_grad=True)
    compiled = torch.compile(plain_loss, dynamic=False)
    compiled(x, y, scale).backward()
    plain = peak_extra_bytes(lambda: compiled(x, y, scale).backward())
    assert peak_extra_bytes(lambda: modest_align_loss(x, y, scale).backward()) <= plain
