"""Latents on disk: what the frozen encoders gave for each image and caption, and where it came from."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor
from tqdm import tqdm

from modest_align_train.answers import caption_key
from modest_align_train.files import read_json, write_file, write_json
from modest_align_train.pictures import decode_picture
from modest_align_train.rows import Rows
from modest_align_train.tables import read_embedded

# Version 1 told images apart by the text of their paths, and took a column named group without being asked.
FORMAT_VERSION = 2
_READABLE_VERSIONS = (1, 2)
_IN_ARCHIVE = re.compile(r"(.+?\.(?:tar|parquet))::(.+)", re.IGNORECASE | re.DOTALL)
# A damaged size or offset may lead anywhere.
_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, OSError, RecursionError)
MANIFEST = "manifest.json"
PARTIAL_MANIFEST = "manifest.partial.json"
SPLITS = ("train", "validation", "test")
# Latents of more bytes than that, in float32, stay on disk.
IN_MEMORY = 2**30
DTYPES = {"float32": torch.float32, "float16": torch.float16}
_SHARD_NAME = re.compile(r"shard-[0-9]{5,}")


@dataclass(frozen=True, slots=True)
class Record:
    """One image and what a person needs to know of it.

    Attributes:
        key: Unique name of the image.
        captions: Its captions, in the order of their rows in ``Latents.text``.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        group: Images of equal group show the same thing, those of equal files too; one that is alone has its key here.
        location: Where the image's bytes are, ``"path/to.png"`` or ``"path/to.tar::member.webp"``.
    """

    key: str
    captions: tuple[str, ...]
    split: str
    group: str
    location: str


_RECORD = TypeAdapter(Record)
_Count = Annotated[int, Field(ge=0, strict=True)]


@dataclass(frozen=True)
class _Shard:
    name: str
    images: _Count
    captions: _Count
    sha256: dict[str, str]


@dataclass(frozen=True)
class _Manifest:
    """What a manifest must have; it may have more."""

    image_encoder: str
    text_encoder: str
    image_dim: _Count
    text_dim: _Count
    images: _Count
    captions: _Count
    shards: list[_Shard]


_MANIFEST = TypeAdapter(_Manifest)


@dataclass(frozen=True)
class Latents:
    """Latents of images and of their captions.

    Attributes:
        image: Image latents as the encoder gave them (not normalised), float32 [images, Di]. `Rows`, which stay on disk
            until they are asked for, where all latents are more than `IN_MEMORY`.
        text: Caption latents, float32 [captions, Dt], likewise.
        caption_image: Row of ``image`` that each caption describes, non-decreasing, int64 [captions].
        caption_text: A number from 0 of what each caption says, equal where captions are, int64 [captions].
        group: The records' groups as consecutive integers from 0, int64 [images].
        records: What each row of ``image`` is, [images].
        image_encoder: Name of the encoder of ``image``.
        text_encoder: Name of the encoder of ``text``.
        fingerprint: `latents_fingerprint` of all that was extracted with them, of a subset too.
    """

    image: Tensor | Rows
    text: Tensor | Rows
    caption_image: Tensor
    caption_text: Tensor
    group: Tensor
    records: list[Record]
    image_encoder: str
    text_encoder: str
    fingerprint: str

    @property
    def captions(self) -> list[str]:
        """Every caption, in the order of the rows of ``text``."""
        return [caption for record in self.records for caption in record.captions]

    def subset(self, split: str) -> Latents:
        """Return the images of one split and their captions, numbered anew; what is on disk is not copied.

        Args:
            split: ``"train"``, ``"validation"`` or ``"test"``.

        Raises:
            ValueError: No image is of that split.
        """
        rows = [row for row, record in enumerate(self.records) if record.split == split]
        if not rows:
            counts = ", ".join(f"{name} {count}" for name, count in split_counts(self.records).items())
            raise ValueError(f"split must be one that has images ({counts}), got {split!r}")
        device = self.group.device
        image_rows = torch.tensor(rows, device=device)
        new_row = torch.full((len(self.records),), -1, dtype=torch.int64, device=device)
        new_row[image_rows] = torch.arange(len(rows), device=device)
        caption_image = new_row[self.caption_image]
        caption_rows = (caption_image >= 0).nonzero().flatten()
        return replace(
            self,
            image=self.image[image_rows],
            text=self.text[caption_rows],
            caption_image=caption_image[caption_rows],
            caption_text=self.caption_text[caption_rows].unique(return_inverse=True)[1],
            group=self.group[image_rows].unique(return_inverse=True)[1],
            records=[self.records[row] for row in rows],
        )

    def to(self, device: torch.device | str) -> Latents:
        """Return the same latents with every tensor on ``device``; what is on disk stays there."""
        return replace(
            self,
            image=self.image if isinstance(self.image, Rows) else self.image.to(device),
            text=self.text if isinstance(self.text, Rows) else self.text.to(device),
            caption_image=self.caption_image.to(device),
            caption_text=self.caption_text.to(device),
            group=self.group.to(device),
        )


def pairs_digest(latents: Latents) -> str:
    """Digest of the images' names, groups and captions: equal where two evaluations ask the same."""
    asked = [[record.key, record.group, record.captions] for record in latents.records]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def split_counts(records: Sequence[Record]) -> dict[str, int]:
    """Count the images of each split."""
    return {split: sum(record.split == split for record in records) for split in SPLITS}


def write_shard(
    directory: Path, index: int, image: Tensor, text: Tensor, caption_image: Tensor, records: Sequence[Record]
) -> dict[str, Any]:
    """Write one shard and return its manifest entry.

    Args:
        directory: Where to write ``shard-<index>.safetensors`` and ``.jsonl``; it must exist.
        index: Number of the shard.
        image: Image latents, float32 or float16 [images, Di].
        text: Caption latents, of the same type [captions, Dt].
        caption_image: Row of ``image`` in this shard that each caption describes, int64 [captions].
        records: One per image, [images].
    """
    name = f"shard-{index:05d}"
    contents = {
        f"{name}.safetensors": save_safetensors(
            {"image": image.contiguous(), "text": text.contiguous(), "caption_image": caption_image}
        ),
        f"{name}.jsonl": "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records).encode(),
    }
    for file_name, content in contents.items():
        write_file(directory / file_name, content)
    return {
        "name": name,
        "images": len(records),
        "captions": len(text),
        "sha256": {file_name: hashlib.sha256(content).hexdigest() for file_name, content in contents.items()},
    }


def write_manifest(directory: Path, shards: Sequence[dict[str, Any]], **facts: Any) -> dict[str, Any]:
    """Write and return the manifest by which `load_latents` finds and checks the shards.

    Args:
        directory: Where the shards are.
        shards: What `write_shard` returned for each, in order; further keys are left out.
        facts: `image_encoder`, `text_encoder`, `image_dim` (Di), `text_dim` (Dt), and what else to keep.
    """
    manifest = {
        **facts,
        "format_version": FORMAT_VERSION,
        "images": sum(shard["images"] for shard in shards),
        "captions": sum(shard["captions"] for shard in shards),
        "shards": [{key: shard[key] for key in ("name", "images", "captions", "sha256")} for shard in shards],
    }
    write_json(directory / MANIFEST, manifest)
    return manifest


def read_shard(directory: Path, entry: dict[str, Any]) -> tuple[dict[str, Tensor], list[Record], dict[str, int]]:
    """Read one shard, checked against its manifest entry.

    Returns:
        Its tensors, its records, and where in the file each tensor begins, in bytes.

    Raises:
        FileNotFoundError: One of its files is missing.
        ValueError: One of its files is not the one that was written, is no part of a shard, or is not of this folder.
    """
    name = entry["name"]
    if not _SHARD_NAME.fullmatch(name) or entry["sha256"].keys() != {f"{name}.safetensors", f"{name}.jsonl"}:
        names = ", ".join(map(repr, entry["sha256"]))
        raise ValueError(
            f"the manifest in {directory} must name files of that folder like shard-00000.safetensors and .jsonl, "
            f"got {names}"
        )
    content = {}
    for file_name, expected in entry["sha256"].items():
        path = directory / file_name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: delete {directory} and extract again")
        content[path.suffix] = path.read_bytes()
        if hashlib.sha256(content[path.suffix]).hexdigest() != expected:
            raise ValueError(f"{path} is damaged (its checksum differs): delete {directory} and extract again")
    tensors = content[".safetensors"]
    try:
        # Not splitlines(), which also breaks at separators that a caption may hold.
        records = [_RECORD.validate_json(line) for line in content[".jsonl"].split(b"\n")[:-1]]
        found = load_safetensors(tensors)
        counts = torch.tensor([len(record.captions) for record in records], dtype=torch.int64)
        caption_image = torch.arange(len(records)).repeat_interleave(counts)
        rows = [len(records), len(caption_image)]
        whole = (
            [len(found["image"]), len(found["text"])] == [entry["images"], entry["captions"]] == rows
            and found["image"].ndim == found["text"].ndim == 2
            and found["image"].dtype == found["text"].dtype in DTYPES.values()
            and torch.equal(found["caption_image"], caption_image)
        )
    except (SafetensorError, ValueError, LookupError, TypeError):  # TypeError: the length of a 0-dim tensor
        whole = False
    if not whole:
        raise ValueError(f"{directory / entry['name']}.safetensors and .jsonl are no shard: extract again")
    # The format: the size of a header, the header with places behind it, the tensors.
    header_end = 8 + int.from_bytes(tensors[:8], "little")
    header = json.loads(tensors[8:header_end])
    start = {name: header_end + about["data_offsets"][0] for name, about in header.items() if name != "__metadata__"}
    return found, records, start


def load_latents(directory: Path | str) -> Latents:
    """Load what ``extract`` wrote, all its images and captions; all of it is read once and checked.

    Args:
        directory: The folder with ``manifest.json``. Of latents that stay on disk its shards must stay there.

    Returns:
        Tensors on the CPU, or `Rows` of the shards where that would be more than `IN_MEMORY`.

    Raises:
        FileNotFoundError: The folder holds no finished latents.
        ValueError: A file in it is damaged or of another format version.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory)
    _check_sizes(directory, manifest)
    sides = {"image": ("images", manifest["image_dim"]), "text": ("captions", manifest["text_dim"])}
    on_disk = sum(4 * manifest[rows] * features for rows, features in sides.values()) > IN_MEMORY
    parts: dict[str, list[Tensor]] = {name: [] for name in ("caption_image", *sides)}
    starts: dict[str, list[int]] = {name: [] for name in sides}
    records: list[Record] = []
    for entry in tqdm(manifest["shards"], "reading latents", leave=False, delay=2):
        tensors, shard_records, start = read_shard(directory, entry)
        if [tensors[name].shape[1] for name in ("image", "text")] != [manifest["image_dim"], manifest["text_dim"]]:
            raise _other_numbers(directory)
        parts["caption_image"].append(tensors["caption_image"] + len(records))
        for name in sides:
            starts[name].append(start[name])
            if not on_disk:
                parts[name].append(tensors[name])
        records += shard_records

    def matrix(name: str) -> Tensor | Rows:
        if not on_disk:
            return torch.cat(parts[name]).float()
        rows, features = sides[name]
        return Rows(
            files=[directory / f"{entry['name']}.safetensors" for entry in manifest["shards"]],
            first=torch.tensor([0, *(entry[rows] for entry in manifest["shards"])]).cumsum(0),
            start=starts[name],
            features=features,
            dtype=tensors[name].dtype,
            numbers=torch.arange(manifest[rows]),
        )

    return Latents(
        image=matrix("image"),
        text=matrix("text"),
        caption_image=torch.cat(parts["caption_image"]),
        caption_text=_numbers(caption_key(caption) for record in records for caption in record.captions),
        group=_numbers(record.group for record in records),
        records=records,
        image_encoder=manifest["image_encoder"],
        text_encoder=manifest["text_encoder"],
        fingerprint=_fingerprint(manifest),
    )


def latents_fingerprint(directory: Path | str) -> str:
    """Digest of latents, their captions, groups and splits, from their manifest alone.

    Args:
        directory: The folder with ``manifest.json``.

    Raises:
        FileNotFoundError: The folder holds no finished latents.
        ValueError: They are of another format version.
    """
    return _fingerprint(_read_manifest(Path(directory)))


def _fingerprint(manifest: dict[str, Any]) -> str:
    parts = [manifest["image_encoder"], manifest["text_encoder"], *(entry["sha256"] for entry in manifest["shards"])]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.is_file():
        state = "an unfinished extraction" if (directory / PARTIAL_MANIFEST).is_file() else "no latents"
        raise FileNotFoundError(f"{directory} holds {state} ({MANIFEST} is missing): run extract into it first")
    manifest = read_json(path)
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version not in _READABLE_VERSIONS:
        raise ValueError(f"{path} has format version {version}, wanted {FORMAT_VERSION}")
    try:
        _MANIFEST.validate_python(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path} is damaged ({place}: {first['msg']}): delete {directory} and extract again") from None
    return manifest


def _check_sizes(directory: Path, manifest: dict[str, Any]) -> None:
    """See that a manifest's numbers are those of its shards, before there is memory for so many."""
    sides = {"images": "image_dim", "captions": "text_dim"}
    shards = manifest["shards"]
    whole = all(manifest[rows] == sum(shard[rows] for shard in shards) for rows in sides)
    for shard in shards:
        file = directory / f"{shard['name']}.safetensors"
        # Of two bytes at least is a number.
        size = 2 * sum(shard[rows] * manifest[features] for rows, features in sides.items())
        whole = whole and (not file.is_file() or size <= file.stat().st_size)
    if not whole:
        raise _other_numbers(directory)


def _other_numbers(directory: Path) -> ValueError:
    return ValueError(f"{directory / MANIFEST} has other numbers than its shards: delete {directory} and extract again")


def _numbers(names: Iterable[str]) -> Tensor:
    """Consecutive integers from 0, equal where names are, in the order of their first."""
    number: dict[str, int] = {}
    return torch.tensor([number.setdefault(name, len(number)) for name in names], dtype=torch.int64)


@dataclass(frozen=True)
class TarIndex:
    """Where the members of a tar are.

    Attributes:
        members: Offset and size in bytes of each regular file, by name, in the order of the archive.
        left_out: Name of each other member but folders, and why it is none of these.
        error: Why the archive could not be read to its end, None where it could.
    """

    members: dict[str, tuple[int, int]]
    left_out: list[tuple[str, str]]
    error: str | None


def tar_index(path: Path | str) -> TarIndex:
    """List an uncompressed tar; of a truncated one, what is whole.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not an uncompressed tar.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    return _tar_index(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _tar_index(path: Path, modified_ns: int) -> TarIndex:
    members: dict[str, tuple[int, int]] = {}
    left_out: list[tuple[str, str]] = []
    error = None
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
        except _TAR_ERRORS as reason:
            raise ValueError(f"{path} is not an uncompressed tar ({reason})") from None
        try:
            for member in tar:
                if member.size < 0:
                    # The next one would be this one again, without end.
                    raise ValueError(f"{member.name!r} has a size below 0")
                if not member.isfile():
                    left_out += [] if member.isdir() else [(member.name, "a link or device, no file")]
                elif member.offset_data + member.size > size:
                    left_out.append((member.name, "a member that is cut"))
                else:
                    if member.name in members:
                        left_out.append((member.name, "the first of two files of that name"))
                    members[member.name] = (member.offset_data, member.size)
        except _TAR_ERRORS as reason:
            error = str(reason)
    return TarIndex(members, left_out, error)


def read_member(path: Path | str, member: str) -> bytes:
    """Read one file of a tar by its name.

    Raises:
        FileNotFoundError: There is no such tar, or no such member in it.
    """
    index = tar_index(path)
    if member not in index.members:
        raise FileNotFoundError(f"{path} has no member {member!r}")
    offset, size = index.members[member]
    with Path(path).open("rb") as file:
        file.seek(offset)
        return file.read(size)


def split_location(location: str) -> tuple[str, str]:
    """Split a record's location into the path of a file, and the member of the archive that it is, or ""."""
    match = _IN_ARCHIVE.fullmatch(location)
    return (match[1], match[2]) if match else (location, "")


def image_size(location: str) -> int:
    """Size in bytes of the image file at a record's location; raises as `image_bytes` does."""
    path, member = split_location(location)
    if not member:
        return Path(path).stat().st_size
    if path.lower().endswith(".parquet"):
        return len(read_embedded(path, member))
    members = tar_index(path).members
    if member not in members:
        raise FileNotFoundError(f"{path} has no member {member!r}")
    return members[member][1]


def image_bytes(location: str) -> bytes:
    """Read the image file at a record's location.

    Raises:
        FileNotFoundError: Nothing is there.
    """
    path, member = split_location(location)
    if member:
        return (read_embedded if path.lower().endswith(".parquet") else read_member)(path, member)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{location} does not exist")
    return Path(path).read_bytes()


def open_image(location: str) -> Image.Image:
    """Open the image at a record's ``location``.

    Args:
        location: ``"path/to.png"``, ``"path/to.tar::member.webp"`` or ``"path/to.parquet::column/row"``.

    Returns:
        The whole image as `decode_picture` gives it.

    Raises:
        FileNotFoundError: Nothing is there.
        UnreadableError: It is no image, a damaged one, or one of too many pixels.
        OSError: The file cannot be read.
    """
    return decode_picture(image_bytes(location))
