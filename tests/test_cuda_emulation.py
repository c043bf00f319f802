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

from modest_align_kernels import dispatch, modest_align_loss, noise, ops
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
    flags = ["-std=c++20", "-O1", "-fPIC", "-w", "-DMODEST_ALIGN_CUDA"]
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
    from modest_align_kernels.backends import eager
    from modest_align_kernels.backends.native import cuda

    monkeypatch.setattr(cuda, "_C", extension)
    monkeypatch.setattr(cuda, "_where", lambda device: {"device": 0, "cuda_stream": 0})
    backends = {"native": cuda, "eager": eager}
    monkeypatch.setattr(ops, "_kernel", lambda name, backend, device_type: getattr(backends[backend], name))
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


def assert_like_eager(cuda, x_hat, y_hat, scale, row_ids, col_ids, col_count: int, diagonal: bool = True) -> None:
    """The same operands in float64 through the eager backend: nothing differs but float32 sums and float16 products."""
    rounding = 2e-6 + 4e-7 * float(scale)  # of logits, which float32 holds to 24 bits
    excluded = row_ids, col_ids, diagonal
    wide = tuple(t.double() for t in (x_hat, y_hat, scale))
    with poisoned_memory():
        lse = ops.contrastive_stats(x_hat, y_hat, scale, *excluded, col_count=col_count, backend="native")
    expected = ops.contrastive_stats(*wide, *excluded, col_count=col_count, backend="eager")
    for ours, truth in zip(lse, expected, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=2e-6, atol=rounding)
    weights = tuple(2 * torch.rand(len(each)) - 1 for each in lse)
    with poisoned_memory():
        grads = ops.contrastive_grads(
            *(x_hat, y_hat, scale, *lse, *weights, *excluded), want_x=True, want_y=True, backend="native"
        )
    expected, terms = (
        ops.contrastive_grads(
            *(*wide, *(t.double() for t in (*lse, *signed)), *excluded), want_x=True, want_y=True, backend="eager"
        )
        for signed in (weights, [t.abs() for t in weights])
    )
    for ours, truth, without_signs in zip(grads, expected, terms, strict=True):
        # Of probabilities below float16's smallest, 2^-24 times the gain of 2^10, nothing is left.
        allowed = (1e-3 + rounding) * torch.maximum(truth.norm(dim=1), without_signs.norm(dim=1)) + 2.0**-25
        assert ((ours - truth).norm(dim=1) <= allowed).all()


# Around a warp's 16 rows, a warp group's 64, a tile's 128 rows and 128 columns; the last has tiles of 256 columns.
SHAPES = [(1, 1), (16, 17), (64, 64), (65, 128), (140, 256), (128, 129), (129, 257), (257, 300), (1409, 3080)]


@pytest.mark.parametrize("groups", [0, 40])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_around_warps_and_tiles(cuda, shape: tuple[int, int], groups: int) -> None:
    rows, columns = shape
    ids = [torch.randint(groups, (n,), dtype=torch.int32) for n in shape] if groups else [None, None]
    for col_count, diagonal in ((rows, True), (columns, False), (0 if rows == 65 else 3 * columns // 4, True)):
        assert_like_eager(cuda, *operands(*shape, 64, 20.0), *ids, col_count, diagonal)


@pytest.mark.parametrize("col_count", [700, 600, 0])
@pytest.mark.parametrize("scale", [14.3, 1000.0])
def test_several_waves(cuda, monkeypatch: pytest.MonkeyPatch, scale: float, col_count: int) -> None:
    # So little memory that rows come 256 at a time, and gradients in blocks of 256 x 256.
    monkeypatch.setattr(cuda, "WORKSPACE_BYTES", 2 * 256 * 256)
    x_hat, y_hat, scale = operands(600, 700, 128, scale)
    size = cuda._C.cuda_contrastive_stats_workspace(rows=600, columns=700, col_count=col_count, workspace_bytes=1)
    assert size == 4 * (6 * 256 + 4 * col_count)
    ids = (torch.randint(100, (n,), dtype=torch.int32) for n in (600, 700))
    assert_like_eager(cuda, x_hat, y_hat, scale, *ids, col_count)


@pytest.mark.parametrize("geometry", ["antipodal", "pairs", "random", "identical"])
@pytest.mark.parametrize("scale", [78.0, 79.0, 100.0, 1e4])
def test_exponentials_that_vanish(cuda, scale: float, geometry: str) -> None:
    assert_like_eager(cuda, *operands(70, 150, 64, scale, geometry), None, None, 70)


def test_rows_and_columns_of_which_all_is_excluded(cuda) -> None:
    row_ids, col_ids = torch.arange(70, dtype=torch.int32), torch.arange(150, dtype=torch.int32) % 70
    row_ids[5], col_ids[:] = 150, 150
    col_ids[9] = 3
    for scale in (20.0, 1000.0):
        assert_like_eager(cuda, *operands(70, 150, 64, scale), row_ids, col_ids, 150, False)


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
    std = torch.tensor(0.5)
    given = {"operand_dtype": torch.float16, "backend": "native"}
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
        dx, dot = ops.perturb_normalize_backward(*given, features=features, dtype=dtype, backend="native")
    wide = [t.double() for t in given]
    wide[2][1] = 1e12
    expected = ops.perturb_normalize_backward(*wide, features=features, dtype=torch.float64, backend="eager")
    torch.testing.assert_close(dot.double(), expected[1], rtol=1e-5, atol=1e-5)
    rows = torch.arange(11) != (1 if dtype == torch.float16 else -1)  # 1e12 is too much for float16
    error = (dx.double() - expected[0]).norm(dim=1)
    terms = expected[0].norm(dim=1) + wide[2] * expected[1].abs()
    assert (error <= (torch.finfo(dtype).eps + 1e-5) * terms)[rows].all()


def test_noise_is_the_references(cuda) -> None:
    seed, zero = torch.tensor(-123456789), torch.zeros(5, 40)
    x_hat, inv_norm, _ = ops.perturb_normalize(
        *(zero, seed, torch.tensor(1.0), noise.TEXTS, False, None), operand_dtype=torch.float16, backend="native"
    )
    expected = noise.gaussian_noise(seed, noise.TEXTS, 0, 5, 40)
    torch.testing.assert_close(x_hat[:, :40].double() / inv_norm[:, None], expected, rtol=1e-3, atol=1e-5)


def test_a_status_becomes_a_sentence(cuda) -> None:
    with pytest.raises(RuntimeError, match=r"perturb_normalize\(rows=3, features=20000, width=20032\): CUDA error 1, "):
        ops.perturb_normalize(
            *(torch.ones(3, 20000), None, None, 0, False, None), operand_dtype=torch.float16, backend="native"
        )
