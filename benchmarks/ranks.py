"""The loss of several ranks beside open_clip's: what travels and what is multiplied, counted; time; gradients.

python -m benchmarks.ranks --ranks 2 4 --rows 4096 --features 512     # gloo, on this machine
python -m benchmarks.ranks --model                                    # the table of docs/many_ranks.md, on paper
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import machine, origin
from benchmarks.providers import open_clip_losses
from benchmarks.results import RESULTS, write
from benchmarks.table import markdown
from modest_align_kernels import modest_align_loss
from modest_align_kernels.distributed import GATHER_BYTES

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]

# Of each collective the argument that holds what is moved, and how often a rank sends it, were every byte sent once.
_COLLECTIVES: dict[str, tuple[int, Callable[[int], float]]] = {
    **{
        name: (place, lambda size: (size - 1) / size)
        for place, names in (
            (0, ("allgather_", "_allgather_base_", "broadcast_", "reduce_", "scatter_")),
            (1, ("reduce_scatter_", "_reduce_scatter_base_", "alltoall_", "alltoall_base_")),
        )
        for name in names
    },
    "allreduce_": (0, lambda size: 2 * (size - 1) / size),
    "send": (0, lambda size: 1),
    "recv_": (0, lambda size: 0),
}


class Traffic(TorchDispatchMode):
    """Counts the bytes that leave a rank, by collective: the mean over the ranks."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one, and do it."""
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            place, times = _COLLECTIVES[name]
            tensors = [t for t in tree_leaves(args[place]) if isinstance(t, Tensor)]
            self.sent[name] += round(times(self.size) * sum(t.numel() * t.element_size() for t in tensors))
        return func(*args, **(kwargs or {}))


class Cost(NamedTuple):
    """A step of one rank: floating-point operations of matmuls, bytes sent, bytes of columns held beyond its own."""

    flops: float
    forward: float
    backward: float
    held: float


def on_paper(strategy: str, size: int, rows: int, width: int, operand: int, total: int, matmuls: int = 4) -> Cost:
    """What a step must cost: B = N = ``rows`` over ``size`` ranks alike, both directions, neither groups nor smoothing.

    Args:
        strategy: "gather", "ring", or "open_clip": its local_loss with gather_with_grad.
        size: W.
        rows: B, of all ranks.
        width: of an operand's row.
        operand: bytes of an element of what is multiplied (open_clip: of the features).
        total: bytes of an element of the gradients that are summed.
        matmuls: 4, or 3 where the forward keeps all exponentials; open_clip's are 6 in either case.
    """
    away = (size - 1) / size
    block, whole = rows / size * width, rows * width
    if strategy == "open_clip":
        logits = 2 * rows / size * rows * operand
        return Cost(12 * block * rows, 2 * whole * operand * away, 2 * whole * operand * away, logits)
    forward = backward = 0.0
    forward += (whole * operand + rows * total) * away  # the columns, and their logsumexps back
    backward += (whole * total + 2 * rows * total) * away  # logsumexps and weights, and the gradients back
    if strategy == "gather":
        held = whole * (operand + total)
    else:
        backward += whole * operand * away  # the columns once more
        # This block and the next; gradients: both sides' new ones, what goes on, what comes, its own from the start.
        held = block * (2 * operand + 5 * total)
    return Cost(2 * matmuls * block * rows, forward, backward, held)


# What the table on paper stands on: an H100 at 600 TFLOP/s, with 50 GB/s of network for each.
RATE, BANDWIDTH, FEATURES = 600e12, 50e9, 1024


def paper_table() -> str:
    """The cost of a step under autocast in 16 bits, of 8 to 1,024 ranks and up to 16M pairs."""
    columns = ["W>", "B>", "B/W>", "auto", "matmuls, TFLOP>", "sent, GB>", "open_clip's>", "columns held, GiB>"]
    columns += ["open_clip's logits, GiB>", "matmuls, ms>", "network, ms>", "step, ms>", "of the matmuls>"]
    lines = []
    for size in (8, 64, 256, 1024):
        for rows in (2**15, 2**18, 2**21, 2**24):
            strategy = "ring" if rows * FEATURES * 6 > GATHER_BYTES else "gather"
            cost = on_paper(strategy, size, rows, FEATURES, 2, 4)
            theirs = on_paper("open_clip", size, rows, FEATURES, 4, 4)
            parts = [(cost.flops / 4 / RATE, cost.forward / BANDWIDTH)]
            parts += [(cost.flops * 3 / 4 / RATE, cost.backward / BANDWIDTH)]
            # The ring sends while it multiplies.
            step = sum(map(max if strategy == "ring" else sum, parts))
            matmuls, network = (sum(part) for part in zip(*parts, strict=True))
            sent = cost.forward + cost.backward, theirs.forward + theirs.backward
            lines.append(
                [
                    *(f"{n:,}" for n in (size, rows, rows // size)),
                    strategy,
                    _digits(cost.flops / 1e12),
                    *(_digits(n / 1e9) for n in sent),
                    *(_digits(n / 2**30) for n in (cost.held, theirs.held)),
                    *(_digits(t * 1e3) for t in (matmuls, network, step)),
                    f"{matmuls / step:.0%}",
                ]
            )
    return markdown(columns, lines)


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def count(step: Callable[[], Any], size: int) -> tuple[int, int]:
    """Floating-point operations of the matmuls of a step, and bytes that it sends."""
    with Traffic(size) as traffic, FlopCounterMode(display=False) as flops:
        step()
    return flops.get_total_flops(), sum(traffic.sent.values())


def ours(strategy: str) -> LossFunction:
    """The loss of the default group."""
    return functools.partial(modest_align_loss, process_group=dist.group.WORLD, strategy=strategy)


def open_clip(local_loss: bool, gather_with_grad: bool) -> LossFunction:
    """open_clip's, which wants normalised features."""
    options = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
    loss_fn = open_clip_losses().ClipLoss(**options, rank=dist.get_rank(), world_size=dist.get_world_size())
    return lambda x, y, scale: loss_fn(F.normalize(x, dim=1), F.normalize(y, dim=1), scale)


THEIRS = "open_clip, local_loss, gather_with_grad"


def beside_open_clip(rows: int, features: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Of each provider flops, bytes and seconds a step, on this rank; parity first."""
    size, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    x, y = (torch.randn(rows // size, features, generator=generator).requires_grad_() for _ in range(2))
    scale = torch.tensor(20.0, requires_grad=True)
    losses = {"ours, gather": ours("gather"), "ours, ring": ours("ring"), THEIRS: open_clip(True, True)}

    def step(name: str) -> tuple[Any, ...]:
        x.grad = y.grad = scale.grad = None
        loss = losses[name](x, y, scale)
        loss.backward()
        return loss.detach(), x.grad, y.grad, scale.grad

    expected = step(THEIRS)
    shared = torch.stack((expected[0], expected[3]))
    dist.all_reduce(shared)
    results: dict[str, dict[str, Any]] = {}
    for name in losses:
        if name != THEIRS:
            loss, *of_features, of_scale = step(name)
            torch.testing.assert_close(of_features, list(expected[1:3]), rtol=1e-3, atol=1e-7)
            torch.testing.assert_close(torch.stack((loss, of_scale)), shared / size, rtol=1e-4, atol=1e-6)
        flops, sent = count(functools.partial(step, name), size)
        results[name] = {"flops": flops, "sent": sent, "seconds": []}
    for turn in range(rounds):
        names = list(losses)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            dist.barrier()
            start = time.perf_counter()
            step(name)
            dist.barrier()
            results[name]["seconds"].append(time.perf_counter() - start)
    return results


class _Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16)) for _ in range(2))
        self.log_scale = nn.Parameter(torch.tensor([2.3]))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.image(x), self.text(y), self.log_scale.exp().squeeze()


def gradients(rows: int) -> dict[str, tuple[float, float]]:
    """All parameters' gradient after DistributedDataParallel's mean: its norm in the true one's, and their cosine."""
    size, rank = dist.get_world_size(), dist.get_rank()
    x, y = (torch.randn(rows, 24, generator=torch.Generator().manual_seed(k)).double() for k in (1, 2))
    own = slice(rank * rows // size, (rank + 1) * rows // size)

    def gradient(loss_fn: LossFunction, parallel: bool) -> Tensor:
        model: nn.Module = _Towers().double()
        if parallel:
            model = nn.parallel.DistributedDataParallel(model)
        loss_fn(*model(*((x[own], y[own]) if parallel else (x, y)))).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    truth = gradient(modest_align_loss, parallel=False)
    losses = {f"ours, {strategy}": ours(strategy) for strategy in ("gather", "ring")}
    for flags in ((False, False), (True, False), (False, True), (True, True)):
        losses["open_clip, local_loss={}, gather_with_grad={}".format(*flags)] = open_clip(*flags)
    got = {name: gradient(loss_fn, parallel=True) for name, loss_fn in losses.items()}
    return {name: (float(g.norm() / truth.norm()), float(F.cosine_similarity(g, truth, 0))) for name, g in got.items()}


def _work(rank: int, size: int, folder: str, rows: int, features: int, rounds: int, threads: int) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size)
    results = beside_open_clip(rows, features, rounds), gradients(8 * size)
    if rank == 0:
        torch.save(results, f"{folder}/results")
    dist.barrier()
    dist.destroy_process_group()


def run(size: int, rows: int, features: int, rounds: int) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Both of ``size`` processes."""
    threads = max(1, torch.get_num_threads() // size)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_work, (size, folder, rows, features, rounds, threads), nprocs=size)
        results: tuple[dict[str, dict[str, Any]], dict[str, Any]] = torch.load(f"{folder}/results")
        return results


def report(sizes: Sequence[int], rows: int, features: int, rounds: int) -> str:
    """Everything, as Markdown."""
    load = os.getloadavg()[0]
    results = {size: run(size, rows, features, rounds) for size in sizes}
    chip, where = machine("cpu"), origin()
    head = f"**{chip['device']}, {chip['threads']} threads for all processes together**, {where['date']}, "
    head += f"commit {where['commit']}, torch {where['versions']['torch']}, gloo, `OMP_WAIT_POLICY` "
    head += f"{where['wait_policy']}, load average {load:.1f} before. B = {rows:,} over W processes, "
    head += f"D = {features}, float32; medians of {rounds} rounds, and of the rounds' ratios."
    costs, grads = [], []
    for size, (steps, ratios) in results.items():
        theirs = steps[THEIRS]
        for name, step in steps.items():
            pairs = zip(step["seconds"], theirs["seconds"], strict=True)
            costs.append(
                [
                    *(str(size), name),
                    *(f"{step['flops'] / 1e9:.4g}", f"{step['flops'] / theirs['flops']:.3f}"),
                    *(f"{step['sent'] / 2**20:.4g}", f"{step['sent'] / theirs['sent']:.4f}"),
                    *(
                        f"{statistics.median(step['seconds']) * 1e3:.4g}",
                        f"{statistics.median(a / b for a, b in pairs):.2f}",
                    ),
                ]
            )
        grads += [[str(size), name, f"{norm:.4f}", f"{cosine:.4f}"] for name, (norm, cosine) in ratios.items()]
    columns = ["W>", "loss", "matmuls, GFLOP a rank>", "of open_clip's>", "sent, MiB a rank>", "of open_clip's>"]
    columns += ["ms a step>", "of open_clip's>"]
    of_gradients = markdown(["W>", "loss", "norm, of the true one's>", "cosine>"], grads)
    parts = "# The loss of several ranks", head, markdown(columns, costs)
    parts += "## All parameters' gradient after DDP's mean, in float64, beside one process's", of_gradients
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print, and write a file beside the other results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="numbers of processes")
    parser.add_argument("--rows", type=int, default=4096, help="pairs of all processes together")
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULTS / "ranks.md")
    parser.add_argument("--model", action="store_true", help="only print the table on paper")
    given = parser.parse_args(arguments)
    if given.model:
        print(paper_table())
        return
    text = report(given.ranks, given.rows, given.features, given.rounds)
    print(text)
    write(text.encode(), given.output)


if __name__ == "__main__":
    main()
