"""Image-caption pairs as people keep them: tables, WebDataset tars, Karpathy-split JSON."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from modest_align_train.latents import Record, read_member, tar_index
from modest_align_train.pictures import IMAGE_SUFFIXES
from modest_align_train.skips import Skipped
from modest_align_train.tables import TABLE_SUFFIXES, Row, is_missing, list_as_text, parse_json, read_table

IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_path", "file_name", "filename", "image_name", "path", "img")
CAPTION_COLUMNS = (
    *("caption", "captions", "text", "texts", "sentence", "sentences", "description", "title"),
    *("comment", "raw"),  # Flickr30k's two tables
)
SPLIT_COLUMNS = ("split", "subset", "partition")
GROUP_COLUMNS = ("group", "group_id", "concept")

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
class Source:
    """What a source holds; the images themselves are opened later, one by one, by their location.

    Attributes:
        records: One per image, in the order of the source.
        skipped: What had to be left out already.
        split_rule: Where the splits come from, in words.
    """

    records: list[Record]
    skipped: list[Skipped]
    split_rule: str


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
    """List the files that a source names, with their absolute paths.

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
    for path in files:
        if path.suffix.lower() not in (".tar", *TABLE_SUFFIXES):
            raise ValueError(
                f"source must be .tar, {', '.join(TABLE_SUFFIXES[:-1])} or {TABLE_SUFFIXES[-1]}, "
                f"got {path} (a compressed tar must be unpacked to .tar first)"
            )
    if not files:
        raise ValueError("source must name at least one file, got an empty list")
    return files


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


def hash_split(group: str) -> str:
    """Split of a group that has none declared: 80% train, 10% validation, 10% test, always the same."""
    bucket = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


def read_source(
    source: str | Path | Sequence[str | Path],
    *,
    split: str | None = None,
    image_column: str | None = None,
    caption_column: str | Sequence[str] | None = None,
    image_root: Path | str | None = None,
) -> Source:
    """Read what a source says about its images, without opening them.

    The kind is told by the extension:

    - ``.csv``, ``.tsv``, ``.jsonl``, ``.ndjson``, ``.parquet``: a column with the image's path, one or more
      with captions (a cell of JSONL or Parquet may be a list of them), and optionally columns ``split`` and
      ``group``. Rows of the same path are captions of one image.
    - ``.tar``: WebDataset; files of the same name up to the first dot are one sample: the image, and
      ``.json`` with ``"captions"`` or ``"caption"``, ``"split"``, ``"group"``, or ``.txt`` with a caption
      a line.
    - ``.json``: ``{"images": [{"filepath", "filename", "split", "sentences": [{"raw"}]}]}``, the
      Karpathy splits of COCO and Flickr; or a list of rows as in JSONL.

    Without declared splits each group goes to train, validation or test (80/10/10) by a hash of its name.

    Args:
        source: A file, a folder of tars, a glob, or a list of these.
        split: Put every image into this split, whatever the source says.
        image_column: Column with the image's path; found by its name if None.
        caption_column: Column or columns with captions; found by their names if None.
        image_root: Folder that relative image paths start from; that of the source file if None.

    Raises:
        FileNotFoundError: The source is not there.
        ValueError: It cannot be understood; the sentence says what is missing.
    """
    files = find_files(source)
    if split is not None:
        split = _split_name(split, "the argument")
    skipped: list[Skipped] = []
    pairs: dict[str, _Pair] = {}
    for path in files:
        if path.suffix == ".tar":
            found: Iterable[_Pair] = _read_tar(path, skipped)
        else:
            root = Path(image_root) if image_root is not None else path.parent
            rows = read_table(path, skipped)
            if isinstance(rows, dict):
                found = _read_karpathy(path, rows, root)
            else:
                found = _read_table(path, rows, root, image_column, caption_column, skipped)
        for pair in found:
            known = pairs.setdefault(pair.key, pair)
            if known is pair:
                continue
            if known.location != pair.location or path.suffix == ".tar":
                raise ValueError(f"{pair.origin} and {known.origin} are two images of the same key {pair.key!r}")
            if (known.split, known.group) != (pair.split, pair.group):
                raise ValueError(f"{pair.origin} has another split or group than {known.origin} for the same image")
            known.captions.extend(pair.captions)

    records: list[Record] = []
    undeclared = None
    declared = 0
    for pair in pairs.values():
        captions = tuple(filter(None, (" ".join(caption.split()) for caption in pair.captions)))
        if len(captions) < len(pair.captions) or not captions:
            skipped.append(Skipped(pair.location, "an empty caption" if captions else "no caption"))
        if not captions:
            continue
        group = pair.group or pair.key
        if split is not None:
            name = split
        elif pair.split:
            name = _split_name(pair.split, pair.origin)
            declared += 1
        else:
            name = hash_split(group)
            undeclared = undeclared or pair
        records.append(Record(pair.key, captions, name, group, pair.location))
    if split is None and undeclared is not None and declared:
        raise ValueError(f"{undeclared.origin} has no split, but other images have: give all of them one, or none")
    if not records:
        raise ValueError(f"source {source} holds no image with a caption{_example(skipped)}")
    if split is not None:
        rule = f"all in {split}, as asked"
    elif declared:
        rule = "as declared by the source"
    else:
        rule = "none declared by the source: 80/10/10 by a hash of each image's group"
    return Source(records, skipped, rule)


def _split_name(name: str, origin: str) -> str:
    try:
        return _SPLIT_NAMES[name.strip().lower()]
    except KeyError:
        raise ValueError(f"split must be train, validation or test, got {name!r} ({origin})") from None


def _read_table(
    path: Path,
    rows: list[Row],
    root: Path,
    image_column: str | None,
    caption_column: str | Sequence[str] | None,
    skipped: list[Skipped],
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
    group = _find_column(path, columns, GROUP_COLUMNS, None, None)
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
        yield _Pair(
            key=Path(name).name if ".parquet::" in name else name,
            captions=texts,
            split=_optional(row, split),
            group=_optional(row, group),
            location=str((root / name).absolute()),
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


def _read_tar(path: Path, skipped: list[Skipped]) -> Iterator[_Pair]:
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
            fields = parse_json(read_member(path, members[".json"]), "its .json") if ".json" in members else {}
            if not isinstance(fields, dict):
                raise ValueError(f"its .json must be an object, got {type(fields).__name__}")
            captions = fields.get("captions", fields.get("caption"))
            if captions is None and ".txt" in members:
                captions = read_member(path, members[".txt"]).decode().splitlines()
            yield _Pair(
                key=f"{path.stem}/{sample}",
                captions=[] if captions is None else _strings(captions),
                split=_optional(fields, "split"),
                group=_optional(fields, "group"),
                location=f"{path}::{image}",
                origin=origin,
            )
        except ValueError as error:
            skipped.append(Skipped(origin, str(error).removeprefix(f"{origin}: ")))
