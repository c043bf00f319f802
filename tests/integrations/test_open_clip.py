"""open_clip's own training code with our loss: the same losses and weights, and its program as the page has it."""

from __future__ import annotations

import importlib
import json
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from open_clip_train.params import parse_args
from open_clip_train.train import train_one_epoch
from PIL import Image
from rank_pool import RankPool
from torch.nn.parallel import DistributedDataParallel

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
LOCAL = ("--local-loss", "--gather-with-grad")


with tempfile.TemporaryDirectory() as folder:
    Path(folder, "tiny-clip.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(Path(folder, "tiny-clip.json"))


def arguments(*given: str):
    """open_clip's, with what its program adds to them."""
    args = parse_args(["--model", "tiny-clip", "--device", "cpu", "--precision", "fp32", *given])
    one = {"distill": False, "rank": 0, "local_rank": 0, "world_size": 1, "distributed": False, "wandb": False}
    vars(args).update(one, batch_size=BATCH, log_every_n_steps=1)
    return args


def batches(dtype: torch.dtype, seed: int = 0):
    """[B, 3, 32, 32] and [B, 16] each."""
    generator = torch.Generator().manual_seed(seed)
    loader = type("Loader", (list,), {"num_batches": BATCHES, "num_samples": BATCHES * BATCH})()
    for _ in range(BATCHES):
        texts = torch.randint(1, 49406, (BATCH, 16), generator=generator)
        texts[:, 0], texts[:, -1] = 49406, 49407
        loader.append((torch.randn(BATCH, 3, 32, 32, generator=generator).to(dtype), texts))
    return SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)


def steps(model: torch.nn.Module, loss: torch.nn.Module, args, data) -> torch.Tensor:
    """Two epochs by open_clip's own code: the losses, float64 [steps]."""
    # With its usual epsilon the keys' biases, whose gradient is zero but for rounding, would go a random way.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
    losses = []
    loss.register_forward_hook(lambda module, args, output: losses.append(output["contrastive_loss"].detach().double()))
    for epoch in range(2):
        train_one_epoch(model, {"train": data}, loss, epoch, optimizer, None, lambda step: None, None, args)
    return torch.stack(losses)


def train(loss: torch.nn.Module, args, dtype: torch.dtype = torch.float32):
    """The losses of a tiny CLIP, and its weights."""
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-clip", output_dict=True).to(dtype)
    losses = steps(model, loss, args, batches(dtype))
    return losses, {name: p.detach().double() for name, p in model.named_parameters()}


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

    def off(weights):
        return torch.stack([(weights[name] - true_weights[name]).norm() for name in true_weights]).norm()

    assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 1e-6
    assert off(our_weights) <= 2 * off(their_weights)


def test_its_program_as_the_page_has_it(tmp_path, monkeypatch, caplog) -> None:
    program = importlib.import_module("open_clip_train.main")  # which the ranks below can do without

    generator = np.random.default_rng(0)
    lines = ["filepath\ttitle"]
    for k in range(2 * BATCH):
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / f"{k}.png")
        lines.append(f"{tmp_path / f'{k}.png'}\tpicture {k}")
    (tmp_path / "pairs.tsv").write_text("\n".join(lines))
    given = f"--train-data {tmp_path}/pairs.tsv --dataset-type csv --model tiny-clip --device cpu --precision fp32"
    given += f" --batch-size {BATCH} --epochs 2 --workers 0 --warmup 1 --log-every-n-steps 1 --logs {tmp_path} --name a"
    monkeypatch.setattr(sys, "argv", ["train.py", *given.split()])
    monkeypatch.setattr(program, "create_loss", program.create_loss)  # the page's assignment ends with the test
    trained_with = []

    def spy(model, data, loss, *rest, **kwargs) -> None:
        trained_with.append(loss)
        train_one_epoch(model, data, loss, *rest, **kwargs)

    monkeypatch.setattr(program, "train_one_epoch", spy)
    monkeypatch.setattr(program, "setup_logging", lambda path, level: None)  # it would log to the end of the session
    with caplog.at_level("INFO"):
        exec(code(PAGE_OF_INTEGRATIONS, "open_clip 3.x"), {})
    assert len(trained_with) == 2
    assert type(trained_with[0]) is ModestAlignLoss
    assert (trained_with[0].noise_std, trained_with[0].smoothing) == (0.01, 0.1)
    logged = re.findall(r"Contrastive_loss: (\S+) .* Loss: (\S+) ", caplog.text)
    assert len(logged) == 4
    assert all(contrastive == total for contrastive, total in logged)
    assert "visual.proj" in torch.load(tmp_path / "a" / "checkpoints" / "epoch_2.pt")["state_dict"]


@pytest.mark.skipif(not hasattr(open_clip, "create_task"), reason="this open_clip has no tasks")
def test_a_task_of_its_main_branch() -> None:
    page: dict = {}
    exec(code(PAGE_OF_INTEGRATIONS, "open_clip, main branch"), page)
    (images, texts), *_ = batches(torch.float32).dataloader
    args, results = arguments(), []
    for make in (page["create_task"], open_clip.create_task):
        torch.manual_seed(0)
        task = make(args, model=open_clip.create_model("tiny-clip", output_dict=True))
        if make is page["create_task"]:
            task.loss.noise_std = task.loss.smoothing = 0.0
        losses, _ = task({"image": images, "text": texts})
        losses["loss"].backward()
        results.append((losses, {name: p.grad for name, p in task.trainable_module.named_parameters()}))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--siglip"], "args: got --siglip, want a CLIP model under torch.distributed, or open_clip.create_loss"),
        (["--model", "coca_ViT-B-32"], "got --model coca_ViT-B-32"),
        (["--horovod"], "got --horovod"),
    ],
)
def test_other_losses_are_refused(given: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        create_loss(arguments(*given))


def test_ranks_that_are_not_there_are_refused() -> None:
    args = arguments()
    args.world_size = 2
    with pytest.raises(ValueError, match=r"args\.world_size: got 2 without a process group, want create_loss after"):
        create_loss(args)


def trained_on_ranks(group) -> None:
    """A rank's part: with any of open_clip's two right pairs of flags the same losses and weights as with ours."""
    torch.manual_seed(0)
    start = open_clip.create_model("tiny-clip", output_dict=True).state_dict()
    results = []
    for make, flags in ((create_loss, ()), (open_clip.create_loss, LOCAL), (open_clip.create_loss, LOCAL[1:])):
        args = arguments(*flags)
        args.rank, args.world_size = group.rank(), group.size()
        model = open_clip.create_model("tiny-clip", output_dict=True)
        model.load_state_dict(start)
        model.double()
        loss = make(args, noise_std=0.0, smoothing=0.0) if make is create_loss else make(args)
        losses = steps(DistributedDataParallel(model), loss, args, batches(torch.float64, seed=group.rank()))
        if flags == LOCAL:  # the rank's own
            torch.distributed.all_reduce(losses)
            losses /= group.size()
        results.append((losses, dict(model.named_parameters())))
    for theirs in results[1:]:
        torch.testing.assert_close(results[0], theirs, rtol=1e-6, atol=1e-9)


def test_its_flags_on_ranks() -> None:
    pool = RankPool()
    try:
        pool.run("of_module", 4, module="test_open_clip", function="trained_on_ranks")
    finally:
        pool.stop()
