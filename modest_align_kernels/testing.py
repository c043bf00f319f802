"""What the tests and the benchmarks share: cases by regime, the error budget, poisoned memory, peak memory.

The budget is relative: an implementation may be at most twice as far from the float64 truth as the plain PyTorch loss
in the same dtype. A fixed tolerance would hide a few wrong rows behind many right ones; here every row counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modest_align_kernels import reference

deterministic: Any = torch.utils.deterministic  # its attributes are set by a module class that mypy cannot see
LossFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One set of inputs; ``regime`` says what it stands for."""

    regime: str
    rows: int
    columns: int
    features: int
    scale: float = 14.3
    smoothing: float = 0.1
    groups: int = 0  # how many different group ids; 0: no group ids
    column_ids: bool = False  # the columns have group ids of their own
    weighted: bool = False  # pairs weigh from 0 to 1, some of them 0
    symmetric: bool = True
    geometry: str = "pairs"  # "pairs" | "random" | "confident" | "antipodal" | "identical" rows

    def __str__(self) -> str:
        return self.regime.replace(" ", "-")


# Identical rows are not among them: their gradient is zero, and an error relative to it means nothing.
CASES = (
    Case("one pair", 1, 1, 8),
    Case("one pair with extra negatives", 1, 5, 8),
    Case("two pairs", 2, 2, 8),
    Case("odd sizes", 13, 13, 40),
    Case("extra negatives", 13, 29, 40),
    Case("one direction", 13, 29, 40, symmetric=False),
    Case("groups", 33, 33, 40, groups=12),
    Case("groups and extra negatives", 33, 70, 40, groups=12),
    Case("groups, one direction", 33, 70, 40, groups=12, symmetric=False),
    Case("groups of rows and columns", 33, 70, 40, groups=12, column_ids=True),
    Case("groups of rows and columns, one direction", 33, 40, 40, groups=5, column_ids=True, symmetric=False),
    Case("a single group: no negatives", 9, 9, 8, groups=1),
    Case("a single group of rows and columns", 9, 12, 8, groups=1, column_ids=True),
    Case("weights and groups of rows and columns", 33, 70, 40, groups=12, column_ids=True, weighted=True),
    Case("no smoothing", 64, 64, 40, smoothing=0.0),
    Case("all mass on the negatives", 64, 64, 40, smoothing=1.0),
    Case("scale 1", 64, 64, 40, scale=1.0),
    Case("scale 100", 127, 127, 64, scale=100.0),
    Case("scale 100, random pairs", 128, 128, 64, scale=100.0, geometry="random"),
    Case("scale 1000", 129, 129, 64, scale=1000.0),
    Case("scale 10000", 65, 65, 64, scale=10000.0),
    Case("confident rows", 128, 128, 64, scale=30.0, smoothing=0.0, geometry="confident"),
    Case("confident rows at scale 100", 128, 128, 64, scale=100.0, smoothing=0.0, geometry="confident"),
    Case("antipodal rows at scale 100", 64, 64, 40, scale=100.0, geometry="antipodal"),
    Case("antipodal rows at scale 1000", 64, 64, 40, scale=1000.0, geometry="antipodal"),
    Case("wide", 96, 96, 1032),
)


def make_features(
    case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Features of a case, [rows, features] and [columns, features], of norms between 0.1 and 10.

    "pairs" correlate as after some training, "confident" pairs give p in about [0.5, 1 - 1e-6], "antipodal" texts are
    all the opposite of every image, "identical" rows are all one vector.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, y = normal(case.rows, case.features), normal(case.columns, case.features)
    if case.geometry == "pairs":
        y[: case.rows] += x
    elif case.geometry == "confident":
        spread = torch.rand(case.rows, 1, generator=generator, dtype=torch.float64)
        y[: case.rows] = x + (0.2 + 2 * spread) * y[: case.rows]
    elif case.geometry in ("antipodal", "identical"):
        direction = normal(1, case.features)
        x = direction.expand_as(x).clone()
        y = (direction if case.geometry == "identical" else -direction).expand_as(y).clone()
        if case.geometry == "antipodal":  # one ordinary row and column keep their own logits in view
            x[0], y[0] = normal(case.features), normal(case.features)
    for features in (x, y):
        features *= 10 ** (2 * torch.rand(features.shape[0], 1, generator=generator, dtype=torch.float64) - 1)
    return x.to(dtype).to(device), y.to(dtype).to(device)


def make_group_ids(
    case: Case, device: torch.device | str = "cpu", seed: int = 0
) -> Tensor | tuple[Tensor, Tensor] | None:
    """Random int64 ids, not consecutive, some negative: [rows], and [columns] if the case has those; None: no groups.

    A pair's two ids differ now and then, and some columns are in no row's group.
    """
    if not case.groups:
        return None
    generator = torch.Generator().manual_seed(seed)

    def draw(groups: int, length: int) -> Tensor:
        return (torch.randint(groups, (length,), generator=generator) * 1_000_003 - 7).to(device)

    row_ids = draw(case.groups, case.rows)
    if not case.column_ids:
        return row_ids
    col_ids = draw(case.groups + case.groups // 4, case.columns)
    col_ids[: case.rows : 2] = row_ids[::2]
    return row_ids, col_ids


def make_weights(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """Float32 [rows], multiples of 1/64 (exact in every dtype) from 0 to 1, about a fifth of them 0."""
    sixty_fourths = torch.randint(-16, 65, (case.rows,), generator=torch.Generator().manual_seed(seed))
    return (sixty_fourths.clamp_min(0) / 64).to(device)


def value_and_grads(loss_fn: LossFunction, x: Tensor, y: Tensor, case: Case) -> dict[str, Tensor]:
    """The loss and its gradients by name: "loss", "image_features", "text_features", "logit_scale".

    Of several losses, [n], the gradients are their sum's.
    """
    x, y = x.detach().clone().requires_grad_(), y.detach().clone().requires_grad_()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = torch.tensor(case.scale, dtype=wide, device=x.device, requires_grad=True)
    weights = {"weights": make_weights(case, x.device).to(x.dtype)} if case.weighted else {}
    group_ids = make_group_ids(case, x.device)
    loss = loss_fn(x, y, scale, smoothing=case.smoothing, group_ids=group_ids, symmetric=case.symmetric, **weights)
    grads = torch.autograd.grad(loss.sum(), (x, y, scale))
    names = ("image_features", "text_features", "logit_scale")
    return {"loss": loss.detach(), **dict(zip(names, grads, strict=True))}


def row_errors(value: Tensor, truth: Tensor, atol: Tensor | float = 0.0) -> Tensor:
    """Each row's error past ``atol``, relative to the truth's norm of that row; a 0-dim value is one row, float64."""
    truth = truth.double().reshape(truth.shape[0] if truth.dim() else 1, -1)
    error = (value.double().reshape(truth.shape) - truth).norm(dim=1)
    return torch.where(error <= atol, 0.0, (error - atol) / truth.norm(dim=1))


def assert_within_budget(
    loss_fn: LossFunction,
    case: Case,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    factor: float = 2.0,
    seeds: int = 4,
    plain_fn: LossFunction = reference.modest_align_loss,
) -> None:
    """Loss and gradients at most ``factor`` times as wrong as ``plain_fn``'s in the same dtype, in every row.

    ``plain_fn`` materialises everything; in float64 it is the truth.

    Rows are compared by rank, over a few seeds: the worst with the worst, the median with the median, so that neither a
    lucky nor an unlucky row of the plain loss decides. What both allow on top is float32's rounding of the terms that a
    result is the sum of: of logits for the loss and for the probabilities, scale / B of a unit row for the gradients.

    Raises:
        AssertionError: names the quantity, both errors and the case.
    """
    rounding = 4 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    ours: dict[str, list[Tensor]] = {}
    plain: dict[str, list[Tensor]] = {}
    for seed in range(seeds):
        x, y = make_features(case, dtype, device, seed)
        truth = value_and_grads(plain_fn, x.double(), y.double(), case)
        unit = rounding * case.scale / max(case.rows, 1)
        atol = {
            "loss": rounding * case.scale,
            "image_features": unit / x.double().norm(dim=1),
            "text_features": unit / y.double().norm(dim=1),
            "logit_scale": rounding,
        }
        for errors, function in ((ours, loss_fn), (plain, plain_fn)):
            result = value_and_grads(function, x, y, case)
            for name, expected in truth.items():
                errors.setdefault(name, []).append(row_errors(result[name], expected, atol[name]))
    for name in ours:
        our, their = (torch.cat(errors[name]).nan_to_num(nan=torch.inf).sort().values for errors in (ours, plain))
        for what, rank in (("worst", -1), ("median", len(our) // 2)):
            limit = factor * their[rank] + rounding * max(1.0, case.scale)
            if not our[rank] <= limit:
                raise AssertionError(
                    f"{case.regime}, {dtype}: {name}'s {what} row of {len(our)} is off by {our[rank]:.3e}, "
                    f"the plain loss's by {their[rank]:.3e}"
                )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor starts as NaN (or the largest integer): an output that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would refuse without its own setting
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        deterministic.fill_uninitialized_memory = before[1]


def peak_extra_bytes(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most bytes of PyTorch's memory that ``function`` held at any time beyond what was held before."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
