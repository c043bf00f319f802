"""Rows of a table file, whatever its separator and damage: a row is whole, or it is named and left out."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from ast import literal_eval
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from textwrap import shorten
from typing import Any

from modest_align_train.pictures import IMAGE_SUFFIXES
from modest_align_train.skips import Skipped

Row = tuple[str, dict[str, Any]]  # where it is, for messages, and its cells by column

_SEPARATORS = (",", ";", "\t", "|")
# A quote that is not closed within so many lines was not meant to open a cell.
_LINES_A_CELL = 100
# Read at once, to see whether a column of pictures holds any.
_PICTURES_A_LOOK = 64
_MISSING = {"", "nan", "null", "none", "<na>"}
_LITERAL = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_LIST_AS_TEXT = re.compile(rf"\[\s*(?:(?:{_LITERAL})(?:\s*,)?\s*)*\]", re.DOTALL)


def read_table(path: Path, skipped: list[Skipped]) -> list[Row] | dict[str, Any]:
    """Read a table as rows; of a JSON file that is an object, the object.

    Args:
        path: A file of one of `TABLE_SUFFIXES`.
        skipped: Gets the rows that are damaged.

    Raises:
        ValueError: The file cannot be understood.
        ImportError: It needs a package that is missing.
    """
    return READERS[path.suffix.lower()](path, skipped)


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark.

    Raises:
        ValueError: It is of another encoding; the sentence says of which.
    """
    data = path.read_bytes()
    # Without a byte order mark it shows by the zeros in the letters of the header.
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4]:
        raise ValueError(f"{path} must be UTF-8, got UTF-16: iconv -f UTF-16 -t UTF-8 helps")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = data[error.start : error.start + 1]
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} must be UTF-8, got byte {byte[0]:#x} in line {line}: if that is "
            f"{byte.decode('cp1252', 'replace')!r}, the file is Windows-1252, and iconv -f CP1252 -t UTF-8 helps"
        ) from None


def parse_json(text: str | bytes, origin: str) -> Any:
    """Parse JSON; the error of a ValueError says where it breaks off, but none of the content."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{origin} is not JSON ({error})") from None


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: null, NaN, blank, or one of these as text."""
    if isinstance(value, str):
        return value.strip().lower() in _MISSING
    return value is None or (isinstance(value, float) and value != value)


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8, which one with lone surrogates cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def mend(text: str) -> str:
    """Join the surrogates of a text to characters, and put U+FFFD for those that are alone."""
    return text if is_utf8(text) else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def list_as_text(cell: str) -> list[str]:
    """Captions of one cell of text: several if it is a list as JSON, Python or NumPy write it."""
    text = cell.strip()
    if not _LIST_AS_TEXT.fullmatch(text):
        return [cell]
    with suppress(ValueError):
        return list(map(str, json.loads(text)))
    with suppress(ValueError, SyntaxError):
        # One by one, because Python joins strings that stand side by side, as NumPy writes them.
        return [str(literal_eval(literal.replace("\n", "\\n"))) for literal in re.findall(_LITERAL, text, re.DOTALL)]
    return [cell]


def _read_separated(path: Path, skipped: list[Skipped]) -> list[Row]:
    csv.field_size_limit(sys.maxsize)
    # Not splitlines(), which also breaks at separators that a caption may hold.
    lines = list(io.StringIO(read_text(path), newline=""))
    start = next((number for number, line in enumerate(lines) if line.strip()), len(lines))
    excel = re.fullmatch(r"sep=(.)\s*", lines[start]) if lines[start:] else None
    start += bool(excel)
    if not lines[start:]:
        raise ValueError(f"{path} is empty: a table starts with the names of its columns")
    separator = excel[1] if excel else _find_separator(path, lines[start])
    rows: list[Row] = []
    joined: list[Skipped] = []
    header: list[str] = []
    skipped_before = len(skipped)
    while start < len(lines):
        origin = f"{path} line {start + 1}"
        reader = csv.reader(
            lines[start : start + _LINES_A_CELL], delimiter=separator, strict=True, skipinitialspace=True
        )
        damage = ""
        try:
            cells = [cell.strip() for cell in next(reader)]
            length = reader.line_num
            damage = _swallowed(lines[start + 1 : start + length], separator, len(header))
        except csv.Error as error:
            damage = f"{error}; a quote in a cell is written twice, and the cell between quotes"
        plain = [cell.strip() for cell in lines[start].split(separator)]
        if damage and separator == "\t" and len(plain) == len(header):
            # Most programs that separate by tabs do not quote.
            cells, damage, length = plain, "", 1
        if damage:
            if not header:
                raise ValueError(f"{origin} must be the names of columns, got damaged quotes ({damage})")
            skipped.append(Skipped(origin, "damaged quotes", damage))
            start += 1
            continue
        start += length
        while len(cells) > len(header or [1]) and not cells[-1]:
            cells.pop()
        if not header:
            header = cells
            if len(set(header)) < len(header):
                twice = shorten(next(name for name in header if header.count(name) > 1), 30, placeholder="...")
                raise ValueError(f"{path} must name each column once, got {twice!r} twice")
        elif any(cells):
            if len(cells) != len(header):
                wanted = f"{len(cells)} for {len(header)} columns: one that holds {separator!r} stands in quotes"
                skipped.append(Skipped(origin, "surplus or missing cells", wanted))
            else:
                rows.append((origin, dict(zip(header, cells, strict=True))))
                if any(line.count(separator) + 1 == len(header) > 1 for line in lines[start - length + 1 : start]):
                    joined.append(Skipped(origin, "a cell of several lines, one of which could be a row, kept"))
    damaged = skipped[skipped_before:]
    if len(damaged) > len(rows):
        total = len(damaged) + len(rows)
        raise ValueError(f"{path} must be a table, got {len(damaged):,} damaged rows of {total:,}: {damaged[0]}")
    skipped += joined
    return rows


def _find_separator(path: Path, header: str) -> str:
    """The separator that gives a header the most columns; of equals the one that the suffix stands for."""
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    return max(
        _SEPARATORS,
        key=lambda one: (len(next(csv.reader([header], delimiter=one, skipinitialspace=True))), one == usual),
    )


def _swallowed(lines: list[str], separator: str, columns: int) -> str:
    """Say if the further lines of a cell hold a whole row, as after a quote that is not closed."""
    for line in lines:
        cells = line.split(separator)
        if len(cells) >= columns and any(cell.strip(' "\r\n').lower().endswith(IMAGE_SUFFIXES) for cell in cells):
            return "a cell between quotes goes on over another row"
    return ""


def _read_json(path: Path, skipped: list[Skipped]) -> list[Row] | dict[str, Any]:
    text = read_text(path)
    try:
        content = parse_json(text, str(path))
    except ValueError:
        if _is_object(next((line for line in text.split("\n") if line.strip()), "")):
            return _read_json_lines(path, skipped)
        raise
    if isinstance(content, dict):
        # JSON lines of one line look like this.
        is_row = "images" not in content and any(isinstance(value, str) for value in content.values())
        return [(f"{path} row 1", content)] if is_row else content
    if not isinstance(content, list):
        raise ValueError(f'{path} must be a list of rows or {{"images": [...]}}, got {type(content).__name__}')
    rows = []
    for number, row in enumerate(content, 1):
        if isinstance(row, dict):
            rows.append((f"{path} row {number}", row))
        else:
            skipped.append(Skipped(f"{path} row {number}", "no row with named columns", type(row).__name__))
    return rows


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _read_json_lines(path: Path, skipped: list[Skipped]) -> list[Row]:
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        origin = f"{path} line {number}"
        try:
            row = parse_json(line, "it")
        except ValueError as error:
            skipped.append(Skipped(origin, "not JSON", str(error)))
            continue
        if isinstance(row, dict):
            rows.append((origin, row))
        else:
            skipped.append(Skipped(origin, "no row with named columns", type(row).__name__))
    return rows


def _read_parquet(path: Path, skipped: list[Skipped]) -> list[Row]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{path} needs pyarrow: pip install 'modest-align-kernels[parquet]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            # Hugging Face keeps pictures in the table, as {bytes, path}: all but their bytes is read here.
            pictures = [
                field.name
                for field in file.schema_arrow
                if pyarrow.types.is_struct(field.type) and {"bytes", "path"} <= {one.name for one in field.type}
            ]
            embedded = {name for name in pictures if _has_values(file, f"{name}.bytes")}
            columns = [f"{name}.path" if name in pictures else name for name in file.schema_arrow.names]
            rows = file.read(columns=columns).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a whole Parquet file ({reason})") from None
    for number, row in enumerate(rows):
        for name in pictures:
            row[name] = f"{path.absolute()}::{name}/{number}" if name in embedded else (row[name] or {}).get("path")
    return [(f"{path} row {number}", row) for number, row in enumerate(rows, 1)]


def read_embedded(path: str, place: str) -> bytes:
    """Read a picture that is in a Parquet file, at ``"column/row"``.

    Raises:
        FileNotFoundError: There is no such file, or its row holds no picture.
    """
    column, _, row = place.rpartition("/")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    modified, rest = Path(path).stat().st_mtime_ns, int(row)
    for group, rows in enumerate(_rows_by_group(path, modified)):
        if rest < rows:
            picture = _row_group(path, column, group, modified)[rest].as_py()
            if picture and picture["bytes"] is not None:
                return picture["bytes"]
            break
        rest -= rows
    raise FileNotFoundError(f"{path}::{place} holds no picture")


@lru_cache(maxsize=64)
def _rows_by_group(path: str, modified_ns: int) -> list[int]:
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_metadata(path)
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


@lru_cache(maxsize=2)
def _row_group(path: str, column: str, group: int, modified_ns: int) -> Any:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[f"{column}.bytes"])[column]


def _has_values(file: Any, column: str) -> bool:
    # By reading and not by the statistics in the footer, for which pyarrow ends the process where they are damaged.
    batches = file.iter_batches(_PICTURES_A_LOOK, columns=[column])
    return any(batch.column(0).flatten()[0].null_count < len(batch) for batch in batches)


READERS: dict[str, Callable[[Path, list[Skipped]], list[Row] | dict[str, Any]]] = {
    ".csv": _read_separated,
    ".tsv": _read_separated,
    ".txt": _read_separated,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": _read_parquet,
    ".json": _read_json,
}
TABLE_SUFFIXES = tuple(READERS)
