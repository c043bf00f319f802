"""The loss as a module: a drop-in for open_clip's ClipLoss call."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modest_align_kernels.functional import check_flag, check_has_value, check_number, modest_align_loss, read_number

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


# The attributes that are numbers or one-element tensors, and the arguments they come from.
_STATE = {"noise_std": "noise_std", "smoothing": "smoothing", "fixed_scale": "logit_scale"}


class _BoundedExp(torch.autograd.Function):
    """(x, bound) -> min(exp(x), bound). From the bound on x gets only such gradients as lower it.

    Of a clamp it would get none, and never come back; of one that let every gradient through it would rise on, and come
    back as late.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bound: float) -> Tensor:
        return x.exp().clamp_max(bound)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.bound = inputs[1]
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (output,) = ctx.saved_tensors
        grad = grad * output
        return torch.where(output >= ctx.bound, grad.clamp_min(0), grad), None


class ModestAlignLoss(nn.Module):
    """The contrastive loss of Modest-Align; see ``modest_align_loss`` for the equation.

    The scale is either passed in each call, as open_clip does, or owned: ``logit_scale=14.3`` fixes it, and with
    ``learn_scale=True`` it is the exponential of a parameter, ``log_scale`` [1]. A scale that is passed in the call
    takes the place of a fixed one; passing one beside a learned one is an error. The attribute ``logit_scale`` is the
    present value: what was given, or of a learned scale a 0-dim tensor without gradient. Assigned to, it changes that.

    The noise follows *this module's* ``train()`` and ``eval()``. Where the loss stands beside the model,
    ``model.eval()`` does not reach it: call ``loss_fn.eval()``, too, or validation losses are noisy.

    ``noise_std``, ``smoothing`` and a fixed ``logit_scale`` may be assigned between steps, for a schedule. As tensors
    of one element they are buffers: they move with the module and are saved with it.

    Args:
        noise_std: standard deviation of the noise on the features, in ``train()`` mode only.
        smoothing: the target's mass on the negatives, in [0, 1].
        relative_noise: ``noise_std`` is in units of each row's root mean square.
        logit_scale: the owned scale (for a learned one, its start); None if every call brings it.
        learn_scale: whether the owned scale is a parameter.
        max_scale: the learned scale's upper bound; None: no bound. While ``log_scale`` is above it the scale is
            ``max_scale``, and ``log_scale`` gets no gradient but one that lowers it.
        reduction: "mean", "sum" or "none"; see ``modest_align_loss``.
        symmetric: False keeps only the image-to-text direction.
        process_group: see there, as for the next two.
        strategy: likewise.
        gradient_reduction: likewise.
        backend: "auto", or a name of ``available_backends``.

    Raises:
        TypeError: a number that is none, or a flag that is neither True nor False.
        ValueError: ``learn_scale`` without ``logit_scale``, ``max_scale`` without ``learn_scale`` or below
            ``logit_scale``, or a number out of its range; so do assignments.

    Examples:
        >>> import torch
        >>> loss_fn = ModestAlignLoss(noise_std=0.01, smoothing=0.1, logit_scale=14.3, learn_scale=True)
        >>> loss = loss_fn(torch.randn(8, 16), torch.randn(8, 16))
        >>> loss.shape, loss.dtype
        (torch.Size([]), torch.float32)
        >>> [name for name, _ in loss_fn.named_parameters()]
        ['log_scale']
    """

    _version = 2  # 1: log_scale was 0-dim, and tensors of one element were not saved

    def __init__(
        self,
        noise_std: Tensor | float = 0.01,
        smoothing: Tensor | float = 0.1,
        *,
        relative_noise: bool = False,
        logit_scale: Tensor | float | None = None,
        learn_scale: bool = False,
        max_scale: float | None = None,
        reduction: str = "mean",
        symmetric: bool = True,
        process_group: ProcessGroup | DeviceMesh | tuple[DeviceMesh, str | int] | None = None,
        strategy: str = "auto",
        gradient_reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_flag("learn_scale", learn_scale)
        self.noise_std = noise_std
        self.smoothing = smoothing
        self.relative_noise = relative_noise
        self.fixed_scale = logit_scale
        self.log_scale: nn.Parameter | None = None
        self.max_scale = None if max_scale is None else read_number("max_scale", max_scale)
        self.reduction = reduction
        self.symmetric = symmetric
        self.process_group = process_group
        self.strategy = strategy
        self.gradient_reduction = gradient_reduction
        self.backend = backend
        if not learn_scale:
            if max_scale is not None:
                raise ValueError(f"max_scale: got {max_scale} without learn_scale=True, want None")
            return
        if logit_scale is None:
            raise ValueError("learn_scale: got True without logit_scale, want the scale to start from, e.g. 14.3")
        self._start, self.fixed_scale = read_number("logit_scale", logit_scale), None
        if self.max_scale is not None and self.max_scale < self._start:
            raise ValueError(f"max_scale: got {self.max_scale}, want at least logit_scale, {self._start}")
        # FSDP shards no parameter that is 0-dim.
        self.log_scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set a learned scale to where it starts: ``to_empty`` after a construction on the meta device needs that."""
        if self.log_scale is not None:
            nn.init.constant_(self.log_scale, math.log(self._start))

    @property
    def logit_scale(self) -> Tensor | float | None:
        """The scale: of a learned one the present value, 0-dim, without gradient (a DTensor where FSDP holds it)."""
        if self.log_scale is None:
            return self.fixed_scale
        with torch.no_grad():
            scale = self._bounded_exp(self.log_scale)
        return scale.squeeze() if type(scale) is Tensor else scale

    @logit_scale.setter
    def logit_scale(self, value: Tensor | float | None) -> None:
        self._set_logit_scale(value)

    def _set_logit_scale(self, value: Tensor | float | None) -> None:
        if self.log_scale is None:
            self.fixed_scale = value
        else:
            nn.init.constant_(self.log_scale, math.log(read_number("logit_scale", value)))  # type: ignore[arg-type]

    def _bounded_exp(self, log_scale: Tensor) -> Tensor:
        if self.max_scale is None:
            return log_scale.exp()
        scale: Tensor = _BoundedExp.apply(log_scale, self.max_scale)
        return scale

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "logit_scale":  # PyTorch 2.11's compiler calls no setter before the compiled code has run
            self._set_logit_scale(value)
            return
        if name not in _STATE:
            super().__setattr__(name, value)
            return
        if value is not None or name != "fixed_scale":
            check_number(_STATE[name], value)
        # A number takes a tensor's place, or a tensor a number's. A number that is only replaced is not looked at:
        # PyTorch's compiler would guard on it, up to 2.12.
        if name in self._buffers or name in self._parameters or (isinstance(value, Tensor) and name in self.__dict__):
            delattr(self, name)
        if isinstance(value, nn.Parameter):
            super().__setattr__(name, value)
        elif isinstance(value, Tensor):
            self.register_buffer(name, value)
        else:
            object.__setattr__(self, name, value if value is None or isinstance(value, float) else float(value))

    def __deepcopy__(self, memo: dict[int, Any]) -> ModestAlignLoss:
        """A copy of the same process group, which cannot be copied: averaged models are copies."""
        memo[id(self.process_group)] = self.process_group
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        log_scale = state_dict.get(prefix + "log_scale")
        if log_scale is not None and log_scale.dim() == 0:
            state_dict[prefix + "log_scale"] = log_scale.reshape(1)
        if (local_metadata.get("version") or 1) < 2:
            for name in self._buffers:
                state_dict.setdefault(prefix + name, getattr(self, name))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float | None = None,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        group_ids: Tensor | tuple[Tensor, Tensor] | None = None,
        weights: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of one batch.

        Args:
            image_features: [B, D].
            text_features: [N, D], N >= B.
            logit_scale: the scale of this call; None uses the owned one.
            logit_bias: accepted because open_clip passes it: a constant cancels in a softmax, so it gets a gradient of
                zero and changes nothing.
            output_dict: return ``{"contrastive_loss": loss}``.
            group_ids: see ``modest_align_loss``.
            weights: likewise.

        Returns:
            The loss, 0-dim float32 ([B] with ``reduction="none"``), or the dictionary that holds it.

        Raises:
            ValueError: no scale is passed and none is owned, or one is passed beside a learned one; otherwise as
                ``modest_align_loss``.
        """
        if self.log_scale is not None:
            if logit_scale is not None:
                raise ValueError(
                    "logit_scale: got one in the call while this loss learns its own, want one or the other"
                )
            logit_scale = self._bounded_exp(self.log_scale)
        elif logit_scale is None:
            logit_scale = self.fixed_scale
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
            weights=weights,
            reduction=self.reduction,
            symmetric=self.symmetric,
            process_group=self.process_group,
            strategy=self.strategy,
            gradient_reduction=self.gradient_reduction,
            backend=self.backend,
        )
        if logit_bias is not None:
            check_number("logit_bias", logit_bias)
            check_has_value("logit_bias", logit_bias, loss.device)
        check_flag("output_dict", output_dict)
        if isinstance(logit_bias, Tensor):
            loss = loss + 0.0 * logit_bias.sum().to(loss.dtype)
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        """The settings and the present scale, as ``repr`` shows them."""
        value: Tensor | float | None = self.log_scale
        if self.log_scale is None or _is_here(self.log_scale):
            value = self.logit_scale
        scale = "per call" if value is None else _shown(value)
        if self.log_scale is not None:
            scale += " (learned)" if self.max_scale is None else f" (learned, at most {self.max_scale})"
        return (
            f"noise_std={_shown(self.noise_std)}, smoothing={_shown(self.smoothing)}, "
            f"relative_noise={self.relative_noise}, logit_scale={scale}, "
            f"reduction={self.reduction!r}, symmetric={self.symmetric}, backend={self.backend!r}"
        )


def _is_here(tensor: Tensor) -> bool:
    """Whether there is a value to read: on the meta device, in another rank's shard or freed by FSDP there is none."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.numel() == 1 and not tensor.is_meta
    return plain and tensor.untyped_storage().nbytes() > 0


def _shown(value: Tensor | float) -> str:
    """``value`` for ``repr``, which must neither fail nor wait for other ranks."""
    if not isinstance(value, Tensor):
        return str(value)
    if not _is_here(value):
        return f"{type(value).__name__} of shape {tuple(value.shape)} on {value.device}"
    return str(float(f"{value.item():.6g}"))
