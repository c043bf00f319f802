"""Latents that stand in for encoders', and small settings: shared by the trainer's tests."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import torch

from modest_align_train.checkpoints import BEST, LAST, part, read_checkpoint
from modest_align_train.latents import Record, write_manifest, write_shard
from modest_align_train.settings import Settings
from modest_align_train.train import train

IMAGE_DIM, TEXT_DIM = 24, 16


def write_store(directory: Path, shards, image_encoder: str = "seeded", text_encoder: str = "seeded") -> Path:
    """Latents as `extract` leaves them, of shards (image latents, caption latents, records)."""
    directory.mkdir(parents=True, exist_ok=True)
    entries = []
    for index, (image, text, records) in enumerate(shards):
        counts = torch.tensor([len(record.captions) for record in records])
        caption_image = torch.arange(len(records)).repeat_interleave(counts)
        entries.append(write_shard(directory, index, image, text, caption_image, records))
    write_manifest(
        directory,
        entries,
        image_encoder=image_encoder,
        text_encoder=text_encoder,
        image_dim=image.shape[1],
        text_dim=text.shape[1],
    )
    return directory


def write_latents(directory: Path, images: int = 200, splits=("train", "train", "train", "validation", "test")) -> Path:
    """Two captions an image; both modalities are noisy views of the same 8 numbers."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(images, 8, generator=generator)
    image = common @ torch.randn(8, IMAGE_DIM, generator=generator)
    text = common.repeat_interleave(2, dim=0) @ torch.randn(8, TEXT_DIM, generator=generator)
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
    return write_store(directory, [(image, text, records)])


def write_tar(path: Path, members: dict) -> Path:
    """A tar of bytes, or of what JSON can hold, by member name."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


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


def read_log(run: Path) -> list[dict]:
    """Lines of the log without the clock."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    """The same losses and recalls, last weights and best weights, bit for bit."""
    assert read_log(a) == read_log(b)
    for name in (LAST, BEST):
        one, other = (read_checkpoint(run / name)[0] for run in (a, b))
        assert one["step"] == other["step"]
        for parameter, value in part(one, "model").items():
            assert torch.equal(value, other[f"model.{parameter}"]), parameter


def train_in_one_thread(settings: Settings) -> None:
    """What a process of its own runs, so that its bits are those of the tests."""
    torch.set_num_threads(1)
    train(settings, progress=False)
