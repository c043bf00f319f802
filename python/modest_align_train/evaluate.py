"""Retrieval and calibration of a trained run, with bootstrap intervals over groups."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from modest_align_train.adapters import Aligner, Checkpoint, load_checkpoint
from modest_align_train.answers import Answers
from modest_align_train.devices import choose_device
from modest_align_train.files import read_json, write_file, write_json
from modest_align_train.latents import Latents, pairs_digest
from modest_align_train.workers import ALONE, Workers

RECALL_AT = (1, 5, 10)
RECALLS = tuple(f"R@{k}" for k in RECALL_AT)
# The ranks of each direction's queries, and the queries' groups.
DIRECTIONS = {"image_to_text": ("image_rank", "image_group"), "text_to_image": ("text_rank", "caption_group")}
BINS = 15

# Similarities held at once: 256 MiB in fp32. Rows of queries are taken so that all candidates fit.
_SIMILARITIES = 2**26
# Bootstrap weights held at once.
_WEIGHTS = 2**23

Ranks = Mapping[str, Tensor]


def evaluate(
    run: Path | str,
    *,
    latents: Path | str | None = None,
    split: str = "test",
    bootstrap: int = 1000,
    device: str = "auto",
) -> dict[str, Any]:
    """Evaluate the best checkpoint of a run; write what was found into it.

    On the test split of the run's own latents into `evaluation.json` and `ranks.safetensors`; names of other splits
    and latents say so (`evaluation-validation.json`). Each says which checkpoint and latents it is of.

    Recalls follow the protocol of COCO and Flickr30k: an image finds its best right caption, a caption its
    best right image; `Answers` says what is right. Ties count against us: a wrong candidate that is as similar
    as the best right one ranks before it.

    Calibration takes at most one pair a group, so that each query has one right candidate
    (`Answers.one_to_one`), and the softmax over all of them at the run's own scale. ECE = sum_b n_b/n
    |accuracy_b - confidence_b| over 15 bins of equal width of the highest probability (Guo et al., 2017).

    Intervals are the 2.5 and 97.5 percentiles of a bootstrap that draws groups with replacement; those of the
    calibration are freed of the bootstrap's bias, which for an ECE is large.

    Args:
        run: Run directory.
        latents: Directory of latents; None is the one the run was trained on.
        split: Split to evaluate.
        bootstrap: Bootstrap replicates.
        device: Where to embed and rank: "auto", "cpu", "cuda".

    Returns:
        What `evaluation.json` holds: what it is of, recalls, ECE, confidence and accuracy in percent, median ranks
        (1 is the best), NLL in nats.

    Raises:
        FileNotFoundError: The run has no best checkpoint, or there are no latents.
        ValueError: The split has no images, the latents have other numbers of features than the run's, or other
            latents were extracted into the place of those that the run was trained on.
    """
    if bootstrap < 1:
        raise ValueError(f"bootstrap must be at least 1, got {bootstrap}")
    run = Path(run)
    checkpoint = load_checkpoint(run, choose_device(device))
    aligner = checkpoint.aligner
    data = checkpoint.load_latents(latents).subset(split)
    images, texts = embed(aligner, data)
    ranks = retrieval_ranks(images, texts, data)
    scale = float(aligner.scale)
    name, ranks_name = _file_names(split, data.fingerprint, checkpoint)
    result = {
        "split": split,
        "checkpoint": checkpoint.digest,
        "latents": data.fingerprint,
        "pairs": pairs_digest(data),
        "ranks": ranks_name,
        "images": len(images),
        "captions": len(texts),
        "groups": int(data.group.max()) + 1,
        "scale": scale,
        "chance": chance(data),
        **_retrieval(ranks, bootstrap),
        "calibration": _calibration(*_one_to_one(images, texts, data), scale, bootstrap),
    }
    # Never new ranks beside an old evaluation.
    (run / name).unlink(missing_ok=True)
    write_file(run / ranks_name, save(ranks))
    write_json(run / name, result)
    return result


def load_evaluation(run: Path | str, *, latents: Path | str | None = None, split: str = "test") -> dict[str, Any]:
    """Load what `evaluate` found with the run's checkpoint and latents as they are now; evaluate if it has not.

    Args:
        run: Run directory.
        latents: Directory of latents; None is the one the run was trained on, which need no longer be there.
        split: Split that was to be evaluated.

    Raises:
        FileNotFoundError, ValueError: As `evaluate` does.
    """
    run = Path(run)
    checkpoint = load_checkpoint(run)
    try:
        fingerprint = checkpoint.find_latents(latents)[1]
    except FileNotFoundError:
        if latents is not None:
            raise
        fingerprint = checkpoint.trained_on
    path = run / _file_names(split, fingerprint, checkpoint)[0]
    if path.is_file():
        stored: dict[str, Any] = read_json(path)
        wanted = {"split": split, "checkpoint": checkpoint.digest, "latents": fingerprint}
        if wanted.items() <= stored.items() and (run / stored["ranks"]).is_file():
            return stored
    return evaluate(run, latents=latents, split=split)


def _file_names(split: str, fingerprint: str, checkpoint: Checkpoint) -> tuple[str, str]:
    """Names of the files for what was found and for the ranks."""
    parts = [split] if split != "test" else []
    if checkpoint.trained_on != fingerprint:
        parts.append(fingerprint[:8])
    return "-".join(["evaluation", *parts]) + ".json", "-".join(["ranks", *parts]) + ".safetensors"


def embed(aligner: Aligner, latents: Latents, workers: Workers = ALONE) -> tuple[Tensor, Tensor]:
    """Embeddings of the images and of the captions, of which each worker makes its share."""
    return (
        workers.join(aligner.embed_images(latents.image[workers.share(len(latents.image))])),
        workers.join(aligner.embed_texts(latents.text[workers.share(len(latents.text))])),
    )


def best_ranks(
    queries: Tensor,
    candidates: Tensor,
    answers: Callable[[Tensor], tuple[Tensor, Tensor]],
    workers: Workers = ALONE,
) -> Tensor:
    """Rank of the most similar right candidate of each query; 1 is the best.

    Similarities are dot products. The rank is one more than the number of wrong candidates that are at least as
    similar. NaN counts as the worst.

    Args:
        queries: [n, D].
        candidates: [m, D].
        answers: Tells the right candidates of some queries by their rows, as `Answers.captions` does.
        workers: Each of them ranks its share of the queries.

    Returns:
        int64 [n].
    """
    found = [torch.empty(0, dtype=torch.int64, device=queries.device)]
    own = workers.share(len(queries))
    for row in _chunks(own.stop - own.start, len(candidates), "ranks", workers):
        row = row.to(queries.device) + own.start
        similarity = queries[row] @ candidates.T
        position, right = answers(row)
        of_right = similarity[position, right]
        best = of_right.new_full((len(row),), -torch.inf).scatter_reduce(0, position, of_right, "amax")
        # Not those that are >=: NaN would rank first.
        ahead = len(candidates) - (similarity < best[:, None]).sum(1)
        found.append(1 + ahead.index_add(0, position, (of_right < best[position]).long() - 1))
    return workers.join(torch.cat(found))


def _chunks(queries: int, candidates: int, what: str, workers: Workers = ALONE) -> Iterable[Tensor]:
    """Rows of queries whose similarities to all candidates are held at once; the bar shows up where it takes long."""
    rows = torch.arange(queries).split(max(1, _SIMILARITIES // candidates))
    # No bar of one of several processes, which would write over each other's.
    alone = workers.writes and multiprocessing.parent_process() is None
    return tqdm(rows, what, leave=False, delay=5, disable=not alone)


def retrieval_ranks(images: Tensor, texts: Tensor, latents: Latents, workers: Workers = ALONE) -> dict[str, Tensor]:
    """Ranks both ways, on the CPU.

    Args:
        images: Embeddings [images, D].
        texts: Embeddings [captions, D].
        latents: What they were made from; gives the groups and what is right.
        workers: Each of them ranks its share.

    Returns:
        `image_rank` and `image_group` [images], `text_rank` and `caption_group` [captions], all int64.
    """
    answers = Answers(latents.to(images.device))
    return {
        "image_rank": best_ranks(images, texts, answers.captions, workers).cpu(),
        "text_rank": best_ranks(texts, images, answers.images, workers).cpu(),
        "image_group": latents.group.cpu(),
        "caption_group": latents.group[latents.caption_image].cpu(),
    }


def recalls(ranks: Ranks) -> dict[str, dict[str, float]]:
    """Recalls in percent as in `evaluate`, without intervals."""
    found = {}
    for direction, (rank, _) in DIRECTIONS.items():
        found[direction] = {f"R@{k}": 100 * (ranks[rank] <= k).double().mean().item() for k in RECALL_AT}
    found["mean"] = {r: (found["image_to_text"][r] + found["text_to_image"][r]) / 2 for r in RECALLS}
    return found


def chance(latents: Latents) -> dict[str, float]:
    """Recalls of a random order of the candidates, the mean of both directions, in percent.

    Args:
        latents: Of one split.
    """
    found = dict.fromkeys(RECALLS, 0.0)
    for right, candidates in zip(Answers(latents).counts(), (len(latents.text), len(latents.image)), strict=True):
        missed = torch.ones(len(right), dtype=torch.float64)
        for k in range(1, max(RECALL_AT) + 1):
            # The k-th of the order is wrong as well; a query finds all once no wrong ones are left.
            missed = missed * (candidates - right - k + 1).clamp_min(0) / max(candidates - k + 1, 1)
            if k in RECALL_AT:
                found[f"R@{k}"] += 50 * (1 - float(missed.mean()))
    return found


def validation_score(found: Mapping[str, Mapping[str, float]]) -> float:
    """Mean of what `recalls` found over k and both directions, in percent: what the best checkpoint is chosen by."""
    return sum(found["mean"].values()) / len(found["mean"])


def load_ranks(run: Path | str, name: str = "ranks.safetensors") -> dict[str, Tensor]:
    """Load the ranks that `evaluate` wrote into a run.

    Args:
        run: Run directory.
        name: What `evaluate` calls ``ranks``; by default of the test split.

    Raises:
        FileNotFoundError: The run was not evaluated.
    """
    path = Path(run) / name
    if not path.is_file():
        raise FileNotFoundError(f"{run} has no {name}: evaluate it first")
    try:
        return load_file(path)
    except SafetensorError:
        raise ValueError(f"{path} is damaged: evaluate the run again") from None


def format_evaluation(result: Mapping[str, Any]) -> str:
    """Lay out what `evaluate` returns as a small table with 95% intervals."""
    lines = [
        f"{result['split']}: {result['images']:,} images, {result['captions']:,} captions, "
        f"{result['groups']:,} groups; in brackets 95% intervals",
        f"{'':<15}{'R@1 %':>21}{'R@5 %':>21}{'R@10 %':>21}{'ECE %':>21}{'median rank':>21}",
    ]
    for name in (*DIRECTIONS, "mean"):
        found = {**result[name], "ece": result["calibration"][name]["ece"]}
        cells = [
            f"{found[key]['value']:.1f} ({found[key]['low']:.1f}-{found[key]['high']:.1f})" if key in found else ""
            for key in (*RECALLS, "ece", "median_rank")
        ]
        lines.append((f"{name.replace('_', ' '):<15}" + "".join(f"{cell:>21}" for cell in cells)).rstrip())
    if "chance" in result:  # not in what an earlier version found
        lines.append(f"{'chance':<15}" + "".join(f"{result['chance'][name]:>21.1f}" for name in RECALLS))
    return "\n".join(lines)


def mean_recall(ranks: Sequence[Ranks], k: int = 1, bootstrap: int = 1000) -> dict[str, float]:
    """R@k, the mean of both directions and of several runs (seeds) on the same images and captions.

    Args:
        ranks: Ranks of each run, as `load_ranks` gives them.
        k: Of R@k.
        bootstrap: Bootstrap replicates, which draw groups; the runs are taken as they are.

    Returns:
        `value`, `low` and `high` in percent.

    Raises:
        ValueError: The runs were not evaluated on the same images and captions, or there is none.
    """
    return _mean_hits([(1.0, ranks)], k, bootstrap)


def paired_difference(
    a: Sequence[Ranks], b: Sequence[Ranks], k: int | Sequence[int] = 1, bootstrap: int = 1000
) -> dict[str, float]:
    """How much higher the recall of the runs A is than that of the runs B on the same images and captions.

    Both are resampled with the same groups, so that what is hard for both cancels.

    Args:
        a: Ranks of the runs A (seeds of one kind), as `load_ranks` gives them.
        b: Ranks of the runs B.
        k: The recall is R@k, the mean of both directions, of the runs, and of several k.
        bootstrap: Bootstrap replicates.

    Returns:
        `value`, `low` and `high` in percentage points; above 0 where A is better.

    Raises:
        ValueError: The runs were not evaluated on the same images and captions, or there are none.
    """
    return _mean_hits([(1.0, a), (-1.0, b)], k, bootstrap)


def _mean_hits(
    terms: Sequence[tuple[float, Sequence[Ranks]]], k: int | Sequence[int], bootstrap: int
) -> dict[str, float]:
    """Sum of the terms' signs times the mean hit rate of their runs, with an interval."""
    if not all(runs for _, runs in terms):
        raise ValueError("ranks must hold those of at least one run, got none")
    first = terms[0][1][0]
    for _, group in DIRECTIONS.values():
        if not all(torch.equal(ranks[group], first[group]) for _, runs in terms for ranks in runs):
            raise ValueError(f"the runs must be evaluated on the same images, but their {group} differ")

    ks = torch.tensor(k).reshape(-1, 1)

    def hits(name: str) -> Tensor:
        mean = [
            sign * torch.stack([(ranks[name] <= ks).double().mean(0) for ranks in runs]).mean(0) for sign, runs in terms
        ]
        return torch.stack(mean).sum(0)[:, None]

    both = [(hits(rank), first[group]) for rank, group in DIRECTIONS.values()]

    def statistics(weights: Tensor) -> Tensor:
        return 50 * sum(group_mean(values, group, weights) for values, group in both)

    return intervals(statistics, first["caption_group"], bootstrap)[0]


def _retrieval(ranks: Ranks, bootstrap: int) -> dict[str, Any]:
    def statistics(weights: Tensor) -> Tensor:
        recall, median = [], []
        for rank, group in DIRECTIONS.values():
            hits = torch.stack([ranks[rank] <= k for k in RECALL_AT], dim=1).double()
            recall.append(100 * group_mean(hits, ranks[group], weights))
            median.append(_median(ranks[rank], ranks[group], weights))
        return torch.cat([recall[0], median[0], recall[1], median[1], (recall[0] + recall[1]) / 2], dim=1)

    found = intervals(statistics, ranks["caption_group"], bootstrap)
    each = len(RECALLS) + 1
    result = {
        direction: dict(zip([*RECALLS, "median_rank"], found[i * each : (i + 1) * each], strict=True))
        for i, direction in enumerate(DIRECTIONS)
    }
    return {**result, "mean": dict(zip(RECALLS, found[2 * each :], strict=True))}


def _one_to_one(images: Tensor, texts: Tensor, latents: Latents) -> tuple[Tensor, Tensor]:
    image, caption = Answers(latents).one_to_one(latents)
    return images[image.to(images.device)], texts[caption.to(texts.device)]


def calibrate(queries: Tensor, candidates: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence, correctness and NLL of the softmax of scale * queries candidatesᵀ over the candidates.

    Args:
        queries: [n, D].
        candidates: [n, D]; row i is the right one of query i.
        scale: Factor on the dot products.

    Returns:
        On the CPU, fp64 [n] each: the highest probability; 1 where it is the right candidate's, else 0; minus
        the log of the right candidate's probability.
    """
    found = []
    for row in _chunks(len(queries), len(candidates), "calibration"):
        row = row.to(queries.device)
        log_probability = (scale * (queries[row] @ candidates.T)).log_softmax(1)
        best, place = log_probability.max(1)
        nll = -log_probability.gather(1, row[:, None])[:, 0]
        found.append(torch.stack([best.exp(), place == row, nll]).double().cpu())
    return tuple(torch.cat(found, dim=1))


def _calibration(images: Tensor, texts: Tensor, scale: float, bootstrap: int) -> dict[str, Any]:
    pairs = torch.arange(len(images))
    directions = {
        "image_to_text": calibrate(images, texts, scale),
        "text_to_image": calibrate(texts, images, scale),
    }
    bins = {name: _bin(confidence) for name, (confidence, _, _) in directions.items()}

    def statistics(weights: Tensor) -> Tensor:
        found = []
        for name, (confidence, correct, nll) in directions.items():
            # The gap of each bin, weighted by its share of the queries.
            gap = torch.zeros(len(pairs), BINS, dtype=torch.float64)
            gap[pairs, bins[name]] = correct - confidence
            ece = group_mean(gap, pairs, weights).abs().sum(1, keepdim=True)
            means = group_mean(torch.stack([confidence, correct, nll], dim=1), pairs, weights)
            found.append(torch.cat([100 * ece, 100 * means[:, :2], means[:, 2:]], dim=1))
        return torch.cat([*found, (found[0] + found[1]) / 2], dim=1)

    found = intervals(statistics, pairs, bootstrap, unbias=True)
    names = ("ece", "confidence", "accuracy", "nll")
    result: dict[str, Any] = {"pairs": len(pairs)}
    for i, name in enumerate((*directions, "mean")):
        result[name] = dict(zip(names, found[4 * i : 4 * i + 4], strict=True))
    for name, (confidence, correct, _) in directions.items():
        result[name]["bins"] = [
            {
                "confidence": 100 * confidence[bins[name] == b].mean().item(),
                "accuracy": 100 * correct[bins[name] == b].mean().item(),
                "count": int((bins[name] == b).sum()),
            }
            for b in bins[name].unique().tolist()
        ]
    return result


def _bin(confidence: Tensor) -> Tensor:
    """Bin of each confidence among 15 of equal width, (0, 1/15] the first."""
    return (confidence * BINS).ceil().long().clamp(1, BINS) - 1


def group_mean(values: Tensor, group: Tensor, weights: Tensor) -> Tensor:
    """Means of values fp64 [n, m] for each row of the groups' weights fp64 [r, groups]: [r, m]."""
    groups = weights.shape[1]
    sums = torch.zeros(groups, values.shape[1], dtype=torch.float64).index_add_(0, group, values)
    counts = group.bincount(minlength=groups).double()
    return (weights @ sums) / (weights @ counts)[:, None]


def _median(ranks: Tensor, group: Tensor, weights: Tensor) -> Tensor:
    """Smallest rank that at least half of the (weighted) queries reach: [r, 1]."""
    ordered, order = ranks.sort()
    reached = weights[:, group[order]].cumsum(1)
    place = torch.searchsorted(reached, reached[:, -1:] / 2)
    return ordered[place].double()


def intervals(
    statistics: Callable[[Tensor], Tensor], group: Tensor, replicates: int, *, unbias: bool = False
) -> list[dict[str, float]]:
    """Value and 95% interval of each statistic by a bootstrap over groups.

    Args:
        statistics: Maps weights of the groups, fp64 [r, groups], to [r, m].
        group: Group of each of the most numerous items, int64 [n]: gives the number of groups and bounds the
            memory.
        replicates: Bootstrap replicates.
        unbias: Shift the replicates so that their mean is the value: drawing pairs twice raises an ECE, by so
            much that the value could lie below its own interval. No end of an interval is then below 0.
    """
    groups = int(group.max()) + 1
    generator = torch.Generator().manual_seed(0)
    block = max(1, _WEIGHTS // len(group))
    drawn = []
    for first in range(0, replicates, block):
        rows = min(block, replicates - first)
        choice = torch.randint(groups, (rows, groups), generator=generator)
        weights = torch.zeros(rows, groups, dtype=torch.float64)
        drawn.append(statistics(weights.scatter_add_(1, choice, torch.ones_like(weights))))
    value = statistics(torch.ones(1, groups, dtype=torch.float64))[0]
    replicated = torch.cat(drawn)
    if unbias:
        replicated = (replicated - replicated.mean(0) + value).clamp_min(0)
    low, high = replicated.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return [
        {"value": v, "low": a, "high": b} for v, a, b in zip(value.tolist(), low.tolist(), high.tolist(), strict=True)
    ]
