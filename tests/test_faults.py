"""Disks that are full, files that are damaged, words that make no sense: one sentence each, and nothing lost."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from train_data import trained_run

from modest_align_train import extract as extract_module
from modest_align_train import search as search_module
from modest_align_train import train as train_module
from modest_align_train import tune as tune_module
from modest_align_train.checkpoints import PREVIOUS
from modest_align_train.cli import main
from modest_align_train.encoders import ImageEncoder, TextEncoder
from modest_align_train.files import folder_of_its_own

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return trained_run(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def run(trained, tmp_path):
    """A trained run of its own, with its latents, and encoders of their sizes."""
    shutil.copytree(trained.parent, tmp_path, dirs_exist_ok=True)
    settings = tmp_path / "run" / "settings.toml"
    settings.write_text(settings.read_text().replace(str(trained.parent), str(tmp_path)))
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def encoders(monkeypatch):
    def load_images(name, device="cpu"):
        return ImageEncoder(name, 24, CPU, 2, lambda image: torch.ones(24), lambda x: x, contextlib.nullcontext())

    def load_texts(name, device="cpu"):
        return TextEncoder(name, 16, CPU, 3, True, lambda captions: torch.ones(len(captions), 16))

    for module in (extract_module, search_module):
        monkeypatch.setattr(module, "load_image_encoder", load_images)
        monkeypatch.setattr(module, "load_text_encoder", load_texts)


def pairs(folder, count=40):
    rows = ["image,caption"]
    for number in range(count):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / f"{number}.png")
        rows.append(f"{number}.png,caption number {number}")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    return folder / "pairs.csv"


def sentence(capsys, *words):
    """What a command that fails says: one line on stderr, and no traceback anywhere."""
    capsys.readouterr()
    try:
        code = main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert code == 2, printed
    assert "Traceback" not in printed.out + printed.err
    lines = [line for line in printed.err.splitlines() if line.startswith("modest-align: ")]
    assert len(lines) == 1, printed.err
    return lines[0].removeprefix("modest-align: ")


def stored(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts}


@contextlib.contextmanager
def full_disk(free=1000):
    """Let no file grow past a size, as a disk does that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def evaluated(run):
    """Another run of the same, so that a report compares the two; both evaluated."""
    other = run.with_name("another")
    if not other.is_dir():
        assert main(["evaluate", str(run), "--bootstrap", "10"]) == 0
        shutil.copytree(run, other)
    return other


COMMANDS = {
    "extract": lambda run, at: ("extract", pairs(run.parent), at("latents")),
    "train": lambda run, at: ("train", "--config", run / "settings.toml", "--output", at("other"), "--steps", 40),
    "evaluate": lambda run, at: ("evaluate", run, "--bootstrap", 10),
    "search": lambda run, at: ("search", run, "a text", "--output", at("hits.png")),
    "report": lambda run, at: ("report", run, evaluated(run), "--output", at("report.html")),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk(name, run, capsys):
    folder = run.parent / "out"
    folder.mkdir()
    words = COMMANDS[name](run, lambda file: folder / file)
    before = stored(run.parent)
    with full_disk():
        said = sentence(capsys, *words)
    assert f"{run if name == 'evaluate' else folder}/" in said
    assert "File too large" in said
    after = stored(run.parent)
    assert before.items() <= after.items()
    assert [path for path in after if path.suffix == ".tmp"] == []
    assert main([str(word) for word in words]) == 0


@pytest.mark.parametrize("name", ["extract", "train", "search", "report"])
def test_a_file_where_a_folder_should_be(name, run, capsys):
    file = run.parent / "file"
    file.write_text("kept")
    assert f"{file}" in sentence(capsys, *COMMANDS[name](run, lambda name: file / name))
    assert file.read_text() == "kept"


@pytest.mark.parametrize("name", ["extract", "train"])
def test_an_output_that_is_a_file(name, run, capsys):
    file = run.parent / "file"
    file.write_text("kept")
    assert f"{file}" in sentence(capsys, *COMMANDS[name](run, lambda name: file))
    assert file.read_text() == "kept"


@pytest.mark.parametrize("name", ["search", "report"])
def test_a_folder_where_a_file_should_be(name, run, capsys):
    folder = run.parent / "folder.png"
    folder.mkdir()
    assert f"{folder}" in sentence(capsys, *COMMANDS[name](run, lambda name: folder))


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="no file system that nobody may write to")
@pytest.mark.parametrize("name", ["extract", "train", "search", "report"])
def test_a_folder_that_cannot_be_written_to(name, run, capsys):
    assert "/sys/kernel/" in sentence(capsys, *COMMANDS[name](run, lambda name: Path("/sys/kernel") / name))


@pytest.mark.parametrize("content", [b"", b"\0garbage", b"{}"])
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("latents/manifest.json", "evaluate"),
        ("latents/manifest.json", "train"),
        ("run/best.safetensors", "evaluate"),
        ("run/best.safetensors", "search"),
        ("run/last.safetensors", "train"),
        ("run/settings.toml", "evaluate"),
        ("run/evaluation.json", "report"),
        ("run/ranks.safetensors", "report"),
    ],
)
def test_a_damaged_file(file, name, content, run, capsys):
    evaluated(run)
    path = run.parent / file
    path.write_bytes(content if content != b"{}" or path.suffix == ".json" else path.read_bytes()[:-20])
    words = COMMANDS[name](run, lambda file: run if name == "train" else run.parent / file)
    if name == "train":
        (run / PREVIOUS).unlink()
        words = (*words[:-1], 300)
    if file.endswith("evaluation.json") and content == b"{}":
        assert main([str(word) for word in words]) == 0  # of something else: made again
    else:
        assert str(path) in sentence(capsys, *words)


@pytest.mark.parametrize("name", ["extract", "train", "tune"])
def test_two_processes_in_one_folder(name, run, capsys, monkeypatch):
    output = run.parent / "out"
    words = {
        "extract": (pairs(run.parent), output),
        "train": ("--config", run / "settings.toml", "--output", output, "--steps", 3),
        "tune": (run.parent / "latents", output, "--noise", 0, "--smoothing", 0, "--seeds", 1),
    }[name]
    hold = (
        "import sys, time, pathlib; from modest_align_train.files import folder_of_its_own\n"
        "with folder_of_its_own(pathlib.Path(sys.argv[1])): print('has it', flush=True); time.sleep(600)"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1] / "python"), *filter(None, sys.path)])
    command, environment = [sys.executable, "-c", hold, output], {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "has it\n"
        said = sentence(capsys, name, *words)
        assert f"output {output} is being written by another process: wait until it ends, or take another" in said
        assert [path.name for path in output.iterdir()] == [".lock"]
        other.kill()  # and has it no longer
    module, function = {
        "extract": (extract_module, "write_shard"),
        "train": (train_module, "training_step"),
        "tune": (tune_module, "_bind"),
    }[name]

    def look(*_):
        with pytest.raises(ValueError, match="is being written by another process"), folder_of_its_own(output):
            pass
        raise ValueError("nobody else can have it")

    monkeypatch.setattr(module, function, look)
    assert sentence(capsys, name, *words) == "nobody else can have it"
    assert not (output / ".lock").exists()
