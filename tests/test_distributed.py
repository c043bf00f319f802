"""The loss of several ranks is that of one process, with all its gradients, in every strategy; nothing hangs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from rank_pool import RankPool

STRATEGIES = ("gather", "ring")


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    ranks = RankPool()
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("size", "how"),
    [
        (2, "equal"),
        (3, "unequal"),
        (4, "empty"),
        *(
            pytest.param(size, how, marks=pytest.mark.slow)
            for size, how in ((2, "empty"), (3, "equal"), (4, "unequal"))
        ),
    ],
)
def test_exact_in_float64(pool, strategy: str, size: int, how: str) -> None:
    pool.run("exact_in_float64", size, strategy=strategy, how=how)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("native", torch.float32),
        ("native", torch.bfloat16),
        *(
            pytest.param(backend, dtype, marks=pytest.mark.slow)
            for backend, dtype in (
                ("native", torch.float16),
                ("eager", torch.float32),
                ("eager", torch.bfloat16),
                ("eager", torch.float16),
            )
        ),
    ],
    ids=str,
)
def test_error_budget(pool, strategy: str, backend: str, dtype: torch.dtype) -> None:
    pool.run("error_budget", 3, strategy=strategy, how="unequal", dtype=dtype, backend=backend)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("size", "how"),
    [(3, "empty"), *(pytest.param(n, how, marks=pytest.mark.slow) for n, how in ((2, "unequal"), (4, "equal")))],
)
def test_options(pool, strategy: str, size: int, how: str) -> None:
    pool.run("options", size, strategy=strategy, how=how)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("size", "dtype"), [(2, torch.float32), (3, torch.float64), (4, torch.float64)], ids=str)
def test_logsumexps(pool, strategy: str, size: int, dtype: torch.dtype) -> None:
    pool.run("logsumexp", size, strategy=strategy, dtype=dtype)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_contract(pool, strategy: str) -> None:
    pool.run("contract", 3, strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("size", "how", "backend"), [(3, "unequal", "eager"), (4, "empty", "native"), (2, "equal", "native")]
)
def test_noise_does_not_depend_on_the_number_of_ranks(pool, strategy: str, size: int, how: str, backend: str) -> None:
    pool.run("noise", size, strategy=strategy, how=how, backend=backend)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("size", "backend", "dtype"),
    [(2, "native", torch.float32), (3, "native", torch.bfloat16), (4, "eager", torch.float32)],
    ids=str,
)
def test_costs_are_as_on_paper(pool, strategy: str, size: int, backend: str, dtype: torch.dtype) -> None:
    pool.run("costs", size, strategy=strategy, backend=backend, dtype=dtype)


def test_auto_is_the_ring_where_gathering_takes_too_much(pool) -> None:
    pool.run("auto", 2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_memory_is_as_on_paper(pool, strategy: str) -> None:
    pool.run("memory", 4, strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_smaller_side_travels(pool, strategy: str) -> None:
    pool.run("smaller_side_travels", 3, strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_whatever_asks_for_a_gradient(pool, strategy: str) -> None:
    pool.run("numbers_without_a_gradient", 2, strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_second_derivative(pool, strategy: str) -> None:
    pool.run("second_derivative", 2, strategy=strategy)


@pytest.mark.parametrize("size", [2, 3])
def test_disagreements_raise_the_same_sentence_on_every_rank(pool, size: int) -> None:
    pool.run("disagreements", size)


def test_meshes_and_groups(pool) -> None:
    pool.run("meshes", 4)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"find_unused_parameters": True}], ids=str)
def test_data_parallel(pool, strategy: str, options: dict[str, bool]) -> None:
    pool.run("data_parallel", 3, strategy=strategy, how="unequal", **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "surroundings",
    ["accumulated_without_sync", "documented", "fully_sharded", "compiled", "under_autocast"],
)
def test_surroundings(pool, surroundings: str, strategy: str) -> None:
    pool.run(surroundings, 2, strategy=strategy)


@pytest.mark.parametrize(("strategy", "use_reentrant"), [("gather", True), ("ring", False)])
def test_checkpointing(pool, strategy: str, use_reentrant: bool) -> None:
    pool.run("checkpointed", 2, strategy=strategy, use_reentrant=use_reentrant)


# Last: it takes the pool down.
def test_a_rank_that_dies_ends_the_others(pool) -> None:
    with pytest.raises(AssertionError) as raised:
        pool.run("death", 3)
    _, *of_ranks = str(raised.value).split("rank ")
    assert ["RuntimeError" in text for text in of_ranks] == [True, True, False], of_ranks
    assert of_ranks[-1] == "2 of 3: it died"
