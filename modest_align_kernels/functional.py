"""The loss as a function: checks, and what it means."""

from __future__ import annotations

import math
import numbers
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
_NUMBER_TYPES = (numbers.Real, torch.SymInt, torch.SymFloat)  # NumPy's scalars are numbers.Real
# What an argument that is a number may be, and the test of that.
_NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "logit_scale": ("a finite float > 0", lambda value: 0 < value < math.inf),
    "max_scale": ("a finite float > 0", lambda value: 0 < value < math.inf),
    "noise_std": ("a finite float >= 0", lambda value: 0 <= value < math.inf),
    "smoothing": ("a float in [0, 1]", lambda value: 0 <= value <= 1),
}


def modest_align_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    noise_std: Tensor | float = 0.0,
    relative_noise: bool = False,
    smoothing: Tensor | float = 0.0,
    group_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    symmetric: bool = True,
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""The contrastive loss of Modest-Align, exact, in memory O((B + N) D).

    .. math::
        \tilde x = x + \sigma \epsilon, \quad \hat x = \tilde x / \max(|\tilde x|, 10^{-12})
        \quad (\text{the same for } y), \quad S = s \hat X \hat Y^T

        T_{ij} = 1 - a \text{ for the positive } (i = j), \quad
        a / n_i \text{ for each of row i's } n_i \text{ negatives}

        L = \tfrac12 \text{mean}_i CE(T_{i:}, S_{i:}) + \tfrac12 \text{mean}_j CE(T_{:j}, S_{:j})

    from Modest-Align (arXiv 2510.21606): the noise is its Random Perturbation, the smoothed target its Embedding
    Smoothing. With ``noise_std=0`` and ``smoothing=0`` this is CLIP's loss. Label smoothing of PyTorch's kind, e, which
    also gives mass to the positive, is ``smoothing = e * (N - 1) / N``.

    Gradients flow to the features, to ``logit_scale`` and to ``smoothing`` if these are tensors that ask for them. A
    row whose norm is below 1e-12 has a gradient of zero: the formula's is up to 1e12 times that of other rows. A second
    derivative raises RuntimeError. ``torch.manual_seed`` governs the noise; each call draws fresh noise.

    A number may be Python's or NumPy's, or a floating-point tensor of one element and any shape, whose value is not
    checked (that would wait for the GPU). A number that changes from step to step, compiled, costs one compilation
    more.

    Args:
        image_features: [B, D] float16, bfloat16, float32 or float64, any strides; need not be normalised. D = 0 makes
            every logit 0. On the meta device nothing is computed but shapes.
        text_features: [N, D], N >= B, on the same device; row i < B is the positive of image i. Rows past B are extra
            negatives (a memory bank, hard negatives) of every image, without a loss of their own.
        logit_scale: s > 0, the inverse temperature, already exponentiated: a number.
        noise_std: standard deviation of Gaussian noise added to every feature before the normalisation, in units of
            the features: a number, without a gradient. 0 adds none. Noise on D features adds about
            ``noise_std * sqrt(D)`` to a row's norm.
        relative_noise: ``noise_std`` is in units of each row's root mean square, which the gradient holds constant.
        smoothing: a in [0, 1], the target's mass on the negatives: a number. A row without negatives keeps its mass.
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
    noise_std = check_number("noise_std", noise_std)
    logit_scale = check_number("logit_scale", logit_scale)
    smoothing = check_number("smoothing", smoothing)
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
    mass = None if _is_zero(smoothing) else _as_tensor(smoothing, dtype, device)
    if rows == 0:
        # Sums over nothing, so that whoever asks for gradients gets zeros.
        nothing = image_features.to(dtype).sum() + text_features[:0].to(dtype).sum() + 0.0 * scale
        return nothing if mass is None else nothing + 0.0 * mass
    if image_features.shape[1] == 0:
        # No backend needs to know: one feature that is 0 makes the same zero logits.
        image_features, text_features = (torch.nn.functional.pad(t, (0, 1)) for t in (image_features, text_features))
        noise_std = 0.0
    if text_features is image_features:
        text_features = text_features.view_as(text_features)  # Dynamo refuses one tensor as two inputs of a Function
    row_ids = col_ids = None
    if given_ids is not None:
        row_ids, col_ids = number_groups(*given_ids, text_features.shape[0])
    seed = noise = None
    if not _is_zero(noise_std):
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
        noise = _as_tensor(noise_std, dtype, device)
    # Inside an autograd.Function gradients are always off.
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (image_features, text_features, scale))
    options = Options(relative_noise, symmetric, operand_dtype, backend, keep)
    loss: Tensor = ContrastiveLoss.apply(
        image_features, text_features, scale, mass, row_ids, col_ids, seed, noise, options
    )[0]
    return loss


def _check_features(image_features: Tensor, text_features: Tensor) -> None:
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        if not isinstance(features, Tensor):
            raise TypeError(f"{name}: got {type(features).__name__}, want a tensor")
        _check_plain(name, features)
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
        _check_plain(name, ids)
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"{name}: got dtype {ids.dtype}, want int64")
        if ids.shape != (length,):
            raise ValueError(f"{name}: got shape {tuple(ids.shape)}, want [{length}], one for each {what}")
        if ids.device != device:
            raise ValueError(f"{name}: got device {ids.device}, want {device} as image_features")
    row_ids, *col_ids = (ids for ids, _, _ in given.values())
    return row_ids.long(), col_ids[0].long() if col_ids else None


def _check_plain(name: str, tensor: Tensor) -> None:
    """Raise one sentence for a tensor that is not one block of plain numbers."""
    kind = None
    if type(tensor).__name__ == "DTensor":  # to import its class takes seconds
        kind, remedy = "a DTensor", "full_tensor() or to_local()"
    elif tensor.is_nested:
        kind, remedy = "a nested tensor", "to_padded_tensor(0.0)"
    elif tensor.is_quantized:
        kind, remedy = "a quantised tensor", "dequantize()"
    elif tensor.layout != torch.strided:
        kind, remedy = f"a tensor of layout {tensor.layout}", "to_dense()"
    if kind is not None:
        raise TypeError(f"{name}: got {kind}, want a dense one, such as its {remedy}")


def check_number(name: str, value: Tensor | float) -> Tensor | float:
    """``value``, or one sentence if it is not what the argument wants; a tensor's value is not looked at.

    Args:
        name: of the argument, and of its line in ``_NUMBERS``.
        value: a number, or a floating-point tensor of one element.
    """
    wanted, valid = _NUMBERS[name]
    if not isinstance(value, (Tensor, *_NUMBER_TYPES)) and torch.compiler.is_compiling() and _is_array(value):
        value = torch.as_tensor(value, dtype=torch.float64)  # Dynamo takes NumPy's scalars for arrays
    if isinstance(value, Tensor):
        _check_plain(name, value)
        if value.numel() != 1 or not value.is_floating_point():
            got = f"a {value.dtype} tensor of shape {tuple(value.shape)}"
            raise ValueError(f"{name}: got {got}, want {wanted} or a one-element tensor")
        if name == "noise_std" and value.requires_grad:
            raise ValueError("noise_std: got a tensor that requires a gradient, want one that does not: it gets none")
    elif isinstance(value, bool) or not isinstance(value, _NUMBER_TYPES):
        raise TypeError(f"{name}: got {type(value).__name__}, want {wanted} or a one-element tensor")
    elif not valid(value):
        raise ValueError(f"{name}: got {value!r}, want {wanted}")
    return value


def _is_array(value: object) -> bool:
    return type(value).__name__ == "ndarray"


def _is_zero(value: Tensor | float) -> bool:
    """Whether a number is known to be 0: not of one that changes while it is traced, whose graph is for every value."""
    if isinstance(value, Tensor):
        return False
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy

        return statically_known_true(value == 0)
    return bool(value == 0)


def _as_tensor(value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        scalar = value.reshape(()) if value.dim() else value
        return scalar.to(device=device, dtype=dtype, non_blocking=True)
    if torch.compiler.is_compiling():
        # In a product a number that changes becomes an input of the graph; in torch.full, a constant of one graph each.
        return torch.ones((), dtype=dtype, device=device) * value
    # torch.tensor would copy from the host, and wait for it.
    return torch.full((), float(value), dtype=dtype, device=device)
