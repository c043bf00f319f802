"""The loss and its gradients: exact in float64, within the error budget below it, in every regime."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from modest_align_kernels import available_backends, modest_align_loss, reference
from modest_align_kernels.backends import eager
from modest_align_kernels.backends.contract import Logits
from modest_align_kernels.dispatch import why_not
from modest_align_kernels.testing import (
    CASES,
    Case,
    assert_within_budget,
    make_features,
    make_group_ids,
    poisoned_memory,
    row_errors,
    value_and_grads,
)

BACKENDS = [name for name, reason in available_backends("cpu").items() if reason is None]
SMALL_BLOCKS = Case("several ragged blocks", 70, 150, 24, groups=20)


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


def loss_on(backend: str):
    def loss(*args, **kwargs):
        return modest_align_loss(*args, backend=backend, **kwargs)

    return loss


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    """Blocks so small that a test has several of them, the last ones ragged."""
    monkeypatch.setattr(eager, "BLOCK_ROWS", 16)
    monkeypatch.setattr(eager, "BLOCK_COLUMNS", 32)
    monkeypatch.setattr(eager, "NORMALIZE_ROWS", 8)


def assert_exact(loss_fn, case: Case, rtol: float = 1e-10) -> None:
    x, y = make_features(case, torch.float64)
    truth = value_and_grads(reference.modest_align_loss, x, y, case)
    ours = value_and_grads(loss_fn, x, y, case)
    for name, expected in truth.items():
        assert ours[name].dtype == expected.dtype
        error = (ours[name] - expected).norm() / expected.norm().clamp_min(1e-3)
        assert error <= rtol, f"{name}: {error:.2e}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact_in_float64(case: Case) -> None:
    assert_exact(loss_on("eager"), case)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale", [14.3, 100.0, 1000.0])
def test_exact_over_ragged_blocks(small_blocks, scale: float, symmetric: bool) -> None:
    for rows, columns in ((15, 15), (16, 32), (17, 33), (70, 150)):
        for groups in (0, 9):
            case = Case("blocks", rows, columns, 24, scale=scale, groups=groups, symmetric=symmetric)
            assert_exact(loss_on("eager"), case)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_equals_cross_entropy_and_its_gradients(label_smoothing: float) -> None:
    x, y = (t.requires_grad_() for t in make_features(Case("", 48, 48, 16), torch.float64))
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    logits = scale * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    target = torch.arange(48)
    expected = sum(F.cross_entropy(s, target, label_smoothing=label_smoothing) for s in (logits, logits.T)) / 2
    loss = modest_align_loss(x, y, scale, smoothing=label_smoothing * 47 / 48)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    ours, theirs = (torch.autograd.grad(value, (x, y, scale)) for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("groups", ["none", "rows", "rows and columns"])
def test_gradcheck(groups: str, symmetric: bool) -> None:
    x, y = make_features(Case("", 5, 7, 3), torch.float64)
    ids = torch.tensor([0, 1, 0, 2, 7])
    ids = {"none": None, "rows": ids, "rows and columns": (ids, torch.tensor([0, 1, 5, 2, 1, 0, 9]))}[groups]
    inputs = [t.requires_grad_() for t in (x, y, *torch.tensor([5.0, 0.2], dtype=torch.float64))]

    def loss(x, y, scale, smoothing):
        return modest_align_loss(x, y, scale, smoothing=smoothing, group_ids=ids, symmetric=symmetric)

    assert torch.autograd.gradcheck(loss, inputs, eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_budget(backend: str, case: Case, dtype: torch.dtype) -> None:
    # The interpreter is slow: fewer seeds for it.
    assert_within_budget(loss_on(backend), case, dtype, seeds=2 if backend == "triton" else 4)


@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_triton_is_three_times_as_exact_as_the_plain_bfloat16_loss(scale: float) -> None:
    # float16 operands have three bits more than the features
    if "triton" not in BACKENDS:
        pytest.skip("Triton is not installed")
    for geometry in ("pairs", "random"):
        case = Case("bfloat16", 96, 96, 512, scale=scale, geometry=geometry)
        x, y = make_features(case, torch.bfloat16)
        truth = value_and_grads(reference.modest_align_loss, x.double(), y.double(), case)
        plain = value_and_grads(reference.modest_align_loss, x, y, case)
        # float32 leaves, so that what is measured is not the rounding of the result to bfloat16
        ours = value_and_grads(
            lambda x, y, s, **k: loss_on("triton")(x.half(), y.half(), s, **k), x.float(), y.float(), case
        )
        for name in ("image_features", "text_features"):
            assert row_errors(ours[name], truth[name]).max() <= row_errors(plain[name], truth[name]).max() / 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_budget_over_ragged_blocks(small_blocks, dtype: torch.dtype) -> None:
    assert_within_budget(loss_on("eager"), SMALL_BLOCKS, dtype)


@pytest.fixture
def device_without_float64(monkeypatch) -> None:
    """The eager statistics as they are off the CPU: float32 sums, and no look at a value."""
    monkeypatch.setattr(eager, "_sums_dtype", lambda operands, device: torch.float32)
    monkeypatch.setattr(eager, "_shift", lambda scale_log2: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [SMALL_BLOCKS, *(c for c in CASES if c.columns <= 130)], ids=str)
def test_error_budget_without_float64(device_without_float64, small_blocks, case: Case, dtype: torch.dtype) -> None:
    assert_within_budget(loss_on("eager"), case, dtype)


def test_float32_sums_stay_exact_over_a_thousand_blocks(device_without_float64, monkeypatch) -> None:
    # each logarithm in float32 would round a statistic of 140 by 8e-6, and a thousand of them by 1e-4
    monkeypatch.setattr(eager, "BLOCK_COLUMNS", 4)
    x, y = (F.normalize(t, dim=1) for t in make_features(Case("", 24, 4096, 16), torch.float64))
    lse = torch.empty(24), torch.empty(4096)
    eager.contrastive_stats(Logits(x.float(), y.float(), torch.tensor(100.0), None, None, False), *lse)
    logits = 100 * (x.float().double() @ y.float().double().T)
    for ours, truth in zip(lse, (logits.logsumexp(1), logits.logsumexp(0)), strict=True):
        assert (ours.double() - truth).abs().max() <= 3e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_identical_rows_have_no_gradient(backend: str, dtype: torch.dtype) -> None:
    case = Case("identical", 64, 64, 40, scale=100.0, geometry="identical")
    x, y = make_features(case, dtype)
    ours = value_and_grads(loss_on(backend), x, y, case)
    assert float(ours["loss"]) == pytest.approx(math.log(64), rel=4e-3 if dtype == torch.bfloat16 else 1e-5)
    unit_row = case.scale / case.rows
    for name, features in (("image_features", x), ("text_features", y)):
        relative = ours[name].double().norm(dim=1) * features.double().norm(dim=1) / unit_row
        assert relative.max() <= 16 * torch.finfo(dtype).eps


def test_opposite_pairs_at_scale_100_are_finite_and_right(backend: str) -> None:
    # every cosine is -1: each row of logits is -100, far below what one shift for the whole matrix can hold
    x = torch.ones(300, 8)
    loss = modest_align_loss(x, -x, 100.0, backend=backend)
    assert float(loss) == pytest.approx(math.log(300), rel=1e-5)


@pytest.mark.parametrize("scale", [60.0, 69.4, 78.0, 100.0, 138.0, 139.0, 200.0, 1e4])
def test_around_the_limits_of_one_shift(backend: str, scale: float) -> None:
    assert_within_budget(loss_on(backend), Case("shift", 40, 50, 32, scale=scale), torch.float32)
    assert_within_budget(loss_on(backend), Case("shift", 40, 50, 32, scale=scale, geometry="antipodal"), torch.float32)


def test_confident_rows_keep_their_relative_accuracy(backend: str) -> None:
    # 1 - p of about 1e-9: a softmax in float32 returns 0 here
    x = torch.eye(8)
    x_grad = x.clone().requires_grad_()
    loss = modest_align_loss(x_grad, x, 23.0, backend=backend)
    assert float(loss.detach()) == pytest.approx(7 * math.exp(-23), rel=1e-4)
    truth = x.double().requires_grad_()
    reference.modest_align_loss(truth, x.double(), 23.0).backward()
    (grad,) = torch.autograd.grad(loss, x_grad)
    assert row_errors(grad, truth.grad).max() <= 1e-4


def test_empty_batch(backend: str) -> None:
    x, y = torch.empty(0, 8, requires_grad=True), torch.empty(0, 8, requires_grad=True)
    scale = torch.tensor(10.0, requires_grad=True)
    loss = modest_align_loss(x, y, scale, smoothing=0.1, noise_std=0.1, backend=backend)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == 0
    loss.backward()
    assert x.grad.shape == y.grad.shape == (0, 8)
    assert float(scale.grad) == 0


def test_empty_batch_with_extra_negatives(backend: str) -> None:
    y = torch.randn(3, 8, requires_grad=True)
    loss = modest_align_loss(torch.empty(0, 8), y, 10.0, backend=backend)
    loss.backward()
    assert float(loss.detach()) == 0
    assert not y.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_extent_has_a_value_or_a_sentence(backend: str, dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    runs = why_not(backend, torch.device("cpu"), dtype) is None
    for rows, columns, features in itertools.product((0, 1, 3), (0, 1, 3, 5), (0, 1, 3)):
        x, y = (torch.randn(n, features).to(dtype).requires_grad_() for n in (rows, columns))
        scale, smoothing = (torch.tensor(v, requires_grad=True) for v in (3.0, 0.2))
        given = {"smoothing": smoothing, "group_ids": torch.arange(rows) // 2}
        if columns < rows or not runs:
            with pytest.raises(ValueError if columns < rows else RuntimeError, match=r"^[^\n]+$"):
                modest_align_loss(x, y, scale, backend=backend, **given)
            continue
        loss = modest_align_loss(x, y, scale, backend=backend, **given)
        loss.backward()
        truth = reference.modest_align_loss(x.detach().double(), y.detach().double(), 3.0, **given)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert abs(loss.double() - truth) <= tolerance, (rows, columns, features)
        for leaf in (x, y, scale, smoothing):
            assert leaf.grad.shape == leaf.shape
            assert leaf.grad.isfinite().all()
        if features == 0:
            loss = modest_align_loss(x, y, 3.0, noise_std=0.1, relative_noise=True, backend=backend)
            assert loss.isfinite()


def test_no_features_make_every_logit_zero(backend: str) -> None:
    x, y = torch.empty(4, 0, requires_grad=True), torch.empty(6, 0)
    scale = torch.tensor(100.0, requires_grad=True)
    loss = modest_align_loss(x, y, scale, noise_std=0.1, smoothing=0.3, backend=backend)
    loss.backward()
    assert float(loss.detach()) == pytest.approx((math.log(6) + math.log(4)) / 2)
    assert float(scale.grad) == 0
    assert x.grad.shape == (4, 0)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("rows", [0, 5])
def test_one_element_is_a_number_whatever_its_shape(backend: str, rows: int, shape: tuple[int, ...]) -> None:
    x, y = make_features(Case("", rows, 7, 8), torch.float32)
    numbers = [torch.full(shape, v, requires_grad=True) for v in (12.0, 0.2)]
    torch.manual_seed(0)
    expected = modest_align_loss(x, y, 12.0, smoothing=0.2, noise_std=0.1, backend=backend)
    torch.manual_seed(0)
    std = torch.full(shape, 0.1)
    loss = modest_align_loss(x, y, numbers[0], smoothing=numbers[1], noise_std=std, backend=backend)
    loss.backward()
    assert loss.shape == ()
    torch.testing.assert_close(loss.detach(), expected)
    assert [n.grad.shape for n in numbers] == [shape] * 2
    assert all(n.grad.any() for n in numbers) == (rows > 0)


@pytest.mark.parametrize(
    "number", [int, np.float64, np.float32, np.float16, np.int64, np.int8], ids=lambda t: t.__name__
)
def test_numbers_of_every_kind(number: type) -> None:
    x, y = make_features(CASES[3], torch.float32)
    torch.manual_seed(0)
    expected = modest_align_loss(x, y, 8.0, smoothing=1.0, noise_std=1.0)
    torch.manual_seed(0)
    assert modest_align_loss(x, y, number(8), smoothing=number(1), noise_std=number(1)) == expected


def test_zero_rows(backend: str) -> None:
    x, y = make_features(Case("", 6, 6, 8), torch.float32)
    x[2] = 0
    y[4] = 0
    ours = value_and_grads(loss_on(backend), x, y, Case("", 6, 6, 8))
    truth = value_and_grads(reference.modest_align_loss, x.double(), y.double(), Case("", 6, 6, 8))
    for name, expected in truth.items():
        torch.testing.assert_close(ours[name].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rows_that_are_nearly_zero_have_no_gradient(backend: str, dtype: torch.dtype) -> None:
    """Beside 1e12 times that of other rows, no step of a gradient scaler would ever be taken."""
    x, y = (t.requires_grad_() for t in make_features(Case("", 6, 8, 8), dtype))
    with torch.no_grad():
        x[2], y[4], y[7] = 0.0, 0.0, 0.0
        if dtype != torch.float16:  # to which it is zero
            x[3] = 1e-14
    modest_align_loss(x, y, 10.0, smoothing=0.1, backend=backend).backward()
    assert x.grad.isfinite().all()
    assert y.grad.isfinite().all()
    assert not x.grad[2].any()
    assert not y.grad[[4, 7]].any()
    assert x.grad[3].any() == (dtype == torch.float16)
    assert x.grad[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_whose_squares_overflow_are_no_rows_of_zeros(backend: str, dtype: torch.dtype, monkeypatch) -> None:
    """As which the plain loss takes them in silence; elements of 3e38 have a norm that overflows, too."""
    seed = torch.tensor(7)
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: seed)
    case = Case("", 9, 12, 40)
    x, y = make_features(case, dtype)
    x[2] *= 1e30
    x[5], y[4] = 3e38, 3e38
    y[4, ::2] *= -1
    y[11] *= 2e18  # just above what can be squared
    for noise in ({}, {"noise_std": 0.3, "relative_noise": True}, {"noise_std": 1e25}):
        given = noise | {"seed": seed} if noise else {}
        truth = value_and_grads(partial(reference.modest_align_loss, **given), x.double(), y.double(), case)
        ours = value_and_grads(partial(loss_on(backend), **noise), x, y, case)
        rounding = 64 * torch.finfo(dtype).eps
        for name, expected in truth.items():
            smallest = torch.finfo(torch.float32).smallest_normal
            assert row_errors(ours[name], expected, smallest).max() <= rounding, (noise, name)


def test_a_nan_row_has_a_nan_gradient(backend: str) -> None:
    x, y = (t.requires_grad_() for t in make_features(Case("", 6, 6, 8), torch.float32))
    with torch.no_grad():
        x[3, 5] = math.nan
    modest_align_loss(x, y, 10.0, backend=backend).backward()
    assert x.grad[3].isnan().all()


def test_a_scale_of_zero_has_a_derivative(backend: str) -> None:
    case = Case("", 9, 11, 8, scale=0.0)
    x, y = make_features(case, torch.float32)
    ours = value_and_grads(loss_on(backend), x, y, case)
    truth = value_and_grads(reference.modest_align_loss, x.double(), y.double(), case)
    torch.testing.assert_close(ours["logit_scale"].double(), truth["logit_scale"], rtol=1e-5, atol=0.0)
    assert not ours["image_features"].any()


def test_nan_features_give_nan(backend: str) -> None:
    x, y = make_features(Case("", 6, 6, 8), torch.float32)
    x[3, 5] = math.nan
    for scale in (10.0, 100.0, 1000.0):
        assert math.isnan(modest_align_loss(x, y, scale, smoothing=0.1, backend=backend))


@pytest.mark.parametrize("subset", list(itertools.product([False, True], repeat=4))[1:])
def test_each_requires_grad_subset(backend: str, subset: tuple[bool, ...]) -> None:
    values = (*make_features(Case("", 7, 9, 8), torch.float32), torch.tensor(12.0), torch.tensor(0.15))

    def grads(loss_fn, values):
        leaves = [v.detach().clone().requires_grad_(wanted) for v, wanted in zip(values, subset, strict=True)]
        loss_fn(*leaves[:3], smoothing=leaves[3]).backward()
        return [leaf.grad for leaf in leaves]

    ours = grads(loss_on(backend), values)
    truth = grads(reference.modest_align_loss, [v.double() for v in values])
    for got, expected in zip(ours, truth, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


def test_strided_inputs(backend: str) -> None:
    case = Case("", 12, 12, 16)
    x, y = make_features(case, torch.float32)
    contiguous = value_and_grads(loss_on(backend), x, y, case)
    wide = torch.full((24, 40), math.nan)
    wide[::2, 3:35:2] = x
    column_major = y.T.contiguous().T
    strided_x = wide[::2, 3:35:2].requires_grad_()
    strided_y = column_major.requires_grad_()
    loss = modest_align_loss(strided_x, strided_y, 14.3, smoothing=case.smoothing, backend=backend)
    grads = torch.autograd.grad(loss, (strided_x, strided_y))
    torch.testing.assert_close(loss, contiguous["loss"])
    torch.testing.assert_close(grads, (contiguous["image_features"], contiguous["text_features"]))
    expanded = x[:1].expand(12, 16)  # one row, stride 0
    torch.testing.assert_close(
        modest_align_loss(expanded, y, 14.3, backend=backend),
        modest_align_loss(expanded.contiguous(), y, 14.3),
    )


@pytest.mark.parametrize("case", [c for c in CASES if c.columns <= 70], ids=str)
def test_every_output_is_written(backend: str, case: Case) -> None:
    x, y = make_features(case, torch.float32)
    clean = value_and_grads(loss_on(backend), x, y, case)
    with poisoned_memory():
        poisoned = value_and_grads(loss_on(backend), x, y, case)
    for name, expected in clean.items():
        assert torch.equal(poisoned[name], expected), name


def test_runs_repeat_bit_for_bit(backend: str) -> None:
    case = Case("", 200, 600, 40, groups=50)
    x, y = make_features(case, torch.float32)
    first, second = (value_and_grads(loss_on(backend), x, y, case) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_16_bit_features_get_gradients_of_their_dtype(backend: str) -> None:
    x, y = make_features(Case("", 9, 12, 16), torch.bfloat16)
    x.requires_grad_()
    y = y.float().requires_grad_()
    scale = torch.tensor(10.0, dtype=torch.float16, requires_grad=True)
    loss = modest_align_loss(x, y, scale, backend=backend)
    loss.backward()
    assert loss.dtype == torch.float32
    assert (x.grad.dtype, y.grad.dtype, scale.grad.dtype) == (torch.bfloat16, torch.float32, torch.float16)


def test_second_derivative_raises(backend: str) -> None:
    x, y = make_features(Case("", 5, 5, 4), torch.float32)
    for wanted in ((0,), (1,), (0, 1)):
        inputs = [t.clone().requires_grad_(k in wanted) for k, t in enumerate((x, y))]
        loss = modest_align_loss(*inputs, 10.0, smoothing=0.1, backend=backend)
        grads = torch.autograd.grad(loss, [inputs[k] for k in wanted], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            sum(g.square().sum() for g in grads).backward()
    scale = torch.tensor(10.0, requires_grad=True)
    (grad,) = torch.autograd.grad(modest_align_loss(x, y, scale, backend=backend), scale, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.backward()


# Noise


@pytest.mark.parametrize("relative_noise", [False, True])
def test_noise_is_the_references(backend: str, relative_noise: bool, monkeypatch) -> None:
    case = Case("", 30, 41, 21)
    x, y = make_features(case, torch.float64)
    seed = torch.tensor(123456789123456789)
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: seed)
    noise = {"noise_std": 0.3, "relative_noise": relative_noise}
    expected = value_and_grads(lambda *a, **k: reference.modest_align_loss(*a, **k, **noise, seed=seed), x, y, case)
    for dtype, rtol in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        if dtype == torch.float64 and backend != "eager":
            continue
        got = value_and_grads(lambda *a, **k: loss_on(backend)(*a, **k, **noise), x.to(dtype), y.to(dtype), case)
        for name, value in expected.items():
            error = (got[name].double() - value).norm() / value.norm()
            assert error <= rtol, name


def test_manual_seed_governs_the_noise(backend: str) -> None:
    x, y = make_features(Case("", 8, 8, 16), torch.float32)

    def draw() -> float:
        return float(modest_align_loss(x, y, 10.0, noise_std=0.1, backend=backend))

    torch.manual_seed(5)
    first, second = draw(), draw()
    torch.manual_seed(5)
    assert (draw(), draw()) == (first, second)
    assert first != second
    state = torch.get_rng_state()
    modest_align_loss(x, y, 10.0, noise_std=0.0, backend=backend)
    assert torch.equal(torch.get_rng_state(), state)


def test_relative_noise_does_not_depend_on_the_rows_size(backend: str) -> None:
    x, y = make_features(Case("", 8, 8, 16), torch.float32)
    losses = []
    for factor in (1.0, 64.0):
        torch.manual_seed(0)
        losses.append(modest_align_loss(factor * x, y, 10.0, noise_std=0.3, relative_noise=True, backend=backend))
    torch.testing.assert_close(*losses)


def test_group_ids_are_labels_not_indices(backend: str) -> None:
    case = Case("", 20, 26, 8, groups=6)
    x, y = make_features(case, torch.float32)
    ids = make_group_ids(case)
    renamed = torch.unique(ids, return_inverse=True)[1] * -(2**40) + 3
    for dtype in (torch.int64, torch.int32):
        small = torch.unique(ids, return_inverse=True)[1].to(dtype)
        losses = [
            modest_align_loss(x, y, 9.0, smoothing=0.2, group_ids=g, backend=backend) for g in (ids, renamed, small)
        ]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
        torch.testing.assert_close(losses[0], losses[2], rtol=1e-6, atol=0)


def test_group_ids_of_columns_exclude_extra_negatives_too(backend: str) -> None:
    x, y = make_features(Case("", 6, 10, 8), torch.float32)
    row_ids = torch.tensor([4, 4, 0, 1, 2, 3])
    own = torch.cat((row_ids, torch.tensor([9, 10, 11, 12])))

    def loss(y, group_ids):
        return modest_align_loss(x, y, 9.0, smoothing=0.2, group_ids=group_ids, backend=backend)

    torch.testing.assert_close(loss(y, (row_ids, own)), loss(y, row_ids), rtol=1e-6, atol=0)
    own[9], y[9] = 0, 3 * x[2]  # what a bank may hold: a false negative of image 2
    expected = reference.modest_align_loss(x.double(), y.double(), 9.0, smoothing=0.2, group_ids=(row_ids, own))
    torch.testing.assert_close(loss(y, (row_ids, own)).double(), expected, rtol=1e-5, atol=0)
    assert loss(y, row_ids) > 1.1 * expected


@pytest.mark.parametrize("scale", [-3.0, -95.0, -130.0, -1000.0])
def test_a_scale_below_zero_is_as_any_other(backend: str, scale: float) -> None:
    """Of a tensor, whose value nobody checks: logits above what one shift was made for were wrong, or infinite."""
    x, y = make_features(Case("", 40, 50, 8, geometry="antipodal"), torch.float32)
    y[:20] = make_features(Case("", 20, 20, 8), torch.float32)[1]
    case = Case("", 40, 50, 8, scale=scale)
    truth = value_and_grads(reference.modest_align_loss, x.double(), y.double(), case)
    ours = value_and_grads(loss_on(backend), x, y, case)
    assert abs(ours["loss"].double() - truth["loss"]) <= 8 * torch.finfo(torch.float32).eps * abs(scale)
    for name in ("image_features", "text_features"):
        error = (ours[name].double() - truth[name]).norm() / truth[name].norm()
        assert error <= 32 * torch.finfo(torch.float32).eps * abs(scale), name
