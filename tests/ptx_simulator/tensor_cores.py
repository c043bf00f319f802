"""WGMMA: products of a warp group, which complete some time between their issue and the wait for them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx_simulator.barriers import WINDOW
from tests.ptx_simulator.instructions import BLOCKED, F32, TYPES, U32, U64, Mask, Meaning, Reader, instruction, reader
from tests.ptx_simulator.memory import Array, Fault
from tests.ptx_simulator.parser import Constant, Register, Statement, Vector
from tests.ptx_simulator.tensor_memory import swizzle

if TYPE_CHECKING:
    from tests.ptx_simulator.machine import Block, Unit

WARPS = 4
_ROW_BYTES = {1: 128, 2: 64, 3: 32}  # by a descriptor's swizzle mode


@dataclass
class Product:
    """One WGMMA as it was issued: A (16 rows a warp) times B transposed into accumulators."""

    accumulators: tuple[int, ...]  # numbers of registers
    columns: int
    kind: str  # "f16" | "tf32"
    a: int | tuple[int, ...]  # a descriptor, or the numbers of registers
    b: int
    accumulate: bool

    def execute(self, unit: Unit) -> None:
        """For the rows of a unit's warps."""
        warps = unit.lanes // 32
        if isinstance(self.a, int):
            a = _operand(unit.block, self.a, 64, self.kind)[16 * (unit.first_warp % WARPS) :][: 16 * warps]
        else:
            # Lane 4 r + q of warp w has column q (+ 4) of row 16 w + r (+ 8), in the order (r, q), (r + 8, q), ...
            parts = np.stack([unit.registers[n] for n in self.a]).reshape(2, 2, warps, 8, 4)
            a = _value(parts.transpose(2, 1, 3, 0, 4), self.kind).reshape(16 * warps, 8)
        b = _operand(unit.block, self.b, self.columns, self.kind)
        # Row 16 w + 8 h + r and column 8 g + 2 q + c belong to register (g, h, c) of lane 4 r + q of warp w.
        sums = (a @ b.T).reshape(warps, 2, 8, self.columns // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
        values = sums.reshape(len(self.accumulators), unit.lanes)
        if self.accumulate:
            values = values + np.stack([unit.registers[n].view(F32) for n in self.accumulators])
        for number, value in zip(self.accumulators, values.astype(F32).view(U32), strict=True):
            unit.registers[number] = value


@dataclass
class WarpGroup:
    """Its products: issued by each warp, committed in groups, done."""

    issued: dict[int, list[Product]] = field(default_factory=lambda: {w: [] for w in range(WARPS)})
    committed: dict[int, list[list[Product]]] = field(default_factory=lambda: {w: [] for w in range(WARPS)})
    done: int = 0

    def complete(self, units: list[Unit], groups: int) -> None:
        """Execute what the first ``groups`` groups have left: the tensor cores serve all four warps at once."""
        for number in range(self.done, groups):
            for unit in units:
                for product in self.committed[unit.first_warp % WARPS][number]:
                    product.execute(unit)
        self.done = max(self.done, groups)


def _value(bits: Array, kind: str) -> Array:
    # Of float32 the tensor cores ignore what tf32 does not have.
    values = bits.view(TYPES["f16"]) if kind == "f16" else (bits & U32.type(0xFFFFE000)).view(F32)
    return values.astype(np.float64)


def _operand(block: Block, descriptor: int, rows: int, kind: str) -> Array:
    """A matrix of rows of 32 bytes in shared memory, each contiguous up to the swizzle."""
    row_bytes = _ROW_BYTES.get(descriptor >> 62)
    if row_bytes is None or descriptor >> 49 & 7:
        raise NotImplementedError(f"matrix descriptor {descriptor:#x}")
    dtype = TYPES["b16" if kind == "f16" else "b32"]
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    row = np.arange(rows)[:, None]
    offset = start + row // 8 * stride + row % 8 * row_bytes + np.arange(0, 32, dtype.itemsize)
    places = (block.rank << WINDOW) + swizzle(offset, row_bytes)
    return _value(block.shared.load(places.reshape(-1), dtype, 1), kind).reshape(rows, -1)


def _numbers(registers: Vector) -> tuple[int, ...]:
    return tuple(r.number for r in registers.parts if isinstance(r, Register))


def _one(unit: Unit, read: Reader) -> int:
    values = np.unique(read(unit))
    if len(values) != 1:
        raise Fault("a warp group's lanes give different operands")
    return int(values[0])


def _warps(unit: Unit, mask: Mask) -> range:
    if mask is not None:
        raise Fault("a warp group has diverged")
    if unit.first_warp % WARPS + unit.lanes // 32 > WARPS:
        raise NotImplementedError("a unit of several warp groups")
    return range(unit.first_warp % WARPS, unit.first_warp % WARPS + unit.lanes // 32)


def _group(unit: Unit) -> tuple[WarpGroup, list[Unit]]:
    number = unit.first_warp // WARPS
    units = [u for u in unit.block.cluster.units if u.block is unit.block and u.first_warp // WARPS == number]
    return unit.block.groups[number], units


@instruction("wgmma.mma_async.sync.aligned")
def _issue(statement: Statement) -> Meaning:
    shape = re.search(r"\.m64n(\d+)k(?:16\.f32\.f16\.f16|8\.f32\.tf32\.tf32)$", statement.opcode)
    to, first, second, *operands = statement.operands
    flags = [o.bits for o in operands[1:] if isinstance(o, Constant)]
    # Signs of A and B, then their transpositions, which only 16-bit types have.
    if shape is None or not isinstance(to, Vector) or flags not in ([1, 1, 0, 0], [1, 1]):
        raise NotImplementedError(statement.text)
    accumulators, columns, kind = _numbers(to), int(shape[1]), statement.parts[-1]
    if len(accumulators) != columns // 2 or (isinstance(first, Vector) and kind != "tf32"):
        raise NotImplementedError(statement.text)
    a = None if isinstance(first, Vector) else reader(first, U64)
    a_numbers = _numbers(first) if isinstance(first, Vector) else ()
    b, accumulate = reader(second, U64), reader(operands[0], TYPES["pred"])

    def run(unit: Unit, mask: Mask) -> None:
        group, _ = _group(unit)
        warps = _warps(unit, mask)
        left = a_numbers if a is None else _one(unit, a)
        product = Product(accumulators, columns, kind, left, _one(unit, b), bool(_one(unit, accumulate)))
        for warp in warps:
            group.issued[warp].append(product)

    return run


@instruction("wgmma.commit_group")
def _commit(statement: Statement) -> Meaning:
    def run(unit: Unit, mask: Mask) -> None:
        group, units = _group(unit)
        for warp in _warps(unit, mask):
            group.committed[warp].append(group.issued[warp])
            group.issued[warp] = []
        order = unit.block.cluster.run
        if order.rng.random() >= order.order.late:
            group.complete(units, min(len(c) for c in group.committed.values()))

    return run


@instruction("wgmma.wait_group")
def _wait(statement: Statement) -> Meaning:
    pending = statement.operands[0].bits  # type: ignore[union-attr]

    def run(unit: Unit, mask: Mask) -> int | None:
        group, units = _group(unit)
        warps = _warps(unit, mask)
        wanted = len(group.committed[warps[0]]) - pending
        if min(len(c) for c in group.committed.values()) < wanted:
            return BLOCKED  # none of the four is served before all have asked
        group.complete(units, wanted)
        return None

    return run
