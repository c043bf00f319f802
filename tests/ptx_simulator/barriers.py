"""What threads meet at: named barriers, barriers in shared memory (mbarriers), the barrier of a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx_simulator.instructions import (
    BLOCKED,
    TYPES,
    U32,
    Mask,
    Meaning,
    Reader,
    addresses_of,
    elementwise,
    instruction,
    reader,
    whole_warps,
    writer,
)
from tests.ptx_simulator.memory import Fault
from tests.ptx_simulator.parser import Constant, Statement

if TYPE_CHECKING:
    from tests.ptx_simulator.machine import Unit


# A cluster's blocks have windows of shared addresses.
WINDOW = 24
# Attempts of a loop around an mbarrier after which its warps count as waiting.
MOST_ATTEMPTS = 100


@dataclass
class NamedBarrier:
    """bar.sync, round after round."""

    threads: int = 0
    arrived: set[int] = field(default_factory=set)  # warps, in this round
    vote: bool = False  # in this round
    round: int = 0
    result: bool = False  # of the last round: nobody can be two rounds ahead

    def arrive(self, warps: list[int], threads: int, vote: bool) -> None:
        """Count warps; the last of a round begins the next."""
        if threads % 32 or (self.arrived and self.threads != threads):
            raise Fault(f"a barrier of {self.threads} threads is met as one of {threads}")
        self.threads = threads
        self.arrived.update(warps)
        self.vote |= vote
        if 32 * len(self.arrived) > threads:
            raise Fault(f"more than {threads} threads at a barrier")
        if 32 * len(self.arrived) == threads:
            self.round, self.result = self.round + 1, self.vote
            self.arrived, self.vote = set(), False


@dataclass
class MemoryBarrier:
    """mbarrier: a phase ends when all arrivals and all bytes are there."""

    expected: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def update(self, arrivals: int = 0, expected_bytes: int = 0, received_bytes: int = 0) -> None:
        """Count what has come."""
        self.pending -= arrivals
        self.bytes += expected_bytes - received_bytes
        if self.pending < 0:
            raise Fault("more arrivals at an mbarrier than it expects")
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.expected


class Barriers:
    """Those of a block."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.named = [NamedBarrier() for _ in range(16)]
        self.waiting: dict[int, int] = {}  # of a warp that has arrived: the barrier's round
        self.memory: dict[int, MemoryBarrier] = {}


@instruction("bar.sync", "barrier.cta.sync", "barrier.cta.red.or")
def _meet(statement: Statement) -> Meaning:
    operands = list(statement.operands)
    write, vote = None, None
    if "red" in statement.parts:
        write, vote = writer(operands.pop(0), TYPES["pred"]), reader(operands.pop(), TYPES["pred"])
    number = reader(operands[0], U32)
    threads = reader(operands[1], U32) if len(operands) > 1 else None

    def one(unit: Unit, mask: Mask, read: Reader) -> int:
        """The value that all lanes have."""
        values = np.unique(np.broadcast_to(read(unit), unit.lanes)[slice(None) if mask is None else mask])
        if len(values) > 1:
            raise NotImplementedError("warps of one unit at different barriers")
        return int(values[0])

    def run(unit: Unit, mask: Mask) -> int | None:
        whole_warps(unit, mask)
        barriers, name = unit.block.barriers, one(unit, mask, number)
        barrier = barriers.named[name]
        warps = [int(w) for w in np.unique(unit.thread[slice(None) if mask is None else mask] // 32)]
        if warps[0] not in barriers.waiting:
            wanted = barriers.threads if threads is None else one(unit, mask, threads)
            votes = vote is not None and bool(np.any(vote(unit) if mask is None else vote(unit) & mask))
            barriers.waiting.update(dict.fromkeys(warps, barrier.round))
            barrier.arrive(warps, wanted, votes)
        if barriers.waiting[warps[0]] == barrier.round:
            return BLOCKED
        for warp in warps:
            del barriers.waiting[warp]
        if write is not None:
            write(unit, mask, np.bool_(barrier.result))
        return None

    return run


@instruction("barrier.cluster.arrive")
def _arrive_cluster(statement: Statement) -> Meaning:
    def run(unit: Unit, mask: Mask) -> None:
        whole_warps(unit, mask)
        unit.cluster_arrivals += 1
        unit.block.cluster.arrived += unit.lanes if mask is None else int(mask.sum())

    return run


@instruction("barrier.cluster.wait")
def _wait_cluster(statement: Statement) -> Meaning:
    def run(unit: Unit, mask: Mask) -> int | None:
        whole_warps(unit, mask)
        cluster = unit.block.cluster
        everyone = sum(block.threads for block in cluster.blocks)
        return BLOCKED if cluster.arrived < unit.cluster_arrivals * everyone else None

    return run


# mbarriers


def at(unit: Unit, address: int) -> MemoryBarrier:
    """The mbarrier at a shared address of the cluster."""
    barrier = unit.block.cluster.block_at(address).barriers.memory.get(address)
    if barrier is None:
        raise Fault(f"the mbarrier at {address:#x} was not initialised")
    return barrier


def _each(unit: Unit, mask: Mask, *values: Any) -> Iterator[tuple[int, ...]]:
    """The lanes' values, one lane after the other."""
    lanes = range(unit.lanes) if mask is None else np.flatnonzero(mask)
    columns = [np.broadcast_to(value, unit.lanes) for value in values]
    for lane in lanes:
        yield tuple(int(column[lane]) for column in columns)


@instruction("mbarrier.init")
def _initialise(statement: Statement) -> Meaning:
    addresses, count = addresses_of(statement.operands[0]), reader(statement.operands[1], U32)

    def run(unit: Unit, mask: Mask) -> None:
        for address, expected in _each(unit, mask, addresses(unit), count(unit)):
            if address % 8:
                raise Fault(f"an mbarrier at {address:#x}")
            unit.block.shared.find(address, address + 8, write=True)
            unit.block.barriers.memory[address] = MemoryBarrier(expected, expected)

    return run


@instruction("mbarrier.arrive")
def _arrive(statement: Statement) -> Meaning:
    addresses = addresses_of(statement.operands[1])
    expects = "expect_tx" in statement.parts
    if len(statement.operands) != (3 if expects else 2):
        raise NotImplementedError(statement.text)
    expected = reader(statement.operands[2] if expects else Constant(0), U32)

    def run(unit: Unit, mask: Mask) -> None:
        for address, expected_bytes in _each(unit, mask, addresses(unit), expected(unit)):
            at(unit, address).update(arrivals=1, expected_bytes=expected_bytes)

    return run


@instruction("mbarrier.try_wait.parity")
def _wait(statement: Statement) -> Meaning:
    write = writer(statement.operands[0], TYPES["pred"])
    addresses, parity = addresses_of(statement.operands[1]), reader(statement.operands[2], U32)
    # Without a time to wait for it may fail at once, and the program has to ask again.
    patient = len(statement.operands) > 3

    def run(unit: Unit, mask: Mask) -> int | None:
        done = all(at(unit, a).phase != p for a, p in _each(unit, mask, addresses(unit), parity(unit)))
        if done or patient or unit.impatient > MOST_ATTEMPTS:
            unit.impatient = 0 if done else unit.impatient
            write(unit, mask, np.bool_(done))
            return None if done else BLOCKED
        unit.impatient += 1
        write(unit, mask, np.bool_(False))
        return None

    return run


@instruction("mapa")
def _map(statement: Statement) -> Meaning:
    """The address in another block of the cluster."""

    def function(address: Any, rank: Any) -> Any:
        return (address & U32.type((1 << WINDOW) - 1)) | (rank << U32.type(WINDOW))

    return elementwise(statement, function, U32, U32, U32)
