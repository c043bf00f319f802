"""Who is measured: this library's backends, the plain loss, and the losses that other packages offer.

Every provider does the same work from the same tensors: normalise both sides, compute the symmetric softmax loss, and
return its gradients to both sides' features and to the scale. What one does differently its ``note`` says.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.operations import backends
from benchmarks.results import COMPILED, OPEN_CLIP, PLAIN, Key
from benchmarks.workloads import SCALE
from modest_align_kernels import modest_align_loss

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
# (image_features, text_features, scale, factor on the loss) -> loss, three gradients; None where there is none
Step = Callable[[Tensor, Tensor, Tensor, float], "tuple[Tensor, Tensor, Tensor, Tensor | None]"]


@dataclass(frozen=True)
class Provider:
    """One way to compute the loss and its gradients.

    Attributes:
        key: In tables and for ``--providers``.
        load: Called once for each workload; its imports may fail.
        package: What to install for it.
        needs_gpu: It has no path for a CPU.
        same_loss: False if it is another loss: measured, but its values are not compared.
        slow: Left out where a workload asks for fast peers only.
        compiled: Its first call compiles.
        bounded: Its memory is O(B D) and a constant, which small batches do not show: never predicted from them.
        dtypes: The features' dtypes that it takes, if not all.
        note: What differs from the others' work.
    """

    key: Key
    load: Callable[[], Step]
    package: str | None = None
    needs_gpu: bool = False
    same_loss: bool = True
    slow: bool = False
    compiled: bool = False
    bounded: bool = False
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    note: str = ""

    def why_not(self, device: str, dtype: str) -> str | None:
        """Why it cannot run, as far as that shows without trying, or None."""
        if self.needs_gpu and device == "cpu":
            return "needs a GPU"
        if self.package is not None and installed_version(self.package) is None:
            return f"not installed (pip install {self.package})"
        if dtype not in self.dtypes:
            return f"takes {' or '.join(self.dtypes)} only"
        return None


def installed_version(package: str) -> str | None:
    """A package's version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def from_loss(loss_fn: LossFunction) -> Step:
    """The step of a loss that PyTorch differentiates."""

    def step(x: Tensor, y: Tensor, scale: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        loss = loss_fn(x, y, scale)
        grads = torch.autograd.grad(loss, (x, y, scale), torch.full_like(loss, factor), allow_unused=True)
        return loss.detach(), *grads

    return step


def plain_loss(x: Tensor, y: Tensor, scale: Tensor, smoothing: float = 0.0) -> Tensor:
    """The loss as most CLIP trainers write it, with the whole matrix of logits, in the features' dtype throughout."""
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    logits = scale.to(x.dtype) * x @ y.T
    target = torch.arange(len(x), device=x.device)
    rows = F.cross_entropy(logits, target, label_smoothing=smoothing)
    return (rows + F.cross_entropy(logits.T, target, label_smoothing=smoothing)) / 2


def _compiled() -> Step:
    torch._dynamo.reset()
    return from_loss(torch.compile(plain_loss, dynamic=False))


def open_clip_losses() -> Any:
    """The module ``open_clip.loss``."""
    # open_clip's package imports torchvision, its losses need only PyTorch.
    folder = importlib.util.find_spec("open_clip").submodule_search_locations[0]  # type: ignore[union-attr, index]
    spec = importlib.util.spec_from_file_location("open_clip_loss", f"{folder}/loss.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def _open_clip() -> Step:
    loss_fn = open_clip_losses().ClipLoss()
    return from_loss(lambda x, y, s: loss_fn(F.normalize(x, dim=1), F.normalize(y, dim=1), s.to(x.dtype)))


def _linear_cross_entropy() -> Step:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise RuntimeError(f"torch {torch.__version__} has no chunked F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()

    def loss_fn(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
        scale, target = scale.to(x.dtype), torch.arange(len(x), device=x.device)
        rows = F.linear_cross_entropy(scale * x, y, target, options=options)
        return (rows + F.linear_cross_entropy(scale * y, x, target, options=options)) / 2

    return from_loss(loss_fn)


def sentence_transformers_loss(name: str, **options: Any) -> Any:
    """One of its losses, for embeddings in a model's place."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:
        # One that does not match this PyTorch breaks transformers' import; one that is not there does not.
        sys.modules["torchvision"] = None  # type: ignore[assignment]
    try:
        from sentence_transformers.sentence_transformer import losses
    except ImportError:  # before 6.0
        from sentence_transformers import losses

    # The losses want a model whose first module embeds; here the embeddings are given.
    model = torch.nn.Sequential(torch.nn.Identity())
    return getattr(losses, name)(model, **options)


BOTH_DIRECTIONS = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}


def _ranking() -> Step:
    module = sentence_transformers_loss("MultipleNegativesRankingLoss", **BOTH_DIRECTIONS)

    def loss_fn(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        module.scale = scale.to(x.dtype)
        return module.compute_loss_from_embeddings([x, y], None)

    return from_loss(loss_fn)


def _cached_ranking() -> Step:
    module = sentence_transformers_loss("CachedMultipleNegativesRankingLoss", mini_batch_size=1024, **BOTH_DIRECTIONS)

    def step(x: Tensor, y: Tensor, scale: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        x, y, scale = (t.detach().requires_grad_() for t in (x, y, scale))
        # A leaf of the features' dtype: its graph is walked once for every mini-batch.
        module.loss.scale = cast = scale.detach().to(x.dtype).requires_grad_()
        loss = module.calculate_loss([[x], [y]], with_backward=True)
        return loss, x.grad, y.grad, cast.grad

    return step


def _memeff() -> Step:
    from memeff import MemoryEfficientCLIPLoss

    def loss_fn(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        # In float16 its true gradients underflow before the loss's factor reaches them; stable=True is its remedy,
        # and multiplies them by sqrt(rows / scale), which is taken back here.
        stable = x.dtype == torch.float16
        # The scale is a Python number there.
        loss = MemoryEfficientCLIPLoss(temperature=1 / SCALE, stable=stable)(x, y)
        if not stable:
            return loss
        share = math.sqrt(SCALE / len(x))
        return loss * share + (loss * (1 - share)).detach()

    return from_loss(loss_fn)


def _inf_cl() -> Step:
    from inf_cl import cal_flash_loss

    def loss_fn(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
        # Its heads are blocks of features of one width, a power of two.
        head = math.gcd(x.shape[1], 256)
        return sum(cal_flash_loss(a, b, scale=scale, head_dim=head).mean() for a, b in ((x, y), (y, x))) / 2

    return from_loss(loss_fn)


def _siglip() -> Step:
    from siglip_kernel import fused_siglip_loss

    bias: dict[torch.device, Tensor] = {}

    def loss_fn(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        if x.device not in bias:
            bias[x.device] = torch.tensor(-10.0, device=x.device, requires_grad=True)
        return fused_siglip_loss(F.normalize(x, dim=1), F.normalize(y, dim=1), scale.log(), bias[x.device])

    return from_loss(loss_fn)


PLAIN_PROVIDER = Provider(PLAIN, lambda: from_loss(plain_loss))
PEERS = (
    PLAIN_PROVIDER,
    Provider(COMPILED, _compiled, slow=True, compiled=True),
    Provider(OPEN_CLIP, _open_clip, "open_clip_torch"),
    Provider(Key("sentence-transformers MNRL"), _ranking, "sentence-transformers"),
    Provider(
        Key("sentence-transformers cached MNRL"),
        _cached_ranking,
        "sentence-transformers",
        slow=True,
        dtypes=("float32", "bfloat16"),  # it calls backward itself: no factor on the loss, which float16 needs
    ),
    Provider(Key("F.linear_cross_entropy x 2"), _linear_cross_entropy),
    Provider(Key("memeff"), _memeff, "memeff", needs_gpu=True, note="no gradient of the scale"),
    Provider(
        Key("Inf-CL"),
        _inf_cl,
        "inf-cl",
        needs_gpu=True,
        slow=True,
        note="tf32 inside, whatever the features' dtype",
    ),
    Provider(Key("siglip-kernel"), _siglip, "siglip-kernel", needs_gpu=True, same_loss=False, note="another loss"),
)


def _ours(backend: str, reason: str | None) -> Provider:
    def load() -> Step:
        if reason is not None:
            raise RuntimeError(reason)
        return from_loss(partial(modest_align_loss, backend=backend))

    return Provider(Key("ours", backend), load, bounded=True)


def all_providers(device: str) -> list[Provider]:
    """Ours by backend, then everybody else's; who cannot run says so when it is loaded."""
    return [*(_ours(backend, reason) for backend, reason in backends(device).items()), *PEERS]
