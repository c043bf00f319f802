"""How things are measured: the exact truth, parity before time, interleaved rounds, memory, and the floor."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.providers import PLAIN, Provider, Step
from benchmarks.workloads import LATENT_FEATURES, SCALE, Workload
from modest_align_kernels import available_backends, ops
from modest_align_kernels.dispatch import operand_dtype
from modest_align_kernels.testing import peak_extra_bytes, row_errors

# A provider is of the same loss if its loss and its gradients (over all sampled rows) are this near to the truth.
LARGEST_ERROR = {"float32": (1e-4, 1e-3), "bfloat16": (2e-2, 0.1), "float16": (2e-2, 0.1)}
# float16 gradients of a large batch are subnormal; trainers multiply the loss, and so does every provider's step here.
LOSS_FACTOR = {"float16": 2.0**15}
SAMPLED_ROWS = 128
# B * B * D past which the truth in float64 would take minutes.
LARGEST_TRUTH = {"cpu": 32_768**2 * 512, "cuda": 262_144**2 * 512}
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
L2_BYTES = 2**28
# Where a batch can take the whole memory of a CPU, it is predicted from two small ones instead of tried.
PREDICT_ROWS = 8_192
PROBE_ROWS = (1_024, 2_048)

Result = dict[str, Any]


class LostDeviceError(RuntimeError):
    """A kernel has broken the GPU's context: nothing more can be measured in this process."""


class Truth(NamedTuple):
    """The loss and its gradients in float64; those of the features for ``sample``'s rows only."""

    sample: Tensor
    loss: Tensor
    image_grad: Tensor
    text_grad: Tensor
    scale_grad: Tensor


def make_features(rows: int, features: int, dtype: str, device: str) -> tuple[Tensor, Tensor]:
    """Pairs of cosine 0.7 or so, as after some training: [rows, features] each, not normalised."""
    generator = torch.Generator(device).manual_seed(0)
    x, y = (torch.randn(rows, features, generator=generator, device=device) for _ in range(2))
    y += x
    return x.to(getattr(torch, dtype)).requires_grad_(), y.to(getattr(torch, dtype)).requires_grad_()


@torch.no_grad()
def exact(x: Tensor, y: Tensor, scale: float, sample: Tensor) -> Truth:
    """The symmetric loss in float64 in blocks of rows, and its gradients by the formulas of the loss's definition.

    Args:
        x: [B, D], not normalised.
        y: [B, D].
        scale: at most 300, so that exp(-2 * scale) is a normal number.
        sample: int64 indices of the rows whose gradients are wanted, of both sides.
    """
    rows = len(x)
    x_norm, y_norm = (torch.linalg.vector_norm(t.double(), dim=1).clamp_min(1e-12) for t in (x, y))
    x_hat, y_hat = x.double() / x_norm[:, None], y.double() / y_norm[:, None]
    positive = scale * (x_hat * y_hat).sum(1)
    row_sum, row_dot, col_sum, col_dot = (torch.zeros_like(positive) for _ in range(4))
    size = 2**24 if x.device.type == "cpu" else 2**27
    for block in torch.arange(rows, device=x.device).split(max(1, size // rows)):
        logits = (scale * x_hat[block]) @ y_hat.T
        weights = (logits - scale).exp_()
        row_sum[block] = weights.sum(1)
        col_sum += weights.sum(0)
        weights *= logits
        row_dot[block] = weights.sum(1)
        col_dot += weights.sum(0)
    loss = (row_sum.log().mean() + col_sum.log().mean()) / 2 + scale - positive.mean()
    scale_grad = (((row_dot / row_sum).mean() + (col_dot / col_sum).mean()) / 2 - positive.mean()) / scale

    def grad(own: Tensor, other: Tensor, norm: Tensor, own_sum: Tensor, other_sum: Tensor) -> Tensor:
        weights = ((scale * own[sample]) @ other.T - scale).exp_()
        weights = weights / own_sum[sample, None] + weights / other_sum
        weights[torch.arange(len(sample)), sample] -= 2
        g = scale / (2 * rows) * (weights @ other)
        g -= own[sample] * (own[sample] * g).sum(1, keepdim=True)
        return g / norm[sample, None]

    return Truth(
        sample,
        loss,
        grad(x_hat, y_hat, x_norm, row_sum, col_sum),
        grad(y_hat, x_hat, y_norm, col_sum, row_sum),
        scale_grad,
    )


def compare(step_result: tuple[Tensor, ...], truth: Truth, factor: float) -> Result:
    """A provider's relative errors: of the loss, the gradients of the sampled rows and their worst row, the scale."""
    loss, image_grad, text_grad, scale_grad = step_result
    found = torch.cat([grad[truth.sample].double() / factor for grad in (image_grad, text_grad)])
    expected = torch.cat([truth.image_grad, truth.text_grad])
    errors = {
        "loss_error": _distance(loss, truth.loss),
        "gradient_error": _distance(found, expected),
        "worst_row_error": float(row_errors(found, expected).max()),
    }
    if scale_grad is not None:
        errors["scale_error"] = _distance(scale_grad.double() / factor, truth.scale_grad)
    return errors


def timed(task: Callable[[], object], device: str, flush: Tensor | None = None) -> float:
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


def interleave(
    tasks: dict[str, Callable[[], object]],
    device: str,
    rounds: int,
    failed: Callable[[str, Exception], None],
    flush: Tensor | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, list[float]]:
    """Seconds of every task, one run a round, each round in another order, so that noise hits all alike.

    Args:
        tasks: By name; all have run before.
        device: "cpu" or "cuda".
        rounds: At most; fewer where they take long.
        failed: Told of a task that raises; it takes no further part.
        flush: See :func:`timed`.
        progress: Told what runs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    broken: set[str] = set()
    gc.collect()
    gc.disable()  # as timeit does: a collection would hit whoever runs just then
    start = time.perf_counter()
    try:
        for r in range(rounds):
            spent = time.perf_counter() - start
            if spent > SHARE_SECONDS[device] and (r >= LEAST_ROUNDS or spent / r > LONG_SECONDS[device]):
                break
            names = list(tasks)
            for name in names[r % len(names) :] + names[: r % len(names)]:
                if name in broken:
                    continue
                progress(f"{name}, round {r + 1}")
                try:
                    if not seconds[name] or seconds[name][-1] < SHORT_SECONDS:
                        tasks[name]()
                    seconds[name].append(timed(tasks[name], device, flush))
                except Exception as error:
                    broken.add(name)
                    failed(name, error)
    finally:
        gc.enable()
    return {name: taken for name, taken in seconds.items() if name not in broken}


def sentence(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    text = text if type(error) in (RuntimeError, AssertionError) else f"{type(error).__name__}: {text}"
    return (text[:157] + "...") if len(text) > 160 else text


def check_device(device: str, culprit: str) -> None:
    """Raise LostDeviceError if a kernel of ``culprit`` has broken the GPU's context."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise LostDeviceError(f"{culprit} has broken the GPU's context ({sentence(error)})") from error


def free_bytes() -> int:
    """Memory of the host that a provider may take without pushing anything else out."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        return int(0.9 * int(available.split()[1]) * 1024)
    return int(0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def measure_losses(
    workload: Workload,
    providers: list[Provider],
    device: str,
    rounds: int,
    memory: float = math.inf,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Result]:
    """Every provider on one workload: errors, peak memory, then seconds side by side with the floor.

    Args:
        workload: What to measure.
        providers: Who takes part.
        device: "cpu" or "cuda".
        rounds: At most so many.
        memory: Bytes that a provider may take; more is predicted, not tried, on a CPU.
        progress: Told what runs.

    Returns:
        By provider "seconds" (one a round, the same rounds for all), "peak_extra_mib" and :func:`compare`'s errors;
        or "failed", a sentence.
    """
    x, y = make_features(workload.rows, workload.features, workload.dtype, device)
    scale = torch.tensor(SCALE, device=device, requires_grad=True)
    factor = LOSS_FACTOR.get(workload.dtype, 1.0)
    truth = None
    if workload.rows**2 * workload.features <= LARGEST_TRUTH[device]:
        progress("float64")
        count = min(SAMPLED_ROWS, workload.rows)
        sample = torch.arange(count, device=device) * workload.rows // count
        truth = exact(x.detach(), y.detach(), SCALE, sample)
    results: dict[str, Result] = {}
    tasks: dict[str, Callable[[], object]] = {"floor": floor(x.detach(), y.detach())}
    for provider in providers:
        progress(provider.name)
        try:
            results[provider.name], step = first_runs(provider, workload, (x, y, scale), factor, truth, device, memory)
        except Exception as error:
            check_device(device, provider.name)
            results[provider.name] = {"failed": sentence(error)}
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
                results[provider.name] |= _wall(provider, workload, device)
            continue
        if step is not None:
            tasks[provider.name] = lambda step=step: step(x, y, scale, factor)  # type: ignore[misc]

    def failed(name: str, error: Exception) -> None:
        check_device(device, name)
        results[name] = {"failed": sentence(error)}

    tasks["floor"]()
    for name, taken in interleave(tasks, device, rounds, failed, progress=progress).items():
        results.setdefault(name, {})["seconds"] = taken
    return results


def first_runs(
    provider: Provider,
    workload: Workload,
    tensors: tuple[Tensor, Tensor, Tensor],
    factor: float,
    truth: Truth | None,
    device: str,
    memory: float,
) -> tuple[Result, Step | None]:
    """A provider's errors and memory, and its step; no step but "failed" if it cannot run here, or is wrong.

    Whatever the provider raises is raised.
    """
    reason = provider.why_not(device, workload.dtype)
    if reason is not None:
        return {"failed": reason}, None
    if device == "cpu" and workload.rows > PREDICT_ROWS:
        wall = _wall(provider, workload, device)
        limit = min(memory, free_bytes())
        if wall["predicted_mib"] * 2**20 > limit:
            needs = wall["predicted_mib"] / 2**10
            return {"failed": f"needs {needs:,.0f} GiB, {limit / 2**30:,.0f} GiB may be taken", **wall}, None
    step = provider.load()
    if provider.compiled:
        step(*tensors, factor)
    output: list[Any] = []

    def run() -> None:
        output[:] = step(*tensors, factor)

    start = time.perf_counter()
    peak = peak_extra_bytes(run, device)
    result: Result = {"note": provider.note} if provider.note else {}
    if truth is not None and provider.same_loss:
        result |= compare(tuple(output), truth, factor)
        for name, limit in zip(("loss_error", "gradient_error"), LARGEST_ERROR[workload.dtype], strict=True):
            if not result[name] <= limit:
                result["failed"] = f"wrong: {name.replace('_', ' ')} {result[name]:.1e}, {limit:.0e} allowed"
                return result, None
    output.clear()
    if time.perf_counter() - start < 5:
        # What a first run allocates for itself, workspaces and the like, stays allocated.
        peak = min(peak, peak_extra_bytes(run, device))
        output.clear()
    return {**result, "peak_extra_mib": peak / 2**20}, step


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


def _wall(provider: Provider, workload: Workload, device: str) -> Result:
    """The memory that a workload would take: a B + b B^2 through two small batches."""
    first, second = (_probe(provider, rows, workload.features, workload.dtype, device) for rows in PROBE_ROWS)
    square = max(0.0, (second / PROBE_ROWS[1] - first / PROBE_ROWS[0]) / (PROBE_ROWS[1] - PROBE_ROWS[0]))
    linear = second / PROBE_ROWS[1] - square * PROBE_ROWS[1]
    return {"predicted_mib": (linear * workload.rows + square * workload.rows**2) / 2**20}


@cache
def _probe(provider: Provider, rows: int, features: int, dtype: str, device: str) -> int:
    x, y = make_features(rows, features, dtype, device)
    scale = torch.tensor(SCALE, device=device, requires_grad=True)
    step = provider.load()
    if provider.compiled:
        step(x, y, scale, LOSS_FACTOR.get(dtype, 1.0))
    return peak_extra_bytes(lambda: step(x, y, scale, LOSS_FACTOR.get(dtype, 1.0)), device)


def measure_operations(
    workload: Workload,
    device: str,
    rounds: int,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Result]:
    """The four functions of every backend that runs here, each beside its own floor.

    The floor of ``contrastive_stats`` is one matmul of the shape and ``contrastive_grads``'s is three; the others' is a
    copy of the bytes that they must move (see :func:`operation_model`).

    Returns:
        By "operation, backend" (or "operation, floor"): "seconds".
    """
    rows, features = workload.rows, workload.features
    x, y = (t.detach() for t in make_features(rows, features, workload.dtype, device))
    scale = torch.tensor(SCALE, device=device)
    seed = torch.zeros((), dtype=torch.int64, device=device)
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device=device) if device == "cuda" else None
    tasks: dict[str, Callable[[], object]] = {}
    expected: dict[str, tuple[Tensor, ...]] = {}
    results: dict[str, Result] = {}
    for backend, reason in available_backends(device).items():
        if reason is not None or (backend, device) == ("triton", "cpu"):
            continue
        progress(backend)
        try:
            mine = operations(backend, x, y, scale, seed)
            for name, task in mine.items():
                output = task()
                for value, truth in zip(output, expected.setdefault(name, output), strict=True):
                    error = _distance(*(t[:, :features] if t.dim() == 2 else t for t in (value, truth)))
                    assert error <= LARGEST_ERROR[workload.dtype][1], f"{name}: differs by {error:.1e} from eager"
        except Exception as error:
            check_device(device, backend)
            results[f"contrastive_stats, {backend}"] = {"failed": sentence(error)}
            continue
        tasks |= {f"{name}, {backend}": task for name, task in mine.items()}
    del expected
    one = floor(x, y)  # four matmuls: divided below
    operand = operand_dtype(x.dtype, x.device, "eager")
    if operand != x.dtype:
        one = floor(x.to(operand), y.to(operand))
    tasks["matmul, floor"] = one
    for name in ("perturb_normalize", "perturb_normalize_backward"):
        half = int(operation_model(name, rows, features, x.element_size(), operand.itemsize)["bytes"]) // 2
        source, target = (torch.empty(half, dtype=torch.int8, device=device) for _ in range(2))
        tasks[f"{name}, floor"] = lambda source=source, target=target: target.copy_(source)  # type: ignore[misc]

    def failed(name: str, error: Exception) -> None:
        check_device(device, name)
        results[name] = {"failed": sentence(error)}

    taken = interleave(tasks, device, rounds, failed, flush, progress)
    four = taken.pop("matmul, floor")
    taken["contrastive_stats, floor"] = [t / 4 for t in four]
    taken["contrastive_grads, floor"] = [t * 3 / 4 for t in four]
    return results | {name: {"seconds": seconds} for name, seconds in taken.items()}


def operations(
    backend: str, x: Tensor, y: Tensor, scale: Tensor, seed: Tensor
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """A backend's four functions on the tensors of a training step: images normalised with noise, and so on."""
    features = x.shape[1]
    operand = operand_dtype(x.dtype, x.device, backend)
    x_hat, inv_norm = ops.perturb_normalize(x, seed, 0, 0.02, False, operand, backend=backend)
    y_hat, _ = ops.perturb_normalize(y, seed, 1, 0.02, False, operand, backend=backend)
    positive, row_lse, col_lse = ops.contrastive_stats(x_hat, y_hat, scale, None, True, backend=backend)
    row_lse, col_lse = torch.logaddexp(row_lse, positive), torch.logaddexp(col_lse, positive)
    lse = (row_lse, col_lse)
    grad_x, _ = ops.contrastive_grads(x_hat, y_hat, scale, *lse, None, True, True, backend=backend)
    offset = torch.zeros(2, x_hat.shape[1], device=x.device)
    backward = (grad_x, x_hat, inv_norm, y_hat, -torch.ones_like(positive), offset, scale, features, x.dtype)
    return {
        "perturb_normalize": lambda: ops.perturb_normalize(x, seed, 0, 0.02, False, operand, backend=backend),
        "perturb_normalize_backward": lambda: ops.perturb_normalize_backward(*backward, backend=backend),
        "contrastive_stats": lambda: ops.contrastive_stats(x_hat, y_hat, scale, None, True, backend=backend),
        "contrastive_grads": lambda: ops.contrastive_grads(
            x_hat, y_hat, scale, *lse, None, True, True, backend=backend
        ),
    }


def _distance(value: Tensor, truth: Tensor) -> float:
    value, truth = value.double(), truth.double()
    return float((value - truth).norm() / truth.norm())


def operation_model(name: str, rows: int, features: int, feature_bytes: int, operand_bytes: int) -> dict[str, float]:
    """The bytes that an operation must move and the floating-point operations that it must do, for B = N = ``rows``.

    Vectors of length B are left out. See benchmarks/README.md.
    """
    elements = rows * features
    matmul = 2.0 * rows * rows * features
    return {
        "perturb_normalize": {"bytes": elements * (feature_bytes + operand_bytes), "flops": 0.0},
        "perturb_normalize_backward": {"bytes": elements * (4 + 2 * operand_bytes + feature_bytes), "flops": 0.0},
        "contrastive_stats": {"bytes": 2 * elements * operand_bytes, "flops": matmul},
        "contrastive_grads": {"bytes": 2 * elements * (operand_bytes + 4), "flops": 3 * matmul},
    }[name]


class _PlainLoss(torch.nn.Module):
    """The plain loss in the reference trainer's place for a loss, with its smoothing."""

    def __init__(self, scale: float, smoothing: float) -> None:
        super().__init__()
        self.log_scale = torch.nn.Parameter(torch.tensor(math.log(scale)))
        self.smoothing = smoothing

    def forward(self, x: Tensor, y: Tensor, group_ids: None = None) -> Tensor:
        logits = self.log_scale.exp() * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
        target, rows = torch.arange(len(x), device=x.device), len(x)
        smoothing = self.smoothing * rows / (rows - 1)  # PyTorch's also gives mass to the positive
        both = (F.cross_entropy(each, target, label_smoothing=smoothing) for each in (logits, logits.T))
        return sum(both) / 2  # type: ignore[return-value]


class _NoLoss(_PlainLoss):
    """Gradients of the right shapes at no cost: what is left of a step without its loss."""

    def forward(self, x: Tensor, y: Tensor, group_ids: None = None) -> Tensor:
        return (x.float().mean() + y.float().mean()) * self.log_scale.exp()


def measure_step(
    workload: Workload,
    device: str,
    rounds: int,
    memory: float = math.inf,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Result]:
    """One training step of the reference trainer: adapters forward, loss, backward, AdamW.

    Returns:
        By loss ("no loss", "plain", "ours (backend)"): "seconds" and "peak_extra_mib" of the whole step.
    """
    from modest_align_train.settings import Settings
    from modest_align_train.train import Aligner, training_step

    rows = workload.rows
    generator = torch.Generator(device).manual_seed(0)
    image, text = (
        F.normalize(torch.randn(rows, features, generator=generator, device=device), dim=1)
        for features in LATENT_FEATURES
    )
    backends = [
        name
        for name, reason in available_backends(device).items()
        if reason is None and (name, device) != ("triton", "cpu")
    ]
    settings = Settings(latents=Path(), output=Path(), batch_size=rows, embedding_dim=workload.features)
    modules = {"no loss": _NoLoss, "plain": _PlainLoss, **{f"ours ({backend})": None for backend in backends}}
    tasks: dict[str, Callable[[], object]] = {}
    results: dict[str, Result] = {}
    values: dict[str, float] = {}
    for name, module in modules.items():
        progress(name)
        if name == "plain" and device == "cpu" and rows > PREDICT_ROWS:
            needs = _wall(PLAIN, workload, device)["predicted_mib"] * 2**20
            if needs > min(memory, free_bytes()):
                results[name] = {"failed": f"needs {needs / 2**30:,.0f} GiB"}
                continue
        mine = replace(settings, backend="auto" if module else name[6:-1])
        torch.manual_seed(0)
        aligner = Aligner(*LATENT_FEATURES, mine)
        if module:
            aligner.loss = module(mine.scale, mine.smoothing)
        aligner.to(device).train()
        optimizer = torch.optim.AdamW(aligner.parameters(), lr=mine.learning_rate, fused=True)

        def run(aligner: Any = aligner, optimizer: Any = optimizer, mine: Any = mine) -> Tensor:
            return training_step(aligner, optimizer, image, text, None, mine)

        try:
            torch.manual_seed(1)
            values[name] = float(run())
            results[name] = {"peak_extra_mib": peak_extra_bytes(run, device) / 2**20}
            if name.startswith("ours") and "plain" in values:
                error = abs(values[name] / values["plain"] - 1)
                assert error <= LARGEST_ERROR["bfloat16"][0], f"its loss differs by {error:.1e} from the plain one"
        except Exception as error:
            check_device(device, name)
            results[name] = {"failed": sentence(error)}
            continue
        tasks[name] = run

    def failed(name: str, error: Exception) -> None:
        check_device(device, name)
        results[name] = {"failed": sentence(error)}

    for name, taken in interleave(tasks, device, rounds, failed, progress=progress).items():
        results[name]["seconds"] = taken
    return results
