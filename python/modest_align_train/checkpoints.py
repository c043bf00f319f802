"""Checkpoints on disk: safetensors, with all that is no tensor as JSON in the header, and a checksum of every byte."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from modest_align_train.files import write_file

BEST, LAST = "best.safetensors", "last.safetensors"
# The one before the last: a disk may damage a file long after it was written.
PREVIOUS = "previous.safetensors"

# In the only entry of the metadata, whose order safetensors does not keep.
_CHECKSUM = re.compile(rb'\{"__metadata__":\{"checkpoint":"\{\\"sha256\\": \\"([0-9a-f]{64})\\"')
_UNKNOWN = "0" * 64

State = dict[str, Any]


def named(prefix: str, values: Mapping[str, Any]) -> State:
    """Put ``prefix.`` before every name."""
    return {f"{prefix}.{name}": value for name, value in values.items()}


def part(state: State, prefix: str) -> State:
    """Undo `named`: what has ``prefix.`` before its name, without it."""
    return {name[len(prefix) + 1 :]: value for name, value in state.items() if name.startswith(f"{prefix}.")}


def has_checkpoint(path: Path) -> bool:
    """Whether there is a file of this name.

    Raises:
        ValueError: There is one of an earlier version instead.
    """
    earlier = path.with_suffix(".pt")
    if earlier.is_file() and not path.is_file():
        raise ValueError(
            f"{earlier} is of an earlier version, which this one does not read: train into another --output"
        )
    return path.is_file()


def write_checkpoint(path: Path, state: State, keep: Path | None = None) -> None:
    """Write tensors, and what JSON can hold, by name.

    Args:
        path: The file; it appears whole or not at all.
        state: Tensors of any shape, dtype and device; numbers, texts, None, lists of these.
        keep: What the file that was there before is called then.
    """
    tensors = {name: value.contiguous() for name, value in state.items() if isinstance(value, Tensor)}
    facts = {name: value for name, value in state.items() if name not in tensors}
    content = bytearray(save(tensors, {"checkpoint": json.dumps({"sha256": _UNKNOWN, "facts": facts})}))
    start, end, digest = _checksum(content)
    content[start:end] = digest.encode()
    write_file(path, bytes(content), keep=keep)


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> tuple[State, str]:
    """Read what `write_checkpoint` wrote: the state, its tensors on the device, and the checksum.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A byte of it is not the one that was written.
    """
    content = path.read_bytes()
    try:
        start, end, digest = _checksum(content)
        if content[start:end] != digest.encode():
            raise ValueError("another checksum")
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        facts = dict(json.loads(header["__metadata__"]["checkpoint"])["facts"])
        tensors = load(content)
    except Exception:  # one whose checksum is right may still be made by hand
        raise ValueError(
            f"{path} is damaged (its checksum differs): train into another --output, or delete this one"
        ) from None
    return {**facts, **{name: tensor.to(device) for name, tensor in tensors.items()}}, digest


@contextmanager
def fits_its_settings(path: Path) -> Iterator[None]:
    """Say in one sentence that what was read does not fit, where one of the two files was changed or exchanged."""
    try:
        yield
    except (LookupError, TypeError, RuntimeError, OverflowError):  # torch's own sentence names every parameter
        raise ValueError(f"{path} does not fit the settings.toml beside it: one of them is of another run") from None


def _checksum(content: bytes | bytearray) -> tuple[int, int, str]:
    """Where the checksum stands, and SHA-256 of all that is before and behind it."""
    found = _CHECKSUM.match(content, 8)
    if found is None:
        raise ValueError("no checksum")
    start, end = found.span(1)
    digest = hashlib.sha256(memoryview(content)[:start])
    digest.update(memoryview(content)[end:])
    return start, end, digest.hexdigest()
