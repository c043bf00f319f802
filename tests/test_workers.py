"""torchrun: the same run and the same latents as one process makes, and what happens when a worker ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from train_data import write_latents

from modest_align_train.latents import MANIFEST, PARTIAL_MANIFEST
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
    process = start(2, *words(latents, output))
    while not (output / "last.pt").is_file():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    killed = process.communicate(timeout=60)[0]
    if process.returncode != 0:  # else it was through before
        assert "SIGKILL" in killed
    printed = run(3, *words(latents, output))
    assert printed.count("trained: ") == (1 if torch.load(output / "last.pt")["step"] == 30 else 0)
    assert_same_run(alone, output)
    state, one = (torch.load(folder / "last.pt", weights_only=True)["model"] for folder in (output, alone))
    for name, value in one.items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4)


def test_a_bad_setting_is_said_once(latents: Path, tmp_path) -> None:
    process = start(2, *words(tmp_path / "nothing", tmp_path / "run"))
    printed = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert printed.count("modest-align: ") == 1
    assert "Traceback" not in printed.split("modest-align: ")[1].split("\n")[0]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_fewer_rows_than_workers_and_uneven_shares(latents: Path, tmp_path, count: int) -> None:
    options = {"batch_size": 3, "steps": 12}
    output = tmp_path / "run"
    run(count, *words(latents, output, **options))
    train(Settings(latents=latents, output=tmp_path / "one", **{**OPTIONS, **options}), progress=False)
    assert_same_run(tmp_path / "one", output)


def test_shards_are_shared_out_and_an_interrupted_extraction_goes_on(tmp_path) -> None:
    table, alone, shared = tmp_path / "pairs.jsonl", tmp_path / "alone", tmp_path / "shared"
    rows = []
    for number in range(17):
        Image.new("RGB", (4, 3), (number, 2 * number, 255 - number)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "captions": [f"image {number}", "more " * number][: 1 + number % 2]})
    (tmp_path / "7.png").write_bytes(b"no image")
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    extract_program.run(table, alone)
    expected = {path.name: path.read_bytes() for path in alone.iterdir()}
    assert len([name for name in expected if name.endswith(".safetensors")]) == 6

    # As it is after two of three rounds of two workers: the fifth and the sixth shard are missing.
    run(2, table, shared, module="tests.extract_program")
    assert {path.name: path.read_bytes() for path in shared.iterdir()} == expected
    manifest = json.loads((shared / MANIFEST).read_text())
    shards = [{**shard, "records": 3, "skipped": [], "faulty": []} for shard in manifest["shards"][:4]]
    shards[2]["skipped"] = manifest["skipped"]  # the seventh image
    partial = {**manifest, "shards": shards}
    (shared / PARTIAL_MANIFEST).write_text(json.dumps(partial))
    for name in (MANIFEST, *(f"shard-0000{k}.{kind}" for k in (4, 5) for kind in ("safetensors", "jsonl"))):
        (shared / name).unlink()
    run(3, table, shared, module="tests.extract_program")
    assert {path.name: path.read_bytes() for path in shared.iterdir()} == expected
