"""Rows of a matrix that stays in its files, so that it may be larger than memory."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

# From disk, so many reads at once are five times as fast as one after the other.
_AT_ONCE = 16
_READERS = ThreadPoolExecutor(_AT_ONCE)


@dataclass(frozen=True)
class Rows:
    """Some rows of a matrix in files: indexing and `split` give views, `to` reads.

    Read, and not mapped into memory: a mapped page counts as resident, a row that is touched maps 64 KiB, and where
    the files do not fit in memory the system reads ahead megabytes for each row of a batch. And an error of the disk
    does not end the process.

    Attributes:
        files: Each has some rows, one after the other.
        first: Number of the first row of each file and, at the end, of all rows, int64 [files + 1].
        start: Where the rows of each file begin, in bytes.
        features: Length of a row.
        dtype: Type of the numbers in the files.
        numbers: Which rows these are, int64 [n] on the CPU.
    """

    files: Sequence[Path]
    first: Tensor
    start: Sequence[int]
    features: int
    dtype: torch.dtype
    numbers: Tensor

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def shape(self) -> tuple[int, int]:
        """As of a tensor: (rows, features)."""
        return len(self), self.features

    def __getitem__(self, rows: Tensor | slice) -> Rows:
        return replace(self, numbers=self.numbers[rows])

    def split(self, rows: int) -> list[Rows]:
        """Split into views of so many rows, the last one perhaps shorter."""
        return [replace(self, numbers=numbers) for numbers in self.numbers.split(rows)]

    def to(self, device: torch.device | str) -> Tensor:
        """Read: float32 [n, features].

        Raises:
            OSError: A file cannot be read.
            ValueError: A file no longer has all its rows.
        """
        rows = torch.empty(len(self), self.features, dtype=self.dtype)
        order = self.numbers.argsort()
        file = torch.searchsorted(self.first, self.numbers[order], right=True) - 1
        wanted = torch.stack([file, self.numbers[order] - self.first[file], order], dim=1)
        list(_READERS.map(lambda part: self._read(part.tolist(), rows), wanted.split(-(-len(self) // _AT_ONCE) or 1)))
        return rows.to(device).float()

    def _read(self, wanted: Sequence[Sequence[int]], rows: Tensor) -> None:
        """Read some of [file, row in the file, row here], those of a file together."""
        size = self.features * self.dtype.itemsize
        content = rows.view(-1).view(torch.uint8).numpy()
        for file, places in groupby(wanted, key=lambda place: place[0]):
            path = self.files[file]
            try:
                with open(path, "rb", buffering=0) as opened:
                    for _, there, here in places:
                        opened.seek(self.start[file] + there * size)
                        if opened.readinto(content[here * size : (here + 1) * size]) != size:
                            raise ValueError(f"{path} is damaged: it was cut while it was in use")
            except OSError as error:
                # One that a disk makes has no file's name.
                raise OSError(error.errno, error.strerror, str(path)) from error
