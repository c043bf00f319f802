"""The loss for ``SentenceTransformerTrainer``. Tested with sentence-transformers 6.2.0, whose modules moved in 6.0."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers.base.losses import CachedLossMixin, has_static_embedding_input
from sentence_transformers.base.losses.merged_forward import embed_columns
from torch import Tensor, distributed, nn

from modest_align_kernels.modules import ModestAlignLoss

# Whether both directions are in the loss, of the directions and the partition that MultipleNegativesRankingLoss has.
_SYMMETRIC = {
    (("query_to_doc",), "joint"): False,
    (("query_to_doc",), "per_direction"): False,
    (("doc_to_query", "query_to_doc"), "per_direction"): True,
}


class ModestAlignRankingLoss(nn.Module):
    """``MultipleNegativesRankingLoss`` with noise and smoothing, in memory O(B D), on cosines.

    What both take means the same in both, and at ``noise_std=0, smoothing=0`` so does the loss. The columns are those
    of theirs: anchors [B], positives [B], and any number of hard negatives [B], which are negatives of every anchor.

    The noise follows the model's ``train()`` and ``eval()``: an evaluation has none.

    Args:
        model: the SentenceTransformer.
        scale: the inverse temperature; with ``learn_scale`` its start.
        noise_std: see :class:`modest_align_kernels.ModestAlignLoss`, as for the others that are not told here.
        smoothing: the target's mass on all other documents, equally.
        relative_noise: see there.
        directions: ``("query_to_doc",)``, or ``("query_to_doc", "doc_to_query")``.
        partition_mode: with two directions "per_direction": each has its softmax, and they are averaged.
        gather_across_devices: the loss is that of all ranks' batch, with its exact gradients; see
            ``process_group`` of :func:`modest_align_kernels.modest_align_loss`.
        learn_scale: the scale is the exponential of a parameter, which the trainer hands to the optimiser as
            ``loss_fn.log_scale``. No checkpoint of the model holds it.
        max_scale: see there.
        backend: likewise.

    Raises:
        TypeError: a number that is none.
        ValueError: directions that only MultipleNegativesRankingLoss has, or a number out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        *,
        noise_std: Tensor | float = 0.01,
        smoothing: Tensor | float = 0.1,
        relative_noise: bool = False,
        directions: tuple[str, ...] = ("query_to_doc",),
        partition_mode: str = "joint",
        gather_across_devices: bool = False,
        learn_scale: bool = False,
        max_scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        symmetric = _SYMMETRIC.get((tuple(sorted(set(directions))), partition_mode))
        if symmetric is None:
            raise ValueError(
                f"directions: got {tuple(directions)} with partition_mode={partition_mode!r}, want ('query_to_doc',) "
                "or ('query_to_doc', 'doc_to_query') with partition_mode='per_direction'; others are a recipe in "
                "docs/other_losses.md"
            )
        self.model = model
        self.directions = tuple(directions)
        self.partition_mode = partition_mode
        self.gather_across_devices = gather_across_devices
        self.loss_fn = ModestAlignLoss(
            noise_std,
            smoothing,
            relative_noise=relative_noise,
            logit_scale=scale,
            learn_scale=learn_scale,
            max_scale=max_scale,
            symmetric=symmetric,
            backend=backend,
        )

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """The loss of one batch: tokenised columns, [B] texts each; the labels are not used."""
        return self.compute_loss_from_embeddings(embed_columns(self.model, sentence_features), labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss, 0-dim float32, of anchors, positives and hard negatives, [B, D] each."""
        if len(embeddings) < 2:
            raise ValueError(f"embeddings: got {len(embeddings)} column(s), want anchors and positives at least")
        # The trainer never calls train() or eval() of a loss.
        self.loss_fn.train(self.model.training)
        # Asked in each call: scripts build the loss before the trainer's arguments start torch.distributed.
        self.loss_fn.process_group = distributed.group.WORLD if self.gather_across_devices else None
        loss: Tensor = self.loss_fn(embeddings[0], torch.cat(embeddings[1:]))
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        """What the model's card tells of this loss, with the present scale."""
        loss_fn = self.loss_fn
        return {
            "scale": float(loss_fn.logit_scale),  # type: ignore[arg-type]
            "noise_std": float(loss_fn.noise_std),
            "smoothing": float(loss_fn.smoothing),
            "relative_noise": loss_fn.relative_noise,
            "directions": self.directions,
            "partition_mode": self.partition_mode,
            "gather_across_devices": self.gather_across_devices,
            "learn_scale": loss_fn.log_scale is not None,
            "max_scale": loss_fn.max_scale,
        }

    @property
    def citation(self) -> str:
        """BibTeX for the model's card."""
        return """
@misc{liu2025modestalign,
    title={Modest-Align: Data-Efficient Alignment for Vision-Language Models},
    author={Jiaxiang Liu and Yuan Wang and Jiawei Du and Joey Tianyi Zhou and Mingkun Xu and Zuozhu Liu},
    year={2025},
    eprint={2510.21606},
    archivePrefix={arXiv},
    primaryClass={cs.CV}
}
"""


class CachedModestAlignRankingLoss(CachedLossMixin, ModestAlignRankingLoss):
    """``CachedMultipleNegativesRankingLoss`` likewise: the encoder, too, in the memory of a mini-batch (GradCache).

    Args:
        model: see :class:`ModestAlignRankingLoss`, as for ``scale`` and ``options``.
        scale: see there.
        mini_batch_size: texts that are encoded at once. The loss is not chunked: it takes O(B D) as it is.
        mini_batch_num_tokens: if given, mini-batches have at most so many tokens, however many texts that is.
        show_progress_bar: whether each batch has one.
        options: see there.

    Raises:
        ValueError: as there, or a model whose input cannot be split.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        *,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model, scale, **options)
        if has_static_embedding_input(model):
            raise ValueError(
                "model: got a StaticEmbedding's, whose batch cannot be split, want another, or ModestAlignRankingLoss"
            )
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """See :class:`ModestAlignRankingLoss`."""
        learned = list(self.loss_fn.parameters()) if torch.is_grad_enabled() else []
        kept = [parameter.grad for parameter in learned]
        for parameter in learned:
            parameter.grad = None
        loss: Tensor = super().forward_cached(sentence_features, labels)
        for parameter, grad in zip(learned, kept, strict=True):
            # The features' gradients wait for the factor that backward() brings (accumulation, GradScaler): so must
            # these, which calculate_loss has left in place already.
            derivative, parameter.grad = parameter.grad, grad
            loss = loss + (derivative * (parameter - parameter.detach())).sum()  # type: ignore[operator]
        return loss

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of columns of mini-batches [b, D]; with ``with_backward`` detached, their gradients computed."""
        loss = self.compute_loss_from_embeddings([torch.cat(column) for column in reps], labels)
        if not with_backward:
            return loss
        loss.backward()
        return loss.detach()

    def get_config_dict(self) -> dict[str, Any]:
        """See :class:`ModestAlignRankingLoss`."""
        mini_batches = {
            "mini_batch_size": self.mini_batch_size,
            "mini_batch_num_tokens": self.mini_batch_num_tokens,
        }
        return super().get_config_dict() | mini_batches

    @property
    def citation(self) -> str:
        """See :class:`ModestAlignRankingLoss`."""
        return (
            super().citation
            + """
@misc{gao2021scaling,
    title={Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup},
    author={Luyu Gao and Yunyi Zhang and Jiawei Han and Jamie Callan},
    year={2021},
    eprint={2101.06983},
    archivePrefix={arXiv},
    primaryClass={cs.LG}
}
"""
        )
