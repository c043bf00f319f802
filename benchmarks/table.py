"""The tables: everything in full, what README and the page of each chip show, and two runs compared."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from benchmarks.operations import work
from benchmarks.results import COMPILED, FLOOR, OPEN_CLIP, PLAIN, Key, Result, floor_of, same_machine, workload_of
from benchmarks.step import NO_LOSS
from benchmarks.workloads import OTHER_LOSSES

SLOWER = 1.1
# The columns of `shape`.
SHAPE = ("B = N>", "D>", "dtype")


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


def first_dtype(stored: Result) -> list[Result]:
    """The losses of the first dtype."""
    cases = select(stored, "loss")
    return [case for case in cases if case["dtype"] == cases[0]["dtype"]]


def main_cases(stored: Result) -> list[Result]:
    """The losses of the first dtype, at the width that has most sizes."""
    cases = first_dtype(stored)
    widths = [case["features"] for case in cases]
    return [case for case in cases if case["features"] == max(widths, key=widths.count)]


def milliseconds(result: Result) -> str:
    """Median and spread."""
    low, middle, high = (t * 1e3 for t in quartiles(result["seconds"]))
    digits = min(max(0, 2 - math.floor(math.log10(middle))), 3)
    spread = f" ({low:,.{digits}f} to {high:,.{digits}f})" if len(result["seconds"]) > 1 else ""
    return f"{middle:,.{digits}f}{spread}"


def mebibytes(result: Result) -> str:
    """The peak, in three digits, if it was measured."""
    peak = result.get("peak_extra_mib")
    return "" if peak is None else f"{peak:,.0f}" if peak >= 100 else f"{peak:.3g}"


def of_plain(result: Result, plain: Result) -> str:
    """A result's time in plain's, if that was measured."""
    return f"{ratio(result, plain)[1]:.2f}" if "seconds" in plain else ""


def of_plains_peak(result: Result, plain: Result) -> str:
    """A result's memory in plain's, if both were measured."""
    both = [each.get("peak_extra_mib") for each in (result, plain)]
    return f"{both[0] / both[1]:.1%}" if all(both) else ""


def shape(case: Result) -> list[str]:
    """The first cells of a row."""
    return [f"{case['rows']:,}", f"{case['features']:,}", case["dtype"]]


def markdown(columns: list[str], rows: Iterable[list[str]]) -> str:
    """A table; the columns that end with ">" are of numbers, and missing last cells are empty."""
    lines = [[column.rstrip(">") for column in columns], ["---:" if c.endswith(">") else "---" for c in columns], *rows]
    return "\n".join(f"| {' | '.join(line + [''] * (len(columns) - len(line)))} |" for line in lines)


def full_tables(stored: Result) -> str:
    """Everything that was measured, as Markdown."""
    parts = [heading(stored, stored["workloads"])]
    for title, kind, rows in (
        ("The loss, forward + backward", "loss", loss_table),
        ("The operations", "operations", operations_table),
        ("One training step", "step", step_table),
    ):
        if select(stored, kind):
            parts += [f"## {title}", rows(stored)]
    if any(select(stored, kind) for kind in OTHER_LOSSES):
        parts += ["## Other losses", others_table(stored)]
    if absent := absences(stored):
        parts += ["## Not measured", "\n".join(f"- {line}" for line in absent)]
    parts += ["## What was measured, when, and where the shapes come from", provenance(stored)]
    return "\n\n".join(parts) + "\n"


def device(stored: Result) -> str:
    """The chip, and of a CPU its threads."""
    machine = stored["machine"]
    return machine["device"] + (f", {machine['threads']} threads" if machine["type"] == "cpu" else "")


def heading(stored: Result, cases: list[Result]) -> str:
    """The chip, and where the numbers of some cases come from."""
    return f"**{device(stored)}**, {circumstances(stored, cases)}."


def circumstances(stored: Result, cases: list[Result]) -> str:
    """Dates, versions and OpenMP's policy of some cases; their commits stand in the tables."""
    versions = dict.fromkeys(item for case in cases for item in case["versions"].items())
    dates = dict.fromkeys(case["date"] for case in cases)
    # Of a CPU, and not stored with its first results.
    policies = dict.fromkeys(case.get("wait_policy") for case in cases if stored["machine"]["type"] == "cpu")
    facts = [*dates, *(f"{package} {version}" for package, version in versions)]
    return ", ".join([*facts, *(f"`OMP_WAIT_POLICY` {policy}" for policy in policies if policy)])


def loss_table(stored: Result) -> str:
    """One row for each workload and provider that was measured or failed there."""
    columns = [*SHAPE, "loss", "ms, median (quartiles)>", "rounds>", "of plain's time>", "of the floor>"]
    columns += [
        "useful TFLOP/s>",
        "peak extra MiB>",
        "of plain's>",
        "gradient error>",
        "of the worst row>",
        "loss error>",
    ]
    everywhere = _everywhere(stored)
    rows = []
    for case in select(stored, "loss"):
        results = case["results"]
        plain, flops = results.get(PLAIN, {}), 8 * case["rows"] ** 2 * case["features"]
        for key, result in results.items():
            if "failed" in result:
                if key not in everywhere:
                    rows.append([*shape(case), str(key), result["failed"]])
                continue
            note = f" ({result['note']})" if "note" in result else ""
            rows.append(
                [
                    *shape(case),
                    f"{key}{note}",
                    milliseconds(result),
                    str(len(result["seconds"])),
                    of_plain(result, plain),
                    f"{ratio(results[FLOOR], result)[1]:.0%}",
                    f"{flops / quartiles(result['seconds'])[1] / 1e12:.3g}",
                    mebibytes(result),
                    of_plains_peak(result, plain),
                    *(_error(result, name) for name in ("gradient_error", "worst_row_error", "loss_error")),
                ]
            )
    return markdown(columns, rows)


def _error(result: Result, name: str, digits: int = 1) -> str:
    return f"{result[name]:.{digits}e}" if name in result else ""


def _everywhere(stored: Result) -> dict[Key, str]:
    """Who failed on every workload, and its sentence if it was always the same."""
    reasons: dict[Key, set[str | None]] = {}
    for case in select(stored, "loss"):
        for key, result in case["results"].items():
            reasons.setdefault(key, set()).add(result.get("failed"))
    return {key: next(iter(why)) for key, why in reasons.items() if len(why) == 1 and None not in why}  # type: ignore[misc]


def absences(stored: Result) -> list[str]:
    """Who took no part and what was left out, a line for each reason."""
    reasons: dict[str, list[str]] = {}
    for who, why in (*_everywhere(stored).items(), *stored["left_out"].items()):
        reasons.setdefault(why, []).append(str(who))
    return [f"{', '.join(who)}: {why}" for why, who in reasons.items()]


def operations_table(stored: Result) -> str:
    """The five functions of every backend: time, rate, fraction of their own floor."""
    columns = [*SHAPE, "operation", "backend", "ms, median (quartiles)>", "rate>", "of its floor>"]
    rows = []
    for case in select(stored, "operations"):
        for key, result in case["results"].items():
            if "failed" in result:
                rows.append([*shape(case), *key, result["failed"]])
            elif key != floor_of(key.name):
                needed = work(key.name, case["rows"], case["features"], case["feature_bytes"], case["operand_bytes"])
                seconds = quartiles(result["seconds"])[1]
                rate = f"{needed.bytes / seconds / 1e9:,.3g} GB/s"
                if needed.flops:
                    rate = f"{needed.flops / seconds / 1e12:.3g} TFLOP/s"
                of_floor = ratio(case["results"][floor_of(key.name)], result)[1]
                rows.append([*shape(case), *key, milliseconds(result), rate, f"{of_floor:.0%}"])
    return markdown(columns, rows)


def step_table(stored: Result) -> str:
    """The reference trainer's step: what share of it is the loss."""
    columns = ["B>", "D>", "loss", "step, ms, median (quartiles)>", "the loss's share>", "of plain's step>"]
    rows = []
    for case in select(stored, "step"):
        results = case["results"]
        for key, result in results.items():
            start = [*shape(case)[:2], str(key)]
            if "failed" in result:
                rows.append([*start, result["failed"]])
                continue
            share = "" if key == NO_LOSS else f"{1 - ratio(results[NO_LOSS], result)[1]:.0%}"
            rows.append([*start, milliseconds(result), share, of_plain(result, results[PLAIN]), mebibytes(result)])
    return markdown([*columns, "peak extra MiB>"], rows)


def others_table(stored: Result) -> str:
    """The losses of docs/other_losses.md, each beside its plain version and a library's."""
    columns = ["loss", *SHAPE[:2], "by", "ms, median (quartiles)>", "rounds>", "of plain's time>", "peak extra MiB>"]
    columns += ["of plain's>", "gradient error>", "loss error>"]
    everywhere = _everywhere(stored)
    rows = []
    for kind, meaning in OTHER_LOSSES.items():
        for case in select(stored, kind):
            results = case["results"]
            plain = results.get(PLAIN, {})
            for key, result in results.items():
                start = [meaning, *shape(case)[:2], f"{key} ({result['note']})" if "note" in result else str(key)]
                if "failed" in result:
                    if key not in everywhere:
                        rows.append([*start, result["failed"]])
                    continue
                rows.append(
                    [
                        *start,
                        milliseconds(result),
                        str(len(result["seconds"])),
                        of_plain(result, plain),
                        mebibytes(result),
                        of_plains_peak(result, plain),
                        *(_error(result, name) for name in ("gradient_error", "loss_error")),
                    ]
                )
    return markdown(columns, rows)


def provenance(stored: Result) -> str:
    """Each workload's commit, date and version of PyTorch, and its shape's name and source."""
    columns = ["workload", "commit", "date", "torch", "`--workloads`", "where the shape comes from"]
    rows = []
    for kind in dict.fromkeys(case["kind"] for case in stored["workloads"]):
        for case in select(stored, kind):
            workload, torch = workload_of(case), case["versions"]["torch"]
            rows.append([str(workload), case["commit"], case["date"], torch, f"`{workload.name}`", workload.provenance])
    return markdown(columns, rows)


def short_cases(stored: Result) -> list[Result]:
    """The three cases that the short table shows: those in which all take part, of a thousand rows or more."""
    cases = [case for case in main_cases(stored) if PLAIN in case["results"]]
    crowd = max((len(case["results"]) for case in cases), default=0)
    cases = [case for case in cases if len(case["results"]) == crowd]
    large = [case for case in cases if case["rows"] >= 1024]
    cases = large if len(large) >= 3 else cases
    return cases if len(cases) <= 3 else [cases[i * (len(cases) - 1) // 2] for i in range(3)]


def short_table(stored: Result) -> str:
    """What a user decides by: time at three sizes, memory and error at the last of them, a row for each loss."""
    cases = short_cases(stored)
    last = cases[-1]
    columns = ["loss", *(f"B = {case['rows']:,}>" for case in cases)]
    columns += [f"peak extra memory at {last['rows']:,}>", "gradient error>"]
    absent = _everywhere(stored)
    rows = []
    for key in sorted(last["results"], key=lambda key: not key.ours):
        if key in absent or key == FLOOR:
            continue
        cells = []
        for case in cases:
            result = case["results"].get(key, {})
            multiple = of_plain(result, case["results"][PLAIN]) if "seconds" in result else ""
            cells.append((_seconds(result) or result.get("failed", "")) + (multiple and f", {multiple}x"))
        result = last["results"][key]
        cells.append(f"{mebibytes(result)} MiB" if "peak_extra_mib" in result else "")
        cells.append(_error(result, "gradient_error", 0) or result.get("note", ""))
        rows.append([str(key), *cells])
    rows.append(["*floor: four matmuls*", *(_seconds(case["results"][FLOOR]) for case in cases)])
    rows.append(["*commit*", *(case["commit"] for case in cases)])
    return markdown(columns, rows)


def brief_table(chips: list[Result]) -> str:
    """Time and memory of the fastest of ours beside the plain losses and open_clip's, three rows for each chip."""
    others = [PLAIN, COMPILED, OPEN_CLIP]
    rows = []
    for stored in chips:
        for case in short_cases(stored):
            ours = {key: r for key, r in case["results"].items() if key.ours and "seconds" in r}
            if not ours:
                continue
            best = min(ours, key=lambda key: quartiles(ours[key]["seconds"])[1])
            cells = [f"{_cost(ours[best])} ({best.backend})", *(_cost(case["results"].get(key, {})) for key in others)]
            rows.append([device(stored), f"{case['rows']:,}", f"{case['features']:,}", case["dtype"], *cells])
    return markdown(["chip", "B>", "D>", "dtype", "ours>", *(f"{key}>" for key in others)], rows)


def _cost(result: Result) -> str:
    memory = f", {mebibytes(result)} MiB" if "peak_extra_mib" in result else ""
    return _seconds(result) + memory


def _seconds(result: Result) -> str:
    if "seconds" not in result:
        return ""
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
    columns = [*SHAPE, "loss", "old, ms>", "new, ms>", "new / old>", "in floors>", "noise>"]
    rows, slower = [], []
    before = {workload_of(case): case["results"] for case in old["workloads"]}
    for case in select(new, "loss"):
        results = before.get(workload_of(case), {})
        for key, result in case["results"].items():
            if "seconds" not in result or "seconds" not in results.get(key, {}):
                continue
            was, now = quartiles(results[key]["seconds"])[1], quartiles(result["seconds"])[1]
            floors = [ratio(each[key], each[FLOOR]) for each in (results, case["results"])]
            in_floors = floors[1][1] / floors[0][1]
            noise = math.hypot(*((high - low) / 2 / middle for low, middle, high in floors))
            start = [*shape(case), str(key)]
            times = [f"{was * 1e3:,.3g}", f"{now * 1e3:,.3g}", f"{now / was:.2f}"]
            rows.append([*start, *times, f"{in_floors:.2f}", f"{noise:.2f}"])
            if in_floors > max(threshold, 1 + 2 * noise) and key.ours:
                slower.append(f"{', '.join(start)}: {in_floors:.2f} times as slow, noise {noise:.2f}")
    return markdown(columns, rows), slower if same_machine(old, new) else []
