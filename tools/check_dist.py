"""What `make dist` made: is everything in it, and does a wheel run where there is no repository and no compiler?

    python tools/check_dist.py dist      # the sdist, and the wheels for the Python that runs this

A wheel is installed into a fresh environment, with what it depends on. There README's first lines are run, as the wheel
carries them, and the doctor's self-tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"modest_align_kernels": ROOT, "modest_align_train": ROOT / "python"}
BUILT = re.compile(r"(^|/)(__pycache__|_C\..*\.so$)")


def files(folder: Path, base: Path) -> set[str]:
    """The files below a folder of the repository, but for what is built, by their paths from ``base``."""
    names = {path.relative_to(base).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not BUILT.search(name)}


def refuse_difference(archive: Path, found: set[str], wanted: set[str]) -> None:
    """End with what is in an archive and should not be, and what is not."""
    if found != wanted:
        sys.exit(f"{archive}: has {sorted(found - wanted)} and lacks {sorted(wanted - found)}")


def check_sdist(sdist: Path) -> None:
    """Refuse one that does not have all that a build needs, or has more."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    wanted = files(ROOT / "csrc", ROOT) | {"pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"}
    wanted |= {name for package, base in PACKAGES.items() for name in files(base / package, ROOT)}
    refuse_difference(sdist, {n for n in names if not re.search(r"\.egg-info/|^(PKG-INFO|setup\.cfg)$", n)}, wanted)


def check_wheel(wheel: Path) -> None:
    """Refuse one that lacks a file of the packages, has another, or does not run."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}
        (metadata,) = (archive.read(name) for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    compiled = {name for name in names if BUILT.search(name)}
    if len(compiled) != 1:
        sys.exit(f"{wheel}: has {sorted(compiled)}, want one compiled module")
    wanted = {name for package, base in PACKAGES.items() for name in files(base / package, base)}
    refuse_difference(wheel, names - compiled, wanted)
    with tempfile.TemporaryDirectory() as folder:
        venv.create(Path(folder) / "venv", with_pip=True)
        programs = Path(folder) / "venv" / "bin"
        kept = {k: v for k, v in os.environ.items() if not re.match("PYTHON|MODEST_ALIGN_|TRITON_|CUDA|CXX", k)}
        env = kept | {"PATH": str(programs)}

        def python(*arguments: str) -> str:
            command = [str(programs / "python"), "-I", *arguments]
            done = subprocess.run(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                sys.exit(f"{wheel}: python {' '.join(arguments)} ended with {done.returncode}\n{done.stdout}")
            return done.stdout

        python("-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt"), str(wheel))
        readme = message_from_bytes(metadata).get_payload()
        lines = re.search(r"^```python\n(import torch\n.*?)^```$", readme, re.MULTILINE | re.DOTALL)
        if lines is None:
            sys.exit(f"{wheel}: README has no Python that begins with import torch")
        python("-c", lines[1])
        report = python("-m", "modest_align_kernels")
        cuda = "built" if wheel.parent.name == "cuda" else "not built"
        for want in (f"({folder}/venv/", f"CUDA part {cuda}\n", "  native (the default): self-test passed"):
            if want not in report:
                sys.exit(f"{wheel}: the doctor does not say {want.strip()!r}\n{report}")
    print(report)


def main() -> None:
    """Check a folder."""
    folder = Path(sys.argv[1]).resolve()
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheels = sorted(folder.rglob(f"*-{python}-{python}-*.whl"))
    if not wheels:
        sys.exit(f"{folder}: there is no wheel for this Python ({python}): make dist")
    for archive in [*folder.glob("*.tar.gz"), *wheels]:
        (check_wheel if archive.suffix == ".whl" else check_sdist)(archive)
        print(f"{archive.relative_to(folder)}: right, {archive.stat().st_size / 1e6:.1f} MB\n")


if __name__ == "__main__":
    main()
