"""The tensor memory accelerator: boxes of a tensor in global memory to shared memory, in one block or several."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx_simulator.barriers import WINDOW, at
from tests.ptx_simulator.instructions import I32, U16, U64, Mask, Meaning, addresses_of, instruction, reader
from tests.ptx_simulator.memory import Array, Fault
from tests.ptx_simulator.parser import Address, Statement, Vector

if TYPE_CHECKING:
    from tests.ptx_simulator.machine import Unit

_FORMAT = "<8sQ4Q5I5H5H5B"  # struct TensorMap in runtime.cpp
MAGIC = b"tensor\0\0"
BYTES_OF_CODE = {1: 2, 6: 2, 7: 4}  # CU_TENSOR_MAP_DATA_TYPE_UINT16, FLOAT16, FLOAT32
SWIZZLED_BYTES = {0: 0, 1: 32, 2: 64, 3: 128}


def swizzle(offset: Array, row_bytes: int) -> Array:
    """Where a byte is that a tile of rows of this length keeps at ``offset``: granules of 16 bytes change places."""
    return offset ^ ((offset >> 7 & (row_bytes // 16 - 1)) << 4) if row_bytes else offset


@dataclass
class TensorMap:
    """What cuTensorMapEncodeTiled was told."""

    address: int
    shape: tuple[int, ...]  # innermost first, as all that follows
    strides: tuple[int, ...]  # bytes, from the second dimension on
    box: tuple[int, ...]
    item_bytes: int
    swizzled_bytes: int

    @classmethod
    def unpack(cls, data: bytes) -> TensorMap:
        """Read the fake map that runtime.cpp makes."""
        magic, address, *rest = struct.unpack(_FORMAT, data[: struct.calcsize(_FORMAT)])
        if magic != MAGIC:
            raise Fault("a bulk copy by what is no tensor map")
        strides, shape, box, steps = rest[:4], rest[4:9], rest[9:14], rest[14:19]
        code, rank, interleave, swizzled, fill = rest[19:]
        if code not in BYTES_OF_CODE or interleave or fill or any(step != 1 for step in steps[:rank]):
            raise NotImplementedError(f"tensor map {rest}")
        return cls(
            address, shape[:rank], strides[: rank - 1], box[:rank], BYTES_OF_CODE[code], SWIZZLED_BYTES[swizzled]
        )


@dataclass
class Copy:
    """A bulk copy in flight."""

    unit: Unit
    source: TensorMap
    corner: tuple[int, ...]
    destination: int  # addresses in each receiving block's window
    barrier: int
    blocks: list[int]

    def complete(self) -> None:
        """Write the box to the blocks, and count its bytes at their barriers."""
        source, memory = self.source, self.unit.block.cluster.run.memory
        coordinates = np.meshgrid(
            *(c + np.arange(n) for c, n in zip(reversed(self.corner), reversed(source.box), strict=True)), indexing="ij"
        )
        inside = np.ones(coordinates[0].shape, bool)
        addresses = np.full(inside.shape, source.address)
        for where, length, stride in zip(
            coordinates, reversed(source.shape), [*reversed(source.strides), source.item_bytes], strict=True
        ):
            inside &= (where >= 0) & (where < length)
            addresses = addresses + where * stride
        dtype = np.dtype(f"u{source.item_bytes}")
        box = np.zeros(inside.shape, dtype)
        if inside.any():
            box[inside] = memory.load(addresses[inside], dtype, 1)[0]
        offset = self.destination + np.arange(box.size) * source.item_bytes
        # The swizzle counts from the address 0 of a window.
        places = swizzle(offset, source.swizzled_bytes)
        for rank in self.blocks:
            window = rank << WINDOW
            self.unit.block.cluster.blocks[rank].shared.store(window + places, box.reshape(1, -1))
            at(self.unit, window + self.barrier).update(received_bytes=box.nbytes)


@instruction("cp.async.bulk.tensor")
def _copy(statement: Statement) -> Meaning:
    words = statement.parts
    if "shared::cluster" not in words or "global" not in words:
        raise NotImplementedError(statement.text)
    source = statement.operands[1]
    if not isinstance(source, Address) or not isinstance(source.coordinates, Vector):
        raise NotImplementedError(statement.text)
    tensor_map = reader(source.base, U64)
    corner = [reader(o, I32) for o in source.coordinates.parts]
    destinations, barriers = addresses_of(statement.operands[0]), addresses_of(statement.operands[2])
    multicast = reader(statement.operands[3], U16) if "multicast::cluster" in words else None

    def run(unit: Unit, mask: Mask) -> None:
        cluster = unit.block.cluster

        def one(value: Array, lane: int) -> int:
            return int(np.broadcast_to(value, unit.lanes)[lane])

        for lane in range(unit.lanes) if mask is None else np.flatnonzero(mask):
            where = one(tensor_map(unit), lane)
            if where % 64:
                raise Fault("a tensor map that is not aligned to 64 bytes")
            destination, barrier = one(destinations(unit), lane), one(barriers(unit), lane)
            if destination % 128:
                raise Fault("a bulk copy to an address that is not aligned to 128 bytes")
            receivers = 1 << (destination >> WINDOW) if multicast is None else one(multicast(unit), lane)
            inside = (1 << WINDOW) - 1
            data = cluster.run.launch.parameters[where : where + 128]
            cluster.copies.append(
                Copy(
                    unit,
                    TensorMap.unpack(data),
                    tuple(one(c(unit), lane) for c in corner),
                    destination & inside,
                    barrier & inside,
                    [rank for rank in range(16) if receivers >> rank & 1],
                )
            )

    return run
