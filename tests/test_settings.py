from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from modest_align_train.settings import Settings, read_settings

SETTINGS = Settings(latents=Path("latents"), output=Path("run"))


def test_defaults_pass_and_come_back_from_toml(tmp_path):
    SETTINGS.check()
    changed = replace(SETTINGS, steps=7, learn_scale=False, noise_std=0.03)
    (tmp_path / "settings.toml").write_text(changed.to_toml())
    assert Settings(**read_settings(tmp_path / "settings.toml")) == changed


def test_toml_may_have_few_settings_and_whole_numbers_for_real_ones(tmp_path):
    path = tmp_path / "few.toml"
    path.write_text('latents = "somewhere"\nscale = 20\n')
    assert read_settings(path) == {"latents": Path("somewhere"), "scale": 20.0}


@pytest.mark.parametrize(
    ("text", "error", "sentence"),
    [
        ("step = 3", ValueError, "unknown setting 'step'; known are latents, output, .*steps"),
        ('steps = "3"', TypeError, "few.toml: steps must be of type int, got str '3'"),
        ("steps = true", TypeError, "steps must be of type int, got bool True"),
        ("learn_scale = 1", TypeError, "learn_scale must be of type bool, got int 1"),
        ("latents = 1", TypeError, "latents must be of type Path, got int 1"),
        ("steps = ", ValueError, "few.toml is not TOML"),
    ],
)
def test_what_toml_may_not_say(tmp_path, text, error, sentence):
    path = tmp_path / "few.toml"
    path.write_text(text)
    with pytest.raises(error, match=sentence):
        read_settings(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"settings file .*nothing\.toml does not exist"):
        read_settings(tmp_path / "nothing.toml")


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"smoothing": 1.1}, ValueError, "smoothing must be between 0 and 1, got 1.1"),
        ({"noise_std": -0.1}, ValueError, "noise_std must be at least 0, got -0.1"),
        ({"scale": 0.0}, ValueError, "scale must be above 0, got 0.0"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate must be finite, got nan"),
        ({"scale": 101.0}, ValueError, r"scale must be at most max_scale \(100.0\), got 101.0"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be of type int, got float 2.5"),
        ({"output": "run"}, TypeError, "output must be of type Path, got str 'run'"),
    ],
)
def test_what_a_setting_may_not_be(change, error, sentence):
    with pytest.raises(error, match=sentence):
        replace(SETTINGS, **change).check()


def test_a_fixed_scale_may_be_above_the_maximum_of_a_learned_one():
    replace(SETTINGS, scale=1000.0, learn_scale=False).check()
