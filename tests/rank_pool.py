"""Processes that stay: four ranks of one gloo group, to which tests send functions of ``rank_jobs.py`` by name."""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SIZE = 4
TIMEOUT = 100.0  # seconds that a job may take
# The ranks of the whole group that are the smaller ones: their numbers in it are others.
MEMBERS = {2: (2, 3), 3: (1, 2, 3), 4: (0, 1, 2, 3)}


def _work(rank: int, store: str, connection: Connection) -> None:
    import conftest  # noqa: F401  one thread
    import rank_jobs
    import torch

    timeout = datetime.timedelta(seconds=TIMEOUT / 4)
    file_store = torch.distributed.FileStore(store, SIZE)
    torch.distributed.init_process_group("gloo", store=file_store, rank=rank, world_size=SIZE, timeout=timeout)
    groups = {size: torch.distributed.new_group(members, timeout) for size, members in MEMBERS.items()}
    while True:
        job = connection.recv()
        if job is None:
            return
        name, size, options = job
        torch.manual_seed(rank)
        try:
            connection.send((None, getattr(rank_jobs, name)(groups[size], **options)))
        except Exception:
            connection.send((traceback.format_exc(), None))


class RankPool:
    """Started by the first job; a job that fails or hangs takes it down, and the next starts another."""

    def __init__(self) -> None:
        self.processes: list[Any] = []
        self.connections: list[Connection] = []

    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        for rank in range(SIZE):
            ours, theirs = context.Pipe()
            store = str(Path(self.folder.name, "store"))
            process = context.Process(target=_work, args=(rank, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.processes, self.connections = [], []

    def run(self, name: str, size: int, **options: Any) -> list[Any]:
        """What the function returns on each of ``size`` ranks; AssertionError with every traceback if one raises."""
        if not self.processes:
            self.start()
        members = [self.connections[rank] for rank in MEMBERS[size]]
        for connection in members:
            connection.send((name, size, options))
        until, answers = time.monotonic() + TIMEOUT, []
        for connection in members:
            answered = connection.poll(max(0.0, until - time.monotonic()))
            try:
                answers.append(connection.recv() if answered else ("no answer: it hangs", None))
            except EOFError:
                answers.append(("it died", None))
        failures = [f"rank {rank} of {size}: {error}" for rank, (error, _) in enumerate(answers) if error]
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return [result for _, result in answers]
