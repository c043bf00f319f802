"""The five functions, each from the file that has its kernels."""

from modest_align_kernels.backends import EXPERIMENT
from modest_align_kernels.backends.triton.contrastive_stats import contrastive_stats
from modest_align_kernels.backends.triton.pair_losses import pair_losses
from modest_align_kernels.backends.triton.perturb_normalize import perturb_normalize, perturb_normalize_backward

if EXPERIMENT == "triton-persistent":
    from modest_align_kernels.backends.triton.persistent import contrastive_grads
else:
    from modest_align_kernels.backends.triton.contrastive_grads import contrastive_grads

__all__ = ["contrastive_grads", "contrastive_stats", "pair_losses", "perturb_normalize", "perturb_normalize_backward"]
