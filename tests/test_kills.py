"""Training that is killed at random moments, or whose disk is full: nothing is lost, bit for bit. All of it is slow."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from train_data import assert_same_run, small_settings, train_in_one_thread

from modest_align_train.checkpoints import LAST, read_checkpoint

pytestmark = pytest.mark.slow
KILLS = 50


def test_killed_at_random_moments(tmp_path: Path) -> None:
    # Most of the time a checkpoint is being written.
    settings = small_settings(
        tmp_path, steps=300, checkpoint_every=2, validate_every=20, log_every=7, loss_noise_std=0.01, dropout=0.1,
        fusemix_alpha=0.5,
    )  # fmt: skip
    context = multiprocessing.get_context("forkserver")
    # so that a process starts in no time
    context.set_forkserver_preload(["modest_align_train.train", "torch.utils.tensorboard"])

    def start(output: Path) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=train_in_one_thread, args=(replace(settings, output=output),))
        process.start()
        return process

    start(tmp_path / "warm").join()
    began = time.monotonic()
    process = start(tmp_path / "whole")
    process.join()
    life = time.monotonic() - began
    assert process.exitcode == 0

    moments = random.Random(0)
    found = {"kills": 0, "before the first checkpoint": 0, "while a file was written": 0, "runs": 0}
    run = settings.output

    def enough() -> bool:
        return found["kills"] >= KILLS and (found["while a file was written"] > 0 or found["kills"] >= 5 * KILLS)

    while not enough() or run.exists():
        process = start(run)
        process.join(None if enough() else moments.uniform(0, life))
        process.kill()  # SIGKILL; one that has ended does not mind
        process.join()
        if process.exitcode == 0:
            assert_same_run(run, tmp_path / "whole")
            shutil.rmtree(run)
            found["runs"] += 1
            continue
        assert process.exitcode == -9
        found["kills"] += 1
        found["before the first checkpoint"] += not (run / LAST).exists()
        found["while a file was written"] += any(run.glob(".*.tmp"))
    print(json.dumps(found))
    assert found["while a file was written"]
    assert found["before the first checkpoint"] < KILLS / 2


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="no file system can be mounted",
)
def test_a_full_disk_that_gets_space_again(tmp_path: Path) -> None:
    settings = small_settings(tmp_path, steps=60, embedding_dim=64, dropout=0.1)
    train_in_one_thread(replace(settings, output=tmp_path / "whole"))
    # The first checkpoint fits, the next one does not fit beside it.
    size = (tmp_path / "whole" / LAST).stat().st_size
    disk, run = tmp_path / "disk", tmp_path / "disk" / "run"
    disk.mkdir()
    (tmp_path / "settings.toml").write_text(replace(settings, output=run).to_toml())
    script = f"""
        mount -t tmpfs -o size={int(1.7 * size)} none {disk}
        train() {{ {sys.executable} -m modest_align_train train --config {tmp_path}/settings.toml; }}
        train; test $? = 2 || exit 1
        ls -A {run}
        mount -o remount,size=100m {disk}
        train || exit 1
        cp -r {run} {tmp_path}/copied
    """
    path = os.pathsep.join([str(Path(__file__).parents[1] / "python"), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["unshare", "-rm", "bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"modest-align: {run}/") == 1
    assert "No space left on device" in done.stderr
    assert LAST in done.stdout.splitlines()
    assert ".tmp" not in done.stdout
    assert read_checkpoint(tmp_path / "copied" / LAST)[0]["step"] == 60
    assert_same_run(tmp_path / "copied", tmp_path / "whole")
