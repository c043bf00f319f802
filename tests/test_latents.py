from __future__ import annotations

import contextlib
import hashlib
import io
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save
from train_data import write_store, write_tar

from modest_align_train import latents as module
from modest_align_train.files import atomic_path, write_json
from modest_align_train.latents import (
    MANIFEST,
    PARTIAL_MANIFEST,
    SPLITS,
    Latents,
    Record,
    load_latents,
    open_image,
    tar_index,
)
from modest_align_train.rows import Rows


def record(key, split="train", group=None, captions=("a caption",)):
    return Record(key, tuple(captions), split, group or key, f"{key}.png")


def store(directory, shards):
    """Write shards of (records) with random latents; return the whole tensors."""
    images = [torch.randn(len(records), 4) for records in shards]
    texts = [torch.randn(sum(len(one.captions) for one in records), 3) for records in shards]
    write_store(directory, zip(images, texts, shards, strict=True), "eyes", "ears")
    return torch.cat(images), torch.cat(texts)


@pytest.fixture
def stored(tmp_path):
    shards = [
        [
            record("a", captions=["one", "line\u2028separator"]),
            record("b", "test", "g"),
            record("c", "validation"),
        ],
        [record("d", "train", "g", ["x", "y", "z"]), record("e", "test")],
    ]
    return tmp_path / "latents", shards, *store(tmp_path / "latents", shards)


def test_what_was_written_is_read(stored):
    directory, shards, image, text = stored
    latents = load_latents(directory)
    assert torch.equal(latents.image, image)
    assert torch.equal(latents.text, text)
    assert latents.caption_image.tolist() == [0, 0, 1, 2, 3, 3, 3, 4]
    assert latents.group.tolist() == [0, 1, 2, 1, 3]
    assert latents.records == shards[0] + shards[1]
    assert (latents.image_encoder, latents.text_encoder) == ("eyes", "ears")


def test_subset_keeps_each_caption_with_its_image(stored):
    latents = load_latents(stored[0])
    part = latents.subset("test")
    assert [one.key for one in part.records] == ["b", "e"]
    assert torch.equal(part.image, latents.image[[1, 4]])
    assert torch.equal(part.text, latents.text[[2, 7]])
    assert part.caption_image.tolist() == [0, 1]
    assert part.group.tolist() == [0, 1]
    train = latents.subset("train")
    assert train.caption_image.tolist() == [0, 0, 1, 1, 1]
    assert torch.equal(train.text, latents.text[[0, 1, 4, 5, 6]])
    assert isinstance(train.to("cpu"), Latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_stays_on_disk_is_what_would_be_in_memory(tmp_path, monkeypatch, dtype):
    shards = [[record(f"{shard} {row}", SPLITS[(row + shard) % 3]) for row in range(30)] for shard in range(3)]
    images, texts = ([torch.randn(30, n).to(dtype) for _ in shards] for n in (5, 3))
    write_store(tmp_path, zip(images, texts, shards, strict=True))
    in_memory = load_latents(tmp_path)
    assert in_memory.image.dtype == torch.float32
    assert torch.equal(in_memory.image, torch.cat(images).float())
    monkeypatch.setattr(module, "IN_MEMORY", 4 * 90 * (5 + 3) - 1)
    on_disk = load_latents(tmp_path)
    for latents, other in ((in_memory, on_disk), *((in_memory.subset(s), on_disk.subset(s)) for s in SPLITS)):
        for wanted, rows in ((latents.image, other.image), (latents.text, other.text)):
            assert isinstance(rows, Rows)
            assert (len(rows), rows.shape) == (len(wanted), wanted.shape)
            order = torch.randperm(len(rows)).repeat(2)
            assert torch.equal(rows[order].to("cpu"), wanted[order])
            assert torch.equal(rows[5:8].to("cpu"), wanted[5:8])
            assert torch.equal(torch.cat([part.to("cpu") for part in rows.split(7)]), wanted)
            assert rows[:0].to("cpu").shape == (0, wanted.shape[1])
        assert other.to("cpu").records == latents.records
        assert torch.equal(other.caption_image, latents.caption_image)
    assert on_disk.subset("test").image.files is on_disk.image.files


def test_a_shard_that_is_cut_while_it_is_in_use(stored, monkeypatch):
    monkeypatch.setattr(module, "IN_MEMORY", 0)
    latents = load_latents(stored[0])
    path = stored[0] / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is damaged: it was cut while it was in use"):
        latents.text.to("cpu")
    path.unlink()
    with pytest.raises(FileNotFoundError) as error:
        latents.text.to("cpu")
    assert error.value.filename == str(path)


def test_subset_says_which_splits_there_are(tmp_path):
    store(tmp_path / "latents", [[record("a")]])
    with pytest.raises(ValueError, match=r"split must be one that has images \(train 1, validation 0, test 0\)"):
        load_latents(tmp_path / "latents").subset("dev")


def test_missing_latents(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no latents \(manifest.json is missing\): run extract"):
        load_latents(tmp_path)
    write_json(tmp_path / PARTIAL_MANIFEST, {})
    with pytest.raises(FileNotFoundError, match=r"holds an unfinished extraction"):
        load_latents(tmp_path)


def test_damage_is_noticed(stored):
    directory = stored[0]
    path = directory / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is damaged"):
        load_latents(directory)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00001.safetensors is missing"):
        load_latents(directory)


@pytest.mark.parametrize("name", ["../out/shard-00000", "/out/shard-00000", "shard-00000/../../x", "shard-1", ""])
def test_a_manifest_that_points_outside_its_folder(stored, name):
    directory = stored[0]
    path = directory / MANIFEST
    manifest = json.loads(path.read_text())
    shard = manifest["shards"][0]
    # The file would be there, and be the one that was written.
    shard["sha256"] = {file.replace(shard["name"], name): digest for file, digest in shard["sha256"].items()}
    for named in (name, shard["name"]):
        shard["name"] = named
        path.write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=r"the manifest in .* must name files of that folder like .*, got '"):
            load_latents(directory)


DAMAGES = [
    (lambda manifest: [manifest], "has format version None, wanted 2"),
    (lambda manifest: {**manifest, "shards": None}, r"is damaged \(shards: Input should be a valid list\): delete"),
    (lambda manifest: {**manifest, "shards": [{}]}, r"is damaged \(shards\.0\.name: Field required\)"),
    (lambda manifest: {**manifest, "text_dim": -1}, r"is damaged \(text_dim: Input should be greater than or equal"),
    (lambda manifest: {**manifest, "image_dim": 10**12}, "has other numbers than its shards"),
    (lambda manifest: {**manifest, "images": 10**12}, "has other numbers than its shards"),
    (lambda manifest: {**manifest, "image_dim": 2}, "has other numbers than its shards"),
]


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES)
def test_a_damaged_manifest(stored, damage, sentence):
    path = stored[0] / MANIFEST
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=sentence):
        load_latents(stored[0])


@pytest.mark.parametrize(
    "content",
    [
        {"shard-00000.jsonl": b""},
        {"shard-00000.jsonl": b"[]\n"},
        {"shard-00000.safetensors": bytes(100)},
        {"shard-00000.safetensors": save({"image": torch.ones(()), "text": torch.ones(())})},
    ],
    ids=["no records", "other records", "no tensors", "other tensors"],
)
def test_a_shard_that_is_whole_but_none(stored, content):
    path = stored[0] / MANIFEST
    manifest = json.loads(path.read_text())
    for name, data in content.items():
        (stored[0] / name).write_bytes(data)
        manifest["shards"][0]["sha256"][name] = hashlib.sha256(data).hexdigest()
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors and \.jsonl are no shard: extract again"):
        load_latents(stored[0])


def test_another_format_version(stored):
    path = stored[0] / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    with pytest.raises(ValueError, match=r"format version 99, wanted 2"):
        load_latents(stored[0])


def test_atomic_path_leaves_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_open_image_from_file_and_tar(tmp_path):
    red = png(Image.new("RGB", (3, 2), "red"))
    (tmp_path / "red.png").write_bytes(red)
    write_tar(tmp_path / "pairs.tar", {"first.txt": b"hello", "folder/red.png": red})
    for location in (tmp_path / "red.png", f"{tmp_path}/pairs.tar::folder/red.png"):
        image = open_image(str(location))
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (3, 2), (255, 0, 0))
    with pytest.raises(FileNotFoundError, match=r"pairs.tar has no member 'blue.png'"):
        open_image(f"{tmp_path}/pairs.tar::blue.png")
    with pytest.raises(FileNotFoundError, match=r"none.png does not exist"):
        open_image(f"{tmp_path}/none.png")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(tmp_path, mode):
    if mode == "P":
        image = Image.new("P", (2, 1), 0)
        image.putpalette([0, 0, 0, 9, 9, 9])
        image.info["transparency"] = 0
    else:
        image = Image.new(mode, (2, 1), (0,) * len(mode))
    image.putpixel((1, 0), {"RGBA": (9, 9, 9, 255), "LA": (9, 255), "P": 1}[mode])
    image.save(tmp_path / "image.png")
    opened = open_image(str(tmp_path / "image.png"))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (9, 9, 9)]


def test_truncated_image_is_an_error(tmp_path):
    noise = Image.frombytes("RGB", (64, 64), bytes(torch.randint(256, (64 * 64 * 3,)).tolist()))
    (tmp_path / "cut.png").write_bytes(png(noise)[:4000])
    with pytest.raises(OSError, match=r"truncated"):
        open_image(str(tmp_path / "cut.png"))


def test_tar_index_of_damaged_archives(tmp_path):
    members = {f"{number}.txt": bytes(2000) for number in range(4)}
    write_tar(tmp_path / "whole.tar", members)
    assert tar_index(tmp_path / "whole.tar").error is None
    assert list(tar_index(tmp_path / "whole.tar").members) == list(members)
    (tmp_path / "cut.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:6000])
    index = tar_index(tmp_path / "cut.tar")
    assert list(index.members) == ["0.txt", "1.txt"]
    assert index.error is not None
    (tmp_path / "none.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match=r"none.tar is not an uncompressed tar"):
        tar_index(tmp_path / "none.tar")


@pytest.mark.parametrize("size", [-512, -1024, -(2**60), 2**62])
def test_a_tar_that_leads_before_its_start_or_behind_its_end(tmp_path, size):
    """Found by tests/fuzz: an error of the system came from nowhere, or tarfile read the same member for ever."""
    path = write_tar(tmp_path / "t.tar", {"a.txt": b"one", "b.txt": b"two"})
    content = path.read_bytes()
    header = bytearray(content[1024:1536])
    header[124:136] = bytes([0x80 if size > 0 else 0xFF]) + (size % 2**88).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(content[:1024] + header + content[1536:])
    index = tar_index(path)
    assert list(index.members) == ["a.txt"]
    assert index.left_out == [("b.txt", "a member that is cut")] * (size > 0)
    assert index.error is not None
    path.write_bytes(header + content[512:])
    with contextlib.suppress(ValueError):
        assert tar_index(path).members == {}
