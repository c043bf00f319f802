"""What the five functions of every backend are given; what they compute is said in ``backends/eager.py``.

    perturb_normalize(PerturbNormalize)
    perturb_normalize_backward(PerturbNormalizeBackward, SmoothedGradient or None)
    pair_losses(PairLosses, SmoothedLosses or None)
    contrastive_stats(Logits, row_lse, col_lse)
    contrastive_grads(Logits, Softmaxes, grad_x, grad_y)

Results are allocated by :mod:`modest_align_kernels.ops`, and a function writes all of them. Sums, statistics and
gradients of operands are in the accumulation dtype: float64 for float64 operands, else float32.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PerturbNormalize(NamedTuple):
    """Arguments of ``perturb_normalize``.

    Attributes:
        x: [rows, D], any strides.
        seed: int64, one element; None draws no noise.
        noise_std: standard deviation of the noise, accumulation dtype, one element; None beside no seed.
        noise_stream: of :mod:`modest_align_kernels.noise`.
        relative_noise: times each row's root mean square.
        pair_hat: [P, width], P <= rows, in x_hat's dtype: what the first rows are paired with. None: nothing.
        x_hat: written, [rows, width >= D] in the operands' dtype; zero past D.
        inv_norm: written, [rows].
        pair_dot: written, [P] (0 without pairs), of x_hat as it was rounded.
        first_row: the noise's number of row 0: of a rank's rows, that among all ranks'.
    """

    x: Tensor
    seed: Tensor | None
    noise_std: Tensor | None
    noise_stream: int
    relative_noise: bool
    pair_hat: Tensor | None
    x_hat: Tensor
    inv_norm: Tensor
    pair_dot: Tensor
    first_row: int = 0


class PerturbNormalizeBackward(NamedTuple):
    """Arguments of ``perturb_normalize_backward``.

    Attributes:
        grad: [rows, width].
        x_hat: [rows, width].
        inv_norm: [rows].
        pair_hat: [P, width], the other side; row i < B of either is a pair.
        pair_weight: [B], B <= rows and B <= P.
        scale: 0-dim.
        factor: 0-dim.
        dx: written, [rows, D <= width], any floating dtype.
        row_dot: written, [rows].
    """

    grad: Tensor
    x_hat: Tensor
    inv_norm: Tensor
    pair_hat: Tensor
    pair_weight: Tensor
    scale: Tensor
    factor: Tensor
    dx: Tensor
    row_dot: Tensor


class SmoothedGradient(NamedTuple):
    """What the smoothing adds to the arguments of ``perturb_normalize_backward``.

    Attributes:
        smoothing: 0-dim.
        ids: int32 [rows], from 0 to B, where B is the smaller side's length and stands for no group; or None.
        pair_ids: int32 [P], likewise.
        negative_weight: [B].
        pair_negative_weight: [B].
    """

    smoothing: Tensor
    ids: Tensor | None
    pair_ids: Tensor | None
    negative_weight: Tensor
    pair_negative_weight: Tensor


class PairLosses(NamedTuple):
    """Arguments of ``pair_losses``.

    Attributes:
        row_lse: [B], of the negatives.
        col_lse: [C], likewise; C is B, or 0: there is but one direction.
        pair_dot: [B].
        scale: 0-dim.
        losses: written, [B].
        row_weight: written, [B].
        col_weight: written, [C].
        pair_weight: written, [B].
    """

    row_lse: Tensor
    col_lse: Tensor
    pair_dot: Tensor
    scale: Tensor
    losses: Tensor
    row_weight: Tensor
    col_weight: Tensor
    pair_weight: Tensor


class SmoothedLosses(NamedTuple):
    """What the smoothing adds to the arguments of ``pair_losses``.

    Attributes:
        smoothing: 0-dim.
        x_hat: [B, width].
        y_hat: [N, width], N >= B.
        row_ids: int32 [B], from 0 to B, where B stands for no group; or None.
        col_ids: int32 [N], likewise.
        slope: written, [B].
        row_negative_weight: written, [B].
        col_negative_weight: written, [B].
    """

    smoothing: Tensor
    x_hat: Tensor
    y_hat: Tensor
    row_ids: Tensor | None
    col_ids: Tensor | None
    slope: Tensor
    row_negative_weight: Tensor
    col_negative_weight: Tensor


class Logits(NamedTuple):
    """The matrix S_ij = scale <x_hat_i, y_hat_j>, and what is excluded from it.

    A pair (i, j) is excluded where row_ids[i] == col_ids[j], and with ``exclude_diagonal`` where i == j.

    Attributes:
        x_hat: [B, width].
        y_hat: [N, width], same dtype.
        scale: 0-dim.
        row_ids: int32 [B], or None: no pair is excluded by its ids.
        col_ids: int32 [N], or None with it.
        exclude_diagonal: see above.
        exponentials: exponentials of the last rows, in the operands' dtype and in whatever form its backend likes, that
            contrastive_stats writes and contrastive_grads reads, as often as there is a backward; None or without
            elements: nothing is kept.
    """

    x_hat: Tensor
    y_hat: Tensor
    scale: Tensor
    row_ids: Tensor | None
    col_ids: Tensor | None
    exclude_diagonal: bool
    exponentials: Tensor | None = None


class Softmaxes(NamedTuple):
    """Weighted softmaxes of the rows, and of the first C <= N columns.

    Attributes:
        row_lse: [B], at least every logit of its row that is not excluded; -inf where all is.
        col_lse: [C], likewise.
        row_weight: [B], between -1 and 1, so that float16 holds G: who has larger weights divides both by the largest,
            and gives it back to the results in float32.
        col_weight: [C], likewise.
    """

    row_lse: Tensor
    col_lse: Tensor
    row_weight: Tensor
    col_weight: Tensor


# Where nothing is smoothed, for kernels that take everything by name.
UNSMOOTHED_GRADIENT = SmoothedGradient(*(None,) * len(SmoothedGradient._fields))  # type: ignore[arg-type]
UNSMOOTHED_LOSSES = SmoothedLosses(*(None,) * len(SmoothedLosses._fields))  # type: ignore[arg-type]
