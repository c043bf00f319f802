from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from train_data import trained_run, write_latents

from modest_align_train import evaluate as module
from modest_align_train.adapters import load_aligner
from modest_align_train.checkpoints import BEST, named, part, read_checkpoint, write_checkpoint
from modest_align_train.evaluate import (
    best_ranks,
    calibrate,
    chance,
    evaluate,
    format_evaluation,
    load_evaluation,
    load_ranks,
    mean_recall,
    paired_difference,
    recalls,
    retrieval_ranks,
)
from modest_align_train.latents import Latents

EYE = torch.eye(4)


def ranks_of(similarity, query_group, candidate_group):
    """Ranks of a table of similarities: queries are its rows, candidates the unit vectors."""
    similarity = torch.tensor(similarity)
    return best_ranks(similarity, torch.eye(similarity.shape[1]), of_one_group(query_group, candidate_group)).tolist()


def of_one_group(query_group, candidate_group):
    right = torch.as_tensor(query_group)[:, None] == torch.as_tensor(candidate_group)
    return lambda rows: right[rows].nonzero(as_tuple=True)


def test_one_caption_an_image():
    table = [[0.9, 0.1, 0.2], [0.5, 0.4, 0.3], [0.3, 0.2, 0.1]]
    assert ranks_of(table, [0, 1, 2], [0, 1, 2]) == [1, 2, 3]


def test_the_best_of_several_captions_counts():
    # Captions 0 and 1 are right for image 0, 2 and 3 for image 1.
    table = [[0.1, 0.8, 0.9, 0.2], [0.7, 0.6, 0.5, 0.1]]
    assert ranks_of(table, [0, 1], [0, 0, 1, 1]) == [2, 3]


def test_images_of_one_group_are_all_right():
    # Of the caption's two right images the second ranks first; the other one does not stand in its way.
    table = [[0.5, 0.7, 0.6], [0.9, 0.1, 0.2]]
    assert ranks_of(table, [0, 1], [0, 0, 1]) == [1, 2]


def test_ties_count_against_us_but_not_among_right_ones():
    assert ranks_of([[0.5, 0.5, 0.5, 0.4]], [0], [0, 0, 1, 2]) == [2]
    assert ranks_of([[1.0, 1.0, 1.0, 1.0]], [3], [0, 1, 2, 3]) == [4]


def test_not_a_number_is_the_worst():
    assert ranks_of([[math.nan, math.nan, math.nan]], [0], [0, 1, 2]) == [3]


def test_chunks_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    queries, candidates = torch.randn(101, 8, generator=generator), torch.randn(67, 8, generator=generator)
    # Whole numbers: the products are exact in every shape of matmul, so that even ties must agree.
    queries, candidates = queries.mul(2).round(), candidates.mul(2).round()
    query_group, candidate_group = torch.arange(101) % 20, torch.arange(67) % 20
    answers = of_one_group(query_group, candidate_group)
    whole = best_ranks(queries, candidates, answers)
    calibrated = calibrate(queries[:67], candidates, 0.1)
    monkeypatch.setattr(module, "_SIMILARITIES", 200)
    assert torch.equal(best_ranks(queries, candidates, answers), whole)
    for chunked, at_once in zip(calibrate(queries[:67], candidates, 0.1), calibrated, strict=True):
        torch.testing.assert_close(chunked, at_once)
    similarity = queries @ candidates.T
    for i in range(101):
        right = candidate_group == query_group[i]
        assert whole[i] == 1 + (similarity[i][~right] >= similarity[i][right].max()).sum()


def test_recalls_of_known_ranks():
    ranks = {"image_rank": torch.tensor([1, 2, 6, 11]), "text_rank": torch.tensor([1, 1, 5, 10, 11])}
    found = recalls(ranks)
    assert found["image_to_text"] == {"R@1": 25.0, "R@5": 50.0, "R@10": 75.0}
    assert found["text_to_image"] == {"R@1": 40.0, "R@5": 60.0, "R@10": 80.0}
    assert found["mean"] == {"R@1": 32.5, "R@5": 55.0, "R@10": 77.5}


def test_calibration_of_a_two_way_softmax():
    # Scale log 3 and cosines (1, 0): probabilities 3/4 and 1/4; the second query is wrong.
    queries = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    confidence, correct, nll = calibrate(queries, torch.eye(2), math.log(3))
    assert confidence.tolist() == pytest.approx([0.75, 0.75])
    assert correct.tolist() == [1.0, 0.0]
    assert nll.tolist() == pytest.approx([-math.log(0.75), -math.log(0.25)])


def test_ece_and_bins_of_hand_made_probabilities(monkeypatch):
    confidence = torch.tensor([0.9, 0.95, 0.9, 0.5, 0.5]).double()
    correct = torch.tensor([1, 1, 0, 1, 0]).double()
    monkeypatch.setattr(module, "calibrate", lambda *_: (confidence, correct, -confidence.log()))
    found = module._calibration(torch.zeros(5, 2), torch.zeros(5, 2), 1.0, bootstrap=10)
    # 0.9 is in (13/15, 14/15], 0.95 in the last bin: gaps |1/2 - 0.9|, |1 - 0.95|, and |1/2 - 0.5|.
    assert found["mean"]["ece"]["value"] == pytest.approx(100 * (2 * 0.4 + 1 * 0.05) / 5)
    assert found["mean"]["confidence"]["value"] == pytest.approx(75)
    assert found["mean"]["accuracy"]["value"] == pytest.approx(60)
    bins = found["text_to_image"]["bins"]
    assert [one["count"] for one in bins] == [2, 2, 1]
    assert bins[1] == {"confidence": pytest.approx(90), "accuracy": pytest.approx(50), "count": 2}


@pytest.mark.parametrize(("confidence", "expected"), [(1e-9, 0), (1 / 15, 0), (0.07, 1), (0.999, 14), (1.0, 14)])
def test_bins_have_equal_width(confidence, expected):
    assert module._bin(torch.tensor([confidence], dtype=torch.float64)).item() == expected


def test_the_weighted_median_is_that_of_the_repeated_ranks():
    ranks = torch.tensor([9, 2, 4, 7])
    weights = torch.tensor([[1, 1, 1, 1], [3, 1, 1, 0], [0, 0, 2, 5]]).double()
    expected = [sorted([9, 2, 4, 7])[1], sorted([9, 9, 9, 2, 4])[2], 7]
    assert module._median(ranks, torch.arange(4), weights)[:, 0].tolist() == expected


def test_intervals_are_those_of_a_bootstrap_over_groups(monkeypatch):
    # 100 groups of 4 queries that agree: the standard error is that of 100 draws, not of 400.
    group = torch.arange(100).repeat_interleave(4)
    hits = (group < 30).double()[:, None]
    statistics = lambda weights: module.group_mean(hits, group, weights)  # noqa: E731
    found = module.intervals(statistics, group, 4000)[0]
    half_width = 1.96 * math.sqrt(0.3 * 0.7 / 100)
    assert found["value"] == pytest.approx(0.3)
    assert found["low"] == pytest.approx(0.3 - half_width, abs=0.015)
    assert found["high"] == pytest.approx(0.3 + half_width, abs=0.015)
    monkeypatch.setattr(module, "_WEIGHTS", 4000)
    in_blocks = module.intervals(statistics, group, 4000)[0]
    assert in_blocks["low"] == pytest.approx(found["low"], abs=0.01)


def test_a_paired_difference_is_narrower_than_two_intervals():
    generator = torch.Generator().manual_seed(0)
    hard = torch.randint(1, 20, (500,), generator=generator)
    group = torch.arange(500)
    worse = {"image_rank": hard, "text_rank": hard, "image_group": group, "caption_group": group}
    # The same, but every tenth of those found second is found first.
    helped = torch.where((hard == 2) & (group % 2 == 0), 1, hard)
    better = {**worse, "image_rank": helped, "text_rank": helped}
    gain = paired_difference([better], [worse], k=1, bootstrap=500)
    expected = 100 * ((helped == 1).double().mean() - (hard == 1).double().mean()).item()
    assert gain["value"] == pytest.approx(expected)
    assert 0 < gain["low"] < gain["value"] < gain["high"]
    assert gain["high"] - gain["low"] < 3
    assert paired_difference([worse], [better], bootstrap=500)["value"] == pytest.approx(-expected)


def test_recall_over_seeds_is_the_mean_of_their_recalls():
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(300) // 2
    seeds = []
    for _ in range(3):
        image, text = torch.randint(1, 4, (2, 300), generator=generator)
        seeds.append({"image_rank": image, "text_rank": text, "image_group": group, "caption_group": group})
    each = [mean_recall([ranks], k=2, bootstrap=50)["value"] for ranks in seeds]
    together = mean_recall(seeds, k=2, bootstrap=500)
    assert together["value"] == pytest.approx(sum(each) / 3)
    assert together["low"] < together["value"] < together["high"]
    difference = paired_difference(seeds, seeds[:1], k=2, bootstrap=50)
    assert difference["value"] == pytest.approx(sum(each) / 3 - each[0])
    with pytest.raises(ValueError, match="at least one run"):
        mean_recall([])


def test_the_interval_of_an_ece_holds_it(monkeypatch):
    # Perfectly calibrated answers: without correction most of a resampled ECE is chance, and above the value.
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(600, generator=generator, dtype=torch.float64)
    correct = (torch.rand(600, generator=generator, dtype=torch.float64) < confidence).double()
    monkeypatch.setattr(module, "calibrate", lambda *_: (confidence, correct, -confidence.log()))
    ece = module._calibration(torch.zeros(600, 2), torch.zeros(600, 2), 1.0, bootstrap=300)["mean"]["ece"]
    assert 0 <= ece["low"] < ece["value"] < ece["high"]
    assert (ece["low"] + ece["high"]) / 2 == pytest.approx(ece["value"], rel=0.1)


def test_runs_on_other_images_cannot_be_paired():
    a = {"image_group": torch.arange(3), "caption_group": torch.arange(3)}
    with pytest.raises(ValueError, match="same images, but their image_group differ"):
        paired_difference([a], [{**a, "image_group": torch.tensor([0, 1, 1])}])


def test_evaluation_of_a_run(tmp_path):
    run = trained_run(tmp_path)
    result = evaluate(run, bootstrap=200)
    assert json.loads((run / "evaluation.json").read_text()) == result
    assert (result["split"], result["images"], result["captions"], result["groups"]) == ("test", 40, 80, 40)
    assert result["scale"] == pytest.approx(float(load_aligner(run).scale))
    # 300 steps on data with a strong common part; chance R@1 is 2.5.
    assert result["mean"]["R@1"]["value"] > 40
    ranks = load_ranks(run)
    for direction, name in (("image_to_text", "image_rank"), ("text_to_image", "text_rank")):
        found = result[direction]
        for k in (1, 5, 10):
            assert found[f"R@{k}"]["value"] == pytest.approx(100 * (ranks[name] <= k).double().mean().item())
            assert found[f"R@{k}"]["low"] <= found[f"R@{k}"]["value"] <= found[f"R@{k}"]["high"]
        assert found["median_rank"]["value"] == ranks[name].median()
        calibration = result["calibration"][direction]
        assert sum(one["count"] for one in calibration["bins"]) == result["calibration"]["pairs"] == 40
        ece = sum(one["count"] / 40 * abs(one["accuracy"] - one["confidence"]) for one in calibration["bins"])
        assert calibration["ece"]["value"] == pytest.approx(ece)
    # Two of 80 captions are right for an image, one of 40 images for a caption.
    by_hand = {k: 50 * (1 - math.comb(78, k) / math.comb(80, k)) + 50 * k / 40 for k in (1, 5, 10)}
    assert result["chance"] == pytest.approx({f"R@{k}": value for k, value in by_hand.items()})
    assert format_evaluation(result).splitlines()[-1].split() == ["chance", "2.5", "12.3", "24.3"]
    words = format_evaluation(result).splitlines()[2].split()
    assert words[:3] == ["image", "to", "text"]
    assert float(words[3]) == pytest.approx(result["image_to_text"]["R@1"]["value"], abs=0.051)


def contents(run):
    return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


def test_other_splits_and_latents_leave_the_numbers_of_the_test_split(tmp_path):
    run = trained_run(tmp_path)
    result = evaluate(run, bootstrap=1)
    before = contents(run)
    assert evaluate(run, split="validation", bootstrap=1)["split"] == "validation"
    other = evaluate(run, latents=write_latents(tmp_path / "other", 80), bootstrap=1)
    assert (other["split"], other["images"]) == ("test", 16)
    after = contents(run)
    assert {name: after[name] for name in before} == before
    names = [f"{what}-{of}" for what in ("evaluation", "ranks") for of in (other["latents"][:8], "validation")]
    assert sorted(path.rsplit(".", 1)[0] for path in set(after) - set(before)) == sorted(names)
    assert load_evaluation(run) == result
    assert load_evaluation(run, split="validation")["split"] == "validation"
    assert load_evaluation(run, latents=tmp_path / "other") == other
    assert len(load_ranks(run, other["ranks"])["image_rank"]) == 16
    assert contents(run) == after
    shutil.copytree(tmp_path / "latents", tmp_path / "moved")
    assert load_evaluation(run, latents=tmp_path / "moved") == result


def test_an_evaluation_is_of_one_checkpoint_and_its_latents(tmp_path):
    run = trained_run(tmp_path)
    result = evaluate(run, bootstrap=1)
    shutil.move(tmp_path / "latents", tmp_path / "away")
    assert load_evaluation(run) == result
    state, _ = read_checkpoint(run / BEST)
    write_checkpoint(run / BEST, {**state, **named("model", {k: 0.9 * v for k, v in part(state, "model").items()})})
    with pytest.raises(FileNotFoundError, match="holds no latents"):
        load_evaluation(run)
    shutil.move(tmp_path / "away", tmp_path / "latents")
    fresh = load_evaluation(run)
    assert fresh["checkpoint"] != result["checkpoint"]
    assert fresh["scale"] != result["scale"]
    assert load_evaluation(run) == fresh == json.loads((run / "evaluation.json").read_text())
    (run / "ranks.safetensors").unlink()
    assert load_evaluation(run) is not None
    assert (run / "ranks.safetensors").is_file()


def test_latents_that_were_extracted_again_are_refused(tmp_path):
    run = trained_run(tmp_path)
    evaluate(run, bootstrap=1)
    before = contents(run)
    write_latents(tmp_path / "latents", splits=("test", "train", "train", "train", "validation"))
    for refuse in (evaluate, load_evaluation):
        for latents in (None, tmp_path / "latents"):
            with pytest.raises(
                ValueError, match=r"latents .* are not those that .*run was trained on, .*another --out"
            ):
                refuse(run, latents=latents)
    assert contents(run) == before


def test_chance_is_what_random_orders_give():
    group = torch.tensor([0, 0, 1, 2, 2, 2, 3])
    count = torch.tensor([1, 3, 12, 1, 1, 2, 1])
    caption_image = torch.arange(7).repeat_interleave(count)
    text = torch.arange(21).clamp_max(19)  # the last two captions are equal, of different groups
    data = Latents(torch.zeros(7, 1), torch.zeros(21, 1), caption_image, text, group, [], "", "", "")
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(2000):
        similarity = torch.rand(7, int(count.sum()), generator=generator)
        found.append(recalls(retrieval_ranks(similarity, torch.eye(len(caption_image)), data))["mean"])
    for name, value in chance(data).items():
        assert value == pytest.approx(sum(one[name] for one in found) / len(found), abs=1)


def test_what_cannot_be_evaluated(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a trained run: it has no best\.safetensors"):
        evaluate(tmp_path)
    with pytest.raises(ValueError, match="bootstrap must be at least 1, got 0"):
        evaluate(tmp_path, bootstrap=0)
    with pytest.raises(ValueError, match="device must be"):
        evaluate(tmp_path, device="abacus")
    with pytest.raises(FileNotFoundError, match="evaluate it first"):
        load_ranks(Path(tmp_path))
