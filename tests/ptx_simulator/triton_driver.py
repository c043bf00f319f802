"""A driver for Triton that says it has an sm_90: what its launches compile runs on the simulator."""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from tests.ptx_simulator.machine import Launch, Order, Program, Run
from tests.ptx_simulator.memory import Memory
from tests.ptx_simulator.parser import parse
from tests.ptx_simulator.runtime import FOLDER, extent

_FORMATS = {"i32": "<i", "i64": "<q", "fp32": "<f"}


class Driver:
    """What Triton asks of a driver, on CPU tensors.

    Attributes:
        order: see :class:`Order`, for the launches to come.
        execute: whether launches are executed, or only compiled.
        edit: what is done to PTX before it is read.
        compiled: how often each kernel has been compiled.
        launches: how often each kernel has been launched.
    """

    def __init__(self) -> None:
        self.order = Order(warps=4)
        self.execute = True
        self.edit: Callable[[str], str] = lambda text: text
        self.compiled: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.programs: dict[Path, Program] = {}
        self.utils = self
        self._ptx = Path()

    def activate(self) -> None:
        """Become Triton's driver for this process."""
        os.environ["TRITON_CACHE_DIR"] = str(FOLDER / "triton")
        triton.runtime.driver.set_active(self)
        triton.knobs.runtime.kernel_load_start_hook = self._on_load
        triton.knobs.runtime.jit_post_compile_hook = self._on_compile

    def _on_compile(self, *, fn: Any, **_: Any) -> None:
        self.compiled[fn.name.rsplit(".", 1)[-1]] += 1

    def _on_load(self, module: Any, function: Any, name: str, files: dict[str, str], key: str) -> None:
        self._ptx = Path(files[f"{name}.ptx"])

    def get_current_device(self) -> int:
        """See Triton, here and below."""
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, Path, int, int, int]:
        """A handle, which is the PTX's file, and what the assembler would know: registers, spills, most threads."""
        return object(), self._ptx, 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What launches a kernel that was compiled from ``source``."""
        types = list(source.signature.values())

        def launch(x: int, y: int, z: int, stream: int, file: Path, *more: Any) -> None:
            # First metadata and hooks, then the arguments, of which constants are no part of the kernel's.
            given = [(t, a) for t, a in zip(types, more[4:], strict=True) if t != "constexpr"]
            self.launches[metadata.name] += 1
            if not self.execute:
                return
            if file not in self.programs:
                self.programs[file] = Program(parse(self.edit(file.read_text()), metadata.name))
            kernel = self.programs[file].kernel
            memory = Memory()
            for address, (size, name) in {a.data_ptr(): extent(a) for t, a in given if t[0] == "*"}.items():
                if size:
                    memory.add_host(address, size, name, writable=True)
            parameters = bytearray()
            # Behind the function's own parameters come addresses of scratch memory, which no kernel here has.
            for parameter, (kind, value) in zip(kernel.parameters, given):  # noqa: B905
                bits = struct.pack("<Q", value.data_ptr()) if kind[0] == "*" else struct.pack(_FORMATS[kind], value)
                parameters = parameters.ljust(parameter.offset, b"\0") + bits
            last = kernel.parameters[-1]
            parameters = parameters.ljust(last.offset + last.size, b"\0")
            block = (32 * metadata.num_warps, 1, 1)
            run = Launch(kernel, bytes(parameters), (x, y, z), block, (metadata.num_ctas, 1, 1), metadata.shared)
            Run(self.programs[file], run, memory, self.order).execute()

        return launch
