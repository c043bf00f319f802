"""The truth itself, pinned to PyTorch's functions, finite differences, hand-made tables and published vectors."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from modest_align_kernels import noise, reference


def features(rows: int, columns: int, width: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    y = torch.randn(columns, width, generator=generator, dtype=torch.float64)
    return x, y


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("columns", [5, 8])
def test_equals_cross_entropy_with_label_smoothing(columns: int, label_smoothing: float) -> None:
    x, y = features(5, columns)
    logits = 14.3 * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    target = torch.arange(5)
    expected = F.cross_entropy(logits, target, label_smoothing=label_smoothing)
    smoothing = label_smoothing * (columns - 1) / columns
    one_way = reference.modest_align_loss(x, y, 14.3, smoothing=smoothing, symmetric=False)
    torch.testing.assert_close(one_way, expected, rtol=1e-12, atol=0)
    if columns == 5:
        expected = (expected + F.cross_entropy(logits.T, target, label_smoothing=label_smoothing)) / 2
        both = reference.modest_align_loss(x, y, 14.3, smoothing=smoothing)
        torch.testing.assert_close(both, expected, rtol=1e-12, atol=0)


def test_two_by_two_by_hand() -> None:
    # cosines [[1, 0], [0.6, 0.8]] at scale 2: S = [[2, 0], [1.2, 1.6]]
    x = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    y = torch.tensor([[3.0, 0.0], [0.0, 0.5]], dtype=torch.float64)
    rows = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-0.4))
    columns = math.log(1 + math.exp(-0.8)) + math.log(1 + math.exp(-1.6))
    assert float(reference.modest_align_loss(x, y, 2.0)) == pytest.approx((rows + columns) / 4, rel=1e-14)
    # moving a quarter of the mass to the one negative costs a quarter of each gap between positive and negative
    gaps = (2 + 0.4) + (0.8 + 1.6)
    smoothed = float(reference.modest_align_loss(x, y, 2.0, smoothing=0.25))
    assert smoothed == pytest.approx((rows + columns) / 4 + 0.25 * gaps / 4, rel=1e-14)


def test_groups_take_negatives_out() -> None:
    x, y = features(4, 4)
    ids = torch.tensor([5, 9, 5, -3])
    logits = 10 * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    row0 = logits[0, [0, 1, 3]].logsumexp(0) - logits[0, 0]
    row1 = logits[1].logsumexp(0) - logits[1, 1]
    row2 = logits[2, [1, 2, 3]].logsumexp(0) - logits[2, 2]
    row3 = logits[3].logsumexp(0) - logits[3, 3]
    loss = reference.modest_align_loss(x, y, 10.0, group_ids=ids, symmetric=False)
    torch.testing.assert_close(loss, (row0 + row1 + row2 + row3) / 4, rtol=1e-12, atol=0)
    # each of rows 0 and 2 spreads its smoothing over two negatives, 1 and 3 over three
    smoothed = reference.modest_align_loss(x, y, 10.0, group_ids=ids, symmetric=False, smoothing=0.3)
    gap = logits.diagonal() - torch.stack(
        [
            logits[0, [1, 3]].mean(),
            logits[1, [0, 2, 3]].mean(),
            logits[2, [1, 3]].mean(),
            logits[3, :3].mean(),
        ]
    )
    torch.testing.assert_close(smoothed, loss + 0.3 * gap.mean(), rtol=1e-12, atol=0)


def test_without_negatives_the_mass_goes_back_to_the_positive() -> None:
    x, y = features(3, 3)
    ids = torch.zeros(3, dtype=torch.int64)
    assert float(reference.modest_align_loss(x, y, 10.0, group_ids=ids, smoothing=0.7)) == 0


def test_extra_columns_are_negatives_of_rows_only() -> None:
    x, y = features(3, 5)
    logits = 10 * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    target = torch.arange(3)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :3].T, target)) / 2
    torch.testing.assert_close(reference.modest_align_loss(x, y, 10.0), expected, rtol=1e-12, atol=0)


def test_weights_and_reductions_are_those_of_cross_entropy() -> None:
    x, y = features(3, 3)
    logits = 10 * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    target, weights = torch.arange(3), torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    for reduction in ("mean", "sum"):
        # Its weights are of classes: here each is a pair's.
        both = [F.cross_entropy(s, target, weight=weights, reduction=reduction) for s in (logits, logits.T)]
        got = reference.modest_align_loss(x, y, 10.0, weights=weights, reduction=reduction)
        torch.testing.assert_close(got, sum(both) / 2, rtol=1e-12, atol=0)
        both = [F.cross_entropy(s, target, reduction=reduction) for s in (logits, logits.T)]
        got = reference.modest_align_loss(x, y, 10.0, reduction=reduction)
        torch.testing.assert_close(got, sum(both) / 2, rtol=1e-12, atol=0)
    both = [F.cross_entropy(s, target, weight=weights, reduction="none") for s in (logits, logits.T)]
    got = reference.modest_align_loss(x, y, 10.0, weights=weights, reduction="none")
    torch.testing.assert_close(got, sum(both) / 2, rtol=1e-12, atol=0)


def test_logsumexp_by_hand() -> None:
    x = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    y = torch.tensor([[3.0, 0.0], [0.0, 0.5], [-1.0, 0.0]], dtype=torch.float64)  # cosines 1 0 -1, 0 1 0
    row_lse, col_lse = reference.contrastive_logsumexp(x, y, 2.0)
    e = math.exp(2)
    assert row_lse.exp().tolist() == pytest.approx([e + 1 + 1 / e, 2 + e])
    assert col_lse.exp().tolist() == pytest.approx([e + 1, 1 + e, 1 / e + 1])
    ids = {"row_ids": torch.tensor([4, 7]), "col_ids": torch.tensor([4, 4, 7])}
    row_lse, col_lse = reference.contrastive_logsumexp(x, y, 2.0, **ids)
    assert row_lse.exp().tolist() == pytest.approx([1 / e, 1 + e])
    assert col_lse.exp().tolist() == pytest.approx([1, e, 1 / e])


def test_gradcheck() -> None:
    x, y = features(4, 6, width=3)
    ids = torch.tensor([0, 1, 0, 2])
    scale, smoothing = torch.tensor(5.0, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, y, scale, smoothing)]

    def loss(x, y, scale, smoothing):
        return reference.modest_align_loss(x, y, scale, smoothing=smoothing, group_ids=ids)

    assert torch.autograd.gradcheck(loss, inputs, eps=1e-6, atol=1e-8)


# The known answers of Philox4x32-10 that come with its authors' Random123 library.
PHILOX_VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX_VECTORS)
def test_philox_known_answers(counter, key, expected) -> None:
    words = noise.philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(map(int, words)) == expected


def test_random_bits_follow_the_written_counter_layout() -> None:
    seed = torch.tensor((7 << 32) + 11)
    first_row = (3 << 32) + 5
    bits = noise.random_bits(seed, noise_stream=1, first_row=first_row, rows=2, features=10)
    assert bits.shape == (2, 12)
    for row in range(2):
        for feature in range(10):
            counter = (feature // 4, 5 + row, 3, 1)
            words = noise.philox4x32(tuple(map(torch.tensor, counter)), (torch.tensor(11), torch.tensor(7)))
            assert int(bits[row, feature]) == int(words[feature % 4])


def test_noise_is_standard_normal() -> None:
    drawn = noise.gaussian_noise(torch.tensor(3), 0, 0, 1000, 401)
    count = drawn.numel()
    assert drawn.shape == (1000, 401)
    assert abs(float(drawn.mean())) < 4 / count**0.5
    assert abs(float(drawn.var()) - 1) < 4 * (2 / count) ** 0.5
    assert abs(float((drawn**4).mean()) - 3) < 4 * (96 / count) ** 0.5
    assert float(drawn.abs().max()) <= (48 * math.log(2)) ** 0.5
    # neighbours in a row, in a column, and the two streams are uncorrelated
    other = noise.gaussian_noise(torch.tensor(3), 1, 0, 1000, 401)
    for a, b in ((drawn[:, 1:], drawn[:, :-1]), (drawn[1:], drawn[:-1]), (drawn, other)):
        assert abs(float((a * b).mean())) < 4 / a.numel() ** 0.5


def test_noise_of_a_shard_is_the_shard_of_the_noise() -> None:
    seed = torch.tensor(-12345)
    whole = noise.gaussian_noise(seed, 0, 0, 20, 9)
    torch.testing.assert_close(noise.gaussian_noise(seed, 0, 13, 7, 9), whole[13:], rtol=0, atol=0)
