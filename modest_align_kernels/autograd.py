r"""The loss and its gradient from a backend's four functions: what is saved, what is recomputed.

Everything that depends on the target leaves the B x N loop. With p_i = S_ii, the negatives' logsumexp rho_i of row i
and kappa_j of column j, smoothing a, n_i and m_j negatives, and w = 1/2B (1/B in one direction),

    L  = w [ sum_i softplus(rho_i - p_i) + sum_j softplus(kappa_j - p_j) ] + a * slope
    slope = w [ sum_i (p_i - sum_{j neg} S_ij / n_i) + sum_j (p_j - sum_{i neg} S_ij / m_j) ]

where a sum over negatives is the product with a sum of rows, O(BD). Rows without negatives leave the slope: all their
mass is on the positive. The gradient to x_hat_i is, with sigma the logistic function,

    scale w { sum_j G_ij y_hat_j - [sigma(rho_i - p_i) + sigma(kappa_i - p_i)] y_hat_i  + a * d slope }

of which the first term is ``contrastive_grads`` with the weights sigma(rho_i - p_i) and sigma(kappa_j - p_j), and the
rest is added in float32.

Saved are x_hat and y_hat (in the operands' dtype), their inverse norms, four vectors of length B, and what the backend
keeps of the exponentials; the noise is neither saved nor drawn again, because adding it has the identity as its
Jacobian.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from modest_align_kernels import ops
from modest_align_kernels.noise import IMAGES, TEXTS


class Options(NamedTuple):
    """What a call of the loss does not differentiate, and no tensor holds; see ``modest_align_loss``."""

    relative_noise: bool
    symmetric: bool
    paired_groups: bool  # the columns' group ids are the rows'
    operand_dtype: torch.dtype
    backend: str
    keep: bool  # a backward can follow: the forward may leave exponentials for it


def _softplus(x: Tensor) -> Tensor:
    # PyTorch's default threshold drops 2e-9 past 20, which float64 would notice.
    return torch.nn.functional.softplus(x, threshold=40.0)


def number_groups(row_ids: Tensor, col_ids: Tensor | None, columns: int) -> tuple[Tensor, Tensor]:
    """The groups' numbers from 0, in the order of the rows' ids: int32 [B] and int32 [columns].

    Args:
        row_ids: integers [B] of any values.
        col_ids: integers [columns], or None: those of the rows, and no group for columns past B.
        columns: N.

    Returns:
        The rows' numbers, below B, and the columns': B where a column is in no row's group.
    """
    # torch.unique would need the number of groups on the host: a sync on a GPU, a graph break when compiled.
    order = row_ids.argsort()
    in_order = row_ids[order]
    starts = torch.zeros_like(order)
    starts[1:] = in_order[1:] != in_order[:-1]
    number = starts.cumsum(0)
    row_numbers = torch.empty_like(order, dtype=torch.int32)
    row_numbers[order] = number.int()
    rows = row_ids.shape[0]
    if col_ids is None:
        return row_numbers, torch.cat((row_numbers, row_numbers.new_full((columns - rows,), rows)))
    place = torch.searchsorted(in_order, col_ids).clamp_max(rows - 1)
    return row_numbers, torch.where(in_order[place] == col_ids, number[place], rows).int()


def _excluded_sums(values: Tensor, ids: Tensor, receivers: Tensor, apart: Tensor | None) -> Tensor:
    """Row r: the sum of ``values`` over what is excluded with r: equal ids, and number r itself.

    Args:
        values: [V, D].
        ids: [V], those of :func:`number_groups`.
        receivers: [R], likewise, of the other side.
        apart: [B, 1], 1 where the two ids of a pair differ; None: nowhere.
    """
    rows = min(ids.shape[0], receivers.shape[0])
    sums = values.new_zeros((rows + 1, values.shape[1]))
    # On a GPU index_add_ is made of atomics, whose order changes from run to run; this sorts the ids first.
    sums = sums.index_put_((ids,), values, accumulate=True) if values.is_cuda else sums.index_add_(0, ids, values)
    sums = sums[receivers]
    if apart is not None:
        sums[:rows].addcmul_(apart, values[:rows])
    return sums


class _Smoothing(NamedTuple):
    """The gradient of the smoothing's slope, which is linear in what it moves: all tensors in the accumulation dtype.

    Attributes:
        row_negative_weight: of one negative of row i, 1 / n_i: 0-dim, or [B, 1] with groups.
        col_negative_weight: 1 / m_j, likewise; 0 in one direction.
        pair_weight: of the positives, 0-dim or [B].
        all_x: sum of x_hat, [D].
        all_y: sum of y_hat, [D].
        weighted_x: sum of x_hat by the weights of its rows' negatives, [D].
        weighted_y: sum of the first B rows of y_hat by the weights of their columns' negatives, [D].
        apart: [B, 1], 1 where the two ids of a pair differ; None where they cannot.
    """

    row_negative_weight: Tensor
    col_negative_weight: Tensor
    pair_weight: Tensor
    all_x: Tensor
    all_y: Tensor
    weighted_x: Tensor
    weighted_y: Tensor
    apart: Tensor | None = None

    @classmethod
    def of(
        cls,
        x_hat: Tensor,
        y_hat: Tensor,
        row_ids: Tensor | None,
        col_ids: Tensor | None,
        options: Options,
        dtype: torch.dtype,
    ) -> _Smoothing:
        rows, columns = x_hat.shape[0], y_hat.shape[0]
        paired = y_hat if rows == columns else y_hat[:rows]
        all_x, all_y = x_hat.sum(0, dtype=dtype), y_hat.sum(0, dtype=dtype)
        if row_ids is None or col_ids is None:
            row_mass, col_mass = float(columns > 1), float(options.symmetric and rows > 1)
            on_row, on_col = row_mass / max(columns - 1, 1), col_mass / max(rows - 1, 1)
            # The positive is in the sums over all, too.
            numbers = on_row, on_col, row_mass + col_mass + on_row + on_col
            row_weight, col_weight, pair_weight = (all_x.new_full((), number) for number in numbers)
            paired_y = all_y if paired is y_hat else paired.sum(0, dtype=dtype)
            return cls(row_weight, col_weight, pair_weight, all_x, all_y, on_row * all_x, on_col * paired_y)
        one, paired_ids = all_x.new_ones((columns, 1)), col_ids[:rows]
        apart = None if options.paired_groups else (row_ids != paired_ids).to(dtype).unsqueeze(1)
        row_excluded = _excluded_sums(one, col_ids, row_ids, apart)
        col_excluded = row_excluded if apart is None else _excluded_sums(one[:rows], row_ids, paired_ids, apart)
        row_negatives, col_negatives = columns - row_excluded, rows - col_excluded
        row_weight = torch.where(row_negatives > 0, row_negatives.reciprocal(), 0.0)
        col_weight = torch.where(col_negatives > 0, col_negatives.reciprocal(), 0.0) * float(options.symmetric)
        pair_weight = torch.cat((row_weight, col_weight), 1).sign().sum(1)
        weighted_x, weighted_y = (row_weight * x_hat).sum(0), (col_weight * paired).sum(0)
        return cls(row_weight, col_weight, pair_weight, all_x, all_y, weighted_x, weighted_y, apart)

    def excluded_y(self, y_hat: Tensor, row_ids: Tensor, col_ids: Tensor) -> Tensor:
        """[B, D]: what the sums over all columns have too much for row i, by both directions' weights."""
        rows, paired_ids = row_ids.shape[0], col_ids[: row_ids.shape[0]]
        if self.apart is None:  # the weights are the same for a whole group
            return _excluded_sums(self._both_weights * y_hat[:rows], paired_ids, row_ids, None)
        own = self.row_negative_weight * _excluded_sums(y_hat.to(self.all_y.dtype), col_ids, row_ids, self.apart)
        return own.add_(_excluded_sums(self.col_negative_weight * y_hat[:rows], paired_ids, row_ids, self.apart))

    def excluded_x(self, x_hat: Tensor, row_ids: Tensor, col_ids: Tensor) -> Tensor:
        """[B or N, D]: what the sums over all rows have too much for column j, likewise; past B nothing."""
        rows, paired_ids = row_ids.shape[0], col_ids[: row_ids.shape[0]]
        if self.apart is None:
            return _excluded_sums(self._both_weights * x_hat, row_ids, paired_ids, None)
        sums = _excluded_sums(self.row_negative_weight * x_hat, row_ids, col_ids, self.apart)
        own = _excluded_sums(x_hat.to(self.all_x.dtype), row_ids, paired_ids, self.apart)
        sums[:rows].addcmul_(self.col_negative_weight, own)
        return sums

    @property
    def _both_weights(self) -> Tensor:
        return self.row_negative_weight + self.col_negative_weight

    def slope(
        self, x_hat: Tensor, y_hat: Tensor, pair_dot: Tensor, row_ids: Tensor | None, col_ids: Tensor | None
    ) -> Tensor:
        """DL/da / (scale w): see the module's docstring. 0-dim."""
        slope = (self.pair_weight * pair_dot).sum()
        slope = slope - torch.dot(self.weighted_x, self.all_y) - torch.dot(self.weighted_y, self.all_x)
        if row_ids is None or col_ids is None:
            return slope
        return slope + (x_hat * self.excluded_y(y_hat, row_ids, col_ids)).sum()


class _OnlyFirstDerivatives(torch.autograd.Function):
    """(what they depend on, gradients) -> gradients, whose differentiation raises."""

    @staticmethod
    def forward(ctx: Any, depend_on: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """``depend_on`` leads a second differentiation here, wherever it is bound for."""
        return gradients

    @staticmethod
    def backward(ctx: Any, *unused: Tensor | None) -> Any:
        """Raise."""
        raise RuntimeError(
            "modest_align_loss has no second derivative: its gradient was differentiated again (create_graph=True)"
        )


class ContrastiveLoss(torch.autograd.Function):
    """(x, y, scale, smoothing, ...) -> (loss, row_lse of the negatives)."""

    @staticmethod
    def forward(
        ctx: Any,
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
        """Args as :func:`modest_align_kernels.modest_align_loss`; ``smoothing`` None is none at all."""
        rows = x.shape[0]
        relative_noise, symmetric, _, operand_dtype, backend, _ = options

        def perturb_normalize(features: Tensor, noise_stream: int, pair_hat: Tensor | None) -> tuple[Tensor, ...]:
            noise = seed, noise_std, noise_stream, relative_noise
            return ops.perturb_normalize(features, *noise, pair_hat, operand_dtype=operand_dtype, backend=backend)

        x_hat, x_inv_norm, _ = perturb_normalize(x, IMAGES, None)
        y_hat, y_inv_norm, pair_dot = perturb_normalize(y, TEXTS, x_hat)
        row_lse, col_lse, exponentials = ops.contrastive_stats(
            *(x_hat, y_hat, scale, row_ids, col_ids, True),
            col_count=rows if symmetric else 0,
            keep=options.keep,
            backend=backend,
        )
        # rho - p and kappa - p
        row_margin = torch.addcmul(row_lse, pair_dot, scale, value=-1)
        loss, col_margin = _softplus(row_margin).sum(), col_lse
        if symmetric:
            col_margin = torch.addcmul(col_lse, pair_dot, scale, value=-1)
            loss = loss + _softplus(col_margin).sum()
        loss = loss * _weight(rows, symmetric)
        slope: Tensor | None = None
        smoothed: tuple[Tensor | None, ...] = ()
        if smoothing is not None:
            smoothed = target = _Smoothing.of(x_hat, y_hat, row_ids, col_ids, options, scale.dtype)
            slope = target.slope(x_hat, y_hat, pair_dot, row_ids, col_ids) * scale * _weight(rows, symmetric)
            loss = loss + smoothing * slope
        ctx.options, ctx.features, ctx.dtypes = options, x.shape[1], (x.dtype, y.dtype)
        operands = x_hat, y_hat, x_inv_norm, y_inv_norm
        margins = row_margin, col_margin
        ctx.save_for_backward(
            *(row_lse, col_lse, *margins, *operands, exponentials),
            *(row_ids, col_ids, scale, smoothing, slope, *smoothed),
        )
        ctx.set_materialize_grads(False)
        # An output that is saved leads a second differentiation of the gradients back to here.
        return loss, row_lse

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        """Gradients to x, y, scale and smoothing."""
        gradients: tuple[Tensor | None, ...] = (None,) * 4
        if grad_loss is not None:
            with torch.no_grad():
                gradients = _gradients(ctx, grad_loss)
            if torch.is_grad_enabled():
                gradients = _OnlyFirstDerivatives.apply(ctx.saved_tensors[0], *gradients)
        return *gradients, *(None,) * 5


def _gradients(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    row_lse, col_lse, row_margin, col_margin, x_hat, y_hat, x_inv_norm, y_inv_norm, *others = ctx.saved_tensors
    exponentials, row_ids, col_ids, scale, smoothing, slope, *smoothed = others
    symmetric, backend, rows = ctx.options.symmetric, ctx.options.backend, x_hat.shape[0]
    want_x, want_y, want_scale, want_smoothing = ctx.needs_input_grad[:4]
    # <x_hat, dL/dx_hat> = <y_hat, dL/dy_hat> = scale dL/dscale: either side gives the scale's gradient.
    run_x = want_x or (want_scale and not want_y)
    d_x = d_y = d_scale = None
    d_smoothing = grad_loss * slope if want_smoothing else None
    if not (run_x or want_y):
        return None, None, None, d_smoothing

    row_weight, col_weight = torch.sigmoid(row_margin), torch.sigmoid(col_margin)
    pair_weight = (row_weight + col_weight if symmetric else row_weight).neg()
    grad_x, grad_y = ops.contrastive_grads(
        *(x_hat, y_hat, scale, row_lse, col_lse, row_weight, col_weight, row_ids, col_ids, True, exponentials),
        want_x=run_x,
        want_y=want_y,
        backend=backend,
    )
    x_offset = y_offset = scale.new_zeros((2, x_hat.shape[1]))
    if smoothing is not None:
        target = _Smoothing(*smoothed)
        pair_weight = torch.addcmul(pair_weight, smoothing, target.pair_weight)
        if row_ids is None or col_ids is None:
            to_x = target.weighted_y + target.row_negative_weight * target.all_y
            to_paired_y = target.weighted_x + target.col_negative_weight * target.all_x
            x_offset = (-smoothing * to_x).repeat(2, 1)
            y_offset = -smoothing * torch.stack((to_paired_y, target.weighted_x))
        else:
            x_offset = (-smoothing * target.weighted_y).repeat(2, 1)
            y_offset = (-smoothing * target.weighted_x).repeat(2, 1)
            if run_x:
                excluded = target.excluded_y(y_hat, row_ids, col_ids)
                grad_x.addcmul_(smoothing, excluded.addcmul_(target.row_negative_weight, target.all_y, value=-1))
            if want_y:
                excluded = target.excluded_x(x_hat, row_ids, col_ids)
                excluded[:rows].addcmul_(target.col_negative_weight, target.all_x, value=-1)
                grad_y[: len(excluded)].addcmul_(smoothing, excluded)
    factor = grad_loss.to(scale.dtype) * scale * _weight(rows, symmetric)

    def side(
        dtype: torch.dtype, grad: Tensor, hat: Tensor, inv_norm: Tensor, pair_hat: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor]:
        return ops.perturb_normalize_backward(
            *(grad, hat, inv_norm, pair_hat, pair_weight, offset, factor),
            features=ctx.features,
            dtype=dtype,
            backend=backend,
        )

    if run_x:
        pair_hat = y_hat if y_hat.shape[0] == rows else y_hat[:rows]
        d_x, dot = side(ctx.dtypes[0], grad_x, x_hat, x_inv_norm, pair_hat, x_offset)
    del grad_x
    if want_y:
        d_y, dot = side(ctx.dtypes[1], grad_y, y_hat, y_inv_norm, x_hat, y_offset)
    if want_scale:
        d_scale = dot.sum() / scale
    return d_x if want_x else None, d_y, d_scale, d_smoothing


def _weight(rows: int, symmetric: bool) -> float:
    """A pair's share in the mean, in each direction."""
    return 1 / (2 * rows) if symmetric else 1 / rows
