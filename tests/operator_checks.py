"""What the tests of simulated GPU kernels share: operators of a backend against the eager one in float64."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import pytest
import torch
from torch import Tensor

from modest_align_kernels import noise, ops
from modest_align_kernels.testing import Case, make_features, poisoned_memory


def slow_but(quick: set, *values: Iterable) -> list:
    """All combinations of parameters, marked slow except for some."""
    return [
        pytest.param(*c, marks=[] if c in quick else pytest.mark.slow, id="-".join(map(str, c)))
        for c in product(*values)
    ]


def operands(
    rows: int, columns: int, width: int, scale: float, geometry: str = "pairs", dtype: torch.dtype = torch.float16
) -> tuple[Tensor, ...]:
    """x_hat, y_hat and the scale."""
    x, y = make_features(Case("", rows, columns, width, geometry=geometry), torch.float64)
    x_hat, y_hat = (torch.nn.functional.normalize(t, dim=1).to(dtype) for t in (x, y))
    return x_hat, y_hat, torch.tensor(scale)


def assert_like_eager(
    x_hat: Tensor,
    y_hat: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    col_count: int,
    backend: str,
    diagonal: bool = True,
) -> None:
    """The same operands in float64 through the eager backend: nothing differs but float32's sums and G's rounding."""
    rounding = 2e-6 + 4e-7 * float(scale)  # of logits, which float32 holds to 24 bits
    excluded = row_ids, col_ids, diagonal
    wide = tuple(t.double() for t in (x_hat, y_hat, scale))
    with poisoned_memory():
        *lse, _ = ops.contrastive_stats(x_hat, y_hat, scale, *excluded, col_count=col_count, backend=backend)
    *expected, _ = ops.contrastive_stats(*wide, *excluded, col_count=col_count, backend="eager")
    for ours, truth in zip(lse, expected, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=2e-6, atol=rounding)
    weights = tuple(2 * torch.rand(len(each)) - 1 for each in lse)
    with poisoned_memory():
        grads = ops.contrastive_grads(
            *(x_hat, y_hat, scale, *lse, *weights, *excluded), want_x=True, want_y=True, backend=backend
        )
    expected, terms = (
        ops.contrastive_grads(
            *(*wide, *(t.double() for t in (*lse, *signed)), *excluded), want_x=True, want_y=True, backend="eager"
        )
        for signed in (weights, [t.abs() for t in weights])
    )
    for ours, truth, without_signs in zip(grads, expected, terms, strict=True):
        # Of probabilities below float16's smallest, 2^-24 times the gain of 2^10, nothing is left, nor below float32's.
        relative, absolute = (1e-3, 2.0**-25) if x_hat.dtype == torch.float16 else (4e-6, 2.0**-120)
        allowed = (relative + rounding) * torch.maximum(truth.norm(dim=1), without_signs.norm(dim=1)) + absolute
        assert ((ours - truth).norm(dim=1) <= allowed).all()


def assert_rows_like_eager(dtype: torch.dtype, features: int, backend: str) -> None:
    """Both operators of normalisation on features of ``dtype`` and any strides."""
    x, y = make_features(Case("", 9, 11, features), dtype)
    seed = torch.tensor((77 << 40) + 987654321)
    std = torch.tensor(0.5)
    given = {"operand_dtype": torch.float16, "backend": backend}
    truth = {"operand_dtype": torch.float64, "backend": "eager"}
    for strided in (x, x.T.contiguous().T, torch.cat((x, x), 1)[:, features:]):
        for relative in (False, True):
            x_hat, inv_norm, _ = ops.perturb_normalize(strided, seed, std, noise.TEXTS, relative, None, **given)
            expected = ops.perturb_normalize(x.double(), seed, std.double(), noise.TEXTS, relative, None, **truth)
            assert ((x_hat[:, :features].double() - expected[0]).norm(dim=1) <= 6e-4).all()
            torch.testing.assert_close(inv_norm.double(), expected[1], rtol=1e-5, atol=0.0)
            assert x_hat.shape[1] % 64 == 0
            assert not x_hat[:, features:].any()
    y_hat, y_inv_norm, dot = ops.perturb_normalize(y, None, None, noise.IMAGES, False, x_hat, **given)
    torch.testing.assert_close(dot.double(), (x_hat.double() * y_hat[:9].double()).sum(1), rtol=1e-5, atol=1e-6)
    width = y_hat.shape[1]
    inside = torch.arange(width) < features
    grad, offset = torch.randn(11, width) * inside, torch.randn(2, width) * inside
    weight, factor = torch.randn(9), torch.tensor(0.3)
    y_inv_norm[1] = 1e12  # a zero row's: no projection
    given = (grad, y_hat, y_inv_norm, x_hat, weight, offset, factor)
    with poisoned_memory():
        dx, dot = ops.perturb_normalize_backward(*given, features=features, dtype=dtype, backend=backend)
    wide = [t.double() for t in given]
    wide[2][1] = 1e12
    expected = ops.perturb_normalize_backward(*wide, features=features, dtype=torch.float64, backend="eager")
    torch.testing.assert_close(dot.double(), expected[1], rtol=1e-5, atol=1e-5)
    rows = torch.arange(11) != (1 if dtype == torch.float16 else -1)  # 1e12 is too much for float16
    error = (dx.double() - expected[0]).norm(dim=1)
    terms = expected[0].norm(dim=1) + wide[2] * expected[1].abs()
    assert (error <= (torch.finfo(dtype).eps + 1e-5) * terms)[rows].all()
