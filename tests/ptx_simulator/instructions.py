"""What each statement does to the registers and the memory of the lanes that execute it.

A lane's value of a register is one element of an array. A meaning is built once from a statement, and then called with
a unit of warps and the mask of its lanes (None: all).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx_simulator.memory import Array, Fault
from tests.ptx_simulator.parser import Address, Constant, Negated, Operand, Register, Special, Statement, Symbol, Vector

if TYPE_CHECKING:
    from tests.ptx_simulator.machine import Unit

Mask = Array | None
Reader = Callable[["Unit"], Any]
Writer = Callable[["Unit", Mask, Any], None]
# Called with the unit and the lanes; gives None (go on), the statement to jump to, or one of the two below.
Meaning = Callable[["Unit", Mask], "int | None"]
EXIT, BLOCKED = -1, -2

# Words that would change a meaning: saturation, other roundings, carries.
_UNKNOWN = {"sat", "relu", "rz", "rm", "rp", "cc"}
BUILDERS: dict[str, Callable[[Statement], Meaning]] = {}
LANES = np.arange(32)

TYPES: dict[str, np.dtype[Any]] = {
    f"{kind}{8 * size}": np.dtype(f"{code}{size}")
    for kind, code in (("b", "u"), ("u", "u"), ("s", "i"), ("f", "f"))
    for size in ((2, 4, 8) if kind == "f" else (1, 2, 4, 8))
}
TYPES |= {"pred": np.dtype(bool), "bf16": TYPES["b16"], "f16x2": TYPES["b32"], "bf16x2": TYPES["b32"]}
U16, U32, I32, F32, U64, I64 = (TYPES[t] for t in ("u16", "u32", "s32", "f32", "u64", "s64"))


def instruction(*names: str) -> Callable[[Callable[[Statement], Meaning]], Callable[[Statement], Meaning]]:
    """Register a builder for opcodes that start with these words."""

    def register(build: Callable[[Statement], Meaning]) -> Callable[[Statement], Meaning]:
        BUILDERS.update(dict.fromkeys(names, build))
        return build

    return register


def build(statement: Statement) -> Meaning:
    """The meaning of a statement; the longest registered name that its opcode starts with decides."""
    words = statement.parts
    if not _UNKNOWN.isdisjoint(words):
        raise NotImplementedError(statement.text)
    for length in range(len(words), 0, -1):
        builder = BUILDERS.get(".".join(words[:length]))
        if builder is not None:
            return builder(statement)
    raise NotImplementedError(statement.text)


def bits(value: int, dtype: np.dtype[Any]) -> Any:
    """A scalar of ``dtype`` from the bits of a constant."""
    if dtype == TYPES["pred"]:
        return np.bool_(value)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    return np.array(value & ((1 << 8 * dtype.itemsize) - 1), unsigned).view(dtype)[()]


def reader(operand: Operand | None, dtype: np.dtype[Any]) -> Reader:
    """How to read an operand as ``dtype``: an array with an element for each lane, or a scalar."""
    if isinstance(operand, Register):
        number, stored = operand.number, operand.dtype
        if stored == dtype:
            return lambda unit: unit.registers[number]
        if stored.itemsize == dtype.itemsize:
            return lambda unit: unit.registers[number].view(dtype)
        if stored.itemsize > dtype.itemsize:
            unsigned = np.dtype(f"u{dtype.itemsize}")
            return lambda unit: unit.registers[number].astype(unsigned).view(dtype)
    elif isinstance(operand, Constant):
        value = bits(operand.bits, dtype)
        return lambda unit: value
    elif isinstance(operand, Symbol):
        offset = operand.offset
        if operand.space != "shared":
            value = bits(offset, dtype)
            return lambda unit: value
        return lambda unit: bits(unit.block.shared_base + offset, dtype)
    elif isinstance(operand, Special):
        name = operand.name
        return lambda unit: np.asarray(unit.special(name)).astype(dtype)
    elif isinstance(operand, Negated):
        inner = reader(operand.operand, dtype)
        return lambda unit: ~inner(unit)
    raise NotImplementedError(f"{operand} as {dtype}")


def writer(operand: Operand | None, dtype: np.dtype[Any]) -> Writer:
    """How to write ``dtype`` to a register, extended to its size; lanes that the mask leaves out keep theirs."""
    if operand is None:
        return lambda unit, mask, value: None
    if not isinstance(operand, Register):
        raise NotImplementedError(operand)
    number, stored = operand.number, operand.dtype
    same = stored.itemsize == dtype.itemsize

    def write(unit: Unit, mask: Mask, value: Any) -> None:
        if value.ndim == 0:
            value = np.full(unit.lanes, value)
        value = value.view(stored) if same else value.astype(stored)
        unit.registers[number] = value if mask is None else np.where(mask, value, unit.registers[number])

    return write


def whole_warps(unit: Unit, mask: Mask) -> None:
    """What .sync asks for: all lanes of a warp, or none."""
    if mask is not None:
        lanes = mask.reshape(-1, 32)
        if (lanes.any(1) != lanes.all(1)).any():
            raise Fault("a warp has diverged at .sync")


def elementwise(
    statement: Statement, function: Callable[..., Any], result: np.dtype[Any], *arguments: np.dtype[Any]
) -> Meaning:
    """The first operand becomes a function of the others, lane by lane."""
    write = writer(statement.operands[0], result)
    reads = [reader(o, t) for o, t in zip(statement.operands[1:], arguments, strict=True)]
    if len(reads) == 1:
        (a,) = reads
        return lambda unit, mask: write(unit, mask, function(a(unit)))
    if len(reads) == 2:
        a, b = reads
        return lambda unit, mask: write(unit, mask, function(a(unit), b(unit)))
    a, b, c = reads
    return lambda unit, mask: write(unit, mask, function(a(unit), b(unit), c(unit)))


def last_type(statement: Statement) -> np.dtype[Any]:
    """The type that an opcode ends with."""
    return TYPES[statement.parts[-1]]


# Arithmetic


def _fma(a: Any, b: Any, c: Any) -> Any:
    # The product of two float32 is exact in float64.
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(F32)


def _flush(value: Any) -> Any:
    return np.where(np.abs(value) < np.finfo(F32).tiny, np.copysign(F32.type(0), value), value)


def _flushed(function: Callable[..., Any]) -> Callable[..., Any]:
    """With subnormal arguments and results as zeros: .ftz."""
    return lambda *arguments: _flush(function(*map(_flush, arguments)))


def _widened(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of float32 by way of float64."""
    return lambda a: function(a.astype(np.float64)).astype(F32)


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
_DROPS_NAN: dict[str, Callable[[Any, Any], Any]] = {"min": np.fmin, "max": np.fmax}


@instruction("add", "sub", "mul.f32", "mul.rn", "mul.lo", "div", "min", "max", "and", "or", "xor")
def _binary(statement: Statement) -> Meaning:
    words, dtype = statement.parts, last_type(statement)
    if words[0] in _DROPS_NAN and dtype.kind == "f" and "NaN" not in words:
        function = _DROPS_NAN[words[0]]
    elif words[0] == "div" and dtype.kind != "f":
        # Toward zero, where numpy rounds down.
        function = lambda a, b: np.trunc(a.astype(np.float64) / b.astype(np.float64)).astype(dtype)  # noqa: E731
        if dtype.itemsize > 4:
            raise NotImplementedError(statement.text)
    else:
        function = _BINARY[words[0]]
    return elementwise(statement, _flushed(function) if "ftz" in words else function, dtype, dtype, dtype)


@instruction("fma")
def _fused(statement: Statement) -> Meaning:
    if last_type(statement) != F32:
        raise NotImplementedError(statement.text)
    return elementwise(statement, _flushed(_fma) if "ftz" in statement.parts else _fma, F32, F32, F32, F32)


@instruction("mad.lo")
def _mad(statement: Statement) -> Meaning:
    dtype = last_type(statement)
    return elementwise(statement, lambda a, b, c: a * b + c, dtype, dtype, dtype, dtype)


@instruction("mul.wide", "mad.wide")
def _wide(statement: Statement) -> Meaning:
    dtype = last_type(statement)
    wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
    if statement.parts[0] == "mul":
        return elementwise(statement, lambda a, b: a.astype(wide) * b.astype(wide), wide, dtype, dtype)
    return elementwise(statement, lambda a, b, c: a.astype(wide) * b.astype(wide) + c, wide, dtype, dtype, wide)


@instruction("mul.hi")
def _high(statement: Statement) -> Meaning:
    dtype = last_type(statement)
    size = 8 * dtype.itemsize
    high = np.frompyfunc(lambda a, b: int(a) * int(b) >> size, 2, 1)
    if size == 32:
        wide = np.dtype(f"{dtype.kind}8")
        return elementwise(
            statement,
            lambda a, b: (a.astype(wide) * b.astype(wide) >> wide.type(32)).astype(dtype),
            dtype,
            dtype,
            dtype,
        )
    return elementwise(statement, lambda a, b: np.asarray(high(a, b), dtype=dtype), dtype, dtype, dtype)


@instruction("neg", "abs", "not", "cvta", "rcp", "sqrt", "ex2")
def _unary(statement: Statement) -> Meaning:
    words, dtype = statement.parts, last_type(statement)
    functions: dict[str, Callable[[Any], Any]] = {
        "neg": np.negative,
        "abs": np.abs,
        "not": np.invert,
        "cvta": lambda a: a,  # all spaces have their own addresses
        "rcp": _widened(np.reciprocal),
        "sqrt": np.sqrt,
        "ex2": _widened(np.exp2),
    }
    function = functions[words[0]]
    return elementwise(statement, _flushed(function) if "ftz" in words else function, dtype, dtype)


@instruction("shl", "shr")
def _shift(statement: Statement) -> Meaning:
    dtype = last_type(statement)
    size = 8 * dtype.itemsize
    shift = np.left_shift if statement.parts[0] == "shl" else np.right_shift
    amount = statement.operands[2]
    if isinstance(amount, Constant) and amount.bits < size:
        fixed = dtype.type(amount.bits)
        write, read = writer(statement.operands[0], dtype), reader(statement.operands[1], dtype)
        return lambda unit, mask: write(unit, mask, shift(read(unit), fixed))

    def function(a: Any, b: Any) -> Any:
        moved = shift(a, np.minimum(b, U32.type(size - 1)).astype(dtype))
        # Amounts past the width leave nothing, of a signed number its sign.
        return moved if dtype.kind == "i" and shift is np.right_shift else np.where(b < size, moved, dtype.type(0))

    return elementwise(statement, function, dtype, dtype, U32)


@instruction("bfi")
def _insert(statement: Statement) -> Meaning:
    dtype = last_type(statement)
    reads = [reader(o, t) for o, t in zip(statement.operands[1:], (dtype, dtype, U32, U32), strict=True)]
    write = writer(statement.operands[0], dtype)

    def run(unit: Unit, mask: Mask) -> None:
        a, b, start, length = (read(unit) for read in reads)
        field = ((dtype.type(1) << length.astype(dtype)) - dtype.type(1)) << start.astype(dtype)
        write(unit, mask, (b & ~field) | ((a << start.astype(dtype)) & field))

    return run


@instruction("bfe.u32", "bfe.s32")
def _extract(statement: Statement) -> Meaning:
    dtype = last_type(statement)

    def function(a: Any, start: Any, length: Any) -> Any:
        above = U32.type(32) - length
        return (a << (above - start)).view(dtype) >> above.astype(dtype)

    return elementwise(statement, function, dtype, U32, U32, U32)


@instruction("shf.l.wrap")
def _funnel(statement: Statement) -> Meaning:
    def function(a: Any, b: Any, amount: Any) -> Any:
        both = a.astype(U64) | (b.astype(U64) << U64.type(32))
        return ((both << (amount & U32.type(31)).astype(U64)) >> U64.type(32)).astype(U32)

    return elementwise(statement, function, U32, U32, U32, U32)


# Comparison and choice

_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    **{name: getattr(operator, name) for name in ("eq", "lt", "le", "gt", "ge")},
    "ne": lambda a, b: (a < b) | (a > b),  # false of a NaN
    "neu": operator.ne,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}


@instruction("setp")
def _compare(statement: Statement) -> Meaning:
    words, dtype = statement.parts, last_type(statement)
    if words[1] not in _COMPARISONS:
        raise NotImplementedError(statement.text)
    compare = operator.ne if words[1] == "ne" and dtype.kind != "f" else _COMPARISONS[words[1]]
    first = statement.operands[0]
    destinations = first.parts if isinstance(first, Vector) else (first, None)
    write, write_other = (writer(d, TYPES["pred"]) for d in destinations)
    a, b = (reader(o, dtype) for o in statement.operands[1:3])
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(words[2])
    other = reader(statement.operands[3], TYPES["pred"]) if combine else None

    def run(unit: Unit, mask: Mask) -> None:
        result = np.asarray(compare(a(unit), b(unit)))
        negated = ~result
        if combine is not None and other is not None:
            with_other = other(unit)
            result, negated = combine(result, with_other), combine(negated, with_other)
        write(unit, mask, result)
        write_other(unit, mask, negated)

    return run


@instruction("selp")
def _select(statement: Statement) -> Meaning:
    dtype = last_type(statement)
    return elementwise(statement, lambda a, b, p: np.where(p, a, b), dtype, dtype, dtype, TYPES["pred"])


# Conversion


def to_bfloat16(value: Any) -> Any:
    """The bits of float32 rounded to the nearest bfloat16, to even."""
    word = value.view(U32)
    rounded = (word + U32.type(0x7FFF) + ((word >> U32.type(16)) & U32.type(1))) >> U32.type(16)
    return np.where(np.isnan(value), U32.type(0x7FFF), rounded).astype(U16)


def from_bfloat16(value: Any) -> Any:
    """float32 of bfloat16's bits."""
    return (value.astype(U32) << U32.type(16)).view(F32)


def to_tf32(word: Any) -> Any:
    """The bits of float32 rounded to 10 of mantissa, ties away from zero; a NaN may become another."""
    infinite = (word & U32.type(0x7F800000)) == U32.type(0x7F800000)
    return np.where(infinite, word, (word + U32.type(0x1000)) & U32.type(0xFFFFE000))


_ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@instruction("cvt")
def _convert(statement: Statement) -> Meaning:
    words = statement.parts
    to, of = words[-2], words[-1]
    modes = set(words[1:-2])
    if modes - {"rn", "rna", *_ROUNDINGS, "ftz"}:
        raise NotImplementedError(statement.text)
    rounding = next((_ROUNDINGS[m] for m in modes if m in _ROUNDINGS), None)
    if to in ("f16x2", "bf16x2"):
        half = to_bfloat16 if to == "bf16x2" else lambda a: a.astype(np.float16).view(U16)
        return elementwise(
            statement, lambda a, b: (half(a).astype(U32) << U32.type(16)) | half(b).astype(U32), U32, F32, F32
        )
    if to == "tf32":
        return elementwise(statement, to_tf32, U32, U32)
    result, argument = TYPES[to], TYPES[of]
    if to == "bf16":
        function = to_bfloat16
    elif of == "bf16":
        function = from_bfloat16
    elif argument.kind == "f" and result.kind != "f":
        limits = np.iinfo(result)

        def function(a: Any) -> Any:
            whole = np.nan_to_num(rounding(a.astype(np.float64)), nan=0.0)  # type: ignore[misc]
            return np.clip(whole, limits.min, limits.max).astype(result)

    elif argument.kind == "f" and rounding is not None:
        function = rounding
    else:
        function = lambda a: a.astype(result)  # noqa: E731
    return elementwise(statement, function, result, argument)


@instruction("mov")
def _move(statement: Statement) -> Meaning:
    to, of = statement.operands
    dtype = last_type(statement)
    if isinstance(to, Vector):
        size = dtype.itemsize // len(to.parts)
        part = np.dtype(f"u{size}")
        writes = [writer(o, part) for o in to.parts]
        read = reader(of, dtype)

        def unpack(unit: Unit, mask: Mask) -> None:
            value = read(unit)
            for place, write in enumerate(writes):
                write(unit, mask, (value >> dtype.type(8 * size * place)).astype(part))

        return unpack
    if isinstance(of, Vector):
        size = dtype.itemsize // len(of.parts)
        reads = [reader(o, np.dtype(f"u{size}")) for o in of.parts]
        write = writer(to, dtype)

        def pack(unit: Unit, mask: Mask) -> None:
            value = reads[0](unit).astype(dtype)
            for place, read in enumerate(reads[1:], 1):
                value = value | (read(unit).astype(dtype) << dtype.type(8 * size * place))
            write(unit, mask, value)

        return pack
    return elementwise(statement, np.asarray, dtype, dtype)


# Memory


def addresses_of(operand: Operand | None) -> Callable[[Unit], Array]:
    """The lanes' addresses, int64."""
    if not isinstance(operand, Address):
        raise NotImplementedError(operand)
    base, offset = operand.base, operand.offset
    wide = isinstance(base, Register) and base.dtype == U64
    read = reader(base, U64 if wide or isinstance(base, Symbol) else U32)

    def addresses(unit: Unit) -> Array:
        value = read(unit).astype(I64) + offset
        return np.full(unit.lanes, value) if value.ndim == 0 else value

    return addresses


@instruction("ld")
def _load(statement: Statement) -> Meaning:
    words, dtype = statement.parts, last_type(statement)
    to = statement.operands[0]
    writes = [writer(o, dtype) for o in (to.parts if isinstance(to, Vector) else (to,))]
    addresses = addresses_of(statement.operands[1])
    space = words[1].split(":")[0]

    def run(unit: Unit, mask: Mask) -> None:
        memory = unit.memory(space)
        where = addresses(unit)
        if mask is None:
            values = memory.load(where, dtype, len(writes))
        else:
            values = np.zeros((len(writes), unit.lanes), dtype)
            values[:, mask] = memory.load(where[mask], dtype, len(writes))
        for write, value in zip(writes, values, strict=True):
            write(unit, mask, value)

    return run


@instruction("st")
def _store(statement: Statement) -> Meaning:
    words, dtype = statement.parts, last_type(statement)
    addresses = addresses_of(statement.operands[0])
    of = statement.operands[1]
    reads = [reader(o, dtype) for o in (of.parts if isinstance(of, Vector) else (of,))]
    space = words[1].split(":")[0]

    def run(unit: Unit, mask: Mask) -> None:
        values = np.stack([np.broadcast_to(read(unit), unit.lanes) for read in reads])
        where = addresses(unit)
        if mask is not None:
            values, where = values[:, mask], where[mask]
        unit.memory(space).store(where, values)

    return run


@dataclass
class Copy:
    """cp.async in flight: some words from each lane's source to its destination, or zeros in their place."""

    source: Array
    destination: Array
    lanes: Array
    filled: Array  # whether a lane's source is read
    words: int  # of four bytes

    def take(self, lanes: Array) -> Copy:
        """Of some lanes only."""
        return Copy(self.source[lanes], self.destination[lanes], self.lanes[lanes], self.filled[lanes], self.words)

    def complete(self, unit: Unit) -> None:
        """Copy."""
        read = self.lanes & self.filled
        values = np.zeros((self.words, len(read)), U32)
        if read.any():
            values[:, read] = unit.memory("global").load(self.source[read], U32, self.words)
        if self.lanes.any():
            unit.block.shared.store(self.destination[self.lanes], values[:, self.lanes])


@instruction("cp.async.cg.shared.global", "cp.async.ca.shared.global")
def _copy(statement: Statement) -> Meaning:
    destination, source = (addresses_of(o) for o in statement.operands[:2])
    size, filled = (reader(o, U32) for o in (statement.operands[2], statement.operands[-1]))

    def run(unit: Unit, mask: Mask) -> None:
        lanes = np.ones(unit.lanes, bool) if mask is None else mask
        bytes_read = np.broadcast_to(filled(unit), unit.lanes)
        whole = int(size(unit))
        if not np.isin(bytes_read[lanes], (0, whole)).all():
            raise NotImplementedError(statement.text)
        unit.copies[-1].append(Copy(source(unit), destination(unit), lanes, bytes_read == whole, whole // 4))

    return run


@instruction("cp.async.commit_group", "cp.async.wait_group")
def _wait_for_copies(statement: Statement) -> Meaning:
    commits = statement.parts[2] == "commit_group"
    allowed = statement.operands[0].bits if statement.operands else 0  # type: ignore[union-attr]

    def run(unit: Unit, mask: Mask) -> None:
        run = unit.block.cluster.run
        if commits:
            unit.copies.append([])
        # Groups complete in their order: before a wait for them, or then.
        pending = len(unit.copies) - 1 if commits else allowed
        while len(unit.copies) - 1 > pending or (len(unit.copies) > 1 and run.rng.random() >= run.order.late):
            for copy in unit.copies.pop(0):
                copy.complete(unit)

    return run


# Warps


@instruction("shfl.sync")
def _shuffle(statement: Statement) -> Meaning:
    mode = statement.parts[2]
    first = statement.operands[0]
    destination, inside = first.parts if isinstance(first, Vector) else (first, None)
    write, write_inside = writer(destination, U32), writer(inside, TYPES["pred"])
    value, by, clamp = (reader(o, U32) for o in statement.operands[1:4])

    def run(unit: Unit, mask: Mask) -> None:
        whole_warps(unit, mask)
        parts = clamp(unit) != (0 if mode == "up" else 31)
        if (parts if mask is None else parts & mask).any():
            raise NotImplementedError("shfl of parts of a warp")
        lane, amount = unit.lane, by(unit).astype(I64)
        source = {"bfly": lane ^ amount, "idx": amount & 31, "down": lane + amount, "up": lane - amount}[mode]
        source = np.broadcast_to(source, unit.lanes)
        exists = (source >= 0) & (source < 32)
        source = np.where(exists, source, lane) + (np.arange(unit.lanes) - lane)
        write(unit, mask, np.broadcast_to(value(unit), unit.lanes)[source])
        write_inside(unit, mask, exists)

    return run


@instruction("vote.sync.any.pred")
def _vote(statement: Statement) -> Meaning:
    write, read = (writer(statement.operands[0], TYPES["pred"]), reader(statement.operands[1], TYPES["pred"]))

    def run(unit: Unit, mask: Mask) -> None:
        whole_warps(unit, mask)
        votes = np.broadcast_to(read(unit), unit.lanes).reshape(-1, 32)
        write(unit, mask, np.repeat(votes.any(1), 32))

    return run


@instruction("redux.sync")
def _reduce(statement: Statement) -> Meaning:
    dtype = last_type(statement)
    function = {"min": np.minimum, "max": np.maximum}[statement.parts[2]]
    write, read = writer(statement.operands[0], dtype), reader(statement.operands[1], dtype)

    def run(unit: Unit, mask: Mask) -> None:
        whole_warps(unit, mask)
        values = np.broadcast_to(read(unit), unit.lanes).reshape(-1, 32)
        write(unit, mask, np.repeat(function.reduce(values, axis=1), 32))

    return run


@instruction("ldmatrix.sync.aligned.m8n8", "stmatrix.sync.aligned.m8n8")
def _matrices(statement: Statement) -> Meaning:
    """Matrices of 8 rows of 8 values: lane 8 m + r has the address of row r of matrix m."""
    words = statement.parts
    loads, transposed = words[0] == "ldmatrix", "trans" in words
    registers, address = statement.operands if loads else reversed(statement.operands)
    if not isinstance(registers, Vector):
        raise NotImplementedError(statement.text)
    count = len(registers.parts)
    writes = [writer(o, U32) for o in registers.parts]
    reads = [reader(o, U32) for o in registers.parts]
    addresses = addresses_of(address)

    def run(unit: Unit, mask: Mask) -> None:
        whole_warps(unit, mask)
        if mask is not None:
            raise NotImplementedError("matrices of some of a unit's warps")
        where = addresses(unit).reshape(-1, 32)[:, : 8 * count].reshape(-1)
        # By warp, matrix, row and column; of each row (or column) lane 4 r + q has values 2 q and 2 q + 1.
        if loads:
            matrices = unit.block.shared.load(where, U16, 8).T.reshape(-1, count, 8, 8)
            matrices = matrices.swapaxes(2, 3) if transposed else matrices
            packed = np.ascontiguousarray(matrices).view(U32)
            for matrix, write in enumerate(writes):
                write(unit, mask, packed[:, matrix].reshape(-1))
        else:
            packed = np.stack([read(unit).reshape(-1, 8, 4) for read in reads], axis=1)
            matrices = packed.view(U16).swapaxes(2, 3) if transposed else packed.view(U16)
            unit.block.shared.store(where, matrices.reshape(-1, 8).T)

    return run


@instruction("elect.sync")
def _elect(statement: Statement) -> Meaning:
    first = statement.operands[0]
    write, write_elected = (writer(o, t) for o, t in zip(first.parts, (U32, TYPES["pred"]), strict=True))  # type: ignore

    def run(unit: Unit, mask: Mask) -> None:
        whole_warps(unit, mask)
        write(unit, mask, U32.type(0))
        write_elected(unit, mask, unit.lane == 0)

    return run


@instruction("bar.warp.sync")
def _meet_warp(statement: Statement) -> Meaning:
    return whole_warps


@instruction("fence", "prefetch", "setmaxnreg", "wgmma.fence")
def _nothing(statement: Statement) -> Meaning:
    return lambda unit, mask: None


# Control


@instruction("bra")
def _branch(statement: Statement) -> Meaning:
    return lambda unit, mask: statement.target


@instruction("ret")
def _exit(statement: Statement) -> Meaning:
    return lambda unit, mask: EXIT
