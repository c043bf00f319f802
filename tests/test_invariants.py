"""What must not change the loss, or must change it in a known way; the noise's statistics; equal bits in every run."""

from __future__ import annotations

import hashlib
import itertools
import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import Tensor

from modest_align_kernels import available_backends, contrastive_logsumexp, modest_align_loss, noise, ops
from modest_align_kernels.backends import eager, native
from modest_align_kernels.testing import Case, make_features

BACKENDS = [name for name, reason in available_backends("cpu").items() if reason is None]
EPS = torch.finfo(torch.float32).eps
SCALE = 14.3
# Of a loss, in units of the logits' rounding, and of a gradient's row, relative to scale / B of a unit row.
LOSS_TOLERANCE, ROW_TOLERANCE = 8 * EPS * SCALE, 32 * EPS * SCALE


# Triton's interpreter is slow, and what holds for its kernels alone is in their own tests.
@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow if name == "triton" else ()) for name in BACKENDS])
def backend(request) -> str:
    return request.param


def loss_and_grads(backend: str, x: Tensor, y: Tensor, scale: float = SCALE, **options) -> tuple[Tensor, ...]:
    """The loss, or losses whose sum has the gradients, of x, y and the scale."""
    leaves = *(t.detach().clone().requires_grad_() for t in (x, y)), torch.tensor(scale, requires_grad=True)
    loss = modest_align_loss(*leaves, backend=backend, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)


def assert_same(ours: tuple[Tensor, ...], others: tuple[Tensor, ...], x: Tensor, y: Tensor) -> None:
    assert (ours[0] - others[0]).abs().max() <= LOSS_TOLERANCE
    for got, expected, features in zip(ours[1:3], others[1:3], (x, y), strict=True):
        error = (got - expected).norm(dim=1) * features.norm(dim=1)
        assert error.max() <= ROW_TOLERANCE * SCALE / (1 if ours[0].dim() else len(x))
    assert abs(ours[3] - others[3]) <= ROW_TOLERANCE * (len(x) if ours[0].dim() else 1)


IDS = torch.tensor([0, 1, 2, 0, 3, 4, 1, 5, 6, 7, 8])
SETTINGS = [
    {},
    {"smoothing": 0.2, "group_ids": IDS},
    {"smoothing": 0.3, "weights": torch.linspace(0, 1, 11), "reduction": "sum"},
]


@pytest.mark.parametrize("options", SETTINGS, ids=["plain", "groups", "weights"])
def test_towers_may_be_swapped(backend: str, options: dict) -> None:
    x, y = make_features(Case("", 11, 11, 24), torch.float32)
    loss, d_x, d_y, d_scale = loss_and_grads(backend, y, x, **options)
    assert_same((loss, d_y, d_x, d_scale), loss_and_grads(backend, x, y, **options), x, y)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_pairs_and_extra_negatives_may_be_in_any_order(backend: str, reduction: str) -> None:
    x, y = make_features(Case("", 11, 17, 24), torch.float32)
    order, extra = torch.randperm(11), 11 + torch.randperm(6)
    columns = torch.cat((order, extra))
    options = {"smoothing": 0.2, "reduction": reduction}
    loss, d_x, d_y, d_scale = loss_and_grads(backend, x, y, group_ids=IDS, **options)
    expected = loss[order] if reduction == "none" else loss, d_x[order], d_y[columns], d_scale
    ours = loss_and_grads(backend, x[order], y[columns], group_ids=IDS[order], **options)
    assert_same(ours, expected, x[order], y[columns])


def test_the_size_of_a_row_does_not_count(backend: str) -> None:
    """By powers of two, which round nothing, bit for bit; with it gradients become smaller."""
    x, y = make_features(Case("", 11, 17, 24), torch.float32)
    powers = [2.0 ** torch.randint(-30, 90, (len(t), 1)).float() for t in (x, y)]
    loss, d_x, d_y, d_scale = loss_and_grads(backend, x, y, smoothing=0.1)
    ours = loss_and_grads(backend, x * powers[0], y * powers[1], smoothing=0.1)
    for got, expected in zip(ours, (loss, d_x / powers[0], d_y / powers[1], d_scale), strict=True):
        assert torch.equal(got, expected)


def test_groups_of_one_pair_are_no_groups(backend: str) -> None:
    x, y = make_features(Case("", 11, 17, 24), torch.float32)
    grouped = loss_and_grads(backend, x, y, smoothing=0.2, group_ids=torch.randperm(11) - 5)
    assert_same(grouped, loss_and_grads(backend, x, y, smoothing=0.2), x, y)


@pytest.mark.parametrize("parts", [(1, 16), (5, 12), (8, 8, 1)])
def test_columns_and_rows_may_be_split(backend: str, parts: tuple[int, ...]) -> None:
    """Logsumexps of parts merge by logaddexp, in value and gradient."""
    x, y = make_features(Case("", 11, 17, 24), torch.float32)

    def run(split: bool) -> tuple[Tensor, ...]:
        leaves = [t.detach().clone().requires_grad_() for t in (x, y)]
        pieces = leaves[1].split(parts) if split else (leaves[1],)
        rows, columns = zip(
            *(contrastive_logsumexp(leaves[0], piece, SCALE, backend=backend) for piece in pieces), strict=True
        )
        row_lse, col_lse = torch.stack(rows).logsumexp(0), torch.cat(columns)
        total = (row_lse * torch.linspace(-1, 1, 11)).sum() + (col_lse * torch.linspace(1, 0, 17)).sum()
        return torch.cat((row_lse, col_lse)).detach(), *torch.autograd.grad(total, leaves)

    for got, whole, features in zip(run(True), run(False), (None, x, y), strict=True):
        error = (got - whole).abs() if features is None else (got - whole).norm(dim=1) * features.norm(dim=1) / SCALE
        assert error.max() <= (LOSS_TOLERANCE if features is None else 4 * ROW_TOLERANCE)


SMALLER = {
    "eager": [(eager, "BLOCK_ROWS", 8), (eager, "BLOCK_COLUMNS", 16), (eager, "NORMALIZE_ROWS", 4)],
    "native": [(native, "WORKSPACE_BYTES", 0)],
}


@pytest.mark.parametrize("name", [name for name in BACKENDS if name in SMALLER])
def test_chunks_and_what_is_kept_do_not_count(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With native: exponentials kept by the forward, or computed again. Triton's waves have tests of their own."""
    x, y = make_features(Case("", 70, 90, 24), torch.float32)
    whole = loss_and_grads(name, x, y, smoothing=0.1)
    for module, constant, value in SMALLER[name]:
        monkeypatch.setattr(module, constant, value)
    assert_same(loss_and_grads(name, x, y, smoothing=0.1), whole, x, y)


def test_backends_and_instruction_sets_agree() -> None:
    x, y = make_features(Case("", 33, 40, 24), torch.float32)
    expected = loss_and_grads("eager", x, y, smoothing=0.1)
    for name in BACKENDS:
        assert_same(loss_and_grads(name, x, y, smoothing=0.1), expected, x, y)
    if "native" in BACKENDS:
        from modest_align_kernels import _C

        best = _C.cpu_level()
        for level in _C.cpu_levels():
            try:
                assert _C.set_cpu_level(level)
                assert_same(loss_and_grads("native", x, y, smoothing=0.1), expected, x, y)
            finally:
                assert _C.set_cpu_level(best)


@pytest.mark.parametrize("scale", [0.5, 14.3, 100.0])
def test_the_scales_gradient_is_the_difference_of_losses(backend: str, scale: float) -> None:
    x, y = make_features(Case("", 33, 40, 24), torch.float32)
    step = scale / 64
    up, down = (loss_and_grads(backend, x, y, s, smoothing=0.1)[0].double() for s in (scale + step, scale - step))
    slope = float(loss_and_grads(backend, x, y, scale, smoothing=0.1)[3])
    # Of the loss, whose third derivative is below 2, and of float32's rounding of both.
    assert float(up - down) / (2 * step) == pytest.approx(slope, abs=step**2 / 3 + 8 * EPS * max(scale, 1) / step)


@pytest.mark.parametrize("number", ["logit_scale", "smoothing", "noise_std", "weights"])
def test_a_number_that_is_nan_makes_the_loss_nan(backend: str, number: str) -> None:
    """Its value is on the device, where none is looked at: a NaN comes through, and is not lost in a maximum."""
    x, y = make_features(Case("", 5, 7, 8), torch.float32)
    nan = torch.full((5,) if number == "weights" else (), math.nan)
    given = {"logit_scale": 10.0} | {number: nan}
    assert modest_align_loss(x, y, given.pop("logit_scale"), backend=backend, **given).isnan()


# Noise. Statistics in standard deviations, of which a right generator exceeds 4.5 once in 150,000: a test looks at no
# more than 100 of them, with seeds that are always the same.
LIMIT = 4.5
ROWS, FEATURES = 400, 250


def drawn(backend: str, seed: Tensor, stream: int) -> Tensor:
    """What is added to rows of zeros: [ROWS, FEATURES]."""
    given = seed, torch.tensor(1.0), stream, False, None
    rows = torch.zeros(8 if backend == "triton" else ROWS, FEATURES)  # whose interpreter is slow
    x_hat, inv_norm, _ = ops.perturb_normalize(rows, *given, operand_dtype=torch.float32, backend=backend)
    return (x_hat[:, :FEATURES] / inv_norm[:, None]).double()


def correlation(a: Tensor, b: Tensor) -> float:
    """Of standard normals, in standard deviations."""
    return float((a * b).mean()) * a.numel() ** 0.5


@pytest.mark.parametrize("name", BACKENDS)
def test_noise_is_normal_by_its_moments_and_by_chi_square(name: str) -> None:
    torch.manual_seed(0)
    edges = torch.special.ndtri(torch.linspace(0, 1, 65, dtype=torch.float64)[1:-1])
    for stream in (noise.IMAGES, noise.TEXTS):
        for seed in torch.randint(2**63 - 1, (3,)):
            values = drawn(name, seed, stream).flatten()
            n = len(values)
            # The moments of a normal, and the variances of their estimates.
            for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
                assert abs(float((values**power).mean()) - moment) <= LIMIT * (variance / n) ** 0.5, power
            counts = torch.bincount(torch.bucketize(values, edges), minlength=64).double()
            chi_square = float(((counts - n / 64) ** 2 / (n / 64)).sum())
            assert abs(chi_square - 63) <= LIMIT * (2 * 63) ** 0.5


def test_noise_of_rows_towers_and_steps_is_independent(backend: str) -> None:
    """No correlation, of values and of squares, between neighbours, towers and the seeds that calls draw in turn."""
    torch.manual_seed(0)
    seeds = [torch.randint(2**63 - 1, ()) for _ in range(4)] + [torch.tensor(0), torch.tensor(1), torch.tensor(2**32)]
    of_steps = [drawn(backend, seed, noise.IMAGES) for seed in seeds]
    first = of_steps[0]
    pairs = [(first[:, lag:], first[:, :-lag]) for lag in (1, 2, 3, 4, 8, 64)]
    pairs += [(first[lag:], first[:-lag]) for lag in (1, 2, 4)]
    pairs += [(first, drawn(backend, seeds[0], noise.TEXTS))]
    pairs += itertools.combinations(of_steps, 2)
    for a, b in pairs:
        assert abs(correlation(a, b)) <= LIMIT
        assert abs(correlation((a**2 - 1) / 2**0.5, (b**2 - 1) / 2**0.5)) <= LIMIT


def test_a_call_draws_one_seed_and_its_backward_none(backend: str) -> None:
    x, y = (t.requires_grad_() for t in make_features(Case("", 11, 17, 24), torch.float32))
    torch.manual_seed(0)
    torch.randint(2**63 - 1, ())
    after_one = torch.get_rng_state()
    torch.manual_seed(0)
    loss = modest_align_loss(x, y, SCALE, noise_std=0.1, backend=backend)
    assert torch.equal(torch.get_rng_state(), after_one)
    loss.backward()
    assert torch.equal(torch.get_rng_state(), after_one)


# Equal bits

DIGEST = """
import sys, torch
from tests.test_invariants import digest
print(digest(sys.argv[1], int(sys.argv[2])))
"""


def digest(backend: str, threads: int) -> str:
    """Of the loss and its gradients, with noise."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, y = make_features(Case("", 40 if backend == "triton" else 700, 800, 72), torch.float32)
        torch.manual_seed(0)
        found = loss_and_grads(backend, x, y, smoothing=0.1, noise_std=0.1)
    finally:
        torch.set_num_threads(before)
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in found)).hexdigest()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "triton"])
def test_equal_bits_for_a_number_of_threads(name: str, threads: int) -> None:
    assert len({digest(name, threads) for _ in range(4)}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_equal_bits_in_every_process(backend: str, threads: int) -> None:
    call = partial(
        subprocess.run, [sys.executable, "-c", DIGEST, backend, str(threads)], capture_output=True, text=True
    )
    done = [call() for _ in range(2)]
    assert all(d.returncode == 0 for d in done), done
    assert done[0].stdout.strip() == done[1].stdout.strip() == digest(backend, threads)
