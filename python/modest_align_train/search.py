"""Search with a trained run: a text finds images, an image finds captions."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from modest_align_train.adapters import CHUNK, load_checkpoint
from modest_align_train.encoders import load_image_encoder, load_text_encoder
from modest_align_train.files import atomic_path
from modest_align_train.latents import open_image
from modest_align_train.pictures import IMAGE_SUFFIXES
from modest_align_train.rows import Rows
from modest_align_train.skips import visible

SHEET_SUFFIXES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Hit:
    """One thing found.

    Attributes:
        rank: 1 is the best.
        score: Cosine similarity to the query.
        key: Name of the image; where captions were searched, of an image that has this one.
        captions: The image's captions; where captions were searched, the one found.
        location: Where the image's bytes are, as in `Record`.
    """

    rank: int
    score: float
    key: str
    captions: tuple[str, ...]
    location: str


def search(
    run: Path | str,
    query: str,
    *,
    latents: Path | str | None = None,
    split: str | None = None,
    top: int = 10,
    output: Path | str | None = None,
) -> list[Hit]:
    """Find the images that a text describes, or the captions that describe an image.

    Args:
        run: Run directory of `train`.
        query: A text, or the path of an image file (any file that is there is taken for one).
        latents: Directory that `extract` wrote, to search; by default the run's own.
        split: Search only this split: "train", "validation" or "test".
        top: Hits wanted.
        output: Picture of the hits to write, `.png`, `.pdf` or `.svg`.

    Returns:
        At most `top` hits, best first: images, or captions (one that several images share is listed once).

    Raises:
        FileNotFoundError: The run, the latents or the image of the query are not there.
        ValueError: An argument cannot be used; the sentence says why.
    """
    if not query.strip():
        raise ValueError("query must be a text or the path of an image, got an empty string")
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    if output is not None and Path(output).suffix.lower() not in SHEET_SUFFIXES:
        raise ValueError(f"output must end in {', '.join(SHEET_SUFFIXES)}, got {output}")
    image = None
    if os.path.isfile(query) or query.lower().endswith(IMAGE_SUFFIXES):
        image = _open_query(query)
    checkpoint = load_checkpoint(run)
    aligner, store = checkpoint.aligner, checkpoint.load_latents(latents)
    if split is not None:
        store = store.subset(split)
    if image is not None:
        encoded = load_image_encoder(store.image_encoder)([image])
        captions = store.captions
        scores, rows = nearest_captions(
            _cosines(aligner.embed_images(encoded)[0], aligner.embed_texts, store.text), captions, top
        )
        records = [store.records[int(store.caption_image[row])] for row in rows]
        found = [(record, (captions[row],)) for record, row in zip(records, rows, strict=True)]
    else:
        encoded = load_text_encoder(store.text_encoder)([query])
        scores, rows = nearest_images(_cosines(aligner.embed_texts(encoded)[0], aligner.embed_images, store.image), top)
        found = [(store.records[row], store.records[row].captions) for row in rows]
    hits = [
        Hit(rank, score, record.key, captions, record.location)
        for rank, (score, (record, captions)) in enumerate(zip(scores, found, strict=True), 1)
    ]
    if output is not None:
        write_sheet(hits, query, Path(output))
    return hits


def nearest_images(scores: Tensor, top: int) -> tuple[list[float], list[int]]:
    """Cosines and rows of the `top` images nearest to a query, best first, of the cosines of all [images]."""
    best = scores.topk(min(top, len(scores)))
    return best.values.tolist(), best.indices.tolist()


def nearest_captions(scores: Tensor, captions: Sequence[str], top: int) -> tuple[list[float], list[int]]:
    """Cosines and rows of the `top` captions nearest to a query, best first, equal ones listed once.

    Args:
        scores: Cosines of all captions [captions].
        captions: What they say, [captions].
        top: Captions wanted.
    """
    looked_at = min(4 * top, len(captions))
    while True:
        nearest = scores.topk(looked_at)
        best: dict[str, tuple[float, int]] = {}
        for score, row in zip(nearest.values.tolist(), nearest.indices.tolist(), strict=True):
            best.setdefault(captions[row], (score, row))
        if len(best) >= top or looked_at == len(captions):
            found = list(best.values())[:top]
            return [score for score, _ in found], [row for _, row in found]
        looked_at = min(4 * looked_at, len(captions))


def _cosines(query: Tensor, embed: Callable[[Tensor], Tensor], latents: Tensor | Rows) -> Tensor:
    """Cosines of an embedding [D] and those of latents [n, features], of which few are held at once."""
    chunks = tqdm(latents.split(CHUNK), "embedding", leave=False, delay=2)
    return torch.cat([embed(chunk.to("cpu")) @ query for chunk in chunks])


def format_hits(hits: Sequence[Hit], width: int = 100) -> str:
    """Lay hits out as a table of at most `width` characters a line: rank, cosine, captions, key."""
    key_width = min(max((len(hit.key) for hit in hits), default=3), 36)
    caption_width = max(width - key_width - 16, 20)
    lines = [f"{'rank':>4}  {'cosine':>6}  {'caption':<{caption_width}}  image"]
    for hit in hits:
        captions = visible(textwrap.shorten(" | ".join(hit.captions), caption_width, placeholder="…"))
        lines.append(f"{hit.rank:>4}  {hit.score:>6.3f}  {captions:<{caption_width}}  {visible(hit.key)}")
    return "\n".join(lines)


def write_sheet(hits: Sequence[Hit], query: str, output: Path) -> None:
    """Draw the hits' images with rank, cosine and caption, five in a row."""
    rows = -(-len(hits) // 5)
    figure = Figure(figsize=(10, 0.5 + 2.5 * rows), layout="constrained")
    figure.suptitle(textwrap.shorten(query, 90, placeholder="…"), parse_math=False)
    for axes, hit in zip(figure.subplots(rows, 5, squeeze=False).flat, hits, strict=False):
        caption = textwrap.shorten(" | ".join(hit.captions), 48, placeholder="…")
        axes.set_title(f"{hit.rank}.  {hit.score:.3f}\n{textwrap.fill(caption, 26)}", fontsize=8, parse_math=False)
        try:
            axes.imshow(open_image(hit.location))
        except OSError:
            axes.text(0.5, 0.5, "image not found", ha="center", va="center", transform=axes.transAxes)
    for axes in figure.axes:
        axes.set_axis_off()
    with atomic_path(output) as temporary:
        figure.savefig(temporary, format=output.suffix[1:].lower(), dpi=120)


def _open_query(query: str) -> Image.Image:
    try:
        return open_image(query)
    except FileNotFoundError:
        raise FileNotFoundError(f"query {query} looks like the path of an image, but there is no such file") from None
    except OSError as error:
        raise ValueError(f"query {query} is not an image that can be read: {error}") from None
