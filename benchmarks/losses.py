"""Every provider on one workload: parity with the truth, peak memory, then time beside the floor."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import Run, Task, failure, floor, interleave
from benchmarks.providers import Provider, Step
from benchmarks.results import FLOOR, Key, Result
from benchmarks.truth import LARGEST_ERROR, Inputs, Truth, compare, make_inputs, sampled_truth
from benchmarks.workloads import Workload
from modest_align_kernels.testing import peak_extra_bytes

# B * B * D past which the truth in float64 would take minutes.
LARGEST_TRUTH = {"cpu": 32_768**2 * 512, "cuda": 262_144**2 * 512}
# Where a batch can take the whole memory of a CPU, it is predicted from two small ones instead of tried.
PREDICT_ROWS = 8_192
PROBE_ROWS = (1_024, 2_048)


def measure(
    workload: Workload,
    providers: list[Provider],
    run: Run,
    truth_of: Callable[[Inputs], Truth] = sampled_truth,
    has_floor: bool = True,
) -> dict[Key, Result]:
    """Every provider on one workload, and the floor if it has one.

    Returns:
        "seconds" (one a round, the same rounds for all), "peak_extra_mib" and :func:`compare`'s errors; or "failed", a
        sentence.
    """
    inputs = make_inputs(workload, run.device)
    truth = None
    if workload.rows**2 * workload.features <= LARGEST_TRUTH[run.device]:
        run.progress("float64")
        truth = truth_of(inputs)
    results: dict[Key, Result] = {}
    tasks: dict[Key, Task] = {FLOOR: floor(inputs.x.detach(), inputs.y.detach())} if has_floor else {}
    for provider in providers:
        key = provider.key
        run.progress(str(key))
        try:
            results[key], step = first_runs(provider, workload, inputs, truth, run)
        except Exception as error:
            results[key] = failure(error, key, run.device)
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
                results[key]["predicted_mib"] = predict_mib(provider, workload, run.device)
            continue
        if step is not None:
            tasks[key] = partial(step, *inputs)
    if has_floor:
        tasks[FLOOR]()
    interleave(tasks, results, run)
    return results


def first_runs(
    provider: Provider, workload: Workload, inputs: Inputs, truth: Truth | None, run: Run
) -> tuple[Result, Step | None]:
    """A provider's errors and memory, and its step; no step but "failed" if it cannot run here, or is wrong.

    Whatever the provider raises is raised.
    """
    reason = provider.why_not(run.device, workload.dtype)
    if reason is not None:
        return {"failed": reason}, None
    too_large = why_too_large(provider, workload, run)
    if too_large is not None:
        return too_large, None
    step = provider.load()
    if provider.compiled:
        step(*inputs)
    output: list[Any] = []

    def task() -> None:
        output[:] = step(*inputs)

    start = time.perf_counter()
    peak = peak_extra_bytes(task, run.device)
    result: Result = {"note": provider.note} if provider.note else {}
    if truth is not None and provider.same_loss:
        result |= compare(tuple(output), truth, inputs.factor)
        for name, limit in zip(("loss_error", "gradient_error"), LARGEST_ERROR[workload.dtype], strict=True):
            if not result[name] <= limit:
                result["failed"] = f"wrong: {name.replace('_', ' ')} {result[name]:.1e}, {limit:.0e} allowed"
                return result, None
    output.clear()
    if time.perf_counter() - start < 5:
        # What a first run allocates for itself, workspaces and the like, stays allocated.
        peak = min(peak, peak_extra_bytes(task, run.device))
        output.clear()
    return {**result, "peak_extra_mib": peak / 2**20}, step


def why_too_large(provider: Provider, workload: Workload, run: Run) -> Result | None:
    """The result of a provider that would take more of a CPU's memory than it may, or None."""
    if provider.bounded or run.device != "cpu" or workload.rows <= PREDICT_ROWS:
        return None
    needs, limit = predict_mib(provider, workload, run.device), min(run.memory, free_bytes()) / 2**20
    if needs <= limit:
        return None
    sentence = f"needs {needs / 2**10:,.0f} GiB, {limit / 2**10:,.0f} GiB may be taken"
    return {"failed": sentence, "predicted_mib": needs}


def free_bytes() -> int:
    """Memory of the host that a provider may take without pushing anything else out."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        return int(0.9 * int(available.split()[1]) * 1024)
    return int(0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def predict_mib(provider: Provider, workload: Workload, device: str) -> float:
    """The memory that a workload would take: a B + b B^2 through two small batches."""
    first, second = (_probe(provider, replace(workload, rows=rows), device) for rows in PROBE_ROWS)
    square = max(0.0, (second / PROBE_ROWS[1] - first / PROBE_ROWS[0]) / (PROBE_ROWS[1] - PROBE_ROWS[0]))
    linear = second / PROBE_ROWS[1] - square * PROBE_ROWS[1]
    return (linear * workload.rows + square * workload.rows**2) / 2**20


@cache
def _probe(provider: Provider, workload: Workload, device: str) -> int:
    inputs = make_inputs(workload, device)
    step = provider.load()
    if provider.compiled:
        step(*inputs)
    return peak_extra_bytes(lambda: step(*inputs), device)
