from __future__ import annotations

import csv
import json
import sys
from collections import Counter

import pytest
from train_data import write_tar

from modest_align_train.identity import hash_split
from modest_align_train.sources import find_files, fingerprint, read_source


def write_csv(path, rows, delimiter=",", encoding="utf-8"):
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [
    {"image": "a.png", "caption": "first", "split": "train", "group": "g"},
    {"image": "b.png", "caption": "other", "split": "val", "group": ""},
    {"image": "a.png", "caption": " second\n one ", "split": "train", "group": "g"},
    {"image": "/elsewhere/c.png", "caption": "third", "split": "TEST", "group": "g"},
]


def check_rows(source, folder):
    assert [record.key for record in source.records] == ["a.png", "b.png", "/elsewhere/c.png"]
    assert [record.captions for record in source.records] == [("first", "second one"), ("other",), ("third",)]
    assert [record.split for record in source.records] == ["train", "validation", "test"]
    assert [record.group for record in source.records] == ["g", "b.png", "g"]
    assert [record.location for record in source.records] == [
        f"{folder}/a.png",
        f"{folder}/b.png",
        "/elsewhere/c.png",
    ]
    assert source.skipped == []
    assert source.split_rule == "as declared by the source"


def test_every_kind_of_table_says_the_same(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(sys.modules["pyarrow"].Table.from_pylist(ROWS), tmp_path / "t.parquet")
    (tmp_path / "t.json").write_text(json.dumps(ROWS))
    tables = [
        write_csv(tmp_path / "t.csv", ROWS),
        write_csv(tmp_path / "bom.csv", ROWS, encoding="utf-8-sig"),
        write_csv(tmp_path / "t.tsv", ROWS, "\t"),
        write_jsonl(tmp_path / "t.jsonl", ROWS),
        tmp_path / "t.parquet",
        tmp_path / "t.json",
    ]
    for table in tables:
        check_rows(read_source(table, group_column="group"), tmp_path)


def test_image_root(tmp_path):
    table = write_csv(tmp_path / "t.csv", ROWS)
    check_rows(read_source(table, image_root=tmp_path / "pictures", group_column="group"), tmp_path / "pictures")


def test_several_caption_columns_and_lists(tmp_path):
    rows = [{"File_Name": "a.png", "caption_0": "x", "caption_1": "y", "note": "z"}]
    table = write_csv(tmp_path / "t.csv", rows)
    assert read_source(table).records[0].captions == ("x", "y")
    assert read_source(table, caption_column="note").records[0].captions == ("z",)
    assert read_source(table, caption_column=("note", "caption_0")).records[0].captions == ("z", "x")
    assert read_source(table, image_column="note").records[0].key == "z"
    table = write_jsonl(tmp_path / "t.jsonl", [{"image": "a.png", "captions": ["x", "y"]}])
    assert read_source(table).records[0].captions == ("x", "y")


def test_empty_captions_are_reported(tmp_path):
    rows = [
        {"image": "a.png", "captions": ["x", " "]},
        {"image": "b.png", "captions": []},
        {"image": "c.png", "captions": None},
        {"image": "d.png", "captions": ""},
    ]
    source = read_source(write_jsonl(tmp_path / "t.jsonl", rows))
    assert [(record.key, record.captions) for record in source.records] == [("a.png", ("x",))]
    assert [str(one) for one in source.skipped] == [
        f"{tmp_path}/a.png: an empty caption",
        f"{tmp_path}/b.png: no caption",
        f"{tmp_path}/c.png: no caption",
        f"{tmp_path}/d.png: no caption",
    ]


def test_splits_by_hash_keep_groups_together_and_never_change(tmp_path):
    rows = [{"image": f"{n}.png", "caption": "x", "group": str(n // 2)} for n in range(4000)]
    source = read_source(write_jsonl(tmp_path / "t.jsonl", rows), group_column="group")
    split = {record.group: record.split for record in source.records}
    assert all(split[record.group] == record.split for record in source.records)
    counts = Counter(split.values())
    assert counts["train"] == pytest.approx(1600, abs=60)
    assert counts["validation"] == pytest.approx(200, abs=45)
    assert counts["test"] == pytest.approx(200, abs=45)
    assert [hash_split(name) for name in ("a", "cat", "dog", "house")] == ["train", "test", "train", "validation"]
    assert "80/10/10" in source.split_rule


def test_split_for_all(tmp_path):
    source = read_source(write_csv(tmp_path / "t.csv", ROWS), split="val")
    assert {record.split for record in source.records} == {"validation"}
    assert source.split_rule == "all in validation, as asked"


@pytest.mark.parametrize(
    ("rows", "options", "sentence"),
    [
        ([{"picture": "a", "caption": "x"}], {}, r"no image column .* one of: picture, caption"),
        ([{"image": "a", "words": "x"}], {}, r"no caption column .* one of: image, words"),
        ([{"image": "a", "caption": "x"}], {"image_column": "b"}, r"image_column must be one of .*'b'"),
        ([{"image": "a", "caption": "x"}], {"caption_column": "b"}, r"caption_column must be one of .*'b'"),
        ([{"image": "a", "caption": 3}], {}, r"line 1: no caption \(a caption must be a string or a list .* got int\)"),
        ([{"image": None, "caption": "x"}], {}, r"line 1: no path of an image \(image is NoneType\)"),
        ([{"image": "a", "caption": "x", "split": "holdout"}], {}, r"split must be train, .* got 'holdout'"),
        ([{"image": "a", "caption": "x"}], {"split": "all"}, r"split must be train, validation or test, got 'all'"),
        (
            [{"image": "a", "caption": "x", "split": "train"}, {"image": "b", "caption": "x"}],
            {},
            r"line 2 has no split, but other images have",
        ),
        (
            [{"image": "a", "caption": "x", "split": "train"}, {"image": "a", "caption": "y", "split": "test"}],
            {},
            r"line 2 has another split or group than .* line 1",
        ),
        ([{"image": "a", "caption": "x"}], {"group_column": "b"}, r"group_column must be one of .*'b'"),
        (
            [{"image": "a", "caption": "x", "group": ""}],
            {"group_column": "group"},
            r"group_column must name a column that has values, got 'group'",
        ),
        ([{"image": "a", "caption": ""}], {}, r"holds no image with a caption \(.*a: no caption\)"),
        ([], {}, r"must hold rows with named columns, got none"),
    ],
)
def test_a_table_that_cannot_be_understood(tmp_path, rows, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_source(write_jsonl(tmp_path / "t.jsonl", rows), **options)


def test_files_that_cannot_be_understood(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"source .*none\.csv does not exist"):
        read_source(tmp_path / "none.csv")
    with pytest.raises(FileNotFoundError, match=r"is a folder without .tar files, metadata\.csv, pictures"):
        read_source(tmp_path)
    with pytest.raises(ValueError, match=r"at least one file"):
        read_source([])
    (tmp_path / "t.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"source must be .tar, .csv, .*got .*t\.tar\.gz"):
        read_source(tmp_path / "t.tar.gz")
    (tmp_path / "t.csv").write_bytes("image,caption\na,gr\xfcn\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"t.csv must be UTF-8, got byte 0xfc"):
        read_source(tmp_path / "t.csv")
    (tmp_path / "t.json").write_text('{"annotations": []}')
    with pytest.raises(ValueError, match=r'must hold "images" with "id" and "file_name" and "annotations"'):
        read_source(tmp_path / "t.json")


def test_karpathy_splits(tmp_path):
    images = [
        {
            "filepath": "val2014",
            "filename": f"{split}.jpg",
            "split": split,
            "sentences": [{"raw": "A dog ."}, {"raw": "Dog"}],
        }
        for split in ("train", "restval", "val", "test")
    ]
    images.append({"filename": "flickr.jpg", "split": "test", "sentences": [{"raw": "x"}]})
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    source = read_source(path, image_root=tmp_path / "coco")
    assert [record.split for record in source.records] == ["train", "train", "validation", "test", "test"]
    assert source.records[0].captions == ("A dog .", "Dog")
    assert source.records[0].location == str(tmp_path / "coco/val2014/train.jpg")
    assert source.records[4].key == source.records[4].group == "flickr.jpg"
    del images[1]["split"]
    path.write_text(json.dumps({"images": images}))
    with pytest.raises(ValueError, match=r'image 1 must have "filename", "split" and "sentences"'):
        read_source(path)


def test_webdataset(tmp_path):
    write_tar(
        tmp_path / "one.tar",
        {
            "a.json": {"captions": ["x", "y"], "group": "g", "split": "train"},
            "folder/b.v1.JPG": b"jpg",
            "a.webp": b"webp",
            "a.txt": b"not this one",
            "folder/b.json": {"split": "test"},
            "folder/b.txt": b"first line\nsecond line\n",
            ".hidden.png": b"",
        },
    )
    write_tar(tmp_path / "two.tar", {"a.png": b"png", "a.json": {"caption": "z", "split": "val"}})
    source = read_source(tmp_path, group_column="group")
    assert [record.key for record in source.records] == ["one/a", "one/folder/b", "two/a"]
    assert [record.captions for record in source.records] == [
        ("x", "y"),
        ("first line", "second line"),
        ("z",),
    ]
    assert [record.split for record in source.records] == ["train", "test", "validation"]
    assert [record.group for record in source.records] == ["g", "one/folder/b", "two/a"]
    assert [record.location for record in source.records] == [
        f"{tmp_path}/one.tar::a.webp",
        f"{tmp_path}/one.tar::folder/b.v1.JPG",
        f"{tmp_path}/two.tar::a.png",
    ]
    assert [str(one).removeprefix(f"{tmp_path}/one.tar::") for one in source.skipped] == [
        ".hidden.png: a hidden file",
        "a.txt: other captions than the .json's, which count",
    ]
    assert read_source(str(tmp_path / "*.tar"), group_column="group") == source
    assert read_source([tmp_path / "one.tar", str(tmp_path / "two.tar")], group_column="group") == source


def test_webdataset_with_damage(tmp_path):
    path = write_tar(
        tmp_path / "t.tar",
        {
            "a.png": b"",
            "a.txt": b"x",
            "b.txt": b"no image",
            "c.png": b"",
            "d.png": b"",
            "d.json": b"{",
            "e.png": b"",
            "e.json": {"captions": 3},
        },
    )
    whole = read_source(path)
    assert [record.key for record in whole.records] == ["t/a"]
    assert "a caption must be a string or a list of strings, got int" in [one.detail for one in whole.skipped]
    path.write_bytes(path.read_bytes()[: 512 * 11 + 5])
    source = read_source(path)
    assert [record.key for record in source.records] == ["t/a"]
    reasons = {one.location.removeprefix(str(path)): one.reason for one in source.skipped}
    assert reasons.pop("") == "a damaged file"
    assert reasons.pop("::b") == "no image"
    assert reasons.pop("::c.png") == "no caption"
    assert reasons.pop("::d") == "no caption that can be read"
    assert reasons.pop("::e.png") == "no caption"
    assert reasons.pop("::e.json") == "a member that is cut"
    assert reasons == {}


def test_one_picture_in_three_spellings_is_one_image(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"a")
    (tmp_path / "linked").symlink_to(tmp_path / "pictures")
    paths = ["pictures/a.png", "./pictures/../pictures/a.png", str(tmp_path / "pictures" / "a.png"), "linked/a.png"]
    rows = [{"image": path, "caption": f"caption {number}"} for number, path in enumerate(paths)]
    (one,) = read_source(write_jsonl(tmp_path / "t.jsonl", rows)).records
    assert one.key == "pictures/a.png"
    assert one.captions == tuple(f"caption {number}" for number in range(4))
    rows = [{**row, "split": split} for row, split in zip(rows, ("train", "test"), strict=False)]
    with pytest.raises(ValueError, match=r"line 2 has another split or group than .* line 1 for the same image"):
        read_source(write_jsonl(tmp_path / "t.jsonl", rows))


def test_a_file_named_twice_is_read_once(tmp_path):
    tar = write_tar(tmp_path / "t.tar", {"a.png": b"a", "a.txt": b"x"})
    (tmp_path / "again.tar").symlink_to(tar)
    assert find_files([tar, f"{tmp_path}/../{tmp_path.name}/t.tar", tmp_path / "*.tar"]) == [tar]
    assert read_source([tar, tmp_path / "again.tar"]).records[0].captions == ("x",)


def test_equal_keys_in_different_shards_are_different_images(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "t.tar", {"a.png": folder.encode(), "a.txt": folder.encode(), "b.png": b""})
        write_csv(tmp_path / folder / "t.csv", [{"image": "c.png", "caption": folder}])
    source = read_source([tmp_path / "x", tmp_path / "y", tmp_path / "x/t.csv", tmp_path / "y/t.csv"])
    locations = [f"{tmp_path}/{end}" for end in ("x/t.tar::a.png", "y/t.tar::a.png", "x/c.png", "y/c.png")]
    assert [record.location for record in source.records] == locations
    assert [record.captions for record in source.records] == [("x",), ("y",), ("x",), ("y",)]
    keys = [location.removeprefix(f"{tmp_path}/") for location in locations]
    assert [record.key for record in source.records] == keys == [record.group for record in source.records]
    write_csv(tmp_path / "t.csv", [{"image": "d.png", "caption": "d"}, {"image": "x/c.png", "caption": "again"}])
    (tmp_path / "z").mkdir()
    write_csv(tmp_path / "z/t.csv", [{"image": "y/c.png", "caption": "another"}])
    tables = [tmp_path / name for name in ("x/t.csv", "y/t.csv", "z/t.csv", "t.csv")]
    source = read_source(tables)
    assert [record.key for record in source.records] == ["x/c.png", f"{tmp_path}/y/c.png", "y/c.png", "d.png"]
    assert source.records[0].captions == ("x", "again")


def test_a_column_named_group_is_used_only_when_asked_for(tmp_path):
    rows = [{"image": f"{n}.png", "caption": f"caption {n}", "Group": "half"} for n in range(40)]
    table = write_jsonl(tmp_path / "t.jsonl", rows)
    tar = write_tar(tmp_path / "t.tar", {"a.png": b"", "a.json": {"caption": "x", "group": "g", "kind": "k"}})
    for source, column in ((table, "Group"), (tar, "group")):
        found = read_source(source)
        assert [record.group for record in found.records] == [record.key for record in found.records]
        assert found.found == [
            f"the column {column!r} of {source} is not used: --group-column {column} would take it for groups"
        ]
    asked = read_source(table, group_column="Group")
    assert {record.group for record in asked.records} == {"half"}
    assert len({record.split for record in asked.records}) == 1
    assert asked.found == []
    assert read_source(tar, group_column="kind").records[0].group == "k"


def test_fingerprint(tmp_path):
    files = [tmp_path / "a", tmp_path / "b"]
    for path in files:
        path.write_bytes(b"same")
    first = fingerprint(files)
    assert fingerprint(files) == first
    assert fingerprint(files[:1]) != first
    files[1].write_bytes(b"SAME")
    assert fingerprint(files) != first
