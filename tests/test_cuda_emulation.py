"""csrc/cuda compiled by a C++ compiler and run on this CPU, a coroutine for each thread: all but CUTLASS's matmul.

What a GPU alone can show is in tests/test_gpu.py. Here are the indices, masks, reductions, waves and barriers of the
kernels' own source: tests/cuda_emulator stands in for CUDA's headers, and plain loops for the tensor cores.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from modest_align_kernels import dispatch, modest_align_loss, reference
from modest_align_kernels.backends import eager
from modest_align_kernels.testing import CASES, Case, assert_within_budget, make_features, poisoned_memory

ROOT = Path(__file__).parent.parent
KERNELS = ("contrastive_grads", "contrastive_stats", "perturb_normalize")


def why_not() -> str | None:
    if importlib.util.find_spec("modest_align_kernels._C") is None:
        return "the extension is not built"
    if shutil.which("g++") is None or sys.platform != "linux":
        return "there is no g++"
    return None if importlib.util.find_spec("pybind11") else "pybind11 is not installed"


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory):
    import pybind11

    folder = tmp_path_factory.mktemp("emulator")
    flags = ["-std=c++20", "-O1", "-fPIC", "-w", "-DMODEST_ALIGN_CUDA", "-DMODEST_ALIGN_SM90A"]
    flags += [f"-I{ROOT}/tests/cuda_emulator", f"-I{ROOT}/csrc"]
    jobs = [[*flags, "-xc++", "-c", f"{ROOT}/csrc/cuda/{name}.cu", "-o", f"{folder}/{name}.o"] for name in KERNELS]
    python = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    jobs.append([*flags, *python, "-O0", "-c", f"{ROOT}/csrc/bindings.cpp", "-o", f"{folder}/bindings.o"])
    jobs.append(["-shared", *(f"{folder}/{name}.o" for name in (*KERNELS, "bindings")), "-o", f"{folder}/_C.so"])
    for job in jobs:
        done = subprocess.run(["g++", *job], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location("_C", folder / "_C.so")
    before = sys.getdlopenflags()
    sys.setdlopenflags(1)  # RTLD_LAZY: the CPU kernels, which bindings.cpp names too, are not linked in
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.setdlopenflags(before)
    return module


@pytest.fixture
def cuda(extension, monkeypatch: pytest.MonkeyPatch):
    """The native backend as it is on a GPU, on CPU tensors."""
    from modest_align_kernels.backends import native
    from modest_align_kernels.backends.native import cuda

    monkeypatch.setattr(cuda, "_C", extension)
    monkeypatch.setattr(cuda, "_stream", lambda device: (0, 0))
    monkeypatch.setattr(native, "_kernels", lambda device_type: cuda)
    monkeypatch.setattr(dispatch, "operand_dtype", lambda *args: torch.float16)
    return cuda


def native_loss(*args, **kwargs):
    return modest_align_loss(*args, backend="native", **kwargs)


def operands(rows: int, columns: int, width: int, scale: float, geometry: str = "pairs") -> tuple[torch.Tensor, ...]:
    case = Case("", rows, columns, width, geometry=geometry)
    x, y = make_features(case, torch.float64)
    x_hat, y_hat = (torch.nn.functional.normalize(t, dim=1).half() for t in (x, y))
    return x_hat, y_hat, torch.tensor(scale)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_budget(cuda, case: Case) -> None:
    with poisoned_memory():
        assert_within_budget(native_loss, case, torch.float16, seeds=2)


def assert_like_eager(cuda, x_hat, y_hat, scale, ids, symmetric: bool) -> None:
    """The same operands in float64 through the eager backend: nothing differs but float32 sums and float16 products."""
    rounding = 2e-6 + 4e-7 * float(scale)  # of logits, which float32 holds to 24 bits
    with poisoned_memory():
        positive, row_lse, col_lse = cuda.contrastive_stats(x_hat, y_hat, scale, ids, symmetric)
    expected = eager.contrastive_stats(x_hat.double(), y_hat.double(), scale.double(), ids, symmetric)
    for ours, truth in zip((positive, row_lse, col_lse), expected, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=2e-6, atol=rounding)
    row_full = torch.logaddexp(row_lse, positive)
    col_full = torch.logaddexp(col_lse, positive) if symmetric else torch.full_like(positive, torch.inf)
    with poisoned_memory():
        grads = cuda.contrastive_grads(x_hat, y_hat, scale, row_full, col_full, ids, True, True)
    wide = (t.double() for t in (x_hat, y_hat, scale, row_full, col_full))
    for ours, truth in zip(grads, eager.contrastive_grads(*wide, ids, True, True), strict=True):
        # Of probabilities below float16's smallest, 2^-24 times the gain of 2^10, nothing is left.
        assert ((ours - truth).norm(dim=1) <= (1e-3 + rounding) * truth.norm(dim=1) + 2.0**-25).all()


# Around a warp's 16 rows, a warp group's 64, a tile's 128 rows and 128 columns; the last has tiles of 256 columns.
SHAPES = [(1, 1), (16, 17), (64, 64), (65, 128), (140, 256), (128, 129), (129, 257), (257, 300), (1409, 3080)]


@pytest.mark.parametrize("groups", [0, 40])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_around_warps_and_tiles(cuda, shape: tuple[int, int], groups: int) -> None:
    ids = torch.randint(min(groups, shape[0]), shape[:1]) if groups else None  # numbered below B, as they always are
    assert_like_eager(cuda, *operands(*shape, 64, 20.0), ids, symmetric=not groups or shape[0] != 65)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale", [14.3, 1000.0])
def test_several_waves(cuda, monkeypatch: pytest.MonkeyPatch, scale: float, symmetric: bool) -> None:
    # So little memory that rows come 256 at a time, and gradients in blocks of 256 x 256.
    monkeypatch.setattr(cuda, "WORKSPACE_BYTES", 2 * 256 * 256)
    x_hat, y_hat, scale = operands(600, 700, 128, scale)
    assert cuda._C.cuda_contrastive_stats_workspace(600, 700, symmetric, 1) == 4 * (6 * 256 + 4 * 600 * symmetric)
    assert_like_eager(cuda, x_hat, y_hat, scale, torch.randint(100, (600,)), symmetric)


@pytest.mark.parametrize("geometry", ["antipodal", "pairs", "random", "identical"])
@pytest.mark.parametrize("scale", [78.0, 79.0, 100.0, 1e4])
def test_exponentials_that_vanish(cuda, scale: float, geometry: str) -> None:
    assert_like_eager(cuda, *operands(70, 150, 64, scale, geometry), None, symmetric=True)


def test_threads_in_another_order_give_the_same_bits(cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = make_features(Case("", 200, 270, 2000), torch.float16)

    def run() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        image, text = x.clone().requires_grad_(), y.clone().requires_grad_()
        loss = native_loss(image, text, 100.0, noise_std=0.1, relative_noise=True, smoothing=0.1)
        return loss, *torch.autograd.grad(loss, (image, text))

    forward = run()
    monkeypatch.setenv("CUDA_EMULATOR_REVERSED", "1")
    for ours, other in zip(forward, run(), strict=True):
        assert torch.equal(ours, other)


def test_a_nan_comes_through(cuda) -> None:
    x, y = make_features(Case("", 20, 30, 40), torch.float16)
    x[3, 5] = torch.nan
    assert native_loss(x, y, 100.0).isnan()


# Widths up to 1,024 are a warp's, others a block's; the odd ones are not aligned to 16 bytes.
@pytest.mark.parametrize("features", [1, 8, 77, 512, 1024, 1025, 3000, 16384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rows_of_any_width(cuda, dtype: torch.dtype, features: int) -> None:
    x, y = make_features(Case("", 9, 11, features), dtype)
    seed = torch.tensor((77 << 40) + 987654321)
    for strided in (x, x.T.contiguous().T, torch.cat((x, x), 1)[:, features:]):
        for relative in (False, True):
            x_hat, inv_norm = cuda.perturb_normalize(strided, seed, 1, 0.5, relative, torch.float16)
            expected = eager.perturb_normalize(x.double(), seed, 1, 0.5, relative, torch.float64)
            assert ((x_hat[:, :features].double() - expected[0]).norm(dim=1) <= 6e-4).all()
            torch.testing.assert_close(inv_norm.double(), expected[1], rtol=1e-5, atol=0.0)
            assert x_hat.shape[1] % 64 == 0
            assert not x_hat[:, features:].any()
    y_hat, y_inv_norm = cuda.perturb_normalize(y, None, 0, 0.0, False, torch.float16)
    width = y_hat.shape[1]
    inside = torch.arange(width) < features
    grad, offset = torch.randn(11, width) * inside, torch.randn(2, width) * inside
    weight, factor = torch.randn(9), torch.tensor(0.3)
    y_inv_norm[1] = 1e12  # a zero row's: no projection
    given = (grad, y_hat, y_inv_norm, x_hat, weight, offset, factor)
    with poisoned_memory():
        dx, dot = cuda.perturb_normalize_backward(*given, features, dtype)
    wide = [t.double() for t in given]
    wide[2][1] = 1e12
    expected = eager.perturb_normalize_backward(*wide, width, torch.float64)
    torch.testing.assert_close(dot.double(), expected[1], rtol=1e-5, atol=1e-5)
    rows = torch.arange(11) != (1 if dtype == torch.float16 else -1)  # 1e12 is too much for float16
    error = (dx.double() - expected[0][:, :features]).norm(dim=1)
    terms = expected[0].norm(dim=1) + wide[2] * expected[1].abs()
    assert (error <= (torch.finfo(dtype).eps + 1e-5) * terms)[rows].all()


def test_noise_is_the_references(cuda) -> None:
    seed = torch.tensor(-123456789)
    x_hat, inv_norm = cuda.perturb_normalize(torch.zeros(5, 40), seed, 1, 1.0, False, torch.float16)
    noise = reference.gaussian_noise(seed, 1, 0, 5, 40)
    torch.testing.assert_close(x_hat[:, :40].double() / inv_norm[:, None], noise, rtol=1e-3, atol=1e-5)


def test_a_status_becomes_a_sentence(cuda) -> None:
    with pytest.raises(RuntimeError, match=r"perturb_normalize\(rows=3, features=20000\): CUDA error 1, "):
        cuda.perturb_normalize(torch.ones(3, 20000), None, 0, 0.0, False, torch.float16)
