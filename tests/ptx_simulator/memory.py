"""Memory as allocations: what lies outside of one, or is misaligned, cannot be accessed."""

from __future__ import annotations

import bisect
import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
GRANULE = 16  # bytes, the widest access


class Fault(Exception):
    """What a kernel must not do."""


@dataclass
class Allocation:
    """Addresses from ``base`` to ``end``; ``storage`` starts at the granule of ``base``."""

    name: str
    base: int
    end: int
    storage: Array
    writable: bool = True

    @property
    def origin(self) -> int:
        """The address of the first byte of the storage."""
        return self.base // GRANULE * GRANULE


class Memory:
    """Allocations that do not overlap."""

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []
        self._bases: list[int] = []

    def add(self, allocation: Allocation) -> None:
        """Make an allocation known."""
        place = bisect.bisect(self._bases, allocation.base)
        neighbours = self.allocations[max(place - 1, 0) : place + 1]
        if any(a.base < allocation.end and allocation.base < a.end for a in neighbours):
            raise ValueError(f"{allocation.name} overlaps {' or '.join(a.name for a in neighbours)}")
        self._bases.insert(place, allocation.base)
        self.allocations.insert(place, allocation)

    def add_host(self, address: int, size: int, name: str, writable: bool) -> None:
        """Make memory of this process known under its own address."""
        origin = address // GRANULE * GRANULE
        length = -(-(address + size - origin) // GRANULE) * GRANULE
        storage = np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(origin))
        self.add(Allocation(name, address, address + size, storage, writable))

    def find(self, first: int, end: int, write: bool = False) -> Allocation:
        """The allocation that has all bytes from ``first`` to ``end``."""
        place = bisect.bisect(self._bases, first) - 1
        if place < 0:
            raise Fault(f"access at {first:#x}, where nothing is")
        allocation = self.allocations[place]
        if end > allocation.end:
            first, end, size = (place - allocation.base for place in (first, end, allocation.end))
            raise Fault(f"access to bytes {first} to {end} of {allocation.name}, which has {size}")
        if write and not allocation.writable:
            raise Fault(f"write to {allocation.name}")
        return allocation

    def load(self, addresses: Array, dtype: np.dtype[Any], count: int) -> Array:
        """``count`` neighbours from each address, [count, addresses]."""
        out = np.empty((count, len(addresses)), dtype)
        for lanes, view, places in self._parts(addresses, dtype, count, write=False):
            out[:, lanes] = view[places].T
        return out

    def store(self, addresses: Array, values: Array) -> None:
        """The inverse of `load`; of two values for one address the later lane's stays."""
        for lanes, view, places in self._parts(addresses, values.dtype, len(values), write=True):
            view[places] = values[:, lanes].T

    def _parts(
        self, addresses: Array, dtype: np.dtype[Any], count: int, write: bool
    ) -> list[tuple[slice | Array, Array, Array]]:
        """For each allocation that is met: the lanes, the storage as rows of ``count`` values, and the lanes' rows."""
        size = dtype.itemsize * count
        if (addresses % size).any():
            raise Fault(f"misaligned access of {size} bytes at {addresses[addresses % size != 0][0]:#x}")
        low, high = int(addresses.min()), int(addresses.max())
        allocation = self.find(low, low + size, write)
        if high + size <= allocation.end:
            return [(slice(None), *self._rows(allocation, addresses, dtype, count))]
        owners = np.searchsorted(self._bases, addresses, side="right")
        parts: list[tuple[slice | Array, Array, Array]] = []
        for owner in np.unique(owners):
            lanes = np.flatnonzero(owners == owner)
            here = addresses[lanes]
            allocation = self.find(int(here.min()), int(here.max()) + size, write)
            parts.append((lanes, *self._rows(allocation, here, dtype, count)))
        return parts

    @staticmethod
    def _rows(allocation: Allocation, addresses: Array, dtype: np.dtype[Any], count: int) -> tuple[Array, Array]:
        view = allocation.storage.view(dtype).reshape(-1, count)
        return view, (addresses - allocation.origin) // (dtype.itemsize * count)
