"""Search on drawn pairs whose latents already agree, with an identity in the adapters' place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from train_data import write_store

from modest_align_train import search as search_module
from modest_align_train.adapters import Checkpoint
from modest_align_train.latents import Record, load_latents
from modest_align_train.search import format_hits, nearest_captions, search
from modest_align_train.settings import Settings

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")


def write_pairs(directory: Path, images: int = 6, splits: tuple[str, ...] = ("test",)) -> Path:
    """Images of one colour with two captions each; caption latents are the image's, slightly turned."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(images, 16, generator=generator)
    records = []
    for row in range(images):
        location = directory / f"{row}.png"
        Image.new("RGB", (24, 24), COLOURS[row % len(COLOURS)]).save(location)
        captions = (f"{COLOURS[row % len(COLOURS)]} square {row}", "a square")
        records.append(Record(f"key-{row}", captions, splits[row % len(splits)], f"key-{row}", str(location)))
    text = image.repeat_interleave(2, dim=0)
    text = text + 0.1 * torch.randn(text.shape, generator=generator)
    text[1::2] = torch.randn(16, generator=generator)  # the caption that all share
    return write_store(directory, [(image, text, records)], "drawn-image", "drawn-text")


class Identity:
    def embed_images(self, latents):
        return F.normalize(latents, dim=-1)

    embed_texts = embed_images


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run directory whose encoders look the latents up again."""
    store = load_latents(write_pairs(tmp_path / "latents", splits=("test", "train")))
    run = tmp_path / "run"
    run.mkdir()
    settings = Settings(latents=tmp_path / "latents", output=run)
    (run / "settings.toml").write_text(settings.to_toml(), encoding="utf-8")

    def image_encoder(name):
        assert name == "drawn-image"
        colours = {Image.open(r.location).getpixel((0, 0)): row for row, r in enumerate(store.records)}
        return lambda images: torch.stack([store.image[colours[i.getpixel((0, 0))]] for i in images])

    def text_encoder(name):
        assert name == "drawn-text"
        texts = [caption for record in store.records for caption in record.captions]
        return lambda captions: torch.stack([store.text[texts.index(c)] for c in captions])

    checkpoint = Checkpoint(run, Identity(), "", store.fingerprint)
    monkeypatch.setattr(search_module, "load_checkpoint", lambda run: checkpoint)
    monkeypatch.setattr(search_module, "load_image_encoder", image_encoder)
    monkeypatch.setattr(search_module, "load_text_encoder", text_encoder)
    return run


def test_text_finds_its_image(run):
    hits = search(run, "blue square 2", top=3)
    assert [hit.rank for hit in hits] == [1, 2, 3]
    assert hits[0].key == "key-2"
    assert hits[0].captions == ("blue square 2", "a square")
    assert hits[0].score > 0.9 > hits[1].score >= hits[2].score


def test_image_finds_its_caption_and_equal_captions_are_listed_once(run):
    hits = search(run, str(run.parent / "latents" / "3.png"), top=10)
    assert hits[0].captions == ("yellow square 3",)
    assert hits[0].key == "key-3"
    assert len(hits) == 7
    assert len({hit.captions for hit in hits}) == 7
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_nearest_captions_look_past_many_equal_ones():
    scores = torch.ones(100)
    scores[-1] = 0
    _, rows = nearest_captions(scores, ["same"] * 99 + ["other"], 2)
    assert rows[1] == 99
    assert len(rows) == 2


def test_latents_on_disk_are_searched_too(run, monkeypatch):
    wanted = search(run, "blue square 2", split="train")
    monkeypatch.setattr("modest_align_train.latents.IN_MEMORY", 0)
    monkeypatch.setattr("modest_align_train.search.CHUNK", 2)
    assert [hit.key for hit in search(run, "blue square 2", split="train")] == [hit.key for hit in wanted]


def test_split_and_top_bound_what_is_found(run):
    hits = search(run, "blue square 2", split="train", top=100)
    assert {hit.key for hit in hits} == {"key-1", "key-3", "key-5"}
    with pytest.raises(ValueError, match=r"split must be .* got 'validation'"):
        search(run, "blue square 2", split="validation")


def test_other_latents_can_be_searched(run, tmp_path):
    other = write_pairs(tmp_path / "other", images=2)
    assert len(search(run, "blue square 2", latents=other)) == 2


@pytest.mark.parametrize(
    ("query", "keywords", "error", "sentence"),
    [
        (" ", {}, ValueError, "query must be a text or the path of an image"),
        ("a square", {"top": 0}, ValueError, "top must be at least 1, got 0"),
        ("a square", {"output": "hits.gif"}, ValueError, "output must end in .png, .pdf, .svg, got hits.gif"),
        ("nowhere/dog.png", {}, FileNotFoundError, "looks like the path of an image, but there is no such"),
    ],
)
def test_bad_input_gets_one_sentence(run, query, keywords, error, sentence):
    with pytest.raises(error) as caught:
        search(run, query, **keywords)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("content", [b"not a picture", b"\x89PNG\r\n\x1a\n", b""])
def test_unreadable_image_gets_one_sentence(run, tmp_path, content):
    for name in ("broken.png", "no_suffix"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is not an image that can be read: [^\n]*$"):
            search(run, str(tmp_path / name))


def test_an_image_is_told_by_its_content(run, tmp_path):
    query = tmp_path / "picture"
    query.write_bytes((run.parent / "latents" / "3.png").read_bytes())
    assert search(run, str(query))[0].captions == ("yellow square 3",)
    assert len(search(run, "blue square 2", top=1)) == 1


def test_an_untrained_run_gets_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no best\.safetensors"):
        search(tmp_path, "a square")


def test_table_has_a_line_a_hit_and_keeps_its_width(run):
    lines = format_hits(search(run, "blue square 2", top=4), width=60).splitlines()
    assert len(lines) == 5
    assert "key-2" in lines[1]
    assert "blue square 2" in lines[1]
    assert max(map(len, lines)) <= 60


def test_sheet_is_a_picture_even_where_images_are_gone(run, tmp_path):
    (run.parent / "latents" / "4.png").unlink()
    sheet = tmp_path / "hits.png"
    search(run, "blue square 2", top=6, output=sheet)
    picture = Image.open(sheet).convert("RGB")
    assert (0, 0, 255) in {colour for _, colour in picture.getcolors(maxcolors=2**24)}
    assert [path.name for path in tmp_path.glob("*.tmp")] == []
