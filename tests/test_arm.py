"""csrc/cpu as setup.py builds it for 64-bit Arm: cross-compiled, run by an emulator, called by the native backend here.

On Debian: apt-get install g++-12-aarch64-linux-gnu qemu-user-static
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from modest_align_kernels import available_backends, modest_align_loss, noise, ops, reference
from modest_align_kernels.backends import native
from modest_align_kernels.testing import CASES, Case, assert_within_budget, make_features, poisoned_memory
from tests.operator_checks import assert_like_eager, operands
from tests.test_build import load_setup

HERE = Path(__file__).parent
COMPILER, EMULATOR, LIBRARIES = "aarch64-linux-gnu-g++-12", "qemu-aarch64-static", "/usr/aarch64-linux-gnu"


def why_not() -> str | None:
    for tool in (COMPILER, EMULATOR):
        if shutil.which(tool) is None:
            return f"there is no {tool}"
    for module in ("pybind11", "ninja"):
        if find_spec(module) is None:
            return f"{module} is not installed"
    return available_backends("cpu")["native"]


pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


# The codes of Dtype in csrc/kernels.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def arguments_of_functions() -> dict[str, dict[str, list[str] | None]]:
    """For every kernel its arguments, with the extents of those that are tensors, from the docstrings of ``_C``."""
    from modest_align_kernels import _C

    found = {name: re.search(r"\(\*, (.*)\)", getattr(_C, name).__doc__ or "") for name in dir(_C)}
    return {
        name: {
            argument: re.findall(r"\w+", layout) if layout else None
            for argument, layout in re.findall(r"(\w+)(\[[\w, ]*\])?", listed[1].replace("[]", "[ ]"))
        }
        for name, listed in found.items()
        if name.startswith("cpu_") and listed
    }


def fields_of(arguments: dict[str, list[str] | None]) -> list[str]:
    """Of the struct: the arguments, what bindings.cpp reads from tensors, and a workspace."""
    extents = dict.fromkeys(extent for layout in arguments.values() for extent in layout or ())
    strides = ["x_dtype", "row_stride", "feature_stride"] if "x" in arguments else ["workspace"]
    return [*arguments, *extents, "operand_dtype", *strides, *(["dx_dtype"] if "dx" in arguments else [])]


def build(
    out: Path, libraries: list[str], compiler: str = COMPILER, machine: str = "aarch64", sanitizer: str = "none"
) -> Path:
    """The driver, with the objects of csrc/cpu that setup.py would put into the extension on such a machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "machine", lambda: machine)
        setup = load_setup(patch, MODEST_ALIGN_CUDA="0", CXX=compiler, MODEST_ALIGN_SANITIZE=sanitizer)
        (out / "build.ninja").write_text(setup.ninja_file(out))
    objects = re.findall(r"^build (\S+/cpu/\S+\.o):", (out / "build.ninja").read_text(), re.MULTILINE)
    subprocess.run([sys.executable, "-m", "ninja", "-C", out, *objects], check=True, capture_output=True)
    functions = (
        f"FUNCTION({name.removeprefix('cpu_')}{suffix}, {' '.join(f'FIELD({field})' for field in fields)})\n"
        for name, fields in ((name, fields_of(arguments)) for name, arguments in arguments_of_functions().items())
        for suffix in (("", "_workspace") if "workspace" in fields else ("",))
    )
    (out / "functions.inc").write_text("".join(functions))
    driver = [HERE / "arm_driver.cpp", *objects, "-o", out / "driver", f"-I{setup.CSRC}", f"-I{out}", "-O1", "-Wall"]
    sanitize = [] if sanitizer == "none" else [f"-fsanitize={sanitizer}"]
    subprocess.run([compiler, "-std=c++17", *driver, "-pthread", *sanitize, *libraries, "-ldl"], check=True)
    return out / "driver"


class Arm:
    """Stands in for ``_C`` where the native backend calls it: hands copies of the memory to the driver and back."""

    def __init__(self, *command: str | Path) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, **pipes)
        self.level, bfloat16 = self.process.stdout.readline().decode().split()
        self.bfloat16 = bool(int(bfloat16))
        self.arguments = arguments_of_functions()

    def cpu_bfloat16(self) -> bool:
        return self.bfloat16

    def __getattr__(self, name: str) -> Any:
        return partial(self.call, name)

    def threads(self) -> set[str]:
        return set(os.listdir(f"/proc/{self.process.pid}/task"))

    def call(self, name: str, **given: Any) -> None:
        arguments = self.arguments[name]
        assert sorted(given) == sorted(arguments)
        fields = dict.fromkeys(fields_of(arguments), 0) | given
        known: set[str] = set()
        for argument, extents in arguments.items():
            tensor = given[argument]
            if tensor is not None and extents is not None:
                new = {e: n for e, n in zip(extents, tensor.shape, strict=True) if e not in known}
                known |= set(new)
                fields |= new
        for argument, field in (("x_hat", "operand_dtype"), ("x", "x_dtype"), ("dx", "dx_dtype")):
            if given.get(argument) is not None:
                fields[field] = DTYPES[given[argument].dtype]
        if "x" in given:
            fields["row_stride"], fields["feature_stride"] = given["x"].stride()
        if name == "cpu_pair_losses" and "columns" not in known:
            fields["columns"] = fields["rows"]
        if "workspace" in fields:
            fields["workspace"] = torch.empty(self.send(f"{name}_workspace", fields), dtype=torch.uint8)
        self.send(name, fields)

    def send(self, name: str, fields: dict[str, Any]) -> int:
        self.process.stdin.write(f"{name}\n".encode())
        sent = []
        for value in fields.values():
            if not isinstance(value, torch.Tensor) or not value.numel():
                number = int(value) if isinstance(value, (int, bool)) else 0
                self.process.stdin.write(struct.pack("<qq", -1, number))
                continue
            assert value.is_contiguous()
            content = ctypes.string_at(value.data_ptr(), value.nbytes)
            self.process.stdin.write(struct.pack("<q", len(content)) + content)
            sent.append((value.data_ptr(), content))
        self.process.stdin.flush()
        (result,) = struct.unpack("<q", self.receive(8))
        for address, before in sent:
            after = self.receive(len(before))
            if after != before:
                ctypes.memmove(address, after, len(after))
        return result

    def receive(self, length: int) -> bytes:
        content = self.process.stdout.read(length)
        assert len(content) == length, "the driver stopped: its reason stands on stderr"
        return content


@pytest.fixture(scope="module", params=["own threads", "OpenMP"])
def process(request: pytest.FixtureRequest) -> Iterator[Arm]:
    """With and without what PyTorch's wheels for Arm bring: GNU's OpenMP."""
    with tempfile.TemporaryDirectory() as out:
        driver = build(Path(out), ["-Wl,--no-as-needed", "-lgomp"] if request.param == "OpenMP" else [])
        arm = Arm(EMULATOR, "-L", LIBRARIES, driver)
        arm.openmp = request.param == "OpenMP"
        yield arm
        arm.process.stdin.close()
        assert arm.process.wait() == 0


@pytest.fixture
def arm(process: Arm, monkeypatch: pytest.MonkeyPatch) -> Arm:
    from modest_align_kernels.backends.native import cpu

    for module in (native, cpu):
        monkeypatch.setattr(module, "_C", process)
    return process


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def native_loss(*args, **kwargs):
    return modest_align_loss(*args, backend="native", **kwargs)


def test_the_level(arm: Arm) -> None:
    assert arm.level == "baseline"
    assert not arm.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*CASES, Case("past a vector", 25, 48, 65), Case("before its end", 9, 9, 7)], ids=str)
def test_error_budget(arm: Arm, case: Case, dtype: torch.dtype) -> None:
    with poisoned_memory():
        assert_within_budget(native_loss, case, dtype, seeds=2)


@pytest.mark.parametrize(("rows", "columns", "width"), [(7, 11, 64), (8, 12, 64), (9, 13, 64), (90, 250, 128)])
@pytest.mark.parametrize("scale", [14.3, 1000.0])
def test_statistics_and_gradients_around_a_tile(
    arm: Arm, two_threads: None, rows: int, columns: int, width: int, scale: float
) -> None:
    given = operands(rows, columns, width, scale, dtype=torch.float32)
    row_ids, col_ids = (torch.randint(rows // 3 + 1, (length,), dtype=torch.int32) for length in (rows, columns))
    for ids in ((None, None), (row_ids, col_ids)):
        for col_count in (0, rows, columns):
            assert_like_eager(*given, *ids, col_count, "native", diagonal=col_count == rows)


def test_threads_are_openmps_where_it_is(arm: Arm, two_threads: None) -> None:
    x_hat, y_hat, scale = operands(512, 512, 64, 14.3, dtype=torch.float32)

    def threads() -> set[str]:
        ops.contrastive_stats(x_hat, y_hat, scale, None, None, True, col_count=512, backend="native")
        return arm.threads()

    # The emulator has two of its own, and OpenMP keeps its threads for the next call.
    assert len(threads() & threads()) == (3 if arm.openmp else 2)


@pytest.mark.parametrize("features", [1, 15, 1000])
@pytest.mark.parametrize("relative", [False, True])
def test_noise_is_the_references(arm: Arm, relative: bool, features: int) -> None:
    x, _ = make_features(Case("", 21, 21, features), torch.float32)
    seed = torch.tensor((77 << 40) + 987654321987)
    given = (x, seed, torch.tensor(0.5), noise.TEXTS, relative, None)
    x_hat, inv_norm, _ = ops.perturb_normalize(*given, operand_dtype=torch.float32, backend="native")
    given = {"seed": seed, "noise_stream": noise.TEXTS, "noise_std": 0.5, "relative_noise": relative}
    truth = reference.perturb_normalize(x.double(), **given)
    assert ((x_hat.double()[:, :features] - truth).norm(dim=1) <= 2e-6).all()
    assert not x_hat[:, features:].any()
    assert inv_norm.isfinite().all()
