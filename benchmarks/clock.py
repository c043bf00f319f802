"""Time: interleaved rounds, what a task that fails becomes, and the floor."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.results import Key, Result

# Shorter runs are preceded by one that is not timed: caches and clocks are then their own, not their predecessor's.
SHORT_SECONDS = 0.05
ROUNDS = {"cpu": 7, "cuda": 20}
# No further round of a workload starts after so many seconds, once there are LEAST_ROUNDS or one takes LONG_SECONDS.
SHARE_SECONDS = {"cpu": 20.0, "cuda": 6.0}
LEAST_ROUNDS = 3
LONG_SECONDS = {"cpu": 200.0, "cuda": 10.0}
# The floor's output is this large at most: on a CPU it then stays in the cache, as a loss's block of logits does.
FLOOR_BYTES = {"cpu": 2**24, "cuda": 2**31}
FLOOR_COLUMNS = {"cpu": 2**13, "cuda": 2**17}

Task = Callable[[], object]


class LostDeviceError(RuntimeError):
    """A kernel has broken the GPU's context: nothing more can be measured in this process."""


class Run(NamedTuple):
    """How to measure.

    Attributes:
        device: "cpu" or "cuda".
        rounds: At most so many.
        memory: Bytes that a loss may take; more is predicted, not tried, on a CPU.
        progress: Told what runs.
    """

    device: str
    rounds: int
    memory: float = math.inf
    progress: Callable[[str], object] = lambda text: None


def timed(task: Task, device: str, flush: Tensor | None = None) -> float:
    """Seconds of one run, on the device's own clock.

    Args:
        task: What to run.
        device: "cpu" or "cuda".
        flush: Larger than the L2 cache; overwritten first, which also hides the time of the launches.
    """
    if device == "cpu":
        start = time.perf_counter()
        task()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if flush is not None:
        flush.zero_()
    first.record()
    task()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


def interleave(tasks: dict[Key, Task], results: dict[Key, Result], run: Run, flush: Tensor | None = None) -> None:
    """Time every task once a round, each round in another order, so that noise hits all alike.

    Args:
        tasks: All have run before.
        results: Gets each task's "seconds", or "failed" alone if it raises; it then takes no further part.
        run: See :class:`Run`; fewer rounds where they take long.
        flush: See :func:`timed`.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in tasks}
    gc.collect()
    gc.disable()  # as timeit does: a collection would hit whoever runs just then
    start = time.perf_counter()
    try:
        for r in range(run.rounds):
            spent = time.perf_counter() - start
            if spent > SHARE_SECONDS[run.device] and (r >= LEAST_ROUNDS or spent / r > LONG_SECONDS[run.device]):
                break
            keys = list(tasks)
            for key in keys[r % len(keys) :] + keys[: r % len(keys)]:
                if key not in seconds:
                    continue
                run.progress(f"{key}, round {r + 1}")
                try:
                    if not seconds[key] or seconds[key][-1] < SHORT_SECONDS:
                        tasks[key]()
                    seconds[key].append(timed(tasks[key], run.device, flush))
                except Exception as error:
                    del seconds[key]
                    results[key] = failure(error, key, run.device)
    finally:
        gc.enable()
    for key, taken in seconds.items():
        results.setdefault(key, {})["seconds"] = taken


def failure(error: Exception, culprit: object, device: str) -> Result:
    """The result of what raised ``error``; LostDeviceError if it has broken the GPU's context."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as lost:
            raise LostDeviceError(f"{culprit} has broken the GPU's context ({sentence(lost)})") from lost
    return {"failed": sentence(error)}


def sentence(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    text = text if type(error) in (RuntimeError, AssertionError) else f"{type(error).__name__}: {text}"
    return (text[:157] + "...") if len(text) > 160 else text


def floor(x: Tensor, y: Tensor) -> Callable[[], None]:
    """Four matmuls of the shape and dtype, [B, D] by [D, B]: the least work of an exact loss that stores no logits.

    Their output is one buffer of at most FLOOR_BYTES, written block after block; flat strips would be slower.
    """
    rows = len(x)
    width = min(rows, FLOOR_COLUMNS[x.device.type])
    height = max(1, min(rows, FLOOR_BYTES[x.device.type] // (width * x.element_size())))
    scratch = torch.empty(height, width, dtype=x.dtype, device=x.device)

    def run() -> None:
        for _ in range(4):
            for i in range(0, rows, height):
                for j in range(0, rows, width):
                    x_block, y_block = x[i : i + height], y[j : j + width]
                    torch.mm(x_block, y_block.T, out=scratch[: len(x_block), : len(y_block)])

    return run
