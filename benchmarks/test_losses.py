"""One loss or one operation at a time, with pytest-benchmark: `pytest benchmarks`; see README.md beside this file."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import measure
from benchmarks.providers import Provider, all_providers
from benchmarks.workloads import SCALE, Workload
from modest_align_kernels import available_backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = "bfloat16" if DEVICE == "cuda" else "float32"
BACKENDS = [
    name
    for name, reason in available_backends(DEVICE).items()
    if reason is None and (name, DEVICE) != ("triton", "cpu")
]
OPERATIONS = ("perturb_normalize", "perturb_normalize_backward", "contrastive_stats", "contrastive_grads")


def settled(task: Callable[[], object]) -> Callable[[], None]:
    """A task that is over when it returns, also on a GPU."""

    def run() -> None:
        task()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


def bench_loss(benchmark: Any, provider: Provider, rows: int, features: int) -> None:
    """Parity and memory first, then the time."""
    workload = Workload("loss", rows, features, DTYPE)
    x, y = measure.make_features(rows, features, DTYPE, DEVICE)
    scale = torch.tensor(SCALE, device=DEVICE, requires_grad=True)
    truth = measure.exact(x.detach(), y.detach(), SCALE, torch.arange(min(rows, measure.SAMPLED_ROWS), device=DEVICE))
    factor = measure.LOSS_FACTOR.get(DTYPE, 1.0)
    try:
        result, step = measure.first_runs(provider, workload, (x, y, scale), factor, truth, DEVICE, math.inf)
    except (ImportError, RuntimeError) as error:
        pytest.skip(measure.sentence(error))
    if step is None:
        assert "wrong" not in result["failed"], result["failed"]
        pytest.skip(result["failed"])
    benchmark.group = str(workload)
    benchmark.extra_info.update(result)
    benchmark.pedantic(settled(lambda: step(x, y, scale, factor)), rounds=7, warmup_rounds=1)


def bench_operation(benchmark: Any, name: str, backend: str, rows: int, features: int) -> None:
    """One of a backend's four functions; the tests hold their parity."""
    x, y = (t.detach() for t in measure.make_features(rows, features, DTYPE, DEVICE))
    scale, seed = torch.tensor(SCALE, device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE)
    task = measure.operations(backend, x, y, scale, seed)[name]
    benchmark.group = f"{name} {rows:,} x {features:,} {DTYPE}"
    benchmark.pedantic(settled(task), rounds=7, warmup_rounds=1)


@pytest.mark.parametrize("provider", all_providers(DEVICE), ids=lambda provider: provider.name)
@pytest.mark.parametrize("rows", [1_024, 4_096])
def test_loss(benchmark: Any, rows: int, provider: Provider) -> None:
    bench_loss(benchmark, provider, rows, 512)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(benchmark: Any, name: str, backend: str) -> None:
    bench_operation(benchmark, name, backend, 4_096, 512)
