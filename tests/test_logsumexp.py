"""The logsumexps, differentiable for any gradient: exact in float64, within the error budget below it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from modest_align_kernels import available_backends, contrastive_logsumexp, modest_align_loss, ops, reference
from modest_align_kernels.dispatch import operand_dtype
from modest_align_kernels.testing import (
    CASES,
    Case,
    assert_within_budget,
    make_features,
    make_group_ids,
    peak_extra_bytes,
    poisoned_memory,
    row_errors,
    value_and_grads,
)

BACKENDS = [name for name, reason in available_backends("cpu").items() if reason is None]
# Weights and one direction are no part of it, and ids are of both sides or of neither.
ITS_CASES = [c for c in CASES if c.symmetric and not c.weighted and bool(c.groups) == c.column_ids]
IDS = {"row_ids": torch.tensor([0, 1, 0, 2, 7]), "col_ids": torch.tensor([0, 1, 5, 2, 1, 0, 9])}


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


def on(backend: str):
    return lambda *args, **kwargs: contrastive_logsumexp(*args, backend=backend, **kwargs)


def upstream(row_lse: Tensor, col_lse: Tensor) -> tuple[Tensor, ...]:
    """Gradients of either sign that every dtype holds exactly.

    Where a row's and a column's softmax nearly cancel, or the terms of the scale's gradient, rounding is all that is
    left of them: columns' gradients are smaller than rows', and every fourth is negative.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(lse: Tensor, largest: float) -> Tensor:
        grad = torch.randint(1, 9, (len(lse),), generator=generator) * (largest / 8)
        grad[3::4] *= -1
        return grad.to(lse.dtype)

    return draw(row_lse, 1 / 64), draw(col_lse, 1 / 1024)


def finite(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == -math.inf, 0.0)


def weighted(logsumexp):
    """Losses, [B + N], with which :func:`upstream` comes back to the logsumexps.

    What is subtracted makes an error relative to the logits' size, of whose rounding a logsumexp near 0 is the sum.
    """

    def losses(x, y, scale, smoothing=0.0, group_ids=None, symmetric=True):
        ids = {} if group_ids is None else dict(zip(("row_ids", "col_ids"), group_ids, strict=True))
        both = logsumexp(x, y, scale, **ids)
        return torch.cat([u * (finite(lse) - 2 * scale.detach()) for u, lse in zip(upstream(*both), both, strict=True)])

    return losses


@pytest.mark.parametrize("case", ITS_CASES, ids=str)
def test_exact_in_float64(case: Case) -> None:
    x, y = make_features(case, torch.float64)
    group_ids = make_group_ids(case)
    ids = {} if group_ids is None else {"row_ids": group_ids[0], "col_ids": group_ids[1]}
    got, expected = (f(x, y, case.scale, **ids) for f in (contrastive_logsumexp, reference.contrastive_logsumexp))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    got, expected = (
        value_and_grads(weighted(f), x, y, case) for f in (contrastive_logsumexp, reference.contrastive_logsumexp)
    )
    for name, truth in expected.items():
        assert (got[name] - truth).norm() <= 1e-10 * truth.norm().clamp_min(1e-3), name


@pytest.mark.parametrize("ids", [{}, IDS], ids=["all", "ids"])
def test_gradcheck(ids: dict) -> None:
    ids = {**ids, "row_ids": IDS["row_ids"].clone()} if ids else {}
    inputs = [t.requires_grad_() for t in make_features(Case("", 5, 7, 3), torch.float64)]
    inputs.append(torch.tensor(5.0, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(lambda *a: contrastive_logsumexp(*a, **ids), inputs, eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ITS_CASES, ids=str)
def test_error_budget(backend: str, case: Case, dtype: torch.dtype) -> None:
    plain = weighted(reference.contrastive_logsumexp)
    seeds = 2 if backend == "triton" else 4  # the interpreter is slow
    assert_within_budget(weighted(on(backend)), case, dtype, seeds=seeds, plain_fn=plain)


@pytest.mark.parametrize("which", ["rows", "columns", "both"])
@pytest.mark.parametrize("scale", [1.0, 14.3, 60.0, 100.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_very_unequal_size(backend: str, dtype: torch.dtype, scale: float, which: str) -> None:
    """1e-30 beside 1: relative to its own row, whose gradient a norm over all rows would not see."""
    if operand_dtype(dtype, torch.device("cpu"), backend) == torch.float16:
        pytest.skip("float16 operands hold nothing below 2^-34 of the largest gradient")
    x, y = make_features(Case("", 40, 50, 32), dtype)
    row_grad, col_grad = torch.ones(40), torch.ones(50)
    row_grad[::3], col_grad[::2] = -1e-30, 1e-30
    if which != "both":
        (col_grad if which == "rows" else row_grad).zero_()

    def grads(logsumexp, x, y):
        x, y = (t.clone().requires_grad_() for t in (x, y))
        both = logsumexp(x, y, scale)
        return torch.autograd.grad(
            both, (x, y), [g.to(lse.dtype) for g, lse in zip((row_grad, col_grad), both, strict=True)]
        )

    truth = grads(reference.contrastive_logsumexp, x.double(), y.double())
    plain = grads(reference.contrastive_logsumexp, x, y)
    rounding = 4 * torch.finfo(torch.float32).eps * max(scale, 1.0)
    sides = {"rows": [0], "columns": [1], "both": [0, 1]}[which]
    for side, got in enumerate(grads(on(backend), x, y)):
        if side in sides:
            limit = 2 * row_errors(plain[side], truth[side]).max() + rounding
            assert row_errors(got, truth[side]).max() <= limit


def test_zero_gradients_are_zero(backend: str) -> None:
    x, y = (t.requires_grad_() for t in make_features(Case("", 6, 9, 8), torch.float32))
    both = contrastive_logsumexp(x, y, 14.3, backend=backend)
    for grad in torch.autograd.grad(both, (x, y), [torch.zeros(6), torch.zeros(9)], retain_graph=True):
        assert not grad.any()
    row_grad = torch.zeros(6)
    row_grad[2] = 1.0
    grad_x, grad_y = torch.autograd.grad(both, (x, y), [row_grad, torch.zeros(9)])
    assert grad_x[2].any()
    assert not grad_x[[0, 1, 3, 4, 5]].any()
    assert grad_y.any(1).all()


@pytest.mark.parametrize("scale", [14.3, 100.0, 1000.0])
def test_rows_and_columns_of_which_nothing_is_left(backend: str, scale: float) -> None:
    case = Case("", 7, 9, 8, scale=scale)
    x, y = (t.requires_grad_() for t in make_features(case, torch.float32))
    ids = {"row_ids": torch.tensor([5, 5, 3, 5, 5, 5, 5]), "col_ids": torch.tensor([3, 3, 3, 3, 3, 3, 3, 3, 5])}
    row_lse, col_lse = contrastive_logsumexp(x, y, scale, **ids, backend=backend)
    assert torch.equal(row_lse == -math.inf, torch.zeros(7, dtype=torch.bool))
    ids["col_ids"][8] = 3  # now nothing is left of row 2
    row_lse, col_lse = contrastive_logsumexp(x, y, scale, **ids, backend=backend)
    assert (row_lse == -math.inf).nonzero().tolist() == [[2]]
    assert col_lse.isfinite().all()
    grads = torch.autograd.grad((row_lse, col_lse), (x, y), [torch.ones(7), torch.ones(9)])
    assert not grads[0][2].any()
    assert grads[0][[0, 1, 3, 4, 5, 6]].any(1).all()
    assert all(grad.isfinite().all() for grad in grads)
    ids["row_ids"][:] = 3  # and here of anything
    row_lse, col_lse = contrastive_logsumexp(x, y, scale, **ids, backend=backend)
    assert (row_lse == -math.inf).all()
    assert (col_lse == -math.inf).all()
    for grad in torch.autograd.grad((row_lse, col_lse), (x, y), [torch.ones(7), torch.ones(9)]):
        assert not grad.any()


def test_an_output_that_nobody_uses(backend: str, monkeypatch) -> None:
    """Nothing of its softmaxes is computed: its weights have no length."""
    x, y = (t.requires_grad_() for t in make_features(Case("", 13, 29, 40), torch.float32))
    lengths = []
    original = ops.contrastive_grads

    def spy(*args, **kwargs):
        lengths.append(len(args[4]))
        return original(*args, **kwargs)

    monkeypatch.setattr(ops, "contrastive_grads", spy)
    truth = reference.contrastive_logsumexp(x.double(), y.double(), 14.3)
    for k in (0, 1):
        both = contrastive_logsumexp(x, y, 14.3, backend=backend)
        got = torch.autograd.grad(both[k].square().sum(), (x, y))
        expected = torch.autograd.grad(truth[k].square().sum(), (x, y), retain_graph=True)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert lengths == [0, 29]


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:])
def test_each_requires_grad_subset(backend: str, wanted: tuple[bool, ...]) -> None:
    values = (*make_features(Case("", 7, 9, 8), torch.float32), torch.tensor(12.0))

    def grads(logsumexp, values):
        leaves = [v.detach().clone().requires_grad_(w) for v, w in zip(values, wanted, strict=True)]
        weighted(logsumexp)(*leaves).sum().backward()
        return [leaf.grad for leaf in leaves]

    truth = grads(reference.contrastive_logsumexp, [v.double() for v in values])
    for got, expected in zip(grads(on(backend), values), truth, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


def test_flops_are_those_of_four_matmuls() -> None:
    x, y = make_features(Case("", 24, 40, 64), torch.float32)
    for wanted, matmuls in (((True, True), 4), ((True, False), 3), ((False, False), 1)):
        features = [t.clone().requires_grad_(w) for t, w in zip((x, y), wanted, strict=True)]
        with FlopCounterMode(display=False) as counter:
            loss = weighted(on("eager"))(*features, torch.tensor(14.3)).sum()
            if any(wanted):
                loss.backward()
        assert counter.get_total_flops() == matmuls * 2 * 24 * 40 * 64


@pytest.mark.parametrize("ids", [None, torch.arange(4096)], ids=["all", "ids"])
def test_the_matrix_is_never_stored(ids: Tensor | None) -> None:
    x, y = (torch.randn(4096, 64, requires_grad=True) for _ in range(2))

    def step() -> None:
        both = contrastive_logsumexp(x, y, 14.3, row_ids=ids, col_ids=ids, backend="eager")
        torch.autograd.grad([lse.sum() for lse in both], (x, y))

    assert peak_extra_bytes(step) <= 0.6 * 4096**2 * 4


@pytest.mark.parametrize("case", [c for c in ITS_CASES if c.columns <= 70], ids=str)
def test_every_output_is_written(backend: str, case: Case) -> None:
    x, y = make_features(case, torch.float32)
    clean = value_and_grads(weighted(on(backend)), x, y, case)
    with poisoned_memory():
        poisoned = value_and_grads(weighted(on(backend)), x, y, case)
    for name, expected in clean.items():
        assert torch.equal(poisoned[name], expected), name


def test_any_strides_and_dtypes(backend: str) -> None:
    x, y = make_features(Case("", 12, 14, 16), torch.float32)
    wide = torch.full((24, 40), math.nan)
    wide[::2, 3:35:2] = x
    strided = wide[::2, 3:35:2], y.T.contiguous().T
    expected = contrastive_logsumexp(x, y, 14.3, backend=backend)
    torch.testing.assert_close(contrastive_logsumexp(*strided, 14.3, backend=backend), expected)
    x, y = x.bfloat16().requires_grad_(), y.requires_grad_()
    scale = torch.tensor([14.3], dtype=torch.float16, requires_grad=True)
    both = contrastive_logsumexp(x, y, scale, backend=backend)
    sum(lse.sum() for lse in both).backward()
    assert [lse.dtype for lse in both] == [torch.float32] * 2
    assert (x.grad.dtype, y.grad.dtype, scale.grad.dtype) == (torch.bfloat16, torch.float32, torch.float16)
    assert scale.grad.shape == (1,)


def test_ids_are_labels_not_indices(backend: str) -> None:
    x, y = make_features(Case("", 5, 7, 8), torch.float32)
    expected = contrastive_logsumexp(x, y, 9.0, **IDS, backend=backend)
    for rename in (lambda t: t * -(2**40) + 3, lambda t: t.to(torch.int32), lambda t: t.to(torch.uint8)):
        renamed = {name: rename(ids) for name, ids in IDS.items()}
        assert torch.equal(torch.cat(contrastive_logsumexp(x, y, 9.0, **renamed, backend=backend)), torch.cat(expected))


def test_the_loss_is_made_of_it(backend: str) -> None:
    case = Case("", 40, 40, 24)
    x, y = make_features(case, torch.float32)

    def loss(x, y, scale, smoothing, group_ids, symmetric):
        positive = scale * torch.nn.functional.cosine_similarity(x, y)
        return sum((lse - positive).mean() for lse in contrastive_logsumexp(x, y, scale, backend=backend)) / 2

    expected = value_and_grads(lambda x, y, s, **_: modest_align_loss(x, y, s, backend=backend), x, y, case)
    torch.testing.assert_close(value_and_grads(loss, x, y, case), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("rows", "columns", "features"), [(0, 3, 4), (3, 0, 4), (0, 0, 4), (3, 5, 0)])
def test_empty(backend: str, rows: int, columns: int, features: int) -> None:
    x, y = torch.randn(rows, features, requires_grad=True), torch.randn(columns, features, requires_grad=True)
    scale = torch.tensor(10.0, requires_grad=True)
    both = contrastive_logsumexp(x, y, scale, backend=backend)
    # Without features every logit is 0; of nothing the logsumexp is that of no number.
    assert both[0].tolist() == pytest.approx([math.log(columns) if columns else -math.inf] * rows)
    assert both[1].tolist() == pytest.approx([math.log(rows) if rows else -math.inf] * columns)
    sum(finite(lse).sum() for lse in both).backward()
    assert x.grad.shape == x.shape
    assert y.grad.shape == y.shape
    assert not x.grad.any()
    assert not y.grad.any()
    assert float(scale.grad) == 0


def test_zero_and_nan_rows(backend: str) -> None:
    x, y = make_features(Case("", 6, 8, 8), torch.float32)
    x[2], y[7] = 0.0, 0.0
    x.requires_grad_(), y.requires_grad_()
    both = contrastive_logsumexp(x, y, 14.3, backend=backend)
    expected = reference.contrastive_logsumexp(x.double(), y.double(), 14.3)
    torch.testing.assert_close(tuple(t.double() for t in both), expected, rtol=1e-5, atol=1e-5)
    sum(lse.sum() for lse in both).backward()
    assert not x.grad[2].any()
    assert not y.grad[7].any()
    x = x.detach().clone()
    x[3, 5] = math.nan
    for scale in (14.3, 100.0, 1000.0):
        row_lse, col_lse = contrastive_logsumexp(x, y, scale, backend=backend)
        assert row_lse[3].isnan()
        assert col_lse.isnan().all()


def test_second_derivative_raises(backend: str) -> None:
    x, y = make_features(Case("", 5, 5, 4), torch.float32)
    for wanted, k in itertools.product(((0,), (1,), (2,), (0, 1, 2)), (0, 1)):
        inputs = [t.clone().requires_grad_(n in wanted) for n, t in enumerate((x, y, torch.tensor(10.0)))]
        lse = contrastive_logsumexp(*inputs, backend=backend)[k]
        grads = torch.autograd.grad(lse.sum(), [inputs[n] for n in wanted], create_graph=True)
        with pytest.raises(RuntimeError, match="contrastive_logsumexp has no second derivative"):
            sum(g.square().sum() for g in grads).backward()


def test_torch_func(backend: str) -> None:
    x, y = make_features(Case("", 5, 7, 16), torch.float32)

    def loss(x, y, scale):
        return weighted(on(backend))(x, y, scale).sum()

    inputs = [t.clone().requires_grad_() for t in (x, y, torch.tensor(14.3))]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    got = torch.func.grad(loss, argnums=(0, 1, 2))(x, y, torch.tensor(14.3))
    torch.testing.assert_close(got, expected, rtol=0.0, atol=0.0)
    with pytest.raises(RuntimeError, match=r"contrastive_logsumexp has no torch\.vmap: got several batches at once"):
        torch.func.vmap(on(backend), in_dims=(0, 0, None))(x.expand(3, 5, 16), y.expand(3, 7, 16), 14.3)


@pytest.mark.parametrize("ids", [False, True])
def test_compiles_once_for_all_batch_sizes(backend: str, ids: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(x, y, scale, row_ids, col_ids):
        row_lse, col_lse = contrastive_logsumexp(x, y, scale, row_ids=row_ids, col_ids=col_ids, backend=backend)
        return finite(row_lse).square().sum() - finite(col_lse).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for rows in (24, 10, 17):
        inputs = [*make_features(Case("", rows, rows + 3, 16), torch.float32), torch.tensor(14.3)]
        inputs = [t.requires_grad_() for t in inputs]
        of_both = (torch.arange(rows) % 7, torch.arange(rows + 3) % 5) if ids else (None, None)
        got, expected = (torch.autograd.grad(function(*inputs, *of_both), inputs) for function in (compiled, loss))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3


def test_compiles_with_one_tensor_on_both_sides() -> None:
    torch._dynamo.reset()
    x, own = make_features(Case("", 9, 9, 16), torch.float32)[0].requires_grad_(), torch.arange(9)

    def loss(x, own):
        return contrastive_logsumexp(x, x, 10.0, row_ids=own, col_ids=own)[0].sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(function(x, own), x) for function in (compiled, loss)))


def test_autocast_gives_float32_from_16_bit_operands(backend: str, monkeypatch) -> None:
    x, y = (t.requires_grad_() for t in make_features(Case("", 24, 30, 16), torch.float32))
    exact = contrastive_logsumexp(x, y, 14.3, backend=backend)
    operands = []
    normalize = ops.perturb_normalize
    monkeypatch.setattr(
        ops, "perturb_normalize", lambda *a, **k: operands.append(k["operand_dtype"]) or normalize(*a, **k)
    )
    with torch.autocast("cpu", torch.bfloat16):
        both = contrastive_logsumexp(x, y, 14.3, backend=backend)
        expected = operand_dtype(torch.float32, x.device, backend)
    assert expected != torch.float32
    assert operands == [expected, expected]
    assert all(lse.dtype == torch.float32 for lse in both)
    torch.testing.assert_close(both, exact, rtol=1e-2, atol=0)
    grads = (torch.autograd.grad([lse.sum() for lse in each], (x, y)) for each in (both, exact))
    for grad, of_exact in zip(*grads, strict=True):
        assert (grad - of_exact).norm() <= 2e-2 * of_exact.norm()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(backend: str, use_reentrant: bool) -> None:
    x, y = (t.requires_grad_() for t in make_features(Case("", 12, 15, 16), torch.float32))
    losses, scale = weighted(on(backend)), torch.tensor(10.0)
    expected = torch.autograd.grad(losses(x, y, scale).sum(), (x, y))
    checkpoint(losses, x, y, scale, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(y.grad, expected[1])


def test_meta_device_has_shapes() -> None:
    x = torch.empty(6, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y = torch.empty(9, 8, device="meta", dtype=torch.bfloat16)
    ids = {"row_ids": torch.empty(6, dtype=torch.int64, device="meta")}
    ids["col_ids"] = torch.empty(9, dtype=torch.int64, device="meta")
    for given in ({}, ids):
        row_lse, col_lse = contrastive_logsumexp(x, y, 10.0, **given)
        assert (row_lse.shape, col_lse.shape, row_lse.dtype) == ((6,), (9,), torch.float32)
        (grad,) = torch.autograd.grad(row_lse.sum() + col_lse.sum(), x)
        assert (grad.shape, grad.dtype, grad.device.type) == (x.shape, x.dtype, "meta")


X = torch.randn(4, 8)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "words"),
    [
        (([[1.0]], X, 1.0), {}, TypeError, "x: got list, want a tensor"),
        ((X, X.long(), 1.0), {}, TypeError, "y: got dtype torch.int64, want float16"),
        ((X[0], X, 1.0), {}, ValueError, r"x: got shape \(8,\), want two dimensions"),
        ((X, X[:, :7], 1.0), {}, ValueError, "y: got 7 features, want 8 as in x"),
        ((X, X.to("meta"), 1.0), {}, ValueError, "y: got device meta, want cpu as x"),
        ((X, X, 0.0), {}, ValueError, "scale: got 0.0, want a finite float > 0"),
        ((X, X, True), {}, TypeError, "scale: got bool"),
        ((X, X, torch.ones(2)), {}, ValueError, r"scale: got a torch.float32 tensor of shape \(2,\)"),
        ((X, X, 1.0), {"row_ids": torch.arange(4)}, ValueError, "col_ids: got None beside row_ids, want both or neith"),
        ((X, X, 1.0), {"col_ids": torch.arange(4)}, ValueError, "row_ids: got None beside col_ids, want both or neith"),
        (
            (X, X[:3], 1.0),
            {"row_ids": torch.arange(4), "col_ids": torch.arange(4)},
            ValueError,
            r"col_ids: got shape \(4,\), want \[3\], one for each row of y",
        ),
        (
            (X, X, 1.0),
            {"row_ids": torch.ones(4), "col_ids": torch.arange(4)},
            TypeError,
            "row_ids: got dtype torch.float32, want int64",
        ),
        (
            (X, X, 1.0),
            {"row_ids": [0, 1, 2, 3], "col_ids": torch.arange(4)},
            TypeError,
            r"row_ids: got list, want an int64 tensor \[4\]",
        ),
        (
            (X, X, 1.0),
            {"row_ids": torch.arange(4), "col_ids": torch.arange(4, device="meta")},
            ValueError,
            "col_ids: got device meta, want cpu as x",
        ),
        ((X, X, 1.0), {"backend": "cuda"}, ValueError, "backend: got 'cuda', want \"auto\" or one of"),
    ],
)
def test_one_clear_sentence(args, kwargs, error, words) -> None:
    with pytest.raises(error, match=words) as caught:
        contrastive_logsumexp(*args, **kwargs)
    assert "\n" not in str(caught.value)
