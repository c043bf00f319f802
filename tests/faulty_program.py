"""The program, with a fault in one process or none; test_workers.py starts it under torchrun."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from modest_align_train import cli, extract, train, workers
from tests import extract_program

OWN = os.environ["RANK"]


def at_call(number: int, function: Callable[..., Any], fault: Callable[[], object]) -> Callable[..., Any]:
    """`function`, with a fault in process 1 before that call."""
    calls = 0

    def called(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if OWN == "1" and calls == number:
            fault()
        return function(*args)

    return called


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refused() -> None:
    raise ValueError("process 1 cannot have it")


def choose_device(device: str | torch.device) -> torch.device:
    if OWN == "1" and not isinstance(device, str):  # its own, after "auto" was chosen
        refused()
    return torch.device("cpu")


FAULT, *words = sys.argv[1:]
extract.load_image_encoder, extract.load_text_encoder = extract_program.load_images, extract_program.load_texts
extract.extract.__kwdefaults__["shard_size"] = 3
if FAULT == "first is late" and OWN == "0":
    time.sleep(1)
elif FAULT == "killed in step 15":
    train.training_step = at_call(15, train.training_step, killed)
elif FAULT == "killed in shard 4":
    extract.write_shard = at_call(2, extract.write_shard, killed)
elif FAULT == "no shard":
    extract.write_shard = at_call(1, extract.write_shard, refused)
elif FAULT == "no device":
    workers.choose_device = choose_device
status = cli.main(words)
# Threads of a group that is alive when Python ends abort the process, one time in some twenty.
threads = [name.read_text() for name in Path("/proc/self/task").glob("*/comm")]
print(f"process {OWN} ends with {sum('gloo' in name for name in threads)} threads of a group")
sys.exit(status)
