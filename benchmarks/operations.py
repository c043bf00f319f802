"""A backend's five functions, each beside its own floor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.clock import Run, Task, failure, floor, interleave
from benchmarks.results import Key, Result, floor_of
from benchmarks.truth import LARGEST_ERROR, distance, make_inputs
from benchmarks.workloads import Workload
from modest_align_kernels import available_backends, ops
from modest_align_kernels.dispatch import operand_dtype
from modest_align_kernels.noise import IMAGES, TEXTS

OPERATIONS = (
    "perturb_normalize",
    "perturb_normalize_backward",
    "pair_losses",
    "contrastive_stats",
    "contrastive_grads",
)
SMOOTHING = 0.1  # of pair_losses, which without it are vectors of length B alone
L2_BYTES = 2**28


class Work(NamedTuple):
    """The bytes that an operation must move and the floating-point operations that it must do."""

    bytes: int
    flops: int


def backends(device: str) -> dict[str, str | None]:
    """Every backend, and why it is not measured on "cpu" or "cuda", or None."""
    found = available_backends(device)
    if device == "cpu" and found.get("triton", "") is None:
        found["triton"] = "Triton's interpreter is no measure of speed"
    return found


def measured_backends(device: str) -> list[str]:
    """The backends that are measured."""
    return [backend for backend, reason in backends(device).items() if reason is None]


def element_bytes(workload: Workload, device: str) -> dict[str, int]:
    """The bytes of a feature and of a matmul's operand, for :func:`work`."""
    dtype = getattr(torch, workload.dtype)
    operand = operand_dtype(dtype, torch.device(device), "eager")
    return {"feature_bytes": dtype.itemsize, "operand_bytes": operand.itemsize}


def work(operation: str, rows: int, features: int, feature_bytes: int, operand_bytes: int) -> Work:
    """An operation's work for B = N = ``rows``; of the first two, one side's.

    Left out are vectors of length B, O(B D) flops, and the B N exponentials of each of the last two. The second is
    without smoothing, which would read the pairs' rows once more.
    """
    elements, matmul = rows * features, 2 * rows * rows * features
    return {
        "perturb_normalize": Work(elements * (feature_bytes + operand_bytes), 0),
        # read: the gradient, its own and its pair's rows
        "perturb_normalize_backward": Work(elements * (4 + 2 * operand_bytes + feature_bytes), 0),
        # read: both sides' rows, which a backend reads twice
        "pair_losses": Work(2 * elements * operand_bytes, 0),
        "contrastive_stats": Work(2 * elements * operand_bytes, matmul),
        "contrastive_grads": Work(2 * elements * (operand_bytes + 4), 3 * matmul),
    }[operation]


def tasks_of(backend: str, x: Tensor, y: Tensor, scale: Tensor) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """A backend's five functions on the tensors of a training step: images normalised with noise, and so on."""
    operand = operand_dtype(x.dtype, x.device, backend)
    noise = torch.zeros((), dtype=torch.int64, device=x.device), torch.full_like(scale, 0.02)
    normalize = partial(ops.perturb_normalize, operand_dtype=operand, backend=backend)
    perturb_normalize = partial(normalize, x, *noise, IMAGES, False, None)
    x_hat, inv_norm, _ = perturb_normalize()
    y_hat, _, dot = normalize(y, *noise, TEXTS, False, x_hat)
    logits, excluded, where = (x_hat, y_hat, scale), (None, None, True), {"backend": backend}
    # As in a step: what a backend keeps for the backward is kept.
    stats = partial(ops.contrastive_stats, *logits, *excluded, col_count=len(x), keep=True, **where)
    *lse, exponentials = stats()
    smoothing = torch.full_like(scale, SMOOTHING)
    pair_losses = partial(ops.pair_losses, *lse, dot, scale, smoothing, x_hat, y_hat, None, None, **where)
    _, *weights, pair_weight = pair_losses()[:4]
    softmaxes = *lse, *weights, *excluded, exponentials
    grads = partial(ops.contrastive_grads, *logits, *softmaxes, want_x=True, want_y=True, **where)
    grad_x, _ = grads()
    unsmoothed = None, None, None, dot, dot
    backward = partial(ops.perturb_normalize_backward, features=x.shape[1], dtype=x.dtype, **where)
    return {
        "perturb_normalize": perturb_normalize,
        "perturb_normalize_backward": partial(
            backward, grad_x, x_hat, inv_norm, y_hat, pair_weight, scale, scale, *unsmoothed
        ),
        "pair_losses": pair_losses,
        "contrastive_stats": stats,
        "contrastive_grads": grads,
    }


def measure(workload: Workload, run: Run, chosen: list[str] | None = None) -> dict[Key, Result]:
    """The five functions of every backend that runs here, or of ``chosen``, each with "seconds", and so their floors.

    The floor of ``contrastive_stats`` is one matmul of the shape and ``contrastive_grads``'s is three; the others' is a
    copy of the bytes that they must move.
    """
    rows, features, device = workload.rows, workload.features, run.device
    x, y, scale = (t.detach() for t in make_inputs(workload, device)[:3])
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device=device) if device == "cuda" else None
    tasks: dict[Key, Task] = {}
    expected: dict[str, tuple[Tensor, ...]] = {}
    results: dict[Key, Result] = {}
    for backend in measured_backends(device) if chosen is None else chosen:
        run.progress(backend)
        try:
            mine = tasks_of(backend, x, y, scale)
            for name, task in mine.items():
                output = task()
                for value, truth in zip(output, expected.setdefault(name, output), strict=True):
                    if not (value.numel() and truth.numel()):  # images are paired with nothing, eager keeps nothing
                        continue
                    error = distance(*(t[:, :features] if t.dim() == 2 else t for t in (value, truth)))
                    assert error <= LARGEST_ERROR[workload.dtype][1], f"{name}: differs by {error:.1e} from eager"
        except Exception as error:
            results[Key("contrastive_stats", backend)] = failure(error, backend, device)
            continue
        tasks |= {Key(name, backend): task for name, task in mine.items()}
    del expected
    operand = operand_dtype(x.dtype, x.device, "eager")
    matmuls = floor_of("four matmuls")
    tasks[matmuls] = floor(x.to(operand), y.to(operand))
    for name in ("perturb_normalize", "perturb_normalize_backward", "pair_losses"):
        half = work(name, rows, features, x.element_size(), operand.itemsize).bytes // 2
        source, target = (torch.empty(half, dtype=torch.int8, device=device) for _ in range(2))
        tasks[floor_of(name)] = partial(target.copy_, source)
    interleave(tasks, results, run, flush)
    four = results.pop(matmuls)["seconds"]
    for name, count in (("contrastive_stats", 1), ("contrastive_grads", 3)):
        results[floor_of(name)] = {"seconds": [t * count / 4 for t in four]}
    return results
