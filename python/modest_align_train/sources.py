"""Image-caption pairs as people keep them: tables, WebDataset tars, Karpathy-split JSON."""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from modest_align_train.identity import image_file, settle
from modest_align_train.latents import Record, read_member, tar_index

IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_path", "file_name", "filename", "path", "img")
CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "sentence", "sentences", "description", "title")
SPLIT_COLUMNS = ("split", "subset", "partition")
GROUP_COLUMNS = ("group", "group_id", "concept")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")

_SPLIT_NAMES = {
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


@dataclass(frozen=True)
class Skipped:
    """Something of the source that was left out.

    Attributes:
        location: Which image, caption or file.
        reason: Why, in a few words.
    """

    location: str
    reason: str

    def __str__(self) -> str:
        return f"{self.location}: {self.reason}"


@dataclass(frozen=True)
class Source:
    """What a source holds; the images themselves are opened later, one by one, by their location.

    Attributes:
        records: One per image, in the order of the source.
        skipped: What had to be left out already.
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
        source: A file, a folder of tars, a glob (``"pairs-*.tar"``), or a list of these.

    Raises:
        FileNotFoundError: One of them is not there.
        ValueError: A file is of an unknown kind.
    """
    files: list[Path] = []
    for one in [source] if isinstance(source, (str, Path)) else source:
        path = Path(one)
        if path.is_dir():
            found = sorted(path.glob("*.tar"))
            if not found:
                raise FileNotFoundError(
                    f"source {path} is a folder without .tar files: name the table or JSON file in it"
                )
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(match) for match in glob.glob(str(one)))
            if not found:
                raise FileNotFoundError(f"source {one} does not exist")
        files += [file.absolute() for file in found]
    unique: dict[str, Path] = {}
    for path in files:
        unique.setdefault(os.path.realpath(path), path)
        if path.suffix not in (".tar", ".json", *TABLE_SUFFIXES):
            raise ValueError(
                f"source must be .tar, .json, {', '.join(TABLE_SUFFIXES[:-1])} or {TABLE_SUFFIXES[-1]}, "
                f"got {path} (a compressed tar must be unpacked to .tar first)"
            )
    if not files:
        raise ValueError("source must name at least one file, got an empty list")
    return list(unique.values())


def fingerprint(files: Iterable[Path]) -> str:
    """Digest of files that differs when one was changed, moved or exchanged.

    Files up to 64 MiB are compared by content, larger ones by size and time of change, which is quick.
    """
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        digest.update(f"{path}\0{status.st_size}\0".encode())
        if status.st_size <= 64 << 20:
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

    - ``.csv``, ``.tsv``, ``.jsonl``, ``.ndjson``, ``.parquet``: a column with the image's path, one or more
      with captions (a cell of JSONL or Parquet may be a list of them), and optionally a column ``split``.
      Rows of one image are captions of it.
    - ``.tar``: WebDataset; files of the same name up to the first dot are one sample: the image, and
      ``.json`` with ``"captions"`` or ``"caption"``, ``"split"``, or ``.txt`` with a caption a line.
    - ``.json``: ``{"images": [{"filepath", "filename", "split", "sentences": [{"raw"}]}]}``, the
      Karpathy splits of COCO and Flickr; or a list of rows as in JSONL.

    Without declared splits images go to train, validation or test (80/10/10) by a hash of their names, those that
    `settle` ties together to the same.

    Args:
        source: A file, a folder of tars, a glob, or a list of these.
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
    for path in files:
        if path.suffix == ".tar":
            found: Iterable[_Pair] = _read_tar(path, skipped, group_column, said)
        else:
            root = Path(image_root) if image_root is not None else path.parent
            try:
                rows = _read_rows(path)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} must be UTF-8, got byte {error.object[error.start]:#x}") from None
            if isinstance(rows, dict):
                found = _read_karpathy(path, rows, root)
            else:
                found = _read_table(path, rows, root, image_column, caption_column, group_column, said)
        for pair in found:
            known = pairs.setdefault(image_file(pair.location), pair)
            if known is pair:
                continue
            if (known.split, known.group) != (pair.split, pair.group):
                raise ValueError(f"{pair.origin} has another split or group than {known.origin} for the same image")
            known.captions.extend(pair.captions)

    records: list[Record] = []
    undeclared = None
    declared = 0
    images_of_key = Counter(pair.key for pair in pairs.values())
    shared_folder = os.path.commonpath([path.parent for path in files])
    for pair in pairs.values():
        captions = tuple(filter(None, (" ".join(caption.split()) for caption in pair.captions)))
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
        else:
            name = ""
            undeclared = undeclared or pair
        records.append(Record(key, captions, name, pair.group or key, pair.location))
    if split is None and undeclared is not None and declared:
        raise ValueError(f"{undeclared.origin} has no split, but other images have: give all of them one, or none")
    if group_column and not any(pair.group for pair in pairs.values()):
        raise ValueError(f"group_column must name a column that has values, got {group_column!r}, which has none")
    if not records:
        example = f" ({skipped[0]})" if skipped else ""
        raise ValueError(f"source {source} holds no image with a caption{example}")
    if split is not None:
        rule = f"all in {split}, as asked"
    elif declared:
        rule = "as declared by the source"
    else:
        rule = "none declared by the source: 80/10/10 by a hash of names, equal images and captions kept together"
    records, sentences = settle(records)
    return Source(records, skipped, rule, said + sentences)


def _split_name(name: str, origin: str) -> str:
    try:
        return _SPLIT_NAMES[name.strip().lower()]
    except KeyError:
        raise ValueError(f"split must be train, validation or test, got {name!r} ({origin})") from None


def _read_rows(path: Path) -> list[dict[str, Any]] | dict[str, Any]:
    """Read a table as a list of rows; of a JSON file, whatever is at its top."""
    suffix = path.suffix
    if suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise ImportError(f"{path} needs pyarrow: pip install 'modest-align-kernels[parquet]'") from None
        return pyarrow.parquet.read_table(path).to_pylist()
    if suffix in (".csv", ".tsv"):
        csv.field_size_limit(sys.maxsize)
        # A byte order mark, as spreadsheets write it, would become part of the first column's name.
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ","))
    if suffix == ".json":
        content = _parse_json(path.read_bytes(), str(path))
        if not isinstance(content, (dict, list)):
            raise ValueError(f'{path} must be a list of rows or {{"images": [...]}}, got {type(content).__name__}')
        return content
    with path.open(encoding="utf-8") as file:
        return [_parse_json(line, f"{path} line {number}") for number, line in enumerate(file, 1) if line.strip()]


def _parse_json(text: str | bytes, origin: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{origin} is not JSON ({error})") from None


def _read_table(
    path: Path,
    rows: list[dict[str, Any]],
    root: Path,
    image_column: str | None,
    caption_column: str | Sequence[str] | None,
    group_column: str | None,
    said: list[str],
) -> Iterator[_Pair]:
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold rows with named columns, got {'none' if not rows else 'other values'}")
    columns = list(dict.fromkeys(column for row in rows for column in row if column is not None))
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
    for number, row in enumerate(rows, 1):
        origin = f"{path} row {number}"
        if not isinstance(row.get(image), str) or not row[image]:
            raise ValueError(f"{origin}: column {image!r} must be the path of an image, got {row.get(image)!r}")
        yield _Pair(
            key=row[image],
            captions=[caption for column in captions for caption in _strings(row.get(column), origin)],
            split=_optional(row, split),
            group=_optional(row, group),
            location=str((root / row[image]).absolute()),
            origin=origin,
        )


def _find_column(path: Path, columns: list[str], known: tuple[str, ...], wanted: str | None, name: str | None) -> str:
    """Column called ``name`` or, if None, by the first of the ``known`` names; "" if nobody needs it."""
    if name is not None:
        if name not in columns:
            raise ValueError(f"{wanted}_column must be one of {path}'s columns ({', '.join(columns)}), got {name!r}")
        return name
    by_lower_case = {column.lower(): column for column in reversed(columns)}
    for candidate in known:
        if candidate in by_lower_case:
            return by_lower_case[candidate]
    if wanted is not None:
        raise ValueError(
            f"{path} has no {wanted} column that is known by its name; name it by {wanted}_column, "
            f"one of: {', '.join(columns)}"
        )
    return ""


def _optional(row: dict[str, Any], column: str) -> str | None:
    value = row.get(column)
    return None if value is None or str(value) == "" else str(value)


def _strings(value: Any, origin: str) -> list[str]:
    """Caption or captions of one cell or JSON field."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return value
    raise ValueError(f"{origin}: a caption must be a string or a list of strings, got {value!r}")


def _read_karpathy(path: Path, content: dict[str, Any], root: Path) -> Iterator[_Pair]:
    if not isinstance(content.get("images"), list):
        raise ValueError(f'{path} must hold {{"images": [...]}} as the Karpathy splits do, got keys {list(content)}')
    for number, image in enumerate(content["images"]):
        origin = f"{path} image {number}"
        try:
            key = str(PurePosixPath(image.get("filepath", ""), image["filename"]))
            captions = [sentence["raw"] for sentence in image["sentences"]]
            yield _Pair(key, captions, image["split"], None, str((root / key).absolute()), origin)
        except (AttributeError, KeyError, TypeError):
            raise ValueError(
                f'{origin} must have "filename", "split" and "sentences" with "raw", got {str(image)[:100]}'
            ) from None


def _note_unused_group(said: list[str], columns: Iterable[str], origin: str) -> None:
    """Say, once a source, that what looks like groups is not used."""
    column = next((name for name in columns if name.lower() in GROUP_COLUMNS), None)
    if column and not said:
        said.append(f"the column {column!r} of {origin} is not used: --group-column {column} would take it for groups")


def _read_tar(path: Path, skipped: list[Skipped], group_column: str | None, said: list[str]) -> Iterator[_Pair]:
    index = tar_index(path)
    if index.error is not None:
        skipped.append(Skipped(str(path), f"damaged after {len(index.members)} files ({index.error})"))
    samples: dict[str, dict[str, str]] = {}
    for member in index.members:
        name = PurePosixPath(member)
        if not name.name.startswith("."):
            stem, _, extension = name.name.partition(".")
            samples.setdefault(str(name.with_name(stem)), {})[f".{extension.lower()}"] = member
    for sample, members in samples.items():
        origin = f"{path}::{sample}"
        image = next((m for extension, m in members.items() if extension.endswith(IMAGE_SUFFIXES)), None)
        if image is None:
            skipped.append(Skipped(origin, "no image"))
            continue
        try:
            fields = _parse_json(read_member(path, members[".json"]), "its .json") if ".json" in members else {}
            if not isinstance(fields, dict):
                raise ValueError(f"its .json must be an object, got {type(fields).__name__}")
            if group_column is None:
                _note_unused_group(said, fields, str(path))
            captions = fields.get("captions", fields.get("caption"))
            if captions is None and ".txt" in members:
                captions = read_member(path, members[".txt"]).decode().splitlines()
            yield _Pair(
                key=f"{path.stem}/{sample}",
                captions=[] if captions is None else _strings(captions, origin),
                split=_optional(fields, "split"),
                group=_optional(fields, group_column) if group_column else None,
                location=f"{path}::{image}",
                origin=origin,
            )
        except ValueError as error:
            skipped.append(Skipped(origin, str(error).removeprefix(f"{origin}: ")))
