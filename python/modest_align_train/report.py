"""One self-contained HTML page about one or several runs."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
import torch
from matplotlib.figure import Figure

from modest_align_train.adapters import load_checkpoint
from modest_align_train.evaluate import RECALLS, load_ranks, paired_difference
from modest_align_train.examples import EXAMINED, EXAMPLES, FOUND_CAPTIONS, FOUND_IMAGES, find_examples, thumbnail
from modest_align_train.figures import DIRECTION_LABELS, curves, legend, recall_figure, reliability_figure, to_svg
from modest_align_train.files import write_file
from modest_align_train.runs import TrainedRun, load_run


@dataclass(frozen=True)
class Section:
    """A part of the page that the caller adds.

    Attributes:
        title: Its heading.
        text: A paragraph above the figure; escaped unless it is `markupsafe.Markup`.
        figure: A matplotlib figure, best made by `plot`.
        table: Rows of texts below the text, the first one the header.
    """

    title: str
    text: str = ""
    figure: Figure | None = None
    table: Sequence[Sequence[str]] = ()


def write_report(
    runs: Sequence[Path | str],
    output: Path | str,
    *,
    title: str = "Alignment report",
    latents: Path | str | None = None,
    sections: Sequence[Section] = (),
    table: Sequence[Sequence[str]] | None = None,
) -> Path:
    """Write one HTML page that needs nothing else: pictures and plots are inside it.

    A run that was not evaluated on the test split with its checkpoint and latents as they are now is evaluated first.

    Args:
        runs: Run directories of `train`.
        output: The page; replaced by atomic rename.
        title: Heading of the page.
        latents: Directory of latents to evaluate and show examples from; by default each run's own.
        sections: Further parts, shown after the results.
        table: Rows of texts, the first one the header, shown instead of the table of recalls; a cell may
            have several lines.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: A run or given latents are not there.
        ValueError: No run is given, the runs were not evaluated on the same images and captions, other latents were
            extracted into the place of a run's own, or the rows of the table differ in length.
    """
    if not runs:
        raise ValueError("runs must name at least one run directory, got none")
    if table is not None and (not table or len({len(row) for row in table}) != 1):
        lengths = [len(row) for row in table]
        raise ValueError(f"table must have rows of one length, the header first, got lengths {lengths}")
    paths = [Path(run) for run in runs]
    loaded = [load_run(path, name, latents) for path, name in zip(paths, _short_names(paths), strict=True)]
    for run in loaded[1:]:
        if run.evaluation["pairs"] != loaded[0].evaluation["pairs"]:
            raise ValueError(
                f"runs must be evaluated on the same images and captions, but {loaded[0].name} and {run.name} "
                "were not: name latents for all by --latents, or make a report of each"
            )
    best = max(loaded, key=_mean_recall)
    examples, encoders, no_examples = None, None, None
    try:
        store = load_checkpoint(best.path).load_latents(latents)
        encoders = (store.image_encoder, store.text_encoder)
        examples = find_examples(best.path, store.subset(best.evaluation["split"]))
    except FileNotFoundError as reason:
        if latents is not None:
            raise
        no_examples = str(reason)
    same, different = _compare_settings(loaded)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        title=title,
        summary=_summary(loaded, best, encoders),
        table=table or _recall_table(loaded),
        table_is_ours=table is None,
        evaluation=best.evaluation,
        differences=_differences(loaded),
        recall_figures=[to_svg(recall_figure(loaded, direction), direction) for direction in DIRECTION_LABELS],
        legend=legend(loaded),
        curves=[to_svg(axes.figure, f"curve {i}") for i, axes in enumerate(curves(loaded))],
        losses_differ=len({(run.settings.smoothing, run.settings.batch_size) for run in loaded}) > 1,
        reliability=[to_svg(reliability_figure(run), f"reliability {run.name}") for run in loaded],
        sections=[
            (s.title, s.text, s.table, s.figure and to_svg(s.figure, f"section {i}")) for i, s in enumerate(sections)
        ],
        examples=examples,
        thumbnail=thumbnail,
        no_examples=no_examples,
        best=best.name,
        several=len(loaded) > 1,
        found_images=FOUND_IMAGES,
        found_captions=FOUND_CAPTIONS,
        wanted_examples=EXAMPLES,
        examined=EXAMINED,
        same=same,
        different=different,
        versions=_versions(),
    )
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_file(output, page)
    return output


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Name of each run's folder, with as many of its parents as it takes to tell them apart."""
    parts = [path.absolute().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"runs must differ, got {', '.join(map(str, paths))}")


def _mean_recall(run: TrainedRun) -> float:
    return sum(run.evaluation["mean"][name]["value"] for name in RECALLS) / len(RECALLS)


def _interval(statistic: Mapping[str, float], digits: int = 1) -> str:
    return f"{statistic['low']:.{digits}f}–{statistic['high']:.{digits}f}"


def _summary(runs: Sequence[TrainedRun], best: TrainedRun, encoders: tuple[str, str] | None) -> str:
    result = best.evaluation
    subject = f"{len(runs)} runs" if len(runs) > 1 else f"The run {best.name}"
    what = f" aligned {encoders[0]} with {encoders[1]}" if encoders else " aligned two encoders"
    recall = result["mean"]["R@1"]
    ece = result["calibration"]["mean"]["ece"]
    guessing = result.get("chance", {"R@1": 100 / result["groups"]})["R@1"]  # an earlier version stored none
    who = f"the one with the highest mean recall, {best.name}," if len(runs) > 1 else "it"
    return (
        f"{subject}{what}; on {result['images']:,} {result['split']} images and {result['captions']:,} "
        f"captions, {who} ranks a right answer first for {recall['value']:.1f}% of the queries "
        f"(95% interval {_interval(recall)}; guessing: {guessing:.2f}%), and its "
        f"confidence is off by {ece['value']:.1f} points on average (ECE)."
    )


def _recall_table(runs: Sequence[TrainedRun]) -> list[list[str]]:
    header = ["run"]
    header += [f"{label}\n{name}" for label in DIRECTION_LABELS.values() for name in (*RECALLS, "median rank")]
    rows = [[*header, "mean\nECE"]]
    for run in runs:
        row = [run.name]
        for direction in DIRECTION_LABELS:
            found = run.evaluation[direction]
            row += [f"{found[name]['value']:.1f}\n{_interval(found[name])}" for name in RECALLS]
            row.append(f"{found['median_rank']['value']:.0f}\n{_interval(found['median_rank'], 0)}")
        ece = run.evaluation["calibration"]["mean"]["ece"]
        rows.append([*row, f"{ece['value']:.1f}\n{_interval(ece)}"])
    return rows


def _differences(runs: Sequence[TrainedRun]) -> list[list[str]]:
    """Gain in mean R@1 of each run over the first; the header first."""
    found = [["run", f"R@1 over {runs[0].name}", "from", "to"]]
    for run in runs[1:]:
        ranks, first = ([load_ranks(one.path, one.evaluation["ranks"])] for one in (run, runs[0]))
        gain = paired_difference(ranks, first)
        found.append([run.name, *(f"{gain[n]:+.1f}".replace("-", "−") for n in ("value", "low", "high"))])
    return found if len(found) > 1 else []


def _compare_settings(runs: Sequence[TrainedRun]) -> tuple[dict[str, Any], list[list[str]]]:
    """Settings that all runs share, and a table of those that differ, the header first."""
    settings = [vars(run.settings) for run in runs]
    same = {name: value for name, value in settings[0].items() if all(one[name] == value for one in settings)}
    differing = [name for name in settings[0] if name not in same and name != "output"]
    rows = [[run.name, *(str(one[name]) for name in differing)] for run, one in zip(runs, settings, strict=True)]
    return same, [["run", *differing], *rows] if differing else []


def _versions() -> dict[str, str]:
    library = "modest-align-kernels"
    try:
        installed = version(library)
    except PackageNotFoundError:
        installed = "not installed"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = {
        library: installed,
        "git commit": _commit(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "python": platform.python_version(),
        "device": gpu or f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)",
        "system": platform.system(),
    }
    return {name: value for name, value in found.items() if value}


def _commit() -> str | None:
    """Commit of the checkout that this file is tracked in, if it is in one."""
    here = Path(__file__)

    def git(*words: str) -> str:
        # Git would store what it saw of the files, in a repository that is none of our business.
        command = ["git", "-C", str(here.parent), "--no-optional-locks", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("describe", "--always", "--abbrev=12") + "-dirty" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None
