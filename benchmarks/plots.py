"""The two pictures: time and memory against B, and the fraction of the floor against B and D."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter

from benchmarks.results import FLOOR, PLAIN, Key, Result, write
from benchmarks.table import first_dtype, main_cases, quartiles, ratio

# Ours in warm colours and thick lines, the peers in cool ones.
OURS = ("#c1121f", "#f48c06", "#7b2d26")
THEIRS = ("#1d3557", "#457b9d", "#2a9d8f", "#8a6fb3", "#6c757d", "#4f772d", "#a68a64", "#b56576")
FLOOR_STYLE = {"color": "#222222", "linestyle": ":", "linewidth": 1.4}


def styles(keys: list[Key]) -> dict[Key, dict[str, Any]]:
    """A line style for each provider."""
    found: dict[Key, dict[str, Any]] = {FLOOR: {**FLOOR_STYLE, "marker": ""}}
    for i, key in enumerate(key for key in keys if key.ours):
        found[key] = {"color": OURS[i % len(OURS)], "linewidth": 2.4, "marker": "o", "zorder": 5}
    for i, key in enumerate(key for key in keys if key not in found):
        found[key] = {
            "color": THEIRS[i % len(THEIRS)],
            "linewidth": 1.3,
            "marker": "sv^D<>pX"[i % 8],
            "markersize": 4.5,
        }
    return {key: found[key] for key in keys}


def _line(axes: Axes, points: list[tuple[float, float, float, float]], key: Key, style: dict[str, Any]) -> None:
    """Points (x, low, middle, high) with error bars."""
    if points:
        where, low, middle, high = zip(*points, strict=True)
        below, above = ([abs(m - e) for m, e in zip(middle, ends, strict=True)] for ends in (low, high))
        axes.errorbar(where, middle, yerr=(below, above), label=str(key), capsize=2, elinewidth=1, **style)


def _rows_axis(axes: Axes, rows: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(rows, [f"{r // 1024}k" if r >= 1024 else str(r) for r in rows])
    axes.minorticks_off()
    axes.set_xlabel("B = N")


def _finish(figure: Figure, axes: Axes, stored: Result, path: Path) -> None:
    """Add the chip's name and one legend for all panels, and write the picture."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(stored["machine"]["device"], fontsize=10, color="#666666")
    picture = BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    write(picture.getvalue(), path)


def _timed(cases: list[Result]) -> list[Key]:
    """Whose time was measured in one of the cases at least."""
    return list(dict.fromkeys(key for case in cases for key, result in case["results"].items() if "seconds" in result))


def plot_scaling(stored: Result, path: Path) -> None:
    """Time and memory against B, log-log, for the first dtype and the width with most sizes."""
    cases = main_cases(stored)
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    small = {"textcoords": "offset points", "fontsize": 8}
    for key, style in styles(_timed(cases)).items():
        results = [(case["rows"], case["results"][key]) for case in cases if key in case["results"]]
        _line(time_axes, [(rows, *quartiles(r["seconds"])) for rows, r in results if "seconds" in r], key, style)
        known = [(rows, *[r["peak_extra_mib"]] * 3) for rows, r in results if "peak_extra_mib" in r]
        _line(memory_axes, known, key, style)
        beyond = [(rows, r["predicted_mib"]) for rows, r in results if "predicted_mib" in r]
        if known and beyond and key == PLAIN:
            color = style["color"]
            line = [(known[-1][0], known[-1][2]), *beyond]
            memory_axes.plot(*zip(*line, strict=True), color=color, linestyle="--", linewidth=1)
            memory_axes.plot(*zip(*beyond, strict=True), color=color, linestyle="", marker="x", markersize=8)
            memory_axes.annotate(f"{key} does not fit", beyond[0], xytext=(-8, 2), ha="right", color=color, **small)
    title = f"D = {cases[0]['features']}, {cases[0]['dtype']}"
    time_axes.set(title=f"Time, forward + backward, {title}", yscale="log")
    time_axes.yaxis.set_major_formatter(EngFormatter(unit="s"))
    memory_axes.set(title=f"Peak extra memory, {title}")
    memory_axes.set_yscale("log", base=4)
    memory_axes.yaxis.set_major_formatter(
        FuncFormatter(lambda mib, _: f"{mib / 1024:g} GiB" if mib >= 1024 else f"{mib:g} MiB")
    )
    whole = stored["machine"]["memory_gib"]
    memory_axes.axhline(whole * 1024, color="#999999", linestyle="--", linewidth=1)
    where = (cases[0]["rows"], whole * 1024)
    memory_axes.annotate(f"this machine has {whole:.0f} GiB", where, xytext=(0, 3), color="#666666", **small)
    for axes in (time_axes, memory_axes):
        _rows_axis(axes, [case["rows"] for case in cases])
        axes.grid(alpha=0.25)
    _finish(figure, time_axes, stored, path)


def plot_floor(stored: Result, path: Path) -> None:
    """The fraction of the floor that each loss reaches, against B and, at the largest B that has several, against D."""
    cases, all_widths = main_cases(stored), first_dtype(stored)
    sizes = [case["rows"] for case in all_widths]
    chosen_rows = max(sizes, key=lambda rows: (sizes.count(rows), rows))
    widths = [case for case in all_widths if case["rows"] == chosen_rows]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2 if len(widths) > 1 else 1, sharey=True, squeeze=False)[0]
    for axes, chosen, across in zip(panels, (cases, widths), ("rows", "features"), strict=False):
        for key, style in styles([key for key in _timed(cases) if key != FLOOR]).items():
            points = [
                (case[across], *(100 * r for r in ratio(case["results"][FLOOR], case["results"][key])))
                for case in chosen
                if "seconds" in case["results"].get(key, {})
            ]
            _line(axes, points, key, style)
        axes.axhline(100, **FLOOR_STYLE)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    _rows_axis(panels[0], [case["rows"] for case in cases])
    panels[0].set(
        title=f"D = {cases[0]['features']}, {cases[0]['dtype']}", ylabel="% of the floor (four matmuls / time)"
    )
    if len(panels) > 1:
        panels[1].set(title=f"B = {chosen_rows:,}, {widths[0]['dtype']}", xlabel="D")
        panels[1].set_xticks([case["features"] for case in widths])
    _finish(figure, panels[0], stored, path)
