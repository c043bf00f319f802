"""`python -m modest_align_kernels`, and a library whose compiled part is missing or broken."""

from __future__ import annotations

import importlib.machinery
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import modest_align_kernels
from modest_align_kernels import ops
from modest_align_kernels.backends import eager

PACKAGE = Path(modest_align_kernels.__file__).parent


@pytest.fixture(autouse=True)
def triton_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its interpreter takes ten seconds for a self-test."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def kernels_looked_up_again() -> Iterator[None]:
    ops._kernel.cache_clear()
    yield
    ops._kernel.cache_clear()


def doctor() -> int:
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("modest_align_kernels", run_name="__main__")
    return stop.value.code


def lines(report: str) -> dict[str, str]:
    """What is said of each backend, without its times."""
    found = (line.strip().partition(": ") for line in report.splitlines() if line.startswith("  "))
    return {name.removesuffix(" (the default)"): said.partition(" in ")[0] for name, _, said in found}


def test_what_a_bug_report_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MODEST_ALIGN_WORKSPACE_MIB", "17")
    assert doctor() == 0
    report = capsys.readouterr().out
    assert f"({PACKAGE})\nPython {platform.python_version()}, torch {torch.__version__} (" in report
    assert "MODEST_ALIGN_WORKSPACE_MIB=17" in report
    assert f"threads {torch.get_num_threads()} of {os.cpu_count()}" in report
    for device in ("cpu", *(["cuda:0"] if torch.cuda.is_available() else [])):
        reasons = modest_align_kernels.available_backends(device)
        wanted = {name: f"not usable: {why}" if why else "self-test passed" for name, why in reasons.items()}
        assert lines(report.partition(f"\n{device}: ")[2].partition("\n\n")[0]) == wanted
    if modest_align_kernels.available_backends("cpu")["native"] is None:
        from modest_align_kernels import _C

        assert f"instruction set {_C.cpu_level()} (of " in report
        assert "  native (the default): " in report


@pytest.mark.usefixtures("kernels_looked_up_again")
@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_backend_at_fault_is_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    right = eager.contrastive_grads

    def at_fault(a, softmaxes, grad_x, grad_y) -> None:
        if fault == "raises":
            raise ZeroDivisionError("of the test")
        right(a, softmaxes, grad_x, grad_y)
        grad_x[int(grad_x.norm(dim=1).argmax())] *= 1.0001  # one row of 150, in the fourth digit

    monkeypatch.setattr(eager, "contrastive_grads", at_fault)
    assert doctor() == 1
    said = lines(capsys.readouterr().out)
    assert said["eager"].startswith("SELF-TEST FAILED: ")
    assert ("ZeroDivisionError: of the test" if fault == "raises" else "image_features's worst row") in said["eager"]
    assert said["native"].startswith(("self-test passed", "not usable"))


USE = """
import runpy, torch
import modest_align_kernels as m

x, y = torch.eye(4), torch.eye(4)
assert float(m.modest_align_loss(x, y, 1.0)) == float(m.modest_align_loss(x, y, 1.0, backend="eager"))
try:
    m.modest_align_loss(x, y, 1.0, backend="native")
except RuntimeError as error:
    print(error)
runpy.run_module("modest_align_kernels", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("compiled", "sentence"),
    [
        (None, r"are not there: install again with a C\+\+17 compiler and without MODEST_ALIGN_NATIVE=0"),
        (b"cut off", r"do not load \(.*_C.*\): install again"),
    ],
    ids=["missing", "broken"],
)
def test_import_never_fails_and_use_explains(tmp_path: Path, compiled: bytes | None, sentence: str) -> None:
    package = tmp_path / PACKAGE.name
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    if compiled is not None:
        (package / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(compiled)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    # -S: an editable installation's finder would find the compiled part that is there.
    python = [sys.executable, "-S", "-W", "error::UserWarning", "-c", USE]
    done = subprocess.run(python, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refusal, _, report = done.stdout.partition("\n")
    reason = refusal.removeprefix('backend "native" cannot run on cpu: ')
    assert re.fullmatch(f"the compiled kernels {sentence}", reason)
    assert f"({package})\n" in report
    assert "native kernels: none" in report
    assert f"  native: not usable: {reason}\n" in report
    assert "  eager (the default): self-test passed" in report
