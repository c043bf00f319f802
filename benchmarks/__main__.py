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
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from modest_align_kernels import available_backends, modest_align_loss
from modest_align_kernels.testing import peak_extra_bytes, row_errors

RESULTS = Path(__file__).parent / "results"
SCALE = 14.3
SHAPES = {
    "cpu": ([1024, 4096, 8192, 16384], [512], ["float32"]),
    "cuda": ([1024, 4096, 16384, 32768, 65536], [512, 768, 1024], ["bfloat16"]),
}
# The largest B whose gradient in float64 takes seconds.
LARGEST_TRUTH = {"cpu": 4096, "cuda": 16384}
Provider = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain_loss(image_features: Tensor, text_features: Tensor, scale: Tensor) -> Tensor:
    """The loss as most CLIP trainers write it, with the whole matrix of logits."""
    x, y = F.normalize(image_features, dim=1), F.normalize(text_features, dim=1)
    logits = scale.to(x.dtype) * x @ y.T
    target = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def providers(device: str) -> dict[str, Provider]:
    """The losses that run on ``device``, by name; on a GPU also PyTorch's compiler's and open_clip's."""

    def ours(backend: str) -> Provider:
        return lambda x, y, scale: modest_align_loss(x, y, scale, backend=backend)

    running = [name for name, reason in available_backends(device).items() if reason is None]
    if device == "cpu" and "triton" in running:  # only Triton's interpreter, which says nothing of speed
        running.remove("triton")
    found = {"plain": plain_loss, **{f"ours ({name})": ours(name) for name in running}}
    if device != "cpu":
        found["plain, torch.compile"] = torch.compile(plain_loss)
        if find_spec("open_clip") is not None:
            from open_clip.loss import ClipLoss

            found["open_clip"] = lambda x, y, scale: ClipLoss()(
                F.normalize(x, dim=1), F.normalize(y, dim=1), scale.to(x.dtype)
            )
    return found


def measure(
    rows: int, features: int, dtype: torch.dtype, device: str, rounds: int
) -> dict[str, dict[str, float | str]]:
    """Each provider's seconds, ratio to the plain loss, peak extra MiB and error, once they are seen to agree."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, features, generator=generator).to(device, dtype).requires_grad_() for _ in range(2))
    scale = torch.tensor(SCALE, device=device, requires_grad=True)

    def run(loss_fn: Provider) -> tuple[Tensor, Tensor]:
        loss = loss_fn(x, y, scale)
        return loss.detach(), torch.autograd.grad(loss, (x, y, scale))[0]

    def floor() -> None:
        with torch.no_grad():
            for _ in range(4):
                torch.mm(x, y.T, out=scratch)

    truth = None
    if rows <= LARGEST_TRUTH[device]:
        exact = [t.detach().double().requires_grad_() for t in (x, y)]
        truth = torch.autograd.grad(modest_align_loss(*exact, SCALE, backend="eager"), exact[0])[0]
    result: dict[str, dict[str, float | str]] = {}
    losses, values = {}, {}
    for name, loss_fn in providers(device).items():
        try:
            value, grad = run(loss_fn)
        except torch.OutOfMemoryError:
            result[name] = {"failed": "out of memory"}
            continue
        losses[name], values[name] = loss_fn, float(value)
        result[name] = {"peak_extra_mib": peak_extra_bytes(lambda f=loss_fn: run(f), device) / 2**20}
        if truth is not None:
            result[name]["worst_row_error"] = float(row_errors(grad, truth).max())
        del grad
    assert max(values.values()) - min(values.values()) <= 1e-2 * max(values.values()), f"the losses differ: {values}"
    del truth
    scratch = torch.empty(rows, rows, dtype=dtype, device=device)
    tasks = {"floor": floor, **{name: (lambda f=f: run(f)) for name, f in losses.items()}}
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            synchronize(device)
            start = time.perf_counter()
            task()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    for name, taken in seconds.items():
        result.setdefault(name, {}).update(
            seconds=statistics.median(taken), seconds_low=min(taken), seconds_high=max(taken)
        )
        if "plain" in seconds:
            ratios = [a / b for a, b in zip(taken, seconds["plain"], strict=True)]
            result[name]["ratio_to_plain"] = statistics.median(ratios)
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
        "| B = N | D | dtype | loss | forward + backward, ms | of plain's time | of the floor | useful TFLOP/s "
        "| peak extra MiB | of plain's | worst row's error |",
        "|---:|---:|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case in cases:
        results, flops = case["results"], 8 * case["rows"] ** 2 * case["features"]
        for name, r in results.items():
            start = f"| {case['rows']:,} | {case['features']:,} | {case['dtype']} | {name} "
            if "failed" in r:
                lines.append(start + f"| {r['failed']} | | | | | | |")
            elif name != "floor":
                plain = results["plain"].get("peak_extra_mib")
                cells = [
                    f"{r['seconds'] * 1e3:,.1f}",
                    f"{r['ratio_to_plain']:.2f}" if "ratio_to_plain" in r else "",
                    f"{results['floor']['seconds'] / r['seconds']:.0%}",
                    f"{flops / r['seconds'] / 1e12:.3g}",
                    f"{r['peak_extra_mib']:,.0f}",
                    f"{r['peak_extra_mib'] / plain:.1%}" if plain else "",
                    f"{r['worst_row_error']:.1e}" if "worst_row_error" in r else "",
                ]
                lines.append(start + "| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(cases: list[dict], path: Path) -> None:
    """Time and memory against B, log-log, for the first width and dtype."""
    from matplotlib.figure import Figure

    cases = [c for c in cases if (c["features"], c["dtype"]) == (cases[0]["features"], cases[0]["dtype"])]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for name in dict.fromkeys(name for case in cases for name in case["results"]):
        for axes, key, unit in ((time_axes, "seconds", 1e3), (memory_axes, "peak_extra_mib", 1)):
            points = [(c["rows"], c["results"][name][key] * unit) for c in cases if key in c["results"].get(name, {})]
            if points:
                style = {"color": "#888888", "linestyle": ":"} if name == "floor" else {"marker": "o"}
                axes.plot(*zip(*points, strict=True), label=name, **style)
    title = f"D = {cases[0]['features']}, {cases[0]['dtype']}"
    time_axes.set(title=f"Forward + backward, {title}", ylabel="ms")
    memory_axes.set(title=f"Peak extra memory, {title}", ylabel="MiB")
    for axes in (time_axes, memory_axes):
        axes.set(xscale="log", yscale="log", xlabel="B = N")
        axes.set_xticks(rows := [c["rows"] for c in cases], [f"{r:,}" for r in rows])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(args: list[str] | None = None) -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, features, dtypes = SHAPES[device]
    parser.add_argument("--rows", type=int, nargs="+", default=rows)
    parser.add_argument("--features", type=int, nargs="+", default=features)
    parser.add_argument("--dtypes", nargs="+", default=dtypes, choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file; benchmarks/results/<device>.json by default")
    options = parser.parse_args(args)
    output = options.output or RESULTS / f"{device}.json"
    shapes = [(d, f, r) for d in options.dtypes for f in options.features for r in options.rows]
    cases = []
    for dtype, features, rows in tqdm(shapes, desc="shapes"):
        results = measure(rows, features, getattr(torch, dtype), device, options.rounds)
        cases.append({"rows": rows, "features": features, "dtype": dtype, "results": results})
    output.parent.mkdir(parents=True, exist_ok=True)
    stored = {"machine": machine(device), "rounds": options.rounds, "cases": cases}
    output.write_text(json.dumps(stored, indent=1) + "\n")
    plot(cases, output.with_suffix(".png"))
    print(table(cases))


if __name__ == "__main__":
    main()
