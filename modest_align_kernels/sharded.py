"""The loss and the logsumexps of rows that are spread over ranks: as :mod:`modest_align_kernels.autograd` has them.

Each rank has rows of its own, and sees all columns, at once or one rank's after another (``distributed.Ranks.visit``).
The rows are the images and the columns the texts, or, where the images travel, the other way round (``Ranks.ordered``).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from modest_align_kernels import ops
from modest_align_kernels.autograd import (
    OnlyFirstDerivatives,
    Options,
    number_groups,
    over_largest,
    through_normalisation,
)
from modest_align_kernels.backends import accumulation_dtype, blocks, negated_sums
from modest_align_kernels.backends.registry import operand_width
from modest_align_kernels.distributed import Columns, Ranks
from modest_align_kernels.noise import IMAGES, TEXTS

_ROWS = 1024  # of a block of O(N D) terms


class _Rows(NamedTuple):
    """This rank's rows, as every block of columns meets them."""

    hat: Tensor
    scale: Tensor
    ids: Tensor | None  # int64 [B]
    numbers: Tensor | None  # int32 [B], of their groups
    exclude_own: bool  # row i's positive, column i of this rank's, is excluded
    options: Options

    def numbers_of(self, columns: Columns) -> Tensor | None:
        """int32 [n], those of the columns' groups: B if they are in no group of these rows."""
        if self.ids is None or columns.ids is None:
            return None
        _, numbers = number_groups(self.ids, columns.ids, len(columns.ids))
        return pad(numbers, (0, len(columns.hat) - len(numbers)), value=len(self.ids))

    def excluded(self, columns: Columns, numbers: Tensor | None) -> tuple[Any, ...]:
        """Arguments row_ids, col_ids and exclude_diagonal of the operators."""
        return self.numbers, numbers, self.exclude_own and columns.own_first


def _rows(hat: Tensor, ids: Tensor | None, scale: Tensor, exclude_own: bool, options: Options) -> _Rows:
    numbers = None if ids is None else number_groups(ids, None, len(ids))[0]
    return _Rows(hat, scale, ids, numbers, exclude_own, options)


def _row_dots(hat: Tensor, sums: Tensor, numbers: Tensor | None) -> Tensor:
    """<hat_i, the sums of i's number> [rows]."""
    dots = sums.new_empty(len(hat))
    for i in blocks(len(hat), _ROWS):
        own = sums if numbers is None else sums[numbers[i]]
        torch.sum(hat[i].to(sums.dtype) * own, dim=1, out=dots[i])
    return dots


def _add_smoothing(
    grad: Tensor, smoothing: Tensor, weight: Tensor, sums: tuple[Tensor, ...], numbers: Tensor | None
) -> None:
    """Add smoothing * (weight_i * own_i + other_i), as ``backends/eager.py`` writes it.

    Args:
        grad: [rows, width].
        smoothing: 0-dim.
        weight: of the first rows; the others' are 0.
        sums: own and other, by the number of a row's group; of one number without groups.
        numbers: int32 [rows], or None.
    """
    weight = pad(weight * smoothing, (0, len(grad) - len(weight)))
    for i in blocks(len(grad), _ROWS):
        own, other = (t if numbers is None else t[numbers[i]] for t in sums)
        grad[i].addcmul_(weight[i, None], own).addcmul_(smoothing, other)


class _Stats(NamedTuple):
    """What a rank knows of its rows and of its counted columns when all have met."""

    row_lse: Tensor
    col_lse: Tensor  # [0] in one direction
    exponentials: Tensor | None
    col_sums: Tensor | None  # by a row's number: sums over the columns; with groups and row_sums
    row_counts: Tensor  # columns in the row's group
    col_dots: Tensor  # the column with the sum over its group's rows; likewise, and in both directions, else [0]
    col_counts: Tensor  # rows in the column's group


def _stats(ranks: Ranks, columns: Columns, rows: _Rows, row_sums: Tensor | None) -> _Stats:
    """The logsumexps of this rank's rows and columns, and what the smoothing wants to know of groups.

    Args:
        ranks: where the columns are.
        columns: this rank's for the ring, else all.
        rows: this rank's.
        row_sums: by number, the sums over this rank's rows; None: nobody asks for sums over groups.
    """
    own, options = len(rows.hat), rows.options
    row_lse = rows.scale.new_full((own,), -math.inf)
    row_counts = rows.scale.new_zeros(own)
    col_sums = None if row_sums is None else torch.zeros_like(row_sums)
    exponentials: Tensor | None = None

    def sizes(numbers: Tensor) -> Tensor:
        return row_lse.new_zeros(own + 1).index_add_(0, numbers, row_lse.new_ones(len(numbers)))

    group_sizes = None if row_sums is None or rows.numbers is None else sizes(rows.numbers)

    def find(columns: Columns) -> Tensor:
        nonlocal row_lse, exponentials
        count = columns.counted if options.symmetric else 0
        col_lse = row_lse.new_full((count,), -math.inf)
        numbers = rows.numbers_of(columns)
        if own and len(columns.hat):
            of_rows, col_lse, exponentials = ops.contrastive_stats(
                *(rows.hat, columns.hat, rows.scale, *rows.excluded(columns, numbers)),
                col_count=count,
                keep=options.keep and ranks.at_once,
                backend=options.backend,
            )
            row_lse = torch.logaddexp(row_lse, of_rows)
        found = [col_lse]
        if row_sums is not None and col_sums is not None and group_sizes is not None and numbers is not None:
            col_sums.add_(negated_sums(columns.hat, None, numbers, own))
            row_counts.add_(sizes(numbers)[rows.numbers])
            numbers = numbers[:count]
            found += [_row_dots(columns.hat[:count], row_sums, numbers), group_sizes[numbers]]
        return torch.stack(found, dim=1) if options.symmetric else col_lse.new_empty((columns.counted, 0))

    def merge(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat((torch.logaddexp(a[:, :1], b[:, :1]), a[:, 1:] + b[:, 1:]), dim=1)

    def home(found: Tensor) -> Tensor:
        if found.shape[1] == 0:
            return found[: ranks.counted[ranks.rank]]
        received = ranks.exchange(found)
        return torch.cat((received[..., :1].logsumexp(0), received[..., 1:].sum(0)), dim=1)

    found = ranks.visit(columns, find, merge, home, extra=False)
    col_lse, *sums = found.unbind(1) if found.shape[1] else (row_lse[:0],)
    col_dots, col_counts = sums or (row_lse[:0], row_counts.new_zeros(()))
    return _Stats(row_lse, col_lse.contiguous(), exponentials, col_sums, row_counts, col_dots, col_counts)


class _Smoothing(NamedTuple):
    """What the smoothing needs of each pair: see :func:`modest_align_kernels.backends.eager.pair_losses`."""

    slope: Tensor
    on_pair: Tensor
    row_share: Tensor  # row_negative_weight there
    col_share: Tensor
    sums: Tensor | None  # without groups: those of all ranks' rows and columns [2, 1, width], negated


def _smoothing(
    ranks: Ranks, rows: _Rows, own: Columns, stats: _Stats, pair_dot: Tensor, row_sums: Tensor, symmetric: bool
) -> _Smoothing:
    pairs, sums = len(pair_dot), None
    apart = torch.ones_like(pair_dot)
    if stats.col_sums is None or rows.ids is None or own.ids is None:
        sums = ranks.total(torch.stack((row_sums, negated_sums(own.hat, None, None, pairs))))
        row_sums, col_sums = sums
        col_dots = _row_dots(own.hat[:pairs], row_sums, None)
    else:
        col_sums, col_dots = stats.col_sums, stats.col_dots
        apart = (rows.ids[:pairs] != own.ids[:pairs]).to(apart.dtype)
    row_dots = _row_dots(rows.hat[:pairs], col_sums, None if rows.numbers is None else rows.numbers[:pairs])
    of_images, of_texts = ranks.ordered((row_dots, stats.row_counts[:pairs]), (col_dots, stats.col_counts))
    slope, on_pair, weights = torch.zeros_like(pair_dot), torch.zeros_like(pair_dot), []
    images = sum(ranks.counted)
    for wanted, others, (dots, counts) in (
        (True, images + sum(ranks.extra), of_images),
        (symmetric, images, of_texts),
    ):
        negatives = others - counts - apart
        weight = negatives.reciprocal().masked_fill_(negatives <= 0, 0.0) if wanted else torch.zeros_like(pair_dot)
        on_pair.add_(weight.sign()).addcmul_(apart, weight)
        if wanted:
            slope.addcmul_(weight, dots)
        weights.append(weight)
    slope.addcmul_(pair_dot, on_pair).mul_(rows.scale * (0.5 if symmetric else 1.0))
    row_share, col_share = weights
    return _Smoothing(slope, on_pair, row_share, col_share, sums)


def _normalize(
    ranks: Ranks,
    features: Tensor,
    noise_stream: int,
    pair_hat: Tensor | None,
    seed: Tensor | None,
    noise_std: Tensor | None,
    options: Options,
) -> tuple[Tensor, ...]:
    """``perturb_normalize``, also of no rows; the noise is that of a row's number among all ranks'."""
    own, rank = ranks.counted[ranks.rank], ranks.rank
    parts = [(features, pair_hat, sum(ranks.counted[:rank]))]
    if seed is not None and len(features) > own:
        # All ranks' extra columns follow all counted ones.
        parts = [(features[:own], *parts[0][1:])]
        parts += [(features[own:], None, sum(ranks.counted) + sum(ranks.extra[:rank]))]

    def normalize(features: Tensor, pair_hat: Tensor | None, first_row: int) -> tuple[Tensor, ...]:
        if len(features) == 0:
            width, dtype = operand_width(features.shape[1], options.backend), accumulation_dtype(options.operand_dtype)
            nothing = features.new_empty(0, dtype=dtype)
            return features.new_empty((0, width), dtype=options.operand_dtype), nothing, nothing
        pair_hat = None if pair_hat is None or len(pair_hat) == 0 else pair_hat
        return ops.perturb_normalize(
            *(features, seed, noise_std, noise_stream, options.relative_noise, pair_hat, first_row),
            operand_dtype=options.operand_dtype,
            backend=options.backend,
        )

    results = [normalize(*part) for part in parts]
    return results[0] if len(results) == 1 else tuple(torch.cat(t) for t in zip(*results, strict=True))


class RanksLoss(torch.autograd.Function):
    """(x, y, scale, smoothing, ...) -> this rank's pairs' losses [B]."""

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
        ranks: Ranks,
    ) -> Tensor:
        """As :meth:`modest_align_kernels.autograd.ContrastiveLoss.forward`, but ids as they were given."""
        pairs, col_ids = len(x), row_ids if col_ids is None else col_ids
        x_hat, x_inv_norm, _ = _normalize(ranks, x, IMAGES, None, seed, noise_std, options)
        y_hat, y_inv_norm, pair_dot = _normalize(ranks, y, TEXTS, x_hat, seed, noise_std, options)
        rows, own = _sides(ranks, x_hat, y_hat, scale, row_ids, col_ids, True, options)
        columns = own if ranks.ring else ranks.gathered(own)
        sums = None if smoothing is None else negated_sums(rows.hat, None, rows.numbers, len(rows.hat))
        stats = _stats(ranks, columns, rows, None if rows.numbers is None else sums)
        row_lse, col_lse = ranks.ordered(stats.row_lse, stats.col_lse)
        col_lse = col_lse[: pairs if options.symmetric else 0]
        losses, row_weight, pair_weight = (scale.new_empty(pairs) for _ in range(3))
        col_weight = torch.empty_like(col_lse)
        if pairs:
            losses, row_weight, col_weight, pair_weight, *_ = ops.pair_losses(
                *(row_lse, col_lse, pair_dot, scale, None, x_hat, y_hat, None, None), backend=options.backend
            )
        smoothed: tuple[Tensor | None, ...] = (None,) * 4
        if smoothing is not None and sums is not None:
            slope, on_pair, *shares = _smoothing(ranks, rows, own, stats, pair_dot, sums, options.symmetric)
            losses.addcmul_(smoothing, slope)
            pair_weight.addcmul_(smoothing, on_pair)
            smoothed = slope, *shares
        ctx.options, ctx.ranks, ctx.dtypes, ctx.features = options, ranks, (x.dtype, y.dtype), x.shape[1]
        ctx.set_materialize_grads(False)
        # Leads a second differentiation of the gradients back to here.
        ctx.save_for_backward(
            *(losses, x_hat, x_inv_norm, y_hat, y_inv_norm, scale, smoothing, row_ids, col_ids, *columns[:2]),
            *(stats.row_lse, stats.col_lse, stats.exponentials, row_weight, col_weight, pair_weight, *smoothed),
        )
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients to x, y, scale and smoothing."""
        gradients: tuple[Tensor | None, ...] = (None,) * 4
        if grad_losses is not None:
            with torch.no_grad():
                gradients = _loss_gradients(ctx, grad_losses)
            if torch.is_grad_enabled():
                gradients = OnlyFirstDerivatives.apply("modest_align_loss", ctx.saved_tensors[0], *gradients)
        return *gradients, *(None,) * 6


def _sides(
    ranks: Ranks,
    x_hat: Tensor,
    y_hat: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    exclude_pairs: bool,
    options: Options,
) -> tuple[_Rows, Columns]:
    """This rank's rows, and its columns."""
    rows, columns = ranks.ordered((x_hat, row_ids), (y_hat, col_ids))
    # All images have a logsumexp, also in one direction.
    options = options._replace(symmetric=options.symmetric or ranks.swapped)
    return _rows(*rows, scale, exclude_pairs, options), ranks.local(*columns)


def _loss_gradients(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
    ranks = ctx.ranks
    _, x_hat, x_inv_norm, y_hat, y_inv_norm, scale, smoothing, row_ids, col_ids, *more = ctx.saved_tensors
    seen_y_hat, seen_ids, row_lse, col_lse, exponentials, row_weight, col_weight, pair_weight, *more = more
    slope, row_share, col_share, sums = more
    d_smoothing: Tensor | None = None
    largest, grad_losses = _largest_of_all(ranks, grad_losses)
    rows, own = _sides(ranks, x_hat, y_hat, scale, row_ids, col_ids, True, ctx.options)
    pair_weight = pair_weight * grad_losses
    weights = row_weight * grad_losses, col_weight * grad_losses[: len(col_weight)]
    of_rows, of_columns = ranks.ordered(*weights)
    of_rows = pad(of_rows, (0, len(rows.hat) - len(of_rows)))  # texts that are no image's
    vectors = [col_lse, of_columns] if rows.options.symmetric else []
    smoothed: _Smoothed | None = None
    if smoothing is not None:
        of_row, of_column = ranks.ordered(row_share * grad_losses, col_share * grad_losses)
        smoothed = _Smoothed(smoothing, of_row, of_column, sums)
        if ctx.needs_input_grad[3]:
            d_smoothing = torch.dot(grad_losses, slope) * largest
        if sums is None:
            vectors.append(smoothed.col_share)
    columns = _with_vectors(ranks, own, seen_y_hat, seen_ids, vectors)
    factor = largest * (0.5 if ctx.options.symmetric else 1.0)
    sides = (x_hat, x_inv_norm), (y_hat, y_inv_norm)
    d_x, d_y, d_scale = _of_inputs(
        ctx, columns, rows, (row_lse, of_rows, exponentials), smoothed, sides, pair_weight, factor
    )
    shared = [d for d in (d_scale, d_smoothing) if d is not None]
    if shared:
        shared = list(ranks.total(torch.stack(shared)).div_(ranks.size))
    d_smoothing = None if d_smoothing is None else shared.pop()
    d_scale = None if d_scale is None else shared.pop()
    return d_x, d_y, d_scale, d_smoothing


class RanksLogsumexp(torch.autograd.Function):
    """(x, y, scale, ...) -> row_lse [B] and col_lse [N], of this rank's rows and columns with all ranks' others."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        row_ids: Tensor | None,
        col_ids: Tensor | None,
        options: Options,
        ranks: Ranks,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`modest_align_kernels.autograd.ContrastiveLogsumexp.forward`, but ids as they were given."""
        x_hat, x_inv_norm, _ = _normalize(ranks, x, IMAGES, None, None, None, options)
        y_hat, y_inv_norm, _ = _normalize(ranks, y, TEXTS, None, None, None, options)
        rows, own = _sides(ranks, x_hat, y_hat, scale, row_ids, col_ids, False, options)
        columns = own if ranks.ring else ranks.gathered(own)
        stats = _stats(ranks, columns, rows, None)
        row_lse, col_lse = ranks.ordered(stats.row_lse, stats.col_lse)
        ctx.options, ctx.ranks, ctx.dtypes, ctx.features = options, ranks, (x.dtype, y.dtype), x.shape[1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            *(row_lse, col_lse, x_hat, x_inv_norm, y_hat, y_inv_norm, scale, row_ids, col_ids),
            *(*columns[:2], stats.exponentials),
        )
        return row_lse, col_lse

    @staticmethod
    def backward(ctx: Any, grad_row: Tensor | None, grad_col: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients to x, y and scale."""
        row_lse, col_lse, *_ = ctx.saved_tensors
        # Which of them is None may not be the same on every rank.
        grad_row = torch.zeros_like(row_lse) if grad_row is None else grad_row
        grad_col = torch.zeros_like(col_lse) if grad_col is None else grad_col
        with torch.no_grad():
            gradients = _logsumexp_gradients(ctx, grad_row, grad_col)
        if torch.is_grad_enabled():
            gradients = OnlyFirstDerivatives.apply("contrastive_logsumexp", row_lse, *gradients)
        return *gradients, *(None,) * 4


def _logsumexp_gradients(ctx: Any, grad_row: Tensor, grad_col: Tensor) -> tuple[Tensor | None, ...]:
    ranks = ctx.ranks
    row_lse, col_lse, x_hat, x_inv_norm, y_hat, y_inv_norm, scale, row_ids, col_ids, *more = ctx.saved_tensors
    seen_y_hat, seen_ids, exponentials = more
    largest, row_weight, col_weight = _largest_of_all(ranks, grad_row, grad_col)
    rows, own = _sides(ranks, x_hat, y_hat, scale, row_ids, col_ids, False, ctx.options)
    of_rows, of_columns = ranks.ordered((row_lse, row_weight), (col_lse, col_weight))
    columns = _with_vectors(ranks, own, seen_y_hat, seen_ids, list(of_columns))
    sides, no_pairs = ((x_hat, x_inv_norm), (y_hat, y_inv_norm)), row_lse.new_empty(0)
    d_x, d_y, d_scale = _of_inputs(ctx, columns, rows, (*of_rows, exponentials), None, sides, no_pairs, largest)
    return d_x, d_y, None if d_scale is None else ranks.total(d_scale).div_(ranks.size)


def _largest_of_all(ranks: Ranks, *weights: Tensor) -> tuple[Tensor, ...]:
    """The largest absolute value on any rank, and the weights over it: one unit for all, in which float16 holds G."""
    # Zeros, so that there is always one.
    sizes = [torch.cat((weight.abs(), weight.new_zeros(1))).amax() for weight in weights]
    return over_largest(ranks.total(torch.stack(sizes).amax(), dist.ReduceOp.MAX), *weights)


class _Smoothed(NamedTuple):
    """What the smoothing adds to the gradients."""

    smoothing: Tensor
    row_share: Tensor  # of the first rows, a negative's part in their gradients
    col_share: Tensor  # of this rank's counted columns
    sums: Tensor | None  # of _Smoothing: without groups


def _with_vectors(
    ranks: Ranks, own: Columns, seen_y_hat: Tensor, seen_ids: Tensor | None, vectors: list[Tensor]
) -> Columns:
    """The columns of the forward, with [counted] vectors of this rank's."""
    stacked = torch.stack(vectors, dim=1) if vectors else None
    own = own._replace(vectors=stacked)
    if ranks.ring:
        return own
    stacked = None if stacked is None else ranks.gather_counted(stacked)
    return Columns(seen_y_hat, seen_ids, stacked, sum(ranks.counted), True)


def _of_inputs(
    ctx: Any,
    columns: Columns,
    rows: _Rows,
    softmaxes: tuple[Tensor, Tensor, Tensor | None],
    smoothed: _Smoothed | None,
    sides: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    pair_weight: Tensor,
    factor: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to x, y and scale, that of this rank's rows, of those that are wanted."""
    ranks = ctx.ranks
    want_x, want_y, want_scale = ctx.needs_input_grad[:3]
    wanted = want_x or (want_scale and not want_y), want_y  # either side gives the scale's
    if not any(wanted):
        return None, None, None
    grads = _products(ranks, columns, rows, *softmaxes, smoothed, *ranks.ordered(*wanted))
    (x_hat, _), (y_hat, _) = sides
    if smoothed is not None and smoothed.sums is not None:
        _smooth_without_groups(ranks, smoothed, smoothed.sums, ranks.ordered(x_hat, y_hat), grads)
    results: list[Tensor | None] = [None, None]
    dot = None
    unsmoothed = None, None, None, pair_weight, pair_weight  # the rest is added
    for side, grad, other_hat in zip((0, 1), ranks.ordered(*grads), (y_hat, x_hat), strict=True):
        if grad is not None and len(grad) == 0:
            results[side], dot = grad.new_empty((0, ctx.features), dtype=ctx.dtypes[side]), grad.new_empty(0)
        elif grad is not None:
            of_pairs = pair_weight, rows.scale, factor, *unsmoothed
            results[side], dot = through_normalisation(ctx, side, grad, *sides[side], other_hat, *of_pairs)
    d_x, d_y = results
    return d_x if want_x else None, d_y, dot.sum() if want_scale and dot is not None else None


def _smooth_without_groups(
    ranks: Ranks,
    smoothed: _Smoothed,
    sums: Tensor,
    hats: tuple[Tensor, Tensor],
    grads: tuple[Tensor | None, Tensor | None],
) -> None:
    """Add what the smoothing adds to the gradients of this rank's rows and columns."""
    smoothing, *shares, _ = smoothed
    weighted = ranks.total(torch.stack([negated_sums(hat, s, None, 0) for hat, s in zip(hats, shares, strict=True)]))
    for grad, share, other in zip(grads, shares, (1, 0), strict=True):
        if grad is not None:
            _add_smoothing(grad, smoothing, share, (sums[other], weighted[other]), None)


def _products(
    ranks: Ranks,
    columns: Columns,
    rows: _Rows,
    row_lse: Tensor,
    row_weight: Tensor,
    exponentials: Tensor | None,
    smoothed: _Smoothed | None,
    want_rows: bool,
    want_columns: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """G and its transpose times the other side's rows, and what the smoothing adds where there are groups.

    Returns:
        Of this rank's rows, and of its columns; None for what is not wanted.
    """
    own, options, numbers = len(rows.hat), rows.options, rows.numbers
    of_rows: Tensor | None = None
    # By a row's number, sums over the columns, and weighted ones; likewise over this rank's rows.
    col_sums: tuple[Tensor, ...] = ()
    row_sums: tuple[Tensor, ...] = ()
    grouped = smoothed is not None and smoothed.sums is None
    if smoothed is not None and grouped:
        row_sums = tuple(negated_sums(rows.hat, share, numbers, own) for share in (None, smoothed.row_share))
        col_sums = tuple(torch.zeros_like(t) for t in row_sums)

    def find(columns: Columns) -> Tensor:
        nonlocal of_rows
        hat, vectors = columns.hat, columns.vectors
        col_numbers = rows.numbers_of(columns)
        col_lse = col_weight = row_lse.new_empty(0)
        if options.symmetric and vectors is not None:
            col_lse, col_weight = vectors[:, 0].contiguous(), vectors[:, 1].contiguous()
        grad: Tensor | None = None
        if own and len(hat):
            of_these, grad = ops.contrastive_grads(
                *(rows.hat, hat, rows.scale, row_lse, col_lse, row_weight, col_weight),
                *(*rows.excluded(columns, col_numbers), exponentials),
                want_x=want_rows,
                want_y=want_columns,
                backend=options.backend,
            )
            of_rows = of_these if of_rows is None else of_rows.add_(of_these)
        if grad is None or not want_columns:
            grad = row_lse.new_zeros((len(hat), hat.shape[1] if want_columns else 0))
        if smoothed is not None and vectors is not None and grouped:
            col_share = vectors[:, -1]
            for total, share in zip(col_sums, (None, col_share), strict=True):
                total.add_(negated_sums(hat, share, col_numbers, own))
            if want_columns:
                _add_smoothing(grad, smoothed.smoothing, col_share, row_sums, col_numbers)
        return grad

    of_columns = ranks.visit(columns, find, lambda a, b: a.add_(b), ranks.sum_to_owners, extra=True)
    if want_rows and of_rows is None:  # no columns anywhere, or no rows here
        of_rows = row_lse.new_zeros(rows.hat.shape)
    if want_rows and of_rows is not None and smoothed is not None and grouped:
        _add_smoothing(of_rows, smoothed.smoothing, smoothed.row_share, col_sums, numbers)
    return of_rows if want_rows else None, of_columns if want_columns else None
