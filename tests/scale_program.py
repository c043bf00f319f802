"""Make pairs of latents up, train on them and evaluate: times and memory, a line each.

`python -m tests.scale_program 1000000 FOLDER` is the run whose numbers README has; test_scale.py starts a smaller one.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

from modest_align_train.evaluate import evaluate
from modest_align_train.latents import MANIFEST, Record, load_latents, write_manifest, write_shard
from modest_align_train.settings import Settings
from modest_align_train.train import train

SHARD = 2048
COMMON = 64  # numbers that an image and its caption share


@dataclass(frozen=True)
class Scale:
    """What to make up and how long to train.

    Attributes:
        pairs: Images, one caption each.
        folder: Gets latents and run; latents that are there are taken.
        dtype: Of the latents.
        image_dim: Features of an image.
        text_dim: Features of a caption.
        validation: Images of the validation split.
        test: Images of the test split.
        steps: Training steps.
        embedding_dim: Of the adapters.
        blocks: Of the adapters.
    """

    pairs: tyro.conf.Positional[int]
    folder: tyro.conf.Positional[Path]
    dtype: str = "float16"
    image_dim: int = 1536
    text_dim: int = 1024
    validation: int = 10_000
    test: int = 20_000
    steps: int = 300
    embedding_dim: int = 512
    blocks: int = 1


def memory() -> dict[str, int]:
    """MiB that are resident now, those of them that no file holds, and the most that ever were resident."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, anonymous = (int(status[name].split()[0]) // 1024 for name in ("VmRSS", "RssAnon"))
    return {"resident": now, "anonymous": anonymous, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


@contextmanager
def measured(what: str) -> Iterator[dict[str, float]]:
    facts: dict[str, float] = {}
    start, cpu_start = time.perf_counter(), time.process_time()
    yield facts
    # Of all threads: on a machine that others use too it says more than the clock.
    spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
    rounded = {name: round(value, 2) for name, value in spent.items()}
    print(json.dumps({"what": what, **rounded, **facts, **memory()}), flush=True)


def write(scale: Scale, directory: Path) -> None:
    """Write latents: noisy views of a few common numbers, the splits spread over all shards."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(COMMON, dim, generator=generator) for dim in (scale.image_dim, scale.text_dim)]
    places = torch.randperm(scale.pairs, generator=generator)
    splits = ["train"] * scale.pairs
    for split, rows in (("validation", places[: scale.validation]), ("test", places[-scale.test :])):
        for row in rows.tolist():
            splits[row] = split
    entries = []
    for first in tqdm(range(0, scale.pairs, SHARD), "writing shards", delay=2):
        rows = range(first, min(first + SHARD, scale.pairs))
        common = torch.randn(len(rows), COMMON, generator=generator)
        image, text = (
            (common @ view + 4 * torch.randn(len(rows), view.shape[1], generator=generator)).to(
                getattr(torch, scale.dtype)
            )
            for view in views
        )
        records = [
            Record(f"{row:07}.jpg", (f"what is to be seen in picture {row}",), splits[row], f"{row:07}.jpg", f"/{row}")
            for row in rows
        ]
        entries.append(write_shard(directory, len(entries), image, text, torch.arange(len(rows)), records))
    write_manifest(
        directory,
        entries,
        image_encoder="made up",
        text_encoder="made up",
        image_dim=scale.image_dim,
        text_dim=scale.text_dim,
        dtype=scale.dtype,
    )


def main(scale: Scale) -> None:
    latents = scale.folder / "latents"
    print(json.dumps({"what": "start", **memory()}), flush=True)
    if not (latents / MANIFEST).is_file():
        with measured("write"):
            write(scale, latents)
    with measured("open") as facts:
        facts["images"] = len(load_latents(latents).records)
    settings = Settings(
        latents=latents,
        output=scale.folder / "run",
        device="cpu",
        steps=scale.steps,
        embedding_dim=scale.embedding_dim,
        blocks=scale.blocks,
        validate_every=scale.steps,
    )
    with measured("train") as facts:
        run = train(settings, progress=False)
        seconds = [line["seconds"] for line in map(json.loads, (run / "log.jsonl").open()) if "loss" in line]
        facts["seconds_a_step"] = round((seconds[-1] - seconds[0]) / (scale.steps - settings.log_every), 4)
    with measured("evaluate") as facts:
        found = evaluate(run, device="cpu")
        facts |= {"images": found["images"], "R@1": found["mean"]["R@1"]["value"]}


if __name__ == "__main__":
    main(tyro.cli(Scale))
