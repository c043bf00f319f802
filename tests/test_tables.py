"""Tables as strangers have them: each row comes whole, or it is named and left out."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from modest_align_train.sources import read_source
from modest_align_train.tables import read_table


def read(path, content, **options):
    """Captions by image, and what was left out: by the name of the place, the reason."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    source = read_source(path, **options)
    skipped = {one.location.removeprefix(f"{path} ").rpartition("/")[2]: one.reason for one in source.skipped}
    return {record.key: record.captions for record in source.records}, skipped


@pytest.mark.parametrize("separator", [",", ";", "\t", "|", "| "])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "txt", "CSV"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_separators_and_suffixes(tmp_path, separator, suffix, mark):
    rows = [["image", "caption"], ["a.png", "a dog"], ["b.png", f'"a cat{separator} and a ""mat"""']]
    content = mark + "\r\n".join(separator.join(row) for row in rows) + "\r\n\r\n"
    expected = " ".join(f'a cat{separator} and a "mat"'.split())
    assert read(tmp_path / f"t.{suffix}", content) == ({"a.png": ("a dog",), "b.png": (expected,)}, {})


def test_a_separator_that_excel_names(tmp_path):
    assert read(tmp_path / "t.csv", "sep=;\r\nimage;caption\r\na.png;a, b\r\n") == ({"a.png": ("a, b",)}, {})


def test_spaces_and_empty_rows(tmp_path):
    content = 'Image , caption ,\na.png, a dog ,\n b.png ,"a cat",\n,,\n   \n'
    assert read(tmp_path / "t.csv", content) == ({"a.png": ("a dog",), "b.png": ("a cat",)}, {})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("image,caption\na.png,grün\n".encode("latin-1"), "must be UTF-8, got byte 0xfc in line 2: if that is 'ü'"),
        ("image,caption\na.png,grün\n".encode("utf-16"), "must be UTF-8, got UTF-16"),
        ("image,caption\na.png,grün\n".encode("utf-16-le"), "must be UTF-8, got UTF-16"),
        (b"", "is empty: a table starts with the names of its columns"),
        (b"\n\n", "is empty: a table starts with the names of its columns"),
        (b"image,caption,Caption,caption\na.png,x,y,z\n", "must name each column once, got 'caption' twice"),
        (b'"image,caption\na.png,x\n', "line 1 must be the names of columns, got damaged quotes"),
        (b"image,caption\na.png,x, y\nb.png,z\nc.png,u, v\n", "must be a table, got 2 damaged rows of 3: "),
        (b"a.png,a dog\nb.png,a cat\n", "has no image column that is known by its name"),
    ],
)
def test_a_table_that_is_refused(tmp_path, content, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the words are checked below
        read(tmp_path / "t.csv", content)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("last", ["c.png,a cow\n", 'c.png,"a cow"\n', "c.png,a cow"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ('b.png,"a cat', "damaged quotes"),
        ('b.png,"a cat" on a mat', "damaged quotes"),
        ("b.png,a cat, a mat", "surplus or missing cells"),
        ("b.png", "surplus or missing cells"),
    ],
)
def test_a_damaged_row_costs_itself_alone(tmp_path, damage, reason, last):
    content = f"image,caption\na.png,a dog\n{damage}\n{last}"
    whole = {"a.png": ("a dog",), "c.png": ("a cow",)}
    assert read(tmp_path / "t.csv", content) == (whole, {"line 3": reason})


def test_a_quote_never_swallows_rows(tmp_path):
    content = 'image,caption\na.png,"a dog\nb.png,a cat"\nc.png,"a cow,\nand a calf"\n'
    captions, skipped = read(tmp_path / "t.csv", content)
    assert captions == {"b.png": ('a cat"',), "c.png": ("a cow, and a calf",)}
    assert skipped == {"line 2": "damaged quotes"}


def test_lines_that_may_have_been_joined_are_said(tmp_path):
    content = 'image,caption\n1,"a dog\n2,a cat"\n3,"a cow,\nand a calf"\n4,"one line, two"\n5,"x\ny"\n'
    captions, skipped = read(tmp_path / "t.csv", content)
    assert captions["1"] == ("a dog 2,a cat",)
    assert captions["3"] == ("a cow, and a calf",)
    assert skipped == {"line 2": "a cell of several lines, one of which could be a row, kept"}


def test_quotes_in_a_table_that_does_not_quote(tmp_path):
    content = 'image\tcaption\na.png\t"a dog\nb.png\t"a cat" on a mat\n'
    assert read(tmp_path / "t.tsv", content) == ({"a.png": ('"a dog',), "b.png": ('"a cat" on a mat',)}, {})


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ("['a dog', \"the dog's mat\"]", ("a dog", "the dog's mat")),
        ('["a dog", "gr\\u00fcn \\ud83d\\ude00"]', ("a dog", "grün 😀")),
        ("['a dog' 'a cat']", ("a dog", "a cat")),
        ("['a dog'\n 'a cat']", ("a dog", "a cat")),
        ("[a dog]", ("[a dog]",)),
        (r"['a \xno dog']", (r"['a \xno dog']",)),
        # Ends at all only if no part of the pattern can match one text in two ways.
        ("['a'" + "  'b'" * 60 + " x]", ("['a'" + " 'b'" * 60 + " x]",)),
        ("['a dog'] and more", ("['a dog'] and more",)),
    ],
)
def test_a_list_written_as_text(tmp_path, cell, captions):
    quoted = cell.replace('"', '""')
    assert read(tmp_path / "t.csv", f'image,captions\na.png,"{quoted}"\n') == ({"a.png": captions}, {})


def test_json_lines_in_json(tmp_path):
    rows = [json.dumps({"image": f"{name}.png", "caption": [name, "x"]}) for name in "ab"]
    expected = {"a.png": ("a", "x"), "b.png": ("b", "x")}
    assert read(tmp_path / "t.json", "\n".join(rows)) == (expected, {})
    assert read(tmp_path / "t.JSON", f"\ufeff{rows[0]}\n") == ({"a.png": ("a", "x")}, {})
    assert read(tmp_path / "t.json", f"{rows[0]}\n[1]\n{rows[1][:9]}\n{rows[1]}\n") == (
        expected,
        {"line 2": "no row with named columns", "line 3": "not JSON"},
    )
    with pytest.raises(ValueError, match=r"t\.json is not JSON"):
        read(tmp_path / "t.json", json.dumps([{"image": "a", "caption": "x"}])[:-5])


def test_missing_captions(tmp_path):
    content = "image,caption\na.png,a dog\nb.png,\nc.png,NaN\nd.png,null\ne.png,None\n,a cat\n"
    gone = {f"{name}.png": "no caption" for name in "bcde"} | {"line 7": "no path of an image"}
    assert read(tmp_path / "t.csv", content) == ({"a.png": ("a dog",)}, gone)
    rows = [{"image": f"{n}.png", "caption": value} for n, value in enumerate(["x", None, float("nan"), ["y", None]])]
    captions, skipped = read(tmp_path / "t.json", json.dumps(rows))
    assert captions == {"0.png": ("x",), "3.png": ("y",)}
    assert skipped == {"1.png": "no caption", "2.png": "no caption", "3.png": "an empty caption"}


def test_row_numbers_that_pandas_writes(tmp_path):
    content = ",image,caption\n0,a.png,a dog\n1,b.png,a cat\n"
    assert read(tmp_path / "t.csv", content) == ({"a.png": ("a dog",), "b.png": ("a cat",)}, {})


def test_paths_of_windows_and_urls(tmp_path):
    content = "image,caption\nsub\\a.png,a dog\nhttps://example.org/b.png,a cat\ns3://x/c.png,a cow\n"
    reason = "a URL: download the images first, img2dataset does"
    assert read(tmp_path / "t.csv", content) == ({"sub/a.png": ("a dog",)}, {"line 3": reason, "line 4": reason})


def test_a_zero_byte_is_no_utf_16(tmp_path):
    assert read(tmp_path / "t.csv", b"image,caption\na.png,x\0y\nb.png,z\n")[0]["b.png"] == ("z",)


def test_time_grows_with_the_rows_only(tmp_path):
    def seconds(rows):
        path = tmp_path / "t.csv"
        path.write_text("image,caption\n" + "".join(f"{row}.png,dog {row}\n" for row in range(rows)))
        started = time.process_time()
        read_table(path, [])
        return time.process_time() - started

    seconds(1000)
    many, few = (min(seconds(rows) for _ in range(3)) for rows in (64_000, 4_000))  # a machine may be busy
    assert many < 64 * few  # 16 times the rows


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", f"<html>{'secret ' * 900},x\n1,2\n"),
        ("t.csv", ",".join(f"secret{number}" for number in range(900)) + "\n" + ",".join("x" * 900) + "\n"),
        ("t.csv", "secret " * 900 + ",a," + "secret " * 900 + "\n1,2,3\n"),
        ("t.csv", f"image,caption,split\na.png,x,{'secret ' * 900}\n"),
        ("t.json", json.dumps({"secret " * 900: 1})),
        ("t.json", json.dumps({f"secret{number}": 1 for number in range(900)})),
        ("t.json", json.dumps({"images": [{"file": "secret " * 900}]})),
        ("t.json", json.dumps({"images": [{"id": "secret " * 900}], "annotations": []})),
        ("t.jsonl", json.dumps({"image": {"secret " * 900: 1}, "caption": "x"})),
        ("t.jsonl", json.dumps({"image": "a", "caption": {"secret " * 900: 1}})),
        ("t.jsonl", '{"secret": ' + "secret " * 900),
    ],
)
def test_no_sentence_holds_a_files_content(tmp_path, name, content):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # whatever it says, it is short
        read(tmp_path / name, content)
    assert len(str(caught.value)) < 700
    assert str(caught.value).count("secret") <= 20


FLIP_BITS = """
import sys
from pathlib import Path
from modest_align_train.tables import read_table

path = Path(sys.argv[1])
data = path.read_bytes()
footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
counts = [0, 0]
for bit in range(footer * 8, (len(data) - 8) * 8, 6):
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    try:
        read_table(path, [])
        counts[0] += 1
    except ValueError:
        counts[1] += 1
print(*counts)
"""


def test_a_cut_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=r"t\.parquet is not a whole Parquet file \([^\n]*\)$"):
        read(tmp_path / "t.parquet", b"PAR1 and no more")


def test_a_parquet_with_a_damaged_footer(tmp_path):
    """In a process of its own, which pyarrow would end."""
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"image": {"bytes": b"png", "path": f"{row}.png"}, "caption": ["a dog", "dog"]} for row in range(6)]
    parquet.write_table(sys.modules["pyarrow"].Table.from_pylist(rows), tmp_path / "t.parquet")
    done = subprocess.run([sys.executable, "-c", FLIP_BITS, tmp_path / "t.parquet"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole, refused = map(int, done.stdout.split())
    assert whole > 0
    assert refused > 0
