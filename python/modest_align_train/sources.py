"""Image-caption pairs as people keep them: tables, tars and folders of samples, JSON of COCO and Karpathy."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from textwrap import shorten
from typing import Any

from modest_align_train.identity import image_file, settle
from modest_align_train.latents import Record, read_member, split_location, tar_index
from modest_align_train.pictures import IMAGE_SUFFIXES
from modest_align_train.samples import TEXT_SUFFIXES, Sample, group_samples, sample_key
from modest_align_train.skips import Skipped
from modest_align_train.tables import (
    TABLE_SUFFIXES,
    Row,
    is_missing,
    is_utf8,
    list_as_text,
    mend,
    parse_json,
    read_table,
)

IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_path", "file_name", "filename", "image_name", "path", "img")
CAPTION_COLUMNS = (
    *("caption", "captions", "text", "texts", "sentence", "sentences", "description", "title"),
    *("comment", "raw"),  # Flickr30k's two tables
)
SPLIT_COLUMNS = ("split", "subset", "partition")
GROUP_COLUMNS = ("group", "group_id", "concept")

_MENDED = "a caption that was no Unicode text, mended"
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "restval": "train",  # Karpathy's COCO: the part of the official validation images that is trained on
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
_SPLIT_IN_NAME = re.compile(r"(?:.*[^a-z])?(train|training|valid|validation|val|dev|test|testing)(?:[^a-z].*)?")


@dataclass(frozen=True)
class Source:
    """What a source holds; the images themselves are opened later, one by one, by their location.

    Attributes:
        records: One per image, in the order of the source.
        skipped: What had to be left out or mended already.
        split_rule: Where the splits come from, in words.
        found: What else a person should know, a sentence each: equal images, what splits share, a column not used.
    """

    records: list[Record]
    skipped: list[Skipped]
    split_rule: str
    found: list[str]


@dataclass(frozen=True)
class _Pair:
    """A record to be: one row, or one sample of a tar, as the file has it."""

    key: str
    captions: list[str]
    split: str | None
    group: str | None
    location: str
    origin: str


def find_files(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """List the files that a source names, each once, with their absolute paths.

    Args:
        source: A file, a folder, a glob (``"pairs-*.tar"``), or a list of these. Of a folder its tars; else tables
            named ``metadata`` in it or below, as Hugging Face's imagefolder has them; else itself, if it holds pictures
            with texts beside; else the Parquet files in it or below.

    Raises:
        FileNotFoundError: One of them is not there.
        ValueError: A file is of an unknown kind.
    """
    files: list[Path] = []
    for one in [source] if isinstance(source, (str, Path)) else source:
        path = Path(one)
        matches = [path] if path.exists() else sorted(map(Path, glob.glob(str(one))))
        if not matches:
            raise FileNotFoundError(f"source {one} does not exist")
        for match in matches:
            files += [file.absolute() for file in (_files_of_folder(match) if match.is_dir() else [match])]
    unique: dict[str, Path] = {}
    for path in files:
        unique.setdefault(os.path.realpath(path), path)
        if not path.is_dir() and path.suffix.lower() not in (".tar", *TABLE_SUFFIXES):
            raise ValueError(
                f"source must be .tar, {', '.join(TABLE_SUFFIXES[:-1])} or {TABLE_SUFFIXES[-1]}, "
                f"got {path} (a compressed tar must be unpacked to .tar first)"
            )
    if not files:
        raise ValueError("source must name at least one file, got an empty list")
    return list(unique.values())


def _files_of_folder(folder: Path) -> list[Path]:
    below = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    told = {sample_key(path) for path in below if path.suffix.lower() in TEXT_SUFFIXES}
    for found in (
        [path for path in below if path.suffix.lower() == ".tar" and path.parent == folder],
        [path for path in below if path.stem == "metadata" and path.suffix.lower() in TABLE_SUFFIXES],
        [folder] * any(path.suffix.lower() in IMAGE_SUFFIXES and sample_key(path) in told for path in below),
        [path for path in below if path.suffix.lower() == ".parquet"],
    ):
        if found:
            return found
    raise FileNotFoundError(
        f"source {folder} is a folder without .tar files, metadata.csv, pictures with .txt or .json beside, or "
        ".parquet files: name the table or JSON file in it"
    )


def fingerprint(files: Iterable[Path]) -> str:
    """Digest of files that differs when one was changed, moved or exchanged.

    Files up to 64 MiB are compared by content, larger ones and those of a folder by size and time of change, which is
    quick.
    """
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        digest.update(f"{path}\0{status.st_size}\0".encode())
        if path.is_dir():
            for file in sorted(file for file in path.rglob("*") if file.is_file()):
                status = file.stat()
                digest.update(os.fsencode(file) + f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        elif status.st_size <= 64 << 20:
            digest.update(path.read_bytes())
        else:
            digest.update(str(status.st_mtime_ns).encode())
    return digest.hexdigest()


def read_source(
    source: str | Path | Sequence[str | Path],
    *,
    split: str | None = None,
    image_column: str | None = None,
    caption_column: str | Sequence[str] | None = None,
    image_root: Path | str | None = None,
    group_column: str | None = None,
) -> Source:
    """Read what a source says about its images, without decoding them.

    An image is its file, or its archive and member, however its path is spelled.

    The kind is told by the extension:

    - ``.csv``, ``.tsv``, ``.txt``, ``.jsonl``, ``.ndjson``, ``.parquet``: a column with the image's path (in Parquet
      it may hold the image, as ``{bytes, path}``), one or more with captions (a cell may be a list of them), and
      optionally a column ``split``. Rows of one image are captions of it.
    - ``.tar``, or a folder of pictures with texts beside: WebDataset, as `group_samples` has it; captions come from
      ``.json`` with ``"captions"`` or ``"caption"``, ``"split"``, or from ``.txt``, one a line.
    - ``.json``: ``{"images": [{"filepath", "filename", "split", "sentences": [{"raw"}]}]}``, the Karpathy splits of
      COCO and Flickr; ``{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}``, COCO's
      captions; or rows, as a list or as in JSONL.

    Without declared splits the names of all files, or of the folders of all images, tell them, if they name "train"
    and another; else they go to train, validation or test (80/10/10) by a hash of their names, those that
    `settle` ties together to the same.

    Args:
        source: A file, a folder, a glob, or a list of these, as `find_files` takes them.
        split: Put every image into this split, whatever the source says.
        image_column: Column with the image's path; found by its name if None.
        caption_column: Column or columns with captions; found by their names if None.
        image_root: Folder that relative image paths start from; that of the source file if None.
        group_column: Column, or field of a tar's ``.json``, whose equal values say that images show the same thing;
            if None, only images of equal files are taken to do so.

    Raises:
        FileNotFoundError: The source is not there.
        ValueError: It cannot be understood; the sentence says what is missing.
    """
    files = find_files(source)
    if split is not None:
        split = _split_name(split, "the argument")
    skipped: list[Skipped] = []
    pairs: dict[str, _Pair] = {}
    said: list[str] = []
    named: dict[str, str | None] = {}
    for path in files:
        if path.is_dir():
            found: Iterable[_Pair] = _read_folder(path, skipped, group_column, said)
        elif path.suffix.lower() == ".tar":
            found = _read_tar(path, skipped, group_column, said)
        else:
            root = Path(image_root) if image_root is not None else path.parent
            try:
                rows = read_table(path, skipped)
            except ValueError as error:
                # As with tars, a cut one of several costs itself alone.
                if path.suffix.lower() != ".parquet" or len(files) == 1:
                    raise
                skipped.append(Skipped(str(path), "a damaged file", str(error)))
                continue
            if isinstance(rows, dict):
                found = (_read_coco if "annotations" in rows else _read_karpathy)(path, rows, root, skipped)
            else:
                found = _read_table(path, rows, root, image_column, caption_column, group_column, skipped, said)
        for pair in found:
            if "\0" in pair.location or not is_utf8(pair.location):
                skipped.append(Skipped(mend(pair.location), "a name that is not UTF-8, or holds a zero byte"))
                continue
            known = pairs.setdefault(image_file(pair.location), pair)
            if known is pair:
                named[pair.location] = _split_in_names(path, pair.key)
                continue
            if (known.split, known.group) != (pair.split, pair.group):
                raise ValueError(f"{pair.origin} has another split or group than {known.origin} for the same image")
            known.captions.extend(pair.captions)

    records: list[Record] = []
    undeclared = None
    declared = 0
    splits_named = set(named.values())
    by_name = None not in splits_named and len(splits_named) > 1 and "train" in splits_named
    by_name = by_name and not any(pair.split for pair in pairs.values())
    images_of_key = Counter(pair.key for pair in pairs.values())
    shared_folder = os.path.commonpath([path.parent for path in files])
    for pair in pairs.values():
        mended = [mend(caption) for caption in pair.captions]
        captions = tuple(" ".join(caption.split()) for caption in mended if not is_missing(caption))
        skipped += [Skipped(pair.location, _MENDED) for caption in pair.captions if not is_utf8(caption)]
        if len(captions) < len(pair.captions) or not captions:
            skipped.append(Skipped(pair.location, "an empty caption" if captions else "no caption"))
        if not captions:
            continue
        key = pair.key
        if images_of_key[key] > 1:
            # Not the whole path, so that a default split stays the same where the data are moved.
            key = os.path.relpath(pair.location, shared_folder)
            key = pair.location if key in images_of_key else key
        if split is not None:
            name = split
        elif pair.split:
            name = _split_name(pair.split, pair.origin)
            declared += 1
        elif by_name:
            name = str(named[pair.location])
        else:
            name = ""
            undeclared = undeclared or pair
        records.append(Record(key, captions, name, pair.group or key, pair.location))
    if split is None and undeclared is not None and declared:
        raise ValueError(f"{undeclared.origin} has no split, but other images have: give all of them one, or none")
    if group_column and not any(pair.group for pair in pairs.values()):
        raise ValueError(f"group_column must name a column that has values, got {group_column!r}, which has none")
    if not records:
        raise ValueError(f"source {source} holds no image with a caption{_example(skipped)}")
    if split is not None:
        rule = f"all in {split}, as asked"
    elif declared:
        rule = "as declared by the source"
    elif by_name:
        rule = "as the files or their folders are named"
    else:
        rule = "none declared by the source: 80/10/10 by a hash of names, equal images and captions kept together"
    records, sentences = settle(records)
    return Source(records, skipped, rule, said + sentences)


def _split_in_names(path: Path, key: str) -> str | None:
    """Split that a file is named after, or a folder: ``captions_val2017.json``, ``train/a.png``."""
    names = [path.parent.name] * (path.stem == "metadata") + [path.stem] * (not path.is_dir())
    found = None
    for name in (*names, *PurePosixPath(key).parts[:-1]):
        match = _SPLIT_IN_NAME.fullmatch(name.lower())
        found = SPLIT_NAMES[match[1]] if match else found
    return found


def _split_name(name: str, origin: str) -> str:
    try:
        return SPLIT_NAMES[name.strip().lower()]
    except KeyError:
        given = shorten(name, 30, placeholder="...")
        raise ValueError(f"split must be train, validation or test, got {given!r} ({origin})") from None


def _read_table(
    path: Path,
    rows: list[Row],
    root: Path,
    image_column: str | None,
    caption_column: str | Sequence[str] | None,
    group_column: str | None,
    skipped: list[Skipped],
    said: list[str],
) -> Iterator[_Pair]:
    if not rows:
        raise ValueError(f"{path} must hold rows with named columns, got none{_example(skipped)}")
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    image = _find_column(path, columns, IMAGE_COLUMNS, "image", image_column)
    if caption_column is None:
        numbered = [name for name in columns if re.fullmatch(r"(caption|text|sentence)s?[ _-]?\d+", name.lower())]
        captions = numbered or [_find_column(path, columns, CAPTION_COLUMNS, "caption", None)]
    else:
        names = [caption_column] if isinstance(caption_column, str) else caption_column
        captions = [_find_column(path, columns, (), "caption", name) for name in names]
    split = _find_column(path, columns, SPLIT_COLUMNS, None, None)
    group = _find_column(path, columns, (), "group", group_column) if group_column else ""
    if not group:
        _note_unused_group(said, columns, str(path))
    for origin, row in rows:
        name = row.get(image)
        if is_missing(name) or not isinstance(name, str):
            skipped.append(Skipped(origin, "no path of an image", f"{image} is {type(name).__name__}"))
            continue
        try:
            texts = [caption for column in captions for caption in _strings(row.get(column))]
        except ValueError as error:
            skipped.append(Skipped(origin, "no caption", str(error)))
            continue
        name = name.strip()
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", name):
            skipped.append(Skipped(origin, "a URL: download the images first, img2dataset does", ""))
            continue
        if "\\" in name and not (root / name).exists():
            name = name.replace("\\", "/")  # as Windows writes paths
        yield _Pair(
            key=_key(path, name),
            captions=texts,
            split=_optional(row, split),
            group=_optional(row, group),
            location=str((root / name).absolute()),
            origin=origin,
        )


def _key(path: Path, name: str) -> str:
    if split_location(name)[0].lower().endswith(".parquet"):
        return f"{path.stem}/{name.rpartition('/')[2]}"
    # There is one such table a folder, with names of its own.
    return f"{path.parent.name}/{name}" if path.stem == "metadata" else name


def _find_column(path: Path, columns: list[str], known: tuple[str, ...], wanted: str | None, name: str | None) -> str:
    """Column called ``name`` or, if None, by the first of the ``known`` names; "" if nobody needs it."""
    if name is not None:
        if name not in columns:
            raise ValueError(f"{wanted}_column must be one of {path}'s columns ({_names(columns)}), got {name!r}")
        return name
    by_lower_case = {column.lower(): column for column in reversed(columns)}
    for candidate in known:
        if candidate in by_lower_case:
            return by_lower_case[candidate]
    if wanted is not None:
        raise ValueError(
            f"{path} has no {wanted} column that is known by its name; name it by {wanted}_column, "
            f"one of: {_names(columns)}"
        )
    return ""


def _names(columns: list[str]) -> str:
    """Columns for a sentence; what is no table has a whole line, or file, for a column's name."""
    shown = [shorten(column, 30, placeholder="...") or '""' for column in columns[:20]]
    return ", ".join(shown + ["..."] * (len(columns) > 20))


def _optional(row: dict[str, Any], column: str) -> str | None:
    # pandas names the column of its row numbers "", which here stands for no column.
    value = row.get(column) if column else None
    return None if is_missing(value) else str(value)


def _strings(value: Any) -> list[str]:
    """Caption or captions of one cell or JSON field; what is missing is empty."""
    if is_missing(value):
        return []
    if isinstance(value, str):
        return list_as_text(value)
    if isinstance(value, list) and all(is_missing(one) or isinstance(one, str) for one in value):
        return ["" if is_missing(one) else one for one in value]
    raise ValueError(f"a caption must be a string or a list of strings, got {type(value).__name__}")


def _example(skipped: list[Skipped]) -> str:
    return f" ({skipped[0]})" if skipped else ""


def _read_coco(path: Path, content: dict[str, Any], root: Path, skipped: list[Skipped]) -> Iterator[_Pair]:
    captions: dict[Any, list[str]] = {}
    try:
        images = {image["id"]: image["file_name"] for image in content["images"]}
        for annotation in content["annotations"]:
            if annotation["image_id"] in images:
                captions.setdefault(annotation["image_id"], []).extend(_strings(annotation["caption"]))
            else:
                skipped.append(Skipped(f"{path} annotation {annotation.get('id')}", "a caption of no image"))
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            f'{path} must hold "images" with "id" and "file_name" and "annotations" with "image_id" and "caption", as '
            "COCO's captions_*.json do"
        ) from None
    # COCO keeps the images of captions_val2017.json in the folder val2017, beside that of the annotations.
    folder = path.stem.rpartition("_")[2]
    first = next(iter(images.values()), "")
    root = next((one for one in (root, root / folder, root.parent / folder) if (one / first).is_file()), root)
    for number, name in images.items():
        location = str((root / name).absolute())
        yield _Pair(name, captions.get(number, []), None, None, location, f"{path} image {number}")


def _read_karpathy(path: Path, content: dict[str, Any], root: Path, skipped: list[Skipped]) -> Iterator[_Pair]:
    if not isinstance(content.get("images"), list):
        raise ValueError(
            f'{path} must hold {{"images": [...]}} as the Karpathy splits do, with "annotations" as COCO does, or '
            f"rows, got keys {_names(list(content))}"
        )
    for number, image in enumerate(content["images"]):
        origin = f"{path} image {number}"
        try:
            key = str(PurePosixPath(image.get("filepath", ""), image["filename"]))
            captions = [sentence["raw"] for sentence in image["sentences"]]
            yield _Pair(key, captions, image["split"], None, str((root / key).absolute()), origin)
        except (AttributeError, KeyError, TypeError):
            raise ValueError(f'{origin} must have "filename", "split" and "sentences" with "raw"') from None


def _note_unused_group(said: list[str], columns: Iterable[str], origin: str) -> None:
    """Say, once a source, that what looks like groups is not used."""
    column = next((name for name in columns if name.lower() in GROUP_COLUMNS), None)
    if column and not said:
        said.append(f"the column {column!r} of {origin} is not used: --group-column {column} would take it for groups")


def _read_tar(path: Path, skipped: list[Skipped], group_column: str | None, said: list[str]) -> Iterator[_Pair]:
    try:
        index = tar_index(path)
    except ValueError as error:
        skipped.append(Skipped(str(path), "a damaged file", str(error)))
        return iter(())
    if index.error is not None:
        skipped.append(Skipped(str(path), "a damaged file", f"after {len(index.members)} members: {index.error}"))
    skipped += [Skipped(f"{path}::{name}", reason) for name, reason in index.left_out]
    samples = group_samples(index.members, skipped, f"{path}::")
    return _read_samples(samples, skipped, f"{path}::", partial(read_member, path), f"{path.stem}/", group_column, said)


def _read_folder(path: Path, skipped: list[Skipped], group_column: str | None, said: list[str]) -> Iterator[_Pair]:
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    samples = group_samples(names, skipped, f"{path}/")
    return _read_samples(samples, skipped, f"{path}/", lambda name: (path / name).read_bytes(), "", group_column, said)


def _read_samples(
    samples: Iterable[Sample],
    skipped: list[Skipped],
    prefix: str,
    read: Callable[[str], bytes],
    key_prefix: str,
    group_column: str | None,
    said: list[str],
) -> Iterator[_Pair]:
    for sample in samples:
        origin = f"{prefix}{sample.key}"
        fields, lines = {}, None
        try:
            if ".json" in sample.texts:
                fields = parse_json(read(sample.texts[".json"]), "its .json")
                if not isinstance(fields, dict):
                    raise ValueError(f"its .json must be an object, got {type(fields).__name__}")
            if ".txt" in sample.texts:
                lines = [line for line in read(sample.texts[".txt"]).decode("utf-8-sig").split("\n") if line.strip()]
            captions = _strings(fields.get("captions", fields.get("caption")))
        except UnicodeDecodeError:
            skipped.append(Skipped(origin, "a text that is not UTF-8"))
            continue
        except (OSError, ValueError) as error:
            skipped.append(Skipped(origin, "no caption that can be read", str(error)))
            continue
        if group_column is None:
            _note_unused_group(said, fields, prefix.rstrip(":/"))
        if lines and captions and [line.split() for line in lines] != [caption.split() for caption in captions]:
            skipped.append(Skipped(prefix + sample.texts[".txt"], "other captions than the .json's, which count"))
        yield _Pair(
            key=key_prefix + sample.key,
            captions=captions or lines or [],
            split=_optional(fields, "split"),
            group=_optional(fields, group_column) if group_column else None,
            location=prefix + sample.image,
            origin=origin,
        )
