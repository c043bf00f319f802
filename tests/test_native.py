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
from modest_align_kernels.testing import (
    CASES,
    Case,
    assert_within_budget,
    make_features,
    peak_extra_bytes,
    poisoned_memory,
)

if (reason := available_backends("cpu")["native"]) is not None:
    pytest.skip(reason, allow_module_level=True)

from modest_align_kernels import _C
from modest_align_kernels.backends import native
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
    drawn = seed, torch.tensor(0.5), noise.TEXTS, relative, None
    x_hat, inv_norm, _ = perturb_normalize(x.T.contiguous().T, *drawn)
    for part, first_row in zip(x.split(2), range(0, len(x), 2), strict=True):
        assert torch.equal(perturb_normalize(part, *drawn, first_row)[0], x_hat[first_row : first_row + 2])
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


@pytest.mark.parametrize("scope", ["RTLD_GLOBAL", "RTLD_LOCAL"])
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_threads_are_those_of_pytorchs_openmp(scope: str) -> None:
    """Also where the process does not see OpenMP: a wheel for Arm keeps what it is linked with to itself."""
    code = f"""
import ctypes, os, threading
ctypes.RTLD_GLOBAL = ctypes.{scope}  # what PyTorch loads its dependencies with
import torch
from modest_align_kernels import modest_align_loss

def threads():
    return set(os.listdir("/proc/self/task"))

torch.set_num_threads(2)
x = torch.randn(1024, 512)
x @ x.T  # starts PyTorch's threads
seen, watched = set(), True

def watch():
    while watched:
        seen.update(threads())

watcher = threading.Thread(target=watch)
watcher.start()
known = threads()
for _ in range(5):
    modest_align_loss(x, x, 14.3, backend="native")
watched = False
watcher.join()
assert seen, "nobody watched"
assert seen <= known, seen - known
print(hasattr(ctypes.CDLL(None), "GOMP_parallel"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert scope == "RTLD_GLOBAL" or done.stdout == "False\n", "OpenMP was visible"


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
    with pytest.raises(ValueError, match=r"width: got 0, want a multiple of 64"):
        stats(x_hat[:, :0], y_hat[:, :0])
    with pytest.raises(ValueError, match=r"width: got 0, want a multiple of 64"):
        ops.pair_losses(
            *(inv_norm, inv_norm, inv_norm, scale, scale, x_hat[:, :0], y_hat[:, :0], None, None), backend="native"
        )
    for kept in (torch.empty(9, 96), torch.empty(7, 48), torch.empty(8, 47)):
        shape = rf"\({', '.join(map(str, kept.shape))}\)"
        with pytest.raises(ValueError, match=rf"exponentials: got shape {shape}, want \(8, (48|96)\)"):
            ops.contrastive_grads(
                *(x_hat, y_hat, scale, inv_norm, inv_norm, inv_norm, inv_norm, None, None, True, kept),
                want_x=True,
                want_y=True,
                backend="native",
            )
    with pytest.raises(ValueError, match=r"pair_hat: got shape \(8, 32\), want \(8, 64\)"):
        ops.perturb_normalize_backward(
            *(x_hat, x_hat, inv_norm, y_hat[:, :32].contiguous(), inv_norm, scale, scale),
            *(None, None, None, inv_norm, inv_norm),
            features=64,
            dtype=torch.float32,
            backend="native",
        )


# What the exponentials that are kept may take: nothing, some rows and all of them in both dtypes, all.
BUDGETS = {"nothing": 0, "some": 70 * 121 * 4, "all": 256 << 20}


@pytest.fixture(params=BUDGETS)
def budget(request, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "WORKSPACE_BYTES", BUDGETS[request.param])
    return request.param


@pytest.mark.parametrize("kind", ["pairs", "one direction", "groups", "large scale", "lost under one shift"])
def test_kept_rows_are_as_good_as_computed_ones(level: str, two_threads: None, budget: str, kind: str) -> None:
    options = {
        "pairs": {},
        "one direction": {"symmetric": False},
        "groups": {"groups": 30, "smoothing": 0.1},
        "large scale": {"scale": 1e4},
        "lost under one shift": {"scale": 130.0, "geometry": "antipodal"},
    }[kind]
    for dtype in (torch.float32, torch.bfloat16) if _C.cpu_bfloat16() else (torch.float32,):
        with poisoned_memory():
            assert_within_budget(native_loss, Case(kind, 101, 121, 72, **options), dtype, seeds=1)


def test_kept_exponentials_are_read_again_and_again(level: str, two_threads: None, budget: str) -> None:
    x, y = (t.requires_grad_() for t in make_features(Case("", 101, 121, 72), torch.float32))
    loss = native_loss(x, y, 14.3)
    first, again, twice = (torch.autograd.grad(loss * by, (x, y), retain_graph=True) for by in (1, 1, 2))
    for a, b, c in zip(first, again, twice, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(2 * a, c)


def test_kept_exponentials_are_those_of_the_last_rows(level: str, budget: str) -> None:
    x, y = make_features(Case("", 101, 121, 64), torch.float64)
    x_hat, y_hat = (torch.nn.functional.normalize(t, dim=1).float() for t in (x, y))
    ids = torch.arange(101, dtype=torch.int32) % 40, torch.arange(121, dtype=torch.int32) % 50
    scale = torch.tensor(14.3)
    given = x_hat, y_hat, scale, *ids, True
    with poisoned_memory():
        row_lse, col_lse, kept = ops.contrastive_stats(*given, col_count=90, keep=True, backend="native")
    assert len(kept) == {"nothing": 0, "some": 101 - 48, "all": 101}[budget]
    truth = (scale * x_hat.double() @ y_hat.double().T).exp()
    truth[ids[0][:, None] == ids[1]] = 0
    truth.fill_diagonal_(0)
    torch.testing.assert_close(kept[:, :121].double(), truth[101 - len(kept) :], rtol=1e-5, atol=0)
    softmaxes = row_lse, col_lse, torch.linspace(-1, 1, 101), torch.linspace(1, -1, 90)
    wanted = {"want_x": True, "want_y": True, "backend": "native"}
    computed = ops.contrastive_grads(*given[:3], *softmaxes, *given[3:], **wanted)
    before = kept.clone()
    with poisoned_memory():
        read = ops.contrastive_grads(*given[:3], *softmaxes, *given[3:], kept, **wanted)
    assert torch.equal(kept.nan_to_num(7), before.nan_to_num(7))
    for ours, other in zip(read, computed, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)


def test_nothing_is_kept_without_a_backward_to_come() -> None:
    x, y = (torch.randn(1000, 64, requires_grad=True) for _ in range(2))
    matrix = 4 * 1000**2
    assert peak_extra_bytes(lambda: native_loss(x, y, 14.3)) > matrix
    assert peak_extra_bytes(lambda: native_loss(x.detach(), y.detach(), 14.3)) < 0.5 * matrix
    with torch.no_grad():
        assert peak_extra_bytes(lambda: native_loss(x, y, 14.3)) < 0.5 * matrix


def test_kept_exponentials_stay_within_the_workspace(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (torch.randn(6000, 64, requires_grad=True) for _ in range(2))

    def peak(budget: int) -> int:
        monkeypatch.setattr(native, "WORKSPACE_BYTES", budget)
        return peak_extra_bytes(lambda: native_loss(x, y, 14.3).backward())

    nothing, some = peak(0), peak(20 << 20)
    assert nothing < 0.25 * 6000**2 * 4
    assert 19 << 20 < some - nothing < 21 << 20


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
            listed = re.match(rf"{name}\(\*, (.*)\)", getattr(_C, name).__doc__)[1]
            documented = re.sub(r"\[.*?\]", "", listed).split(", ")
            assert len(documented) == len(set(documented))
            by_itself = {argument.arg for argument in functions[name].args.kwonlyargs}
            assert set(documented) == fields(by_name.annotation.slice.id) | by_itself, name


def test_a_wrong_argument_of_a_kernel_is_a_type_error() -> None:
    x, x_hat, length = torch.ones(3, 64), torch.empty(3, 64), torch.empty(3)
    given = {"x": x, "seed": None, "noise_std": None, "noise_stream": 0, "first_row": 0, "relative_noise": False}
    given |= {"pair_hat": None, "x_hat": x_hat, "inv_norm": length, "pair_dot": torch.empty(0), "threads": 1}
    _C.cpu_perturb_normalize(**given)
    assert torch.equal(length, torch.full((3,), 0.125))
    wrong = {
        "cpu_perturb_normalize: got no argument x_hat": {k: v for k, v in given.items() if k != "x_hat"},
        "cpu_perturb_normalize: got the unknown argument features": {**given, "features": 3},
        "cpu_perturb_normalize: threads: got str": {**given, "threads": "1"},
        "cpu_perturb_normalize: threads: got float": {**given, "threads": 1.5},
        "cpu_perturb_normalize: x_hat: got int": {**given, "x_hat": 64},
    }
    for message, arguments in wrong.items():
        with pytest.raises(TypeError, match=message):
            _C.cpu_perturb_normalize(**arguments)
    with pytest.raises(ValueError, match=r"pair_dot: got shape \(3,\), want \(0,\)"):
        _C.cpu_perturb_normalize(**given | {"pair_dot": torch.empty(3)})
    with pytest.raises(ValueError, match="inv_norm: got a tensor on meta, want one on cpu"):
        _C.cpu_perturb_normalize(**given | {"inv_norm": length.to("meta")})
    with pytest.raises(TypeError):
        _C.cpu_perturb_normalize(64, 64, 64, 64, 0, 1)


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
