"""Operators of a backend against the eager one in float64, row by row: on this machine, on a GPU or a simulated one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from modest_align_kernels import noise, ops
from modest_align_kernels.autograd import number_groups
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
    if dtype != torch.float16:
        x[3] *= 1e30  # whose square is no float32
    seed = torch.tensor((77 << 40) + 987654321)
    std = torch.tensor(0.5)
    first_row = (1 << 32) + 5
    given = {"operand_dtype": torch.float16, "backend": backend}
    truth = {"operand_dtype": torch.float64, "backend": "eager"}
    for strided in (x, x.T.contiguous().T, torch.cat((x, x), 1)[:, features:]):
        for relative in (False, True):
            x_hat, inv_norm, _ = ops.perturb_normalize(
                strided, seed, std, noise.TEXTS, relative, None, first_row, **given
            )
            expected = ops.perturb_normalize(
                x.double(), seed, std.double(), noise.TEXTS, relative, None, first_row, **truth
            )
            assert ((x_hat[:, :features].double() - expected[0]).norm(dim=1) <= 6e-4).all()
            torch.testing.assert_close(inv_norm.double(), expected[1], rtol=1e-5, atol=0.0)
            assert x_hat.shape[1] % 64 == 0
            assert not x_hat[:, features:].any()
    y_hat, _, dot = ops.perturb_normalize(y, None, None, noise.IMAGES, False, x_hat, **given)
    torch.testing.assert_close(dot.double(), (x_hat.double() * y_hat[:9].double()).sum(1), rtol=1e-5, atol=1e-6)
    for ids, smoothing in (("none", None), ("none", 0.3), ("groups of columns", 0.3)):
        assert_sides_like_eager(x_hat, y_hat, *numbered_groups(ids, 9, 11), smoothing, features, dtype, backend)
        assert_pairs_like_eager(x_hat, y_hat, *numbered_groups(ids, 9, 11), smoothing, 9, backend)


GROUP_PATTERNS = ("none", "groups", "groups of columns", "large groups", "one group", "no groups")


def numbered_groups(pattern: str, rows: int, columns: int) -> tuple[Tensor | None, Tensor | None]:
    """The ids that the loss makes, int32 [rows] and [columns], of a pattern from ``GROUP_PATTERNS``."""
    generator = torch.Generator().manual_seed(rows)
    sizes = {"groups": rows // 2 + 1, "groups of columns": 5, "large groups": 3, "one group": 1, "no groups": 2**40}
    if pattern == "none":
        return None, None
    row_ids = torch.randint(sizes[pattern], (rows,), generator=generator)
    col_ids = None
    if pattern in ("groups of columns", "large groups"):  # some columns are in no row's group
        col_ids = torch.randint(sizes[pattern] + 2, (columns,), generator=generator)
    return number_groups(row_ids, col_ids, columns)


EPS = torch.finfo(torch.float32).eps


def assert_within(error: Tensor, budget: Tensor | float, what: str) -> None:
    """Every row's error is at most its budget."""
    for k, (its_error, its_budget) in enumerate(
        zip(error.tolist(), torch.as_tensor(budget, device=error.device).expand_as(error).tolist(), strict=True)
    ):
        if not its_error <= its_budget:
            raise AssertionError(f"{what}: row {k} is off by {its_error:.2e}, may be by {its_budget:.2e}")


def _wide(*arguments: Tensor | None) -> list[Tensor | None]:
    return [a.double() if a is not None and a.is_floating_point() else a for a in arguments]


def assert_pairs_like_eager(
    x_hat: Tensor,
    y_hat: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    smoothing: float | None,
    col_count: int,
    backend: str,
    scale: float = 14.3,
) -> None:
    """``pair_losses``: each softplus and softmax relative to itself, the slope to the terms that it is the sum of."""
    pairs, columns, device = len(x_hat), len(y_hat), x_hat.device
    generator = torch.Generator().manual_seed(pairs)
    dot = (x_hat.float() * y_hat[:pairs].float()).sum(1)

    def lse(length: int) -> Tensor:
        margin = 60 * torch.randn(length, generator=generator) ** 3 / 5
        margin[1:4] = torch.tensor([-math.inf, math.nan, 0.0])[: max(0, length - 1)]  # nothing is left, lost, even
        return scale * dot[:length] + margin.to(device)

    strength = None if smoothing is None else torch.tensor(smoothing, device=device)
    given = lse(pairs), lse(col_count), dot, torch.tensor(scale, device=device), strength
    given += x_hat, y_hat, row_ids, col_ids
    with poisoned_memory():
        results = ops.pair_losses(*given, backend=backend)
    expected = ops.pair_losses(*_wide(*given), backend="eager")
    losses, row_weight, col_weight, pair_weight, slope, row_negative, col_negative = (t.double() for t in results)
    for ours, truth in zip(results, expected, strict=True):
        assert ours.shape == truth.shape
        assert torch.equal(ours.isnan(), truth.isnan())

    def check(name: str, ours: Tensor, truth: Tensor, budget: Tensor | float) -> None:
        # The smallest normal number in float32: below it the hardware may give up.
        assert_within((ours - truth).nan_to_num().abs(), torch.as_tensor(budget).nan_to_num() + 2.0**-120, name)

    def relative(lse: Tensor) -> Tensor:
        """Of a function of a margin whose logarithm has no derivative above 1."""
        return EPS * (4 + 2 * lse.nan_to_num(neginf=0.0).abs() + 2 * scale * dot[: len(lse)].abs())

    row_relative, col_relative = relative(given[0]), relative(given[1])
    check("row_weight", row_weight, expected[1], row_relative * expected[1])
    check("col_weight", col_weight, expected[2], col_relative * expected[2])
    share = 0.5 if col_count else 1.0
    unsmoothed = ops.pair_losses(*_wide(*given[:4]), None, *given[5:], backend="eager")
    loss_budget = torch.maximum(row_relative, col_relative if col_count else row_relative) * unsmoothed[0]
    pair_budget = row_relative * expected[1]
    if col_count:
        pair_budget = pair_budget + col_relative * expected[2]
    if smoothing is not None:
        for name, ours, truth in (("row", row_negative, expected[5]), ("column", col_negative, expected[6])):
            assert torch.equal(ours == 0, truth == 0)
            check(f"{name}'s negative weight", ours, truth, 2 * EPS * truth)
        on_pair = 2 + expected[5] + expected[6]
        terms = dot.abs() * on_pair + expected[5] * columns + expected[6] * pairs
        slope_budget = 8 * EPS * share * scale * terms
        check("slope", slope, expected[4], slope_budget)
        loss_budget = loss_budget + smoothing * slope_budget + EPS * expected[0].abs()
        pair_budget = pair_budget + 4 * EPS * smoothing * on_pair
    check("losses", losses, expected[0], loss_budget)
    check("pair_weight", pair_weight, expected[3], pair_budget + EPS)


def assert_sides_like_eager(
    x_hat: Tensor,
    y_hat: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    smoothing: float | None,
    features: int,
    dtype: torch.dtype,
    backend: str,
) -> None:
    """``perturb_normalize_backward`` of both sides, relative to the sizes of the terms that a row's gradient has."""
    pairs, device = len(x_hat), x_hat.device
    generator = torch.Generator().manual_seed(pairs)
    normal = partial(torch.randn, generator=generator)
    strength = None if smoothing is None else torch.tensor(smoothing, device=device)
    pair_weight, *weights = (normal(pairs).to(device), *(torch.rand(pairs, generator=generator) / pairs for _ in "xy"))
    own_weight, other_weight = (t.to(device) for t in weights)
    scale, factor = torch.tensor(14.3, device=device), torch.tensor(0.03, device=device)
    for hat, other_hat, ids, other_ids in ((x_hat, y_hat, row_ids, col_ids), (y_hat, x_hat, col_ids, row_ids)):
        grad, inv_norm = normal(hat.shape).to(device), torch.rand(len(hat), generator=generator).to(device) + 0.1
        grad[:, features:] = 0.0
        inv_norm[1:3] = torch.tensor([1e12, math.nan])[: len(hat) - 1]  # divided by a constant, lost
        given = (grad, hat, inv_norm, other_hat, pair_weight, scale, factor)
        given += (strength, ids, other_ids, own_weight, other_weight)
        with poisoned_memory():
            dx, dot = ops.perturb_normalize_backward(*given, features=features, dtype=dtype, backend=backend)
        wide = _wide(*given)
        wide[2] = torch.where(inv_norm >= 1e12, 1e12, wide[2])  # which float32 rounds down
        expected = ops.perturb_normalize_backward(*wide, features=features, dtype=torch.float64, backend="eager")
        assert dx.dtype == dtype
        terms = grad.double().norm(dim=1)
        terms[:pairs] += pair_weight.abs()
        if smoothing is not None:
            terms += smoothing * other_weight.sum()
            terms[:pairs] += smoothing * own_weight * len(other_hat)
        assert_within((dot.double() - expected[1]).abs(), 16 * EPS * factor * terms, "row_dot")
        assert torch.equal(dx.isnan(), expected[0].isnan())
        constant = inv_norm >= 1e12
        assert not dx[constant].any()
        size = factor * scale * wide[2].nan_to_num().masked_fill(constant, 0.0) * terms
        rounding = torch.finfo(dtype).eps + 16 * EPS
        smallest = torch.finfo(dtype).smallest_normal * features**0.5
        assert_within((dx.double() - expected[0]).nan_to_num().norm(dim=1), rounding * size + smallest, "dx")
