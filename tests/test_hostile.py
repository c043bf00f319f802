"""Generated cases, hostile ones among them: every row within a bound that is derived, or NaN as the plain loss has it.

The bound is no tolerance. With unit roundings u of the operands and of float32, a logit is off by at most

    delta = scale * ((1 + u_operand)^2 - 1 + (8 + 2 sqrt(D)) u_float32)

(a third power where ``eager`` has PyTorch round products to bfloat16)
of which a pair's loss, and its smoothing's slope, see at most twice as much, and a probability a factor exp(2 delta).
A row's gradient is a sum of probabilities times unit rows, and its bound is that factor times the sum of their sizes.
The positive's part counts as 1 - p: rows that are nearly right are held to an error relative to what is left.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from modest_align_kernels import available_backends, contrastive_logsumexp, modest_align_loss, reference
from modest_align_kernels.dispatch import operand_dtype
from modest_align_kernels.testing import poisoned_memory

# A backend, and for native the instruction set: "native-avx2".
RUNS = [
    name for name, reason in available_backends("cpu").items() if reason is None and name not in ("native", "triton")
]
if available_backends("cpu")["native"] is None:
    from modest_align_kernels import _C

    RUNS += [f"native-{level}" for level in _C.cpu_levels()]
TRITON = pytest.mark.skipif(available_backends("cpu")["triton"] is not None, reason="Triton does not run here")
FLOAT32 = torch.finfo(torch.float32)
CPU = torch.device("cpu")

GEOMETRIES = ("random", "pairs", "near duplicates", "identical", "antipodal", "constant", "one-hot")
# What happens to a row, by the factor that it is multiplied with.
ROWS = {"huge": 1e30, "largest": 1e38, "tiny": 1e-30, "subnormal": 1e-40, "zero": 0.0}
SCALES = (*(10 ** (k / 4) for k in range(-12, 17)), 7.0, 14.3, 20.0, 25.0, 30.0, 40.0, 60.0, 69.4, 80.0, 138.6)
EXTREME_IDS = (-(2**63), 2**63 - 1, 0, -1, 2**31, 7)


@dataclasses.dataclass(frozen=True)
class Hostile:
    """What a case is made of; numbers come from the seed."""

    run: str
    dtype: torch.dtype
    rows: int
    extra: int
    features: int
    scale: float
    smoothing: float
    geometry: str
    changed: tuple[tuple[str, int, int], ...]  # of ROWS, the side, the row
    groups: str
    weights: str
    reduction: str
    symmetric: bool
    strides: str
    seed: int

    @property
    def backend(self) -> str:
        return self.run.split("-")[0]


@st.composite
def hostile(draw, runs: tuple[str, ...] = tuple(RUNS), largest: int = 20, changes: int = 3) -> Hostile:
    run = draw(st.sampled_from(runs))
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    if run == "eager":
        dtypes.append(torch.float64)
    if run == "triton":
        dtypes.remove(torch.bfloat16)  # whose operands are float16 there, and slow to interpret
    rows, extra = draw(st.integers(1, largest)), draw(st.integers(0, largest))
    changed = st.tuples(st.sampled_from(sorted(ROWS)), st.integers(0, 1), st.integers(0, 2 * largest))
    return Hostile(
        run,
        draw(st.sampled_from(dtypes)),
        rows,
        extra,
        draw(st.sampled_from((1, 2, 3, 8, 17, 40, 64, 65, 130))),
        draw(st.sampled_from(SCALES)),
        draw(st.sampled_from((0.0, 0.0, 0.1, 0.5, 1.0))),
        draw(st.sampled_from(GEOMETRIES)),
        tuple(draw(st.lists(changed, max_size=changes))) if draw(st.booleans()) else (),
        draw(st.sampled_from(("none", "none", "few", "one", "distinct", "rows and columns", "extreme"))),
        draw(st.sampled_from(("none", "none", "some are 0", "of all sizes", "bool"))),
        draw(st.sampled_from(("mean", "sum", "none"))),
        draw(st.booleans()),
        draw(st.sampled_from(("contiguous", "column-major", "every other", "overlapping"))),
        draw(st.integers(0, 2**31)),
    )


def make_side(case: Hostile, generator: torch.Generator, rows: int, pairs: Tensor | None) -> Tensor:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = rows, case.features
    side = normal(*shape)
    if case.geometry == "one-hot":
        side = F.one_hot(torch.randint(case.features, (rows,), generator=generator), case.features).double()
    elif case.geometry == "constant":
        side = torch.full(shape, 0.3, dtype=torch.float64)
    elif case.geometry in ("near duplicates", "identical"):
        one = torch.linspace(-1, 2, case.features, dtype=torch.float64)
        side = one + (1e-4 * side if case.geometry == "near duplicates" else 0.0)
    elif pairs is not None and case.geometry == "pairs":
        side[: len(pairs)] = (
            pairs + torch.linspace(0.1, 2, len(pairs), dtype=torch.float64)[:, None] * side[: len(pairs)]
        )
    elif pairs is not None and case.geometry == "antipodal":
        side = -pairs[torch.arange(rows) % len(pairs)]
    return side * 10 ** (2 * torch.rand(rows, 1, generator=generator, dtype=torch.float64) - 1)


def make_features(case: Hostile) -> tuple[Tensor, Tensor]:
    """Of the case's dtype and strides; what a dtype cannot hold is its largest number."""
    generator = torch.Generator().manual_seed(case.seed)
    x = make_side(case, generator, case.rows, None)
    sides = [x, make_side(case, generator, case.rows + case.extra, x)]
    for kind, side, row in case.changed:
        sides[side][row % len(sides[side])] *= ROWS[kind]
    largest = torch.finfo(case.dtype).max
    return tuple(strided(s.clamp(-largest, largest).to(case.dtype), case.strides) for s in sides)


def strided(side: Tensor, strides: str) -> Tensor:
    rows, features = side.shape
    if strides == "column-major":
        return side.T.contiguous().T
    if strides == "every other":
        wide = torch.full((2 * rows, 3 * features + 1), math.nan, dtype=side.dtype)
        wide[::2, 1::3] = side
        return wide[::2, 1::3]
    if strides == "overlapping" and rows > 1:  # rows of one long vector: each starts one feature after the last one
        return side.flatten()[: rows + features - 1].clone().as_strided((rows, features), (1, 1))
    return side


def make_options(case: Hostile) -> dict:
    generator = torch.Generator().manual_seed(case.seed + 1)
    columns = case.rows + case.extra

    def draw(number: int, length: int) -> Tensor:
        return torch.randint(number, (length,), generator=generator)

    ids = {
        "none": None,
        "few": draw(3, case.rows).int(),
        "one": torch.zeros(case.rows, dtype=torch.uint8),
        "distinct": torch.randperm(case.rows, generator=generator),
        "rows and columns": (draw(5, case.rows), draw(6, columns)),
        "extreme": (torch.tensor(EXTREME_IDS)[draw(6, case.rows)], torch.tensor(EXTREME_IDS)[draw(6, columns)]),
    }[case.groups]
    uniform = torch.rand(case.rows, generator=generator)
    weights = {
        "none": None,
        "some are 0": torch.where(uniform < 0.3, 0.0, uniform),
        "of all sizes": 10 ** (40 * uniform - 20),
        "bool": uniform < 0.7,
    }[case.weights]
    if weights is not None:
        weights[0] = True
    return {
        "smoothing": case.smoothing,
        "group_ids": ids,
        "weights": weights,
        "reduction": case.reduction,
        "symmetric": case.symmetric,
    }


@contextmanager
def on(case: Hostile) -> Iterator[None]:
    """The instruction set, and memory that shows what is not written."""
    level = case.run.partition("-")[2]
    best = _C.cpu_level() if level else ""
    try:
        if level:
            assert _C.set_cpu_level(level)
        with poisoned_memory():
            yield
    finally:
        if level:
            _C.set_cpu_level(best)


def results(
    function, x: Tensor, y: Tensor, case: Hostile, options: dict, upstream: Tensor, **more
) -> dict[str, Tensor]:
    """The loss and its gradients, of leaves that share nothing with the features but their strides."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    leaves = [t.detach().requires_grad_() for t in (x, y)]
    leaves += [torch.tensor(v, dtype=wide, requires_grad=True) for v in (case.scale, case.smoothing)]
    loss = function(*leaves[:3], **options | {"smoothing": leaves[3]}, **more)
    total = (loss * upstream.to(loss.dtype)).sum() if case.reduction == "none" else loss
    names = "image_features", "text_features", "logit_scale", "smoothing"
    grads = dict(zip(names, torch.autograd.grad(total, leaves, allow_unused=True), strict=True))
    return {"loss": loss.detach(), **{n: torch.zeros(()) if g is None else g for n, g in grads.items()}}


def make_upstream(case: Hostile) -> Tensor:
    """Of ``reduction="none"``: of either sign, and exact in every dtype."""
    return torch.randint(-4, 5, (case.rows,), generator=torch.Generator().manual_seed(case.seed + 2)) / 4


class Rounding:
    """What rounding can do to a case."""

    def __init__(self, case: Hostile) -> None:
        operands = torch.finfo(operand_dtype(case.dtype, CPU, case.backend)).eps / 2
        self.case, self.result = case, torch.finfo(case.dtype)
        self.accumulated = (torch.finfo(torch.float64) if case.dtype == torch.float64 else FLOAT32).eps / 2
        # Of a sum over the features: norms, dot products, and the gradient's along its row, which is taken away.
        summed = (8 + 2 * case.features**0.5) * self.accumulated
        factors = 3 if case.backend == "eager" and case.dtype == torch.bfloat16 else 2
        self.delta = case.scale * ((1 + operands) ** factors - 1 + summed)
        # Of a probability, and of what it is multiplied with.
        self.factor = math.expm1(min(2 * self.delta, 50.0)) + 4 * operands + summed
        self.truth = 64 * torch.finfo(torch.float64).eps * (1 + case.scale)  # for weights of 1
        self.smallest = 0.0 if case.dtype == torch.float64 else FLOAT32.smallest_normal

    def gradients(self, features: Tensor, of_terms: Tensor, largest: float = 1.0) -> Tensor:
        """Bounds of the rows of a gradient, from those of sums of unit rows; below the smallest number all is 0."""
        norm = features.double().norm(dim=1)
        inverse = torch.where(norm < 1e-12, 0.0, 1 / norm.clamp_min(1e-12))
        lost = self.smallest * (1 + largest * (self.case.rows + self.case.extra))
        return self.case.scale * inverse * (of_terms + lost) + self.smallest * self.case.features**0.5

    def compare(self, seen: Seen, name: str, got: Tensor, expected: Tensor, bound: Tensor) -> None:
        """Rows of gradients, which are rounded to their dtype, as far as that can hold them."""
        held = expected.abs() + bound[:, None] < 0.99 * self.result.max
        expected, got = expected.where(held, 0.0), got.double().where(held, 0.0)
        rounded = self.result.eps * expected.norm(dim=1) + self.result.smallest_normal * expected.shape[1] ** 0.5
        seen.compare(name, (got - expected).norm(dim=1), bound + rounded, self.case)


class Bounds(Rounding):
    """What a loss and its gradients may be off by, from probabilities in float64."""

    def __init__(self, x: Tensor, y: Tensor, case: Hostile, options: dict, upstream: Tensor) -> None:
        super().__init__(case)
        x, y, rows = x.double(), y.double(), case.rows
        columns = len(y)
        self.of_losses = torch.ones(rows).double() if options["weights"] is None else options["weights"].double()
        if case.reduction == "mean":
            self.of_losses /= self.of_losses.sum()
        of_pairs = self.of_losses * upstream.double().abs() if case.reduction == "none" else self.of_losses
        share = of_pairs * (0.5 if case.symmetric else 1.0)
        self.all = of_pairs.sum()
        self.truth *= float(self.all)

        unit = [F.normalize(t, dim=1, eps=1e-12) for t in (x, y)]
        logits = case.scale * unit[0] @ unit[1].T
        positive = torch.eye(rows, columns, dtype=torch.bool)
        negative = ~positive
        ids = options["group_ids"]
        if ids is not None:
            row_ids, col_ids = (t.long() for t in (ids if isinstance(ids, tuple) else (ids, ids)))
            negative[:, : len(col_ids)] &= row_ids[:, None] != col_ids

        def sizes(logits: Tensor, negative: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
            """The sizes of a direction's terms in the gradient to the logits, and the positives' probabilities."""
            p = logits.masked_fill(~(negative | positive), -math.inf).softmax(1)
            rest = (p * negative).sum(1)
            counts = negative.sum(1, keepdim=True)
            of_smoothing = torch.where(counts > 0, negative / counts.clamp_min(1) + positive.double(), 0.0)
            terms = p * negative + positive * rest[:, None] + case.smoothing * of_smoothing
            return share[:, None] * terms, 1 - rest

        terms, self.confidence = sizes(logits, negative, positive)
        if case.symmetric:
            square = slice(None), slice(0, rows)
            terms[square] += sizes(logits[square].T, negative[square].T, positive[square].T)[0].T
        self.terms = self.gradients(x, terms.sum(1))
        # A sum over negatives is that of all less that of the own group, which may weigh more by far.
        of_sums = 8 * self.accumulated * case.smoothing * share.sum() + self.truth
        # However wrong the logits are, a softmax is one.
        of_terms = [
            torch.minimum(terms.sum(dim) * self.factor, terms.sum(dim) + 4 * share.sum()) + of_sums for dim in (1, 0)
        ]
        largest = float(share.max())
        self.image_features, self.text_features = map(self.gradients, (x, y), of_terms, (largest, largest))
        self.logit_scale = of_terms[0].sum() + of_terms[1].sum() + 2 * self.accumulated * terms.sum()
        self.logit_scale += self.smallest * rows * (1 + largest * columns)
        self.smoothing = self.all * (4 * self.delta + 8 * self.accumulated * case.scale) + self.truth

    def losses(self, truth: Tensor) -> Tensor:
        weights = self.of_losses if truth.dim() else self.of_losses.sum()
        return 2 * self.delta * weights + 8 * self.accumulated * truth.abs() + self.truth


BINS = (0.0, 0.5, 0.9, 0.999, math.inf)
LEVELS = torch.tensor((0.5, 0.9, 1.0), dtype=torch.float64)


class Seen:
    """What cases have shown: worst shares of the bounds, and errors of rows by the confidence of their pair."""

    def __init__(self) -> None:
        self.cases = 0
        self.shares: dict[str, float] = {}
        self.errors: dict[tuple[str, str, float], list[tuple[Tensor, Tensor]]] = {}

    def compare(self, name: str, error: Tensor, bound: Tensor, case: Hostile) -> None:
        share = float(torch.where(error == 0, 0.0, error / bound).nan_to_num(nan=math.inf).max())
        assert share <= 1, f"{name} is off by {share:.3g} times its bound: {case}"
        self.shares[name] = max(self.shares.get(name, 0.0), share)

    def add(self, key: str, name: str, ours: Tensor, plain: Tensor, confidence: Tensor) -> None:
        for low, high in itertools.pairwise(BINS):
            rows = (confidence >= low) & (confidence < high)
            self.errors.setdefault((key, name, low), []).append((ours[rows], plain[rows]))

    def table(self) -> Iterator[tuple[str, str, float, int, Tensor, Tensor]]:
        """Dtype, quantity, bin, rows, ours and the plain loss's: median, 90th percentile, worst."""
        for (key, name, low), pairs in sorted(self.errors.items()):
            ours, plain = (torch.cat(side) for side in zip(*pairs, strict=True))
            if len(ours):
                yield key, name, low, len(ours), *(torch.quantile(t, LEVELS) for t in (ours, plain))


def check(case: Hostile, seen: Seen) -> None:
    x, y = make_features(case)
    options, upstream = make_options(case), make_upstream(case)
    wide_options = options | {"weights": None if options["weights"] is None else options["weights"].double()}
    truth = results(reference.modest_align_loss, x.double(), y.double(), case, wide_options, upstream)
    with on(case):
        ours = results(modest_align_loss, x, y, case, options, upstream, backend=case.backend)
    bounds = Bounds(x, y, case, options, upstream)
    seen.cases += 1
    seen.compare("loss", (ours["loss"].double() - truth["loss"]).abs(), bounds.losses(truth["loss"]), case)
    for name in ("logit_scale", "smoothing"):
        seen.compare(name, (ours[name].double() - truth[name]).abs(), getattr(bounds, name), case)
    for name in ("image_features", "text_features"):
        bounds.compare(seen, name, ours[name], truth[name], getattr(bounds, name))
    usual = case.geometry in ("random", "pairs") and not case.changed and case.weights == "none"
    if usual and case.features >= 8 and case.scale <= 200 and case.dtype != torch.float64:
        plain = results(reference.modest_align_loss, x, y, case, options, upstream)
        add_errors(case, x, seen, bounds, truth, ours, plain)


def add_errors(case: Hostile, x: Tensor, seen: Seen, bounds: Bounds, truth: dict, ours: dict, plain: dict) -> None:
    """Of losses, and of gradients beside their terms' sizes, in roundings of a logit."""
    rounding = bounds.accumulated * (1 + case.scale)
    key = f"{case.dtype}".removeprefix("torch.")
    errors = [(side["image_features"].double() - truth["image_features"]).norm(dim=1) for side in (ours, plain)]
    told = bounds.terms * rounding > bounds.gradients(x, bounds.truth)  # else the truth is not exact enough
    errors = [(e / bounds.terms / rounding)[told] for e in errors]
    seen.add(key, "image_features", *errors, bounds.confidence[told])
    if case.reduction == "none":
        errors = [(side["loss"].double() - truth["loss"]).abs() for side in (ours, plain)]
        seen.add(key, "loss", *(e / rounding for e in errors), bounds.confidence)


def check_logsumexp(case: Hostile, seen: Seen) -> None:
    """``contrastive_logsumexp`` for gradients of either sign, in which nothing cancels in the bound."""
    x, y = make_features(case)
    ids = make_options(case)["group_ids"]
    ids = dict(zip(("row_ids", "col_ids"), ids, strict=True)) if isinstance(ids, tuple) else {}
    upstream = [make_upstream(case), make_upstream(dataclasses.replace(case, rows=case.rows + case.extra))]

    def run(function: Callable, x: Tensor, y: Tensor, **more: str) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (x, y)]
        lse = function(*leaves, case.scale, **ids, **more)
        return *(t.detach() for t in lse), *torch.autograd.grad(lse, leaves, [u.to(lse[0]) for u in upstream])

    truth = run(reference.contrastive_logsumexp, x.double(), y.double())
    with on(case):
        ours = run(contrastive_logsumexp, x, y, backend=case.backend)
    seen.cases += 1
    rounding = Rounding(case)
    unit = [F.normalize(t.double(), dim=1, eps=1e-12) for t in (x, y)]
    logits = case.scale * unit[0] @ unit[1].T
    if ids:
        logits = logits.masked_fill(ids["row_ids"].long()[:, None] == ids["col_ids"].long(), -math.inf)
    weights = [u.abs().double() for u in upstream]
    terms = weights[0][:, None] * logits.softmax(1).nan_to_num(0.0) + weights[1] * logits.softmax(0).nan_to_num(0.0)
    names = "row_lse", "col_lse", "x", "y"
    for name, expected, got in zip(names[:2], truth[:2], ours[:2], strict=True):
        left = expected > -math.inf
        assert torch.equal(got > -math.inf, left), f"{name}: {case}"
        error, bound = (
            (got - expected).abs()[left],
            rounding.delta + 8 * rounding.accumulated * (1 + expected.abs()[left]),
        )
        if len(error):
            seen.compare(name, error, bound + rounding.truth, case)
    for name, expected, got, features, dim in zip(names[2:], truth[2:], ours[2:], (x, y), (1, 0), strict=True):
        of_terms = torch.minimum(
            terms.sum(dim) * rounding.factor, terms.sum(dim) + 2 * (weights[0].sum() + weights[1].sum())
        )
        bound = rounding.gradients(features, of_terms + rounding.truth)
        rounding.compare(seen, name, got, expected, bound)


def check_not_finite(case: Hostile, seen: Seen) -> None:
    """What the plain loss makes NaN is NaN; with groups to smooth over, whose sums hold every row, more may be."""
    x, y = (t.clone() for t in make_features(case))
    generator = torch.Generator().manual_seed(case.seed)
    for _ in range(1 + case.seed % 2):
        side = (x, y)[int(torch.randint(2, (), generator=generator))]
        row, feature = (int(torch.randint(n, (), generator=generator)) for n in side.shape)
        side[row, feature] = (math.nan, math.inf, -math.inf)[int(torch.randint(3, (), generator=generator))]
    options, upstream = make_options(case), torch.ones(case.rows)
    wide_options = options | {"weights": None if options["weights"] is None else options["weights"].double()}
    truth = results(reference.modest_align_loss, x.double(), y.double(), case, wide_options, upstream)
    with on(case):
        ours = results(modest_align_loss, x, y, case, options, upstream, backend=case.backend)
    seen.cases += 1
    for name, expected in truth.items():
        if name == "smoothing" and case.smoothing == 0.0:
            continue
        got, want = ours[name].isnan(), expected.isnan()
        assert (got >= want).all(), f"{name} hides a NaN: {case}"
        if case.groups == "none" and name != "smoothing":  # whose terms of rows without negatives are 0 times NaN
            assert torch.equal(got, want), f"{name} is NaN where the plain loss's is not: {case}"


def job(test: Callable[[Hostile, Seen], None], count: int, *, fresh: bool = False, **strategy) -> Seen:
    """``count`` cases of :func:`hostile`: always the same ones, or ``fresh`` ones in every run."""
    seen = Seen()

    @settings(
        max_examples=count,
        derandomize=not fresh,
        database=None,
        deadline=None,
        print_blob=fresh,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=hostile(**strategy))
    def run(case: Hostile) -> None:
        test(case, seen)

    run()
    assert seen.cases >= count
    return seen


def test_every_row_is_within_its_bound() -> None:
    job(check, 150)


def test_every_logsumexp_is_within_its_bound() -> None:
    job(check_logsumexp, 90)


@pytest.mark.parametrize(
    ("run", "dtype", "rows", "features", "scale", "strides", "seed"),
    [
        ("eager", torch.bfloat16, 15, 8, 10**1.5, "overlapping", 321666),
        ("eager", torch.bfloat16, 16, 64, 10**2.75, "overlapping", 0),
        (RUNS[-1], torch.float32, 1, 130, 0.001, "contiguous", 0),
    ],
)
def test_rows_whose_rounding_is_the_worst_that_can_be(run, dtype, rows, features, scale, strides, seed) -> None:
    case = Hostile(
        run=run, dtype=dtype, rows=rows, extra=17, features=features, scale=scale, smoothing=0.0, geometry="constant",
        changed=(), groups="none", weights="none", reduction="mean", symmetric=False, strides=strides, seed=seed,
    )  # fmt: skip
    check_logsumexp(case, Seen())


def test_what_is_not_finite_is_nan_where_the_plain_loss_has_it() -> None:
    job(check_not_finite, 60)


@TRITON
def test_triton_under_its_interpreter() -> None:
    job(check, 2, runs=("triton",), largest=6)


@pytest.mark.slow
def test_thousands_of_cases_and_the_plain_loss_beside_them() -> None:
    """New cases in every run. By the confidence of a row's pair: at most twice the plain loss's error."""
    seen = job(check, 7000, fresh=True)
    print(f"\nworst shares of the bounds: {seen.shares}")
    for dtype, name, low, rows, ours, plain in seen.table():
        numbers = " ".join(f"{value:.1e}" for value in (*ours, *plain))
        print(f"{dtype} {name}, confidence from {low}: {rows} rows, ours and plain: {numbers}")
        # The worst row is held to its bound.
        if rows >= 100:
            assert (ours <= 2 * plain + 1)[:2].all(), (dtype, name, low)


@pytest.mark.slow
@pytest.mark.parametrize(("test", "count"), [(check_logsumexp, 2000), (check_not_finite, 1000)])
def test_thousands_of_other_cases(test: Callable, count: int) -> None:
    print(job(test, count, fresh=True).shares)


@TRITON
@pytest.mark.slow
@pytest.mark.parametrize(("test", "count"), [(check, 60), (check_logsumexp, 20), (check_not_finite, 20)])
def test_more_under_tritons_interpreter(test: Callable, count: int) -> None:
    job(test, count, fresh=True, runs=("triton",), largest=12)


def plain_loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    logits = scale * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    target = torch.arange(len(x))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, : len(x)].T, target)) / 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [*RUNS, pytest.param("triton", marks=TRITON)])
def test_nan_and_infinity_are_those_of_pytorchs_own_loss(backend: str, dtype: torch.dtype, value: float) -> None:
    """One element, or a row, of either side: the loss, and of each gradient the same elements."""
    torch.manual_seed(0)
    for side, place in ((0, (2, 3)), (1, (2,)), (1, (6, 1))):
        leaves = [torch.randn(n, 8).to(dtype) for n in (5, 7)]
        leaves[side][place] = value
        leaves = [*(t.requires_grad_() for t in leaves), torch.tensor(14.3, requires_grad=True)]
        case = SimpleNamespace(run=backend)
        with on(case):
            loss = modest_align_loss(*leaves, backend=backend.split("-")[0])
            ours = loss, *torch.autograd.grad(loss, leaves)
        expected = plain_loss(*leaves)
        for got, want in zip(ours, (expected, *torch.autograd.grad(expected, leaves)), strict=True):
            assert want.isnan().any()
            assert torch.equal(got.isnan(), want.isnan())
            assert not got.isinf().any()
