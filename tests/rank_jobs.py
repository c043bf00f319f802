"""What the ranks of ``rank_pool.py`` do: each function gets its process group, and asserts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from modest_align_kernels import contrastive_logsumexp, modest_align_loss, reference
from modest_align_kernels.testing import (
    CASES,
    Case,
    assert_within_budget,
    make_features,
    make_group_ids,
    value_and_grads,
)


class _Shard(torch.autograd.Function):
    """Rows of a tensor that all ranks have; the gradient is the mean (or the sum) of the ranks', as trainers take it."""

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


def logsumexp(group, strategy: str) -> None:
    size, rank = group.size(), group.rank()
    for rows, columns, how, other, ids in itertools.product(
        (1, 9), (2, 13), ("equal", "unequal", "empty"), ("equal", "empty"), (False, True)
    ):
        x, y = (torch.randn(n, 5, generator=torch.Generator().manual_seed(n)).double() for n in (rows, columns))
        u, v = torch.linspace(-1, 1, rows).double(), torch.linspace(2, -3, columns).double()
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
        torch.testing.assert_close(got, list(expected), rtol=1e-9, atol=1e-12)
