"""What gpu_check measures beside the benchmarks: `python -m benchmarks.gpu_measurements NAME`, each a row at a time."""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import losses, operations
from benchmarks.clock import Run, Task, floor, interleave, sentence
from benchmarks.gpu_check import KERNELS
from benchmarks.machine import origin
from benchmarks.providers import PLAIN_PROVIDER, all_providers, from_loss
from benchmarks.results import FLOOR, Key, Result, floor_of, write
from benchmarks.truth import make_inputs
from benchmarks.workloads import Workload
from modest_align_kernels import available_backends, modest_align_loss
from modest_align_kernels.backends import (
    FP16_GAIN,
    accumulate_matmul,
    blocks,
    even_block,
    gradient_block,
    processors_of,
)

MULTIPLE = 256  # of rows and columns, in both backends' blocks of G on Hopper
# The last: 0x4 is the power limit, 0x20 and 0x40 heat.
SMI = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active")


class Sizes(NamedTuple):
    """How large everything is."""

    matmul: int = 8_192
    copied: int = 2**31
    rows: int = 32_768
    features: tuple[int, ...] = (512, 1_024)
    heights: tuple[int, ...] = (2_048, 4_096, 6_144, 8_192, 8_448, 10_240, 11_008, 12_288, 16_384)
    workspaces: tuple[int, ...] = (128 * 2**20, 256 * 2**20, 512 * 2**20)
    host_rows: tuple[int, ...] = (256, 1_024)
    host_steps: int = 200
    profiled_rows: int = 8_192  # one block of G
    compared: tuple[tuple[int, int], ...] = ((32_768, 512), (32_768, 1_024), (4_096, 512), (1_024, 512), (16_384, 768))
    loop_seconds: float = 1.5
    rounds: int = 10
    dtype: str = "bfloat16"


TINY = Sizes(32, 4_096, 64, (16,), (32, 64), (8_192,), (32,), 2, 64, ((48, 16),), 0.05, 1, "float32")


def median(result: Result) -> float:
    """The median of a result's seconds; raises what was wrong instead where there are none."""
    if not result.get("seconds"):
        raise RuntimeError(result.get("failed", "was not measured"))
    return statistics.median(result["seconds"])


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def ceilings(device: str, sizes: Sizes, backend: str) -> Iterator[Result]:
    """What the chip can do: a copy, counted read and written, and PyTorch's matmuls."""
    yield {key: str(value) for key, value in origin().items()} | {"processors": processors_of(torch.device(device))}
    source, target = (torch.empty(sizes.copied, dtype=torch.int8, device=device) for _ in range(2))
    tasks: dict[Key, Task] = {Key("copy"): partial(target.copy_, source)}
    for dtype in (torch.float16, torch.bfloat16):
        a, b = (torch.randn(sizes.matmul, sizes.matmul, device=device).to(dtype) for _ in range(2))
        tasks[Key(str(dtype)[6:])] = partial(torch.mm, a, b, out=torch.empty_like(a))
    results: dict[Key, Result] = {}
    for task in tasks.values():
        task()
    interleave(tasks, results, Run(device, 2 * sizes.rounds))
    copied, *matmuls = (median(results[key]) for key in tasks)
    rates = [2 * sizes.matmul**3 / seconds / 1e12 for seconds in matmuls]
    yield {"copy_gb_s": 2 * sizes.copied / copied / 1e9, "float16_tflop_s": rates[0], "bfloat16_tflop_s": rates[1]}


def products(g: Tensor, x: Tensor, y: Tensor, grad_x: Tensor, grad_y: Tensor, height: int, width: int) -> None:
    """The matmuls of ``accumulate_products``, from one block of G that stands for all."""
    g = g[: height * width].view(height, width)
    for i in blocks(len(x), height):
        for j in blocks(len(y), width):
            part = g[: i.stop - i.start, : j.stop - j.start]
            accumulate_matmul(grad_x[i], part, y[j], first=j.start == 0, alpha=1 / FP16_GAIN)
            accumulate_matmul(grad_y[j], part.T, x[i], first=i.start == 0, alpha=1 / FP16_GAIN)


def addmm(device: str, sizes: Sizes, backend: str) -> Iterator[Result]:
    """The two products of G for each height of its blocks in each workspace, beside what ``gradient_block`` takes."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    rows, processors = sizes.rows, processors_of(torch.device(device))
    for features in sizes.features:
        x, y, grad_x, grad_y = (torch.randn(rows, features, device=device) for _ in range(4))
        x, y = x.to(dtype), y.to(dtype)
        names: dict[tuple[int, int], list[str]] = {}
        for workspace in sizes.workspaces:
            elements = workspace // dtype.itemsize
            for height in sizes.heights:
                names.setdefault((height, even_block(rows, elements // height, MULTIPLE)), [])
            taken = gradient_block(rows, rows, features, elements, MULTIPLE, MULTIPLE, processors)
            names.setdefault(taken, []).append(f"{workspace // 2**20} MiB")
        # Random: a matmul of zeros is faster.
        g = torch.randn(max(height * width for height, width in names), dtype=dtype, device=device)
        tasks: dict[Key, Task] = {FLOOR: floor(x, y)}
        for block in names:
            tasks[Key(str(block))] = partial(products, g, x, y, grad_x, grad_y, *block)
        results: dict[Key, Result] = {}
        for task in tasks.values():
            task()
        interleave(tasks, results, Run(device, sizes.rounds))
        two = median(results[FLOOR]) / 2
        seconds = {block: median(results[Key(str(block))]) for block in names}
        for block in sorted(names, key=seconds.__getitem__):
            row = {"features": features, "height": block[0], "width": block[1], "ms": 1e3 * seconds[block]}
            yield {**row, "of_two_matmuls": two / seconds[block], "gradient_block_with": ", ".join(names[block])}
        best = min(names, key=seconds.__getitem__)
        lost = {name: seconds[block] / seconds[best] - 1 for block, found in names.items() for name in found}
        slower = ", ".join(f"{name} {share:+.1%}" for name, share in lost.items())
        yield {"features": features, "fastest": str(best), "ms": 1e3 * seconds[best], "gradient_block": slower}


def operation(device: str, sizes: Sizes, backend: str) -> Iterator[Result]:
    """A backend's five functions beside their floors; eager's, first, are what they are held against."""
    for features in sizes.features:
        workload = Workload("operations", sizes.rows, features, sizes.dtype)
        results = operations.measure(workload, Run(device, sizes.rounds), ["eager", backend])
        if "failed" in results.get(Key("contrastive_stats", backend), {}):
            raise RuntimeError(results[Key("contrastive_stats", backend)]["failed"])
        seconds = {key: median(result) for key, result in results.items() if key.backend != "eager"}
        for name in operations.OPERATIONS:
            ours, its_floor = seconds[Key(name, backend)], seconds[floor_of(name)]
            yield {"features": features, "operation": name, "ms": 1e3 * ours, "of_its_floor": its_floor / ours}
        matmuls = [name for name in operations.OPERATIONS if name.startswith("contrastive")]
        ours, ideal = (sum(seconds[Key(name, who)] for name in matmuls) for who in (backend, FLOOR.name))
        yield {"features": features, "four_matmuls_ms": 1e3 * ours, "of_their_floor": ideal / ours}


def host_cost(step: Callable[[], object], device: str, steps: int) -> Result:
    """Microseconds of a step: of the host alone, of both, and of a CUDA graph's replay, where the host does nothing."""

    def times(task: Callable[[], object]) -> tuple[float, float]:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            task()
        host = time.perf_counter() - start
        synchronize(device)
        return 1e6 * host / steps, 1e6 * (time.perf_counter() - start) / steps

    times(step)
    host, whole = times(step)
    row = {"host_us": host, "step_us": whole}
    if device == "cuda":
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            row["graph_us"] = times(graph.replay)[1]
        except RuntimeError as error:
            row["graph_us"] = sentence(error)
    return row


def host(device: str, sizes: Sizes, backend: str) -> Iterator[Result]:
    """What the host costs where batches are small, for ours and for the plain loss."""
    for rows in sizes.host_rows:
        inputs = make_inputs(Workload("loss", rows, sizes.features[0], sizes.dtype), device)
        ours = from_loss(partial(modest_align_loss, backend=backend))
        for name, step in (("plain", PLAIN_PROVIDER.load()), (backend, ours)):
            yield {"rows": rows, "loss": name, **host_cost(partial(step, *inputs), device, sizes.host_steps)}


def smi() -> list[str]:
    """What SMI names, or nothing where there is no nvidia-smi."""
    query = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return []
    return [value.strip() for value in done.stdout.splitlines()[0].split(",")]


def watched(task: Task, device: str, seconds: float) -> Result:
    """A task in a loop for so many seconds: one run's time, and medians of what nvidia-smi said meanwhile."""
    samples: list[list[str]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set() and (sample := smi()):
            samples.append(sample)

    watcher = threading.Thread(target=watch)
    task()
    synchronize(device)
    watcher.start()
    start, runs = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(10):
            task()
        synchronize(device)
        runs += 10
    row: Result = {"ms": 1e3 * (time.perf_counter() - start) / runs, "samples": len(samples)}
    over.set()
    watcher.join()
    if samples:
        numbers = zip(*(sample[:-1] for sample in samples), strict=True)
        medians = (statistics.median(map(float, values)) for values in numbers)
        row |= dict(zip(("sm_mhz", "memory_mhz", "watts", "celsius"), medians, strict=True))
        row["limited_by"] = ", ".join(sorted({sample[-1] for sample in samples}))
    return row


def clocks(device: str, sizes: Sizes, backend: str) -> Iterator[Result]:
    """Clocks and watts of four matmuls and of each of a backend's functions in a loop."""
    workload = Workload("operations", sizes.rows, sizes.features[0], sizes.dtype)
    x, y, scale = (t.detach() for t in make_inputs(workload, device)[:3])
    operand = operations.operand_dtype(x.dtype, x.device, "eager")
    tasks = {"four matmuls": floor(x.to(operand), y.to(operand)), **operations.tasks_of(backend, x, y, scale)}
    for name, task in tasks.items():
        yield {"operation": name, **watched(task, device, sizes.loop_seconds)}


def launches(device: str, sizes: Sizes, backend: str) -> Iterator[Result]:
    """Each of a backend's functions once, in the range that a profiler looks at."""
    workload = Workload("operations", sizes.profiled_rows, sizes.features[0], sizes.dtype)
    tasks = operations.tasks_of(backend, *(t.detach() for t in make_inputs(workload, device)[:3]))
    for task in tasks.values():
        task()
    synchronize(device)
    if device == "cuda":
        torch.cuda.profiler.start()
    for task in tasks.values():
        task()
    synchronize(device)
    if device == "cuda":
        torch.cuda.profiler.stop()
    yield {"launched": ", ".join(tasks)}


def profile(device: str, sizes: Sizes, backend: str) -> Iterator[Result]:
    """What ncu counts in one launch of each kernel; without it they are only launched."""
    if shutil.which("ncu") is None:
        yield from launches(device, sizes, backend)
        yield {"ncu": "is not on the PATH"}
        return
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        options = ["--profile-from-start", "off", "--clock-control", "none", "--csv", "--log-file", str(log)]
        options += ["--kernel-name", f"regex:.*({'|'.join(KERNELS)}).*", "--print-details", "all"]
        for section in ("SpeedOfLight", "ComputeWorkloadAnalysis", "LaunchStats", "Occupancy"):
            options += ["--section", section]
        target = [sys.executable, "-m", "benchmarks.gpu_measurements", "launches", "--backend", backend]
        done = subprocess.run(["ncu", *options, *target, *(["--tiny"] if sizes is TINY else [])], check=False)
        text = log.read_text(encoding="utf-8") if log.exists() else ""
    yield from parse_ncu(text)
    if done.returncode:
        raise RuntimeError(f"ncu failed: {text.strip()[-300:] or done.returncode}")


def parse_ncu(text: str) -> list[Result]:
    """A row for each launch in ncu's details as CSV: its kernel, and each metric with its unit."""
    rows: dict[str, Result] = {}
    table = text[text.find('"ID"') :] if '"ID"' in text else ""
    for line in csv.DictReader(table.splitlines()):
        name = re.sub(r"\(.*", "", line["Kernel Name"].replace("(int)", "")).removeprefix("void ")
        row = rows.setdefault(line["ID"], {"kernel": name})
        if line.get("Metric Name"):
            row[line["Metric Name"]] = f"{line['Metric Value']} {line['Metric Unit']}".strip()
    return list(rows.values())


def versus(device: str, sizes: Sizes, backend: str) -> Iterator[Result]:
    """Native beside Triton and the plain loss in the same rounds, whole steps: what decides between the two."""
    ours = [provider for provider in all_providers(device) if provider.key.ours and provider.key.backend != "eager"]
    for rows, features in sizes.compared:
        workload = Workload("loss", rows, features, sizes.dtype)
        results = losses.measure(workload, [*ours, PLAIN_PROVIDER], Run(device, 2 * sizes.rounds))
        row: Result = {"rows": rows, "features": features}
        for key, result in results.items():
            row[f"{key.backend or key.name}_ms"] = 1e3 * median(result) if "seconds" in result else result["failed"]
        native, triton = (results[provider.key].get("seconds") for provider in ours)
        if native and triton:
            row["triton_over_native"] = statistics.median(b / a for a, b in zip(native, triton, strict=False))
        yield row


def groups(device: str, sizes: Sizes, backend: str) -> Iterator[Result]:
    """What group ids cost: sorted, as few tiles exclude anything, and shuffled, as nearly all compare ids."""
    inputs = make_inputs(Workload("loss", sizes.rows, sizes.features[0], sizes.dtype), device)
    ids = torch.arange(sizes.rows, device=device) // 4
    shuffled = ids[torch.randperm(sizes.rows, generator=torch.Generator(device).manual_seed(0), device=device)]
    tasks: dict[Key, Task] = {}
    for name, group_ids in (("none", None), ("sorted", ids), ("shuffled", shuffled)):
        loss_fn = partial(modest_align_loss, smoothing=0.1, group_ids=group_ids, backend=backend)
        tasks[Key(name)] = partial(from_loss(loss_fn), *inputs)
        tasks[Key(name)]()
    results: dict[Key, Result] = {}
    interleave(tasks, results, Run(device, sizes.rounds))
    yield {f"{key.name}_ms": 1e3 * median(result) for key, result in results.items()}


Measurement = Callable[[str, Sizes, str], Iterator[Result]]
MEASUREMENTS: dict[str, Measurement] = {
    "ceilings": ceilings,
    "addmm": addmm,
    "operations": operation,
    "host": host,
    "clocks": clocks,
    "launches": launches,
    "profile": profile,
    "versus": versus,
    "groups": groups,
}


def main(args: list[str] | None = None) -> int:
    """Print a measurement's rows as they come, and keep them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_measurements", description=__doc__.split(":")[0])
    parser.add_argument("name", choices=MEASUREMENTS)
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--result", type=Path, metavar="JSON")
    options = parser.parse_args(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = available_backends(device).get(options.backend)
    if reason is not None:
        print(f"{options.backend}: {reason}")
        return 1
    rows = []
    for row in MEASUREMENTS[options.name](device, TINY if options.tiny else Sizes(), options.backend):
        rows.append(row)
        print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
        if options.result:
            write((json.dumps(rows) + "\n").encode(), options.result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
