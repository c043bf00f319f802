"""What makes two images one, and which images a split must keep on one side."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace

from modest_align_train.answers import caption_key
from modest_align_train.latents import SPLITS, Record, image_bytes, image_size, split_location

# A caption that would tie more of the images together than this names no thing ("a photo").
_LARGEST_PART = 0.1


def image_file(location: str) -> str:
    """Name the file (or the archive and its member) at a record's location, the same however its path is spelled."""
    path, member = split_location(location)
    return os.path.realpath(path) + (f"::{member}" if member else "")


def hash_split(group: str) -> str:
    """Split of a group that has none declared: 80% train, 10% validation, 10% test, always the same."""
    bucket = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


def settle(records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """Put equal images into one group, and give a split to the images that have none.

    Images of one group, and those whose files are equal byte for byte, are one group from here on. A default split
    (80/10/10 by a hash of names) also keeps equal captions on one side, but those that would tie more than a tenth
    of the images together.

    Args:
        records: All images of the source; an empty split is one to be given.

    Returns:
        The records, and what was found that a person should know, a sentence each.
    """
    found = []
    parts = _Parts(len(records))
    equal = equal_files([record.location for record in records])
    for rows in (*_classes(range(len(records)), lambda row: records[row].group), *equal):
        parts.join(rows)
    records = [replace(record, group=records[parts.of(row)].group) for row, record in enumerate(records)]
    if equal:
        found.append(
            f"{sum(map(len, equal)):,} images are equal byte for byte to another one, e.g. {_two(records, equal[0])}: "
            f"{len(equal):,} groups of equal images"
        )
    if any(not record.split for record in records):
        by_caption = defaultdict(list)
        for row, record in enumerate(records):
            for text in {caption_key(caption) for caption in record.captions}:
                by_caption[text].append(row)
        limit = max(2, int(_LARGEST_PART * len(records)))
        # The rarest first: what few images share says most about them.
        for _, rows in sorted(by_caption.items(), key=lambda item: (len(item[1]), item[0])):
            if parts.size_joined(rows) <= limit:
                parts.join(rows)
        name: dict[int, str] = {}
        for row, record in enumerate(records):
            part = parts.of(row)
            name[part] = min(name.get(part, record.group), record.group)
        records = [r if r.split else replace(r, split=hash_split(name[parts.of(row)])) for row, r in enumerate(records)]
        tied = [rows for rows in by_caption.values() if len(rows) > 1 and len({parts.of(row) for row in rows}) == 1]
        if tied:
            found.append(f"{len(tied):,} captions that several images share were kept in one split each")
    return records, found + _shared_with_train(records, equal)


def equal_files(locations: Sequence[str]) -> list[list[int]]:
    """Find images whose files are equal byte for byte; one that cannot be read equals none.

    Args:
        locations: As in `Record`.

    Returns:
        Positions of equal ones, two or more each, in order.
    """

    def digest(row: int) -> bytes:
        return hashlib.sha256(image_bytes(locations[row])).digest()

    # Most files differ in size already, so that few are read.
    same_size = _classes(range(len(locations)), lambda row: image_size(locations[row]))
    return sorted(rows for candidates in same_size for rows in _classes(candidates, digest))


def _shared_with_train(records: Sequence[Record], equal: Sequence[Sequence[int]]) -> list[str]:
    """Say what validation and test have in common with the training split."""
    found = []
    trained = {caption_key(caption) for one in records if one.split == "train" for caption in one.captions}
    with_train = {row for rows in equal if any(records[row].split == "train" for row in rows) for row in rows}
    for split in SPLITS[1:]:
        rows = [row for row, record in enumerate(records) if record.split == split]
        images = sum(row in with_train for row in rows)
        captions = Counter(caption_key(caption) in trained for row in rows for caption in records[row].captions)
        if images or captions[True]:
            found.append(
                f"{split} shares {images:,} of its {len(rows):,} images and {captions[True]:,} of its "
                f"{captions.total():,} captions with train"
            )
    return found


def _two(records: Sequence[Record], rows: Sequence[int]) -> str:
    return f"{records[rows[0]].location} and {records[rows[1]].location}"


def _classes(rows: Iterable[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    """Rows of equal keys, two or more each; a row whose key cannot be read is alone."""
    classes: dict[Hashable, list[int]] = {}
    for row in rows:
        try:
            classes.setdefault(key(row), []).append(row)
        except (OSError, ValueError):
            continue
    return [same for same in classes.values() if len(same) > 1]


class _Parts:
    """Disjoint sets of the numbers below ``count``; the name of a part is its smallest number."""

    def __init__(self, count: int) -> None:
        self.parent = list(range(count))
        self.size = [1] * count

    def of(self, row: int) -> int:
        while self.parent[row] != row:
            self.parent[row] = self.parent[self.parent[row]]
            row = self.parent[row]
        return row

    def size_joined(self, rows: Iterable[int]) -> int:
        """Size of the part that `join` of these would make."""
        return sum(self.size[part] for part in {self.of(row) for row in rows})

    def join(self, rows: Iterable[int]) -> None:
        first, *others = sorted({self.of(row) for row in rows})
        for other in others:
            self.parent[other] = first
            self.size[first] += self.size[other]
