"""The extension with its CUDA part, in its place: `python -m benchmarks.gpu_build FOLDER [EXPERIMENT ...]`.

FOLDER keeps it by a digest of its sources, so that another machine with the same Python need not build it; and beside
it a build of each experiment that is named, which has no place:
`python -m benchmarks.gpu_build FOLDER --with EXPERIMENT MODULE [ARGUMENT ...]` runs a module on one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))


def digest() -> str:
    """Of all that the extension is made of."""
    files = [ROOT / "setup.py", *sorted(file for file in (ROOT / "csrc").rglob("*") if file.is_file())]
    return hashlib.sha256(b"".join(str(f.relative_to(ROOT)).encode() + f.read_bytes() for f in files)).hexdigest()


def kept(folder: Path, experiment: str = "") -> Path:
    """Where a build is kept, of today's sources."""
    return folder / f"_C-{'-'.join(filter(None, (digest()[:12], experiment)))}{SUFFIX}"


def place(source: Path, target: Path) -> None:
    """Copy a file whole: a process may have the old one mapped."""
    shutil.copyfile(source, f"{target}.part")
    os.replace(f"{target}.part", target)


def build(folder: Path, experiment: str) -> bool:
    """Build and keep the extension, if it is not kept; whether it is there now."""
    if kept(folder, experiment).exists():
        return True
    with tempfile.TemporaryDirectory() as library:
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", library]
        env = {**os.environ, "MODEST_ALIGN_CUDA": "1", "MODEST_ALIGN_EXPERIMENT": experiment}
        if subprocess.run(command, cwd=ROOT, env=env, check=False).returncode:
            return False
        place(Path(library, "modest_align_kernels", f"_C{SUFFIX}"), kept(folder, experiment))
    return True


def main(folder: Path, experiments: list[str]) -> int:
    """Place the kept extension, built if it must be, and keep the experiments; print what then runs on a GPU."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("_C-*"):
        if digest()[:12] not in old.name:
            old.unlink()
    names = ["", *experiments]
    with ThreadPoolExecutor(len(names)) as pool:
        built = dict(zip(names, pool.map(partial(build, folder), names), strict=True))
    if built[""]:
        place(kept(folder), ROOT / "modest_align_kernels" / f"_C{SUFFIX}")
    missing = [name or "the extension" for name, there in built.items() if not there]
    if missing:
        print("did not compile:", ", ".join(missing))
        return 1
    from modest_align_kernels import available_backends

    reasons = {name: reason for name, reason in available_backends("cuda").items() if reason is not None}
    print(kept(folder).name, "; ".join(f"{n}: {reason}" for n, reason in reasons.items()) or "every backend runs")
    return 0


def run_with(extension: Path, module: str, arguments: list[str]) -> None:
    """Run a module as if an extension were in its place."""
    name = "modest_align_kernels._C"
    spec = importlib.util.spec_from_file_location(name, extension)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    folder, *rest = sys.argv[1:]
    if rest[:1] == ["--with"]:
        run_with(kept(Path(folder), rest[1]), rest[2], rest[3:])
    else:
        sys.exit(main(Path(folder), rest))
