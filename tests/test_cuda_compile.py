"""The machine code of the extension's CUDA kernels, for GPUs that need not be here: no spills, the fast instructions.

`python tests/test_cuda_compile.py` prints the table of benchmarks/NOTES.md.
"""

from __future__ import annotations

import re
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

# What makes each kernel fast: tensor cores fed by bulk copies, accesses of 16 bytes.
INSTRUCTIONS = {
    "HGMMA": r"\bHGMMA\.64x\d+x16\.F32",
    "UTMALDG": r"\bUTMALDG\.",
    "LDG.128": r"\bLDG\.E\.(?:\w+\.)*128",
    "STG.128": r"\bSTG\.E\.(?:\w+\.)*128",
}
MATMULS = [f"{kernel}Tile<{columns}>" for kernel in ("Stats", "Grads") for columns in (256, 128)]


def why_not() -> str | None:
    if find_spec("modest_align_kernels._C") is None:
        return "the extension is not built"
    from modest_align_kernels import _C

    if not _C.cuda:
        return "the extension was built without nvcc"
    return None if find_spec("triton") else "cuobjdump comes with triton, which is not installed"


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def cuobjdump(option: str) -> str:
    tool = Path(str(find_spec("triton").origin)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    extension = find_spec("modest_align_kernels._C").origin
    return subprocess.run([tool, option, extension], capture_output=True, text=True, check=True).stdout


def readable(mangled: str) -> str:
    """`StatsTile<256>` for a matmul, `perturb_normalize_kernel<half, 32, 4>` for a rowwise kernel."""
    if tile := re.search(r"((?:Stats|Grads)Tile)ILi(\d+)E", mangled):
        return f"{tile[1]}<{tile[2]}>"
    name = re.search(r"[a-z]\w*?_kernel", mangled[mangled.rindex("_cu_") + 12 :])[0]
    if rowwise := re.search(r"_kernelI(\w+?)Li(\d+)ELi(\d+)E", mangled):
        dtype = {"f": "float", "6__half": "half"}.get(rowwise[1], "bfloat16")
        return f"{name}<{dtype}, {rowwise[2]}, {rowwise[3]}>"
    if smoothed := re.search(r"pair_losses_kernelILb(\d)E", mangled):
        return f"{name}<{'true' if smoothed[1] == '1' else 'false'}>"
    return name


@cache
def kernels() -> dict[tuple[str, str], dict[str, int]]:
    """For each (architecture, kernel) its registers, the bytes it spills, and how often each instruction occurs."""
    found = {}
    for section in re.split(r"^arch = ", cuobjdump("-res-usage"), flags=re.MULTILINE)[1:]:
        for mangled, registers, stack, local in re.findall(
            r"Function (\w+):\s+REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", section
        ):
            key = section.split("\n")[0], readable(mangled)
            found[key] = {"registers": int(registers), "spilled": int(stack) + int(local)}
    for section in re.split(r"^\s*code for ", cuobjdump("-sass"), flags=re.MULTILINE)[1:]:
        for function in section.split("Function : ")[1:]:
            usage = found[section.split("\n")[0].strip(), readable(function.split("\n")[0])]
            usage |= {name: len(re.findall(pattern, function)) for name, pattern in INSTRUCTIONS.items()}
    return found


def test_no_kernel_spills() -> None:
    assert kernels()
    assert {key: usage["spilled"] for key, usage in kernels().items() if usage["spilled"]} == {}


@pytest.mark.parametrize("kernel", MATMULS)
def test_matmuls_use_what_hopper_has(kernel: str) -> None:
    usage = kernels()["sm_90a", kernel]
    assert usage["HGMMA"] > 0
    assert usage["UTMALDG"] > 0
    if kernel.startswith("Grads"):
        assert usage["STG.128"] > 0


def test_rowwise_kernels_move_16_bytes_at_a_time() -> None:
    rowwise = {key: usage for key, usage in kernels().items() if key[1].startswith("perturb_normalize")}
    assert {architecture for architecture, _ in rowwise} == {"sm_90a"}
    assert len(rowwise) == 12
    for key, usage in rowwise.items():
        assert usage["LDG.128"] > 0, key
        assert usage["STG.128"] > 0, key
    for kernel in ("group_sums_kernel", "fold_sums_kernel", "pair_losses_kernel<true>"):
        assert kernels()["sm_90a", kernel]["LDG.128"] > 0, kernel


if __name__ == "__main__":
    names = ["registers", "spilled", *INSTRUCTIONS]
    print(f"| kernel | architecture | {' | '.join(names)} |\n" + "|---" * (len(names) + 2) + "|")
    for (architecture, kernel), usage in sorted(kernels().items(), key=lambda item: item[0][::-1]):
        print(f"| {kernel} | {architecture} | {' | '.join(str(usage[name]) for name in names)} |")
