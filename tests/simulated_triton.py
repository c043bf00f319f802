"""What Triton compiles for an sm_90, by its own launches, on the simulator of tests/ptx_simulator.

Not collected by itself, for the suite's process has Triton's interpreter in it: test_simulator_triton.py runs this file
in another, as does `TRITON_INTERPRET=0 pytest tests/simulated_triton.py`.
"""

from __future__ import annotations

import os
import re
from importlib import import_module

import pytest
import torch

from modest_align_kernels import dispatch, modest_align_loss, noise
from modest_align_kernels.testing import CASES, Case, assert_within_budget, make_features, poisoned_memory
from tests.operator_checks import (
    GROUP_PATTERNS,
    assert_like_eager,
    assert_pairs_like_eager,
    assert_rows_like_eager,
    assert_sides_like_eager,
    numbered_groups,
    operands,
    slow_but,
)
from tests.ptx_simulator.machine import Order
from tests.ptx_simulator.memory import Fault

DTYPES = (torch.float16, torch.float32)
GROUPS = next(case for case in CASES if case.regime == "groups of rows and columns")
FILES = [
    ("contrastive_stats_kernel", "contrastive_stats"),
    ("merge_kernel", "contrastive_stats"),
    ("contrastive_grads_kernel", "contrastive_grads"),
    ("softmax_factors_kernel", "contrastive_grads"),
    ("fold_sums_kernel", "group_sums"),
    ("group_sums_kernel", "group_sums"),
    ("ids_bounds_kernel", "logits"),
    ("pair_losses_kernel", "pair_losses"),
    ("perturb_normalize_kernel", "perturb_normalize"),
    ("perturb_normalize_backward_kernel", "perturb_normalize"),
]


@pytest.fixture(scope="module")
def simulator():
    from tests.ptx_simulator.triton_driver import Driver

    assert os.environ.get("TRITON_INTERPRET") == "0"
    driver = Driver()
    driver.activate()
    return driver


@pytest.fixture
def driver(simulator, monkeypatch: pytest.MonkeyPatch):
    """The Triton backend as it is on a GPU, on CPU tensors."""
    tiles = import_module("modest_align_kernels.backends.triton.tiles")
    for name in ("contrastive_stats", "contrastive_grads"):
        module = import_module(f"modest_align_kernels.backends.triton.{name}")
        monkeypatch.setattr(module, "choose_tile", lambda device, dtype: tiles.TILES[90, dtype])
    group_sums = import_module("modest_align_kernels.backends.triton.group_sums")
    monkeypatch.setattr(group_sums, "_INTERPRETER_TILE_ROWS", group_sums._TILE_ROWS)
    monkeypatch.setattr(dispatch, "choose", lambda *args: "triton")
    torch.manual_seed(0)
    simulator.order, simulator.execute = Order(warps=4), True
    return simulator


def triton_loss(*args, **kwargs):
    return modest_align_loss(*args, backend="triton", **kwargs)


@pytest.mark.parametrize(("case", "dtype"), slow_but({(GROUPS, torch.float16)}, CASES, DTYPES))
def test_error_budget(driver, case: Case, dtype: torch.dtype) -> None:
    with poisoned_memory():
        assert_within_budget(triton_loss, case, dtype, seeds=2)


SHAPES = [(1, 1), (16, 17), (64, 64), (140, 256), (256, 128), (257, 129), (300, 400)]


@pytest.mark.parametrize(
    ("shape", "groups", "dtype"),
    slow_but({((140, 256), 40, torch.float16)}, SHAPES, (0, 40), DTYPES),
)
def test_around_tiles(driver, shape: tuple[int, int], groups: int, dtype: torch.dtype) -> None:
    columns = shape[1]
    ids = [torch.randint(groups, (n,), dtype=torch.int32) for n in shape] if groups else [None, None]
    for col_count, diagonal in ((min(shape), True), (columns, False), (0, True)):
        given = operands(*shape, 192, 20.0, "random", dtype)
        assert_like_eager(*given, *ids, col_count, "triton", diagonal)


@pytest.mark.parametrize(
    ("seed", "late", "dtype"), slow_but({(1, 0.5, torch.float16)}, range(3), (0.0, 0.5, 1.0), DTYPES)
)
def test_any_order_of_warps_copies_and_products(driver, seed: int, late: float, dtype: torch.dtype) -> None:
    driver.order = Order(seed, warps=1, late=late)
    assert_like_eager(*operands(70, 130, 512, 20.0, dtype=dtype), None, None, 70, "triton")


@pytest.mark.parametrize(
    ("scale", "geometry", "dtype"),
    slow_but({(1e4, "antipodal", torch.float16)}, (79.0, 100.0, 1e4), ("antipodal", "pairs", "identical"), DTYPES),
)
def test_exponentials_that_vanish(driver, scale: float, geometry: str, dtype: torch.dtype) -> None:
    assert_like_eager(*operands(70, 150, 64, scale, geometry, dtype), None, None, 70, "triton")


@pytest.mark.parametrize(("scale", "col_count"), slow_but({(14.3, 600)}, (14.3, 1000.0), (700, 600, 0)))
def test_several_waves(driver, monkeypatch: pytest.MonkeyPatch, scale: float, col_count: int) -> None:
    # So little memory that rows come 256 at a time, and gradients in blocks of a tile.
    for name in ("contrastive_stats", "contrastive_grads"):
        module = import_module(f"modest_align_kernels.backends.triton.{name}")
        monkeypatch.setattr(module, "WORKSPACE_BYTES", 1)
    ids = (torch.randint(100, (n,), dtype=torch.int32) for n in (600, 700))
    assert_like_eager(*operands(600, 700, 64, scale), *ids, col_count, "triton")


@pytest.mark.parametrize(
    ("dtype", "features"),
    slow_but(
        {(torch.float16, 77)},
        (torch.float32, torch.float16, torch.bfloat16),
        (1, 8, 40, 77, 512, 1024, 1025, 3000),
    ),
)
def test_rows_of_any_width(driver, dtype: torch.dtype, features: int) -> None:
    driver.order = Order(warps=8)
    assert_rows_like_eager(dtype, features, "triton")


# Around the 64 rows that a program sums, its 256 features, and once the 64 pieces of a run that another adds up.
@pytest.mark.parametrize(
    ("shape", "groups", "dtype"),
    [
        *slow_but(
            {((40, 65, 64), "groups", torch.float32)},
            ((1, 1, 64), (40, 65, 64), (64, 128, 256), (70, 200, 320)),
            GROUP_PATTERNS,
            DTYPES,
        ),
        pytest.param((10, 4300, 64), "one group", torch.float16, marks=pytest.mark.slow),
    ],
)
def test_pairs_and_sums(driver, shape: tuple[int, int, int], groups: str, dtype: torch.dtype) -> None:
    rows, columns, width = shape
    hats, ids = operands(*shape, 14.3, "pairs", dtype)[:2], numbered_groups(groups, rows, columns)
    for col_count in (rows, 0):
        assert_pairs_like_eager(*hats, *ids, 0.3, col_count, "triton")
    assert_sides_like_eager(*hats, *ids, 0.3, width, dtype, "triton")


@pytest.mark.parametrize("first_row", [0, 2**32 - 3])
def test_noise_has_the_references_integers(driver, first_row: int) -> None:
    import triton
    import triton.language as tl

    normalize = import_module("modest_align_kernels.backends.triton.perturb_normalize")

    @triton.jit
    def words_kernel(seed, out, first_row, noise_stream, GROUPS: tl.constexpr):
        row = first_row + tl.arange(0, 8).to(tl.int64)
        words = normalize._noise_words(tl.load(seed), row[:, None], tl.arange(0, GROUPS)[None, :], noise_stream)
        place = (tl.arange(0, 8) * GROUPS * 4)[:, None] + (tl.arange(0, GROUPS) * 4)[None, :]
        for lane in tl.static_range(4):
            tl.store(out + place + lane, words[lane].to(tl.int64))

    seed, out = torch.tensor((77 << 40) + 123456789), torch.empty((8, 32), dtype=torch.int64)
    words_kernel[(1,)](seed, out, first_row, noise.TEXTS, GROUPS=8)
    assert torch.equal(out & 0xFFFFFFFF, noise.random_bits(seed, noise.TEXTS, first_row, 8, 32))


def test_another_order_gives_the_same_bits(driver) -> None:
    x, y = make_features(Case("", 9, 12, 130), torch.float16)
    results = []
    for order in (Order(1, warps=4), Order(2, warps=1, late=0.9)):
        driver.order = order
        torch.manual_seed(0)
        image, text = x.clone().requires_grad_(), y.clone().requires_grad_()
        options = {"noise_std": 0.1, "relative_noise": True, "smoothing": 0.1, "group_ids": torch.arange(9) // 2}
        loss = triton_loss(image, text, 100.0, **options)
        results.append((loss, *torch.autograd.grad(loss, (image, text))))
    for ours, other in zip(*results, strict=True):
        assert torch.equal(ours, other)


def step(rows: int, features: int, dtype: torch.dtype, **options) -> None:
    x, y = (torch.randn(n, features).to(dtype).requires_grad_() for n in (rows, rows + 3))
    torch.autograd.grad(triton_loss(x, y, 14.3, **options), (x, y))


def test_what_is_compiled(driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for what a kernel is written for, and nothing for another number of rows."""
    driver.execute = False  # launches are enough
    monkeypatch.setattr(dispatch, "operand_dtype", lambda *args: torch.float16)
    kernels = {
        name: getattr(import_module(f"modest_align_kernels.backends.triton.{file}"), name) for name, file in FILES
    }
    for kernel in kernels.values():
        kernel.device_caches.clear()
    driver.compiled.clear()
    step(300, 512, torch.bfloat16)
    plain = dict.fromkeys(kernels.keys() - {"ids_bounds_kernel", "group_sums_kernel", "fold_sums_kernel"}, 1)
    assert driver.compiled == plain
    sums = {"group_sums_kernel": 1, "fold_sums_kernel": 1}
    smoothed = {"pair_losses_kernel": 1, "perturb_normalize_backward_kernel": 1}
    # of both sides without weights, and of one with them
    smoothed |= dict.fromkeys(sums, 2)
    groups = {"group_ids": torch.arange(300) // 2}
    for options, also in (
        ({"symmetric": False}, {}),
        ({"noise_std": 0.1}, {"perturb_normalize_kernel": 1}),
        ({"noise_std": 0.2}, {}),
        (
            groups,
            dict.fromkeys(("contrastive_stats_kernel", "contrastive_grads_kernel", "ids_bounds_kernel"), 1),
        ),
        ({"group_ids": (torch.arange(300) // 2, torch.arange(303) // 2)}, {}),
        ({"smoothing": 0.1}, smoothed),
        ({"smoothing": 0.2, "symmetric": False}, sums),
        ({"smoothing": 0.1, **groups}, smoothed),
        ({"smoothing": 0.1, "symmetric": False, **groups}, sums),
    ):
        before = driver.compiled.copy()
        step(300, 512, torch.bfloat16, **options)
        assert driver.compiled - before == also, options
    before = driver.compiled.copy()
    for rows in (1, 16, 64, 255, 256, 257, 1000, 1001):
        step(rows, 512, torch.bfloat16)
        step(rows, 512, torch.bfloat16, smoothing=0.1)
        step(rows, 512, torch.bfloat16, smoothing=0.1, group_ids=torch.arange(rows) // 2)
    assert driver.compiled == before
    before = driver.compiled.copy()
    for rows in (300, 301):
        step(rows, 1024, torch.bfloat16)
    assert driver.compiled - before == {"perturb_normalize_kernel": 1, "perturb_normalize_backward_kernel": 1}


@pytest.mark.parametrize(
    ("options", "launches"),
    [
        ({}, {"pair_losses_kernel": 1, "perturb_normalize_backward_kernel": 2}),
        (
            {"smoothing": 0.1},
            {
                "pair_losses_kernel": 1,
                "perturb_normalize_backward_kernel": 2,
                "group_sums_kernel": 3,
                "fold_sums_kernel": 3,
            },
        ),
    ],
    ids=["plain", "smoothed"],
)
def test_launches_of_a_step(driver, options: dict, launches: dict[str, int]) -> None:
    driver.execute = False
    for more in ({}, {"group_ids": torch.arange(30) // 2}, {"symmetric": False}):
        driver.launches.clear()
        step(30, 64, torch.float16, **options, **more)
        ours = ("pair_losses", "perturb_normalize_backward", "_sums")
        assert {k: v for k, v in driver.launches.items() if any(part in k for part in ours)} == launches


# What of a kernel's PTX is replaced by what, in which of its places (from 0).
PLANTED = {
    "copies are not waited for": (
        "contrastive_stats_kernel",
        r"cp\.async\.wait_group\s+2;",
        "cp.async.wait_group 9;",
        0,
    ),
    "products are not waited for": ("contrastive_grads_kernel", r"wgmma\.wait_group\.sync\.aligned 0;", "", 0),
    "a stage is overwritten while it is read": (
        *("contrastive_stats_kernel", r"wgmma\.wait_group\.sync\.aligned 1;", "wgmma.wait_group.sync.aligned 4;", 0),
    ),
    "warps do not wait for each other's copies": ("contrastive_stats_kernel", r"bar\.sync\s+0;", "", 0),
    "no barrier between the sums of warps": ("contrastive_stats_kernel", r"bar\.sync\s+0;", "", 12),
}


@pytest.mark.parametrize("bug", [b if "products" in b else pytest.param(b, marks=pytest.mark.slow) for b in PLANTED])
def test_planted_bugs_are_caught(driver, monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    kernel, pattern, replacement, place = PLANTED[bug]

    def edit(text: str) -> str:
        if f".entry {kernel}(" not in text:
            return text
        found = list(re.finditer(pattern, text))[place]
        return text[: found.start()] + replacement + text[found.end() :]

    monkeypatch.setattr(driver, "edit", edit)
    monkeypatch.setattr(driver, "programs", {})
    caught = []
    for seed in range(3):
        driver.order = Order(seed, warps=1)
        try:
            assert_like_eager(*operands(140, 150, 640, 20.0), None, None, 140, "triton")
        except (AssertionError, Fault) as error:
            caught.append(error)
            break
    assert caught
