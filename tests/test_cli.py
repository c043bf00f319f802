from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from train_data import small_settings

from modest_align_train.cli import main

COMMANDS = ("demo", "extract", "train", "evaluate", "search", "report")


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
    assert done.stderr == f"modest-align: {tmp_path} is not a trained run: it has no best.pt\n"


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
    assert (tmp_path / "other" / "best.pt").is_file()
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


def test_ctrl_c_is_one_sentence(config, monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt("stopped after step 3 of 9: the same command goes on from there")

    monkeypatch.setattr("modest_align_train.train.train", stopped)
    assert run("train", "--config", config) == 130
    assert capsys.readouterr().err == "modest-align: stopped after step 3 of 9: the same command goes on from there\n"
