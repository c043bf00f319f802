"""docs/integrations.md's recipes for hosts that need no adapter, with the hosts' own trainers."""

from __future__ import annotations

import copy
import importlib
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.recipes import PAGE_OF_INTEGRATIONS, code
from modest_align_kernels import ModestAlignLoss

pytestmark = pytest.mark.integrations

PLAIN = {"noise_std": 0.0, "smoothing": 0.0}
ROWS = 48


def recipe(heading: str, **names) -> dict:
    exec(code(PAGE_OF_INTEGRATIONS, heading), names)
    return names


# transformers


def clip_config():
    from transformers import CLIPConfig

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": 100, "max_position_embeddings": 16, "eos_token_id": 99}
    vision = {**small, "image_size": 32, "patch_size": 16}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)


def clip_pairs() -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 98, (ROWS, 12), generator=generator)
    tokens[:, -1] = 99
    pixels = torch.randn(ROWS, 3, 32, 32, generator=generator)
    mask = torch.ones(12, dtype=torch.int64)
    return [{"input_ids": t, "pixel_values": p, "attention_mask": mask} for t, p in zip(tokens, pixels, strict=True)]


def with_return_loss(rows: list[dict]) -> dict:
    from transformers import default_data_collator

    return {**default_data_collator(rows), "return_loss": True}


def hf_arguments(folder, **options):
    from transformers import TrainingArguments

    given = {"max_steps": 8, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    given |= {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "use_cpu": True, "disable_tqdm": True}
    return TrainingArguments(str(folder), **given | options)


def clip_model(kind: type):
    torch.manual_seed(0)
    return kind(clip_config())


def hf_losses(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("how", ["the loss in the model", "compute_loss_func"])
def test_transformers(how: str, accumulate: int, tmp_path) -> None:
    from transformers import CLIPModel, Trainer

    args = hf_arguments(tmp_path, gradient_accumulation_steps=accumulate)
    data = {"train_dataset": clip_pairs(), "eval_dataset": clip_pairs()[:16]}
    theirs = Trainer(clip_model(CLIPModel), args, data_collator=with_return_loss, **data)
    expected = hf_losses(theirs)
    page = recipe(f"transformers, {how}")
    if how == "compute_loss_func":
        loss_fn = ModestAlignLoss(**PLAIN)
        ours = page["make_trainer"](clip_model(CLIPModel), args, loss_fn, **data)
    else:
        ours = Trainer(clip_model(page["AlignedCLIP"]), args, **data)
        loss_fn = ours.model.loss_fn
        loss_fn.noise_std = loss_fn.smoothing = 0.0
    got = hf_losses(ours)
    assert expected[-1] < expected[0] - 0.2, "it should have learned something"
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(
        dict(ours.model.named_parameters()), dict(theirs.model.named_parameters()), rtol=0, atol=2e-3
    )
    evaluated = theirs.evaluate()["eval_loss"]
    loss_fn.noise_std = 1.0  # which no evaluation may see
    torch.testing.assert_close(ours.evaluate()["eval_loss"], evaluated, rtol=1e-3, atol=0)


# Lightning


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(20, 16), nn.Linear(12, 16)

    def forward(self, images, texts):
        return self.image(images), self.text(texts)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning(tmp_path) -> None:
    import pytorch_lightning as lightning

    torch.manual_seed(0)
    module = recipe("Lightning")["Alignment"](Towers())
    module.loss_fn.noise_std = module.loss_fn.smoothing = 0.0
    by_hand = copy.deepcopy(module)
    pairs = DataLoader(TensorDataset(torch.randn(ROWS, 20), torch.randn(ROWS, 12)), 16)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=30, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(module, pairs, pairs)

    optimizer = by_hand.configure_optimizers()
    for _ in range(30):
        for images, texts in pairs:
            x, y = (F.normalize(features, dim=1) for features in by_hand.towers(images, texts))
            logits, target = by_hand.loss_fn.log_scale.exp() * x @ y.T, torch.arange(16)
            loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    trained = dict(module.named_parameters())
    torch.testing.assert_close(trained, dict(by_hand.named_parameters()), rtol=1e-3, atol=1e-3)
    assert abs(module.loss_fn.logit_scale - 14.3) > 0.1, "the scale should have learned"
    state = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=False)["state_dict"]
    torch.testing.assert_close(state, trained)

    module.loss_fn.noise_std = 0.5  # which no evaluation may see
    validated = trainer.validate(module, pairs, verbose=False)[0]["val_loss"]
    module.loss_fn.noise_std = 0.0
    assert trainer.validate(module, pairs, verbose=False)[0]["val_loss"] == validated


# GradCache


@pytest.fixture
def grad_cache(monkeypatch):
    """GradCache under its own name: PyPI's package of the same files has the name without the underscore."""
    package = importlib.import_module("gradcache")
    contexts = importlib.import_module("gradcache.context_managers")
    monkeypatch.setitem(sys.modules, "grad_cache", package)
    monkeypatch.setitem(sys.modules, "grad_cache.context_managers", contexts)
    cache = importlib.import_module("gradcache.grad_cache").GradCache
    monkeypatch.setattr(package, "GradCache", cache, raising=False)
    return importlib.import_module("gradcache.loss")


@pytest.mark.parametrize("hard_negatives", [0, 2])
def test_gradcache(grad_cache, hard_negatives: int) -> None:
    make_cache = recipe("GradCache, Tevatron")["make_cache"]

    class Encoder(nn.Sequential):
        def __init__(self, scale: float) -> None:
            super().__init__(nn.Linear(20, 32), nn.Dropout(0.2), nn.Linear(32, 16))
            self.scale = scale

        def forward(self, x):
            return self.scale * F.normalize(super().forward(x), dim=1)

    torch.manual_seed(0)
    queries, passages = torch.randn(24, 20), torch.randn(24 * (1 + hard_negatives), 20)
    encoders = Encoder(1.0), Encoder(1.0)
    results = []
    for who in ("ours", "theirs"):
        copies = [copy.deepcopy(encoder) for encoder in encoders]
        cache = make_cache(*copies, 7, **PLAIN)
        if who == "theirs":
            copies[0].scale = 20.0  # its loss has none
            cache.loss_fn = grad_cache.SimpleContrastiveLoss(hard_negatives)
        torch.manual_seed(1)  # of the dropout
        loss = cache(queries, passages)
        results.append((loss, *(p.grad for model in copies for p in model.parameters())))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
