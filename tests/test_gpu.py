"""What only a GPU can show: `make gpu-check` runs these. Where there is none they are skipped, and prove nothing."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch

from modest_align_kernels import ModestAlignLoss, available_backends, modest_align_loss, ops, reference
from modest_align_kernels.dispatch import why_not
from modest_align_kernels.noise import IMAGES, TEXTS
from modest_align_kernels.testing import (
    CASES,
    Case,
    assert_within_budget,
    make_features,
    peak_extra_bytes,
    poisoned_memory,
    row_errors,
    value_and_grads,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
BACKENDS = (
    [name for name, reason in available_backends("cuda").items() if reason is None] if torch.cuda.is_available() else []
)
KERNELS = [name for name in BACKENDS if name != "eager"]


def loss_on(backend: str):
    return lambda *args, **kwargs: modest_align_loss(*args, backend=backend, **kwargs)


def skip_unless_it_runs(backend: str, dtype: torch.dtype) -> None:
    if (reason := why_not(backend, torch.device("cuda"), dtype)) is not None:
        pytest.skip(reason)


def features(rows: int, columns: int, width: int, dtype=torch.float16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    x, y = (torch.randn(n, width, generator=generator, device="cuda").to(dtype) for n in (rows, columns))
    return x.requires_grad_(), y.requires_grad_()


def test_auto_is_triton() -> None:
    assert available_backends()["triton"] is None
    x, y = make_features(Case("", 40, 40, 24), torch.float32, "cuda")
    assert torch.equal(modest_align_loss(x, y, 10.0), modest_align_loss(x, y, 10.0, backend="triton"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_budget(backend: str, case: Case, dtype: torch.dtype) -> None:
    skip_unless_it_runs(backend, dtype)
    with poisoned_memory():
        assert_within_budget(loss_on(backend), case, dtype, "cuda")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("rows", [255, 256, 257, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_around_real_tiles(dtype: torch.dtype, rows: int, backend: str) -> None:
    skip_unless_it_runs(backend, dtype)
    for groups in (0, rows // 3):
        case = Case("tiles", rows, rows + 130, 192, scale=50.0, groups=groups)
        assert_within_budget(loss_on(backend), case, dtype, "cuda", seeds=1)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("scale", [20.0, 100.0, 1e4])
@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (140, 256), (1409, 3080), (5000, 6000)])
@pytest.mark.parametrize("workspace", [None, 2**20])
def test_matmul_kernels_agree_with_eager_in_float64(
    workspace: int | None, rows: int, columns: int, scale: float, backend: str, monkeypatch
) -> None:
    if workspace is not None:  # so small that both operations need several waves
        for name in {"native": ["native.cuda"], "triton": ["triton.contrastive_stats", "triton.contrastive_grads"]}[
            backend
        ]:
            module = import_module(f"modest_align_kernels.backends.{name}")
            monkeypatch.setattr(module, "WORKSPACE_BYTES", workspace)
    case = Case("", rows, columns, 192, scale=scale)
    x, y = make_features(case, torch.float32, "cuda")
    given = {"operand_dtype": torch.float16, "backend": backend}
    x_hat, _, _ = ops.perturb_normalize(x, None, None, IMAGES, False, None, **given)
    y_hat, _, dot = ops.perturb_normalize(y, None, None, TEXTS, False, x_hat, **given)
    torch.testing.assert_close(dot.double(), (x_hat.double() * y_hat[:rows].double()).sum(1), rtol=1e-5, atol=1e-6)
    logits = x_hat, y_hat, torch.tensor(scale, device="cuda")
    exact = tuple(t.double() for t in logits)
    ids = tuple(torch.arange(n, device="cuda", dtype=torch.int32) // 3 for n in (rows, columns))
    for *excluded, col_count in ((None, None, True, rows), (*ids, True, rows), (*ids, False, columns)):
        with poisoned_memory():
            *lse, _ = ops.contrastive_stats(*logits, *excluded, col_count=col_count, backend=backend)
        *expected, _ = ops.contrastive_stats(*exact, *excluded, col_count=col_count, backend="eager")
        for value, truth in zip(lse, expected, strict=True):
            torch.testing.assert_close(value.double(), truth, rtol=2e-6, atol=2e-6 + 4e-7 * scale)
        weights = tuple(2 * torch.rand(len(each), device="cuda") - 1 for each in lse)
        wanted = {"want_x": True, "want_y": True}
        with poisoned_memory():
            got = ops.contrastive_grads(*logits, *lse, *weights, *excluded, **wanted, backend=backend)
        wide = (t.double() for t in (*lse, *weights))
        expected = ops.contrastive_grads(*exact, *wide, *excluded, **wanted, backend="eager")
        for value, truth in zip(got, expected, strict=True):
            assert truth.norm() > 1e-2  # with the negatives' own logsumexps G is large at any scale
            assert (value.double() - truth).norm() <= (1e-3 + 4e-7 * scale) * truth.norm()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_three_times_as_exact_as_the_plain_bfloat16_loss(scale: float, backend: str) -> None:
    case = Case("bfloat16", 2048, 2048, 512, scale=scale)
    x, y = make_features(case, torch.bfloat16, "cuda")
    truth = value_and_grads(reference.modest_align_loss, x.double(), y.double(), case)
    plain = value_and_grads(reference.modest_align_loss, x, y, case)
    ours = value_and_grads(
        lambda x, y, s, **k: modest_align_loss(x.half(), y.half(), s, **k, backend=backend), x.float(), y.float(), case
    )
    for name in ("image_features", "text_features"):
        assert row_errors(ours[name], truth[name]).max() <= row_errors(plain[name], truth[name]).max() / 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_repeat_bit_for_bit(backend: str) -> None:
    x, y = features(5000, 6000, 512)
    ids = torch.arange(5000, device="cuda") // 7

    def grads(group_ids: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        loss = modest_align_loss(x, y, 30.0, smoothing=0.1, group_ids=group_ids, backend=backend)
        return loss.detach(), *torch.autograd.grad(loss, (x, y))

    for group_ids in (None, ids):
        for first, second in zip(grads(group_ids), grads(group_ids), strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("backend", KERNELS)
def test_no_host_sync(backend: str) -> None:
    x, y = features(512, 512, 256)
    scale = torch.tensor(14.3, device="cuda", requires_grad=True)
    ids = torch.arange(512, device="cuda") // 3
    kwargs = {"noise_std": 0.1, "smoothing": torch.tensor(0.1, device="cuda"), "group_ids": ids, "backend": backend}
    modest_align_loss(x, y, scale, **kwargs).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        modest_align_loss(x, y, scale, **kwargs).backward()
        modest_align_loss(x, y, 14.3, smoothing=0.1, backend=backend).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", KERNELS)
def test_graph_capture_of_a_training_step_draws_fresh_noise(backend: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64, device="cuda", dtype=torch.float16)
    settings = {"noise_std": 0.5, "smoothing": 0.1, "logit_scale": 14.3, "learn_scale": True}
    loss_fn = ModestAlignLoss(**settings, backend=backend).cuda()
    parameters = [*model.parameters(), *loss_fn.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, capturable=True)
    x, y = (torch.randn(512, 64, device="cuda", dtype=torch.float16) for _ in range(2))

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    losses = []
    for _ in range(3):
        graph.replay()
        losses.append(float(captured))
    assert all(math.isfinite(loss) for loss in losses)
    assert len(set(losses)) == 3


def test_compiles_once_for_all_batch_sizes() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    loss_fn = ModestAlignLoss(noise_std=0.0, smoothing=0.1, logit_scale=14.3, learn_scale=True).cuda()
    compiled = torch.compile(loss_fn, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for rows in (256, 100, 77):
        x, y = make_features(Case("", rows, rows, 64), torch.float32, "cuda")
        x.requires_grad_()
        loss = compiled(x, y)
        torch.testing.assert_close(loss, loss_fn(x, y), rtol=1e-5, atol=1e-6)
        loss.backward()
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3


@pytest.mark.parametrize("backend", KERNELS)
def test_offsets_past_2_31_elements_of_an_operand(backend: str) -> None:
    rows, columns, width = 128, 4_300_000, 512  # columns * width > 2^31
    assert columns * width > 2**31
    x, y = features(rows, columns, width)
    with torch.no_grad():
        # A hard negative in the very last row, which a wrapped offset would miss; with a part of its own, for what is
        # parallel to the row is no gradient.
        y[-1] = x[5] + y[-1] / 2
    # Smoothed, for the sums over these columns, too.
    options = {"smoothing": 0.1, "symmetric": False}
    loss = modest_align_loss(x, y, 50.0, **options, backend=backend)
    (grad,) = torch.autograd.grad(2.0**15 * loss, y)
    expected = modest_align_loss(x, y, 50.0, **options, backend="eager")
    (expected_grad,) = torch.autograd.grad(2.0**15 * expected, y)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    assert expected_grad[-1].float().norm() > 100 * expected_grad[-2].float().norm()
    assert (grad[-1] - expected_grad[-1]).float().norm() <= 1e-2 * expected_grad[-1].float().norm()


@pytest.mark.parametrize("backend", KERNELS)
def test_more_than_2_31_logits(backend: str) -> None:
    rows = 65_536
    x, y = features(rows, rows, 64)
    loss = modest_align_loss(x, y, 14.3, smoothing=0.1, backend=backend)
    grad_x, grad_y = torch.autograd.grad(loss, (x, y))
    # the last rows against the truth of their own softmax and of every column's
    with torch.no_grad():
        x_hat, y_hat = (torch.nn.functional.normalize(t.double(), dim=1) for t in (x, y))
        part = slice(rows - 64, rows)
        row_logits = 14.3 * x_hat[part] @ y_hat.T
        col_logits = 14.3 * y_hat[part] @ x_hat.T
        row = row_logits.logsumexp(1) - row_logits[:, part].diagonal()
    shares = modest_align_loss(x[part], torch.cat((y[part], y[: rows - 64])), 14.3, symmetric=False, backend=backend)
    torch.testing.assert_close(shares.double(), row.mean(), rtol=1e-4, atol=0)
    assert grad_x.isfinite().all()
    assert grad_y.isfinite().all()
    assert grad_x[part].float().norm(dim=1).min() > 0
    assert col_logits.isfinite().all()


@pytest.mark.parametrize("backend", KERNELS)
def test_peak_memory_at_65536(backend: str) -> None:
    rows = 65_536
    x, y = features(rows, rows, 512)
    ours = peak_extra_bytes(lambda: modest_align_loss(x, y, 14.3, smoothing=0.1, backend=backend).backward(), "cuda")
    one_matrix = rows * rows * 2
    # the plain loss holds the logits, two log-softmaxes and their gradients: more than four of these
    assert ours <= 0.03 * 4 * one_matrix + 4 * rows * 512 * 4


@pytest.mark.parametrize("backend", KERNELS)
def test_half_a_million_pairs(backend: str) -> None:
    x, y = features(524_288, 524_288, 512)
    with torch.no_grad():
        loss = modest_align_loss(x, y, 14.3, backend=backend)
    # random pairs: the logits are normal with variance scale^2 / D, so their logsumexp is known
    expected = math.log(524_288) + 14.3**2 / 512 / 2
    assert float(loss) == pytest.approx(expected, abs=0.02)
