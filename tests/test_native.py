"""The compiled CPU kernels on every instruction set that this machine has, around their tiles and blocks."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modest_align_kernels import available_backends, modest_align_loss, noise, ops, reference
from modest_align_kernels.testing import CASES, Case, assert_within_budget, make_features, poisoned_memory

if (reason := available_backends("cpu")["native"]) is not None:
    pytest.skip(reason, allow_module_level=True)

from modest_align_kernels import _C
from modest_align_kernels.backends.native import cpu

BEST = _C.cpu_level()


@pytest.fixture(params=_C.cpu_levels())
def level(request):
    assert _C.set_cpu_level(request.param)
    yield request.param
    assert _C.set_cpu_level(BEST)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def native_loss(*args, **kwargs):
    return modest_align_loss(*args, backend="native", **kwargs)


def perturb_normalize(*arguments):
    return ops.perturb_normalize(*arguments, operand_dtype=torch.float32, backend="native")


def test_levels() -> None:
    assert _C.cpu_levels()[-1] == "baseline"
    assert _C.cpu_levels()[0] == BEST
    assert not _C.set_cpu_level("avx3")
    assert _C.cpu_level() == BEST


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_budget_on_every_level(level: str, case: Case) -> None:
    with poisoned_memory():
        assert_within_budget(native_loss, case, torch.float32, seeds=2)


@pytest.mark.parametrize(
    ("rows", "columns", "features"),
    [(23, 33, 70), (24, 32, 64), (25, 31 + 17, 65), (300, 301, 2000), (1100, 2150, 24)],
    ids=["around a tile", "whole tiles", "past a tile", "several panels", "several blocks of G"],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_around_tiles_and_blocks(
    level: str, two_threads: None, rows: int, columns: int, features: int, symmetric: bool
) -> None:
    for scale, groups in ((14.3, 0), (300.0, rows // 3)):
        case = Case("blocks", rows, columns, features, scale=scale, groups=groups, symmetric=symmetric)
        with poisoned_memory():
            assert_within_budget(native_loss, case, torch.float32, seeds=1)


@pytest.mark.parametrize("rows", [23, 1100])
def test_bfloat16_blocks(two_threads: None, rows: int) -> None:
    case = Case("bfloat16", rows, rows + 51, 72, groups=rows // 3)
    with poisoned_memory():
        assert_within_budget(native_loss, case, torch.bfloat16, seeds=1)


def test_equal_bits_in_every_run(level: str, two_threads: None) -> None:
    x, y = (t.requires_grad_() for t in make_features(Case("", 1500, 1600, 64), torch.float32))

    def grads() -> tuple[torch.Tensor, ...]:
        loss = native_loss(x, y, 30.0, smoothing=0.1)
        return loss.detach(), *torch.autograd.grad(loss, (x, y))

    first = grads()
    for _ in range(3):
        for a, b in zip(first, grads(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [1, 15, 64, 1000])
@pytest.mark.parametrize("relative", [False, True])
def test_noise_is_the_references(level: str, relative: bool, features: int, dtype: torch.dtype) -> None:
    x, _ = make_features(Case("", 21, 21, features), dtype)
    seed = torch.tensor((77 << 40) + 987654321987)
    x_hat, inv_norm, _ = perturb_normalize(x.T.contiguous().T, seed, torch.tensor(0.5), noise.TEXTS, relative, None)
    given = {"seed": seed, "noise_stream": noise.TEXTS, "noise_std": 0.5, "relative_noise": relative}
    truth = reference.perturb_normalize(x.double(), **given)
    assert ((x_hat.double()[:, :features] - truth).norm(dim=1) <= 2e-6).all()
    assert not x_hat[:, features:].any()
    assert inv_norm.isfinite().all()


def test_long_noise_has_the_moments_of_a_normal() -> None:
    zero = torch.zeros(1, 4_000_000)
    x_hat, inv_norm, _ = perturb_normalize(zero, torch.tensor(5), torch.tensor(1.0), noise.IMAGES, False, None)
    drawn = (x_hat / inv_norm).double()
    assert abs(float(drawn.mean())) < 3e-3
    assert float(drawn.var()) == pytest.approx(1, abs=5e-3)
    assert float((drawn**4).mean()) == pytest.approx(3, abs=5e-2)


def test_kernels_refuse_what_they_would_misread() -> None:
    x, y = make_features(Case("", 8, 8, 64), torch.float32)
    x_hat, inv_norm, _ = perturb_normalize(x, None, None, noise.IMAGES, False, None)
    y_hat, _, _ = perturb_normalize(y, None, None, noise.TEXTS, False, x_hat)
    scale = torch.tensor(10.0)

    def stats(x_hat, y_hat, row_ids=None, col_ids=None):
        return ops.contrastive_stats(x_hat, y_hat, scale, row_ids, col_ids, True, col_count=8, backend="native")

    with pytest.raises(ValueError, match=r"operand_dtype: got torch\.float16, want torch\.float32"):
        stats(x_hat.half(), y_hat.half())
    with pytest.raises(TypeError, match=r"y_hat: got torch\.float64, want torch\.float32"):
        stats(x_hat, y_hat.double())
    with pytest.raises(ValueError, match=r"y_hat: got strides \(1, 8\)"):
        stats(x_hat, y_hat.T.contiguous().T)
    with pytest.raises(ValueError, match=r"col_ids: got shape \(7,\), want \(8,\)"):
        stats(x_hat, y_hat, torch.zeros(8, dtype=torch.int32), torch.zeros(7, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"columns: got 0, want at least 1"):
        stats(x_hat, y_hat[:0])
    with pytest.raises(ValueError, match=r"width: got 0, want at least 1"):
        stats(x_hat[:, :0], y_hat[:, :0])
    with pytest.raises(ValueError, match=r"offset: got shape \(2, 8\), want \(2, 64\)"):
        ops.perturb_normalize_backward(
            *(x_hat, x_hat, inv_norm, y_hat, inv_norm, torch.zeros(2, 8), scale),
            features=64,
            dtype=torch.float32,
            backend="native",
        )


def test_memory_stays_far_below_the_matrix(two_threads: None) -> None:
    from modest_align_kernels.testing import peak_extra_bytes

    x, y = (torch.randn(6000, 64, requires_grad=True) for _ in range(2))
    assert peak_extra_bytes(lambda: native_loss(x, y, 14.3).backward()) < 0.25 * 6000**2 * 4


def test_the_stub_names_what_the_module_has() -> None:
    stub = ast.parse((Path(cpu.__file__).parents[2] / "_C.pyi").read_text())
    structs = {node.name: node for node in stub.body if isinstance(node, ast.ClassDef)}
    functions = {node.name: node for node in stub.body if isinstance(node, ast.FunctionDef)}
    values = {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    public = {name for name in dir(_C) if not name.startswith("_")}
    optional = {name for name in functions if name.startswith("cuda_")} if not _C.cuda else set()
    assert public == (set(functions) | values) - optional

    def fields(struct: str) -> set[str]:
        if struct not in structs:
            return set()
        own = {node.target.id for node in structs[struct].body if isinstance(node, ast.AnnAssign)}
        return own.union(*(fields(base.id) for base in structs[struct].bases))

    for name in public & set(functions):
        if by_name := functions[name].args.kwarg:
            documented = re.match(rf"{name}\(\*, (.*)\)", getattr(_C, name).__doc__)[1].split(", ")
            assert len(documented) == len(set(documented))
            assert set(documented) == fields(by_name.annotation.slice.id), name


def test_a_wrong_argument_of_a_kernel_is_a_type_error() -> None:
    given = dict.fromkeys(("rows", "columns", "col_count", "width"), 64) | {"operand_dtype": 0, "threads": 1}
    assert _C.cpu_contrastive_stats_workspace(**given) > 0
    wrong = {
        "cpu_contrastive_stats_workspace: got no argument width": {k: v for k, v in given.items() if k != "width"},
        "cpu_contrastive_stats_workspace: got the unknown argument features": {**given, "features": 3},
        "cpu_contrastive_stats_workspace: rows: got str": {**given, "rows": "64"},
        "cpu_contrastive_stats_workspace: rows: got float": {**given, "rows": 64.5},
    }
    for message, arguments in wrong.items():
        with pytest.raises(TypeError, match=message):
            _C.cpu_contrastive_stats_workspace(**arguments)
    with pytest.raises(TypeError):
        _C.cpu_contrastive_stats_workspace(64, 64, 64, 64, 0, 1)


@pytest.mark.slow
def test_address_and_undefined_behaviour_sanitizers(tmp_path) -> None:
    root = Path(__file__).parents[1]
    for name in ("csrc", "modest_align_kernels", "python", "tests"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "demo_data"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    target = tmp_path / "installed"
    build = {"MODEST_ALIGN_SANITIZE": "address,undefined", "MODEST_ALIGN_NATIVE": "1", "MODEST_ALIGN_CUDA": "0"}
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, tmp_path]
    subprocess.run(install, env={**os.environ, **build}, check=True)
    libraries = [
        subprocess.run(["gcc", f"-print-file-name=lib{name}.so"], text=True, capture_output=True, check=True).stdout
        for name in ("asan", "ubsan")
    ]
    env = {
        **os.environ,
        "LD_PRELOAD": " ".join(map(str.strip, libraries)),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and PyTorch keep what they hold
        "UBSAN_OPTIONS": "halt_on_error=1",
        "PYTHONPATH": str(target),
    }
    code = "import torch, modest_align_kernels._C as c; print(c.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path / "tests", text=True, capture_output=True
    )
    assert where.stdout.startswith(str(target)), where.stderr
    grid = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        os.devnull,
        "--rootdir",
        tmp_path,
        tmp_path / "tests/test_native.py",
    ]
    skip = ["-k", "not moments and not sanitizers", "-p", "no:cacheprovider"]
    run = subprocess.run([*grid, *skip], env=env, cwd=tmp_path / "tests", text=True, capture_output=True)
    assert run.returncode == 0, run.stdout + run.stderr
