"""What is here, for a bug report, and a self-test of each backend that runs: ``python -m modest_align_kernels``."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from modest_align_kernels.backends import native
from modest_align_kernels.dispatch import available_backends, choose, why_not
from modest_align_kernels.functional import modest_align_loss
from modest_align_kernels.testing import Case, assert_within_budget

# More than a tile each way, the last ones ragged, and all that changes what the kernels do.
SELF_TEST = Case("self-test", 150, 200, 72, groups=40, column_ids=True, weighted=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VARIABLES = re.compile("MODEST_ALIGN_|OMP_|KMP_|TRITON_|CUDA_VISIBLE_DEVICES|PYTORCH_")


def main() -> int:
    """Print the report, line by line: where a self-test takes the process down, the last line says which.

    Returns:
        Exit status: 1 if a self-test failed, else 0.
    """
    for line in _installation():
        print(line)
    failed = False
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if not gpus:
        print(f"\nGPU: {'PyTorch sees none' if _gpu_runtime() else 'none for this PyTorch, which is built for CPUs'}")
    for device in map(torch.device, ("cpu", *gpus)):
        print(f"\n{device}: {_gpu(device) if device.type == 'cuda' else _cpu()}")
        default = choose("auto", device, torch.float32, SELF_TEST.features)
        for name, reason in available_backends(device).items():
            print(f"  {name}{' (the default)' if name == default else ''}: ", end="", flush=True)
            passed, outcome = (True, f"not usable: {reason}") if reason else _self_test(name, device)
            failed |= not passed
            print(outcome, flush=True)
    return int(failed)


def _installation() -> Iterator[str]:
    yield f"modest-align-kernels {_version('modest-align-kernels')} ({Path(__file__).parent})"
    packages = ", ".join(f"{name} {_version(name)}" for name in ("triton", "numpy"))
    yield f"Python {platform.python_version()}, torch {torch.__version__} ({_gpu_runtime() or 'no GPU'}), {packages}"
    yield platform.platform()
    yield f"native kernels: {native.description()}"
    variables = [f"{name}={value}" for name, value in sorted(os.environ.items()) if VARIABLES.match(name)]
    yield f"environment: {' '.join(variables) or 'nothing set'}"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _gpu_runtime() -> str | None:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else None


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    name = model[1] if model else platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name}, threads {torch.get_num_threads()} of {os.cpu_count()}, PyTorch's instruction set {capability}"


def _gpu(device: torch.device) -> str:
    gpu = torch.cuda.get_device_properties(device)
    return f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.1f} GiB"


def _self_test(name: str, device: torch.device) -> tuple[bool, str]:
    """Whether loss and gradients are within the error budget in every dtype that the backend takes; a sentence."""
    dtypes = [dtype for dtype in DTYPES if why_not(name, device, dtype, SELF_TEST.features) is None]
    start = time.perf_counter()
    try:
        for dtype in dtypes:
            assert_within_budget(partial(modest_align_loss, backend=name), SELF_TEST, dtype, device, seeds=1)
    except Exception as error:  # whatever it is, it belongs into the report
        return False, f"SELF-TEST FAILED: {type(error).__name__}: {error}"
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return True, f"self-test passed in {time.perf_counter() - start:.2f} s ({names})"


if __name__ == "__main__":
    sys.exit(main())
