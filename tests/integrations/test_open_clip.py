"""open_clip's own training code with our loss: the same losses and weights, and its program as the page has it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import open_clip_train.main as program
import pytest
import torch
from open_clip_train.params import parse_args
from open_clip_train.train import train_one_epoch
from PIL import Image

from benchmarks.recipes import PAGE_OF_INTEGRATIONS, code
from modest_align_kernels import ModestAlignLoss
from modest_align_kernels.integrations.open_clip import create_loss

pytestmark = pytest.mark.integrations

CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
BATCHES, BATCH = 8, 16


@pytest.fixture(scope="module", autouse=True)
def tiny_clip(tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("configs") / "tiny-clip.json"
    path.write_text(json.dumps(CONFIG))
    open_clip.add_model_config(path)


def arguments(*given: str):
    """open_clip's, with what its program adds to them."""
    args = parse_args(["--model", "tiny-clip", "--device", "cpu", "--precision", "fp32", *given])
    one = {"distill": False, "rank": 0, "local_rank": 0, "world_size": 1, "distributed": False, "wandb": False}
    vars(args).update(one, batch_size=BATCH, log_every_n_steps=1)
    return args


def batches(dtype: torch.dtype):
    """[B, 3, 32, 32] and [B, 16] each."""
    generator = torch.Generator().manual_seed(1)
    loader = type("Loader", (list,), {"num_batches": BATCHES, "num_samples": BATCHES * BATCH})()
    for _ in range(BATCHES):
        texts = torch.randint(1, 49406, (BATCH, 16), generator=generator)
        texts[:, 0], texts[:, -1] = 49406, 49407
        loader.append((torch.randn(BATCH, 3, 32, 32, generator=generator).to(dtype), texts))
    return SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)


def train(loss: torch.nn.Module, args, dtype: torch.dtype = torch.float32):
    """Two epochs of open_clip's: the losses [steps], and the weights."""
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-clip", output_dict=True).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    loss.register_forward_hook(lambda module, args, output: losses.append(output["contrastive_loss"].detach().double()))
    for epoch in range(2):
        train_one_epoch(model, {"train": batches(dtype)}, loss, epoch, optimizer, None, lambda step: None, None, args)
    return torch.stack(losses), {name: p.detach().double() for name, p in model.named_parameters()}


@pytest.mark.parametrize("given", [(), ("--accum-freq", "2"), ("--precision", "amp_bfloat16")], ids=" ".join)
def test_same_training_as_with_its_own_loss(given: tuple[str, ...]) -> None:
    args = arguments(*given)
    ours, our_weights = train(create_loss(args, noise_std=0.0, smoothing=0.0), args)
    theirs, their_weights = train(open_clip.create_loss(args), args)
    exact = arguments(*given)
    exact.precision = "fp32"
    truth, true_weights = train(open_clip.create_loss(exact), exact, torch.float64)
    assert len(ours) == 2 * BATCHES
    assert truth[-1] < truth[0] - 0.5, "it should have learned something"
    print(given, "losses off by", (ours - truth).abs().max(), "theirs", (theirs - truth).abs().max())
    print("between", (ours - theirs).abs().max())

    def off(weights):
        return torch.stack([(weights[name] - true_weights[name]).norm() for name in true_weights]).norm()

    print("weights", off(our_weights), off(their_weights))
    assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 1e-6
    assert off(our_weights) <= 2 * off(their_weights)
