"""What makes images and captions equal, and what a split keeps together."""

from __future__ import annotations

from collections import Counter

import pytest
from train_data import write_tar

from modest_align_train.answers import caption_key
from modest_align_train.identity import equal_files, image_file, settle
from modest_align_train.latents import Record


def records(captions, split="", contents=None, folder=None):
    """A record for each tuple of captions; ``contents`` are written to its files."""
    found = []
    for number, texts in enumerate(captions):
        location = f"{folder}/{number}.png"
        if contents is not None:
            (folder / f"{number}.png").write_bytes(contents[number])
        found.append(Record(f"{number}.png", texts, split, f"{number}.png", location))
    return found


def splits_by(records, key):
    """The splits in which each key of a record occurs."""
    found = {}
    for record in records:
        for one in key(record):
            found.setdefault(one, set()).add(record.split)
    return found


def test_a_file_has_one_name(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for end in ("a.png", "a.tar::b/c.png"):
        spellings = {f"{tmp_path}/{way}{end}" for way in ("real/", "link/", "real/../link/./")}
        assert {image_file(spelling) for spelling in spellings} == {f"{tmp_path}/real/{end}"}
    assert image_file("a.tar::b.png") != image_file("a.tar::./b.png")


def test_equal_files_are_found_in_folders_and_archives(tmp_path):
    (tmp_path / "a.png").write_bytes(b"same")
    (tmp_path / "b.png").write_bytes(b"size")
    tar = write_tar(tmp_path / "t.tar", {"c.png": b"same", "d.png": b"longer", "e.png": b"longer"})
    names = ("a.png", "gone.png", "b.png", "t.tar::c.png", "t.tar::d.png", "t.tar::gone.png", "t.tar::e.png")
    locations = [f"{tmp_path}/{name}" for name in names]
    assert equal_files(locations) == [[0, 3], [4, 6]]
    tar.unlink()
    assert equal_files(locations) == []


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [("A dog", "a  DOG ", True), ("caf\u00e9", "cafe\u0301", True), ("a dog", "a dog.", False), ("a", "b", False)],
)
def test_captions_that_say_the_same(a, b, equal):
    assert (caption_key(a) == caption_key(b)) == equal


def test_the_default_split_keeps_equal_images_on_one_side_and_says_so(tmp_path):
    contents = [b"picture %d" % (number // 3) for number in range(300)]
    settled, found = settle(records([(f"caption {n}",) for n in range(300)], "", contents, tmp_path))
    by_content = splits_by(settled, lambda record: [contents[int(record.key[:-4])]])
    assert all(len(splits) == 1 for splits in by_content.values())
    assert len(Counter(record.split for record in settled)) == 3
    assert [record.group for record in settled[:7]] == [f"{n}.png" for n in (0, 0, 0, 3, 3, 3, 6)]
    assert found == [
        f"300 images are equal byte for byte to another one, e.g. {tmp_path}/0.png and {tmp_path}/1.png: "
        "100 groups of equal images"
    ]


def test_the_default_split_keeps_equal_captions_on_one_side_and_says_so():
    captions = [(f"Caption {n // 4}", f"own {n}") if n % 2 else (f"caption  {n // 4}",) for n in range(200)]
    settled, found = settle(records(captions))
    assert all(len(splits) == 1 for splits in splits_by(settled, lambda r: map(caption_key, r.captions)).values())
    assert len(Counter(record.split for record in settled)) == 3
    assert len({record.group for record in settled}) == 200
    assert found == ["50 captions that several images share were kept in one split each"]


def test_a_caption_of_many_images_ties_nothing_and_is_said():
    settled, found = settle(records([("a photo", f"pair {n // 2}") for n in range(400)]))
    counts = Counter(record.split for record in settled)
    assert counts["train"] == pytest.approx(320, abs=30)
    by_pair = splits_by(settled, lambda record: record.captions[1:])
    assert all(len(splits) == 1 for splits in by_pair.values())
    assert found == [
        "200 captions that several images share were kept in one split each",
        *(
            f"{split} shares 0 of its {counts[split]} images and {counts[split]} of its {2 * counts[split]} captions "
            "with train"
            for split in ("validation", "test")
        ),
    ]


def test_the_default_split_depends_on_no_order():
    captions = [(f"caption {n // 3}",) for n in range(60)]
    forward, _ = settle(records(captions))
    backward, _ = settle(records(captions)[::-1])
    assert forward == backward[::-1]


def test_declared_splits_stay_and_what_they_share_is_said(tmp_path):
    contents = [b"twice", b"other", b"twice", b"third"]
    train = records([("a dog",), ("a cat",)], "train", contents[:2], tmp_path)
    test = [
        Record("2.png", ("A dog", "a hound"), "test", "2.png", f"{tmp_path}/2.png"),
        Record("3.png", ("a fish",), "test", "3.png", f"{tmp_path}/3.png"),
    ]
    for number in (2, 3):
        (tmp_path / f"{number}.png").write_bytes(contents[number])
    settled, found = settle(train + test)
    assert [record.split for record in settled] == ["train", "train", "test", "test"]
    assert [record.group for record in settled] == ["0.png", "1.png", "0.png", "3.png"]
    assert found[1:] == ["test shares 1 of its 2 images and 1 of its 3 captions with train"]
