"""Data larger than the memory that it may take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PAIRS, IMAGE_DIM, TEXT_DIM = 300_000, 1536, 1024


@pytest.mark.slow
def test_memory_does_not_grow_with_the_latents(tmp_path):
    """1.5 GB of them; what is resident may grow by half of that, of which the records take 0.2 GB."""
    words = f"{PAIRS} {tmp_path} --steps 60 --validation 1000 --test 1000 --embedding-dim 64 --blocks 0".split()
    finished = subprocess.run(
        [sys.executable, "-m", "tests.scale_program", *words],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    lines = {line["what"]: line for line in map(json.loads, finished.stdout.splitlines())}
    print(finished.stdout)
    latents = PAIRS * (IMAGE_DIM + TEXT_DIM) * 2 / 2**20
    assert lines["evaluate"]["peak"] - lines["start"]["peak"] < latents / 2
    assert lines["open"]["images"] == PAIRS
    # Of 1,000 images, by chance 0.1%: each caption came with its own image.
    assert lines["evaluate"]["R@1"] > 50
