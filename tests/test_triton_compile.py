"""The Triton kernels compiled for GPUs that need not be here, and what the compiler made of them.

Every row of the tile table becomes machine code, whose registers, spills, shared memory and tensor-core instructions
are read with the tools that come inside the triton package. `python tests/test_triton_compile.py` prints the table of
benchmarks/NOTES.md.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

# Dynamic shared memory that one program may use, in bytes (CUDA programming guide, technical specifications).
SHARED_MEMORY = {kind: 1024 * size for kind, size in ((80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99))}
# What multiplies: tensor cores of one warp, of a warp group, or of a whole multiprocessor.
TENSOR_CORES = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
MATMULS = ("contrastive_stats_kernel", "contrastive_grads_kernel")
ROWWISE = ("perturb_normalize_kernel", "perturb_normalize_backward_kernel", "pair_losses_kernel")
SUMS = ("group_sums_kernel", "fold_sums_kernel")
SMALL = ("merge_kernel", "ids_bounds_kernel", "softmax_factors_kernel")
PERSISTENT = ("persistent_grads_kernel", "rare_grads_kernel")
# At most so many barriers, and loads from the tensor cores' last instruction to the first exponential, on sm_90 with
# Triton 3.6 to 3.9. In the order of the code, where a rare way may come first: it is the gradients' 50.
BARRIERS_AND_LOADS = {
    ("contrastive_grads_kernel", "float16"): (14, 50),
    ("contrastive_grads_kernel", "float32"): (22, 30),
    ("contrastive_stats_kernel", "float16"): (71, 33),
    ("contrastive_stats_kernel", "float32"): (81, 18),
}


def compile_all(jobs: list[list]) -> list[dict]:
    """Compile in processes of their own: this one may have Triton's interpreter switched on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"

    def compile_some(some: list[list]) -> list[dict]:
        command = [sys.executable, __file__, json.dumps(some)]
        with tempfile.TemporaryDirectory() as cache:
            environment_here = {**environment, "TRITON_CACHE_DIR": cache}
            done = subprocess.run(command, capture_output=True, text=True, env=environment_here, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(compile_some, (jobs[0::2], jobs[1::2])))
    return [result for half in halves for result in half]


def matmul_jobs(capabilities: tuple[int, ...]) -> list[list]:
    return [
        [kernel, capability, dtype, 0, ids]
        for capability in capabilities
        for dtype in ("float16", "float32")
        for kernel in MATMULS
        for ids in (False, True)
    ]


def rowwise_jobs(widths: tuple[int, ...], capability: int = 90) -> list[list]:
    """With smoothing: what it adds is compiled away without it."""
    smoothed = [[kernel, capability, "float16", width, True] for kernel in ROWWISE[1:] for width in widths]
    return [*([ROWWISE[0], capability, "float16", width, False] for width in widths), *smoothed]


def sums_jobs(capability: int, dtype: str = "float16") -> list[list]:
    return [[kernel, capability, dtype, 0, ids] for kernel in SUMS for ids in (False, True)]


def small_jobs() -> list[list]:
    return [[kernel, 90, "float16", 0, True] for kernel in SMALL]


def check(result: dict) -> None:
    what = f"{result['kernel']} for sm_{result['capability']}, {result['dtype']}, {result['tile']}, ids={result['ids']}"
    # The sines and cosines of the noise have a stack for arguments far past 2 pi, which theirs never are.
    allowed = 32 if result["kernel"] == "perturb_normalize_kernel" else 0
    assert result["spilled"] <= allowed, f"{what} spills {result['spilled']} bytes"
    assert result["registers"] <= 255, what
    assert result["shared"] <= SHARED_MEMORY[result["capability"]], what
    if result["kernel"] in MATMULS:
        instruction = TENSOR_CORES[result["capability"]]
        assert result["tensor_core"].get(instruction, 0) > 0, f"{what} has no {instruction}: {result['tensor_core']}"


@pytest.mark.parametrize("capability", [90, *(pytest.param(c, marks=pytest.mark.slow) for c in (80, 100))])
def test_matmul_kernels(capability: int) -> None:
    results = compile_all(matmul_jobs((capability,)))
    assert len(results) == 8
    for result in results:
        check(result)
        if capability == 90:
            barriers, loads = BARRIERS_AND_LOADS[result["kernel"], result["dtype"]]
            assert result["barriers"] <= barriers, result
            assert result["epilogue_loads"] <= loads, result


@pytest.mark.slow
@pytest.mark.parametrize("capability", [86, 89, 120])
def test_every_kernel_on_consumer_chips(capability: int) -> None:
    jobs = [
        *matmul_jobs((capability,)),
        *rowwise_jobs((1024,), capability),
        *sums_jobs(capability),
        ["merge_kernel", capability, "float32", 0, False],
    ]
    for result in compile_all(jobs):
        check(result)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 100])
def test_pairs_and_sums(capability: int) -> None:
    for result in compile_all(rowwise_jobs((1024,), capability)[1:] + sums_jobs(capability)):
        check(result)


def test_rowwise_kernels_read_16_bytes_at_a_time() -> None:
    for result in compile_all(rowwise_jobs((512, 1024, 4096)) + sums_jobs(90) + sums_jobs(90, "float32")):
        check(result)
        assert result["wide_loads"] > 0, result


def test_small_kernels() -> None:
    results = {result["kernel"]: result for result in compile_all(small_jobs())}
    for result in results.values():
        check(result)
    # 64 x 32 partial sums on 256 threads, two such blocks and the next one copied ahead
    assert results["merge_kernel"]["copies"] == 3 * 8


@pytest.mark.slow
@pytest.mark.parametrize("ids", [False, True])
def test_persistent_experiment(ids: bool) -> None:
    results = compile_all([[kernel, 90, "float16", 0, ids] for kernel in PERSISTENT])
    assert [result["specialized"] for result in results] == [True, False]
    for result in results:
        check(result)
        assert result["tensor_core"]["HGMMA"] > 0


# What follows runs in the processes that compile.


def compile_one(kernel: str, capability: int, dtype: str, width: int, ids: bool) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from modest_align_kernels.backends.triton import (
        contrastive_grads,
        contrastive_stats,
        group_sums,
        logits,
        pair_losses,
        persistent,
        perturb_normalize,
        tiles,
    )

    modules = (contrastive_grads, contrastive_stats, group_sums, pair_losses, perturb_normalize, logits, persistent)
    function = next(getattr(module, kernel) for module in modules if hasattr(module, kernel))
    torch_dtype = getattr(torch, dtype)
    operand = "*fp16" if dtype == "float16" else "*fp32"
    operands = {"x", "x_hat", "y_hat", "g", "pair_hat", "dx", "hat", "other_hat"}
    types = {f"{side}_{what}": "*i32" for side in ("row", "col") for what in ("ids", "bounds", "careful")}
    types |= dict.fromkeys(("ids", "other_ids", "open_ids", "bounds"), "*i32")
    types |= dict.fromkeys(("seed", "order", "other_order"), "*i64") | {"gain": "fp32"}
    integers = {"rows", "first_row", "wave_rows", "block_rows", "columns", "first_col", "block_columns", "col_count"}
    integers |= {"tiles", "length", "features", "width", "pairs", "stride", "row_stride", "noise_stream"}
    integers |= {"other_rows", "weighted_rows", "numbers", "chunks"}
    if kernel in MATMULS:
        tile = tiles.tile_of_capability(capability, torch_dtype)
        constants = {
            "BLOCK_ROWS": tile.block_rows,
            "BLOCK_COLUMNS": tile.block_columns,
            "BLOCK_FEATURES": tile.block_features,
            "PRECISION": "tf32x3" if dtype == "float32" else "tf32",
            "IDS": ids,
            "DIAGONAL": True,
        }
        if not ids:
            constants |= {f"{side}_{what}": None for side in ("row", "col") for what in ("ids", "bounds")}
        options, shape = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}, list(tile)
    elif kernel in PERSISTENT:
        tile = persistent.TILE
        constants = {
            "IDS": ids,
            "BLOCK_ROWS": tile.block_rows,
            "BLOCK_COLUMNS": tile.block_columns,
            "BLOCK_FEATURES": tile.block_features,
        }
        options, shape = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}, list(tile)
        if kernel == "rare_grads_kernel":
            constants |= {"BLOCK_COLUMNS": tile.block_columns // 2, "TILE_COLUMNS": tile.block_columns}
            options["num_warps"] = persistent._RARE_WARPS
        if not ids:
            constants |= {f"{side}_{what}": None for side in ("row", "col") for what in ("ids", "bounds")}
        constants = {name: value for name, value in constants.items() if name in function.arg_names}
    elif kernel == "merge_kernel":
        constants = {"BLOCK_TILES": contrastive_stats._MERGE_TILES, "BLOCK": contrastive_stats._MERGE_BLOCK}
        options, shape = {"num_warps": 8}, [*constants.values(), 8]
    elif kernel in SMALL:
        tile = tiles.tile_of_capability(capability, torch_dtype)
        constants = {"BLOCK_ROWS": tile.block_rows, "BLOCK_COLUMNS": tile.block_columns}
        options, shape = {}, [*constants.values()]
    elif kernel in SUMS:
        constants = {"ROWS": group_sums._ROWS}
        if kernel == "group_sums_kernel":
            constants |= {"TILE_ROWS": group_sums._TILE_ROWS, "FEATURES": group_sums._FEATURES}
        else:
            constants |= {"PIECES": group_sums._PIECES, "FEATURES": group_sums._PIECE_FEATURES, "SIDES": 2, "KINDS": 2}
        options, shape = {"num_warps": 1 if kernel == "group_sums_kernel" else 4}, [*constants.values()]
        if not ids:
            none = ("order", "ids", "other_order", "other_ids", "open_ids", "bounds", "table")
            constants |= {name: None for name in none if name in function.arg_names}
    elif kernel == "pair_losses_kernel":
        pairs, block_features, warps = perturb_normalize.row_blocks(width)
        constants = {"PAIRS": pairs, "FEATURES": block_features}
        options, shape = {"num_warps": warps}, [pairs, block_features, warps]
    else:
        block_rows, block_features, warps = perturb_normalize.row_blocks(width)
        constants = {"BLOCK_ROWS": block_rows, "BLOCK_FEATURES": block_features}
        if kernel == "perturb_normalize_kernel":
            # a stride of 1 is specialised, as it is in a launch
            constants |= {"NOISE": True, "RELATIVE": False, "feature_stride": 1}
        options, shape = {"num_warps": warps}, [block_rows, block_features, warps]
    signature, attributes = {}, {}
    for place, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = types.get(name) or ("i32" if name in integers else operand if name in operands else "*fp32")
        if signature[name].startswith("*") or name in ("stride", "row_stride", "width", "features"):
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(function.arg_names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    instructions = re.findall(r"\b(HMMA|HGMMA|UTCHMMA)\b", code)
    before_exponentials = code.split("MUFU.EX2")[0]
    epilogue = re.split(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", before_exponentials)[-1]
    return {
        "triton": [int(part) for part in triton.__version__.split(".")[:2]],
        "kernel": kernel,
        "capability": capability,
        "dtype": dtype,
        "ids": ids,
        "tile": shape,
        "registers": int(registers),
        "spilled": int(stack),
        "shared": compiled.metadata.shared,
        "specialized": "ttg.warp_specialize" in compiled.asm["ttgir"],
        "tensor_core": {name: instructions.count(name) for name in sorted(set(instructions))},
        "barriers": len(re.findall(r"\bBAR\.(?:SYNC|RED)", code)),
        "epilogue_loads": len(re.findall(r"\bLDG\b", epilogue)),
        "copies": len(re.findall(r"\bLDGSTS\b", code)),
        "wide_loads": len(re.findall(r"\bLDG\.E\.(?:\w+\.)*128", code)),
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps([compile_one(*job) for job in json.loads(sys.argv[1])]))
    else:
        print(
            "| kernel | sm | operands | ids | tile | registers | spilled | shared, KiB | tensor core "
            + "| barriers | loads before exp2 |\n"
            + "|---" * 11
            + "|"
        )
        for r in compile_all(matmul_jobs((80, 90, 100)) + rowwise_jobs((1024,)) + sums_jobs(90) + small_jobs()):
            cores = ", ".join(f"{count} {name}" for name, count in r["tensor_core"].items())
            print(
                f"| {r['kernel']} | {r['capability']} | {r['dtype']} | {'yes' if r['ids'] else 'no'} "
                f"| {' x '.join(map(str, r['tile']))} | {r['registers']} | {r['spilled']} | {r['shared'] / 1024:.0f} "
                f"| {cores} | {r['barriers']} | {r['epilogue_loads']} |"
            )
