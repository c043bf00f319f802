"""Time, memory and error of the loss beside every other one: see benchmarks/README.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Read when PyTorch is loaded: its profiler, which counts a CPU's memory, else prints into the progress bar.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from tqdm import tqdm

from benchmarks import measure, table
from benchmarks.providers import Provider, all_providers
from benchmarks.readme import RESULTS
from benchmarks.workloads import Workload, default_workloads
from modest_align_kernels.dispatch import operand_dtype

BUDGET = {"cpu": 240.0, "cuda": 360.0}
KINDS = ("loss", "operations", "step")


def machine(device: str) -> dict[str, Any]:
    """What a reader needs to know of where the numbers come from."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    for package in ("triton", "open_clip_torch", "sentence-transformers", "memeff", "inf-cl", "siglip-kernel"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "type": device,
        "device": torch.cuda.get_device_name() if device == "cuda" else name,
        "memory_gib": round(_total_memory(device) / 2**30, 1),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def _total_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def default_output(device: str) -> Path:
    """benchmarks/results/cpu.json, or h200.json on an NVIDIA H200."""
    name = device
    if device == "cuda":
        words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name().lower())
        name = next((word for word in words if word not in ("nvidia", "amd", "tesla", "instinct")), device)
    return RESULTS / f"{name}.json"


def write(text: str, path: Path) -> None:
    """Write a whole file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read(path: Path) -> dict[str, Any]:
    """An earlier run."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored["machine"]["threads"], stored["workloads"][0]["kind"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise ValueError(f"--compare: {path} holds no results of this version of the benchmarks") from None
    return stored


def chosen_workloads(options: argparse.Namespace, device: str) -> list[Workload]:
    """The default ones, or all combinations of what was asked for."""
    defaults = default_workloads(device, options.full or bool(options.workloads))
    if options.rows or options.features:
        dtypes = options.dtypes or [defaults[0].dtype]
        return [
            Workload(kind, rows, features, dtype)
            for kind in options.only or ["loss"]
            for dtype in dtypes
            for features in options.features or [512]
            for rows in options.rows or [4_096]
        ]
    if options.workloads:
        unknown = set(options.workloads) - {workload.name for workload in defaults}
        if unknown:
            known = ", ".join(dict.fromkeys(workload.name for workload in defaults))
            raise ValueError(f"--workloads: got {', '.join(sorted(unknown))}, want some of {known}")
    return [
        workload
        for workload in defaults
        if (not options.workloads or workload.name in options.workloads)
        and (not options.dtypes or workload.dtype in options.dtypes)
        and (not options.only or workload.kind in options.only)
    ]


def chosen_providers(names: list[str] | None, device: str) -> list[Provider]:
    """All, or those whose names contain one of ``names``."""
    providers = all_providers(device)
    for name in names or ():
        if not any(name in provider.name for provider in providers):
            raise ValueError(
                f"--providers: got {name!r}, want (parts of) {', '.join(provider.name for provider in providers)}"
            )
    return [provider for provider in providers if not names or any(name in provider.name for name in names)]


def run_workload(
    workload: Workload, providers: list[Provider], device: str, options: argparse.Namespace, bar: tqdm
) -> dict[str, Any]:
    """Measure one workload; the stored form of its results."""
    rounds = options.rounds or measure.ROUNDS[device]
    progress = bar.set_postfix_str
    case: dict[str, Any] = {
        "kind": workload.kind,
        "name": workload.name,
        "rows": workload.rows,
        "features": workload.features,
        "dtype": workload.dtype,
        "provenance": workload.provenance,
    }
    memory = options.memory * 2**30
    if workload.kind == "loss":
        invited = [
            provider
            for provider in providers
            if workload.peers == "all"
            or provider.name == "plain"
            or provider.name.startswith("ours")
            or (workload.peers == "fast" and not provider.slow)
        ]
        case["results"] = measure.measure_losses(workload, invited, device, rounds, memory, progress)
    elif workload.kind == "step":
        case["results"] = measure.measure_step(workload, device, rounds, memory, progress)
    else:
        dtype = getattr(torch, workload.dtype)
        case["feature_bytes"] = dtype.itemsize
        case["operand_bytes"] = operand_dtype(dtype, torch.device(device), "auto").itemsize
        case["results"] = measure.measure_operations(workload, device, rounds, progress)
    return case


def parse(args: list[str] | None, device: str) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split(":")[0])
    add = parser.add_argument
    add("--full", action="store_true", help="everything, however long it takes")
    add("--workloads", nargs="+", metavar="NAME", help="only these shapes: minilm, fusemix, clip-rn50, 4096x256, ...")
    add("--rows", type=int, nargs="+", metavar="B", help="these batch sizes instead")
    add("--features", type=int, nargs="+", metavar="D", help="these widths instead")
    add("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"])
    add("--only", nargs="+", choices=KINDS, help="the losses, the four operations, the training step")
    add("--providers", nargs="+", metavar="NAME", help="only those whose name has this part (plain is ours to compare)")
    add("--rounds", type=int, metavar="N", help=f"at most this many, {measure.ROUNDS[device]} by default")
    add("--budget", type=float, metavar="SECONDS", help="start no further shape after so long")
    add("--memory", type=float, default=float("inf"), metavar="GIB", help="what a loss may take on a CPU")
    add("--output", type=Path, metavar="JSON", help=f"or a folder; {default_output(device)} by default")
    add("--compare", type=Path, metavar="JSON", help="an earlier run: print ratios, fail where ours is slower")
    add("--threshold", type=float, default=table.SLOWER, help="slower by this factor fails --compare")
    options = parser.parse_args(args)
    if options.budget is None:
        options.budget = float("inf") if options.full else BUDGET[device]
    for name in ("rows", "features"):
        if min(getattr(options, name) or [1]) < 1:
            raise ValueError(f"--{name}: got {min(getattr(options, name))}, want whole numbers above 0")
    if options.rounds is not None and options.rounds < 1:
        raise ValueError(f"--rounds: got {options.rounds}, want a whole number above 0")
    return options


def main(args: list[str] | None = None) -> int:
    """Measure, print the tables, write JSON and pictures; 1 if --compare finds ours slower."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        options = parse(args, device)
        old = read(options.compare) if options.compare else None
        workloads = chosen_workloads(options, device)
        providers = chosen_providers(options.providers, device)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    output = options.output or default_output(device)
    if output.is_dir():
        output /= default_output(device).name
    stored: dict[str, Any] = {"machine": machine(device), "workloads": [], "left_out": []}
    if not options.full and not (options.rows or options.features or options.workloads) and device == "cpu":
        stored["left_out"].append("larger batches and other widths: `--full` measures them")
    lost = None
    start = time.perf_counter()
    with tqdm(workloads, unit="shape") as bar:
        for workload in bar:
            bar.set_description(str(workload))
            if lost or time.perf_counter() - start > options.budget:
                why = lost or f"the {options.budget:,.0f} seconds of --budget were over"
                stored["left_out"].append(f"{workload}: {why}")
                continue
            try:
                stored["workloads"].append(run_workload(workload, providers, device, options, bar))
            except measure.LostDeviceError as error:
                lost = str(error)
                stored["left_out"].append(f"{workload}: {lost}")
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                stored["left_out"].append(f"{workload}: {measure.sentence(error)}")
            if device == "cuda" and not lost:
                torch.cuda.empty_cache()
            write(json.dumps(stored, indent=1) + "\n", output)
    write(json.dumps(stored, indent=1) + "\n", output)
    report(stored, output)
    print(f"\n{output} written in {time.perf_counter() - start:,.0f} s")
    if old is not None:
        text, slower = table.compare_runs(old, stored, options.threshold)
        print(f"\n{text}\n")
        print("\n".join(slower) or "nothing of ours is slower")
        return 1 if slower else 0
    return 1 if lost else 0


def report(stored: dict[str, Any], output: Path) -> None:
    """Print the tables, and write them and the pictures beside the JSON."""
    text = table.full_tables(stored)
    print(text)
    write(text, output.with_suffix(".md"))
    if not table.select(stored, "loss"):
        return
    try:
        from benchmarks.plots import plot_floor, plot_scaling
    except ImportError:
        print("no pictures: matplotlib is not installed")
        return
    plot_scaling(stored, output.with_suffix(".png"))
    plot_floor(stored, output.with_name(f"{output.stem}-floor.png"))


if __name__ == "__main__":
    sys.exit(main())
