"""torchrun: the same run and the same latents as one process makes, and what happens when a worker ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from train_data import write_latents

from modest_align_train.checkpoints import LAST, part, read_checkpoint
from modest_align_train.latents import PARTIAL_MANIFEST
from modest_align_train.settings import Settings
from modest_align_train.train import train
from tests import extract_program

PYTHON = Path(__file__).parents[1] / "python"


def start(count: int, *words: object, module: str = "modest_align_train") -> subprocess.Popen:
    """`torchrun -m module words`."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    # What tests import, too; one thread each, as torchrun would have it.
    path = os.pathsep.join([str(PYTHON), str(PYTHON.parent), *filter(None, sys.path)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [*launch, "-m", module, *map(str, words)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(count: int, *words: object, **options: str) -> str:
    process = start(count, *words, **options)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


def fails(count: int, fault: str, *words: object) -> str:
    """What is printed by a run with that fault of `faulty_program.py`, which ends soon."""
    process = start(count, fault, *words, module="tests.faulty_program")
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0, output
    return output


def log_of(run_directory: Path) -> dict[int, dict]:
    lines = [json.loads(line) for line in (run_directory / "log.jsonl").read_text().splitlines()]
    found: dict[int, dict] = {}
    for line in lines:
        found.setdefault(line["step"], {}).update(line)
    return found


def assert_same_run(a: Path, b: Path) -> None:
    first, second = log_of(a), log_of(b)
    assert list(first) == list(second)
    for step, line in first.items():
        for name in ("loss", "scale"):
            if name in line:
                assert second[step][name] == pytest.approx(line[name], rel=2e-4)
        for direction, values in line.get("validation", {}).items():
            assert second[step]["validation"][direction] == pytest.approx(values, abs=5.1)  # of 40 images two


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents"))


OPTIONS = {
    "steps": 30, "batch_size": 61, "embedding_dim": 16, "log_every": 5, "validate_every": 10, "checkpoint_every": 10,
    "warmup_steps": 3, "latent_noise_std": 0.02, "fusemix_alpha": 1.0, "dropout": 0.1, "loss_noise_std": 0.01,
    "smoothing": 0.1,
}  # fmt: skip


def words(latents: Path, output: Path, **options: object) -> list[str]:
    given = {"latents": latents, "output": output, **OPTIONS, **options}
    return ["train", *(f"--{name.replace('_', '-')}={value}" for name, value in given.items())]


@pytest.fixture(scope="module")
def alone(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    return train(Settings(latents=latents, output=tmp_path_factory.mktemp("alone"), **OPTIONS), progress=False)


def test_a_killed_worker_ends_the_others_and_another_number_goes_on(latents: Path, alone: Path, tmp_path) -> None:
    output = tmp_path / "run"
    printed = fails(2, "killed in step 15", *words(latents, output))
    assert "SIGKILL" in printed
    assert read_checkpoint(output / LAST)[0]["step"] == 10
    printed = run(3, *words(latents, output))
    assert printed.count("trained: ") == 1
    assert_same_run(alone, output)
    state, one = (part(read_checkpoint(folder / LAST)[0], "model") for folder in (output, alone))
    for name, value in one.items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("fault", "changes", "sentence"),
    [
        ("first is late", ["--bad-flag=3"], "Unrecognized options: --bad-flag"),
        ("no device", [], "modest-align: process 1 cannot have it"),
    ],
)
def test_an_error_is_said_once(latents: Path, tmp_path, fault: str, changes: list[str], sentence: str) -> None:
    printed = fails(2, fault, *words(latents, tmp_path / "run"), *changes)
    assert printed.count(sentence) == 1
    # Of torchrun itself there is one.
    assert printed.count("Traceback") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"latents": "nothing"}, "nothing holds no latents"),
        ({"steps": -3}, "steps must be greater than or equal to 0, got -3"),
        ({"config": "nothing.toml"}, "settings file nothing.toml does not exist"),
        ({"learning_rate": 1e30}, "is not finite"),
    ],
)
def test_an_error_of_all_is_said_once(latents: Path, tmp_path, changes: dict, sentence: str) -> None:
    printed = fails(2, "first is late", *words(**{"latents": latents, "output": tmp_path / "run", **changes}))
    assert printed.count(sentence) == printed.count("modest-align: ") == 1
    assert printed.count("Traceback") == 1


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_fewer_rows_than_workers_and_uneven_shares(latents: Path, tmp_path, count: int) -> None:
    options = {"batch_size": 3, "steps": 12}
    output = tmp_path / "run"
    printed = run(count, "none", *words(latents, output, **options), module="tests.faulty_program")
    if sys.platform == "linux":
        assert printed.count("ends with 0 threads of a group") == count
    train(Settings(latents=latents, output=tmp_path / "one", **{**OPTIONS, **options}), progress=False)
    assert_same_run(tmp_path / "one", output)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 images, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for number in range(17):
        Image.new("RGB", (4, 3), (number, 2 * number, 255 - number)).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "captions": [f"image {number}", "more " * number][: 1 + number % 2]})
    (folder / "7.png").write_bytes(b"no image")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


def test_shards_are_shared_out_and_an_interrupted_extraction_goes_on(table: Path, tmp_path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    extract_program.run(table, alone)
    expected = {path.name: path.read_bytes() for path in alone.iterdir()}
    assert len([name for name in expected if name.endswith(".safetensors")]) == 6

    fails(2, "killed in shard 4", "extract", table, shared)
    assert len(json.loads((shared / PARTIAL_MANIFEST).read_text())["shards"]) == 2  # of one round
    run(3, table, shared, module="tests.extract_program")
    assert {path.name: path.read_bytes() for path in shared.iterdir()} == expected


@pytest.mark.slow
def test_an_error_in_one_shard_is_said_once(table: Path, tmp_path) -> None:
    printed = fails(2, "no shard", "extract", table, tmp_path / "latents")
    assert printed.count("modest-align: process 1 cannot have it") == 1
    assert printed.count("Traceback") == 1
    run(3, table, tmp_path / "latents", module="tests.extract_program")
