"""The compiled kernels under ThreadSanitizer, in a process without Python and PyTorch.

Their threads are their own there, whose start and end the sanitizer sees. GNU's OpenMP is not made for it: each of its
barriers would look like a race. What runs in the threads, and the queue between them, is the same.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch

from modest_align_kernels import available_backends, modest_align_loss
from modest_align_kernels.backends import native
from modest_align_kernels.testing import CASES, Case, make_features, value_and_grads
from tests.test_arm import Arm, build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None or platform.machine() != "x86_64", reason="no g++ for this machine"),
    pytest.mark.skipif(available_backends("cpu")["native"] is not None, reason="no native backend"),
]
BLOCKS = [Case("several panels", 300, 301, 200, groups=90), Case("several blocks of G", 1100, 2150, 24)]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("build"), [], "g++", platform.machine(), "thread")


def run(driver: Path, monkeypatch: pytest.MonkeyPatch, cases: list[Case]) -> int:
    """Exit status of a process that computed these cases; 66 after a race, of which it tells on stderr."""
    from modest_align_kernels.backends.native import cpu

    # Without randomised addresses, which some kernels spread wider than this sanitizer knows.
    process = Arm("setarch", "-R", driver)
    for module in (native, cpu):
        monkeypatch.setattr(module, "_C", process)
    torch.set_num_threads(3)
    try:
        for case in cases:
            for dtype in (torch.float32, torch.bfloat16):
                x, y = make_features(case, dtype)
                found, expected = (
                    value_and_grads(partial(modest_align_loss, backend=backend), x, y, case)
                    for backend in ("native", "eager")
                )
                for name, value in found.items():
                    torch.testing.assert_close(value, expected[name], rtol=0.1, atol=0.1)
    finally:
        torch.set_num_threads(1)
        process.process.stdin.close()
        status = process.process.wait()
    return status


def test_no_thread_races_another(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(driver, monkeypatch, [*CASES, *BLOCKS]) == 0


def test_a_race_would_be_seen(driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With counts of the queue that are no longer atomic."""
    source = Path(__file__).parents[1] / "csrc"
    plain = """struct {
        std::int64_t n = 0;
        std::int64_t load() const { return n; }
        operator std::int64_t() const { return n; }
        std::int64_t operator++() { return ++n; }
        std::int64_t operator=(std::int64_t other) { return n = other; }
      } done_, posted_;"""
    code = (source / "cpu" / "dispatch.cpp").read_text()
    racy = code.replace("std::atomic<std::int64_t> done_{0}, posted_{0};", plain)
    assert racy != code
    (tmp_path / "dispatch.cpp").write_text(racy)
    ninja = (driver.parent / "build.ninja").read_text()
    flags = re.search(r"^build \S*dispatch\.once\.o:.*\n  flags = (.*)$", ninja, re.MULTILINE)[1].split()
    objects = [one for one in driver.parent.glob("cpu/*.o") if not one.name.startswith("dispatch.")]
    files = [tmp_path / "dispatch.cpp", source.parent / "tests" / "arm_driver.cpp", *objects, "-o", tmp_path / "racy"]
    include = [f"-I{driver.parent}", f"-I{source}/cpu"]
    subprocess.run(["g++", *flags, *include, *files, "-pthread", "-ldl"], check=True)
    assert run(tmp_path / "racy", monkeypatch, BLOCKS) == 66
