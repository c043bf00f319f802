"""Latents that stand in for encoders', and small settings: shared by the trainer's tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from modest_align_train.latents import Record, write_json, write_shard
from modest_align_train.settings import Settings
from modest_align_train.train import train

IMAGE_DIM, TEXT_DIM = 24, 16


def write_latents(directory: Path, images: int = 200, splits=("train", "train", "train", "validation", "test")) -> Path:
    """Two captions an image; both modalities are noisy views of the same 8 numbers."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(images, 8, generator=generator)
    caption_image = torch.arange(images).repeat_interleave(2)
    image = common @ torch.randn(8, IMAGE_DIM, generator=generator)
    text = common[caption_image] @ torch.randn(8, TEXT_DIM, generator=generator)
    image += torch.randn(image.shape, generator=generator) / 2
    text += torch.randn(text.shape, generator=generator) / 2
    records = [
        Record(
            f"image {i}",
            (f"caption {i} a", f"caption {i} b"),
            splits[i % len(splits)],
            f"image {i}",
            f"{i}.png",
        )
        for i in range(images)
    ]
    directory.mkdir()
    shard = write_shard(directory, 0, image, text, caption_image, records)
    manifest = {
        "format_version": 1,
        "images": images,
        "captions": len(text),
        "image_dim": IMAGE_DIM,
        "text_dim": TEXT_DIM,
        "image_encoder": "seeded",
        "text_encoder": "seeded",
        "shards": [shard],
    }
    write_json(directory / "manifest.json", manifest)
    return directory


def small_settings(tmp_path: Path, **changes) -> Settings:
    """Settings of a run of a second."""
    latents = tmp_path / "latents"
    if not latents.exists():
        write_latents(latents)
    settings = Settings(
        latents=latents, output=tmp_path / "run", device="cpu", steps=40, batch_size=32, embedding_dim=16,
        warmup_steps=5, validate_every=10, checkpoint_every=10, log_every=5,
    )  # fmt: skip
    return replace(settings, **changes)


def trained_run(tmp_path: Path) -> Path:
    return train(small_settings(tmp_path, steps=300, validate_every=50), progress=False)
