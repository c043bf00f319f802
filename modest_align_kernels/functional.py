"""The loss as a function: checks, and what it means."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modest_align_kernels import dispatch
from modest_align_kernels.autograd import ContrastiveLoss, Options, number_groups
from modest_align_kernels.backends import accumulation_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FEATURE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def modest_align_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    noise_std: float = 0.0,
    relative_noise: bool = False,
    smoothing: Tensor | float = 0.0,
    group_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    symmetric: bool = True,
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""The contrastive loss of Modest-Align, exact, in memory O((B + N) D) and a workspace of constant size.

    .. math::
        \tilde x = x + \sigma \epsilon, \quad \hat x = \tilde x / \max(|\tilde x|, 10^{-12})
        \quad (\text{the same for } y), \quad S = s \hat X \hat Y^T

        T_{ij} = 1 - a \text{ for the positive } (i = j), \quad
        a / n_i \text{ for each of row i's } n_i \text{ negatives}

        L = \tfrac12 \text{mean}_i CE(T_{i:}, S_{i:}) + \tfrac12 \text{mean}_j CE(T_{:j}, S_{:j})

    from Modest-Align (arXiv 2510.21606): the noise is its Random Perturbation, the smoothed target its Embedding
    Smoothing. With ``noise_std=0`` and ``smoothing=0`` this is CLIP's loss. Label smoothing of PyTorch's kind, e, which
    also gives mass to the positive, is ``smoothing = e * (N - 1) / N``.

    Gradients flow to the features, to ``logit_scale`` and to ``smoothing`` if these are tensors that ask for them.
    A second derivative raises RuntimeError. ``torch.manual_seed`` governs the noise; each call draws fresh noise.

    Args:
        image_features: [B, D] float16, bfloat16, float32 or float64, any strides; need not be normalised.
        text_features: [N, D], N >= B, on the same device; row i < B is the positive of image i. Rows past B are extra
            negatives (a memory bank, hard negatives) of every image, without a loss of their own.
        logit_scale: s > 0, the inverse temperature, already exponentiated: a float or a 0-dim tensor.
        noise_std: standard deviation of Gaussian noise added to every feature before the normalisation, in units of
            the features. 0 adds none. Noise on D features adds about ``noise_std * sqrt(D)`` to a row's norm.
        relative_noise: ``noise_std`` is in units of each row's root mean square, which the gradient holds constant.
        smoothing: a in [0, 1], the target's mass on the negatives: a float or a 0-dim tensor, for schedules (a
            tensor's value is not checked: that would wait for the GPU). A row without negatives keeps its mass.
        group_ids: integers [B]; pairs with equal id are not each other's negatives. Or a tuple, integers [B] of the
            images and [N] of all texts: a text is no negative of an image with its id, which excludes texts past B too.
        symmetric: False keeps only the image-to-text direction, with weight 1.
        process_group: not None raises NotImplementedError in this version.
        backend: "auto", or a name of :func:`available_backends`.

    Returns:
        The mean loss, 0-dim float32 (float64 for float64 features). B = 0 gives 0 with gradients of zeros; NaN features
        give NaN.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a shape or a value out of range; the message names the argument, what came and what is wanted.
        RuntimeError: the backend asked for cannot run here; the message says why.
    """
    _check_features(image_features, text_features)
    rows, device = image_features.shape[0], image_features.device
    check_number("noise_std", noise_std, "a finite float >= 0", lambda value: 0 <= value < math.inf, tensor=False)
    check_number("logit_scale", logit_scale, "a finite float > 0 or a 0-dim tensor", lambda value: 0 < value < math.inf)
    check_number("smoothing", smoothing, "a float in [0, 1] or a 0-dim tensor", lambda value: 0 <= value <= 1)
    given_ids = _check_group_ids(group_ids, image_features, text_features)
    if process_group is not None:
        raise NotImplementedError(
            "process_group: the loss over several ranks is not part of this version, want None for this rank's pairs"
        )
    features_dtype = image_features.dtype
    if text_features.dtype != features_dtype:
        features_dtype = torch.promote_types(features_dtype, text_features.dtype)
    backend = dispatch.choose(backend, device, features_dtype, image_features.shape[1])
    operand_dtype = dispatch.operand_dtype(features_dtype, device, backend)
    dtype = accumulation_dtype(operand_dtype)
    scale = _as_tensor(logit_scale, dtype, device)
    no_smoothing = not isinstance(smoothing, Tensor) and smoothing == 0
    mass = None if no_smoothing else _as_tensor(smoothing, dtype, device)
    if rows == 0:
        # Sums over nothing, so that whoever asks for gradients gets zeros.
        return image_features.to(dtype).sum() + text_features[:0].to(dtype).sum() + 0.0 * scale
    row_ids, col_ids, paired_groups = None, None, False
    if given_ids is not None:
        row_ids, col_ids = number_groups(*given_ids, text_features.shape[0])
        paired_groups = given_ids[1] is None
    seed = noise = None
    if noise_std > 0:
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
        noise = _as_tensor(noise_std, dtype, device)
    # Inside an autograd.Function gradients are always off.
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (image_features, text_features, scale))
    options = Options(relative_noise, symmetric, paired_groups, operand_dtype, backend, keep)
    loss: Tensor = ContrastiveLoss.apply(
        image_features, text_features, scale, mass, row_ids, col_ids, seed, noise, options
    )[0]
    return loss


def _check_features(image_features: Tensor, text_features: Tensor) -> None:
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        if not isinstance(features, Tensor):
            raise TypeError(f"{name}: got {type(features).__name__}, want a tensor")
        if features.dtype not in _FEATURE_DTYPES:
            raise TypeError(f"{name}: got dtype {features.dtype}, want float16, bfloat16, float32 or float64")
        if features.dim() != 2:
            raise ValueError(f"{name}: got shape {tuple(features.shape)}, want two dimensions [rows, features]")
    (rows, width), (columns, text_width) = image_features.shape, text_features.shape
    if text_width != width:
        raise ValueError(f"text_features: got {text_width} features, want {width} as in image_features")
    if columns < rows:
        raise ValueError(
            f"text_features: got {columns} rows, want at least {rows}: row i is the positive of image i, "
            "rows past the images are extra negatives"
        )
    if text_features.device != image_features.device:
        raise ValueError(
            f"text_features: got device {text_features.device}, want {image_features.device} as image_features"
        )


def _check_group_ids(
    group_ids: Tensor | tuple[Tensor, Tensor] | None, image_features: Tensor, text_features: Tensor
) -> tuple[Tensor, Tensor | None] | None:
    """The ids of the rows and, if they are given, of the columns."""
    if group_ids is None:
        return None
    rows, columns, device = image_features.shape[0], text_features.shape[0], image_features.device
    if isinstance(group_ids, tuple):
        if len(group_ids) != 2:
            raise ValueError(f"group_ids: got {len(group_ids)} of them, want a tensor [{rows}] or a pair of tensors")
        given = {"group_ids[0]": (group_ids[0], rows, "image"), "group_ids[1]": (group_ids[1], columns, "text")}
    else:
        given = {"group_ids": (group_ids, rows, "image")}
    for name, (ids, length, what) in given.items():
        if not isinstance(ids, Tensor):
            raise TypeError(f"{name}: got {type(ids).__name__}, want an int64 tensor [{length}]")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"{name}: got dtype {ids.dtype}, want int64")
        if ids.shape != (length,):
            raise ValueError(f"{name}: got shape {tuple(ids.shape)}, want [{length}], one for each {what}")
        if ids.device != device:
            raise ValueError(f"{name}: got device {ids.device}, want {device} as image_features")
    row_ids, *col_ids = (ids for ids, _, _ in given.values())
    return row_ids.long(), col_ids[0].long() if col_ids else None


def check_number(
    name: str, value: Tensor | float, wanted: str, valid: Callable[[float], bool], tensor: bool = True
) -> None:
    """Raise one sentence unless ``value`` is what is wanted; a tensor is checked for kind, not for its value."""
    if tensor and isinstance(value, Tensor):
        if value.dim() != 0 or not value.is_floating_point():
            raise ValueError(f"{name}: got a {value.dtype} tensor of shape {tuple(value.shape)}, want {wanted}")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, want {wanted}")
    elif not valid(value):
        raise ValueError(f"{name}: got {value!r}, want {wanted}")


def _as_tensor(value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype, non_blocking=True)
    # torch.tensor would copy from the host, and wait for it.
    return torch.full((), value, dtype=dtype, device=device)
