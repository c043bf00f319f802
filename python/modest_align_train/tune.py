"""Choose noise and smoothing for one's own pairs: on the validation split, over several seeds."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from safetensors.torch import save
from tqdm import tqdm

from modest_align_train.adapters import load_aligner
from modest_align_train.checkpoints import LAST, PREVIOUS
from modest_align_train.devices import choose_device
from modest_align_train.evaluate import (
    RECALL_AT,
    RECALLS,
    Ranks,
    embed,
    load_ranks,
    paired_difference,
    recalls,
    retrieval_ranks,
    validation_score,
)
from modest_align_train.figures import COLOURS, plot
from modest_align_train.files import atomic_path, folder_of_its_own, read_json, write_file, write_json
from modest_align_train.latents import MANIFEST, load_latents, split_counts
from modest_align_train.settings import TUNE_NOISE, TUNE_SEEDS, TUNE_SMOOTHING, Settings
from modest_align_train.train import train

# Of the noises, how many are tried with smoothing; of all settings, how many beside InfoNCE with every seed.
_WITH_SMOOTHING, _WITH_EVERY_SEED = 2, 3

_RANKS = "validation_ranks.safetensors"

_Result = TypeVar("_Result")
_stopped: Event  # in a worker: that Ctrl-C came


class Setting(NamedTuple):
    """What is chosen; both 0 is InfoNCE."""

    latent_noise_std: float
    smoothing: float

    def __str__(self) -> str:
        parts = [f"noise {self.latent_noise_std:g}"] * (self.latent_noise_std > 0)
        parts += [f"smoothing {self.smoothing:g}"] * (self.smoothing > 0)
        return " + ".join(parts) or "InfoNCE"


INFONCE = Setting(0.0, 0.0)


@dataclass(frozen=True)
class Tuned:
    """What `tune` found.

    Attributes:
        chosen: The choice.
        rows: A dict for each setting tried: `latent_noise_std`, `smoothing`, `seeds`; in percent, on the validation
            split, R@1, R@5, R@10 and their mean `score`; and in `gain` how far that is above InfoNCE's (`value`, `low`,
            `high`).
        verdict: One sentence on what the choice brings.
        path: TOML file of the choice.
    """

    chosen: Setting
    rows: list[dict[str, Any]]
    verdict: str
    path: Path


def tune(
    settings: Settings,
    *,
    noise: Sequence[float] = TUNE_NOISE,
    smoothing: Sequence[float] = TUNE_SMOOTHING,
    seeds: int = TUNE_SEEDS,
    progress: bool = True,
) -> Tuned:
    """Choose `latent_noise_std` and `smoothing` by the validation split; the test split is not looked at.

    Three rounds: each noise without smoothing, with one seed; each smoothing on the two best of them, with one seed;
    InfoNCE and the three best others so far with every seed, and of these the choice (`choose`). By default 16 runs;
    one that is finished is not repeated.

    Args:
        settings: Of every run but for the noise, the smoothing and the seed; `output` is the directory to write.
        noise: Standard deviations to try; 0 is tried anyway.
        smoothing: Likewise.
        seeds: Runs of each setting in the last round: seeds from `settings.seed` on.
        progress: Show a progress bar, the table and the choice.

    Returns:
        What was found. In `settings.output` are `choice.toml`, which `train --config` takes, `table.md`, `tune.png`,
        `results.json` and `runs/`.

    Raises:
        ValueError: A setting is of the wrong type or out of range, there is no validation split, or `output` holds what
            was tuned with other latents or settings, or another process is writing into it.
        FileNotFoundError: There are no latents.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    for name, values, largest in (("noise", noise, None), ("smoothing", smoothing, 1)):
        if not all(math.isfinite(value) and 0 <= value <= (largest or value) for value in values):
            bounds = f"0 to {largest}" if largest else "0"
            raise ValueError(f"{name} must be numbers from {bounds}, got {', '.join(map(str, values))}")
    settings = replace(settings, latent_noise_std=0.0, smoothing=0.0).checked()
    settings = replace(settings, latents=settings.latents.resolve(), output=settings.output.resolve())
    counts = split_counts(load_latents(settings.latents).records)
    settings = settings.for_images(counts["train"])
    if not counts["validation"]:
        raise ValueError(f"latents {settings.latents} have no validation split to choose by")
    with folder_of_its_own(settings.output):
        _bind(settings)
        stds, smoothings = (sorted({0.0, *map(float, values)}) for values in (noise, smoothing))

        ranks: dict[Setting, dict[int, Ranks]] = {}
        every_seed = range(settings.seed, settings.seed + seeds)

        def measure(wanted: Sequence[tuple[Setting, int]], what: str) -> None:
            runs = [_run_settings(settings, *one) for one in wanted]
            pool.map(_train_and_rank, [run for run in runs if not _ranks_path(run).is_file()], what, progress)
            for (setting, seed), run in zip(wanted, runs, strict=True):
                ranks.setdefault(setting, {})[seed] = load_ranks(run.output, _RANKS)

        def by_score() -> list[Setting]:
            return sorted(ranks, key=lambda setting: _score(ranks[setting]), reverse=True)

        with ProcessPool(settings.device, len(stds)) as pool:
            measure([(Setting(std, 0.0), settings.seed) for std in stds], "1/3 noise")
            smoothed = [Setting(std, share) for std, _ in by_score()[:_WITH_SMOOTHING] for share in smoothings if share]
            measure([(setting, settings.seed) for setting in smoothed], "2/3 smoothing")
            remaining = [INFONCE, *(setting for setting in by_score() if setting != INFONCE)][: 1 + _WITH_EVERY_SEED]
            measure([(setting, seed) for setting in remaining for seed in every_seed[1:]], "3/3 seeds")

        chosen = choose({setting: [ranks[setting][seed] for seed in every_seed] for setting in remaining})
        rows = [_row(setting, ranks[setting], ranks[INFONCE]) for setting in sorted(ranks)]
        tuned = Tuned(chosen, rows, _verdict(chosen, rows, max(stds)), settings.output / "choice.toml")
        _write(tuned, settings)
        if progress:
            print(f"\n{_markdown(tuned)}\n\n{tuned.verdict}\n{tuned.path}")
        return tuned


def choose(ranks: Mapping[Setting, Sequence[Ranks]]) -> Setting:
    """Choose the setting with the best mean score over the seeds.

    Not the simplest within a standard error of it: noise costs nothing, and on a small validation split that rule keeps
    InfoNCE where noise is several points ahead on the test split.

    Args:
        ranks: Ranks of each setting's runs on the same queries, with the same seeds in the same order.
    """
    return max(ranks, key=lambda setting: fmean(_scores(ranks[setting])))


class ProcessPool:
    """Processes for several runs, one on each core at a time; a GPU takes one run after the other.

    Two runs of one thread each finish sooner than two of two threads in turn, and much sooner where something else
    uses a core: no thread waits for another. Use it in a `with`.

    Args:
        device: Where they train.
        runs: How many there are at most.
    """

    def __init__(self, device: str, runs: int) -> None:
        workers = 1 if choose_device(device).type == "cuda" else min(runs, os.cpu_count() or 1)
        threads = torch.get_num_threads() // workers or 1
        context = multiprocessing.get_context("spawn")
        self.stopped = context.Event()
        self.pool = ProcessPoolExecutor(workers, context, _start_worker, (threads, self.stopped))

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def map(
        self, work: Callable[[Settings], _Result], runs: Sequence[Settings], what: str, progress: bool = True
    ) -> list[_Result]:
        """Return what some work gives for the settings of each run.

        Args:
            work: A function of a module.
            runs: Settings of the runs.
            what: Title of the progress bar.
            progress: Show it.

        Raises:
            KeyboardInterrupt: By Ctrl-C, with a sentence on how to go on.
        """
        try:
            found = self.pool.map(_unless_stopped, [work] * len(runs), runs)
            return list(tqdm(found, total=len(runs), desc=what, disable=not progress))
        except KeyboardInterrupt:
            self.stopped.set()
            raise KeyboardInterrupt("stopped: the same command goes on from there") from None


def _start_worker(threads: int, stopped: Event) -> None:
    global _stopped
    _stopped = stopped
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # One that is killed ends no pool: its workers would train on, and then wait forever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _unless_stopped(work: Callable[[Settings], _Result], run: Settings) -> _Result:
    """Do the work of a run, but none that waits in the pool's queue when Ctrl-C comes: it cannot be cancelled there."""
    if _stopped.is_set():
        raise KeyboardInterrupt
    try:
        return work(run)
    except KeyboardInterrupt:
        _stopped.set()
        raise


def sweep_figure(rows: Sequence[Mapping[str, Any]], chosen: Setting) -> Figure:
    """Gain over InfoNCE against the noise, a line a smoothing, with intervals; where noise collapses it is cut off."""
    axes = plot("Gain over InfoNCE, validation split", "latent_noise_std", "mean of R@1, R@5, R@10: points", height=3.4)
    stds = sorted({row["latent_noise_std"] for row in rows})
    smoothings = sorted({row["smoothing"] for row in rows})
    most_seeds = max(row["seeds"] for row in rows)
    top = max(1.0, *(row["gain"]["high"] for row in rows))
    bottom = max(-2 * top, min(row["gain"]["low"] for row in rows))
    for i, share in enumerate(smoothings):
        colour = COLOURS[i % len(COLOURS)]
        line = [row for row in rows if row["smoothing"] == share]
        # Beside each other, so that no interval hides another.
        places = [stds.index(row["latent_noise_std"]) + 0.2 * (i - (len(smoothings) - 1) / 2) for row in line]
        axes.plot(places, [row["gain"]["value"] for row in line], color=colour, lw=1.2, alpha=0.6)
        for place, row in zip(places, line, strict=True):
            value, low, high = (row["gain"][bound] for bound in ("value", "low", "high"))
            if value < bottom:
                axes.annotate(
                    f"{value:.0f}", (place, bottom), (0, 3), textcoords="offset points", ha="center", color=colour
                )
                continue
            axes.plot([place, place], [low, high], color=colour, lw=2.4, alpha=0.45)
            full = row["seeds"] == most_seeds
            axes.plot(place, value, "o", ms=5, color=colour, mfc=colour if full else "none")
            if (row["latent_noise_std"], row["smoothing"]) == chosen:
                axes.plot(place, value, "o", ms=12, mfc="none", mec="#888888", label="chosen")
        axes.plot([], [], "o", color=colour, label=f"smoothing {share:g}")
    if any(row["seeds"] < most_seeds for row in rows):
        axes.plot([], [], "o", color="#888888", mfc="none", ms=5, label="one seed")
    axes.axhline(0, color="#888888", lw=1, ls="--")
    axes.set(xlim=(-0.5, len(stds) - 0.5), ylim=(bottom, 1.1 * top))
    axes.set_xticks(range(len(stds)), [f"{std:g}" for std in stds])
    with mpl.rc_context({"legend.frameon": False}):
        axes.figure.legend(loc="outside lower center", ncols=2, handletextpad=0.1)
    return axes.figure


def _bind(settings: Settings) -> None:
    """See that the directory's runs are of these latents and settings, or note them."""
    path = settings.output / "tune.json"
    digest = hashlib.sha256((settings.latents / MANIFEST).read_bytes()).hexdigest()
    values = json.loads(json.dumps({**vars(settings), "latents": digest}, default=str))
    # The directory may be moved, more seeds be asked for, and the runs go on elsewhere.
    values = {name: value for name, value in values.items() if name not in ("output", "seed", "device")}
    if not path.is_file():
        write_json(path, values)
        return
    stored = read_json(path)
    differs = next((name for name in values if values[name] != stored.get(name)), None)
    if differs:
        raise ValueError(f"{differs} is not what the runs in {settings.output} have: take another output, or delete it")


def _run_settings(settings: Settings, setting: Setting, seed: int) -> Settings:
    name = f"noise{setting.latent_noise_std:g}-smoothing{setting.smoothing:g}-seed{seed}"
    return replace(settings, output=settings.output / "runs" / name, seed=seed, **setting._asdict())


def _ranks_path(run: Settings) -> Path:
    """File of a run's ranks on the validation split; a run that has it is finished."""
    return run.output / _RANKS


def _train_and_rank(settings: Settings) -> None:
    run = train(settings, progress=False)
    aligner = load_aligner(run, choose_device(settings.device))
    data = load_latents(settings.latents).subset("validation")
    ranks = retrieval_ranks(*embed(aligner, data), data)
    write_file(_ranks_path(settings), save(ranks))
    # They hold the optimizer's state, and nothing resumes from here any more.
    for name in (LAST, PREVIOUS):
        (run / name).unlink(missing_ok=True)


def _scores(runs: Sequence[Ranks]) -> list[float]:
    return [validation_score(recalls(ranks)) for ranks in runs]


def _score(runs: Mapping[int, Ranks]) -> float:
    return fmean(_scores(list(runs.values())))


def _row(setting: Setting, runs: Mapping[int, Ranks], infonce: Mapping[int, Ranks]) -> dict[str, Any]:
    mean = [recalls(ranks)["mean"] for ranks in runs.values()]
    return {
        **setting._asdict(),
        "seeds": len(runs),
        **{name: fmean(one[name] for one in mean) for name in RECALLS},
        "score": _score(runs),
        "gain": paired_difference(list(runs.values()), [infonce[seed] for seed in runs], RECALL_AT),
    }


def _verdict(chosen: Setting, rows: Sequence[Mapping[str, Any]], largest: float) -> str:
    if chosen == INFONCE:
        return "InfoNCE is chosen: no noise or smoothing that was tried is better on the validation split."
    gain = next(row["gain"] for row in rows if (row["latent_noise_std"], row["smoothing"]) == chosen)
    text = f"{chosen} is chosen: {_interval(gain)} points over InfoNCE on the validation split"
    if gain["low"] <= 0:
        text += "; the interval has 0 in it, so more validation pairs might tell otherwise"
    if chosen.latent_noise_std == largest:
        text += "; it is the largest noise that was tried, so try more"
    return text + "."


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['value']:+.1f} ({found['low']:+.1f} to {found['high']:+.1f})"


def _markdown(tuned: Tuned) -> str:
    header = ["noise", "smoothing", "seeds", *(f"{name} %" for name in RECALLS), "mean %", "over InfoNCE", ""]
    lines = [header, ["---:"] * (len(header) - 1) + ["---"]]
    for row in tuned.rows:
        setting = Setting(row["latent_noise_std"], row["smoothing"])
        lines.append(
            [
                *(f"{value:g}" for value in (*setting, row["seeds"])),
                *(f"{row[name]:.1f}" for name in (*RECALLS, "score")),
                "" if setting == INFONCE else _interval(row["gain"]),
                "chosen" if setting == tuned.chosen else "",
            ]
        )
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\nMeans of the seeds on the validation split; gains with 95% intervals, of equal seeds."


def _write(tuned: Tuned, settings: Settings) -> None:
    directory = settings.output
    write_json(directory / "results.json", {"chosen": tuned.chosen._asdict(), "rows": tuned.rows})
    write_file(directory / "table.md", f"{_markdown(tuned)}\n\n{tuned.verdict}\n")
    figure = sweep_figure(tuned.rows, tuned.chosen)
    for axes in figure.axes:
        # On a report's page they take its faint colour.
        axes.grid(color="#dddddd")
        axes.tick_params(color="#999999")
        axes.spines[:].set_color("#999999")
    with atomic_path(directory / "tune.png") as temporary:
        figure.savefig(temporary, format="png", dpi=200, facecolor="white")
    choice = replace(settings, **tuned.chosen._asdict()).to_toml()
    kept = [line for line in choice.splitlines() if line.split(" = ")[0] not in ("output", "seed", "device")]
    write_file(tuned.path, "\n".join([f"# {tuned.verdict}", *kept]) + "\n")
