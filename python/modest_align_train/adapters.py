"""The trained part: an adapter for each modality, and the loss with its scale."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.functional import dropout, gelu, normalize

from modest_align_kernels import ModestAlignLoss
from modest_align_train.checkpoints import BEST, fits_its_settings, has_checkpoint, part, read_checkpoint
from modest_align_train.latents import Latents, latents_fingerprint, load_latents
from modest_align_train.rows import Rows
from modest_align_train.settings import Settings, run_settings

# Rows that are read, sent to a device and embedded at once, outside of training.
CHUNK = 8192


class Dropout(nn.Dropout):
    """Dropout that can be of a share of a batch.

    Attributes:
        share: Rows of the whole batch, and those of them that come here: what is dropped is drawn for the whole, so
            that it is the same however the rows are shared out.
    """

    share: tuple[int, slice] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, width] to [n, width]."""
        if self.share is None or not self.training:
            return super().forward(x)
        rows, own = self.share
        return x * dropout(x.new_ones(rows, x.shape[1]), self.p)[own]


class Block(nn.Module):
    """Pre-norm residual block with an inverted bottleneck: x + W2 dropout(gelu(W1 layer_norm(x))).

    Args:
        width: Features in and out.
        expansion: Hidden features in multiples of `width`.
        drop: Share of the hidden features dropped in training.
    """

    def __init__(self, width: int, expansion: int, drop: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, expansion * width)
        self.dropout = Dropout(drop)
        self.contract = nn.Linear(expansion * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, width] to [n, width]."""
        return x + self.contract(self.dropout(gelu(self.expand(self.norm(x)))))


class Adapter(nn.Sequential):
    """Projection to the shared width, residual blocks there, and a final norm.

    The projection comes first so that the cost of a block follows the shared space, not the encoder: at 1,280
    features a block would cost six times as much.

    Args:
        features: Features of the encoder's latents.
        settings: Gives `embedding_dim`, `blocks`, `expansion` and `dropout`.
    """

    def __init__(self, features: int, settings: Settings) -> None:
        width = settings.embedding_dim
        super().__init__(
            nn.LayerNorm(features),
            nn.Linear(features, width),
            *(Block(width, settings.expansion, settings.dropout) for _ in range(settings.blocks)),
            nn.LayerNorm(width),
        )
        self.features = features


class Aligner(nn.Module):
    """Both adapters and the loss that owns the scale.

    Args:
        image_dim: Features of the image latents.
        text_dim: Features of the text latents.
        settings: Gives the shape of the adapters and the loss.
        process_group: Of the ranks whose rows the loss is of.
    """

    def __init__(
        self, image_dim: int, text_dim: int, settings: Settings, process_group: ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self.image_adapter = Adapter(image_dim, settings)
        self.text_adapter = Adapter(text_dim, settings)
        self.loss = ModestAlignLoss(
            noise_std=settings.loss_noise_std,
            smoothing=settings.smoothing,
            logit_scale=settings.scale,
            learn_scale=settings.learn_scale,
            backend=settings.backend,
            process_group=process_group,
        )

    def take_share(self, rows: int, own: slice) -> None:
        """Expect these rows of a batch of so many."""
        for module in self.modules():
            if isinstance(module, Dropout):
                module.share = rows, own

    def embed_images(self, latents: Tensor | Rows) -> Tensor:
        """Embed image latents as the encoder gave them, [n, image_dim] on any device or on disk.

        Returns:
            L2-normalised embeddings, fp32 [n, embedding_dim], on the aligner's device, without gradient and
            as in `eval()` mode.

        Raises:
            ValueError: The latents have another number of features than those of the training.
        """
        return self._embed("image", self.image_adapter, latents)

    def embed_texts(self, latents: Tensor | Rows) -> Tensor:
        """Embed text latents [n, text_dim]; see `embed_images`."""
        return self._embed("text", self.text_adapter, latents)

    @property
    def scale(self) -> Tensor:
        """Factor on the cosines, 0-dim, without gradient."""
        return torch.as_tensor(self.loss.logit_scale)

    @torch.no_grad()
    def _embed(self, name: str, adapter: Adapter, latents: Tensor | Rows) -> Tensor:
        if latents.shape[-1] != adapter.features:
            raise ValueError(f"{name} latents must have {adapter.features} features, got {latents.shape[-1]}")
        was_training = adapter.training
        adapter.eval()
        device = next(adapter.parameters()).device
        chunks = latents.split(CHUNK)
        embedded = [normalize(adapter(normalize(c.to(device).float(), dim=-1)), dim=-1) for c in chunks]
        adapter.train(was_training)
        return torch.cat(embedded)


@dataclass(frozen=True)
class Checkpoint:
    """The best checkpoint of a run, and the latents that it belongs to.

    Attributes:
        run: Run directory.
        aligner: In `eval()` mode.
        digest: Its checksum.
        trained_on: `latents_fingerprint` of the run's latents.
    """

    run: Path
    aligner: Aligner
    digest: str
    trained_on: str

    def find_latents(self, directory: Path | str | None = None) -> tuple[Path, str]:
        """Find the latents to use with the run: the directory, by default that of the training, and the fingerprint.

        Raises:
            FileNotFoundError: The directory holds no latents.
            ValueError: It is that of the training, and other latents were extracted into it since.
        """
        own = run_settings(self.run).latents
        found = own if directory is None else Path(directory)
        fingerprint = latents_fingerprint(found)
        if found.resolve() == own.resolve() and fingerprint != self.trained_on:
            raise ValueError(
                f"latents {own} are not those that {self.run} was trained on, they were extracted again: "
                "train into another --output, or name others by --latents"
            )
        return found, fingerprint

    def load_latents(self, directory: Path | str | None = None) -> Latents:
        """Load the latents that `find_latents` finds."""
        return load_latents(self.find_latents(directory)[0])


def load_aligner(run: Path | str, device: torch.device | str = "cpu") -> Aligner:
    """Load the aligner of a run's best checkpoint; see `load_checkpoint`."""
    return load_checkpoint(run, device).aligner


def load_checkpoint(run: Path | str, device: torch.device | str = "cpu") -> Checkpoint:
    """Load the best checkpoint of a run.

    Args:
        run: Run directory.
        device: Where to put it.

    Raises:
        FileNotFoundError: The run has no best checkpoint.
        ValueError: It is damaged, of an earlier version, or does not fit the run's settings.
    """
    run = Path(run)
    if not has_checkpoint(run / BEST):
        raise FileNotFoundError(f"{run} is not a trained run: it has no {BEST}")
    state, digest = read_checkpoint(run / BEST, device)
    # A run trained with a backend that this machine lacks must still load.
    settings = replace(run_settings(run), backend="auto")
    with fits_its_settings(run / BEST):
        aligner = Aligner(state["image_dim"], state["text_dim"], settings).to(device)
        aligner.load_state_dict(part(state, "model"))
        return Checkpoint(run, aligner.eval(), digest, state["latents"])
