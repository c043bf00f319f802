"""Zero-shot classification: the names of classes, put into templates, are the classifier of a trained run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from modest_align_train.adapters import Aligner, load_checkpoint
from modest_align_train.answers import caption_key
from modest_align_train.devices import choose_device
from modest_align_train.encoders import TextEncoder, load_image_encoder, load_text_encoder
from modest_align_train.evaluate import best_ranks, group_mean, intervals
from modest_align_train.extract import image_batches, text_batches
from modest_align_train.files import read_json, write_json
from modest_align_train.latents import MANIFEST
from modest_align_train.pictures import IMAGE_SUFFIXES
from modest_align_train.settings import ZERO_SHOT_TEMPLATE, ZERO_SHOT_TOP
from modest_align_train.skips import Skipped, SkipReport, count_reasons
from modest_align_train.sources import SPLIT_NAMES, fingerprint
from modest_align_train.tables import parse_json, read_text


@dataclass(frozen=True)
class ClassFolders:
    """Pictures in one folder a class, not yet opened.

    Attributes:
        names: What the classes are called, [classes].
        locations: Paths of the pictures, [images].
        label: Class of each, int64 [images].
        skipped: Files in the folders that are none by their names.
    """

    names: list[str]
    locations: list[str]
    label: Tensor
    skipped: list[Skipped]


def zero_shot(
    run: Path | str,
    folder: Path | str,
    *,
    template: Sequence[str] = ZERO_SHOT_TEMPLATE,
    names: Path | str | None = None,
    top: Sequence[int] = ZERO_SHOT_TOP,
    bootstrap: int = 1000,
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Classify the pictures of one folder a class by the classes' names; write what was found into the run.

    Into `zero-shot-FOLDER.json`, which says which checkpoint and pictures it is of; where the folder is called as
    splits are (`val`), its parent's name stands before it. A picture's class is the one whose prototype
    (`class_prototypes`) is nearest to its embedding by cosine; ties count against us.

    Intervals are the 2.5 and 97.5 percentiles of a bootstrap that draws pictures with replacement; the classes are
    taken as they are.

    Args:
        run: Run directory; its encoders and adapters make the embeddings.
        folder: As `read_class_folders` wants it.
        template: Texts with ``{}`` in the place of a class's name.
        names: As in `read_class_folders`.
        top: Numbers k: a picture is right in the top k where its class is among the k nearest.
        bootstrap: Bootstrap replicates.
        device: Where to encode: "auto", "cpu", "cuda".
        progress: Show a progress bar and say what was left out.

    Returns:
        What the file holds: what it is of; `accuracy`, with `top-K` and, of top 1, `mean_per_class`, each with `value`,
        `low` and `high`; `chance`; `per_class`, of each the images and the accuracy; what was left out and why.
        Accuracies are in percent.

    Raises:
        FileNotFoundError: The folder, the run's checkpoint or its latents, which name the encoders, are not there.
        ValueError: The folder or an argument cannot be used, or no picture can be read.
        ImportError: An encoder's package is missing.
    """
    if not template or not all("{}" in one for one in template):
        given = next((repr(one) for one in template if "{}" not in one), "none")
        raise ValueError(f"template must be texts with {{}} in the place of a class's name, got {given}")
    if not top or min(top) < 1:
        raise ValueError(f"top must be numbers of at least 1, got {', '.join(map(str, top)) or 'none'}")
    if bootstrap < 1:
        raise ValueError(f"bootstrap must be at least 1, got {bootstrap}")
    run, folder = Path(run), Path(os.path.abspath(folder))
    pictures = read_class_folders(folder, names)
    checkpoint = load_checkpoint(run, choose_device(device))
    aligner = checkpoint.aligner
    manifest = read_json(checkpoint.find_latents()[0] / MANIFEST)
    encode_images = load_image_encoder(manifest["image_encoder"], device)
    encode_texts = load_text_encoder(manifest["text_encoder"], device)

    output = run / _file_name(folder)
    report = SkipReport(tqdm.write if progress else lambda line: None, output.name)
    report.add(pictures.skipped)
    total = len(pictures.names) * len(template) + len(pictures.locations)
    embedded: list[Tensor] = []
    unread: list[Skipped | None] = []
    with tqdm(total=total, unit=" items", disable=not progress, smoothing=0.05) as bar:
        prototypes = class_prototypes(aligner, encode_prompts(pictures.names, template, encode_texts, bar.update))
        for latents, reasons in image_batches(pictures.locations, encode_images):
            embedded.append(aligner.embed_images(latents))
            unread += reasons
            report.add([one for one in reasons if one])
            bar.update(len(reasons))
    report.close()

    skipped = pictures.skipped + [one for one in unread if one]
    label = pictures.label[torch.tensor([one is None for one in unread])]
    if not len(label):
        raise ValueError(
            f"{folder} has {len(unread):,} pictures, none of which could be read, the first being {unread[0]}"
        )
    ranks, classes = class_ranks(torch.cat(embedded), prototypes, label), len(prototypes)
    counts, right = label.bincount(minlength=classes), label[ranks == 1].bincount(minlength=classes)
    result = {
        "folder": str(folder),
        "pictures": fingerprint([folder]),
        "checkpoint": checkpoint.digest,
        "image_encoder": encode_images.name,
        "text_encoder": encode_texts.name,
        "templates": list(template),
        "classes": classes,
        "images": len(label),
        "accuracy": {
            **top_accuracy([ranks], torch.arange(len(ranks)), top, bootstrap),
            "mean_per_class": _mean_per_class(ranks, label, bootstrap),
        },
        "chance": {**chance_accuracy(classes, top), "mean_per_class": 100 / classes},
        "per_class": {
            name: {"images": images, "top-1": 100 * hits / images if images else None}
            for name, images, hits in zip(pictures.names, counts.tolist(), right.tolist(), strict=True)
        },
        "skipped_by_reason": count_reasons(one.reason for one in skipped),
        "skipped": list(map(asdict, skipped)),
    }
    write_json(output, result)
    return result


def read_class_folders(folder: Path, names: Path | str | None = None) -> ClassFolders:
    """List the pictures of a folder that holds one folder a class, as torchvision's ImageFolder does.

    Args:
        folder: Its folders are the classes, in the order of their names; pictures lie in these or below, and are told
            by their suffixes. What is hidden is not looked at.
        names: JSON file with what the classes are called, by the names of their folders,
            ``{"n02084071": "dog", ...}``; if None, the folders' names with spaces for ``_`` and ``-``.

    Raises:
        FileNotFoundError: The folder is not there.
        ValueError: It holds no classes but splits, fewer than two classes, one without pictures, or two of one name;
            or the file of names is no such file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} must be a folder that holds one folder a class, but there is none")
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if classes and all(one.name.lower() in SPLIT_NAMES for one in classes):
        found = ", ".join(one.name for one in classes)
        raise ValueError(
            f"{folder} must hold one folder a class, got splits ({found}): name one of these, {classes[-1]}"
        )
    if len(classes) < 2:
        raise ValueError(f"{folder} must hold one folder a class, and at least two of them, got {len(classes)}")
    called = _class_names([one.name for one in classes], names)
    locations: list[str] = []
    skipped: list[Skipped] = []
    counts = []
    for one in classes:
        files = _files_below(one)
        pictures = [path for path in files if path.lower().endswith(IMAGE_SUFFIXES)]
        others = [path for path in files if not path.lower().endswith(IMAGE_SUFFIXES)]
        if not pictures:
            raise ValueError(f"{one} must hold pictures of its class, got none and {len(others):,} other files")
        skipped += [Skipped(path, "no picture by its name") for path in others]
        locations += pictures
        counts.append(len(pictures))
    return ClassFolders(called, locations, torch.arange(len(classes)).repeat_interleave(torch.tensor(counts)), skipped)


def _class_names(folders: Sequence[str], names: Path | str | None) -> list[str]:
    if names is None:
        called = [" ".join(folder.replace("_", " ").replace("-", " ").split()) for folder in folders]
    else:
        given = parse_json(read_text(Path(names)), str(names))
        if not isinstance(given, dict):
            raise ValueError(
                f'names must be a JSON file of {{"folder": "class"}}, got {type(given).__name__} in {names}'
            )
        missing = next((folder for folder in folders if not isinstance(given.get(folder), str)), None)
        if missing is not None:
            raise ValueError(f"names must give each folder's class as a text, got {given.get(missing)!r} for {missing}")
        called = [given[folder] for folder in folders]
    first: dict[str, str] = {}
    for folder, name in zip(folders, called, strict=True):
        if not caption_key(name):
            raise ValueError(f"the class of the folder {folder!r} must have a name: give it one by names")
        if first.setdefault(caption_key(name), folder) != folder:
            raise ValueError(
                f"classes must differ in their names, got {name!r} for the folders {first[caption_key(name)]} and "
                f"{folder}: tell them apart by names"
            )
    return called


def _files_below(folder: Path) -> list[str]:
    """Paths of all files in a folder or below, through links too, in order, but not of what is hidden."""
    found = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(root, name) for name in sorted(files) if not name.startswith(".")]
    return found


def _file_name(folder: Path) -> str:
    """Name of the file for what was found; many data sets have a folder ``val``."""
    parents = [folder.parent.name] if folder.name.lower() in SPLIT_NAMES else []
    return "-".join(["zero-shot", *filter(None, parents), folder.name]) + ".json"


def encode_prompts(
    names: Sequence[str],
    templates: Sequence[str],
    encoder: TextEncoder,
    progress: Callable[[int], object] = lambda count: None,
) -> Tensor:
    """Encode each class's name in each template: latents, float32 [classes, templates, Dt].

    Args:
        names: What the classes are called.
        templates: Texts with ``{}`` in the place of the name.
        encoder: Of texts.
        progress: Called with the number of texts whenever some are done.
    """
    texts = [template.replace("{}", name) for name in names for template in templates]
    latents = []
    for batch in text_batches(texts, encoder):
        latents.append(batch)
        progress(len(batch))
    return torch.cat(latents).unflatten(0, (len(names), len(templates)))


def class_prototypes(aligner: Aligner, prompts: Tensor) -> Tensor:
    """Embed classes: the mean of the normalised embeddings of their prompts, normalised again.

    That is CLIP's ensemble of prompts in embedding space (Radford et al., 2021, arXiv 2103.00020, section 3.1.4).

    Args:
        aligner: Of a run.
        prompts: What `encode_prompts` returns, [classes, templates, Dt].

    Returns:
        float32 [classes, D] on the aligner's device.
    """
    embedded = aligner.embed_texts(prompts.flatten(0, 1))
    return normalize(embedded.unflatten(0, prompts.shape[:2]).mean(1), dim=-1)


def class_ranks(images: Tensor, prototypes: Tensor, label: Tensor) -> Tensor:
    """Rank of each image's class among all by cosine, as `best_ranks` has it; 1 is the best.

    Args:
        images: L2-normalised embeddings [n, D].
        prototypes: L2-normalised [classes, D], on the same device.
        label: Class of each image, int64 [n].

    Returns:
        int64 [n] on the CPU.
    """
    label = label.to(images.device)
    return best_ranks(images, prototypes, lambda rows: (torch.arange(len(rows), device=rows.device), label[rows])).cpu()


def top_accuracy(
    ranks: Sequence[Tensor], group: Tensor, top: Sequence[int], bootstrap: int = 1000
) -> dict[str, dict[str, float]]:
    """Accuracy in percent, the mean of several runs (seeds) on the same images, with 95% intervals.

    Args:
        ranks: What `class_ranks` returns for each run, int64 [n].
        group: What the bootstrap draws, a number from 0 for each image, int64 [n].
        top: Numbers k.
        bootstrap: Bootstrap replicates.

    Returns:
        Of each ``top-K`` the `value`, `low` and `high`.
    """
    hits = torch.stack([torch.stack([rank <= k for rank in ranks]).double().mean(0) for k in top], dim=1)
    found = intervals(lambda weights: 100 * group_mean(hits, group, weights), group, bootstrap)
    return {f"top-{k}": accuracy for k, accuracy in zip(top, found, strict=True)}


def chance_accuracy(classes: int, top: Sequence[int]) -> dict[str, float]:
    """Accuracy of guesses among so many classes, in percent, by ``top-K``."""
    return {f"top-{k}": 100 * min(k, classes) / classes for k in top}


def _mean_per_class(ranks: Tensor, label: Tensor, bootstrap: int) -> dict[str, float]:
    """Mean over the classes that have images of their top-1 accuracies, in percent, with an interval.

    A replicate is the mean over the classes that were drawn, which small ones often are not: the interval is freed of
    the bias of that.
    """
    hits, classes = (ranks == 1).double(), int(label.max()) + 1

    def statistics(weights: Tensor) -> Tensor:
        right, drawn = torch.zeros(2, len(weights), classes, dtype=torch.float64)
        right.index_add_(1, label, weights * hits)
        drawn.index_add_(1, label, weights)
        return 100 * (right / drawn).nanmean(1, keepdim=True)

    found = intervals(statistics, torch.arange(len(label)), bootstrap, unbias=True)[0]
    return {**found, "high": min(found["high"], 100.0)}


def format_zero_shot(result: Mapping[str, Any]) -> str:
    """Lay out what `zero_shot` returns as a small table with 95% intervals."""
    accuracy, templates = result["accuracy"], result["templates"]
    labels = {name: name.replace("_", " ") for name in accuracy}
    cells = [f"{one['value']:.1f} ({one['low']:.1f}-{one['high']:.1f})" for one in accuracy.values()]
    return "\n".join(
        [
            f"{result['folder']}: {result['images']:,} images, {result['classes']:,} classes, "
            f"{len(templates)} template{'s' if len(templates) > 1 else ''}; in brackets 95% intervals",
            f"{'':<9}" + "".join(f"{label + ' %':>21}" for label in labels.values()),
            f"{'accuracy':<9}" + "".join(f"{cell:>21}" for cell in cells),
            f"{'chance':<9}" + "".join(f"{result['chance'][name]:>21.2f}" for name in accuracy),
        ]
    )
