"""Checkpoint files: what is written is read, any damage is found, and a run goes on from the one before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save
from train_data import assert_same_run, small_settings

import modest_align_train.train as module
from modest_align_train.adapters import load_aligner
from modest_align_train.checkpoints import BEST, LAST, PREVIOUS, read_checkpoint, write_checkpoint
from modest_align_train.train import train

STATE = {
    "step": 300,
    "best": 0.1 + 0.2,
    "latents": 'a "sha256": "' + "0" * 64,
    "model.weight": torch.randn(3, 2).T,
    "model.scale": torch.tensor(2.5),
    "rng.cpu": torch.arange(7, dtype=torch.uint8),
    "order": torch.empty(0, dtype=torch.int64),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / LAST, STATE)
    return tmp_path / LAST


def test_what_was_written_is_read(path: Path) -> None:
    state, digest = read_checkpoint(path)
    assert state.keys() == STATE.keys()
    for name, value in STATE.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(state[name], value)
            assert state[name].dtype == value.dtype
        else:
            assert state[name] == value
    content = path.read_bytes()
    write_checkpoint(path, state)
    assert path.read_bytes() == content
    assert read_checkpoint(path)[1] == digest
    assert load_file(path).keys() == {name for name, value in STATE.items() if isinstance(value, torch.Tensor)}


def test_each_byte_is_checked(path: Path) -> None:
    content = path.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"last\.safetensors is damaged \(its checksum differs\): train into"):
            read_checkpoint(path)


def test_each_length_is_checked(path: Path) -> None:
    content = path.read_bytes()
    shorter = [content[:size] for size in range(0, len(content), 7)]
    for damaged in (*shorter, content[:-1], content + b"\0", content[1:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            read_checkpoint(path)


def test_other_files_are_no_checkpoints(path: Path) -> None:
    for metadata in (None, {"checkpoint": "{}"}, {"checkpoint": json.dumps({"sha256": "0" * 64, "facts": {}})}):
        path.write_bytes(save(load(path.read_bytes()), metadata))
        with pytest.raises(ValueError, match="is damaged"):
            read_checkpoint(path)
    torch.save(STATE, path)
    with pytest.raises(ValueError, match="is damaged"):
        read_checkpoint(path)


def stopped_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> tuple[Path, Path]:
    """A whole run, and one that ended before that step; checkpoints are of every 10th of 40."""
    settings = small_settings(tmp_path, dropout=0.1)
    whole = train(replace(settings, output=tmp_path / "whole"), progress=False)
    real_step, calls = module.training_step, []

    def ends(*args: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == step:
            raise RuntimeError("as if it were killed")
        return real_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "training_step", ends)
        with pytest.raises(RuntimeError, match="as if"):
            train(settings, progress=False)
    return whole, settings.output


def spoil(path: Path) -> None:
    """Change the last byte, which is of a tensor."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path: Path, monkeypatch) -> None:
    whole, run = stopped_run(tmp_path, monkeypatch, 35)
    assert [read_checkpoint(run / name)[0]["step"] for name in (LAST, PREVIOUS)] == [30, 20]
    spoil(run / LAST)
    with pytest.warns(
        UserWarning, match=r"last.safetensors is damaged .*: the run goes on from the checkpoint before, of step 20$"
    ):
        train(small_settings(tmp_path, dropout=0.1), progress=False)
    assert_same_run(run, whole)
    assert [read_checkpoint(run / name)[0]["step"] for name in (LAST, PREVIOUS)] == [40, 30]


def test_a_damaged_checkpoint_is_never_kept_for_the_one_before(tmp_path: Path, monkeypatch) -> None:
    whole, run = stopped_run(tmp_path, monkeypatch, 35)
    spoil(run / LAST)
    # Killed again, after it went on from step 20 and before another checkpoint.
    monkeypatch.setattr(module, "training_step", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="of step 20"), pytest.raises(ZeroDivisionError):
        train(small_settings(tmp_path, dropout=0.1), progress=False)
    monkeypatch.undo()
    assert read_checkpoint(run / LAST)[0]["step"] == 20
    assert not (run / PREVIOUS).exists()
    assert_same_run(train(small_settings(tmp_path, dropout=0.1), progress=False), whole)


def test_killed_between_the_two_renames_of_a_checkpoint(tmp_path: Path, monkeypatch) -> None:
    whole, run = stopped_run(tmp_path, monkeypatch, 35)
    (run / LAST).replace(run / PREVIOUS)
    (run / f".{LAST}.12345.tmp").write_bytes(b"half a che")
    (run / f".{BEST}.12345.tmp").write_bytes(b"")
    assert_same_run(train(small_settings(tmp_path, dropout=0.1), progress=False), whole)
    assert list(run.glob("*.tmp")) + list(run.glob(".*")) == []


def test_both_checkpoints_damaged(tmp_path: Path, monkeypatch) -> None:
    _, run = stopped_run(tmp_path, monkeypatch, 35)
    spoil(run / LAST)
    spoil(run / PREVIOUS)
    with pytest.raises(ValueError, match=r"previous\.safetensors is damaged .* another --output, or delete this one"):
        train(small_settings(tmp_path, dropout=0.1), progress=False)


def test_a_checkpoint_of_other_settings(tmp_path: Path) -> None:
    run = train(small_settings(tmp_path), progress=False)
    settings = run / "settings.toml"
    settings.write_text(settings.read_text().replace("embedding_dim = 16", "embedding_dim = 17"))
    with pytest.raises(ValueError, match=r"best\.safetensors does not fit the settings\.toml beside it: one of them"):
        load_aligner(run)
    state, _ = read_checkpoint(run / LAST)
    write_checkpoint(run / LAST, {**state, "step": 30})
    with pytest.raises(ValueError, match=r"last\.safetensors does not fit the settings\.toml beside it: one of them"):
        train(small_settings(tmp_path, embedding_dim=17), progress=False)
    for facts in ({"step": 30, "latents": state["latents"]}, {"step": 30}, {}):
        write_checkpoint(run / LAST, facts)
        with pytest.raises(ValueError, match=r"last\.safetensors does not fit the settings\.toml beside it"):
            train(small_settings(tmp_path, embedding_dim=17), progress=False)
