"""Pictures with captions in files beside them, in a tar (WebDataset) or a folder (img2dataset)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePath, PurePosixPath

from modest_align_train.pictures import IMAGE_SUFFIXES
from modest_align_train.skips import Skipped

TEXT_SUFFIXES = (".json", ".txt")


@dataclass(frozen=True)
class Sample:
    """One picture and the files that tell of it.

    Attributes:
        key: Its name: that of the files up to the first dot, as WebDataset has it, with what else tells it from others.
        image: Name of the picture.
        texts: Names of its ``.json`` and ``.txt``, by suffix.
    """

    key: str
    image: str
    texts: dict[str, str]


def sample_key(path: PurePath) -> str:
    """Name of the sample that a file belongs to: its path up to the first dot of its name."""
    return str(path.with_name(path.name.partition(".")[0]))


def group_samples(names: Iterable[str], skipped: list[Skipped], prefix: str) -> Iterator[Sample]:
    """Put files that belong together into samples, and report every other.

    Files are of one sample if their names are equal up to the first dot. In it a picture belongs to the texts that
    have the rest of its name too (``a.v1.jpg``, ``a.v1.txt``), or to the plain ones (``a.txt``) if it is plain
    (``a.jpg``, whatever ``a.depth.png`` lies beside) or the only one.

    Args:
        names: Names of files, with ``/`` between folders.
        skipped: Gets those that are left out.
        prefix: What makes a name a location.
    """

    def skip(name: str, reason: str) -> None:
        skipped.append(Skipped(prefix + name, reason))

    pictures: dict[str, dict[str, str]] = {}
    texts: dict[str, dict[str, dict[str, str]]] = {}
    for name in names:
        path = PurePosixPath(name)
        if path.name.startswith("."):
            skip(name, "a hidden file")
            continue
        key, suffix = sample_key(path), path.suffix.lower()
        middle = path.name.partition(".")[2].rpartition(".")[0]
        by_middle = pictures.setdefault(key, {})
        if suffix in TEXT_SUFFIXES:
            texts.setdefault(key, {}).setdefault(middle, {})[suffix] = name
        elif suffix not in IMAGE_SUFFIXES:
            skip(name, "neither a picture nor its caption")
        elif middle in by_middle:
            skip(name, "another picture of the sample")
        else:
            by_middle[middle] = name
    for key, by_middle in pictures.items():
        beside = texts.get(key, {})
        if not by_middle:
            if beside:
                skip(key, "no image")
            continue
        plain = next(iter(by_middle)) if len(by_middle) == 1 else ""
        for middle, image in by_middle.items():
            own = beside.pop(middle, None)
            if own is None and middle == plain:
                own = beside.pop("", {})
            if own is not None:
                yield Sample(key if middle == plain else f"{key}.{middle}", image, own)
            else:
                skip(image, "another picture of the sample" if "" in by_middle else "one of several, none is plain")
        for left in beside.values():
            for name in left.values():
                skip(name, "a text without a picture of its name")
