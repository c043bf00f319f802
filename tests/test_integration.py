"""What surrounds a loss in practice: torch.compile, autocast, activation checkpointing, the operators' contracts."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from operator_checks import slow_but
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from modest_align_kernels import ModestAlignLoss, available_backends, modest_align_loss, ops, reference
from modest_align_kernels.backends import eager
from modest_align_kernels.backends.contract import (
    Logits,
    PairLosses,
    PerturbNormalize,
    PerturbNormalizeBackward,
    SmoothedGradient,
    SmoothedLosses,
    Softmaxes,
)
from modest_align_kernels.dispatch import operand_dtype, why_not
from modest_align_kernels.testing import Case, make_features, value_and_grads

CASE = Case("", 24, 24, 16)
BACKENDS = [name for name, reason in available_backends("cpu").items() if reason is None]


class Model(torch.nn.Module):
    def __init__(self, **loss) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = torch.nn.Linear(16, 12), torch.nn.Linear(16, 12)
        self.loss = ModestAlignLoss(**{"logit_scale": 14.3, "learn_scale": True, **loss})

    def forward(self, x, y, group_ids=None):
        return self.loss(self.image(x), self.text(y), group_ids=group_ids)


def grads_of(model, *args):
    model.zero_grad()
    loss = model(*args)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [False, True])
def test_compiles_once_for_all_batch_sizes_and_seeds(groups: bool, backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = Model(noise_std=0.1, smoothing=0.1, backend=backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for rows in (24, 10, 17):
        x, y = make_features(Case("", rows, rows, 16), torch.float32)
        args = (x, y, torch.arange(rows) % 7) if groups else (x, y)
        torch.manual_seed(rows)
        expected = grads_of(model, *args)
        torch.manual_seed(rows)
        got = grads_of(compiled, *args)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
        assert not torch.equal(got[0], grads_of(compiled, *args)[0]), "each call draws fresh noise"
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
AUTOCAST = (None, torch.bfloat16, torch.float16)
TRACED = [
    case
    for case in slow_but(
        {
            *(
                (how, b, d, a)
                for how in ("aot_eager", "strict export", "export")
                for b in BACKENDS
                for d in DTYPES
                for a in AUTOCAST[:2]
            ),
            ("inductor", "native", torch.bfloat16, None),
            ("inductor", "eager", torch.float32, torch.bfloat16),
        },
        ("aot_eager", "inductor", "strict export", "export"),
        BACKENDS,
        DTYPES,
        AUTOCAST,
    )
    if why_not(case.values[1], torch.device("cpu"), case.values[2]) is None
]


@pytest.mark.parametrize(("how", "backend", "dtype", "autocast"), TRACED)
def test_traces_in_every_dtype(how: str, backend: str, dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    torch._dynamo.reset()
    loss_fn = ModestAlignLoss(0.0, 0.1, logit_scale=10.0, learn_scale=True, max_scale=50.0, backend=backend)
    x, y = (t.requires_grad_() for t in make_features(Case("", 6, 9, 8), dtype))

    def run(function):
        with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
            loss = function(x, y)
        return loss, torch.autograd.grad(loss, (x, y, loss_fn.log_scale)) if loss.requires_grad else None

    expected, grads = run(loss_fn)
    if "export" in how:
        with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
            traced = torch.export.export(loss_fn, (x, y), strict=how == "strict export").module()
        grads = None  # torch.export keeps no autograd.Function's backward
    else:
        traced = torch.compile(loss_fn, fullgraph=True, backend=how)
    torch.testing.assert_close(run(traced), (expected, grads), rtol=1e-3, atol=1e-5)


def test_traces_one_tensor_as_both_features() -> None:
    torch._dynamo.reset()
    x = torch.randn(6, 8, requires_grad=True)
    expected = torch.autograd.grad(modest_align_loss(x, x, 10.0, smoothing=0.1), x)
    compiled = torch.compile(modest_align_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x, x, 10.0, smoothing=0.1), x), expected)


SCHEDULES = {
    "from 0": [k / 20 for k in range(12)],
    "to 0": [k / 20 for k in range(11, -1, -1)] + [0.0, 0.3],
    "integer first": [0, *(k / 20 for k in range(1, 12))],
    "NumPy's": [np.float32(k / 20) for k in range(12)],
    "tensors": [torch.tensor([k / 20]) for k in range(12)],
}


@pytest.mark.parametrize("setting", ["logit_scale", "smoothing", "noise_std"])
@pytest.mark.parametrize(
    ("where", "schedule"),
    [
        *((where, schedule) for where in ("call", "module") for schedule in SCHEDULES),
        ("compiled step", "from 0"),
        ("compiled step", "to 0"),
    ],
)
def test_a_number_that_changes_compiles_twice(where: str, setting: str, schedule: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    x, y = (t.requires_grad_() for t in make_features(Case("", 6, 9, 8), torch.float32))
    loss_fn = ModestAlignLoss(0.0, 0.0, logit_scale=10.0)

    def call(value):
        return modest_align_loss(x, y, **{"logit_scale": 10.0, setting: value})

    def step(value):
        setattr(loss_fn, setting, value)
        return loss_fn(x, y)

    compiled_fn = torch.compile(loss_fn, fullgraph=True, backend=counter)

    def module(value):
        setattr(loss_fn, setting, value)
        return compiled_fn(x, y)

    traced = module
    if where != "module":
        traced = torch.compile(call if where == "call" else step, fullgraph=True, backend=counter)
    for value in SCHEDULES[schedule]:
        value = 100 * value + 1 if setting == "logit_scale" else value
        results = []
        for function in (traced, call):
            torch.manual_seed(0)
            loss = function(value)
            results.append((loss.detach(), *torch.autograd.grad(loss, (x, y))))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    assert counter.frame_count <= 2


class NoFloat64(TorchDispatchMode):
    """A device that has no float64, as Apple's GPUs."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        assert not any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tree_leaves(result)), function
        return result


@pytest.mark.parametrize("groups", ["none", "rows", "rows and columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_meta_tensors_have_shapes(backend: str, dtype: torch.dtype, groups: str) -> None:
    for rows, columns, features in ((4, 6, 8), (0, 3, 8), (2, 2, 0)):
        x = torch.empty(rows, features, dtype=dtype, device="meta", requires_grad=True)
        y = torch.empty(columns, features, dtype=dtype, device="meta", requires_grad=True)
        row_ids, col_ids = (torch.empty(n, dtype=torch.int64, device="meta") for n in (rows, columns))
        ids = {"none": None, "rows": row_ids, "rows and columns": (row_ids, col_ids)}[groups]
        with torch.device("meta"):
            loss_fn = ModestAlignLoss(0.1, 0.1, logit_scale=14.3, learn_scale=True, max_scale=100.0, backend=backend)
        with NoFloat64():
            loss = loss_fn(x, y, group_ids=ids)
            loss.backward()
        assert (loss.shape, loss.dtype, loss.device.type) == ((), torch.float32, "meta")
        for leaf in (x, y, loss_fn.log_scale):
            assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, leaf.dtype)
        assert "on meta (learned, at most 100.0)" in repr(loss_fn)


def test_meta_tensors_under_autocast() -> None:
    x = torch.empty(4, 8, device="meta")
    with torch.autocast("cpu", torch.bfloat16):
        assert modest_align_loss(x, x, 10.0).shape == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_eager_kernels_make_no_float64_off_the_cpu(dtype: torch.dtype) -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x_hat, y_hat = meta(4, 8, dtype=dtype), meta(6, 8, dtype=dtype)
    row, col = meta(4), meta(5)
    logits = Logits(x_hat, y_hat, meta(), *(meta(n, dtype=torch.int32) for n in (4, 6)), True)
    noise = meta(dtype=torch.int64), meta(), 0, True
    with NoFloat64():
        eager.perturb_normalize(PerturbNormalize(meta(4, 8, dtype=dtype), *noise, y_hat[:4], x_hat, row, row))
        eager.contrastive_stats(logits, row, col)
        eager.contrastive_grads(logits, Softmaxes(row, col, row, col), meta(4, 8), meta(6, 8))
        dx = meta(4, 8, dtype=dtype)
        ids = logits.row_ids, logits.col_ids
        smoothed = SmoothedGradient(meta(), *ids, row, row)
        eager.perturb_normalize_backward(
            PerturbNormalizeBackward(meta(4, 8), x_hat, row, y_hat, row, meta(), meta(), dx, row), smoothed
        )
        losses = PairLosses(row, row, row, meta(), row, row, row, row)
        eager.pair_losses(losses, SmoothedLosses(meta(), x_hat, y_hat, *ids, row, row, row))


IMPORT_AGAIN = """
import importlib, sys
import torch
import modest_align_kernels as first
x = torch.randn(4, 8, requires_grad=True)
backends = [name for name, reason in first.available_backends("cpu").items() if reason is None]
packages = []
for again in ("imported", "reloaded"):
    if again == "imported":
        for name in [name for name in sys.modules if name.split(".")[0] == "modest_align_kernels"]:
            del sys.modules[name]
    else:
        for name in [name for name in sys.modules if name.split(".")[0] == "modest_align_kernels"]:
            if not name.endswith("._C"):
                importlib.reload(sys.modules[name])
    packages.append(importlib.import_module("modest_align_kernels"))
assert packages[0] is not first
losses = {}
for package in (first, *packages):
    for backend in backends:
        loss = package.ModestAlignLoss(0.0, 0.1, logit_scale=10.0, backend=backend)(x, x)
        loss.backward()
        losses.setdefault(backend, set()).add(float(loss.detach()))
    torch._dynamo.reset()
    torch.compile(package.modest_align_loss, fullgraph=True, backend="aot_eager")(x, x, 10.0).backward()
print(*sorted(losses), {len(each) for each in losses.values()})
"""


def test_the_library_may_be_imported_again() -> None:
    result = subprocess.run([sys.executable, "-c", IMPORT_AGAIN], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == " ".join(sorted(BACKENDS)) + " {1}\n"


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_gives_a_float32_loss_from_16_bit_operands(backend: str, monkeypatch) -> None:
    x, y = make_features(CASE, torch.float32)
    exact = modest_align_loss(x, y, 14.3, backend=backend)
    operands = []
    normalize = ops.perturb_normalize
    monkeypatch.setattr(
        ops, "perturb_normalize", lambda *a, **k: operands.append(k["operand_dtype"]) or normalize(*a, **k)
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = modest_align_loss(x, y, 14.3, backend=backend)
        expected = operand_dtype(torch.float32, x.device, backend)
    assert loss.dtype == torch.float32
    assert operands == [expected, expected]
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=0)


def test_autocast_leaves_no_trace_in_float64() -> None:
    x, y = make_features(CASE, torch.float64)
    expected = value_and_grads(reference.modest_align_loss, x, y, CASE)
    with torch.autocast("cpu", torch.bfloat16):
        got = value_and_grads(modest_align_loss, x, y, CASE)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


def test_training_step_under_autocast() -> None:
    model = Model(noise_std=0.0, smoothing=0.1)
    x, y = make_features(CASE, torch.float32)
    expected, exact = grads_of(model, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        model.zero_grad()
        loss = model(x, y)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    for parameter, grad in zip(model.parameters(), exact, strict=True):
        assert (parameter.grad - grad).norm() <= 5e-2 * grad.norm() + 1e-4


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_repeats_the_noise(use_reentrant: bool) -> None:
    x, y = (t.requires_grad_() for t in make_features(CASE, torch.float32))
    loss_fn = ModestAlignLoss(noise_std=0.3, logit_scale=10.0)
    torch.manual_seed(1)
    plain = loss_fn(x, y)
    expected = torch.autograd.grad(plain, (x, y))
    torch.manual_seed(1)
    loss = checkpoint(loss_fn, x, y, use_reentrant=use_reentrant)
    loss.backward()
    assert torch.equal(loss, plain)
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(y.grad, expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_keep_their_contracts(backend: str) -> None:
    x, y = make_features(Case("", 6, 9, 8), torch.float32)
    scale, seed, std = torch.tensor(10.0), torch.tensor(7), torch.tensor(0.1)
    row_ids, col_ids = torch.arange(6, dtype=torch.int32) % 4, torch.arange(9, dtype=torch.int32) % 5
    op = torch.ops.modest_align
    checks = ("test_schema", "test_faketensor")
    where = {"backend": backend}
    operands = {"operand_dtype": torch.float32, **where}
    x_hat, inv_norm, _ = op.perturb_normalize(x, None, None, 0, False, None, **operands)
    y_hat, _, _ = op.perturb_normalize(y, None, None, 1, False, x_hat, **operands)
    for pair_hat in (None, x_hat):
        args = (y, seed, std, 0, False, pair_hat)
        torch.library.opcheck(op.perturb_normalize, args, operands, test_utils=checks)
    for col_count in (6, 9, 0):
        args = (x_hat, y_hat, scale, row_ids, col_ids, True)
        torch.library.opcheck(op.contrastive_stats, args, {"col_count": col_count, **where}, test_utils=checks)
    row_lse, col_lse, _ = op.contrastive_stats(x_hat, y_hat, scale, None, None, True, col_count=6, **where)
    for want_x, want_y in ((True, True), (False, True), (True, False)):
        args = (x_hat, y_hat, scale, row_lse, col_lse, row_lse.cos(), col_lse.cos(), row_ids, col_ids, False)
        wanted = {"want_x": want_x, "want_y": want_y, **where}
        torch.library.opcheck(op.contrastive_grads, args, wanted, test_utils=checks)
    for smoothing, ids in ((None, (None, None)), (torch.tensor(0.1), (None, None)), (std, (row_ids, col_ids))):
        args = (row_lse, col_lse, row_lse.cos(), scale, smoothing, x_hat, y_hat, *ids)
        torch.library.opcheck(op.pair_losses, args, where, test_utils=checks)
        args = (x_hat, x_hat, inv_norm, y_hat, row_lse, scale, std, smoothing, *ids, row_lse.cos(), row_lse.sin())
        wanted = {"features": 8, "dtype": torch.bfloat16, **where}
        torch.library.opcheck(op.perturb_normalize_backward, args, wanted, test_utils=checks)


def test_no_gradient_no_saved_tensors() -> None:
    x, y = make_features(CASE, torch.float32)
    x.requires_grad_()
    with torch.no_grad():
        loss = modest_align_loss(x, y, 10.0)
    assert not loss.requires_grad


class CallCount(TorchDispatchMode):
    """Counts the calls that PyTorch's dispatcher gets: on a GPU small batches take as long as these do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


IDS = torch.arange(40) % 7
MODES = {
    "plain": (16, {}),
    "one direction": (16, {"symmetric": False}),
    "noise": (18, {"noise_std": 0.1}),
    "smoothing": (19, {"noise_std": 0.1, "smoothing": 0.1}),
    "groups": (20, {"group_ids": IDS[:24]}),
    "groups and smoothing": (23, {"noise_std": 0.1, "smoothing": 0.1, "group_ids": IDS[:24]}),
    "groups of both sides and smoothing": (25, {"noise_std": 0.1, "smoothing": 0.1, "group_ids": (IDS[:24], IDS)}),
    "weights": (36, {"weights": torch.ones(24)}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_a_step_is_few_calls(mode: str, backend: str) -> None:
    at_most, options = MODES[mode]
    x, y = (t.requires_grad_() for t in make_features(Case("", 24, 40, 16), torch.float32))
    scale = torch.tensor(14.3, requires_grad=True)
    with CallCount() as count:
        modest_align_loss(x, y, scale, backend=backend, **options).backward()
    assert count.calls <= at_most


@pytest.mark.parametrize("backend", BACKENDS)
def test_flops_are_counted(backend: str) -> None:
    x, y = make_features(Case("", 24, 40, 64), torch.float32)
    of_a_matmul, again = 2 * 24 * 40 * 64, backend != "native"  # which keeps the exponentials of so few rows
    for wanted, matmuls in (((True, True), 3 + again), ((True, False), 2 + again), ((False, False), 1)):
        features = [t.clone().requires_grad_(is_wanted) for t, is_wanted in zip((x, y), wanted, strict=True)]
        with FlopCounterMode(display=False) as counter:
            loss = modest_align_loss(*features, 14.3, smoothing=0.1, backend=backend)
            if any(wanted):
                loss.backward()
        assert counter.get_total_flops() == matmuls * of_a_matmul


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_func(backend: str) -> None:
    x, y = make_features(CASE, torch.float32)
    scale, smoothing = torch.tensor(14.3), torch.tensor(0.1)

    def loss(x, y, scale, smoothing):
        return modest_align_loss(x, y, scale, smoothing=smoothing, group_ids=torch.arange(24) // 2, backend=backend)

    inputs = [t.clone().requires_grad_() for t in (x, y, scale, smoothing)]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    got = torch.func.grad(loss, argnums=(0, 1, 2, 3))(x, y, scale, smoothing)
    torch.testing.assert_close(got, expected, rtol=0.0, atol=0.0)
    value, pull = torch.func.vjp(loss, x, y, scale, smoothing)
    torch.testing.assert_close(pull(torch.tensor(2.0)), tuple(2 * t for t in expected))
    assert torch.equal(value, loss(x, y, scale, smoothing))
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x, y, scale, smoothing).sum())(x)
    with pytest.raises(RuntimeError, match=r"has no torch\.vmap: got several batches at once"):
        torch.func.vmap(loss, in_dims=(0, 0, None, None))(x.expand(3, 24, 16), y.expand(3, 24, 16), scale, smoothing)
    # PyTorch's sentence: Dynamo would refuse a Function that has its own.
    with pytest.raises(NotImplementedError, match=r"You must implement the jvp .* to use it with forward mode AD"):
        torch.func.hessian(loss)(x, y, scale, smoothing)


def test_functional_call() -> None:
    model, (x, y) = Model(noise_std=0.0), make_features(CASE, torch.float32)
    expected = grads_of(model, x, y)

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x, y))

    grads = torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()})
    torch.testing.assert_close(list(grads.values()), expected[1])
