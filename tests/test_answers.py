"""What a right answer is, in numbers and in what a report shows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_search import write_pairs
from train_data import write_latents, write_store

from modest_align_train.answers import Answers
from modest_align_train.evaluate import evaluate, retrieval_ranks
from modest_align_train.examples import find_examples
from modest_align_train.latents import Record, load_latents
from modest_align_train.settings import Settings
from modest_align_train.train import train

ANIMALS = (
    ("dog 1", "g", ("a dog", "an animal")),
    ("dog 2", "g", ("a hound",)),
    ("cat", "cat", ("A cat", "an animal")),
    ("wolf", "wolf", ("A  dog",)),
    ("fish", "fish", ("a fish",)),
)


@pytest.fixture
def animals(tmp_path):
    records = [Record(key, captions, "test", group, key) for key, group, captions in ANIMALS]
    texts = sum(len(record.captions) for record in records)
    return load_latents(write_store(tmp_path / "animals", [(torch.eye(5), torch.eye(texts), records)]))


def table(pairs, rows, columns):
    """1 where the row's answer is right, of (rows, answers)."""
    return torch.zeros(rows, columns, dtype=torch.int64).index_put(pairs, torch.tensor(1), accumulate=True).tolist()


def test_the_captions_of_a_group_and_equal_ones_are_right(animals):
    answers = Answers(animals)
    # Captions: dog 1's "a dog" and "an animal", dog 2's "a hound", the cat's two, the wolf's "A  dog", "a fish".
    wanted = [
        [1, 1, 1, 0, 1, 1, 0],
        [1, 1, 1, 0, 1, 1, 0],
        [0, 1, 0, 1, 1, 0, 0],
        [1, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    assert table(answers.captions(torch.arange(5)), 5, 7) == wanted
    assert table(answers.images(torch.arange(7)), 7, 5) == torch.tensor(wanted).T.tolist()
    assert table(answers.captions(torch.tensor([4, 2])), 2, 7) == [wanted[4], wanted[2]]
    assert [count.tolist() for count in answers.counts()] == [[5, 5, 3, 2, 1], [3, 3, 2, 1, 3, 3, 1]]
    part = replace(animals, group=torch.arange(5))
    assert table(Answers(part).images(torch.tensor([2])), 1, 5) == [[0, 1, 0, 0, 0]]


def test_a_candidate_with_an_equal_caption_is_no_miss(animals):
    # The wolf's picture lies nearest to "a dog" of dog 1, and the other way round.
    images = torch.eye(5)
    texts = torch.stack([images[3], images[1], images[1], images[2], images[2], images[0], images[4]])
    ranks = retrieval_ranks(images, texts, animals)
    assert ranks["image_rank"].tolist() == [1] * 5
    assert ranks["text_rank"].tolist() == [1] * 7


def test_pairs_of_calibration_have_one_right_answer_each(animals):
    answers = Answers(animals)
    image, caption = answers.one_to_one(animals)
    # The wolf's only caption is right for dog 1, which was chosen before.
    assert (image.tolist(), caption.tolist()) == ([0, 2, 4], [0, 3, 6])
    right = torch.tensor(table(answers.captions(image), 3, 7))
    assert torch.equal(right[:, caption], torch.eye(3, dtype=torch.int64))
    all_equal = replace(animals, caption_text=torch.zeros(7, dtype=torch.int64))
    assert [rows.tolist() for rows in Answers(all_equal).one_to_one(all_equal)] == [[0], [0]]


def test_without_equal_captions_a_group_is_a_pair(tmp_path):
    latents = load_latents(write_latents(tmp_path / "latents", 20))
    image, caption = Answers(latents).one_to_one(latents)
    assert (image.tolist(), caption.tolist()) == (list(range(20)), list(range(0, 40, 2)))


def test_evaluation_and_report_agree_on_what_is_right(tmp_path):
    """Every image has the caption "a square": each query whose first caption that is finds a right answer first."""
    write_pairs(tmp_path / "latents", images=40, splits=("train", "test"))
    latents = load_latents(tmp_path / "latents")
    records = [replace(record, captions=record.captions[::-1]) for record in latents.records]
    text = latents.text.view(40, 2, -1).flip(1).reshape(80, -1)
    write_store(tmp_path / "latents", [(latents.image, text, records)])
    settings = Settings(latents=tmp_path / "latents", output=tmp_path / "run", steps=2, batch_size=8, device="cpu")
    with pytest.warns(UserWarning, match="no validation split"):
        run = train(settings, progress=False)
    result = evaluate(run, bootstrap=5)
    test = load_latents(tmp_path / "latents").subset("test")
    examples = find_examples(run, test)["from_text"]
    assert examples["misses"] == []
    assert all(one["right"] for example in examples["hits"] for one in example["found"])
    assert {example["rank"] for example in examples["hits"]} == {1}
    assert result["text_to_image"]["R@1"]["value"] >= 50
