"""Images and captions -> latents on disk, by frozen encoders, in shards that survive an interruption."""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor
from tqdm import tqdm

from modest_align_train.encoders import (
    DEFAULT_IMAGE_ENCODER,
    DEFAULT_TEXT_ENCODER,
    ImageEncoder,
    TextEncoder,
    in_batches,
    load_image_encoder,
    load_text_encoder,
    local_files,
)
from modest_align_train.files import read_json, write_file, write_json
from modest_align_train.latents import (
    DTYPES,
    FORMAT_VERSION,
    MANIFEST,
    PARTIAL_MANIFEST,
    Latents,
    Record,
    load_latents,
    open_image,
    read_shard,
    split_counts,
    write_manifest,
    write_shard,
)
from modest_align_train.pictures import UnreadableError
from modest_align_train.skips import Skipped, SkipReport, count_reasons
from modest_align_train.sources import Source, find_files, fingerprint, read_source
from modest_align_train.workers import ALONE, Workers

_SECONDS_UNSAVED = 30

T = TypeVar("T")
R = TypeVar("R")


def extract(
    source: str | Path | Sequence[str | Path],
    output: Path | str,
    *,
    image_encoder: str = DEFAULT_IMAGE_ENCODER,
    text_encoder: str = DEFAULT_TEXT_ENCODER,
    split: str | None = None,
    image_column: str | None = None,
    caption_column: str | Sequence[str] | None = None,
    image_root: Path | str | None = None,
    group_column: str | None = None,
    dtype: str = "float32",
    batch_size: int | None = None,
    shard_size: int = 2048,
    device: str = "auto",
    progress: bool = True,
    workers: Workers = ALONE,
) -> Latents:
    """Encode images and their captions with frozen encoders and store the latents.

    An interrupted extraction goes on from its last half minute when it is called again; a finished one of
    the same source and encoders is loaded at once. What cannot be read is reported and left out.

    Args:
        source: Pairs of images and captions, of a kind that `read_source` knows: a file, a folder, a glob, a list.
        output: Folder for the latents; created if need be.
        image_encoder: efficientnet-lite0, timm:NAME, open_clip:NAME:PRETRAINED or transformers:NAME.
        text_encoder: all-MiniLM-L6-v2, open_clip:NAME:PRETRAINED, sentence-transformers:NAME or
            transformers:NAME.
        split: Put every image into this split (train, validation or test), whatever the source says. Without
            it and without splits in the source, 80/10/10 by a hash of names, equal images and captions together.
        image_column: Column of a table with the image's path; found by its usual names if not given.
        caption_column: Column or columns of a table with captions; found by their usual names if not given.
        image_root: Folder that relative image paths start from; that of the source file if not given.
        group_column: Column, or field of a tar's .json, whose equal values say that images show the same thing:
            they stay in one split, and the captions of one are right answers for the others. Not used unless named.
        dtype: Type that latents are stored in: float32, or float16, in half the space.
        batch_size: Images a batch; what is fast on the device if not given.
        shard_size: Images a shard.
        device: auto, cpu, cuda, ...
        progress: Show a progress bar and say what was left out.
        workers: Those that share the shards out; each calls this, on one file system.

    Returns:
        The latents, on the CPU.

    Raises:
        ValueError: The source or an argument cannot be understood, no image can be read, ``output`` holds latents of
            something else, a latent is too large for its type, or another process is writing into it.
        FileNotFoundError: The source is not there.
        ImportError: An encoder's package is missing.
    """
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be {' or '.join(DTYPES)}, got {dtype}")
    caption_column = [caption_column] if isinstance(caption_column, str) else list(caption_column or []) or None
    files = find_files(source)
    origin = {
        "format_version": FORMAT_VERSION,
        "image_encoder": image_encoder,
        "image_encoder_fingerprint": fingerprint(local_files(image_encoder)),
        "text_encoder": text_encoder,
        "text_encoder_fingerprint": fingerprint(local_files(text_encoder)),
        "source": [str(path) for path in files],
        "source_fingerprint": fingerprint(files),
        "split": split,
        "image_column": image_column,
        "caption_column": caption_column,
        "image_root": None if image_root is None else str(Path(image_root).absolute()),
        "group_column": group_column,
        "dtype": dtype,
    }
    with workers.alone_in(Path(output)):
        return _extract(files, Path(output), origin, batch_size, shard_size, device, progress, workers)


def _extract(
    files: Sequence[Path],
    output: Path,
    origin: dict[str, Any],
    batch_size: int | None,
    shard_size: int,
    device: str,
    progress: bool,
    workers: Workers,
) -> Latents:
    progress = progress and workers.writes
    say: Callable[[str], object] = tqdm.write if progress else lambda line: None

    def prepare() -> tuple[Source, ImageEncoder, TextEncoder, list[dict[str, Any]], bool] | None:
        if _stored(output / MANIFEST, origin) is not None:
            say(f"{output} holds the latents of this source and these encoders already")
            return None
        partial = _stored(output / PARTIAL_MANIFEST, origin)
        arguments = ("split", "image_column", "caption_column", "image_root", "group_column")
        contents = read_source(files, **{name: origin[name] for name in arguments})
        say(f"{len(contents.records):,} images; splits: {contents.split_rule}")
        for sentence in contents.found:
            say(sentence)
        encode_images = load_image_encoder(origin["image_encoder"], workers.device or device)
        encode_texts = load_text_encoder(origin["text_encoder"], workers.device or device)
        shards = _whole_shards(output, partial["shards"] if partial else [])
        return contents, encode_images, encode_texts, shards, partial is not None

    prepared = workers.together(prepare)
    if prepared is None:
        return load_latents(output)
    contents, encode_images, encode_texts, shards, going_on = prepared
    if workers.writes:
        # Of the shards that come next, what is done is kept.
        now = {_unfinished_name(len(shards) + k) for k in range(workers.size)} if going_on else set()
        for leftover in (*output.glob(".*.tmp"), *output.glob("shard-*.partial")):
            if leftover.name not in now:
                leftover.unlink()
        # From here on what is left of a shard has an origin.
        write_json(output / PARTIAL_MANIFEST, {**origin, "shards": shards})
    workers.everyone(None)  # nobody's temporary file before that
    there, done = len(shards), sum(shard["records"] for shard in shards)
    if going_on:
        say(f"going on after an interruption: {done:,} images are there, in {len(shards)} whole shards")

    report = SkipReport(say, MANIFEST)
    report.add(contents.skipped)
    report.add([Skipped(**one) for shard in shards for one in shard["skipped"] + shard["faulty"]])
    todo = contents.records[done:]
    started = perf_counter()
    total = sum(1 + len(record.captions) for record in todo)
    with tqdm(total=total, unit=" items", disable=not progress, smoothing=0.05) as bar:

        def encode(records: Sequence[Record] | None, index: int) -> dict[str, Any] | None:
            if records is None:
                return None
            unfinished = _Unfinished(output / _unfinished_name(index), encode_images.dim, encode_texts.dim)
            bar.set_description("images")
            image, kept, unread = _encode_images(records, encode_images, batch_size, bar.update, unfinished)
            bar.set_description("captions")
            text, faulty = _encode_captions(kept, encode_texts, bar.update, unfinished)
            counts = torch.tensor([len(record.captions) for record in kept], dtype=torch.int64)
            caption_image = torch.arange(len(kept)).repeat_interleave(counts)
            image, text = (_as_stored(latents, origin["dtype"]) for latents in (image, text))
            written = write_shard(output, index, image, text, caption_image, kept)
            kept_apart = {"skipped": list(map(asdict, unread)), "faulty": list(map(asdict, faulty))}
            return {**written, "records": len(records), **kept_apart}

        for shared_out in in_batches(list(in_batches(todo, shard_size)), workers.size):
            # Each worker has one of these shards, if there are as many; all are noted when all are written.
            own = shared_out[workers.rank] if workers.rank < len(shared_out) else None
            entry = workers.together(encode, own, len(shards) + workers.rank)
            for records, written in zip(shared_out, workers.everyone(entry), strict=False):
                shards.append(written)
                report.add([Skipped(**one) for one in written["skipped"] + written["faulty"]])
                total -= sum(len(record.captions) for record in records) - written["captions"]
            if workers.writes:
                write_json(output / PARTIAL_MANIFEST, {**origin, "shards": shards})
                for leftover in output.glob("shard-*.partial"):
                    leftover.unlink()
            workers.everyone(None)  # none of the next round before that
            bar.total = total
            bar.update(sum(shard["records"] + shard["captions"] for shard in shards[there:]) - bar.n)
    report.close()

    unread_fields = [one for shard in shards for one in shard["skipped"]]
    if len(unread_fields) == len(contents.records):
        (output / PARTIAL_MANIFEST).unlink(missing_ok=True)
        first = unread_fields[0]
        raise ValueError(
            f"source has {len(contents.records):,} images, none of which could be read, the first being "
            f"{first['location']}: {first['reason']} (relative paths start from image_root)"
        )
    if workers.writes:
        unreadable = {one["location"] for one in unread_fields}
        splits = split_counts([record for record in contents.records if record.location not in unreadable])
        faulty_fields = [one for shard in shards for one in shard["faulty"]]
        skipped = [asdict(one) for one in contents.skipped] + unread_fields + faulty_fields
        manifest = write_manifest(
            output,
            shards,
            image_dim=encode_images.dim,
            text_dim=encode_texts.dim,
            splits=splits,
            split_rule=contents.split_rule,
            found=contents.found,
            skipped_by_reason=count_reasons(one["reason"] for one in skipped),
            skipped=skipped,
            **origin,
        )
        (output / PARTIAL_MANIFEST).unlink()
        counts_said = ", ".join(f"{name} {count:,}" for name, count in splits.items())
        say(
            f"{manifest['images']:,} images ({counts_said}) and {manifest['captions']:,} captions in {output}, "
            f"{perf_counter() - started:.0f} s"
        )
    workers.everyone(None)  # the manifest is there
    return load_latents(output)


def _stored(path: Path, origin: dict[str, Any]) -> dict[str, Any] | None:
    """Read a manifest that is of the same origin; None if there is none.

    Raises:
        ValueError: It is of another source or other encoders.
    """
    if not path.is_file():
        return None
    # One of before there was a choice has no dtype.
    manifest = {"dtype": "float32", **read_json(path)}
    for key, wanted in origin.items():
        if manifest.get(key) != wanted:
            difference = f"{key} {_plain(manifest.get(key))}, now {_plain(wanted)}"
            if key == "format_version":
                difference = "another version of this program"
            elif key.endswith("_fingerprint"):
                difference = f"the {key.removesuffix('_fingerprint')} as it was before its files changed"
            raise ValueError(f"output {path.parent} holds latents of {difference}: choose another folder, or delete it")
    return manifest


def _as_stored(latents: Tensor, dtype: str) -> Tensor:
    largest = torch.finfo(DTYPES[dtype]).max
    if (latents.abs() > largest).any():
        raise ValueError(f"dtype {dtype} holds numbers up to {largest:,.0f}, but a latent is larger: take float32")
    return latents.to(DTYPES[dtype])


def _plain(value: Any) -> str:
    return "not given" if value is None else ", ".join(value) if isinstance(value, list) else str(value)


def _whole_shards(output: Path, shards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the leading shards that are on disk as they were written."""
    for count, shard in enumerate(shards):
        try:
            read_shard(output, shard)
        except (FileNotFoundError, ValueError, LookupError, TypeError):
            return shards[:count]
    return shards


def _unfinished_name(shard: int) -> str:
    return f"shard-{shard:05d}.partial"


class _Unfinished:
    """What is done of the shard under way, in a file now and then: what an interruption need not cost.

    Attributes:
        path: The file.
        image: Latents of the images that can be read, batches [n, Di].
        text: Latents of captions, batches [n, Dt].
        captions: These captions.
        unread: What `Skipped` says of each image that was tried, None for one that can be read.
    """

    def __init__(self, path: Path, image_dim: int, text_dim: int) -> None:
        self.path = path
        self.image, self.text = [torch.empty(0, image_dim)], [torch.empty(0, text_dim)]
        self.captions: list[str] = []
        self.unread: list[dict[str, str] | None] = []
        self.saved_at = perf_counter()
        if path.is_file():
            with safe_open(path, "pt") as file:
                metadata = {key: json.loads(value) for key, value in file.metadata().items()}
                self.image.append(file.get_tensor("image"))
                self.unread = metadata["unread"]
                # An earlier version took them in another order, and did not note which they are: they come again.
                if "captions" in metadata:
                    self.text.append(file.get_tensor("text"))
                    self.captions = metadata["captions"]

    def save(self) -> None:
        """Write the file, unless that was a moment ago."""
        if perf_counter() - self.saved_at >= _SECONDS_UNSAVED:
            tensors = {"image": torch.cat(self.image), "text": torch.cat(self.text)}
            metadata = {"unread": json.dumps(self.unread), "captions": json.dumps(self.captions)}
            write_file(self.path, save_safetensors(tensors, metadata))
            self.saved_at = perf_counter()


def _encode_images(
    records: Sequence[Record],
    encoder: ImageEncoder,
    batch_size: int | None,
    progress: Callable[[int], object],
    unfinished: _Unfinished,
) -> tuple[Tensor, list[Record], list[Skipped]]:
    """Encode the images that can be read: latents [kept, Di], their records, and why not the others."""
    progress(len(unfinished.unread))
    locations = [record.location for record in records[len(unfinished.unread) :]]
    for latents, unread in image_batches(locations, encoder, batch_size):
        unfinished.image.append(latents)
        unfinished.unread += [asdict(one) if one else None for one in unread]
        unfinished.save()
        progress(len(unread))
    return (
        torch.cat(unfinished.image),
        [record for record, unread in zip(records, unfinished.unread, strict=True) if unread is None],
        [Skipped(**unread) for unread in unfinished.unread if unread],
    )


def _encode_captions(
    records: Sequence[Record], encoder: TextEncoder, progress: Callable[[int], object], unfinished: _Unfinished
) -> tuple[Tensor, list[Skipped]]:
    """Encode captions, equal ones once, those of like length together.

    Returns:
        Latents [n, Dt], and which captions' tokens are not what they say; these stay, as the encoder reads them.
    """
    captions = [caption for record in records for caption in record.captions]
    counts = Counter(captions)
    reading = dict(zip(counts, encoder.read(list(counts)), strict=True))
    done = set(unfinished.captions)
    progress(sum(counts[caption] for caption in done))
    todo = sorted((caption for caption in counts if caption not in done), key=lambda caption: reading[caption].length)
    for batch, latents in zip(in_batches(todo, encoder.batch_size), text_batches(todo, encoder), strict=True):
        unfinished.text.append(latents)
        unfinished.captions += batch
        unfinished.save()
        progress(sum(counts[caption] for caption in batch))
    row = {caption: number for number, caption in enumerate(unfinished.captions)}
    places = [(caption, record.location) for record in records for caption in record.captions]
    return (
        torch.cat(unfinished.text)[torch.tensor([row[caption] for caption in captions], dtype=torch.int64)],
        [Skipped(place, reading[caption].fault) for caption, place in places if reading[caption].fault],
    )


def image_batches(
    locations: Sequence[str], encoder: ImageEncoder, batch_size: int | None = None
) -> Iterator[tuple[Tensor, list[Skipped | None]]]:
    """Open and encode images, batch by batch and in order.

    Args:
        locations: As in `Record`.
        encoder: Of images.
        batch_size: Images a batch; the encoder's own if None.

    Yields:
        Latents of those of a batch that can be read, float32 [k, Di], and for each of the batch None, or why it
        cannot.
    """

    def encode(batch: Sequence[str]) -> tuple[Tensor, list[Skipped | None]]:
        decoded = [_decode(location, encoder) for location in batch]
        pixels = [one for one in decoded if isinstance(one, Tensor)]
        latents = encoder.encode(pixels) if pixels else torch.empty(0, encoder.dim)
        return latents, [one if isinstance(one, Skipped) else None for one in decoded]

    with _threads(encoder.device) as threads:
        yield from _map_in_order(encode, in_batches(locations, batch_size or encoder.batch_size), threads)


def text_batches(texts: Sequence[str], encoder: TextEncoder) -> Iterator[Tensor]:
    """Encode texts, of which those of like length belong together: in order, float32 [k, Dt] a batch."""
    with _threads(encoder.device) if encoder.concurrent else nullcontext(1) as threads:
        yield from _map_in_order(encoder, in_batches(texts, encoder.batch_size), threads)


@contextmanager
def _threads(device: torch.device) -> Iterator[int]:
    """Say how many threads should work on batches, and on a CPU give each operator one of them.

    One batch a thread, rather than all threads on one batch, saves the wait at the end of each of its small
    operators; where other programs want the cores too, that wait made it 5 times as slow.
    """
    if device.type != "cpu":
        yield min(16, os.cpu_count() or 1)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _map_in_order(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Map as ``Executor.map`` does, but with few items under way, so that memory stays bounded."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _decode(location: str, encoder: ImageEncoder) -> Tensor | Skipped:
    try:
        image = open_image(location)
    except FileNotFoundError:
        return Skipped(location, "no such file")
    except UnreadableError as error:
        return Skipped(location, error.reason, error.detail)
    except OSError as error:
        return Skipped(location, "the file cannot be read", error.strerror or str(error))
    return encoder.preprocess(image)
