from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_data import IMAGE_DIM, TEXT_DIM, assert_same_run, read_log, small_settings, write_latents

import modest_align_train.latents as latents_module
import modest_align_train.train as module
from modest_align_train.adapters import Aligner, load_aligner
from modest_align_train.checkpoints import BEST, LAST, PREVIOUS, part, read_checkpoint
from modest_align_train.evaluate import evaluate
from modest_align_train.latents import load_latents
from modest_align_train.settings import Settings, read_settings
from modest_align_train.train import Batches, fuse, learning_rate, train

CPU = torch.device("cpu")


def checkpoint(run: Path, name: str = "last") -> dict:
    return read_checkpoint(run / f"{name}.safetensors")[0]


def change_step(monkeypatch, number: int, change) -> list[int]:
    """Let `change(aligner, loss)` give the loss of that call of training_step; returns a list with an item a call."""
    real_step, calls = module.training_step, []

    def step(aligner, *args):
        calls.append(1)
        loss = real_step(aligner, *args)
        return change(aligner, loss) if len(calls) == number else loss

    monkeypatch.setattr(module, "training_step", step)
    return calls


def test_a_run_learns_and_leaves_everything(tmp_path, capsys):
    settings = small_settings(tmp_path, steps=200)
    run = train(settings)
    assert "learning_rate = 0.001" in capsys.readouterr().out
    assert Settings(**read_settings(run / "settings.toml")) == settings
    log = read_log(run)
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 40
    assert losses[-1] < 0.7 * losses[0]
    validations = {line["step"]: line["validation"]["mean"] for line in log if "validation" in line}
    assert list(validations) == list(range(10, 201, 10))
    scores = {step: sum(mean.values()) for step, mean in validations.items()}
    assert checkpoint(run, "best")["step"] == max(scores, key=scores.get)
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    scalars = board.Scalars("loss")
    assert [event.step for event in scalars] == list(range(5, 201, 5))
    assert scalars[-1].value == pytest.approx(losses[-1])
    assert {"scale", "learning_rate", "validation/mean/R@1", "validation/text_to_image/R@10"} <= set(
        board.Tags()["scalars"]
    )
    assert sorted(path.name for path in run.iterdir()) == [
        "best.safetensors", "last.safetensors", "log.jsonl", "previous.safetensors", "settings.toml", "tensorboard",
    ]  # fmt: skip


def test_steps_are_those_of_the_data_also_when_it_goes_on(tmp_path, monkeypatch, capsys):
    settings = small_settings(tmp_path, steps=0, validate_every=0, checkpoint_every=10)
    change_step(monkeypatch, 15, lambda aligner, loss: os.kill(os.getpid(), signal.SIGINT) or loss)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 15 of 830"):
        train(settings)
    monkeypatch.undo()
    monkeypatch.setattr(module.Run, "validate", lambda run: None)
    stored = read_settings(settings.output / "settings.toml")
    assert (stored["steps"], stored["validate_every"]) == (830, 69)
    assert checkpoint(train(settings, progress=False))["step"] == 830
    train(settings)
    assert "is finished: all its 830 steps are done" in capsys.readouterr().out


def test_the_kept_step_is_said(tmp_path, monkeypatch, capsys):
    scores = iter([50.0, 70.0, 60.0, 65.0])
    monkeypatch.setattr(module, "validation_score", lambda found: next(scores))
    run = train(small_settings(tmp_path))
    assert "kept step 20 of 40: validation recall 70.0% (mean of R@1, 5, 10)" in capsys.readouterr().out
    assert checkpoint(run, "best")["step"] == 20


def test_a_finished_run_is_left_alone(tmp_path, capsys):
    settings = small_settings(tmp_path)
    run = train(settings, progress=False)
    before = (run / LAST).read_bytes()
    assert train(settings) == run
    assert "is finished: all its 40 steps are done" in capsys.readouterr().out
    assert (run / LAST).read_bytes() == before


def test_the_seed_governs_everything_and_nothing_leaks(tmp_path):
    torch.manual_seed(123)
    state = torch.get_rng_state()
    settings = small_settings(tmp_path, loss_noise_std=0.01, dropout=0.2, fusemix_alpha=1.0, shuffled_captions=0.3)
    a = train(settings, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(456)
    b = train(replace(settings, output=tmp_path / "b"), progress=False)
    assert_same_run(a, b)
    c = train(replace(settings, output=tmp_path / "c", seed=1), progress=False)
    assert read_log(c)[0]["loss"] != read_log(a)[0]["loss"]


def test_killed_and_resumed_is_the_same_as_never_killed(tmp_path):
    # With 7, checkpoints fall between two lines of the log.
    settings = small_settings(tmp_path, steps=400, log_every=7, loss_noise_std=0.01, dropout=0.1, fusemix_alpha=0.5)
    whole = train(replace(settings, output=tmp_path / "whole"), progress=False)
    (tmp_path / "settings.toml").write_text(settings.to_toml())
    process = subprocess.Popen(
        [
            sys.executable, "-c",
            "import torch; torch.set_num_threads(1); from modest_align_train.cli import main; main()",
            "train", "--config", str(tmp_path / "settings.toml"),
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    log = settings.output / "log.jsonl"
    deadline = time.monotonic() + 60
    while not log.exists() or log.read_bytes().count(b"loss") < 15:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 100 <= checkpoint(settings.output)["step"] < 400
    assert read_log(settings.output)[-1]["step"] < 400
    assert_same_run(train(settings, progress=False), whole)


def test_killed_before_the_first_checkpoint_starts_again(tmp_path):
    settings = small_settings(tmp_path)
    settings.output.mkdir()
    (settings.output / "log.jsonl").write_text('{"step": 5, "loss": 1.0}\n{"ste')
    run = train(settings, progress=False)
    assert_same_run(run, train(replace(settings, output=tmp_path / "other"), progress=False))


def test_ctrl_c_finishes_the_step_and_the_same_command_goes_on(tmp_path, monkeypatch):
    settings = small_settings(tmp_path)
    whole = train(replace(settings, output=tmp_path / "whole"), progress=False)

    def interrupt(_, loss):
        os.kill(os.getpid(), signal.SIGINT)
        return loss

    calls = change_step(monkeypatch, 13, interrupt)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 13 of 40: the same command goes on from there"):
        train(settings, progress=False)
    assert signal.getsignal(signal.SIGINT) is handler
    assert checkpoint(settings.output)["step"] == 13
    assert_same_run(train(settings, progress=False), whole)
    assert len(calls) == 40


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"steps": 50}, "steps is 50 but 40 in the run stored in .*run"),
        ({"learning_rate": 0.5, "steps": 50}, "steps is 50 but 40"),
        ({"latent_noise_std": 0.5}, "latent_noise_std is 0.5 but 0.02 in the run stored in"),
    ],
)
def test_a_run_goes_on_only_with_its_own_settings(tmp_path, change, sentence):
    settings = small_settings(tmp_path)
    train(settings, progress=False)
    with pytest.raises(ValueError, match=sentence):
        train(replace(settings, **change), progress=False)


def write_again(latents: Path, images: int = 200) -> None:
    """Extract again: the same encoders and place, the splits in another order."""
    shutil.rmtree(latents)
    write_latents(latents, images, ("test", "train", "train", "train", "validation"))


def test_a_run_is_bound_to_its_latents(tmp_path, monkeypatch):
    finished = small_settings(tmp_path)
    stopped = replace(finished, output=tmp_path / "stopped")
    train(finished, progress=False)
    change_step(monkeypatch, 13, lambda _, loss: os.kill(os.getpid(), signal.SIGINT) or loss)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, progress=False)
    shutil.copytree(tmp_path / "latents", tmp_path / "kept")
    write_again(tmp_path / "latents")
    for settings in (finished, stopped):
        before = (settings.output / LAST).read_bytes()
        with pytest.raises(
            ValueError, match=r"latents .* are not those that the run stored in .*extracted again: take"
        ):
            train(settings, progress=False)
        assert (settings.output / LAST).read_bytes() == before
    shutil.rmtree(tmp_path / "latents")
    (tmp_path / "kept").rename(tmp_path / "latents")
    assert train(finished, progress=False) == finished.output
    assert_same_run(train(stopped, progress=False), finished.output)


def test_a_run_of_an_earlier_version_is_refused(tmp_path):
    run = train(small_settings(tmp_path), progress=False)
    for name in (BEST, LAST):
        (run / name).rename((run / name).with_suffix(".pt"))
    (run / PREVIOUS).unlink()
    before = sorted(run.iterdir())
    for use, name in (
        (lambda: train(small_settings(tmp_path), progress=False), "last"),
        (lambda: evaluate(run), "best"),
    ):
        with pytest.raises(
            ValueError, match=rf"run/{name}\.pt is of an earlier version, which this one does not read: "
        ):
            use()
    assert sorted(run.iterdir()) == before


def test_a_moved_run_goes_on(tmp_path):
    settings = small_settings(tmp_path)
    train(settings, progress=False).rename(tmp_path / "moved")
    assert train(replace(settings, output=tmp_path / "moved"), progress=False) == tmp_path / "moved"


def test_a_run_whose_settings_have_their_earlier_names_goes_on(tmp_path):
    run = train(small_settings(tmp_path, latent_noise_std=0.03), progress=False)
    stored = run / "settings.toml"
    stored.write_text(stored.read_text().replace("latent_noise_std", "noise_std"))
    assert train(small_settings(tmp_path, latent_noise_std=0.03), progress=False) == run
    assert load_aligner(run).image_adapter.features == IMAGE_DIM
    with pytest.raises(ValueError, match=r"latent_noise_std is 0.02 but 0.03 in the run stored in"):
        train(small_settings(tmp_path), progress=False)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    settings = small_settings(tmp_path)
    change_step(monkeypatch, 27, lambda _, loss: loss * math.nan)
    with pytest.raises(FloatingPointError, match=r"the loss is not finite at step 27 of .*its last checkpoint is kept"):
        train(settings, progress=False)
    assert checkpoint(settings.output)["step"] == 20


def test_weights_that_are_not_finite_are_never_a_checkpoint(tmp_path, monkeypatch):
    settings = small_settings(tmp_path, checkpoint_every=7, log_every=40)

    def spoil(aligner, loss):
        aligner.image_adapter[1].weight.data[0, 0] = math.inf
        return loss

    change_step(monkeypatch, 7, spoil)
    with pytest.raises(FloatingPointError, match=r"a weight is not finite at step 7 of .*no checkpoint yet"):
        train(settings, progress=False)
    assert not (settings.output / LAST).exists()


def test_without_a_validation_split_the_last_is_the_best(tmp_path):
    latents = write_latents(tmp_path / "unvalidated", splits=("train",))
    settings = small_settings(tmp_path, latents=latents)
    with pytest.warns(UserWarning, match="has no validation split: the last checkpoint is taken for the best"):
        run = train(settings, progress=False)
    best = checkpoint(run, "best")
    assert best["step"] == 40
    for name, value in part(checkpoint(run), "model").items():
        assert torch.equal(value, best[f"model.{name}"])


def test_the_test_split_is_never_touched(tmp_path, monkeypatch):
    with_test = train(small_settings(tmp_path), progress=False)
    latents = tmp_path / "latents"
    rows = [i for i, record in enumerate(load_latents(latents).records) if record.split == "test"]
    real_load = module.load_latents

    def load_poisoned(directory):
        data = real_load(directory)
        data.image[rows] = math.nan
        data.text[torch.isin(data.caption_image, torch.tensor(rows))] = math.nan
        return data

    monkeypatch.setattr(module, "load_latents", load_poisoned)
    assert_same_run(with_test, train(small_settings(tmp_path, output=tmp_path / "poisoned"), progress=False))


def test_latents_on_disk_give_the_same_run(tmp_path, monkeypatch):
    in_memory = train(small_settings(tmp_path, shuffled_captions=0.3), progress=False)
    monkeypatch.setattr(latents_module, "IN_MEMORY", 0)
    settings = small_settings(tmp_path, shuffled_captions=0.3, output=tmp_path / "streamed")
    change_step(monkeypatch, 15, lambda aligner, loss: os.kill(os.getpid(), signal.SIGINT) or loss)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 15"):
        train(settings, progress=False)
    assert_same_run(in_memory, train(settings, progress=False))
    found, wanted = (evaluate(run, bootstrap=5) for run in (settings.output, in_memory))
    assert {**found, "checkpoint": ""} == {**wanted, "checkpoint": ""}


def test_the_learned_scale_stays_below_its_maximum(tmp_path):
    settings = small_settings(tmp_path, learning_rate=0.1, scale=14.0, max_scale=14.5, smoothing=0.0)
    scales = [line["scale"] for line in read_log(train(settings, progress=False)) if "scale" in line]
    assert max(scales) == pytest.approx(14.5, rel=1e-5)


def test_a_fixed_scale_stays(tmp_path):
    run = train(small_settings(tmp_path, learn_scale=False, scale=200.0), progress=False)
    assert {line["scale"] for line in read_log(run) if "scale" in line} == {200.0}
    assert float(load_aligner(run).scale) == 200.0


def test_the_learning_rate_warms_up_and_follows_a_cosine(tmp_path):
    settings = small_settings(tmp_path, steps=25, warmup_steps=5, learning_rate=2.0)
    rates = [learning_rate(step, settings) for step in range(1, 26)]
    assert rates[:6] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0])
    assert rates[15] == pytest.approx(1.0)
    assert 0 < rates[-1] < 0.02
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(1, replace(settings, warmup_steps=0)) == 2.0


def batches(tmp_path, splits=("train",), images=50, **changes) -> tuple[Batches, torch.Tensor, torch.Tensor]:
    latents = load_latents(write_latents(tmp_path / "latents", images, splits))
    unit = torch.nn.functional.normalize
    return (
        Batches(latents, small_settings(tmp_path, **changes), CPU),
        unit(latents.image, dim=-1),
        unit(latents.text, dim=-1),
    )


def rows_of(batch: torch.Tensor, latents: torch.Tensor) -> list[int]:
    return torch.cdist(batch, latents).argmin(1).tolist()


def test_an_epoch_holds_each_image_once_and_each_caption_is_drawn(tmp_path):
    drawn, image, text = batches(tmp_path, images=50, batch_size=16)
    captions = Counter()
    orders = []
    for _ in range(40):
        seen = []
        for _ in range(3):
            images, texts, group = drawn.draw()
            assert group is None
            torch.testing.assert_close(images.norm(dim=1), torch.ones(16))
            seen += rows_of(images, image)
            mine = rows_of(texts, text)
            assert [caption // 2 for caption in mine] == seen[-16:]
            captions.update(mine)
        assert len(set(seen)) == 48
        orders.append(seen)
    assert orders[0] != orders[1]
    assert len(captions) == 100
    assert captions.most_common()[-1][1] >= 8


def test_a_set_smaller_than_a_batch_is_one_batch(tmp_path):
    drawn, image, _ = batches(tmp_path, images=10, batch_size=64)
    for _ in range(3):
        assert sorted(rows_of(drawn.draw()[0], image)) == list(range(10))


def test_groups_of_several_images_reach_the_loss(tmp_path):
    latents = load_latents(write_latents(tmp_path / "latents", 20, ("train",)))
    grouped = replace(latents, group=torch.arange(20) // 2)
    drawn = Batches(grouped, small_settings(tmp_path, batch_size=20), CPU)
    images, _, group = drawn.draw()
    assert group.tolist() == [row // 2 for row in rows_of(images, drawn.image)]


def test_shuffled_captions_are_wrong_for_that_share_and_stay_so(tmp_path):
    drawn, image, text = batches(tmp_path, images=50, batch_size=50, shuffled_captions=0.4)
    partners = []
    for _ in range(2):
        images, texts, _ = drawn.draw()
        partners.append(dict(zip(rows_of(images, image), (c // 2 for c in rows_of(texts, text)), strict=True)))
    assert partners[0] == partners[1]
    assert sum(i != j for i, j in partners[0].items()) == 20
    assert sorted(partners[0].values()) == list(range(50))


def test_fuse_mixes_both_modalities_with_the_same_partner_and_share():
    torch.manual_seed(0)
    for _ in range(20):
        image, text = fuse(torch.eye(6), torch.eye(6), alpha=1.0)
        torch.testing.assert_close(image, text)
        torch.testing.assert_close(image.sum(1), torch.ones(6))
        assert (image.diagonal() >= 0.5).all()
        others = image[~torch.eye(6, dtype=torch.bool)]
        assert len(others[others > 0].unique()) <= 1


def test_noise_reaches_the_adapters_in_training_only(tmp_path):
    settings = small_settings(tmp_path, latent_noise_std=0.05, embedding_dim=8)
    aligner = Aligner(1000, 1000, settings).train()
    optimizer = torch.optim.SGD(aligner.parameters(), lr=0.0)
    seen = []
    aligner.image_adapter.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    image = torch.zeros(32, 1000)
    torch.manual_seed(0)
    module.training_step(aligner, optimizer, image, image, None, settings)
    assert seen[0].std().item() == pytest.approx(0.05, rel=0.02)
    aligner.embed_images(image)
    assert torch.equal(seen[1], image)
    assert aligner.image_adapter.training


def test_embeddings_are_unit_and_the_same_in_chunks(tmp_path, monkeypatch):
    aligner = Aligner(IMAGE_DIM, TEXT_DIM, small_settings(tmp_path, dropout=0.5))
    latents = torch.randn(10, IMAGE_DIM)
    embedded = aligner.embed_images(latents)
    assert embedded.shape == (10, 16)
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(10))
    torch.testing.assert_close(aligner.embed_images(5 * latents), embedded)
    monkeypatch.setattr("modest_align_train.adapters.CHUNK", 3)
    torch.testing.assert_close(aligner.embed_images(latents), embedded)
    with pytest.raises(ValueError, match="image latents must have 24 features, got 16"):
        aligner.embed_images(torch.randn(3, TEXT_DIM))


@pytest.mark.parametrize(
    ("device", "sentence"),
    [
        ("abacus", "device must be auto or one that this torch can use, got 'abacus'"),
        ("cuda:77", "device must be auto or one that this torch can use, got 'cuda:77'"),
    ],
)
def test_a_device_that_is_not_there(tmp_path, device, sentence):
    with pytest.raises(ValueError, match=sentence):
        train(small_settings(tmp_path, device=device), progress=False)
