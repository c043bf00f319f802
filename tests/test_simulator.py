"""csrc/cuda on the simulator of tests/ptx_simulator: nvcc's PTX of every kernel behind its own host code and Python.

What remains for a real GPU is in tests/test_gpu.py: speed, the memory model, and what PTX becomes in the assembler.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch

from modest_align_kernels import dispatch, modest_align_loss, noise, ops
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
from tests.ptx_simulator import runtime
from tests.ptx_simulator.machine import Launch, Order, Program, Run
from tests.ptx_simulator.memory import Fault, Memory
from tests.ptx_simulator.parser import entry_names, parse


def why_not() -> str | None:
    if importlib.util.find_spec("modest_align_kernels._C") is None:
        return "the extension is not built"
    return runtime.why_not()


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
# What each operator writes of its contract's structs; the other two write their other arguments.
RESULTS = {
    "perturb_normalize": ("x_hat", "inv_norm", "pair_dot"),
    "perturb_normalize_backward": ("dx", "row_dot"),
    "pair_losses": (
        *("losses", "row_weight", "col_weight", "pair_weight"),
        *("slope", "row_negative_weight", "col_negative_weight"),
    ),
}


@pytest.fixture(scope="module")
def simulator() -> runtime.Device:
    return runtime.Device()


def behind_native(simulator: runtime.Device, monkeypatch: pytest.MonkeyPatch) -> runtime.Device:
    """The native backend as it is on a GPU, on CPU tensors."""
    from modest_align_kernels.backends import eager
    from modest_align_kernels.backends.native import cuda

    def kernel(name: str, backend: str, device_type: str):
        if backend == "eager":
            return getattr(eager, name)

        def run(*arguments) -> None:
            fields = [f for a in arguments if isinstance(a, tuple) for f in a._asdict().items()]
            with simulator.allocations(*(value for key, value in fields if key not in RESULTS.get(name, ()))):
                getattr(cuda, name)(*arguments)

        return run

    monkeypatch.setattr(cuda, "_C", simulator.extension)
    monkeypatch.setattr(cuda, "_where", lambda device: {"device": 0, "cuda_stream": 0})
    monkeypatch.setattr(ops, "_kernel", kernel)
    monkeypatch.setattr(dispatch, "operand_dtype", lambda *args: torch.float16)
    torch.manual_seed(0)
    simulator.order = Order()
    simulator.set_processors(132)
    simulator.launches.clear()
    return simulator


@pytest.fixture
def device(simulator: runtime.Device, monkeypatch: pytest.MonkeyPatch) -> runtime.Device:
    return behind_native(simulator, monkeypatch)


def tiles_launched(device: runtime.Device) -> set[tuple[int, int]]:
    """The columns of the tiles and the blocks of the grids of matmuls so far."""
    matmuls = [(re.search(r"TileILi(\d+)E", name), blocks) for name, blocks, _ in device.launches]
    return {(int(columns[1]), blocks) for columns, blocks in matmuls if columns}


def native_loss(*args, **kwargs):
    return modest_align_loss(*args, backend="native", **kwargs)


QUICK_CASES = {
    "one pair with extra negatives",
    "one direction",
    "groups of rows and columns",
    "a single group: no negatives",
    "scale 1000",
    "confident rows",
    "antipodal rows at scale 100",
}


@pytest.mark.parametrize(
    "case", [c if c.regime in QUICK_CASES else pytest.param(c, marks=pytest.mark.slow) for c in CASES], ids=str
)
def test_error_budget(device, case: Case) -> None:
    with poisoned_memory():
        assert_within_budget(native_loss, case, torch.float16, seeds=2)


# Around a warp's 16 rows, a warp group's 64, a tile's 128 rows and 128 columns.
SHAPES = [(1, 1), (16, 17), (64, 64), (65, 128), (140, 256), (128, 129), (129, 257), (257, 300)]


@pytest.mark.parametrize(("shape", "groups"), slow_but({((65, 128), 0), ((129, 257), 40)}, SHAPES, (0, 40)))
def test_around_warps_and_tiles(device, shape: tuple[int, int], groups: int) -> None:
    rows, columns = shape
    ids = [torch.randint(groups, (n,), dtype=torch.int32) for n in shape] if groups else [None, None]
    for col_count, diagonal in ((rows, True), (columns, False), (0 if rows == 65 else 3 * columns // 4, True)):
        assert_like_eager(*operands(*shape, 64, 20.0), *ids, col_count, "native", diagonal)


@pytest.mark.slow
def test_tiles_of_256_columns(device) -> None:
    device.order = Order(warps=4)
    ids = (torch.randint(300, (n,), dtype=torch.int32) for n in (1409, 3080))
    assert_like_eager(*operands(1409, 3080, 64, 20.0), *ids, 3000, "native")
    assert {width for width, _ in tiles_launched(device)} == {256}


@pytest.mark.parametrize(("seed", "late"), slow_but({(1, 0.5)}, range(4), (0.0, 0.5, 1.0)))
def test_any_order_of_warps_copies_and_products(device, seed: int, late: float) -> None:
    # 20 blocks of 64 features: the pipeline's stages go round several times.
    device.order = Order(seed, warps=1, late=late)
    assert_like_eager(*operands(140, 256, 1280, 20.0), None, None, 140, "native")


@pytest.mark.parametrize("processors", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_blocks_with_several_tiles(device, processors: int) -> None:
    device.set_processors(processors)
    device.order = Order(3, warps=1)
    assert_like_eager(*operands(300, 400, 128, 20.0), None, None, 300, "native")
    assert max(blocks for name, blocks, _ in device.launches if "Tile" in name) == processors


@pytest.mark.parametrize(("scale", "col_count"), slow_but({(14.3, 600)}, (14.3, 1000.0), (700, 600, 0)))
def test_several_waves(device, monkeypatch: pytest.MonkeyPatch, scale: float, col_count: int) -> None:
    from modest_align_kernels.backends.native import cuda

    # So little memory that rows come 256 at a time, and gradients in blocks of 256 x 256.
    monkeypatch.setattr(cuda, "WORKSPACE_BYTES", 2 * 256 * 256)
    x_hat, y_hat, scale = operands(600, 700, 128, scale)
    given = {"x_hat": x_hat, "y_hat": y_hat, "scale": scale, "row_ids": None, "col_ids": None}
    given |= {"exclude_diagonal": True, "exponentials": None, "device": 0, "cuda_stream": 0, "workspace_bytes": 1}
    results = {"row_lse": torch.empty(600), "col_lse": torch.empty(col_count)}
    size = cuda._C.cuda_contrastive_stats_workspace(**given, **results)
    assert size == 4 * (6 * 256 + 4 * col_count)
    ids = (torch.randint(100, (n,), dtype=torch.int32) for n in (600, 700))
    assert_like_eager(x_hat, y_hat, scale, *ids, col_count, "native")


@pytest.mark.parametrize(
    ("scale", "geometry"),
    slow_but(
        {(100.0, "antipodal"), (1e4, "pairs")}, (78.0, 79.0, 100.0, 1e4), ("antipodal", "pairs", "random", "identical")
    ),
)
def test_exponentials_that_vanish(device, scale: float, geometry: str) -> None:
    assert_like_eager(*operands(70, 150, 64, scale, geometry), None, None, 70, "native")


def test_rows_and_columns_of_which_all_is_excluded(device) -> None:
    row_ids, col_ids = torch.arange(70, dtype=torch.int32), torch.arange(150, dtype=torch.int32) % 70
    row_ids[5], col_ids[:] = 150, 150
    col_ids[9] = 3
    for scale in (20.0, 1000.0):
        assert_like_eager(*operands(70, 150, 64, scale), row_ids, col_ids, 150, "native", False)


@pytest.mark.parametrize("shape", [(5, 6, 1100), (66, 70, 64)], ids=str)
def test_another_order_gives_the_same_bits(device, shape: tuple[int, int, int]) -> None:
    x, y = make_features(Case("", *shape), torch.float16)
    results = []
    for order in (Order(1, warps=4), Order(2, warps=1, late=0.9)):
        device.order = order
        torch.manual_seed(0)
        image, text = x.clone().requires_grad_(), y.clone().requires_grad_()
        options = {"noise_std": 0.1, "relative_noise": True, "smoothing": 0.1, "group_ids": torch.arange(len(x)) // 2}
        loss = native_loss(image, text, 100.0, **options)
        results.append((loss, *torch.autograd.grad(loss, (image, text))))
    for ours, other in zip(*results, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("scale", [14.3, 1000.0])
def test_a_nan_comes_through_the_waves(device, monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    from modest_align_kernels.backends.native import cuda

    # The columns' sums of the first wave are NaN: merging the second must not lose that.
    monkeypatch.setattr(cuda, "WORKSPACE_BYTES", 1)
    x_hat, y_hat, scale = operands(300, 130, 64, scale, "random")
    x_hat[3, 5] = torch.nan
    excluded = None, None, False
    row_lse, col_lse, _ = ops.contrastive_stats(x_hat, y_hat, scale, *excluded, col_count=130, backend="native")
    assert row_lse.isnan().nonzero().flatten().tolist() == [3]
    assert col_lse.isnan().all()
    x, y = make_features(Case("", 20, 30, 40), torch.float16)
    x[3, 5] = torch.nan
    assert native_loss(x, y, scale).isnan()


@pytest.fixture(scope="module", params=["pingpong64", "pingpong128", "stagger"])
def experimental(request: pytest.FixtureRequest) -> runtime.Device:
    """A build of csrc/experiment.h."""
    simulator = runtime.Device(request.param)
    assert simulator.extension.experiment == request.param
    return simulator


@pytest.fixture
def experiment(experimental: runtime.Device, monkeypatch: pytest.MonkeyPatch) -> runtime.Device:
    return behind_native(experimental, monkeypatch)


# How many blocks a cluster has, and the columns of narrow and wide tiles.
EXPERIMENTS = {"pingpong64": (4, 128, 256), "pingpong128": (4, 64, 128), "stagger": (2, 128, 256)}


@pytest.mark.slow
@pytest.mark.parametrize("groups", [0, 40])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_experiments_around_warps_and_tiles(experiment, shape: tuple[int, int], groups: int) -> None:
    rows, columns = shape
    ids = [torch.randint(groups, (n,), dtype=torch.int32) for n in shape] if groups else [None, None]
    for col_count, diagonal in ((rows, True), (columns, False), (0 if rows == 65 else 3 * columns // 4, True)):
        assert_like_eager(*operands(*shape, 64, 20.0), *ids, col_count, "native", diagonal)


# A block's warp groups take turns at tiles, and more than one each.
@pytest.mark.slow
@pytest.mark.parametrize("late", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("features", [64, 1280])
def test_experiments_with_several_tiles_a_block(experiment, features: int, late: float) -> None:
    blocks, narrow, _ = EXPERIMENTS[experiment.extension.experiment]
    experiment.set_processors(blocks)
    experiment.order = Order(int(10 * late), warps=1, late=late)
    assert_like_eager(*operands(300, 700 if features == 64 else 300, features, 20.0), None, None, 300, "native")
    assert tiles_launched(experiment) == {(narrow, blocks)}


@pytest.mark.slow
@pytest.mark.parametrize("geometry", ["antipodal", "pairs", "random"])
@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_experiments_where_exponentials_vanish(experiment, scale: float, geometry: str) -> None:
    assert_like_eager(*operands(290, 300, 64, scale, geometry), None, None, 290, "native")


@pytest.mark.slow
def test_experiments_in_waves(experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    from modest_align_kernels.backends.native import cuda

    monkeypatch.setattr(cuda, "WORKSPACE_BYTES", 2 * 256 * 256)
    assert_like_eager(*operands(600, 700, 128, 1000.0), None, None, 700, "native")


@pytest.mark.slow
def test_experiments_with_wide_tiles(experiment) -> None:
    experiment.order = Order(warps=4)
    ids = (torch.randint(300, (n,), dtype=torch.int32) for n in (1409, 3080))
    assert_like_eager(*operands(1409, 3080, 64, 20.0), *ids, 3000, "native")
    assert {width for width, _ in tiles_launched(experiment)} == {EXPERIMENTS[experiment.extension.experiment][2]}


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if c.regime in QUICK_CASES], ids=str)
def test_experiments_keep_the_error_budget(experiment, case: Case) -> None:
    with poisoned_memory():
        assert_within_budget(native_loss, case, torch.float16, seeds=1)


# Widths up to 1,024 are a warp's, others a block's; the odd ones are not aligned to 16 bytes.
@pytest.mark.parametrize(
    ("dtype", "features"),
    slow_but(
        {(torch.float32, 512), (torch.float16, 77), (torch.bfloat16, 1025)},
        (torch.float32, torch.float16, torch.bfloat16),
        (1, 8, 77, 512, 1024, 1025, 3000, 16384),
    ),
)
def test_rows_of_any_width(device, dtype: torch.dtype, features: int) -> None:
    device.order = Order(warps=8)
    assert_rows_like_eager(dtype, features, "native")


def pairs_and_sums(shape: tuple[int, int, int], groups: str, smoothing: float | None = 0.3) -> None:
    hats, ids = operands(*shape, 14.3)[:2], numbered_groups(groups, *shape[:2])
    for col_count in (shape[0], 0):
        assert_pairs_like_eager(*hats, *ids, smoothing, col_count, "native")
    assert_sides_like_eager(*hats, *ids, smoothing, shape[2], torch.float16, "native")


# Around the 64 rows that a warp sums, its 256 features, and the 128 of a block that adds up what warps leave.
@pytest.mark.parametrize(
    ("shape", "groups"),
    slow_but(
        {((70, 200, 320), "large groups"), ((40, 65, 64), "groups")},
        ((1, 1, 64), (40, 65, 64), (64, 128, 256), (70, 200, 320), (30, 700, 1088)),
        GROUP_PATTERNS,
    ),
)
def test_pairs_and_sums(device, shape: tuple[int, int, int], groups: str) -> None:
    device.order = Order(warps=8)
    pairs_and_sums(shape, groups)


@pytest.mark.parametrize(("smoothing", "launches"), [(None, 1), (0.3, 3)])
def test_launches(device, smoothing: float | None, launches: int) -> None:
    pairs_and_sums((9, 11, 64), "groups", smoothing)
    # Losses in both directions and in one, the backward of both sides.
    assert len(device.launches) == 4 * launches
    for kernel in ("pair_losses_kernel", "perturb_normalize_backward_kernel"):
        assert sum(kernel in name for name, *_ in device.launches) == 2


@pytest.mark.parametrize("features", [40, 1100])
def test_noise_is_the_references(device, features: int) -> None:
    seed, zero = torch.tensor(-123456789), torch.zeros(5, features)
    x_hat, inv_norm, _ = ops.perturb_normalize(
        *(zero, seed, torch.tensor(1.0), noise.TEXTS, False, None), operand_dtype=torch.float16, backend="native"
    )
    expected = noise.gaussian_noise(seed, noise.TEXTS, 0, 5, features)
    # float16's precision of x_hat; below its normal numbers that of the smallest.
    torch.testing.assert_close(x_hat[:, :features].double() / inv_norm[:, None], expected, rtol=1e-3, atol=1e-5)


def test_a_status_becomes_a_sentence(device, monkeypatch) -> None:
    from modest_align_kernels.backends.native import cuda

    monkeypatch.setattr(cuda, "_where", lambda device: {"device": 7, "cuda_stream": 0})
    with pytest.raises(RuntimeError, match=r"perturb_normalize\(rows=3, features=64, width=64\): CUDA error 101, "):
        ops.perturb_normalize(
            *(torch.ones(3, 64), None, None, 0, False, None), operand_dtype=torch.float16, backend="native"
        )


def normalized(features: int) -> None:
    x, _ = make_features(Case("", 9, 9, features), torch.float16)
    seed, std = torch.tensor(5), torch.tensor(0.5)
    ours, expected = (
        ops.perturb_normalize(x.to(d), seed, std.to(w), 0, True, None, operand_dtype=o, backend=b)[0]
        for d, w, o, b in (
            (torch.float16, torch.float32, torch.float16, "native"),
            (torch.float64, torch.float64, torch.float64, "eager"),
        )
    )
    assert ((ours[:, :features].double() - expected).norm(dim=1) <= 6e-4).all()


def products(*shape_and_scale: int | float | str, col_count: int | None = None) -> None:
    x_hat, y_hat, scale = operands(*shape_and_scale)
    assert_like_eager(x_hat, y_hat, scale, None, None, len(x_hat) if col_count is None else col_count, "native")


# A kernel, what of its PTX is replaced by what, in which of its places (from 0), and a run that has to fail.
STATS, GRADS, LONG_ROWS = "StatsTileILi128", "GradsTileILi128", "perturb_normalize_kernelI6__halfLi256"
AWAIT = r"(mbarrier\.try_wait\.parity\.shared::cta\.b64 P1, \[%r\d+\]), %r\d+"
PLANTED: dict[str, tuple[str, str, str, int, Callable[[], None]]] = {
    "columns are read before all warps have written them": (
        STATS,
        r"barrier\.cta\.red\.or\.pred out, [^;]*;",
        "mov.pred out, in;",
        0,
        partial(products, 300, 400, 64, 20.0),
    ),
    "careful columns are read before all warps have written them": (
        STATS,
        r"barrier\.cta\.sync [^;]*;",
        "",
        1,
        partial(products, 129, 257, 64, 1e4, "antipodal"),
    ),
    "the last products are not waited for": (
        GRADS,
        r"wgmma\.wait_group\.sync\.aligned 0;",
        "",
        0,
        partial(products, 65, 128, 192, 20.0),
    ),
    "a stage is released while it is read": (
        GRADS,
        r"wgmma\.wait_group\.sync\.aligned 1;",
        "wgmma.wait_group.sync.aligned 2;",
        0,
        partial(products, 140, 256, 1280, 20.0),
    ),
    "a stage is not released": (
        STATS,
        r"mbarrier\.arrive\.shared::cluster\.b64\s+_, \[remAddr32\];",
        "",
        0,
        partial(products, 65, 128, 1280, 20.0),
    ),
    "a stage is released twice": (
        STATS,
        r"(mbarrier\.arrive\.shared::cluster\.b64\s+_, \[remAddr32\];)",
        r"\1 \1",
        0,
        partial(products, 65, 128, 1280, 20.0),
    ),
    "a phase that does not change": (STATS, AWAIT, r"\1, 0", 3, partial(products, 65, 128, 1280, 20.0)),
    "a stage is read before it is full": (
        GRADS,
        r"mbarrier\.arrive\.expect_tx\.shared::cta\.b64 _, (\[%r\d+\]), %r\d+;",
        r"mbarrier.arrive.shared::cta.b64 _, \1;",
        0,
        partial(products, 65, 128, 192, 20.0),
    ),
    "a block begins before its partner has initialised its barriers": (
        STATS,
        r"barrier\.cluster\.wait\.aligned;",
        "",
        0,
        partial(products, 140, 256, 576, 20.0),
    ),
    "a step of the operands that is too long": (
        STATS,
        r"(add\.s32\s+%r\d+, %r\d+), 2;(\s+mov\.b64\s+%rd\d+, \{)",
        r"\1, 4;\2",
        0,
        partial(products, 65, 128, 64, 20.0),
    ),
    "a row of partial sums in another's place": (
        STATS,
        r"(st\.global\.f32\s+\[%rd\d+\+)32\]",
        r"\g<1>36]",
        0,
        partial(products, 65, 128, 64, 20.0),
    ),
    "columns that do not exist are summed": (
        STATS,
        r"setp\.ge\.s32\s+(%p\d+), %r\d+, %r\d+;",
        r"setp.ne.s32 \1, 0, 0;",
        5,
        partial(products, 65, 2, 64, 20.0, "random", col_count=2),
    ),
    "slices are merged before all have been written": (
        "merge_kernel",
        r"bar\.sync\s+0;",
        "",
        0,
        partial(products, 65, 1100, 64, 20.0),
    ),
    "a row is summed before all warps have added to it": (
        LONG_ROWS,
        r"bar\.sync\s+0;",
        "",
        1,
        partial(normalized, 1032),
    ),
    "a sum is overwritten before all warps have read it": (
        LONG_ROWS,
        r"bar\.sync\s+0;",
        "",
        2,
        partial(normalized, 1032),
    ),
    "features past a row's end are loaded": (
        LONG_ROWS,
        r"setp\.ge\.s32\s+(%p\d+), %r\d+, %r\d+;",
        r"setp.ne.s32 \1, 0, 0;",
        0,
        partial(normalized, 1032),
    ),
    "pieces of a run are added up before all warps have theirs": (
        "fold_sums_kernel",
        r"bar\.sync\s+0;",
        "",
        0,
        partial(pairs_and_sums, (30, 700, 64), "large groups"),
    ),
    "the row of another lane": (
        "group_sums_kernel",
        r"(shfl\.sync\.idx\.b32\s+%r\d+\|%p\d+, %r\d+), %r\d+,",
        r"\1, 0,",
        1,
        partial(pairs_and_sums, (30, 70, 64), "groups"),
    ),
    "another random number": (LONG_ROWS, r"3528531795", "3528531797", 0, partial(normalized, 1032)),
}
QUICK = {"the last products are not waited for", "a row is summed before all warps have added to it"}


def assert_caught(
    device: runtime.Device,
    monkeypatch: pytest.MonkeyPatch,
    kernel: str,
    pattern: str,
    replacement: str,
    place: int,
    run: Callable[[], None],
) -> None:
    text = device.ptx
    name = next(name for name in entry_names(text) if kernel in name)
    start = text.index(f".entry {name}(")
    found = list(re.finditer(pattern, text[start:]))[place]
    planted = text[: start + found.start()] + found.expand(replacement) + text[start + found.end() :]
    monkeypatch.setitem(device.programs, name, Program(parse(planted, name)))
    caught = []
    for seed in range(3):
        device.order = Order(seed, warps=1)
        torch.manual_seed(seed)
        try:
            run()
        except AssertionError as error:
            caught.append(str(error))
        except RuntimeError as error:
            caught.append(str(error))
        if caught:
            break
    assert caught
    assert "CUDA error" not in caught[0] or ", Fault: " in caught[0]  # not a limit of the simulator


@pytest.mark.parametrize("bug", [b if b in QUICK else pytest.param(b, marks=pytest.mark.slow) for b in PLANTED])
def test_planted_bugs_are_caught(device, monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    assert_caught(device, monkeypatch, *PLANTED[bug])


@pytest.mark.slow
@pytest.mark.parametrize("experimental", ["pingpong64", "pingpong128"], indirect=True)
@pytest.mark.parametrize(
    "bug",
    [
        r"mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];",  # the tensor cores are not handed on
        r"wgmma\.wait_group\.sync\.aligned 0;",  # the last products are not waited for
    ],
    ids=["turn", "products"],
)
def test_planted_bugs_in_pingpong_are_caught(experiment, monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    blocks, narrow, _ = EXPERIMENTS[experiment.extension.experiment]
    experiment.set_processors(blocks)
    run = partial(products, 300, 300, 192, 20.0)
    assert_caught(experiment, monkeypatch, f"StatsTileILi{narrow}", bug, "", 0, run)


PROBE = """
.visible .entry probe(.param .u64 out, .param .u64 constant)
{
.reg .pred %p<3>;
.reg .b32 %r<5>;
.reg .b64 %rd<5>;
.shared .align 8 .b8 room[64];
ld.param.u64 %rd1, [out];
ld.param.u64 %rd2, [constant];
mov.u32 %r1, %tid.x;
mov.u32 %r2, room;
BODY
DONE:
ret;
}
"""


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("st.global.u32 [%rd1+124], %r1;", None),
        ("st.global.u32 [%rd1+128], %r1;", "bytes 128 to 132 of out, which has 128"),
        ("ld.global.u32 %r3, [%rd1+-4];", "where nothing is|bytes"),
        ("st.global.u32 [%rd1+2], %r1;", "misaligned access of 4 bytes"),
        ("ld.global.v2.u32 {%r3, %r4}, [%rd1+4];", "misaligned access of 8 bytes"),
        ("st.global.u32 [%rd2], %r1;", "write to constant"),
        ("st.shared.u32 [%r2+64], %r1;", "bytes 64 to 68 of shared memory"),
        ("setp.lt.u32 %p1, %r1, 5; @%p1 shfl.sync.bfly.b32 %r3|%p2, %r1, 1, 31, -1;", "diverged"),
        ("setp.lt.u32 %p1, %r1, 5; @%p1 bar.sync 0;", "diverged"),
        ("setp.lt.u32 %p1, %r1, 32; @%p1 bra DONE; bar.sync 0;", "deadlock: warps 1 to 1 .* at bar.sync 0"),
        ("bar.sync 0, 20;", "met as one of 20"),
        ("mbarrier.arrive.shared::cta.b64 _, [%r2];", "was not initialised"),
        ("mbarrier.init.shared::cta.b64 [%r2+4], 1;", "an mbarrier at"),
        (
            "mbarrier.init.shared::cta.b64 [%r2], 1; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 16;",
            "more arrivals",
        ),
        (
            "mbarrier.init.shared::cta.b64 [%r2], 1;"
            "AGAIN: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r2], 0; @!%p1 bra AGAIN;",
            "deadlock",
        ),
    ],
)
def test_faults(body: str, fault: str | None) -> None:
    out, constant = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    memory = Memory()
    memory.add_host(out.ctypes.data, out.nbytes, "out", writable=True)
    memory.add_host(constant.ctypes.data, constant.nbytes, "constant", writable=False)
    kernel = parse(PROBE.replace("BODY", body), "probe")
    parameters = np.array([out.ctypes.data, constant.ctypes.data]).tobytes()
    run = Run(Program(kernel), Launch(kernel, parameters, (1, 1, 1), (64, 1, 1)), memory, Order(warps=1))
    with pytest.raises(Fault, match=fault) if fault else nullcontext():
        run.execute()
    assert fault or out[31] in (31, 63)
