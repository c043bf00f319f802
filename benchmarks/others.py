"""Three of docs/other_losses.md's losses beside the libraries that have them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import losses
from benchmarks.clock import Run
from benchmarks.operations import backends
from benchmarks.providers import LossFunction, Provider, Step, from_loss, sentence_transformers_loss
from benchmarks.recipes import recipes
from benchmarks.results import COMPILED, PLAIN, Key, Result
from benchmarks.truth import Inputs, Truth
from benchmarks.workloads import HARD_NEGATIVES, SCALE, Workload
from modest_align_kernels import contrastive_logsumexp

Logsumexp = Callable[..., tuple[Tensor, Tensor]]
NO_SCALE = "no gradient of the scale"


def plain_logsumexp(
    x: Tensor, y: Tensor, scale: Tensor, row_ids: Tensor | None = None, col_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As one would write it, with the whole matrix; the columns' of a symmetric one are its rows'."""
    x_hat = F.normalize(x, dim=1)
    logits = scale.to(x.dtype) * x_hat @ (x_hat if y is x else F.normalize(y, dim=1)).T
    if row_ids is not None and col_ids is not None:
        logits = logits.masked_fill(row_ids[:, None] == col_ids, -math.inf)
    rows = logits.logsumexp(1)
    return rows, rows if y is x else logits.logsumexp(0)


def _rows_only(x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    rows = (scale.to(x.dtype) * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T).logsumexp(1)
    return rows, rows


def labels(views: int, device: torch.device) -> Tensor:
    """Of two sets of views, [2 * views]: two images a class, so three positives a view."""
    return (torch.arange(views, device=device) // 2).repeat(2)


def _supcon(page: Any, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return page.supcon(torch.cat((x, y)), labels(len(x), x.device), scale)


def _gte(page: Any, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return page.ranking(x, [y], scale, page.GTE)


def _own_negatives(page: Any, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    hard = y[len(x) :].view(len(x), HARD_NEGATIVES, -1)
    return page.own_negatives(x, y[: len(x)], hard, scale)


def _metric_learning() -> Step:
    from pytorch_metric_learning.losses import SupConLoss

    loss_fn = SupConLoss(temperature=1 / SCALE)
    return from_loss(lambda x, y, s: loss_fn(torch.cat((x, y)), labels(len(x), x.device)))


def _gte_ranking() -> Step:
    # Its -inf times the scale makes its gradient of the scale NaN.
    module = sentence_transformers_loss("MultipleNegativesRankingLoss", directions=recipes().GTE, scale=SCALE)
    return from_loss(lambda x, y, s: module.compute_loss_from_embeddings([x, y], None))


def _shared_ranking() -> Step:
    module = sentence_transformers_loss("MultipleNegativesRankingLoss", scale=SCALE)
    return from_loss(lambda x, y, s: module.compute_loss_from_embeddings([x, *y.split(len(x))], None))


class Other(NamedTuple):
    """A loss (recipes, x, y, scale) -> loss; the logsumexp of its plain version, and other libraries' providers."""

    loss: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    plain: Logsumexp
    peers: tuple[Provider, ...]


RANKING = "sentence-transformers MNRL"
OTHERS = {
    "supcon": Other(
        _supcon,
        plain_logsumexp,
        (
            Provider(
                Key("pytorch-metric-learning SupConLoss"), _metric_learning, "pytorch-metric-learning", note=NO_SCALE
            ),
        ),
    ),
    "gte": Other(
        _gte, plain_logsumexp, (Provider(Key(RANKING), _gte_ranking, "sentence-transformers", note=NO_SCALE),)
    ),
    "own-negatives": Other(
        _own_negatives,
        _rows_only,
        (
            Provider(
                Key(RANKING),
                _shared_ranking,
                "sentence-transformers",
                same_loss=False,
                note="another loss: every query's hard negatives are all queries'",
            ),
        ),
    ),
}


def providers(kind: str, device: str) -> list[Provider]:
    """Ours by backend, the plain loss, then other libraries."""
    other = OTHERS[kind]

    def ours(backend: str, reason: str | None) -> Step:
        if reason is not None:
            raise RuntimeError(reason)
        return from_loss(loss(partial(contrastive_logsumexp, backend=backend)))

    def compiled() -> Step:
        torch._dynamo.reset()
        return from_loss(torch.compile(loss(other.plain), dynamic=False))

    def loss(logsumexp: Logsumexp) -> LossFunction:
        return partial(other.loss, recipes(logsumexp))

    mine = [Provider(Key("ours", name), partial(ours, name, reason)) for name, reason in backends(device).items()]
    plain = (
        Provider(PLAIN, lambda: from_loss(loss(other.plain))),
        Provider(COMPILED, compiled, compiled=True),
    )
    return [*mine, *plain, *other.peers]


def exact(kind: str, inputs: Inputs) -> Truth:
    """The recipe on the eager backend in float64, blocks of rows at a time; the tests hold it to the formulas."""
    x, y, scale = (t.detach().double().requires_grad_() for t in inputs[:3])
    step = from_loss(partial(OTHERS[kind].loss, recipes(partial(contrastive_logsumexp, backend="eager"))))
    return Truth(slice(None), *step(x, y, scale, 1.0))


def measure(workload: Workload, run: Run, names: list[str] | None = None) -> dict[Key, Result]:
    """As :func:`benchmarks.losses.measure`, of those whose names contain one of ``names``, and without a floor."""
    chosen = [p for p in providers(workload.kind, run.device) if not names or any(n in str(p.key) for n in names)]
    return losses.measure(workload, chosen, run, partial(exact, workload.kind), has_floor=False)
