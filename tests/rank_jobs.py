"""What the ranks of ``rank_pool.py`` do: each function gets its process group, and asserts."""

from __future__ import annotations

import datetime
import functools
import importlib
import itertools
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from modest_align_kernels import (
    ModestAlignLoss,
    contrastive_logsumexp,
    dispatch,
    distributed,
    modest_align_loss,
    reference,
)
from modest_align_kernels.backends import eager
from modest_align_kernels.testing import (
    CASES,
    Case,
    assert_within_budget,
    make_features,
    make_group_ids,
    peak_extra_bytes,
    value_and_grads,
)


def of_module(group, module: str, function: str) -> Any:
    """A function that stands beside the test which sends it, where it needs what that imports."""
    return getattr(importlib.import_module(module), function)(group)


class _Shard(torch.autograd.Function):
    """Rows of a tensor that all ranks have; its gradient is the ranks' mean (or their sum), as trainers take it."""

    @staticmethod
    def forward(ctx, whole, index, group, mean):
        ctx.save_for_backward(whole, index)
        ctx.group, ctx.mean = group, mean
        return whole[index]

    @staticmethod
    def backward(ctx, grad):
        whole, index = ctx.saved_tensors
        total = torch.zeros_like(whole, dtype=torch.float64)
        total[index] = grad.double()
        dist.all_reduce(total, group=ctx.group)
        return (total / ctx.group.size() if ctx.mean else total).to(whole.dtype), None, None, None


def lengths_of(total: int, size: int, how: str) -> list[int]:
    """Of each rank's shard: "equal" as far as can be, "unequal", or "empty": the first rank and the last have none."""
    shares = {"equal": [1] * size, "unequal": range(1, size + 1), "empty": [0, *[1] * (size - 2), 0]}[how]
    if how == "empty" and size == 2:
        shares = [0, 1]
    ends = [round(total * sum(list(shares)[: q + 1]) / sum(shares)) for q in range(size)]
    return [end - start for start, end in itertools.pairwise([0, *ends])]


def shard_of(lengths: Sequence[int], rank: int, first: int = 0) -> torch.Tensor:
    start = first + sum(lengths[:rank])
    return torch.arange(start, start + lengths[rank])


class ShardedLoss:
    """The loss of one process, computed by all: every rank passes everything, and gets every gradient."""

    def __init__(self, group, how: str, function=modest_align_loss, **options: Any) -> None:
        self.group, self.how, self.function, self.options = group, how, function, options

    def indices(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        size, rank = self.group.size(), self.group.rank()
        of_rows = shard_of(lengths_of(rows, size, self.how), rank)
        # Extra columns are spread differently, and the rank without pairs has some.
        other_way = "unequal" if self.how == "empty" else self.how
        of_extra = shard_of(lengths_of(columns - rows, size, other_way), rank, rows)
        return of_rows, torch.cat((of_rows, of_extra))

    def __call__(self, x, y, scale, *, group_ids=None, weights=None, **options: Any):
        of_rows, of_columns = self.indices(len(x), len(y))
        mean = self.options.get("gradient_reduction", "mean") == "mean"
        if isinstance(group_ids, tuple):
            group_ids = group_ids[0][of_rows], group_ids[1][of_columns]
        elif group_ids is not None:
            group_ids = group_ids[of_rows]
        if weights is not None:
            options["weights"] = _Shard.apply(weights, of_rows, self.group, mean)
        x, y = (_Shard.apply(t, i, self.group, mean) for t, i in ((x, of_rows), (y, of_columns)))
        return self.function(x, y, scale, group_ids=group_ids, process_group=self.group, **options, **self.options)


def same_everywhere(group, value: torch.Tensor) -> None:
    everyone = [torch.empty_like(value) for _ in range(group.size())]
    dist.all_gather(everyone, value.detach().contiguous(), group=group)
    assert all(torch.equal(other, value) for other in everyone), everyone


def exact_in_float64(group, strategy: str, how: str) -> None:
    loss = ShardedLoss(group, how, strategy=strategy)
    for case in CASES:
        x, y = make_features(case, torch.float64)
        truth = value_and_grads(reference.modest_align_loss, x, y, case)
        for name, value in value_and_grads(loss, x, y, case).items():
            same_everywhere(group, value)
            error = (value - truth[name]).norm() / truth[name].norm().clamp_min(1e-3)
            assert error <= 1e-10, f"{case}: {name}: {error:.2e}"


def error_budget(group, strategy: str, how: str, dtype: torch.dtype, backend: str, every: int = 1) -> None:
    loss = ShardedLoss(group, how, strategy=strategy, backend=backend)
    for case in CASES[::every]:
        assert_within_budget(loss, case, dtype)


def options(group, strategy: str, how: str) -> None:
    """Everything of one process's loss that is no part of a Case: against it, in float64."""
    for rows, columns, symmetric, groups, smoothing in itertools.product(
        (7,), (7, 12), (True, False), ("none", "rows", "both"), (0.0, 0.3)
    ):
        case = Case("", rows, columns, 6, scale=8.0, groups=0 if groups == "none" else 4, column_ids=groups == "both")
        x, y = make_features(case, torch.float64)
        given = {"symmetric": symmetric, "group_ids": make_group_ids(case)}
        upstream = torch.linspace(-1, 2, rows, dtype=torch.float64)
        for reduction, weighted, gradient_reduction in (
            ("mean", False, "sum"),
            ("mean", True, "mean"),
            ("mean", True, "sum"),
            ("sum", False, "mean"),
            ("sum", True, "mean"),
            ("none", False, "mean"),
            ("none", True, "mean"),
        ):
            ranks_loss = ShardedLoss(group, how, strategy=strategy, gradient_reduction=gradient_reduction)
            results = []
            for loss_fn in (modest_align_loss, ranks_loss):
                ours = loss_fn is ranks_loss
                leaves = [t.clone().requires_grad_() for t in (x, y, torch.tensor(8.0, dtype=x.dtype))]
                given["smoothing"] = torch.tensor(smoothing, dtype=x.dtype, requires_grad=True) if smoothing else 0.0
                leaves += [given["smoothing"]] if smoothing else []
                weights = torch.tensor([0.0, 1, 2, 0.5, 1, 3, 0.25], dtype=x.dtype, requires_grad=True)
                leaves += [weights] if weighted else []
                loss = loss_fn(*leaves[:3], **given, weights=weights if weighted else None, reduction=reduction)
                value = loss
                if reduction == "none":
                    of_rows, _ = ranks_loss.indices(rows, columns)
                    value = torch.zeros(rows, dtype=x.dtype)
                    value[of_rows if ours else slice(None)] = loss.detach()
                    if ours:
                        dist.all_reduce(value, group=group)
                    # J = sum over ranks; a trainer that takes the mean gets J / W.
                    loss = (loss * (upstream[of_rows] * group.size() if ours else upstream)).sum()
                grads = list(torch.autograd.grad(loss, leaves))
                if ours and gradient_reduction == "sum":
                    shared = [2, 3] if smoothing else [2]
                    grads = [g * group.size() if i in shared else g for i, g in enumerate(grads)]
                for grad in grads if ours else ():
                    same_everywhere(group, grad)
                results.append((value.detach(), *grads))
            torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)


def logsumexp(group, strategy: str, dtype: torch.dtype) -> None:
    size, rank = group.size(), group.rank()
    rtol, atol = (1e-9, 1e-12) if dtype == torch.float64 else (1e-4, 1e-4)
    for rows, columns, how, other, ids in itertools.product(
        (1, 9), (2, 13), ("equal", "unequal", "empty"), ("equal", "empty"), (False, True)
    ):
        x, y = (torch.randn(n, 5, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (rows, columns))
        u, v = torch.linspace(-1, 1, rows).to(dtype), torch.linspace(2, -3, columns).to(dtype)
        row_ids, col_ids = torch.arange(rows) % 3, torch.arange(columns) % 4
        leaves = [t.clone().requires_grad_() for t in (x, y, torch.tensor(6.0, dtype=x.dtype))]
        of_all = contrastive_logsumexp(*leaves, **({"row_ids": row_ids, "col_ids": col_ids} if ids else {}))
        finite = [torch.where(t.isfinite(), t, 0.0) for t in of_all]
        expected = torch.autograd.grad((finite[0] * u).sum() + (finite[1] * v).sum(), leaves)
        i, j = shard_of(lengths_of(rows, size, how), rank), shard_of(lengths_of(columns, size, other), rank)
        given = {"row_ids": row_ids[i], "col_ids": col_ids[j]} if ids else {}
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        shards = [_Shard.apply(t, index, group, False) for t, index in zip(leaves, (i, j), strict=False)]
        lse = contrastive_logsumexp(*shards, leaves[2], process_group=group, strategy=strategy, **given)
        torch.testing.assert_close(lse, (of_all[0][i], of_all[1][j]))
        finite = [torch.where(t.isfinite(), t, 0.0) for t in lse]
        total = (finite[0] * u[i]).sum() + (finite[1] * v[j]).sum()
        got = list(torch.autograd.grad(total, leaves))
        got[2] = got[2] * size
        torch.testing.assert_close(got, list(expected), rtol=rtol, atol=atol)


def shares(group, lengths: Sequence[int], *tensors: torch.Tensor) -> list[torch.Tensor]:
    """This rank's rows of each tensor, as leaves."""
    index = shard_of(lengths, group.rank())
    return [t[index].clone().requires_grad_(t.is_floating_point()) for t in tensors]


def contract(group, strategy: str) -> None:
    """Each clause of the docstring, in its words."""
    size = group.size()
    x, y = make_features(Case("", 11, 11, 6), torch.float64)
    lengths = lengths_of(11, size, "unequal")
    index = shard_of(lengths, group.rank())
    leaves = [t.clone().requires_grad_() for t in (x, y, *torch.tensor([7.0, 0.2], dtype=torch.float64))]
    whole = modest_align_loss(*leaves[:3], smoothing=leaves[3])
    of_x, of_y, of_scale, of_smoothing = torch.autograd.grad(whole, leaves)
    for gradient_reduction, features, shared in (("mean", size, 1), ("sum", 1, 1 / size)):
        given = {"process_group": group, "strategy": strategy, "gradient_reduction": gradient_reduction}
        x_own, y_own = shares(group, lengths, x, y)
        scale, smoothing = (t.detach().clone().requires_grad_() for t in leaves[2:])
        loss = modest_align_loss(x_own, y_own, scale, smoothing=smoothing, **given)
        same_everywhere(group, loss)
        torch.testing.assert_close(loss, whole)
        # J_r = f_r L: the gradients are those of the mean of all J_r
        for factor in (1.0, group.rank() - 3.0):
            mean = 1.0 if factor == 1.0 else sum(q - 3.0 for q in range(size)) / size
            got = torch.autograd.grad(loss, (x_own, y_own, scale, smoothing), torch.tensor(factor).double(), True)
            same_everywhere(group, got[2])
            expected = of_x[index] * features, of_y[index] * features, of_scale * shared, of_smoothing * shared
            torch.testing.assert_close(got, tuple(t * mean for t in expected))
        loss = ModestAlignLoss(0.0, 0.2, **given)(x_own, y_own, scale)
        torch.testing.assert_close(torch.autograd.grad(loss, (x_own, scale)), (expected[0], expected[2]))


def noise(group, strategy: str, how: str, backend: str) -> None:
    """The noise of one process that draws what the first rank draws, relative or not, extra columns' too."""
    ranks_loss = ShardedLoss(group, how, strategy=strategy, backend=backend)
    for rows, columns, relative_noise in ((11, 11, False), (11, 17, True)):
        case, given = Case("", rows, columns, 6, scale=8.0), {"noise_std": 0.4, "relative_noise": relative_noise}
        x, y = make_features(case, torch.float64 if backend == "eager" else torch.float32)
        results = []
        for loss_fn, seed in ((modest_align_loss, 5), (ranks_loss, 5 + group.rank())):
            torch.manual_seed(seed)
            results.append(value_and_grads(functools.partial(loss_fn, **given), x, y, case))
            drawn = torch.rand(())  # every rank's generator has gone on by one number
        torch.testing.assert_close(results[1], results[0], rtol=1e-9 if backend == "eager" else 2e-5, atol=1e-6)
        torch.manual_seed(5 + group.rank())
        torch.randint(2**63 - 1, ())
        assert torch.equal(torch.rand(()), drawn)


def costs(group, strategy: str, backend: str, dtype: torch.dtype) -> None:
    """Matmuls and bytes sent are what they are on paper, beside a few small numbers."""
    from benchmarks.ranks import count, on_paper

    rows, features, size = 96, 64, group.size()
    (x, y), scale = make_features(Case("", rows // size, rows // size, features), dtype), torch.tensor(9.0)
    leaves = [t.detach().requires_grad_() for t in (x, y, scale)]
    given = {"process_group": group, "strategy": strategy, "backend": backend}
    flops, sent = count(lambda: modest_align_loss(*leaves, **given).backward(), size)
    # The ring keeps no exponentials from forward to backward, nor does eager.
    matmuls = 3 if (strategy, backend) == ("gather", "native") else 4
    operand = dispatch.operand_dtype(dtype, torch.device("cpu"), backend)
    cost = on_paper(strategy, size, rows, features, operand.itemsize, 4, matmuls)
    assert flops == cost.flops
    small = 4 * 8 * (size - 1) + 4 * 2 * 4  # what all agree on; the largest weight, the loss, its and scale's gradients
    assert 0 < sent - (cost.forward + cost.backward) <= small, (sent, cost)


def auto(group) -> None:
    """The ring where gathering would take too much."""
    from benchmarks.ranks import Traffic

    x, y = (torch.randn(4, 8) for _ in range(2))
    needed = 4 * group.size() * 8 * (4 + 4)  # bytes of all texts and of their gradient
    before = distributed.GATHER_BYTES
    for limit, ring in ((needed - 1, True), (needed, False)):
        distributed.GATHER_BYTES = limit
        with Traffic(group.size()) as traffic:
            modest_align_loss(x, y, 9.0, process_group=group)
        assert ("send" in traffic.sent) == ring, traffic.sent
    distributed.GATHER_BYTES = before


def memory(group, strategy: str) -> None:
    """What is held beyond one process of as many rows is at most what it is on paper."""
    from benchmarks.ranks import on_paper

    rows, features, size = 512, 128, group.size()
    x, y = (torch.randn(rows, features, requires_grad=True) for _ in range(2))
    before = eager.BLOCK_ROWS, eager.BLOCK_COLUMNS
    eager.BLOCK_ROWS = eager.BLOCK_COLUMNS = 64
    alone, together = (
        peak_extra_bytes(lambda given=given: modest_align_loss(x, y, 9.0, backend="eager", **given).backward())
        for given in ({}, {"process_group": group, "strategy": strategy})
    )
    eager.BLOCK_ROWS, eager.BLOCK_COLUMNS = before
    whole = rows * size * features * 4
    held = on_paper(strategy, size, rows * size, features, 4, 4).held
    # gloo has a copy of what it sums and scatters, and a block changes places.
    slack = whole * (1 + 1 / size) if strategy == "gather" else 0
    assert together - alone <= held + slack + whole / 20


def smaller_side_travels(group, strategy: str) -> None:
    """The images where there are many more texts; or the side that wants no gradient."""
    from benchmarks.ranks import count

    pairs, features, size = 8, 64, group.size()
    for extra, of_images, of_texts, most in (
        (80, True, True, 3.2),  # times the images: there (by the ring twice) and back
        (80, True, False, 3.2),
        (0, False, True, 2.2),
        (0, True, False, 2.2),
    ):
        x, y = make_features(Case("", pairs, pairs + extra, features), torch.float32)
        x, y = x.requires_grad_(of_images), y.requires_grad_(of_texts)
        given = {"process_group": group, "strategy": strategy}
        for function in (
            lambda x=x, y=y, given=given: modest_align_loss(x, y, 9.0, smoothing=0.1, **given),
            lambda x=x, y=y, given=given: sum(t.sum() for t in contrastive_logsumexp(x, y, 9.0, **given)),
        ):
            _, sent = count(lambda function=function: function().backward(), size)
            assert sent <= most * 4 * pairs * (size - 1) * features + 4000, (extra, of_images, of_texts, sent)


def numbers_without_a_gradient(group, strategy: str) -> None:
    """Each subset of what may ask for a gradient, and none."""
    x, y = make_features(Case("", 10, 14, 6), torch.float32)
    loss_fn = ShardedLoss(group, "unequal", strategy=strategy)
    for wanted in itertools.product((False, True), repeat=4):
        results = []
        for function in (modest_align_loss, loss_fn):
            leaves = [
                t.clone().requires_grad_(w) for t, w in zip((x, y, *torch.tensor([7.0, 0.2])), wanted, strict=True)
            ]
            loss = function(*leaves[:3], smoothing=leaves[3])
            assert loss.requires_grad == any(wanted)
            leaves = [t for t in leaves if t.requires_grad]
            results.append((loss.detach(), torch.autograd.grad(loss, leaves) if leaves else ()))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def second_derivative(group, strategy: str) -> None:
    x, y = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    losses = (modest_align_loss(x, y, 5.0, process_group=group, strategy=strategy),)
    losses += (contrastive_logsumexp(x, y, 5.0, process_group=group, strategy=strategy)[0].sum(),)
    for loss, name in zip(losses, ("modest_align_loss", "contrastive_logsumexp"), strict=True):
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        raises(RuntimeError, f"{name} has no second derivative", grad.sum().backward)


def raises(kind: type[Exception], words: str, function) -> str:
    with pytest.raises(kind, match=re.escape(words)) as raised:
        function()
    assert "\n" not in str(raised.value), raised.value
    return str(raised.value)


def disagreements(group) -> None:
    """On every rank the same sentence, and the group goes on as before."""
    rank, size = group.rank(), group.size()
    x, y = (torch.randn(3, 8, requires_grad=True) for _ in range(2))
    wide = torch.randn(3, 9)
    last = rank == size - 1
    of = f"on rank {size - 1} of {size}, want the same on every rank"

    def call(x=x, y=y, scale=5.0, **options):
        return modest_align_loss(x, y, scale, process_group=group, **options)

    def all_raise(kind, words, function) -> None:
        sentences = [None] * size
        dist.all_gather_object(sentences, raises(kind, words, function), group=group)
        assert len(set(sentences)) == 1, sentences

    for words, options in (
        ("features: got 8 on rank 0 and 9 " + of, {"x": wide, "y": wide}),
        (
            "the operands' dtype: got torch.float32 on rank 0 and torch.float64 " + of,
            {"x": x.double(), "y": y.double()},
        ),
        ("backend: got native on rank 0 and eager " + of, {"backend": "eager"}),
        ("strategy: got auto on rank 0 and ring " + of, {"strategy": "ring"}),
        ("gradient_reduction: got mean on rank 0 and sum " + of, {"gradient_reduction": "sum"}),
        ("logit_scale: got 5.0 on rank 0 and 6.0 " + of, {"scale": 6}),
        ("logit_scale: got 5.0 on rank 0 and a tensor " + of, {"scale": torch.tensor(5.0)}),
        ("smoothing: got 0.0 on rank 0 and 0.1 " + of, {"smoothing": 0.1}),
        ("noise_std: got 0.0 on rank 0 and 0.5 " + of, {"noise_std": 0.5}),
        ("relative_noise: got False on rank 0 and True " + of, {"relative_noise": True}),
        ("group_ids: got None on rank 0 and a tensor " + of, {"group_ids": torch.arange(3)}),
        ("weights: got None on rank 0 and a tensor " + of, {"weights": torch.ones(3)}),
        ("reduction: got mean on rank 0 and none " + of, {"reduction": "none"}),
        ("symmetric: got True on rank 0 and False " + of, {"symmetric": False}),
        ("requires_grad of the images: got True on rank 0 and False " + of, {"x": x.detach()}),
    ):
        all_raise(ValueError, words, lambda options=options: call(**(options if last else {})))
    # What one rank refuses, all raise in its words.
    for kind, words, options in (
        (ValueError, "text_features: got 9 features, want 8", {"y": wide}),
        (TypeError, "image_features: got list, want a tensor", {"x": [1.0]}),
        (ValueError, "smoothing: got 1.5, want a float in [0, 1]", {"smoothing": 1.5}),
        (RuntimeError, 'float64 features run on backend="eager" only', {"x": x.double(), "backend": "native"}),
    ):
        all_raise(kind, words, lambda options=options: call(**(options if last else {})))
        all_raise(kind, f"(on rank {size - 1} of {size})", lambda options=options: call(**(options if last else {})))

    def lse(x=x, y=y, **options):
        return contrastive_logsumexp(x, y, 5.0, process_group=group, **options)

    ids = {"row_ids": torch.arange(3), "col_ids": torch.arange(3)}
    all_raise(ValueError, "ids: got False on rank 0 and True " + of, lambda: lse(**(ids if last else {})))
    all_raise(
        ValueError, "col_ids: got None beside row_ids", lambda: lse(**({"row_ids": ids["row_ids"]} if last else {}))
    )
    with torch.no_grad() if last else torch.enable_grad():
        all_raise(ValueError, "requires_grad of the images: got True on rank 0 and False " + of, call)
    same_everywhere(group, call())


def death(group) -> None:
    """The last rank is gone between forward and backward: the others raise within their group's timeout."""
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=3), group)
    x, y = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    loss = modest_align_loss(x, y, 5.0, process_group=group)
    if group.rank() == group.size() - 1:
        os._exit(1)
    start = time.monotonic()
    try:
        loss.backward()
    except RuntimeError:
        assert time.monotonic() - start < 6
        raise


def meshes(group) -> None:
    """Of a mesh, the ranks of one dimension; the others have the same pairs, as under tensor parallelism."""
    rank = dist.get_rank()
    x, y = make_features(Case("", 6, 6, 5), torch.float64)
    whole = modest_align_loss(x, y, 9.0)
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    data_rank = rank // 2
    own = slice(3 * data_rank, 3 * data_rank + 3)
    for process_group in ((mesh, "dp"), (mesh, 0), mesh["dp"], mesh.get_group("dp")):
        torch.testing.assert_close(modest_align_loss(x[own], y[own], 9.0, process_group=process_group), whole)
    raises(
        ValueError,
        "process_group: got a DeviceMesh of 2 dimensions, want (DeviceMesh, dimension)",
        lambda: modest_align_loss(x, y, 9.0, process_group=mesh),
    )
    raises(
        ValueError,
        "process_group: got dimension 'pp' of",
        lambda: modest_align_loss(x, y, 9.0, process_group=(mesh, "pp")),
    )
    pair = dist.new_group([0, 1])
    if rank > 1:
        raises(
            ValueError,
            "process_group: got one that this rank is no member of",
            lambda: modest_align_loss(x, y, 9.0, process_group=pair),
        )
    alone = [dist.new_group([q]) for q in range(4)][rank]
    torch.testing.assert_close(modest_align_loss(x, y, 9.0, process_group=alone, strategy="ring"), whole)


class Towers(torch.nn.Module):
    """Two encoders and a scale; the first layer's parameters get the gradients of many rows."""

    def __init__(self, unused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))
        self.text = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))
        self.log_scale = torch.nn.Parameter(torch.tensor([2.0]))
        if unused:
            self.idle = torch.nn.Linear(3, 3)

    def forward(self, x, y):
        return self.image(x), self.text(y), self.log_scale.exp()


SMOOTHED = {"smoothing": 0.2}


def one_process(x, y, model=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of the whole batch, and every parameter's gradient."""
    model = Towers() if model is None else model
    loss = modest_align_loss(*model(x, y), **SMOOTHED)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_grads(model, expected: dict[str, torch.Tensor]) -> None:
    got = {name.replace("module.", ""): p.grad for name, p in model.named_parameters() if p.grad is not None}
    got = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in got.items()}
    assert set(got) == set(expected)
    for name, value in expected.items():
        error = (got[name] - value).norm() / value.norm()
        assert error <= 2e-5, f"{name}: {error:.1e}, of norm {got[name].norm() / value.norm():.3f} of what is wanted"


def _batch(group, how: str = "unequal", rows: int = 20):
    x, y = (torch.randn(rows, 6, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    index = shard_of(lengths_of(rows, group.size(), how), group.rank())
    return x, y, index


def data_parallel(group, strategy: str, how: str, **options: Any) -> None:
    from torch.nn.parallel import DistributedDataParallel

    x, y, own = _batch(group, how)
    expected, grads = one_process(x, y)
    model = DistributedDataParallel(Towers(unused="find_unused_parameters" in options), process_group=group, **options)
    given = {"process_group": group, "strategy": strategy, **SMOOTHED}
    for _ in range(3):  # static_graph learns in the first
        model.zero_grad()
        loss = modest_align_loss(*model(x[own], y[own]), **given)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        assert_grads(model, grads)


def accumulated_without_sync(group, strategy: str) -> None:
    """Two batches, each with its own negatives, averaged once."""
    from torch.nn.parallel import DistributedDataParallel

    x, y, own = _batch(group)
    reference_model = Towers()
    one_process(x, y, reference_model)
    _, grads = one_process(x.flip(1), y, reference_model)
    model = DistributedDataParallel(Towers(), process_group=group)
    given = {"process_group": group, "strategy": strategy, **SMOOTHED}
    with model.no_sync():
        modest_align_loss(*model(x[own], y[own]), **given).backward()
    modest_align_loss(*model(x[own].flip(1), y[own]), **given).backward()
    assert_grads(model, grads)


def documented(group, strategy: str) -> None:
    """The functions of docs/many_ranks.md: a step, and one whose features are cached."""
    from torch.nn.parallel import DistributedDataParallel

    from benchmarks.recipes import PAGE_OF_RANKS, code

    page: dict[str, Any] = {}
    exec(code(PAGE_OF_RANKS), page)
    x, y, own = _batch(group)

    def gradients(process_group, step, *more, parallel: bool) -> tuple[torch.Tensor, ...]:
        model = torch.nn.Module()
        model.towers = Towers()
        model.towers.log_scale = None
        model.forward = lambda x, y: (model.towers.image(x), model.towers.text(y))
        loss_fn = page["make_loss"](process_group)
        loss_fn.noise_std, loss_fn.strategy = 0.0, strategy
        wrapped = DistributedDataParallel(model, process_group=group) if parallel else model
        loss = step(wrapped, loss_fn, *((x[own], y[own]) if parallel else (x, y)), *more)
        return loss, loss_fn.log_scale.grad, *(p.grad for p in model.parameters())

    expected = gradients(None, page["step"], parallel=False)
    for step, *more in ((page["step"],), (page["cached_step"], 3)):
        got = gradients(group, step, *more, parallel=True)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def fully_sharded(group, strategy: str) -> None:
    from torch.distributed.fsdp import fully_shard

    x, y, own = _batch(group)
    expected, grads = one_process(x, y)
    mesh = dist.DeviceMesh.from_group(group, "cpu")
    model = Towers()
    for tower in (model.image, model.text):
        fully_shard(tower, mesh=mesh)
    loss_fn = ModestAlignLoss(0.0, 0.2, process_group=mesh, strategy=strategy)
    loss = loss_fn(*model(x[own], y[own]))
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert_grads(model, grads)  # the scale is outside FSDP, and in step


def compiled(group, strategy: str) -> None:
    x, y, own = _batch(group)
    expected, grads = one_process(x, y)
    model = Towers()

    def step(x, y):
        return 2 * modest_align_loss(*model(x, y), process_group=group, strategy=strategy, **SMOOTHED)

    loss = torch.compile(step, backend="aot_eager")(x[own], y[own])
    (loss / 2).backward()
    torch.testing.assert_close(loss / 2, expected)
    for name, parameter in model.named_parameters():
        if name != "log_scale":
            dist.all_reduce(parameter.grad, group=group)
            parameter.grad /= group.size()
    assert_grads(model, grads)


def checkpointed(group, strategy: str, use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    x, y, own = _batch(group)
    loss_fn = ModestAlignLoss(0.3, 0.1, logit_scale=10.0, process_group=group, strategy=strategy)
    results = []
    for function in (loss_fn, lambda *a: checkpoint(loss_fn, *a, use_reentrant=use_reentrant)):
        leaves = [t[own].clone().requires_grad_() for t in (x, y)]
        torch.manual_seed(group.rank())
        loss = function(*leaves)
        loss.backward()
        results.append((loss.detach(), *(t.grad for t in leaves)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def under_autocast(group, strategy: str) -> None:
    x, y, own = _batch(group)
    expected, _ = one_process(x, y)
    model = Towers()
    with torch.autocast("cpu", torch.bfloat16):
        loss = modest_align_loss(*model(x[own], y[own]), process_group=group, strategy=strategy, **SMOOTHED)
    loss.backward()
    same_everywhere(group, loss)
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
