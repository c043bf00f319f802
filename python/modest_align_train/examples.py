"""What a trained run finds, not picked by hand: hits and misses both ways, with their pictures."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from modest_align_train.adapters import load_aligner
from modest_align_train.answers import Answers
from modest_align_train.evaluate import best_ranks
from modest_align_train.latents import Latents, open_image
from modest_align_train.search import nearest_captions, nearest_images

EXAMPLES = 4
EXAMINED = 200
FOUND_IMAGES = 5
FOUND_CAPTIONS = 3


def find_examples(run: Path, latents: Latents) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Queries both ways, not picked by hand: the first hits and misses in the order of a hash.

    Args:
        run: Run directory.
        latents: Of the split to search.

    Returns:
        "from_text" and "from_image", of each "hits" and "misses": the query, what was found, with its cosine and
        whether it is right, and the best right answer with its rank.
    """
    aligner = load_aligner(run)
    images, texts = aligner.embed_images(latents.image), aligner.embed_texts(latents.text)
    answers = Answers(latents)
    captions = latents.captions
    first_caption = torch.searchsorted(latents.caption_image, torch.arange(len(images)))
    order = _one_of_each_group(latents)[:EXAMINED]

    def from_text(row: int) -> dict[str, Any]:
        caption = first_caption[row : row + 1]
        query, (position, right) = texts[caption[0]], answers.images(caption)
        scores = images @ query
        answer = int(right[scores[right].argmax()])
        return {
            "query": captions[caption[0]],
            "rank": int(best_ranks(query[None], images, lambda _: (position, right))),
            "answer": latents.records[answer].location,
            "found": [
                {
                    "location": latents.records[image].location,
                    "caption": " · ".join(latents.records[image].captions),
                    "score": score,
                    "right": image in right,
                }
                for score, image in zip(*nearest_images(scores, FOUND_IMAGES), strict=True)
            ],
        }

    def from_image(row: int) -> dict[str, Any]:
        query, (position, right) = images[row], answers.captions(torch.tensor([row]))
        return {
            "query": latents.records[row].location,
            "rank": int(best_ranks(query[None], texts, lambda _: (position, right))),
            "answer": " · ".join(latents.records[row].captions),
            "found": [
                {"caption": captions[caption], "score": score, "right": caption in right}
                for score, caption in zip(*nearest_captions(texts @ query, captions, FOUND_CAPTIONS), strict=True)
            ],
        }

    def first(make: Callable[[int], dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        shown: dict[str, list[dict[str, Any]]] = {"hits": [], "misses": []}
        for row in order:
            example = make(row)
            kind = shown["hits" if any(one["right"] for one in example["found"]) else "misses"]
            if len(kind) < EXAMPLES:
                kind.append(example)
            if all(len(examples) == EXAMPLES for examples in shown.values()):
                break
        return shown

    return {"from_text": first(from_text), "from_image": first(from_image)}


def _one_of_each_group(latents: Latents) -> list[int]:
    """Rows of images in the order of the SHA-256 of their keys, the first of each group."""
    order = sorted(
        range(len(latents.records)),
        key=lambda row: hashlib.sha256(latents.records[row].key.encode()).digest(),
    )
    first: dict[int, int] = {}
    for row in order:
        first.setdefault(int(latents.group[row]), row)
    return list(first.values())


@lru_cache(maxsize=512)
def thumbnail(location: str) -> str | None:
    """Small JPEG as a data URI, None where the image is gone or cannot be read."""
    try:
        image = open_image(location)
    except (OSError, ValueError):
        return None
    image.thumbnail((160, 160))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
