"""The command line: `modest-align` and `python -m modest_align_train`."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from modest_align_train.settings import (
    TUNE_NOISE,
    TUNE_SEEDS,
    TUNE_SMOOTHING,
    ZERO_SHOT_TEMPLATE,
    ZERO_SHOT_TOP,
    Settings,
    read_settings,
)
from modest_align_train.skips import visible

# Modules that need torch are imported by the subcommands, so that --help is quick.

# What a shell says of a program that SIGPIPE ended.
_BROKEN_PIPE = 141
# Seconds that other processes wait, before they speak, for the first one to have spoken and torchrun to end them.
_FIRST_SPEAKS = 10

_Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
_Runs = Annotated[list[Path], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...", help_behavior_hint="(required)")]
_Query = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="QUERY")]
_Source = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
_Output = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]
_Numbers = Annotated[tuple[float, ...], tyro.conf.arg(metavar="FLOAT ...")]
_OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]
_OptionalStr = Annotated[str | None, tyro.conf.arg(metavar="STR")]
_OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT")]


def main(args: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        args: Words after the program's name; None takes those of the process.

    Returns:
        Exit status: 0; 2 for bad input, with one sentence on stderr; 130 for Ctrl-C; 141, without a word, where
        nobody reads the output any more, as after `| head -1`.

    Raises:
        SystemExit: of --help, of words that are no arguments, and of `doctor`: 1 if a self-test failed.
    """
    try:
        try:
            return _run(args)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes what is left once more when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE


def _run(args: Sequence[str] | None) -> int:
    # OpenMP reads it when PyTorch is loaded. By default threads spin while they wait: beside other busy processes they
    # keep each other from the cores, and a training step takes twice as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    args = list(sys.argv[1:] if args is None else args)
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    process = int(os.environ["RANK"]) if under_torchrun else 0
    if under_torchrun and int(os.environ["WORLD_SIZE"]) > 1 and args[:1] not in (["train"], ["extract"]):
        return _end(
            process, f"{' '.join(args[:1])}: got it under torchrun, which only train and extract know: start it alone"
        )
    commands: dict[str, Callable[..., None]] = {
        "demo": demo,
        "extract": extract,
        "tune": tune,
        "train": _train({}),
        "evaluate": evaluate,
        "zero-shot": zero_shot,
        "search": search,
        "report": report,
        "doctor": doctor,
    }
    try:
        _refuse_repeated_flags(args)
        config = _config_file(args) if args[:1] == ["train"] else None
        if config:
            commands["train"] = _train(read_settings(config))
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="modest-align",
            description="Align two frozen encoders with few, noisy pairs.",
            args=args,
            console_outputs=process == 0,
        )
    except SystemExit as stop:
        if stop.code and process:
            return _end(process, f"process {process} cannot read its arguments")
        raise
    except BrokenPipeError:
        raise
    except (OSError, ValueError, TypeError, ImportError, FloatingPointError) as error:
        # The system's own errors have a number, and the path apart.
        system = isinstance(error, OSError) and error.errno
        sentence = f"{error.filename}: {error.strerror}" if system else str(error)
        flags = _flags(commands[args[0]]) if args[:1] and args[0] in commands else []
        return _end(process, _name_flags(sentence, flags))
    except KeyboardInterrupt as stop:
        if process == 0:
            print(f"modest-align: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


def _end(process: int, sentence: str) -> int:
    if process:
        # torchrun ends all processes with the first that ends: let it be process 0, which has the same sentence to say.
        time.sleep(_FIRST_SPEAKS)
    print(f"modest-align: {visible(sentence)}", file=sys.stderr)
    return 2


def demo(output: _Output = Path("demo_run"), *, seeds: int = 1, quick: bool = False) -> None:
    """Extract, train, evaluate and report on the pairs that come with the project.

    Args:
        output: Directory for all of it.
        seeds: Runs of each kind.
        quick: A small part of it, to see that it works.
    """
    from modest_align_train.demo import demo as run_demo

    run_demo(output, seeds=seeds, quick=quick)


def extract(
    source: _Source,
    output: _Output,
    *,
    image_encoder: str = "efficientnet-lite0",
    text_encoder: str = "all-MiniLM-L6-v2",
    split: _OptionalStr = None,
    image_column: _OptionalStr = None,
    caption_column: Annotated[tuple[str, ...], tyro.conf.arg(metavar="STR ...", help_behavior_hint="")] = (),
    image_root: _OptionalPath = None,
    group_column: _OptionalStr = None,
    dtype: Literal["float32", "float16"] = "float32",
    batch_size: _OptionalInt = None,
    device: str = "auto",
) -> None:
    """Turn images and captions into latents with two frozen encoders.

    Args:
        source: CSV, TSV, JSONL or Parquet, WebDataset tars, COCO's or Karpathy's JSON, a folder of pictures with texts
            beside, imagefolder; or a glob or folder of them.
        output: Directory of latents to write; an interrupted extraction goes on.
        image_encoder: efficientnet-lite0, timm:NAME, open_clip:NAME:PRETRAINED or transformers:NAME.
        text_encoder: all-MiniLM-L6-v2, open_clip:NAME:PRETRAINED, sentence-transformers:NAME or
            transformers:NAME.
        split: Put every image into this split; by default the source's, or 80/10/10 where it has none.
        image_column: Column of a table with the image's path; found by its usual names if not given.
        caption_column: Columns of a table with captions; found by their usual names if not given.
        image_root: Folder that relative image paths start from; by default that of the source.
        group_column: Column of a table, or field of a tar's .json, whose equal values say that images show the same
            thing: they stay in one split, and their captions are right answers for each other. By default none.
        dtype: Type that latents are stored in; float16 takes half the space.
        batch_size: Images a batch; by default what is fast on the device.
        device: Where to encode: "auto", "cpu", "cuda".
    """
    from modest_align_train.extract import extract as run_extract
    from modest_align_train.workers import workers_of_torchrun

    with workers_of_torchrun(device) as workers:
        run_extract(
            source,
            output,
            image_encoder=image_encoder,
            text_encoder=text_encoder,
            split=split,
            image_column=image_column,
            caption_column=caption_column or None,
            image_root=image_root,
            group_column=group_column,
            dtype=dtype,
            batch_size=batch_size,
            device=device,
            workers=workers,
        )


def tune(
    latents: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LATENTS")],
    output: _Output = Path("tuned"),
    *,
    noise: _Numbers = TUNE_NOISE,
    smoothing: _Numbers = TUNE_SMOOTHING,
    seeds: int = TUNE_SEEDS,
    config: _OptionalPath = None,
) -> None:
    """Choose noise and smoothing for these latents on their validation split; an interrupted tuning goes on.

    Args:
        latents: Directory that `extract` wrote.
        output: Directory for runs, table, picture and the choice.
        noise: Values of latent_noise_std; InfoNCE (0) is tried anyway.
        smoothing: Values of smoothing.
        seeds: Runs of each setting that remains.
        config: TOML file with other settings of the runs.
    """
    from modest_align_train.tune import tune as run_tune

    values = read_settings(config) if config else {}
    settings = Settings(**{**values, "latents": latents, "output": output})
    tuned = run_tune(settings, noise=noise, smoothing=smoothing, seeds=seeds)
    print(f"next: modest-align train --config {tuned.path} --output run")


def _train(values: dict[str, Any]) -> Callable[..., None]:
    default = Settings(**{"latents": tyro.MISSING, "output": tyro.MISSING, **values})

    def train(settings: Annotated[Settings, tyro.conf.arg(name="")] = default, *, config: _OptionalPath = None) -> None:
        """Train the adapters on latents; an interrupted run goes on.

        Args:
            settings: See `Settings`.
            config: TOML file with settings; those on the command line go first.
        """
        from modest_align_train.train import train as run_train
        from modest_align_train.workers import workers_of_torchrun

        with workers_of_torchrun(settings.device) as workers:
            run = run_train(settings, workers=workers)
        if workers.writes:
            print(f"trained: {run}; next: modest-align evaluate {run}")

    return train


def evaluate(
    run: _Run,
    *,
    latents: _OptionalPath = None,
    split: str = "test",
    bootstrap: int = 1000,
    device: str = "auto",
) -> None:
    """Measure retrieval and calibration of a run.

    Args:
        run: Run directory of `train`.
        latents: Directory of latents; by default the one that the run was trained on.
        split: Split to evaluate.
        bootstrap: Bootstrap replicates of the intervals.
        device: Where to compute: "auto", "cpu", "cuda".
    """
    from modest_align_train.evaluate import evaluate as run_evaluate
    from modest_align_train.evaluate import format_evaluation

    result = run_evaluate(run, latents=latents, split=split, bootstrap=bootstrap, device=device)
    print(format_evaluation(result))


def zero_shot(
    run: _Run,
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")],
    *,
    template: Annotated[tuple[str, ...], tyro.conf.arg(metavar="STR ...")] = ZERO_SHOT_TEMPLATE,
    names: _OptionalPath = None,
    top: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...")] = ZERO_SHOT_TOP,
    bootstrap: int = 1000,
    device: str = "auto",
) -> None:
    """Classify the pictures of one folder a class by the classes' names.

    Args:
        run: Run directory of `train`.
        folder: Holds one folder of pictures a class, whose name is the class's (ImageFolder).
        template: Texts with {} in the place of a class's name; the embeddings of several are averaged.
        names: JSON file with what the classes are called by the names of their folders, {"n02084071": "dog"}.
        top: Numbers k: of top-k accuracy.
        bootstrap: Bootstrap replicates of the intervals.
        device: Where to compute: "auto", "cpu", "cuda".
    """
    from modest_align_train.zero_shot import format_zero_shot
    from modest_align_train.zero_shot import zero_shot as run_zero_shot

    result = run_zero_shot(run, folder, template=template, names=names, top=top, bootstrap=bootstrap, device=device)
    print(format_zero_shot(result))


def search(
    run: _Run,
    query: _Query,
    *,
    latents: _OptionalPath = None,
    split: _OptionalStr = None,
    top: int = 10,
    output: _OptionalPath = None,
) -> None:
    """Find images by a text, or captions by an image.

    Args:
        run: Run directory of `train`.
        query: A text, or the path of an image file.
        latents: Directory of latents to search; by default the one that the run was trained on.
        split: Search this split only.
        top: Hits to show.
        output: Picture of the hits to write: .png, .pdf or .svg.
    """
    from modest_align_train.search import format_hits
    from modest_align_train.search import search as run_search

    print(format_hits(run_search(run, query, latents=latents, split=split, top=top, output=output)))


def report(
    runs: _Runs,
    *,
    output: Path = Path("report.html"),
    title: str = "Alignment report",
    latents: _OptionalPath = None,
) -> None:
    """Write one HTML page about one or several runs.

    Args:
        runs: Run directories of `train`.
        output: The page.
        title: Its heading.
        latents: Directory of latents; by default the one that each run was trained on.
    """
    from modest_align_train.report import write_report

    print(f"report: {write_report(runs, output, title=title, latents=latents)}")


def doctor() -> None:
    """Say what is installed and which backends run here, for a bug report, and test them; status 1 if a test fails."""
    runpy.run_module("modest_align_kernels", run_name="__main__")


def _refuse_repeated_flags(args: Sequence[str]) -> None:
    """The last one would count, and the others be forgotten without a word."""
    names = [word.partition("=")[0].replace("_", "-") for word in args if word.startswith("--")]
    for name, count in Counter(name.replace("--no-", "--") for name in names).items():
        if count > 1:
            raise ValueError(f"{name} must be given once, with all its values, got it {count} times")


def _flags(command: Callable[..., None]) -> list[str]:
    """Names of the arguments that are flags on the command line."""
    names = [one.name for one in signature(command).parameters.values() if one.kind is one.KEYWORD_ONLY]
    return names + [field.name for field in fields(Settings)] if "settings" in signature(command).parameters else names


def _name_flags(sentence: str, names: Sequence[str]) -> str:
    """Call arguments by their flags, where a sentence speaks of them: at its start, and after some words."""
    if not names:
        return sentence
    spoken_of = rf"(^|\b(?:by|from|lower|or) )({'|'.join(names)})\b(?![-/.])"
    return re.sub(spoken_of, lambda match: f"{match[1]}--{match[2].replace('_', '-')}", sentence)


def _config_file(args: Sequence[str]) -> str | None:
    """Value of --config: its settings are the defaults that the other words are parsed with."""
    parser = argparse.ArgumentParser("modest-align train", add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return parser.parse_known_args(args)[0].config
