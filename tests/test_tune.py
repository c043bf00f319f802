from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from PIL import Image
from train_data import small_settings, write_latents, write_store

import modest_align_train.tune as module
from modest_align_train.cli import main
from modest_align_train.latents import load_latents
from modest_align_train.settings import read_settings
from modest_align_train.tune import INFONCE, Setting, choose, sweep_figure, tune

NOISE, SMOOTHED, BOTH = Setting(0.02, 0.0), Setting(0.0, 0.1), Setting(0.02, 0.1)
QUERIES = 400


def ranks_of(share: float, seed: int = 0) -> dict[str, torch.Tensor]:
    """Each query finds its answer first, or not among the first ten; the same queries are easy at any share."""
    hard = torch.rand(QUERIES, generator=torch.Generator().manual_seed(7))
    hard = (hard + 0.02 * torch.randn(QUERIES, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)
    rank = torch.where(hard <= share, 1, 99)
    group = torch.arange(QUERIES)
    return {"image_rank": rank, "text_rank": rank, "image_group": group, "caption_group": group}


@pytest.fixture
def inline(monkeypatch):
    """No processes: the runs are tiny."""
    done = []

    class Pool(nullcontext):
        def map(self, work, runs, what, progress=True):
            done.extend(runs)
            return [work(settings) for settings in runs]

        def __enter__(self):
            return self

    monkeypatch.setattr(module, "ProcessPool", lambda device, runs: Pool())
    return done


@pytest.fixture
def settings(tmp_path):
    return replace(small_settings(tmp_path), output=tmp_path / "tuned", steps=8, validate_every=4, warmup_steps=2)


@pytest.mark.parametrize(
    ("shares", "chosen"),
    [
        ({INFONCE: 0.4, NOISE: 0.3, SMOOTHED: 0.35, BOTH: 0.3}, INFONCE),
        ({INFONCE: 0.4, NOISE: 0.5, SMOOTHED: 0.35, BOTH: 0.3}, NOISE),
        ({INFONCE: 0.4, NOISE: 0.5, SMOOTHED: 0.35, BOTH: 0.6}, BOTH),
        ({INFONCE: 0.4, NOISE: 0.5, Setting(0.05, 0.0): 0.53, BOTH: 0.3}, Setting(0.05, 0.0)),
    ],
)
def test_the_best_mean_over_the_seeds_is_chosen(shares, chosen):
    # Other seeds for each setting: which queries are easy differs a little.
    ranks = {s: [ranks_of(share, 10 * i + seed) for seed in range(3)] for i, (s, share) in enumerate(shares.items())}
    assert choose(ranks) == chosen


def test_from_the_command_line_to_a_trained_run(tmp_path, settings, capsys):
    (tmp_path / "few.toml").write_text(
        "steps = 8\nvalidate_every = 4\nbatch_size = 32\nembedding_dim = 16\nwarmup_steps = 2\ndevice = 'cpu'\n"
    )
    command = [
        "tune", str(settings.latents), str(tmp_path / "tuned"), "--config", str(tmp_path / "few.toml"),
        "--noise", "0.02", "0.5", "--seeds", "2",
    ]  # fmt: skip
    assert main(command) == 0
    printed = capsys.readouterr().out
    table = (tmp_path / "tuned" / "table.md").read_text().strip()
    assert table in printed
    assert table.count("| chosen |") == 1
    results = json.loads((tmp_path / "tuned" / "results.json").read_text())
    tried = {(row["latent_noise_std"], row["smoothing"]): row["seeds"] for row in results["rows"]}
    # every noise alone; smoothing on the two best of them; then the best three and InfoNCE with both seeds
    assert {(0, 0), (0.02, 0), (0.5, 0)} < set(tried)
    assert tried[0, 0] == 2
    assert sorted(tried.values()) == [1, 2, 2, 2, 2]
    with Image.open(tmp_path / "tuned" / "tune.png") as picture:
        assert picture.width > 600

    assert main([*re.search(r"next: modest-align (train .*) run\n", printed)[1].split(), str(tmp_path / "run")]) == 0
    assert "kept step" in capsys.readouterr().out
    trained = read_settings(tmp_path / "run" / "settings.toml")
    assert {name: trained[name] for name in results["chosen"]} == results["chosen"]
    assert (trained["steps"], trained["batch_size"]) == (8, 32)

    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "tuned" / "runs").glob("*/*")}
    assert len(list((tmp_path / "tuned" / "runs").iterdir())) == sum(tried.values())
    assert main(command) == 0
    assert table in capsys.readouterr().out
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "tuned" / "runs").glob("*/*")}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT to a group of processes")
def test_ctrl_c_stops_every_process_and_starts_no_other_run(tmp_path, settings):
    (tmp_path / "long.toml").write_text("steps = 1000000\nbatch_size = 32\nembedding_dim = 16\ndevice = 'cpu'\n")
    command = ["tune", settings.latents, tmp_path / "tuned", "--config", tmp_path / "long.toml"]
    process = subprocess.Popen(
        [sys.executable, "-m", "modest_align_train", *map(str, command)],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not list((tmp_path / "tuned").glob("runs/*/log.jsonl")):
            time.sleep(0.2)
        time.sleep(1)
        os.killpg(process.pid, signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert "modest-align: stopped: the same command goes on from there" in error
    assert "Traceback" not in error
    assert len(list((tmp_path / "tuned").glob("runs/*"))) <= os.cpu_count()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks ps for a session's processes")
def test_a_tuning_that_is_killed_leaves_no_process_behind(tmp_path, settings):
    (tmp_path / "long.toml").write_text("steps = 1000000\nbatch_size = 32\nembedding_dim = 16\ndevice = 'cpu'\n")
    command = ["tune", settings.latents, tmp_path / "tuned", "--config", tmp_path / "long.toml"]
    process = subprocess.Popen(
        [sys.executable, "-m", "modest_align_train", *map(str, command)], stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip

    def alive() -> list[str]:
        listed = subprocess.run(["ps", "-o", "stat=", "-s", str(process.pid)], capture_output=True, text=True)
        return [state for state in listed.stdout.split() if not state.startswith("Z")]

    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not list((tmp_path / "tuned").glob("runs/*/log.jsonl")):
            time.sleep(0.2)
        assert len(alive()) > 1
        process.kill()
        process.wait()
        while alive() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert alive() == []
    finally:
        if alive():
            os.killpg(process.pid, signal.SIGKILL)


def test_the_test_split_is_not_looked_at(tmp_path, settings, inline):
    rows = tune(settings, noise=[0.02], seeds=1, progress=False).rows
    data = load_latents(settings.latents)
    held_out = torch.tensor([record.split == "test" for record in data.records])
    data.image[held_out] = torch.nan
    data.text[held_out[data.caption_image]] = torch.nan
    blind = write_store(tmp_path / "blind", [(data.image, data.text, data.records)])
    assert load_latents(blind).image.isnan().any()
    again = tune(replace(settings, latents=blind, output=tmp_path / "again"), noise=[0.02], seeds=1, progress=False)
    assert again.rows == rows


def test_more_seeds_train_only_what_is_missing(settings, inline):
    tune(settings, noise=[], smoothing=[], seeds=1, progress=False)
    assert [run.seed for run in inline] == [0]
    tuned = tune(settings, noise=[], smoothing=[], seeds=3, progress=False)
    assert tuned.chosen == INFONCE
    assert tuned.rows[0]["seeds"] == 3
    logs = sorted(settings.output.glob("runs/*/log.jsonl"))
    assert [log.parent.name[-5:] for log in logs] == ["seed0", "seed1", "seed2"]
    assert "no noise or smoothing that was tried is better" in tuned.path.read_text()


def test_what_was_tuned_with_other_settings_is_kept(tmp_path, settings, inline):
    tune(settings, noise=[], smoothing=[], seeds=1, progress=False)
    with pytest.raises(ValueError, match=r"learning_rate is not what the runs in .*tuned have: take another output"):
        tune(replace(settings, learning_rate=0.01), noise=[], smoothing=[], seeds=1, progress=False)
    other = write_latents(tmp_path / "other", images=150)
    with pytest.raises(ValueError, match="latents is not what"):
        tune(replace(settings, latents=other), noise=[], smoothing=[], seeds=1, progress=False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"noise": [0.1, -1.0]}, "noise must be numbers from 0, got 0.1, -1.0"),
        ({"smoothing": [float("nan")]}, "smoothing must be numbers from 0 to 1, got nan"),
        ({"smoothing": [2.0]}, "smoothing must be numbers from 0 to 1, got 2.0"),
    ],
)
def test_bad_arguments_are_one_sentence(settings, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        tune(settings, **arguments)
    assert not settings.output.exists()


def test_latents_without_validation_are_refused(tmp_path, settings):
    latents = write_latents(tmp_path / "none", splits=("train", "test"))
    with pytest.raises(ValueError, match="have no validation split to choose by"):
        tune(replace(settings, latents=latents))


def test_the_picture_shows_each_gain_and_rings_the_choice():
    rows = [
        {
            "latent_noise_std": std,
            "smoothing": share,
            "seeds": seeds,
            "gain": {"value": gain, "low": gain - 1, "high": gain + 2},
        }
        for std, share, seeds, gain in ((0, 0, 3, 0.0), (0.02, 0, 3, 3.0), (0.02, 0.1, 1, 1.0), (0.5, 0, 1, -40.0))
    ]
    axes = sweep_figure(rows, NOISE).axes[0]
    lines = [(line.get_label(), list(line.get_ydata())) for line in axes.lines]
    assert ("chosen", [3.0]) in lines
    drawn = [values for _, values in lines]
    assert [0.0, 3.0, -40.0] in drawn
    for row in rows[:3]:
        assert [row["gain"]["low"], row["gain"]["high"]] in drawn
    # what collapsed is cut off, but said
    assert axes.get_ylim()[0] == -10.0
    assert [text.get_text() for text in axes.texts] == ["-40"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "0.02", "0.5"]
