"""Time, memory and error of the loss beside every other one: see benchmarks/README.md."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

# Read when PyTorch is loaded: its profiler, which counts a CPU's memory, else prints into the progress bar.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from tqdm import tqdm

from benchmarks import losses, operations, others, step, table
from benchmarks.clock import ROUNDS, LostDeviceError, Run, sentence
from benchmarks.machine import default_output, machine, origin
from benchmarks.providers import Provider, all_providers
from benchmarks.results import PLAIN, Result, fields_of, load, merge, same_machine, save, write
from benchmarks.workloads import Workload, default_workloads

BUDGET = {"cpu": 240.0, "cuda": 360.0}
KINDS = ("loss", "operations", "step", *others.OTHERS)


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
    providers = {str(provider.key): provider for provider in all_providers(device)}
    of_others = [str(provider.key) for kind in others.OTHERS for provider in others.providers(kind, device)]
    known_names = dict.fromkeys((*providers, *of_others))
    for name in names or ():
        if not any(name in known for known in known_names):
            raise ValueError(f"--providers: got {name!r}, want (parts of) {', '.join(known_names)}")
    return [provider for known, provider in providers.items() if not names or any(name in known for name in names)]


def run_workload(workload: Workload, providers: list[Provider], run: Run, names: list[str] | None = None) -> Result:
    """Measure one workload: "results", and what its tables need besides."""
    if workload.kind in others.OTHERS:
        return {"results": others.measure(workload, run, names)}
    if workload.kind == "loss":
        invited = [
            provider
            for provider in providers
            if workload.peers == "all"
            or provider.key == PLAIN
            or provider.key.ours
            or (workload.peers == "fast" and not provider.slow)
        ]
        return {"results": losses.measure(workload, invited, run)}
    named = {provider.key.backend for provider in providers if provider.key.ours}
    ours = [backend for backend in operations.measured_backends(run.device) if backend in named]
    if workload.kind == "step":
        return {"results": step.measure(workload, run, ours)}
    sizes = operations.element_bytes(workload, run.device)
    return {**sizes, "results": operations.measure(workload, run, ours)}


def parse(args: list[str] | None, device: str) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split(":")[0])
    add = parser.add_argument
    add("--full", action="store_true", help="everything, however long it takes")
    add("--workloads", nargs="+", metavar="NAME", help="only these shapes: minilm, fusemix, clip-rn50, 4096x256, ...")
    add("--rows", type=int, nargs="+", metavar="B", help="these batch sizes instead")
    add("--features", type=int, nargs="+", metavar="D", help="these widths instead")
    add("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"])
    add("--only", nargs="+", choices=KINDS, help="the loss, its operations, the training step, or other losses")
    add("--providers", nargs="+", metavar="NAME", help="only those whose name has this part (plain is ours to compare)")
    add("--rounds", type=int, metavar="N", help=f"at most this many, {ROUNDS[device]} by default")
    add("--budget", type=float, metavar="SECONDS", help="start no further shape after so long")
    add("--memory", type=float, default=float("inf"), metavar="GIB", help="what a loss may take on a CPU")
    add("--output", type=Path, metavar="JSON", help="or a folder; benchmarks/results/CHIP.json by default")
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
    mine = machine(device)
    new: Result = {"machine": mine, "workloads": [], "left_out": {}}
    try:
        options = parse(args, device)
        old = load(options.compare) if options.compare else None
        workloads = chosen_workloads(options, device)
        providers = chosen_providers(options.providers, device)
        output = options.output or default_output(mine)
        if output.is_dir():
            output /= default_output(mine).name
        kept = load(output) if output.exists() else new
        if not same_machine(kept, new):
            raise ValueError(f"--output: {output} holds another machine's results, {kept['machine']['device']}")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.full:
        kept["left_out"] = {}
    elif device == "cpu" and not (kept["workloads"] or options.rows or options.features or options.workloads):
        new["left_out"]["larger batches and other widths"] = "`--full` measures them"
    lost = None
    start, origins = time.perf_counter(), origin()
    with tqdm(workloads, unit="shape") as bar:
        run = Run(device, options.rounds or ROUNDS[device], options.memory * 2**30, bar.set_postfix_str)
        for workload in bar:
            bar.set_description(str(workload))
            if lost or time.perf_counter() - start > options.budget:
                new["left_out"][str(workload)] = lost or f"the {options.budget:,.0f} seconds of --budget were over"
                continue
            try:
                measured = run_workload(workload, providers, run, options.providers)
                new["workloads"].append({**fields_of(workload), **origins, **measured})
            except (LostDeviceError, torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                lost = str(error) if isinstance(error, LostDeviceError) else None
                new["left_out"][str(workload)] = lost or sentence(error)
            if device == "cuda" and not lost:
                torch.cuda.empty_cache()
            save(merge(kept, new), output)
    stored = merge(kept, new)
    save(stored, output)
    print(table.full_tables(new))
    report(stored, output)
    print(f"\n{output} written in {time.perf_counter() - start:,.0f} s")
    if old is not None:
        text, slower = table.compare_runs(old, new, options.threshold)
        print(f"\n{text}\n")
        print("\n".join(slower) or "nothing of ours is slower")
        return 1 if slower else 0
    return 1 if lost else 0


def report(stored: Result, output: Path) -> None:
    """Write the tables and the pictures beside the JSON."""
    write(table.full_tables(stored).encode(), output.with_suffix(".md"))
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
