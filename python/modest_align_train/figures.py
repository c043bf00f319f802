"""The figures of a report: matplotlib drawn as SVG that follows the page's light and dark mode."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text

from modest_align_train.evaluate import BINS, RECALLS, validation_score
from modest_align_train.runs import TrainedRun

DIRECTION_LABELS = {"image_to_text": "image → text", "text_to_image": "text → image"}

# Middle tones, legible on white and on near-black.
COLOURS = ("#3a7fc1", "#e0812a", "#2f9c72", "#9a68c4", "#d4525f", "#18a0b0", "#a3784c", "#c96aa5")
_DASHES = ("", "6 3", "2 2", "8 3 2 3")
# Stand-ins in the SVG for colours that follow the page's light or dark mode.
_INK, _FAINT = "#010203", "#040506"
_STYLE = {
    **dict.fromkeys(("axes.labelcolor", "axes.titlecolor", "text.color", "xtick.labelcolor", "ytick.labelcolor"), _INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), _FAINT),
    **dict.fromkeys(("axes.spines.right", "axes.spines.top", "legend.frameon", "text.parse_math"), False),
    **dict.fromkeys(("axes.axisbelow", "axes.grid", "figure.constrained_layout.use"), True),
    "axes.labelsize": 9,
    "axes.prop_cycle": mpl.cycler(color=COLOURS),
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "font.family": "sans-serif",
    "font.size": 9,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
}
_MOST_POINTS = 400


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


def recall_figure(runs: Sequence[TrainedRun], direction: str) -> Figure:
    """Recall at each k with its interval, a row a run."""
    axes = plot(
        f"Recall, {DIRECTION_LABELS[direction]}",
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


def legend(runs: Sequence[TrainedRun]) -> list[tuple[str, str, str]]:
    """Name, colour and dash pattern of each run's line."""
    return [
        (run.name, COLOURS[i % len(COLOURS)], _DASHES[i // len(COLOURS) % len(_DASHES)]) for i, run in enumerate(runs)
    ]


def curves(runs: Sequence[TrainedRun]) -> list[Axes]:
    """Loss, validation recall and scale against the step, a line a run."""
    loss = plot("Training loss", "step", "loss, nats")
    recall = plot("Validation recall (mean of R@1, 5, 10)", "step", "mean of both directions, %")
    scale = plot("Scale (1 / temperature)", "step", "scale")
    for run, (_, colour, dash) in zip(runs, legend(runs), strict=True):
        style = {"color": colour, "ls": (0, tuple(map(int, dash.split()))) if dash else "-"}
        thin = slice(None, None, -(-len(run.steps) // _MOST_POINTS) or 1)
        steps = [line["step"] for line in run.steps][thin]
        loss.plot(steps, [line["loss"] for line in run.steps][thin], **style)
        scale.plot(steps, [line["scale"] for line in run.steps][thin], **style)
        validated = {step: validation_score(found) for step, found in run.validations.items()}
        if validated:
            recall.plot(list(validated), list(validated.values()), **style)
            kept = max(validated, key=validated.__getitem__)
            recall.plot(kept, validated[kept], "o", ms=7, mfc="none", mec=colour)
    for axes in (recall, scale):
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    return [loss, recall, scale]


def reliability_figure(run: TrainedRun) -> Figure:
    """Accuracy against confidence of one run, above the number of queries in each bin."""
    calibration = run.evaluation["calibration"]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(3.8, 4.2))
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        title = f"{run.name}: mean ECE {calibration['mean']['ece']['value']:.1f}%"
        figure.suptitle(textwrap.fill(title, 42), x=0.02, ha="left", size=10, weight="bold")
    upper.plot([0, 100], [0, 100], color=_INK, lw=1, ls="--")
    upper.text(98, 3, "overconfident", ha="right", va="bottom", fontsize=8)
    upper.text(2, 97, "underconfident", ha="left", va="top", fontsize=8)
    most = max(one["count"] for direction in DIRECTION_LABELS for one in calibration[direction]["bins"])
    width = 100 / BINS
    for i, (direction, label) in enumerate(DIRECTION_LABELS.items()):
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


def to_svg(figure: Figure, salt: str) -> Markup:
    """Inline SVG whose ids are this figure's own and whose ink is the page's."""
    # What the caller drew outside of the style would be black on black in dark mode.
    for text in figure.findobj(Text):
        if to_hex(text.get_color()) == "#000000":
            text.set_color(_INK)
    for shown in figure.findobj(Legend):
        shown.set_frame_on(False)
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
