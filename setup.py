"""Builds ``modest_align_kernels._C`` with pybind11 and ninja; docs/install.md has the variables that steer it.

C++ of ``csrc/cpu`` is compiled once for each instruction-set level, and chosen when it runs: one wheel runs on every
machine of its kind. ``csrc/cuda`` is compiled where nvcc is. PyTorch is not needed here: the kernels take addresses.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
CUTLASS = "nvidia-cutlass==4.2.0.0"
X86 = platform.machine().lower() in ("x86_64", "amd64")

# Not -ffast-math: a module linked with it makes the whole process flush subnormal numbers.
CXX_FLAGS = shlex.split(
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -ffp-contract=fast -Wall -Wextra -pthread"
)
# The matmuls are written for one chip, and elsewhere there is Triton.
NVCC_FLAGS = shlex.split(
    "-std=c++17 -O3 -DNDEBUG --expt-relaxed-constexpr -Xcompiler=-fPIC,-fvisibility=hidden "
    "-gencode=arch=compute_90a,code=sm_90a"
)
_AVX2 = ["-mavx2", "-mfma"]
_AVX512 = [*_AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")), "-mprefer-vector-width=512"]
LEVELS: dict[str, list[str]] = {"baseline": []}
if X86:
    LEVELS |= {"avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": [*_AVX512, "-mavx512bf16"]}


def variable(name: str, default: str, pattern: str, want: str) -> str:
    """An environment variable's value; one that does not match ends the build in one sentence."""
    value = os.environ.get(name) or default
    if re.fullmatch(pattern, value) is None:
        sys.exit(f"{name}: got {value!r}, want {want}")
    return value


def experiment() -> str:
    """What is switched on in the CUDA part, see benchmarks/NOTES.md; Triton's experiments are nothing to a build."""
    names = "pingpong64|pingpong128|stagger"
    want = f"{names.replace('|', ', ')}, triton-persistent or nothing"
    name = variable("MODEST_ALIGN_EXPERIMENT", "", f"({names}|triton-persistent)?", want)
    return "" if name.startswith("triton") else name


def cxx() -> list[str]:
    """The C++ compiler's command, from CXX or the PATH; empty if there is none."""
    command = shlex.split(os.environ.get("CXX", "")) or [n for n in ("c++", "g++", "clang++") if shutil.which(n)][:1]
    return command if command and shutil.which(command[0]) else []


def why_no_native() -> str | None:
    """What keeps the extension from being built, or None."""
    if sys.platform == "win32":
        return "they are not written for Windows' compiler"
    if not cxx():
        return "there is no C++ compiler (c++, g++, clang++ or what CXX names)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return None if header.exists() else f"Python's own headers are not installed ({header})"


def nvcc() -> str | None:
    """The CUDA compiler, if the CUDA part is to be built."""
    wanted = variable("MODEST_ALIGN_CUDA", "auto", "auto|0|1", "auto, 0 or 1")
    home = os.environ.get("CUDA_HOME")
    compiler = None if wanted == "0" else shutil.which("nvcc", path=f"{home}/bin" if home else None)
    reason = None if compiler else f"found no nvcc {f'in CUDA_HOME ({home})' if home else 'on the PATH'}"
    if compiler:
        version = subprocess.run([compiler, "--version"], text=True, capture_output=True, check=True).stdout
        release = tuple(map(int, re.search(r"release (\d+)\.(\d+)", version).groups()))
        if release < (12, 4):
            reason = f"want CUDA 12.4 or newer, but {compiler} is of {release[0]}.{release[1]}"
    if reason and wanted == "1":
        sys.exit(f"MODEST_ALIGN_CUDA=1: {reason}")
    return None if reason else compiler


def cutlass_include() -> Path | None:
    """The headers inside the nvidia-cutlass package, which nothing but the build needs."""
    spec = find_spec("cutlass_library")
    return Path(next(iter(spec.submodule_search_locations))) / "source" / "include" if spec else None  # type: ignore


def ninja_file(out: Path) -> str:
    """Rules and edges that make ``out / _C.so``; an object depends on the headers that it read."""
    import pybind11

    want, names = "address, undefined or thread, separated by commas", "(address|undefined|thread)"
    sanitizers = variable("MODEST_ALIGN_SANITIZE", "none", f"none|{names}(,{names})*", want)
    sanitize = [] if sanitizers == "none" else [f"-fsanitize={name}" for name in sanitizers.split(",")]
    debug = ["-g", "-O1", "-fno-omit-frame-pointer"] if sanitize else []
    flags = [*CXX_FLAGS, *sanitize, *debug, f"-I{CSRC}", *(["-DMODEST_ALIGN_X86"] if X86 else [])]
    binding = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    linker, link = shlex.join(cxx()), ["-shared", "-pthread", *sanitize]
    link += ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    dependencies = "-MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
    rules = [f"rule cxx\n  command = {shlex.join(cxx())} $flags -MMD {dependencies}"]
    edges: list[str] = []
    objects: list[Path] = []

    def escape(text: object, pattern: str = r"([$ :])") -> str:
        return re.sub(pattern, r"$\1", str(text))

    def edge(rule: str, target: str, inputs: list[Path], arguments: list[str]) -> None:
        edges.append(f"build {escape(out / target)}: {rule} {' '.join(map(escape, inputs))}")
        edges.append(f"  flags = {escape(shlex.join(arguments), r'([$])')}")
        objects.append(out / target)

    compiler, include = nvcc(), cutlass_include()
    if compiler and include is None:
        reason = f"CUTLASS's headers are not installed: pip install {CUTLASS}"
        if os.environ.get("MODEST_ALIGN_CUDA") == "1":
            sys.exit(f"MODEST_ALIGN_CUDA=1: {reason}")
        print(f"The CUDA kernels are left out: {reason}.", file=sys.stderr)
    elif compiler:
        switches = ["-DMODEST_ALIGN_CUDA", *([f"-DMODEST_ALIGN_EXPERIMENT={experiment()}"] if experiment() else [])]
        binding += switches
        host = [f"-ccbin={cxx()[0]}"] if os.environ.get("CXX") else []
        common = [*NVCC_FLAGS, *host, f"-I{CSRC}", f"-I{include}", *switches]
        rules.append(f"rule nvcc\n  command = {compiler} $flags -MD {dependencies}")
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            edge("nvcc", f"cuda/{source.stem}.o", [source], common)
        # nvcc knows where its runtime is, whose symbols must not be mixed up with those of PyTorch's.
        linker, link = shlex.join([compiler, *common]), [f"-Xcompiler={flag}" for flag in ["-pthread", *sanitize]]
        link += ["-shared", "-nodlink", "-cudart=static", "-Xlinker=--exclude-libs=ALL"]
    edge("cxx", "bindings.o", [CSRC / "bindings.cpp"], [*flags, *binding])
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        once = source.name == "dispatch.cpp"
        for level, machine in {"once": []}.items() if once else LEVELS.items():
            level_flags = [] if once else [*machine, f"-DMODEST_ALIGN_LEVEL={level}"]
            edge("cxx", f"cpu/{source.stem}.{level}.o", [source], [*flags, *level_flags])
    edge("link", "_C.so", list(objects), link)
    rules.append(f"rule link\n  command = {linker} $flags $in -ldl -o $out")
    return "\n".join([*rules, *edges, ""])


class NinjaBuild(build_ext):
    """Runs ninja in ``build/native``, wherever setuptools would build: what did not change is not compiled again.

    An experiment has a folder of its own.
    """

    def build_extension(self, ext: Extension) -> None:
        """Build and copy to where setuptools wants it."""
        out = ROOT / "build" / "-".join(filter(None, ("native", experiment())))
        out.mkdir(parents=True, exist_ok=True)
        (out / "build.ninja").write_text(ninja_file(out))
        jobs = variable("MAX_JOBS", str(os.cpu_count() or 1), "[1-9][0-9]*", "a positive integer")
        if subprocess.run([sys.executable, "-m", "ninja", "-C", str(out), "-j", jobs], check=False).returncode:
            sys.exit("the native kernels did not compile (above): MODEST_ALIGN_NATIVE=0, or _CUDA=0, leaves them out")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(out / "_C.so"), str(target))


if __name__ == "__main__":
    native = variable("MODEST_ALIGN_NATIVE", "auto", "auto|0|1", "0 or 1")
    experiment()
    reason = "MODEST_ALIGN_NATIVE is 0" if native == "0" else why_no_native()
    if reason and native == "1":
        sys.exit(f"MODEST_ALIGN_NATIVE=1, but the native kernels cannot be built: {reason}")
    if reason:
        print(f"The native kernels are left out: {reason}.", file=sys.stderr)
    compiles_cuda = not reason and nvcc() is not None
    setup(
        ext_modules=[] if reason else [Extension("modest_align_kernels._C", sources=["csrc/bindings.cpp"])],
        cmdclass={"build_ext": NinjaBuild},
        # For pip, which asks in this way and installs it for the build.
        setup_requires=[CUTLASS] if compiles_cuda and "egg_info" in sys.argv and not cutlass_include() else [],
    )
