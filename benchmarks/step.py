"""One training step of the reference trainer, with each loss and without one."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.clock import Run, Task, failure, interleave
from benchmarks.losses import why_too_large
from benchmarks.operations import measured_backends
from benchmarks.providers import PLAIN_PROVIDER, plain_loss
from benchmarks.results import PLAIN, Key, Result
from benchmarks.truth import LARGEST_ERROR
from benchmarks.workloads import LATENT_FEATURES, Workload
from modest_align_kernels.testing import peak_extra_bytes

NO_LOSS = Key("no loss")


class _PlainLoss(torch.nn.Module):
    """The plain loss in the reference trainer's place for a loss, with its smoothing."""

    def __init__(self, scale: float, smoothing: float) -> None:
        super().__init__()
        self.log_scale = torch.nn.Parameter(torch.tensor(math.log(scale)))
        self.smoothing = smoothing

    def forward(self, x: Tensor, y: Tensor, group_ids: None = None) -> Tensor:
        # PyTorch's smoothing also gives mass to the positive.
        return plain_loss(x, y, self.log_scale.exp(), self.smoothing * len(x) / (len(x) - 1))


class _NoLoss(_PlainLoss):
    """Gradients of the right shapes at no cost: what is left of a step without its loss."""

    def forward(self, x: Tensor, y: Tensor, group_ids: None = None) -> Tensor:
        return (x.float().mean() + y.float().mean()) * self.log_scale.exp()


MODULES = {NO_LOSS: _NoLoss, PLAIN: _PlainLoss}


def make_step(key: Key, image: Tensor, text: Tensor, features: int) -> Task:
    """The trainer's step with the loss of ``key``: adapters forward, loss, backward, AdamW."""
    from modest_align_train.settings import Settings
    from modest_align_train.train import Aligner, training_step

    settings = Settings(
        latents=Path(), output=Path(), batch_size=len(image), embedding_dim=features, backend=key.backend or "auto"
    )
    torch.manual_seed(0)
    aligner = Aligner(*LATENT_FEATURES, settings)
    if key in MODULES:
        aligner.loss = MODULES[key](settings.scale, settings.smoothing)
    aligner.to(image.device).train()
    optimizer = torch.optim.AdamW(aligner.parameters(), lr=settings.learning_rate, fused=True)
    return partial(training_step, aligner, optimizer, image, text, None, settings)


def measure(workload: Workload, run: Run, chosen: list[str] | None = None) -> dict[Key, Result]:
    """The step with no loss, the plain one and each backend's, or those of ``chosen``.

    Returns:
        "seconds" and "peak_extra_mib" of the whole step.
    """
    generator = torch.Generator(run.device).manual_seed(0)
    image, text = (
        F.normalize(torch.randn(workload.rows, features, generator=generator, device=run.device), dim=1)
        for features in LATENT_FEATURES
    )
    tasks: dict[Key, Task] = {}
    results: dict[Key, Result] = {}
    values: dict[Key, float] = {}
    backends = measured_backends(run.device) if chosen is None else chosen
    for key in (*MODULES, *(Key("ours", backend) for backend in backends)):
        run.progress(str(key))
        too_large = why_too_large(PLAIN_PROVIDER, workload, run) if key == PLAIN else None
        if too_large is not None:
            results[key] = too_large
            continue
        task = make_step(key, image, text, workload.features)
        try:
            torch.manual_seed(1)
            values[key] = float(task())  # type: ignore[arg-type]
            results[key] = {"peak_extra_mib": peak_extra_bytes(task, run.device) / 2**20}
            if key.ours and PLAIN in values:
                error = abs(values[key] / values[PLAIN] - 1)
                assert error <= LARGEST_ERROR["bfloat16"][0], f"its loss differs by {error:.1e} from the plain one"
        except Exception as error:
            results[key] = failure(error, key, run.device)
            continue
        tasks[key] = task
    interleave(tasks, results, run)
    return results
