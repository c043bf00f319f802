"""The house's arrows: who may import whom, and what an import must not do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "modest_align_kernels"

# A module may import what stands below it here, and nothing else of the project.
ALLOWED = {
    "reference": set(),
    "backends": set(),
    "backends.eager": {"backends", "reference"},
    "backends.native": set(),  # takes cpu or cuda by the tensor's device
    "backends.native.addresses": set(),
    "backends.native.cpu": {"_C", "backends", "backends.native.addresses"},
    "backends.native.cuda": {"_C", "backends", "backends.native.addresses"},
    "backends.triton": {
        "backends.triton.contrastive_grads",
        "backends.triton.contrastive_stats",
        "backends.triton.perturb_normalize",
    },
    "backends.triton.contrastive_grads": {"backends", "backends.triton.logits", "backends.triton.tiles"},
    "backends.triton.contrastive_stats": {"backends", "backends.triton.logits", "backends.triton.tiles"},
    "backends.triton.logits": set(),
    "backends.triton.perturb_normalize": {"backends"},
    "backends.triton.tiles": set(),
    "ops": {"backends"},
    "autograd": {"ops", "reference"},
    "dispatch": {"_C"},
    "functional": {"dispatch", "autograd", "backends"},
    "modules": {"functional"},
    "testing": {"reference"},
    "": {"dispatch", "functional", "modules"},
}


def imports_of(path: Path) -> set[str]:
    """Every module that a file's import statements may load, wherever they stand."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            submodule = [path.parent, ROOT, ROOT / "python"]
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {
                name
                for name in names
                for root in submodule[1:]
                for suffix in (".py", ".pyi")
                if (root / (name.replace(".", "/") + suffix)).exists()
            }
            found |= modules or {node.module}
    return found


def library_modules() -> list[str]:
    names = []
    for path in sorted(LIBRARY.rglob("*.py")):
        parts = path.relative_to(LIBRARY).with_suffix("").parts
        names.append(".".join(part for part in parts if part != "__init__"))
    return names


def path_of(name: str) -> Path:
    path = LIBRARY.joinpath(*name.split(".")) if name else LIBRARY
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_every_module_has_its_place() -> None:
    assert set(library_modules()) == set(ALLOWED)


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_arrows_go_one_way(name: str) -> None:
    project = {
        module.removeprefix("modest_align_kernels").removeprefix(".")
        for module in imports_of(path_of(name))
        if module.split(".")[0] == "modest_align_kernels"
    }
    assert project <= ALLOWED[name]
    assert not any(module.startswith("modest_align_train") for module in imports_of(path_of(name)))


def test_the_trainer_uses_the_public_face_only() -> None:
    public = {"modest_align_kernels"}
    for path in sorted((ROOT / "python" / "modest_align_train").glob("*.py")):
        used = {module for module in imports_of(path) if module.split(".")[0] == "modest_align_kernels"}
        assert used <= public, path


def test_only_ops_registers_operators() -> None:
    for name in library_modules():
        if name != "ops":
            assert "torch.library" not in path_of(name).read_text(), name


def test_import_is_quiet_and_touches_no_gpu() -> None:
    code = "import torch, modest_align_kernels; print(torch.cuda.is_initialized())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
    assert "modest" not in result.stderr
