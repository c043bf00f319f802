"""One loss or one operation at a time, with pytest-benchmark: `pytest benchmarks`; see README.md beside this file."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.clock import Run, Task, sentence
from benchmarks.losses import first_runs
from benchmarks.operations import OPERATIONS, measured_backends, tasks_of
from benchmarks.providers import Provider, all_providers
from benchmarks.truth import make_inputs, sampled_truth
from benchmarks.workloads import Workload

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = "bfloat16" if DEVICE == "cuda" else "float32"


def settled(task: Task) -> Task:
    """A task that is over when it returns, also on a GPU."""

    def run() -> None:
        task()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


def bench_loss(benchmark: Any, provider: Provider, rows: int, features: int) -> None:
    """Parity and memory first, then the time."""
    workload = Workload("loss", rows, features, DTYPE)
    inputs = make_inputs(workload, DEVICE)
    try:
        result, step = first_runs(provider, workload, inputs, sampled_truth(inputs), Run(DEVICE, 1))
    except (ImportError, RuntimeError) as error:
        pytest.skip(sentence(error))
    if step is None:
        assert "wrong" not in result["failed"], result["failed"]
        pytest.skip(result["failed"])
    benchmark.group = str(workload)
    benchmark.extra_info.update(result)
    benchmark.pedantic(settled(lambda: step(*inputs)), rounds=7, warmup_rounds=1)


def bench_operation(benchmark: Any, name: str, backend: str, rows: int, features: int) -> None:
    """One of a backend's five functions; the tests hold their parity."""
    inputs = make_inputs(Workload("operations", rows, features, DTYPE), DEVICE)
    task = tasks_of(backend, *(t.detach() for t in inputs[:3]))[name]
    benchmark.group = f"{name} {rows:,} x {features:,} {DTYPE}"
    benchmark.pedantic(settled(task), rounds=7, warmup_rounds=1)


@pytest.mark.parametrize("provider", all_providers(DEVICE), ids=lambda provider: str(provider.key))
@pytest.mark.parametrize("rows", [1_024, 4_096])
def test_loss(benchmark: Any, rows: int, provider: Provider) -> None:
    bench_loss(benchmark, provider, rows, 512)


@pytest.mark.parametrize("backend", measured_backends(DEVICE))
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(benchmark: Any, name: str, backend: str) -> None:
    bench_operation(benchmark, name, backend, 4_096, 512)
