"""The module: a drop-in for open_clip's ClipLoss, with noise only in training and a scale of its own if asked."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from modest_align_kernels import ModestAlignLoss, modest_align_loss
from modest_align_kernels.testing import Case, make_features

open_clip = pytest.importorskip("open_clip")


def unit_features(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [F.normalize(t, dim=1).requires_grad_() for t in make_features(Case("", 32, 32, 24), dtype)]


def test_same_value_and_gradients_as_open_clip() -> None:
    x, y = unit_features()
    scale = torch.tensor(math.log(1 / 0.07), dtype=torch.float64, requires_grad=True)
    ours = ModestAlignLoss(noise_std=0.0, smoothing=0.0)(x, y, scale.exp(), output_dict=True)["contrastive_loss"]
    theirs = open_clip.ClipLoss()(x, y, scale.exp(), output_dict=True)["contrastive_loss"]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    # open_clip takes unit features as given; our normalisation projects its gradient onto the sphere's tangent
    got, raw = (torch.autograd.grad(loss, (x, y, scale)) for loss in (ours, theirs))
    for ours_row, raw_row, features in zip(got[:2], raw[:2], (x, y), strict=True):
        tangent = raw_row - features * (raw_row * features).sum(1, keepdim=True)
        torch.testing.assert_close(ours_row, tangent, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(got[2], raw[2], rtol=1e-10, atol=0)


def test_same_training_step_as_open_clip() -> None:
    # through a model that normalises, as open_clip's do, the gradients are the same to the last parameter
    class Towers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text = torch.nn.Linear(24, 16), torch.nn.Linear(24, 16)
            self.logit_scale = torch.nn.Parameter(torch.tensor(2.6593))
            self.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))

        def forward(self, x, y):
            return {
                "image_features": F.normalize(self.image(x), dim=-1),
                "text_features": F.normalize(self.text(y), dim=-1),
                "logit_scale": self.logit_scale.exp(),
                "logit_bias": self.logit_bias,
            }

    torch.manual_seed(0)
    model = Towers().double()
    x, y = make_features(Case("", 32, 32, 24), torch.float64)
    grads = []
    for loss_fn in (ModestAlignLoss(noise_std=0.0, smoothing=0.0), open_clip.ClipLoss()):
        model.zero_grad()
        sum(loss_fn(**model(x, y), output_dict=True).values()).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-13)
    assert float(grads[0]["logit_bias"]) == 0


def test_noise_only_while_training() -> None:
    x, y = unit_features(torch.float32)
    loss_fn = ModestAlignLoss(noise_std=0.5, smoothing=0.2)
    loss_fn.eval()
    quiet = modest_align_loss(x, y, 10.0, smoothing=0.2)
    assert loss_fn(x, y, 10.0) == quiet
    loss_fn.train()
    assert loss_fn(x, y, 10.0) != quiet


def test_owned_scale() -> None:
    x, y = unit_features(torch.float32)
    expected = modest_align_loss(x, y, 14.3, smoothing=0.1)
    fixed = ModestAlignLoss(noise_std=0.0, logit_scale=14.3)
    assert list(fixed.parameters()) == []
    assert fixed(x, y) == expected
    assert fixed(x, y, 5.0) == modest_align_loss(x, y, 5.0, smoothing=0.1)

    learned = ModestAlignLoss(noise_std=0.0, logit_scale=14.3, learn_scale=True)
    assert [name for name, _ in learned.named_parameters()] == ["log_scale"]
    loss = learned(x, y)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    scale = torch.tensor(14.3, requires_grad=True)
    modest_align_loss(x, y, scale, smoothing=0.1).backward()
    torch.testing.assert_close(learned.log_scale.grad, 14.3 * scale.grad)
    state = learned.state_dict()
    assert float(state["log_scale"]) == pytest.approx(math.log(14.3))


def test_arguments_reach_the_loss() -> None:
    x, y = unit_features(torch.float32)
    ids = torch.arange(32) % 5
    module = ModestAlignLoss(0.0, torch.tensor(0.3), symmetric=False, backend="eager")
    expected = modest_align_loss(x, y, 7.0, smoothing=0.3, symmetric=False, group_ids=ids)
    torch.testing.assert_close(module(x, y, 7.0, group_ids=ids), expected)
    module.smoothing = 0.0  # a schedule may assign it
    expected = modest_align_loss(x, y, 7.0, symmetric=False, group_ids=ids)
    torch.testing.assert_close(module(x, y, 7.0, group_ids=ids), expected)
    text = repr(ModestAlignLoss(0.02, 0.1, relative_noise=True, logit_scale=20.0, learn_scale=True))
    assert "noise_std=0.02" in text
    assert "logit_scale=20.0 (learned)" in text
