"""The module: a drop-in for open_clip's ClipLoss, with noise only in training and a scale of its own if asked."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
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
    scale = torch.tensor([14.3], requires_grad=True)
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


def learned_scale(**kwargs) -> ModestAlignLoss:
    return ModestAlignLoss(**{"noise_std": 0.0, "logit_scale": 14.3, "learn_scale": True, **kwargs})


def step(loss_fn: ModestAlignLoss, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss_fn(x, y).backward()
    optimizer.step()


def test_the_present_scale() -> None:
    loss_fn = learned_scale(logit_scale=20.0)
    assert "logit_scale=20.0 (learned)" in repr(loss_fn)
    with torch.no_grad():
        loss_fn.log_scale.add_(math.log(2))
    assert float(loss_fn.logit_scale) == pytest.approx(40.0)
    assert f"{loss_fn.logit_scale:.2f}" == "40.00"
    assert not loss_fn.logit_scale.requires_grad
    assert "logit_scale=40.0 (learned)" in repr(loss_fn)
    loss_fn.logit_scale = 7  # and assigned, it is that
    assert float(loss_fn.log_scale.detach()) == pytest.approx(math.log(7))
    for wrong in (None, True, "10"):
        with pytest.raises(TypeError, match=r"logit_scale: got (NoneType|bool|str), want a finite float > 0"):
            loss_fn.logit_scale = wrong
    loss_fn.reset_parameters()
    assert float(loss_fn.logit_scale) == pytest.approx(20.0)

    fixed = ModestAlignLoss(logit_scale=14.3)
    assert fixed.logit_scale == 14.3
    fixed.logit_scale = 20
    assert "logit_scale=20.0," in repr(fixed)
    fixed.logit_scale = None
    assert "logit_scale=per call" in repr(fixed)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_a_bounded_scale_stops_and_comes_back(make) -> None:
    x = F.normalize(torch.randn(16, 8), dim=1)
    loss_fn = learned_scale(smoothing=0.0, max_scale=20.0)
    optimizer = make(loss_fn.parameters(), lr=0.05)
    for _ in range(200):  # pairs that match want ever more
        step(loss_fn, optimizer, x, x)
        assert float(loss_fn.logit_scale) <= 20.0
    assert float(loss_fn.logit_scale) == pytest.approx(20.0, rel=0.05)
    assert float(loss_fn.log_scale.detach()) <= math.log(20.0) + 0.5, "it does not run away above the bound"
    for _ in range(40):  # those that do not, less
        step(loss_fn, optimizer, x, x.roll(1, 0))
    assert float(loss_fn.logit_scale) < 15.0

    # within the bound it is the same as without
    grads = []
    for kwargs in ({}, {"max_scale": 20.0}):
        loss_fn = learned_scale(**kwargs)
        loss_fn(x, x).backward()
        grads.append(loss_fn.log_scale.grad)
    torch.testing.assert_close(*grads, rtol=1e-6, atol=0)


def test_a_scale_from_far_above_its_bound() -> None:
    loss_fn = learned_scale(max_scale=100.0)
    loss_fn.load_state_dict({"log_scale": torch.tensor(1000.0)})  # exp of which is infinite
    x = F.normalize(torch.randn(16, 8), dim=1)
    assert float(loss_fn.logit_scale) == 100.0
    assert loss_fn(x, x.roll(1, 0)).backward() is None
    assert 0 < float(loss_fn.log_scale.grad) < math.inf


def test_checkpoints_of_a_0_dim_scale_load() -> None:
    old = {"loss.log_scale": torch.tensor(3.0)}
    model = torch.nn.ModuleDict({"loss": learned_scale(smoothing=torch.tensor(0.2))})
    model.load_state_dict(old)
    assert model["loss"].log_scale.shape == (1,)
    assert model["loss"].log_scale.tolist() == [3.0]
    assert old["loss.log_scale"].dim() == 0
    new = model.state_dict()
    assert {name: value.shape for name, value in new.items()} == {"loss.log_scale": (1,), "loss.smoothing": ()}
    model.load_state_dict(new)
    del new["loss.smoothing"]
    with pytest.raises(RuntimeError, match=r"Missing key.*loss\.smoothing"):
        model.load_state_dict(new)


def test_copies_are_of_the_same_process_group(one_rank) -> None:
    loss_fn = learned_scale(process_group=torch.distributed.group.WORLD, smoothing=torch.tensor(0.2))
    model = torch.nn.Sequential(loss_fn)
    copied = torch.optim.swa_utils.AveragedModel(model).module[0]
    assert copied.process_group is loss_fn.process_group
    assert copied.log_scale is not loss_fn.log_scale
    copied.smoothing = 0.5
    assert float(loss_fn.smoothing) == pytest.approx(0.2)
    x, y = torch.randn(2, 4, 8)
    copied.smoothing = loss_fn.smoothing
    copied.noise_std = loss_fn.noise_std = 0.0
    assert torch.equal(copied(x, y), loss_fn(x, y))


def test_built_on_meta_and_materialised() -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(learned_scale(max_scale=50.0))
    assert "on meta" in repr(model)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert float(model[0].logit_scale) == pytest.approx(14.3)


class Towers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text, self.loss = torch.nn.Linear(24, 8), torch.nn.Linear(24, 8), learned_scale()

    def forward(self, x, y):
        return self.loss(self.image(x), self.text(y))


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("wrapper", ["FSDP1", "FSDP1, original parameters", "FSDP2"])
def test_fully_sharded(one_rank, wrapper: str, meta: bool) -> None:
    x, y = make_features(Case("", 32, 32, 24), torch.float32)
    expected = Towers()
    with torch.device("meta" if meta else "cpu"):
        model = Towers()
    if wrapper == "FSDP2":
        fully_shard(model)
        if meta:
            model.to_empty(device="cpu")
            for module in model.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
    else:
        original = wrapper != "FSDP1"
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=original)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(x, y)
    if not meta:  # there the layers start anywhere
        torch.testing.assert_close(loss, expected(x, y))
    loss.backward()
    optimizer.step()
    loss_fn = next(module for module in model.modules() if isinstance(module, ModestAlignLoss))
    scale = loss_fn.logit_scale
    if wrapper == "FSDP2":
        assert type(scale).__name__ == "DTensor"
        scale = scale.full_tensor()
    assert 5.0 < float(scale) < 20.0
    assert float(scale) != pytest.approx(14.3, abs=1e-3)
    assert "(learned)" in repr(model)


@pytest.mark.parametrize("name", ["smoothing", "noise_std", "logit_scale"])
def test_numbers_as_tensors_are_state(name: str) -> None:
    x, y = unit_features(torch.float32)
    loss_fn = ModestAlignLoss(**{"noise_std": 0.0, "smoothing": 0.0, "logit_scale": 10.0, name: torch.tensor([0.25])})

    def expected(value: float) -> torch.Tensor:
        torch.manual_seed(0)
        return modest_align_loss(x, y, **{"logit_scale": 10.0, name: value})

    def loss() -> torch.Tensor:
        torch.manual_seed(0)
        return loss_fn(x, y)

    assert loss() == expected(0.25)
    assert all(value.dtype == torch.float64 for value in copy.deepcopy(loss_fn).double().state_dict().values())
    (key,) = loss_fn.state_dict()
    assert key == {"logit_scale": "fixed_scale"}.get(name, name)
    assert getattr(copy.deepcopy(loss_fn).to("meta"), name).is_meta
    loss_fn.load_state_dict({key: torch.tensor([0.5])})
    assert loss() == expected(0.5)
    for value in (0.75, np.float32(0.75), torch.tensor(0.125), 1, torch.tensor([[0.5]])):
        setattr(loss_fn, name, value)
        assert loss() == expected(float(value))
        assert len(loss_fn.state_dict()) == isinstance(value, torch.Tensor)
        assert f"{name}={float(value)}" in repr(loss_fn)


def test_a_smoothing_that_is_a_parameter_learns() -> None:
    x, y = unit_features(torch.float32)
    loss_fn = ModestAlignLoss(0.0, torch.nn.Parameter(torch.tensor([0.1])), logit_scale=10.0)
    assert [name for name, _ in loss_fn.named_parameters()] == ["smoothing"]
    loss_fn(x, y).backward()
    assert loss_fn.smoothing.grad.shape == (1,)
    loss_fn.smoothing = 0.2
    assert list(loss_fn.parameters()) == []
    assert loss_fn(x, y) == modest_align_loss(x, y, 10.0, smoothing=0.2)


def test_as_open_clip_models_with_a_scale_of_one_element() -> None:
    x, y = unit_features(torch.float32)
    log_scale = torch.nn.Parameter(torch.ones([1]) * math.log(14.3))
    ModestAlignLoss(0.0, 0.0)(x, y, log_scale.exp()).backward()
    ours, log_scale.grad = log_scale.grad, None
    open_clip.ClipLoss()(x, y, log_scale.exp()).backward()
    assert ours.shape == (1,)
    torch.testing.assert_close(ours, log_scale.grad)


def test_weights_and_reduction() -> None:
    x, y = make_features(Case("", 6, 9, 8), torch.float32)
    weights = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.5, 1.0])
    settings = {"logit_scale": 10.0, "smoothing": 0.1}
    losses = ModestAlignLoss(0.0, reduction="none", **settings)(x, y)
    assert losses.shape == (6,)
    torch.testing.assert_close(ModestAlignLoss(0.0, **settings)(x, y), losses.mean())
    torch.testing.assert_close(ModestAlignLoss(0.0, reduction="sum", **settings)(x, y), losses.sum())
    expected = (weights * losses).sum() / weights.sum()
    torch.testing.assert_close(ModestAlignLoss(0.0, **settings)(x, y, weights=weights), expected)
    with pytest.raises(ValueError, match='reduction: got \'max\', want "mean", "sum" or "none"'):
        ModestAlignLoss(0.0, reduction="max", **settings)(x, y)
