"""Compiles a launch for a GPU without having one, and reads its registers, local memory, shared memory and PTX.

`compile_launch` runs Triton's own compiler, including the specialisation of arguments, up to the machine code for an
architecture. `resources` reads what that code uses with cuobjdump, which is part of the triton package. Triton's disk
cache keeps compiled code, so a second run takes seconds. Local memory means spills: no kernel here has local arrays.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from focalnet.kernels.plan import SHARED_BYTES
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses. Bytes, but for ``registers`` (of 4 bytes, a thread)."""

    kernel: str
    arch: int
    registers: int
    local: int
    shared: int
    code: int
    threads: int

    def why_not(self) -> str | None:
        if self.local:
            return f"it spills: {self.local} bytes of local memory a thread"
        if self.shared > SHARED_BYTES[self.arch]:
            return f"it wants {self.shared} bytes of shared memory, sm_{self.arch} has {SHARED_BYTES[self.arch]}"
        return None


class Pointer:
    """Stands for a tensor of which only the dtype and the alignment of its address matter."""

    def __init__(self, dtype: torch.dtype, alignment: int = 16) -> None:
        self.dtype, self._alignment = dtype, alignment

    def data_ptr(self) -> int:
        return self._alignment


class _Driver:
    """What Triton's JIT asks a driver, answered for a GPU that is not there. Its device number is the architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def compile_launch(kernel, arguments: dict, options: dict, arch: int):
    """The kernel compiled as ``kernel[grid](**arguments, **options)`` would be on ``arch`` (80, 90, ...).

    ``arguments`` holds `Pointer`s or tensors, numbers, and what the kernel declares constexpr; ``options`` num_warps
    and num_stages. The returned object has ``asm["ptx"]`` and ``asm["cubin"]``.
    """
    with target_of(arch):
        return kernel.warmup(**arguments, **options, grid=(1,))


@contextlib.contextmanager
def target_of(arch: int) -> Iterator[None]:
    """Triton compiles for ``arch``, whatever GPU is here or none."""
    # reset_active() would look for a GPU.
    before, driver._active = driver._active, _Driver(arch)
    try:
        yield
    finally:
        driver._active = before


def resources(compiled, arch: int) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        found = subprocess.run(
            [tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    uses = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", found.stdout))
    return Resources(
        kernel=compiled.metadata.name,
        arch=arch,
        registers=int(uses["REG"]),
        local=int(uses["STACK"]) + int(uses["LOCAL"]),
        shared=int(uses["SHARED"]) + compiled.metadata.shared,
        code=len(compiled.asm["cubin"]),
        threads=32 * compiled.metadata.num_warps,
    )


def tool(name: str) -> Path:
    """Path of a program that comes with the triton package."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
