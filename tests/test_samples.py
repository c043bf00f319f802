"""Archives and folders as strangers have them: who belongs to whom, and what is left out and said."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
from PIL import Image
from train_data import write_tar

from modest_align_train.latents import image_bytes, open_image
from modest_align_train.sources import find_files, fingerprint, read_source


def png(color="red", size=(4, 4)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def write_files(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def read(source, prefix, key_prefix=""):
    """Picture and captions by key, and what was left out: by name, the reason."""
    contents = read_source(source)
    pairs = {
        record.key.removeprefix(key_prefix): (record.location.removeprefix(prefix), record.captions)
        for record in contents.records
    }
    return pairs, {one.location.removeprefix(prefix): one.reason for one in contents.skipped}


CASES = {
    "dots belong to what is behind the key": (
        {"a.v1.jpg": b"", "a.v1.txt": b"one", "a.v2.jpg": b"", "a.v2.json": {"caption": "two"}},
        {"a.v1": ("a.v1.jpg", ("one",)), "a.v2": ("a.v2.jpg", ("two",))},
        {},
    ),
    "dots of a folder do not": (
        {"v1.0/a.jpg": b"", "v1.0/a.txt": b"one", "v2.0/a.jpg": b"", "v2.0/a.txt": b"two"},
        {"v1.0/a": ("v1.0/a.jpg", ("one",)), "v2.0/a": ("v2.0/a.jpg", ("two",))},
        {},
    ),
    "the plain picture, not the depth map": (
        {"a.depth.png": b"", "a.jpg": b"", "a.mask.png": b"", "a.txt": b"one"},
        {"a": ("a.jpg", ("one",))},
        {"a.depth.png": "another picture of the sample", "a.mask.png": "another picture of the sample"},
    ),
    "the first of two plain pictures": (
        {"a.jpg": b"", "a.png": b"", "a.txt": b"one"},
        {"a": ("a.jpg", ("one",))},
        {"a.png": "another picture of the sample"},
    ),
    "the only picture is meant": ({"a.rgb.png": b"", "a.txt": b"one"}, {"a": ("a.rgb.png", ("one",))}, {}),
    "none of several is guessed": (
        {"a.depth.png": b"", "a.rgb.png": b"", "a.txt": b"one", "b.png": b"", "b.txt": b"two"},
        {"b": ("b.png", ("two",))},
        {
            "a.depth.png": "one of several, none is plain",
            "a.rgb.png": "one of several, none is plain",
            "a.txt": "a text without a picture of its name",
        },
    ),
    "all that is left out is said": (
        {"a.jpg": b"", "a.txt": b"one", "a.npy": b"", "b.json": {}, "c.en.txt": b"x", "c.jpg": b"", ".x.jpg": b""},
        {"a": ("a.jpg", ("one",))},
        {
            "a.npy": "neither a picture nor its caption",
            "b": "no image",
            "c.en.txt": "a text without a picture of its name",
            "c.jpg": "no caption",
            ".x.jpg": "a hidden file",
        },
    ),
    "texts": (
        {
            **{f"{name}.jpg": b"" for name in "abcde"},
            "a.txt": "\ufeffgrün\r\n\r\nzwei\u2028drei\r\n".encode(),
            "b.txt": "grün".encode("latin-1"),
            "c.json": {"caption": None},
            "c.txt": b"of the text",
            "d.json": {"caption": "same  words"},
            "d.txt": b"same words\n",
            "e.json": {"caption": "of the json"},
            "e.txt": b"of the text",
        },
        {
            "a": ("a.jpg", ("grün", "zwei drei")),
            "c": ("c.jpg", ("of the text",)),
            "d": ("d.jpg", ("same words",)),
            "e": ("e.jpg", ("of the json",)),
        },
        {"b": "a text that is not UTF-8", "e.txt": "other captions than the .json's, which count"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_who_belongs_to_whom(tmp_path, case):
    files, pairs, skipped = CASES[case]
    tar = write_tar(tmp_path / "t.tar", files)
    assert read(tar, f"{tar}::", "t/") == (pairs, skipped)
    folder = write_files(tmp_path / "folder", files)
    assert read(folder, f"{folder}/") == (pairs, skipped)


def test_members_that_are_no_files(tmp_path):
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            ("./d", tarfile.DIRTYPE),
            ("./a.jpg", None),
            ("./a.txt", None),
            ("./b.jpg", tarfile.LNKTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type = kind or tarfile.REGTYPE
            info.linkname = "./a.jpg" if kind == tarfile.LNKTYPE else ""
            info.size = 0 if kind else 3
            tar.addfile(info, io.BytesIO(b"one"))
        info = tarfile.TarInfo("./a.txt")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"two"))
    assert read(path, f"{path}::") == (
        {"t/a": ("./a.jpg", ("two",))},
        {"./b.jpg": "a link or device, no file", "./a.txt": "the first of two files of that name"},
    )


def test_names_that_a_terminal_would_obey(tmp_path):
    """Found by tests/fuzz: a line break in the name of a member made two lines of a sentence."""
    path = write_tar(tmp_path / "t.tar", {"a\n\x1b[2J.doc": b"x"})
    with pytest.raises(ValueError, match=r"holds no image with a caption \(.*::a\\n\\x1b\[2J\.doc: neither a pict"):
        read_source(path)


@pytest.mark.parametrize("content", [b"", b"no tar", b"\x1f\x8b\x08 a compressed one"])
def test_a_damaged_shard_costs_itself_alone(tmp_path, content):
    write_tar(tmp_path / "0.tar", {"a.jpg": b"", "a.txt": b"one"})
    (tmp_path / "1.tar").write_bytes(content)
    write_tar(tmp_path / "2.TAR", {"a.jpg": b"", "a.txt": b"two"})
    assert read(tmp_path, f"{tmp_path}/") == (
        {"0/a": ("0.tar::a.jpg", ("one",)), "2/a": ("2.TAR::a.jpg", ("two",))},
        {"1.tar": "a damaged file"},
    )
    assert image_bytes(f"{tmp_path}/2.TAR::a.txt") == b"two"
    with pytest.raises(ValueError, match=r"holds no image with a caption \(.*1\.tar: a damaged file \([^\n]*\)\)$"):
        read_source(tmp_path / "1.tar")


def test_a_folder_has_changed_when_a_file_in_it_has(tmp_path):
    folder = write_files(tmp_path / "x", {"a.jpg": b"", "a.txt": b"one"})
    assert find_files(folder) == [folder]
    before = fingerprint([folder])
    assert fingerprint([folder]) == before
    write_files(folder, {"a.txt": b"other"})
    assert fingerprint([folder]) != before


def test_a_glob_of_folders(tmp_path):
    for name in "ab":
        write_files(tmp_path / name, {"x.jpg": b"", "x.txt": b"one"})
    assert find_files(str(tmp_path / "*")) == [tmp_path / "a", tmp_path / "b"]
    assert len(read_source(str(tmp_path / "*")).records) == 2


def test_img2dataset(tmp_path):
    files = {"00000.parquet": b"PAR1", "00000_stats.json": {"count": 2}}
    for number in range(2):
        files |= {
            f"00000/{number:09}.jpg": png(),
            f"00000/{number:09}.txt": b"dog %d" % number,
            f"00000/{number:09}.json": {"caption": f"dog {number}", "url": "https://example.org"},
        }
    folder = write_files(tmp_path / "x", files)
    assert read(folder, f"{folder}/") == (
        {f"00000/{n:09}": (f"00000/{n:09}.jpg", (f"dog {n}",)) for n in range(2)},
        {"00000.parquet": "neither a picture nor its caption", "00000_stats": "no image"},
    )


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_hugging_face_imagefolder(tmp_path, suffix):
    for split in ("train", "test"):
        rows = [{"file_name": "0.png", "text": f"a {split} dog"}, {"file_name": "sub/1.png", "text": "a, b"}]
        table = f'file_name,text\n0.png,a {split} dog\nsub/1.png,"a, b"\n'.encode()
        if suffix == "jsonl":
            table = "\n".join(map(json.dumps, rows)).encode()
        write_files(tmp_path / "x" / split, {"0.png": png(), "sub/1.png": png(), f"metadata.{suffix}": table})
    source = read_source(tmp_path / "x")
    assert [(record.key, record.split) for record in source.records] == [
        ("test/0.png", "test"),
        ("test/sub/1.png", "test"),
        ("train/0.png", "train"),
        ("train/sub/1.png", "train"),
    ]
    assert source.records[3].captions == ("a, b",)
    assert source.records[3].location == str(tmp_path / "x/train/sub/1.png")
    assert source.split_rule == "as the files or their folders are named"
    assert source.skipped == []
    whole = write_files(tmp_path / "y", {"metadata.csv": b"file_name,text\ntrain/0.png,x\nval/0.png,y\n"})
    assert [record.split for record in read_source(whole).records] == ["train", "validation"]


def test_names_that_tell_no_split(tmp_path):
    one = write_files(tmp_path, {"test.csv": b"image,caption\na.png,x\n"}) / "test.csv"
    assert "80/10/10" in read_source(one).split_rule
    other = write_files(tmp_path, {"more.csv": b"image,caption\nb.png,y\n", "train.csv": b"image,caption\nc.png,y\n"})
    assert "80/10/10" in read_source([one, other / "more.csv", other / "train.csv"]).split_rule
    assert [record.split for record in read_source([one, other / "train.csv"]).records] == ["test", "train"]


@pytest.mark.parametrize("folder", ["train2017", "../train2017", "."])
def test_coco(tmp_path, folder):
    content = {
        "info": {},
        "images": [{"id": 7, "file_name": "7.jpg"}, {"id": 3, "file_name": "3.jpg"}, {"id": 4, "file_name": "4.jpg"}],
        "annotations": [
            {"id": 0, "image_id": 3, "caption": "A cat.\n"},
            {"id": 1, "image_id": 7, "caption": "A dog."},
            {"id": 2, "image_id": 3, "caption": "Cats "},
            {"id": 5, "image_id": 9, "caption": "Nothing"},
        ],
    }
    files = {"captions_train2017.json": content, f"{folder}/7.jpg": png(), f"{folder}/3.jpg": png()}
    write_files(tmp_path / "annotations", files)
    source = read_source(tmp_path / "annotations/captions_train2017.json")
    assert [(record.key, record.captions) for record in source.records] == [
        ("7.jpg", ("A dog.",)),
        ("3.jpg", ("A cat.", "Cats")),
    ]
    assert open_image(source.records[0].location).size == (4, 4)
    assert [one.reason for one in source.skipped] == ["a caption of no image", "no caption"]
    content["annotations"] = [{"id": 0, "image_id": 3, "bbox": [0, 0, 1, 1]}]
    write_files(tmp_path, {"instances.json": content})
    with pytest.raises(ValueError, match=r'must hold "images" .* "caption", as COCO'):
        read_source(tmp_path / "instances.json")


def test_flickrs_results(tmp_path):
    table = b"image_name| comment_number| comment\n1.jpg| 0| Two men, talking .\n1.jpg| 1| Men .\n2.jpg| 4   A dog .\n"
    path = write_files(tmp_path, {"results.csv": table}) / "results.csv"
    assert read(path, f"{tmp_path}/") == (
        {"1.jpg": ("1.jpg", ("Two men, talking .", "Men ."))},
        {"results.csv line 4": "surplus or missing cells"},
    )


def test_hugging_face_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"image": {"bytes": png((row, 0, 0)), "path": "same.png"}, "caption": [f"dog {row}", "a dog"]}
        for row in range(7)
    ]
    rows[5]["image"]["bytes"] = None
    rows.append({"image": None, "caption": ["nothing"]})
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        path = tmp_path / f"data/{split}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    (tmp_path / "data/test-00000-of-00001.parquet").write_bytes(path.read_bytes()[:-9])
    source = read_source(tmp_path)
    assert [one.reason for one in source.skipped] == ["a damaged file"]
    assert len(source.records) == 16
    assert [record.split for record in source.records[::8]] == ["train", "validation"]
    assert source.records[0].captions == ("dog 0", "a dog")
    assert source.records[9].key == "validation-00000-of-00001/1"
    for row in (0, 2, 3, 6):
        assert open_image(source.records[row].location).getpixel((0, 0)) == (row, 0, 0)
    for row in (5, 7):
        with pytest.raises(FileNotFoundError, match=r"image/\d holds no picture"):
            open_image(source.records[row].location)
    for row in rows:
        row["image"] = {"bytes": None, "path": "pictures/a.png"}
    schema = pyarrow.parquet.read_schema(path)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), tmp_path / "t.parquet")
    assert {record.location for record in read_source(tmp_path / "t.parquet").records} == {f"{tmp_path}/pictures/a.png"}


def test_text_that_is_no_unicode(tmp_path):
    path = tmp_path / "t.jsonl"
    rows = [
        ("a.png", "half \\ud83d of a smile"),
        ("b.png", "a \\ud83d\\ude00 smile"),
        ("\\udcfc.png", "x"),
        ("\\ud83d\\u0000", ""),
    ]
    path.write_text("".join(f'{{"image": "{image}", "caption": "{caption}"}}\n' for image, caption in rows))
    source = read_source(path)
    assert [record.captions for record in source.records] == [("half \ufffd of a smile",), ("a 😀 smile",)]
    assert sorted(str(one).removeprefix(f"{tmp_path}/") for one in source.skipped) == [
        "a.png: a caption that was no Unicode text, mended",
        "\ufffd.png: a name that is not UTF-8, or holds a zero byte",
        "\ufffd\\x00: a name that is not UTF-8, or holds a zero byte",
    ]
