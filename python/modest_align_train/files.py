"""Files that appear whole or not at all, and folders that one process writes into."""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def folder_of_its_own(folder: Path) -> Iterator[None]:
    """Create a folder if need be, and keep other processes that ask for it out of it until the block or this one ends.

    Raises:
        ValueError: It is a file, or another process has it.
    """
    if folder.is_file():
        raise ValueError(f"output must be a folder, got the file {folder}")
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _lock(folder):
            yield
    finally:
        if made:
            with suppress(OSError):
                folder.rmdir()  # empty: nothing was begun


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    path = folder / ".lock"
    try:
        file = path.open("w")
    except OSError:
        yield  # where nothing can be written nobody need be kept out
        return
    with file:
        try:
            # The system undoes it when the process ends, however that may be.
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Else the one who had it ended, and deleted it, since it was opened.
            mine = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            mine = False
        except OSError as error:
            mine = True
            warnings.warn(
                f"{folder} cannot be locked ({error.strerror}): start nothing else that writes there", stacklevel=5
            )
        if not mine:
            raise ValueError(
                f"output {folder} is being written by another process: wait until it ends, or take another folder"
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: Path, keep: Path | None = None) -> Iterator[Path]:
    """Give a temporary path beside ``path``; it takes its place when the block ends without an error.

    Args:
        path: The file to be.
        keep: What the file that was there before is called from then on; it is gone if None.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # Renaming would only fail after all the work.
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        yield temporary
        # Without it a power cut can leave the new name on an empty file.
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        if keep is not None and path.is_file():
            path.replace(keep)
        temporary.replace(path)
    except OSError as error:
        # A full disk has no file's name in its error, and nobody knows the temporary one.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_file(path: Path, content: str | bytes, keep: Path | None = None) -> None:
    """Write ``content``, a text as UTF-8, by atomic rename; for ``keep`` see `atomic_path`."""
    with atomic_path(path, keep) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON by atomic rename."""
    write_file(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is damaged: it is no JSON; delete it, or the folder, and make it again") from None
