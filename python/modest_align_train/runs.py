"""What a trained run left in its directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modest_align_train.evaluate import load_evaluation
from modest_align_train.settings import Settings, run_settings


@dataclass(frozen=True)
class TrainedRun:
    """A run as its files tell of it.

    Attributes:
        name: What to call it.
        path: Its directory.
        settings: What it was trained with.
        steps: Lines of its log with the loss, the learning rate and the scale.
        validations: What `recalls` found on the validation split, by step.
        evaluation: What `evaluate` found.
    """

    name: str
    path: Path
    settings: Settings
    steps: list[dict[str, Any]]
    validations: dict[int, dict[str, dict[str, float]]]
    evaluation: dict[str, Any]


def load_run(path: Path, name: str | None = None, latents: Path | str | None = None) -> TrainedRun:
    """Load what a run left; it is evaluated on the test split first, unless it was with what is there now.

    Args:
        path: Run directory.
        name: What to call it; by default the directory's name.
        latents: Directory of latents to evaluate on; by default the run's own.

    Raises:
        FileNotFoundError: There is no such run.
        ValueError: Other latents were extracted into the place of those that it was trained on.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"run {path} does not exist")
    lines = list(_read_log(path / "log.jsonl"))
    return TrainedRun(
        name=name or path.name,
        path=path,
        settings=run_settings(path),
        steps=[line for line in lines if "loss" in line],
        validations={line["step"]: line["validation"] for line in lines if "validation" in line},
        evaluation=load_evaluation(path, latents=latents),
    )


def _read_log(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            # A run that is still being trained may have written half of its last line.
            if line.endswith("}"):
                try:
                    yield json.loads(line)
                except ValueError:
                    raise ValueError(f"{path} is damaged: a line is no JSON") from None
