"""Time and memory of the loss, side by side with the plain one: `python -m benchmarks --help`.

Every round runs each provider once, so that a noisy machine is noisy for all of them; what counts are the medians and
the medians of the rounds' ratios. One run is normalisation, loss and all gradients. The floor is four matmuls of the
same shape and dtype, the least that an exact loss without the B x N matrix can do.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from modest_align_kernels import available_backends, modest_align_loss
from modest_align_kernels.testing import peak_extra_bytes

RESULTS = Path(__file__).parent / "results"
SCALE = 14.3
Provider = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain_loss(image_features: Tensor, text_features: Tensor, scale: Tensor) -> Tensor:
    """The loss as most CLIP trainers write it, with the whole matrix of logits."""
    x, y = F.normalize(image_features, dim=1), F.normalize(text_features, dim=1)
    logits = scale.to(x.dtype) * x @ y.T
    target = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def providers(device: str) -> dict[str, Provider]:
    """The losses that run on ``device``, by name."""

    def ours(backend: str) -> Provider:
        return lambda x, y, scale: modest_align_loss(x, y, scale, backend=backend)

    running = [name for name, reason in available_backends(device).items() if reason is None]
    return {"plain": plain_loss, **{f"ours ({name})": ours(name) for name in running}}


def measure(rows: int, features: int, dtype: torch.dtype, device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds, ratio to the plain loss and peak extra MiB of each provider, after an assertion that they agree."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, features, generator=generator).to(device, dtype).requires_grad_() for _ in range(2))
    scale = torch.tensor(SCALE, device=device, requires_grad=True)
    scratch = torch.empty(rows, rows, dtype=dtype, device=device)

    def run(loss_fn: Provider) -> Tensor:
        loss = loss_fn(x, y, scale)
        torch.autograd.grad(loss, (x, y, scale))
        return loss.detach()

    def floor() -> None:
        with torch.no_grad():
            for _ in range(4):
                torch.mm(x, y.T, out=scratch)

    losses = providers(device)
    values = [float(run(loss_fn)) for loss_fn in losses.values()]
    named = dict(zip(losses, values, strict=True))
    assert max(values) - min(values) <= 1e-2 * max(values), f"the losses differ: {named}"
    tasks = {"floor": floor, **{name: (lambda f=f: run(f)) for name, f in losses.items()}}
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            synchronize(device)
            start = time.perf_counter()
            task()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    result = {}
    for name, task in tasks.items():
        ratios = [a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)]
        result[name] = {
            "seconds": statistics.median(seconds[name]),
            "seconds_low": min(seconds[name]),
            "seconds_high": max(seconds[name]),
            "ratio_to_plain": statistics.median(ratios),
        }
        if name != "floor":
            result[name]["peak_extra_mib"] = peak_extra_bytes(task, device) / 2**20
    return result


def synchronize(device: str) -> None:
    """Wait for a GPU's queue."""
    if device != "cpu":
        torch.cuda.synchronize()


def machine(device: str) -> dict[str, str | int]:
    """What a reader needs to know of where the numbers come from."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def table(cases: list[dict]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| B = N | D | dtype | loss | forward + backward, ms | of plain's time | of the floor "
        "| peak extra MiB | of plain's |",
        "|---:|---:|---|---|---:|---:|---:|---:|---:|",
    ]
    for case in cases:
        results = case["results"]
        for name, r in results.items():
            if name == "floor":
                continue
            lines.append(
                f"| {case['rows']:,} | {case['features']:,} | {case['dtype']} | {name} | {r['seconds'] * 1e3:,.1f} "
                f"| {r['ratio_to_plain']:.2f} | {results['floor']['seconds'] / r['seconds']:.0%} "
                f"| {r['peak_extra_mib']:,.0f} | {r['peak_extra_mib'] / results['plain']['peak_extra_mib']:.1%} |"
            )
    return "\n".join(lines)


def main(args: list[str] | None = None) -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 4096, 8192, 16384])
    parser.add_argument("--features", type=int, nargs="+", default=[512])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file; benchmarks/results/<device>.json by default")
    options = parser.parse_args(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    output = options.output or RESULTS / f"{device}.json"
    shapes = [(d, f, r) for d in options.dtypes for f in options.features for r in options.rows]
    cases = []
    for dtype, features, rows in tqdm(shapes, desc="shapes"):
        results = measure(rows, features, getattr(torch, dtype), device, options.rounds)
        cases.append({"rows": rows, "features": features, "dtype": dtype, "results": results})
    output.parent.mkdir(parents=True, exist_ok=True)
    stored = {"machine": machine(device), "rounds": options.rounds, "cases": cases}
    output.write_text(json.dumps(stored, indent=1) + "\n")
    print(table(cases))


if __name__ == "__main__":
    main()
