r"""The loss and its gradient from a backend's five functions: what is saved, what is recomputed.

Everything that depends on the target leaves the B x N loop. With p_i = S_ii, the negatives' logsumexp rho_i of row i
and kappa_j of column j, smoothing a, n_i and m_j negatives, and w = 1/2B (1/B in one direction),

    L  = w [ sum_i softplus(rho_i - p_i) + sum_j softplus(kappa_j - p_j) ] + a * slope
    slope = w [ sum_i (p_i - sum_{j neg} S_ij / n_i) + sum_j (p_j - sum_{i neg} S_ij / m_j) ]

where a sum over negatives is the product with a sum of rows, O(BD): that of all less that of the row's own group. Rows
without negatives leave the slope: all their mass is on the positive. ``pair_losses`` has these terms pair by pair. The
gradient to x_hat_i is, with sigma the logistic function,

    scale w { sum_j G_ij y_hat_j - [sigma(rho_i - p_i) + sigma(kappa_i - p_i)] y_hat_i  + a * d slope }

of which the first term is ``contrastive_grads`` with the weights sigma(rho_i - p_i) and sigma(kappa_j - p_j), and the
rest is added in float32 by ``perturb_normalize_backward``.

Saved are x_hat and y_hat (in the operands' dtype), their inverse norms, some vectors of length B, and what the backend
keeps of the exponentials; the sums over groups are made again, and the noise is neither saved nor drawn again, because
adding it has the identity as its Jacobian.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modest_align_kernels import ops
from modest_align_kernels.noise import IMAGES, TEXTS


class Options(NamedTuple):
    """What a call does not differentiate, and no tensor holds; see ``modest_align_loss``."""

    operand_dtype: torch.dtype
    backend: str
    keep: bool  # a backward can follow: the forward may leave exponentials for it
    relative_noise: bool = False
    symmetric: bool = True
    mean: bool = True  # of the pairs' losses; else these


def number_groups(row_ids: Tensor, col_ids: Tensor | None, columns: int) -> tuple[Tensor, Tensor]:
    """Numbers for the groups' ids: int32 [B] below B, and int32 [columns] that are B where a column is in no group.

    Args:
        row_ids: integers [B] of any values.
        col_ids: integers [columns], or None: those of the rows, and no group for columns past B.
        columns: N.
    """
    # torch.unique would need the number of groups on the host: a sync on a GPU, a graph break when compiled. A group's
    # number is the first place of its id among the sorted ones.
    rows, in_order = row_ids.shape[0], row_ids.sort().values
    row_numbers = torch.searchsorted(in_order, row_ids, out_int32=True)
    if col_ids is None:
        # Without extra columns a copy: Dynamo refuses one tensor as two inputs of a Function.
        return row_numbers, torch.cat((row_numbers, row_numbers.new_full((columns - rows,), rows)))
    first = torch.searchsorted(in_order, col_ids, out_int32=True)
    end = torch.searchsorted(in_order, col_ids, out_int32=True, right=True)
    return row_numbers, first.masked_fill_(first == end, rows)


class OnlyFirstDerivatives(torch.autograd.Function):
    """(whose they are, what they depend on, gradients) -> gradients, whose differentiation raises."""

    @staticmethod
    def forward(name: str, depend_on: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """``depend_on`` leads a second differentiation here, wherever it is bound for."""
        return gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """For the message."""
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *unused: Tensor | None) -> Any:
        """Raise."""
        raise RuntimeError(
            f"{ctx.name} has no second derivative: its gradient was differentiated again (create_graph=True)"
        )


class ContrastiveLoss(torch.autograd.Function):
    """(x, y, scale, smoothing, ...) -> (loss or [B] losses, row_lse of the negatives, what else the backward needs)."""

    @staticmethod
    def forward(
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        smoothing: Tensor | None,
        row_ids: Tensor | None,
        col_ids: Tensor | None,
        seed: Tensor | None,
        noise_std: Tensor | None,
        options: Options,
    ) -> tuple[Tensor, ...]:
        """Args as :func:`modest_align_kernels.modest_align_loss`; no smoothing is None."""
        # torch.export traces through here with gradients on, and would keep those of some operators alone.
        with torch.no_grad():
            rows, backend = x.shape[0], options.backend

            def perturb_normalize(features: Tensor, noise_stream: int, pair_hat: Tensor | None) -> tuple[Tensor, ...]:
                noise = seed, noise_std, noise_stream, options.relative_noise
                return ops.perturb_normalize(
                    features, *noise, pair_hat, operand_dtype=options.operand_dtype, backend=backend
                )

            x_hat, x_inv_norm, _ = perturb_normalize(x, IMAGES, None)
            y_hat, y_inv_norm, pair_dot = perturb_normalize(y, TEXTS, x_hat)
            row_lse, col_lse, exponentials = ops.contrastive_stats(
                *(x_hat, y_hat, scale, row_ids, col_ids, True),
                col_count=rows if options.symmetric else 0,
                keep=options.keep,
                backend=backend,
            )
            losses, *of_pairs = ops.pair_losses(
                row_lse, col_lse, pair_dot, scale, smoothing, x_hat, y_hat, row_ids, col_ids, backend=backend
            )
            loss = losses.mean() if options.mean else losses
            return loss, row_lse, col_lse, x_hat, y_hat, exponentials, x_inv_norm, y_inv_norm, *of_pairs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save what ``_gradients`` reads."""
        x, y, scale, smoothing, row_ids, col_ids, _, _, ctx.options = inputs
        _, row_lse, *saved = output
        ctx.features, ctx.dtypes = x.shape[1], (x.dtype, y.dtype)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*saved)
        # An output that is saved leads a second differentiation of the gradients back to here.
        ctx.save_for_backward(row_lse, *saved, scale, smoothing, row_ids, col_ids)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Gradients to x, y, scale and smoothing."""
        gradients: tuple[Tensor | None, ...] = (None,) * 4
        if grad_loss is not None:
            with torch.no_grad():
                gradients = _gradients(ctx, grad_loss)
            if torch.is_grad_enabled():
                gradients = OnlyFirstDerivatives.apply("modest_align_loss", ctx.saved_tensors[0], *gradients)
        return *gradients, *(None,) * 5

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """Raise."""
        raise RuntimeError("modest_align_loss has no torch.vmap: got several batches at once, want one call for each")


def _gradients(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    row_lse, col_lse, x_hat, y_hat, exponentials, x_inv_norm, y_inv_norm, *more = ctx.saved_tensors
    row_weight, col_weight, pair_weight, slope, row_negative_weight, col_negative_weight, *more = more
    scale, smoothing, row_ids, col_ids = more
    share, d_smoothing = 0.5 if ctx.options.symmetric else 1.0, None
    if ctx.options.mean:
        factor = grad_loss * (share / len(row_lse))
        if ctx.needs_input_grad[3]:
            d_smoothing = grad_loss * slope.mean()
    else:
        if ctx.needs_input_grad[3]:
            d_smoothing = torch.dot(grad_loss, slope)
        largest, grad_loss = _largest(grad_loss)
        factor = largest * share
        row_weight, pair_weight = row_weight * grad_loss, pair_weight * grad_loss
        col_weight = col_weight * grad_loss[: len(col_weight)]
        if smoothing is not None:
            row_negative_weight, col_negative_weight = row_negative_weight * grad_loss, col_negative_weight * grad_loss
    softmaxes = row_lse, col_lse, row_weight, col_weight, row_ids, col_ids, True, exponentials
    of_x = smoothing, row_ids, col_ids, row_negative_weight, col_negative_weight
    of_y = smoothing, col_ids, row_ids, col_negative_weight, row_negative_weight
    sides = (x_hat, x_inv_norm, of_x), (y_hat, y_inv_norm, of_y)
    return *_of_inputs(ctx, sides, pair_weight, scale, factor, softmaxes), d_smoothing


class ContrastiveLogsumexp(torch.autograd.Function):
    """(x, y, scale, ...) -> (row_lse, col_lse, what else the backward needs)."""

    @staticmethod
    def forward(
        x: Tensor, y: Tensor, scale: Tensor, row_ids: Tensor | None, col_ids: Tensor | None, options: Options
    ) -> tuple[Tensor, ...]:
        """Args as :func:`modest_align_kernels.contrastive_logsumexp`."""
        with torch.no_grad():  # as above
            of_operands: dict[str, Any] = {"operand_dtype": options.operand_dtype, "backend": options.backend}
            x_hat, x_inv_norm, _ = ops.perturb_normalize(x, None, None, IMAGES, False, None, **of_operands)
            y_hat, y_inv_norm, _ = ops.perturb_normalize(y, None, None, TEXTS, False, None, **of_operands)
            row_lse, col_lse, exponentials = ops.contrastive_stats(
                *(x_hat, y_hat, scale, row_ids, col_ids, False),
                col_count=y.shape[0],
                keep=options.keep,
                backend=options.backend,
            )
            return row_lse, col_lse, x_hat, y_hat, exponentials, x_inv_norm, y_inv_norm

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save what the backward reads."""
        x, y, scale, row_ids, col_ids, ctx.options = inputs
        ctx.features, ctx.dtypes = x.shape[1], (x.dtype, y.dtype)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*output, scale, row_ids, col_ids)

    @staticmethod
    def backward(ctx: Any, grad_row: Tensor | None, grad_col: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Gradients to x, y and scale."""
        gradients: tuple[Tensor | None, ...] = (None,) * 3
        if grad_row is not None or grad_col is not None:
            with torch.no_grad():
                gradients = _logsumexp_gradients(ctx, grad_row, grad_col)
            if torch.is_grad_enabled():
                name, (row_lse, col_lse, *_) = "contrastive_logsumexp", ctx.saved_tensors
                depend_on = row_lse if grad_row is not None else col_lse
                gradients = OnlyFirstDerivatives.apply(name, depend_on, *gradients)
        return *gradients, *(None,) * 3

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """Raise."""
        raise RuntimeError(
            "contrastive_logsumexp has no torch.vmap: got several batches at once, want one call for each"
        )


def _logsumexp_gradients(ctx: Any, grad_row: Tensor | None, grad_col: Tensor | None) -> tuple[Tensor | None, ...]:
    row_lse, col_lse, x_hat, y_hat, exponentials, x_inv_norm, y_inv_norm, scale, row_ids, col_ids = ctx.saved_tensors
    row_weight = torch.zeros_like(row_lse) if grad_row is None else grad_row
    col_weight = col_lse.new_empty(0) if grad_col is None else grad_col
    largest, row_weight, col_weight = _largest(row_weight, col_weight)
    softmaxes = row_lse, col_lse[: len(col_weight)], row_weight, col_weight
    nothing = row_lse.new_empty(0)
    unsmoothed = None, None, None, nothing, nothing
    sides = (x_hat, x_inv_norm, unsmoothed), (y_hat, y_inv_norm, unsmoothed)
    return _of_inputs(ctx, sides, nothing, scale, largest, (*softmaxes, row_ids, col_ids, False, exponentials))


def _largest(*weights: Tensor) -> tuple[Tensor, ...]:
    return over_largest(torch.stack([weight.abs().amax() for weight in weights if len(weight)]).amax(), *weights)


def over_largest(largest: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """The largest absolute value, and the weights over it: between -1 and 1, so that float16 holds G."""
    largest = largest.masked_fill(largest == 0, 1.0)
    return largest, *(weight / largest for weight in weights)


def _of_inputs(
    ctx: Any,
    sides: tuple[tuple[Tensor, Tensor, tuple[Any, ...]], ...],
    pair_weight: Tensor,
    scale: Tensor,
    factor: Tensor,
    softmaxes: tuple[Any, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to x, y and scale, of those that are wanted.

    Args:
        ctx: of a Function whose inputs begin with these three.
        sides: for x and y the unit rows, their inverse norms, and what the smoothing adds.
        pair_weight: see :class:`modest_align_kernels.backends.contract.PerturbNormalizeBackward`.
        scale: likewise.
        factor: likewise.
        softmaxes: the arguments of ``contrastive_grads`` after the scale.
    """
    (x_hat, x_inv_norm, of_x), (y_hat, y_inv_norm, of_y) = sides
    want_x, want_y, want_scale = ctx.needs_input_grad[:3]
    # Either side gives the scale's gradient.
    run_x = want_x or (want_scale and not want_y)
    if not (run_x or want_y):
        return None, None, None
    grad_x, grad_y = ops.contrastive_grads(
        x_hat, y_hat, scale, *softmaxes, want_x=run_x, want_y=want_y, backend=ctx.options.backend
    )
    d_x = d_y = None
    if run_x:
        of_pairs = y_hat, pair_weight, scale, factor, *of_x
        d_x, dot = through_normalisation(ctx, 0, grad_x, x_hat, x_inv_norm, *of_pairs)
    del grad_x
    if want_y:
        of_pairs = x_hat, pair_weight, scale, factor, *of_y
        d_y, dot = through_normalisation(ctx, 1, grad_y, y_hat, y_inv_norm, *of_pairs)
    return d_x if want_x else None, d_y, dot.sum() if want_scale else None


def through_normalisation(ctx: Any, side: int, *terms: Any) -> tuple[Tensor, Tensor]:
    """The gradient to x (side 0) or y, and the rows' dots: ``perturb_normalize_backward``, which gets ``terms``."""
    return ops.perturb_normalize_backward(
        *terms, features=ctx.features, dtype=ctx.dtypes[side], backend=ctx.options.backend
    )


# apply() asks for the signature in every call, and would parse it each time.
for _forward in (ContrastiveLoss.forward, ContrastiveLogsumexp.forward):
    setattr(_forward, "__signature__", inspect.signature(_forward))  # noqa: B010
