from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from train_data import small_settings

from modest_align_train.cli import main
from modest_align_train.train import train

COMMANDS = ("demo", "extract", "tune", "train", "evaluate", "zero-shot", "search", "report", "doctor")


def run(*words: object) -> int:
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text(small_settings(tmp_path).to_toml())
    return path


def test_help_lists_the_subcommands_without_torch():
    code = (
        "import sys; from modest_align_train.cli import main\n"
        "try: main(['--help'])\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f" {name} " in done.stdout for name in COMMANDS)
    assert done.stdout.rstrip().endswith("False")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_subcommand_has_help(command, capsys):
    assert run(command, "--help") == 0
    assert f"usage: modest-align {command}" in capsys.readouterr().out


def test_python_m_is_the_same(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "modest_align_train", "evaluate", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == f"modest-align: {tmp_path} is not a trained run: it has no best.safetensors\n"


def test_doctor_is_the_library_s(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert run("doctor") == 0
    assert "eager: self-test passed" in capsys.readouterr().out


@pytest.mark.parametrize(("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE")])
def test_waiting_threads_leave_the_cores_to_others(tmp_path, given, policy):
    """OpenMP itself says which policy it has read, when PyTorch is loaded."""
    own = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-m", "modest_align_train", "evaluate", str(tmp_path)],
        env={**own, **given, "OMP_DISPLAY_ENV": "true"},
        capture_output=True,
        text=True,
    )
    assert re.findall(r"OMP_WAIT_POLICY ?= ?'(\w+)'", done.stderr) == [policy]


def test_the_command_line_goes_before_the_file(tmp_path, config, capsys):
    assert run("train", "--config", config, "--steps", 20, "--no-learn-scale", "--output", tmp_path / "other") == 0
    printed = capsys.readouterr().out
    assert "steps = 20\n" in printed
    assert "learn_scale = false\n" in printed
    assert "embedding_dim = 16\n" in printed
    assert (tmp_path / "other" / "best.safetensors").is_file()
    assert run("evaluate", tmp_path / "other", "--bootstrap", 50) == 0
    assert "text to image" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nonsense = 1", "has the unknown setting 'nonsense'"),
        ("seed = 'one'", "seed must be a valid integer, got 'one'"),
        ("batch_size = 0", "batch_size must be greater than or equal to 1, got 0"),
    ],
)
def test_bad_settings_are_one_sentence(tmp_path, capsys, text, sentence):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    assert run("train", "--config", path, "--latents", tmp_path, "--output", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith("modest-align: ")
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_missing_latents_and_options_are_named(tmp_path, capsys):
    assert run("train", "--latents", tmp_path, "--output", tmp_path / "run") == 2
    assert "manifest.json is missing" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert run("train", "--latents", tmp_path) == 2
    assert "--output" in capsys.readouterr().err
    assert run("trian") == 2
    assert "trian" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("extract", "t.csv", "out", "--caption-column", "a", "--caption-column", "b"),
        ("extract", "t.csv", "out", "--image-root=a", "--image_root", "b"),
        ("train", "--latents", "a", "--output", "b", "--output", "c"),
        ("train", "--latents", "a", "--output", "b", "--learn-scale", "--no-learn-scale"),
        ("search", "run", "text", "--top", "1", "--top", "2"),
        ("report", "run", "--title", "a", "--title=b"),
    ],
)
def test_a_repeated_flag_is_refused(words, capsys):
    assert run(*words) == 2
    flag = next(word for word in reversed(words) if word.startswith("--")).partition("=")[0].replace("_", "-")
    flag = flag.replace("--no-", "--")
    sentence = f"{flag} must be given once, with all its values, got it 2 times"
    assert capsys.readouterr().err == f"modest-align: {sentence}\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("extract", "{}/t.csv", "{}/x", "--batch-size", "0"), "--batch-size must be at least 1, got 0"),
        (("extract", "{}/t.csv", "{}/x", "--split", "all"), "--split must be train, validation or test, got 'all'"),
        (("extract", "{}/t.csv", "{}/x", "--image-column", "b"), "--image-column must be one of {}/t.csv's columns"),
        (("extract", "{}/t.csv", "{}/x"), "name it by --caption-column, one of: image, words, image_column"),
        (("train", "--latents", "{}", "--output", "{}/x", "--warmup-steps", "-1"), "--warmup-steps must be greater"),
        (("train", "--latents", "{}", "--output", "{}/x", "--steps", "-1"), "--steps must be greater"),
        (("search", "{}", "text", "--top", "0"), "--top must be at least 1, got 0"),
        (("demo", "{}/x", "--seeds", "0"), "--seeds must be at least 1, got 0"),
    ],
)
def test_sentences_name_flags(words, sentence, tmp_path, capsys):
    (tmp_path / "t.csv").write_text("image,words,image_column\na.png,x,y\n")
    assert run(*(word.format(tmp_path) for word in words)) == 2
    assert sentence.format(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [("train", "--help"), ("evaluate", "run", "--bootstrap", "50")])
def test_a_reader_that_has_gone_ends_it_quietly(words, unbuffered, tmp_path):
    """Without a buffer the pipe breaks while it prints, with one when it ends."""
    if words[0] == "evaluate":
        train(small_settings(tmp_path), progress=False)
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "modest_align_train", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_ctrl_c_is_one_sentence(config, monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt("stopped after step 3 of 9: the same command goes on from there")

    monkeypatch.setattr("modest_align_train.train.train", stopped)
    assert run("train", "--config", config) == 130
    assert capsys.readouterr().err == "modest-align: stopped after step 3 of 9: the same command goes on from there\n"
