"""The settings of one training run: defaults, checks, TOML."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import tomli_w

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Smallest and largest value of each bounded setting, both allowed.
_BOUNDS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "steps": (1, math.inf),
    "batch_size": (1, math.inf),
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "embedding_dim": (1, math.inf),
    "blocks": (0, math.inf),
    "expansion": (1, math.inf),
    "dropout": (0, 1),
    "noise_std": (0, math.inf),
    "loss_noise_std": (0, math.inf),
    "smoothing": (0, 1),
    "scale": (sys.float_info.min, math.inf),
    "max_scale": (sys.float_info.min, math.inf),
    "fusemix_alpha": (0, math.inf),
    "shuffled_captions": (0, 1),
    "validate_every": (1, math.inf),
    "checkpoint_every": (1, math.inf),
    "log_every": (1, math.inf),
}


@dataclass(frozen=True)
class Settings:
    """Settings of one training run.

    Attributes:
        latents: Directory that `extract` wrote.
        output: Run directory to write; a run that was interrupted there goes on.
        device: Where to train: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1".
        seed: Seed of the weights, the batches and the noise.
        steps: Optimiser steps; the learning rate's cosine ends there.
        batch_size: Pairs in a step, one caption for each image.
        learning_rate: Highest learning rate of AdamW.
        weight_decay: AdamW's decay of the weight matrices (not of biases, norms and the scale).
        warmup_steps: Steps in which the learning rate rises linearly.
        embedding_dim: Features of the shared space.
        blocks: Residual blocks of each adapter.
        expansion: Hidden features of a block, in multiples of its width.
        dropout: Share of a block's hidden features dropped in training.
        noise_std: Random perturbation: standard deviation of the Gaussian noise that training adds to each
            feature of the unit-norm latents, before the adapters.
        loss_noise_std: The same on the adapters' outputs, inside the loss.
        smoothing: Embedding smoothing: share of the target that goes to the negatives.
        learn_scale: Learn the scale of the cosines; otherwise it stays as it is.
        scale: Factor on the cosines at the start (1 / temperature).
        max_scale: The learned scale is held at or below this.
        fusemix_alpha: FuseMix: mix pairs of latents with a share ~ Beta(alpha, alpha); 0 is off.
        shuffled_captions: Share of the training images whose captions are given to other ones: a study of
            noisy pairs.
        backend: Backend of the loss: "auto", "native", "triton" or "eager".
        validate_every: Steps between two validations (the best checkpoint is chosen there).
        checkpoint_every: Steps between two checkpoints to resume from.
        log_every: Steps between two lines of the log.
    """

    latents: Path
    output: Path
    device: str = "auto"
    seed: int = 0
    steps: int = 300
    batch_size: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    warmup_steps: int = 20
    embedding_dim: int = 512
    blocks: int = 1
    expansion: int = 2
    dropout: float = 0.1
    noise_std: float = 0.01
    loss_noise_std: float = 0.0
    smoothing: float = 0.1
    learn_scale: bool = True
    scale: float = 14.3
    max_scale: float = 100.0
    fusemix_alpha: float = 0.0
    shuffled_captions: float = 0.0
    backend: str = "auto"
    validate_every: int = 25
    checkpoint_every: int = 100
    log_every: int = 10

    def check(self) -> None:
        """Raise a TypeError or ValueError that names the first setting that cannot be used."""
        for name, value in vars(self).items():
            _check_type(name, value)
            low, high = _BOUNDS.get(name, (-math.inf, math.inf))
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
            if name in _BOUNDS and not low <= value <= high:
                if low == sys.float_info.min:
                    wanted = "above 0"
                else:
                    wanted = f"at least {low}" if high == math.inf else f"between {low} and {high}"
                raise ValueError(f"{name} must be {wanted}, got {value}")
        if self.scale > self.max_scale and self.learn_scale:
            raise ValueError(f"scale must be at most max_scale ({self.max_scale}), got {self.scale}")

    def to_toml(self) -> str:
        """Return the settings as TOML, one line each."""
        return tomli_w.dumps({name: str(v) if isinstance(v, Path) else v for name, v in asdict(self).items()})


def read_settings(path: Path | str) -> dict[str, Any]:
    """Read settings from a TOML file.

    Args:
        path: The file; it need not have all settings, but no other keys.

    Returns:
        Values by the names of `Settings`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not TOML, or has a key that is not a setting.
        TypeError: A value is of another type than the setting.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"settings file {path} does not exist")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as reason:
        raise ValueError(f"{path} is not TOML: {reason}") from None
    names = [field.name for field in fields(Settings)]
    for name, value in values.items():
        if name not in names:
            raise ValueError(f"{path} has the unknown setting {name!r}; known are {', '.join(names)}")
        expected = _TYPES[name]
        if expected is Path and isinstance(value, str):
            values[name] = Path(value)
        elif expected is float and type(value) is int:
            values[name] = float(value)
        try:
            _check_type(name, values[name])
        except TypeError as reason:
            raise TypeError(f"{path}: {reason}") from None
    return values


def _check_type(name: str, value: object) -> None:
    expected = _TYPES[name]
    # bool is an int to isinstance, and an int is as good as a float.
    fine = type(value) in (int, float) if expected is float else isinstance(value, expected)
    if not fine or (expected is int and isinstance(value, bool)):
        raise TypeError(f"{name} must be of type {expected.__name__}, got {type(value).__name__} {value!r}")


_TYPES: dict[str, type] = get_type_hints(Settings)
