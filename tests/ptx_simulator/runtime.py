"""csrc/cuda with its own host code on the simulator: nvcc's PTX, and `_C` linked with runtime.cpp instead of CUDA."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tests.ptx_simulator.machine import Launch, Order, Program, Run
from tests.ptx_simulator.memory import Memory
from tests.ptx_simulator.parser import parse

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
SOURCES = ("contrastive_stats", "contrastive_grads", "group_sums", "pair_losses", "perturb_normalize")
LAUNCH_FAILED = 719  # cudaErrorLaunchFailure
FOLDER = ROOT / "build" / "ptx_simulator"
# setup.py's for the GPU's side; the host's need not be fast.
_FLAGS = shlex.split(
    "-std=c++17 -DNDEBUG --expt-relaxed-constexpr -w -Xcompiler=-fPIC,-fvisibility=hidden -DMODEST_ALIGN_CUDA"
)
_LAUNCH = ctypes.CFUNCTYPE(
    *(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_uint)),
    *(ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_uint), ctypes.c_ulong),
)


def why_not() -> str | None:
    """What keeps csrc/cuda from being compiled here, or None."""
    if sys.platform != "linux" or shutil.which("nvcc") is None:
        return "there is no nvcc on the PATH"
    if importlib.util.find_spec("cutlass_library") is None:
        return "CUTLASS's headers are not installed (nvidia-cutlass)"
    return None if importlib.util.find_spec("pybind11") else "pybind11 is not installed"


def build(experiment: str = "") -> tuple[Path, Path]:
    """The PTX of csrc/cuda and `_C`, of an experiment if not as they are: compiled unless that has been done."""
    import pybind11

    package = importlib.util.find_spec("cutlass_library")
    cutlass = Path(next(iter(package.submodule_search_locations))) / "source" / "include"  # type: ignore
    python = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    # PTX is all that is asked for: no assembler runs.
    flags = [*_FLAGS, f"-I{ROOT / 'csrc'}", f"-I{cutlass}", "-gencode=arch=compute_90a,code=compute_90a"]
    flags += [f"-DMODEST_ALIGN_EXPERIMENT={experiment}"] if experiment else []
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    folder = ROOT / "csrc"
    headers = [*sorted(folder.glob("*.h")), *sorted((folder / "cuda").glob("*.*h"))]
    common = _key(version.encode(), repr([*flags, *python]).encode(), *(header.read_bytes() for header in headers))
    FOLDER.mkdir(parents=True, exist_ok=True)

    def compiled(name: str, *sources: Path) -> Path:
        target = FOLDER / f"{_key(common.encode(), *(source.read_bytes() for source in sources))}-{name}.o"
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
                together = Path(scratch, name)
                together.write_text("".join(f'#include "{source}"\n' for source in sources))
                _nvcc([*flags, *python, "--keep", f"--keep-dir={scratch}", "-c", str(together), "-o", f"{together}.o"])
                if together.suffix == ".cu":
                    together.with_suffix(".ptx").rename(target.with_suffix(".ptx"))
                Path(f"{together}.o").rename(target)
        return target

    # The kernels as one file, for half of the time goes into CUTLASS's headers.
    files = {
        "kernels.cu": [folder / "cuda" / f"{name}.cu" for name in SOURCES],
        "bindings.cpp": [folder / "bindings.cpp"],
        "runtime.cpp": [HERE / "runtime.cpp"],
    }
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(compiled, name, *sources) for name, sources in files.items()]
        objects = [job.result() for job in jobs]
    extension = FOLDER / f"_C-{_key(*(o.name.encode() for o in objects))}.so"
    if not extension.exists():
        with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
            _nvcc(["-shared", "-cudart=none", *map(str, objects), "-o", f"{scratch}/out.so"])
            Path(scratch, "out.so").rename(extension)
    return objects[0].with_suffix(".ptx"), extension


def _key(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _nvcc(arguments: list[str]) -> None:
    done = subprocess.run(["nvcc", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvcc {shlex.join(arguments)}:\n{done.stderr}")


def extent(tensor: torch.Tensor) -> tuple[int, str]:
    """How many bytes a tensor reaches over from its first element on, and what to call it."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    size = (last + 1) * tensor.element_size() if tensor.numel() else 0
    return size, f"the {tensor.dtype} tensor of shape {tuple(tensor.shape)}"


class _Recorder(TorchFunctionMode):
    """A tensor whose address is taken is an allocation of the GPU."""

    def __init__(self, memory: Memory, read_only: set[int]) -> None:
        super().__init__()
        self.memory, self.read_only = memory, read_only
        self.seen: dict[tuple[int, int], torch.Tensor] = {}  # keeps the memory from being another's

    def __torch_function__(self, function, types, arguments=(), keywords=None):  # type: ignore[no-untyped-def]
        result = function(*arguments, **(keywords or {}))
        if function is torch.Tensor.data_ptr:
            size, name = extent(arguments[0])
            if size and (result, size) not in self.seen:
                self.seen[result, size] = arguments[0]
                self.memory.add_host(result, size, name, writable=result not in self.read_only)
        return result


class Device:
    """The simulated GPU: `_C`, as backends/native/cuda.py calls it, and what its launches do.

    Args:
        experiment: which build, see csrc/experiment.h.

    Attributes:
        extension: the module `_C`.
        ptx: the text of all kernels.
        order: see :class:`Order`, for the launches to come.
        launches: of each so far, the kernel's name, the grid's blocks, and the instructions that units have executed.
    """

    def __init__(self, experiment: str = "") -> None:
        ptx, library = build(experiment)
        before = sys.getdlopenflags()
        sys.setdlopenflags(os.RTLD_LAZY)  # the CPU kernels, which bindings.cpp names too, are not linked in
        try:
            # pybind11 gives the module that it has of a name.
            spec = importlib.util.spec_from_file_location(f"{library.stem}._C", library)
            self.extension: ModuleType = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
            spec.loader.exec_module(self.extension)  # type: ignore[union-attr]
        finally:
            sys.setdlopenflags(before)
        self._library = ctypes.CDLL(str(library), mode=os.RTLD_LAZY)
        self._callback = _LAUNCH(self._launch)
        self._library.simulator_on_launch(self._callback)
        self.ptx = ptx.read_text()
        self.programs: dict[str, Program] = {}
        self.order = Order()
        self.memory = Memory()
        self.launches: list[tuple[str, int, int]] = []

    def set_processors(self, count: int) -> None:
        """The number of multiprocessors, which a persistent grid fills."""
        self._library.simulator_set_processors(count)

    @contextmanager
    def allocations(self, *read_only: Any) -> Iterator[None]:
        """Inside, tensors whose address is taken can be accessed; those given cannot be written."""
        self.memory = Memory()
        addresses = {t.data_ptr() for t in read_only if isinstance(t, torch.Tensor)}
        with _Recorder(self.memory, addresses):
            yield

    def program(self, name: str) -> Program:
        """A kernel by its name."""
        if name not in self.programs:
            self.programs[name] = Program(parse(self.ptx, name))
        return self.programs[name]

    def _launch(self, name: bytes, arguments: Any, grid: Any, block: Any, cluster: Any, shared: int) -> int:
        try:
            program = self.program(name.decode())
            parameters = bytearray()
            for parameter, argument in zip(program.kernel.parameters, arguments):  # noqa: B905 - a C array has no end
                parameters = parameters.ljust(parameter.offset, b"\0") + ctypes.string_at(argument, parameter.size)
            extents = (tuple(extent[:3]) for extent in (grid, block, cluster))
            launch = Launch(program.kernel, bytes(parameters), *extents, shared_bytes=shared)
            executed = Run(program, launch, self.memory, self.order).execute()
        except Exception as error:  # across C++ it can only go as a status
            self._library.simulator_set_fault(f"{type(error).__name__}: {error}".encode())
            return LAUNCH_FAILED
        self.launches.append((program.kernel.name, grid[0] * grid[1] * grid[2], executed))
        return 0
