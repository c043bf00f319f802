"""The Triton kernels around the edges of their tiles and waves, executed by Triton's interpreter or on a GPU."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch

from modest_align_kernels import available_backends, modest_align_loss, ops, reference
from modest_align_kernels.backends import HEADROOM, LOG2E, blocks, even_block, gradient_block, round_up
from modest_align_kernels.backends.contract import Logits, Softmaxes
from modest_align_kernels.noise import TEXTS, random_bits
from modest_align_kernels.testing import Case, assert_within_budget, make_features, poisoned_memory, value_and_grads
from tests.operator_checks import slow_but

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if (reason := available_backends(DEVICE)["triton"]) is not None:
    pytest.skip(reason, allow_module_level=True)

stats = import_module("modest_align_kernels.backends.triton.contrastive_stats")
grads = import_module("modest_align_kernels.backends.triton.contrastive_grads")
group_sums = import_module("modest_align_kernels.backends.triton.group_sums")
logits = import_module("modest_align_kernels.backends.triton.logits")
persistent = import_module("modest_align_kernels.backends.triton.persistent")
normalize = import_module("modest_align_kernels.backends.triton.perturb_normalize")
tiles = import_module("modest_align_kernels.backends.triton.tiles")


def perturb_normalize(x, seed=None, noise_std=None, noise_stream=0, relative_noise=False, dtype=torch.float32):
    noise = seed, noise_std, noise_stream, relative_noise
    return ops.perturb_normalize(x, *noise, None, operand_dtype=dtype, backend="triton")


def triton_loss(*args, **kwargs):
    return modest_align_loss(*args, backend="triton", **kwargs)


@pytest.mark.parametrize(
    ("rows", "columns"), slow_but({(31, 63), (32, 64), (33, 65), (33, 130)}, (31, 32, 33), (63, 64, 65, 130))
)
def test_around_one_tile(rows: int, columns: int) -> None:
    for groups in (0, 9):
        case = Case(f"{rows} x {columns}, {groups} groups", rows, columns, 24, groups=groups)
        with poisoned_memory():
            assert_within_budget(triton_loss, case, torch.float32, DEVICE)


def test_tiles_with_more_rows_than_columns(monkeypatch) -> None:
    # as on a Hopper GPU: the diagonal also crosses tiles that begin right of it
    monkeypatch.setattr(tiles, "INTERPRETER_TILE", tiles.Tile(64, 32, 16, 1, 1))
    for groups in (0, 9):
        case = Case(f"tall tiles, {groups} groups", 70, 140, 24, groups=groups)
        assert_within_budget(triton_loss, case, torch.float32, DEVICE)


@pytest.mark.parametrize(
    ("scale", "symmetric"), slow_but({(14.3, True), (1000.0, False)}, (14.3, 100.0, 1000.0), (True, False))
)
def test_several_waves(monkeypatch, scale: float, symmetric: bool) -> None:
    # so little memory that both operations need several ragged blocks in each direction
    monkeypatch.setattr(stats, "WORKSPACE_BYTES", 40 * 12)
    monkeypatch.setattr(grads, "WORKSPACE_BYTES", 64 * 64 * 4)
    case = Case("waves", 100, 170, 24, scale=scale, groups=30, symmetric=symmetric)
    with poisoned_memory():
        assert_within_budget(triton_loss, case, torch.float32, DEVICE)


@pytest.mark.parametrize(
    ("scale", "geometry"),
    slow_but({(79.0, "antipodal"), (1e4, "pairs")}, (78.0, 79.0, 100.0, 1e4), ("antipodal", "pairs")),
)
def test_tiles_whose_exponentials_vanish(scale: float, geometry: str) -> None:
    case = Case("vanishing", 70, 70, 24, scale=scale, geometry=geometry)
    assert_within_budget(triton_loss, case, torch.float32, DEVICE)


def test_softmax_factors() -> None:
    scale, tile = torch.tensor(100.0, device=DEVICE), tiles.Tile(32, 64, 16, 1, 1)
    row_lse, col_lse = torch.full((70,), 90.0), torch.linspace(-20, 105, 50)
    row_lse[:2] = torch.tensor([-math.inf, math.nan])
    row_lse[33], row_lse[65] = -24.7, -24.8  # 80 binades below the shift are -24.77
    softmaxes = [row_lse, col_lse, *(2 * torch.rand(n) - 1 for n in (70, 50))]
    factors = grads.softmax_factors(scale, [t.to(DEVICE) for t in softmaxes], 140, 1024.0, tile)
    row_factor, col_factor, row_careful, col_careful = (t.cpu() for t in factors)
    assert row_careful.tolist() == [0, 0, 1]
    assert col_careful.tolist() == [0, 0, 0]
    shift = 100 * LOG2E - HEADROOM
    for factor, lse, weight in ((row_factor, *softmaxes[::2]), (col_factor, *softmaxes[1::2])):
        expected = 1024 * weight.double() * torch.exp2(shift - LOG2E * lse.double())
        expected[lse == -math.inf] = 0.0
        torch.testing.assert_close(factor[: len(lse)].double(), expected, rtol=2e-5, atol=0, equal_nan=True)
        assert not factor[len(lse) :].any()
    assert [len(row_factor), len(col_factor)] == [96, 192]


def test_tiles_with_and_without_care(monkeypatch) -> None:
    # At this scale the best of a row's cosines decides: some tiles take one exponential an element, some two.
    results, factors = [], grads.softmax_factors
    monkeypatch.setattr(grads, "softmax_factors", lambda *args: results.append(factors(*args)) or results[-1])
    case = Case("some careful", 100, 170, 24, scale=195.0)
    assert_within_budget(triton_loss, case, torch.float32, DEVICE)
    for careful in results[0][2:]:
        assert set(careful.tolist()) == {0, 1}


@pytest.mark.parametrize("scale", [14.3, 195.0, 1000.0])
@pytest.mark.parametrize("groups", [0, 9])
def test_persistent_experiment(monkeypatch, groups: int, scale: float) -> None:
    if DEVICE == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for Hopper GPUs alone")
    monkeypatch.setattr(persistent, "WORKSPACE_BYTES", 64 * 64 * 2)
    x, y = make_features(Case("", 100, 170, 24), torch.float32, DEVICE)
    x_hat, y_hat = (perturb_normalize(t, dtype=torch.float16)[0] for t in (x, y))
    ids = (torch.arange(100), torch.arange(170)) if groups else ()
    row_ids, col_ids = (i.to(DEVICE).int() // groups for i in ids) if groups else (None, None)
    for diagonal, col_count in ((False, 100), (True, 40)):
        a = Logits(x_hat, y_hat, torch.tensor(scale, device=DEVICE), row_ids, col_ids, diagonal)
        *lse, _ = ops.contrastive_stats(*a[:6], col_count=col_count, backend="triton")
        softmaxes = Softmaxes(*lse, *(2 * torch.rand(n, device=DEVICE) - 1 for n in (100, col_count)))
        expected, results = ([torch.full(t.shape, math.nan, device=DEVICE) for t in (x_hat, y_hat)] for _ in range(2))
        grads.contrastive_grads(a, softmaxes, *expected)
        with poisoned_memory():
            persistent.contrastive_grads(a, softmaxes, *results)
        for result, correct in zip(results, expected, strict=True):
            torch.testing.assert_close(result, correct, rtol=0, atol=2e-3 * float(correct.abs().max()))


def test_ids_bounds() -> None:
    row_ids, col_ids = (torch.randint(-(2**31), 2**31 - 1, (n,), dtype=torch.int32, device=DEVICE) for n in (70, 140))
    bounds = logits.ids_bounds(row_ids, col_ids, tiles.Tile(32, 64, 16, 1, 1))
    for result, ids, size in zip(bounds, (row_ids, col_ids), (32, 64), strict=True):
        assert result.tolist() == [[int(part.min()), int(part.max())] for part in ids.split(size)]
    assert logits.ids_bounds(None, None, tiles.INTERPRETER_TILE) == (None, None)


@pytest.mark.parametrize("sizes", [[1] * 40, [40], [15, 1, 16, 8], [16, 16, 8], [3, 30, 7], [17, 23]], ids=str)
def test_sums_of_groups_around_chunks(monkeypatch, sizes: list[int]) -> None:
    # Chunks of 16 rows in tiles of 4, of which a second kernel adds up two pieces at a time.
    monkeypatch.setattr(group_sums, "_ROWS", 16)
    monkeypatch.setattr(group_sums, "_PIECES", 2)
    monkeypatch.setattr(group_sums, "_INTERPRETER_TILE_ROWS", 4)
    generator = torch.Generator().manual_seed(1)
    ids = torch.repeat_interleave(torch.arange(len(sizes)) * 40 // len(sizes), torch.tensor(sizes)).int()
    ids = ids[torch.randperm(40, generator=generator)]
    hat, weight = torch.randn(40, 320, generator=generator), torch.randn(33, generator=generator)
    weighted = hat.double().clone()
    weighted[:33] *= weight[:, None]
    weighted[33:] = 0.0
    with poisoned_memory():
        total, table, bounds = group_sums.group_sums([hat.to(DEVICE)], [ids.to(DEVICE)], 40, weight.to(DEVICE))
    counts = torch.zeros(41, dtype=torch.int64).index_add_(0, ids.long(), torch.ones(40, dtype=torch.int64))
    begins, ends = bounds[0].cpu()
    assert torch.equal(ends - begins, counts.int())
    for kind, rows in enumerate((hat.double(), weighted)):
        sums = torch.zeros(41, 320, dtype=torch.float64).index_add_(0, ids.long(), rows)
        for result, expected in ((total[0, kind], rows.sum(0)), (table[0, kind][counts > 0], sums[counts > 0])):
            torch.testing.assert_close(result.cpu().double(), expected, rtol=1e-5, atol=1e-5)


def test_sums_of_two_sides(monkeypatch) -> None:
    monkeypatch.setattr(group_sums, "_ROWS", 16)
    hats = [torch.randn(n, 64, device=DEVICE) for n in (35, 20)]
    ids = [torch.arange(n, dtype=torch.int32, device=DEVICE) * 7 % 3 for n in (35, 20)]
    both = group_sums.group_sums(hats, ids, 20)
    for side in (0, 1):
        alone = group_sums.group_sums(hats[side : side + 1], ids[side : side + 1], 20)
        assert torch.equal(both.total[side], alone.total[0])
        assert torch.equal(both.bounds[side], alone.bounds[0])
        assert torch.equal(both.table[side, :, :3], alone.table[0, :, :3])


@pytest.mark.parametrize("features", [1, 3, 8, 40, 1000, 4096])
def test_any_number_of_features(features: int) -> None:
    x, y = make_features(Case("", 9, 11, features), torch.float32, DEVICE)
    x, y = x.T.contiguous().T, y[:, ::1]
    x_hat, inv_norm, _ = perturb_normalize(x)
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
    def words_kernel(seed, out, first_row, noise_stream, GROUPS: tl.constexpr):
        row = first_row + tl.arange(0, 8).to(tl.int64)
        words = normalize._noise_words(tl.load(seed), row[:, None], tl.arange(0, GROUPS)[None, :], noise_stream)
        place = (tl.arange(0, 8) * GROUPS * 4)[:, None] + (tl.arange(0, GROUPS) * 4)[None, :]
        for lane in tl.static_range(4):
            tl.store(out + place + lane, words[lane].to(tl.int64))

    seed = torch.tensor((77 << 40) + 123456789, device=DEVICE)
    out = torch.empty((8, 32), dtype=torch.int64, device=DEVICE)
    words_kernel[(1,)](seed, out, first_row, TEXTS, GROUPS=8)
    assert torch.equal(out & 0xFFFFFFFF, random_bits(seed, TEXTS, first_row, 8, 32))


@pytest.mark.parametrize(("relative", "rtol"), [(False, 1e-5), (True, 1e-5)])
def test_noise_is_the_references(relative: bool, rtol: float) -> None:
    x, _ = make_features(Case("", 21, 21, 50), torch.float32, DEVICE)
    seed, std = torch.tensor(987654321987, device=DEVICE), torch.tensor(0.5, device=DEVICE)
    x_hat, _, _ = perturb_normalize(x, seed, std, TEXTS, relative)
    noise = {"seed": seed, "noise_stream": TEXTS, "noise_std": 0.5, "relative_noise": relative}
    truth = reference.perturb_normalize(x.double(), **noise)
    assert ((x_hat.double()[:, :50] - truth).norm(dim=1) <= rtol).all()


@pytest.mark.parametrize("tiles_merged", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("length", [1, 33])
def test_merge(tiles_merged: int, length: int) -> None:
    generator = torch.Generator().manual_seed(tiles_merged)
    partial, lse = (300 * torch.randn(*shape, generator=generator) for shape in ((tiles_merged, length), (length,)))
    partial[:: tiles_merged // 2 + 1] = -math.inf
    lse[::3] = -math.inf
    if length > 1:  # nothing at all, and a NaN that is no maximum
        partial[:, 3], partial[tiles_merged // 3, 4] = -math.inf, math.nan
    expected = torch.cat([partial.double() * math.log(2), lse.double()[None]]).logsumexp(0)
    results = [lse.clone().to(DEVICE) for _ in range(2)]
    for result in results:
        stats._merge(partial.to(DEVICE), result)
    assert torch.equal(results[0].view(torch.int32), results[1].view(torch.int32))
    torch.testing.assert_close(results[0].cpu().double(), expected, rtol=1e-6, atol=1e-5, equal_nan=True)


def test_nan_survives_the_waves(monkeypatch) -> None:
    # The columns' sums of the first wave are NaN: merging the later waves must not lose that.
    monkeypatch.setattr(stats, "WORKSPACE_BYTES", 1)
    x, y = make_features(Case("", 100, 130, 24), torch.float32, DEVICE)
    x[3, 5] = math.nan
    x_hat, y_hat = perturb_normalize(x)[0], perturb_normalize(y)[0]
    for scale in (14.3, 1000.0):
        scale_tensor = torch.tensor(scale, device=DEVICE)
        ids = None, None, False
        row_lse, col_lse, _ = ops.contrastive_stats(x_hat, y_hat, scale_tensor, *ids, col_count=130, backend="triton")
        assert row_lse.isnan().nonzero().flatten().tolist() == [3]
        assert col_lse.isnan().all()


EXTREMES = [(1, 1_000_000), (8, 10_000_000), (65_536, 65_536), (1_000_000, 1_000_000), (1, 1)]


@pytest.mark.parametrize("multiple", [1, 32, 256])
def test_even_blocks_cover_everything_without_a_tiny_tail(multiple: int) -> None:
    for total in (1, 8, 100, 65_536, 65_537, 10_000_000):
        for largest in (7, 64, 11_585, 20_000_000):
            size = even_block(total, largest, multiple)
            parts = [part.stop - part.start for part in blocks(total, size)]
            assert size % multiple == 0
            assert size <= max(largest, multiple)
            assert sum(parts) == total
            assert set(parts[:-1]) <= {size}
            assert parts[-1] > size - len(parts) * multiple


@pytest.mark.parametrize(("rows", "columns"), EXTREMES)
@pytest.mark.parametrize("tile", [(1, 1), (32, 64), (256, 128)])
@pytest.mark.parametrize("elements", [1, 64 * 64, grads.WORKSPACE_BYTES // 4, grads.WORKSPACE_BYTES // 2, 2**35])
def test_a_gradient_block_keeps_its_budget(elements: int, tile: tuple[int, int], rows: int, columns: int) -> None:
    for processors in (1, 132):
        height, width = gradient_block(rows, columns, 512, elements, *tile, processors)
        assert height % tile[0] == 0
        assert width % tile[1] == 0
        assert height * width <= max(elements, tile[0] * tile[1])
        assert tile[0] * width < 2**31
        # none is larger than what it covers, up to whole tiles, and few make G: it is near square, or as long as a side
        assert height <= round_up(rows, tile[0])
        assert width <= round_up(columns, tile[1])
        if elements >= 2**16 * tile[0] * tile[1]:
            assert height * width >= min(elements, round_up(rows, tile[0]) * round_up(columns, tile[1])) / 5


@pytest.mark.parametrize("width", [512, 768, 1024])
@pytest.mark.parametrize("rows", [16_384, 32_768, 65_536, 262_144, 1_000_000])
def test_products_of_a_gradient_block_fill_the_chip(rows: int, width: int) -> None:
    # An even split at D = 512 gave 11,008 rows: 172 tiles on 132 processors, whose second wave was three quarters idle.
    sides = gradient_block(rows, rows, width, 2**27, 256, 256, 132)
    for size in sides:
        tiles = -(-size // 128) * -(-width // 256)
        assert tiles / (132 * -(-tiles // 132)) >= 0.85
    assert max(sides) <= 4 * min(sides)


def test_every_architecture_has_a_tile() -> None:
    for dtype in (torch.float16, torch.float32):
        assert {capability for capability, known in tiles.TILES if known == dtype} == {80, 90, 100, 120}
        chosen = {
            capability: tiles.tile_of_capability(capability, dtype) for capability in (80, 86, 89, 90, 103, 110, 121)
        }
        assert chosen[86] == chosen[89] == chosen[80] == tiles.TILES[80, dtype]
        assert chosen[103] == chosen[110] == tiles.TILES[100, dtype]
        assert chosen[121] == tiles.TILES[120, dtype]
