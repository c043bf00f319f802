"""weights= and reduction=: each pair's loss and its gradient, for any gradient that comes back to it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from modest_align_kernels import available_backends, modest_align_loss, reference
from modest_align_kernels.dispatch import operand_dtype
from modest_align_kernels.testing import (
    CASES,
    Case,
    assert_within_budget,
    make_features,
    make_weights,
    poisoned_memory,
    row_errors,
    value_and_grads,
)

BACKENDS = [name for name, reason in available_backends("cpu").items() if reason is None]
# The larger ones meet the same kernels in test_loss.py.
SMALL = [case for case in CASES if case.rows <= 65 and not case.weighted]
OPTIONS = {
    "plain": {},
    "one direction": {"symmetric": False},
    "smoothing": {"smoothing": 0.2},
    "groups": {"smoothing": 0.2, "group_ids": torch.tensor([0, 1, 0, 2, 7])},
    "groups of both sides": {
        "smoothing": 0.2,
        "symmetric": False,
        "group_ids": (torch.tensor([0, 1, 0, 2, 7]), torch.tensor([0, 1, 5, 2, 1, 0, 9])),
    },
}


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


def on(backend: str):
    return lambda *args, **kwargs: modest_align_loss(*args, backend=backend, **kwargs)


def singly(loss_fn):
    """Each pair's loss times what then is its gradient: of either sign, exact in every dtype."""

    def losses(x, y, scale, **kwargs):
        each = loss_fn(x, y, scale, reduction="none", **kwargs)
        factor = torch.randint(1, 9, (len(each),), generator=torch.Generator().manual_seed(0)) / 512
        factor[3::4] *= -1
        return factor.to(each.dtype) * each

    return losses


@pytest.mark.parametrize("case", CASES, ids=str)
def test_single_pairs_are_exact_in_float64(case: Case) -> None:
    x, y = make_features(case, torch.float64)
    got, expected = (value_and_grads(singly(f), x, y, case) for f in (on("eager"), reference.modest_align_loss))
    for name, truth in expected.items():
        assert got[name].shape == truth.shape
        assert (got[name] - truth).norm() <= 1e-10 * truth.norm().clamp_min(1e-3), name


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mode", OPTIONS)
def test_gradcheck(mode: str, reduction: str) -> None:
    options = dict(OPTIONS[mode])
    smoothing = options.pop("smoothing", 0.0)
    x, y = make_features(Case("", 5, 7, 3), torch.float64)
    numbers = torch.tensor([5.0, smoothing or 0.1], dtype=torch.float64)
    weights = torch.tensor([0.3, 1.0, 2.0, 0.7, 0.1], dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, y, *numbers, weights)]

    def loss(function, x, y, scale, a, w):
        given = {"smoothing": a if smoothing else 0.0, "weights": w, "reduction": reduction, **options}
        return function(x, y, scale, **given)

    torch.testing.assert_close(loss(modest_align_loss, *inputs), loss(reference.modest_align_loss, *inputs))
    if not smoothing:
        inputs[3].requires_grad_(False)
    assert torch.autograd.gradcheck(lambda *a: loss(modest_align_loss, *a), inputs, eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_error_budget_of_single_pairs(backend: str, case: Case, dtype: torch.dtype) -> None:
    seeds = 2 if backend == "triton" else 4  # the interpreter is slow
    plain = singly(reference.modest_align_loss)
    assert_within_budget(singly(on(backend)), case, dtype, seeds=seeds, plain_fn=plain)


@pytest.mark.parametrize("scale", [14.3, 69.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_of_very_unequal_size(backend: str, dtype: torch.dtype, scale: float) -> None:
    """In one direction an image's gradient is its own pair's: 1e-30 beside 1."""
    if operand_dtype(dtype, torch.device("cpu"), backend) == torch.float16:
        pytest.skip("float16 operands hold nothing below 2^-34 of the largest gradient")
    weights = torch.ones(40)
    weights[::3] = 1e-30
    x, y = make_features(Case("", 40, 50, 8, geometry="random"), dtype)

    def grad(loss_fn, x, y):
        x = x.clone().requires_grad_()
        loss = loss_fn(x, y, scale, symmetric=False, weights=weights.to(x.dtype))
        return torch.autograd.grad(loss, x)[0]

    truth = grad(reference.modest_align_loss, x.double(), y.double())
    plain = row_errors(grad(reference.modest_align_loss, x, y), truth).max()
    limit = 2 * plain + 4 * torch.finfo(torch.float32).eps * scale
    assert row_errors(grad(on(backend), x, y), truth).max() <= limit


@pytest.mark.parametrize("mode", OPTIONS)
def test_reductions_are_sums_of_single_pairs(backend: str, mode: str) -> None:
    x, y = make_features(Case("", 5, 7, 8), torch.float32)
    loss, weights, scale = on(backend), torch.tensor([0.5, 0.0, 2.0, 1.0, 0.25]), torch.tensor(14.3)
    leaves = [t.clone().requires_grad_() for t in (x, y, scale, weights)]

    def grads(function):
        value = function(*leaves[:3], weights=leaves[3], **OPTIONS[mode])
        return value.detach(), torch.autograd.grad(value, leaves, torch.full_like(value, -3.0))

    def by_hand(divide: bool):
        def function(*args, weights, **options):
            each = loss(*args, reduction="none", **options)
            return (weights * each).sum() / (weights.sum() if divide else 1.0)

        return function

    for reduction in ("mean", "sum"):
        got = grads(lambda *a, r=reduction, **k: loss(*a, reduction=r, **k))
        torch.testing.assert_close(got, grads(by_hand(reduction == "mean")), rtol=1e-5, atol=1e-6)
    each = loss(x, y, scale, reduction="none", **OPTIONS[mode])
    assert (each.shape, each.dtype) == ((5,), torch.float32)
    torch.testing.assert_close(loss(x, y, scale, **OPTIONS[mode]), each.mean())
    weighed = loss(x, y, scale, reduction="none", weights=weights, **OPTIONS[mode])
    torch.testing.assert_close(weighed, weights * each)


def test_equal_weights_are_no_weights(backend: str) -> None:
    case = Case("", 12, 15, 8)
    x, y = make_features(case, torch.float32)
    expected = value_and_grads(on(backend), x, y, case)
    for weights in (torch.full((12,), 7.0), torch.ones(12, dtype=torch.int64), torch.ones(12, dtype=torch.bool)):
        got = value_and_grads(lambda *a, w=weights, **k: on(backend)(*a, weights=w, **k), x, y, case)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mode", OPTIONS)
def test_weight_0(backend: str, mode: str, reduction: str) -> None:
    """Without a loss of its own a pair is still a negative of the others; where all are 0 nothing is left, not NaN."""
    x, y = (t.requires_grad_() for t in make_features(Case("", 5, 7, 8), torch.float32))
    scale = torch.tensor(14.3, requires_grad=True)
    options = {**OPTIONS[mode], "reduction": reduction, "backend": backend}
    for weights in (torch.tensor([1.0, 0.0, 1.0, 2.0, 0.0]), torch.zeros(5)):
        loss = modest_align_loss(x, y, scale, weights=weights, **options)
        grads = torch.autograd.grad(loss.sum(), (x, y, scale))
        assert all(grad.isfinite().all() for grad in grads)
        if reduction == "none":
            assert torch.equal(loss == 0, weights == 0)
        if weights.any():
            assert grads[1][[1, 4]].any(1).all()
            assert grads[0][[1, 4]].any(1).all() == OPTIONS[mode].get("symmetric", True)
        else:
            assert not loss.any()
            assert not any(grad.any() for grad in grads)


def test_pairs_that_weigh_nothing_do_not_change_the_others(backend: str) -> None:
    """Against the loss of the pairs that count, with the others' texts as extra negatives."""
    x, y = make_features(Case("", 9, 9, 8), torch.float32)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 0.0, 0.0, 0.0, 0.0])
    got = modest_align_loss(x, y, 14.3, weights=weights, symmetric=False, smoothing=0.1, backend=backend)
    expected = modest_align_loss(x[:5], y, 14.3, weights=weights[:5], symmetric=False, smoothing=0.1, backend=backend)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("mode", OPTIONS)
def test_every_output_is_written(backend: str, mode: str) -> None:
    case = Case("", 5, 7, 8)
    x, y = make_features(case, torch.float32)

    def grads():
        leaves = [t.clone().requires_grad_() for t in (x, y)]
        losses = modest_align_loss(*leaves, 14.3, reduction="none", backend=backend, **OPTIONS[mode])
        return losses.detach(), *torch.autograd.grad(losses, leaves, torch.tensor([1.0, -2.0, 0.0, 0.5, -1.0]))

    clean = grads()
    with poisoned_memory():
        poisoned = grads()
    for got, expected in zip(poisoned, clean, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("reduction", "columns"), itertools.product(["mean", "sum", "none"], [0, 3]))
def test_empty_batch(backend: str, reduction: str, columns: int) -> None:
    x, y = torch.empty(0, 8, requires_grad=True), torch.randn(columns, 8, requires_grad=True)
    scale, weights = torch.tensor(10.0, requires_grad=True), torch.empty(0, requires_grad=True)
    for given in (None, weights):
        loss = modest_align_loss(x, y, scale, smoothing=0.1, weights=given, reduction=reduction, backend=backend)
        assert (loss.shape, loss.dtype) == ((0,) if reduction == "none" else (), torch.float32)
        assert not loss.any()
        loss.sum().backward()
    assert x.grad.shape == (0, 8)
    assert not y.grad.any()
    assert float(scale.grad) == 0
    assert weights.grad.shape == (0,)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_once_for_all_batch_sizes(backend: str, reduction: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(x, y, scale, weights):
        each = modest_align_loss(
            x, y, scale, smoothing=0.1, weights=weights, reduction=reduction, noise_std=0.1, backend=backend
        )
        return each.square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for rows in (24, 10, 17):
        case = Case("", rows, rows + 2, 16)
        inputs = [*make_features(case, torch.float32), torch.tensor(14.3), make_weights(case)]
        inputs = [t.requires_grad_() for t in inputs]
        results = []
        for function in (compiled, loss):
            torch.manual_seed(rows)
            results.append(torch.autograd.grad(function(*inputs), inputs))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3


def test_autocast_and_meta(backend: str) -> None:
    x, y = make_features(Case("", 6, 9, 8), torch.float32)
    exact = modest_align_loss(x, y, 14.3, reduction="none", backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        each = modest_align_loss(x, y, 14.3, weights=torch.ones(6), reduction="none", backend=backend)
    assert each.dtype == torch.float32
    torch.testing.assert_close(each, exact, rtol=3e-2, atol=3e-2)
    x, y, weights = x.to("meta").requires_grad_(), y.to("meta"), torch.ones(6, device="meta")
    each = modest_align_loss(x, y, 14.3, weights=weights, reduction="none")
    assert (each.shape, each.device.type) == ((6,), "meta")
    assert torch.autograd.grad(each.sum(), x)[0].shape == (6, 8)


def test_second_derivative_raises(backend: str) -> None:
    x, y = (t.requires_grad_() for t in make_features(Case("", 5, 5, 4), torch.float32))
    each = modest_align_loss(x, y, 10.0, smoothing=0.1, reduction="none", backend=backend)
    (grad,) = torch.autograd.grad(each.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="modest_align_loss has no second derivative"):
        grad.square().sum().backward()


X = torch.randn(4, 8)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"weights": [1.0] * 4}, TypeError, r"weights: got list, want a float32 tensor \[4\]"),
        ({"weights": torch.ones(3)}, ValueError, r"weights: got shape \(3,\), want \[4\], one for each pair"),
        ({"weights": torch.ones(4, 1)}, ValueError, r"weights: got shape \(4, 1\), want \[4\]"),
        ({"weights": torch.ones(4, dtype=torch.complex64)}, TypeError, "weights: got dtype torch.complex64, want flo"),
        ({"weights": torch.ones(4, device="meta")}, ValueError, "weights: got device meta, want cpu as image_features"),
        ({"weights": torch.ones(4).to_sparse()}, TypeError, "weights: got a tensor of layout torch.sparse_coo"),
        ({"reduction": "batchmean"}, ValueError, 'reduction: got \'batchmean\', want "mean", "sum" or "none"'),
        ({"reduction": None}, TypeError, "reduction: got NoneType"),
    ],
)
def test_one_clear_sentence(kwargs, error, words) -> None:
    with pytest.raises(error, match=words) as caught:
        modest_align_loss(X, X, 1.0, **kwargs)
    assert "\n" not in str(caught.value)


def test_nan_features_give_nan_of_their_own_row(backend: str) -> None:
    x, y = make_features(Case("", 6, 6, 8), torch.float32)
    x[3, 5] = math.nan
    each = modest_align_loss(x, y, 14.3, symmetric=False, reduction="none", backend=backend)
    assert each.isnan().tolist() == [False, False, False, True, False, False]
