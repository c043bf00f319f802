"""The recipes of docs/other_losses.md: values and gradients of the libraries' own losses, or of the formula's."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.providers import sentence_transformers_loss
from benchmarks.recipes import PAGE, recipes
from modest_align_kernels import available_backends, contrastive_logsumexp, reference
from modest_align_kernels.testing import Case, make_features

SCALE = 14.3
# Triton's kernels meet every one of these calls in test_logsumexp.py, and its interpreter is slow.
BACKENDS = [name for name, why in available_backends("cpu").items() if why is None and name != "triton"]
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5}


@pytest.fixture(params=[("eager", torch.float64), *((name, torch.float32) for name in BACKENDS)], ids=str)
def where(request):
    """The recipes on a backend, and the dtype of the features."""
    backend, dtype = request.param
    return recipes(partial(contrastive_logsumexp, backend=backend)), dtype


def features(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Correlated if they are of one shape, of norms that differ."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(64, shapes[0][-1], generator=generator, dtype=torch.float64)
    drawn = []
    for shape in shapes:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) == 2:
            x = (x + common[: shape[0]]) * (0.2 + torch.rand(shape[0], 1, generator=generator, dtype=torch.float64))
        drawn.append(x.to(dtype).requires_grad_())
    return drawn


def assert_same(ours, theirs, inputs: list[Tensor], scale: bool = True) -> None:
    """Value and gradients of ``ours(*inputs, scale)`` are those of ``theirs``, which is computed in float64.

    Args:
        ours: a recipe.
        theirs: what it is to be.
        inputs: the features.
        scale: theirs has a gradient of the scale, too.
    """
    results = []
    for function, dtype in ((ours, inputs[0].dtype), (theirs, torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        number = torch.tensor(SCALE, dtype=dtype, requires_grad=True) if scale else SCALE
        loss = function(*leaves, number)
        wanted = [*leaves, number] if scale else leaves
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), wanted)))
    rtol = TOLERANCES[inputs[0].dtype]
    for got, expected in zip(*results, strict=True):
        assert got.shape == expected.shape
        assert (got.double() - expected).norm() <= rtol * expected.norm().clamp_min(1e-3)
    assert results[1][0].isfinite().all()


def logits_of(x: Tensor, y: Tensor, scale: Tensor | float) -> Tensor:
    return scale * F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT


def test_every_recipe_is_tested() -> None:
    named = set(re.findall(r"^def (\w+)\(", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    helpers = {"unit", "cosine", "softplus", "own", "negatives", "mean_positive", "damped", "own_logits"}
    tested = set(re.findall(r"where\[0\]\.(\w+)", Path(__file__).read_text(encoding="utf-8")))
    assert named - helpers == tested


def test_the_links_of_the_page_lead_somewhere() -> None:
    text = PAGE.read_text(encoding="utf-8")
    titles = {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in re.findall(r"^## (.*)$", text, re.M)}
    assert set(re.findall(r"\(#([^)]*)\)", text)) <= titles


def test_recipes_keep_float32_with_16_bit_features() -> None:
    x, y = (t.detach() for t in features((6, 8), (6, 8)))
    expected = recipes(reference.contrastive_logsumexp).nt_xent(x, y, SCALE)
    loss = recipes().nt_xent(x.bfloat16(), y.bfloat16(), SCALE)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=3e-2, atol=0)


def test_trimmed(where) -> None:
    def theirs(x, y, scale):
        logits, target = logits_of(x, y, scale), torch.arange(10)
        losses = sum(F.cross_entropy(s, target, reduction="none") for s in (logits, logits.T)) / 2
        return losses.topk(7, largest=False).values.mean()

    assert_same(partial(where[0].trimmed, share=0.7), theirs, features((10, 12), (10, 12), dtype=where[1]))


# GradCache


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("passages", [1, 3])
def test_targeted(where, passages: int, reduction: str) -> None:
    x, y = features((8, 12), (8 * passages, 12), dtype=where[1])
    ours = partial(where[0].targeted, reduction=reduction)

    def theirs(x, y, scale, target=None):
        target = torch.arange(0, 8 * passages, passages) if target is None else target
        return F.cross_entropy(logits_of(x, y, scale), target, reduction=reduction)

    assert_same(lambda x, y, s: ours(x, y, scale=s), theirs, [x, y])
    target = torch.tensor([7, 0, 3, 3, 1, 2, 6, 5])
    assert_same(lambda x, y, s: ours(x, y, target, scale=s), partial(theirs, target=target), [x, y])


def test_targeted_in_gradcache(where) -> None:
    """Gradients of cached representations, and then each chunk's, are those of the whole batch at once."""
    torch.manual_seed(0)
    models = [torch.nn.Linear(10, 12, dtype=where[1]) for _ in range(2)]
    inputs = [torch.randn(9, 10, dtype=where[1]) for _ in range(2)]
    weights = [model.weight for model in models]
    whole = where[0].targeted(*(model(x) for model, x in zip(models, inputs, strict=True)))
    expected = torch.autograd.grad(whole, weights)
    with torch.no_grad():
        cached = [model(x) for model, x in zip(models, inputs, strict=True)]
    loss = where[0].targeted(*(t.requires_grad_() for t in cached))
    loss.backward()
    for model, x, cache in zip(models, inputs, cached, strict=True):
        for chunk, grad in zip(x.split(4), cache.grad.split(4), strict=True):
            model(chunk).backward(grad)
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close([weight.grad for weight in weights], list(expected), rtol=1e-4, atol=1e-6)


# lightly


def lightly_loss(name: str, **options):
    return getattr(pytest.importorskip("lightly.loss", exc_type=ImportError), name)(temperature=1 / SCALE, **options)


def test_nt_xent_of_lightly(where) -> None:
    theirs = lightly_loss("NTXentLoss")
    assert_same(where[0].nt_xent, lambda x, y, s: theirs(x, y), features((9, 12), (9, 12), dtype=where[1]), scale=False)


def test_memory_bank_of_lightly(where) -> None:
    theirs = lightly_loss("NTXentLoss", memory_bank_size=(20, 12))
    theirs(torch.randn(20, 12), torch.randn(20, 12))  # draws the bank
    bank = F.normalize(theirs.memory_bank.bank.double(), dim=1)
    x, y = features((9, 12), (9, 12), dtype=where[1])

    def with_bank(x, y, s):
        theirs.memory_bank.bank = bank.clone()
        return theirs(x, y)

    ours = where[0].memory_bank
    assert_same(lambda x, y, s: ours(x, y, bank.to(x.dtype), s), with_bank, [x, y], scale=False)


@pytest.mark.parametrize(("name", "sigma"), [("DCLLoss", None), ("DCLWLoss", 0.5)])
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_dcl_of_lightly(where, name: str, sigma: float | None) -> None:
    theirs = lightly_loss(name)
    ours = partial(where[0].dcl, sigma=sigma)
    assert_same(ours, lambda x, y, s: theirs(x, y), features((9, 12), (9, 12), dtype=where[1]), scale=False)


# pytorch-metric-learning

LABELS = torch.tensor([3, 1, 3, 2, 7, 1, 3, 9, 2])  # 7 and 9 are alone


def metric_learning_loss(name: str):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    return getattr(losses, name)(temperature=1 / SCALE)


def test_nt_xent_of_metric_learning(where) -> None:
    theirs = metric_learning_loss("NTXentLoss")

    def of_views(x, y, s):
        return theirs(torch.cat((x, y)), torch.arange(len(x)).repeat(2))

    assert_same(where[0].nt_xent, of_views, features((9, 12), (9, 12), dtype=where[1]), scale=False)


def test_nt_xent_of_labels(where) -> None:
    theirs = metric_learning_loss("NTXentLoss")
    same = (LABELS[:, None] == LABELS) & ~torch.eye(9, dtype=torch.bool)
    anchors, positives = same.nonzero().T
    ours = where[0].nt_xent_of_labels
    assert_same(
        lambda z, s: ours(z, LABELS, anchors, positives, s),
        lambda z, s: theirs(z, LABELS),
        features((9, 12), dtype=where[1]),
        scale=False,
    )


def test_supcon(where) -> None:
    theirs, ours = metric_learning_loss("SupConLoss"), where[0].supcon
    z = features((9, 12), dtype=where[1])
    assert_same(lambda z, s: ours(z, LABELS, s), lambda z, s: theirs(z, LABELS), z, scale=False)


# UniCL


@pytest.mark.parametrize("captions", ["two or three an image", "classes"])
def test_unicl(where, captions: str) -> None:
    if captions == "classes":
        image_ids, text_ids = torch.tensor([5, -2, 5, 0, 9]), torch.tensor([0, 5, -2, 5, 9])
    else:
        image_ids = torch.arange(5)
        text_ids = torch.tensor([0, 1, 2, 3, 4, 0, 1, 3, 4, 2, 1, 3])
    images, texts = features((5, 12), (len(text_ids), 12), dtype=where[1])

    def theirs(x, y, scale):
        logits, target = logits_of(x, y, scale), (image_ids[:, None] == text_ids).double()
        return (
            F.cross_entropy(logits, target / target.sum(1, keepdim=True))
            + F.cross_entropy(logits.T, target.T / target.T.sum(1, keepdim=True))
        ) / 2

    assert_same(lambda x, y, s: where[0].unicl(x, y, image_ids, text_ids, s), theirs, [images, texts])


# Debiased and hard-weighted, from the papers' formulas


@pytest.mark.parametrize("scale", [2.0, 14.3])
@pytest.mark.parametrize(("tau_plus", "beta"), [(0.1, 0.0), (0.02, 1.0), (0.3, 0.5)])
def test_debiased(where, tau_plus: float, beta: float, scale: float) -> None:
    def theirs(x, y, unused):
        views, count = torch.cat((x, y)), 2 * len(x) - 2
        both = logits_of(views, views, scale)
        pair = torch.arange(2 * len(x)) % len(x)
        others = both[pair[:, None] != pair].reshape(len(views), count)
        positive = both.diagonal(len(x)).repeat(2).exp()
        # Robinson et al.'s importance, of mean 1
        weights = (beta * others).exp() / (beta * others).exp().mean(1, keepdim=True)
        total = (weights * others.exp()).sum(1)
        estimate = (total - count * tau_plus * positive) / (1 - tau_plus)
        clamped.append((estimate < count * math.exp(-scale)).double().mean())
        return -(positive / (positive + estimate.clamp(min=count * math.exp(-scale)))).log().mean()

    clamped: list[Tensor] = []
    x, y = features((9, 12), (9, 12), dtype=where[1])
    assert_same(lambda x, y, s: where[0].debiased(x, y, scale, tau_plus, beta), theirs, [x, y], scale=False)
    if (tau_plus, beta, scale) == (0.3, 0.5, 14.3):
        assert 0 < clamped[0] < 1, "the case should have rows on both sides of the floor"


def test_debiased_at_scale_100_is_finite(where) -> None:
    x, y = features((9, 12), (9, 12), dtype=where[1])
    loss = where[0].debiased(x, y, 100.0, 0.1, 0.5)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (x, y)))


# sentence-transformers

BOTH = ("query_to_doc", "doc_to_query")


def ranking_loss(**options):
    pytest.importorskip("sentence_transformers")
    loss = sentence_transformers_loss("MultipleNegativesRankingLoss", **options)

    def theirs(queries, *docs_and_scale):
        *docs, loss.scale = docs_and_scale
        return loss.compute_loss_from_embeddings([queries, *docs], None)

    return theirs


@pytest.mark.parametrize(
    ("directions", "joint"),
    [
        (("query_to_doc",), True),
        (BOTH, True),
        (BOTH, False),
        (("query_to_doc", "query_to_query"), True),
        (("query_to_doc", "doc_to_doc"), True),
        (("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"), True),
    ],
)
@pytest.mark.parametrize("hard", [0, 1, 2])
def test_ranking(where, hard: int, directions: tuple[str, ...], joint: bool) -> None:
    theirs = ranking_loss(directions=directions, partition_mode="joint" if joint else "per_direction")
    ours = where[0].ranking
    inputs = features(*((8, 12),) * (2 + hard), dtype=where[1])
    # Its -inf times the scale makes its gradient of the scale NaN.
    scale = set(directions) <= set(BOTH)
    assert_same(lambda x, *rest: ours(x, list(rest[:-1]), rest[-1], directions, joint), theirs, inputs, scale)


@pytest.mark.parametrize(
    ("mode", "alphas"),
    [
        ("in_batch_negatives", {"others": 5.0}),
        ("hard_negatives", {"hard": 5.0}),
        ("all_negatives", {"others": 5.0, "hard": 5.0}),
    ],
)
@pytest.mark.parametrize("hard", [0, 2])
def test_hardness(where, hard: int, mode: str, alphas: dict) -> None:
    theirs = ranking_loss(hardness_mode=mode, hardness_strength=5.0)
    inputs = features(*((8, 12),) * (2 + hard), dtype=where[1])
    ours = where[0].hardness
    assert_same(lambda x, *rest: ours(x, list(rest[:-1]), rest[-1], **alphas), theirs, inputs)


# Own hard negatives, Qwen3-Embedding, z-loss, from their formulas


def own_of(x: Tensor, hard: Tensor, scale: Tensor) -> Tensor:
    return logits_of(x[:, None], hard, scale)[:, 0]


def test_own_negatives(where) -> None:
    def theirs(x, y, hard, scale):
        logits = torch.cat((logits_of(x, y, scale), own_of(x, hard, scale)), 1)
        return F.cross_entropy(logits, torch.arange(len(x)))

    assert_same(where[0].own_negatives, theirs, features((8, 12), (8, 12), (8, 3, 12), dtype=where[1]))


@pytest.mark.parametrize("doc_ids", [None, torch.tensor([4, 1, 4, 2, 3, 1, 5, 6])], ids=["all", "equal documents"])
def test_qwen3(where, doc_ids: Tensor | None) -> None:
    ids = torch.arange(8) if doc_ids is None else doc_ids
    others = (ids[:, None] != ids).double()

    def theirs(queries, docs, hard, scale):
        to_docs = logits_of(queries, docs, scale)
        z = own_of(queries, hard, scale).exp().sum(1) + to_docs.diagonal().exp()
        for logits in (to_docs, logits_of(queries, queries, scale), logits_of(docs, docs, scale)):
            z = z + (others * logits.exp()).sum(1)
        return (z.log() - to_docs.diagonal()).mean()

    ours = where[0].qwen3
    inputs = features((8, 12), (8, 12), (8, 3, 12), dtype=where[1])
    assert_same(lambda *a: ours(*a, doc_ids=doc_ids), theirs, inputs)


def test_clip_with_z_loss(where) -> None:
    def theirs(x, y, scale):
        logits, target = logits_of(x, y, scale), torch.arange(len(x))
        both = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return both + 1e-2 * torch.cat((logits.logsumexp(0), logits.logsumexp(1))).square().mean()

    x, y = make_features(Case("", 9, 9, 12), where[1])
    assert_same(partial(where[0].clip_with_z_loss, coefficient=1e-2), theirs, [x, y])
