"""One self-contained HTML page about one or several runs."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import platform
import re
import subprocess
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import torch
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text

from modest_align_train.adapters import load_aligner
from modest_align_train.evaluate import BINS, RECALL_AT, best_ranks, evaluate, load_ranks, paired_difference
from modest_align_train.files import write_file
from modest_align_train.latents import Latents, load_latents, open_image
from modest_align_train.search import all_captions, nearest_captions, nearest_images
from modest_align_train.settings import run_settings

DIRECTIONS = {"image_to_text": "image → text", "text_to_image": "text → image"}
RECALLS = tuple(f"R@{k}" for k in RECALL_AT)

# Middle tones, legible on white and on near-black.
COLOURS = ("#3a7fc1", "#e0812a", "#2f9c72", "#9a68c4", "#d4525f", "#18a0b0", "#a3784c", "#c96aa5")
_DASHES = ("", "6 3", "2 2", "8 3 2 3")
# Stand-ins in the SVG for colours that follow the page's light or dark mode.
_INK, _FAINT = "#010203", "#040506"
_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": _FAINT,
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.labelsize": 9,
    "axes.prop_cycle": mpl.cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": _INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.size": 9,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.color": _FAINT,
    "ytick.labelcolor": _INK,
}
_MOST_POINTS = 400
_EXAMPLES = 4
_EXAMINED = 200
_FOUND_IMAGES = 5
_FOUND_CAPTIONS = 3


@dataclass(frozen=True)
class Section:
    """A part of the page that the caller adds.

    Attributes:
        title: Its heading.
        text: A paragraph above the figure; escaped unless it is `markupsafe.Markup`.
        figure: A matplotlib figure, best made by `plot`.
    """

    title: str
    text: str = ""
    figure: Figure | None = None


@dataclass(frozen=True)
class _Run:
    name: str
    path: Path
    settings: dict[str, Any]
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    evaluation: dict[str, Any]


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

    A run without `evaluation.json` is evaluated on its test split first.

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
        ValueError: No run is given, or the rows of the table differ in length.
    """
    if not runs:
        raise ValueError("runs must name at least one run directory, got none")
    if table is not None and (not table or len({len(row) for row in table}) != 1):
        lengths = [len(row) for row in table]
        raise ValueError(f"table must have rows of one length, the header first, got lengths {lengths}")
    paths = [Path(run) for run in runs]
    loaded = [_load_run(path, name, latents) for path, name in zip(paths, _short_names(paths), strict=True)]
    best = max(loaded, key=_mean_recall)
    examples, encoders, no_examples = None, None, None
    try:
        store = load_latents(latents or run_settings(best.path).latents)
        encoders = (store.image_encoder, store.text_encoder)
        examples = _examples(best, store.subset(best.evaluation["split"]))
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
        recall_figures=[_svg(_recall_figure(loaded, direction), direction) for direction in DIRECTIONS],
        legend=_legend(loaded),
        curves=[_svg(axes.figure, f"curve {i}") for i, axes in enumerate(_curves(loaded))],
        losses_differ=len({tuple(run.settings[n] for n in ("smoothing", "batch_size")) for run in loaded}) > 1,
        reliability=[_svg(_reliability_figure(run), f"reliability {run.name}") for run in loaded],
        sections=[(s.title, s.text, s.figure and _svg(s.figure, f"section {i}")) for i, s in enumerate(sections)],
        examples=examples,
        thumbnail=_thumbnail,
        no_examples=no_examples,
        best=best.name,
        several=len(loaded) > 1,
        found_images=_FOUND_IMAGES,
        found_captions=_FOUND_CAPTIONS,
        wanted_examples=_EXAMPLES,
        examined=_EXAMINED,
        same=same,
        different=different,
        versions=_versions(),
    )
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_file(output, page)
    return output


def plot(title: str, xlabel: str, ylabel: str, *, height: float = 2.8) -> Axes:
    """Empty axes in the style of the page, which also follows its light and dark mode.

    Args:
        title: Says what is shown; at most some 45 characters fit.
        xlabel: With the unit.
        ylabel: With the unit.
        height: Of the figure, in inches; it is 3.8 wide.

    Returns:
        The only axes of a new figure (`axes.figure`).
    """
    with mpl.rc_context(_STYLE):
        axes = Figure(figsize=(3.8, height)).subplots()
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return axes


def _load_run(path: Path, name: str, latents: Path | str | None) -> _Run:
    if not path.is_dir():
        raise FileNotFoundError(f"run {path} does not exist")
    settings = vars(run_settings(path))
    evaluation_path = path / "evaluation.json"
    if evaluation_path.is_file():
        evaluation = json.loads(evaluation_path.read_text(encoding="utf-8"))
    else:
        evaluation = evaluate(path, latents=latents)
    lines = list(_read_log(path / "log.jsonl"))
    return _Run(
        name=name,
        path=path,
        settings=settings,
        steps=[line for line in lines if "loss" in line],
        validations=[line for line in lines if "validation" in line],
        evaluation=evaluation,
    )


def _read_log(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            # A run that is still being trained may have written half of its last line.
            if line.endswith("}"):
                yield json.loads(line)


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Name of each run's folder, with as many of its parents as it takes to tell them apart."""
    parts = [path.absolute().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"runs must differ, got {', '.join(map(str, paths))}")


def _mean_recall(run: _Run) -> float:
    return sum(run.evaluation["mean"][name]["value"] for name in RECALLS) / len(RECALLS)


def _interval(statistic: Mapping[str, float], digits: int = 1) -> str:
    return f"{statistic['low']:.{digits}f}–{statistic['high']:.{digits}f}"


def _summary(runs: Sequence[_Run], best: _Run, encoders: tuple[str, str] | None) -> str:
    result = best.evaluation
    subject = f"{len(runs)} runs" if len(runs) > 1 else f"The run {best.name}"
    what = f" aligned {encoders[0]} with {encoders[1]}" if encoders else " aligned two encoders"
    recall = result["mean"]["R@1"]
    ece = result["calibration"]["mean"]["ece"]
    who = f"the one with the highest mean recall, {best.name}," if len(runs) > 1 else "it"
    return (
        f"{subject}{what}; on {result['images']:,} {result['split']} images and {result['captions']:,} "
        f"captions, {who} ranks a right answer first for {recall['value']:.1f}% of the queries "
        f"(95% interval {_interval(recall)}; guessing: about {100 / result['groups']:.2f}%), and its "
        f"confidence is off by {ece['value']:.1f} points on average (ECE)."
    )


def _recall_table(runs: Sequence[_Run]) -> list[list[str]]:
    header = ["run"]
    header += [f"{label}\n{name}" for label in DIRECTIONS.values() for name in (*RECALLS, "median rank")]
    rows = [[*header, "mean\nECE"]]
    for run in runs:
        row = [run.name]
        for direction in DIRECTIONS:
            found = run.evaluation[direction]
            row += [f"{found[name]['value']:.1f}\n{_interval(found[name])}" for name in RECALLS]
            row.append(f"{found['median_rank']['value']:.0f}\n{_interval(found['median_rank'], 0)}")
        ece = run.evaluation["calibration"]["mean"]["ece"]
        rows.append([*row, f"{ece['value']:.1f}\n{_interval(ece)}"])
    return rows


def _differences(runs: Sequence[_Run]) -> list[list[str]]:
    """Gain in mean R@1 of each run over the first, where both ranked the same queries; the header first."""
    found = [["run", f"R@1 over {runs[0].name}", "from", "to"]]
    for run in runs[1:]:
        try:
            gain = paired_difference([load_ranks(run.path)], [load_ranks(runs[0].path)])
        except (FileNotFoundError, ValueError):
            continue
        found.append([run.name, *(f"{gain[n]:+.1f}".replace("-", "−") for n in ("value", "low", "high"))])
    return found if len(found) > 1 else []


def _recall_figure(runs: Sequence[_Run], direction: str) -> Figure:
    axes = plot(
        f"Recall, {DIRECTIONS[direction]}",
        "queries with a right answer among the first k, %",
        "",
        height=1.3 + 0.42 * len(runs),
    )
    for place, run in enumerate(runs):
        for name, marker, colour in zip(RECALLS, "os^", COLOURS, strict=False):
            found = run.evaluation[direction][name]
            axes.plot([found["low"], found["high"]], [-place, -place], color=colour, lw=2.4, alpha=0.45)
            label = name if place == 0 else None
            axes.plot(found["value"], -place, marker, color=colour, ms=5, ls="", label=label)
        # Names stand over their lines: beside the axis a long one would leave no room on a phone.
        axes.annotate(
            run.name,
            (0, -place),
            (0, 6),
            textcoords="offset points",
            fontsize=8,
            parse_math=False,
            xycoords=("axes fraction", "data"),
        )
    axes.set_yticks([])
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set(xlim=(0, None), ylim=(-len(runs) + 0.6, 0.8))
    with mpl.rc_context(_STYLE):
        axes.figure.legend(loc="outside lower center", ncols=3, handletextpad=0.2)
    return axes.figure


def _legend(runs: Sequence[_Run]) -> list[tuple[str, str, str]]:
    """Name, colour and dash pattern of each run's line."""
    return [
        (run.name, COLOURS[i % len(COLOURS)], _DASHES[i // len(COLOURS) % len(_DASHES)]) for i, run in enumerate(runs)
    ]


def _curves(runs: Sequence[_Run]) -> list[Axes]:
    """Loss, validation recall and scale against the step, a line a run."""
    loss = plot("Training loss", "step", "loss, nats")
    recall = plot("Validation recall (mean of R@1, 5, 10)", "step", "mean of both directions, %")
    scale = plot("Scale (1 / temperature)", "step", "scale")
    for run, (_, colour, dash) in zip(runs, _legend(runs), strict=True):
        style = {"color": colour, "ls": (0, tuple(map(int, dash.split()))) if dash else "-"}
        thin = slice(None, None, -(-len(run.steps) // _MOST_POINTS) or 1)
        steps = [line["step"] for line in run.steps][thin]
        loss.plot(steps, [line["loss"] for line in run.steps][thin], **style)
        scale.plot(steps, [line["scale"] for line in run.steps][thin], **style)
        validated = {line["step"]: sum(line["validation"]["mean"].values()) / len(RECALLS) for line in run.validations}
        if validated:
            recall.plot(list(validated), list(validated.values()), **style)
            kept = max(validated, key=validated.__getitem__)
            recall.plot(kept, validated[kept], "o", ms=7, mfc="none", mec=colour)
    for axes in (recall, scale):
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    return [loss, recall, scale]


def _reliability_figure(run: _Run) -> Figure:
    calibration = run.evaluation["calibration"]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(3.8, 4.2))
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        title = f"{run.name}: mean ECE {calibration['mean']['ece']['value']:.1f}%"
        figure.suptitle(textwrap.fill(title, 42), x=0.02, ha="left", size=10, weight="bold")
    upper.plot([0, 100], [0, 100], color=_INK, lw=1, ls="--")
    upper.text(98, 3, "overconfident", ha="right", va="bottom", fontsize=8)
    upper.text(2, 97, "underconfident", ha="left", va="top", fontsize=8)
    most = max(one["count"] for direction in DIRECTIONS for one in calibration[direction]["bins"])
    width = 100 / BINS
    for i, (direction, label) in enumerate(DIRECTIONS.items()):
        bins = calibration[direction]["bins"]
        confidence, accuracy, count = ([one[n] for one in bins] for n in ("confidence", "accuracy", "count"))
        # Small where few queries are: their accuracy says little.
        upper.scatter(
            confidence,
            accuracy,
            s=[8 + 60 * c / most for c in count],
            marker="os"[i],
            color=COLOURS[i],
            clip_on=False,
            label=f"{label}: ECE {calibration[direction]['ece']['value']:.1f}%",
        )
        upper.plot(confidence, accuracy, color=COLOURS[i], lw=1, alpha=0.6)
        left = [min(c // width, BINS - 1) * width for c in confidence]
        lower.bar([x + width * (0.3 + 0.4 * i) for x in left], count, width=0.38 * width, color=COLOURS[i])
    upper.set(xlim=(0, 100), ylim=(0, 100), ylabel="right answers, %")
    upper.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), borderpad=0.2, handletextpad=0.2)
    lower.set(xlabel="confidence in the first answer, %", ylabel="queries")
    lower.grid(visible=False, axis="x")
    return figure


def _svg(figure: Figure, salt: str) -> Markup:
    """Inline SVG whose ids are this figure's own and whose ink is the page's."""
    # What the caller drew outside of the style would be black on black in dark mode.
    for text in figure.findobj(Text):
        if to_hex(text.get_color()) == "#000000":
            text.set_color(_INK)
    for legend in figure.findobj(Legend):
        legend.set_frame_on(False)
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        loose = None if figure.get_layout_engine() else "tight"
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches=loose)
    _, root, body = re.split(r"(<svg [^>]*>)", buffer.getvalue(), maxsplit=1)
    root = re.sub(r' (width|height|xmlns|xmlns:xlink)="[^"]*"', "", root)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    # Ids such as axes_1 repeat from figure to figure; only those of clip paths and markers are referred to.
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    return Markup((root + body).replace(_INK, "currentColor").replace(_FAINT, "var(--faint)"))


def _examples(run: _Run, latents: Latents) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Queries both ways, not picked by hand: the first hits and misses in the order of a hash."""
    aligner = load_aligner(run.path)
    images, texts = aligner.embed_images(latents.image), aligner.embed_texts(latents.text)
    caption_group = latents.group[latents.caption_image]
    captions = all_captions(latents)
    first_caption = torch.searchsorted(latents.caption_image, torch.arange(len(images)))
    order = _one_of_each_group(latents)[:_EXAMINED]

    def from_text(row: int) -> dict[str, Any]:
        query, group = texts[first_caption[row]], latents.group[row]
        scores, found = nearest_images(query, images, _FOUND_IMAGES)
        right = latents.group == group
        answer = int((images @ query).masked_fill(~right, -torch.inf).argmax())
        return {
            "query": captions[first_caption[row]],
            "rank": int(best_ranks(query[None], images, group[None], latents.group)),
            "answer": latents.records[answer].location,
            "found": [
                {
                    "location": latents.records[image].location,
                    "caption": " · ".join(latents.records[image].captions),
                    "score": score,
                    "right": bool(right[image]),
                }
                for score, image in zip(scores, found, strict=True)
            ],
        }

    def from_image(row: int) -> dict[str, Any]:
        query, group = images[row], latents.group[row]
        scores, found = nearest_captions(query, texts, captions, _FOUND_CAPTIONS)
        right = {captions[i] for i in (caption_group == group).nonzero()[:, 0].tolist()}
        return {
            "query": latents.records[row].location,
            "rank": int(best_ranks(query[None], texts, group[None], caption_group)),
            "answer": " · ".join(latents.records[row].captions),
            "found": [
                {"caption": captions[caption], "score": score, "right": captions[caption] in right}
                for score, caption in zip(scores, found, strict=True)
            ],
        }

    def first(make: Callable[[int], dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        shown: dict[str, list[dict[str, Any]]] = {"hits": [], "misses": []}
        for row in order:
            example = make(row)
            kind = shown["hits" if any(one["right"] for one in example["found"]) else "misses"]
            if len(kind) < _EXAMPLES:
                kind.append(example)
            if all(len(examples) == _EXAMPLES for examples in shown.values()):
                break
        return shown

    return {"from_text": first(from_text), "from_image": first(from_image)}


def _one_of_each_group(latents: Latents) -> list[int]:
    """Rows of images in the order of the SHA-256 of their keys, the first of each group."""
    order = sorted(
        range(len(latents.records)),
        key=lambda row: hashlib.sha256(latents.records[row].key.encode()).digest(),
    )
    first: dict[int, int] = {}
    for row in order:
        first.setdefault(int(latents.group[row]), row)
    return list(first.values())


@lru_cache(maxsize=512)
def _thumbnail(location: str) -> str | None:
    """Small JPEG as a data URI, None where the image is gone or cannot be read."""
    try:
        image = open_image(location)
    except (OSError, ValueError):
        return None
    image.thumbnail((160, 160))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _compare_settings(runs: Sequence[_Run]) -> tuple[dict[str, Any], list[list[str]]]:
    """Settings that all runs share, and a table of those that differ, the header first."""
    names = list(runs[0].settings)
    same = {name: runs[0].settings[name] for name in names if len({run.settings[name] for run in runs}) == 1}
    differing = [name for name in names if name not in same and name != "output"]
    rows = [[run.name, *(str(run.settings[name]) for name in differing)] for run in runs]
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
    git = ["git", "-C", str(here.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], check=True, capture_output=True)
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=12"],
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
