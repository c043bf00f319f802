"""The settings of one training run: what each means, its default and bounds, and TOML."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What settings files of earlier versions say, and what it is called now.
RENAMED = {"noise_std": "latent_noise_std"}

# What `tune` tries, from nothing to where noise ruins the alignment; here for --help, which loads no torch.
TUNE_NOISE = (0.0, 0.01, 0.02, 0.03, 0.05, 0.08)
TUNE_SMOOTHING = (0.0, 0.1)
TUNE_SEEDS = 3
# What `zero_shot` asks for; CLIP's template (Radford et al., 2021).
ZERO_SHOT_TEMPLATE = ("a photo of a {}.",)
ZERO_SHOT_TOP = (1, 5)

_Path = Annotated[Path, Field(strict=False)]  # TOML has no paths, only strings
_Count = Annotated[int, Field(ge=1)]
_CountFromZero = Annotated[int, Field(ge=0)]
_NotNegative = Annotated[float, Field(ge=0)]
_Positive = Annotated[float, Field(gt=0)]
_Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Settings:
    """Settings of one training run; `checked` holds them to their types and bounds."""

    # Strict: a bool is no int, and "3" no number; an int is as good as a float.
    __pydantic_config__ = ConfigDict(strict=True, allow_inf_nan=False, revalidate_instances="always")

    latents: _Path
    """Directory that `extract` wrote."""
    output: _Path
    """Run directory to write; a run that was interrupted there goes on."""
    device: str = "auto"
    """Where to train: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1"."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the weights, the batches and the noise."""
    steps: _CountFromZero = 0
    """Optimiser steps; the learning rate's cosine ends there. 0 follows the size of the training split."""
    batch_size: _Count = 512
    """Pairs in a step, one caption for each image."""
    learning_rate: _NotNegative = 1e-3
    """Highest learning rate of AdamW."""
    weight_decay: _NotNegative = 0.1
    """AdamW's decay of the weight matrices (not of biases, norms and the scale)."""
    warmup_steps: _CountFromZero = 20
    """Steps in which the learning rate rises linearly."""
    embedding_dim: _Count = 512
    """Features of the shared space."""
    blocks: _CountFromZero = 1
    """Residual blocks of each adapter."""
    expansion: _Count = 2
    """Hidden features of a block, in multiples of its width."""
    dropout: _Share = 0.1
    """Share of a block's hidden features dropped in training."""
    latent_noise_std: _NotNegative = 0.01
    """Random perturbation: standard deviation of the noise on each feature of the unit-norm latents, in training."""
    loss_noise_std: _NotNegative = 0.0
    """The same on the adapters' outputs, inside the loss."""
    smoothing: _Share = 0.1
    """Embedding smoothing: share of the target that goes to the negatives."""
    learn_scale: bool = True
    """Learn the scale of the cosines; otherwise it stays as it is."""
    scale: _Positive = 14.3
    """Factor on the cosines at the start (1 / temperature)."""
    max_scale: _Positive = 100.0
    """The learned scale is held at or below this."""
    fusemix_alpha: _NotNegative = 0.0
    """FuseMix: mix pairs of latents with a share ~ Beta(alpha, alpha); 0 is off."""
    shuffled_captions: _Share = 0.0
    """Share of the training images whose captions are given to other ones: a study of noisy pairs."""
    backend: str = "auto"
    """Backend of the loss: "auto", "native", "triton" or "eager"."""
    validate_every: _CountFromZero = 0
    """Steps between two validations (the best checkpoint is chosen there). 0 is a twelfth of all."""
    checkpoint_every: _Count = 100
    """Steps between two checkpoints to resume from."""
    log_every: _Count = 10
    """Steps between two lines of the log."""

    def checked(self) -> Settings:
        """Return the same settings, each of its own type: a str for a directory as a Path, an int as a float.

        Raises:
            ValueError: A setting is of the wrong type or out of range; the sentence names the first one.
        """
        checked = _of_right_types(self)
        if checked.scale > checked.max_scale and checked.learn_scale:
            raise ValueError(f"scale must be at most max_scale ({checked.max_scale}), got {checked.scale}")
        return checked

    def for_images(self, images: int) -> Settings:
        """Return the settings with `steps` and `validate_every` of a training split of so many images.

        Steps such that 2,400 sqrt(images) pairs are seen: 120 of 512 for 600 images, 300 for 4,000, 1,490 for 100,000.
        At 600 and 2,000 of the demo's images more steps gave nothing, and with half of them strong noise lost.
        """
        steps = self.steps or 10 * math.ceil(240 * math.sqrt(images) / max(1, min(self.batch_size, images)))
        return replace(self, steps=steps, validate_every=self.validate_every or max(1, steps // 12))

    def to_toml(self) -> str:
        """Return the settings as TOML, one line each."""
        return tomli_w.dumps(_SCHEMA.dump_python(self, mode="json"))


def read_settings(path: Path | str) -> dict[str, Any]:
    """Read settings from a TOML file.

    Args:
        path: The file; it need not have all settings, but no other keys. Earlier names are understood.

    Returns:
        Values by the names of `Settings`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not TOML, has a key that is not a setting, or a value that its setting cannot have.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"settings file {path} does not exist")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as reason:
        raise ValueError(f"{path} is not TOML: {reason}") from None
    values = {RENAMED.get(name, name): value for name, value in values.items()}
    names = [field.name for field in fields(Settings)]
    for name in values:
        if name not in names:
            raise ValueError(f"{path} has the unknown setting {name!r}; known are {', '.join(names)}")
    try:
        checked = _of_right_types(Settings(**{"latents": "", "output": "", **values}))
    except ValueError as reason:
        raise ValueError(f"{path}: {reason}") from None
    return {name: getattr(checked, name) for name in values}


def run_settings(run: Path | str) -> Settings:
    """Return the settings that a run was trained with, from its `settings.toml`.

    Raises:
        FileNotFoundError: It has none.
        ValueError: They cannot be read; see `read_settings`.
    """
    path = Path(run) / "settings.toml"
    try:
        return Settings(**read_settings(path))
    except TypeError:
        raise ValueError(f"{path} is damaged: it lacks settings") from None


_SCHEMA = TypeAdapter(Settings)


def _of_right_types(settings: Settings) -> Settings:
    try:
        return _SCHEMA.validate_python(settings)
    except ValidationError as error:
        first = error.errors()[0]
        wanted = "must be a path" if first["type"] == "path_type" else first["msg"].replace("Input should", "must")
        raise ValueError(f"{first['loc'][0]} {wanted}, got {first['input']!r}") from None
