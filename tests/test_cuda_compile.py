"""The machine code of the extension's CUDA kernels, for GPUs that need not be here: no spills, the fast instructions.

`python tests/test_cuda_compile.py` prints the table of benchmarks/NOTES.md.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent

# What makes each kernel fast: tensor cores fed by bulk copies, accesses of 16 bytes.
INSTRUCTIONS = {
    "HGMMA": r"\bHGMMA\.64x\d+x16\.F32",
    "UTMALDG": r"\bUTMALDG\.",
    "LDG.128": r"\bLDG\.E\.(?:\w+\.)*128",
    "STG.128": r"\bSTG\.E\.(?:\w+\.)*128",
}
# The present code's numbers of loads from global memory between a tile's last product and its first exponential, most
# of them of ids, and of a warp group's meetings for a tile.
LIMITS = {
    "StatsTile<256>": {"loads before exp2": 11, "barriers a tile": 3},
    "StatsTile<128>": {"loads before exp2": 11, "barriers a tile": 3},
    "GradsTile<256>": {"loads before exp2": 15, "barriers a tile": 2},
    "GradsTile<128>": {"loads before exp2": 14, "barriers a tile": 2},
}
EXPERIMENTS = {"pingpong64": (256, 128), "pingpong128": (128, 64), "stagger": (256, 128)}


def why_not() -> str | None:
    if find_spec("modest_align_kernels._C") is None:
        return "the extension is not built"
    from modest_align_kernels import _C

    if not _C.cuda:
        return "the extension was built without nvcc"
    if _C.experiment:
        return f"the extension is a build of the experiment {_C.experiment}"
    return None if find_spec("triton") else "cuobjdump comes with triton, which is not installed"


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def cuobjdump(option: str, file: Path) -> str:
    tool = Path(str(find_spec("triton").origin)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout


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


def after_a_tile(code: str) -> dict[str, int]:
    """What LIMITS bounds, in the order of the code: from the last HGMMA on, without what diverged warps would do."""
    epilogue = re.split(r"\bWARPSYNC\.COLLECTIVE", re.split(r"\bHGMMA\.", code)[-1])[0]
    return {
        "loads before exp2": len(re.findall(r"\bLDG\.", re.split(r"\bMUFU\.EX2", epilogue)[0])),
        "barriers a tile": len(re.findall(r"\bBAR\.", epilogue)),
    }


@cache
def kernels(file: Path | None = None) -> dict[tuple[str, str], dict[str, int]]:
    """For each (architecture, kernel) its registers, the bytes it spills, and how often each instruction occurs.

    Of the extension, if it is not of another file.
    """
    file = file or Path(str(find_spec("modest_align_kernels._C").origin))
    found = {}
    for section in re.split(r"^arch = ", cuobjdump("-res-usage", file), flags=re.MULTILINE)[1:]:
        for mangled, registers, stack, local in re.findall(
            r"Function (\w+):\s+REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", section
        ):
            key = section.split("\n")[0], readable(mangled)
            found[key] = {"registers": int(registers), "spilled": int(stack) + int(local)}
    for section in re.split(r"^\s*code for ", cuobjdump("-sass", file), flags=re.MULTILINE)[1:]:
        for function in section.split("Function : ")[1:]:
            usage = found[section.split("\n")[0].strip(), readable(function.split("\n")[0])]
            usage |= {name: len(re.findall(pattern, function)) for name, pattern in INSTRUCTIONS.items()}
            usage |= after_a_tile(function) if usage["HGMMA"] else {}
    return found


def test_no_kernel_spills() -> None:
    assert kernels()
    assert {key: usage["spilled"] for key, usage in kernels().items() if usage["spilled"]} == {}


@pytest.mark.parametrize("kernel", LIMITS)
def test_matmuls_use_what_hopper_has(kernel: str) -> None:
    usage = kernels()["sm_90a", kernel]
    assert usage["HGMMA"] > 0
    assert usage["UTMALDG"] > 0
    if kernel.startswith("Grads"):
        assert usage["STG.128"] > 0


@pytest.mark.parametrize("kernel", LIMITS)
def test_little_is_between_a_tile_and_its_exponentials(kernel: str) -> None:
    usage = kernels()["sm_90a", kernel]
    assert {name: usage[name] for name, limit in LIMITS[kernel].items() if usage[name] > limit} == {}


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("nvcc") and find_spec("cutlass_library")), reason="there is no nvcc or CUTLASS")
@pytest.mark.parametrize("source", ["stats", "grads"])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments_compile(experiment: str, source: str, tmp_path: Path) -> None:
    setup = load_setup()
    compiled = tmp_path / "kernels.fatbin"
    flags = [*setup.NVCC_FLAGS, "-DMODEST_ALIGN_CUDA", f"-DMODEST_ALIGN_EXPERIMENT={experiment}", "-fatbin"]
    flags += [f"-I{ROOT / 'csrc'}", f"-I{setup.cutlass_include()}", f"{ROOT}/csrc/cuda/contrastive_{source}.cu"]
    subprocess.run(["nvcc", *flags, "-o", compiled], check=True)
    for columns in EXPERIMENTS[experiment]:
        usage = kernels(compiled)["sm_90a", f"{source.capitalize()}Tile<{columns}>"]
        assert usage["HGMMA"] > 0
        assert usage["spilled"] == 0


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
    names = ["registers", "spilled", *INSTRUCTIONS, *LIMITS["StatsTile<256>"]]
    print(f"| kernel | architecture | {' | '.join(names)} |\n" + "|---" * (len(names) + 2) + "|")
    for (architecture, kernel), usage in sorted(kernels().items(), key=lambda item: item[0][::-1]):
        print(f"| {kernel} | {architecture} | {' | '.join(str(usage.get(name, '')) for name in names)} |")
