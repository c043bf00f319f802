"""The contrastive loss of Modest-Align, exact and in memory O(B D)."""

from modest_align_kernels.dispatch import available_backends
from modest_align_kernels.functional import contrastive_logsumexp, modest_align_loss
from modest_align_kernels.modules import ModestAlignLoss

__all__ = ["ModestAlignLoss", "available_backends", "contrastive_logsumexp", "modest_align_loss"]
