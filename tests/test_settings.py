from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from modest_align_train.settings import Settings, read_settings

SETTINGS = Settings(latents=Path("latents"), output=Path("run"))


def test_defaults_pass_and_come_back_from_toml(tmp_path):
    assert SETTINGS.checked() == SETTINGS
    changed = replace(SETTINGS, steps=7, learn_scale=False, latent_noise_std=0.03)
    (tmp_path / "settings.toml").write_text(changed.to_toml())
    assert Settings(**read_settings(tmp_path / "settings.toml")) == changed


def test_each_setting_comes_out_as_its_own_type():
    checked = replace(SETTINGS, output="run", scale=20).checked()
    assert checked == replace(SETTINGS, scale=20.0)
    assert (type(checked.output), type(checked.scale)) == (type(Path()), float)


def test_toml_may_have_few_settings_and_whole_numbers_for_real_ones(tmp_path):
    path = tmp_path / "few.toml"
    path.write_text('latents = "somewhere"\nscale = 20\n')
    assert read_settings(path) == {"latents": Path("somewhere"), "scale": 20.0}


def test_earlier_names_are_understood(tmp_path):
    path = tmp_path / "old.toml"
    path.write_text("noise_std = 0.03\nloss_noise_std = 0.1\n")
    assert read_settings(path) == {"latent_noise_std": 0.03, "loss_noise_std": 0.1}


def test_a_scale_above_its_maximum_in_toml_waits_for_the_other_settings(tmp_path):
    path = tmp_path / "few.toml"
    path.write_text("scale = 200.0")
    fixed = replace(SETTINGS, learn_scale=False, **read_settings(path))
    assert fixed.checked().scale == 200.0


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("step = 3", "unknown setting 'step'; known are latents, output, .*steps"),
        ('steps = "3"', "few.toml: steps must be a valid integer, got '3'"),
        ("steps = true", "steps must be a valid integer, got True"),
        ("scale = true", "scale must be a valid number, got True"),
        ("learn_scale = 1", "learn_scale must be a valid boolean, got 1"),
        ("latents = 1", "latents must be a path, got 1"),
        ("batch_size = 0", "few.toml: batch_size must be greater than or equal to 1, got 0"),
        ("steps = ", "few.toml is not TOML"),
    ],
)
def test_what_toml_may_not_say(tmp_path, text, sentence):
    path = tmp_path / "few.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence) as caught:
        read_settings(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"settings file .*nothing\.toml does not exist"):
        read_settings(tmp_path / "nothing.toml")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batch_size": 0}, "batch_size must be greater than or equal to 1, got 0"),
        ({"smoothing": 1.1}, "smoothing must be less than or equal to 1, got 1.1"),
        ({"latent_noise_std": -0.1}, "latent_noise_std must be greater than or equal to 0, got -0.1"),
        ({"scale": 0.0}, "scale must be greater than 0, got 0.0"),
        ({"seed": 2**63}, f"seed must be less than {2**63}, got {2**63}"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number, got nan"),
        ({"max_scale": float("inf")}, "max_scale must be a finite number, got inf"),
        ({"scale": 101.0}, r"scale must be at most max_scale \(100.0\), got 101.0"),
        ({"batch_size": 2.5}, "batch_size must be a valid integer, got 2.5"),
        ({"learn_scale": 1}, "learn_scale must be a valid boolean, got 1"),
        ({"device": None}, "device must be a valid string, got None"),
    ],
)
def test_what_a_setting_may_not_be(change, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        replace(SETTINGS, **change).checked()
    assert "\n" not in str(caught.value)


def test_a_fixed_scale_may_be_above_the_maximum_of_a_learned_one():
    replace(SETTINGS, scale=1000.0, learn_scale=False).checked()


@pytest.mark.parametrize(
    ("images", "batch_size", "steps", "validate_every"),
    [(600, 512, 120, 10), (4068, 512, 300, 25), (100_000, 512, 1490, 124), (600, 128, 460, 38), (20, 512, 540, 45)],
)
def test_steps_follow_the_size_of_the_data(images, batch_size, steps, validate_every):
    settings = replace(SETTINGS, batch_size=batch_size, steps=0, validate_every=0).for_images(images)
    assert (settings.steps, settings.validate_every) == (steps, validate_every)
    assert replace(SETTINGS, steps=7, validate_every=3).for_images(images) == replace(
        SETTINGS, steps=7, validate_every=3
    )
    assert replace(SETTINGS, steps=5, validate_every=0).for_images(images).validate_every == 1
