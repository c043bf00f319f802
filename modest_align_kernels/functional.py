"""The loss, and the logsumexps that it is made of, as functions: checks, and what they mean."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from modest_align_kernels import dispatch
from modest_align_kernels.autograd import ContrastiveLogsumexp, ContrastiveLoss, Options, number_groups
from modest_align_kernels.backends import accumulation_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

_FEATURE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NUMBER_TYPES = (numbers.Real, torch.SymInt, torch.SymFloat)  # NumPy's scalars are numbers.Real
# What an argument that is a number may be, and the test of that.
_NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "logit_scale": ("a finite float > 0", lambda value: 0 < value < math.inf),
    "scale": ("a finite float > 0", lambda value: 0 < value < math.inf),
    "max_scale": ("a finite float > 0", lambda value: 0 < value < math.inf),
    "noise_std": ("a finite float >= 0", lambda value: 0 <= value < math.inf),
    "smoothing": ("a float in [0, 1]", lambda value: 0 <= value <= 1),
    "logit_bias": ("a finite float", lambda value: -math.inf < value < math.inf),
}
# What an argument that is a word may be.
_CHOICES = {
    "reduction": ("mean", "sum", "none"),
    "strategy": ("auto", "gather", "ring"),
    "gradient_reduction": ("mean", "sum"),
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
    weights: Tensor | None = None,
    reduction: str = "mean",
    symmetric: bool = True,
    process_group: ProcessGroup | DeviceMesh | tuple[DeviceMesh, str | int] | None = None,
    strategy: str = "auto",
    gradient_reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""The contrastive loss of Modest-Align, exact, in memory O((B + N) D) and a workspace of constant size.

    $$
    \tilde x = x + \sigma \epsilon, \quad \hat x = \tilde x / \max(|\tilde x|, 10^{-12})
    \quad (\text{the same for } y), \quad S = s \hat X \hat Y^T
    $$

    $$
    T_{ij} = 1 - a \text{ for the positive } (i = j), \quad
    a / n_i \text{ for each of row i's } n_i \text{ negatives}
    $$

    $$
    \ell_i = \tfrac12 CE(T_{i:}, S_{i:}) + \tfrac12 CE(T_{:i}, S_{:i}), \quad
    L = \sum_i w_i \ell_i / \sum_i w_i
    $$

    from Modest-Align (arXiv 2510.21606): the noise is its Random Perturbation, the smoothed target its Embedding
    Smoothing. With ``noise_std=0`` and ``smoothing=0`` this is CLIP's loss. Label smoothing of PyTorch's kind, e, which
    also gives mass to the positive, is ``smoothing = e * (N - 1) / N``.

    Gradients flow to the features, to ``logit_scale`` and to ``smoothing`` if these are tensors that ask for them. A
    row whose norm is below 1e-12 has a gradient of zero: the formula's is up to 1e12 times that of other rows. A second
    derivative raises RuntimeError. ``torch.manual_seed`` governs the noise; each call draws fresh noise.

    With a process group, B and N are those of all ranks together (rank after rank, the texts past B last), and

    - every rank returns the same number, the loss of the global batch (``reduction="none"``: its own pairs' losses);
    - the features and weights receive W times the derivative, so that the mean over the W ranks that DDP and FSDP take
      of the parameters' gradients is exact, however unequal the shards (``gradient_reduction="sum"``: once);
    - ``logit_scale`` and ``smoothing`` receive the derivative of the global loss, the same on every rank, so that a
      parameter that nothing averages stays in step (``gradient_reduction="sum"``: divided by W).

    In other words: where rank r makes J_r of what is returned, the gradients are those of the mean of all J_r, or where
    the loss was reduced to one number for trainers that sum, of its mean, too. Every rank must make the same calls, and
    as many backward passes. Shards may have any lengths, also 0. The noise is what one process would draw with the
    first rank's generator: a row's depends on its number in the global batch, not on the ranks.

    What the ranks must have alike and have not, or what one of them refuses, is raised on all of them in the same
    sentence; that takes one all-gather of four integers in each call, for which the host waits (not the GPU, if the
    group has a backend for CPU tensors, as that of ``init_process_group()`` has). If a rank dies the others end with
    the group's timeout. ``torch.compile`` breaks its graph here.

    Features may be hostile. A zero row stays zero, and with it one of norm below 1e-12 all but; rows of any other size
    count alike, also those whose squares overflow float32 (of float64, norms up to 1e154), which F.normalize makes rows
    of zeros. A NaN or an infinity in a feature, in ``logit_scale`` or in a weight makes NaN of whatever it makes NaN in
    F.normalize, a matmul and F.cross_entropy, losses and gradients alike; with group ids, of more: the sums that
    smoothing is made of hold every row. No loss is finite that is NaN there.

    A number may be Python's or NumPy's, or a floating-point tensor of one element and any shape, whose value is not
    checked (that would wait for the GPU). Compiled, a number that changes from step to step costs one compilation more
    (with PyTorch's CUDA graphs one for each value: a tensor does not).

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
        weights: w >= 0, [B] of any real dtype, whose values are not checked: a pair's share in the mean. A pair of
            weight 0 is still a negative of the others; where all are 0, so is the loss. Gradients flow to them, too.
        reduction: "mean"; "sum", of w l; or "none": w l, [B].
        symmetric: False keeps only the image-to-text direction, with weight 1.
        process_group: the ranks over which the batch is spread: a torch.distributed.ProcessGroup, a DeviceMesh of one
            dimension, or a tuple, a DeviceMesh and that dimension of it whose ranks have different pairs. The features,
            ids and weights are this rank's shard; see below. None: this process has all.
        strategy: how the ranks see each other's texts (or the images, where that sends less): "gather" them all, and
            as many rows of their gradient; let them go around in a "ring", in memory that does not grow with the ranks,
            for a third more traffic in 16 bits and half more in 32; or "auto", the ring where gathering takes more than
            16 times MODEST_ALIGN_WORKSPACE_MIB.
        gradient_reduction: what the trainer makes of the ranks' gradients of a parameter: their "mean" or their "sum".
        backend: "auto", or a name of ``available_backends``.

    Returns:
        The loss, 0-dim or [B] float32 (float64 for float64 features). B = 0 gives 0 with gradients of zeros; NaN
        features give NaN.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a shape or a value out of range; the message names the argument, what came and what is wanted.
        RuntimeError: the backend asked for cannot run here; the message says why.

    Examples:
        Four pairs; the fifth text is a negative of all four images:

        >>> import torch
        >>> images, texts = torch.eye(5)[:4], torch.eye(5)
        >>> modest_align_loss(images, texts, 1.0)
        tensor(0.8243)
        >>> modest_align_loss(images, texts, 1.0, smoothing=0.1, reduction="none")
        tensor([0.9243, 0.9243, 0.9243, 0.9243])

        The first two show the same thing, and are no negatives of each other:

        >>> modest_align_loss(images, texts, 1.0, group_ids=torch.tensor([0, 0, 1, 2]), reduction="none")
        tensor([0.6476, 0.6476, 0.8243, 0.8243])
    """
    call: tuple[Any, ...] = image_features, text_features, logit_scale, noise_std, relative_noise, smoothing
    call += group_ids, weights, reduction, symmetric, backend, strategy, gradient_reduction
    if process_group is not None:
        from modest_align_kernels import distributed  # imports Dynamo, which takes a second

        loss: Tensor = distributed.outside_graphs(_loss_of_ranks, process_group, *call)
        return loss
    x, y, scale, mass, given_ids, weights, noise_std, options = _prepare_loss(*call)
    if x.shape[0] == 0:
        return _loss_of_nothing(x, y, scale, mass, weights, reduction)
    row_ids = col_ids = None
    if given_ids is not None:
        row_ids, col_ids = number_groups(*given_ids, y.shape[0])
    seed, noise = _draw_seed(noise_std, x, scale)
    loss = ContrastiveLoss.apply(x, y, scale, mass, row_ids, col_ids, seed, noise, options)[0]
    if weights is not None:
        loss = loss * weights
    if reduction == "none" or options.mean:
        return loss
    loss = loss.sum()
    if reduction == "sum" or weights is None:
        return loss
    return loss / weights.sum().clamp_min(torch.finfo(loss.dtype).tiny)


class _Call(NamedTuple):
    """The arguments of a loss, checked."""

    x: Tensor
    y: Tensor
    scale: Tensor
    smoothing: Tensor | None
    ids: tuple[Tensor, Tensor | None] | None
    weights: Tensor | None
    noise_std: Tensor | float
    options: Options


def _prepare_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    noise_std: Tensor | float,
    relative_noise: bool,
    smoothing: Tensor | float,
    group_ids: Tensor | tuple[Tensor, Tensor] | None,
    weights: Tensor | None,
    reduction: str,
    symmetric: bool,
    backend: str,
    strategy: str,
    gradient_reduction: str,
) -> _Call:
    _check_features({"image_features": image_features, "text_features": text_features})
    rows, columns = image_features.shape[0], text_features.shape[0]
    if columns < rows:
        raise ValueError(
            f"text_features: got {columns} rows, want at least {rows}: row i is the positive of image i, "
            "rows past the images are extra negatives"
        )
    noise_std = check_number("noise_std", noise_std)
    logit_scale = check_number("logit_scale", logit_scale)
    smoothing = check_number("smoothing", smoothing)
    given_ids = _check_group_ids(group_ids, image_features, text_features)
    if weights is not None:
        _check_weights(weights, image_features)
    check_flag("relative_noise", relative_noise)
    check_flag("symmetric", symmetric)
    _check_choice("reduction", reduction)
    _check_choice("strategy", strategy)
    _check_choice("gradient_reduction", gradient_reduction)
    for name, number in (("logit_scale", logit_scale), ("noise_std", noise_std), ("smoothing", smoothing)):
        check_has_value(name, number, image_features.device)
    if image_features.shape[1] == 0:
        noise_std = 0.0  # _prepare makes a feature, which has none
    x, y, scale, options = _prepare(image_features, text_features, logit_scale, backend)
    mass = None if _is_zero(smoothing) else _as_tensor(smoothing, scale.dtype, scale.device)
    if weights is not None:
        weights = weights.to(scale.dtype)
    mean = reduction == "mean" and weights is None
    options = options._replace(relative_noise=bool(relative_noise), symmetric=bool(symmetric), mean=mean)
    return _Call(x, y, scale, mass, given_ids, weights, noise_std, options)


def _loss_of_nothing(
    x: Tensor, y: Tensor, scale: Tensor, smoothing: Tensor | None, weights: Tensor | None, reduction: str
) -> Tensor:
    """Sums over nothing, so that whoever asks for gradients gets zeros."""
    nothing = x.to(scale.dtype).sum(1) + (y[:0].to(scale.dtype).sum() + 0.0 * scale)
    nothing = nothing if smoothing is None else nothing + 0.0 * smoothing
    nothing = nothing if weights is None else nothing * weights
    return nothing if reduction == "none" else nothing.sum()


def _draw_seed(noise_std: Tensor | float, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The noise's seed and standard deviation, if there is any."""
    if _is_zero(noise_std):
        return None, None
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=x.device)
    return seed, _as_tensor(noise_std, scale.dtype, scale.device)


def _loss_of_ranks(process_group: Any, *arguments: Any) -> Tensor:
    """``modest_align_loss`` of a process group; the arguments are those of ``_prepare_loss``."""
    from modest_align_kernels import distributed, sharded

    logit_scale, noise_std, relative_noise, smoothing, group_ids, weights, reduction = arguments[2:9]
    symmetric, backend, strategy, gradient_reduction = arguments[9:]
    group = distributed.group_of(process_group)
    if group.size() == 1:
        return modest_align_loss(
            *arguments[:3],
            noise_std=noise_std,
            relative_noise=relative_noise,
            smoothing=smoothing,
            group_ids=group_ids,
            weights=weights,
            reduction=reduction,
            symmetric=symmetric,
            strategy=strategy,
            gradient_reduction=gradient_reduction,
            backend=backend,
        )

    def check() -> tuple[_Call, tuple[int, int], dict[str, Any]]:
        call = _prepare_loss(*arguments)
        alike = _alike(call.x, call.y, call.scale, call.options, strategy) | {
            "logit_scale": _kind(logit_scale),
            "noise_std": _kind(noise_std),
            "relative_noise": bool(relative_noise),
            "smoothing": _kind(smoothing),
            "group_ids": _kind(group_ids),
            "weights": _kind(weights),
            "reduction": reduction,
            "symmetric": bool(symmetric),
            "gradient_reduction": gradient_reduction,
            "requires_grad of the smoothing": _wants_gradient(call.smoothing),
            "requires_grad of the weights": _wants_gradient(call.weights),
        }
        return call, (call.x.shape[0], call.y.shape[0]), alike

    call, extents = distributed.agree(group, _device_of(arguments[0]), check)
    x, y, scale, mass, given_ids, weights, noise_std, options = call
    pairs, counted = sum(rows for rows, _ in extents), [rows for rows, _ in extents]
    if pairs == 0:
        return _loss_of_nothing(x, y, scale, mass, weights, reduction)
    extra = [columns - rows for rows, columns in extents]
    swapped = distributed.traffic(pairs, x, options) < distributed.traffic(pairs + sum(extra), y, options)
    extra_ids = isinstance(group_ids, tuple)
    if given_ids is not None and not extra_ids and any(extra):
        swapped = False  # every row has an id
    travelling = pairs if swapped else pairs + sum(extra)
    ring = distributed.ring_is_better(strategy, travelling, options, x.shape[1])
    ranks = distributed.Ranks(group, counted, extra, extra_ids, ring, swapped)
    seed, noise = _draw_seed(noise_std, x, scale)
    seed = distributed.broadcast_seed(ranks, seed)
    ids = given_ids or (None, None)
    losses: Tensor = sharded.RanksLoss.apply(x, y, scale, mass, *ids, seed, noise, options, ranks)
    if weights is not None:
        losses = losses * weights
    if reduction == "none":
        return losses
    own = losses.sum() if weights is None else torch.stack((losses.sum(), weights.sum()))
    total: Tensor = distributed.Total.apply(own, ranks, gradient_reduction == "sum")
    if weights is None:
        return total / pairs if reduction == "mean" else total
    return total[0] / total[1].clamp_min(torch.finfo(total.dtype).tiny) if reduction == "mean" else total[0]


def _alike(x: Tensor, y: Tensor, scale: Tensor, options: Options, strategy: str) -> dict[str, Any]:
    """What every rank must have alike, by its name in the message."""
    from modest_align_kernels import distributed

    return {
        "features": x.shape[1],
        "the device's type": x.device.type,
        "the operands' dtype": str(options.operand_dtype),
        "backend": options.backend,
        "strategy": strategy,
        "MODEST_ALIGN_WORKSPACE_MIB": distributed.GATHER_BYTES,
        **{
            f"requires_grad of {name}": _wants_gradient(t)
            for name, t in (("the images", x), ("the texts", y), ("the scale", scale))
        },
    }


def _wants_gradient(tensor: Tensor | None) -> bool:
    # A backward on some ranks alone would wait for the others.
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _device_of(features: Any) -> torch.device:
    return features.device if isinstance(features, Tensor) else torch.device("cpu")


def _kind(value: Any) -> Any:
    """What ranks can compare of an argument without a look at a tensor's values."""
    if value is None or isinstance(value, _NUMBER_TYPES):
        return value if value is None else float(value)
    return "a tuple" if isinstance(value, tuple) else "a tensor"


def contrastive_logsumexp(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    *,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    process_group: ProcessGroup | DeviceMesh | tuple[DeviceMesh, str | int] | None = None,
    strategy: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""The logsumexps of the rows and of the columns of a matrix of cosines that is never stored.

    $$
    \hat x_i = x_i / \max(|x_i|, 10^{-12}) \quad (\text{the same for } y), \quad S = s \hat X \hat Y^T
    $$

    $$
    \text{row lse}_i = \log \sum_{j: c_j \ne r_i} e^{S_{ij}}, \quad
    \text{col lse}_j = \log \sum_{i: r_i \ne c_j} e^{S_{ij}}
    $$

    with ids r of the rows and c of the columns (without ids: over all), -inf where no pair is left. Every softmax
    contrastive loss is a few lines on these B + N numbers, exact, at four matmuls and in memory O((B + N) D), because
    both are differentiable for any gradients u and v that come back to them:

    $$
    \partial L / \partial S_{ij} = u_i e^{S_{ij} - \text{row lse}_i} + v_j e^{S_{ij} - \text{col lse}_j}
    $$

    Gradients flow to x, y, and to ``scale`` if it is a tensor that asks for one; of -inf they are zero. A row whose
    norm is below 1e-12 has none. A second derivative raises RuntimeError. With float16 operands (of float16 features;
    on a GPU of bfloat16 ones, too) what is below 2^-34 of the largest of u and v counts as 0.

    Args:
        x: [B, D] float16, bfloat16, float32 or float64, any strides; need not be normalised.
        y: [N, D], on the same device; any N.
        scale: s > 0, the inverse temperature: a number as in ``modest_align_loss``.
        row_ids: integers [B], or None beside None.
        col_ids: integers [N].
        process_group: as for ``modest_align_loss``. x and y, of any lengths, are then this rank's shards, and the
            logsumexps are over all ranks' columns and rows. Where rank r makes J_r of them, x and y receive the
            derivative of the sum of all J_r, and ``scale`` that of their mean.
        strategy: likewise.
        backend: "auto", or a name of ``available_backends``.

    Returns:
        row_lse [B] and col_lse [N], float32 (float64 for float64 features).

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a shape or a value out of range; the message names the argument, what came and what is wanted.
        RuntimeError: the backend asked for cannot run here; the message says why.

    Examples:
        CLIP's loss:

        >>> import torch
        >>> x, y, scale = torch.eye(4), torch.eye(4), 10.0
        >>> rows, columns = contrastive_logsumexp(x, y, scale)
        >>> (rows + columns).mean() / 2 - scale * torch.cosine_similarity(x, y).mean()
        tensor(0.0001)

        Nothing is compared with itself, and with one row nothing is left:

        >>> contrastive_logsumexp(x[:1], x[:1], scale, row_ids=torch.tensor([7]), col_ids=torch.tensor([7]))[0]
        tensor([-inf])
    """
    if process_group is not None:
        from modest_align_kernels import distributed  # imports Dynamo, which takes a second

        call = x, y, scale, row_ids, col_ids, backend, strategy
        lse: tuple[Tensor, Tensor] = distributed.outside_graphs(_logsumexp_of_ranks, process_group, *call)
        return lse
    x, y, scale, given_ids, options = _prepare_logsumexp(x, y, scale, row_ids, col_ids, backend, strategy)
    if x.shape[0] == 0 or y.shape[0] == 0:
        return _logsumexp_of_nothing(x, y, scale)
    ids = (None, None) if given_ids is None else number_groups(*given_ids, y.shape[0])
    row_lse, col_lse, *_ = ContrastiveLogsumexp.apply(x, y, scale, *ids, options)
    return row_lse, col_lse


def _prepare_logsumexp(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    backend: str,
    strategy: str,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None, Options]:
    _check_features({"x": x, "y": y})
    scale = check_number("scale", scale)
    check_has_value("scale", scale, x.device)
    ids = None
    if row_ids is not None and col_ids is not None:
        _check_ids("row_ids", row_ids, x, "row of x", "x")
        _check_ids("col_ids", col_ids, y, "row of y", "x")
        ids = row_ids.long(), col_ids.long()
    elif row_ids is not col_ids:
        given, missing = ("row_ids", "col_ids") if col_ids is None else ("col_ids", "row_ids")
        raise ValueError(f"{missing}: got None beside {given}, want both or neither")
    _check_choice("strategy", strategy)
    x, y, scale, options = _prepare(x, y, scale, backend)
    return x, y, scale, ids, options


def _logsumexp_of_nothing(x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Of no pairs, with gradients of zeros."""
    zeros = (0.0 * t.to(scale.dtype).sum(1) for t in (x, y))
    row_lse, col_lse = (zero + (0.0 * scale - math.inf) for zero in zeros)
    return row_lse, col_lse


def _logsumexp_of_ranks(process_group: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
    """``contrastive_logsumexp`` of a process group; the arguments are those of ``_prepare_logsumexp``."""
    from modest_align_kernels import distributed, sharded

    x, y, scale, row_ids, col_ids, backend, strategy = arguments
    group = distributed.group_of(process_group)
    if group.size() == 1:
        return contrastive_logsumexp(x, y, scale, row_ids=row_ids, col_ids=col_ids, strategy=strategy, backend=backend)

    def check() -> tuple[tuple[Any, ...], tuple[int, int], dict[str, Any]]:
        x, y, scale_tensor, ids, options = call = _prepare_logsumexp(*arguments)
        alike = _alike(x, y, scale_tensor, options, strategy) | {"scale": _kind(scale), "ids": ids is not None}
        return call, (x.shape[0], y.shape[0]), alike

    (x, y, scale, ids, options), extents = distributed.agree(group, _device_of(x), check)
    rows, columns = map(list, zip(*extents, strict=True))
    if sum(rows) == 0 or sum(columns) == 0:
        return _logsumexp_of_nothing(x, y, scale)
    swapped = distributed.traffic(sum(rows), x, options) < distributed.traffic(sum(columns), y, options)
    travelling = rows if swapped else columns
    ring = distributed.ring_is_better(strategy, sum(travelling), options, x.shape[1])
    ranks = distributed.Ranks(group, travelling, [0] * len(rows), False, ring, swapped)
    row_lse, col_lse = sharded.RanksLogsumexp.apply(x, y, scale, *(ids or (None, None)), options, ranks)
    return row_lse, col_lse


def _prepare(x: Tensor, y: Tensor, scale: Tensor | float, backend: str) -> tuple[Tensor, Tensor, Tensor, Options]:
    """What a Function gets of both sides, of the scale and of the backend."""
    dtype = x.dtype if x.dtype == y.dtype else torch.promote_types(x.dtype, y.dtype)
    backend = dispatch.choose(backend, x.device, dtype, x.shape[1])
    operand_dtype = dispatch.operand_dtype(dtype, x.device, backend)
    # Inside an autograd.Function gradients are always off.
    wanted = any(isinstance(t, Tensor) and t.requires_grad for t in (x, y, scale))
    options = Options(operand_dtype, backend, keep=torch.is_grad_enabled() and wanted)
    scale = _as_tensor(scale, accumulation_dtype(operand_dtype), x.device)
    x, y = x.resolve_neg(), y.resolve_neg()  # kernels read the memory, which knows nothing of a lazy sign
    if x.shape[1] == 0:
        # No backend needs to know: one feature that is 0 makes the same zero logits.
        x, y = (torch.nn.functional.pad(t, (0, 1)) for t in (x, y))
    # Dynamo refuses one tensor as two inputs of a Function.
    return x, y.view_as(y) if y is x else y, scale, options


def _check_features(sides: dict[str, Tensor]) -> None:
    for name, features in sides.items():
        if not isinstance(features, Tensor):
            raise TypeError(f"{name}: got {type(features).__name__}, want a tensor")
        _check_plain(name, features)
        if features.dtype not in _FEATURE_DTYPES:
            raise TypeError(f"{name}: got dtype {features.dtype}, want float16, bfloat16, float32 or float64")
        if features.dim() != 2:
            raise ValueError(f"{name}: got shape {tuple(features.shape)}, want two dimensions [rows, features]")
    (x_name, x), (y_name, y) = sides.items()
    if y.shape[1] != x.shape[1]:
        raise ValueError(f"{y_name}: got {y.shape[1]} features, want {x.shape[1]} as in {x_name}")
    if y.device != x.device:
        raise ValueError(f"{y_name}: got device {y.device}, want {x.device} as {x_name}")


def _check_group_ids(
    group_ids: Tensor | tuple[Tensor, Tensor] | None, image_features: Tensor, text_features: Tensor
) -> tuple[Tensor, Tensor | None] | None:
    """The ids of the rows and, if they are given, of the columns."""
    if group_ids is None:
        return None
    if not isinstance(group_ids, tuple):
        _check_ids("group_ids", group_ids, image_features, "image", "image_features")
        return group_ids.long(), None
    if len(group_ids) != 2:
        want = f"a tensor [{image_features.shape[0]}] or a pair of tensors"
        raise ValueError(f"group_ids: got {len(group_ids)} of them, want {want}")
    row_ids, col_ids = group_ids
    _check_ids("group_ids[0]", row_ids, image_features, "image", "image_features")
    _check_ids("group_ids[1]", col_ids, text_features, "text", "image_features")
    return row_ids.long(), col_ids.long()


def _check_ids(name: str, ids: Tensor, side: Tensor, one: str, where: str) -> None:
    """Raise one sentence unless ``ids`` are integers, one for each row of ``side``."""
    length, device = side.shape[0], side.device
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name}: got {type(ids).__name__}, want an int64 tensor [{length}]")
    _check_plain(name, ids)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name}: got dtype {ids.dtype}, want int64")
    if ids.shape != (length,):
        raise ValueError(f"{name}: got shape {tuple(ids.shape)}, want [{length}], one for each {one}")
    if ids.device != device:
        raise ValueError(f"{name}: got device {ids.device}, want {device} as {where}")


def _check_weights(weights: Tensor, image_features: Tensor) -> None:
    rows, device = image_features.shape[0], image_features.device
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights: got {type(weights).__name__}, want a float32 tensor [{rows}]")
    _check_plain("weights", weights)
    if weights.is_complex():
        raise TypeError(f"weights: got dtype {weights.dtype}, want float32")
    if weights.shape != (rows,):
        raise ValueError(f"weights: got shape {tuple(weights.shape)}, want [{rows}], one for each pair")
    if weights.device != device:
        raise ValueError(f"weights: got device {weights.device}, want {device} as image_features")


def _check_choice(name: str, value: str) -> None:
    *others, last = (f'"{choice}"' for choice in _CHOICES[name])
    wanted = f"{', '.join(others)} or {last}"
    if not isinstance(value, str):
        raise TypeError(f"{name}: got {type(value).__name__}, want {wanted}")
    if value not in _CHOICES[name]:
        raise ValueError(f"{name}: got {value!r}, want {wanted}")


def check_flag(name: str, value: bool) -> None:
    """Raise one sentence unless ``value`` is True or False, Python's or NumPy's."""
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_", "SymBool"):
        raise TypeError(f"{name}: got {type(value).__name__}, want True or False")


def check_has_value(name: str, number: Tensor | float, device: torch.device) -> None:
    """Raise one sentence for a number on the meta device, unless nothing is computed."""
    if isinstance(number, Tensor) and number.is_meta and device.type != "meta":
        raise ValueError(f"{name}: got a tensor on meta, want one that has a value")


def read_number(name: str, value: Tensor | float) -> float:
    """The value of :func:`check_number`, checked, that of a tensor too."""
    checked = check_number(name, value)
    check_has_value(name, checked, torch.device("cpu"))
    return float(check_number(name, float(checked)))


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
    if isinstance(value, numbers.Rational) and not torch.compiler.is_compiling() and abs(value) > sys.float_info.max:
        value = math.inf if value > 0 else -math.inf  # no float, and maybe too long to be shown
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
        scalar = (value.reshape(()) if value.dim() else value).resolve_neg()
        return scalar.to(device=device, dtype=dtype, non_blocking=True)
    if torch.compiler.is_compiling():
        # In a product a number that changes becomes an input of the graph; in torch.full, a constant of one graph each.
        return torch.ones((), dtype=dtype, device=device) * value
    # torch.tensor would copy from the host, and wait for it.
    return torch.full((), float(value), dtype=dtype, device=device)
