"""The loss as a module: a drop-in for open_clip's ClipLoss call."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from modest_align_kernels.functional import check_number, modest_align_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ModestAlignLoss(nn.Module):
    """The contrastive loss of Modest-Align; see :func:`modest_align_kernels.modest_align_loss` for the equation.

    The scale is either passed in each call, as open_clip does, or owned: ``logit_scale=14.3`` fixes it, and with
    ``learn_scale=True`` it is the exponential of a parameter, ``log_scale``. A scale that is passed in the call takes
    the place of a fixed one; passing one beside a learned one is an error.

    Args:
        noise_std: standard deviation of the noise on the features, in ``train()`` mode only.
        smoothing: the target's mass on the negatives, in [0, 1]; a float or a 0-dim tensor. It may be assigned
            between steps, for a schedule.
        relative_noise: ``noise_std`` is in units of each row's root mean square.
        logit_scale: the owned scale (for a learned one, its start); None if every call brings it.
        learn_scale: whether the owned scale is a parameter.
        symmetric: False keeps only the image-to-text direction.
        process_group: see :func:`modest_align_kernels.modest_align_loss`.
        backend: "auto", or a name of :func:`modest_align_kernels.available_backends`.

    Raises:
        ValueError: ``learn_scale`` without ``logit_scale``, or a ``logit_scale`` that is not finite and positive.

    Example:
        >>> loss_fn = ModestAlignLoss(noise_std=0.01, smoothing=0.1, logit_scale=14.3, learn_scale=True)
        >>> loss = loss_fn(torch.randn(8, 16), torch.randn(8, 16))
    """

    def __init__(
        self,
        noise_std: float = 0.01,
        smoothing: Tensor | float = 0.1,
        *,
        relative_noise: bool = False,
        logit_scale: float | None = None,
        learn_scale: bool = False,
        symmetric: bool = True,
        process_group: ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if logit_scale is not None:
            check_number(
                "logit_scale",
                logit_scale,
                "a finite float > 0",
                lambda value: 0 < value < math.inf,
                tensor=False,
            )
        check_number("noise_std", noise_std, "a finite float >= 0", lambda value: 0 <= value < math.inf, tensor=False)
        check_number("smoothing", smoothing, "a float in [0, 1] or a 0-dim tensor", lambda value: 0 <= value <= 1)
        if learn_scale and logit_scale is None:
            raise ValueError("learn_scale: got True without logit_scale, want the scale to start from, e.g. 14.3")
        self.noise_std = noise_std
        self.smoothing = smoothing
        self.relative_noise = relative_noise
        self.logit_scale = logit_scale
        self.log_scale = nn.Parameter(torch.tensor(math.log(logit_scale))) if learn_scale and logit_scale else None
        self.symmetric = symmetric
        self.process_group = process_group
        self.backend = backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float | None = None,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        group_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of one batch.

        Args:
            image_features: [B, D].
            text_features: [N, D], N >= B.
            logit_scale: the scale of this call; None uses the owned one.
            logit_bias: accepted because open_clip passes it: a constant cancels in a softmax, so it gets a gradient of
                zero and changes nothing.
            output_dict: return ``{"contrastive_loss": loss}``.
            group_ids: see :func:`modest_align_kernels.modest_align_loss`.

        Returns:
            The mean loss, 0-dim float32, or the dictionary that holds it.

        Raises:
            ValueError: no scale is passed and none is owned, or one is passed beside a learned one; otherwise as
                :func:`modest_align_kernels.modest_align_loss`.
        """
        if self.log_scale is not None:
            if logit_scale is not None:
                raise ValueError(
                    "logit_scale: got one in the call while this loss learns its own, want one or the other"
                )
            logit_scale = self.log_scale.exp()
        elif logit_scale is None:
            logit_scale = self.logit_scale
        if logit_scale is None:
            raise ValueError(
                "logit_scale: got none, want one in the call or an owned one, as in ModestAlignLoss(logit_scale=14.3)"
            )
        loss = modest_align_loss(
            image_features,
            text_features,
            logit_scale,
            noise_std=self.noise_std if self.training else 0.0,
            relative_noise=self.relative_noise,
            smoothing=self.smoothing,
            group_ids=group_ids,
            symmetric=self.symmetric,
            process_group=self.process_group,
            backend=self.backend,
        )
        if isinstance(logit_bias, Tensor):
            loss = loss + 0.0 * logit_bias.sum().to(loss.dtype)
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        """The settings, as ``repr`` shows them."""
        scale = (
            "per call"
            if self.logit_scale is None
            else f"{self.logit_scale}{' (learned)' if self.log_scale is not None else ''}"
        )
        return (
            f"noise_std={self.noise_std}, smoothing={self.smoothing}, relative_noise={self.relative_noise}, "
            f"logit_scale={scale}, symmetric={self.symmetric}, backend={self.backend!r}"
        )
