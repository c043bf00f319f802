"""The targets of tests/fuzz/readers.py on their seeds, and on these with some bytes changed, the same in every run."""

from __future__ import annotations

import random

import pytest

from tests.fuzz import readers

MUTATIONS = 150


def mutated(seed: bytes, other: bytes, draw: random.Random) -> bytes:
    """Change some bytes, cut some out, or put some of another seed in."""
    data = bytearray(seed)
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(len(data) or 1)
        end = start + draw.choice((1, 1, 1, 8, 100))
        data[start:end] = draw.choice((b"", draw.randbytes(1), data[start:end] * 2, other[start:end], b'"', b"9" * 20))
    return bytes(data)


@pytest.mark.parametrize("target", readers.TARGETS)
def test_readers_of_damaged_files(target: str) -> None:
    draw = random.Random(0)
    seeds = readers.seeds(target)
    assert [readers.TARGETS[target](seed) for seed in seeds] == [""] * len(seeds)
    said = set()
    for _ in range(MUTATIONS):
        data = mutated(draw.choice(seeds), draw.choice(seeds), draw)
        if data:
            said.add(readers.TARGETS[target](data))
    assert len(said) > 1
