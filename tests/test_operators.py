"""Every backend's operators against the materialised ones, or eager's, in float64, row by row."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from modest_align_kernels import available_backends, ops, reference
from modest_align_kernels.dispatch import operand_dtype, why_not
from modest_align_kernels.testing import Case, make_features, poisoned_memory
from tests.operator_checks import (
    GROUP_PATTERNS,
    assert_pairs_like_eager,
    assert_sides_like_eager,
    assert_within,
    numbered_groups,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FEATURES = 24


def operand_dtypes(backend: str) -> list[torch.dtype]:
    """What a backend multiplies on this device; eager takes anything, so it gets what the GPU kernels do."""
    if backend == "eager":
        return [torch.float32, torch.float16]
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    return list(dict.fromkeys(operand_dtype(d, DEVICE, backend) for d in dtypes if why_not(backend, DEVICE, d) is None))


OPERANDS = [
    pytest.param(name, dtype, id=f"{name}-{dtype}".replace("torch.", ""))
    for name, reason in available_backends(DEVICE).items()
    if reason is None
    for dtype in operand_dtypes(name)
]

# Triton's interpreter is slow: a scale for each dtype, where two do, and the others when there is time.
_QUICK = {(torch.float32, 1000.0), (torch.float16, 14.3)}
OPERANDS_AND_SCALES = [
    pytest.param(
        *given.values,
        scale,
        id=f"{given.id}-{scale}",
        marks=pytest.mark.slow if given.values[0] == "triton" and (given.values[1], scale) not in _QUICK else (),
    )
    for given in OPERANDS
    for scale in (14.3, 100.0, 1000.0)
]


def make_operands(rows: int, columns: int, backend: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unit rows, rounded to ``dtype``, in the backend's width."""
    features = make_features(Case("", rows, columns, FEATURES), torch.float32, DEVICE)
    noise = None, None, 0, False
    x_hat, y_hat = (ops.perturb_normalize(t, *noise, None, operand_dtype=dtype, backend=backend)[0] for t in features)
    return x_hat, y_hat


def make_ids(pattern: str, rows: int, columns: int) -> tuple[Tensor | None, Tensor | None]:
    """Int32 ids [rows] and [columns]."""
    generator = torch.Generator().manual_seed(rows)
    row_ids, col_ids = (torch.randint(9, (n,), generator=generator, dtype=torch.int32) for n in (rows, columns))
    if pattern == "none":
        return None, None
    if pattern == "groups":
        col_ids[::3] = rows  # in no row's group
    elif pattern == "sorted":  # most tiles exclude nothing
        row_ids, col_ids = torch.arange(rows).int() // 3, torch.arange(columns).int() // 2 - 5
    elif pattern == "rows":  # where everything is excluded
        col_ids.fill_(4)
    elif pattern == "columns":
        row_ids.fill_(4)
    elif pattern == "a row and a column":  # for the last of whose pairs it takes the diagonal
        row_ids.fill_(4)
        col_ids.fill_(4)
        row_ids[5], col_ids[7] = 5, 7
    return row_ids.to(DEVICE), col_ids.to(DEVICE)


PATTERNS = ("none", "groups", "sorted", "rows", "columns", "a row and a column")


def cases(rows: int, columns: int):
    """Ids, exclude_diagonal and col_count."""
    for k, (pattern, diagonal) in enumerate(itertools.product(PATTERNS, (False, True))):
        for col_count in ((0, rows), (5, columns))[k % 4 in (1, 2)]:
            yield f"ids: {pattern}, {diagonal=}, {col_count=}", (*make_ids(pattern, rows, columns), diagonal), col_count


# around the interpreter's tile of 32 x 64, and several of them
SIZES = [(31, 63), (32, 64), (33, 65), (70, 140)]


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize(("backend", "dtype", "scale"), OPERANDS_AND_SCALES)
def test_stats(backend: str, dtype: torch.dtype, rows: int, columns: int, scale: float) -> None:
    """The budget: a logit's float32 product, its sum and the logsumexp's roundings, in units of the largest logit."""
    x_hat, y_hat = make_operands(rows, columns, backend, dtype)
    scale_tensor = torch.tensor(scale, device=DEVICE)
    budget = 8 * torch.finfo(torch.float32).eps * scale
    for what, excluded, col_count in cases(rows, columns):
        truth = reference.contrastive_stats(x_hat.double(), y_hat.double(), scale_tensor.double(), *excluded, col_count)
        with poisoned_memory():
            *results, _ = ops.contrastive_stats(
                x_hat, y_hat, scale_tensor, *excluded, col_count=col_count, backend=backend
            )
        for name, result, expected in zip(("row_lse", "col_lse"), results, truth, strict=True):
            assert result.dtype == torch.float32
            assert torch.equal(result == -math.inf, expected == -math.inf), f"{what}: {name}"
            finite = expected > -math.inf
            assert_within((result.double() - expected)[finite].abs(), budget, f"{what}: {name}")


def absolute_g(x_hat, y_hat, scale, row_lse, col_lse, row_weight, col_weight, *excluded) -> Tensor:
    """|G| with both terms' absolute values, [B, N]: what errors are relative to where terms of either sign cancel."""
    logits = reference._logits(x_hat, y_hat, scale, *excluded)
    g = row_weight.abs()[:, None] * (logits - row_lse[:, None]).exp()
    g[:, : len(col_lse)] += col_weight.abs() * (logits[:, : len(col_lse)] - col_lse).exp()
    return g.masked_fill(logits == -math.inf, 0.0)


def make_weights(length: int, seed: int) -> Tensor:
    """[length], of either sign, with -1, 0 and 1 among them."""
    weights = 2 * torch.rand(length, generator=torch.Generator().manual_seed(seed)) - 1
    weights[:3] = torch.tensor([-1.0, 0.0, 1.0])[:length]
    return weights.to(DEVICE)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize(("backend", "dtype", "scale"), OPERANDS_AND_SCALES)
def test_grads(backend: str, dtype: torch.dtype, rows: int, columns: int, scale: float) -> None:
    """The budget, relative to a row's sum of |G|: that of the logits for the exponentials, and G's rounding."""
    x_hat, y_hat = make_operands(rows, columns, backend, dtype)
    scale_tensor = torch.tensor(scale, device=DEVICE)
    exact = x_hat.double(), y_hat.double(), scale_tensor.double()
    relative = 8 * torch.finfo(torch.float32).eps * scale + torch.finfo(dtype).eps
    absolute = 2.0**-35  # half a subnormal float16 over the gain; what float32 loses to underflow is less
    for what, excluded, col_count in cases(rows, columns):
        lse = tuple(t.float() for t in reference.contrastive_stats(*exact, *excluded, col_count))
        softmaxes = *lse, make_weights(rows, 1), make_weights(col_count, 2)
        wide = *exact, *(t.double() for t in softmaxes), *excluded
        truth, g = reference.contrastive_grads(*wide), absolute_g(*wide)
        with poisoned_memory():
            grads = ops.contrastive_grads(
                x_hat, y_hat, scale_tensor, *softmaxes, *excluded, want_x=True, want_y=True, backend=backend
            )
        for name, grad, expected, size in zip(("grad_x", "grad_y"), grads, truth, (g, g.T), strict=True):
            assert grad.dtype == torch.float32
            error = (grad.double() - expected).norm(dim=1)
            assert_within(error, relative * size.sum(1) + absolute * size.count_nonzero(1), f"{what}: {name}")


@pytest.mark.parametrize(("backend", "dtype"), OPERANDS)
def test_grads_of_one_side(backend: str, dtype: torch.dtype) -> None:
    x_hat, y_hat = make_operands(33, 65, backend, dtype)
    scale, excluded = torch.tensor(14.3, device=DEVICE), (None, None, True)
    *lse, _ = ops.contrastive_stats(x_hat, y_hat, scale, *excluded, col_count=33, backend=backend)
    args = x_hat, y_hat, scale, *lse, make_weights(33, 1), make_weights(33, 2), *excluded
    both = ops.contrastive_grads(*args, want_x=True, want_y=True, backend=backend)
    for side in (0, 1):
        with poisoned_memory():
            grads = ops.contrastive_grads(*args, want_x=side == 0, want_y=side == 1, backend=backend)
        assert torch.equal(grads[side], both[side])
        assert grads[1 - side].shape == (0, x_hat.shape[1])


@pytest.mark.parametrize("pairs", [None, 0, 1, 7, 20])
@pytest.mark.parametrize(("backend", "dtype"), OPERANDS)
def test_pairs_dots_are_of_rounded_rows(backend: str, dtype: torch.dtype, pairs: int | None) -> None:
    x_hat, _ = make_operands(20, 20, backend, dtype)
    _, y = make_features(Case("", 20, 20, FEATURES), torch.float32, DEVICE)
    pair_hat = None if pairs is None else x_hat[:pairs]
    seed, noise_std = torch.tensor(5, device=DEVICE), torch.tensor(0.1, device=DEVICE)
    for noise in ((None, None, 0, False), (seed, noise_std, 1, True)):
        with poisoned_memory():
            y_hat, inv_norm, pair_dot = ops.perturb_normalize(y, *noise, pair_hat, operand_dtype=dtype, backend=backend)
        truth = reference.perturb_normalize(
            y.double(), seed=noise[0], noise_stream=noise[2], noise_std=0.1, relative_noise=noise[3]
        )
        rounding = torch.finfo(dtype).eps + 1e-5
        assert_within((y_hat[:, :FEATURES].double() - truth).norm(dim=1), rounding, "y_hat")
        assert not y_hat[:, FEATURES:].any()
        assert inv_norm.dtype == pair_dot.dtype == torch.float32
        assert pair_dot.shape == (pairs or 0,)
        expected = (y_hat[: len(pair_dot)].double() * x_hat[: len(pair_dot)].double()).sum(1)
        assert_within((pair_dot.double() - expected).abs(), 4 * torch.finfo(torch.float32).eps, "pair_dot")


SMOOTHED_SIZES = [(1, 1), (1, 5), (6, 6), (40, 131)]  # of which the columns are more than a GPU's program sums


def smoothed_cases(rows: int, columns: int):
    """Ids, and a smoothing for each."""
    for pattern, smoothing in zip(GROUP_PATTERNS, (None, 0.1, 0.3, 0.7, 1.0, 0.0), strict=True):
        for its_smoothing in {smoothing, 0.2} if pattern == "none" else {smoothing}:
            ids = (None if t is None else t.to(DEVICE) for t in numbered_groups(pattern, rows, columns))
            yield (*ids, its_smoothing)


@pytest.mark.parametrize(("scale", "symmetric"), [(14.3, True), (1000.0, False)])
@pytest.mark.parametrize(("rows", "columns"), SMOOTHED_SIZES)
@pytest.mark.parametrize(("backend", "dtype"), OPERANDS)
def test_pair_losses(backend: str, dtype: torch.dtype, rows: int, columns: int, scale: float, symmetric: bool) -> None:
    hats = make_operands(rows, columns, backend, dtype)
    for case in smoothed_cases(rows, columns):
        assert_pairs_like_eager(*hats, *case, rows if symmetric else 0, backend, scale)


@pytest.mark.parametrize(("rows", "columns"), SMOOTHED_SIZES)
@pytest.mark.parametrize(("backend", "dtype"), OPERANDS)
def test_perturb_normalize_backward(backend: str, dtype: torch.dtype, rows: int, columns: int) -> None:
    hats = make_operands(rows, columns, backend, dtype)
    for case, dx_dtype in zip(smoothed_cases(rows, columns), itertools.cycle((dtype, torch.bfloat16)), strict=False):
        assert_sides_like_eager(*hats, *case, FEATURES, dx_dtype, backend)
