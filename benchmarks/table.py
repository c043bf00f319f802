"""The tables: everything in full, what README shows, and two runs compared."""

from __future__ import annotations

import math
import statistics
from typing import Any

from benchmarks.measure import operation_model

Result = dict[str, Any]
SLOWER = 1.1


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; of fewer than four values least, median, largest."""
    if len(values) < 4:
        return min(values), statistics.median(values), max(values)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratio(result: Result, other: Result) -> tuple[float, float, float]:
    """Quartiles of the rounds' ratios of two results' seconds: what slows a round slows both."""
    return quartiles([a / b for a, b in zip(result["seconds"], other["seconds"], strict=False)])


def select(stored: Result, kind: str) -> list[Result]:
    """The stored workloads of a kind, by dtype, features and rows."""
    cases = [case for case in stored["workloads"] if case["kind"] == kind]
    dtypes = list(dict.fromkeys(case["dtype"] for case in cases))
    return sorted(cases, key=lambda case: (dtypes.index(case["dtype"]), case["features"], case["rows"]))


def main_cases(stored: Result) -> list[Result]:
    """The losses of the first dtype, at the width that has most sizes."""
    cases = select(stored, "loss")
    cases = [case for case in cases if case["dtype"] == cases[0]["dtype"]]
    widths = [case["features"] for case in cases]
    return [case for case in cases if case["features"] == max(widths, key=widths.count)]


def milliseconds(result: Result) -> str:
    """Median and spread."""
    low, middle, high = (t * 1e3 for t in quartiles(result["seconds"]))
    digits = max(0, 2 - math.floor(math.log10(middle)))
    digits = min(digits, 3)
    if len(result["seconds"]) == 1:
        return f"{middle:,.{digits}f}"
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def mebibytes(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def full_tables(stored: Result) -> str:
    """Everything that was measured, as Markdown."""
    parts = [heading(stored)]
    if select(stored, "loss"):
        parts += ["## The loss, forward + backward", loss_table(stored)]
    absent = absences(stored)
    if absent:
        parts += ["Not measured:", "\n".join(f"- {line}" for line in absent)]
    if select(stored, "operations"):
        parts += ["## The four operations", operations_table(stored)]
    if select(stored, "step"):
        parts += ["## One training step", step_table(stored)]
    parts += ["## Where the shapes come from", provenance(stored)]
    return "\n\n".join(parts) + "\n"


def heading(stored: Result) -> str:
    """Where the numbers come from."""
    machine = stored["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    threads = f"{machine['threads']} threads, " if machine["type"] == "cpu" else ""
    return f"{machine['device']}, {threads}{machine['date']}, commit {machine['commit']}; {versions}."


def loss_table(stored: Result) -> str:
    """One row for each workload and provider that was measured or failed there."""
    lines = [
        "| B = N | D | dtype | loss | ms, median (quartiles) | rounds | of plain's time | of the floor "
        "| useful TFLOP/s | peak extra MiB | of plain's | gradient error | of the worst row | loss error |",
        "|---:|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    everywhere = set(_everywhere(stored))
    for case in select(stored, "loss"):
        results = case["results"]
        plain, floor = results.get("plain", {}), results["floor"]
        for name, result in results.items():
            start = f"| {case['rows']:,} | {case['features']:,} | {case['dtype']} | {name} "
            if "failed" in result:
                if name not in everywhere:
                    lines.append(start + f"| {result['failed']} | | | | | | | | | |")
                continue
            if "note" in result:
                start = start[:-1] + f" ({result['note']}) "
            seconds = quartiles(result["seconds"])[1]
            flops = 8 * case["rows"] ** 2 * case["features"]
            cells = [milliseconds(result), str(len(result["seconds"]))]
            cells.append(f"{ratio(result, plain)[1]:.2f}" if "seconds" in plain else "")
            cells.append(f"{ratio(floor, result)[1]:.0%}")
            cells.append(f"{flops / seconds / 1e12:.3g}")
            if "peak_extra_mib" in result:
                cells.append(mebibytes(result["peak_extra_mib"]))
                known = plain.get("peak_extra_mib")
                cells.append(f"{result['peak_extra_mib'] / known:.1%}" if known else "")
            else:
                cells += ["", ""]
            errors = ("gradient_error", "worst_row_error", "loss_error")
            cells += [f"{result[key]:.1e}" if key in result else "" for key in errors]
            lines.append(start + "| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _everywhere(stored: Result) -> dict[str, str]:
    """Who failed on every workload, and its sentence if it was always the same."""
    reasons: dict[str, set[str | None]] = {}
    for case in select(stored, "loss"):
        for name, result in case["results"].items():
            reasons.setdefault(name, set()).add(result.get("failed"))
    return {name: next(iter(why)) for name, why in reasons.items() if len(why) == 1 and None not in why}  # type: ignore[misc]


def absences(stored: Result) -> list[str]:
    """Who took no part and what was left out, a line for each reason."""
    reasons: dict[str, list[str]] = {}
    for name, why in _everywhere(stored).items():
        reasons.setdefault(why, []).append(name)
    return [f"{', '.join(names)}: {why}" for why, names in reasons.items()] + stored["left_out"]


def operations_table(stored: Result) -> str:
    """The four functions of every backend: time, rate, fraction of their own floor."""
    lines = [
        "| B = N | D | dtype | operation | backend | ms, median (quartiles) | rate | of its floor |",
        "|---:|---:|---|---|---|---:|---:|---:|",
    ]
    for case in select(stored, "operations"):
        for name, result in case["results"].items():
            operation, backend = name.split(", ")
            start = f"| {case['rows']:,} | {case['features']:,} | {case['dtype']} | {operation} | {backend} "
            if "failed" in result:
                lines.append(start + f"| {result['failed']} | | |")
            elif backend != "floor":
                sizes = case["feature_bytes"], case["operand_bytes"]
                model = operation_model(operation, case["rows"], case["features"], *sizes)
                seconds = quartiles(result["seconds"])[1]
                rate = f"{model['bytes'] / seconds / 1e9:,.3g} GB/s"
                if model["flops"]:
                    rate = f"{model['flops'] / seconds / 1e12:.3g} TFLOP/s"
                of_floor = ratio(case["results"][f"{operation}, floor"], result)[1]
                lines.append(start + f"| {milliseconds(result)} | {rate} | {of_floor:.0%} |")
    return "\n".join(lines)


def step_table(stored: Result) -> str:
    """The reference trainer's step: what share of it is the loss."""
    lines = [
        "| B | D | loss | step, ms, median (quartiles) | the loss's share | of plain's step | peak extra MiB |",
        "|---:|---:|---|---:|---:|---:|---:|",
    ]
    for case in select(stored, "step"):
        results = case["results"]
        nothing, plain = results["no loss"], results["plain"]
        for name, result in results.items():
            start = f"| {case['rows']:,} | {case['features']:,} | {name} "
            if "failed" in result:
                lines.append(start + f"| {result['failed']} | | | |")
                continue
            share = "" if name == "no loss" else f"{1 - ratio(nothing, result)[1]:.0%}"
            of_plain = f"{ratio(result, plain)[1]:.2f}" if "seconds" in plain else ""
            memory = mebibytes(result["peak_extra_mib"])
            lines.append(start + f"| {milliseconds(result)} | {share} | {of_plain} | {memory} |")
    return "\n".join(lines)


def provenance(stored: Result) -> str:
    """Each shape's name and source."""
    shapes = {(c["rows"], c["features"]): c for c in stored["workloads"]}
    return "\n".join(
        f"- {rows:,} x {features:,} (`{case['name']}`): {case['provenance']}"
        for (rows, features), case in sorted(shapes.items())
    )


def caption(stored: Result) -> str:
    """What the short table shows."""
    case = main_cases(stored)[0]
    return (
        f"Normalisation, loss and all gradients, D = {case['features']}, {case['dtype']}: median times, and multiples "
        "of the plain loss's in the same rounds. The floor is four matmuls of that shape "
        "([what that means](benchmarks/README.md)); errors are against float64."
    )


def short_table(stored: Result) -> str:
    """What a user decides by: time at three sizes, memory and error at the last of them, a row for each loss."""
    cases = [case for case in main_cases(stored) if "plain" in case["results"]]
    crowd = max(len(case["results"]) for case in cases)
    cases = [case for case in cases if len(case["results"]) == crowd]
    large = [case for case in cases if case["rows"] >= 1024]
    cases = large if len(large) >= 3 else cases
    shown = cases if len(cases) <= 3 else [cases[i * (len(cases) - 1) // 2] for i in range(3)]
    last = shown[-1]
    lines = [
        "| loss | "
        + " | ".join(f"B = {case['rows']:,}" for case in shown)
        + f" | peak extra memory at {last['rows']:,} | gradient error |",
        "|---|" + "---:|" * (len(shown) + 2),
    ]
    absent = _everywhere(stored)
    ours_first = sorted(last["results"], key=lambda name: not name.startswith("ours"))
    for name in ours_first:
        if name in absent or name == "floor":
            continue
        cells = []
        for case in shown:
            result = case["results"].get(name, {})
            if "seconds" not in result:
                cells.append(result.get("failed", ""))
                continue
            plain = case["results"]["plain"]
            of_plain = f", {ratio(result, plain)[1]:.2f}x" if "seconds" in plain else ""
            cells.append(_seconds(result) + of_plain)
        result = last["results"][name]
        cells.append(f"{mebibytes(result['peak_extra_mib'])} MiB" if "peak_extra_mib" in result else "")
        cells.append(f"{result['gradient_error']:.0e}" if "gradient_error" in result else result.get("note", ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    floor = [_seconds(case["results"]["floor"]) for case in shown]
    lines.append("| *floor: four matmuls* | " + " | ".join(floor) + " | | |")
    return "\n".join(lines)


def _seconds(result: Result) -> str:
    seconds = quartiles(result["seconds"])[1]
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def compare_runs(old: Result, new: Result, threshold: float = SLOWER) -> tuple[str, list[str]]:
    """Ratios of two runs' times, each in units of its own run's floor, and what is slower beyond doubt.

    Dividing by the floor of the same round takes out most of what makes a shared machine slow on one day. A ratio's
    noise is the two half interquartile ranges in quadrature.

    Returns:
        A Markdown table, and a sentence for each provider slower by more than ``threshold`` and twice the noise; none
        if the runs are from different devices.
    """
    lines = [
        "| B = N | D | dtype | loss | old, ms | new, ms | new / old | in floors | noise |",
        "|---:|---:|---|---|---:|---:|---:|---:|---:|",
    ]
    slower = []
    before = {(c["kind"], c["rows"], c["features"], c["dtype"]): c["results"] for c in old["workloads"]}
    for case in select(new, "loss"):
        results = before.get(("loss", case["rows"], case["features"], case["dtype"]), {})
        for name, result in case["results"].items():
            if "seconds" not in result or "seconds" not in results.get(name, {}):
                continue
            was, now = quartiles(results[name]["seconds"])[1], quartiles(result["seconds"])[1]
            floors = [ratio(each[name], each["floor"]) for each in (results, case["results"])]
            in_floors = floors[1][1] / floors[0][1]
            noise = math.hypot(*((high - low) / 2 / middle for low, middle, high in floors))
            cells = [f"{was * 1e3:,.3g}", f"{now * 1e3:,.3g}", f"{now / was:.2f}", f"{in_floors:.2f}", f"{noise:.2f}"]
            label = f"{case['rows']:,} | {case['features']:,} | {case['dtype']} | {name}"
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
            if in_floors > max(threshold, 1 + 2 * noise) and name.startswith("ours"):
                slower.append(f"{label.replace(' | ', ', ')}: {in_floors:.2f} times as slow, noise {noise:.2f}")
    same = all(old["machine"][key] == new["machine"][key] for key in ("device", "threads"))
    return "\n".join(lines), slower if same else []
