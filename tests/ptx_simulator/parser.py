"""PTX text to statements whose operands are resolved: registers to numbers, labels to places."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_BITS = {"8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}


@dataclass(frozen=True)
class Register:
    """Number ``number`` of a kernel; holds bits, as an unsigned integer or a bool."""

    number: int
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Constant:
    """The bits of a number that the text gives."""

    bits: int


@dataclass(frozen=True)
class Special:
    """A register that can only be read, such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """A parameter or a variable: where it starts in its space."""

    space: str  # "param" | "shared", or "global" | "local", of which none can be accessed
    offset: int


@dataclass(frozen=True)
class Vector:
    """{a, b, ...} or a|b; None is _."""

    parts: tuple[Operand | None, ...]


@dataclass(frozen=True)
class Address:
    """[base + offset], or [base, {coordinates}]."""

    base: Operand
    offset: int = 0
    coordinates: Vector | None = None


@dataclass(frozen=True)
class Negated:
    """!predicate."""

    operand: Operand


Operand = Register | Constant | Special | Symbol | Vector | Address | Negated


@dataclass
class Statement:
    """One instruction."""

    text: str
    opcode: str
    operands: tuple[Operand | None, ...]
    predicate: Register | None = None
    negated: bool = False
    target: int = -1  # of a branch

    @property
    def parts(self) -> list[str]:
        """The opcode's words."""
        return self.opcode.split(".")


@dataclass
class Parameter:
    """Bytes of the parameter space."""

    offset: int
    size: int


@dataclass
class Kernel:
    """An entry: its statements in order, and what it needs."""

    name: str
    parameters: list[Parameter] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    registers: list[np.dtype[Any]] = field(default_factory=list)
    shared_bytes: int = 0  # of static variables


@dataclass
class _Scope:
    names: dict[str, Operand]
    labels: dict[str, int]


def entry_names(text: str) -> list[str]:
    """The kernels of a PTX module."""
    return re.findall(r"\.entry\s+([\w$]+)", text)


def parse(text: str, name: str) -> Kernel:
    """Read one kernel of a PTX module."""
    entry = re.search(rf"\.entry\s+{re.escape(name)}\s*\(", text)
    if entry is None:
        raise KeyError(f"no kernel {name}")
    body = text.index("{", text.index(")", entry.end()))
    return _Parser(Kernel(name)).run(text[: entry.start()], text[entry.end() : body], text[body:])


class _Parser:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.scopes = [_Scope({}, {})]
        self.branches: list[tuple[Statement, str, list[_Scope]]] = []

    def run(self, before: str, parameters: str, body: str) -> Kernel:
        for declaration in re.findall(r"^\.shared\s[^;]*", before, re.MULTILINE):
            if re.search(r"[\w$]+(?=\[)", declaration)[0] in body:  # type: ignore[index]
                self._declare(declaration)
        for constant in re.findall(r"^\.global\s[^;={]*?([\w$]+)\[", before, re.MULTILINE):
            self.scopes[0].names[constant] = Symbol("global", 0)
        self._parameters(parameters)
        for alignment, dynamic in re.findall(r"\.extern\s+\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[\]", before):
            # Starts behind the static variables; a launch says how long it is.
            self.kernel.shared_bytes = -(-self.kernel.shared_bytes // int(alignment)) * int(alignment)
            self.scopes[0].names[dynamic] = Symbol("shared", self.kernel.shared_bytes)
        body = re.sub(r"//[^\n]*", "", body)
        start = 0
        while len(self.scopes) > 1 or start == 0:
            end = body.find(";", start)
            if end < 0:
                break
            self._chunk(body[start:end].strip())
            start = end + 1
        for statement, label, scopes in self.branches:
            statement.target = next(scope.labels[label] for scope in reversed(scopes) if label in scope.labels)
        self.kernel.statements.append(Statement("(end)", "ret", ()))
        return self.kernel

    def _chunk(self, chunk: str) -> None:
        """What is between two semicolons: braces and labels, then one declaration or statement."""
        while chunk:
            if chunk[0] == "{":
                self.scopes.append(_Scope({}, {}))
                chunk = chunk[1:].lstrip()
            elif chunk[0] == "}":
                self.scopes.pop()
                chunk = chunk[1:].lstrip()
                if len(self.scopes) == 1:  # the kernel has ended: what follows is another's
                    return
            elif label := re.match(r"([$\w]+):(?!:)\s*", chunk):
                self.scopes[-1].labels[label[1]] = len(self.kernel.statements)
                chunk = chunk[label.end() :]
            elif skipped := re.match(r"\.(loc|file)\s[^\n]*\n?\s*", chunk):
                chunk = chunk[skipped.end() :]
            else:
                break
        if chunk.startswith(".pragma"):
            return
        if chunk.startswith("."):
            self._declare(chunk)
        elif chunk:
            self._statement(" ".join(chunk.split()))

    def _declare(self, text: str) -> None:
        names = self.scopes[-1].names
        if registers := re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL):
            kind = registers[1]
            dtype = np.dtype(bool if kind == "pred" else _BITS[kind.lstrip("busf")])
            for name in registers[2].split(","):
                many = re.fullmatch(r"(\S+)<(\d+)>", name.strip())
                for each in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]:
                    names[each] = Register(len(self.kernel.registers), dtype)
                    self.kernel.registers.append(dtype)
        elif shared := re.match(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", text):
            alignment = int(shared[1])
            offset = -(-self.kernel.shared_bytes // alignment) * alignment
            names[shared[2]] = Symbol("shared", offset)
            self.kernel.shared_bytes = offset + int(shared[3])
        elif local := re.match(r"\.local\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\d+\]", text):
            names[local[1]] = Symbol("local", 0)
        else:
            raise NotImplementedError(text)

    def _parameters(self, text: str) -> None:
        end = 0
        for declaration in re.findall(r"\.param\s+([^,)]*)", text):
            words = declaration.split()
            array = re.fullmatch(r"([\w$]+)\[(\d+)\]", words[-1])
            if array:
                alignment, size = int(words[words.index(".align") + 1]), int(array[2])
            else:
                alignment = size = int(re.search(r"\d+", words[0])[0]) // 8  # type: ignore[index]
            offset = -(-end // alignment) * alignment
            end = offset + size
            self.kernel.parameters.append(Parameter(offset, size))
            self.scopes[0].names[array[1] if array else words[-1]] = Symbol("param", offset)

    def _statement(self, text: str) -> None:
        match = re.fullmatch(r"(?:@(!?)(\S+)\s+)?([a-z][\w.:]*)\s*(.*)", text)
        if match is None:
            raise NotImplementedError(text)
        opcode, operands = match[3], _split(match[4])
        predicate = self._lookup(match[2]) if match[2] else None
        branch = opcode.split(".")[0] == "bra"
        parsed = () if branch else tuple(self._operand(o) for o in operands)
        statement = Statement(text, opcode, parsed, predicate, match[1] == "!")  # type: ignore[arg-type]
        if branch:
            self.branches.append((statement, operands[0], list(self.scopes)))
        self.kernel.statements.append(statement)

    def _lookup(self, name: str) -> Operand:
        for scope in reversed(self.scopes):
            if name in scope.names:
                return scope.names[name]
        if name.startswith("%"):
            return Special(name)
        raise KeyError(name)

    def _operand(self, text: str) -> Operand | None:
        if text == "_":
            return None
        if text[0] == "{":
            return Vector(tuple(self._operand(part) for part in _split(text[1:-1])))
        if text[0] == "[":
            parts = _split(text[1:-1])
            if len(parts) == 2:
                base, coordinates = self._operand(parts[0]), self._operand(parts[1])
                return Address(base, 0, coordinates)  # type: ignore[arg-type]
            match = re.fullmatch(r"([^+]+?)\s*(?:\+\s*(-?\d+))?", parts[0])
            return Address(self._operand(match[1]), int(match[2] or 0))  # type: ignore[arg-type,index]
        if "|" in text:
            return Vector(tuple(self._operand(part) for part in text.split("|")))
        if text[0] == "!":
            return Negated(self._lookup(text[1:].strip()))
        if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", text):
            return Constant(int(text[2:], 16))
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return Constant(int(text.rstrip("U"), 0))
        return self._lookup(text)


def _split(text: str) -> list[str]:
    """Operands at the commas that no bracket encloses."""
    parts, depth, start = [], 0, 0
    for place, character in enumerate(text):
        if character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:place].strip())
            start = place + 1
    return [*parts, text[start:].strip()] if text else []
