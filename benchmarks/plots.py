"""The two pictures: time and memory against B, and the fraction of the floor against B and D."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter

from benchmarks.table import main_cases, quartiles, ratio, select

Result = dict[str, Any]
# Ours in warm colours and thick lines, the peers in cool ones.
OURS = ("#c1121f", "#f48c06", "#7b2d26")
THEIRS = ("#1d3557", "#457b9d", "#2a9d8f", "#8a6fb3", "#6c757d", "#4f772d", "#a68a64", "#b56576")
FLOOR = {"color": "#222222", "linestyle": ":", "linewidth": 1.4, "marker": ""}


def styles(names: list[str]) -> dict[str, dict[str, Any]]:
    """A line style for each provider."""
    found: dict[str, dict[str, Any]] = {"floor": FLOOR}
    ours = [name for name in names if name.startswith("ours")]
    theirs = [name for name in names if name != "floor" and name not in ours]
    for i, name in enumerate(ours):
        found[name] = {"color": OURS[i % len(OURS)], "linewidth": 2.4, "marker": "o", "zorder": 5}
    for i, name in enumerate(theirs):
        marker = "sv^D<>pX"[i % 8]
        found[name] = {"color": THEIRS[i % len(THEIRS)], "linewidth": 1.3, "marker": marker, "markersize": 4.5}
    return found


def _line(axes: Axes, points: list[tuple[float, float, float, float]], label: str, style: dict[str, Any]) -> None:
    """Points (x, low, middle, high) with error bars."""
    if points:
        where, low, middle, high = zip(*points, strict=True)
        below, above = ([abs(m - e) for m, e in zip(middle, ends, strict=True)] for ends in (low, high))
        axes.errorbar(where, middle, yerr=(below, above), label=label, capsize=2, elinewidth=1, **style)


def _rows_axis(axes: Axes, rows: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(rows, [f"{r // 1024}k" if r >= 1024 else str(r) for r in rows])
    axes.minorticks_off()
    axes.set_xlabel("B = N")


def _finish(figure: Figure, axes: Axes, path: Path) -> None:
    """Add one legend for all panels and write the whole file or none of it."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=130, format="png")
    temporary.replace(path)


def plot_scaling(stored: Result, path: Path) -> None:
    """Time and memory against B, log-log, for the first dtype and the width with most sizes."""
    cases = main_cases(stored)
    names = list(dict.fromkeys(name for case in cases for name in case["results"]))
    names = [name for name in names if any("failed" not in c["results"].get(name, {"failed": ""}) for c in cases)]
    style = styles(names)
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for name in names:
        results = [(case["rows"], case["results"][name]) for case in cases if name in case["results"]]
        _line(
            time_axes,
            [(rows, *quartiles(r["seconds"])) for rows, r in results if "seconds" in r],
            name,
            style[name],
        )
        known = [(rows, *[r["peak_extra_mib"]] * 3) for rows, r in results if "peak_extra_mib" in r]
        _line(memory_axes, known, name, style[name])
        beyond = [(rows, r["predicted_mib"]) for rows, r in results if "predicted_mib" in r]
        if known and beyond and name == "plain":
            color = style[name]["color"]
            line = [(known[-1][0], known[-1][2]), *beyond]
            memory_axes.plot(*zip(*line, strict=True), color=color, linestyle="--", linewidth=1)
            memory_axes.plot(*zip(*beyond, strict=True), color=color, linestyle="", marker="x", markersize=8)
            memory_axes.annotate(
                f"{name} does not fit",
                beyond[0],
                xytext=(-8, 2),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color=color,
            )
    title = f"D = {cases[0]['features']}, {cases[0]['dtype']}"
    time_axes.set(title=f"Time, forward + backward, {title}", yscale="log")
    time_axes.yaxis.set_major_formatter(EngFormatter(unit="s"))
    memory_axes.set(title=f"Peak extra memory, {title}")
    memory_axes.set_yscale("log", base=4)
    memory_axes.yaxis.set_major_formatter(
        FuncFormatter(lambda mib, _: f"{mib / 1024:g} GiB" if mib >= 1024 else f"{mib:g} MiB")
    )
    whole = stored["machine"]["memory_gib"] * 1024
    memory_axes.axhline(whole, color="#999999", linestyle="--", linewidth=1)
    memory_axes.annotate(
        f"this machine has {whole / 1024:.0f} GiB",
        (cases[0]["rows"], whole),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=8,
        color="#666666",
    )
    for axes in (time_axes, memory_axes):
        _rows_axis(axes, [case["rows"] for case in cases])
        axes.grid(alpha=0.25)
    _finish(figure, time_axes, path)


def plot_floor(stored: Result, path: Path) -> None:
    """The fraction of the floor that each loss reaches, against B and, at the largest B that has several, against D."""
    cases = main_cases(stored)
    widths = _most_widths(stored)
    names = [name for name in dict.fromkeys(n for c in cases for n in c["results"]) if name != "floor"]
    names = [name for name in names if any("seconds" in c["results"].get(name, {}) for c in cases)]
    style = styles(names)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2 if len(widths) > 1 else 1, sharey=True, squeeze=False)[0]
    for axes, chosen, key in zip(panels, (cases, widths), ("rows", "features"), strict=False):
        for name in names:
            points = [
                (case[key], *(100 * r for r in ratio(case["results"]["floor"], case["results"][name])))
                for case in chosen
                if "seconds" in case["results"].get(name, {})
            ]
            _line(axes, points, name, style[name])
        axes.axhline(100, **{k: v for k, v in FLOOR.items() if k != "marker"})
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    _rows_axis(panels[0], [case["rows"] for case in cases])
    panels[0].set(
        title=f"D = {cases[0]['features']}, {cases[0]['dtype']}", ylabel="% of the floor (four matmuls / time)"
    )
    if len(panels) > 1:
        panels[1].set(title=f"B = {widths[0]['rows']:,}, {widths[0]['dtype']}", xlabel="D")
        panels[1].set_xticks([case["features"] for case in widths])
    _finish(figure, panels[0], path)


def _most_widths(stored: Result) -> list[Result]:
    """The cases of the first dtype, at the largest size that has most widths."""
    cases = [case for case in select(stored, "loss") if case["dtype"] == select(stored, "loss")[0]["dtype"]]
    sizes = [case["rows"] for case in cases]
    chosen = max(sizes, key=lambda rows: (sizes.count(rows), rows))
    return [case for case in cases if case["rows"] == chosen]
