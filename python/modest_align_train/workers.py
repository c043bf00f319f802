"""The processes that torchrun starts: what each of them does, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from modest_align_train.devices import choose_device
from modest_align_train.files import folder_of_its_own

# A worker waits so long for one that is stuck, as a shard of images on a slow CPU takes minutes; not for a dead one.
TIMEOUT = timedelta(minutes=30)

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """This process among those that work together; by default it is alone, and nothing below does anything.

    Attributes:
        rank: Its number.
        size: How many there are.
        device: Where this one computes; empty: wherever it was told to.
    """

    rank: int = 0
    size: int = 1
    device: str = ""

    @property
    def group(self) -> dist.ProcessGroup | None:
        """What they talk through. Not kept here: one that is alive when Python ends aborts the process."""
        return dist.group.WORLD if self.size > 1 else None

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """This process's part of so many rows."""
        return slice(rows * self.rank // self.size, rows * (self.rank + 1) // self.size)

    def everyone(self, own: T) -> list[T]:
        """What every process has, in the order of their numbers."""
        if self.group is None:
            return [own]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own, group=self.group)
        return found

    def together(self, function: Callable[..., T], *args: Any) -> T:
        """What ``function(*args)`` returns, once every process has it; what it raises anywhere is raised everywhere."""
        try:
            result, error = function(*args), None
        except Exception as raised:
            if self.group is None:
                raise
            error = raised
        found = next((one for one in self.everyone(error) if one is not None), None)
        if found is not None:
            raise found
        return result

    @contextmanager
    def alone_in(self, folder: Path) -> Iterator[None]:
        """Have a folder for these processes alone; see `folder_of_its_own`."""
        with ExitStack() as stack:
            self.together(lambda: self.writes and stack.enter_context(folder_of_its_own(folder)))
            yield

    def agree(self, what: str, own: object) -> None:
        """Raise everywhere unless all processes have the same."""
        found = self.everyone(own)
        for rank, other in enumerate(found):
            if other != found[0]:
                raise ValueError(
                    f"{what} of process {rank} is not that of process 0: all of them want the same files and arguments"
                )

    def join(self, rows: Tensor) -> Tensor:
        """The rows of all processes, [their sum, ...], in the order of their numbers, on this one's device."""
        return rows if self.group is None else torch.cat([r.to(rows.device) for r in self.everyone(rows.cpu())])

    def any(self, own: bool) -> bool:
        """Whether it is so for any process."""
        if self.group is None:
            return own
        # On the CPU: a GPU need not wait.
        flag = torch.tensor([own], dtype=torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag)

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Make each gradient its mean over the processes, as DistributedDataParallel does."""
        if self.group is None:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=self.group)
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient) / self.size)


ALONE = Workers()


@contextmanager
def workers_of_torchrun(device: str) -> Iterator[Workers]:
    """The workers that torchrun started, or this process alone.

    Args:
        device: As the settings have it; "auto" and "cuda" become this process's own GPU.

    Raises:
        ValueError: There is no such device.
    """
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield ALONE
        return
    chosen = choose_device(device)
    if chosen.index is not None:
        raise ValueError(f"device: got {device}, want {chosen.type}: under torchrun each process takes its own")
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    # Imported later, as torch.compile does, its defaults keep the group alive to the end of the process, which then
    # aborts now and then: torchrun would call a run failed that was through.
    import_module("torch.distributed.nn.functional")
    # Objects and what the host asks for travel by gloo, where there is NCCL too.
    dist.init_process_group("gloo" if chosen.type == "cpu" else "cpu:gloo,cuda:nccl", timeout=TIMEOUT)
    try:
        workers = Workers(dist.get_rank(), dist.get_world_size(), str(chosen))
        # There may be fewer GPUs than processes, which only those without one find out.
        workers.together(choose_device, chosen)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        yield workers
    finally:
        dist.destroy_process_group()
