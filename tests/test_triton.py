"""The Triton kernels around the edges of their tiles and waves, executed by Triton's interpreter or on a GPU."""

from __future__ import annotations

from importlib import import_module
from itertools import pairwise

import pytest
import torch

from modest_align_kernels import available_backends, modest_align_loss, reference
from modest_align_kernels.backends import even_blocks, gradient_blocks, round_up
from modest_align_kernels.testing import Case, assert_within_budget, make_features, poisoned_memory, value_and_grads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if (reason := available_backends(DEVICE)["triton"]) is not None:
    pytest.skip(reason, allow_module_level=True)

stats = import_module("modest_align_kernels.backends.triton.contrastive_stats")
grads = import_module("modest_align_kernels.backends.triton.contrastive_grads")
normalize = import_module("modest_align_kernels.backends.triton.perturb_normalize")
tiles = import_module("modest_align_kernels.backends.triton.tiles")


def triton_loss(*args, **kwargs):
    return modest_align_loss(*args, backend="triton", **kwargs)


@pytest.mark.parametrize("columns", [63, 64, 65, 130])
@pytest.mark.parametrize("rows", [31, 32, 33])
def test_around_one_tile(rows: int, columns: int) -> None:
    for groups in (0, 9):
        case = Case(f"{rows} x {columns}, {groups} groups", rows, columns, 24, groups=groups)
        with poisoned_memory():
            assert_within_budget(triton_loss, case, torch.float32, DEVICE)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale", [14.3, 100.0, 1000.0])
def test_several_waves(monkeypatch, scale: float, symmetric: bool) -> None:
    # so little memory that both operations need several ragged blocks in each direction
    monkeypatch.setattr(stats, "WORKSPACE_BYTES", 40 * 12)
    monkeypatch.setattr(grads, "WORKSPACE_BYTES", 64 * 64 * 4)
    case = Case("waves", 100, 170, 24, scale=scale, groups=30, symmetric=symmetric)
    with poisoned_memory():
        assert_within_budget(triton_loss, case, torch.float32, DEVICE)


@pytest.mark.parametrize("geometry", ["antipodal", "pairs"])
@pytest.mark.parametrize("scale", [78.0, 79.0, 100.0, 1e4])
def test_tiles_whose_exponentials_vanish(scale: float, geometry: str) -> None:
    case = Case("vanishing", 70, 70, 24, scale=scale, geometry=geometry)
    assert_within_budget(triton_loss, case, torch.float32, DEVICE)


@pytest.mark.parametrize("features", [1, 3, 8, 40, 1000, 4096])
def test_any_number_of_features(features: int) -> None:
    x, y = make_features(Case("", 9, 11, features), torch.float32, DEVICE)
    x, y = x.T.contiguous().T, y[:, ::1]
    x_hat, inv_norm = normalize.perturb_normalize(x, None, 0, 0.0, False, torch.float32)
    assert x_hat.shape[1] % 64 == 0
    assert not x_hat[:, features:].any()
    x_hat = x_hat[:, :features]
    truth = reference.perturb_normalize(x.double())
    torch.testing.assert_close(x_hat.double(), truth, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(inv_norm.double(), 1 / x.double().norm(dim=1), rtol=1e-6, atol=0)
    case = Case("", 9, 11, features)
    ours, plain = (value_and_grads(f, x, y, case) for f in (triton_loss, reference.modest_align_loss))
    torch.testing.assert_close(ours["image_features"], plain["image_features"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("first_row", [0, 2**32 - 3])
def test_noise_has_the_references_integers(first_row: int) -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def words_kernel(seed, out, first_row, stream, GROUPS: tl.constexpr):
        row = first_row + tl.arange(0, 8).to(tl.int64)
        words = normalize._noise_words(tl.load(seed), row[:, None], tl.arange(0, GROUPS)[None, :], stream)
        place = (tl.arange(0, 8) * GROUPS * 4)[:, None] + (tl.arange(0, GROUPS) * 4)[None, :]
        for lane in tl.static_range(4):
            tl.store(out + place + lane, words[lane].to(tl.int64))

    seed = torch.tensor((77 << 40) + 123456789, device=DEVICE)
    out = torch.empty((8, 32), dtype=torch.int64, device=DEVICE)
    words_kernel[(1,)](seed, out, first_row, 1, GROUPS=8)
    assert torch.equal(out & 0xFFFFFFFF, reference.random_bits(seed, 1, first_row, 8, 32))


@pytest.mark.parametrize(("relative", "rtol"), [(False, 1e-5), (True, 1e-5)])
def test_noise_is_the_references(relative: bool, rtol: float) -> None:
    x, _ = make_features(Case("", 21, 21, 50), torch.float32, DEVICE)
    seed = torch.tensor(987654321987, device=DEVICE)
    x_hat, _ = normalize.perturb_normalize(x, seed, 1, 0.5, relative, torch.float32)
    truth = reference.perturb_normalize(x.double(), seed=seed, stream=1, noise_std=0.5, relative_noise=relative)
    assert ((x_hat.double()[:, :50] - truth).norm(dim=1) <= rtol).all()


def test_blocks_cover_everything_without_a_tiny_tail() -> None:
    for total, largest, multiple in ((1, 5, 4), (100, 64, 32), (65536, 11585, 256), (65537, 11585, 256), (7, 1000, 64)):
        blocks = even_blocks(total, largest, multiple)
        assert blocks[0][0] == 0
        assert blocks[-1][1] == total
        assert all(a[1] == b[0] for a, b in pairwise(blocks))
        assert all(last - first <= max(round_up(largest, multiple), multiple) for first, last in blocks)
        if total > largest:
            assert min(b - a for a, b in blocks) >= max(b - a for a, b in blocks) - len(blocks) * multiple


@pytest.mark.parametrize("rows", [1000, 65_536, 1_000_000])
def test_workspace_keeps_its_budget(rows: int) -> None:
    budget = grads.WORKSPACE_BYTES
    for columns in (rows, 3 * rows):
        row_blocks, column_blocks = gradient_blocks(rows, columns, budget // 2, 256, 128)
        height, width = (max(b - a for a, b in blocks) for blocks in (row_blocks, column_blocks))
        assert round_up(height, 256) * round_up(width, 128) * 2 <= 1.1 * budget


def test_every_architecture_has_a_tile() -> None:
    for dtype in (torch.float16, torch.float32):
        assert {capability for capability, known in tiles.TILES if known == dtype} == {80, 90, 100}
