"""Zero-shot classification of small pictures by a run whose encoders look their latents up."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from train_data import IMAGE_DIM, TEXT_DIM, small_settings

from modest_align_train import zero_shot as module
from modest_align_train.adapters import load_checkpoint
from modest_align_train.cli import main
from modest_align_train.encoders import ImageEncoder, TextEncoder
from modest_align_train.latents import load_latents
from modest_align_train.train import train
from modest_align_train.zero_shot import (
    chance_accuracy,
    class_prototypes,
    class_ranks,
    read_class_folders,
    top_accuracy,
    zero_shot,
)

CPU = torch.device("cpu")
# Rows of the test split; a class has one to three pictures.
CLASSES = {row: 1 + number % 3 for number, row in enumerate(range(4, 104, 10))}


class Identity:
    def embed_texts(self, latents):
        return F.normalize(latents, dim=-1)


class Encoders:
    """A text is looked up by its words, a picture by its colour: its row, and how much of the next row is mixed in."""

    def __init__(self, latents):
        self.latents, self.asked = load_latents(latents), []

    def load_images(self, name, device):
        pixels = lambda image: torch.tensor(image.getpixel((0, 0)))[:, None, None]  # noqa: E731
        return ImageEncoder(name, IMAGE_DIM, CPU, 2, pixels, self.images, nullcontext())

    def images(self, pixels):
        row, blur, _ = pixels.flatten(1).T
        return self.latents.image[row] + blur[:, None] * self.latents.image[row + 1]

    def load_texts(self, name, device):
        return TextEncoder(name, TEXT_DIM, CPU, 2, True, self.texts)

    def texts(self, texts):
        self.asked += texts
        said = self.latents.captions
        return torch.stack(
            [self.latents.text[said.index(text)] if text in said else torch.ones(TEXT_DIM) for text in texts]
        )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(small_settings(tmp_path_factory.mktemp("zero_shot"), steps=150), progress=False)


@pytest.fixture
def encoders(trained, monkeypatch):
    encoders = Encoders(trained.parent / "latents")
    monkeypatch.setattr(module, "load_image_encoder", encoders.load_images)
    monkeypatch.setattr(module, "load_text_encoder", encoders.load_texts)
    return encoders


@pytest.fixture
def run(trained, encoders):
    return trained


@pytest.fixture
def pictures(tmp_path):
    """A folder of one folder a class; third pictures lie deeper."""
    folder = tmp_path / "pictures"
    for row, count in CLASSES.items():
        for number in range(count):
            path = folder / str(row) / ("deeper" if number == 2 else "") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (1, 1), (row, number, 0)).save(path)
    return folder


def contents(run):
    return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


def test_a_prototype_is_the_normalised_mean_of_normalised_embeddings():
    prompts = torch.tensor([[[10.0, 0.0], [0.0, 1.0]], [[-2.0, 0.0], [-3.0, 0.0]]])
    half = math.sqrt(0.5)
    assert class_prototypes(Identity(), prompts).flatten().tolist() == pytest.approx([half, half, -1, 0])


def test_ranks_and_accuracies_by_hand():
    images = F.normalize(torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 1.0, 0.0]]), dim=1)
    ranks = class_ranks(images, torch.eye(3), torch.tensor([0, 1, 2, 0]))
    # Of equal cosines the wrong one counts first.
    assert ranks.tolist() == [1, 2, 3, 2]
    found = top_accuracy([ranks, torch.tensor([1, 1, 1, 2])], torch.arange(4), (1, 2), bootstrap=200)
    assert found["top-1"]["value"] == 50
    assert found["top-2"]["value"] == 87.5
    assert 0 < found["top-1"]["low"] < 50 < found["top-1"]["high"] < 100
    assert chance_accuracy(8, (1, 2, 10)) == {"top-1": 12.5, "top-2": 25, "top-10": 100}


def test_the_mean_per_class_is_that_of_the_bootstrap_over_pictures():
    label = torch.arange(2).repeat_interleave(torch.tensor([400, 100]))
    ranks = torch.where(torch.arange(500) % 2 == 0, 1, 2)
    ranks[400:450] = 1  # half of the first class is right, three quarters of the second
    found = module._mean_per_class(ranks, label, 2000)
    assert found["value"] == pytest.approx(62.5)
    # The standard error of the mean of two independent shares.
    half_width = 1.96 * 100 * math.sqrt(0.25 / 400 + 0.1875 / 100) / 2
    assert found["low"] == pytest.approx(62.5 - half_width, abs=0.5)
    assert found["high"] == pytest.approx(62.5 + half_width, abs=0.5)


def test_small_classes_do_not_move_the_interval_of_the_mean_per_class():
    # Classes of one picture, which replicates often lack, are wrong, those of three are right.
    label = torch.arange(200).repeat_interleave(torch.tensor([1, 3]).repeat(100))
    ranks = 2 - label % 2
    found = module._mean_per_class(ranks, label, 500)
    assert found["value"] == 50
    assert (found["low"] + found["high"]) / 2 == pytest.approx(50, abs=0.5)
    assert found["low"] < 49 < 51 < found["high"]
    assert module._mean_per_class(torch.where(label == 1, 2, 1), label, 500)["high"] == 100


def test_a_folder_is_classified_with_the_run_as_it_is(run, encoders, pictures, capsys):
    (pictures / "4" / "broken.png").write_bytes(b"no picture")
    (pictures / "4" / "notes.md").write_text("four")
    (pictures / "4" / ".ipynb_checkpoints").mkdir()
    (pictures / "4" / ".ipynb_checkpoints" / "0.png").write_bytes(b"hidden")
    before = contents(run)
    words = ["--template", "caption {} a", "caption {} b", "--top", "1", "3"]
    assert main(["zero-shot", str(run), str(pictures), *words]) == 0
    printed = capsys.readouterr().out
    result = json.loads((run / "zero-shot-pictures.json").read_text())
    assert {name: content for name, content in contents(run).items() if "zero-shot" not in name} == before

    checkpoint = load_checkpoint(run)
    assert result["checkpoint"] == checkpoint.digest
    assert (result["image_encoder"], result["text_encoder"]) == ("seeded", "seeded")
    # Folders come in the order of their names, 14 before 4.
    rows = sorted(CLASSES, key=str)
    pixels = torch.tensor([[row, number, 0] for row in rows for number in range(CLASSES[row])])[:, :, None, None]
    label = torch.arange(len(rows)).repeat_interleave(torch.tensor([CLASSES[row] for row in rows]))
    images = checkpoint.aligner.embed_images(encoders.images(pixels))
    texts = [
        checkpoint.aligner.embed_texts(encoders.texts([f"caption {row} {which}" for row in rows])) for which in "ab"
    ]
    nearest = (images @ F.normalize(texts[0] + texts[1], dim=1).T).argsort(1, descending=True)
    right = nearest == label[:, None]
    by_class = [right[label == number, 0].double().mean().item() for number in range(len(rows))]
    accuracy = {name: one["value"] for name, one in result["accuracy"].items()}
    assert accuracy["top-1"] == pytest.approx(100 * right[:, 0].double().mean().item())
    assert accuracy["top-3"] == pytest.approx(100 * right[:, :3].any(1).double().mean().item())
    assert accuracy["mean_per_class"] == pytest.approx(100 * sum(by_class) / len(rows))
    assert 10 < accuracy["top-1"] < accuracy["top-3"] < 100
    assert accuracy["mean_per_class"] != accuracy["top-1"]
    assert all(one["low"] < one["value"] < one["high"] for one in result["accuracy"].values())
    assert result["per_class"] == {
        str(row): {"images": CLASSES[row], "top-1": pytest.approx(100 * share)}
        for row, share in zip(rows, by_class, strict=True)
    }
    assert result["chance"] == pytest.approx({"top-1": 10, "top-3": 30, "mean_per_class": 10})

    assert result["skipped_by_reason"] == {"no picture by its name": 1, "not an image": 1}
    assert "all listed in zero-shot-pictures.json" in printed
    table = printed.splitlines()
    assert table[-4].endswith(f"{len(label)} images, 10 classes, 2 templates; in brackets 95% intervals")
    assert table[-2].split()[:2] == ["accuracy", f"{accuracy['top-1']:.1f}"]
    assert table[-1].split() == ["chance", "10.00", "30.00", "10.00"]


@pytest.fixture
def colours(tmp_path):
    for name in ("red", "dark_red", "light-blue"):
        (tmp_path / "colours" / name).mkdir(parents=True)
        Image.new("RGB", (1, 1), (4, 0, 0)).save(tmp_path / "colours" / name / "0.png")
    return tmp_path / "colours"


def test_classes_are_called_as_their_folders_or_as_a_file_says(run, encoders, colours, tmp_path):
    zero_shot(run, colours, bootstrap=1, progress=False)
    assert encoders.asked == [f"a photo of a {name}." for name in ("dark red", "light blue", "red")]
    names = {"red": "rouge", "dark_red": "bordeaux", "light-blue": "bleu-clair", "green": "vert"}
    (tmp_path / "names.json").write_text(json.dumps(names))
    assert read_class_folders(colours, tmp_path / "names.json").names == ["bordeaux", "bleu-clair", "rouge"]


def test_a_folder_called_as_a_split_is_told_from_others(run, colours):
    colours = colours.rename(colours.with_name("val"))
    before = contents(run)
    zero_shot(run, colours, bootstrap=1, progress=False)
    assert set(contents(run)) - set(before) == {f"zero-shot-{colours.parent.name}-val.json"}


def test_a_class_whose_pictures_cannot_be_read_stays_a_candidate(run, colours):
    (colours / "red" / "0.png").write_bytes(b"")
    result = zero_shot(run, colours, bootstrap=50, progress=False)
    assert (result["classes"], result["images"]) == (3, 2)
    assert result["per_class"]["red"] == {"images": 0, "top-1": None}
    others = [one["top-1"] for one in result["per_class"].values() if one["images"]]
    assert result["accuracy"]["mean_per_class"]["value"] == sum(others) / 2
    for path in colours.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"has 3 pictures, none of which could be read, the first being .*: not an image"
    ):
        zero_shot(run, colours, progress=False)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("colours", "--template", "a square"), "--template must be texts with {} in the place of a class's name"),
        (("colours", "--top", "0"), "--top must be numbers of at least 1, got 0"),
        (("colours", "--bootstrap", "0"), "--bootstrap must be at least 1, got 0"),
        (("nowhere",), "@/nowhere must be a folder that holds one folder a class, but there is none"),
        (("colours/red",), "@/colours/red must hold one folder a class, and at least two of them, got 0"),
        (
            ("splits",),
            "@/splits must hold one folder a class, got splits (train, val): name one of these, @/splits/val",
        ),
        (("empty",), "@/empty/b must hold pictures of its class, got none and 1 other files"),
        (("same",), "got 'light blue' for the folders light-blue and light_blue: tell them apart by --names"),
        (("colours", "--names", "@/list.json"), "--names must be a JSON file of"),
        (
            ("colours", "--names", "@/some.json"),
            "--names must give each folder's class as a text, got None for dark_red",
        ),
        (("colours", "--names", "@/none.json"), "@/none.json: No such file or directory"),
    ],
)
def test_what_cannot_be_classified_is_one_sentence(words, sentence, colours, tmp_path, capsys):
    for path in ("splits/train/a/0.png", "splits/val/a/0.png", "empty/a/0.png", "empty/b/0.txt",
                 "same/light-blue/0.png", "same/light_blue/0.png"):  # fmt: skip
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(b"")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "some.json").write_text('{"red": "rouge"}')
    folder, *flags = (word.replace("@", str(tmp_path)) for word in words)
    assert main(["zero-shot", str(tmp_path / "run"), str(tmp_path / folder), *flags]) == 2
    error = capsys.readouterr().err
    assert sentence.replace("@", str(tmp_path)) in error
    assert error.count("\n") == 1
