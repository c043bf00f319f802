"""All of it on the pairs that come with the project: extract, train, evaluate, report.

Twelve kinds of training: InfoNCE alone, with random perturbation (RP), with embedding smoothing (ES) and with both, the
scale learned; InfoNCE and both once more at the fixed scale 100; each on clean captions and with 40% of the training
captions shuffled.
"""

from __future__ import annotations

import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from modest_align_train.adapters import load_aligner
from modest_align_train.encoders import load_text_encoder
from modest_align_train.evaluate import RECALL_AT, load_ranks, mean_recall, paired_difference, validation_score
from modest_align_train.extract import extract
from modest_align_train.figures import plot
from modest_align_train.files import atomic_path, write_file, write_json
from modest_align_train.latents import Latents
from modest_align_train.report import Section, write_report
from modest_align_train.runs import TrainedRun, load_run
from modest_align_train.settings import ZERO_SHOT_TOP, Settings
from modest_align_train.train import train
from modest_align_train.tune import ProcessPool
from modest_align_train.zero_shot import chance_accuracy, class_prototypes, class_ranks, encode_prompts, top_accuracy

DATA = Path(__file__).parent / "demo_data"
SMOOTHING = 0.1
SHUFFLED = 0.4
FIXED_SCALE = 100.0
# Standard deviation on each feature of unit-norm latents; 0.01 is the published value.
SWEEP = (0.0, 0.01, 0.02, 0.04, 0.08)

# What --quick leaves of it: a run that shows that everything works, and says nothing about the methods.
QUICK_IMAGES = {"train": 320, "validation": 80, "test": 120}
QUICK_STEPS = 30
QUICK_SWEEP = (0.0, 0.02)


@dataclass(frozen=True)
class Kind:
    """One way of training, a row of the table."""

    loss: str
    fixed: bool
    shuffled: bool

    def settings(self, seed: int, latent_noise_std: float, common: Settings) -> Settings:
        """Settings of one run; its directory is named after what tells it from the others."""
        rp = f"rp{latent_noise_std:g}"
        loss = {"InfoNCE": "infonce", "RP": rp, "ES": "es", "RP + ES": f"{rp}+es"}[self.loss]
        captions, scale = "shuffled" if self.shuffled else "clean", f"-scale{FIXED_SCALE:g}" if self.fixed else ""
        return replace(
            common,
            output=common.output / f"{captions}-{loss}{scale}-seed{seed}",
            seed=seed,
            latent_noise_std=latent_noise_std if "RP" in self.loss else 0.0,
            smoothing=SMOOTHING if "ES" in self.loss else 0.0,
            shuffled_captions=SHUFFLED if self.shuffled else 0.0,
            learn_scale=not self.fixed,
            scale=FIXED_SCALE if self.fixed else common.scale,
        )


KINDS = tuple(
    Kind(loss, fixed, shuffled)
    for shuffled in (False, True)
    for loss, fixed in (
        ("InfoNCE", False),
        ("RP", False),
        ("ES", False),
        ("RP + ES", False),
        ("InfoNCE", True),
        ("RP + ES", True),
    )
)


def demo(output: Path | str, *, seeds: int = 1, quick: bool = False) -> Path:
    """Run all of it; what is done already in ``output`` is not done again.

    Args:
        output: Directory for latents, runs, ``results.json``, ``table.md`` and ``report.html``.
        seeds: Runs of each kind; the table holds their means.
        quick: A small part of the data and few steps: whether it works, not how well.

    Returns:
        The path of the report.

    Raises:
        ValueError: ``seeds`` is below 1.
        ImportError: The encoders' packages are missing.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    started = time.perf_counter()
    output = Path(output)
    print("1/4  latents: frozen encoders over images and captions")
    source = _few_samples(output / "data") if quick else DATA
    latents = extract(source, output / "latents", group_column="group")
    settings = Settings(latents=output / "latents", output=output / "runs", smoothing=0.0, latent_noise_std=0.0)
    if quick:
        settings = replace(settings, steps=QUICK_STEPS, batch_size=128, validate_every=10, warmup_steps=5)

    print("2/4  noise: one run for each standard deviation, judged on the validation split")
    stds = QUICK_SWEEP if quick else SWEEP
    infonce, rp = KINDS[:2]
    swept = _train_all([(rp if std else infonce).settings(0, std, settings) for std in stds], "sweep")
    sweep = [{"latent_noise_std": std, **_best_validation(run)} for std, run in zip(stds, swept, strict=True)]
    latent_noise_std = max(sweep[1:], key=lambda point: point["mean_recall"])["latent_noise_std"]
    print(f"     latent_noise_std = {latent_noise_std:g} has the highest mean recall of them")

    print(f"3/4  training: {len(KINDS)} kinds, {seeds} seed{'s' if seeds > 1 else ''} each")
    wanted = [kind.settings(seed, latent_noise_std, settings) for kind in KINDS for seed in range(seeds)]
    trained = iter(_train_all(wanted, "runs"))
    runs = {kind: [next(trained) for _ in range(seeds)] for kind in KINDS}

    print("4/4  table and report")
    test = latents.subset("test")
    prompts = _concept_prompts(test)
    rows = [_row(kind, runs[kind], runs[_baseline(kind)]) for kind in KINDS]
    rows = [{**row, **_zero_shot(runs[kind], test, prompts)} for row, kind in zip(rows, KINDS, strict=True)]
    table = _table(rows)
    markdown = _markdown(table)
    results = {
        "images": len(latents.records),
        "captions": len(latents.text),
        "test_groups": len(prompts),
        "seeds": seeds,
        "latent_noise_std": latent_noise_std,
        "smoothing": SMOOTHING,
        "sweep": sweep,
        "rows": rows,
        "chance": chance_accuracy(len(prompts), ZERO_SHOT_TOP),
        "table": markdown,
        "effect": _effect(rows, latent_noise_std),
    }
    write_json(output / "results.json", results)
    write_file(output / "table.md", markdown + "\n")
    report = write_report(
        [runs[kind][0].path for kind in KINDS],
        output / "report.html",
        title="Modest-Align on drawings and their captions",
        sections=[
            _method_section(seeds),
            _zero_shot_section(rows, table, len(prompts)),
            _sweep_section(sweep, latent_noise_std),
        ],
        table=table,
    )
    print(f"\n{markdown}\n\n{results['effect']}\n\n{report}, after {time.perf_counter() - started:.0f} s")
    return report


def _train_all(runs: Sequence[Settings], what: str) -> list[TrainedRun]:
    """Train and evaluate runs, or find them trained."""
    with ProcessPool("auto", len(runs)) as pool:
        return pool.map(_train_and_evaluate, runs, what)


def _train_and_evaluate(settings: Settings) -> TrainedRun:
    return load_run(train(settings, progress=False))


def _best_validation(run: TrainedRun) -> dict[str, float]:
    """Recalls of a run's best validation, and their mean, in percent."""
    best = max(run.validations.values(), key=validation_score)
    return {**best["mean"], "mean_recall": validation_score(best)}


def _baseline(kind: Kind) -> Kind:
    """InfoNCE with the same scale on the same captions."""
    return next(k for k in KINDS if k.loss == "InfoNCE" and (k.fixed, k.shuffled) == (kind.fixed, kind.shuffled))


def _row(kind: Kind, runs: Sequence[TrainedRun], baseline: Sequence[TrainedRun]) -> dict[str, Any]:
    """Means over the seeds, with 95% intervals of a bootstrap over the test groups."""
    ranks, base = ([load_ranks(run.path) for run in each] for each in (runs, baseline))
    calibration = [run.evaluation["calibration"]["mean"] for run in runs]
    row: dict[str, Any] = asdict(kind)
    for k in RECALL_AT:
        row[f"R@{k}"] = mean_recall(ranks, k)
        row[f"R@{k} gain"] = paired_difference(ranks, base, k)
    for name in ("ece", "nll"):
        row[name] = {bound: fmean(c[name][bound] for c in calibration) for bound in ("value", "low", "high")}
    row["scale"] = fmean(run.evaluation["scale"] for run in runs)
    return row


def _concept_prompts(test: Latents) -> Tensor:
    """Latents of the test concepts' names, in the order of `test.group`."""
    named = dict(zip(test.group.tolist(), (record.group for record in test.records), strict=True))
    concepts = [named[number] for number in range(len(named))]
    # As they stand: captions say what a drawing is without a sentence around it, too.
    return encode_prompts(concepts, ("{}",), load_text_encoder(test.text_encoder))


def _zero_shot(runs: Sequence[TrainedRun], test: Latents, prompts: Tensor) -> dict[str, dict[str, float]]:
    """Accuracy of naming the test images' concepts, mean over the seeds."""
    ranks = []
    for aligner in (load_aligner(run.path) for run in runs):
        ranks.append(class_ranks(aligner.embed_images(test.image), class_prototypes(aligner, prompts), test.group))
    return top_accuracy(ranks, test.group, ZERO_SHOT_TOP)


def _table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The table as texts, header first; a cell's second line is its interval."""
    table = [["captions", "loss", "scale", *(f"R@{k} %" for k in RECALL_AT), "R@10 over\nInfoNCE", "ECE %", "NLL"]]
    for row in rows:
        gain = row["R@10 gain"]
        table.append(
            [
                f"{SHUFFLED:.0%} shuffled" if row["shuffled"] else "clean",
                row["loss"],
                f"{row['scale']:.0f}{' fixed' if row['fixed'] else ''}",
                *(_cell(row[f"R@{k}"]) for k in RECALL_AT),
                "" if row["loss"] == "InfoNCE" else _cell(gain, sign="+"),
                _cell(row["ece"]),
                _cell(row["nll"], digits=2),
            ]
        )
    return table


def _cell(found: dict[str, float], digits: int = 1, sign: str = "") -> str:
    value, low, high = (f"{found[bound]:{sign}.{digits}f}" for bound in ("value", "low", "high"))
    return f"{value}\n{low} to {high}"


def _markdown(table: Sequence[Sequence[str]]) -> str:
    """The table in Markdown, intervals in brackets."""
    header, *rows = [
        [cell.replace("\n", " ") if number == 0 else _in_brackets(cell) for cell in row]
        for number, row in enumerate(table)
    ]
    align = ["---", "---", *("---:" for _ in header[2:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, align, *rows))


def _in_brackets(cell: str) -> str:
    value, _, interval = cell.partition("\n")
    return f"{value} ({interval})" if interval else value


def _effect(rows: Sequence[dict[str, Any]], latent_noise_std: float) -> str:
    """What RP alone did, in words and with intervals."""
    parts = []
    for row in rows:
        if row["loss"] == "RP" and not row["fixed"]:
            where = f"with {SHUFFLED:.0%} of the training captions shuffled" if row["shuffled"] else "on clean captions"
            gains = (f"R@{k} by {_in_brackets(_cell(row[f'R@{k} gain'], sign='+'))}" for k in (1, 10))
            parts.append(f"{' and '.join(gains)} {where}")
    return (
        f"Random perturbation alone (latent_noise_std {latent_noise_std:g} on unit-norm latents) changes "
        f"{'; '.join(parts)}. In points, mean of both directions, with 95% intervals of a paired bootstrap over the "
        "test concepts."
    )


def _method_section(seeds: int) -> Section:
    means = f"The first table holds means of {seeds} seeds; plots and examples are of seed 0. " if seeds > 1 else ""
    text = (
        f"{means}Recalls are means of both directions. RP adds noise to the unit-norm latents before the adapters, ES "
        f"gives {SMOOTHING:.0%} of the target to the negatives; {SHUFFLED:.0%} shuffled: that share of the training "
        "images had their captions passed round. Intervals draw the test concepts with replacement and take the runs "
        "as they are."
    )
    return Section("What the rows are", text)


def _zero_shot_section(rows: Sequence[dict[str, Any]], table: Sequence[Sequence[str]], concepts: int) -> Section:
    """A table of accuracies whose first columns, which say what a row is, are those of the other one."""
    chance = chance_accuracy(concepts, ZERO_SHOT_TOP)
    cells = [[*(f"{name} %" for name in chance)], *([_cell(row[name]) for name in chance] for row in rows)]
    shown = [[*first[:3], *found] for first, found in zip(table, cells, strict=True)]
    text = (
        f"Each test image is given the nearest of the names of all {concepts:,} test concepts, no image of which was "
        "trained on. Right is its own concept alone, though other names may fit it too. The last row is what guessing "
        "gives."
    )
    last = ["", "chance", "", *(f"{value:.2f}" for value in chance.values())]
    return Section("Naming concepts that were not trained on", text, table=[*shown, last])


def _sweep_section(sweep: Sequence[dict[str, float]], chosen: float) -> Section:
    axes = plot("How much noise helps", "latent_noise_std on unit-norm latents", "validation recall, %")
    stds = [point["latent_noise_std"] for point in sweep]
    for k in RECALL_AT:
        axes.plot(stds, [point[f"R@{k}"] for point in sweep], marker="o", label=f"R@{k}")
    axes.axvline(chosen, color="#888888", linestyle=":", label="chosen")
    axes.set_ylim(bottom=0)
    axes.legend()
    text = (
        f"InfoNCE on clean captions with noise of each of {len(sweep)} standard deviations, one run each. The demo "
        f"takes the one above 0 with the highest mean of R@1, R@5 and R@10 on the validation split: {chosen:g}. "
        "The test split had no part in it."
    )
    return Section("The noise was chosen on the validation split", text, axes.figure)


def _few_samples(directory: Path) -> Path:
    """Copy the first samples of each split's first shard into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    for split, images in QUICK_IMAGES.items():
        with tarfile.open(DATA / f"{split}-00000.tar") as whole:
            members = whole.getmembers()
            # An image and its captions follow each other under one name.
            keys = list(dict.fromkeys(member.name.rsplit(".", 1)[0] for member in members))
            kept = set(keys[:images])
            with atomic_path(directory / f"{split}-00000.tar") as temporary, tarfile.open(temporary, "w") as part:
                for member in members:
                    if member.name.rsplit(".", 1)[0] in kept:
                        part.addfile(member, whole.extractfile(member))
    return directory
