"""Extracts with encoders that cost nothing; test_workers.py starts it under torchrun, and calls it."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch
from PIL import Image

from modest_align_train import extract as module
from modest_align_train.encoders import ImageEncoder, TextEncoder
from modest_align_train.workers import ALONE, Workers, workers_of_torchrun

CPU = torch.device("cpu")


def mean_color(image: Image.Image) -> torch.Tensor:
    return torch.tensor([sum(band) / len(band) for band in (image.getchannel(i).tobytes() for i in range(3))])


def lengths(captions: list[str]) -> torch.Tensor:
    return torch.tensor([[float(len(caption)), 1.0] for caption in captions])


def load_images(name: str, device: str) -> ImageEncoder:
    return ImageEncoder(name, 3, CPU, 2, mean_color, lambda pixels: pixels, contextlib.nullcontext())


def load_texts(name: str, device: str) -> TextEncoder:
    return TextEncoder(name, 2, CPU, 3, True, lengths)


def run(source: str | Path, output: str | Path, workers: Workers = ALONE) -> None:
    loaders = module.load_image_encoder, module.load_text_encoder
    module.load_image_encoder, module.load_text_encoder = load_images, load_texts
    try:
        module.extract(source, output, shard_size=3, progress=False, workers=workers)
    finally:
        module.load_image_encoder, module.load_text_encoder = loaders


if __name__ == "__main__":
    with workers_of_torchrun("cpu") as its_workers:
        run(*sys.argv[1:], workers=its_workers)
