"""setup.py: what the environment variables ask for, and that an installation has it."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None or any(importlib.util.find_spec(name) is None for name in ("pybind11", "ninja")),
    reason="there is no C++ compiler, pybind11 or ninja",
)


def environment(**variables: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MODEST_ALIGN_") and k not in ("CXX", "CUDA_HOME")}
    return clean | variables


def setup_py(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        check=False,
    )


def load_setup(monkeypatch: pytest.MonkeyPatch, **variables: str) -> ModuleType:
    monkeypatch.setattr(os, "environ", environment(**variables))
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ninja_file(monkeypatch: pytest.MonkeyPatch, out: Path, **variables: str) -> str:
    return load_setup(monkeypatch, **variables).ninja_file(out)


def flags_of(text: str, target: str) -> str:
    return re.search(rf"^build \S*{re.escape(target)}:.*\n  flags = (.*)$", text, re.MULTILINE)[1]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what is built, with a C++ part of its own that compiles in a second."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for package in ("modest_align_kernels", "python"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "answer.h").write_text("constexpr int answer = 41;\n")
    (tmp_path / "csrc" / "bindings.cpp").write_text(
        '#include <Python.h>\n#include "answer.h"\nint level();\n'
        'static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};\n'
        "PyMODINIT_FUNC PyInit__C() {\n"
        "  PyObject* module = PyModule_Create(&definition);\n"
        '  PyModule_AddIntConstant(module, "answer", answer + level());\n'
        "  return module;\n}\n"
    )
    (tmp_path / "csrc" / "cpu" / "dispatch.cpp").write_text("int level() { return 1; }\n")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("MODEST_ALIGN_NATIVE", "yes", "MODEST_ALIGN_NATIVE: got 'yes', want 0 or 1"),
        ("MODEST_ALIGN_CUDA", "2", "MODEST_ALIGN_CUDA: got '2', want auto, 0 or 1"),
        (
            "MODEST_ALIGN_EXPERIMENT",
            "pingpong",
            "MODEST_ALIGN_EXPERIMENT: got 'pingpong', "
            "want pingpong64, pingpong128, stagger, triton-persistent or nothing",
        ),
    ],
)
def test_a_bad_value_is_one_sentence(tree: Path, name: str, value: str, sentence: str) -> None:
    done = setup_py(tree, "--version", **{name: value})
    assert done.returncode != 0
    assert done.stderr.strip() == sentence


def test_no_nvcc_where_one_is_demanded(tree: Path) -> None:
    done = setup_py(tree, "--version", MODEST_ALIGN_CUDA="1", CUDA_HOME="/nowhere", CXX="c++")
    assert done.returncode != 0
    assert done.stderr.strip() == "MODEST_ALIGN_CUDA=1: found no nvcc in CUDA_HOME (/nowhere)"


def test_without_a_compiler_the_python_part_is_installed(tree: Path) -> None:
    done = setup_py(tree, "build", CXX="/nowhere/c++")
    assert done.returncode == 0
    assert "native kernels are left out: there is no C++ compiler" in done.stderr
    assert (tree / "build" / "lib" / "modest_align_kernels" / "ops.py").exists()
    assert not list(tree.rglob("_C*.so"))
    demanded = setup_py(tree, "build", CXX="/nowhere/c++", MODEST_ALIGN_NATIVE="1")
    assert demanded.returncode != 0
    assert "MODEST_ALIGN_NATIVE=1, but the native kernels cannot be built: there is no C++" in demanded.stderr


def test_no_package_is_forgotten_and_the_changelog_knows_the_version() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    packages = re.findall(r'^  "(modest_align_\w+[\w.]*)",$', project, re.MULTILINE)
    folders = {path.parent for base in ("modest_align_kernels", "python") for path in (ROOT / base).rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts).removeprefix("python.") for folder in folders}
    assert sorted(packages) == sorted(names)
    version = re.search(r'^version = "(.*)"$', project, re.MULTILINE)[1]
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version


@needs_compiler
def test_flags_of_the_cpu_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = ninja_file(monkeypatch, tmp_path, MODEST_ALIGN_CUDA="0", CXX="c++")
    assert "fast-math" not in text
    assert ".cu" not in text
    assert "-DMODEST_ALIGN_LEVEL=baseline" in flags_of(text, "cpu/perturb_normalize.baseline.o")
    assert "LEVEL" not in flags_of(text, "cpu/dispatch.once.o")
    if "avx512_bf16" in text:
        assert "-mavx512bf16" in flags_of(text, "cpu/contrastive_stats.avx512_bf16.o")
        assert "-m" not in flags_of(text, "cpu/contrastive_stats.baseline.o").replace("-fno-math-errno", "").split()
    sanitized = ninja_file(monkeypatch, tmp_path, MODEST_ALIGN_CUDA="0", MODEST_ALIGN_SANITIZE="address,undefined")
    for target in ("bindings.o", "_C.so"):
        assert "-fsanitize=address" in flags_of(sanitized, target)
    with pytest.raises(SystemExit, match="MODEST_ALIGN_SANITIZE: got 'memory', want address, undefined or thread"):
        ninja_file(monkeypatch, tmp_path, MODEST_ALIGN_SANITIZE="memory")


@needs_compiler
@pytest.mark.parametrize(("system", "machine"), [("linux", "aarch64"), ("darwin", "arm64"), ("linux", "riscv64")])
def test_other_machines_get_one_level_and_no_flag_of_x86(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, system: str, machine: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(sys, "platform", system)
    setup = load_setup(monkeypatch, MODEST_ALIGN_CUDA="0", CXX="c++")
    assert setup.LEVELS == {"baseline": []}
    text = setup.ninja_file(tmp_path)
    flags = " ".join(re.findall("^  flags = (.*)$", text, re.MULTILINE)).split()
    assert not [flag for flag in flags if flag.startswith("-m") or "X86" in flag]
    assert ("dynamic_lookup" in flags_of(text, "_C.so")) == (system == "darwin")
    objects = re.findall(r"^build \S*/cpu/(\S+)\.o:", text, re.MULTILINE)
    assert objects == sorted(
        f"{source.stem}.{'once' if source.stem == 'dispatch' else 'baseline'}"
        for source in (ROOT / "csrc" / "cpu").glob("*.cpp")
    )


@needs_compiler
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_flags_of_the_cuda_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setup = load_setup(monkeypatch)
    monkeypatch.setattr(setup, "cutlass_include", lambda: Path("/cutlass"))
    text = setup.ninja_file(tmp_path)
    for kernels in ("perturb_normalize", "contrastive_stats", "contrastive_grads"):
        assert "code=sm_90a" in flags_of(text, f"cuda/{kernels}.o")
    assert "-DMODEST_ALIGN_CUDA" in flags_of(text, "bindings.o")
    assert "EXPERIMENT" not in text
    monkeypatch.setenv("MODEST_ALIGN_EXPERIMENT", "stagger")
    text = setup.ninja_file(tmp_path)
    for target in ("cuda/contrastive_stats.o", "bindings.o"):
        assert "-DMODEST_ALIGN_EXPERIMENT=stagger" in flags_of(text, target)
    monkeypatch.setenv("MODEST_ALIGN_EXPERIMENT", "triton-persistent")
    assert "EXPERIMENT" not in setup.ninja_file(tmp_path)


@needs_compiler
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_without_cutlass_the_cpu_part_is_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    setup = load_setup(monkeypatch)
    monkeypatch.setattr(setup, "cutlass_include", lambda: None)
    text = setup.ninja_file(tmp_path)
    assert ".cu" not in text
    assert "MODEST_ALIGN_CUDA" not in flags_of(text, "bindings.o")
    assert (
        "CUDA kernels are left out: CUTLASS's headers are not installed: pip install nvidia" in capsys.readouterr().err
    )
    setup = load_setup(monkeypatch, MODEST_ALIGN_CUDA="1")
    monkeypatch.setattr(setup, "cutlass_include", lambda: None)
    with pytest.raises(SystemExit, match="MODEST_ALIGN_CUDA=1: CUTLASS's headers are not installed"):
        setup.ninja_file(tmp_path)


@needs_compiler
def test_only_what_changed_is_built_again(tree: Path) -> None:
    def build() -> str:
        done = setup_py(tree, "build_ext", "--inplace", MODEST_ALIGN_CUDA="0", MODEST_ALIGN_NATIVE="1")
        assert done.returncode == 0, done.stderr
        return done.stdout

    def answer() -> str:
        code = "import sys; sys.path.insert(0, 'modest_align_kernels'); import _C; print(_C.answer)"
        done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    build()
    assert answer() == "42"
    assert "no work to do" in build()
    (tree / "csrc" / "answer.h").write_text("constexpr int answer = 6;\n")
    again = build()
    assert "bindings.cpp" in again
    assert "dispatch.cpp" not in again
    assert answer() == "7"


@needs_compiler
def test_a_compiler_error_ends_the_build(tree: Path) -> None:
    (tree / "csrc" / "cpu" / "dispatch.cpp").write_text("int level() { return }\n")
    done = setup_py(tree, "build_ext", "--inplace", MODEST_ALIGN_CUDA="0")
    assert done.returncode != 0
    assert (
        "the native kernels did not compile (above): MODEST_ALIGN_NATIVE=0, or _CUDA=0, leaves them out" in done.stderr
    )


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("native", ["1", "0"])
def test_an_isolated_installation(tmp_path: Path, native: str) -> None:
    """From a source distribution's contents, without PyTorch in the build: needs the network."""
    variables = environment(MODEST_ALIGN_NATIVE=native, MODEST_ALIGN_CUDA="0")
    source, fresh = tmp_path / "source", tmp_path / "venv"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.so", "__pycache__", "benchmarks"))
    subprocess.run([sys.executable, "-m", "venv", fresh], check=True)
    pip = [fresh / "bin" / "python", "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", "build"], check=True)
    subprocess.run([fresh / "bin" / "python", "-m", "build", "--sdist", source], env=variables, check=True)
    (archive,) = (source / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "sdist")
    (unpacked,) = (tmp_path / "sdist").iterdir()
    assert (unpacked / "csrc" / "kernels.h").exists()
    subprocess.run([*pip, "install", "--no-deps", unpacked], env=variables, check=True)
    code = "import importlib.util as u; print(u.find_spec('modest_align_kernels').submodule_search_locations[0])"
    done = subprocess.run(
        [fresh / "bin" / "python", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert bool(list(Path(done.stdout.strip()).glob("_C*.so"))) == (native == "1")
