"""Runs a grid: units of warps, thread blocks, clusters, and what they wait for.

A unit is some warps of a block that go on together, one instruction after the other, until they wait for different
things. With one warp a unit the order of warps is as random as it can be; with four or more a run is faster.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from tests.ptx_simulator import tensor_cores, tensor_memory
from tests.ptx_simulator.barriers import WINDOW, Barriers
from tests.ptx_simulator.instructions import BLOCKED, EXIT, Copy, Mask, Meaning, build
from tests.ptx_simulator.memory import Allocation, Array, Fault, Memory
from tests.ptx_simulator.parser import Kernel

FIRST = 1024  # where a window of shared addresses begins: below is nobody's
BURSTS = (5, 50, 400, 4000)  # instructions that a unit may go on for


@dataclass
class Order:
    """What a GPU leaves open.

    Attributes:
        seed: of the random order.
        warps: of a unit.
        late: the probability with which an asynchronous copy or product is put off, each time it could complete.
    """

    seed: int = 0
    warps: int = 4
    late: float = 0.5


@dataclass
class Launch:
    """A grid of a kernel with its parameters' bytes."""

    kernel: Kernel
    parameters: bytes
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int] = (1, 1, 1)  # blocks
    shared_bytes: int = 0  # beyond the static variables


@dataclass
class Path:
    """Lanes of a unit that are at the same statement; None: all."""

    place: int
    mask: Mask


class Block:
    """A thread block: its shared memory and barriers."""

    def __init__(self, cluster: Cluster, rank: int, number: tuple[int, int, int], launch: Launch) -> None:
        self.cluster, self.rank, self.number, self.launch = cluster, rank, number, launch
        self.threads = int(np.prod(launch.block))
        self.shared_base = (rank << WINDOW) + FIRST
        size = launch.kernel.shared_bytes + launch.shared_bytes
        self.shared = Memory()
        # What nobody has written is NaN.
        storage = np.full(-(-size // 16) * 16, 0xFF, np.uint8)
        self.shared.add(Allocation("shared memory", self.shared_base, self.shared_base + size, storage))
        self.barriers = Barriers(self.threads)
        self.groups: dict[int, tensor_cores.WarpGroup] = defaultdict(tensor_cores.WarpGroup)


@dataclass(eq=False)
class Unit:
    """Warps that go on together."""

    block: Block
    thread: Array  # numbers in the block
    registers: list[Any]
    paths: list[Path]  # the lowest place first, and the only one that goes on: diverged lanes meet again
    cluster_arrivals: int = 0
    impatient: int = 0  # failed attempts at an mbarrier in a row
    copies: list[list[Copy]] = field(default_factory=lambda: [[]])  # cp.async's groups, the last one not committed

    def __post_init__(self) -> None:
        self.lanes = len(self.thread)
        self.lane = self.thread % 32
        self.first_warp = int(self.thread[0]) // 32

    def special(self, name: str) -> Any:
        """The value of a special register."""
        launch, block = self.block.launch, self.block
        (bx, by, _), (gx, gy, gz) = launch.block, launch.grid
        return {
            "%tid.x": lambda: self.thread % bx,
            "%tid.y": lambda: self.thread // bx % by,
            "%tid.z": lambda: self.thread // (bx * by),
            "%laneid": lambda: self.lane,
            **{f"%ntid.{axis}": lambda n=n: n for axis, n in zip("xyz", launch.block, strict=True)},
            **{f"%ctaid.{axis}": lambda n=n: n for axis, n in zip("xyz", block.number, strict=True)},
            **{f"%nctaid.{axis}": lambda n=n: n for axis, n in zip("xyz", (gx, gy, gz), strict=True)},
            "%cluster_ctarank": lambda: block.rank,
            **{
                f"%cluster_ctaid.{axis}": lambda n=n, c=c: n % c
                for axis, n, c in zip("xyz", block.number, launch.cluster, strict=True)
            },
            "%clock64": lambda: block.cluster.run.executed,  # as good as any other that only grows
        }[name]()

    def memory(self, space: str) -> Memory:
        """The memory behind a state space."""
        run = self.block.cluster.run
        return {"global": run.memory, "shared": self.block.shared, "param": run.parameters}[space]

    def take(self, lanes: Array) -> Unit:
        """The part of this unit that has these lanes, whole warps."""
        paths = []
        for path in self.paths:
            mask = lanes if path.mask is None else path.mask & lanes
            if mask.any():
                paths.append(Path(path.place, None if mask[lanes].all() else mask[lanes]))
        shared: dict[int, Any] = {}  # registers that nobody has written are one array
        registers = [shared.setdefault(id(r), r[lanes]) for r in self.registers]
        return Unit(
            *(self.block, self.thread[lanes], registers, paths, self.cluster_arrivals, self.impatient),
            [[copy.take(lanes) for copy in group] for group in self.copies],
        )


class Cluster:
    """Thread blocks that run at the same time and see each other's shared memory."""

    def __init__(self, run: Run, first: tuple[int, int, int]) -> None:
        self.run = run
        x, y, z = (range(n, n + size) for n, size in zip(first, run.launch.cluster, strict=True))
        numbers = [(i, j, k) for k in z for j in y for i in x]
        self.blocks = [Block(self, rank, number, run.launch) for rank, number in enumerate(numbers)]
        self.arrived = 0  # threads at barrier.cluster
        self.copies: list[tensor_memory.Copy] = []  # bulk copies in flight
        self.units = [unit for block in self.blocks for unit in self._units(block)]

    def _units(self, block: Block) -> list[Unit]:
        lanes = 32 * self.run.order.warps
        units = []
        for first in range(0, block.threads, lanes):
            thread = np.arange(first, min(first + lanes, block.threads))
            units.append(Unit(block, thread, list(self.run.unwritten(len(thread))), [Path(0, None)]))
        return units

    def block_at(self, address: int) -> Block:
        """Whose shared memory an address is in."""
        rank = address >> WINDOW
        if rank >= len(self.blocks):
            raise Fault(f"shared address {address:#x} of block {rank} in a cluster of {len(self.blocks)}")
        return self.blocks[rank]

    def split(self, unit: Unit, lanes: Array) -> Unit:
        """Part a unit: the warps that have these lanes, which is returned, and the others."""
        warps = np.repeat(lanes.reshape(-1, 32).any(1), 32)
        part, rest = unit.take(warps), unit.take(~warps)
        place = self.units.index(unit)
        self.units[place : place + 1] = [part, *([rest] if rest.paths else [])]
        return part

    def execute(self) -> None:
        """Run all blocks to their ends."""
        rng = self.run.rng
        while self.units:
            progress = False
            for unit in rng.sample(self.units, len(self.units)):
                if self.copies and rng.random() >= self.run.order.late:
                    self.copies.pop(rng.randrange(len(self.copies))).complete()
                    progress = True
                if unit in self.units:
                    progress |= self.advance(unit, rng.choice(BURSTS))
            if not progress:
                if not self.copies:
                    raise Fault("deadlock: " + "; ".join(self._where(unit) for unit in self.units))
                self.copies.pop(0).complete()
        if self.copies:
            raise Fault("a cluster has ended with bulk copies in flight")

    def _where(self, unit: Unit) -> str:
        statement = self.run.launch.kernel.statements[unit.paths[0].place]
        last = int(unit.thread[-1]) // 32
        return f"warps {unit.first_warp} to {last} of block {unit.block.number} at {statement.text[:100]}"

    def advance(self, unit: Unit, count: int) -> bool:
        """Let a unit execute up to ``count`` statements; false if it could not execute one."""
        run, done = self.run, 0
        while done < count:
            path = unit.paths[0]
            instruction = run.instruction(path.place)
            mask = path.mask
            if instruction.predicate is not None:
                chosen = unit.registers[instruction.predicate]
                chosen = ~chosen if instruction.negated else chosen
                mask = chosen if mask is None else mask & chosen
                if not mask.any():
                    self._next(unit, path)
                    done += 1
                    continue
                if mask.all():
                    mask = None
            if instruction.waits and mask is not None and self._spread(unit, mask):
                unit = self.split(unit, mask)
                continue
            try:
                outcome = instruction.meaning(unit, mask)
            except (Fault, NotImplementedError) as fault:
                raise type(fault)(f"{fault} ({self._where(unit)})") from None
            if outcome == BLOCKED:
                return done > 0
            done += 1
            run.executed += 1
            if outcome is None:
                self._next(unit, path)
            elif mask is None and outcome != EXIT:
                path.place = outcome
            else:
                self._jump(unit, path, mask, outcome)
                if not unit.paths:
                    self.units.remove(unit)
                    break
        return True

    @staticmethod
    def _spread(unit: Unit, mask: Array) -> bool:
        """Whether the unit has lanes of warps that the mask has none of."""
        warps = mask.reshape(-1, 32).any(1)
        return not warps.all() and any(
            path.mask is None or path.mask.reshape(-1, 32)[~warps].any() for path in unit.paths
        )

    @staticmethod
    def _next(unit: Unit, path: Path) -> None:
        path.place += 1
        if len(unit.paths) > 1 and unit.paths[1].place == path.place:
            _merge(path, unit.paths.pop(1))

    @staticmethod
    def _jump(unit: Unit, path: Path, mask: Mask, place: int) -> None:
        """Some lanes of the first path go to another place, or end; the others go on to the next."""
        before = np.ones(unit.lanes, bool) if path.mask is None else path.mask
        gone = before if mask is None else mask
        parts = [(path.place + 1, before & ~gone), *([(place, gone)] if place != EXIT else [])]
        del unit.paths[0]
        for where, lanes in parts:
            if not lanes.any():
                continue
            added = Path(where, None if lanes.all() else lanes)
            same = next((p for p in unit.paths if p.place == where), None)
            if same is not None:
                _merge(same, added)
            else:
                unit.paths.append(added)
        unit.paths.sort(key=lambda p: p.place)


def _merge(path: Path, other: Path) -> None:
    both = path.mask | other.mask  # type: ignore[operator]
    path.mask = None if both.all() else both


@dataclass
class Instruction:
    """A statement with its meaning."""

    meaning: Meaning
    predicate: int | None
    negated: bool
    waits: bool  # its warps have to be a unit of their own


class Program:
    """A kernel whose statements get their meaning when they are first reached."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.instructions: list[Instruction | None] = [None] * len(kernel.statements)

    def instruction(self, place: int) -> Instruction:
        """The instruction at a place."""
        found = self.instructions[place]
        if found is None:
            statement = self.kernel.statements[place]
            waits = statement.opcode.startswith(("bar", "mbarrier.try_wait", "wgmma"))
            waits &= not statement.opcode.startswith("bar.warp")
            predicate = None if statement.predicate is None else statement.predicate.number
            found = Instruction(build(statement), predicate, statement.negated, waits)
            self.instructions[place] = found
        return found


class Run:
    """One launch."""

    def __init__(self, program: Program, launch: Launch, memory: Memory, order: Order) -> None:
        self.instruction, self.launch, self.memory, self.order = program.instruction, launch, memory, order
        self.rng = random.Random(order.seed)
        self.executed = 0
        self._unwritten: dict[int, list[Array]] = {}
        self.parameters = Memory()
        # Loads may be as wide as their alignment says, past the last parameter.
        storage = np.frombuffer(launch.parameters.ljust(-(-len(launch.parameters) // 16) * 16, b"\0"), np.uint8)
        self.parameters.add(Allocation("the parameters", 0, len(launch.parameters), storage, writable=False))

    def unwritten(self, lanes: int) -> list[Array]:
        """Registers that nobody has written: NaN, or false."""
        if lanes not in self._unwritten:
            kinds = self.launch.kernel.registers
            values = {d: np.full(lanes, False if d.kind == "b" else np.iinfo(d).max, d) for d in set(kinds)}
            self._unwritten[lanes] = [values[d] for d in kinds]
        return self._unwritten[lanes]

    def execute(self) -> int:
        """Run all blocks, a cluster after the other; returns the number of instructions."""
        grid, cluster = self.launch.grid, self.launch.cluster
        if any(n % size for n, size in zip(grid, cluster, strict=True)):
            raise Fault(f"a grid of {grid} blocks is not whole clusters of {cluster}")
        x, y, z = (range(0, n, size) for n, size in zip(grid, cluster, strict=True))
        with np.errstate(all="ignore"):
            for k, j, i in product(z, y, x):
                Cluster(self, (i, j, k)).execute()
        return self.executed
