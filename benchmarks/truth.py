"""The tensors of a workload, the loss and its gradients in float64, and how far a provider is from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.results import Result
from benchmarks.workloads import SCALE, Workload
from modest_align_kernels.testing import row_errors

# A provider is of the same loss if its loss and its gradients (over all sampled rows) are this near to the truth.
LARGEST_ERROR = {"float32": (1e-4, 1e-3), "bfloat16": (2e-2, 0.1), "float16": (2e-2, 0.1)}
# float16 gradients of a large batch are subnormal; trainers multiply the loss, and so does every provider's step here.
LOSS_FACTOR = {"float16": 2.0**15}
SAMPLED_ROWS = 128


class Inputs(NamedTuple):
    """What a provider's step takes."""

    x: Tensor
    y: Tensor
    scale: Tensor
    factor: float


class Truth(NamedTuple):
    """The loss and its gradients in float64; those of the features for ``sample``'s rows only."""

    sample: Tensor | slice
    loss: Tensor
    image_grad: Tensor
    text_grad: Tensor
    scale_grad: Tensor


def make_inputs(workload: Workload, device: str) -> Inputs:
    """Pairs of cosine 0.7 or so, as after some training: [B, D] each for the loss, not normalised."""
    generator = torch.Generator(device).manual_seed(0)
    features, dtype = workload.features, getattr(torch, workload.dtype)
    x, y = (torch.randn(rows, features, generator=generator, device=device) for rows in workload.sides)
    y[: len(x)] += x
    scale = torch.tensor(SCALE, device=device, requires_grad=True)
    factor = LOSS_FACTOR.get(workload.dtype, 1.0)
    return Inputs(x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_(), scale, factor)


def sampled_truth(inputs: Inputs) -> Truth:
    """The truth of a workload, for SAMPLED_ROWS rows spread evenly."""
    rows = len(inputs.x)
    count = min(SAMPLED_ROWS, rows)
    return exact(inputs.x, inputs.y, SCALE, torch.arange(count, device=inputs.x.device) * rows // count)


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
        "loss_error": distance(loss, truth.loss),
        "gradient_error": distance(found, expected),
        "worst_row_error": float(row_errors(found, expected).max()),
    }
    if scale_grad is not None:
        errors["scale_error"] = distance(scale_grad.double() / factor, truth.scale_grad)
    return errors


def distance(value: Tensor, truth: Tensor) -> float:
    """The norm of the difference, relative to the truth's."""
    value, truth = value.double(), truth.double()
    return float((value - truth).norm() / truth.norm())
