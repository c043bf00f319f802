"""The extension with its CUDA part, in its place: `python -m benchmarks.gpu_build FOLDER`.

FOLDER keeps it by a digest of its sources, so that another machine with the same Python need not build it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def digest() -> str:
    """Of all that the extension is made of."""
    files = [ROOT / "setup.py", *sorted(file for file in (ROOT / "csrc").rglob("*") if file.is_file())]
    return hashlib.sha256(b"".join(str(f.relative_to(ROOT)).encode() + f.read_bytes() for f in files)).hexdigest()


def place(source: Path, target: Path) -> None:
    """Copy a file whole: a process may have the old one mapped."""
    shutil.copyfile(source, f"{target}.part")
    os.replace(f"{target}.part", target)


def main(folder: Path) -> int:
    """Place the kept extension, or build and keep it; print what then runs on a GPU."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    kept = folder / f"_C-{digest()[:12]}{suffix}"
    target = ROOT / "modest_align_kernels" / f"_C{suffix}"
    if kept.exists():
        place(kept, target)
    else:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        built = subprocess.run(command, cwd=ROOT, env={**os.environ, "MODEST_ALIGN_CUDA": "1"}, check=False)
        if built.returncode:
            return built.returncode
        for old in folder.glob("_C-*"):
            old.unlink()
        place(target, kept)
    from modest_align_kernels import available_backends

    missing = {name: reason for name, reason in available_backends("cuda").items() if reason is not None}
    print(kept.name, "; ".join(f"{name}: {reason}" for name, reason in missing.items()) or "every backend runs")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
